//! The catalog over long ways: five members in this process, whose messages take as long as they
//! would between places. Their files are real.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use krake_consensus::{
    Command, Config, Expect, GroupStatus, Host, MemberInfo, Operation, Owner, Transport,
};
use krake_model::ids::{FederationId, GroupId, NodeId};
use krake_model::time::Timestamp;
use parking_lot::RwLock;
use tokio::sync::mpsc;

use super::measure::{at, median};

const MEMBERS: u64 = 5;
const WRITES: usize = 60;
/// Frames on one way at once; more are lost.
const FRAMES_MAX: usize = 4096;
const LIMIT: Duration = Duration::from_secs(60);

type Hosts = Arc<RwLock<BTreeMap<NodeId, Host>>>;

fn node(replica: u64) -> NodeId {
    NodeId::from_bytes([replica as u8; 32])
}

/// From one member to the others.
struct Ways {
    hosts: Hosts,
    own: NodeId,
    /// One way.
    delay: Duration,
    /// Frames on their way to each member, which do not overtake each other.
    frames: BTreeMap<NodeId, mpsc::Sender<(Instant, Vec<u8>)>>,
}

impl Ways {
    fn new(hosts: &Hosts, own: NodeId, delay: Duration) -> Self {
        let frames = (1..=MEMBERS).map(|replica| {
            let to = node(replica);
            let (sender, mut frames) = mpsc::channel::<(Instant, Vec<u8>)>(FRAMES_MAX);
            let hosts = Arc::clone(hosts);
            tokio::spawn(async move {
                while let Some((sent, frame)) = frames.recv().await {
                    tokio::time::sleep_until((sent + delay).into()).await;
                    let host = hosts.read().get(&to).cloned();
                    if let Some(host) = host {
                        host.receive(own, &frame);
                    }
                }
            });
            (to, sender)
        });
        Self {
            hosts: Arc::clone(hosts),
            own,
            delay,
            frames: frames.collect(),
        }
    }
}

#[async_trait]
impl Transport for Ways {
    fn send(&self, to: NodeId, frame: Vec<u8>) -> bool {
        let way = self.frames.get(&to);
        way.is_some_and(|way| way.try_send((Instant::now(), frame)).is_ok())
    }

    async fn call(&self, to: NodeId, bytes: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, String> {
        let host = self.hosts.read().get(&to).cloned();
        let host = host.ok_or("it is not there")?;
        let asked = async {
            tokio::time::sleep(self.delay).await;
            let answer = host.handle_call(self.own, &bytes).await;
            tokio::time::sleep(self.delay).await;
            answer
        };
        let answer = tokio::time::timeout(timeout, asked).await;
        answer.map_err(|_| "no answer".to_owned())?
    }
}

fn members(own: u64) -> Vec<MemberInfo> {
    (1..=MEMBERS)
        .map(|replica| MemberInfo {
            replica,
            node: node(replica),
            operator: format!("operator-{replica}"),
            grid_zone: String::new(),
            country: String::new(),
            alive: true,
            heard: true,
            steady: true,
            leaving: false,
            far: replica != own,
        })
        .collect()
}

fn put() -> Command {
    Command::new(vec![Operation::Put {
        key: "key".to_owned(),
        value: vec![7; 1024].into(),
        expect: Expect::Any,
    }])
}

async fn formed(dir: &std::path::Path, rtt: Duration) -> Vec<Host> {
    let hosts = Hosts::default();
    let start = Instant::now();
    let group = GroupId::META;
    for replica in 1..=MEMBERS {
        let owner = Owner {
            federation: FederationId::from_bytes([7; 32]),
            node: node(replica),
        };
        let path = dir.join(replica.to_string());
        krake_consensus::create(&path, owner).unwrap();
        let config = Config::new(owner, replica, path, 1);
        let ways = Arc::new(Ways::new(&hosts, owner.node, rtt / 2));
        let clock =
            move || Timestamp::from_millis(1_764_000_000_000 + start.elapsed().as_millis() as i64);
        let host = Host::start(&config, ways, clock).unwrap();
        hosts.write().insert(owner.node, host.clone());
        host.set_members(members(replica)).await;
        if replica == 1 {
            host.bootstrap(vec![group]).await.unwrap();
        }
    }
    let all: Vec<Host> = hosts.read().values().cloned().collect();
    for host in &all {
        let mut status = host.status();
        let complete = |known: &BTreeMap<GroupId, GroupStatus>| {
            let group = known.get(&group);
            group.is_some_and(|g| g.leader.is_some() && g.voters.len() as u64 == MEMBERS)
        };
        let formed = status.wait_for(complete);
        tokio::time::timeout(LIMIT, formed).await.unwrap().unwrap();
    }
    all
}

/// Milliseconds of writes that are asked for at one member, one after another.
async fn writes(host: &Host) -> Vec<f64> {
    let mut times = Vec::new();
    for _ in 0..WRITES {
        let asked = Instant::now();
        host.submit(GroupId::META, put(), LIMIT).await.unwrap();
        times.push(asked.elapsed().as_secs_f64() * 1e3);
    }
    times.sort_by(f64::total_cmp);
    times
}

/// For each round-trip time between any two members: commits at the leader, and what happens where
/// another member is asked.
pub async fn run() {
    println!(
        "| round trip | commit where the leader is, ms p50 / p99 | p50 over the round trip (goal: 1.1 and a sync) | asked elsewhere, first writes, ms p50 | its leader there after | then, ms p50 |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    for rtt in [50, 100, 200] {
        let dir = tempfile::tempdir().unwrap();
        let hosts = formed(dir.path(), Duration::from_millis(rtt)).await;
        let group = GroupId::META;
        let led_by = hosts[0].leader(group).unwrap();
        let leader = hosts.iter().find(|host| host.replica() == led_by).unwrap();
        let near = writes(leader).await;
        let elsewhere = hosts.iter().find(|host| host.replica() != led_by).unwrap();
        let (start, mut before) = (Instant::now(), Vec::new());
        while elsewhere.leader(group) != Some(elsewhere.replica()) {
            assert!(start.elapsed() < LIMIT, "the leader stays where it is");
            let asked = Instant::now();
            elsewhere.submit(group, put(), LIMIT).await.unwrap();
            before.push(asked.elapsed().as_secs_f64() * 1e3);
        }
        let moved = start.elapsed().as_secs_f64();
        let after = writes(elsewhere).await;
        println!(
            "| {rtt} ms | {:.1} / {:.1} | {:.2} | {:.1} | {moved:.1} s, {} writes | {:.1} |",
            at(&near, 0.5),
            at(&near, 0.99),
            at(&near, 0.5) / rtt as f64,
            median(before.clone()),
            before.len(),
            at(&after, 0.5),
        );
        for host in hosts {
            host.stop().await;
        }
    }
}
