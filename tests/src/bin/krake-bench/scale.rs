//! The catalog with many watchers, with many records, and over its HTTP API.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};
use krake_catalog_client::protocol::group_of;
use krake_catalog_client::{CatalogClient, CatalogPool};
use krake_consensus::{Command, Expect, Operation};
use krake_tests::{Site, Testnet};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::measure::{at, median, resident};

const VALUE: usize = 1024;
const WATCHERS: usize = 1_000;
/// A connection has at most 64.
const WATCHES_OF_ONE: usize = 50;
const EVENTS: usize = 200;
/// Between two writes that are watched.
const PACE: Duration = Duration::from_millis(50);
const RECORDS: usize = 100_000;
const WRITERS: usize = 64;
/// Applications that are listed.
const APPS: usize = 20_000;
/// As `kubectl` reads lists.
const PAGE: usize = 500;
const PATIENCE: Duration = Duration::from_secs(60);
const HTTP_TIME: Duration = Duration::from_secs(5);

fn put(key: &str, value: Vec<u8>) -> Command {
    Command::new(vec![Operation::Put {
        key: key.to_owned(),
        value: value.into(),
        expect: Expect::Any,
    }])
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// How long after a write was asked for at one node all who watch the key at another one have it.
pub async fn watchers() {
    let net = Testnet::up(&["--sites", "3"]);
    let [writer, node, ..] = net.sites() else {
        panic!("three sites")
    };
    let key = "kv/bench/watched";
    let group = group_of(key, 16).unwrap();
    let (told, mut all) = mpsc::channel(WATCHERS);
    for _ in 0..WATCHERS / WATCHES_OF_ONE {
        let client = CatalogClient::connect(&node.catalog_endpoint())
            .await
            .unwrap();
        for _ in 0..WATCHES_OF_ONE {
            let mut watch = client.watch(group, key, None).await.unwrap();
            let told = told.clone();
            tokio::spawn(async move {
                while let Ok(event) = watch.next().await {
                    if !event.changes.is_empty() && told.send(Instant::now()).await.is_err() {
                        return;
                    }
                }
            });
        }
    }
    let writer = CatalogClient::connect(&writer.catalog_endpoint())
        .await
        .unwrap();
    let mut pace = tokio::time::interval(PACE);
    let (mut each, mut last) = (Vec::new(), Vec::new());
    for _ in 0..EVENTS {
        pace.tick().await;
        let asked = Instant::now();
        writer.write(group, put(key, vec![7; VALUE])).await.unwrap();
        let mut latest = asked;
        for _ in 0..WATCHERS {
            let at = all.recv().await.unwrap();
            each.push(at.duration_since(asked).as_secs_f64() * 1e3);
            latest = latest.max(at);
        }
        last.push(latest.duration_since(asked).as_secs_f64() * 1e3);
    }
    let (each, last) = (sorted(each), sorted(last));
    println!(
        "| {WATCHERS} watchers at one node, 1 KiB written at another: until one has it, ms p50 / p99; until all have it, ms p50 / p99 (goal: 50), n={EVENTS} | {:.1} / {:.1}; {:.1} / {:.1} |",
        at(&each, 0.5),
        at(&each, 0.99),
        at(&last, 0.5),
        at(&last, 0.99),
    );
}

/// Reading a long list and a short one in pages, in turn: what a page takes must not depend on how
/// much comes after it.
pub async fn pages() {
    let net = Testnet::up(&["--sites", "3"]);
    let http = reqwest::Client::new();
    let site = &net.sites()[1];
    let url = |namespace: &str| {
        let path = "/apis/krake.dev/v1/namespaces";
        format!("{}{path}/{namespace}/applications", site.api)
    };
    let lists = [("short", 2 * PAGE), ("long", APPS)];
    for (namespace, count) in lists {
        let (http, url) = (&http, &url(namespace));
        let write = async |writer: usize| {
            for number in (writer..count).step_by(WRITERS) {
                let mut app = app(&format!("app-{number}"), &format!("{number:0VALUE$}"));
                app["metadata"]["namespace"] = namespace.into();
                let made = http.post(url).bearer_auth(site.token()).json(&app);
                made.send().await?.error_for_status()?;
            }
            Ok::<(), reqwest::Error>(())
        };
        try_join_all((0..WRITERS).map(write)).await.unwrap();
    }
    let read = async |namespace: &str, count: usize| {
        let (mut times, mut found, mut rest) = (Vec::new(), 0, String::new());
        loop {
            let asked = Instant::now();
            let request = http.get(format!("{}?limit={PAGE}{rest}", url(namespace)));
            let request = request.bearer_auth(site.token());
            let answer = request.send().await.unwrap().error_for_status().unwrap();
            let page: Value = serde_json::from_slice(&answer.bytes().await.unwrap()).unwrap();
            times.push(asked.elapsed().as_secs_f64() * 1e3);
            found += page["items"].as_array().unwrap().len();
            let Some(token) = page["metadata"]["continue"].as_str() else {
                break;
            };
            rest = format!("&continue={token}");
        }
        assert_eq!(found, count);
        times
    };
    let (mut all, mut ratios) = (Vec::new(), Vec::new());
    for _ in 0..15 {
        let [short, long] = lists.map(|(namespace, count)| read(namespace, count));
        let (short, long) = (short.await, long.await);
        // The first page finds out of when the list is.
        ratios.push(long[1] / short[1]);
        all.extend(long);
    }
    let (all, ratio) = (sorted(all), median(ratios));
    println!(
        "| {APPS} applications of 1 KiB in 16 shards in pages of {PAGE} over HTTP: ms a page p50 / p99; the second page over that of a list of {} | {:.1} / {:.1}; {ratio:.2} |",
        2 * PAGE,
        at(&all, 0.5),
        at(&all, 0.99),
    );
}

/// How long a node that was killed takes to serve again what the others have of very much.
pub async fn restart() {
    let net = Testnet::up(&["--sites", "3"]);
    let endpoints = net.sites().iter().map(Site::catalog_endpoint);
    let pool = CatalogPool::connect(endpoints.collect()).await.unwrap();
    let start = Instant::now();
    let write = async |writer: usize| {
        for number in (writer..RECORDS).step_by(WRITERS) {
            let key = format!("kv/bench/record-{number}");
            let group = pool.group_of(&key).unwrap();
            let command = put(&key, vec![7; VALUE]);
            pool.write(group, &command, PATIENCE).await?;
        }
        Ok::<(), krake_catalog_client::CatalogError>(())
    };
    try_join_all((0..WRITERS).map(write)).await.unwrap();
    let took = start.elapsed().as_secs_f64();
    let site = &net.sites()[1];
    let memory = resident(site.pid);
    let mut times = Vec::new();
    for _ in 0..5 {
        net.run(&["chaos", "kill", &site.name, "--node-only"]);
        let start = Instant::now();
        // It comes back when the node is ready.
        net.run(&["chaos", "restart", &site.name]);
        times.push(start.elapsed().as_secs_f64());
    }
    let times = sorted(times);
    println!(
        "| {RECORDS} records of 1 KiB in 16 shards (written in {took:.0} s, {memory:.0} MiB in a node): killed node to ready again, s p50 / max (goal: 10), n={} | {:.1} / {:.1} |",
        times.len(),
        at(&times, 0.5),
        at(&times, 1.0),
    );
}

fn app(name: &str, value: &str) -> Value {
    json!({
        "apiVersion": "krake.dev/v1", "kind": "Application",
        "metadata": {"name": name, "namespace": "default", "annotations": {"value": value}},
        "spec": {"placement": {"require": ["site is nowhere"]}, "source": {"manifests": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {}},
        ]}},
    })
}

/// The HTTP API's figure beside the protocol's: 1 KiB in an application, by a merge patch.
pub async fn http() {
    let net = Arc::new(Testnet::up(&["--sites", "3"]));
    let http = reqwest::Client::new();
    let path = "/apis/krake.dev/v1/namespaces/default/applications";
    for clients in [1, 64] {
        let work = (0..clients).map(|client| {
            let (net, http) = (Arc::clone(&net), http.clone());
            tokio::spawn(async move {
                let site = &net.sites()[client % net.sites().len()];
                let (url, token) = (format!("{}{path}", site.api), site.token());
                let name = format!("bench-{clients}-{client}");
                let made = http.post(&url).bearer_auth(&token).json(&app(&name, ""));
                assert!(made.send().await.unwrap().status().is_success());
                let start = Instant::now();
                let (mut times, mut again) = (Vec::new(), 0);
                for number in 0.. {
                    let asked = Instant::now();
                    if asked.duration_since(start) > HTTP_TIME {
                        break;
                    }
                    let value = format!("{number:0VALUE$}");
                    let patch = json!({"metadata": {"annotations": {"value": value}}});
                    let request = http.patch(format!("{url}/{name}")).bearer_auth(&token);
                    let request = request.header("content-type", "application/merge-patch+json");
                    let answer = request.body(patch.to_string()).send().await.unwrap();
                    match answer.status().as_u16() {
                        200 => times.push(asked.elapsed().as_secs_f64() * 1e3),
                        409 | 429 | 503 => again += 1,
                        other => panic!("{other}"),
                    }
                    drop(answer.bytes().await);
                }
                (times, again)
            })
        });
        let (mut times, mut again) = (Vec::new(), 0);
        for done in join_all(work).await {
            let (own, refused) = done.unwrap();
            times.extend(own);
            again += refused;
        }
        let times = sorted(times);
        println!(
            "| HTTP API: merge patch with 1 KiB, {clients} clients: per second, p50 / p99 ms | {:.0}, {:.1} / {:.1}; {again} to be asked again |",
            times.len() as f64 / HTTP_TIME.as_secs_f64(),
            at(&times, 0.5),
            at(&times, 0.99),
        );
    }
}
