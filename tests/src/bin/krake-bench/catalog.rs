//! The catalog against etcd: three nodes each on loopback, in turn, the same clients, the same
//! values, the disk's own limit before and after each turn (`reference/performance.md` 4.4, 9).

use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::try_join_all;
use krake_catalog_client::protocol::{Freshness, group_of};
use krake_catalog_client::{CatalogClient, CatalogError, Endpoint};
use krake_consensus::{Command, Expect, Operation};
use krake_tests::Testnet;
use serde_json::Value;

use super::etcd::Etcd;

const SITES: usize = 3;
const VALUE: usize = 1024;
const ROUNDS: usize = 5;
const WARM_UP: Duration = Duration::from_secs(1);
const TIME: Duration = Duration::from_secs(3);
/// A turn whose floor moved by more than this factor says nothing.
const FLOOR_MOVED: f64 = 2.0;
/// Each client writes its own keys, one after the other.
const KEYS: usize = 16;

/// What a turn does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    Put,
    Get,
}

/// What one turn showed.
#[derive(Debug, Clone)]
struct Turn {
    /// Operations per second.
    rate: f64,
    p50: f64,
    p99: f64,
    /// `fdatasync` calls of all members for each operation.
    syncs: f64,
    /// Processor seconds of all members for 10,000 operations.
    processor: f64,
}

fn at(times: &[f64], part: f64) -> f64 {
    times[((times.len() - 1) as f64 * part).round() as usize]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    at(&values, 0.5)
}

/// The value of a metric without labels in the text that Prometheus reads.
pub fn metric(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().parse().unwrap()
}

/// Median milliseconds of one writer's `pwrite` and `fdatasync` of a value.
fn floor() -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(dir.path().join("floor")).unwrap();
    file.write_all_at(&vec![0; 1024 * 1024], 0).unwrap();
    file.sync_all().unwrap();
    let times = (0..300_u64).map(|round| {
        let start = Instant::now();
        let offset = round * VALUE as u64;
        file.write_all_at(&[7; VALUE], offset).unwrap();
        file.sync_data().unwrap();
        start.elapsed().as_secs_f64() * 1e3
    });
    median(times.collect())
}

/// Processor seconds of these processes so far (`proc(5)`; a tick is 10 ms).
fn processor(pids: &[u32]) -> f64 {
    pids.iter()
        .map(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let (_, rest) = stat.rsplit_once(')').unwrap();
            let fields: Vec<&str> = rest.split_whitespace().collect();
            (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
        })
        .sum()
}

fn turn(times: Vec<Vec<f64>>, syncs: f64, processor: f64) -> Turn {
    let mut times: Vec<f64> = times.into_iter().flatten().collect();
    times.sort_by(f64::total_cmp);
    let count = times.len() as f64;
    Turn {
        rate: count / TIME.as_secs_f64(),
        p50: at(&times, 0.5),
        p99: at(&times, 0.99),
        syncs: syncs / count,
        processor: processor / count * 1e4,
    }
}

/// Which member a client asks: all in turn, and the leader where there is only one client.
fn member(client: usize, clients: usize, leader: usize) -> usize {
    if clients == 1 { leader } else { client % SITES }
}

struct Krake {
    net: Testnet,
    http: reqwest::Client,
}

impl Krake {
    fn endpoint(&self, site: usize) -> Endpoint {
        let site = &self.net.sites()[site];
        Endpoint::Tcp {
            address: site.api.trim_start_matches("http://").to_owned(),
            token: site.token(),
        }
    }

    async fn client(&self, site: usize) -> CatalogClient {
        CatalogClient::connect(&self.endpoint(site)).await.unwrap()
    }

    async fn text(&self, site: usize, path: &str) -> String {
        let site = &self.net.sites()[site];
        let request = self.http.get(format!("{}{path}", site.api));
        let answer = request.bearer_auth(site.token()).send().await.unwrap();
        answer.text().await.unwrap()
    }

    async fn syncs(&self) -> f64 {
        let mut sum = 0.0;
        for site in 0..SITES {
            let text = self.text(site, "/metrics").await;
            sum += metric(&text, "krake_consensus_writes_total");
        }
        sum
    }

    fn pids(&self) -> Vec<u32> {
        self.net.sites().iter().map(|site| site.pid).collect()
    }

    /// The site that leads the group of this key.
    async fn leader(&self, key: &str) -> usize {
        let group = group_of(key, 16).unwrap().to_string();
        let status: Value = serde_json::from_str(&self.text(0, "/v1/status").await).unwrap();
        let groups = status["groups"].as_array().unwrap();
        let group = groups.iter().find(|known| known["group"] == group.as_str());
        let leader = group.unwrap()["leader"].as_str().unwrap();
        let sites = self.net.sites();
        sites.iter().position(|site| site.name == leader).unwrap()
    }

    async fn turn(&self, work: Work, clients: usize) -> Turn {
        let (mut connections, keys) = (Vec::new(), keys(clients));
        for (client, keys) in keys.iter().enumerate() {
            let site = member(client, clients, self.leader(&keys[0]).await);
            connections.push(self.client(site).await);
        }
        let start = Instant::now() + WARM_UP;
        let tasks: Vec<_> = connections
            .into_iter()
            .zip(keys)
            .map(|(connection, keys)| {
                tokio::spawn(load(
                    start,
                    keys,
                    connection,
                    async move |connection, key| match work {
                        Work::Put => put(connection, key).await,
                        Work::Get => get(connection, key).await,
                    },
                ))
            })
            .collect();
        tokio::time::sleep_until(start.into()).await;
        let (syncs, spent) = (self.syncs().await, processor(&self.pids()));
        let times = try_join_all(tasks).await.unwrap();
        let syncs = self.syncs().await - syncs;
        turn(times, syncs, processor(&self.pids()) - spent)
    }
}

async fn put(client: &mut CatalogClient, key: &str) {
    let command = Command::new(vec![Operation::Put {
        key: key.to_owned(),
        value: value(),
        expect: Expect::Any,
    }]);
    let group = client.group_of(key).unwrap();
    loop {
        match client.write(group, command.clone()).await {
            Ok(_) => return,
            // Told to come back; anything else ends the benchmark.
            Err(CatalogError::Refused(refusal)) if refusal.to_string().contains("again") => {}
            Err(error) => panic!("{error}"),
        }
    }
}

async fn get(client: &mut CatalogClient, key: &str) {
    let group = client.group_of(key).unwrap();
    let read = client.get(group, key, Freshness::Linearizable).await;
    assert!(read.unwrap().0.is_some());
}

fn value() -> Bytes {
    static VALUES: [u8; VALUE] = [7; VALUE];
    Bytes::from_static(&VALUES)
}

/// The keys of each client; those of one client alone belong to one shard.
fn keys(clients: usize) -> Vec<Vec<String>> {
    if clients == 1 {
        let key = |number| format!("kv/bench/alone-{number}");
        let first = group_of(&key(0), 16);
        let keys = (0..).map(key).filter(|key| group_of(key, 16) == first);
        return vec![keys.take(KEYS).collect()];
    }
    (0..clients)
        .map(|client| {
            let keys = (0..KEYS).map(|number| format!("kv/bench/{client}-{number}"));
            keys.collect()
        })
        .collect()
}

/// One client: the next operation when the last is answered. What was asked before `start` is not
/// counted.
async fn load<C>(
    start: Instant,
    keys: Vec<String>,
    mut client: C,
    work: impl AsyncFn(&mut C, &str),
) -> Vec<f64> {
    let (end, mut times) = (start + TIME, Vec::new());
    for key in keys.iter().cycle() {
        let asked = Instant::now();
        if asked >= end {
            break;
        }
        work(&mut client, key).await;
        if asked >= start {
            times.push(asked.elapsed().as_secs_f64() * 1e3);
        }
    }
    times
}

async fn etcd_turn(etcd: &Etcd, work: Work, clients: usize) -> Turn {
    let leader = etcd.leader().await;
    let mut connections = Vec::new();
    for client in 0..clients {
        connections.push(etcd.client(member(client, clients, leader)).await);
    }
    let start = Instant::now() + WARM_UP;
    let tasks: Vec<_> = connections
        .into_iter()
        .zip(keys(clients))
        .map(|(connection, keys)| {
            tokio::spawn(load(
                start,
                keys,
                connection,
                async move |connection, key| match work {
                    Work::Put => connection.put(key, value()).await,
                    Work::Get => connection.get(key).await,
                },
            ))
        })
        .collect();
    tokio::time::sleep_until(start.into()).await;
    let (syncs, spent) = (etcd.syncs().await, processor(&etcd.pids()));
    let times = try_join_all(tasks).await.unwrap();
    let syncs = etcd.syncs().await - syncs;
    turn(times, syncs, processor(&etcd.pids()) - spent)
}

/// The medians of the turns, and how far their rates went.
fn line(name: &str, turns: &[Turn]) -> String {
    let middle = |of: fn(&Turn) -> f64| median(turns.iter().map(of).collect());
    let mut rates: Vec<f64> = turns.iter().map(|turn| turn.rate).collect();
    rates.sort_by(f64::total_cmp);
    format!(
        "{name} {:.0}/s ({:.0} to {:.0}), {:.2} / {:.2} ms, {:.2} syncs each, {:.2} s",
        middle(|turn| turn.rate),
        at(&rates, 0.0),
        at(&rates, 1.0),
        middle(|turn| turn.p50),
        middle(|turn| turn.p99),
        middle(|turn| turn.syncs),
        middle(|turn| turn.processor),
    )
}

async fn compare(krake: &Krake, etcd: &Etcd, work: Work, clients: usize) {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let (mut floors, mut discarded) = (Vec::new(), 0);
    while ours.len() < ROUNDS {
        assert!(discarded < 2 * ROUNDS, "this disk is too unsteady");
        let before = floor();
        let our = krake.turn(work, clients).await;
        let their = etcd_turn(etcd, work, clients).await;
        let after = floor();
        if before.max(after) > before.min(after) * FLOOR_MOVED {
            discarded += 1;
            continue;
        }
        floors.extend([before, after]);
        ours.push(our);
        theirs.push(their);
    }
    // Pair by pair, then the middle: what moved both moves no ratio.
    let ratio = |of: fn(&Turn) -> f64| {
        let pairs = ours.iter().zip(&theirs);
        median(pairs.map(|(our, their)| of(our) / of(their)).collect())
    };
    let what = match work {
        Work::Put => "put 1 KiB",
        Work::Get => "linearizable get",
    };
    println!(
        "| {what}, {clients} clients | {:.2} ms | {} | {} | {:.2} | {:.2} | {:.2} | {discarded} |",
        median(floors),
        line("", &ours).trim(),
        line("", &theirs).trim(),
        ratio(|turn| turn.rate),
        ratio(|turn| turn.p50),
        ratio(|turn| turn.p99),
    );
}

/// Runs all of it and prints a table.
pub async fn run() {
    let krake = Krake {
        net: Testnet::up(&["--sites", "3"]),
        http: reqwest::Client::new(),
    };
    let etcd = Etcd::start().await;
    println!(
        "etcd {}; medians of {ROUNDS} pairs; for each: rate (lowest to highest), p50 / p99, fdatasync of all members for each operation, processor seconds of all members for 10,000",
        etcd.version().await
    );
    println!(
        "| what | floor | Krake | etcd | rate, ours over theirs | p50, ours over theirs | p99, ours over theirs | discarded |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for clients in [1, 16, 64, 256] {
        compare(&krake, &etcd, Work::Put, clients).await;
    }
    for clients in [1, 64] {
        compare(&krake, &etcd, Work::Get, clients).await;
    }
}
