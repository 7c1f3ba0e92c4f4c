//! Raft messages and entries as we write them, on the wire and on disk.
//!
//! The Raft library's own types are Protocol Buffers; what strangers send us never meets its
//! parser: everything goes through the workspace's one bounded codec.

use bytes::Bytes;
use krake_model::codec::{self, CodecError, RECORD_BYTES_MAX};
use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use raft::eraftpb as pb;
use serde::{Deserialize, Serialize};

use crate::command::{Command, Committed, ProposeError};
use crate::inspect::TransferError;

const FRAME_VERSION: u8 = 2;
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
    /// Of snapshots that are too large for a message.
    pub(crate) pieces: Vec<Piece>,
    /// What has come of such snapshots from the receiver of the frame.
    pub(crate) received: Vec<Received>,
    /// No stamp that the sender has seen is above it (see `Core::clock`).
    pub(crate) clock: Revision,
}

/// Version 1 of [`Frame`]: snapshots travelled whole.
#[derive(Debug, Deserialize)]
struct Frame1 {
    from: u64,
    to: u64,
    messages: Vec<(GroupId, Message)>,
    sleeping: Vec<Sleep>,
    pulse: Option<Pulse>,
}

impl From<Frame1> for Frame {
    fn from(old: Frame1) -> Self {
        Self {
            from: old.from,
            to: old.to,
            messages: old.messages,
            sleeping: old.sleeping,
            pulse: old.pulse,
            pieces: Vec::new(),
            received: Vec::new(),
            clock: Revision::NONE,
        }
    }
}

/// Which snapshot of a group. Replicas encode the map at one index alike, so that one leader can go
/// on where another one stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SnapshotId {
    pub(crate) index: u64,
    /// Of the entry at the index.
    pub(crate) term: u64,
    /// Length of its data.
    pub(crate) bytes: u64,
    /// BLAKE3 of its data.
    pub(crate) checksum: [u8; 32],
}

/// A part of a snapshot's data.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Piece {
    pub(crate) group: GroupId,
    /// In which the sender leads.
    pub(crate) term: u64,
    pub(crate) snapshot: SnapshotId,
    pub(crate) configuration: Configuration,
    /// Where it begins.
    pub(crate) offset: u64,
    /// Nothing: the sender asks what has come so far.
    pub(crate) data: Bytes,
}

/// The answer to a [`Piece`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Received {
    pub(crate) group: GroupId,
    pub(crate) snapshot: SnapshotId,
    pub(crate) got: Got,
}

/// What a receiver has of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Got {
    /// So many bytes from its beginning. All of them: it was taken, or is not needed any more.
    Bytes(u64),
    /// It was whole, and not what its checksum says or not fit to be taken. Nothing of it is kept.
    Refused,
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
    /// It should not lead: its disk is slow, or it is about to be taken away.
    pub(crate) reluctant: bool,
}

impl Frame {
    /// Log entries in its messages.
    pub(crate) fn entries(&self) -> usize {
        let messages = self.messages.iter();
        let appends = messages.filter(|(_, message)| message.kind == MessageKind::Append);
        appends.map(|(_, message)| message.entries.len()).sum()
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>, CodecError> {
        codec::encode(FRAME_VERSION, self)
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        if bytes.first() == Some(&1) {
            return codec::decode::<Frame1>(1, bytes, RECORD_BYTES_MAX).map(Self::from);
        }
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
    /// Give no stamp up to `at` any more in those of the groups that you lead.
    Close {
        groups: Vec<GroupId>,
        at: Revision,
        /// Milliseconds the asker still waits.
        patience: u32,
    },
    /// As `Propose`, of somebody who asked the sender for it.
    Submit {
        group: GroupId,
        command: Command,
        /// Milliseconds the asker still waits.
        patience: u32,
    },
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
    /// Whoever has applied the groups' logs up to these indices has everything stamped up to then.
    Closed(Vec<(GroupId, u64)>),
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

/// What an entry takes beyond its data, roughly.
pub(crate) const ENTRY_BYTES: usize = 64;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::{Expect, Operation, RequestId};

    fn entry(kind: EntryKind) -> Entry {
        Entry {
            kind,
            term: 2,
            index: 9,
            data: Bytes::from_static(b"d"),
            context: Bytes::from_static(b"c"),
        }
    }

    fn frame() -> Frame {
        Frame {
            from: 1,
            to: 2,
            messages: vec![(
                GroupId::of_shard(0),
                Message {
                    kind: MessageKind::Append,
                    to: 2,
                    from: 1,
                    term: 2,
                    log_term: 1,
                    index: 8,
                    entries: vec![entry(EntryKind::Normal), entry(EntryKind::ConfChange)],
                    commit: 7,
                    commit_term: 0,
                    snapshot: Some(Snapshot {
                        index: 3,
                        term: 1,
                        configuration: Configuration {
                            voters: vec![1, 2],
                            learners: vec![3],
                        },
                        data: Bytes::from_static(b"s"),
                    }),
                    request_snapshot: 0,
                    reject: true,
                    reject_hint: 5,
                    context: Bytes::from_static(b"x"),
                    priority: 0,
                },
            )],
            sleeping: vec![Sleep {
                group: GroupId::META,
                term: 4,
                last: 10,
            }],
            pulse: Some(Pulse {
                life: 77,
                leaderless: vec![GroupId::of_shard(1)],
                reluctant: true,
            }),
            pieces: vec![Piece {
                group: GroupId::of_shard(2),
                term: 6,
                snapshot: id(),
                configuration: Configuration {
                    voters: vec![1],
                    learners: vec![2],
                },
                offset: 3,
                data: Bytes::from_static(b"p"),
            }],
            received: vec![Got::Bytes(4), Got::Refused]
                .into_iter()
                .map(|got| Received {
                    group: GroupId::of_shard(3),
                    snapshot: id(),
                    got,
                })
                .collect(),
            clock: Revision::from_number(0x1234),
        }
    }

    fn id() -> SnapshotId {
        SnapshotId {
            index: 11,
            term: 5,
            bytes: 8,
            checksum: [0xcc; 32],
        }
    }

    /// Nodes of two versions work together: what is sent may not change under its version.
    #[test]
    fn frames_and_calls_are_these_bytes() {
        let bytes = frame().encode().unwrap();
        assert_eq!(
            hex::encode(&bytes),
            concat!(
                "020100000000000000020000000000000001000000000000000100000000000000020000000000000001",
                "000000000000000200000000000000010000000000000008000000000000000200000000000000000000",
                "000200000000000000090000000000000001000000000000006401000000000000006301000000020000",
                "000000000009000000000000000100000000000000640100000000000000630700000000000000000000",
                "000000000001030000000000000001000000000000000200000000000000010000000000000002000000",
                "000000000100000000000000030000000000000001000000000000007300000000000000000105000000",
                "00000000010000000000000078000000000000000001000000000000000000000004000000000000000a",
                "00000000000000014d000000000000000100000000000000020000000101000000000000000300000006",
                "000000000000000b0000000000000005000000000000000800000000000000cccccccccccccccccccccc",
                "cccccccccccccccccccccccccccccccccccccccccc010000000000000001000000000000000100000000",
                "000000020000000000000003000000000000000100000000000000700200000000000000040000000b00",
                "00000000000005000000000000000800000000000000cccccccccccccccccccccccccccccccccccccccc",
                "cccccccccccccccccccccccc000000000400000000000000040000000b00000000000000050000000000",
                "00000800000000000000cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
                "010000003412000000000000"
            )
        );
        let read = Frame::decode(&bytes).unwrap();
        assert_eq!(read.encode().unwrap(), bytes);
        let version_1 = concat!(
            "010100000000000000020000000000000001000000000000000100000000000000020000000000000001",
            "000000000000000200000000000000010000000000000008000000000000000200000000000000000000",
            "000200000000000000090000000000000001000000000000006401000000000000006301000000020000",
            "000000000009000000000000000100000000000000640100000000000000630700000000000000000000",
            "000000000001030000000000000001000000000000000200000000000000010000000000000002000000",
            "000000000100000000000000030000000000000001000000000000007300000000000000000105000000",
            "00000000010000000000000078000000000000000001000000000000000000000004000000000000000a",
            "00000000000000014d0000000000000001000000000000000200000001"
        );
        let read = Frame::decode(&hex::decode(version_1).unwrap()).unwrap();
        let wanted = Frame {
            pieces: Vec::new(),
            received: Vec::new(),
            clock: Revision::NONE,
            ..frame()
        };
        assert_eq!(read.encode().unwrap(), wanted.encode().unwrap());
        let propose = Call::Propose {
            group: GroupId::of_shard(0),
            command: Command {
                request: RequestId::from_number(7),
                operations: vec![Operation::Delete {
                    key: "k".to_owned(),
                    expect: Expect::Present,
                }],
            },
            patience: 250,
        };
        assert_eq!(
            hex::encode(propose.encode().unwrap()),
            concat!(
                "010000000001000000070000000000000000000000000000000100000000000000010000000100000000",
                "0000006b02000000fa000000"
            )
        );
        let reply = CallReply::NotLeader(Some(3));
        assert_eq!(
            hex::encode(reply.encode().unwrap()),
            "0101000000010300000000000000"
        );
        let close = Call::Close {
            groups: vec![GroupId::META],
            at: Revision::from_number(0x1234),
            patience: 250,
        };
        assert_eq!(
            hex::encode(close.encode().unwrap()),
            "01020000000100000000000000000000003412000000000000fa000000"
        );
        let closed = CallReply::Closed(vec![(GroupId::META, 7)]);
        assert_eq!(
            hex::encode(closed.encode().unwrap()),
            "01030000000100000000000000000000000700000000000000"
        );
    }

    /// What the library sends and what it gets back is the same but for our form in between.
    #[test]
    fn messages_survive_the_way_through_the_librarys_form() {
        for (_, message) in frame().messages {
            let mut message = message;
            // Appends carry no snapshot.
            message.snapshot = None;
            let back = Message::from_raft(&message.clone().into_raft()).unwrap();
            let bytes = |message| codec::encode(FRAME_VERSION, &message).unwrap();
            assert_eq!(bytes(back), bytes(message));
        }
    }
}
