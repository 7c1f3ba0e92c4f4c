//! What is proposed to a group, and what comes of it.

use bytes::Bytes;
use krake_model::{ids::GroupId, revision::Revision};
use serde::{Deserialize, Serialize};

/// Bytes of one key at most.
pub const KEY_BYTES_MAX: usize = 1024;
/// Bytes of all operations of one command at most (2 MiB): what one Raft entry carries.
pub const COMMAND_BYTES_MAX: usize = 2 * 1024 * 1024;
/// Operations of one command at most.
pub const OPERATIONS_MAX: usize = 256;

/// Names one proposal for ever: repeating a proposal under the same id applies it once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(u128);

impl RequestId {
    /// A new id from 128 random bits.
    pub fn random() -> Self {
        Self(rand::random())
    }

    /// An id with a given value, for tests and simulations.
    pub const fn from_number(number: u128) -> Self {
        Self(number)
    }
}

/// What a key must be for the command to apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Expect {
    /// Anything, present or not.
    Any,
    /// Not present.
    Absent,
    /// Present, whatever its revision.
    Present,
    /// Present and last written at this revision.
    Revision(Revision),
}

/// One step of a command; all steps of a command apply, or none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Writes a value.
    Put {
        /// Where.
        key: String,
        /// What.
        value: Bytes,
        /// Under which condition.
        expect: Expect,
    },
    /// Removes a key; nothing happens when it is absent and that is allowed.
    Delete {
        /// Which.
        key: String,
        /// Under which condition.
        expect: Expect,
    },
    /// Writes nothing, but the command applies only if the condition holds.
    Check {
        /// Which key.
        key: String,
        /// What must hold.
        expect: Expect,
    },
}

impl Operation {
    pub(crate) fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } | Self::Check { key, .. } => key,
        }
    }

    pub(crate) const fn expect(&self) -> Expect {
        match self {
            Self::Put { expect, .. } | Self::Delete { expect, .. } | Self::Check { expect, .. } => {
                *expect
            }
        }
    }

    fn bytes(&self) -> usize {
        self.key().len()
            + match self {
                Self::Put { value, .. } => value.len(),
                Self::Delete { .. } | Self::Check { .. } => 0,
            }
    }
}

/// A conditional change of one group's map: results, never "merge this", so that applying it is
/// the same everywhere and in every version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// Makes a repeated proposal harmless.
    pub request: RequestId,
    /// The steps, in order; a key appears at most once.
    pub operations: Vec<Operation>,
}

impl Command {
    /// A command under a new random request id.
    pub fn new(operations: Vec<Operation>) -> Self {
        Self {
            request: RequestId::random(),
            operations,
        }
    }

    /// Checks the limits.
    ///
    /// # Errors
    /// [`ProposeError::Invalid`] or [`ProposeError::TooLarge`].
    pub fn validate(&self) -> Result<(), ProposeError> {
        if self.operations.is_empty() || self.operations.len() > OPERATIONS_MAX {
            return Err(ProposeError::Invalid(format!(
                "a command has 1 to {OPERATIONS_MAX} operations, not {}",
                self.operations.len()
            )));
        }
        let mut keys = std::collections::BTreeSet::new();
        for operation in &self.operations {
            let key = operation.key();
            if key.is_empty() || key.len() > KEY_BYTES_MAX {
                return Err(ProposeError::Invalid(format!(
                    "a key has 1 to {KEY_BYTES_MAX} bytes, not {}",
                    key.len()
                )));
            }
            if self.operations.len() > 1 && !keys.insert(key) {
                return Err(ProposeError::Invalid(format!(
                    "key `{key}` appears twice in one command"
                )));
            }
        }
        let bytes: usize = self.operations.iter().map(Operation::bytes).sum();
        if bytes > COMMAND_BYTES_MAX {
            return Err(ProposeError::TooLarge {
                bytes,
                limit: COMMAND_BYTES_MAX,
            });
        }
        Ok(())
    }
}

/// Where a command took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// The stamp given to everything it wrote.
    pub revision: Revision,
    /// The Raft term of its log entry.
    pub term: u64,
    /// The index of its log entry.
    pub index: u64,
}

/// A proposal did not take effect, or it is not known whether it did.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum ProposeError {
    /// A condition did not hold; nothing changed.
    #[error("key `{key}` is not as expected: it is {}", describe(*.actual))]
    Conflict {
        /// The first key whose condition failed.
        key: String,
        /// The revision it has, if it is there.
        actual: Option<Revision>,
    },
    /// No leader accepted it in time. It may still apply: repeat it under the same request id.
    #[error(
        "group {group} gave no answer within the time limit; a majority of its voters may be unreachable"
    )]
    Timeout {
        /// Which group.
        group: GroupId,
    },
    /// The command is larger than allowed.
    #[error("the change has {bytes} bytes, the limit is {limit}")]
    TooLarge {
        /// Bytes found.
        bytes: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The command breaks a rule.
    #[error("invalid command: {0}")]
    Invalid(String),
    /// The group holds as much as it may (see [`crate::GROUP_BYTES_MAX`]).
    #[error("group {group} is full ({limit} bytes); delete what is no longer needed")]
    Full {
        /// Which group.
        group: GroupId,
        /// Bytes allowed.
        limit: usize,
    },
    /// This node does not hold the group.
    #[error("this node does not hold group {group}")]
    UnknownGroup {
        /// Which group.
        group: GroupId,
    },
    /// The host has stopped or failed.
    #[error("the catalog of this node has stopped")]
    Stopped,
    /// This node has no room on its disk, and no other one leads the group.
    #[error("the disk of this node is full: free some room, or ask another node")]
    DiskFull,
}

fn describe(actual: Option<Revision>) -> String {
    actual.map_or_else(
        || "absent".to_owned(),
        |revision| format!("at revision {}", revision.number()),
    )
}

/// A read could not be confirmed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The group's leader did not confirm in time.
    #[error(
        "group {group} could not confirm the read within the time limit; a majority of its voters may be unreachable"
    )]
    Timeout {
        /// Which group.
        group: GroupId,
    },
    /// This node does not hold the group.
    #[error("this node does not hold group {group}")]
    UnknownGroup {
        /// Which group.
        group: GroupId,
    },
    /// The host has stopped or failed.
    #[error("the catalog of this node has stopped")]
    Stopped,
    /// This node has no room on its disk: what it has may be old.
    #[error("the disk of this node is full: free some room, or ask another node")]
    DiskFull,
}
