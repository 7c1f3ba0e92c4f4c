//! A catalog in one file: to be kept elsewhere, and to begin again from when a majority of a
//! group's voters is lost for ever.
//!
//! The file is a row of frames as those of the log (`frame.rs`), with sequences from 1: first a
//! [`Piece::Header`], then a [`Piece::Group`] for each group, last a [`Piece::End`]. Each group is
//! as it was at one index; groups know nothing of each other.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use krake_model::codec::{self, CodecError};
use krake_model::ids::{FederationId, GroupId};
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::disk::{Change, Disk, DiskError, Write, create};
use crate::frame::{self, Found};
use crate::log::{GroupLog, HardState};
use crate::machine::{Entry, LogEntry, Machine};
use crate::wal::Owner;
use crate::wire::{Configuration, Snapshot};

const VERSION: u8 = 1;

#[derive(Debug, Serialize, Deserialize)]
enum Piece {
    Header {
        federation: FederationId,
        taken_at: Timestamp,
    },
    Group {
        group: GroupId,
        /// Raft term in which it was taken.
        term: u64,
        /// What [`Machine::encode`] makes.
        state: Bytes,
    },
    /// How many groups there are before it.
    End { groups: u64 },
}

/// A file cannot be restored from.
#[derive(Debug, Error)]
pub enum BackupError {
    /// It is none, or was written by a program that knows more.
    #[error("this is no backup of a catalog that this program reads: {0}")]
    Format(String),
    /// It is not what was written.
    #[error("the backup is damaged at byte {offset}")]
    Damaged {
        /// Where.
        offset: usize,
    },
    /// It ends too early.
    #[error("the backup is cut off after {groups} groups: copy it again, whole")]
    CutOff {
        /// How many are there.
        groups: usize,
    },
    /// A group is there twice.
    #[error("the backup has group {group} twice")]
    Twice {
        /// Which.
        group: GroupId,
    },
    /// A group cannot be read or written.
    #[error("group {group} of the backup: {source}")]
    Group {
        /// Which.
        group: GroupId,
        /// Why.
        source: CodecError,
    },
    /// The new files cannot be written.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// One group at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GroupState {
    pub(crate) term: u64,
    pub(crate) machine: Machine,
}

/// Writes a backup piece by piece; the bytes go one behind the other.
#[derive(Debug, Default)]
pub struct BackupWriter {
    pieces: u64,
    groups: u64,
}

impl BackupWriter {
    fn piece(&mut self, piece: &Piece) -> Result<Bytes, CodecError> {
        self.pieces += 1;
        let payload = codec::encode_large(VERSION, piece)?;
        Ok(frame::write(self.pieces, &payload).into())
    }

    /// The beginning.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn begin(
        &mut self,
        federation: FederationId,
        taken_at: Timestamp,
    ) -> Result<Bytes, CodecError> {
        self.piece(&Piece::Header {
            federation,
            taken_at,
        })
    }

    /// A group; `state` is from [`crate::Host::group_backup`].
    ///
    /// # Errors
    /// When it is too large for a record.
    pub fn group(&mut self, group: GroupId, state: (u64, Bytes)) -> Result<Bytes, CodecError> {
        self.groups += 1;
        let (term, state) = state;
        self.piece(&Piece::Group { group, term, state })
    }

    /// The end; without it a backup counts as cut off.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn end(&mut self) -> Result<Bytes, CodecError> {
        let groups = self.groups;
        self.piece(&Piece::End { groups })
    }
}

/// A whole backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// Of which federation.
    pub federation: FederationId,
    /// By the clock of the node that made it.
    pub taken_at: Timestamp,
    groups: BTreeMap<GroupId, GroupState>,
}

impl Backup {
    /// Reads a whole file.
    ///
    /// # Errors
    /// See [`BackupError`].
    pub fn read(bytes: &[u8]) -> Result<Self, BackupError> {
        let mut header = None;
        let mut groups = BTreeMap::new();
        let (mut offset, mut sequence) = (0, 1);
        loop {
            let payload = match frame::read(bytes, offset, sequence) {
                Found::Frame { payload, next, .. } => {
                    let found = payload;
                    (offset, sequence) = (next, sequence + 1);
                    found
                }
                Found::End | Found::Torn if header.is_some() => {
                    let groups = groups.len();
                    return Err(BackupError::CutOff { groups });
                }
                _ if header.is_none() => {
                    let text = "it does not begin as one".to_owned();
                    return Err(BackupError::Format(text));
                }
                _ => return Err(BackupError::Damaged { offset }),
            };
            let piece: Piece = codec::decode_large(VERSION, payload)
                .map_err(|error| BackupError::Format(error.to_string()))?;
            match (piece, &header) {
                (
                    Piece::Header {
                        federation,
                        taken_at,
                    },
                    None,
                ) => header = Some((federation, taken_at)),
                (Piece::Group { group, term, state }, Some(_)) => {
                    let machine = Machine::decode(&state)
                        .map_err(|source| BackupError::Group { group, source })?;
                    if groups.insert(group, GroupState { term, machine }).is_some() {
                        return Err(BackupError::Twice { group });
                    }
                }
                (Piece::End { groups: count }, Some((federation, taken_at))) => {
                    if count != groups.len() as u64 {
                        let groups = groups.len();
                        return Err(BackupError::CutOff { groups });
                    }
                    if offset != bytes.len() {
                        return Err(BackupError::Damaged { offset });
                    }
                    return Ok(Self {
                        federation: *federation,
                        taken_at: *taken_at,
                        groups,
                    });
                }
                _ => return Err(BackupError::Format("its pieces are mixed".to_owned())),
            }
        }
    }

    /// What the files of a node that does not run hold: everything it knows to be committed.
    ///
    /// # Errors
    /// As when the node is started.
    pub fn of_files(path: &Path, owner: Owner, taken_at: Timestamp) -> Result<Self, BackupError> {
        let (_, logs) = Disk::open(path, owner)?;
        let mut groups = BTreeMap::new();
        for (group, log) in logs {
            let state = replayed(&log).map_err(|source| BackupError::Group { group, source })?;
            groups.insert(group, state);
        }
        Ok(Self {
            federation: owner.federation,
            taken_at,
            groups,
        })
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// When a group is too large for a record.
    pub fn write(&self) -> Result<Vec<u8>, BackupError> {
        let mut writer = BackupWriter::default();
        let other = |error: CodecError| BackupError::Format(error.to_string());
        let begin = writer.begin(self.federation, self.taken_at);
        let mut bytes = begin.map_err(other)?.to_vec();
        for (group, state) in &self.groups {
            let of_group = |source| BackupError::Group {
                group: *group,
                source,
            };
            let encoded = state.machine.encode().map_err(of_group)?;
            let piece = writer.group(*group, (state.term, encoded.into()));
            bytes.extend_from_slice(&piece.map_err(of_group)?);
        }
        bytes.extend_from_slice(&writer.end().map_err(other)?);
        Ok(bytes)
    }

    /// Its groups.
    pub fn groups(&self) -> impl Iterator<Item = GroupId> + '_ {
        self.groups.keys().copied()
    }

    /// One key.
    pub fn get(&self, group: GroupId, key: &str) -> Option<&Entry> {
        self.groups.get(&group)?.machine.get(key)
    }

    /// All keys with a prefix.
    pub fn list(&self, group: GroupId, prefix: &str) -> Vec<(&String, &Entry)> {
        let state = self.groups.get(&group);
        state.map_or_else(Vec::new, |state| {
            state.machine.range(prefix, None).collect()
        })
    }

    /// Keys of all groups.
    pub fn len(&self) -> usize {
        self.groups.values().map(|state| state.machine.len()).sum()
    }

    /// Whether there is no key at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The newest revision.
    pub fn revision(&self) -> Revision {
        let stamps = self.groups.values().map(|state| state.machine.last_stamp);
        stamps.max().unwrap_or(Revision::NONE)
    }

    /// The incarnation of what is restored at this time: above every one before, also when a backup
    /// is restored twice.
    pub fn next_incarnation(&self, now: Timestamp) -> u32 {
        let groups = self.groups.values();
        let last = groups.map(|state| state.machine.incarnation()).max();
        let seconds = u32::try_from(now.as_millis() / 1000).unwrap_or(0);
        seconds.max(last.unwrap_or(0) + 1)
    }

    /// Makes a catalog in the directory `path`, which must not be there or be empty: all groups
    /// with `replica` as their only voter, in a new incarnation. Epochs rise: terms and indices go
    /// on from the backup's.
    ///
    /// # Errors
    /// [`DiskError::Present`], or when it cannot be written.
    pub fn restore(
        mut self,
        path: &Path,
        owner: Owner,
        replica: u64,
        incarnation: u32,
    ) -> Result<(), BackupError> {
        create(path, owner)?;
        let (mut disk, _) = Disk::open(path, owner)?;
        for (group, state) in &mut self.groups {
            let (term, index) = (state.term.max(1), state.machine.applied.max(1));
            state.machine.applied = index;
            state.machine.begin_again(incarnation);
            let data = state.machine.encode();
            let data = data.map_err(|source| BackupError::Group {
                group: *group,
                source,
            })?;
            disk.write(vec![Write {
                change: Change {
                    group: *group,
                    truncate_from: None,
                    entries: Vec::new(),
                    hard_state: HardState {
                        term,
                        vote: 0,
                        commit: index,
                    },
                    start: (index, term),
                },
                snapshot: Some(Snapshot {
                    index,
                    term,
                    configuration: Configuration {
                        voters: vec![replica],
                        learners: Vec::new(),
                    },
                    data: data.into(),
                }),
            }])?;
        }
        Ok(())
    }
}

/// A group's state with what is committed in its log.
fn replayed(log: &GroupLog) -> Result<GroupState, CodecError> {
    let snapshot = log.snapshot.as_ref();
    let mut machine = Machine::decode(&snapshot.map_or_else(Bytes::new, |s| s.data.clone()))?;
    machine.applied = log.snapshot_index();
    for entry in log.run(log.snapshot_index() + 1..=log.hard_state.commit) {
        let normal = entry.get_entry_type() == raft::eraftpb::EntryType::EntryNormal;
        match LogEntry::decode(&entry.data) {
            Ok(decoded) if normal => {
                machine.apply(entry.term, entry.index, decoded);
            }
            // As a replica does: see `Group::apply`.
            _ => machine.skip(entry.index),
        }
    }
    let term = log.hard_state.term;
    Ok(GroupState { term, machine })
}

#[cfg(test)]
mod tests {
    use krake_model::ids::NodeId;

    use super::*;
    use crate::command::{Command, Expect, Operation, RequestId};

    fn machine(incarnation: u32) -> Machine {
        let mut machine = Machine::default();
        for index in 1..4 {
            let stamp = Timestamp::from_millis(1_764_000_000_000 + index);
            let command = Command {
                request: RequestId::from_number(index as u128),
                operations: vec![Operation::Put {
                    key: format!("key-{index}"),
                    value: Bytes::from_static(b"value"),
                    expect: Expect::Absent,
                }],
            };
            let stamp = Revision::next(Revision::NONE, stamp, 1);
            machine.apply(7, index as u64, LogEntry { stamp, command });
        }
        machine.begin_again(incarnation);
        machine
    }

    fn backup() -> Backup {
        let state = GroupState {
            term: 9,
            machine: machine(3),
        };
        Backup {
            federation: FederationId::from_bytes([1; 32]),
            taken_at: Timestamp::from_millis(1_764_000_000_000),
            groups: BTreeMap::from([
                (GroupId::META, state.clone()),
                (GroupId::of_shard(0), state),
            ]),
        }
    }

    #[test]
    fn what_is_written_is_read_and_every_damage_is_seen() {
        let bytes = backup().write().unwrap();
        assert_eq!(Backup::read(&bytes).unwrap(), backup());
        for length in 0..bytes.len() {
            assert!(Backup::read(&bytes[..length]).is_err(), "{length} bytes");
        }
        for place in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[place] ^= 0x10;
            assert!(Backup::read(&damaged).is_err(), "byte {place}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(matches!(
            Backup::read(&longer),
            Err(BackupError::Damaged { offset }) if offset == bytes.len()
        ));
    }

    #[test]
    fn a_restored_catalog_goes_on_above_every_epoch_of_the_old_one() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("catalog");
        let owner = Owner {
            federation: FederationId::from_bytes([1; 32]),
            node: NodeId::from_bytes([2; 32]),
        };
        let now = Timestamp::from_millis(1_000);
        let incarnation = backup().next_incarnation(now);
        assert_eq!(incarnation, 4, "clocks may be wrong");
        backup().restore(&path, owner, 5, incarnation).unwrap();
        let again = Backup::of_files(&path, owner, now).unwrap();
        for group in again.groups() {
            let state = &again.groups[&group];
            assert_eq!((state.term, state.machine.applied), (9, 3));
            assert_eq!(state.machine, machine(4));
            let entry = again.get(group, "key-2").unwrap();
            assert_eq!((entry.incarnation, entry.term), (4, 7));
        }
        let refused = backup().restore(&path, owner, 5, 5).unwrap_err();
        assert!(matches!(refused, BackupError::Disk(DiskError::Present(_))));
    }
}
