//! A running testnet: started, looked at, hurt, and stopped.

mod faults;
mod form;
mod prepare;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::prepare::prepare;
use crate::client::NodeClient;
use crate::process::{self, ProcessId};
use crate::profile::{Profile, SITES_MAX, profiles};
use crate::programs::{Programs, ensure_programs};
use crate::progress::Progress;
use crate::site::Starter;
use crate::state::{Directory, KubeKind, SiteState, State, Wish};

/// Sites of a testnet when nobody says how many.
pub const SITES: usize = 5;
/// Name of the context for krakectl.
pub const CONTEXT: &str = "testnet";
/// The app that `--demo` deploys.
pub const DEMO: &str = include_str!("../../examples/shop.yaml");
/// How long nodes may take to hand over and to end before they are killed.
const NODE_PATIENCE: Duration = Duration::from_secs(10);
/// How long clusters may take: an API server would wait for its watches, and nothing is lost.
const CLUSTER_PATIENCE: Duration = Duration::from_secs(1);

/// How a testnet is started.
#[derive(Debug, Clone)]
pub struct UpOptions {
    /// Where everything is kept.
    pub dir: PathBuf,
    /// The sites; empty: those that are there already, or the first five.
    pub profiles: Vec<Profile>,
    /// What they run on; `None`: as before, or embedded.
    pub kube: Option<KubeKind>,
    /// Shards of the catalog; `None`: as before, or the default.
    pub shards: Option<u16>,
    /// Configuration of all nodes, such as `defaults.detect_after` = `5s`.
    pub settings: BTreeMap<String, String>,
    /// Deploy the demo app and wait until it is ready.
    pub demo: bool,
    /// Hears what happens.
    pub progress: Progress,
}

impl UpOptions {
    /// Five embedded sites in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            profiles: Vec::new(),
            kube: None,
            shards: None,
            settings: BTreeMap::new(),
            demo: false,
            progress: Progress::default(),
        }
    }

    /// So many sites.
    ///
    /// # Errors
    /// When there are none or too many.
    pub fn sites(mut self, count: usize) -> anyhow::Result<Self> {
        if count == 0 || count > SITES_MAX {
            bail!("a testnet has 1 to {SITES_MAX} sites, not {count}");
        }
        self.profiles = profiles(count);
        Ok(self)
    }
}

/// What a program needs to know of a site: the same as `krake-testnet up -o json` prints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Its name.
    pub name: String,
    /// URL of the node's API.
    pub api: String,
    /// File with the admin token.
    pub token_file: PathBuf,
    /// kubectl's way to the node.
    pub api_kubeconfig: PathBuf,
    /// kubectl's way to the site's Kubernetes.
    pub kubeconfig: PathBuf,
    /// The node's process.
    pub pid: u32,
    /// The cluster's processes.
    pub kube_pids: Vec<u32>,
    /// The node's data directory.
    pub data_dir: PathBuf,
    /// The node's log.
    pub log: PathBuf,
}

/// A federation on this machine.
#[derive(Debug)]
pub struct Testnet {
    directory: Directory,
    starter: Starter,
    progress: Progress,
    ends_with_us: bool,
    built_in: Duration,
}

impl Testnet {
    /// Starts a federation, or the one in that directory again with its data, and waits until it
    /// is formed. Dropping it stops everything.
    ///
    /// # Errors
    /// When a program cannot be had, the directory is in use, or something does not start. What
    /// was started until then is ended.
    pub async fn up(options: UpOptions) -> anyhow::Result<Self> {
        let directory = Directory::new(&options.dir)?;
        let started = Instant::now();
        let programs = ensure_programs(&options.progress).await?;
        let built_in = started.elapsed();
        let state = directory.claim(|before| prepare(&directory, before, &options))?;
        let testnet = Self {
            directory: directory.clone(),
            starter: Starter {
                directory,
                programs,
                assets: None,
                kube: state.kube,
                site_count: state.site_count(),
            },
            progress: options.progress.clone(),
            ends_with_us: true,
            built_in,
        };
        testnet.bring_up(&state, &options).await
    }

    /// The testnet in a directory, which goes on when this value is dropped.
    ///
    /// # Errors
    /// When there is none, or its programs cannot be had.
    pub async fn open(directory: Directory, progress: &Progress) -> anyhow::Result<Self> {
        let state = directory.require()?;
        let programs = ensure_programs(progress).await?;
        let assets = match state.kube {
            KubeKind::Real => Some(crate::kube::assets(progress).await?),
            KubeKind::Embedded => None,
        };
        Ok(Self {
            starter: Starter {
                directory: directory.clone(),
                programs,
                assets,
                kube: state.kube,
                site_count: state.site_count(),
            },
            directory,
            progress: progress.clone(),
            ends_with_us: false,
            built_in: Duration::ZERO,
        })
    }

    /// Lets it go on after this value is dropped.
    ///
    /// # Errors
    /// When that cannot be noted.
    pub fn detach(mut self) -> anyhow::Result<Directory> {
        self.directory.update(|state| {
            state.holder = None;
            Ok(())
        })?;
        self.ends_with_us = false;
        Ok(self.directory.clone())
    }

    /// How long its programs had to be built before it could start.
    pub const fn built_in(&self) -> Duration {
        self.built_in
    }

    /// Its directory.
    pub const fn directory(&self) -> &Directory {
        &self.directory
    }

    /// The programs it is made of.
    pub const fn programs(&self) -> &Programs {
        &self.starter.programs
    }

    /// Its sites as they are now; the first one is the founder.
    ///
    /// # Errors
    /// When its state cannot be read.
    pub fn sites(&self) -> anyhow::Result<Vec<Site>> {
        Ok(sites(&self.directory, &self.directory.require()?))
    }

    /// The site of this name.
    ///
    /// # Errors
    /// When there is none.
    pub fn site(&self, name: &str) -> anyhow::Result<Site> {
        let state = self.directory.require()?;
        state.site(name)?;
        let found = sites(&self.directory, &state)
            .into_iter()
            .find(|site| site.name == name);
        found.context("the site is gone")
    }

    /// The operator's way to a site's node.
    ///
    /// # Errors
    /// When the client cannot be made.
    pub fn client(&self, site: &str) -> anyhow::Result<NodeClient> {
        self.starter.client(site)
    }

    /// Processes that ended although nobody asked them to.
    ///
    /// # Errors
    /// When the state cannot be read.
    pub fn unexpected_deaths(&self) -> anyhow::Result<Vec<Death>> {
        Ok(deaths(&self.directory, &self.directory.require()?))
    }

    /// Stops everything; the data stays.
    ///
    /// # Errors
    /// When its state cannot be read or changed.
    pub async fn down(mut self) -> anyhow::Result<Stopped> {
        self.ends_with_us = false;
        down(&self.directory).await
    }
}

impl Drop for Testnet {
    fn drop(&mut self) {
        if !self.ends_with_us {
            return;
        }
        let processes = self.directory.update(|state| {
            let processes = state.alive();
            state.holder = None;
            for site in &mut state.sites {
                site.wish = Wish::Stopped;
            }
            Ok(processes)
        });
        // When the state is gone with its directory, so is the list of what to end.
        process::kill_blocking(&processes.unwrap_or_default());
    }
}

/// What [`down`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// Processes that ran, also those that `up` stopped itself when it was asked to.
    pub processes: usize,
    /// Nodes that had to be killed.
    pub killed: usize,
}

/// Stops the testnet in a directory, whoever started it; the data stays.
///
/// # Errors
/// When there is none, or its state cannot be changed.
pub async fn down(directory: &Directory) -> anyhow::Result<Stopped> {
    let mark = |state: &mut State| {
        for site in &mut state.sites {
            site.wish = Wish::Stopped;
            site.blocked.clear();
        }
        Ok(state.clone())
    };
    let state = directory.update(mark)?;
    let mut stopped = state.alive();
    let own = std::process::id();
    if let Some(holder) = state.holder.filter(|holder| holder.pid != own) {
        // It stops what it is starting just now; what it leaves is ended below.
        holder.signal(Signal::SIGTERM);
        let patience = NODE_PATIENCE + Duration::from_secs(5);
        if !holder.gone_within(patience).await {
            process::kill_now(&[holder]).await;
        }
    }
    let mut killed = 0;
    // Twice, for what was started meanwhile.
    for state in [state, directory.require()?] {
        let nodes = state.nodes_alive();
        let mut more = state.alive();
        more.retain(|process| !stopped.contains(process));
        stopped.extend(more);
        killed += process::terminate(&nodes, NODE_PATIENCE).await;
        process::terminate(&state.alive(), CLUSTER_PATIENCE).await;
    }
    directory.update(|state| {
        state.holder = None;
        Ok(())
    })?;
    Ok(Stopped {
        processes: stopped.len(),
        killed,
    })
}

/// A process that ended although nobody asked it to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// At which site.
    pub site: String,
    /// `node`, or a part of the cluster.
    pub component: String,
    /// Which process it was.
    pub process: ProcessId,
    /// Its log.
    pub log: PathBuf,
}

impl std::fmt::Display for Death {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of {} ended unexpectedly; the end of its log {}:\n{}",
            self.component,
            self.site,
            self.log.display(),
            process::tail(&self.log, 8)
        )
    }
}

/// The logs of a site by component.
pub fn logs(directory: &Directory, site: &SiteState) -> BTreeMap<String, PathBuf> {
    let name = &site.profile.name;
    let cluster = directory.cluster(name).join("logs");
    let mut logs: BTreeMap<String, PathBuf> = std::fs::read_dir(&cluster)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let path = entry.path();
            Some((path.file_stem()?.to_str()?.to_owned(), path))
        })
        .collect();
    logs.insert("node".to_owned(), directory.node_log(name));
    logs
}

fn deaths(directory: &Directory, state: &State) -> Vec<Death> {
    let mut deaths = Vec::new();
    for site in &state.sites {
        let name = &site.profile.name;
        let (node, cluster) = match site.wish {
            Wish::Running => (site.node, &site.cluster[..]),
            Wish::NodeKilled => (None, &site.cluster[..]),
            Wish::Stopped | Wish::Killed | Wish::Paused => (None, &[][..]),
        };
        let node = node.map(|node| ("node".to_owned(), node));
        let cluster = cluster.iter().map(|c| (c.name.clone(), c.process));
        for (component, process) in node.into_iter().chain(cluster) {
            if !process.is_alive() {
                let log = if component == "node" {
                    directory.node_log(name)
                } else {
                    directory
                        .cluster(name)
                        .join(format!("logs/{component}.log"))
                };
                deaths.push(Death {
                    site: name.clone(),
                    component,
                    process,
                    log,
                });
            }
        }
    }
    deaths
}

/// The sites for programs.
pub fn sites(directory: &Directory, state: &State) -> Vec<Site> {
    let founder = state.sites.first().map(|site| site.profile.name.as_str());
    let token_file = directory.token(founder.unwrap_or_default());
    let site = |site: &SiteState| {
        let name = &site.profile.name;
        Site {
            name: name.clone(),
            api: format!("http://127.0.0.1:{}", site.api_port),
            token_file: token_file.clone(),
            api_kubeconfig: directory.api_kubeconfig(name),
            kubeconfig: directory.kubeconfig(name),
            pid: site.node.map_or(0, |node| node.pid),
            kube_pids: site.cluster.iter().map(|c| c.process.pid).collect(),
            data_dir: directory.data(name),
            log: directory.node_log(name),
        }
    };
    state.sites.iter().map(site).collect()
}

/// Whether an Application is ready with its newest spec.
pub fn is_ready(app: &Value) -> bool {
    let ready = app["status"]["conditions"]
        .as_array()
        .is_some_and(|conditions| {
            conditions
                .iter()
                .any(|c| c["type"] == "Ready" && c["status"] == "True")
        });
    ready && app["status"]["observedGeneration"] == app["metadata"]["generation"]
}
