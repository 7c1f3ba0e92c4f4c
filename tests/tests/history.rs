//! Nodes are killed again and again while clients write and read, over HTTP and over the catalog's
//! own protocol. What was acknowledged is there, and one order explains every answer.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use krake_catalog_client::protocol::{Freshness, Refusal};
use krake_catalog_client::{CatalogError, CatalogPool};
use krake_consensus::simulation::{Asked, Got, Operation as Asking, linearizable};
use krake_consensus::{Command, Expect, Operation, ProposeError};
use krake_model::revision::Revision;
use krake_tests::{Site, Testnet, wait_for};
use parking_lot::Mutex;
use rand::RngExt as _;
use serde_json::{Value, json};
use tokio::sync::watch;

const SOON: Duration = Duration::from_secs(60);
const KEYS: usize = 3;
/// Of each kind.
const CLIENTS: usize = 4;
/// A client that has no answer by then goes on; what it asked for may still happen.
const PATIENCE: Duration = Duration::from_secs(4);
/// Between two operations of a client, at most, in milliseconds.
const PAUSE: u64 = 60;
/// Each kills a node, every third one two of three. So many at least: there are more where the
/// nodes have given fewer answers about a register meanwhile than [`ANSWERS`].
const ROUNDS: usize = 9;
/// A shorter history proves little.
const ANSWERS: usize = 100;
const APPS: &str = "/apis/krake.dev/v1/namespaces/default/applications";

/// What happened, and in which order.
#[derive(Default)]
struct History {
    /// Revisions of acknowledged writes of programs, by key.
    committed: Mutex<BTreeMap<String, Vec<Revision>>>,
    clock: AtomicU64,
    values: AtomicU64,
    operations: Mutex<BTreeMap<String, Vec<Asking>>>,
    over: AtomicBool,
}

impl History {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst)
    }

    /// A value that nobody else writes.
    fn value(&self) -> u64 {
        1 + self.values.fetch_add(1, Ordering::SeqCst)
    }

    /// Notes an operation; `None`: it certainly did not happen.
    async fn note(&self, key: &str, asked: Asked, work: impl Future<Output = Option<Answer>>) {
        let invoked = self.now();
        let Some(answer) = work.await else { return };
        let returned = match answer {
            Answer::Got(got) => Some((self.now(), got)),
            Answer::Unknown => None,
        };
        let operation = Asking {
            asked,
            invoked,
            returned,
        };
        let mut operations = self.operations.lock();
        operations
            .entry(key.to_owned())
            .or_default()
            .push(operation);
    }

    /// Whether there are enough answers about every register.
    fn is_long_enough(&self) -> bool {
        let operations = self.operations.lock();
        let answers = |of: &Vec<Asking>| of.iter().filter(|o| o.returned.is_some()).count();
        operations.len() == 2 * KEYS && operations.values().all(|of| answers(of) >= ANSWERS)
    }
}

enum Answer {
    Got(Got),
    Unknown,
}

async fn pause() {
    let millis = rand::rng().random_range(0..PAUSE);
    tokio::time::sleep(Duration::from_millis(millis)).await;
}

/// Registers as annotations of applications that no site takes.
struct OverHttp {
    http: reqwest::Client,
    nodes: Vec<(String, String)>,
}

impl OverHttp {
    fn new(net: &Testnet) -> Self {
        let sites = net.sites().iter();
        Self {
            http: reqwest::Client::builder()
                .timeout(PATIENCE)
                .build()
                .unwrap(),
            nodes: sites.map(|site| (site.api.clone(), site.token())).collect(),
        }
    }

    async fn ask(&self, node: usize, key: &str, patch: Option<Value>) -> Option<Answer> {
        let (api, token) = &self.nodes[node];
        let url = format!("{api}{APPS}/{key}");
        let request = match &patch {
            None => self.http.get(url),
            Some(patch) => self
                .http
                .patch(url)
                .header("content-type", "application/merge-patch+json")
                .body(patch.to_string()),
        };
        let Ok(answer) = request.bearer_auth(token).send().await else {
            return Some(Answer::Unknown);
        };
        let status = answer.status().as_u16();
        let Ok(object) = answer.json::<Value>().await else {
            return Some(Answer::Unknown);
        };
        match status {
            200 if patch.is_some() => Some(Answer::Got(Got::Done)),
            200 => {
                let value = object["metadata"]["annotations"]["value"].as_str().unwrap();
                Some(Answer::Got(Got::Value(value.parse().unwrap())))
            }
            // Refused before anything was done.
            409 | 429 => None,
            503 | 504 => Some(Answer::Unknown),
            _ => panic!("{status}: {object}"),
        }
    }

    async fn run(self: Arc<Self>, history: Arc<History>) {
        while !history.over.load(Ordering::SeqCst) {
            let (node, key, write) = {
                let mut random = rand::rng();
                let key = format!("register-{}", random.random_range(0..KEYS));
                let node = random.random_range(0..self.nodes.len());
                (node, key, random.random_bool(0.5))
            };
            let (asked, patch) = if write {
                let value = history.value();
                let patch = json!({"metadata": {"annotations": {"value": value.to_string()}}});
                (Asked::Write(value), Some(patch))
            } else {
                (Asked::Read, None)
            };
            let work = self.ask(node, &key, patch);
            history.note(&key, asked, work).await;
            pause().await;
        }
    }
}

/// Registers as records of programs, with compare-and-set.
async fn over_the_protocol(pool: CatalogPool, history: Arc<History>) {
    let mut seen: BTreeMap<String, (u64, Option<Revision>)> = BTreeMap::new();
    while !history.over.load(Ordering::SeqCst) {
        let (key, kind) = {
            let mut random = rand::rng();
            let key = format!("kv/test/register-{}", random.random_range(0..KEYS));
            (key, random.random_range(0..3))
        };
        let group = pool.group_of(&key).unwrap();
        let value = history.value();
        let (asked, expect) = match (kind, seen.get(&key)) {
            (0, _) => (Asked::Read, Expect::Any),
            (1, Some((from, revision))) => {
                let expect = revision.map_or(Expect::Absent, Expect::Revision);
                (
                    Asked::CompareAndSet {
                        from: *from,
                        to: value,
                    },
                    expect,
                )
            }
            _ => (Asked::Write(value), Expect::Any),
        };
        let known = Mutex::new(None);
        let work = async {
            if asked == Asked::Read {
                let read = pool.get(group, &key, Freshness::Linearizable, PATIENCE);
                let Ok((entry, _)) = read.await else {
                    return Some(Answer::Unknown);
                };
                let number = |bytes: &Bytes| u64::from_le_bytes(bytes[..].try_into().unwrap());
                let value = entry.as_ref().map_or(0, |entry| number(&entry.value));
                *known.lock() = Some((value, entry.map(|entry| entry.modified)));
                return Some(Answer::Got(Got::Value(value)));
            }
            let command = Command::new(vec![Operation::Put {
                key: key.clone(),
                value: Bytes::copy_from_slice(&value.to_le_bytes()),
                expect,
            }]);
            Some(match pool.write(group, &command, PATIENCE).await {
                Ok(committed) => {
                    let revision = committed.revision;
                    *known.lock() = Some((value, Some(revision)));
                    let mut all = history.committed.lock();
                    all.entry(key.clone()).or_default().push(revision);
                    Answer::Got(Got::Done)
                }
                Err(CatalogError::Refused(Refusal::Write(ProposeError::Conflict { .. }))) => {
                    Answer::Got(Got::Conflict)
                }
                Err(_) => Answer::Unknown,
            })
        };
        history.note(&key, asked, work).await;
        if let Some(known) = known.into_inner() {
            seen.insert(key, known);
        }
        pause().await;
    }
}

/// Follows a key while nodes are killed until told that it is over; the revisions it saw.
async fn follow(
    pool: CatalogPool,
    key: String,
    mut over: watch::Receiver<Option<Revision>>,
) -> Vec<Revision> {
    let group = pool.group_of(&key).unwrap();
    let mut following = pool.watch(group, &key, Some(Revision::NONE));
    let mut seen = Vec::new();
    loop {
        let last = *over.borrow_and_update();
        if last.is_some_and(|last| following.last() >= Some(last)) {
            return seen;
        }
        tokio::select! {
            event = following.next() => {
                let event = event.unwrap();
                if !event.changes.is_empty() {
                    seen.push(event.revision);
                }
            }
            _ = over.changed() => {}
        }
    }
}

fn app(name: &str) -> Value {
    json!({
        "apiVersion": "krake.dev/v1", "kind": "Application",
        "metadata": {"name": name, "namespace": "default", "annotations": {"value": "0"}},
        "spec": {"placement": {"require": ["site is nowhere"]}, "source": {"manifests": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {}},
        ]}},
    })
}

/// Kills, waits until the others have had to do without, and starts again, until there is enough to
/// look at.
fn kill_and_restart(net: &Testnet, history: &History) {
    let started = Instant::now();
    for round in 0.. {
        if round >= ROUNDS && history.is_long_enough() {
            return;
        }
        let late = round >= ROUNDS && started.elapsed() > 3 * SOON;
        assert!(!late, "too few answers");
        let sites = net.sites();
        let mut victims = vec![&sites[round % sites.len()]];
        if round % 3 == 2 {
            victims.push(&sites[(round + 1) % sites.len()]);
        }
        for victim in &victims {
            net.run(&["chaos", "kill", &victim.name, "--node-only"]);
        }
        // How long is a part of the load, not a wait for anything.
        std::thread::sleep(Duration::from_millis(300 * (round as u64 % 4)));
        for victim in &victims {
            net.run(&["chaos", "restart", &victim.name]);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_order_explains_what_clients_saw_while_nodes_were_killed() {
    let net = Arc::new(Testnet::up(&["--sites", "3"]));
    for key in 0..KEYS {
        let app = app(&format!("register-{key}"));
        wait_for("the app is accepted", SOON, || {
            net.sites()[0].apply(&app).status.success().then_some(())
        });
    }
    let history = Arc::<History>::default();
    let http = Arc::new(OverHttp::new(&net));
    let endpoints = net.sites().iter().map(Site::catalog_endpoint);
    let pool = CatalogPool::connect(endpoints.collect()).await.unwrap();
    let mut followers = BTreeMap::new();
    let (over, ended) = watch::channel(None);
    for key in 0..KEYS {
        let key = format!("kv/test/register-{key}");
        let follower = follow(pool.clone(), key.clone(), ended.clone());
        followers.insert(key, tokio::spawn(follower));
    }
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(tokio::spawn(Arc::clone(&http).run(Arc::clone(&history))));
        let client = over_the_protocol(pool.clone(), Arc::clone(&history));
        clients.push(tokio::spawn(client));
    }
    let (killed, told) = (Arc::clone(&net), Arc::clone(&history));
    let faults = move || kill_and_restart(&killed, &told);
    tokio::task::spawn_blocking(faults).await.unwrap();
    history.over.store(true, Ordering::SeqCst);
    for client in clients {
        client.await.unwrap();
    }
    // Everybody reads what is there in the end.
    for key in 0..KEYS {
        for node in 0..3 {
            let key = format!("register-{key}");
            let read = async {
                loop {
                    let answer = http.ask(node, &key, None).await;
                    if matches!(answer, Some(Answer::Got(_))) {
                        return answer;
                    }
                    pause().await;
                }
            };
            let noted = history.note(&key, Asked::Read, read);
            tokio::time::timeout(SOON, noted)
                .await
                .expect("a last read");
        }
        let key = format!("kv/test/register-{key}");
        let group = pool.group_of(&key).unwrap();
        let read = async {
            let read = pool.get(group, &key, Freshness::Linearizable, SOON).await;
            let entry = read.unwrap().0;
            let value = entry.map_or(0, |e| u64::from_le_bytes(e.value[..].try_into().unwrap()));
            Some(Answer::Got(Got::Value(value)))
        };
        history.note(&key, Asked::Read, read).await;
    }
    // A watch that moved from node to node was told every write once.
    let committed = std::mem::take(&mut *history.committed.lock());
    let newest = committed.values().flatten().max().copied();
    for key in 0..KEYS {
        // So that every watch comes to an end.
        let key = format!("kv/test/register-{key}");
        let group = pool.group_of(&key).unwrap();
        let command = Command::new(vec![Operation::Delete {
            key,
            expect: Expect::Any,
        }]);
        let last = pool.write(group, &command, SOON).await.unwrap();
        assert!(Some(last.revision) > newest);
    }
    over.send_replace(newest);
    for (key, follower) in followers {
        let seen = tokio::time::timeout(SOON, follower)
            .await
            .expect("a watch's end");
        let seen = seen.unwrap();
        assert!(seen.is_sorted_by(|a, b| a < b), "{key}: {seen:?}");
        for revision in &committed[&key] {
            assert!(seen.contains(revision), "{key}: {revision:?} was not told");
        }
    }
    let histories = std::mem::take(&mut *history.operations.lock());
    assert_eq!(histories.len(), 2 * KEYS);
    for (key, operations) in histories {
        assert!(
            linearizable(&operations),
            "the history of {key} is not linearizable: {operations:?}"
        );
    }
}
