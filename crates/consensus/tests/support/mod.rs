//! Hosts in one process, over a transport that can be cut.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use krake_consensus::{Config, Host, MemberInfo, Owner, Transport};
use krake_model::ids::{FederationId, GroupId, NodeId};
use krake_model::time::Timestamp;
use parking_lot::RwLock;

pub const LIMIT: Duration = Duration::from_secs(20);
pub const LARGE: usize = 100_000;

#[derive(Default)]
pub struct Net {
    pub hosts: RwLock<BTreeMap<NodeId, Host>>,
    pub cut: RwLock<BTreeSet<NodeId>>,
    /// After so many frames of more than [`LARGE`] bytes to this node it is cut off.
    pub cut_after: RwLock<Option<(NodeId, usize)>>,
}

impl Net {
    fn count(&self, to: NodeId, bytes: usize) {
        let mut cut_after = self.cut_after.write();
        if let Some((node, left)) = cut_after.as_mut().filter(|(node, _)| *node == to)
            && bytes > LARGE
        {
            *left -= 1;
            if *left == 0 {
                self.cut.write().insert(*node);
                *cut_after = None;
            }
        }
    }
}

pub struct Link {
    net: Arc<Net>,
    own: NodeId,
}

impl Link {
    fn reach(&self, to: NodeId) -> Option<Host> {
        let cut = self.net.cut.read();
        if cut.contains(&self.own) || cut.contains(&to) {
            return None;
        }
        self.net.hosts.read().get(&to).cloned()
    }
}

#[async_trait]
impl Transport for Link {
    fn send(&self, to: NodeId, frame: Vec<u8>) -> bool {
        self.net.count(to, frame.len());
        self.reach(to)
            .map(|host| host.receive(self.own, &frame))
            .is_some()
    }

    async fn call(&self, to: NodeId, bytes: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, String> {
        let Some(host) = self.reach(to) else {
            tokio::time::sleep(timeout).await;
            return Err("unreachable".to_owned());
        };
        host.handle_call(self.own, &bytes).await
    }
}

pub fn node(replica: u64) -> NodeId {
    NodeId::from_bytes([replica as u8; 32])
}

pub struct Cluster {
    pub net: Arc<Net>,
    pub tick: Duration,
    pub compact_entries: u64,
    dir: tempfile::TempDir,
    boots: BTreeMap<u64, u64>,
}

impl Cluster {
    pub fn new() -> Self {
        Self {
            net: Arc::default(),
            tick: Duration::from_millis(20),
            compact_entries: 50,
            dir: tempfile::tempdir().unwrap(),
            boots: BTreeMap::new(),
        }
    }

    pub fn path(dir: &Path, replica: u64) -> std::path::PathBuf {
        dir.join(replica.to_string())
    }

    pub fn start(&mut self, replica: u64) -> Host {
        let boot = self.boots.entry(replica).or_default();
        *boot += 1;
        let owner = Owner {
            federation: FederationId::from_bytes([7; 32]),
            node: node(replica),
        };
        let path = Self::path(self.dir.path(), replica);
        if *boot == 1 {
            krake_consensus::create(&path, owner).unwrap();
        }
        let mut config = Config::new(owner, replica, path, *boot);
        config.tick = self.tick;
        config.compact_entries = self.compact_entries;
        let link = Link {
            net: Arc::clone(&self.net),
            own: node(replica),
        };
        let started = Instant::now();
        let host = Host::start(&config, Arc::new(link), move || {
            Timestamp::from_millis(1_764_000_000_000 + started.elapsed().as_millis() as i64)
        })
        .unwrap();
        self.net.hosts.write().insert(node(replica), host.clone());
        host
    }

    pub async fn kill(&self, replica: u64) {
        let host = self.net.hosts.write().remove(&node(replica)).unwrap();
        host.stop().await;
    }
}

pub fn members(replicas: &[u64]) -> Vec<MemberInfo> {
    replicas
        .iter()
        .map(|replica| MemberInfo {
            replica: *replica,
            node: node(*replica),
            operator: format!("operator-{replica}"),
            grid_zone: "zone".to_owned(),
            country: "country".to_owned(),
            alive: true,
            heard: true,
            steady: true,
            leaving: false,
            far: false,
        })
        .collect()
}

pub fn groups() -> Vec<GroupId> {
    std::iter::once(GroupId::META)
        .chain((0..3).map(GroupId::of_shard))
        .collect()
}

pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        if start.elapsed() > LIMIT {
            panic!("still not: {what}");
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn formed(cluster: &mut Cluster, count: u64) -> Vec<Host> {
    let replicas: Vec<u64> = (1..=count).collect();
    let hosts: Vec<Host> = replicas.iter().map(|id| cluster.start(*id)).collect();
    hosts[0].set_members(members(&[1])).await;
    hosts[0].bootstrap(groups()).await.unwrap();
    for host in &hosts {
        host.set_members(members(&replicas)).await;
    }
    for host in &hosts {
        let status = host.status();
        until("every group has its voters", || {
            let status = status.borrow();
            groups().iter().all(|id| {
                status
                    .get(id)
                    .is_some_and(|s| s.voters.len() as u64 == count && s.leader.is_some())
            })
        })
        .await;
    }
    hosts
}
