//! Members come and go.

use crate::group::Group;
use crate::testing::{GROUP, Net, members};

/// The simulator's seed 7009 of thirty days, at commit 46e267b.
#[test]
fn who_comes_to_lead_while_its_vote_is_taken_away_hands_over() {
    let mut net = Net::new(4);
    net.until("three vote and one follows", |net| {
        let learners = |(_, group): (u64, &Group)| group.learners().len();
        net.voters().len() == 3 && net.leader().map(learners) == Some(1)
    });
    let leader = net.leader().unwrap().0;
    let voters = net.voters();
    let old = *voters.iter().find(|id| **id != leader).unwrap();
    net.tell(&members(4, &[old]));
    net.until("two sets of voters decide together", |net| {
        net.leader().is_some_and(|(_, group)| group.is_joint())
    });
    net.work(leader, |replica| {
        assert!(matches!(replica.transfer(GROUP, old), Ok(true)));
    });
    net.until("the one that is replaced leads", |net| {
        net.group(old).is_some_and(Group::is_leader)
    });
    net.tell(&members(4, &[]));
    net.until("one that votes leads, and the other one follows", |net| {
        net.leader().is_some_and(|(id, group)| {
            !group.is_joint() && id != old && group.voters().contains(&id)
        }) && !net.voters().contains(&old)
    });
}
