//! Mistakes that can be put in on purpose, so that it can be proved that the simulator finds them.
//! Without the feature `simulation` there is no trace of them in the program.

/// One mistake, each made by some system before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Bug {
    /// A write is acknowledged before it is on the disk.
    AcknowledgedBeforeSync,
    /// A vote is forgotten by a restart.
    VoteNotWritten,
    /// A term is forgotten by a restart.
    TermNotWritten,
    /// A read is answered as soon as it is confirmed, not when that much is applied.
    ReadBeforeApplied,
    /// A leader answers reads without asking a majority.
    ReadWithoutQuorum,
    /// A repeated request is applied again.
    RequestAppliedTwice,
    /// A snapshot does not remember which requests were answered.
    SnapshotForgetsRequests,
    /// A snapshot is labelled with an index that is not in it yet.
    SnapshotAheadOfItself,
    /// Entries that a new leader replaced come back with a restart.
    TruncationNotWritten,
    /// The condition of a write is not checked.
    ConditionIgnored,
    /// A new leader's stamps do not begin above those of the old one.
    StampsStartAnew,
    /// A segment of the log is dropped although entries in it are needed.
    SegmentDroppedEarly,
    /// A new snapshot is in force before it is on the disk.
    SnapshotNotSynced,
    /// Two reads are asked under one context.
    ReusedReadContext,
    /// What a killed process wrote is relied on without making it durable.
    ReadBackNotSynced,
    /// How far the clock was is forgotten by a restart.
    ClockForgotten,
    /// Stamps are taken for closed although entries with such stamps are still under way.
    ClosedAtCommit,
    /// A piece of a snapshot is put behind the others wherever it belongs, and the whole is not
    /// compared with its checksum.
    PieceOrderIgnored,
}

#[cfg(any(test, feature = "simulation"))]
impl Bug {
    /// All of them.
    pub const ALL: [Self; 18] = [
        Self::AcknowledgedBeforeSync,
        Self::VoteNotWritten,
        Self::TermNotWritten,
        Self::ReadBeforeApplied,
        Self::ReadWithoutQuorum,
        Self::RequestAppliedTwice,
        Self::SnapshotForgetsRequests,
        Self::SnapshotAheadOfItself,
        Self::TruncationNotWritten,
        Self::ConditionIgnored,
        Self::StampsStartAnew,
        Self::SegmentDroppedEarly,
        Self::SnapshotNotSynced,
        Self::ReusedReadContext,
        Self::ReadBackNotSynced,
        Self::ClockForgotten,
        Self::ClosedAtCommit,
        Self::PieceOrderIgnored,
    ];
}

#[cfg(any(test, feature = "simulation"))]
mod switch {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// From now on this thread makes the mistake.
    pub(crate) fn plant(bug: Option<Bug>) {
        PLANTED.set(bug);
    }

    pub(crate) fn has(bug: Bug) -> bool {
        PLANTED.get() == Some(bug)
    }
}

#[cfg(any(test, feature = "simulation"))]
pub(crate) use switch::{has, plant};

/// Whether the mistake is to be made.
#[cfg(not(any(test, feature = "simulation")))]
pub(crate) const fn has(_bug: Bug) -> bool {
    false
}
