//! Stock kubectl against the embedded Kubernetes, as a process of its own.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

const WITHIN: Duration = Duration::from_secs(30);

/// An embedded cluster in a process, ended when dropped.
struct Cluster {
    dir: PathBuf,
    process: Child,
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn start(dir: &Path, listen: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_krake-testnet"))
        .arg("embedded-cluster")
        .arg(format!("--dir={}", dir.display()))
        .arg(format!("--listen={listen}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

impl Cluster {
    fn start(dir: &Path) -> Self {
        // Of an earlier process on the same directory.
        let _ = std::fs::remove_file(dir.join("kubeconfig"));
        let mut process = start(dir, "127.0.0.1:0");
        let begun = Instant::now();
        while !dir.join("kubeconfig").exists() {
            assert!(process.try_wait().unwrap().is_none(), "it ended at once");
            assert!(begun.elapsed() < WITHIN, "it does not start");
            std::thread::sleep(Duration::from_millis(10));
        }
        let dir = dir.to_owned();
        Self { dir, process }
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new("kubectl");
        command
            .arg(format!("--cache-dir={}", self.dir.join("cache").display()))
            .args(arguments.split_whitespace())
            .env("KUBECONFIG", self.dir.join("kubeconfig"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn ok(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "kubectl {arguments}: {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn refused(&self, arguments: &str, word: &str) {
        let output = self.run(arguments);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success(),
            "kubectl {arguments} is not refused"
        );
        assert!(error.contains(word), "kubectl {arguments}: {error}");
    }

    fn file(&self, name: &str, objects: &[Value]) -> String {
        let path = self.dir.join(name);
        let documents: Vec<String> = objects.iter().map(Value::to_string).collect();
        std::fs::write(&path, documents.join("\n---\n")).unwrap();
        path.display().to_string()
    }

    fn kill(mut self) -> PathBuf {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.dir.clone()
    }
}

fn deployment(image: &str, annotations: &Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": {
        "replicas": 2, "selector": {"matchLabels": {"app": "web"}},
        "template": {"metadata": {"labels": {"app": "web"}, "annotations": annotations}, "spec": {"containers": [
            {"name": "main", "image": image, "ports": [{"containerPort": 80}]}]}}}})
}

fn service() -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}})
}

#[test]
fn kubectl_applies_rolls_out_scales_and_deletes() {
    let scratch = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&scratch.path().join("dresden"));
    let first = cluster.file("first", &[deployment("x:1", &json!({})), service()]);
    assert!(
        cluster
            .ok(&format!("apply -f {first}"))
            .contains("deployment.apps/web created")
    );
    assert!(
        cluster
            .ok(&format!("apply -f {first}"))
            .contains("deployment.apps/web unchanged")
    );
    cluster.ok("wait --for=condition=Available deploy/web --timeout=30s");
    let table = cluster.ok("get deploy,pods,svc");
    for words in [
        "READY   UP-TO-DATE   AVAILABLE",
        "2/2",
        "1/1     Running   0",
        "ClusterIP   10.96.",
    ] {
        assert!(table.contains(words), "{words} is not in\n{table}");
    }
    // Client-side: a strategic merge patch. Server-side: the same object, another owner.
    let second = cluster.file("second", &[deployment("x:2", &json!({})), service()]);
    assert!(
        cluster
            .ok(&format!("apply -f {second}"))
            .contains("deployment.apps/web configured")
    );
    let done = cluster.ok("rollout status deploy/web --timeout=30s");
    assert!(done.contains("successfully rolled out"), "{done}");
    let third = cluster.file("third", &[deployment("x:3", &json!({}))]);
    cluster.refused(&format!("apply --server-side -f {third}"), "conflict");
    cluster.ok(&format!("apply --server-side --force-conflicts -f {third}"));
    cluster.ok("rollout status deploy/web --timeout=30s");
    let images = "get pods -o jsonpath={.items[*].spec.containers[*].image}";
    assert_eq!(cluster.ok(images), "x:3 x:3");
    cluster.ok(r#"patch deploy web -p {"spec":{"replicas":4}}"#);
    cluster.ok("rollout status deploy/web --timeout=30s");
    assert_eq!(cluster.ok("get pods -o name").lines().count(), 4);
    cluster.ok("rollout undo deploy/web");
    cluster.ok("rollout status deploy/web --timeout=30s");
    assert_eq!(cluster.ok(images), "x:2 x:2 x:2 x:2");
    cluster.ok("delete deploy,svc web --timeout=30s");
    cluster.ok("wait --for=delete pod -l app=web --timeout=30s");
    assert_eq!(cluster.ok("get rs,pods,endpoints -o name"), "");
}

#[test]
fn kubectl_watches() {
    let scratch = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&scratch.path().join("paris"));
    // It ends by itself, so that reading from it does too.
    let mut watch = cluster
        .command("get pods -w --output-watch-events --request-timeout=30s")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let file = cluster.file("web", &[deployment("x:1", &json!({}))]);
    cluster.ok(&format!("apply -f {file}"));
    let mut seen = Vec::new();
    for line in BufReader::new(watch.stdout.take().unwrap()).lines() {
        seen.push(line.unwrap());
        if seen.last().is_some_and(|line| line.contains("Running")) {
            break;
        }
    }
    watch.kill().unwrap();
    watch.wait().unwrap();
    let has = |words: [&str; 2]| {
        seen.iter()
            .any(|line| words.iter().all(|word| line.contains(word)))
    };
    assert!(has(["MODIFIED", "Running"]), "{seen:?}");
    assert!(has(["ADDED", ""]), "{seen:?}");
}

#[test]
fn pods_fail_or_take_long_when_told_to() {
    let scratch = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&scratch.path().join("lisbon"));
    let broken = json!({"testnet.krake.dev/fail": "CrashLoopBackOff"});
    let file = cluster.file("broken", &[deployment("x:1", &broken)]);
    cluster.ok(&format!("apply -f {file}"));
    let waiting = "wait pod -l app=web --timeout=30s --for=jsonpath={.status.containerStatuses[0].state.waiting.reason}=CrashLoopBackOff";
    cluster.ok(waiting);
    cluster.refused(
        "wait --for=condition=Available deploy/web --timeout=300ms",
        "timed out",
    );
    let slow = json!({"testnet.krake.dev/ready-after": "1s"});
    let file = cluster.file("slow", &[deployment("x:1", &slow)]);
    let begun = Instant::now();
    cluster.ok(&format!("apply -f {file}"));
    cluster.ok("rollout status deploy/web --timeout=30s");
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

#[test]
fn objects_survive_a_kill_and_pods_become_ready_anew() {
    let scratch = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&scratch.path().join("warsaw"));
    let definition = json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "gears.example.org"}, "spec": {"group": "example.org", "scope": "Namespaced",
            "names": {"plural": "gears", "kind": "Gear"}, "versions": [{"name": "v1", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": {"type": "object",
                    "properties": {"size": {"type": "integer", "minimum": 1}}}}}}}]}});
    let file = cluster.file(
        "all",
        &[deployment("x:1", &json!({})), service(), definition],
    );
    cluster.ok(&format!("apply -f {file}"));
    cluster.ok("wait --for=condition=Established crd/gears.example.org --timeout=30s");
    let gear = |size: i64| json!({"apiVersion": "example.org/v1", "kind": "Gear", "metadata": {"name": "g"}, "spec": {"size": size}});
    let good = cluster.file("gear", &[gear(3)]);
    cluster.ok(&format!("apply -f {good}"));
    let bad = cluster.file("bad", &[gear(0)]);
    cluster.refused(&format!("apply -f {bad}"), "spec.size");
    cluster.ok("rollout status deploy/web --timeout=30s");
    let uids = "get deploy,rs,pods,svc,gears -o jsonpath={.items[*].metadata.uid}";
    let before = cluster.ok(uids);
    let cluster = Cluster::start(&cluster.kill());
    assert_eq!(cluster.ok(uids), before);
    cluster.ok("wait --for=condition=Ready pod -l app=web --timeout=30s");
    let restarts = "get pods -o jsonpath={.items[*].status.containerStatuses[0].restartCount}";
    assert_eq!(cluster.ok(restarts), "1 1");
    // Its objects go with the definition.
    cluster.ok("delete crd gears.example.org --timeout=30s");
    cluster.refused("get gears", "gears");
}

#[test]
fn namespaces_end_with_all_that_is_in_them() {
    let scratch = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&scratch.path().join("oslo"));
    let lost = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "nowhere"}});
    let lost = cluster.file("lost", &[lost]);
    cluster.refused(
        &format!("apply -f {lost}"),
        "namespaces \"nowhere\" not found",
    );
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}});
    let namespace = cluster.file("namespace", &[namespace]);
    cluster.ok(&format!("apply -f {namespace}"));
    let mut held = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "held", "namespace": "shop"}});
    held["metadata"]["finalizers"] = json!(["example.org/wait"]);
    let mut web = deployment("x:1", &json!({}));
    web["metadata"]["namespace"] = "shop".into();
    let file = cluster.file("shop", &[held, web]);
    cluster.ok(&format!("apply -f {file}"));
    cluster.ok("rollout status -n shop deploy/web --timeout=30s");
    cluster.ok("delete namespace shop --wait=false");
    let late = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "late", "namespace": "shop"}});
    let late = cluster.file("late", &[late]);
    cluster.refused(&format!("apply -f {late}"), "being terminated");
    cluster.ok("wait -n shop --for=delete pod -l app=web --timeout=30s");
    assert!(cluster.ok("get namespace shop").contains("Terminating"));
    cluster.ok(r#"patch configmap held -n shop --type=merge -p {"metadata":{"finalizers":null}}"#);
    cluster.ok("wait --for=delete namespace/shop --timeout=30s");
    cluster.refused("delete namespace default", "may not be deleted");
}

#[test]
fn propagation_policies_do_what_they_say() {
    let scratch = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&scratch.path().join("rome"));
    let file = cluster.file("web", &[deployment("x:1", &json!({}))]);
    let again = || {
        cluster.ok(&format!("apply -f {file}"));
        cluster.ok("rollout status deploy/web --timeout=30s");
    };
    again();
    cluster.ok("delete deploy web --cascade=foreground --timeout=30s");
    // It was the last one to go.
    assert_eq!(cluster.ok("get rs,pods -o name"), "");
    again();
    cluster.ok("delete deploy web --cascade=orphan --timeout=30s");
    assert_eq!(cluster.ok("get rs -o name").lines().count(), 1);
    cluster.ok("delete rs --all --timeout=30s");
    cluster.ok("wait --for=delete pod -l app=web --timeout=30s");
}

#[test]
fn what_is_not_offered_is_said_and_never_a_success() {
    let scratch = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&scratch.path().join("bern"));
    let file = cluster.file("web", &[deployment("x:1", &json!({}))]);
    cluster.ok(&format!("apply -f {file}"));
    cluster.ok("rollout status deploy/web --timeout=30s");
    cluster.refused("logs deploy/web", "no subresource log");
    cluster.refused("scale deploy web --replicas=1", "no subresource scale");
    // kubectl creates namespaces in protobuf.
    cluster.refused("create namespace x", "protobuf` is not supported");
    let template = deployment("x:1", &json!({}))["spec"]["template"].take();
    let cron = json!({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "c"},
        "spec": {"schedule": "@daily", "jobTemplate": {"spec": {"template": template}}}});
    let cron = cluster.file("cron", &[cron]);
    cluster.refused(&format!("apply -f {cron}"), "no CronJobs");
    let typo = deployment("x:1", &json!({}))
        .to_string()
        .replace("replicas", "replica");
    let typo = cluster.file("typo", &[serde_json::from_str(&typo).unwrap()]);
    cluster.refused(&format!("apply -f {typo}"), "spec.replica");
    cluster.refused(
        &format!("apply --server-side --validate=false -f {typo}"),
        "spec.replica",
    );
}

#[test]
fn without_the_token_there_is_only_health() {
    let scratch = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(&scratch.path().join("kiel"));
    let kubeconfig = std::fs::read_to_string(cluster.dir.join("kubeconfig")).unwrap();
    let kubeconfig: Value = serde_json::from_str(&kubeconfig).unwrap();
    assert_eq!(kubeconfig["current-context"], "kiel");
    let mode =
        std::os::unix::fs::MetadataExt::mode(&cluster.dir.join("kubeconfig").metadata().unwrap());
    assert_eq!(mode & 0o777, 0o600);
    let token = kubeconfig["users"][0]["user"]["token"].as_str().unwrap();
    cluster.ok("get --raw /version");
    let other = cluster.dir.join("other");
    std::fs::write(&other, kubeconfig.to_string().replace(token, "wrong")).unwrap();
    let with_other = |arguments: &str| {
        let mut command = cluster.command(arguments);
        command.env("KUBECONFIG", &other).output().unwrap()
    };
    assert!(with_other("get --raw /readyz").status.success());
    let refused = with_other("get --raw /api/v1/secrets");
    assert!(!refused.status.success());
    assert!(
        String::from_utf8_lossy(&refused.stderr).contains("token"),
        "{refused:?}"
    );
}

#[test]
fn a_taken_port_a_used_directory_and_a_foreign_address_are_clear_errors() {
    let scratch = tempfile::tempdir().unwrap();
    let failed = |dir: &Path, listen: &str, word: &str| {
        let output = start(dir, listen).wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success());
        assert!(error.contains(word), "{word} is not in {error}");
    };
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    failed(&scratch.path().join("a"), &address, &address);
    let cluster = Cluster::start(&scratch.path().join("b"));
    failed(&cluster.dir, "127.0.0.1:0", "used by another");
    let file = scratch.path().join("file");
    std::fs::write(&file, "").unwrap();
    failed(&file.join("c"), "127.0.0.1:0", "cannot be made");
    failed(&scratch.path().join("d"), "0.0.0.0:0", "loopback");
}

#[test]
fn it_ends_cleanly_when_told_to() {
    let scratch = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(&scratch.path().join("e"));
    let mut watch = cluster
        .command("get pods -w")
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let id = cluster.process.id().to_string();
    assert!(Command::new("kill").arg(&id).status().unwrap().success());
    let status = cluster.process.wait().unwrap();
    assert!(status.success(), "{status}");
    let _ = watch.kill();
    watch.wait().unwrap();
}
