//! Who waits until everything committed before is here, and who closes a group's stamps: both by
//! `ReadIndex` (Ongaro 2014, §6.4).

use std::collections::BTreeMap;

use tokio::sync::oneshot;

use super::Group;
use crate::core::Settings;
use crate::planted::{self, Bug};

/// Reads that wait at one group at most; more are turned away.
const READS_MAX: usize = 4096;
/// Ticks after which an unanswered read is asked again under a new context.
const READ_RETRY_TICKS: u64 = 3;

/// Who waits until a majority has confirmed that this replica's leader still leads.
#[derive(Debug)]
enum Reader {
    /// Reads when everything committed before is applied.
    Read(oneshot::Sender<()>),
    /// Closed the stamps up to some moment, as leader in a term with a log up to `last`: a majority
    /// knows of it if the leader is still the same.
    Close {
        term: u64,
        last: u64,
        reply: oneshot::Sender<u64>,
    },
}

impl Reader {
    fn is_gone(&self) -> bool {
        match self {
            Self::Read(reply) => reply.is_closed(),
            Self::Close { reply, .. } => reply.is_closed(),
        }
    }

    fn answer(self, now: u64) {
        match self {
            Self::Read(reply) => {
                let _ = reply.send(());
            }
            Self::Close { term, last, reply } if term == now => {
                let _ = reply.send(last);
            }
            Self::Close { .. } => {}
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Reads {
    /// Not yet asked.
    queued: Vec<Reader>,
    /// Asked under a context at a tick.
    asked: BTreeMap<Vec<u8>, (u64, Vec<Reader>)>,
    /// Confirmed, waiting until the index is applied.
    confirmed: Vec<(u64, Vec<Reader>)>,
    /// To be answered when the changes were told to those who watch.
    done: Vec<Reader>,
}

impl Reads {
    pub(super) fn is_empty(&self) -> bool {
        self.queued.is_empty() && self.asked.is_empty() && self.confirmed.is_empty()
    }

    /// A majority has confirmed what was asked under `context`, for everything up to `index`.
    pub(super) fn confirm(&mut self, context: &[u8], index: u64) {
        if let Some((_, waiters)) = self.asked.remove(context) {
            self.confirmed.push((index, waiters));
        }
    }

    /// The map has everything up to `applied`.
    pub(super) fn release(&mut self, applied: u64) {
        let (done, waiting) = std::mem::take(&mut self.confirmed)
            .into_iter()
            .partition(|(index, _)| *index <= applied || planted::has(Bug::ReadBeforeApplied));
        self.confirmed = waiting;
        let done: Vec<(u64, Vec<Reader>)> = done;
        let done = done.into_iter().flat_map(|(_, readers)| readers);
        self.done.extend(done);
    }

    fn waiting(&self) -> usize {
        let asked = self.asked.values().map(|(_, readers)| readers.len());
        let confirmed = self.confirmed.iter().map(|(_, readers)| readers.len());
        self.queued.len() + asked.sum::<usize>() + confirmed.sum::<usize>()
    }
}

impl Group {
    pub(crate) fn read(&mut self, waiter: oneshot::Sender<()>) {
        self.dirty = true;
        if planted::has(Bug::ReadWithoutQuorum) && self.leads() {
            let _ = waiter.send(());
            return;
        }
        self.ask(Reader::Read(waiter));
    }

    /// As leader, when the node's clock has just been set: tells the index of the log up to which
    /// all stamps are that the clock has passed, as soon as it is certain that no other leader will
    /// give one of them. A majority has seen the clock then, and whoever is elected hears of it
    /// from one of them. The commit index would not do: what is not committed yet has its stamp.
    pub(crate) fn close(&mut self, reply: oneshot::Sender<u64>) {
        self.dirty = true;
        let raft = &self.raw.raft;
        let log = &raft.raft_log;
        let last = if planted::has(Bug::ClosedAtCommit) {
            log.committed
        } else {
            log.last_index()
        };
        let term = raft.term;
        if self.is_leader() {
            self.ask(Reader::Close { term, last, reply });
        }
    }

    /// Answers when the log is applied up to `index`.
    pub(crate) fn await_applied(&mut self, index: u64, waiter: oneshot::Sender<()>) {
        self.dirty = true;
        if self.reads.waiting() < READS_MAX {
            self.reads
                .confirmed
                .push((index, vec![Reader::Read(waiter)]));
        }
    }

    fn ask(&mut self, reader: Reader) {
        if self.reads.waiting() < READS_MAX {
            // A sleeping leader answers heartbeats only while it sends them; a follower's time
            // must run for the read to be asked again.
            self.awaken(0);
            self.active_at = self.ticks;
            self.reads.queued.push(reader);
        }
    }

    /// Asks for all queued reads at once, under a context that was never used before.
    pub(super) fn ask_reads(&mut self, settings: &Settings, counter: &mut u64) {
        if self.reads.queued.is_empty() {
            return;
        }
        let can_ask = if self.is_leader() {
            self.raw.raft.commit_to_current_term()
        } else {
            self.leader().is_some()
        };
        if !can_ask {
            self.reads.queued.retain(|reader| !reader.is_gone());
            return;
        }
        if !planted::has(Bug::ReusedReadContext) {
            *counter += 1;
        }
        let mut context = settings.boot_nonce.to_le_bytes().to_vec();
        context.extend_from_slice(&counter.to_le_bytes());
        let waiters = std::mem::take(&mut self.reads.queued);
        let asked = self.reads.asked.entry(context.clone());
        asked.or_insert((self.ticks, Vec::new())).1.extend(waiters);
        self.raw.read_index(context);
    }

    pub(super) fn after_tick_reads(&mut self) {
        let ticks = self.ticks;
        for (_, readers) in &mut self.reads.confirmed {
            readers.retain(|reader| !reader.is_gone());
        }
        self.reads
            .confirmed
            .retain(|(_, readers)| !readers.is_empty());
        let late: Vec<Vec<u8>> = self
            .reads
            .asked
            .iter()
            .filter(|(_, (asked, _))| ticks.saturating_sub(*asked) >= READ_RETRY_TICKS)
            .map(|(context, _)| context.clone())
            .collect();
        for context in late {
            if let Some((_, waiters)) = self.reads.asked.remove(&context) {
                self.reads
                    .queued
                    .extend(waiters.into_iter().filter(|waiter| !waiter.is_gone()));
            }
        }
    }

    /// To be called when the changes of the round were told to those who watch.
    pub(crate) fn answer_reads(&mut self) {
        let term = self.raw.raft.term;
        for reader in self.reads.done.drain(..) {
            reader.answer(term);
        }
    }
}
