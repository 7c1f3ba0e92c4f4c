//! The catalog against etcd: three nodes each on loopback, in turn, the same clients, the same
//! values, the disk's own limit before and after each turn (`reference/performance.md` 4.4, 9).
//!
//! All clients of a turn share a connection to each node, as those of a Kubernetes API server share
//! one to etcd, and ask whoever leads.

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::try_join_all;
use krake_catalog_client::CatalogPool;
use krake_catalog_client::protocol::{Freshness, group_of};
use krake_consensus::{Command, Expect, Operation};
use krake_tests::{Site, Testnet};
use tokio::task::JoinHandle;

use super::etcd::{Etcd, EtcdClient, Peers};
use super::measure::{at, median, metric, processor};

const VALUE: usize = 1024;
const ROUNDS: usize = 5;
const WARM_UP: Duration = Duration::from_secs(1);
const TIME: Duration = Duration::from_secs(3);
/// A turn whose floor moved by more than this factor says nothing.
const FLOOR_MOVED: f64 = 2.0;
const PATIENCE: Duration = Duration::from_secs(20);
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

struct Krake {
    net: Testnet,
    http: reqwest::Client,
}

/// What is compared.
trait Rival {
    type Connection: Connection;

    /// One for all clients of a turn.
    async fn connect(&self) -> Self::Connection;

    /// `fdatasync` calls of all members so far.
    async fn syncs(&self) -> f64;

    fn pids(&self) -> Vec<u32>;
}

impl Rival for Krake {
    type Connection = CatalogPool;

    async fn connect(&self) -> CatalogPool {
        let endpoints = self.net.sites().iter().map(Site::catalog_endpoint);
        CatalogPool::connect(endpoints.collect()).await.unwrap()
    }

    async fn syncs(&self) -> f64 {
        let mut sum = 0.0;
        for site in self.net.sites() {
            let request = self.http.get(format!("{}/metrics", site.api));
            let answer = request.bearer_auth(site.token()).send().await.unwrap();
            let text = answer.text().await.unwrap();
            sum += metric(&text, "krake_consensus_writes_total");
        }
        sum
    }

    fn pids(&self) -> Vec<u32> {
        self.net.sites().iter().map(|site| site.pid).collect()
    }
}

impl Rival for Etcd {
    type Connection = EtcdClient;

    async fn connect(&self) -> EtcdClient {
        // Ours know who leads, too; any other member would have to pass it on.
        self.client(self.leader().await).await
    }

    async fn syncs(&self) -> f64 {
        Self::syncs(self).await
    }

    fn pids(&self) -> Vec<u32> {
        Self::pids(self)
    }
}

/// What both can do.
trait Connection: Clone + Send + 'static {
    fn put(&mut self, key: &str) -> impl Future<Output = ()> + Send;
    fn get(&mut self, key: &str) -> impl Future<Output = ()> + Send;
}

impl Connection for CatalogPool {
    async fn put(&mut self, key: &str) {
        let command = Command::new(vec![Operation::Put {
            key: key.to_owned(),
            value: value(),
            expect: Expect::Any,
        }]);
        let group = self.group_of(key).unwrap();
        self.write(group, &command, PATIENCE).await.unwrap();
    }

    async fn get(&mut self, key: &str) {
        let group = self.group_of(key).unwrap();
        let read = Self::get(self, group, key, Freshness::Linearizable, PATIENCE);
        assert!(read.await.unwrap().0.is_some());
    }
}

impl Connection for EtcdClient {
    async fn put(&mut self, key: &str) {
        Self::put(self, key, value()).await;
    }

    async fn get(&mut self, key: &str) {
        Self::get(self, key).await;
    }
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
async fn client(
    start: Instant,
    keys: Vec<String>,
    mut connection: impl Connection,
    work: Work,
) -> Vec<f64> {
    let (end, mut times) = (start + TIME, Vec::new());
    for key in keys.iter().cycle() {
        let asked = Instant::now();
        if asked >= end {
            break;
        }
        match work {
            Work::Put => connection.put(key).await,
            Work::Get => connection.get(key).await,
        }
        if asked >= start {
            times.push(asked.elapsed().as_secs_f64() * 1e3);
        }
    }
    times
}

/// So many clients at once.
async fn turn(rival: &impl Rival, work: Work, count: usize) -> Turn {
    let connection = rival.connect().await;
    let start = Instant::now() + WARM_UP;
    let clients: Vec<JoinHandle<Vec<f64>>> = keys(count)
        .into_iter()
        .map(|keys| tokio::spawn(client(start, keys, connection.clone(), work)))
        .collect();
    tokio::time::sleep_until(start.into()).await;
    let (syncs, spent) = (rival.syncs().await, processor(&rival.pids()));
    let times = try_join_all(clients).await.unwrap();
    let (syncs, spent) = (
        rival.syncs().await - syncs,
        processor(&rival.pids()) - spent,
    );
    let mut times: Vec<f64> = times.into_iter().flatten().collect();
    times.sort_by(f64::total_cmp);
    let count = times.len() as f64;
    Turn {
        rate: count / TIME.as_secs_f64(),
        p50: at(&times, 0.5),
        p99: at(&times, 0.99),
        syncs: syncs / count,
        processor: spent / count * 1e4,
    }
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

/// One pair after the other, against each way in which etcd was started.
async fn compare(krake: &Krake, rivals: &[(&str, Etcd)], work: Work, clients: usize) {
    let mut ours = Vec::new();
    let mut theirs = vec![Vec::new(); rivals.len()];
    let (mut floors, mut discarded) = (Vec::new(), 0);
    while ours.len() < ROUNDS {
        assert!(discarded < 2 * ROUNDS, "this disk is too unsteady");
        let before = floor();
        let our = turn(krake, work, clients).await;
        let mut their = Vec::new();
        for (_, etcd) in rivals {
            their.push(turn(etcd, work, clients).await);
        }
        let after = floor();
        if before.max(after) > before.min(after) * FLOOR_MOVED {
            discarded += 1;
            continue;
        }
        floors.extend([before, after]);
        ours.push(our);
        for (turns, turn) in theirs.iter_mut().zip(their) {
            turns.push(turn);
        }
    }
    let what = match work {
        Work::Put => "put 1 KiB",
        Work::Get => "linearizable get",
    };
    for ((name, _), theirs) in rivals.iter().zip(&theirs) {
        // Pair by pair, then the middle: what moved both moves no ratio.
        let ratio = |of: fn(&Turn) -> f64| {
            let pairs = ours.iter().zip(theirs);
            median(pairs.map(|(our, their)| of(our) / of(their)).collect())
        };
        println!(
            "| {what}, {clients} clients | {:.2} ms | {} | {} | {:.2} | {:.2} | {:.2} | {discarded} |",
            median(floors.clone()),
            line("", &ours).trim(),
            line(name, theirs).trim(),
            ratio(|turn| turn.rate),
            ratio(|turn| turn.p50),
            ratio(|turn| turn.p99),
        );
    }
}

/// What many groups cost that are all written to: the same clients over one shard and over a
/// thousand, in turn.
pub async fn groups() {
    let krake = |shards| Krake {
        net: Testnet::up(&["--sites", "3", "--shards", shards]),
        http: reqwest::Client::new(),
    };
    let (one, many) = (krake("1"), krake("1000"));
    let (mut few, mut most) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        few.push(turn(&one, Work::Put, 256).await);
        most.push(turn(&many, Work::Put, 256).await);
    }
    let pairs = most.iter().zip(&few);
    let ratio = median(pairs.map(|(most, few)| most.rate / few.rate).collect());
    println!(
        "| put 1 KiB, 256 clients: one shard; 1,000 shards; rate of the second over the first (goal: 0.5) | {} | {} | {ratio:.2} |",
        line("", &few).trim(),
        line("", &most).trim(),
    );
}

/// The puts of so many clients (numbers among the arguments; without one, three loads) of this
/// build, and in turn with them those of other builds (directories).
pub async fn puts(arguments: &[String]) {
    let (mut loads, mut others) = (Vec::new(), Vec::new());
    for argument in arguments {
        match argument.parse() {
            Ok(clients) => loads.push(clients),
            Err(_) => others.push(argument),
        }
    }
    if loads.is_empty() {
        loads = vec![1, 64, 256];
    }
    let krake = |net| Krake {
        net,
        http: reqwest::Client::new(),
    };
    let sites = ["--sites", "3"];
    let mut builds = vec![("this build", krake(Testnet::up(&sites)))];
    for directory in others {
        let net = Testnet::up_from(Path::new(directory), &sites);
        builds.push((directory, krake(net)));
    }
    for clients in loads {
        let mut turns = vec![Vec::new(); builds.len()];
        for _ in 0..ROUNDS {
            for (turns, (_, build)) in turns.iter_mut().zip(&builds) {
                turns.push(turn(build, Work::Put, clients).await);
            }
        }
        for (turns, (name, _)) in turns.iter().zip(&builds) {
            println!(
                "{}",
                line(&format!("| put 1 KiB, {clients} clients | {name} |"), turns)
            );
        }
    }
}

/// Runs all of it and prints a table.
pub async fn run() {
    let krake = Krake {
        net: Testnet::up(&["--sites", "3"]),
        http: reqwest::Client::new(),
    };
    let rivals = [
        ("", Etcd::start(Peers::Plain).await),
        (
            "with TLS between its members:",
            Etcd::start(Peers::Tls).await,
        ),
    ];
    println!(
        "etcd {}; medians of {ROUNDS} pairs; for each: rate (lowest to highest), p50 / p99, fdatasync of all members for each operation, processor seconds of all members for 10,000",
        rivals[0].1.version().await
    );
    println!(
        "| what | floor | Krake | etcd | rate, ours over theirs | p50, ours over theirs | p99, ours over theirs | discarded |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for clients in [1, 16, 64, 256] {
        compare(&krake, &rivals, Work::Put, clients).await;
    }
    for clients in [1, 64] {
        compare(&krake, &rivals, Work::Get, clients).await;
    }
}
