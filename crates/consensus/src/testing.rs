//! Replicas of one group, whose frames go where and when the test wants.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::Path;
use std::sync::Arc;

use krake_model::ids::{FederationId, GroupId, NodeId};

use crate::core::{Batch, Settings};
use crate::disk::{Disk, create_in};
use crate::group::Group;
use crate::medium::memory::MemoryDirectory;
use crate::replica::{Effects, Replica};
use crate::voters::MemberInfo;
use crate::wal::Owner;
use crate::wire::Frame;

pub(crate) const COMPACT_ENTRIES: u64 = 100;
pub(crate) const COMPACT_BYTES: usize = 100_000;
pub(crate) const GROUP: GroupId = GroupId::META;
/// Turns after which nothing new is to be expected: several election timeouts.
const TURNS_MAX: usize = 300;

pub(crate) fn members(count: u64, away: &[u64]) -> Vec<MemberInfo> {
    let member = |replica: u64| MemberInfo {
        replica,
        node: node(replica),
        operator: replica.to_string(),
        grid_zone: String::new(),
        country: String::new(),
        alive: !away.contains(&replica),
        heard: !away.contains(&replica),
        steady: true,
        leaving: false,
        far: false,
    };
    (1..=count).map(member).collect()
}

/// What a replica did, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Did {
    Sent,
    Written,
    Applied,
}

#[derive(Default)]
struct Done {
    sent: Vec<(NodeId, Frame)>,
    order: Vec<Did>,
}

impl Effects for Done {
    fn send(&mut self, to: NodeId, frame: &Frame) -> bool {
        self.sent.push((to, frame.clone()));
        self.order.push(Did::Sent);
        true
    }

    fn written(&mut self) {
        self.order.push(Did::Written);
    }

    fn applied(&mut self, _: &BTreeMap<GroupId, Group>, batches: VecDeque<Batch>) {
        self.order.extend(batches.iter().map(|_| Did::Applied));
    }
}

pub(crate) fn node(replica: u64) -> NodeId {
    NodeId::from_bytes([replica as u8; 32])
}

fn owner(replica: u64) -> Owner {
    Owner {
        federation: FederationId::from_bytes([1; 32]),
        node: node(replica),
    }
}

/// With files in memory.
pub(crate) fn start(replica: u64) -> Replica {
    start_anew(replica, &create(replica))
}

/// An empty catalog.
pub(crate) fn create(replica: u64) -> Arc<MemoryDirectory> {
    let directory = Arc::default();
    create_in(&directory, owner(replica)).ok().unwrap();
    directory
}

/// With the files that are there.
pub(crate) fn start_anew(replica: u64, directory: &Arc<MemoryDirectory>) -> Replica {
    let settings = Settings {
        replica,
        election_ticks: 6,
        heartbeat_ticks: 3,
        boot_nonce: replica,
        seed: replica,
        compact_entries: (COMPACT_ENTRIES, COMPACT_ENTRIES),
        compact_entries_together: 0,
        compact_bytes: COMPACT_BYTES,
        kept_entries: 10,
        piece_bytes: 1024,
        counters: Arc::default(),
    };
    let directory = Box::new(Arc::clone(directory));
    let (disk, groups) = Disk::open_in(directory, Path::new("memory"), owner(replica)).unwrap();
    Replica::new(settings, disk, groups).unwrap()
}

pub(crate) struct Net {
    pub(crate) replicas: BTreeMap<u64, Replica>,
    /// From whom, to whom.
    pub(crate) flying: VecDeque<(u64, NodeId, Frame)>,
}

impl Net {
    pub(crate) fn new(count: u64) -> Self {
        let mut net = Self {
            replicas: (1..=count).map(|id| (id, start(id))).collect(),
            flying: VecDeque::new(),
        };
        net.work(1, |replica| replica.bootstrap(vec![GROUP]).unwrap());
        net.tell(&members(count, &[]));
        net
    }

    /// Gives something to a replica and lets it work.
    pub(crate) fn work(&mut self, id: u64, give: impl FnOnce(&mut Replica)) -> Vec<Did> {
        let (mut done, replica) = (Done::default(), self.replicas.get_mut(&id).unwrap());
        give(replica);
        replica.rounds(&mut done).unwrap();
        let sent = done.sent.into_iter().map(|(to, frame)| (id, to, frame));
        self.flying.extend(sent);
        done.order
    }

    pub(crate) fn tell(&mut self, members: &[MemberInfo]) {
        for id in self.ids() {
            self.work(id, |replica| replica.set_members(members.to_vec()));
        }
    }

    fn ids(&self) -> Vec<u64> {
        self.replicas.keys().copied().collect()
    }

    /// The next frame arrives; `false`: there is none.
    pub(crate) fn deliver(&mut self) -> bool {
        let Some((from, to, frame)) = self.flying.pop_front() else {
            return false;
        };
        let to = u64::from(to.as_bytes()[0]);
        self.work(to, |replica| replica.receive(node(from), frame));
        true
    }

    /// Time goes on, frame by frame, until something holds.
    pub(crate) fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
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

    pub(crate) fn group(&self, id: u64) -> Option<&Group> {
        self.replicas[&id].core.groups.get(&GROUP)
    }

    pub(crate) fn leader(&self) -> Option<(u64, &Group)> {
        let groups = self.ids().into_iter();
        let mut groups = groups.filter_map(|id| Some((id, self.group(id)?)));
        groups.find(|(_, group)| group.is_leader())
    }

    pub(crate) fn voters(&self) -> BTreeSet<u64> {
        self.leader().map(|(_, g)| g.voters()).unwrap_or_default()
    }
}
