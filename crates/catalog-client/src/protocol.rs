//! The frames of `krake-catalog/1`.
//!
//! A connection begins as HTTP/1.1: `GET /v1/catalog` with `Connection: upgrade` and `Upgrade:
//! krake-catalog/1`, authorised as any other path. After the 101 both sides send frames: four
//! bytes of length (little endian), then that many bytes of the workspace's codec
//! ([`krake_model::codec`]). The node's first frame is a [`Reply::Welcome`]. Requests carry numbers
//! that the client chooses; answers carry the number of their request and come in any order.

use std::io;

use krake_consensus::{Command, Committed, Entry, Operation, ProposeError};
use krake_model::codec::{self, CodecError, RECORD_BYTES_MAX};
use krake_model::ids::{GroupId, shard_of};
use krake_model::revision::Revision;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};

/// Where the protocol is asked for.
pub const PATH: &str = "/v1/catalog";
/// What it is called in `Upgrade`.
pub const UPGRADE: &str = "krake-catalog/1";
/// Clients write keys under this prefix only: everything else goes through admission.
pub const WRITABLE: &str = "kv/";
/// Bytes of a request at most: the largest command, with room for its framing.
pub const REQUEST_BYTES_MAX: usize = 2 * 1024 * 1024 + 512 * 1024;
/// Bytes of a reply at most.
pub const REPLY_BYTES_MAX: usize = RECORD_BYTES_MAX;
/// Entries in one page at most.
pub const PAGE_ENTRIES_MAX: u32 = 1000;
/// A page ends with the entry that makes it this large (1 MiB).
pub const PAGE_BYTES: usize = 1024 * 1024;

const VERSION: u8 = 1;
/// Replies under this number belong to no request.
pub const UNASKED: u64 = 0;

/// What a client sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the client, from 1; not that of a request or watch that still runs.
    pub number: u64,
    /// What is asked.
    pub ask: Ask,
}

/// How new an answer must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Freshness {
    /// Has everything that was committed before the request.
    Linearizable,
    /// What the node's replica has; the answer says how far that is and how old it may be.
    Stale,
    /// Has at least what was committed up to this revision of the group. With the revision of one's
    /// own last write, reads at any node see it.
    AtLeast(Revision),
}

/// The requests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// Applies a command. Repeating it under its request id applies it once.
    Write {
        /// The shard of every key it writes.
        group: GroupId,
        /// Puts and deletes of keys under [`WRITABLE`]; checks of any key of the group.
        command: Command,
    },
    /// Reads a key.
    Get {
        /// Where it is.
        group: GroupId,
        /// Which.
        key: String,
        /// How new.
        freshness: Freshness,
    },
    /// Reads all keys with a prefix, in their order, as they were at one revision.
    List {
        /// Where they are.
        group: GroupId,
        /// How they begin.
        prefix: String,
        /// Entries of a page; at most [`PAGE_ENTRIES_MAX`] are given.
        limit: u32,
        /// How new.
        freshness: Freshness,
    },
    /// Reads the next page of a list, as it was when the list began.
    Next {
        /// From [`Reply::Page`].
        list: u64,
        /// Entries of the page.
        limit: u32,
    },
    /// Follows a group: [`Reply::Watching`], then [`Reply::Changes`] under the same number, each
    /// command once and in order, until [`Reply::WatchEnded`] or [`Refusal::Compacted`].
    Watch {
        /// Which group.
        group: GroupId,
        /// Only keys that begin so.
        prefix: String,
        /// From this revision on, whichever node it comes from; `None`: from now on.
        after: Option<Revision>,
    },
    /// Ends a watch. It has no answer of its own.
    Unwatch {
        /// The watch's number.
        watch: u64,
    },
}

/// What a node sends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// Of the request, or [`UNASKED`].
    pub number: u64,
    /// The answer.
    pub reply: Reply,
}

/// The replies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// First on every connection.
    Welcome {
        /// How many shards the federation has.
        shards: u16,
        /// Requests of a connection that may run at once.
        in_flight_max: u32,
        /// The node's replica, as [`Reply::Committed`] and [`Reply::Value`] name leaders.
        replica: u64,
    },
    /// A write took effect.
    Committed {
        /// When.
        committed: Committed,
        /// The replica that leads the group, as far as the node knows: asked there, the next write
        /// comes to its leader without a detour.
        leader: Option<u64>,
    },
    /// What a key holds.
    Value {
        /// The replica had at least everything up to here.
        revision: Revision,
        /// `None`: there is no such key.
        entry: Option<Entry>,
        /// The replica that leads the group, as far as the node knows.
        leader: Option<u64>,
    },
    /// A part of a list.
    Page {
        /// The same for all pages of a list.
        revision: Revision,
        /// In the order of the keys.
        entries: Vec<(String, Entry)>,
        /// What [`Ask::Next`] continues; `None` at the end. It is forgotten with the connection, and
        /// when the connection begins too many other lists.
        more: Option<u64>,
    },
    /// A watch has begun: it tells every change above this revision.
    Watching {
        /// As asked for, or what the replica had then.
        revision: Revision,
    },
    /// A command changed what is watched.
    Changes {
        /// The group's revision after it: a watch can go on from here.
        revision: Revision,
        /// What changed; nothing where this is a bookmark: everything up to the revision was told.
        changes: Vec<Changed>,
    },
    /// The node stops: watch at another one, from the last revision.
    WatchEnded,
    /// The request was not carried out.
    Refused(Refusal),
    /// What the node's replica has of a key, as asked for with [`Freshness::Stale`].
    Stale {
        /// The replica had at least everything up to here.
        revision: Revision,
        /// Index of the last log entry that it had applied.
        index: u64,
        /// Milliseconds since the node heard last from the leader of the group, 0 where it leads;
        /// `None`: it knows of no leader.
        age_ms: Option<u64>,
        /// `None`: there is no such key.
        entry: Option<Entry>,
    },
}

/// What one key has become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Changed {
    /// Which.
    pub key: String,
    /// `None`: it was removed.
    pub entry: Option<Entry>,
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    /// Too many requests run on this connection; nothing of this one was done.
    #[error("too many requests at once; try again in {retry_after_ms} ms")]
    Busy {
        /// How long to wait.
        retry_after_ms: u32,
    },
    /// What was received is not this protocol; the node closes the connection.
    #[error("not a request of {UPGRADE}: {reason}")]
    Protocol {
        /// What is wrong.
        reason: String,
    },
    /// The key is not one that clients may write.
    #[error("key `{key}` cannot be written: clients write kv/NAMESPACE/NAME")]
    NotWritable {
        /// Which.
        key: String,
    },
    /// The key belongs to another group.
    #[error("key `{key}` belongs to {group}")]
    WrongGroup {
        /// Which.
        key: String,
        /// Its group.
        group: GroupId,
    },
    /// There is no such group.
    #[error("there is no group {group}")]
    UnknownGroup {
        /// Which.
        group: GroupId,
    },
    /// The watch cannot go on from its revision: list, and watch from there.
    #[error("changes that old are not kept, only those after revision {}: list again", oldest.number())]
    Compacted {
        /// What can be asked for.
        oldest: Revision,
    },
    /// The list cannot be continued.
    #[error("the list cannot be continued; begin it again")]
    ListGone,
    /// The connection has as many watches as it may.
    #[error("a connection has at most {limit} watches")]
    TooManyWatches {
        /// How many.
        limit: u32,
    },
    /// The write did not take effect, or it is not known whether it did.
    #[error(transparent)]
    Write(ProposeError),
    /// The read could not be confirmed.
    #[error("{reason}")]
    Read {
        /// Why.
        reason: String,
    },
}

/// The group of `kv/NAMESPACE/NAME`: that of the application of this name. `None` for keys that
/// clients may not write.
pub fn group_of(key: &str, shards: u16) -> Option<GroupId> {
    let (namespace, name) = key.strip_prefix(WRITABLE)?.split_once('/')?;
    let valid = !namespace.is_empty() && !name.is_empty() && !name.contains('/');
    valid.then(|| GroupId::of_shard(shard_of(namespace, name, shards)))
}

/// Checks that a client may propose `command` to `group`.
///
/// # Errors
/// The first reason why not.
pub fn check_write(group: GroupId, command: &Command, shards: u16) -> Result<(), Refusal> {
    if group.shard().is_none_or(|shard| shard >= shards) {
        return Err(Refusal::UnknownGroup { group });
    }
    for operation in &command.operations {
        let (Operation::Put { key, .. } | Operation::Delete { key, .. }) = operation else {
            continue;
        };
        match group_of(key, shards) {
            None => return Err(Refusal::NotWritable { key: key.clone() }),
            Some(own) if own != group => {
                return Err(Refusal::WrongGroup {
                    key: key.clone(),
                    group: own,
                });
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Encodes a frame with its length behind `buffer`.
///
/// # Errors
/// When the value is too large.
pub fn write_frame<T: Serialize>(buffer: &mut Vec<u8>, value: &T) -> Result<(), CodecError> {
    append_frame(buffer, &codec::encode(VERSION, value)?);
    Ok(())
}

/// Puts what the codec made behind `buffer`, after its length.
pub(crate) fn append_frame(buffer: &mut Vec<u8>, bytes: &[u8]) {
    // RECORD_BYTES_MAX bounds what the codec makes.
    buffer.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    buffer.extend_from_slice(bytes);
}

/// Encodes a [`Request`], without its length, from what is asked.
///
/// # Errors
/// When the node would refuse it for its size, and with it the connection.
pub(crate) fn encode_request(number: u64, ask: &Ask) -> Result<Vec<u8>, CodecError> {
    // The codec writes a pair as it writes the struct.
    let bytes = codec::encode(VERSION, &(number, ask))?;
    if bytes.len() > REQUEST_BYTES_MAX {
        return Err(CodecError::TooLarge {
            found: bytes.len(),
            limit: REQUEST_BYTES_MAX,
        });
    }
    Ok(bytes)
}

/// Decodes a frame without its length.
///
/// # Errors
/// When the bytes are not a `T`.
pub fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    codec::decode(VERSION, bytes, RECORD_BYTES_MAX)
}

/// Reads a frame's length; `None` where the stream ended before it.
///
/// # Errors
/// When the stream breaks, or with [`io::ErrorKind::InvalidData`] when the length is 0 or above
/// `limit`. Nothing is allocated yet.
pub async fn read_length(
    stream: &mut (impl AsyncRead + Unpin),
    limit: usize,
) -> io::Result<Option<usize>> {
    let mut length = [0; 4];
    if stream.read(&mut length[..1]).await? == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut length[1..]).await?;
    let length = u32::from_le_bytes(length) as usize;
    if length == 0 || length > limit {
        let text = format!("a frame has 1 to {limit} bytes, not {length}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(Some(length))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use krake_consensus::{Expect, RequestId};

    use super::*;

    fn frame<T: Serialize>(value: &T) -> String {
        let mut buffer = Vec::new();
        write_frame(&mut buffer, value).unwrap();
        hex::encode(buffer)
    }

    fn command(keys: &[&str]) -> Command {
        let operations = keys.iter().map(|key| Operation::Put {
            key: (*key).to_owned(),
            value: Bytes::from_static(b"v"),
            expect: Expect::Revision(Revision::from_number(5)),
        });
        Command {
            request: RequestId::from_number(7),
            operations: operations.collect(),
        }
    }

    #[test]
    fn the_bytes_are_fixed_for_ever() {
        let write = Request {
            number: 1,
            ask: Ask::Write {
                group: GroupId::of_shard(2),
                command: command(&["kv/a/b"]),
            },
        };
        assert_eq!(
            frame(&write),
            concat!(
                "5000000001010000000000000000000000030000000700000000000000000000000000000001000000",
                "000000000000000006000000000000006b762f612f6201000000000000007603000000050000000000",
                "0000"
            )
        );
        let unwatch = Request {
            number: 2,
            ask: Ask::Unwatch { watch: 9 },
        };
        assert_eq!(
            frame(&unwatch),
            "15000000010200000000000000050000000900000000000000"
        );
        for Request { number, ask } in [write, unwatch] {
            let bytes = encode_request(number, &ask).unwrap();
            assert_eq!(decode::<Request>(&bytes).unwrap(), Request { number, ask });
        }
        let changes = Response {
            number: 3,
            reply: Reply::Changes {
                revision: Revision::from_number(8),
                changes: vec![Changed {
                    key: "kv/a/b".to_owned(),
                    entry: None,
                }],
            },
        };
        assert_eq!(
            frame(&changes),
            concat!(
                "2c000000010300000000000000050000000800000000000000010000000000000006000000000000006b",
                "762f612f6200"
            )
        );
        let refused = Response {
            number: UNASKED,
            reply: Reply::Refused(Refusal::Busy { retry_after_ms: 20 }),
        };
        assert_eq!(
            frame(&refused),
            "15000000010000000000000000070000000000000014000000"
        );
        let stale = Response {
            number: 4,
            reply: Reply::Stale {
                revision: Revision::from_number(8),
                index: 9,
                age_ms: Some(250),
                entry: None,
            },
        };
        assert_eq!(
            frame(&stale),
            "27000000010400000000000000080000000800000000000000090000000000000001fa0000000000000000"
        );
    }

    #[test]
    fn clients_write_under_one_prefix_and_into_one_shard() {
        let group = group_of("kv/a/b", 16).unwrap();
        assert_eq!(group, GroupId::of_shard(shard_of("a", "b", 16)));
        assert_eq!(check_write(group, &command(&["kv/a/b"]), 16), Ok(()));
        for key in [
            "kv/a",
            "kv//b",
            "kv/a/",
            "kv/a/b/c",
            "applications/a/b",
            "assign/a/b",
            "kv",
        ] {
            let refused = check_write(group, &command(&["kv/a/b", key]), 16);
            let key = key.to_owned();
            assert_eq!(refused, Err(Refusal::NotWritable { key }));
        }
        let stranger = (0..)
            .map(|number| format!("kv/a/{number}"))
            .find(|key| group_of(key, 16) != Some(group))
            .unwrap();
        assert!(matches!(
            check_write(group, &command(&[&stranger]), 16),
            Err(Refusal::WrongGroup { .. })
        ));
        for group in [GroupId::META, GroupId::of_shard(16)] {
            assert_eq!(
                check_write(group, &command(&["kv/a/b"]), 16),
                Err(Refusal::UnknownGroup { group })
            );
        }
    }

    #[tokio::test]
    async fn a_length_is_judged_before_anything_is_allocated() {
        let read = async |bytes: &[u8]| read_length(&mut &*bytes, 100).await;
        assert_eq!(read(&[]).await.unwrap(), None);
        assert_eq!(read(&[100, 0, 0, 0]).await.unwrap(), Some(100));
        for bytes in [[101, 0, 0, 0], [0, 0, 0, 0], [255; 4]] {
            let error = read(&bytes).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
        let error = read(&[1, 0]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
