//! What must hold after every step.

use std::collections::BTreeMap;

use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use raft::Storage as _;

use crate::log::{GroupLog, HardState};
use crate::machine::LogEntry;
use crate::replica::Replica;
use crate::wire::{Frame, MessageKind};

/// A log entry, as far as replicas have to agree on it.
type Digest = [u8; 16];

/// Microseconds after which what is long past is forgotten again.
const FORGET: u64 = 60_000_000;
/// Entries of a group that are remembered; no replica is so far behind for long.
const ENTRIES_KEPT: u64 = 20_000;
const TERMS_KEPT: u64 = 1_000;

/// What was seen so far.
#[derive(Debug, Default)]
pub(super) struct Checks {
    leaders: BTreeMap<(GroupId, u64), u64>,
    votes: BTreeMap<(GroupId, u64, u64), u64>,
    committed: BTreeMap<(GroupId, u64), (u64, Digest)>,
    stamps: BTreeMap<GroupId, BTreeMap<u64, Revision>>,
    /// The stamp of each committed entry that has one.
    stamped: BTreeMap<GroupId, BTreeMap<u64, Revision>>,
    /// By the index behind which only higher stamps may come: the highest one that was closed.
    closed: BTreeMap<GroupId, BTreeMap<u64, Revision>>,
    forget_at: u64,
    /// Up to which index each replica's log was compared.
    compared: BTreeMap<(GroupId, u64), u64>,
    /// As each replica was when it was looked at last.
    looked: BTreeMap<(GroupId, u64), Looked>,
    /// By node: what it had in memory when it was stopped between two steps.
    stopped: BTreeMap<u64, BTreeMap<GroupId, Kept>>,
}

/// What a step that ended has made durable. (The commit index may lag.)
#[derive(Debug, PartialEq, Eq)]
struct Kept {
    term: u64,
    vote: u64,
    last: u64,
    last_term: Option<u64>,
}

impl Kept {
    fn of(log: &GroupLog, HardState { term, vote, .. }: HardState) -> Self {
        let last = log.last();
        Self {
            term,
            vote,
            last,
            last_term: log.term(last).ok(),
        }
    }
}

/// What a replica may only do wrong by changing it.
#[derive(Debug, PartialEq, Eq)]
struct Looked {
    term: u64,
    leads: bool,
    committed: u64,
    applied: u64,
    stamp: Revision,
}

impl Checks {
    /// A replica was started anew: everything of it is compared again.
    pub(super) fn restarted(&mut self, own: u64) {
        self.compared.retain(|(_, replica), _| *replica != own);
        self.looked.retain(|(_, replica), _| *replica != own);
    }

    /// A node stops between two steps.
    pub(super) fn stopped(&mut self, replica: &Replica) {
        let groups = replica.core.groups.iter();
        let kept = groups
            .map(|(id, group)| {
                let raft = &group.raw.raft;
                let hard_state = HardState {
                    term: raft.term,
                    vote: raft.vote,
                    commit: 0,
                };
                (*id, Kept::of(group.raw.store(), hard_state))
            })
            .collect();
        self.stopped.insert(replica.core.settings.replica, kept);
    }

    /// Looks at what a node reads back from its files before it starts.
    pub(super) fn read_back(
        &mut self,
        own: u64,
        logs: &[(GroupId, GroupLog)],
    ) -> Result<(), String> {
        let Some(stopped) = self.stopped.remove(&own) else {
            return Ok(());
        };
        let found: BTreeMap<GroupId, Kept> = logs
            .iter()
            .map(|(id, log)| (*id, Kept::of(log, log.hard_state)))
            .collect();
        for (id, kept) in &stopped {
            if found.get(id) != Some(kept) {
                return Err(format!(
                    "replica {own} of {id} had {kept:?} and reads back {:?}",
                    found.get(id)
                ));
            }
        }
        Ok(())
    }

    /// Forgets once a minute what is long past, so that a simulation of a month fits into memory.
    pub(super) fn forget(&mut self, now: u64) {
        if now < self.forget_at {
            return;
        }
        self.forget_at = now + FORGET;
        let keys = self.committed.keys();
        let newest: BTreeMap<GroupId, u64> = keys.map(|(group, index)| (*group, *index)).collect();
        let oldest = |group: &GroupId| {
            let newest = newest.get(group).copied().unwrap_or(0);
            newest.saturating_sub(ENTRIES_KEPT)
        };
        self.committed
            .retain(|(group, index), _| *index >= oldest(group));
        for (group, stamps) in &mut self.stamps {
            *stamps = stamps.split_off(&oldest(group));
        }
        for (group, stamped) in &mut self.stamped {
            *stamped = stamped.split_off(&oldest(group));
        }
        for (group, closed) in &mut self.closed {
            // The last one before is in force for what comes after.
            let before = closed
                .range(..oldest(group))
                .next_back()
                .map(|(last, _)| *last);
            if let Some(before) = before {
                *closed = closed.split_off(&before);
            }
        }
        let keys = self.leaders.keys();
        let terms: BTreeMap<GroupId, u64> = keys.map(|(group, term)| (*group, *term)).collect();
        let is_new = |group: &GroupId, term: u64| {
            let newest = terms.get(group).copied().unwrap_or(0);
            term + TERMS_KEPT >= newest
        };
        self.leaders.retain(|(group, term), _| is_new(group, *term));
        self.votes
            .retain(|(group, term, _), _| is_new(group, *term));
    }

    /// Looks at what a replica sends.
    pub(super) fn sent(&mut self, frame: &Frame) -> Result<(), String> {
        for (group, message) in &frame.messages {
            if message.kind != MessageKind::VoteResponse || message.reject {
                continue;
            }
            let voter = (*group, message.term, message.from);
            let candidate = *self.votes.entry(voter).or_insert(message.to);
            if candidate != message.to {
                return Err(format!(
                    "replica {} of {group} voted for {candidate} and for {} in term {}",
                    message.from, message.to, message.term
                ));
            }
        }
        Ok(())
    }

    /// Looks at a replica after a step.
    pub(super) fn look(&mut self, replica: &Replica) -> Result<(), String> {
        let own = replica.core.settings.replica;
        for (id, group) in &replica.core.groups {
            let raft = &group.raw.raft;
            let log = group.raw.store();
            let committed = raft.raft_log.committed.min(log.last());
            let (applied, stamp) = {
                let machine = group.machine.read();
                (machine.applied, machine.last_stamp)
            };
            let looked = Looked {
                term: raft.term,
                leads: group.is_leader(),
                committed,
                applied,
                stamp,
            };
            if self.looked.get(&(*id, own)) == Some(&looked) {
                continue;
            }
            self.looked.insert((*id, own), looked);
            if group.is_leader() {
                let leader = *self.leaders.entry((*id, raft.term)).or_insert(own);
                if leader != own {
                    return Err(format!(
                        "{leader} and {own} lead {id} in term {}",
                        raft.term
                    ));
                }
            }
            let compared = self.compared.entry((*id, own)).or_insert(0);
            let from = log.first().max(*compared + 1);
            for entry in log.run(from..=committed) {
                if let Ok(decoded) = LogEntry::decode(&entry.data) {
                    self.stamped
                        .entry(*id)
                        .or_default()
                        .insert(entry.index, decoded.stamp);
                    let closed = self.closed.entry(*id).or_default();
                    let closed = closed.range(..entry.index).next_back();
                    if let Some((last, closed)) = closed
                        && decoded.stamp <= *closed
                    {
                        return Err(not_closed(
                            *id,
                            (entry.index, decoded.stamp),
                            (*last, *closed),
                        ));
                    }
                }
                let mut digest = [0; 16];
                let mut hasher = blake3::Hasher::new();
                hasher.update(&entry.data);
                hasher.update(&entry.context);
                digest.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
                let seen = (entry.term, digest);
                let known = *self.committed.entry((*id, entry.index)).or_insert(seen);
                if known != seen {
                    return Err(format!(
                        "entry {} of {id} is committed with term {} somewhere and with term {} at {own}",
                        entry.index, known.0, entry.term
                    ));
                }
            }
            *compared = committed.max(*compared);
            self.stamp(*id, own, applied, stamp)?;
        }
        Ok(())
    }

    /// A leader said that behind `last` there will be no stamp up to `at`.
    pub(super) fn closed(&mut self, group: GroupId, at: Revision, last: u64) -> Result<(), String> {
        let stamped = self.stamped.entry(group).or_default();
        if let Some((index, stamp)) = stamped.range(last + 1..).find(|(_, stamp)| **stamp <= at) {
            return Err(not_closed(group, (*index, *stamp), (last, at)));
        }
        let closed = self.closed.entry(group).or_default();
        let before = closed.range(..=last).next_back();
        let at = before.map_or(at, |(_, before)| at.max(*before));
        closed.insert(last, at);
        for (_, later) in closed.range_mut(last + 1..) {
            *later = at.max(*later);
        }
        Ok(())
    }

    fn stamp(
        &mut self,
        group: GroupId,
        own: u64,
        applied: u64,
        stamp: Revision,
    ) -> Result<(), String> {
        let stamps = self.stamps.entry(group).or_default();
        let known = *stamps.entry(applied).or_insert(stamp);
        if known != stamp {
            return Err(format!(
                "after entry {applied} of {group} the revision is {stamp:?} at {own} and {known:?} elsewhere"
            ));
        }
        let before = stamps.range(..applied).next_back();
        let after = stamps.range(applied + 1..).next();
        if before.is_some_and(|(_, before)| *before > stamp)
            || after.is_some_and(|(_, after)| *after < stamp)
        {
            return Err(format!("revisions of {group} fall around entry {applied}"));
        }
        Ok(())
    }

    /// Whether one replica has applied more of a group than another one.
    pub(super) fn apart(replicas: &[&Replica]) -> bool {
        let mut applied = BTreeMap::new();
        let mut groups = replicas.iter().flat_map(|replica| &replica.core.groups);
        groups.any(|(id, group)| {
            let here = group.machine.read().applied;
            *applied.entry(*id).or_insert(here) != here
        })
    }

    /// Whether all replicas have the same.
    pub(super) fn equal(replicas: &[&Replica]) -> Result<(), String> {
        let Some((first, rest)) = replicas.split_first() else {
            return Ok(());
        };
        for (id, group) in &first.core.groups {
            let machine = group.machine.read();
            for other in rest {
                let own = other.core.settings.replica;
                let Some(group) = other.core.groups.get(id) else {
                    return Err(format!("replica {own} has no {id}"));
                };
                let theirs = group.machine.read();
                if machine.applied != theirs.applied {
                    return Err(format!(
                        "replica {own} of {id} has applied {}, another one {}",
                        theirs.applied, machine.applied
                    ));
                }
                if *machine != *theirs {
                    return Err(format!("replica {own} of {id} differs from another one"));
                }
            }
        }
        Ok(())
    }
}

fn not_closed(group: GroupId, entry: (u64, Revision), closed: (u64, Revision)) -> String {
    format!(
        "entry {} of {group} is stamped {}, and {} was closed with entry {}",
        entry.0, entry.1, closed.1, closed.0
    )
}
