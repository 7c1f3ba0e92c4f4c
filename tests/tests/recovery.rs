//! What is lost comes back: a member's catalog from the others, the federation from a backup.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use krake_tests::{Site, Testnet, refused, succeeded, wait_for};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(60);

fn node(site: &Site, arguments: &[&str]) -> Output {
    site.node(arguments, SOON)
}

fn catalog(site: &Site) -> PathBuf {
    site.data_dir.join("catalog")
}

fn app(name: &str, colour: &str) -> Value {
    json!({
        "apiVersion": "krake.dev/v1", "kind": "Application",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"migration": {"enabled": false}, "source": {"manifests": [
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"colour": colour}},
        ]}},
    })
}

fn apply(site: &Site, app: &Value) {
    wait_for("the app is accepted", SOON, || {
        site.apply(app).status.success().then_some(())
    });
}

/// The site an app runs at, as `seen` knows.
fn runs_at(seen: &Site, name: &str) -> Option<String> {
    let app = seen.get(&["applications", name])?;
    let ready = app["status"]["phase"] == "Running"
        && app["status"]["observedGeneration"] == app["metadata"]["generation"];
    let copies = app["status"]["copies"].as_array()?;
    let active = copies.iter().find(|copy| copy["role"] == "active")?;
    ready.then(|| active["site"].as_str().unwrap().to_owned())
}

fn colour(net: &Testnet, at: &str, name: &str) -> Option<String> {
    let map = net
        .site(at)
        .cluster_get(&["configmap", name, "-n", "krake-default"])?;
    Some(map["data"]["colour"].as_str()?.to_owned())
}

/// The epoch under which a site runs an app: incarnation, term, index.
fn epoch(net: &Testnet, at: &str) -> Option<Value> {
    let maps = net
        .site(at)
        .cluster_get(&["configmaps", "-A", "-l", "krake.dev/ledger"])?;
    let map = maps["items"].as_array()?.first()?.clone();
    serde_json::from_str(map["data"]["epoch"].as_str()?).ok()
}

fn replica(net: &Testnet, site: &Site) -> Option<u64> {
    let name = &site.name;
    let node = net.sites()[1].get(&["nodes.krake.dev", name])?;
    node["spec"]["replica"].as_u64()
}

fn kill(net: &Testnet, site: &Site) {
    net.run(&["chaos", "kill", &site.name, "--node-only"]);
}

fn restart(net: &Testnet, site: &Site) {
    net.run(&["chaos", "restart", &site.name]);
}

/// Everybody has a voter again, and none of the replicas that are gone.
fn all_vote(net: &Testnet, voters: usize) {
    wait_for("every group has its voters", SOON, || {
        let status = net.sites()[0].kubectl(&["get", "--raw", "/v1/consensus"]);
        let status: Value = serde_json::from_slice(&status.stdout).ok()?;
        let groups = status["groups"].as_array()?;
        let names: Vec<&str> = net.sites().iter().map(|site| site.name.as_str()).collect();
        let known = |voter: &Value| names.contains(&voter.as_str().unwrap());
        groups
            .iter()
            .all(|group| {
                let all = group["voters"].as_array().unwrap();
                all.len() == voters && all.iter().all(known)
            })
            .then_some(())
    });
}

/// A disk that is empty: the node gets another replica id and everything else from the others.
fn catalog_that_is_gone(net: &Testnet) {
    let victim = &net.sites()[0];
    assert_eq!(replica(net, victim), Some(1));
    kill(net, victim);
    std::fs::remove_dir_all(catalog(victim)).unwrap();
    apply(&net.sites()[1], &app("shop", "green"));
    restart(net, victim);
    assert_eq!(replica(net, victim), Some(4));
    wait_for("the app is seen there", SOON, || runs_at(victim, "shop"));
    apply(victim, &app("shop", "blue"));
    all_vote(net, 3);
}

/// Damage is never repaired in silence: the operator says that the others have everything.
fn catalog_that_is_damaged(net: &Testnet) {
    let victim = &net.sites()[2];
    kill(net, victim);
    let segment = std::fs::read_dir(catalog(victim))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| {
            path.file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .starts_with("segment-")
        })
        .unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[200] ^= 1;
    std::fs::write(&segment, &bytes).unwrap();
    let way_out = "krake-node rejoin";
    refused(&node(victim, &["run"]), &["is damaged at byte", way_out]);
    let said = succeeded(&node(victim, &["rejoin"]));
    assert!(said.contains("catalog."), "{said}");
    restart(net, victim);
    assert_eq!(replica(net, victim), Some(5));
    wait_for("the app is seen there", SOON, || runs_at(victim, "shop"));
    all_vote(net, 3);
}

fn everything_is_lost(net: &Testnet, scratch: &std::path::Path) {
    let [first, second, third] = net.sites() else {
        panic!("three sites")
    };
    let file = scratch.join("all.backup");
    let file_text = file.to_str().unwrap();
    let home = wait_for("the app runs", SOON, || runs_at(second, "shop"));
    let before = wait_for("its epoch", SOON, || epoch(net, &home));
    assert_eq!(before["incarnation"], 0);
    let said = succeeded(&node(second, &["backup", file_text]));
    assert!(said.contains("17 groups"), "{said}");
    refused(&node(second, &["backup", file_text]), &["is there already"]);
    apply(second, &app("late", "red"));

    for site in net.sites() {
        kill(net, site);
    }
    // A node that does not run is read from its files, and has what came later, too.
    let newer = scratch.join("stopped.backup");
    succeeded(&node(first, &["backup", newer.to_str().unwrap()]));
    let there = "there is a catalog in";
    refused(&node(first, &["restore", file_text]), &[there]);
    for site in net.sites() {
        std::fs::remove_dir_all(catalog(site)).unwrap();
    }
    let mut bytes = std::fs::read(&file).unwrap();
    let damaged = scratch.join("damaged.backup");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&damaged, &bytes).unwrap();
    let damaged = node(first, &["restore", damaged.to_str().unwrap()]);
    refused(&damaged, &["damaged.backup"]);
    assert!(!catalog(first).exists(), "nothing is half restored");

    let said = succeeded(&node(first, &["restore", file_text]));
    assert!(
        said.contains(&second.name) && said.contains(&third.name),
        "{said}"
    );
    restart(net, first);
    restart(net, second);
    restart(net, third);
    all_vote(net, 3);
    for site in net.sites() {
        let seen = wait_for("the app runs", SOON, || runs_at(site, "shop"));
        assert_eq!(seen, home);
        assert!(site.get(&["applications", "late"]).is_none());
    }
    // The site obeys the restored catalog.
    apply(third, &app("shop", "gold"));
    wait_for("the change is at the site", SOON, || {
        (colour(net, &home, "shop")? == "gold").then_some(())
    });
    wait_for("the epoch is of the new incarnation", SOON, || {
        (epoch(net, &home)?["incarnation"].as_u64()? > 1_700_000_000).then_some(())
    });
}

#[test]
fn what_is_lost_comes_back() {
    let scratch = tempfile::tempdir().unwrap();
    let net = Testnet::up(&["--sites", "3"]);
    catalog_that_is_gone(&net);
    catalog_that_is_damaged(&net);
    everything_is_lost(&net, scratch.path());
}
