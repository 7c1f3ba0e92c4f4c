//! Members leave, are lost and taken out, and join again, while clients write: nothing is lost.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::BTreeSet;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use krake_catalog_client::CatalogPool;
use krake_catalog_client::protocol::Freshness;
use krake_consensus::{Command, Expect, Operation};
use krake_tests::{Site, Testnet, refused, succeeded, wait_for};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);
/// How long a client tries one thing, whoever leads meanwhile.
const PATIENCE: Duration = Duration::from_secs(20);
const WRITERS: usize = 4;
const APPS: [&str; 3] = ["shop", "blog", "wiki"];

fn node(site: &Site, arguments: &[&str]) -> Output {
    site.node(arguments, SOON)
}

fn app(name: &str) -> Value {
    json!({
        "apiVersion": "krake.dev/v1", "kind": "Application",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"failover": {"detectAfter": "5s"}, "source": {"manifests": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"colour": "green"}},
        ]}},
    })
}

/// The site an app runs at, as `seen` knows.
fn runs_at(seen: &Site, name: &str) -> Option<String> {
    let app = seen.get(&["applications", name])?;
    let copies = app["status"]["copies"].as_array()?;
    let active = copies.iter().find(|copy| copy["role"] == "active")?;
    let alone = copies.len() == 1 && active["state"] == "Ready";
    alone.then(|| active["site"].as_str().unwrap().to_owned())
}

fn is_there(site: &Site, name: &str) -> bool {
    let object = ["configmap", name, "-n", "krake-default"];
    site.cluster_get(&object).is_some()
}

/// What became of a writer's keys: the last value that was acknowledged.
async fn write(pool: CatalogPool, writer: usize, over: Arc<AtomicBool>, done: Arc<AtomicU64>) {
    let keys: Vec<String> = (0..8)
        .map(|key| format!("kv/test/{writer}-{key}"))
        .collect();
    let mut acknowledged = vec![0_u64; keys.len()];
    let mut tried = vec![0_u64; keys.len()];
    let mut turn = 0;
    let read = async |key: &String| {
        let group = pool.group_of(key).unwrap();
        let (entry, _) = pool
            .get(group, key, Freshness::Linearizable, SOON)
            .await
            .unwrap_or_else(|error| panic!("{key} cannot be read: {error}"));
        entry.map_or(0, |entry| {
            u64::from_le_bytes(entry.value[..].try_into().unwrap())
        })
    };
    while !over.load(Ordering::SeqCst) {
        let at = turn % keys.len();
        turn += 1;
        let value = tried[at] + 1;
        tried[at] = value;
        let group = pool.group_of(&keys[at]).unwrap();
        let command = Command::new(vec![Operation::Put {
            key: keys[at].clone(),
            value: Bytes::copy_from_slice(&value.to_le_bytes()),
            expect: Expect::Any,
        }]);
        if pool.write(group, &command, PATIENCE).await.is_ok() {
            acknowledged[at] = value;
            done.fetch_add(1, Ordering::SeqCst);
        }
        if turn % 5 == 0 {
            let found = read(&keys[at]).await;
            assert!(
                acknowledged[at] <= found && found <= tried[at],
                "{}: {} was acknowledged, {found} is there",
                keys[at],
                acknowledged[at]
            );
        }
    }
    for (at, key) in keys.iter().enumerate() {
        let found = read(key).await;
        assert!(
            acknowledged[at] <= found && found <= tried[at],
            "{key}: {} was acknowledged, {found} is there",
            acknowledged[at]
        );
    }
}

/// The members, as `seen` knows, when no group has a replica of anybody else.
fn members(seen: &Site) -> Option<BTreeSet<String>> {
    let peers = seen.kubectl(&["get", "--raw", "/v1/consensus/peers"]);
    let peers: Value = serde_json::from_slice(&peers.stdout).ok()?;
    let name = |peer: &Value| peer["site"].as_str().unwrap().to_owned();
    let members: BTreeSet<String> = peers["peers"].as_array()?.iter().map(name).collect();
    let groups = seen.kubectl(&["get", "--raw", "/v1/consensus"]);
    let groups: Value = serde_json::from_slice(&groups.stdout).ok()?;
    let mut replicas = groups["groups"].as_array()?.iter().flat_map(|group| {
        let lists = [&group["voters"], &group["learners"]];
        lists.into_iter().filter_map(Value::as_array).flatten()
    });
    let known = replicas.all(|replica| members.contains(replica.as_str().unwrap()));
    known.then_some(members)
}

fn wait_for_members(seen: &Site, expected: &[&Site]) {
    let expected: BTreeSet<String> = expected.iter().map(|site| site.name.clone()).collect();
    wait_for("the members are those that there are", SOON, || {
        (members(seen)? == expected).then_some(())
    });
}

/// What members and clients see of it; `net` has five sites.
fn leave_and_join(net: &Testnet, goes_on: &dyn Fn(&str)) {
    let [founder, second, third, fourth, fifth] = net.sites() else {
        panic!("five sites")
    };
    for name in APPS {
        succeeded(&fourth.apply(&app(name)));
    }
    for name in APPS {
        wait_for("the app runs", SOON, || runs_at(fourth, name));
    }
    // The founder goes first: nothing depends on it. Its operator asks nobody.
    succeeded(&node(founder, &["leave"]));
    goes_on("the founder left");
    wait_for_members(second, &[second, third, fourth, fifth]);
    refused(&node(founder, &["run"]), &["left its federation"]);
    for name in APPS {
        let at = wait_for("the app runs", SOON, || runs_at(second, name));
        assert_ne!(at, founder.name);
        assert!(is_there(net.site(&at), name) && !is_there(founder, name));
    }

    // Another one is taken out by a user of any node, in Kubernetes' way.
    let home = wait_for("the app runs", SOON, || runs_at(second, "shop"));
    let rest = [second, third, fourth, fifth];
    let seen = *rest.iter().find(|site| site.name != home).unwrap();
    succeeded(&seen.kubectl(&["delete", "sites.krake.dev", &home, "--timeout=60s"]));
    let rest: Vec<&Site> = rest.into_iter().filter(|site| site.name != home).collect();
    wait_for_members(seen, &rest);
    goes_on("a site was deleted");
    assert!(!is_there(net.site(&home), "shop"));

    // One is lost for ever: its copies cannot be confirmed, so it is kept until somebody insists.
    let home = wait_for("the app runs", SOON, || runs_at(seen, "shop"));
    let seen = *rest.iter().find(|site| site.name != home).unwrap();
    net.run(&["chaos", "kill", &home, "--node-only"]);
    let delete = ["delete", "site", home.as_str()];
    succeeded(&net.krakectl(&delete));
    wait_for("the app runs elsewhere, and that is said", SOON, || {
        let site = seen.get(&["sites.krake.dev", &home])?;
        let waits = site["status"]["leaving"].as_str()?;
        let said = waits.contains("--force") && waits.contains("default/shop");
        let app = seen.get(&["applications", "shop"])?;
        let copies = app["status"]["copies"].as_array()?;
        let moved = copies
            .iter()
            .any(|copy| copy["role"] == "active" && copy["site"] != home.as_str());
        (said && moved && site["status"]["state"] == "Lost").then_some(())
    });
    succeeded(&net.krakectl(&[&delete[..], &["--force", "--wait"]].concat()));
    let rest: Vec<&Site> = rest.into_iter().filter(|site| site.name != home).collect();
    wait_for_members(seen, &rest);
    goes_on("a lost site was taken out");
    let lost = net.site(&home);
    assert!(is_there(lost, "shop"), "nobody could remove it");
    // Its node hears of it when it comes back, and says so.
    let said = node(lost, &["run"]);
    assert!(succeeded(&said).contains("left the federation"));
    refused(&node(lost, &["run"]), &["krake-node join"]);

    // One more, and one is left, which cannot leave.
    let [last, other] = rest[..] else {
        panic!("two sites")
    };
    succeeded(&node(other, &["leave"]));
    wait_for_members(last, &[last]);
    goes_on("one is left");
    refused(&node(last, &["leave"]), &["the last site cannot leave"]);
    for name in APPS {
        let at = wait_for("the app runs", SOON, || runs_at(last, name));
        assert_eq!(at, last.name);
    }

    // Who left joins again, as somebody new, and settles what it still had.
    let mut there = vec![last];
    for site in [lost, other] {
        let token = net.krakectl(&["token", "create", "-o", "json"]);
        let token: Value = serde_json::from_slice(&token.stdout).unwrap();
        succeeded(&node(site, &["join", token["token"].as_str().unwrap()]));
        net.run(&["chaos", "restart", &site.name]);
        there.push(site);
        wait_for_members(site, &there);
        goes_on("a site joined again");
    }
    let at = wait_for("the app runs", SOON, || runs_at(lost, "shop"));
    wait_for("what it still had is gone or runs again", SOON, || {
        (is_there(lost, "shop") == (at == lost.name)).then_some(())
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn members_leave_are_lost_and_join_again_while_clients_write() {
    let net = Arc::new(Testnet::up(&["--sites", "5"]));
    let endpoints = net.sites().iter().map(Site::catalog_endpoint);
    let pool = CatalogPool::connect(endpoints.collect()).await.unwrap();
    let (over, done) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (over, done) = (Arc::clone(&over), Arc::clone(&done));
            tokio::spawn(write(pool.clone(), writer, over, done))
        })
        .collect();
    let (changed, written) = (Arc::clone(&net), Arc::clone(&done));
    let changes = tokio::task::spawn_blocking(move || {
        let goes_on = |when: &str| {
            let before = written.load(Ordering::SeqCst);
            wait_for(&format!("writes after {when}"), SOON, || {
                (written.load(Ordering::SeqCst) > before + 20).then_some(())
            });
        };
        leave_and_join(&changed, &goes_on);
    });
    let changed = changes.await;
    over.store(true, Ordering::SeqCst);
    changed.unwrap();
    for writer in writers {
        writer.await.unwrap();
    }
    assert!(done.load(Ordering::SeqCst) > 500, "too little was written");
}
