//! Snapshots in place of the log before them: of the own map, or as the leader sends them.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use raft::ProgressState;
use raft::eraftpb as pb;
use tracing::error;

use super::Group;
use crate::core::{Batch, Settings};
use crate::machine::{GROUP_BYTES_MAX, Machine};
use crate::planted::{self, Bug};
use crate::wire::{ENTRY_BYTES, Message, Snapshot};

impl Group {
    /// Whether the log, with `since` applied entries after the snapshot, is to be replaced by a new
    /// one: when these are many, or large, and larger than the map. What is written for snapshots is
    /// then hardly more than what is written for entries. Those before the snapshot do not count:
    /// the ones that are kept may be as large.
    fn is_long(&self, since: u64, settings: &Settings, compact_after: u64) -> bool {
        // A replica that a snapshot is on its way to needs the entries after it.
        let mut others = self.raw.raft.prs().iter();
        let awaited = others.any(|(_, progress)| progress.state == ProgressState::Snapshot);
        let patience = if awaited { 2 } else { 1 };
        let map = self.machine.read().bytes() as usize;
        let log = self.raw.store().bytes_since() + since as usize * ENTRY_BYTES;
        let many = since >= compact_after * patience as u64;
        let large = log > settings.compact_bytes * patience;
        (many || large) && log > map * patience
    }

    pub(super) fn compact(&mut self, settings: &Settings, compact_after: u64) {
        let mut applied = self.machine.read().applied;
        let log = self.raw.store();
        if planted::has(Bug::SnapshotAheadOfItself) {
            applied = log.last().min(applied + 1);
        }
        // A snapshot has one set of voters.
        if self.is_joint() {
            return;
        }
        let since = applied.saturating_sub(log.snapshot_index());
        let wanted = std::mem::take(&mut self.snapshot_wanted);
        if !wanted && !self.is_long(since, settings, compact_after) {
            return;
        }
        let (Ok(term), Ok(data)) = (
            raft::Storage::term(log, applied),
            self.machine.read().encode(),
        ) else {
            error!(group = %self.id, "no snapshot could be made; the log stays longer");
            return;
        };
        let snapshot = Snapshot {
            index: applied,
            term,
            configuration: self.configuration(),
            data: data.into(),
        };
        let kept = settings.kept_entries;
        let log = self.raw.mut_store();
        log.compact(snapshot.clone(), kept, GROUP_BYTES_MAX);
        let mut write = self.empty_write();
        write.snapshot = Some(snapshot);
        self.compaction = Some(write);
        self.dirty = true;
    }

    /// The gate has read the map of a snapshot that comes with the next message.
    pub(crate) fn expect_map(&mut self, message: &Message, map: Machine) {
        let snapshot = message.snapshot.as_ref();
        self.expected = snapshot.map(|snapshot| (snapshot.data.clone(), map));
    }

    pub(super) fn install(&mut self, snapshot: &pb::Snapshot, batches: &mut VecDeque<Batch>) {
        self.configuration_number += 1;
        let same = |known: &Bytes| {
            (known.as_ptr(), known.len()) == (snapshot.data.as_ptr(), snapshot.data.len())
        };
        let decoded = match self.expected.take() {
            Some((data, machine)) if same(&data) => Ok(machine),
            _ => Machine::decode(&snapshot.data),
        };
        match decoded {
            Ok(mut machine) => {
                machine.applied = snapshot.get_metadata().index;
                let revision = machine.last_stamp;
                *self.machine.write() = machine;
                batches.push_back(Batch {
                    group: self.id,
                    revision,
                    reset: true,
                    changes: Arc::new([]),
                });
            }
            // The gate decoded it before it was taken.
            Err(error) => error!(group = %self.id, %error, "a snapshot could not be installed"),
        }
    }
}
