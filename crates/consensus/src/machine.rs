//! The replicated state of one group: an ordered map, the same on every replica.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;

use bytes::Bytes;
use krake_model::codec::{self, CodecError};
use krake_model::revision::Revision;
use serde::{Deserialize, Serialize};

use crate::command::{Command, Committed, Expect, Operation, RequestId};
use crate::planted::{self, Bug};

/// Version of a log entry's payload.
const ENTRY_VERSION: u8 = 1;
/// Version of a snapshot's payload.
const SNAPSHOT_VERSION: u8 = 2;
/// How many answered requests a group remembers, so that a repeated proposal applies once. A
/// proposer gives up after seconds; at this size the memory spans more than that at full load.
const REMEMBERED_REQUESTS: usize = 2048;

/// Keys and values of one group may take this many bytes (64 MiB). The rest of
/// [`codec::LARGE_RECORD_BYTES_MAX`] is for the answers that a snapshot remembers.
pub const GROUP_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Counted for each entry beyond its key and value.
const ENTRY_OVERHEAD: usize = 64;

/// One stored value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The bytes.
    pub value: Bytes,
    /// Stamp of the write that made it.
    pub created: Revision,
    /// Stamp of its last write.
    pub modified: Revision,
    /// Of the group at its last write: it rises when the group is restored from a backup.
    pub incarnation: u32,
    /// Raft term of its last write.
    pub term: u64,
    /// Log index of its last write.
    pub index: u64,
}

/// What happened to one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Which.
    pub key: String,
    /// What it is now; `None`: removed.
    pub entry: Option<Entry>,
    /// What it was before.
    pub previous: Option<Entry>,
}

/// Payload of a log entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LogEntry {
    /// Given by the leader at proposal, above every earlier one of the group.
    pub(crate) stamp: Revision,
    pub(crate) command: Command,
}

impl LogEntry {
    pub(crate) fn encode(&self) -> Result<Vec<u8>, CodecError> {
        let mut bytes = codec::encode(ENTRY_VERSION, self)?;
        // It is kept for as long as its value.
        bytes.shrink_to_fit();
        Ok(bytes)
    }

    /// What [`Self::encode`] made. A value that is most of the record stays in its memory.
    pub(crate) fn decode(bytes: &Bytes) -> Result<Self, CodecError> {
        let read: LogEntryIn = codec::decode_borrowed(ENTRY_VERSION, bytes)?;
        let value = |value: &[u8]| {
            if value.len() * 2 > bytes.len() {
                bytes.slice_ref(value)
            } else {
                Bytes::copy_from_slice(value)
            }
        };
        let operation = |read| match read {
            OperationIn::Put {
                key,
                value: read,
                expect,
            } => Operation::Put {
                key: key.to_owned(),
                value: value(read),
                expect,
            },
            OperationIn::Delete { key, expect } => Operation::Delete {
                key: key.to_owned(),
                expect,
            },
            OperationIn::Check { key, expect } => Operation::Check {
                key: key.to_owned(),
                expect,
            },
        };
        Ok(Self {
            stamp: read.stamp,
            command: Command {
                request: read.command.request,
                operations: read.command.operations.into_iter().map(operation).collect(),
            },
        })
    }
}

/// [`LogEntry`] as it stands in a record.
#[derive(Deserialize)]
struct LogEntryIn<'a> {
    stamp: Revision,
    #[serde(borrow)]
    command: CommandIn<'a>,
}

/// [`Command`] in a record.
#[derive(Deserialize)]
struct CommandIn<'a> {
    request: RequestId,
    #[serde(borrow)]
    operations: Vec<OperationIn<'a>>,
}

/// [`Operation`] in a record.
#[derive(Deserialize)]
enum OperationIn<'a> {
    Put {
        key: &'a str,
        value: &'a [u8],
        expect: Expect,
    },
    Delete {
        key: &'a str,
        expect: Expect,
    },
    Check {
        key: &'a str,
        expect: Expect,
    },
}

/// The lasting answer to one request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    Committed(Committed),
    Conflict {
        key: String,
        actual: Option<Revision>,
    },
    Full,
}

/// The map, with what it takes to answer a repeated request the same way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) applied: u64,
    pub(crate) last_stamp: Revision,
    bytes: u64,
    entries: BTreeMap<String, Entry>,
    #[serde(serialize_with = "in_order")]
    answers: HashMap<RequestId, Answer>,
    order: VecDeque<RequestId>,
    incarnation: u32,
}

/// Every replica writes the same bytes.
fn in_order<S: serde::Serializer>(
    answers: &HashMap<RequestId, Answer>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(answers.iter().collect::<BTreeMap<_, _>>())
}

/// Version 1 of [`Entry`], before there were backups.
#[derive(Debug, Deserialize)]
struct Entry1 {
    value: Bytes,
    created: Revision,
    modified: Revision,
    term: u64,
    index: u64,
}

/// Version 1 of [`Machine`].
#[derive(Debug, Deserialize)]
struct Machine1 {
    applied: u64,
    last_stamp: Revision,
    bytes: u64,
    entries: BTreeMap<String, Entry1>,
    answers: HashMap<RequestId, Answer>,
    order: VecDeque<RequestId>,
}

impl From<Machine1> for Machine {
    fn from(old: Machine1) -> Self {
        let entry = |old: Entry1| Entry {
            value: old.value,
            created: old.created,
            modified: old.modified,
            incarnation: 0,
            term: old.term,
            index: old.index,
        };
        let entries = old.entries.into_iter();
        Self {
            applied: old.applied,
            last_stamp: old.last_stamp,
            bytes: old.bytes,
            entries: entries.map(|(key, old)| (key, entry(old))).collect(),
            answers: old.answers,
            order: old.order,
            incarnation: 0,
        }
    }
}

impl Machine {
    pub(crate) const fn incarnation(&self) -> u32 {
        self.incarnation
    }

    /// The same state as the beginning of another history: whoever compares epochs takes its
    /// entries for newer than those of any other incarnation before.
    pub(crate) fn begin_again(&mut self, incarnation: u32) {
        self.incarnation = incarnation;
        for entry in self.entries.values_mut() {
            entry.incarnation = incarnation;
        }
    }

    pub(crate) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// The entries whose key starts with `prefix` and comes after `after`, in key order.
    pub(crate) fn range(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> impl Iterator<Item = (&String, &Entry)> {
        let first = match after.filter(|after| *after >= prefix) {
            Some(after) => Bound::Excluded(after),
            None => Bound::Included(prefix),
        };
        self.entries
            .range::<str, _>((first, Bound::Unbounded))
            .take_while(move |(key, _)| key.starts_with(prefix))
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) const fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn answer(&self, request: RequestId) -> Option<&Answer> {
        if planted::has(Bug::RequestAppliedTwice) {
            return None;
        }
        self.answers.get(&request)
    }

    /// Notes an entry without a command (a new leader's, or a membership change's).
    pub(crate) const fn skip(&mut self, index: u64) {
        self.applied = index;
    }

    pub(crate) fn apply(
        &mut self,
        term: u64,
        index: u64,
        entry: LogEntry,
    ) -> (Answer, Vec<Change>) {
        self.applied = index;
        let LogEntry { stamp, command } = entry;
        let answered = self.answers.get(&command.request);
        if let Some(answer) = answered.filter(|_| !planted::has(Bug::RequestAppliedTwice)) {
            return (answer.clone(), Vec::new());
        }
        // Two leaders may stamp alike when the second has not yet applied the first's entry.
        let revision = if stamp > self.last_stamp || planted::has(Bug::StampsStartAnew) {
            stamp
        } else {
            Revision::next(self.last_stamp, stamp.timestamp(), stamp.group_number())
        };
        let (answer, changes) = match self.check(&command) {
            Err(answer) => (answer, Vec::new()),
            Ok(()) => {
                self.last_stamp = revision;
                let committed = Committed {
                    revision,
                    term,
                    index,
                };
                let changes = command
                    .operations
                    .into_iter()
                    .filter_map(|operation| self.perform(operation, committed))
                    .collect();
                (Answer::Committed(committed), changes)
            }
        };
        self.remember(command.request, answer.clone());
        (answer, changes)
    }

    fn check(&self, command: &Command) -> Result<(), Answer> {
        let mut growth = 0_i64;
        for operation in &command.operations {
            let key = operation.key();
            let actual = self.entries.get(key);
            let holds = match operation.expect() {
                Expect::Any => true,
                Expect::Absent => actual.is_none(),
                Expect::Present => actual.is_some(),
                Expect::Revision(revision) => {
                    actual.is_some_and(|entry| entry.modified == revision)
                }
            };
            if !holds && !planted::has(Bug::ConditionIgnored) {
                return Err(Answer::Conflict {
                    key: key.to_owned(),
                    actual: actual.map(|entry| entry.modified),
                });
            }
            let before = actual.map_or(0, |entry| cost(key, &entry.value));
            match operation {
                Operation::Put { value, .. } => {
                    growth += cost(key, value) as i64 - before as i64;
                }
                Operation::Delete { .. } => growth -= before as i64,
                Operation::Check { .. } => {}
            }
        }
        if growth > 0 && self.bytes.saturating_add(growth as u64) > GROUP_BYTES_MAX as u64 {
            return Err(Answer::Full);
        }
        Ok(())
    }

    fn perform(&mut self, operation: Operation, at: Committed) -> Option<Change> {
        match operation {
            Operation::Check { .. } => None,
            Operation::Put { key, value, .. } => {
                let mut entry = Entry {
                    created: at.revision,
                    modified: at.revision,
                    incarnation: self.incarnation,
                    term: at.term,
                    index: at.index,
                    value,
                };
                self.bytes += cost(&key, &entry.value);
                let previous = if let Some(known) = self.entries.get_mut(&key) {
                    self.bytes -= cost(&key, &known.value);
                    entry.created = known.created;
                    Some(std::mem::replace(known, entry.clone()))
                } else {
                    self.entries.insert(key.clone(), entry.clone());
                    None
                };
                Some(Change {
                    key,
                    entry: Some(entry),
                    previous,
                })
            }
            Operation::Delete { key, .. } => {
                let previous = self.entries.remove(&key)?;
                self.bytes -= cost(&key, &previous.value);
                Some(Change {
                    key,
                    entry: None,
                    previous: Some(previous),
                })
            }
        }
    }

    fn remember(&mut self, request: RequestId, answer: Answer) {
        self.answers.insert(request, answer);
        self.order.push_back(request);
        while self.order.len() > REMEMBERED_REQUESTS {
            if let Some(oldest) = self.order.pop_front() {
                self.answers.remove(&oldest);
            }
        }
    }

    /// All of it, as one record.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, CodecError> {
        if planted::has(Bug::SnapshotForgetsRequests) {
            let mut forgetful = self.clone();
            forgetful.answers.clear();
            forgetful.order.clear();
            return codec::encode_large(SNAPSHOT_VERSION, &forgetful);
        }
        codec::encode_large(SNAPSHOT_VERSION, self)
    }

    /// What [`Machine::encode`] made; an empty record is the empty map.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        match bytes.first() {
            None => Ok(Self::default()),
            Some(1) => codec::decode_large::<Machine1>(1, bytes).map(Self::from),
            Some(_) => codec::decode_large(SNAPSHOT_VERSION, bytes),
        }
    }
}

const fn cost(key: &str, value: &Bytes) -> u64 {
    (key.len() + value.len() + ENTRY_OVERHEAD) as u64
}

#[cfg(test)]
mod tests {
    use krake_model::time::Timestamp;

    use super::*;

    fn put(key: &str, value: &'static str, expect: Expect) -> Operation {
        Operation::Put {
            key: key.to_owned(),
            value: Bytes::from_static(value.as_bytes()),
            expect,
        }
    }

    fn entry(request: u128, stamp: u64, operations: Vec<Operation>) -> LogEntry {
        LogEntry {
            stamp: Revision::next(
                Revision::NONE,
                Timestamp::from_millis(1_764_000_000_000 + stamp as i64),
                3,
            ),
            command: Command {
                request: RequestId::from_number(request),
                operations,
            },
        }
    }

    #[test]
    fn a_command_applies_as_a_whole_or_not_at_all() {
        let mut machine = Machine::default();
        machine.apply(1, 1, entry(1, 1, vec![put("a", "1", Expect::Absent)]));
        let before = machine.clone();
        let (answer, changes) = machine.apply(
            1,
            2,
            entry(
                2,
                2,
                vec![put("b", "1", Expect::Absent), put("a", "2", Expect::Absent)],
            ),
        );
        assert!(matches!(answer, Answer::Conflict { key, .. } if key == "a"));
        assert!(changes.is_empty());
        assert_eq!(machine.entries, before.entries);
    }

    #[test]
    fn a_repeated_request_applies_once_and_gets_the_first_answer() {
        let mut machine = Machine::default();
        let (first, _) = machine.apply(1, 1, entry(9, 1, vec![put("a", "1", Expect::Absent)]));
        let (second, changes) =
            machine.apply(2, 2, entry(9, 5, vec![put("a", "1", Expect::Absent)]));
        assert_eq!(first, second);
        assert!(changes.is_empty());
    }

    #[test]
    fn revisions_rise_even_when_a_leader_stamps_low() {
        let mut machine = Machine::default();
        machine.apply(1, 1, entry(1, 100, vec![put("a", "1", Expect::Any)]));
        let (answer, _) = machine.apply(2, 2, entry(2, 50, vec![put("a", "2", Expect::Any)]));
        let Answer::Committed(committed) = answer else {
            panic!("{answer:?}")
        };
        assert_eq!(machine.get("a").unwrap().modified, committed.revision);
        assert!(committed.revision > machine.get("a").unwrap().created);
    }

    #[test]
    fn a_snapshot_restores_the_same_machine() {
        let mut machine = Machine::default();
        for index in 1..50 {
            machine.apply(
                1,
                index,
                entry(u128::from(index), index, vec![put("k", "v", Expect::Any)]),
            );
        }
        let restored = Machine::decode(&machine.encode().unwrap()).unwrap();
        assert_eq!(restored, machine);
    }

    #[test]
    fn a_snapshot_is_these_bytes_and_the_version_before_is_read() {
        let mut machine = Machine::default();
        machine.apply(1, 1, entry(1, 1, vec![put("a", "1", Expect::Any)]));
        machine.begin_again(5);
        let version_2 = concat!(
            "020100000000000000030040007d117d0342000000000000000100000000000000010000000000000061",
            "010000000000000031030040007d117d03030040007d117d030500000001000000000000000100000000",
            "00000001000000000000000100000000000000000000000000000000000000030040007d117d03010000",
            "0000000000010000000000000001000000000000000100000000000000000000000000000005000000"
        );
        assert_eq!(hex::encode(machine.encode().unwrap()), version_2);
        let version_1 = concat!(
            "010100000000000000030040007d117d0342000000000000000100000000000000010000000000000061",
            "010000000000000031030040007d117d03030040007d117d030100000000000000010000000000000001",
            "000000000000000100000000000000000000000000000000000000030040007d117d0301000000000000",
            "000100000000000000010000000000000001000000000000000000000000000000"
        );
        machine.begin_again(0);
        let read = Machine::decode(&hex::decode(version_1).unwrap()).unwrap();
        assert_eq!(read, machine);
    }

    #[test]
    fn a_log_entry_is_read_as_it_was_written_and_a_large_value_is_not_copied() {
        let key = || "key".to_owned();
        let (large, small) = (Bytes::from(vec![7; 1000]), Bytes::from(vec![8; 10]));
        let operations = vec![
            Operation::Put {
                key: key(),
                value: large,
                expect: Expect::Revision(Revision::NONE),
            },
            Operation::Put {
                key: key(),
                value: small,
                expect: Expect::Absent,
            },
            Operation::Delete {
                key: key(),
                expect: Expect::Present,
            },
            Operation::Check {
                key: key(),
                expect: Expect::Any,
            },
        ];
        let written = entry(1, 1, operations);
        let record = Bytes::from(written.encode().unwrap());
        let read = LogEntry::decode(&record).unwrap();
        assert_eq!(read, written);
        let inside = |operation: &Operation| match operation {
            Operation::Put { value, .. } => record.as_ptr_range().contains(&value.as_ptr()),
            _ => false,
        };
        let inside: Vec<bool> = read.command.operations.iter().map(inside).collect();
        assert_eq!(inside, [true, false, false, false]);
        assert!(LogEntry::decode(&record.slice(..record.len() - 1)).is_err());
    }

    #[test]
    fn a_full_group_refuses_growth_but_not_deletion() {
        let mut machine = Machine::default();
        let big = Bytes::from(vec![0; 2_000_000]);
        let mut full = false;
        for index in 1..40_u64 {
            let (answer, _) = machine.apply(
                1,
                index,
                entry(
                    u128::from(index),
                    index,
                    vec![Operation::Put {
                        key: format!("k{index}"),
                        value: big.clone(),
                        expect: Expect::Any,
                    }],
                ),
            );
            full |= answer == Answer::Full;
        }
        assert!(full);
        assert!(machine.bytes() <= GROUP_BYTES_MAX as u64);
        let encoded = machine.encode().unwrap();
        assert_eq!(Machine::decode(&encoded).unwrap(), machine);
        let (answer, changes) = machine.apply(
            1,
            41,
            entry(
                41,
                41,
                vec![Operation::Delete {
                    key: "k1".to_owned(),
                    expect: Expect::Present,
                }],
            ),
        );
        assert!(matches!(answer, Answer::Committed(_)));
        assert_eq!(changes.len(), 1);
    }
}
