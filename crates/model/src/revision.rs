//! Revisions: the hybrid logical stamps that order all committed writes (DESIGN 13.3).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::time::Timestamp;

/// Milliseconds of Unix time at which stamps start: 2024-01-01T00:00:00Z.
const STAMP_EPOCH_MS: i64 = 1_704_067_200_000;
/// Bits of the counter inside one millisecond of one group.
const COUNTER_BITS: u32 = 12;
/// Bits of the group number, the lowest ones: stamps of different groups never tie.
const GROUP_BITS: u32 = 10;

/// A `resourceVersion`: a decimal integer made of milliseconds (41 bits, until 2093), a counter
/// (12 bits) and the group in the low 10 bits.
///
/// Strictly rising in one group, also across leaders; comparable (though not causally complete)
/// between groups. 0 means "none" and never stamps an entry.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Revision(u64);

impl Revision {
    /// Before everything.
    pub const NONE: Self = Self(0);
    /// The largest number of groups that fit: the meta group and 1023 shards.
    pub const GROUPS_MAX: u32 = 1 << GROUP_BITS;

    /// The number.
    pub const fn number(self) -> u64 {
        self.0
    }

    /// Takes a number, such as one read from a `resourceVersion`.
    pub const fn from_number(number: u64) -> Self {
        Self(number)
    }

    /// The group whose leader stamped it.
    pub const fn group_number(self) -> u32 {
        (self.0 & ((1 << GROUP_BITS) - 1)) as u32
    }

    /// The wall clock part, for people: correctness never rests on it.
    pub const fn timestamp(self) -> Timestamp {
        Timestamp::from_millis((self.0 >> (COUNTER_BITS + GROUP_BITS)) as i64 + STAMP_EPOCH_MS)
    }

    /// The next stamp of `group_number` that is above both `last` and everything stamped before
    /// wall time `now`: the hybrid logical clock's rule (Kulkarni et al. 2014, "Logical Physical
    /// Clocks"), with the counter carrying into the milliseconds when it overflows.
    ///
    /// # Panics
    /// When `group_number` is not below [`Revision::GROUPS_MAX`].
    pub fn next(last: Self, now: Timestamp, group_number: u32) -> Self {
        assert!(
            group_number < Self::GROUPS_MAX,
            "group number {group_number} does not fit"
        );
        let wall = (now.as_millis() - STAMP_EPOCH_MS).max(0) as u64;
        let clock = (wall << COUNTER_BITS).max((last.0 >> GROUP_BITS) + 1);
        Self(clock << GROUP_BITS | u64::from(group_number))
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Revision {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn stamps_rise_whatever_the_clock_does(times in prop::collection::vec(0_i64..4_000_000_000_000, 1..200)) {
            let mut last = Revision::NONE;
            for millis in times {
                let next = Revision::next(last, Timestamp::from_millis(millis), 5);
                prop_assert!(next > last);
                prop_assert_eq!(next.group_number(), 5);
                last = next;
            }
        }
    }

    #[test]
    fn a_stamp_shows_its_wall_time() {
        let now = Timestamp::from_millis(1_764_000_000_123);
        assert_eq!(Revision::next(Revision::NONE, now, 0).timestamp(), now);
    }
}
