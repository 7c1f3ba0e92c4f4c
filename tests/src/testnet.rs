//! A running testnet.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use krake_catalog_client::Endpoint;
use serde::Deserialize;
use serde_json::Value;

/// How often a state is looked at while it is waited for.
const LOOK: Duration = Duration::from_millis(50);
/// How often a program is looked at that should end at once.
const LOOK_AT_PROGRAM: Duration = Duration::from_millis(10);

/// One site, as `krake-testnet up -o json` describes it.
#[derive(Debug, Clone, Deserialize)]
#[serde(transparent)]
pub struct Site(krake_testnet::Site);

impl std::ops::Deref for Site {
    type Target = krake_testnet::Site;

    fn deref(&self) -> &krake_testnet::Site {
        &self.0
    }
}

#[derive(Debug, Deserialize)]
struct Up {
    dir: PathBuf,
    sites: Vec<Site>,
}

/// A federation on this machine; dropping it stops everything.
#[derive(Debug)]
pub struct Testnet {
    program: PathBuf,
    up: Up,
    _scratch: tempfile::TempDir,
}

/// The directory of the built programs, of the profile this test was built with.
fn programs() -> &'static Path {
    static PROGRAMS: OnceLock<PathBuf> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let own = std::env::current_exe().expect("the path of this program");
        let mut directory = own.parent().expect("a directory").to_owned();
        if directory.ends_with("deps") {
            directory.pop();
        }
        let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        build
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .args(["build", "--quiet", "--locked"])
            .args(["-p", "krake-node", "-p", "krake-cli", "-p", "krake-testnet"]);
        let profile = directory.file_name().and_then(std::ffi::OsStr::to_str);
        if let Some(profile) = profile.filter(|profile| *profile != "debug") {
            build.args(["--profile", profile]);
        }
        let built = build.status().expect("cargo can be started");
        assert!(built.success(), "the programs could not be built");
        directory
    })
}

/// One of the built programs.
pub fn program(name: &str) -> PathBuf {
    programs().join(name)
}

/// What a program said; it must have succeeded.
pub fn succeeded(output: &Output) -> String {
    assert!(output.status.success(), "{}", text(output));
    text(output)
}

/// A program must have failed, and have said all of this.
pub fn refused(output: &Output, says: &[&str]) {
    let text = text(output);
    assert!(!output.status.success(), "{text}");
    for says in says {
        assert!(text.contains(says), "`{says}` is not in: {text}");
    }
}

/// The text of a program's output, for messages.
fn text(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

impl Testnet {
    /// Starts a federation: `krake-testnet up --detach -o json` with `arguments` behind.
    pub fn up(arguments: &[&str]) -> Self {
        Self::up_from(programs(), arguments)
    }

    /// As [`Self::up`], of another build, whose programs are in this directory.
    pub fn up_from(programs: &Path, arguments: &[&str]) -> Self {
        let program = programs.join("krake-testnet");
        let scratch = tempfile::tempdir().expect("a directory for the testnet");
        let directory = scratch.path().join("net");
        let output = Command::new(&program)
            .args(["up", "--detach", "-o", "json", "--dir"])
            .arg(&directory)
            .args(arguments)
            .output()
            .expect("krake-testnet can be started");
        assert!(
            output.status.success(),
            "the testnet does not start: {}",
            text(&output)
        );
        let up = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("`up -o json`: {error}: {}", text(&output)));
        Self {
            program,
            up,
            _scratch: scratch,
        }
    }

    /// Its sites.
    pub fn sites(&self) -> &[Site] {
        &self.up.sites
    }

    /// The site of this name.
    pub fn site(&self, name: &str) -> &Site {
        let found = self.up.sites.iter().find(|site| site.name == name);
        found.unwrap_or_else(|| panic!("the testnet has no site {name}"))
    }

    /// Runs `krake-testnet` with `arguments` on it; it must succeed.
    pub fn run(&self, arguments: &[&str]) {
        let output = Command::new(&self.program)
            .args(arguments)
            .arg("--dir")
            .arg(&self.up.dir)
            .output()
            .expect("krake-testnet can be started");
        assert!(
            output.status.success(),
            "krake-testnet {}: {}",
            arguments.join(" "),
            text(&output)
        );
    }

    /// `krakectl` of the testnet's context, with `arguments`.
    pub fn krakectl(&self, arguments: &[&str]) -> Output {
        let servers: Vec<&str> = self.sites().iter().map(|site| site.api.as_str()).collect();
        Command::new(programs().join("krakectl"))
            .arg("--server")
            .arg(servers.join(","))
            .arg("--token-file")
            .arg(&self.sites()[0].token_file)
            .args(arguments)
            .output()
            .expect("krakectl can be started")
    }
}

impl Drop for Testnet {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for site in &self.up.sites {
                let log = std::fs::read_to_string(&site.log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().rev().take(30).collect();
                let tail: Vec<&str> = lines.into_iter().rev().collect();
                eprintln_block(&format!("log of {}", site.name), &tail.join("\n"));
            }
        }
        let stopped = Command::new(&self.program)
            .args(["down", "--dir"])
            .arg(&self.up.dir)
            .output();
        if !std::thread::panicking() {
            let output = stopped.expect("krake-testnet can be started");
            assert!(
                output.status.success(),
                "the testnet does not stop: {}",
                text(&output)
            );
        }
    }
}

#[allow(clippy::print_stderr, reason = "a failing test shows the nodes' logs")]
fn eprintln_block(title: &str, text: &str) {
    eprintln!("--- {title}\n{text}");
}

impl Site {
    /// The admin token.
    pub fn token(&self) -> String {
        let text = std::fs::read_to_string(&self.token_file).expect("the token file");
        text.trim().to_owned()
    }

    /// Host and port of the node's API.
    pub fn api_address(&self) -> &str {
        self.api.trim_start_matches("http://")
    }

    /// The node's catalog, for its own protocol.
    pub fn catalog_endpoint(&self) -> Endpoint {
        Endpoint::Tcp {
            address: self.api_address().to_owned(),
            token: self.token(),
        }
    }

    /// `krake-node` with the site's configuration; it must end within `limit`.
    pub fn node(&self, arguments: &[&str], limit: Duration) -> Output {
        let site = self.data_dir.parent().expect("the site's directory");
        let mut node = Command::new(program("krake-node"));
        node.arg("--config")
            .arg(site.join("node.toml"))
            .args(arguments);
        run_within(&mut node, limit)
    }

    /// kubectl towards the node.
    pub fn kubectl(&self, arguments: &[&str]) -> Output {
        kubectl(&self.api_kubeconfig, arguments, None)
    }

    /// Another kubectl towards the node.
    pub fn kubectl_of(&self, program: &Path, arguments: &[&str]) -> Output {
        kubectl_of(program, &self.api_kubeconfig, arguments, None)
    }

    /// kubectl towards the node, with a manifest on standard input.
    pub fn apply(&self, manifest: &Value) -> Output {
        kubectl(
            &self.api_kubeconfig,
            &["apply", "--server-side", "-f", "-"],
            Some(manifest),
        )
    }

    /// kubectl towards the site's cluster.
    pub fn cluster(&self, arguments: &[&str]) -> Output {
        kubectl(&self.kubeconfig, arguments, None)
    }

    /// kubectl towards the site's cluster, with a manifest on standard input.
    pub fn cluster_apply(&self, manifest: &Value) -> Output {
        kubectl(&self.kubeconfig, &["apply", "-f", "-"], Some(manifest))
    }

    /// An object of the node's API as JSON; `None` when there is none or the node is down.
    pub fn get(&self, arguments: &[&str]) -> Option<Value> {
        json(&self.kubectl(&[&["get", "-o", "json"], arguments].concat()))
    }

    /// An object of the site's cluster as JSON; `None` when there is none or it is down.
    pub fn cluster_get(&self, arguments: &[&str]) -> Option<Value> {
        json(&self.cluster(&[&["get", "-o", "json"], arguments].concat()))
    }
}

fn json(output: &Output) -> Option<Value> {
    output
        .status
        .success()
        .then(|| serde_json::from_slice(&output.stdout).ok())
        .flatten()
}

/// The machine's kubectl where it has one, and the one built with the test Kubernetes.
pub fn kubectls() -> &'static [PathBuf] {
    static FOUND: OnceLock<Vec<PathBuf>> = OnceLock::new();
    FOUND.get_or_init(|| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let installed = std::env::split_paths(&path)
            .map(|directory| directory.join("kubectl"))
            .find(|program| program.is_file());
        let output = Command::new(programs().join("krake-testnet"))
            .args(["assets", "--path"])
            .output()
            .expect("krake-testnet can be started");
        assert!(output.status.success(), "no kubectl: {}", text(&output));
        let assets = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        installed
            .into_iter()
            .chain([Path::new(&assets).join("kubectl")])
            .collect()
    })
}

fn kubectl(kubeconfig: &Path, arguments: &[&str], input: Option<&Value>) -> Output {
    kubectl_of(&kubectls()[0], kubeconfig, arguments, input)
}

fn kubectl_of(
    program: &Path,
    kubeconfig: &Path,
    arguments: &[&str],
    input: Option<&Value>,
) -> Output {
    use std::io::Write;
    let mut child = Command::new(program)
        .arg("--kubeconfig")
        .arg(kubeconfig)
        .arg("--request-timeout=20s")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kubectl can be started");
    let mut pipe = child.stdin.take().expect("a pipe");
    if let Some(input) = input {
        pipe.write_all(input.to_string().as_bytes())
            .expect("kubectl reads");
    }
    drop(pipe);
    child.wait_with_output().expect("kubectl ends")
}

/// Runs a program that should end by itself; after `limit` it is killed and the test fails.
pub fn run_within(command: &mut Command, limit: Duration) -> Output {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program can be started");
    let begun = Instant::now();
    while child.try_wait().expect("the program's state").is_none() {
        if begun.elapsed() > limit {
            child.kill().expect("the program can be killed");
            let said = text(&child.wait_with_output().expect("the program ends"));
            panic!("{command:?} does not end. It said:\n{said}");
        }
        std::thread::sleep(LOOK_AT_PROGRAM);
    }
    child.wait_with_output().expect("the program ends")
}

/// Looks until `look` finds what is waited for; after `limit` the test fails and says for what.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            start.elapsed() < limit,
            "waited {} s for: {what}",
            limit.as_secs()
        );
        std::thread::sleep(LOOK);
    }
}
