//! A real control plane is started, killed, and comes back with its objects.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::process::Output;
use std::time::{Duration, Instant};

use krake_testnet::kube::{Assets, Capacity, RealCluster};
use krake_testnet::progress::Progress;
use serde_json::{Value, json};

struct Kubectl<'a> {
    assets: &'a Assets,
    cluster: &'a RealCluster,
}

impl Kubectl<'_> {
    fn run(&self, arguments: &[&str]) -> Output {
        std::process::Command::new(&self.assets.kubectl)
            .arg("--kubeconfig")
            .arg(&self.cluster.kubeconfig)
            .args(arguments)
            .output()
            .unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "kubectl {arguments:?}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }
}

fn deployment() -> Value {
    let labels = json!({"app": "web"});
    json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
        "spec": {"replicas": 2, "selector": {"matchLabels": labels}, "template": {
            "metadata": {"labels": labels},
            "spec": {"containers": [{"name": "web", "image": "example.org/web:1"}]},
        }},
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_comes_back_with_its_objects_after_a_power_cut() {
    if !krake_testnet::kube::wanted().unwrap() {
        Progress::default().line("left out, because KRAKE_SKIP_REAL_KUBE=1: real_kubernetes");
        return;
    }
    let assets = krake_testnet::kube::assets(&Progress::default())
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let cluster = RealCluster::start_with(
        &assets,
        dir.path(),
        "oslo",
        &Capacity::default(),
        |_| Ok(()),
    )
    .await
    .unwrap();
    let first_start = started.elapsed();
    assert_eq!(cluster.pids.len(), 5);
    let file = dir.path().join("web.json");
    std::fs::write(&file, deployment().to_string()).unwrap();
    let kubectl = Kubectl {
        assets: &assets,
        cluster: &cluster,
    };
    assert!(kubectl.ok(&["version"]).contains("Server Version: v1.35.4"));
    kubectl.ok(&["apply", "-f", file.to_str().unwrap()]);
    kubectl.ok(&["rollout", "status", "deployment/web", "--timeout=30s"]);
    let uid = ["get", "deployment", "web", "-o", "jsonpath={.metadata.uid}"];
    let before = kubectl.ok(&uid);

    let processes = cluster.processes().to_vec();
    cluster.kill().await;
    assert!(processes.iter().all(|(_, process)| !process.is_alive()));
    let started = Instant::now();
    let mut cluster = RealCluster::start_with(
        &assets,
        dir.path(),
        "oslo",
        &Capacity::default(),
        |_| Ok(()),
    )
    .await
    .unwrap();
    let second_start = started.elapsed();
    let kubectl = Kubectl {
        assets: &assets,
        cluster: &cluster,
    };
    assert_eq!(kubectl.ok(&uid), before);
    kubectl.ok(&["scale", "deployment/web", "--replicas=3"]);
    kubectl.ok(&["rollout", "status", "deployment/web", "--timeout=30s"]);

    // A paused cluster does not answer; afterwards it works as before.
    cluster.pause();
    let silent = ["get", "nodes", "--request-timeout=1s"];
    let kubectl = Kubectl {
        assets: &assets,
        cluster: &cluster,
    };
    assert!(!kubectl.run(&silent).status.success());
    cluster.resume().await.unwrap();
    let kubectl = Kubectl {
        assets: &assets,
        cluster: &cluster,
    };
    kubectl.ok(&["scale", "deployment/web", "--replicas=1"]);
    kubectl.ok(&[
        "wait",
        "deployment/web",
        "--for=jsonpath={.status.readyReplicas}=1",
        "--timeout=30s",
    ]);

    // Dropped, nothing is left.
    let processes = cluster.processes().to_vec();
    assert_eq!(processes.len(), 5);
    drop(cluster);
    assert!(processes.iter().all(|(_, process)| !process.is_alive()));
    let limit = Duration::from_secs(60);
    assert!(
        first_start < limit && second_start < limit,
        "{first_start:?} {second_start:?}"
    );
    Progress::default().line(&format!(
        "real Kubernetes: ready in {:.1} s, again in {:.1} s",
        first_start.as_secs_f32(),
        second_start.as_secs_f32()
    ));
}
