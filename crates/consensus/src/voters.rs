//! Which replicas of a group vote: a pure function of the members, so that every leader agrees.

use std::collections::{BTreeMap, BTreeSet};

use krake_model::ids::{GroupId, NodeId};

/// What the voter choice looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberInfo {
    /// The member's Raft replica id, the same in every group.
    pub replica: u64,
    /// Who it is.
    pub node: NodeId,
    /// Who runs it: voters of one group spread over operators,
    pub operator: String,
    /// grid zones,
    pub grid_zone: String,
    /// and countries.
    pub country: String,
    /// Whether it is thought reachable: else it may lose its votes.
    pub alive: bool,
    /// Whether it was heard of within the last seconds: only then it gets one.
    pub heard: bool,
    /// Whether it has been so for long enough to take a vote from one that is alive, too.
    pub steady: bool,
    /// Whether it is about to leave: it votes only where nobody else can.
    pub leaving: bool,
    /// Whether messages to it take so long that it matters where a leader is.
    pub far: bool,
}

/// How many voters a group has in a federation of `members`: odd, so that each member counts, and
/// 5 at most (DESIGN §6).
pub const fn voter_count(members: usize) -> usize {
    match members {
        0..=2 => 1,
        3..=4 => 3,
        _ => 5,
    }
}

/// The voters `group` should have: those that differ most in operator, then country, then grid zone;
/// ties by rendezvous hash (Thaler and Ravishankar 1998), so that each member votes in about as many
/// groups, and few votes move when members come and go.
///
/// One of the `current` voters that is alive loses its vote only to a member that is steady: who comes
/// and goes takes none. Where there is one voter, or none can be spared, nothing moves for the
/// spread's sake: with one voter a group is lost with it, wherever that is. A voter that is not alive
/// is kept only while nobody alive could take its place; a member that is not alive and does not vote
/// does not count, nor does one that is leaving while there is another one.
pub fn desired_voters(
    group: GroupId,
    members: &BTreeMap<u64, MemberInfo>,
    current: &BTreeSet<u64>,
) -> BTreeSet<u64> {
    let votes = |member: &MemberInfo| current.contains(&member.replica);
    let can_vote = |member: &&MemberInfo| member.alive || votes(member);
    let stays = |member: &&MemberInfo| can_vote(member) && !member.leaving;
    let mut able: Vec<&MemberInfo> = members.values().filter(stays).collect();
    if able.is_empty() {
        able = members.values().filter(can_vote).collect();
    }
    let count = voter_count(able.len());
    let reliable = |member: &&MemberInfo| member.alive && (member.steady || votes(member));
    let ideal: Vec<&MemberInfo> = able.iter().copied().filter(reliable).collect();
    if count > 1 && ideal.len() >= count {
        return spread(group, ideal, count, |member| member.alive);
    }
    spread(group, able, count, |member| (member.alive, votes(member)))
}

/// `count` of these members that are first by `rank` and differ most.
fn spread<K: Ord>(
    group: GroupId,
    mut left: Vec<&MemberInfo>,
    count: usize,
    rank: impl Fn(&MemberInfo) -> K,
) -> BTreeSet<u64> {
    let mut chosen: Vec<&MemberInfo> = Vec::with_capacity(count);
    while chosen.len() < count && !left.is_empty() {
        let fresh = |pick: fn(&MemberInfo) -> &str, member: &MemberInfo| {
            chosen.iter().all(|other| pick(other) != pick(member))
        };
        let best = left
            .iter()
            .enumerate()
            .max_by_key(|(_, member)| {
                (
                    rank(member),
                    fresh(|m| &m.operator, member),
                    fresh(|m| &m.country, member),
                    fresh(|m| &m.grid_zone, member),
                    weight(group, member.node),
                )
            })
            .map(|(position, _)| position);
        if let Some(position) = best {
            chosen.push(left.swap_remove(position));
        }
    }
    chosen.into_iter().map(|member| member.replica).collect()
}

/// What the voters of a group should differ in, the most important first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    /// Who runs them.
    Operator,
    /// Whose law they are under.
    Country,
    /// Which power grid they hang on.
    GridZone,
}

/// The most important rule that these voters do not meet: the loss of one operator, country or grid
/// zone takes more than one of them. Where nothing is said, each counts as its own.
pub fn unmet_rule<'a>(voters: impl Iterator<Item = &'a MemberInfo> + Clone) -> Option<Rule> {
    let shared = |pick: fn(&MemberInfo) -> &str| {
        let mut seen = BTreeSet::new();
        voters
            .clone()
            .map(pick)
            .any(|place| !place.is_empty() && !seen.insert(place))
    };
    if shared(|m| &m.operator) {
        Some(Rule::Operator)
    } else if shared(|m| &m.country) {
        Some(Rule::Country)
    } else {
        shared(|m| &m.grid_zone).then_some(Rule::GridZone)
    }
}

fn weight(group: GroupId, node: NodeId) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&group.number().to_le_bytes());
    hasher.update(node.as_bytes());
    let mut first = [0_u8; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// Learners added in one step at most.
const LEARNERS_AT_ONCE: usize = 256;

/// One step from the voters there are to those there should be; a group changes or moves one voter
/// at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// Makes replicas that do not vote yet.
    AddLearners(Vec<u64>),
    /// A learner that has the log starts to vote.
    Promote(u64),
    /// The same, while another one stops to vote: with a majority of both sets of voters as long as
    /// it takes (joint consensus, Ongaro and Ousterhout 2014, §6), so that at no moment fewer
    /// failures are survived than before.
    Replace {
        /// Starts to vote.
        by: u64,
        /// Stops to vote, but keeps the state.
        old: u64,
    },
    /// A voter stops to vote, but keeps the state.
    Demote(u64),
    /// A replica whose member left.
    Remove(u64),
}

/// The next step, if any: first everyone gets a replica, then voters are replaced, then added, then
/// taken away. Of several that may go those go first that are no members, leaving or away, and `own`,
/// which decides this, last: not before another one that stays can lead. None is taken away where
/// those that stay and are there could not decide anything any more. `caught_up` are learners with
/// (nearly) the whole log, `there` voters that answered just now.
pub(crate) fn next_step(
    members: &BTreeMap<u64, MemberInfo>,
    voters: &BTreeSet<u64>,
    learners: &BTreeSet<u64>,
    desired: &BTreeSet<u64>,
    caught_up: &BTreeSet<u64>,
    there: &BTreeSet<u64>,
    own: u64,
) -> Option<Step> {
    let missing: Vec<u64> = members
        .keys()
        .filter(|id| !voters.contains(id) && !learners.contains(id))
        .take(LEARNERS_AT_ONCE)
        .copied()
        .collect();
    if !missing.is_empty() {
        return Some(Step::AddLearners(missing));
    }
    let promote = desired
        .iter()
        .find(|id| !voters.contains(id) && caught_up.contains(id) && members[id].heard);
    let alive = |id: &u64| members.get(id).is_some_and(|member| member.alive);
    let stays = |id: &u64| members.get(id).is_some_and(|member| !member.leaving);
    let surplus = || voters.iter().filter(|id| !desired.contains(id));
    let first = |id: &&u64| (**id == own, stays(id), alive(id));
    let old = surplus().min_by_key(first);
    if let Some(by) = promote.copied() {
        let can_go = |old: &u64| *old != own || !voters.is_disjoint(desired);
        return Some(match old.copied().filter(can_go) {
            Some(old) if voters.len() >= desired.len() => Step::Replace { by, old },
            _ => Step::Promote(by),
        });
    }
    let gone = |id: &&u64| !members.contains_key(id);
    if let Some(id) = learners.iter().find(gone) {
        return Some(Step::Remove(*id));
    }
    if voters.len() > desired.len() || desired.iter().all(|id| voters.contains(id)) {
        let can_spare = |old: &&u64| {
            let stay = voters.iter().filter(|id| id != old && there.contains(id));
            stay.count() * 2 >= voters.len()
        };
        let old = surplus().filter(can_spare).min_by_key(first)?;
        return Some(if members.contains_key(old) {
            Step::Demote(*old)
        } else {
            Step::Remove(*old)
        });
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_gone_stops_to_vote_before_who_is_there_and_a_majority_stays() {
        // Five voters: 4 has left for ever, 5 is away.
        let mut members = members(3);
        members.extend(self::members(5).split_off(&5));
        members.get_mut(&5).unwrap().alive = false;
        let voters: BTreeSet<u64> = (1..=5).collect();
        let step = |members: &BTreeMap<u64, MemberInfo>, voters: &BTreeSet<u64>, desired| {
            let nobody = BTreeSet::new();
            next_step(
                members,
                voters,
                &nobody,
                &BTreeSet::from(desired),
                &nobody,
                &there(members),
                1,
            )
        };
        assert_eq!(step(&members, &voters, [1, 2, 5]), Some(Step::Remove(4)));
        let voters = BTreeSet::from([1, 2, 3, 5]);
        assert_eq!(step(&members, &voters, [1, 2, 3]), Some(Step::Demote(5)));
        // Of 1, 2 and 5 two would be left that can decide; with 2 away only one.
        assert_eq!(step(&members, &voters, [1, 2, 5]), Some(Step::Demote(3)));
        members.get_mut(&2).unwrap().alive = false;
        assert_eq!(step(&members, &voters, [1, 2, 5]), None);
    }

    #[test]
    fn a_member_that_is_away_before_it_ever_voted_leaves_no_even_number_of_voters() {
        let mut members = members(5);
        members.get_mut(&5).unwrap().alive = false;
        let voters = BTreeSet::from([1, 2, 3, 4]);
        let desired = desired_voters(GroupId::META, &members, &voters);
        assert_eq!(desired.len(), 3);
        assert!(desired.is_subset(&voters), "{desired:?}");
        // One that votes is missed: it counts until somebody takes its place.
        let voters = BTreeSet::from([1, 2, 3, 4, 5]);
        assert_eq!(desired_voters(GroupId::META, &members, &voters), voters);
    }

    fn members(count: u64) -> BTreeMap<u64, MemberInfo> {
        (1..=count)
            .map(|replica| {
                let info = MemberInfo {
                    replica,
                    node: NodeId::from_bytes([replica as u8; 32]),
                    operator: format!("operator-{}", replica % 4),
                    grid_zone: format!("zone-{}", replica % 3),
                    country: format!("country-{}", replica % 3),
                    alive: true,
                    heard: true,
                    steady: true,
                    leaving: false,
                    far: false,
                };
                (replica, info)
            })
            .collect()
    }

    #[test]
    fn voters_grow_with_the_members() {
        for (count, expected) in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (9, 5)] {
            let members = members(count);
            let desired = desired_voters(GroupId::META, &members, &BTreeSet::from([1]));
            assert_eq!(desired.len(), expected);
            assert!(expected > 1 || desired.contains(&1), "the only one stays");
        }
    }

    fn there(members: &BTreeMap<u64, MemberInfo>) -> BTreeSet<u64> {
        let there = members.iter().filter(|(_, member)| member.alive);
        there.map(|(id, _)| *id).collect()
    }

    #[test]
    fn a_voter_that_fell_silent_a_moment_ago_is_not_counted_on() {
        // Nobody says yet that 1 is away, but it does not answer.
        let mut members = members(3);
        members.get_mut(&3).unwrap().leaving = true;
        let voters = BTreeSet::from([1, 2, 3]);
        let desired = BTreeSet::from([1]);
        let none = BTreeSet::new();
        let step = |there| next_step(&members, &voters, &none, &desired, &none, &there, 2);
        assert_eq!(step(BTreeSet::from([2, 3])), None);
        assert_eq!(step(BTreeSet::from([1, 2, 3])), Some(Step::Demote(3)));
    }

    /// What the groups come to when they move one vote after the other.
    fn settled(group: GroupId, members: &BTreeMap<u64, MemberInfo>, from: &[u64]) -> BTreeSet<u64> {
        let mut voters: BTreeSet<u64> = from.iter().copied().collect();
        for _ in 0..20 {
            let desired = desired_voters(group, members, &voters);
            let everybody = members.keys().copied();
            let learners = everybody.filter(|id| !voters.contains(id)).collect();
            let there = there(members);
            match next_step(
                members, &voters, &learners, &desired, &learners, &there, from[0],
            ) {
                None => return voters,
                Some(Step::Promote(id)) => drop(voters.insert(id)),
                Some(Step::Demote(id) | Step::Remove(id)) => drop(voters.remove(&id)),
                Some(Step::Replace { by, old }) => {
                    voters.remove(&old);
                    voters.insert(by);
                }
                Some(Step::AddLearners(_)) => panic!("all have one"),
            }
        }
        panic!("votes move for ever: {voters:?}")
    }

    #[test]
    fn votes_move_to_those_that_join_and_stay_until_each_has_about_as_many() {
        let mut members = members(7);
        for member in members.values_mut() {
            (member.operator, member.country) = (format!("o{}", member.replica), String::new());
        }
        let count = |members: &BTreeMap<u64, MemberInfo>| {
            let mut votes = BTreeMap::new();
            for shard in 0..100 {
                let voters = settled(GroupId::of_shard(shard), members, &[1, 2, 3, 4, 5]);
                assert_eq!(voters.len(), 5);
                for id in voters {
                    *votes.entry(id).or_insert(0) += 1;
                }
            }
            votes
        };
        let votes = count(&members);
        assert_eq!(votes.len(), 7, "{votes:?}");
        assert!(
            votes.values().all(|count| (55..=85).contains(count)),
            "{votes:?}"
        );
        // Who has only just come, or comes and goes, takes nobody's vote.
        for id in [6, 7] {
            members.get_mut(&id).unwrap().steady = false;
        }
        assert_eq!(count(&members).keys().max(), Some(&5));
    }

    #[test]
    fn votes_move_to_another_operator_country_or_grid_zone() {
        let mut members = members(6);
        for (replica, member) in &mut members {
            member.operator = if *replica == 6 { "b" } else { "a" }.to_owned();
            member.country = if *replica == 4 { "SE" } else { "DE" }.to_owned();
            member.grid_zone = if *replica == 2 { "north" } else { "south" }.to_owned();
        }
        for shard in 0..20 {
            let voters = settled(GroupId::of_shard(shard), &members, &[1, 2, 3, 4, 5]);
            assert!(voters.is_superset(&BTreeSet::from([2, 4, 6])), "{voters:?}");
        }
    }

    #[test]
    fn few_votes_move_when_one_is_lost_and_they_come_back_with_it() {
        let mut members = members(7);
        for shard in 0..20 {
            let group = GroupId::of_shard(shard);
            let before = settled(group, &members, &[1, 2, 3, 4, 5]);
            let lost = *before.first().unwrap();
            let all: Vec<u64> = before.iter().copied().collect();
            let member = members.get_mut(&lost).unwrap();
            (member.alive, member.steady) = (false, false);
            let without = settled(group, &members, &all[1..]);
            assert!(!without.contains(&lost));
            assert!(without.intersection(&before).count() >= 3);
            let others: Vec<u64> = without.iter().copied().collect();
            members.get_mut(&lost).unwrap().alive = true;
            assert_eq!(settled(group, &members, &others), without, "not steady yet");
            members.get_mut(&lost).unwrap().steady = true;
            assert_eq!(settled(group, &members, &others), before);
        }
    }

    #[test]
    fn who_leaves_gives_every_vote_away_and_the_last_one_keeps_them() {
        for count in 1..=7 {
            let mut members = members(count);
            let all: Vec<u64> = (1..=voter_count(count as usize) as u64).collect();
            members.get_mut(&1).unwrap().leaving = true;
            for leader in &all {
                let from: Vec<u64> = std::iter::once(*leader).chain(all.clone()).collect();
                let voters = settled(GroupId::META, &members, &from);
                if count == 1 {
                    assert_eq!(voters, BTreeSet::from([1]));
                    continue;
                }
                // A leader hands over before its own vote goes: then another one decides this.
                let voters: Vec<u64> = voters.into_iter().filter(|id| *id != 1).collect();
                assert_eq!(voters.len(), voter_count(count as usize - 1), "{count}");
            }
        }
    }

    #[test]
    fn who_leaves_does_so_beside_one_that_is_away_as_long_as_that_leaves_a_majority() {
        for (count, away) in [(3, 1..=1), (5, 1..=2), (7, 1..=2)] {
            let mut members = members(count);
            members.get_mut(&count).unwrap().leaving = true;
            for id in away {
                let member = members.get_mut(&id).unwrap();
                (member.alive, member.steady) = (false, false);
            }
            let voters: Vec<u64> = (1..=count).filter(|id| count < 7 || *id > 2).collect();
            let from: Vec<u64> = std::iter::once(3.min(count - 1)).chain(voters).collect();
            let voters = settled(GroupId::META, &members, &from);
            assert!(!voters.contains(&count), "{count}: {voters:?}");
        }
    }

    #[test]
    fn the_only_voter_does_not_go_before_another_one_votes() {
        let mut members = members(2);
        members.get_mut(&1).unwrap().leaving = true;
        let voters = BTreeSet::from([1]);
        let desired = desired_voters(GroupId::META, &members, &voters);
        assert_eq!(desired, BTreeSet::from([2]));
        let learners = BTreeSet::from([2]);
        let step = |members: &BTreeMap<u64, MemberInfo>| {
            let there = BTreeSet::from([1]);
            next_step(members, &voters, &learners, &desired, &learners, &there, 1)
        };
        assert_eq!(step(&members), Some(Step::Promote(2)));
        // Nothing could be decided without it: it has to be there.
        members.get_mut(&2).unwrap().heard = false;
        assert_eq!(step(&members), None);
    }

    #[test]
    fn voters_spread_over_operators_and_groups_over_members() {
        let members = members(12);
        let mut used = BTreeSet::new();
        for shard in 0..16 {
            let desired = desired_voters(GroupId::of_shard(shard), &members, &BTreeSet::new());
            let operators: BTreeSet<_> = desired.iter().map(|id| &members[id].operator).collect();
            assert_eq!(operators.len(), 4);
            used.extend(desired);
        }
        assert!(used.len() >= 10, "{used:?}");
    }

    #[test]
    fn the_most_important_rule_that_is_not_met_is_named() {
        let mut members = members(3);
        assert_eq!(unmet_rule(members.values()), None);
        for (replica, place) in [(1, "grid"), (2, "grid")] {
            members.get_mut(&replica).unwrap().grid_zone = place.to_owned();
        }
        assert_eq!(unmet_rule(members.values()), Some(Rule::GridZone));
        for replica in 1..=3 {
            members.get_mut(&replica).unwrap().country = "DE".to_owned();
        }
        assert_eq!(unmet_rule(members.values()), Some(Rule::Country));
        members.get_mut(&3).unwrap().operator = members[&1].operator.clone();
        assert_eq!(unmet_rule(members.values()), Some(Rule::Operator));
        for member in members.values_mut() {
            (member.operator, member.country, member.grid_zone) = Default::default();
        }
        assert_eq!(unmet_rule(members.values()), None, "nothing is known");
    }

    #[test]
    fn a_dead_voter_is_replaced_when_somebody_alive_is_there() {
        let mut members = members(6);
        let current = desired_voters(GroupId::META, &members, &BTreeSet::new());
        let dead = *current.first().unwrap();
        members.get_mut(&dead).unwrap().alive = false;
        let next = desired_voters(GroupId::META, &members, &current);
        assert!(!next.contains(&dead));
        assert_eq!(next.intersection(&current).count(), 4);
    }

    #[test]
    fn steps_add_before_they_remove_and_end() {
        let members = members(5);
        let mut voters = BTreeSet::from([1]);
        let mut learners = BTreeSet::new();
        let mut steps = 0;
        loop {
            let desired = desired_voters(GroupId::META, &members, &voters);
            let all: BTreeSet<u64> = learners.clone();
            let there = there(&members);
            let step = next_step(&members, &voters, &learners, &desired, &all, &there, 1);
            let Some(step) = step else {
                break;
            };
            match step {
                Step::AddLearners(ids) => learners.extend(ids),
                Step::Promote(id) => {
                    learners.remove(&id);
                    voters.insert(id);
                }
                Step::Replace { .. } => panic!("there are too few"),
                Step::Demote(id) => {
                    voters.remove(&id);
                    learners.insert(id);
                }
                Step::Remove(id) => {
                    voters.remove(&id);
                    learners.remove(&id);
                }
            }
            steps += 1;
            assert!(steps < 50);
        }
        assert_eq!(voters.len(), 5);
        assert!(learners.is_empty());
    }

    #[test]
    fn a_voter_that_is_away_is_replaced_in_one_step_by_one_that_has_caught_up() {
        let mut members = members(7);
        let voters: BTreeSet<u64> = (1..=5).collect();
        let learners = BTreeSet::from([6, 7]);
        members.get_mut(&4).unwrap().alive = false;
        members.remove(&5);
        let desired = desired_voters(GroupId::META, &members, &voters);
        assert_eq!(desired, BTreeSet::from([1, 2, 3, 6, 7]));
        let step = |caught_up: &[u64], own| {
            let caught_up = caught_up.iter().copied().collect();
            let there = there(&members);
            next_step(
                &members, &voters, &learners, &desired, &caught_up, &there, own,
            )
        };
        assert_eq!(step(&[], 1), None, "nobody can take their place yet");
        assert_eq!(step(&[7], 1), Some(Step::Replace { by: 7, old: 5 }));
        assert_eq!(step(&[6, 7], 4), Some(Step::Replace { by: 6, old: 5 }));
    }
}
