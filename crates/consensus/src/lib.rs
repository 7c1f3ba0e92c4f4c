//! Multi-Raft host: replicated key-value groups on disk, linearizable reads, watches.
//!
//! A node runs one [`Host`]. Each group is a Raft group (Ongaro and Ousterhout 2014, crate
//! `raft`) whose state machine is an ordered map from text keys to bytes. Commands are
//! compare-and-set, carry a request id and apply at most once. All groups of a node share one
//! thread, one log on disk, one fsync per round and one frame per peer and round.

mod backup;
pub mod command;
mod core;
mod disk;
mod engine;
mod feeds;
mod follow;
mod frame;
mod gate;
mod group;
mod home;
mod host;
mod inputs;
mod inspect;
mod log;
mod machine;
mod medium;
mod planted;
mod replica;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
mod snapshots;
#[cfg(test)]
mod testing;
mod voters;
mod wal;
mod wire;

pub use crate::backup::{Backup, BackupError, BackupWriter};
pub use crate::command::{
    Command, Committed, Expect, Operation, ProposeError, ReadError, RequestId,
};
pub use crate::core::{Batch, GroupStatus};
pub use crate::disk::{DiskError, create};
pub use crate::follow::{Changes, Compacted, Following, KeptChanges};
pub use crate::host::{Config, Host, Listed, Part, Staleness, Transport};
pub use crate::inspect::{Counters, GroupDetail, PeerProgress, TransferError};
pub use crate::machine::{Change, Entry, GROUP_BYTES_MAX};
pub use crate::voters::{MemberInfo, Rule, desired_voters, unmet_rule, voter_count};
pub use crate::wal::Owner;
