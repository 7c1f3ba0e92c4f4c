//! Watches and lists over all shards, in Kubernetes' way: they go on at any node from what another one
//! told, while nodes are killed and many write.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use krake_tests::{Testnet, wait_for};
use parking_lot::Mutex;
use rand::RngExt as _;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout, timeout_at};

const SOON: Duration = Duration::from_secs(60);
const APPS: &str = "/apis/krake.dev/v1/namespaces/default/applications";
/// Enough that every shard has some.
const NAMES: usize = 24;
const WRITERS: usize = 6;
/// A watch moves to another node after this long, unless its node is killed before.
const STAY: Duration = Duration::from_millis(700);
/// So many nodes are killed at least: there are more where fewer writes and lists were made
/// meanwhile than these.
const ROUNDS: usize = 5;
const WRITES: usize = 500;
const LISTS: usize = 10;
/// Objects in a page of a list.
const PAGE: usize = 5;

/// Asks the nodes of a testnet.
struct Nodes {
    http: reqwest::Client,
    nodes: Vec<(String, String)>,
}

impl Nodes {
    /// The code and the body of the answer, if there is one.
    async fn answer(
        &self,
        node: usize,
        request: impl Fn(&str) -> reqwest::RequestBuilder,
    ) -> Option<(u16, Value)> {
        let (api, token) = &self.nodes[node];
        let request = request(api).bearer_auth(token);
        let answer = request.timeout(Duration::from_secs(4)).send().await.ok()?;
        Some((answer.status().as_u16(), answer.json().await.ok()?))
    }

    async fn ask(
        &self,
        node: usize,
        request: impl Fn(&str) -> reqwest::RequestBuilder,
    ) -> Option<Value> {
        let (code, body) = self.answer(node, request).await?;
        (200..300).contains(&code).then_some(body)
    }
}

/// The revision of an object or a list.
fn revision(object: &Value) -> u64 {
    let text = object["metadata"]["resourceVersion"].as_str().unwrap();
    text.parse().unwrap()
}

/// Of acknowledged writes: which application, and the revision.
type Committed = Mutex<Vec<(usize, u64)>>;

async fn write(nodes: Arc<Nodes>, committed: Arc<Committed>, over: Arc<AtomicBool>) {
    let mut number = 0;
    while !over.load(Ordering::SeqCst) {
        number += 1;
        let (node, name) = {
            let mut random = rand::rng();
            let node = random.random_range(0..nodes.nodes.len());
            (node, random.random_range(0..NAMES))
        };
        let patch = json!({"metadata": {"annotations": {"value": number.to_string()}}});
        let request = |api: &str| {
            let request = nodes.http.patch(format!("{api}{APPS}/app-{name}"));
            let kind = "application/merge-patch+json";
            request.header("content-type", kind).body(patch.to_string())
        };
        if let Some(object) = nodes.ask(node, request).await {
            committed.lock().push((name, revision(&object)));
        }
    }
}

/// What a watch was told.
#[derive(Default)]
struct Told {
    /// Revisions, in the order they came.
    seen: Vec<u64>,
    /// Behind the first revision and up to the second the watch had to list instead.
    listed: Vec<(u64, u64)>,
    /// Times it went on at another node.
    moved: usize,
}

/// Watches until a revision has passed that is told in the end.
async fn watch(nodes: Arc<Nodes>, end: Arc<Mutex<Option<u64>>>) -> Told {
    let mut told = Told::default();
    let mut last = 0;
    let mut node = 0;
    let mut list = true;
    loop {
        if end.lock().is_some_and(|end| last >= end) {
            return told;
        }
        if list {
            let all = |api: &str| nodes.http.get(format!("{api}{APPS}"));
            if let Some(all) = nodes.ask(node, all).await {
                told.listed.push((last, revision(&all)));
                last = last.max(revision(&all));
                list = false;
            }
        }
        if !list {
            list = follow(&nodes, node, "", &mut last, &mut told.seen).await;
            told.moved += usize::from(!list);
        }
        node = (node + 1) % nodes.nodes.len();
    }
}

/// Follows one node from `last` on for a while; `true`: it says that this is too long ago.
async fn follow(
    nodes: &Nodes,
    node: usize,
    selector: &str,
    last: &mut u64,
    seen: &mut Vec<u64>,
) -> bool {
    let (api, token) = &nodes.nodes[node];
    let url =
        format!("{api}{APPS}?watch=true&allowWatchBookmarks=true&resourceVersion={last}{selector}");
    let until = Instant::now() + STAY;
    let opened = timeout_at(until, nodes.http.get(url).bearer_auth(token).send()).await;
    let Ok(Ok(mut answer)) = opened else {
        return false;
    };
    if answer.status().as_u16() == 410 {
        return true;
    }
    let mut text = Vec::new();
    while let Ok(Ok(Some(chunk))) = timeout_at(until, answer.chunk()).await {
        text.extend_from_slice(&chunk);
        while let Some(end) = text.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = text.drain(..=end).collect();
            let event: Value = serde_json::from_slice(&line).unwrap();
            if event["type"] == "ERROR" {
                return event["object"]["code"] == 410;
            }
            let at = revision(&event["object"]);
            if event["type"] != "BOOKMARK" {
                seen.push(at);
            }
            *last = at;
        }
    }
    false
}

/// A list that was read in pages, each at another node than the one before.
struct Paged {
    /// Of which it is.
    revision: u64,
    /// Name and revision of each object.
    objects: Vec<(String, u64)>,
}

/// Lists in pages, again and again.
async fn page(nodes: Arc<Nodes>, lists: Arc<Mutex<Vec<Paged>>>, over: Arc<AtomicBool>) {
    let mut node = 0;
    let (mut begun, mut rest): (Option<Paged>, _) = (None, String::new());
    while !over.load(Ordering::SeqCst) {
        node = (node + 1) % nodes.nodes.len();
        let url = |api: &str| nodes.http.get(format!("{api}{APPS}?limit={PAGE}{rest}"));
        let body = match nodes.answer(node, url).await {
            Some((200, body)) => body,
            // It was not there when that was written, or very much was written.
            Some((410, _)) => {
                (begun, rest) = (None, String::new());
                continue;
            }
            _ => {
                // Others need the processor meanwhile.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        let revision_of_list = revision(&body);
        let list = begun.get_or_insert_with(|| Paged {
            revision: revision_of_list,
            objects: Vec::new(),
        });
        assert_eq!(list.revision, revision_of_list);
        let items = body["items"].as_array().unwrap().iter();
        list.objects.extend(items.map(|item| {
            let name = item["metadata"]["name"].as_str().unwrap();
            (name.to_owned(), revision(item))
        }));
        match body["metadata"]["continue"].as_str() {
            Some(token) => rest = format!("&continue={token}"),
            None => {
                lists.lock().extend(begun.take());
                rest.clear();
            }
        }
    }
}

/// Each list has every object once, in order, as its last write up to the list's revision left it.
fn check_pages(lists: &[Paged], committed: &[(usize, u64)]) {
    let mut names: Vec<String> = (0..NAMES).map(|name| format!("app-{name}")).collect();
    names.sort();
    for Paged { revision, objects } in lists {
        assert!(objects.iter().map(|(name, _)| name).eq(&names));
        let objects: BTreeMap<&str, u64> = objects
            .iter()
            .map(|(name, at)| (name.as_str(), *at))
            .collect();
        assert!(objects.values().all(|at| at <= revision));
        for (name, at) in committed.iter().filter(|(_, at)| at <= revision) {
            let listed = objects[format!("app-{name}").as_str()];
            assert!(*at <= listed, "{at} is missing in a list of {revision}");
        }
    }
}

fn app(name: &str) -> Value {
    json!({
        "apiVersion": "krake.dev/v1", "kind": "Application",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"placement": {"require": ["site is nowhere"]}, "source": {"manifests": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {}},
        ]}},
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_moves_from_node_to_node_is_told_everything_once_in_order() {
    let net = Arc::new(Testnet::up(&["--sites", "3"]));
    for name in 0..NAMES {
        wait_for("the app is accepted", SOON, || {
            let applied = net.sites()[0].apply(&app(&format!("app-{name}")));
            applied.status.success().then_some(())
        });
    }
    let sites = net.sites().iter();
    let nodes = Arc::new(Nodes {
        http: reqwest::Client::new(),
        nodes: sites.map(|site| (site.api.clone(), site.token())).collect(),
    });
    let (committed, over) = (Arc::<Committed>::default(), Arc::<AtomicBool>::default());
    let end = Arc::<Mutex<Option<u64>>>::default();
    let watches: Vec<_> = (0..2)
        .map(|_| tokio::spawn(watch(Arc::clone(&nodes), Arc::clone(&end))))
        .collect();
    let lists = Arc::<Mutex<Vec<Paged>>>::default();
    let pages = page(Arc::clone(&nodes), Arc::clone(&lists), Arc::clone(&over));
    let pages = tokio::spawn(pages);
    let writers: Vec<_> = (0..WRITERS)
        .map(|_| {
            let (nodes, committed) = (Arc::clone(&nodes), Arc::clone(&committed));
            tokio::spawn(write(nodes, committed, Arc::clone(&over)))
        })
        .collect();
    let faults = Arc::clone(&net);
    let (written, listed) = (Arc::clone(&committed), Arc::clone(&lists));
    let faults = move || {
        let started = Instant::now();
        for round in 0.. {
            let enough = written.lock().len() >= WRITES && listed.lock().len() >= LISTS;
            if round >= ROUNDS && enough {
                return;
            }
            let late = round >= ROUNDS && started.elapsed() > 3 * SOON;
            assert!(!late, "too little was done");
            let victim = &faults.sites()[round % 3].name;
            // A while without a fault is a part of the load.
            std::thread::sleep(Duration::from_secs(2));
            faults.run(&["chaos", "kill", victim, "--node-only"]);
            faults.run(&["chaos", "restart", victim]);
        }
    };
    tokio::task::spawn_blocking(faults).await.unwrap();
    over.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
    pages.await.unwrap();
    let lists = std::mem::take(&mut *lists.lock());
    let committed = std::mem::take(&mut *committed.lock());
    check_pages(&lists, &committed);
    let committed: Vec<u64> = committed.into_iter().map(|(_, at)| at).collect();
    *end.lock() = committed.iter().max().copied();
    stale_reads_say_how_old_they_are(&nodes).await;
    for watch in watches {
        let told = timeout(SOON, watch).await.expect("a watch's end").unwrap();
        check(&told, &committed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_goes_on_at_a_node_that_was_started_again() {
    let net = Testnet::up(&["--sites", "1"]);
    let site = &net.sites()[0];
    for name in ["app-0", "app-1"] {
        wait_for("the app is accepted", SOON, || {
            site.apply(&app(name)).status.success().then_some(())
        });
    }
    let nodes = Nodes {
        http: reqwest::Client::new(),
        nodes: vec![(site.api.clone(), site.token())],
    };
    let listed = nodes.ask(0, |api| nodes.http.get(format!("{api}{APPS}")));
    let begun = revision(&listed.await.expect("a list"));
    let mut written = BTreeMap::<&str, Vec<u64>>::new();
    for (number, name) in ["app-0", "app-1", "app-0"]
        .into_iter()
        .cycle()
        .take(12)
        .enumerate()
    {
        let patch = json!({"metadata": {"annotations": {"value": number.to_string()}}});
        let request = |api: &str| {
            let request = nodes.http.patch(format!("{api}{APPS}/{name}"));
            let kind = "application/merge-patch+json";
            request.header("content-type", kind).body(patch.to_string())
        };
        let object = nodes.ask(0, request).await.expect("a write");
        written.entry(name).or_default().push(revision(&object));
    }
    net.run(&["chaos", "kill", &site.name, "--node-only"]);
    net.run(&["chaos", "restart", &site.name]);
    let one = "&fieldSelector=metadata.name%3Dapp-0";
    let of_all: Vec<u64> = written.values().flatten().copied().collect();
    for (selector, written) in [("", &of_all), (one, &written["app-0"])] {
        let (mut last, mut seen) = (begun, Vec::new());
        let told = async {
            while !written.iter().all(|at| seen.contains(at)) {
                let gone = follow(&nodes, 0, selector, &mut last, &mut seen).await;
                assert!(!gone, "410 for {last}");
            }
        };
        timeout(SOON, told).await.expect("all that was written");
        assert!(seen.is_sorted_by(|a, b| a < b), "{seen:?}");
    }
}

async fn stale_reads_say_how_old_they_are(nodes: &Nodes) {
    for (path, one_log) in [("", false), ("/app-0", true)] {
        for (api, token) in &nodes.nodes {
            let get = |query: &str| nodes.http.get(format!("{api}{APPS}{path}{query}"));
            let stale = get("?resourceVersion=0")
                .bearer_auth(token)
                .send()
                .await
                .unwrap();
            let header = |name: &str| Some(stale.headers().get(name)?.to_str().unwrap().to_owned());
            let age: u64 = header("krake-age-ms").unwrap().parse().unwrap();
            assert!(age < 10_000, "{age}");
            let index = header("krake-index").map(|index| index.parse::<u64>().unwrap());
            assert_eq!(index.is_some_and(|index| index > 0), one_log, "{index:?}");
            let newest = get("").bearer_auth(token).send().await.unwrap();
            assert_eq!(newest.headers().get("krake-age-ms"), None);
        }
    }
}

fn check(told: &Told, committed: &[u64]) {
    assert!(told.moved > ROUNDS, "it moved only {} times", told.moved);
    let mut places = BTreeMap::new();
    for (place, revision) in told.seen.iter().enumerate() {
        let before = places.insert(revision, place);
        assert_eq!(before, None, "{revision} was told twice");
    }
    assert!(told.seen.is_sorted(), "out of order: {:?}", told.seen);
    let listed = |revision: u64| {
        told.listed
            .iter()
            .any(|(a, b)| *a < revision && revision <= *b)
    };
    let watched = committed.iter().filter(|revision| !listed(**revision));
    let mut count = 0;
    for revision in watched {
        count += 1;
        assert!(
            places.contains_key(revision),
            "{revision} was not told; listed: {:?}",
            told.listed
        );
    }
    assert!(
        count * 2 > committed.len(),
        "it listed too often: {:?}",
        told.listed
    );
}

/// Three sites without which the meta group has a majority and some shard has none, and those shards.
fn victims(status: &Value, sites: &[String]) -> Option<(Vec<String>, Vec<String>)> {
    let groups = status["groups"].as_array()?;
    let lost = |group: &Value, victims: &[&String]| {
        let voters = group["voters"].as_array().unwrap().iter();
        let left = voters.filter(|voter| victims.iter().all(|one| *voter != one.as_str()));
        2 * left.count() <= group["voters"].as_array().unwrap().len()
    };
    for (first, a) in sites.iter().enumerate() {
        for (second, b) in sites.iter().enumerate().skip(first + 1) {
            for c in sites.iter().skip(second + 1) {
                let gone: Vec<&Value> = groups
                    .iter()
                    .filter(|group| lost(group, &[a, b, c]))
                    .collect();
                if !gone.is_empty() && gone.iter().all(|group| group["group"] != "meta") {
                    let names = gone
                        .iter()
                        .map(|group| group["group"].as_str().unwrap().to_owned());
                    return Some((vec![a.clone(), b.clone(), c.clone()], names.collect()));
                }
            }
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_over_all_shards_says_for_which_one_it_would_wait() {
    // Where the first five come up long before the others, all groups may have the same voters.
    let (net, victims, lost) = (0..3)
        .find_map(|_| {
            let net = Testnet::up(&["--sites", "7"]);
            let others = net.sites()[1..].iter().map(|site| site.name.clone());
            let status = net.sites()[0]
                .kubectl(&["get", "--raw", "/v1/consensus"])
                .stdout;
            let status: Value = serde_json::from_slice(&status).unwrap();
            let (victims, lost) = victims(&status, &others.collect::<Vec<String>>())?;
            Some((net, victims, lost))
        })
        .expect("groups with different voters");
    for name in 0..NAMES {
        wait_for("the app is accepted", SOON, || {
            let applied = net.sites()[0].apply(&app(&format!("app-{name}")));
            applied.status.success().then_some(())
        });
    }
    let nodes = Nodes {
        http: reqwest::Client::new(),
        nodes: vec![(net.sites()[0].api.clone(), net.sites()[0].token())],
    };
    let (api, token) = &nodes.nodes[0];
    let url = format!("{api}{APPS}?watch=true&resourceVersion=0");
    let open = async || {
        nodes
            .http
            .get(&url)
            .bearer_auth(token)
            .send()
            .await
            .unwrap()
    };
    let mut events = open().await;
    for victim in &victims {
        net.run(&["chaos", "kill", victim, "--node-only"]);
    }
    let mut shown = Vec::new();
    let last = timeout(SOON, async {
        let mut number = 0;
        loop {
            // In the shards that are left, so that there is something to wait with.
            number += 1;
            let patch = json!({"metadata": {"annotations": {"value": number.to_string()}}});
            let write = nodes.ask(0, |api| {
                let url = format!("{api}{APPS}/app-{}", number % NAMES);
                let kind = "application/merge-patch+json";
                let request = nodes.http.patch(url).header("content-type", kind);
                request
                    .body(patch.to_string())
                    .timeout(Duration::from_secs(1))
            });
            tokio::select! {
                _ = write => {}
                chunk = events.chunk() => match chunk.unwrap() {
                    Some(chunk) => shown.extend_from_slice(&chunk),
                    None => return String::from_utf8(shown).unwrap().lines().last().unwrap().to_owned(),
                },
            }
        }
    });
    let last: Value = serde_json::from_str(&last.await.expect("an end of the watch")).unwrap();
    assert_eq!(
        (&last["type"], &last["object"]["code"]),
        (&json!("ERROR"), &json!(503))
    );
    let message = last["object"]["message"].as_str().unwrap();
    assert!(
        lost.iter()
            .any(|shard| message.contains(&format!("{shard} "))),
        "{lost:?}: {message}"
    );
    assert_eq!(open().await.status(), 503);
    for victim in &victims {
        net.run(&["chaos", "restart", victim]);
    }
    timeout(SOON, async {
        while !open().await.status().is_success() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    })
    .await
    .expect("a watch again");
}
