//! One site's files and processes: configuration, cluster, node.

use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::json;
use toml::{Table, Value};

use crate::client::NodeClient;
use crate::kube::{Assets, Capacity, RealCluster};
use crate::ports;
use crate::process::{self, ProcessId, look_among, write_private};
use crate::programs::Programs;
use crate::state::{Component, Directory, KubeKind, SiteState, State};

/// A node or an embedded cluster is ready within this time or not at all, also on a busy machine.
const READY_WITHIN: Duration = Duration::from_secs(90);
/// And so much more for each site that starts at the same time.
pub const READY_PER_SITE: Duration = Duration::from_secs(5);
/// How often a newcomer knocks when others are faster.
const JOIN_TRIES: usize = 8;

/// What starts and stops sites.
#[derive(Debug, Clone)]
pub struct Starter {
    /// Where everything is.
    pub directory: Directory,
    /// What is started.
    pub programs: Programs,
    /// Real Kubernetes, where that is used.
    pub assets: Option<Assets>,
    /// Embedded or real.
    pub kube: KubeKind,
    /// How many sites share the machine.
    pub site_count: u32,
}

/// Waits of a testnet: so short that a move is seen within half a minute. Who watches a laptop
/// does not want to wait ten minutes for it; DESIGN's defaults are for data centers.
const WAITS: [(&str, &str); 4] = [
    ("defaults.reschedule_interval", "5s"),
    ("defaults.hold_for", "10s"),
    ("defaults.ready_timeout", "60s"),
    ("limits.report_interval", "2s"),
];

fn insert(table: &mut Table, key: &str, value: Value) -> anyhow::Result<()> {
    match key.split_once('.') {
        None => {
            table.insert(key.to_owned(), value);
            Ok(())
        }
        Some((first, rest)) => {
            let inner = table
                .entry(first.to_owned())
                .or_insert_with(|| Value::Table(Table::new()));
            let inner = inner
                .as_table_mut()
                .with_context(|| format!("`{first}` is not a section"))?;
            insert(inner, rest, value)
        }
    }
}

/// A value given as text: TOML where it is that, else the text itself.
fn read_value(text: &str) -> Value {
    format!("x = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("x"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

/// The configuration of a site's node.
///
/// # Errors
/// When a setting names something inside a value that is no section.
pub fn node_config(
    directory: &Directory,
    site: &SiteState,
    state: &State,
) -> anyhow::Result<String> {
    let profile = &site.profile;
    let name = &profile.name;
    let mut table = Table::new();
    let mut set = |key: &str, value: Value| insert(&mut table, key, value);
    let text = |path: std::path::PathBuf| Value::String(path.display().to_string());
    let address = |port: u16| Value::Array(vec![format!("127.0.0.1:{port}").into()]);
    set("site.name", name.clone().into())?;
    set("site.operator", profile.operator.clone().into())?;
    set("site.labels", Value::try_from(&profile.labels)?)?;
    set("site.location.place", profile.place.clone().into())?;
    set("site.location.country", profile.country.clone().into())?;
    set("site.location.grid_zone", profile.grid_zone.clone().into())?;
    set("site.location.latitude", profile.latitude.into())?;
    set("site.location.longitude", profile.longitude.into())?;
    set("node.data_dir", text(directory.data(name)))?;
    set("api.listen", address(site.api_port))?;
    set("api.socket", text(directory.socket(name)))?;
    set("peers.listen", address(site.peer_port))?;
    let backend = Table::from_iter([
        ("name".to_owned(), Value::from("default")),
        ("kubeconfig".to_owned(), text(directory.kubeconfig(name))),
    ]);
    set("backends", Value::Array(vec![Value::Table(backend)]))?;
    set("metrics", Value::try_from(&profile.metrics)?)?;
    set("federation.name", "testnet".into())?;
    set("federation.shards", i64::from(state.shards).into())?;
    set("testnet.fault_injection", true.into())?;
    for (key, value) in WAITS {
        set(key, value.into())?;
    }
    for (key, value) in &state.settings {
        set(key, read_value(value))?;
    }
    Ok(toml::to_string(&table)?)
}

impl Starter {
    /// The operator's way to a site's node.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub fn client(&self, site: &str) -> anyhow::Result<NodeClient> {
        NodeClient::new(site, &self.directory.socket(site))
    }

    /// Writes what the site's processes read.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_files(&self, site: &SiteState, state: &State) -> anyhow::Result<()> {
        let name = &site.profile.name;
        self.directory.create(Some(name))?;
        self.directory.create_socket_directory(name)?;
        let config = node_config(&self.directory, site, state)?;
        write_private(&self.directory.node_config(name), config.as_bytes())
    }

    /// Writes kubectl's way to the site's node; `founder` has the token.
    ///
    /// # Errors
    /// When there is no token yet, or it cannot be written.
    pub fn write_api_kubeconfig(&self, site: &SiteState, founder: &str) -> anyhow::Result<()> {
        let name = &site.profile.name;
        let token_file = self.directory.token(founder);
        let token = std::fs::read_to_string(&token_file)
            .with_context(|| format!("cannot read {}", token_file.display()))?;
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": name, "cluster": {
                "server": format!("https://127.0.0.1:{}", site.api_port),
                "certificate-authority": self.directory.data(name).join("ca.crt"),
            }}],
            "users": [{"name": "admin", "user": {"token": token.trim()}}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": "admin"}}],
            "current-context": name,
        });
        let text = serde_saphyr::to_string(&kubeconfig)?;
        write_private(&self.directory.api_kubeconfig(name), text.as_bytes())
    }

    /// Whether the site's node belongs to the federation already.
    pub fn is_member(&self, site: &str) -> bool {
        self.directory.data(site).join("membership").exists()
    }

    /// Starts the site's cluster, notes its processes, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not start; the text has the end of its log.
    pub async fn start_cluster(&self, site: &SiteState) -> anyhow::Result<()> {
        let name = &site.profile.name;
        match self.kube {
            KubeKind::Real => {
                let assets = self.assets.as_ref().context("real Kubernetes is missing")?;
                let dir = self.directory.cluster(name);
                let capacity = &site.profile.capacity;
                let note = |processes: &_| self.note_cluster(name, processes);
                let cluster = RealCluster::start_with(assets, &dir, name, capacity, note).await?;
                cluster.detach();
                Ok(())
            }
            KubeKind::Embedded => self.start_embedded(site).await,
        }
    }

    /// Notes the processes of a site's cluster.
    ///
    /// # Errors
    /// When the state cannot be changed.
    pub fn note_cluster(
        &self,
        site: &str,
        processes: &[(String, ProcessId)],
    ) -> anyhow::Result<()> {
        let components = processes.iter().map(|(name, process)| Component {
            name: name.clone(),
            process: *process,
        });
        let components: Vec<Component> = components.collect();
        self.directory.update(|state| {
            state.site_mut(site)?.cluster = components;
            Ok(())
        })
    }

    async fn start_embedded(&self, site: &SiteState) -> anyhow::Result<()> {
        let name = &site.profile.name;
        let port = site.cluster_port;
        require_free(port, name, "cluster")?;
        let dir = self.directory.cluster(name);
        std::fs::create_dir_all(dir.join("logs"))?;
        let log = dir.join("logs/embedded.log");
        let Capacity { cpu, memory, pods } = &site.profile.capacity;
        let arguments = [
            "embedded-cluster".to_owned(),
            format!("--dir={}", dir.display()),
            format!("--listen=127.0.0.1:{port}"),
            format!("--cpu={cpu}"),
            format!("--memory={memory}"),
            format!("--pods={pods}"),
        ];
        let process = process::spawn_detached(&self.programs.testnet, &arguments, &[], &log)?;
        self.note_cluster(name, &[("embedded".to_owned(), process)])?;
        let kubeconfig = self.directory.kubeconfig(name);
        let http = reqwest::Client::builder().no_proxy().build()?;
        let url = format!("http://127.0.0.1:{port}/readyz");
        let what = format!("the embedded Kubernetes of {name}");
        self.wait_ready(process, &what, &log, async || {
            kubeconfig.exists()
                && http
                    .get(&url)
                    .send()
                    .await
                    .is_ok_and(|answer| answer.status().is_success())
        })
        .await
    }

    fn patience(&self) -> Duration {
        READY_WITHIN + READY_PER_SITE * self.site_count
    }

    /// Runs `krake-node` to its end, for `init` and `join`.
    async fn run_node(&self, site: &str, arguments: &[&str]) -> anyhow::Result<()> {
        let mut command = tokio::process::Command::new(&self.programs.node);
        command
            .arg("--config")
            .arg(self.directory.node_config(site))
            .args(arguments)
            .stdin(std::process::Stdio::null())
            .process_group(0)
            .kill_on_drop(true);
        for (name, _) in std::env::vars() {
            if name.starts_with("KRAKE_") {
                command.env_remove(name);
            }
        }
        let output = command
            .output()
            .await
            .with_context(|| format!("cannot start {}", self.programs.node.display()))?;
        if output.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{}", text.trim().trim_start_matches("error: "))
    }

    /// Founds the federation.
    ///
    /// # Errors
    /// When `krake-node init` fails.
    pub async fn init(&self, site: &str) -> anyhow::Result<()> {
        self.run_node(site, &["init"])
            .await
            .with_context(|| format!("{site} cannot found the federation"))
    }

    /// Joins the federation, with an invitation from `founder`.
    ///
    /// # Errors
    /// When the founder does not invite, or `krake-node join` fails.
    pub async fn join(&self, founder: &NodeClient, site: &str) -> anyhow::Result<()> {
        let token = founder.invite(site).await?;
        // Not on the command line, where everybody on the machine can read it.
        let file = self.directory.site(site).join("invitation");
        write_private(&file, token.as_bytes())?;
        let argument = format!("@{}", file.display());
        let mut tried = 0;
        let result = loop {
            tried += 1;
            match self.run_node(site, &["join", &argument]).await {
                Err(error) if tried < JOIN_TRIES && error.to_string().contains("krake::busy") => {}
                result => break result,
            }
        };
        // The invitation can be used once.
        let _ = std::fs::remove_file(&file);
        result.with_context(|| format!("{site} cannot join the federation"))
    }

    /// Starts the site's node, notes its process, and waits until it answers. What cuts it off
    /// from others is told to it at once.
    ///
    /// # Errors
    /// When it does not start; the text has the end of its log.
    pub async fn start_node(&self, site: &SiteState) -> anyhow::Result<ProcessId> {
        let name = &site.profile.name;
        require_free(site.api_port, name, "API")?;
        require_free(site.peer_port, name, "peers")?;
        let log = self.directory.node_log(name);
        let arguments = [
            "--config".to_owned(),
            self.directory.node_config(name).display().to_string(),
            "run".to_owned(),
        ];
        let process = process::spawn_detached(&self.programs.node, &arguments, &[], &log)?;
        self.directory.update(|state| {
            state.site_mut(name)?.node = Some(process);
            Ok(())
        })?;
        let client = self.client(name)?;
        let what = format!("the node of {name}");
        self.wait_ready(process, &what, &log, async || {
            client.get("/livez").await.is_ok()
        })
        .await?;
        if !site.blocked.is_empty() {
            client.block(site.blocked.iter()).await?;
        }
        Ok(process)
    }

    /// Waits until the node is ready to serve.
    ///
    /// # Errors
    /// When it ends or is not ready in time.
    pub async fn node_ready(&self, site: &str, process: ProcessId) -> anyhow::Result<()> {
        let log = self.directory.node_log(site);
        let client = self.client(site)?;
        let what = format!("the node of {site}");
        self.wait_ready(process, &what, &log, async || client.is_ready().await)
            .await
    }

    async fn wait_ready(
        &self,
        process: ProcessId,
        what: &str,
        log: &std::path::Path,
        ready: impl AsyncFn() -> bool,
    ) -> anyhow::Result<()> {
        let patience = self.patience();
        let end = tokio::time::Instant::now() + patience;
        loop {
            if ready().await {
                return Ok(());
            }
            let shown = || {
                format!(
                    "the end of its log {}:\n{}",
                    log.display(),
                    process::tail(log, 8)
                )
            };
            if !process.is_alive() {
                bail!("{what} ended; {}", shown());
            }
            if tokio::time::Instant::now() >= end {
                bail!(
                    "{what} is not ready after {} s; {}",
                    patience.as_secs(),
                    shown()
                );
            }
            tokio::time::sleep(look_among(self.site_count)).await;
        }
    }
}

fn require_free(port: u16, site: &str, what: &str) -> anyhow::Result<()> {
    if ports::is_free(port) {
        return Ok(());
    }
    bail!(
        "port {port} of {site} ({what}) is in use by another program: end it (ss -lntup 'sport = :{port}' names it), or begin anew with krake-testnet down --purge"
    )
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    use super::*;
    use crate::state::Wish;

    #[test]
    fn a_node_accepts_its_configuration() {
        let directory = Directory::new(Path::new("/net")).unwrap();
        let sites: Vec<SiteState> = crate::profile::profiles(3)
            .into_iter()
            .map(|profile| SiteState {
                profile,
                api_port: 20_001,
                peer_port: 20_002,
                cluster_port: 20_003,
                wish: Wish::Stopped,
                node: None,
                cluster: Vec::new(),
                blocked: BTreeSet::new(),
            })
            .collect();
        let settings = BTreeMap::from([
            ("defaults.detect_after".to_owned(), "5s".to_owned()),
            ("capacity.pods".to_owned(), "7".to_owned()),
        ]);
        let state = State::new(KubeKind::Embedded, 4, settings, sites);
        let text = node_config(&directory, &state.sites[1], &state).unwrap();
        let table: Table = text.parse().unwrap();
        assert_eq!(table["site"]["name"].as_str(), Some("stockholm"));
        assert_eq!(table["api"]["listen"][0].as_str(), Some("127.0.0.1:20001"));
        assert_eq!(table["defaults"]["detect_after"].as_str(), Some("5s"));
        assert_eq!(table["capacity"]["pods"].as_integer(), Some(7));
        assert_eq!(table["federation"]["shards"].as_integer(), Some(4));
        assert_eq!(table["metrics"]["carbon"].as_float(), Some(21.0));
    }
}
