//! Snapshots on their way into their files. A large one is written a slice a round, so that no
//! round, and no heartbeat, waits for the whole of it; until then the log on the disk keeps what
//! only the older snapshot has.

use std::io;

use krake_model::codec;
use krake_model::ids::GroupId;

use super::{Change, Disk, DiskError, SNAPSHOT_VERSION, UNFINISHED, snapshot_name};
use crate::frame;
use crate::medium::{Directory, Medium};
use crate::planted::{self, Bug};
use crate::wal::WalError;
use crate::wire::Snapshot;

/// Bytes that are written and synced at once.
pub(super) const SLICE_BYTES: usize = 4 * 1024 * 1024;

/// A snapshot and its file.
pub(super) struct Storing {
    file: Box<dyn Medium>,
    /// One behind the other they are the file.
    parts: [Vec<u8>; 3],
    /// Bytes that are on the disk.
    at: usize,
    /// Where the group's log begins once the snapshot is in force.
    start: (u64, u64),
}

impl Storing {
    fn begin(directory: &dyn Directory, group: GroupId, payload: Vec<u8>) -> io::Result<Self> {
        let (head, tail) = frame::around(1, &payload);
        Ok(Self {
            file: directory.create(&unfinished_name(group))?,
            parts: [head, payload, tail],
            at: 0,
            start: (0, 0),
        })
    }

    /// Writes so many more bytes durably; `true`: that was all.
    fn write_slice(&mut self, bytes: usize) -> io::Result<bool> {
        let (mut begin, mut room) = (0, bytes);
        for part in &self.parts {
            let from = self.at.saturating_sub(begin).min(part.len());
            let slice = &part[from..from.saturating_add(room).min(part.len())];
            if !slice.is_empty() {
                self.file.write_at(self.at as u64, slice)?;
            }
            self.at += slice.len();
            room -= slice.len();
            begin += part.len();
        }
        if !planted::has(Bug::SnapshotNotSynced) {
            self.file.sync()?;
        }
        Ok(self.at == begin)
    }
}

fn unfinished_name(group: GroupId) -> String {
    format!("{}{UNFINISHED}", snapshot_name(group))
}

impl Disk {
    /// Slices are smaller: a simulation shall see many.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) const fn limit_slices(&mut self, bytes: usize) {
        self.slice_bytes = bytes;
    }

    /// Takes a group's snapshot before the log says that entries are gone: at once when it replaces
    /// the log or is small, else with the next rounds.
    pub(super) fn take_snapshot(
        &mut self,
        change: &Change,
        snapshot: &Snapshot,
    ) -> Result<(), DiskError> {
        let group = change.group;
        // An older one is out of date, and has the same file.
        self.storing.remove(&group);
        let payload = codec::encode_large(SNAPSHOT_VERSION, &(group, snapshot))
            .map_err(|source| DiskError::Encode { group, source })?;
        let replaces = change.truncate_from.is_some() || !self.states.contains_key(&group);
        let at_once = replaces || payload.len() <= self.slice_bytes;
        let mut storing = Storing::begin(&*self.directory, group, payload)
            .map_err(|error| self.problem(WalError::Io(error)))?;
        if at_once {
            return storing
                .write_slice(usize::MAX)
                .and_then(|_| self.put_in_force(group))
                .map_err(|error| self.problem(WalError::Io(error)));
        }
        self.storing.insert(group, storing);
        Ok(())
    }

    fn put_in_force(&self, group: GroupId) -> io::Result<()> {
        self.directory
            .rename(&unfinished_name(group), &snapshot_name(group))
    }

    /// While a snapshot is on its way the log on the disk begins where it did.
    pub(super) fn hold_back(&mut self, change: &mut Change) {
        if let Some(storing) = self.storing.get_mut(&change.group)
            && let Some(state) = self.states.get(&change.group)
        {
            storing.start = std::mem::replace(&mut change.start, state.start);
        }
    }

    /// Whether a slice of a snapshot is to be written.
    pub(crate) fn is_storing(&self) -> bool {
        !self.storing.is_empty()
    }

    /// Goes on with a snapshot that is on its way. After an error nothing may be written any more.
    pub(crate) fn store_slice(&mut self) -> Result<(), DiskError> {
        let Some((group, mut storing)) = self.storing.pop_first() else {
            return Ok(());
        };
        let is_whole = storing
            .write_slice(self.slice_bytes)
            .map_err(|error| self.problem(WalError::Io(error)))?;
        if !is_whole {
            self.storing.insert(group, storing);
            return Ok(());
        }
        self.put_in_force(group)
            .map_err(|error| self.problem(WalError::Io(error)))?;
        if let Some(state) = self.states.get(&group).copied() {
            self.append(&[Change {
                group,
                truncate_from: None,
                entries: Vec::new(),
                hard_state: state.hard_state,
                start: storing.start,
            }])?;
        }
        self.drop_old()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use bytes::Bytes;
    use krake_model::ids::{FederationId, NodeId};

    use super::*;
    use crate::disk::{Write, create_in};
    use crate::log::{GroupLog, HardState};
    use crate::medium::memory::MemoryDirectory;
    use crate::wal::Owner;
    use crate::wire::{Configuration, Entry, EntryKind};

    const GROUP: GroupId = GroupId::META;

    fn open(directory: &Arc<MemoryDirectory>) -> (Disk, Option<GroupLog>) {
        let owner = Owner {
            federation: FederationId::from_bytes([1; 32]),
            node: NodeId::from_bytes([2; 32]),
        };
        if directory.list().unwrap().is_empty() {
            create_in(&**directory, owner).ok().unwrap();
        }
        let home = Box::new(Arc::clone(directory));
        let (mut disk, mut logs) = Disk::open_in(home, Path::new("catalog"), owner).unwrap();
        disk.limit_slices(100);
        (disk, logs.pop().map(|(_, log)| log))
    }

    fn write(entries: std::ops::RangeInclusive<u64>, start: u64, snapshot: Option<u64>) -> Write {
        let commit = *entries.end();
        Write {
            change: Change {
                group: GROUP,
                truncate_from: None,
                entries: entries
                    .map(|index| Entry {
                        kind: EntryKind::Normal,
                        term: 1,
                        index,
                        data: Bytes::from_static(b"d"),
                        context: Bytes::new(),
                    })
                    .collect(),
                hard_state: HardState {
                    term: 1,
                    vote: 1,
                    commit,
                },
                start: (start, start.min(1)),
            },
            snapshot: snapshot.map(|index| Snapshot {
                index,
                term: 1,
                configuration: Configuration::default(),
                data: vec![index as u8; 1000].into(),
            }),
        }
    }

    /// First and last index of the log, and that of the snapshot.
    fn found(directory: &Arc<MemoryDirectory>) -> (u64, u64, u64) {
        let log = open(directory).1.unwrap();
        (log.first(), log.last(), log.snapshot_index())
    }

    #[test]
    fn a_large_snapshot_is_in_force_when_all_of_it_is_on_the_disk() {
        const SLICES: usize = 11;
        for slices in 0..SLICES + 2 {
            let directory = Arc::<MemoryDirectory>::default();
            let (mut disk, _) = open(&directory);
            disk.write(vec![write(1..=10, 0, None)]).unwrap();
            disk.write(vec![write(11..=11, 6, Some(8))]).unwrap();
            for slice in 0..slices {
                disk.store_slice().unwrap();
                if slice == SLICES / 2 {
                    disk.write(vec![write(12..=12, 6, None)]).unwrap();
                }
            }
            drop(disk);
            directory.power_cut();
            let last = if slices > SLICES / 2 { 12 } else { 11 };
            let expected = if slices < SLICES {
                (1, last, 0)
            } else {
                (7, last, 8)
            };
            assert_eq!(found(&directory), expected, "{slices} slices");
        }
    }

    #[test]
    fn a_newer_snapshot_takes_the_place_of_one_on_its_way() {
        let directory = Arc::<MemoryDirectory>::default();
        let (mut disk, _) = open(&directory);
        disk.write(vec![write(1..=10, 0, None)]).unwrap();
        disk.write(vec![write(11..=11, 6, Some(8))]).unwrap();
        disk.store_slice().unwrap();
        disk.write(vec![write(12..=12, 9, Some(10))]).unwrap();
        for _ in 0..20 {
            disk.store_slice().unwrap();
        }
        drop(disk);
        assert_eq!(found(&directory), (10, 12, 10));

        // A leader's replaces the log: it is in force with the same write.
        let (mut disk, _) = open(&directory);
        disk.write(vec![write(13..=13, 11, Some(12))]).unwrap();
        disk.store_slice().unwrap();
        let mut leaders = write(0..=0, 20, Some(20));
        leaders.change.entries.clear();
        leaders.change.truncate_from = Some(0);
        leaders.change.hard_state.commit = 20;
        disk.write(vec![leaders]).unwrap();
        drop(disk);
        directory.power_cut();
        assert_eq!(found(&directory), (21, 20, 20));
    }
}
