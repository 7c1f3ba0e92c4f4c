//! All groups on the disk: their logs share one write-ahead log, so that a round of all groups
//! costs one sync; each group's snapshot is a file of its own.
//!
//! A segment goes when no group needs an entry in it any more. A group that is silent for long
//! would hold segments for ever; its entries are then written again at the end.

mod storing;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use krake_model::codec::{self, CodecError, RECORD_BYTES_MAX};
use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::disk::storing::{SLICE_BYTES, Storing};
use crate::frame::{self, Found};
use crate::log::{GroupLog, HardState};
use crate::medium::{Directory, RealDirectory};
use crate::planted::{self, Bug};
use crate::wal::{Owner, Wal, WalError};
use crate::wire::{Entry, Snapshot};

const RECORD_VERSION: u8 = 1;
const SNAPSHOT_VERSION: u8 = 1;
/// A record is closed when its entries have about this many bytes.
const PIECE_BYTES: usize = 4 * 1024 * 1024;
/// Segments that are kept before old entries are written again to let one go.
const SEGMENTS_MIN: usize = 4;
const SNAPSHOT_PREFIX: &str = "snapshot-";
const UNFINISHED: &str = ".tmp";
/// See [`Disk::keep_clock`].
const CLOCK: &str = "clock";
const CLOCK_VERSION: u8 = 1;
/// Written and removed to find out whether there is room again.
const PROBE: &str = "room.tmp";
const PROBE_BYTES: usize = 32 * 1024 * 1024;

/// The catalog's files failed; the host stops, because a state that was not written must not be
/// acted upon.
#[derive(Debug, Error)]
pub enum DiskError {
    /// Reading or writing failed.
    #[error("the catalog's files failed: {0}")]
    Io(String),
    /// There is no room left. Nothing of the last write may be relied on; the catalog can be
    /// opened again as after a crash.
    #[error("there is no room left for the catalog in {}: free some, this node then goes on by itself", .0.display())]
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

/// One group while the log is read.
#[derive(Debug, Default)]
struct Replayed {
    hard_state: HardState,
    start: (u64, u64),
    entries: BTreeMap<u64, Entry>,
}

impl Replayed {
    fn take(&mut self, change: Change) {
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
    /// not lead to replaces it.
    fn adopt(&mut self, snapshot: &Snapshot) {
        let known = if snapshot.index == self.start.0 {
            Some(self.start.1)
        } else {
            self.entries.get(&snapshot.index).map(|entry| entry.term)
        };
        // Only what is committed is in a snapshot.
        self.hard_state.commit = self.hard_state.commit.max(snapshot.index);
        if known == Some(snapshot.term) {
            return;
        }
        self.entries.clear();
        self.start = (snapshot.index, snapshot.term);
        if self.hard_state.term < snapshot.term {
            self.hard_state.term = snapshot.term;
            self.hard_state.vote = 0;
        }
    }

    fn check(&self, snapshot: Option<&Snapshot>) -> Result<(), String> {
        let mut expected = self.start.0 + 1;
        for index in self.entries.keys() {
            if *index != expected {
                return Err(format!("entry {expected} is missing before {index}"));
            }
            expected += 1;
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

/// A group's last state.
#[derive(Debug, Clone, Copy)]
struct State {
    hard_state: HardState,
    start: (u64, u64),
}

/// The files.
pub(crate) struct Disk {
    directory: Box<dyn Directory>,
    path: PathBuf,
    wal: Wal,
    states: BTreeMap<GroupId, State>,
    places: BTreeMap<GroupId, Places>,
    clock: Revision,
    /// Snapshots that are not in force yet.
    storing: BTreeMap<GroupId, Storing>,
    slice_bytes: usize,
}

/// In which segments one group's entries are, newest copies only: ranges of indices in order.
#[derive(Debug, Default, PartialEq, Eq)]
struct Places(Vec<Place>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    first: u64,
    last: u64,
    segment: u64,
}

impl Places {
    fn take(&mut self, change: &Change, segment: u64) {
        if let Some(from) = change.truncate_from {
            self.forget(from, u64::MAX);
        }
        if let (Some(first), Some(last)) = (change.entries.first(), change.entries.last()) {
            self.forget(first.index, last.index);
            let place = Place {
                first: first.index,
                last: last.index,
                segment,
            };
            let at = self.0.partition_point(|old| old.last < place.first);
            match at.checked_sub(1).map(|before| &mut self.0[before]) {
                Some(before) if before.segment == segment && before.last + 1 == place.first => {
                    before.last = place.last;
                }
                _ => self.0.insert(at, place),
            }
        }
        self.forget(0, change.start.0);
    }

    fn forget(&mut self, first: u64, last: u64) {
        if self.0.last().is_none_or(|place| place.last < first)
            || self.0.first().is_none_or(|place| place.first > last)
        {
            return;
        }
        let mut kept = Vec::with_capacity(self.0.len() + 1);
        for place in &self.0 {
            if place.first < first {
                kept.push(Place {
                    last: place.last.min(first - 1),
                    ..*place
                });
            }
            if place.last > last {
                kept.push(Place {
                    first: place.first.max(last + 1),
                    ..*place
                });
            }
        }
        self.0 = kept;
    }

    fn hold(&self, segment: u64) -> bool {
        self.0.iter().any(|place| place.segment == segment)
    }
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
                file: format!("segment {segment}"),
                offset: 0,
                reason: error.to_string(),
            }),
        })?;
        for (group, snapshot) in &snapshots {
            groups.entry(*group).or_default().adopt(snapshot);
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
        let disk = Self {
            directory,
            path: path.to_owned(),
            wal,
            states,
            places,
            clock,
            storing: BTreeMap::new(),
            slice_bytes: SLICE_BYTES,
        };
        Ok((disk, logs))
    }

    /// Segments are full earlier: a simulation shall see many.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) const fn limit_segments(&mut self, bytes: u64) {
        self.wal.segment_bytes = bytes;
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

    /// Groups with entries in a segment that are still wanted.
    fn holders(&self, segment: u64) -> BTreeSet<GroupId> {
        self.places
            .iter()
            .filter(|(_, places)| places.hold(segment))
            .map(|(group, _)| *group)
            .collect()
    }

    fn drop_old(&mut self) -> Result<(), DiskError> {
        loop {
            let (oldest, count) = self.wal.oldest();
            let held = !self.holders(oldest).is_empty();
            if count < 2 || held && !planted::has(Bug::SegmentDroppedEarly) {
                return Ok(());
            }
            self.wal
                .drop_oldest(&*self.directory)
                .map_err(|error| self.problem(error))?;
        }
    }

    /// Groups whose entries should be written again, because they alone hold the oldest segment
    /// and most of what is on the disk is no longer wanted. `live`: bytes of all logs' entries.
    pub(crate) fn to_rewrite(&self, live: impl FnOnce() -> usize) -> BTreeSet<GroupId> {
        let (oldest, count) = self.wal.oldest();
        // What a snapshot that is on its way will let go needs not be written again.
        if !self.storing.is_empty()
            || count <= SEGMENTS_MIN
            || self.wal.bytes() < SEGMENTS_MIN as u64 * self.wal.segment_bytes + 2 * live() as u64
        {
            return BTreeSet::new();
        }
        self.holders(oldest)
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
                    let size = entry.data.len() + entry.context.len() + 64;
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

/// What [`Disk::replace`] wrote.
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;
    use crate::medium::memory::MemoryDirectory;
    use crate::wire::{Configuration, EntryKind};

    const PATH: &str = "catalog";

    fn owner() -> Owner {
        Owner {
            federation: krake_model::ids::FederationId::from_bytes([1; 32]),
            node: krake_model::ids::NodeId::from_bytes([2; 32]),
        }
    }

    /// What a group must have after a restart.
    #[derive(Debug, Clone, Default, PartialEq)]
    struct Model {
        hard_state: HardState,
        start: (u64, u64),
        entries: Vec<(u64, u64, Bytes)>,
        snapshot: Option<(u64, u64)>,
    }

    impl Model {
        fn of(log: &GroupLog) -> Self {
            Self {
                hard_state: log.hard_state,
                start: log.start(),
                entries: log
                    .entries()
                    .map(|entry| (entry.index, entry.term, entry.data.clone()))
                    .collect(),
                snapshot: log
                    .snapshot
                    .as_ref()
                    .map(|snapshot| (snapshot.index, snapshot.term)),
            }
        }

        fn last(&self) -> u64 {
            self.start.0 + self.entries.len() as u64
        }
    }

    type Models = BTreeMap<GroupId, Model>;

    fn open(directory: &Arc<MemoryDirectory>) -> Result<(Disk, Models), DiskError> {
        let (disk, logs) =
            Disk::open_in(Box::new(Arc::clone(directory)), Path::new(PATH), owner())?;
        let models = logs
            .iter()
            .map(|(group, log)| (*group, Model::of(log)))
            .collect();
        Ok((disk, models))
    }

    fn fresh() -> Arc<MemoryDirectory> {
        let directory = Arc::new(MemoryDirectory::default());
        create_in(&directory, owner()).unwrap();
        directory
    }

    /// Changes one group as Raft does: appends, replaces a tail that is not committed, commits,
    /// compacts behind a snapshot, or takes a leader's snapshot.
    fn step(random: &mut StdRng, group: GroupId, model: &mut Model, size: usize) -> Write {
        let mut write = Write {
            change: Change {
                group,
                truncate_from: None,
                entries: Vec::new(),
                hard_state: model.hard_state,
                start: model.start,
            },
            snapshot: None,
        };
        let kind = random.random_range(0..10);
        if kind == 0 {
            // From a leader, far ahead.
            let index = model.last() + random.random_range(1..50);
            let term = model.hard_state.term + 1;
            *model = Model {
                hard_state: HardState {
                    term,
                    vote: 0,
                    commit: index,
                },
                start: (index, term),
                entries: Vec::new(),
                snapshot: Some((index, term)),
            };
            write.change.truncate_from = Some(0);
            write.snapshot = Some(snapshot(index, term));
        } else if kind == 1 && model.hard_state.commit > model.start.0 {
            let index = model.hard_state.commit;
            let position = (index - model.start.0 - 1) as usize;
            let term = model.entries[position].1;
            model.snapshot = Some((index, term));
            let kept = random.random_range(0..3_u64);
            let cut = index.saturating_sub(kept).max(model.start.0);
            while model.start.0 < cut {
                let (index, term, _) = model.entries.remove(0);
                model.start = (index, term);
            }
            write.snapshot = Some(snapshot(index, term));
        } else {
            if kind == 2 {
                model.hard_state.term += 1;
                model.hard_state.vote = random.random_range(0..4);
            }
            let first = random.random_range(model.hard_state.commit + 1..=model.last() + 1);
            if first <= model.last() {
                write.change.truncate_from = Some(first);
                model.entries.truncate((first - model.start.0 - 1) as usize);
                model.hard_state.term += 1;
                model.hard_state.vote = 0;
            }
            for index in first..first + random.random_range(0..4) {
                let data = vec![random.random(); random.random_range(0..size)];
                let data = Bytes::from(data);
                model
                    .entries
                    .push((index, model.hard_state.term, data.clone()));
                write.change.entries.push(Entry {
                    kind: EntryKind::Normal,
                    term: model.hard_state.term,
                    index,
                    data,
                    context: Bytes::new(),
                });
            }
            model.hard_state.commit = random.random_range(model.hard_state.commit..=model.last());
        }
        write.change.hard_state = model.hard_state;
        write.change.start = model.start;
        write
    }

    fn snapshot(index: u64, term: u64) -> Snapshot {
        Snapshot {
            index,
            term,
            configuration: Configuration::default(),
            data: Bytes::from_static(b"map"),
        }
    }

    fn round(random: &mut StdRng, models: &mut Models, size: usize) -> Vec<Write> {
        let mut writes = Vec::new();
        for number in 0..random.random_range(1..4_u32) {
            let group = GroupId::from_number(number * random.random_range(1..4));
            if writes
                .iter()
                .all(|write: &Write| write.change.group != group)
            {
                let model = models.entry(group).or_default();
                writes.push(step(random, group, model, size));
            }
        }
        writes
    }

    /// A group after a power cut in the middle of a round: as before, or as after, or with the
    /// snapshot of the round and the log of before.
    fn plausible(found: Option<&Model>, before: Option<&Model>, after: Option<&Model>) -> bool {
        if found == before || found == after {
            return true;
        }
        let (Some(found), Some(after)) = (found, after) else {
            return false;
        };
        let before = before.cloned().unwrap_or_default();
        let adopted = found.snapshot == after.snapshot && found.snapshot != before.snapshot;
        adopted
            && found.hard_state.commit >= before.hard_state.commit
            && found.hard_state.term >= before.hard_state.term
            && (found.entries == before.entries
                || (found.entries.is_empty() && Some(found.start) == found.snapshot))
    }

    #[test]
    fn the_clock_is_kept_in_these_bytes_and_damage_to_it_is_an_error() {
        let directory = Arc::<MemoryDirectory>::default();
        create_in(&*directory, owner()).ok().unwrap();
        let open = || Disk::open_in(Box::new(Arc::clone(&directory)), Path::new(PATH), owner());
        let (mut disk, _) = open().unwrap();
        assert_eq!(disk.clock(), Revision::NONE);
        disk.keep_clock(Revision::from_number(0x1234)).unwrap();
        assert_eq!(open().unwrap().0.clock(), Revision::from_number(0x1234));
        let mut bytes = directory.read(CLOCK).unwrap();
        assert_eq!(
            hex::encode(&bytes),
            concat!(
                "0900000060fcd62a01000000000000008dd0b4004b524b46",
                "013412000000000000000000000000004b524b4652414d45"
            )
        );
        bytes[25] ^= 1;
        directory
            .create(CLOCK)
            .unwrap()
            .write_at(0, &bytes)
            .unwrap();
        let error = open().unwrap_err();
        assert!(
            error.to_string().starts_with("catalog/clock is damaged"),
            "{error}"
        );
    }

    #[test]
    fn what_was_acknowledged_is_there_after_a_power_cut_at_any_moment() {
        for seed in 0..200 {
            let mut random = StdRng::seed_from_u64(seed);
            let directory = fresh();
            let (mut disk, mut models) = open(&directory).unwrap();
            for _ in 0..random.random_range(1..12) {
                // Every so often the power goes within the next few operations on files.
                directory.fail_after(random.random_range(0..40), seed);
                let mut cut = false;
                for _ in 0..random.random_range(1..20) {
                    let before = models.clone();
                    let writes = round(&mut random, &mut models, 3000);
                    if disk.write(writes).is_ok() {
                        continue;
                    }
                    drop(disk);
                    directory.power_cut();
                    let found;
                    (disk, found) =
                        open(&directory).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
                    let groups: BTreeSet<_> = models.keys().chain(found.keys()).collect();
                    for group in groups {
                        assert!(
                            plausible(found.get(group), before.get(group), models.get(group)),
                            "seed {seed}, group {group}: {:#?} is neither {:#?} nor {:#?}",
                            found.get(group),
                            before.get(group),
                            models.get(group)
                        );
                    }
                    models = found;
                    cut = true;
                    break;
                }
                if !cut {
                    // A clean stop: nothing is missing, and nothing else is there.
                    directory.never_fail();
                    drop(disk);
                    let found;
                    (disk, found) = open(&directory).unwrap();
                    assert_eq!(found, models, "seed {seed}");
                }
            }
        }
    }

    #[test]
    fn old_segments_go_and_a_silent_group_does_not_hold_them() {
        let directory = fresh();
        let (mut disk, _) = open(&directory).unwrap();
        let silent = GroupId::from_number(9);
        let entry = |index: u64, bytes: usize| Entry {
            kind: EntryKind::Normal,
            term: 1,
            index,
            data: vec![3; bytes].into(),
            context: Bytes::new(),
        };
        let change = |group, entries, start: u64, commit| Write {
            change: Change {
                group,
                truncate_from: None,
                entries,
                hard_state: HardState {
                    term: 1,
                    vote: 1,
                    commit,
                },
                start: (start, 1),
            },
            snapshot: (start > 0).then(|| snapshot(start, 1)),
        };
        let small = change(silent, vec![entry(1, 10)], 0, 1);
        disk.write(vec![small.clone()]).unwrap();
        let busy = GroupId::from_number(1);
        let mut most = 0;
        for index in 1..200 {
            let write = change(busy, vec![entry(index, 1_000_000)], index - 1, index - 1);
            disk.write(vec![write]).unwrap();
            for group in disk.to_rewrite(|| 1_000_010) {
                assert_eq!(group, silent);
                disk.write(vec![small.clone()]).unwrap();
            }
            most = most.max(disk.wal.oldest().1);
        }
        assert!(most > SEGMENTS_MIN && most <= SEGMENTS_MIN + 2, "{most}");
        let (_, found) = open(&directory).unwrap();
        assert_eq!(found[&silent].entries.len(), 1);
        assert_eq!(found[&busy].last(), 199);
    }

    #[test]
    fn a_round_larger_than_a_record_is_written_in_pieces() {
        let directory = fresh();
        let (mut disk, mut models) = open(&directory).unwrap();
        let mut random = StdRng::seed_from_u64(5);
        let mut writes = Vec::new();
        for number in 0..3 {
            let group = GroupId::from_number(number);
            let model = models.entry(group).or_default();
            *model = Model {
                hard_state: HardState {
                    term: 1,
                    vote: 1,
                    commit: 5,
                },
                start: (0, 0),
                entries: (1..=7)
                    .map(|index| {
                        let size = random.random_range(500_000..6_000_000);
                        (index, 1, Bytes::from(vec![index as u8; size]))
                    })
                    .collect(),
                snapshot: None,
            };
            writes.push(Write {
                change: Change {
                    group,
                    truncate_from: None,
                    entries: model
                        .entries
                        .iter()
                        .map(|(index, term, data)| Entry {
                            kind: EntryKind::Normal,
                            term: *term,
                            index: *index,
                            data: data.clone(),
                            context: Bytes::new(),
                        })
                        .collect(),
                    hard_state: model.hard_state,
                    start: model.start,
                },
                snapshot: None,
            });
        }
        disk.write(writes).unwrap();
        assert_eq!(open(&directory).unwrap().1, models);
    }

    #[test]
    fn a_flipped_bit_anywhere_is_an_error_that_names_the_file() {
        let directory = fresh();
        let (mut disk, mut models) = open(&directory).unwrap();
        let mut random = StdRng::seed_from_u64(2);
        for _ in 0..20 {
            let writes = round(&mut random, &mut models, 200);
            disk.write(writes).unwrap();
        }
        drop(disk);
        let (mut refused, mut harmless) = (0, 0);
        for name in directory.list().unwrap() {
            let original = directory.read(&name).unwrap();
            let written = original.iter().rposition(|byte| *byte != 0).unwrap();
            for at in (0..=written).step_by(7) {
                let mut bytes = original.clone();
                bytes[at] ^= 1 << random.random_range(0..8);
                directory.put(&name, bytes);
                match open(&directory) {
                    // The padding of a frame says nothing.
                    Ok((_, found)) => {
                        assert_eq!(found, models, "{name} at {at}: another state was read");
                        harmless += 1;
                    }
                    Err(DiskError::Damaged { path, .. }) => {
                        assert!(path.ends_with(&name), "{} for {name}", path.display());
                        refused += 1;
                    }
                    Err(error) => panic!("{name} at {at}: {error}"),
                }
            }
            directory.put(&name, original);
        }
        assert!(
            refused > 50 * harmless,
            "{refused} refused, {harmless} harmless"
        );
    }

    fn name_of_last(names: &[String]) -> String {
        names
            .iter()
            .filter(|name| name.starts_with("segment"))
            .max()
            .unwrap()
            .clone()
    }

    #[test]
    fn files_that_are_gone_or_of_others_are_errors() {
        let directory = fresh();
        let (mut disk, mut models) = open(&directory).unwrap();
        let mut random = StdRng::seed_from_u64(3);
        while disk.wal.oldest().1 < 4 {
            let writes = round(&mut random, &mut models, 3_000_000);
            disk.write(writes).unwrap();
        }
        drop(disk);
        let other = Owner {
            node: krake_model::ids::NodeId::from_bytes([3; 32]),
            ..owner()
        };
        let foreign = Disk::open_in(Box::new(Arc::clone(&directory)), Path::new(PATH), other);
        assert!(matches!(foreign, Err(DiskError::Foreign { .. })));
        let names = directory.list().unwrap();
        assert!(
            names
                .iter()
                .filter(|name| name.starts_with("segment"))
                .count()
                > 2
        );
        // That the last segment is gone cannot be seen.
        let last = name_of_last(&names);
        for name in names.into_iter().filter(|name| *name != last) {
            let bytes = directory.read(&name).unwrap();
            directory.remove(&name).unwrap();
            match open(&directory) {
                Err(DiskError::Damaged { .. }) => {}
                // A snapshot is not wanted when the log begins at the first entry.
                Ok((_, found)) => assert!(
                    name.starts_with(SNAPSHOT_PREFIX)
                        && found
                            .values()
                            .all(|model| model.snapshot.is_some() || model.start.0 == 0),
                    "{name} is gone and nobody noticed"
                ),
                Err(error) => panic!("{name}: {error}"),
            }
            directory.put(&name, bytes);
        }
        for name in directory.list().unwrap() {
            directory.remove(&name).unwrap();
        }
        assert!(matches!(open(&directory), Err(DiskError::Missing(_))));
    }

    #[test]
    fn a_record_is_these_bytes_for_ever() {
        let change = Change {
            group: GroupId::from_number(3),
            truncate_from: Some(7),
            entries: vec![Entry {
                kind: EntryKind::ConfChange,
                term: 2,
                index: 7,
                data: Bytes::from_static(b"d"),
                context: Bytes::from_static(b"c"),
            }],
            hard_state: HardState {
                term: 2,
                vote: 1,
                commit: 6,
            },
            start: (5, 1),
        };
        assert_eq!(
            hex::encode(encode(&[change]).unwrap()),
            "010100000000000000030000000107000000000000000100000000000000010000000200000000000000\
             070000000000000001000000000000006401000000000000006302000000000000000100000000000000\
             060000000000000005000000000000000100000000000000"
        );
        let stored = codec::encode(
            SNAPSHOT_VERSION,
            &(GroupId::from_number(3), &snapshot(9, 2)),
        );
        assert_eq!(
            hex::encode(stored.unwrap()),
            "0103000000090000000000000002000000000000000000000000000000000000000000000003000000000000006d6170"
        );
    }
}
