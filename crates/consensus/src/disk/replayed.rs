//! One group's log as it is put together from the records on the disk.

use std::collections::BTreeMap;

use super::Change;
use crate::log::HardState;
use crate::wire::{Entry, Snapshot};

/// One group while the log is read.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    pub(super) hard_state: HardState,
    pub(super) start: (u64, u64),
    pub(super) entries: BTreeMap<u64, Entry>,
}

impl Replayed {
    pub(super) fn take(&mut self, change: Change) {
        self.hard_state = change.hard_state;
        self.start = change.start;
        if let Some(from) = change.truncate_from {
            self.entries.split_off(&from);
        }
        for entry in change.entries {
            self.entries.insert(entry.index, entry);
        }
        self.entries = self.entries.split_off(&(self.start.0 + 1));
    }

    /// The snapshot was stored, and the power went before the log said so: one that the log does
    /// not lead to replaces it, and the log is to say so before anything else is written to it
    /// (`true`).
    pub(super) fn adopt(&mut self, snapshot: &Snapshot) -> bool {
        let known = if snapshot.index == self.start.0 {
            Some(self.start.1)
        } else {
            self.entries.get(&snapshot.index).map(|entry| entry.term)
        };
        // Only what is committed is in a snapshot.
        self.hard_state.commit = self.hard_state.commit.max(snapshot.index);
        if known == Some(snapshot.term) {
            return false;
        }
        self.entries.clear();
        self.start = (snapshot.index, snapshot.term);
        if self.hard_state.term < snapshot.term {
            self.hard_state.term = snapshot.term;
            self.hard_state.vote = 0;
        }
        true
    }

    pub(super) fn check(&self, snapshot: Option<&Snapshot>) -> Result<(), String> {
        let (mut expected, mut term) = (self.start.0 + 1, self.start.1);
        for (index, entry) in &self.entries {
            if *index != expected {
                return Err(format!("entry {expected} is missing before {index}"));
            }
            // In no log of Raft do terms fall (Ongaro and Ousterhout 2014, 5.3 and 5.4).
            if entry.term < term {
                return Err(format!(
                    "entry {index} is of term {}, the one before it of term {term}",
                    entry.term
                ));
            }
            (expected, term) = (expected + 1, entry.term);
        }
        if self.hard_state.commit >= expected {
            return Err(format!(
                "entries {expected} to {} were committed and are missing",
                self.hard_state.commit
            ));
        }
        let covered = snapshot.map_or(0, |snapshot| snapshot.index);
        if self.start.0 > covered {
            return Err(format!(
                "entries up to {} are gone and the snapshot has only those up to {covered}",
                self.start.0
            ));
        }
        Ok(())
    }
}
