//! What an operator sees of a node's groups, and what was counted.

use std::sync::atomic::{AtomicU64, Ordering};

use krake_model::ids::GroupId;
use serde::{Deserialize, Serialize};

use crate::core::GroupStatus;

/// One group in full, as this node has it at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupDetail {
    /// Leader, term, voters, learners.
    pub status: GroupStatus,
    /// Index of the last entry known committed.
    pub commit: u64,
    /// Index of the last entry applied.
    pub applied: u64,
    /// Index of the last entry in the log.
    pub last: u64,
    /// Index up to which the newest snapshot reaches.
    pub snapshot: u64,
    /// Bytes of the entries kept in the log.
    pub log_bytes: usize,
    /// Nothing happens in it, so nothing is sent.
    pub asleep: bool,
    /// How far each other replica is; only the leader knows.
    pub peers: Vec<PeerProgress>,
}

/// How far another replica of a group is, as the group's leader knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PeerProgress {
    /// Its replica id.
    pub replica: u64,
    /// Up to this index its log is known to be the leader's.
    pub matched: u64,
    /// Whether it answered within the last election timeout.
    pub active: bool,
}

/// Leadership was not handed over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum TransferError {
    /// This node does not hold the group.
    #[error("this node does not hold group {group}")]
    UnknownGroup {
        /// Which group.
        group: GroupId,
    },
    /// The group has no leader that could hand over.
    #[error("group {group} has no leader now; a majority of its voters may be unreachable")]
    NoLeader {
        /// Which group.
        group: GroupId,
    },
    /// Only a voter can lead.
    #[error("replica {to} does not vote in group {group}")]
    NotVoter {
        /// Which group.
        group: GroupId,
        /// Whom it should go to.
        to: u64,
    },
    /// The new leader does not answer the present one.
    #[error("replica {to} has not answered the leader of group {group} lately")]
    Silent {
        /// Which group.
        group: GroupId,
        /// Whom it should go to.
        to: u64,
    },
    /// It was begun and is not known to be done. It may still happen within an election timeout.
    #[error("leadership of group {group} did not reach replica {to} within the time limit")]
    Timeout {
        /// Which group.
        group: GroupId,
        /// Whom it should go to.
        to: u64,
    },
    /// The host has stopped or failed.
    #[error("the catalog of this node has stopped")]
    Stopped,
}

/// Counts since this node's start, over all its groups; they only rise.
#[derive(Debug, Default)]
pub struct Counters {
    /// Terms that began.
    pub terms: AtomicU64,
    /// Times another replica, or none, was found leading.
    pub leader_changes: AtomicU64,
    /// Commands that clients proposed here.
    pub proposals: AtomicU64,
    /// Entries applied.
    pub applied: AtomicU64,
    /// Reads that asked for confirmation here.
    pub reads: AtomicU64,
    /// Rounds whose entries, votes and snapshots were written and synced.
    pub writes: AtomicU64,
    /// Microseconds these took, the sync included.
    pub write_micros: AtomicU64,
    /// Times a group that is led here fell silent.
    pub slept: AtomicU64,
    /// Messages of other members that the gate refused.
    pub refused: AtomicU64,
    /// Snapshots sent to other replicas, whole.
    pub snapshots_sent: AtomicU64,
    /// Pieces of large snapshots sent, repeated ones too.
    pub snapshot_pieces_sent: AtomicU64,
    /// Snapshots of other replicas that replaced what was here.
    pub snapshots_installed: AtomicU64,
    /// No count: milliseconds that the newest stamp is ahead of this node's own clock, as of the
    /// last tick. Far ahead: some node's clock is wrong, this one's or another's.
    pub stamps_ahead_ms: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}
