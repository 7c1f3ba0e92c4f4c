//! The two halves of a round: what the library wants sent and written, and, when that is on disk,
//! what it lets go and what is committed.

use std::collections::VecDeque;

use raft::StateRole;
use raft::eraftpb as pb;
use tracing::error;

use super::{Group, Outcome};
use crate::core::{Batch, Settings};
use crate::disk::{Change as LogChange, Write};
use crate::inspect::Counters;
use crate::log::HardState;
use crate::machine::LogEntry;
use crate::planted::{self, Bug};
use crate::wire::{Entry, Message, Snapshot};

impl Group {
    pub(crate) fn busy(&self) -> bool {
        self.dirty
            && (self.raw.has_ready() || !self.backlog.is_empty() || self.compaction.is_some())
    }

    /// First half of a round: what to send at once, what to write.
    pub(crate) fn collect(
        &mut self,
        settings: &Settings,
        counter: &mut u64,
        out: &mut Vec<Message>,
    ) -> Option<Write> {
        self.dirty = false;
        self.ask_reads(settings, counter);
        let mut write = self.compaction.take();
        if !self.raw.has_ready() {
            if write.is_none() && !has_configuration_change(&self.backlog) {
                return None;
            }
            let mut write = write.unwrap_or_else(|| self.empty_write());
            write.change.hard_state = self.raw.store().hard_state;
            return Some(write);
        }
        let mut ready = self.raw.ready();
        self.note_told(ready.messages());
        send(ready.take_messages(), out);
        let mut must_write = has_configuration_change(&self.backlog)
            || has_configuration_change(ready.committed_entries())
            || ready.must_sync();
        if planted::has(Bug::TermNotWritten) && ready.entries().is_empty() {
            must_write = false;
        }
        if let Some(state) = ready.hs() {
            self.raw.mut_store().hard_state = HardState {
                term: state.term,
                vote: state.vote,
                commit: state.commit,
            };
        }
        let mut truncate_from = None;
        let mut snapshot = None;
        if !ready.snapshot().is_empty() {
            let installed = Snapshot::from_raft(ready.snapshot());
            self.raw.mut_store().install(installed.clone());
            truncate_from = Some(0);
            snapshot = Some(installed);
            must_write = true;
        }
        let entries = ready.take_entries();
        if let Some(first) = entries.first() {
            if snapshot.is_none() && first.index <= self.raw.store().last() {
                truncate_from =
                    Some(first.index).filter(|_| !planted::has(Bug::TruncationNotWritten));
            }
            must_write = true;
        }
        let records = entries.iter().map(Entry::from_raft).collect();
        self.raw.mut_store().append(entries);
        self.ready = Some(ready);
        if !must_write && write.is_none() {
            return None;
        }
        let mut write = write.take().unwrap_or_else(|| self.empty_write());
        if snapshot.is_some() {
            write.snapshot = snapshot;
        }
        write.change = LogChange {
            group: self.id,
            truncate_from,
            entries: records,
            hard_state: self.raw.store().hard_state,
            start: self.raw.store().start(),
        };
        if planted::has(Bug::VoteNotWritten) {
            write.change.hard_state.vote = 0;
        }
        Some(write)
    }

    pub(super) fn empty_write(&self) -> Write {
        Write {
            change: LogChange {
                group: self.id,
                truncate_from: None,
                entries: Vec::new(),
                hard_state: self.raw.store().hard_state,
                start: self.raw.store().start(),
            },
            snapshot: None,
        }
    }

    /// All entries once more, for a log whose old part is to go. Between rounds only.
    pub(crate) fn written_again(&self) -> Write {
        let mut write = self.empty_write();
        write.change.entries = self.raw.store().entries().map(Entry::from_raft).collect();
        write
    }

    /// Second half of a round, after the write is on disk: what was promised may be sent, what is
    /// committed is applied.
    pub(crate) fn complete(
        &mut self,
        settings: &Settings,
        out: &mut Vec<Message>,
        batches: &mut VecDeque<Batch>,
    ) {
        let mut committed = std::mem::take(&mut self.backlog);
        let mut installed = None;
        if let Some(mut ready) = self.ready.take() {
            send(ready.take_persisted_messages(), out);
            if !ready.snapshot().is_empty() {
                Counters::add(&settings.counters.snapshots_installed, 1);
                self.install(ready.snapshot(), batches);
                installed = Some(ready.snapshot().get_metadata().index);
                committed.clear();
            }
            for state in ready.take_read_states() {
                self.reads.confirm(&state.request_ctx, state.index);
            }
            committed.extend(ready.take_committed_entries());
            let mut light = self.raw.advance_append(ready);
            self.note_told(light.messages());
            send(light.take_messages(), out);
            if let Some(commit) = light.commit_index() {
                self.raw.mut_store().hard_state.commit = commit;
            }
            self.backlog = light.take_committed_entries();
            self.dirty = true;
        }
        self.expected = None;
        self.tell_commit(out);
        let last = committed.last().map(|entry| entry.index).or(installed);
        Counters::add(&settings.counters.applied, committed.len() as u64);
        for entry in committed {
            self.apply(entry, batches);
        }
        if let Some(last) = last {
            self.raw.advance_apply_to(last);
            self.after_change(settings);
        }
        self.snapshot_wanted |= self.raw.store().take_snapshot_asked();
        if last.is_some() || self.snapshot_wanted {
            self.compact(settings);
        }
        let applied = self.machine.read().applied;
        self.reads.release(applied);
    }

    fn note_told(&mut self, messages: &[pb::Message]) {
        for message in messages {
            if message.get_msg_type() == pb::MessageType::MsgAppend {
                let reaches = message.index + message.entries.len() as u64;
                let told = self.told.entry(message.to).or_default();
                *told = message.commit.min(reaches).max(*told);
            }
        }
    }

    /// As leader: tells the others what is committed, unless the next entries will. The library
    /// would send an empty append instead, and each is answered at once; the answer to a heartbeat
    /// waits for a frame that goes anyway. One that is lost is made good by the next heartbeat.
    fn tell_commit(&mut self, out: &mut Vec<Message>) {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader || raft.raft_log.committed < raft.raft_log.last_index() {
            return;
        }
        let committed = raft.raft_log.committed;
        for (id, progress) in raft.prs().iter().filter(|(id, _)| **id != raft.id) {
            let known = progress.matched.min(committed);
            let told = self.told.entry(*id).or_default();
            if known <= *told {
                continue;
            }
            *told = known;
            let mut message = pb::Message::default();
            message.set_msg_type(pb::MessageType::MsgHeartbeat);
            message.from = raft.id;
            message.to = *id;
            message.term = raft.term;
            message.commit = known;
            out.extend(Message::from_raft(&message));
            self.telling.push(*id);
        }
    }

    fn apply(&mut self, entry: pb::Entry, batches: &mut VecDeque<Batch>) {
        if entry.get_entry_type() != pb::EntryType::EntryNormal {
            self.apply_configuration(&entry);
            self.machine.write().skip(entry.index);
            return;
        }
        if entry.data.is_empty() {
            self.machine.write().skip(entry.index);
            return;
        }
        let decoded = match LogEntry::decode(&entry.data) {
            Ok(decoded) => decoded,
            Err(error) => {
                // Every replica reads the same bytes, so every replica skips it.
                error!(group = %self.id, index = entry.index, %error, "a log entry is not readable and has no effect");
                self.machine.write().skip(entry.index);
                return;
            }
        };
        let request = decoded.command.request;
        let (answer, changes, before, revision) = {
            let mut machine = self.machine.write();
            let before = machine.last_stamp;
            let (answer, changes) = machine.apply(entry.term, entry.index, decoded);
            (answer, changes, before, machine.last_stamp)
        };
        // Also when it only checked: who reads up to this revision waits for it.
        if revision > before {
            batches.push_back(Batch {
                group: self.id,
                revision,
                reset: false,
                changes: changes.into(),
            });
        }
        if let Some(waiters) = self.proposals.remove(&request) {
            let result = self.to_result(answer);
            for waiter in waiters {
                let _ = waiter.send(Outcome::Done(result.clone()));
            }
        }
    }
}

fn has_configuration_change(entries: &[pb::Entry]) -> bool {
    entries
        .iter()
        .any(|entry| entry.get_entry_type() != pb::EntryType::EntryNormal)
}

fn send(messages: impl IntoIterator<Item = pb::Message>, out: &mut Vec<Message>) {
    out.extend(messages.into_iter().filter_map(|m| Message::from_raft(&m)));
}
