//! The benchmark: five sites on this machine, ratios to the same API servers in the same run.
//!
//! `cargo run --release -p krake-tests --bin krake-bench [-- SCENARIO…]`; scenarios are `latency`,
//! `burst`, `transfer`, `leader`, `failover-fast`, `failover` and `idle`, and of the catalog alone
//! `catalog` (against etcd), `groups`, `http`, `watchers`, `restart`, `pages` and `wan`; without one all run. Each prints lines of a table for `docs/benchmarks.md`.
//! `krake-bench puts [CLIENTS…] [DIRECTORY…]` shows what a change of the catalog brought: the puts of so many clients of this build and, in turn with it,
//! of others whose programs are in these directories.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the program's output"
)]
#![allow(clippy::unwrap_used, reason = "a benchmark that cannot go on stops")]

mod catalog;
mod etcd;
mod measure;
mod scale;
mod wan;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use krake_model::ids::shard_of;
use krake_tests::Testnet;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config};
use serde_json::{Value, json};

use self::measure::{median, processor, resident, spread};

const LIMIT: Duration = Duration::from_secs(180);
/// Where every app goes while nothing is wrong: the best of the testnet's profiles.
const HOME: &str = "stockholm";

/// The next write after a leader was killed comes within this time, but for one of a hundred.
const LEADER_GOAL: Duration = Duration::from_secs(2);

/// How long an idle node is looked at.
const IDLE_TIME: Duration = Duration::from_secs(30);

type Times = Arc<Mutex<BTreeMap<String, Instant>>>;

struct Bench {
    net: Testnet,
    clusters: Vec<Client>,
    nodes: Vec<Client>,
    run: u64,
}

async fn client(kubeconfig: &std::path::Path) -> Client {
    let file = Kubeconfig::read_from(kubeconfig).unwrap();
    let options = KubeConfigOptions::default();
    let config = Config::from_custom_kubeconfig(file, &options).await;
    Client::try_from(config.unwrap()).unwrap()
}

fn resource(group: &str, version: &str, kind: &str, plural: &str) -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural)
}

fn deployments() -> ApiResource {
    resource("apps", "v1", "Deployment", "deployments")
}

fn applications() -> ApiResource {
    resource("krake.dev", "v1", "Application", "applications")
}

fn deployment(name: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name},
        "spec": {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": {
            "metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "c", "image": "nginx",
                "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}}}]}}}})
}

fn application(name: &str, failover: &Value) -> Value {
    json!({"apiVersion": "krake.dev/v1", "kind": "Application",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"source": {"manifests": [deployment(name)]}, "failover": failover}})
}

/// Server-side apply; 409 and 503 say to ask again, and are.
async fn apply(client: &Client, resource: &ApiResource, object: &Value) {
    let name = object["metadata"]["name"].as_str().unwrap();
    let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), "default", resource);
    let params = PatchParams::apply("krake-bench").force();
    let start = Instant::now();
    loop {
        match api.patch(name, &params, &Patch::Apply(object)).await {
            Ok(_) => return,
            Err(kube::Error::Api(status)) if matches!(status.code, 409 | 429 | 503) => {}
            Err(error) => panic!("{name}: {error}"),
        }
        assert!(start.elapsed() < LIMIT, "{name} is not accepted");
    }
}

/// Notes when each object first satisfies `when`.
fn follow(client: Client, resource: ApiResource, when: fn(&DynamicObject) -> bool, times: Times) {
    tokio::spawn(async move {
        let api: Api<DynamicObject> = Api::all_with(client, &resource);
        loop {
            let params = WatchParams::default().timeout(290);
            let Ok(events) = api.watch(&params, "0").await else {
                // The site may be down; a loop without a pause would never let the program end.
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            let mut events = std::pin::pin!(events);
            while let Ok(Some(event)) = events.try_next().await {
                if let WatchEvent::Added(object) | WatchEvent::Modified(object) = event
                    && when(&object)
                {
                    let name = object.metadata.name.clone().unwrap();
                    times
                        .lock()
                        .unwrap()
                        .entry(name)
                        .or_insert_with(Instant::now);
                }
            }
        }
    });
}

fn is_ready(deployment: &DynamicObject) -> bool {
    let observed = deployment.data.pointer("/status/observedGeneration");
    deployment.data.pointer("/status/readyReplicas") == Some(&json!(1))
        && observed.and_then(Value::as_i64) == deployment.metadata.generation
}

fn is_running(app: &DynamicObject) -> bool {
    app.data.pointer("/status/phase") == Some(&json!("Running"))
}

async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < LIMIT, "waited too long for {what}");
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
}

impl Bench {
    async fn new() -> Self {
        let start = Instant::now();
        let net = Testnet::up(&["--kube", "real", "--sites", "5"]);
        println!(
            "| up with five sites, real Kubernetes | {:.1} s |",
            start.elapsed().as_secs_f64()
        );
        let (mut clusters, mut nodes) = (Vec::new(), Vec::new());
        for site in net.sites() {
            clusters.push(client(&site.kubeconfig).await);
            nodes.push(client(&site.api_kubeconfig).await);
        }
        Self {
            net,
            clusters,
            nodes,
            run: 0,
        }
    }

    /// The first site whose name is so.
    fn site_where(&self, is: impl Fn(&str) -> bool) -> usize {
        let found = self.net.sites().iter().position(|site| is(&site.name));
        found.unwrap()
    }

    /// The applications as a site's node shows them.
    fn apps_at(&self, site: usize) -> Api<DynamicObject> {
        Api::namespaced_with(self.nodes[site].clone(), "default", &applications())
    }

    /// A name that was not used before.
    fn name(&mut self, what: &str) -> String {
        self.run += 1;
        format!("{what}-{}", self.run)
    }

    fn follow_clusters(&self, when: fn(&DynamicObject) -> bool) -> Times {
        let times = Times::default();
        for cluster in &self.clusters {
            follow(cluster.clone(), deployments(), when, Arc::clone(&times));
        }
        times
    }

    async fn latency(&mut self, count: usize) {
        let seen = self.follow_clusters(|_| true);
        let ready = self.follow_clusters(is_ready);
        let shown = Times::default();
        follow(
            self.nodes[1].clone(),
            applications(),
            is_running,
            Arc::clone(&shown),
        );
        let home = self.site_where(|name| name == HOME);
        let (mut direct, mut submitted, mut late) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..count {
            let name = self.name("direct");
            let start = Instant::now();
            apply(&self.clusters[home], &deployments(), &deployment(&name)).await;
            direct.push(start.elapsed().as_secs_f64() * 1e3);
            // One at a time: its pods come while nothing else is measured.
            until("the pods", || ready.lock().unwrap().get(&name).copied()).await;
            let name = self.name("app");
            let start = Instant::now();
            apply(
                &self.nodes[0],
                &applications(),
                &application(&name, &json!({})),
            )
            .await;
            let at = |times: &Times| times.lock().unwrap().get(&name).copied();
            let object = until("the object", || at(&seen)).await;
            let (ready, shown) = until("the app", || at(&ready).zip(at(&shown))).await;
            submitted.push((object - start).as_secs_f64() * 1e3);
            late.push(shown.saturating_duration_since(ready).as_secs_f64() * 1e3);
        }
        let ratio = median(submitted.clone()) / median(direct.clone());
        println!(
            "| direct server-side apply, ms p50 / p95 / p99 / max, n={count} | {} |",
            spread(direct)
        );
        println!(
            "| submitted to object in the cluster, ms | {} |",
            spread(submitted)
        );
        println!("| ratio of the medians (goal: at most 5) | {ratio:.1} |");
        println!(
            "| ready in the cluster to shown ready by another node, ms (goal: p50 at most 40) | {} |",
            spread(late)
        );
    }

    /// `count` applies by 8 writers; returns their names and when they began.
    async fn write(&mut self, what: &str, count: usize) -> (Vec<String>, Instant) {
        let names: Arc<Vec<String>> = Arc::new((0..count).map(|_| self.name(what)).collect());
        let next = Arc::new(AtomicUsize::new(0));
        let start = Instant::now();
        let writers = (0..8).map(|writer| {
            let (names, next) = (Arc::clone(&names), Arc::clone(&next));
            let (clusters, nodes) = (self.clusters.clone(), self.nodes.clone());
            let direct = what == "direct";
            tokio::spawn(async move {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(name) = names.get(index) else {
                        return;
                    };
                    if direct {
                        let cluster = &clusters[index % clusters.len()];
                        apply(cluster, &deployments(), &deployment(name)).await;
                    } else {
                        let node = &nodes[writer % nodes.len()];
                        apply(node, &applications(), &application(name, &json!({}))).await;
                    }
                }
            })
        });
        futures::future::try_join_all(writers).await.unwrap();
        (names.to_vec(), start)
    }

    async fn burst(&mut self, count: usize) {
        let seen = self.follow_clusters(|_| true);
        let ready = self.follow_clusters(is_ready);
        let all = |times: &Times, names: &[String]| {
            let times = times.lock().unwrap();
            names
                .iter()
                .map(|name| times.get(name).copied())
                .max()
                .flatten()
                .filter(|_| names.iter().all(|name| times.contains_key(name)))
        };
        let before = processor_times();
        let (names, start) = self.write("direct", count).await;
        let direct = count as f64 / start.elapsed().as_secs_f64();
        let direct_times = spent(&before, count);
        until("the direct objects to be ready", || all(&ready, &names)).await;
        let before = processor_times();
        let (names, start) = self.write("burst", count).await;
        let accepted = count as f64 / start.elapsed().as_secs_f64();
        let end = until("all objects", || all(&seen, &names)).await;
        let krake = count as f64 / (end - start).as_secs_f64();
        let krake_times = spent(&before, count);
        println!("| direct applies by 8 writers to five clusters, objects/s | {direct:.1} |");
        println!(
            "| {count} apps by 8 writers: accepted/s; in the clusters/s; lost | {accepted:.1}; {krake:.1}; 0 |"
        );
        println!("| ratio (goal: at least 0.6) | {:.2} |", krake / direct);
        println!("| processor time per object meanwhile, ms, direct | {direct_times} |");
        println!("| the same, Krake | {krake_times} |");
    }

    async fn running_elsewhere(&self, names: &[String], lost: &str) -> Instant {
        let witness = self.site_where(|name| name != lost);
        let api = self.apps_at(witness);
        let start = Instant::now();
        loop {
            let list = api.list(&kube::api::ListParams::default()).await;
            let running = list.map_or(0, |list| {
                list.items
                    .iter()
                    .filter(|app| {
                        is_running(app)
                            && active(app) != lost
                            && names.contains(app.metadata.name.as_ref().unwrap())
                    })
                    .count()
            });
            if running == names.len() {
                return Instant::now();
            }
            assert!(
                start.elapsed() < LIMIT,
                "only {running} of {} run elsewhere",
                names.len()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn failover(&mut self, rounds: usize, failover: Value, label: &str) {
        let home = HOME;
        let witness = self.site_where(|name| name != home);
        let mut times = Vec::new();
        for _ in 0..rounds {
            let names: Vec<String> = (0..20).map(|_| self.name("failover")).collect();
            let api = self.apps_at(witness);
            for name in &names {
                let mut app = application(name, &failover);
                app["spec"]["placement"] = json!({"weights": {"carbon": 1.0}});
                apply(&self.nodes[witness], &applications(), &app).await;
            }
            let shown = Times::default();
            follow(
                self.nodes[witness].clone(),
                applications(),
                is_running,
                Arc::clone(&shown),
            );
            until("the apps", || {
                let shown = shown.lock().unwrap();
                names
                    .iter()
                    .all(|name| shown.contains_key(name))
                    .then_some(())
            })
            .await;
            let start = Instant::now();
            self.net.run(&["chaos", "kill", home]);
            let end = self.running_elsewhere(&names, home).await;
            times.push((end - start).as_secs_f64());
            eprintln!("{label}: {:.1} s", (end - start).as_secs_f64());
            self.net.run(&["chaos", "restart", home]);
            for name in &names {
                let _ = api.delete(name, &DeleteParams::default()).await;
            }
            for name in &names {
                until_gone(&api, name).await;
            }
        }
        println!(
            "| site killed with 20 apps to all ready elsewhere, {label}, s p50 / p95 / p99 / max, n={rounds} | {} |",
            spread(times)
        );
    }

    async fn leader(&mut self, rounds: usize) {
        let mut times = Vec::new();
        for _ in 0..rounds {
            let name = self.name("leader");
            let group = format!("shard-{}", shard_of("default", &name, 16));
            apply(
                &self.nodes[0],
                &applications(),
                &application(&name, &json!({})),
            )
            .await;
            let site = &self.net.sites()[0];
            let status = site.kubectl(&["get", "--raw", "/v1/status"]).stdout;
            let status: Value = serde_json::from_slice(&status).unwrap();
            let leader = status["groups"]
                .as_array()
                .unwrap()
                .iter()
                .find(|g| g["group"] == group.as_str())
                .unwrap()["leader"]
                .as_str()
                .unwrap()
                .to_owned();
            let other = self.site_where(|name| name != leader);
            let mut app = application(&name, &json!({}));
            app["metadata"]["labels"] = json!({"round": name});
            self.net.run(&["chaos", "kill", &leader, "--node-only"]);
            let start = Instant::now();
            apply(&self.nodes[other], &applications(), &app).await;
            let took = start.elapsed();
            if took > LEADER_GOAL {
                eprintln!(
                    "{leader} led {group}: the next write took {} ms",
                    took.as_millis()
                );
            }
            times.push(took.as_secs_f64() * 1e3);
            self.net.run(&["chaos", "restart", &leader]);
        }
        println!(
            "| shard leader killed to next write accepted, ms p50 / p95 / p99 / max (goal: p50 at most 1000, p99 at most 2000), n={rounds} | {} |",
            spread(times)
        );
    }

    /// Hands groups over that sleep and that do not, and asks how long it took.
    async fn transfer(&self, rounds: usize) {
        let http = reqwest::Client::new();
        let sites = self.net.sites();
        let base = format!("{}/v1/consensus", sites[0].api);
        let mut times = Vec::new();
        for round in 0..rounds {
            let group = format!("shard-{}", round % 16);
            let groups = http.get(&base).bearer_auth(sites[0].token());
            let groups: Value = groups.send().await.unwrap().json().await.unwrap();
            let known = groups["groups"].as_array().unwrap();
            let known = known.iter().find(|g| g["group"] == group.as_str()).unwrap();
            let voters = known["voters"].as_array().unwrap();
            let next = voters.iter().find(|voter| **voter != known["leader"]);
            let url = format!("{base}/groups/{group}/transfer");
            let request = http.post(url).bearer_auth(sites[0].token());
            let start = Instant::now();
            let answer = request.json(&json!({"to": next})).send().await.unwrap();
            assert!(answer.status().is_success(), "{:?}", answer.text().await);
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        println!(
            "| planned handover of a shard, ms p50 / p95 / p99 / max (goal: one round trip and 50), n={rounds} | {} |",
            spread(times)
        );
    }

    async fn idle(&self) {
        let sites = self.net.sites();
        let pids: Vec<u32> = sites.iter().map(|site| site.pid).collect();
        let spent = || pids.iter().map(|pid| processor(&[*pid]));
        // What is measured is a rate over a time, so a time has to pass.
        let (before, start) = (spent().collect::<Vec<f64>>(), Instant::now());
        tokio::time::sleep(IDLE_TIME).await;
        let time = start.elapsed().as_secs_f64();
        let cpu = spent()
            .zip(before)
            .map(|(now, before)| (now - before) / time * 100.0)
            .collect();
        let rss = pids.iter().map(|pid| resident(*pid));
        println!(
            "| idle node of five, % of a core p50 / p95 / p99 / max (goal: at most 1) | {} |",
            spread(cpu)
        );
        println!(
            "| idle node of five, MiB RSS (goal: at most 48) | {} |",
            spread(rss.collect())
        );
    }
}

/// Processor seconds of all processes so far, by program.
fn processor_times() -> BTreeMap<String, f64> {
    let mut times = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        if let Some((name, seconds)) = measure::process(&entry.path()) {
            *times.entry(name).or_default() += seconds;
        }
    }
    times
}

/// What each program spent since then per object, in milliseconds.
fn spent(before: &BTreeMap<String, f64>, objects: usize) -> String {
    let now = processor_times();
    let mut spent: Vec<(f64, &String)> = now
        .iter()
        .map(|(name, seconds)| {
            let seconds = seconds - before.get(name).copied().unwrap_or(0.0);
            (seconds * 1e3 / objects as f64, name)
        })
        .filter(|(time, _)| *time >= 0.1)
        .collect();
    spent.sort_by(|a, b| b.0.total_cmp(&a.0));
    let list: Vec<String> = spent
        .into_iter()
        .map(|(time, name)| format!("{name} {time:.1}"))
        .collect();
    list.join(", ")
}

fn active(app: &DynamicObject) -> &str {
    let copies = app.data.pointer("/status/copies").and_then(Value::as_array);
    let active = copies
        .into_iter()
        .flatten()
        .find(|copy| copy["role"] == "active");
    active
        .and_then(|copy| copy["site"].as_str())
        .unwrap_or_default()
}

async fn until_gone(api: &Api<DynamicObject>, name: &str) {
    let start = Instant::now();
    while !matches!(api.get_opt(name).await, Ok(None)) {
        assert!(start.elapsed() < LIMIT, "{name} does not go");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::main]
async fn main() {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if wanted.first().is_some_and(|scenario| scenario == "puts") {
        return catalog::puts(&wanted[1..]).await;
    }
    let wants = |scenario: &str| wanted.is_empty() || wanted.iter().any(|w| w == scenario);
    if wants("catalog") {
        catalog::run().await;
    }
    if wants("groups") {
        catalog::groups().await;
    }
    if wants("http") {
        scale::http().await;
    }
    if wants("watchers") {
        scale::watchers().await;
    }
    if wants("restart") {
        scale::restart().await;
    }
    if wants("pages") {
        scale::pages().await;
    }
    if wants("wan") {
        wan::run().await;
    }
    let alone = [
        "catalog", "groups", "http", "watchers", "restart", "pages", "wan",
    ];
    if !wanted.is_empty() && wanted.iter().all(|wanted| alone.contains(&wanted.as_str())) {
        return;
    }
    let mut bench = Bench::new().await;
    if wants("idle") {
        bench.idle().await;
    }
    if wants("latency") {
        bench.latency(100).await;
    }
    if wants("burst") {
        bench.burst(500).await;
    }
    if wants("transfer") {
        bench.transfer(48).await;
    }
    if wants("leader") {
        bench.leader(100).await;
    }
    if wants("failover-fast") {
        bench
            .failover(20, json!({"detectAfter": "5s"}), "detectAfter 5 s")
            .await;
    }
    if wants("failover") {
        bench.failover(20, json!({}), "default").await;
    }
}
