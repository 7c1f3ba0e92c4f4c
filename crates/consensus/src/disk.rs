//! All groups' logs in one redb file: one transaction, one fsync, for what a round of all groups
//! must keep.

use std::path::Path;

use krake_model::codec::{self, CodecError, RECORD_BYTES_MAX};
use krake_model::ids::GroupId;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::log::{GroupLog, HardState};
use crate::wire::{Entry, Snapshot};

const ENTRIES: TableDefinition<(u32, u64), &[u8]> = TableDefinition::new("entries");
const STATES: TableDefinition<u32, &[u8]> = TableDefinition::new("states");
const SNAPSHOTS: TableDefinition<u32, &[u8]> = TableDefinition::new("snapshots");
const ENTRY_VERSION: u8 = 1;
const STATE_VERSION: u8 = 1;
const SNAPSHOT_VERSION: u8 = 1;
/// The whole catalog lives in memory; the file's cache only serves its own B-tree pages.
const CACHE_BYTES: usize = 4 * 1024 * 1024;

/// The catalog's file failed; the host stops, because a state that was not written must not be
/// acted upon.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The file could not be opened.
    #[error("cannot open the catalog {path}: {reason}")]
    Open {
        /// Where.
        path: String,
        /// Why.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("the catalog's file failed: {0}")]
    Io(String),
    /// A record cannot be read.
    #[error("a record of group {group} in the catalog's file is damaged: {source}")]
    Damaged {
        /// Which group.
        group: GroupId,
        /// What is wrong.
        source: CodecError,
    },
    /// The group is there already.
    #[error("group {0} exists already")]
    Exists(GroupId),
}

macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for DiskError {
            fn from(error: $error) -> Self {
                Self::Io(error.to_string())
            }
        }
    )*};
}
from_redb!(
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    redb::SetDurabilityError
);

#[derive(Debug, Clone, Serialize, Deserialize)]
struct StateRecord {
    hard_state: HardState,
    start: (u64, u64),
}

/// What one group must keep from one round.
#[derive(Debug)]
pub(crate) struct Write {
    pub(crate) group: GroupId,
    pub(crate) entries: Vec<Entry>,
    /// Entries from here on that are not in `entries` are gone.
    pub(crate) truncate_from: Option<u64>,
    pub(crate) snapshot: Option<Snapshot>,
    /// Entries before this index are gone.
    pub(crate) drop_before: Option<u64>,
    pub(crate) hard_state: HardState,
    pub(crate) start: (u64, u64),
}

/// The file.
#[derive(Debug)]
pub(crate) struct Disk {
    database: Database,
}

impl Disk {
    /// Opens the file and reads every group's log. The library panics on pages that make no sense;
    /// for the operator a damaged file is an error like others.
    pub(crate) fn open_and_load(
        path: &Path,
    ) -> Result<(Self, Vec<(GroupId, GroupLog)>), DiskError> {
        std::panic::catch_unwind(|| {
            let disk = Self::open(path)?;
            let groups = disk.load()?;
            Ok((disk, groups))
        })
        .unwrap_or_else(|_| {
            Err(DiskError::Open {
                path: path.display().to_string(),
                reason: "it is damaged: its contents make no sense".to_owned(),
            })
        })
    }

    pub(crate) fn open(path: &Path) -> Result<Self, DiskError> {
        let open = |reason: String| DiskError::Open {
            path: path.display().to_string(),
            reason,
        };
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|error| open(error.to_string()))?;
        let transaction = database.begin_write()?;
        {
            transaction.open_table(ENTRIES)?;
            transaction.open_table(STATES)?;
            transaction.open_table(SNAPSHOTS)?;
        }
        transaction.commit()?;
        Ok(Self { database })
    }

    /// Reads every group's log.
    pub(crate) fn load(&self) -> Result<Vec<(GroupId, GroupLog)>, DiskError> {
        let transaction = self.database.begin_read()?;
        let states = transaction.open_table(STATES)?;
        let entries = transaction.open_table(ENTRIES)?;
        let snapshots = transaction.open_table(SNAPSHOTS)?;
        let mut groups = Vec::new();
        for state in states.iter()? {
            let (number, state) = state?;
            let group = GroupId::from_number(number.value());
            let damaged = |source| DiskError::Damaged { group, source };
            let state: StateRecord =
                codec::decode(STATE_VERSION, state.value(), RECORD_BYTES_MAX).map_err(damaged)?;
            let snapshot = snapshots
                .get(number.value())?
                .map(|bytes| codec::decode(SNAPSHOT_VERSION, bytes.value(), RECORD_BYTES_MAX))
                .transpose()
                .map_err(damaged)?;
            let mut list = Vec::new();
            let from = state.start.0 + 1;
            for entry in entries.range((number.value(), from)..=(number.value(), u64::MAX))? {
                let (_, bytes) = entry?;
                let entry: Entry = codec::decode(ENTRY_VERSION, bytes.value(), RECORD_BYTES_MAX)
                    .map_err(damaged)?;
                list.push(entry);
            }
            groups.push((
                group,
                GroupLog::new(state.hard_state, snapshot, state.start, list),
            ));
        }
        Ok(groups)
    }

    /// Writes a round durably: when this returns, it is on the disk.
    pub(crate) fn write(&self, writes: &[Write]) -> Result<(), DiskError> {
        let transaction = self.database.begin_write()?;
        {
            let mut entries = transaction.open_table(ENTRIES)?;
            let mut states = transaction.open_table(STATES)?;
            let mut snapshots = transaction.open_table(SNAPSHOTS)?;
            for write in writes {
                let number = write.group.number();
                let damaged = |source| DiskError::Damaged {
                    group: write.group,
                    source,
                };
                if let Some(from) = write.truncate_from {
                    entries.retain_in((number, from)..=(number, u64::MAX), |_, _| false)?;
                }
                if let Some(before) = write.drop_before {
                    entries.retain_in((number, 0)..(number, before), |_, _| false)?;
                }
                for entry in &write.entries {
                    let bytes = codec::encode(ENTRY_VERSION, entry).map_err(damaged)?;
                    entries.insert((number, entry.index), bytes.as_slice())?;
                }
                if let Some(snapshot) = &write.snapshot {
                    let bytes = codec::encode(SNAPSHOT_VERSION, snapshot).map_err(damaged)?;
                    snapshots.insert(number, bytes.as_slice())?;
                }
                let state = StateRecord {
                    hard_state: write.hard_state,
                    start: write.start,
                };
                let bytes = codec::encode(STATE_VERSION, &state).map_err(damaged)?;
                states.insert(number, bytes.as_slice())?;
            }
        }
        transaction.commit()?;
        Ok(())
    }
}
