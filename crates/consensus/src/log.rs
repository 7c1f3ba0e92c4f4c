//! The Raft log of one group in memory, as the library reads it; [`crate::disk`] has it on disk.

use std::collections::VecDeque;
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};

use raft::eraftpb as pb;
use raft::{GetEntriesContext, RaftState, StorageError};

use crate::wire::{Configuration, ENTRY_BYTES, Entry, Snapshot};

/// Term, vote and commit index: what must survive a restart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct HardState {
    pub(crate) term: u64,
    pub(crate) vote: u64,
    pub(crate) commit: u64,
}

/// One group's log: a snapshot and the entries around and after it.
#[derive(Debug)]
pub(crate) struct GroupLog {
    pub(crate) hard_state: HardState,
    pub(crate) snapshot: Option<Snapshot>,
    /// Index and term of the entry before the first one kept.
    start: (u64, u64),
    entries: VecDeque<pb::Entry>,
    bytes: usize,
    /// What of `bytes` the newest snapshot made here covers.
    covered_bytes: usize,
    /// A snapshot was asked for that is not there: it does not know the replica that needs it.
    snapshot_asked: AtomicBool,
}

impl GroupLog {
    pub(crate) fn new(
        hard_state: HardState,
        snapshot: Option<Snapshot>,
        start: (u64, u64),
        entries: impl IntoIterator<Item = Entry>,
    ) -> Self {
        let mut log = Self {
            hard_state,
            snapshot,
            start,
            entries: VecDeque::new(),
            bytes: 0,
            covered_bytes: 0,
            snapshot_asked: AtomicBool::new(false),
        };
        let covered = log.snapshot_index();
        for entry in entries {
            let index = entry.index;
            log.push(entry.into_raft());
            if index <= covered {
                log.covered_bytes = log.bytes;
            }
        }
        log
    }

    pub(crate) fn first(&self) -> u64 {
        self.start.0 + 1
    }

    pub(crate) fn last(&self) -> u64 {
        self.start.0 + self.entries.len() as u64
    }

    pub(crate) const fn start(&self) -> (u64, u64) {
        self.start
    }

    /// The entries kept, in order.
    #[cfg(test)]
    pub(crate) fn entries(&self) -> impl Iterator<Item = &pb::Entry> {
        self.entries.iter()
    }

    /// Those of these entries that are kept, in order.
    pub(crate) fn run(&self, indices: RangeInclusive<u64>) -> impl Iterator<Item = &pb::Entry> {
        let skipped = indices.start().saturating_sub(self.first());
        let rest = self.entries.iter().skip(skipped as usize);
        rest.take_while(move |entry| entry.index <= *indices.end())
    }

    pub(crate) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// What the entries take on the disk, roughly.
    pub(crate) fn size(&self) -> usize {
        self.bytes + self.entries.len() * ENTRY_BYTES
    }

    /// Bytes of the entries after the newest snapshot made here.
    pub(crate) const fn bytes_since(&self) -> usize {
        self.bytes.saturating_sub(self.covered_bytes)
    }

    pub(crate) fn snapshot_index(&self) -> u64 {
        self.snapshot.as_ref().map_or(0, |snapshot| snapshot.index)
    }

    /// Whether a replica with this id may start from the snapshot.
    pub(crate) fn snapshot_knows(&self, id: u64) -> bool {
        self.snapshot.as_ref().is_some_and(|snapshot| {
            let configuration = &snapshot.configuration;
            configuration.voters.contains(&id) || configuration.learners.contains(&id)
        })
    }

    /// Whether another snapshot was needed since this was last asked.
    pub(crate) fn take_snapshot_asked(&self) -> bool {
        self.snapshot_asked.swap(false, Ordering::Relaxed)
    }

    fn push(&mut self, entry: pb::Entry) {
        self.bytes += entry.data.len();
        self.entries.push_back(entry);
    }

    /// Appends, replacing what is at the same indices and after.
    pub(crate) fn append(&mut self, entries: Vec<pb::Entry>) {
        let Some(first) = entries.first().map(|entry| entry.index) else {
            return;
        };
        while self.last() >= first {
            let Some(entry) = self.entries.pop_back() else {
                break;
            };
            self.bytes -= entry.data.len();
        }
        for entry in entries {
            self.push(entry);
        }
    }

    /// Replaces everything by a snapshot.
    pub(crate) fn install(&mut self, snapshot: Snapshot) {
        self.start = (snapshot.index, snapshot.term);
        self.entries.clear();
        (self.bytes, self.covered_bytes) = (0, 0);
        self.hard_state.commit = self.hard_state.commit.max(snapshot.index);
        self.hard_state.term = self.hard_state.term.max(snapshot.term);
        self.snapshot = Some(snapshot);
    }

    /// Puts a snapshot of what is here in force. Of the entries before it the last `kept` stay, as
    /// far as the log does not have more than `bytes` then.
    pub(crate) fn compact(&mut self, snapshot: Snapshot, kept: u64, bytes: usize) {
        let (covered, index) = (snapshot.index, snapshot.index.saturating_sub(kept));
        self.snapshot = Some(snapshot);
        while self.start.0 < index || (self.start.0 < covered && self.bytes > bytes) {
            let Some(entry) = self.entries.pop_front() else {
                break;
            };
            self.bytes -= entry.data.len();
            self.start = (entry.index, entry.term);
        }
        self.covered_bytes = self.bytes;
    }
}

impl raft::Storage for GroupLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let mut hard_state = pb::HardState::default();
        hard_state.term = self.hard_state.term;
        hard_state.vote = self.hard_state.vote;
        hard_state.commit = self.hard_state.commit;
        Ok(RaftState {
            hard_state,
            // Changes after the snapshot are applied again from the log: the commit index that
            // covers a change is on disk before the change is in force.
            conf_state: self
                .snapshot
                .as_ref()
                .map_or_else(Configuration::default, |snapshot| {
                    snapshot.configuration.clone()
                })
                .to_raft(),
        })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<pb::Entry>> {
        if low < self.first() {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last() + 1 {
            return Err(StorageError::Unavailable.into());
        }
        let limit = max_size.into().unwrap_or(u64::MAX);
        let mut size = 0_u64;
        let mut result = Vec::new();
        let from = (low - self.first()) as usize;
        for entry in self.entries.iter().skip(from).take((high - low) as usize) {
            size = size.saturating_add(entry.data.len() as u64 + 32);
            if size > limit && !result.is_empty() {
                break;
            }
            result.push(entry.clone());
        }
        Ok(result)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.start.0 {
            return Ok(self.start.1);
        }
        if let Some(snapshot) = &self.snapshot
            && snapshot.index == index
        {
            return Ok(snapshot.term);
        }
        if index < self.start.0 {
            return Err(StorageError::Compacted.into());
        }
        self.entries
            .get((index - self.first()) as usize)
            .map(|entry| entry.term)
            .ok_or_else(|| StorageError::Unavailable.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<pb::Snapshot> {
        match &self.snapshot {
            Some(snapshot) if snapshot.index >= request_index && self.snapshot_knows(to) => {
                Ok(snapshot.clone().into_raft())
            }
            _ => {
                self.snapshot_asked.store(true, Ordering::Relaxed);
                Err(StorageError::SnapshotTemporarilyUnavailable.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::wire::EntryKind;

    fn entries(indices: std::ops::RangeInclusive<u64>) -> Vec<Entry> {
        indices
            .map(|index| Entry {
                kind: EntryKind::Normal,
                term: 1,
                index,
                data: Bytes::from_static(&[7; 100]),
                context: Bytes::new(),
            })
            .collect()
    }

    #[test]
    fn entries_before_a_snapshot_are_kept_by_number_and_bytes() {
        let snapshot = |index| Snapshot {
            index,
            term: 1,
            configuration: Configuration::default(),
            data: Bytes::new(),
        };
        let mut log = GroupLog::new(HardState::default(), None, (0, 0), entries(1..=20));
        log.compact(snapshot(20), 10, 10_000);
        assert_eq!((log.first(), log.bytes(), log.bytes_since()), (11, 1000, 0));
        log.append(entries(21..=30).into_iter().map(Entry::into_raft).collect());
        assert_eq!(log.bytes_since(), 1000);
        // Of what is read back, the same is new.
        let read = |log: &GroupLog| log.entries().map(Entry::from_raft).collect::<Vec<_>>();
        let again = GroupLog::new(
            log.hard_state,
            log.snapshot.clone(),
            log.start(),
            read(&log),
        );
        assert_eq!((again.bytes(), again.bytes_since()), (2000, 1000));
        log.compact(snapshot(30), 10, 500);
        assert_eq!((log.first(), log.last(), log.bytes()), (26, 30, 500));
        log.compact(snapshot(30), 10, 0);
        assert_eq!((log.first(), log.start()), (31, (30, 1)));
    }
}
