//! A whole federation of real processes: started, hurt, healed, stopped, started again, and
//! nothing left behind.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use krake_testnet::client::NodeClient;
use krake_testnet::process::ProcessId;
use krake_testnet::progress::Progress;
use krake_testnet::state::Directory;
use krake_testnet::{Site, Testnet, UpOptions, is_ready};
use serde_json::Value;

const APP: &str = "/apis/krake.dev/v1/namespaces/default/applications/shop";
const SOON: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(100);

/// Waits for a state; `what` says which one did not come.
async fn until<T>(what: &str, mut state: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + SOON;
    loop {
        if let Some(found) = state().await {
            return found;
        }
        assert!(Instant::now() < end, "not within {SOON:?}: {what}");
        tokio::time::sleep(LOOK).await;
    }
}

/// Where the app runs and is ready, as this node sees it.
async fn ready_at(client: &NodeClient) -> Option<String> {
    let app = client.get(APP).await.ok().filter(is_ready)?;
    let copies = app["status"]["copies"].as_array()?;
    let active = copies.iter().find(|copy| copy["role"] == "active")?;
    (active["state"] == "Ready").then(|| active["site"].as_str().unwrap().to_owned())
}

async fn state_of(client: &NodeClient, site: &str) -> Option<String> {
    let path = format!("/apis/krake.dev/v1/sites/{site}");
    let site = client.get(&path).await.ok()?;
    Some(site["status"]["state"].as_str()?.to_owned())
}

/// Asks with a kubeconfig, as kubectl would.
async fn ask(kubeconfig: &Path, path: &str) -> Value {
    let file = kube::config::Kubeconfig::read_from(kubeconfig).unwrap();
    let options = kube::config::KubeConfigOptions::default();
    let config = kube::Config::from_custom_kubeconfig(file, &options)
        .await
        .unwrap();
    let client = kube::Client::try_from(config).unwrap();
    let request = http::Request::get(path).body(Vec::new()).unwrap();
    client.request(request).await.unwrap()
}

async fn deployments_at(site: &Site) -> usize {
    let path = "/apis/apps/v1/namespaces/krake-default/deployments";
    let list = ask(&site.kubeconfig, path).await;
    list["items"].as_array().unwrap().len()
}

/// Processes that were started for the testnet in this directory and still run.
fn left_behind(directory: &Path) -> Vec<String> {
    let place = directory.display().to_string();
    let own = std::process::id();
    let mut left = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let arguments = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        let alive = ProcessId::of(pid).is_some_and(ProcessId::is_alive);
        if pid != own && alive && arguments.contains(&place) {
            left.push(format!("{pid} {arguments}"));
        }
    }
    left
}

/// Both are seen by the others, and end.
async fn partition_and_pause(testnet: &Testnet, dresden: &NodeClient) {
    // A partition is seen, survives a restart of a node, and ends.
    let one = ["paris".to_owned()];
    testnet
        .partition(&one, &["dresden".to_owned(), "stockholm".to_owned()])
        .await
        .unwrap();
    until("paris is lost to dresden", async || {
        state_of(dresden, "paris")
            .await
            .filter(|state| state == "Lost")
    })
    .await;
    testnet.kill("paris", true).await.unwrap();
    assert!(
        !testnet.restart("paris").await.unwrap(),
        "a minority of one cannot be ready"
    );
    assert_eq!(state_of(dresden, "paris").await.as_deref(), Some("Lost"));
    testnet.heal().await.unwrap();
    until("paris is back", async || {
        state_of(dresden, "paris")
            .await
            .filter(|state| state == "Alive")
    })
    .await;

    // A pause is seen, too.
    testnet.pause("paris").await.unwrap();
    until("paris is lost again", async || {
        state_of(dresden, "paris")
            .await
            .filter(|state| state == "Lost")
    })
    .await;
    testnet.resume("paris").await.unwrap();
    until("paris goes on", async || {
        state_of(dresden, "paris")
            .await
            .filter(|state| state == "Alive")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_federation_lives_through_faults_and_leaves_nothing_behind() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("net");
    let mut options = UpOptions::new(&dir).sites(3).unwrap();
    options.demo = true;
    options
        .settings
        .insert("defaults.detect_after".to_owned(), "5s".to_owned());
    let testnet = Testnet::up(options).await.unwrap();
    let dresden = testnet.client("dresden").unwrap();
    let paris = testnet.client("paris").unwrap();
    let stockholm = testnet.site("stockholm").unwrap();

    // The demo app is where carbon is lowest, and both kubeconfigs show it.
    assert_eq!(ready_at(&dresden).await.as_deref(), Some("stockholm"));
    assert_eq!(deployments_at(&stockholm).await, 1);
    let seen = ask(&testnet.site("paris").unwrap().api_kubeconfig, APP).await;
    assert_eq!(seen["metadata"]["name"], "shop");

    // The directory is taken.
    let error = Testnet::up(UpOptions::new(&dir))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("is running in"), "{error}");
    assert!(
        testnet
            .kill("oslo", false)
            .await
            .unwrap_err()
            .to_string()
            .contains("There are")
    );

    // A killed site's app runs elsewhere; when the site is back, its stale copy goes.
    testnet.kill("stockholm", false).await.unwrap();
    let processes = stockholm.kube_pids.iter().chain([&stockholm.pid]);
    for pid in processes {
        assert!(
            !ProcessId::of(*pid).is_some_and(ProcessId::is_alive),
            "{pid} lives"
        );
    }
    until("the app runs at paris", async || {
        ready_at(&dresden).await.filter(|site| site == "paris")
    })
    .await;
    assert!(testnet.unexpected_deaths().unwrap().is_empty());
    assert!(testnet.restart("stockholm").await.unwrap());
    let again = testnet.site("stockholm").unwrap();
    assert_ne!(again.pid, stockholm.pid);
    until("the stale copy is gone", async || {
        (deployments_at(&again).await == 0).then_some(())
    })
    .await;

    partition_and_pause(&testnet, &dresden).await;

    // A metric moves the app, whatever site it is at.
    let at = until("the app is ready", async || ready_at(&dresden).await).await;
    testnet.metric(&at, "carbon", 990.0).await.unwrap();
    testnet.metric(&at, "price", 0.49).await.unwrap();
    let to = until("the app moves", async || {
        ready_at(&dresden).await.filter(|site| *site != at)
    })
    .await;

    // Stopped, nothing runs; started again, everything is as it was.
    testnet.down().await.unwrap();
    assert_eq!(left_behind(&dir), Vec::<String>::new());
    let testnet = Testnet::up(UpOptions::new(&dir)).await.unwrap();
    assert_eq!(testnet.sites().unwrap().len(), 3);
    until("the app is where it was", async || {
        ready_at(&paris).await.filter(|site| *site == to)
    })
    .await;
    drop(testnet);
    assert_eq!(left_behind(&dir), Vec::<String>::new());
}

/// Beyond twenty members nodes speak less often and most replicas only follow; who joined first
/// knew few of the others.
#[tokio::test(flavor = "multi_thread")]
async fn many_sites_on_one_machine_form_a_federation() {
    const SITES: usize = 24;
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("net");
    let mut options = UpOptions::new(&dir).sites(SITES).unwrap();
    options.shards = Some(4);
    options.demo = true;
    let testnet = Testnet::up(options).await.unwrap();
    let sites = testnet.sites().unwrap();
    assert_eq!(sites.len(), SITES);
    let last = testnet.client(&sites[SITES - 1].name).unwrap();
    let at = until("the last one sees the app", async || ready_at(&last).await).await;

    // One that only follows is as good as any: it writes and reads, also after a restart.
    let follower = sites.iter().rev().find(|site| site.name != at).unwrap();
    testnet.kill(&follower.name, true).await.unwrap();
    assert!(testnet.restart(&follower.name).await.unwrap());
    let client = testnet.client(&follower.name).unwrap();
    until("it has caught up", async || {
        ready_at(&client).await.filter(|site| *site == at)
    })
    .await;
    testnet.down().await.unwrap();
    assert_eq!(left_behind(&dir), Vec::<String>::new());
}

fn program(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_krake-testnet"));
    command
        .arg("--dir")
        .arg(dir)
        .args(arguments)
        .stdin(Stdio::null());
    command
}

fn run(dir: &Path, arguments: &[&str]) -> Output {
    program(dir, arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Builds what a testnet is made of, so that no wait below is for a compiler.
fn build_programs() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let progress = Progress::default();
    let programs = krake_testnet::programs::ensure_programs(&progress);
    runtime.block_on(programs).unwrap();
}

/// Stops the testnet also when an assertion fails.
struct Down<'a>(&'a Path);

impl Drop for Down<'_> {
    fn drop(&mut self) {
        let _ = run(self.0, &["down"]);
    }
}

#[test]
fn the_program_says_one_json_object_and_cleans_up() {
    build_programs();
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path().join("net");
    let _down = Down(&dir);
    let missing = run(&dir, &["status"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).contains("there is no testnet in"));

    let up = run(
        &dir,
        &[
            "up", "--sites", "1", "--shards", "2", "--detach", "-o", "json",
        ],
    );
    assert!(up.status.success(), "{}", text(&up.stderr));
    let answer: Value = serde_json::from_slice(&up.stdout).unwrap();
    assert_eq!(answer["dir"], dir.display().to_string());
    let site = &answer["sites"][0];
    assert_eq!(site["name"], "dresden");
    for file in [
        "token_file",
        "api_kubeconfig",
        "kubeconfig",
        "data_dir",
        "log",
    ] {
        let path = Path::new(site[file].as_str().unwrap());
        assert!(path.exists(), "{file}: {}", path.display());
    }
    let pid = u32::try_from(site["pid"].as_u64().unwrap()).unwrap();
    assert!(ProcessId::of(pid).is_some_and(ProcessId::is_alive));
    assert!(!site["kube_pids"].as_array().unwrap().is_empty());

    // krakectl works with the context as it was written.
    let directory = Directory::new(&dir).unwrap();
    let krakectl = Path::new(env!("CARGO_BIN_EXE_krake-testnet")).with_file_name("krakectl");
    let sites = Command::new(krakectl)
        .arg("--config")
        .arg(directory.contexts())
        .args(["get", "sites", "-o", "json"])
        .output()
        .unwrap();
    assert!(
        text(&sites.stdout).contains("dresden"),
        "{}",
        text(&sites.stderr)
    );

    let bad = run(&dir, &["chaos", "metric", "dresdn", "carbon=1"]);
    assert_eq!(bad.status.code(), Some(1));
    assert!(
        text(&bad.stderr).contains("did you mean `dresden`?"),
        "{}",
        text(&bad.stderr)
    );
    let usage = run(&dir, &["chaos", "metric", "dresden", "carbon=lots"]);
    assert_eq!(usage.status.code(), Some(2));
    let logs = run(&dir, &["logs", "dresden"]);
    assert!(text(&logs.stdout).contains("the node runs"));

    let down = run(&dir, &["down", "--purge"]);
    assert!(down.status.success(), "{}", text(&down.stderr));
    assert_eq!(left_behind(&dir), Vec::<String>::new());
    assert!(!dir.exists());
}

#[test]
fn an_interrupt_stops_everything_at_any_time() {
    build_programs();
    let scratch = tempfile::tempdir().unwrap();
    for (name, ready) in [("early", false), ("late", true), ("down", true)] {
        let dir = scratch.path().join(name);
        let _down = Down(&dir);
        let log = scratch.path().join(format!("{name}.log"));
        let mut up = program(&dir, &["up", "--sites", "1", "--shards", "2"])
            .stdout(std::fs::File::create(&log).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let end = Instant::now() + SOON;
        let reached = || {
            if ready {
                std::fs::read_to_string(&log)
                    .unwrap()
                    .contains("Ctrl-C stops")
            } else {
                !left_behind(&dir.join("sites")).is_empty()
            }
        };
        while !reached() {
            assert!(Instant::now() < end, "{name}: not started");
            std::thread::sleep(LOOK);
        }
        if name == "down" {
            let down = run(&dir, &["down"]);
            let told = text(&down.stdout);
            assert!(told.starts_with("stopped 2 processes of "), "{told}");
        } else {
            let holder = ProcessId::of(up.id()).unwrap();
            assert!(holder.signal(nix::sys::signal::Signal::SIGINT));
        }
        let status = up.wait().unwrap();
        assert_eq!(status.code(), Some(if ready { 0 } else { 130 }), "{name}");
        assert_eq!(left_behind(&dir), Vec::<String>::new(), "{name}");
    }
}
