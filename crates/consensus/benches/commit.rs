//! Commits of 1 KiB against the disk's own limit, hosts in one process on one disk.
//!
//! `cargo bench -p krake-consensus --bench commit`. The floor, one writer's `pwrite` and
//! `fdatasync` of the same bytes into a file with room, is taken before and after each line:
//! disks differ by the minute, so only ratios say something. The hosts share disk and cores, and
//! their transport is a function call: what is measured is consensus and log, not the network.
#![allow(clippy::print_stdout, reason = "the program's output")]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use krake_consensus::{Command, Expect, Host, Operation};
use krake_model::ids::GroupId;
use support::{Cluster, LIMIT, formed};

const VALUE: usize = 1024;
const TIME: Duration = Duration::from_secs(4);

/// Median milliseconds of the floor.
fn floor() -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(dir.path().join("floor")).unwrap();
    file.write_all_at(&vec![0; 16 * 1024 * 1024], 0).unwrap();
    file.sync_all().unwrap();
    let mut times = Vec::new();
    for round in 0..300 {
        let start = Instant::now();
        file.write_all_at(&[7; VALUE], round * VALUE as u64)
            .unwrap();
        file.sync_data().unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    at(&mut times, 0.5)
}

fn at(times: &mut [f64], part: f64) -> f64 {
    times.sort_by(f64::total_cmp);
    times[((times.len() - 1) as f64 * part) as usize]
}

async fn client(host: Host, group: GroupId, keys: Arc<AtomicU64>, end: Instant) -> Vec<f64> {
    let value = Bytes::from(vec![7; VALUE]);
    let mut times = Vec::new();
    while Instant::now() < end {
        let key = keys.fetch_add(1, Ordering::Relaxed) % 1000;
        let command = Command::new(vec![Operation::Put {
            key: format!("key-{key}"),
            value: value.clone(),
            expect: Expect::Any,
        }]);
        let start = Instant::now();
        host.propose(group, command, LIMIT).await.unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    times
}

async fn line(hosts: &[Host], clients: usize) {
    let before = floor();
    let group = GroupId::of_shard(0);
    let leader = hosts[0].status().borrow()[&group].leader.unwrap();
    let host = &hosts[leader as usize - 1];
    let keys = Arc::<AtomicU64>::default();
    let start = Instant::now();
    let running: Vec<_> = (0..clients)
        .map(|_| tokio::spawn(client(host.clone(), group, Arc::clone(&keys), start + TIME)))
        .collect();
    let mut times = Vec::new();
    for task in running {
        times.extend(task.await.unwrap());
    }
    let rate = times.len() as f64 / start.elapsed().as_secs_f64();
    let floor = f64::midpoint(before, floor());
    let (median, high) = (at(&mut times, 0.5), at(&mut times, 0.99));
    println!(
        "| {} | {clients} | {median:.2} / {high:.2} | {floor:.2} | {:.1} | {rate:.0} | {:.2} |",
        hosts.len(),
        median / floor,
        rate * floor / 1e3
    );
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    println!(
        "| voters | clients | ms p50 / p99 | floor ms | p50 over floor | commits/s | commits per floor |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for count in [1, 3, 5] {
        runtime.block_on(async {
            let mut cluster = Cluster::new();
            cluster.tick = Duration::from_millis(100);
            cluster.compact_entries = 1000;
            let hosts = formed(&mut cluster, count).await;
            for clients in [1, 64] {
                line(&hosts, clients).await;
            }
            for replica in 1..=count {
                cluster.kill(replica).await;
            }
        });
    }
}
