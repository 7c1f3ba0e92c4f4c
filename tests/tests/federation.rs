//! The main story on real Kubernetes: submit to any node, run at the best site, survive its loss.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::BTreeMap;
use std::time::Duration;

use krake_model::ids::shard_of;
use krake_tests::{Site, Testnet, kubectls, wait_for};
use serde_json::{Value, json};

const SOON: Duration = Duration::from_secs(30);
const LATER: Duration = Duration::from_secs(90);
/// What the app consists of at a site: resource and name.
const OBJECTS: [(&str, &str); 7] = [
    ("deployments.apps", "web"),
    ("statefulsets.apps", "db"),
    ("services", "web"),
    ("configmaps", "settings"),
    ("secrets", "password"),
    ("ingresses.networking.k8s.io", "web"),
    ("widgets.example.com", "gear"),
];

fn crd() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "widgets.example.com"},
        "spec": {
            "group": "example.com", "scope": "Namespaced",
            "names": {"plural": "widgets", "singular": "widget", "kind": "Widget"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "properties": {"spec": {"type": "object", "properties": {"teeth": {"type": "integer"}}}}}}}],
        },
    })
}

fn pods(app: &str, image: &str) -> Value {
    json!({"metadata": {"labels": {"app": app}}, "spec": {"containers": [
        {"name": app, "image": image, "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}}]}})
}

fn app(image: &str) -> Value {
    let selector = |app: &str| json!({"matchLabels": {"app": app}});
    json!({
        "apiVersion": "krake.dev/v1", "kind": "Application",
        "metadata": {"name": "shop", "namespace": "default"},
        "spec": {
            // It stays where it failed over to, so that the copy left behind can be seen to go.
            "migration": {"enabled": false},
            "failover": {"detectAfter": "5s"},
            "source": {"manifests": [
                {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"colour": "green"}},
                {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "password"}, "stringData": {"word": "example"}},
                {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}},
                {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
                    "spec": {"replicas": 2, "selector": selector("web"), "template": pods("web", image)}},
                {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "db"},
                    "spec": {"serviceName": "db", "selector": selector("db"), "template": pods("db", "postgres:17")}},
                {"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "web"}, "spec": {"rules": [{"http": {"paths": [
                    {"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "web", "port": {"number": 80}}}}]}}]}},
                {"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "gear"}, "spec": {"teeth": 12}},
            ]},
        },
    })
}

fn succeeded(output: &std::process::Output) {
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The active copy's site, when the app is ready there with its newest spec.
fn ready_at(node: &Site) -> Option<String> {
    let app = node.get(&["applications", "shop"])?;
    let status = &app["status"];
    (status["observedGeneration"] == app["metadata"]["generation"]).then_some(())?;
    let copies = status["copies"].as_array()?;
    let active = copies.iter().find(|copy| copy["role"] == "active")?;
    (active["state"] == "Ready").then(|| active["site"].as_str().unwrap().to_owned())
}

fn left_at(site: &Site) -> Vec<String> {
    OBJECTS
        .iter()
        .filter(|(resource, name)| {
            site.cluster_get(&["-n", "krake-default", resource, name])
                .is_some()
        })
        .map(|(resource, name)| format!("{resource}/{name}"))
        .collect()
}

/// How many kinds each site serves, as `node` has heard.
fn kinds_served(node: &Site) -> Option<BTreeMap<String, u64>> {
    let sites = node.get(&["sites"])?;
    let kinds = sites["items"].as_array()?.iter().map(|site| {
        let name = site["metadata"]["name"].as_str()?.to_owned();
        Some((
            name,
            site.pointer("/status/backends/default/kinds")?.as_u64()?,
        ))
    });
    kinds.collect()
}

/// A node that does not own the app.
fn stranger(net: &Testnet) -> &Site {
    let founder = &net.sites()[0];
    let shards = 16;
    let group = format!("shard-{}", shard_of("default", "shop", shards));
    let output = founder.kubectl(&["get", "--raw", "/v1/status"]);
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["federation"]["shards"], shards);
    let groups = status["groups"].as_array().unwrap();
    let owner = groups
        .iter()
        .find(|g| g["group"] == group.as_str())
        .unwrap()["leader"]
        .as_str()
        .unwrap();
    net.sites().iter().find(|site| site.name != owner).unwrap()
}

#[test]
fn an_app_runs_at_the_best_site_survives_its_loss_and_leaves_nothing_behind() {
    if !krake_testnet::kube::wanted().unwrap() {
        return;
    }
    let net = Testnet::up(&["--kube", "real", "--sites", "3"]);
    let node = stranger(&net);
    let before = kinds_served(node).unwrap();
    for site in net.sites() {
        succeeded(&site.cluster_apply(&crd()));
    }
    wait_for("every site reports the new kind", LATER, || {
        let now = kinds_served(node)?;
        let all = now
            .iter()
            .all(|(site, kinds)| before.get(site) < Some(kinds));
        all.then_some(())
    });
    succeeded(&node.apply(&app("nginx:1.28")));
    let first = wait_for("the app is ready", LATER, || ready_at(node));
    assert_eq!(first, "stockholm", "its grid is by far the cleanest");
    let home = net.site(&first);
    assert_eq!(left_at(home).len(), OBJECTS.len());
    for other in net.sites().iter().filter(|site| site.name != first) {
        assert_eq!(left_at(other), Vec::<String>::new());
    }

    for program in kubectls() {
        for arguments in [
            &["get", "applications,placements", "-o", "wide"][..],
            &["get", "apps", "shop", "-o", "jsonpath={.status.phase}"],
            &["describe", "application", "shop"],
            &["explain", "application.spec.placement"],
            &["wait", "app/shop", "--for=condition=Ready", "--timeout=10s"],
            &["label", "app", "shop", "seen=yes", "--overwrite"],
            &["annotate", "app", "shop", "seen-by=kubectl", "--overwrite"],
        ] {
            succeeded(&node.kubectl_of(program, arguments));
        }
    }

    succeeded(&node.apply(&app("nginx:1.29")));
    wait_for("the new image runs", SOON, || {
        let deployment = home.cluster_get(&["-n", "krake-default", "deployments.apps", "web"])?;
        let image = deployment.pointer("/spec/template/spec/containers/0/image")?;
        (image == "nginx:1.29" && ready_at(node).as_deref() == Some(&first)).then_some(())
    });

    net.run(&["chaos", "kill", &first]);
    let witness = net.sites().iter().find(|site| site.name != first).unwrap();
    let second = wait_for("it is ready elsewhere", LATER, || {
        ready_at(witness).filter(|site| *site != first)
    });
    let shown = witness.get(&["applications", "shop"]).unwrap();
    for copy in shown["status"]["copies"].as_array().unwrap() {
        assert!(
            copy["site"] != first.as_str() || copy["state"] == "Unknown",
            "nobody can know: {copy}"
        );
    }
    assert_eq!(left_at(net.site(&second)).len(), OBJECTS.len());

    net.run(&["chaos", "restart", &first]);
    wait_for("the stale copy is gone", LATER, || {
        // No answer is not an answer: the cluster must be there and say that nothing is.
        home.cluster_get(&["namespace", "default"])?;
        left_at(home).is_empty().then_some(())
    });
    assert_eq!(ready_at(witness).as_deref(), Some(second.as_str()));

    succeeded(&witness.kubectl(&["delete", "application", "shop", "--timeout=60s"]));
    for site in net.sites() {
        wait_for("nothing is left", SOON, || {
            let output = site.cluster(&["get", "namespace", "krake-default", "-o", "name"]);
            let gone = String::from_utf8_lossy(&output.stderr).contains("NotFound");
            gone.then_some(())
        });
        for plural in ["applications", "placements"] {
            let list = site.get(&[plural, "-A"]).unwrap();
            assert_eq!(list["items"], json!([]), "{plural} at {}", site.name);
        }
    }
}
