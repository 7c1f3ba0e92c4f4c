//! The two halves of a round: what the library wants sent and written, and, when that is on disk,
//! what it lets go and what is committed.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

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
use crate::wire::{ENTRY_BYTES, Entry, Message, Snapshot};

impl Group {
    pub(crate) fn busy(&self) -> bool {
        self.dirty
            && (self.raw.has_ready() || !self.backlog.is_empty() || self.compaction.is_some())
    }

    /// First half of a round: what to send at once, what to write. What is committed is in the log
    /// here and at a majority: it is applied before the write, and who waits for it is answered.
    pub(crate) fn collect(
        &mut self,
        settings: &Settings,
        counter: &mut u64,
        out: &mut Vec<Message>,
        batches: &mut VecDeque<Batch>,
    ) -> Option<Write> {
        self.dirty = false;
        self.ask_reads(settings, counter);
        let mut write = self.compaction.take();
        if !self.raw.has_ready() {
            let changes = has_configuration_change(&self.backlog);
            if !changes {
                self.apply_backlog(settings, batches);
            }
            if write.is_none() && !changes {
                return None;
            }
            let mut write = write.unwrap_or_else(|| self.empty_write());
            write.change.hard_state = self.raw.store().hard_state;
            return Some(write);
        }
        let mut ready = self.raw.ready();
        self.note_told(ready.messages());
        send(ready.take_messages(), out);
        self.backlog.extend(ready.take_committed_entries());
        // The commit index that covers one is on the disk before it is in force.
        let changes = has_configuration_change(&self.backlog);
        let mut must_write = changes || ready.must_sync();
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
        if !changes && snapshot.is_none() {
            self.apply_backlog(settings, batches);
        }
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

    /// Entries of this run once more, for a log whose old part is to go: until there are so many
    /// `bytes` of them. Between rounds only.
    pub(crate) fn written_again(
        &self,
        run: RangeInclusive<u64>,
        portion: usize,
        bytes: &mut usize,
    ) -> Write {
        let mut write = self.empty_write();
        for entry in self.raw.store().run(run) {
            write.change.entries.push(Entry::from_raft(entry));
            *bytes += entry.data.len() + ENTRY_BYTES;
            if *bytes >= portion {
                break;
            }
        }
        write
    }

    /// Second half of a round, after the write is on disk: what was promised may be sent, what had
    /// to wait for the write is applied.
    pub(crate) fn complete(
        &mut self,
        settings: &Settings,
        compact_after: u64,
        out: &mut Vec<Message>,
        batches: &mut VecDeque<Batch>,
    ) {
        let (mut installed, mut later) = (None, Vec::new());
        if let Some(mut ready) = self.ready.take() {
            send(ready.take_persisted_messages(), out);
            if !ready.snapshot().is_empty() {
                Counters::add(&settings.counters.snapshots_installed, 1);
                self.install(ready.snapshot(), batches);
                installed = Some(ready.snapshot().get_metadata().index);
                self.backlog.clear();
            }
            for state in ready.take_read_states() {
                self.reads.confirm(&state.request_ctx, state.index);
            }
            let mut light = self.raw.advance_append(ready);
            self.note_told(light.messages());
            send(light.take_messages(), out);
            if let Some(commit) = light.commit_index() {
                self.raw.mut_store().hard_state.commit = commit;
            }
            later = light.take_committed_entries();
            self.dirty = true;
        }
        self.apply_backlog(settings, batches);
        self.backlog = later;
        self.expected = None;
        self.note_untold();
        let last = self.applied_to.take().or(installed);
        if let Some(last) = last {
            self.raw.advance_apply_to(last);
            self.after_change(settings);
        }
        self.snapshot_wanted |= self.raw.store().take_snapshot_asked();
        if last.is_some() || self.snapshot_wanted {
            self.compact(settings, compact_after);
        }
        let applied = self.machine.read().applied;
        self.reads.release(applied);
    }

    fn apply_backlog(&mut self, settings: &Settings, batches: &mut VecDeque<Batch>) {
        let committed = std::mem::take(&mut self.backlog);
        Counters::add(&settings.counters.applied, committed.len() as u64);
        for entry in committed {
            self.applied_to = Some(entry.index);
            self.apply(entry, batches);
        }
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

    /// As leader: notes whom to tell what is committed, unless the next entries will. The library
    /// would send an empty append at once, and each is answered at once; a heartbeat says the same,
    /// may wait for a frame that goes anyway (see `Core::untold`), and so may its answer. One that is
    /// lost is made good by the next heartbeat.
    fn note_untold(&mut self) {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader || raft.raft_log.committed < raft.raft_log.last_index() {
            return;
        }
        let mut untold = Vec::new();
        for (id, progress) in raft.prs().iter().filter(|(id, _)| **id != raft.id) {
            if let Some(commit) = self.tellable(*id, progress) {
                let all = commit == raft.raft_log.committed;
                untold.push((*id, all && self.askers.remove(id)));
            }
        }
        self.untold = untold;
    }

    /// Up to where a replica may be told that its log is committed, when it does not know.
    fn tellable(&self, id: u64, progress: &raft::Progress) -> Option<u64> {
        let known = progress.matched.min(self.raw.raft.raft_log.committed);
        (known > self.told.get(&id).copied().unwrap_or(0)).then_some(known)
    }

    /// As leader: what a replica is to be told, when it still is.
    pub(crate) fn tell(&mut self, to: u64) -> Option<Message> {
        let raft = &self.raw.raft;
        let progress = raft.prs().get(to)?;
        let commit = self
            .tellable(to, progress)
            .filter(|_| raft.state == StateRole::Leader)?;
        let mut message = pb::Message::default();
        message.set_msg_type(pb::MessageType::MsgHeartbeat);
        message.from = raft.id;
        message.to = to;
        message.term = raft.term;
        message.commit = commit;
        self.told.insert(to, commit);
        Message::from_raft(&message)
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
