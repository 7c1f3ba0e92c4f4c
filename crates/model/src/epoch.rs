//! The epoch of a placement: what fences a site against older decisions (I3).

use std::fmt;

use serde::{Deserialize, Serialize};

/// (incarnation, term, index) of the committed placement, ordered in that order (DESIGN 13.7).
///
/// The incarnation of a shard rises when it is restored from a backup, so that a restored shard is
/// obeyed although its terms and indexes start again. A site refuses, for one application UID, what
/// is older than the newest epoch it has seen.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct Epoch {
    /// Rises when the shard is restored from a backup.
    pub incarnation: u32,
    /// The Raft term in which the placement was committed.
    pub term: u64,
    /// The Raft log index of the placement.
    pub index: u64,
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.incarnation, self.term, self.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restored_shard_outranks_every_older_term() {
        let old = Epoch {
            incarnation: 0,
            term: 900,
            index: 1_000_000,
        };
        let restored = Epoch {
            incarnation: 1,
            term: 1,
            index: 1,
        };
        assert!(restored > old);
        assert!(
            Epoch {
                term: 901,
                index: 1,
                ..old
            } > old
        );
    }
}
