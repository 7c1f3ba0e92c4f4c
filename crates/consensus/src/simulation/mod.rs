//! A deterministic simulation of nodes that keep a catalog: the same groups, log and files as in
//! the program, over a simulated network, simulated disks and simulated clocks. One seed decides
//! everything, so that a run can be repeated bit for bit.
//!
//! What is simulated: messages are delayed, lost, repeated and reordered, links are cut in one
//! direction or both, nodes are killed, lose power in the middle of any operation on a file (then
//! any of the sectors that were not synced may be lost), have full or slow disks, find a bit
//! flipped, are paused, have clocks that drift and are put forward and back, join and leave while writes run,
//! and are replaced as voters when they are away. Leaders are cut off and take many writes before they
//! notice, while others write as much as calls for a snapshot; where a node puts a snapshot in place of
//! its log, it often stops. Now and then nobody asks for anything, so that
//! groups fall silent. Snapshots travel in pieces of a few hundred bytes.
//!
//! A long simulation is one of rounds: faults, then none, then rest in which nobody asks for
//! anything and every group must be silent. Whoever is lost by then leaves, and others join.
//!
//! What is checked: after every step that no two nodes lead a group in one term, that no replica
//! votes twice in a term, that all replicas agree on every committed entry and on the state at
//! every index, and that revisions rise (R1, R9, R10); at the end that the history of each key is
//! linearizable (R2, R3, and R1 again: a lost write is one), that after the faults everything
//! works again, and that all replicas are equal (R15, R9).

mod checks;
mod history;
mod world;

pub use self::history::{Asked, Got, Operation, linearizable};
pub use crate::planted::Bug;

/// What is simulated.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Members in the end: they join one after another.
    pub nodes: u64,
    /// Groups.
    pub groups: u16,
    /// Clients that each do one operation after another.
    pub clients: usize,
    /// Keys of each group.
    pub keys: usize,
    /// Simulated milliseconds with faults.
    pub faulty_ms: u64,
    /// Simulated milliseconds after them, in which everything must work again.
    pub calm_ms: u64,
    /// Simulated milliseconds between that and the next faults, on the average.
    pub rest_ms: u64,
    /// Simulated milliseconds after which no other round begins; 0: there is one.
    pub long_ms: u64,
    /// A mistake that the program is to make.
    pub bug: Option<Bug>,
}

impl Scenario {
    /// Five members that keep three groups, 45 s of faults and 20 s without.
    pub const fn smoke() -> Self {
        Self {
            nodes: 5,
            groups: 3,
            clients: 6,
            keys: 3,
            faulty_ms: 45_000,
            calm_ms: 20_000,
            rest_ms: 0,
            long_ms: 0,
            bug: None,
        }
    }
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Operations that were answered.
    pub answered: usize,
    /// Operations nobody knows the result of.
    pub unknown: usize,
    /// Faults.
    pub faults: usize,
    /// Times that a leader let its group fall silent.
    pub slept: u64,
    /// Times that a leader closed the stamps of a group.
    pub closed: usize,
    /// Pieces of snapshots that were sent.
    pub pieces: u64,
    /// Times that there were faults and then none.
    pub rounds: u64,
    /// Members that there ever were.
    pub members: u64,
    /// Members that gave all their votes away and then left.
    pub gone: u64,
    /// Simulated milliseconds.
    pub simulated_ms: u64,
    /// A number made of all that happened: equal runs have equal ones.
    pub trace: u64,
    /// What went wrong.
    pub violation: Option<String>,
}

/// Runs one simulation.
pub fn run(seed: u64, scenario: &Scenario) -> Report {
    crate::planted::plant(scenario.bug);
    let report = world::run(seed, scenario);
    crate::planted::plant(None);
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_the_smoke_set_are_green_and_repeat() {
        let scenario = Scenario::smoke();
        let (mut answered, mut slept, mut closed, mut pieces, mut gone) = (0, 0, 0, 0, 0);
        for seed in 0..40 {
            let report = run(seed, &scenario);
            assert_eq!(report.violation, None, "seed {seed}: {report:?}");
            answered += report.answered;
            slept += report.slept;
            closed += report.closed;
            pieces += report.pieces;
            gone += report.gone;
            if seed % 10 == 0 {
                assert_eq!(run(seed, &scenario), report, "seed {seed} does not repeat");
            }
        }
        assert!(answered > 4000, "too little happened: {answered}");
        assert!(slept > 100, "groups fell silent only {slept} times");
        assert!(closed > 4000, "stamps were closed only {closed} times");
        assert!(pieces > 1000, "snapshots had only {pieces} pieces");
        assert!(gone > 0, "nobody gave its votes away and left");
    }

    /// One key of one group has a history that is longer than what is remembered.
    #[test]
    fn long_simulations_are_checked_part_by_part() {
        let scenario = Scenario {
            groups: 1,
            keys: 1,
            faulty_ms: 15 * 60 * 1000,
            ..Scenario::smoke()
        };
        // A wrong history of a single key can take the checker minutes to refute; this seed's does not.
        let report = run(4, &scenario);
        assert_eq!(report.violation, None, "{report:?}");
        assert!(report.answered > 3_000, "too little happened: {report:?}");
        let planted = Scenario {
            bug: Some(Bug::ReadBeforeApplied),
            ..scenario
        };
        let report = run(4, &planted);
        assert!(report.violation.is_some(), "{report:?}");
        assert!(
            report.simulated_ms < planted.faulty_ms,
            "it was found at the end only"
        );
    }

    #[test]
    fn rounds_follow_each_other_and_everything_rests_between_them() {
        let scenario = Scenario {
            faulty_ms: 30_000,
            rest_ms: 240_000,
            long_ms: 20 * 60 * 1000,
            ..Scenario::smoke()
        };
        let (mut rounds, mut members) = (0, 0);
        for seed in 0..6 {
            let report = run(seed, &scenario);
            assert_eq!(report.violation, None, "{report:?}");
            rounds += report.rounds;
            members += report.members;
        }
        assert!(rounds > 18, "only {rounds} rounds");
        assert!(members > 6 * scenario.nodes, "nobody joined for another");
    }

    /// Those that few seeds find; `krake-sim --bug all` looks for all.
    #[test]
    fn planted_mistakes_are_found() {
        for bug in [
            Bug::AcknowledgedBeforeSync,
            Bug::ReadBeforeApplied,
            Bug::RequestAppliedTwice,
            Bug::SnapshotForgetsRequests,
            Bug::SnapshotAheadOfItself,
            Bug::TruncationNotWritten,
            Bug::ConditionIgnored,
            Bug::StampsStartAnew,
            Bug::SegmentDroppedEarly,
            Bug::SnapshotNotSynced,
            Bug::ClosedAtCommit,
            Bug::PieceOrderIgnored,
        ] {
            let scenario = Scenario {
                bug: Some(bug),
                ..Scenario::smoke()
            };
            let found = (0..60).any(|seed| run(seed, &scenario).violation.is_some());
            assert!(found, "{bug:?} was not found");
        }
    }
}
