//! All groups on the disk: their logs share one write-ahead log, so that a round of all groups
//! costs one sync; each group's snapshot is a file of its own.
//!
//! A segment goes when no group needs an entry in it any more. A group that is silent for long
//! would hold segments for ever; its entries are then written again at the end.

mod places;
mod replayed;
mod storing;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use krake_model::codec::{self, CodecError, RECORD_BYTES_MAX};
use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use self::places::Places;
use self::replayed::Replayed;
use self::storing::Storing;
use crate::frame::{self, Found};
use crate::log::{GroupLog, HardState};
use crate::medium::{Directory, RealDirectory, UNFINISHED};
use crate::planted::{self, Bug};
use crate::wal::{self, Owner, Wal, WalError};
use crate::wire::{ENTRY_BYTES, Entry, Snapshot};

const RECORD_VERSION: u8 = 1;
const SNAPSHOT_VERSION: u8 = 1;
/// A record is closed when its entries have about this many bytes.
const PIECE_BYTES: usize = 4 * 1024 * 1024;
/// Segments that are kept before old entries are written again to let one go.
const SEGMENTS_MIN: usize = 4;
/// As many bytes as a segment has are written again in about so many portions.
const REWRITE_PORTIONS: u64 = 16;
const SNAPSHOT_PREFIX: &str = "snapshot-";
/// See [`Disk::keep_clock`].
const CLOCK: &str = "clock";
const CLOCK_VERSION: u8 = 1;
/// Written and removed to find out whether there is room again: for the spares that were given back,
/// too, or there would soon be none.
const PROBE: &str = "room.tmp";
const PROBE_BYTES: usize = 64 * 1024 * 1024;

/// The catalog's files failed; the host stops, because a state that was not written must not be
/// acted upon.
#[derive(Debug, Error)]
pub enum DiskError {
    /// Reading or writing failed.
    #[error("the catalog's files failed: {0}")]
    Io(String),
    /// There is no room left. Nothing of the last write may be relied on; the catalog can be
    /// opened again as after a crash.
    #[error("there is no room left for the catalog in {}: free 64 MiB or more, this node then goes on by itself", .0.display())]
    Full(PathBuf),
    /// There is nothing where the catalog should be.
    #[error("there is no catalog in {}: what this node promised to the others is lost", .0.display())]
    Missing(PathBuf),
    /// There is a catalog already.
    #[error("there is a catalog in {} already", .0.display())]
    Present(PathBuf),
    /// The catalog is not this node's.
    #[error("the catalog in {} is of node {} in federation {}: files of two data directories were mixed", path.display(), owner.node, owner.federation)]
    Foreign {
        /// Where.
        path: PathBuf,
        /// Whose it is.
        owner: Owner,
    },
    /// A file is not what was written to it.
    #[error("{} is damaged at byte {offset}: {reason}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        reason: String,
    },
    /// A record cannot be encoded.
    #[error("a record of group {group} cannot be written: {source}")]
    Encode {
        /// Which group.
        group: GroupId,
        /// Why.
        source: CodecError,
    },
}

/// What one group must keep from one round.
#[derive(Debug, Clone)]
pub(crate) struct Write {
    pub(crate) change: Change,
    pub(crate) snapshot: Option<Snapshot>,
}

/// A change of one group's log, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Change {
    pub(crate) group: GroupId,
    /// Entries from here on that are not in `entries` are gone.
    pub(crate) truncate_from: Option<u64>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) hard_state: HardState,
    /// Index and term of the entry before the first one that is still wanted.
    pub(crate) start: (u64, u64),
}

/// A group's last state.
#[derive(Debug, Clone, Copy)]
struct State {
    hard_state: HardState,
    start: (u64, u64),
}

/// The files.
pub(crate) struct Disk {
    /// Snapshots that are not in force yet. Dropped before the directory: what was not begun is not
    /// done.
    storing: BTreeMap<GroupId, Storing>,
    directory: Box<dyn Directory>,
    path: PathBuf,
    wal: Wal,
    states: BTreeMap<GroupId, State>,
    places: BTreeMap<GroupId, Places>,
    /// Bytes written to the log, see [`Disk::rewrite_bytes`].
    written: usize,
    clock: Revision,
}

impl std::fmt::Debug for Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Disk")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

struct Problem {
    path: PathBuf,
}

impl Problem {
    fn of(&self, error: WalError) -> DiskError {
        match error {
            WalError::Io(error) if is_full(&error) => DiskError::Full(self.path.clone()),
            WalError::Io(error) => DiskError::Io(error.to_string()),
            WalError::Missing => DiskError::Missing(self.path.clone()),
            WalError::Foreign(owner) => DiskError::Foreign {
                path: self.path.clone(),
                owner,
            },
            WalError::Damaged {
                file,
                offset,
                reason,
            } => DiskError::Damaged {
                path: self.path.join(file),
                offset,
                reason,
            },
        }
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
    )
}

enum OpenError {
    Wal(WalError),
    Record(u64, CodecError),
}

impl From<WalError> for OpenError {
    fn from(error: WalError) -> Self {
        Self::Wal(error)
    }
}

fn snapshot_name(group: GroupId) -> String {
    format!("{SNAPSHOT_PREFIX}{:05}", group.number())
}

/// Where a catalog is, so that it can be opened again.
pub(crate) trait Home: Send {
    /// Opens it and reads every group's log.
    fn open(&self) -> Result<(Disk, Vec<(GroupId, GroupLog)>), DiskError>;
    /// Finds out whether there is room to go on.
    fn has_room(&self) -> Result<bool, DiskError>;
}

/// A directory of the file system.
#[derive(Debug)]
pub(crate) struct RealHome {
    pub(crate) path: PathBuf,
    pub(crate) owner: Owner,
}

impl Home for RealHome {
    fn open(&self) -> Result<(Disk, Vec<(GroupId, GroupLog)>), DiskError> {
        Disk::open(&self.path, self.owner)
    }

    fn has_room(&self) -> Result<bool, DiskError> {
        has_room(&RealDirectory::new(&self.path), &self.path)
    }
}

/// Whether one more segment, and the snapshot of a group of ordinary size, can be written.
pub(crate) fn has_room(directory: &dyn Directory, path: &Path) -> Result<bool, DiskError> {
    let probe = |bytes: &[u8]| {
        let file = directory.create(PROBE)?;
        for piece in 0..PROBE_BYTES / bytes.len() {
            file.write_at((piece * bytes.len()) as u64, bytes)?;
        }
        file.sync()
    };
    let written = probe(&[0; 64 * 1024]);
    let removed = match directory.remove(PROBE) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    match removed.and(written) {
        Ok(()) => Ok(true),
        Err(error) if is_full(&error) => Ok(false),
        Err(error) => Err(Problem {
            path: path.to_owned(),
        }
        .of(WalError::Io(error))),
    }
}

/// Makes an empty catalog in the directory `path`, which must not be there or be empty.
///
/// # Errors
/// [`DiskError::Present`], or when it cannot be written.
pub fn create(path: &Path, owner: Owner) -> Result<(), DiskError> {
    let io = |error: std::io::Error| DiskError::Io(format!("{}: {error}", path.display()));
    std::fs::create_dir_all(path).map_err(io)?;
    let directory = RealDirectory::new(path);
    if !directory.list().map_err(io)?.is_empty() {
        return Err(DiskError::Present(path.to_owned()));
    }
    create_in(&directory, owner).map_err(|error| {
        Problem {
            path: path.to_owned(),
        }
        .of(error)
    })?;
    // The directory's own name.
    if let Some(parent) = path.parent() {
        std::fs::File::open(parent)
            .and_then(|parent| parent.sync_all())
            .map_err(io)?;
    }
    Ok(())
}

pub(crate) fn create_in(directory: &dyn Directory, owner: Owner) -> Result<(), WalError> {
    let nothing = codec::encode(RECORD_VERSION, &Vec::<Change>::new())
        .map_err(|error| std::io::Error::other(error.to_string()))?;
    Wal::create(directory, owner, &nothing).map(|_| ())
}

impl Disk {
    /// Opens the catalog in the directory `path` and reads every group's log.
    pub(crate) fn open(
        path: &Path,
        owner: Owner,
    ) -> Result<(Self, Vec<(GroupId, GroupLog)>), DiskError> {
        if !path.is_dir() {
            return Err(DiskError::Missing(path.to_owned()));
        }
        Self::open_in(Box::new(RealDirectory::new(path)), path, owner)
    }

    pub(crate) fn open_in(
        directory: Box<dyn Directory>,
        path: &Path,
        owner: Owner,
    ) -> Result<(Self, Vec<(GroupId, GroupLog)>), DiskError> {
        let problem = Problem {
            path: path.to_owned(),
        };
        let io = |error| problem.of(WalError::Io(error));
        let mut snapshots = BTreeMap::new();
        let mut clock = Revision::NONE;
        for name in directory.list().map_err(io)? {
            if name.ends_with(UNFINISHED) {
                directory.remove(&name).map_err(io)?;
            } else if name.starts_with(SNAPSHOT_PREFIX) {
                let (group, snapshot) =
                    read_snapshot(&*directory, &name).map_err(|error| problem.of(error))?;
                snapshots.insert(group, snapshot);
            } else if name == CLOCK {
                clock = read_clock(&*directory).map_err(|error| problem.of(error))?;
            }
        }
        let mut groups: BTreeMap<GroupId, Replayed> = BTreeMap::new();
        let mut places: BTreeMap<GroupId, Places> = BTreeMap::new();
        let wal = Wal::open(&*directory, owner, |segment, payload| {
            let changes: Vec<Change> = codec::decode(RECORD_VERSION, payload, RECORD_BYTES_MAX)
                .map_err(|error| OpenError::Record(segment, error))?;
            for change in changes {
                let places = places.entry(change.group).or_default();
                places.take(&change, segment);
                groups.entry(change.group).or_default().take(change);
            }
            Ok(())
        })
        .map_err(|error| match error {
            OpenError::Wal(error) => problem.of(error),
            OpenError::Record(segment, error) => problem.of(WalError::Damaged {
                file: wal::name_of(segment),
                offset: 0,
                reason: error.to_string(),
            }),
        })?;
        let mut replaced = Vec::new();
        for (group, snapshot) in &snapshots {
            let replayed = groups.entry(*group).or_default();
            if replayed.adopt(snapshot) {
                replaced.push(Change {
                    group: *group,
                    truncate_from: Some(0),
                    entries: Vec::new(),
                    hard_state: replayed.hard_state,
                    start: replayed.start,
                });
            }
        }
        let mut states = BTreeMap::new();
        let mut logs = Vec::new();
        for (group, replayed) in groups {
            let snapshot = snapshots.remove(&group);
            replayed
                .check(snapshot.as_ref())
                .map_err(|reason| DiskError::Damaged {
                    path: path.to_owned(),
                    offset: 0,
                    reason: format!("group {group}: {reason}"),
                })?;
            let Replayed {
                hard_state,
                start,
                entries,
            } = replayed;
            states.insert(group, State { hard_state, start });
            let log = GroupLog::new(hard_state, snapshot, start, entries.into_values());
            logs.push((group, log));
        }
        let mut disk = Self {
            directory,
            path: path.to_owned(),
            wal,
            states,
            places,
            written: 0,
            clock,
            storing: BTreeMap::new(),
        };
        if !replaced.is_empty() {
            disk.append(&replaced)?;
        }
        Ok((disk, logs))
    }

    /// Segments are full earlier: a simulation shall see many.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) const fn limit_segments(&mut self, bytes: u64) {
        self.wal.segment_bytes = bytes;
    }

    /// Number of the oldest segment, and the bytes of all.
    #[cfg(test)]
    pub(crate) fn segments(&self) -> (u64, u64) {
        (self.wal.oldest().0, self.wal.bytes())
    }

    fn problem(&self, error: WalError) -> DiskError {
        Problem {
            path: self.path.clone(),
        }
        .of(error)
    }

    /// Writes a round durably: when this returns, it is on the disk. After an error nothing may be
    /// written any more.
    pub(crate) fn write(&mut self, writes: Vec<Write>) -> Result<(), DiskError> {
        let mut changes = Vec::with_capacity(writes.len());
        for mut write in writes {
            if let Some(snapshot) = &write.snapshot {
                self.take_snapshot(&write.change, snapshot)?;
            }
            self.hold_back(&mut write.change);
            changes.push(write.change);
        }
        for piece in pieces(changes) {
            self.append(&piece)?;
        }
        self.drop_old()
    }

    fn append(&mut self, changes: &[Change]) -> Result<(), DiskError> {
        if self.wal.is_full() {
            let checkpoint: Vec<Change> = self
                .states
                .iter()
                .map(|(group, state)| Change {
                    group: *group,
                    truncate_from: None,
                    entries: Vec::new(),
                    hard_state: state.hard_state,
                    start: state.start,
                })
                .collect();
            let bytes = encode(&checkpoint)?;
            self.wal
                .rotate(&*self.directory, &bytes)
                .map_err(|error| self.problem(error))?;
        }
        let bytes = encode(changes)?;
        self.written += bytes.len();
        self.wal
            .append(&bytes)
            .map_err(|error| self.problem(error))?;
        for change in changes {
            let places = self.places.entry(change.group).or_default();
            places.take(change, self.wal.current());
            let state = State {
                hard_state: change.hard_state,
                start: change.start,
            };
            self.states.insert(change.group, state);
        }
        Ok(())
    }

    /// Gives room back that is held in reserve. Then nothing of the catalog's files changes any
    /// more unless it is written to.
    pub(crate) fn release(&self) {
        self.directory.release();
    }

    /// What was written with [`Self::keep_clock`] last.
    pub(crate) const fn clock(&self) -> Revision {
        self.clock
    }

    /// Notes durably that this node may have promised that no stamp up to `bound` is given any
    /// more.
    pub(crate) fn keep_clock(&mut self, bound: Revision) -> Result<(), DiskError> {
        let payload = codec::encode(CLOCK_VERSION, &bound).map_err(|source| DiskError::Encode {
            group: GroupId::META,
            source,
        })?;
        let unfinished = format!("{CLOCK}{UNFINISHED}");
        self.directory
            .create(&unfinished)
            .and_then(|file| {
                file.write_at(0, &frame::write(1, &payload))?;
                file.sync()
            })
            .and_then(|()| self.directory.rename(&unfinished, CLOCK))
            .map_err(|error| self.problem(WalError::Io(error)))?;
        self.clock = bound;
        Ok(())
    }

    /// Whether a group has entries in a segment that are still wanted.
    fn is_held(&self, segment: u64) -> bool {
        self.places.values().any(|places| places.hold(segment))
    }

    fn drop_old(&mut self) -> Result<(), DiskError> {
        loop {
            let (oldest, count) = self.wal.oldest();
            if count < 2 || self.is_held(oldest) && !planted::has(Bug::SegmentDroppedEarly) {
                return Ok(());
            }
            self.wal
                .drop_oldest(&*self.directory)
                .map_err(|error| self.problem(error))?;
        }
    }

    /// Entries that should be written again, as runs of indices: they hold the oldest
    /// segment, and most of what is on the disk is no longer wanted. `live`: bytes of all that is.
    /// A group whose snapshot is on its way is not named: that may let go what it holds.
    pub(crate) fn to_rewrite(
        &self,
        live: impl FnOnce() -> usize,
    ) -> Vec<(GroupId, RangeInclusive<u64>)> {
        let (oldest, count) = self.wal.oldest();
        if count <= SEGMENTS_MIN
            || self.wal.bytes() < SEGMENTS_MIN as u64 * self.wal.segment_bytes + 2 * live() as u64
        {
            return Vec::new();
        }
        let groups = self.places.iter();
        groups
            .filter(|(group, _)| !self.storing.contains_key(group))
            .flat_map(|(group, places)| places.runs(oldest).map(|run| (*group, run)))
            .collect()
    }

    /// How much of what [`Self::to_rewrite`] names is written again before anything else is: one
    /// portion, or twice what was written since [`Self::rewritten`]. So the log does not grow however
    /// much is written, and nobody waits much longer than for those writes.
    pub(crate) fn rewrite_bytes(&self) -> usize {
        self.portion_bytes().max(2 * self.written)
    }

    /// Bytes of one write of entries again. With its last entry it fits into a record, so that the
    /// log never says that less is committed than before.
    pub(crate) const fn portion_bytes(&self) -> usize {
        (self.wal.segment_bytes / REWRITE_PORTIONS) as usize
    }

    /// Enough was written again for what was written before.
    pub(crate) const fn rewritten(&mut self) {
        self.written = 0;
    }
}

fn encode(changes: &[Change]) -> Result<Vec<u8>, DiskError> {
    codec::encode(RECORD_VERSION, &changes).map_err(|source| DiskError::Encode {
        group: changes.first().map_or(GroupId::META, |change| change.group),
        source,
    })
}

/// Cuts a round into records of bounded size. A group's state before its last entry must not
/// claim that a later one is committed.
fn pieces(changes: Vec<Change>) -> Vec<Vec<Change>> {
    let mut pieces = Vec::new();
    let mut piece = Vec::new();
    let mut bytes = 0;
    for change in changes {
        let mut rest = change;
        loop {
            let mut room = PIECE_BYTES.saturating_sub(bytes);
            let fitting = rest
                .entries
                .iter()
                .take_while(|entry| {
                    let size = entry.data.len() + entry.context.len() + ENTRY_BYTES;
                    let fits = size <= room;
                    room = room.saturating_sub(size);
                    fits
                })
                .count();
            if fitting == rest.entries.len() {
                bytes = PIECE_BYTES - room;
                piece.push(rest);
                break;
            }
            // An entry larger than a piece is a piece.
            let count = if piece.is_empty() {
                fitting.max(1)
            } else {
                fitting
            };
            if count > 0 {
                let later = rest.entries.split_off(count);
                let mut first = rest.clone();
                if let Some(last) = first.entries.last() {
                    first.hard_state.commit = first.hard_state.commit.min(last.index);
                }
                piece.push(first);
                rest.entries = later;
                rest.truncate_from = None;
            }
            pieces.push(std::mem::take(&mut piece));
            bytes = 0;
        }
    }
    if !piece.is_empty() {
        pieces.push(piece);
    }
    pieces
}

fn damaged(name: &str, reason: String) -> WalError {
    WalError::Damaged {
        file: name.to_owned(),
        offset: 0,
        reason,
    }
}

/// The payload of a file that is one frame.
fn read_whole<'a>(bytes: &'a [u8], name: &str) -> Result<&'a [u8], WalError> {
    let Found::Frame { payload, .. } = frame::read(bytes, 0, 1) else {
        let reason = "its contents are not what was written";
        return Err(damaged(name, reason.to_owned()));
    };
    Ok(payload)
}

fn read_snapshot(directory: &dyn Directory, name: &str) -> Result<(GroupId, Snapshot), WalError> {
    let bytes = directory.read(name)?;
    let payload = read_whole(&bytes, name)?;
    let (group, snapshot): (GroupId, Snapshot) = codec::decode_large(SNAPSHOT_VERSION, payload)
        .map_err(|error| damaged(name, error.to_string()))?;
    if snapshot_name(group) != name {
        let reason = format!("it is the snapshot of group {group}");
        return Err(damaged(name, reason));
    }
    Ok((group, snapshot))
}

fn read_clock(directory: &dyn Directory) -> Result<Revision, WalError> {
    let bytes = directory.read(CLOCK)?;
    let payload = read_whole(&bytes, CLOCK)?;
    codec::decode(CLOCK_VERSION, payload, RECORD_BYTES_MAX)
        .map_err(|error| damaged(CLOCK, error.to_string()))
}
