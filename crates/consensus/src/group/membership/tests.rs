//! Replicas of one group, whose frames go where and when the test wants.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use krake_model::ids::{GroupId, NodeId};

use crate::core::Batch;
use crate::group::Group;
use crate::replica::tests::{node, start};
use crate::replica::{Effects, Replica};
use crate::voters::MemberInfo;
use crate::wire::Frame;

const GROUP: GroupId = GroupId::META;
/// Turns after which nothing new is to be expected: several election timeouts.
const TURNS_MAX: usize = 300;

fn members(count: u64, away: &[u64]) -> Vec<MemberInfo> {
    let member = |replica: u64| MemberInfo {
        replica,
        node: node(replica),
        operator: replica.to_string(),
        grid_zone: String::new(),
        country: String::new(),
        alive: !away.contains(&replica),
        far: false,
    };
    (1..=count).map(member).collect()
}

#[derive(Default)]
struct Sent(Vec<(NodeId, Frame)>);

impl Effects for Sent {
    fn send(&mut self, to: NodeId, frame: &Frame) -> bool {
        self.0.push((to, frame.clone()));
        true
    }

    fn applied(&mut self, _: &BTreeMap<GroupId, Group>, _: VecDeque<Batch>) {}
}

struct Net {
    replicas: BTreeMap<u64, Replica>,
    flying: VecDeque<(u64, NodeId, Frame)>,
}

impl Net {
    fn new(count: u64) -> Self {
        let mut net = Self {
            replicas: (1..=count).map(|id| (id, start(id))).collect(),
            flying: VecDeque::new(),
        };
        net.work(1, |replica| replica.bootstrap(vec![GROUP]).unwrap());
        net.tell(&members(count, &[]));
        net
    }

    fn work(&mut self, id: u64, give: impl FnOnce(&mut Replica)) {
        let (mut sent, replica) = (Sent::default(), self.replicas.get_mut(&id).unwrap());
        give(replica);
        replica.rounds(&mut sent).unwrap();
        let sent = sent.0.into_iter().map(|(to, frame)| (id, to, frame));
        self.flying.extend(sent);
    }

    fn tell(&mut self, members: &[MemberInfo]) {
        for id in self.ids() {
            self.work(id, |replica| replica.set_members(members.to_vec()));
        }
    }

    fn ids(&self) -> Vec<u64> {
        self.replicas.keys().copied().collect()
    }

    /// The next frame arrives; `false`: there is none.
    fn deliver(&mut self) -> bool {
        let Some((from, to, frame)) = self.flying.pop_front() else {
            return false;
        };
        let to = u64::from(to.as_bytes()[0]);
        self.work(to, |replica| replica.receive(node(from), frame));
        true
    }

    /// Time goes on, frame by frame, until something holds.
    fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        for _ in 0..TURNS_MAX {
            for id in self.ids() {
                self.work(id, Replica::tick);
                while !holds(self) {
                    if !self.deliver() {
                        break;
                    }
                }
                if holds(self) {
                    return;
                }
            }
        }
        panic!("still not: {what}");
    }

    fn group(&self, id: u64) -> Option<&Group> {
        self.replicas[&id].core.groups.get(&GROUP)
    }

    fn leader(&self) -> Option<(u64, &Group)> {
        let groups = self.ids().into_iter();
        let mut groups = groups.filter_map(|id| Some((id, self.group(id)?)));
        groups.find(|(_, group)| group.is_leader())
    }

    fn voters(&self) -> BTreeSet<u64> {
        self.leader().map(|(_, g)| g.voters()).unwrap_or_default()
    }
}

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
