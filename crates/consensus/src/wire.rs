//! Raft messages and entries as we write them, on the wire and on disk.
//!
//! The Raft library's own types are Protocol Buffers; what strangers send us never meets its
//! parser: everything goes through the workspace's one bounded codec.

use bytes::Bytes;
use krake_model::codec::{self, CodecError, RECORD_BYTES_MAX};
use krake_model::ids::GroupId;
use raft::eraftpb as pb;
use serde::{Deserialize, Serialize};

use crate::command::{Command, Committed, ProposeError};
use crate::inspect::TransferError;

const FRAME_VERSION: u8 = 1;
const CALL_VERSION: u8 = 1;
/// Messages in one frame at most.
pub(crate) const FRAME_MESSAGES_MAX: usize = 4096;

/// Everything one node has for another at one moment: the heartbeats of all groups share it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Frame {
    /// Replica id of the sender, to be checked against who it is.
    pub(crate) from: u64,
    /// Replica id of the receiver: a frame meant for an earlier life of the address is dropped.
    pub(crate) to: u64,
    pub(crate) messages: Vec<(GroupId, Message)>,
    /// Groups that fall silent.
    pub(crate) sleeping: Vec<Sleep>,
    pub(crate) pulse: Option<Pulse>,
}

/// The leader of a group sends no heartbeats from now on: whoever has the same log needs none, for
/// it hears the [`Pulse`] of the leader's node.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Sleep {
    pub(crate) group: GroupId,
    pub(crate) term: u64,
    /// Index of the last entry; it is committed.
    pub(crate) last: u64,
}

/// The heartbeat of a node, once an interval for all its groups.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Pulse {
    /// Another one after every start: what the node led before it leads no more.
    pub(crate) life: u64,
    /// Groups it has a replica of whose leader it does not know.
    pub(crate) leaderless: Vec<GroupId>,
}

impl Frame {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, CodecError> {
        codec::encode(FRAME_VERSION, self)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        codec::decode(FRAME_VERSION, bytes, RECORD_BYTES_MAX)
    }
}

/// A question to the leader of a group.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Call {
    Propose {
        group: GroupId,
        command: Command,
        /// Milliseconds the asker still waits.
        patience: u32,
    },
    /// Hand leadership to this replica.
    Transfer { group: GroupId, to: u64 },
}

impl Call {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, CodecError> {
        codec::encode(CALL_VERSION, self)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        codec::decode(CALL_VERSION, bytes, RECORD_BYTES_MAX)
    }
}

/// Its answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum CallReply {
    Proposed(Result<Committed, ProposeError>),
    /// Ask this replica instead, or wait when there is none.
    NotLeader(Option<u64>),
    /// Whether it was begun; `false`: it leads already.
    Transferred(Result<bool, TransferError>),
}

impl CallReply {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, CodecError> {
        codec::encode(CALL_VERSION, self)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        codec::decode(CALL_VERSION, bytes, RECORD_BYTES_MAX)
    }
}

/// Kinds of log entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EntryKind {
    Normal,
    ConfChange,
}

/// A log entry.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) kind: EntryKind,
    pub(crate) term: u64,
    pub(crate) index: u64,
    pub(crate) data: Bytes,
    pub(crate) context: Bytes,
}

impl Entry {
    pub(crate) fn from_raft(entry: &pb::Entry) -> Self {
        Self {
            kind: match entry.get_entry_type() {
                pb::EntryType::EntryNormal => EntryKind::Normal,
                pb::EntryType::EntryConfChange | pb::EntryType::EntryConfChangeV2 => {
                    EntryKind::ConfChange
                }
            },
            term: entry.term,
            index: entry.index,
            data: entry.data.clone(),
            context: entry.context.clone(),
        }
    }

    pub(crate) fn into_raft(self) -> pb::Entry {
        let mut entry = pb::Entry::default();
        entry.set_entry_type(match self.kind {
            EntryKind::Normal => pb::EntryType::EntryNormal,
            EntryKind::ConfChange => pb::EntryType::EntryConfChange,
        });
        entry.term = self.term;
        entry.index = self.index;
        entry.data = self.data;
        entry.context = self.context;
        entry
    }
}

/// Who is in a group.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Configuration {
    pub(crate) voters: Vec<u64>,
    pub(crate) learners: Vec<u64>,
}

impl Configuration {
    pub(crate) fn from_raft(state: &pb::ConfState) -> Self {
        Self {
            voters: state.voters.clone(),
            learners: state.learners.clone(),
        }
    }

    pub(crate) fn to_raft(&self) -> pb::ConfState {
        let mut state = pb::ConfState::default();
        state.set_voters(self.voters.clone());
        state.set_learners(self.learners.clone());
        state
    }
}

/// A snapshot of a group.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) configuration: Configuration,
    pub(crate) data: Bytes,
}

impl Snapshot {
    pub(crate) fn from_raft(snapshot: &pb::Snapshot) -> Self {
        let metadata = snapshot.get_metadata();
        Self {
            index: metadata.index,
            term: metadata.term,
            configuration: Configuration::from_raft(metadata.get_conf_state()),
            data: snapshot.data.clone(),
        }
    }

    pub(crate) fn into_raft(self) -> pb::Snapshot {
        let mut snapshot = pb::Snapshot::default();
        let metadata = snapshot.mut_metadata();
        metadata.index = self.index;
        metadata.term = self.term;
        metadata.set_conf_state(self.configuration.to_raft());
        snapshot.data = self.data;
        snapshot
    }
}

/// Kinds of messages that replicas exchange; the library's local kinds have no form here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum MessageKind {
    Append,
    AppendResponse,
    Vote,
    VoteResponse,
    PreVote,
    PreVoteResponse,
    Snapshot,
    Heartbeat,
    HeartbeatResponse,
    TimeoutNow,
    ReadIndex,
    ReadIndexResponse,
}

impl MessageKind {
    const fn from_raft(kind: pb::MessageType) -> Option<Self> {
        use pb::MessageType as T;
        Some(match kind {
            T::MsgAppend => Self::Append,
            T::MsgAppendResponse => Self::AppendResponse,
            T::MsgRequestVote => Self::Vote,
            T::MsgRequestVoteResponse => Self::VoteResponse,
            T::MsgRequestPreVote => Self::PreVote,
            T::MsgRequestPreVoteResponse => Self::PreVoteResponse,
            T::MsgSnapshot => Self::Snapshot,
            T::MsgHeartbeat => Self::Heartbeat,
            T::MsgHeartbeatResponse => Self::HeartbeatResponse,
            T::MsgTimeoutNow => Self::TimeoutNow,
            T::MsgReadIndex => Self::ReadIndex,
            T::MsgReadIndexResp => Self::ReadIndexResponse,
            _ => return None,
        })
    }

    const fn to_raft(self) -> pb::MessageType {
        use pb::MessageType as T;
        match self {
            Self::Append => T::MsgAppend,
            Self::AppendResponse => T::MsgAppendResponse,
            Self::Vote => T::MsgRequestVote,
            Self::VoteResponse => T::MsgRequestVoteResponse,
            Self::PreVote => T::MsgRequestPreVote,
            Self::PreVoteResponse => T::MsgRequestPreVoteResponse,
            Self::Snapshot => T::MsgSnapshot,
            Self::Heartbeat => T::MsgHeartbeat,
            Self::HeartbeatResponse => T::MsgHeartbeatResponse,
            Self::TimeoutNow => T::MsgTimeoutNow,
            Self::ReadIndex => T::MsgReadIndex,
            Self::ReadIndexResponse => T::MsgReadIndexResp,
        }
    }
}

/// A message between two replicas of one group.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Message {
    pub(crate) kind: MessageKind,
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) term: u64,
    pub(crate) log_term: u64,
    pub(crate) index: u64,
    pub(crate) entries: Vec<Entry>,
    pub(crate) commit: u64,
    pub(crate) commit_term: u64,
    pub(crate) snapshot: Option<Snapshot>,
    pub(crate) request_snapshot: u64,
    pub(crate) reject: bool,
    pub(crate) reject_hint: u64,
    pub(crate) context: Bytes,
    pub(crate) priority: i64,
}

impl Message {
    /// `None` for kinds that never leave a node.
    pub(crate) fn from_raft(message: &pb::Message) -> Option<Self> {
        let kind = MessageKind::from_raft(message.get_msg_type())?;
        Some(Self {
            kind,
            to: message.to,
            from: message.from,
            term: message.term,
            log_term: message.log_term,
            index: message.index,
            entries: message.entries.iter().map(Entry::from_raft).collect(),
            commit: message.commit,
            commit_term: message.commit_term,
            snapshot: (kind == MessageKind::Snapshot)
                .then(|| Snapshot::from_raft(message.get_snapshot())),
            request_snapshot: message.request_snapshot,
            reject: message.reject,
            reject_hint: message.reject_hint,
            context: message.context.clone(),
            priority: message.priority,
        })
    }

    pub(crate) fn into_raft(self) -> pb::Message {
        let mut message = pb::Message::default();
        message.set_msg_type(self.kind.to_raft());
        message.to = self.to;
        message.from = self.from;
        message.term = self.term;
        message.log_term = self.log_term;
        message.index = self.index;
        message.set_entries(
            self.entries
                .into_iter()
                .map(Entry::into_raft)
                .collect::<Vec<_>>()
                .into(),
        );
        message.commit = self.commit;
        message.commit_term = self.commit_term;
        if let Some(snapshot) = self.snapshot {
            message.set_snapshot(snapshot.into_raft());
        }
        message.request_snapshot = self.request_snapshot;
        message.reject = self.reject;
        message.reject_hint = self.reject_hint;
        message.context = self.context;
        message.priority = self.priority;
        message
    }
}
