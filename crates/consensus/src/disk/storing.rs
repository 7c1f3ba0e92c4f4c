//! Snapshots on their way into their files. They are written aside, so that no round, and no
//! heartbeat, waits for one; until it is there the log on the disk keeps what only the older snapshot
//! has.

use krake_model::codec;

use super::{Change, Disk, DiskError, Problem, SNAPSHOT_VERSION, snapshot_name};
use crate::frame;
use crate::medium::Store;
use crate::wal::WalError;
use crate::wire::Snapshot;

/// A group's snapshot on its way.
pub(super) struct Storing {
    file: Box<dyn Store>,
    /// Where the group's log begins once the snapshot is in force.
    start: (u64, u64),
    /// The newest one that was made meanwhile. That on its way is not given up for it: on a slow disk
    /// none would ever arrive.
    next: Option<Next>,
}

struct Next {
    parts: [Vec<u8>; 3],
    start: (u64, u64),
}

impl Disk {
    /// Takes a group's snapshot before the log says that entries are gone: at once when it replaces
    /// the log, else aside.
    pub(super) fn take_snapshot(
        &mut self,
        change: &Change,
        snapshot: &Snapshot,
    ) -> Result<(), DiskError> {
        let group = change.group;
        let payload = codec::encode_large(SNAPSHOT_VERSION, &(group, snapshot))
            .map_err(|source| DiskError::Encode { group, source })?;
        let (head, tail) = frame::around(1, &payload);
        let (name, parts) = (snapshot_name(group), [head, payload, tail]);
        let path = self.path.clone();
        let problem = |error| Problem { path }.of(WalError::Io(error));
        if change.truncate_from.is_some() || !self.states.contains_key(&group) {
            // It has the same file.
            if let Some(older) = self.storing.remove(&group) {
                older.file.give_up();
            }
            return self.directory.store(&name, parts).map_err(problem);
        }
        let start = (0, 0);
        if let Some(older) = self.storing.get_mut(&group) {
            older.next = Some(Next { parts, start });
            return Ok(());
        }
        let storing = Storing {
            file: self.directory.store_aside(&name, parts).map_err(problem)?,
            start,
            next: None,
        };
        self.storing.insert(group, storing);
        Ok(())
    }

    /// While a snapshot is on its way the log on the disk begins where it did.
    pub(super) fn hold_back(&mut self, change: &mut Change) {
        if let Some(storing) = self.storing.get_mut(&change.group)
            && let Some(state) = self.states.get(&change.group)
        {
            let start = std::mem::replace(&mut change.start, state.start);
            match &mut storing.next {
                Some(next) => next.start = start,
                None => storing.start = start,
            }
        }
    }

    /// Whether a snapshot is on its way.
    #[cfg(test)]
    pub(crate) fn is_storing(&self) -> bool {
        !self.storing.is_empty()
    }

    /// Goes on with the snapshots that are on their way: the log begins behind those that are there.
    /// After an error nothing may be written any more.
    pub(crate) fn go_on_storing(&mut self) -> Result<(), DiskError> {
        let mut stored = Vec::new();
        for (group, storing) in &mut self.storing {
            match storing.file.go_on() {
                Ok(true) => stored.push((*group, storing.start)),
                Ok(false) => {}
                Err(error) => return Err(self.problem(WalError::Io(error))),
            }
        }
        if stored.is_empty() {
            return Ok(());
        }
        let mut changes = Vec::new();
        for (group, start) in stored {
            let next = self.storing.remove(&group).and_then(|storing| storing.next);
            if let Some(Next { parts, start }) = next {
                let file = self.directory.store_aside(&snapshot_name(group), parts);
                let storing = Storing {
                    file: file.map_err(|error| self.problem(WalError::Io(error)))?,
                    start,
                    next: None,
                };
                self.storing.insert(group, storing);
            }
            if let Some(state) = self.states.get(&group) {
                changes.push(Change {
                    group,
                    truncate_from: None,
                    entries: Vec::new(),
                    hard_state: state.hard_state,
                    start,
                });
            }
        }
        self.append(&changes)?;
        self.drop_old()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use bytes::Bytes;
    use krake_model::ids::{FederationId, GroupId, NodeId};

    use super::*;
    use crate::disk::{Write, create_in};
    use crate::log::{GroupLog, HardState};
    use crate::medium::Directory as _;
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
        let (disk, mut logs) = Disk::open_in(home, Path::new("catalog"), owner).unwrap();
        directory.limit_slices(100);
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
        for slices in 0..SLICES + 3 {
            let directory = Arc::<MemoryDirectory>::default();
            let (mut disk, _) = open(&directory);
            disk.write(vec![write(1..=10, 0, None)]).unwrap();
            disk.write(vec![write(11..=11, 6, Some(8))]).unwrap();
            for slice in 0..slices {
                disk.go_on_storing().unwrap();
                if slice == SLICES / 2 {
                    disk.write(vec![write(12..=12, 6, None)]).unwrap();
                }
            }
            drop(disk);
            directory.power_cut();
            let last = if slices > SLICES / 2 { 12 } else { 11 };
            // Another step sees that it is there.
            let expected = match slices {
                0..SLICES => (1, last, 0),
                SLICES => (1, last, 8),
                _ => (7, last, 8),
            };
            assert_eq!(found(&directory), expected, "{slices} slices");
        }
    }

    #[test]
    fn a_newer_snapshot_follows_the_one_on_its_way_unless_it_replaces_the_log() {
        // Opening it removes what is on its way.
        let after = |steps: usize| {
            let directory = Arc::<MemoryDirectory>::default();
            let (mut disk, _) = open(&directory);
            disk.write(vec![write(1..=10, 0, None)]).unwrap();
            disk.write(vec![write(11..=11, 6, Some(8))]).unwrap();
            disk.go_on_storing().unwrap();
            disk.write(vec![write(12..=12, 9, Some(10))]).unwrap();
            disk.write(vec![write(13..=13, 10, Some(11))]).unwrap();
            disk.write(vec![write(14..=14, 10, None)]).unwrap();
            for _ in 0..steps {
                disk.go_on_storing().unwrap();
            }
            let found = found(&directory);
            (found, disk.is_storing())
        };
        let mut seen: Vec<_> = (0..25).map(after).collect();
        seen.dedup();
        // Newer ones take each other's place.
        let expected = [
            ((1, 14, 0), true),
            ((1, 14, 8), true),
            ((7, 14, 8), true),
            ((7, 14, 11), true),
            ((11, 14, 11), false),
        ];
        assert_eq!(seen, expected);

        let directory = Arc::<MemoryDirectory>::default();
        let (mut disk, _) = open(&directory);
        disk.write(vec![write(1..=14, 0, None)]).unwrap();
        // A leader's replaces the log: it is in force with the same write.
        disk.write(vec![write(15..=15, 11, Some(12))]).unwrap();
        disk.go_on_storing().unwrap();
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
