//! A running testnet: started, looked at, hurt, and stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::future::{try_join, try_join_all};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{Semaphore, watch};

use crate::client::NodeClient;
use crate::kube::RealCluster;
use crate::ports;
use crate::process::{self, LOOK, ProcessId, look_among};
use crate::profile::{Profile, SITES_MAX, profiles};
use crate::programs::{Programs, ensure_programs};
use crate::progress::{Progress, Step};
use crate::site::{READY_PER_SITE, Starter};
use crate::state::{Directory, KubeKind, SiteState, State, Wish, unknown};

/// Sites of a testnet when nobody says how many.
pub const SITES: usize = 5;
/// Name of the context for krakectl.
pub const CONTEXT: &str = "testnet";
/// The app that `--demo` deploys.
pub const DEMO: &str = include_str!("../../examples/shop.yaml");
/// Where it is in the API.
const DEMO_PATH: &str = "/apis/krake.dev/v1/namespaces/default/applications/shop";
/// How long nodes may take to hand over and to end before they are killed.
const NODE_PATIENCE: Duration = Duration::from_secs(10);
/// How long clusters may take: an API server would wait for its watches, and nothing is lost.
const CLUSTER_PATIENCE: Duration = Duration::from_secs(1);
/// A restarted site may stay unready, when others are away.
const READY_WITHIN: Duration = Duration::from_secs(20);
/// A federation that has not formed by then never will.
const FORM_WITHIN: Duration = Duration::from_secs(180);
/// The demo app is ready by then or not at all.
const DEMO_WITHIN: Duration = Duration::from_secs(120);
/// Clusters that start at a time: more would only wait for each other on a small machine.
const STARTS_MAX: usize = 8;

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

/// The voters of each group that `members` can have: one more failure survived with 3, two with 5.
const fn voters_of(members: usize) -> usize {
    match members {
        0..=2 => 1,
        3..=4 => 3,
        _ => 5,
    }
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

    async fn bring_up(mut self, state: &State, options: &UpOptions) -> anyhow::Result<Self> {
        if state.kube == KubeKind::Real {
            self.starter.assets = Some(crate::kube::assets(&self.progress).await?);
        }
        for site in &state.sites {
            self.starter.write_files(site, state)?;
        }
        self.write_contexts(state)?;
        self.start_sites(state).await?;
        let patience = FORM_WITHIN + READY_PER_SITE * state.site_count();
        let formed = tokio::time::timeout(patience, self.until_formed(state)).await;
        formed.map_err(|_| {
            anyhow::anyhow!(
                "the federation has not formed after {} s; the logs are {}/sites/*/node.log",
                patience.as_secs(),
                self.directory.path().display()
            )
        })??;
        if options.demo {
            self.deploy_demo().await?;
        }
        Ok(self)
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

    fn write_contexts(&self, state: &State) -> anyhow::Result<()> {
        use krake_cli::context::{Context as Entry, ContextFile};
        let founder = state.sites.first().context("a testnet without sites")?;
        let servers = state.sites.iter();
        let entry = Entry {
            servers: servers
                .map(|site| format!("http://127.0.0.1:{}", site.api_port))
                .collect(),
            token_file: Some(self.directory.token(&founder.profile.name)),
            namespace: None,
        };
        let file = ContextFile {
            current_context: Some(CONTEXT.to_owned()),
            contexts: BTreeMap::from([(CONTEXT.to_owned(), entry)]),
        };
        Ok(file.save(&self.directory.contexts())?)
    }

    /// All sites at once. Newcomers wait for the founder, and with running until all have joined:
    /// on a small machine running nodes would leave the founder no time for the others.
    async fn start_sites(&self, state: &State) -> anyhow::Result<()> {
        let founder = &state.sites.first().context("no sites")?.profile.name;
        let names = state.sites.iter().map(|site| &site.profile.name);
        let newcomers: BTreeSet<String> = names
            .filter(|name| !self.starter.is_member(name))
            .cloned()
            .collect();
        let absent = newcomers.iter().filter(|name| *name != founder).count();
        let parts = Parts {
            clusters: &self.progress.step("clusters", state.sites.len()),
            nodes: &self.progress.step("nodes", state.sites.len()),
            founder,
            newcomers,
            open: watch::Sender::new(false),
            absent: watch::Sender::new(absent),
            starts: Semaphore::new(STARTS_MAX),
        };
        let all = state.sites.iter().map(|site| self.start_site(site, &parts));
        try_join_all(all).await?;
        Ok(())
    }

    async fn start_site(&self, site: &SiteState, parts: &Parts<'_>) -> anyhow::Result<()> {
        let name = &site.profile.name;
        let starter = &self.starter;
        let is_founder = name == parts.founder;
        let is_newcomer = parts.newcomers.contains(name);
        let cluster = async {
            let _turn = parts.starts.acquire().await?;
            starter.start_cluster(site).await?;
            parts.clusters.advance();
            anyhow::Ok(())
        };
        let member = async {
            if is_newcomer && is_founder {
                starter.init(name).await?;
            } else if is_newcomer {
                parts.open.subscribe().wait_for(|open| *open).await?;
                {
                    let _turn = parts.starts.acquire().await?;
                    starter.join(&starter.client(parts.founder)?, name).await?;
                }
                parts.absent.send_modify(|absent| *absent -= 1);
                parts
                    .absent
                    .subscribe()
                    .wait_for(|absent| *absent == 0)
                    .await?;
            }
            Ok(())
        };
        try_join(cluster, member).await?;
        starter.write_api_kubeconfig(site, parts.founder)?;
        let process = {
            let _turn = parts.starts.acquire().await?;
            starter.start_node(site).await?
        };
        starter.node_ready(name, process).await?;
        parts.nodes.advance();
        if is_founder {
            parts.open.send_replace(true);
        }
        Ok(())
    }

    /// Every node sees every site alive and with a report, and every group has the voters that it
    /// can have.
    async fn until_formed(&self, state: &State) -> anyhow::Result<()> {
        let count = state.sites.len();
        let views = self.progress.step("views agree", count);
        let all = state
            .sites
            .iter()
            .map(|site| self.until_sees_all(site, count, &views));
        let groups = usize::from(state.shards) + 1;
        let voters = self.progress.step("voters", groups);
        let voters = self.until_voters(state, groups, voters_of(count), &voters);
        tokio::select! {
            formed = try_join(try_join_all(all), voters) => formed.map(|_| ()),
            death = self.until_death() => Err(death),
        }
    }

    async fn until_sees_all(
        &self,
        site: &SiteState,
        count: usize,
        views: &Step,
    ) -> anyhow::Result<()> {
        let client = self.client(&site.profile.name)?;
        loop {
            if let Ok(list) = client.get("/apis/krake.dev/v1/sites").await
                && complete_sites(&list) == count
            {
                views.advance();
                return Ok(());
            }
            tokio::time::sleep(look_among(self.starter.site_count) * 2).await;
        }
    }

    /// Ends when one of its processes does.
    async fn until_death(&self) -> anyhow::Error {
        loop {
            if let Err(death) = self.check_alive() {
                return death;
            }
            tokio::time::sleep(LOOK * 5).await;
        }
    }

    async fn until_voters(
        &self,
        state: &State,
        groups: usize,
        voters: usize,
        step: &Step,
    ) -> anyhow::Result<()> {
        // Beyond a few nodes each has only some groups: ask several.
        let clients = state
            .sites
            .iter()
            .map(|site| self.client(&site.profile.name))
            .collect::<anyhow::Result<Vec<_>>>()?;
        loop {
            let mut grown = BTreeSet::new();
            for client in clients.iter().take(8) {
                if let Ok(status) = client.get("/v1/status").await {
                    grown.extend(grown_groups(&status, voters));
                }
                if grown.len() >= groups {
                    break;
                }
            }
            step.set(grown.len());
            if grown.len() >= groups {
                return Ok(());
            }
            tokio::time::sleep(look_among(self.starter.site_count) * 2).await;
        }
    }

    fn check_alive(&self) -> anyhow::Result<()> {
        match self.unexpected_deaths()?.first() {
            None => Ok(()),
            Some(death) => bail!("{death}"),
        }
    }

    /// Processes that ended although nobody asked them to.
    ///
    /// # Errors
    /// When the state cannot be read.
    pub fn unexpected_deaths(&self) -> anyhow::Result<Vec<Death>> {
        Ok(deaths(&self.directory, &self.directory.require()?))
    }

    async fn deploy_demo(&self) -> anyhow::Result<()> {
        let step = self.progress.step("demo app `shop`", 1);
        let state = self.directory.require()?;
        let founder = state.sites.first().context("no sites")?;
        let client = self.client(&founder.profile.name)?;
        client
            .apply(DEMO_PATH, DEMO)
            .await
            .context("the demo app was not accepted")?;
        let end = tokio::time::Instant::now() + DEMO_WITHIN;
        let mut last = Value::Null;
        while tokio::time::Instant::now() < end {
            if let Ok(app) = client.get(DEMO_PATH).await {
                if is_ready(&app) {
                    step.advance();
                    return Ok(());
                }
                last = app["status"].clone();
            }
            self.check_alive()?;
            tokio::time::sleep(LOOK).await;
        }
        bail!(
            "the demo app is not ready after {} s; its status is {last}",
            DEMO_WITHIN.as_secs()
        )
    }

    /// Kills a site as a power cut would: node and cluster, or the node alone.
    ///
    /// # Errors
    /// When there is no such site, or nothing of it runs.
    pub async fn kill(&self, site: &str, node_only: bool) -> anyhow::Result<()> {
        let processes = self.directory.update(|state| {
            let site = state.site_mut(site)?;
            let processes = if node_only {
                site.node
                    .into_iter()
                    .filter(|node| node.is_alive())
                    .collect()
            } else {
                site.alive()
            };
            if processes.is_empty() {
                bail!(
                    "{} does not run; start it with chaos restart",
                    site.profile.name
                );
            }
            site.wish = match node_only {
                true if !site.cluster_alive().is_empty() => Wish::NodeKilled,
                _ => Wish::Killed,
            };
            Ok(processes)
        })?;
        process::kill_now(&processes).await;
        Ok(())
    }

    /// Starts what was killed: the cluster first, then the node. Waits until the node answers, and
    /// a while until it is ready; whether it is. It cannot be while its groups have no majority or
    /// their leaders are behind a partition.
    ///
    /// # Errors
    /// When there is no such site, it runs already, is paused, or does not start.
    pub async fn restart(&self, site: &str) -> anyhow::Result<bool> {
        let state = self.directory.require()?;
        let before = state.site(site)?.clone();
        if before.wish == Wish::Paused {
            bail!("{site} is paused; let it go on with chaos resume {site}");
        }
        let expected = match state.kube {
            KubeKind::Real => 5,
            KubeKind::Embedded => 1,
        };
        let cluster_runs = before.cluster_alive().len() == expected;
        if cluster_runs && before.node_alive() {
            bail!("{site} runs already");
        }
        self.starter.write_files(&before, &state)?;
        let started = async {
            if !cluster_runs {
                process::kill_now(&before.cluster_alive()).await;
                self.starter.start_cluster(&before).await?;
            }
            if !before.node_alive() {
                self.starter.start_node(&before).await?;
            }
            Ok(())
        };
        // From now on a death is unexpected, and said so.
        let state = self.set_wish(site, Wish::Running, started).await?;
        let Some(process) = state.site(site)?.node else {
            return Ok(false);
        };
        let ready = self.starter.node_ready(site, process);
        match tokio::time::timeout(READY_WITHIN, ready).await {
            Ok(result) => result.map(|()| true),
            Err(_) => Ok(false),
        }
    }

    async fn set_wish(
        &self,
        site: &str,
        wish: Wish,
        action: impl Future<Output = anyhow::Result<()>>,
    ) -> anyhow::Result<State> {
        action.await?;
        self.directory.update(|state| {
            state.site_mut(site)?.wish = wish;
            Ok(state.clone())
        })
    }

    /// Stops a site in time (SIGSTOP): it is there and says nothing.
    ///
    /// # Errors
    /// When there is no such site, or nothing of it runs.
    pub async fn pause(&self, site: &str) -> anyhow::Result<()> {
        self.directory.update(|state| {
            let site = state.site_mut(site)?;
            let processes = site.alive();
            if processes.is_empty() {
                bail!(
                    "{} does not run; start it with chaos restart",
                    site.profile.name
                );
            }
            site.wish = Wish::Paused;
            for process in processes {
                process.signal(Signal::SIGSTOP);
            }
            Ok(())
        })
    }

    /// Lets a paused site go on.
    ///
    /// # Errors
    /// When there is no such site, or it is not paused.
    pub async fn resume(&self, site: &str) -> anyhow::Result<()> {
        let before = self.directory.require()?.site(site)?.clone();
        if before.wish != Wish::Paused {
            bail!("{site} is not paused");
        }
        let node = before.node.into_iter();
        let cluster = before.cluster.iter().map(|component| component.process);
        for process in node.chain(cluster) {
            process.signal(Signal::SIGCONT);
        }
        if let Some(assets) = &self.starter.assets {
            let processes = before.cluster.iter();
            let processes = processes.map(|c| (c.name.clone(), c.process)).collect();
            let dir = self.directory.cluster(site);
            let mut cluster = RealCluster::adopt(assets, &dir, processes)?;
            cluster.resume().await?;
            self.starter.note_cluster(site, &cluster.detach())?;
        }
        let node_alive = before.node_alive();
        let after = if node_alive {
            Wish::Running
        } else {
            Wish::NodeKilled
        };
        self.set_wish(site, after, async {
            if node_alive {
                // Partitions that were made meanwhile.
                self.client(site)?.block(before.blocked.iter()).await?;
            }
            Ok(())
        })
        .await?;
        Ok(())
    }

    /// Cuts every site of `one` off from every site of `other`. Partitions add up.
    ///
    /// # Errors
    /// When a site is unknown or on both sides, or a node does not take its list.
    pub async fn partition(&self, one: &[String], other: &[String]) -> anyhow::Result<()> {
        let state = self.directory.update(|state| {
            for name in one.iter().chain(other) {
                state.site(name)?;
            }
            if let Some(both) = one.iter().find(|name| other.contains(name)) {
                bail!("{both} is on both sides; a site cannot be cut off from itself");
            }
            for (ours, theirs) in [(one, other), (other, one)] {
                for name in ours {
                    state.site_mut(name)?.blocked.extend(theirs.iter().cloned());
                }
            }
            Ok(state.clone())
        })?;
        self.send_blocks(&state).await
    }

    /// Ends all partitions.
    ///
    /// # Errors
    /// When a node does not take its list.
    pub async fn heal(&self) -> anyhow::Result<()> {
        let state = self.directory.update(|state| {
            for site in &mut state.sites {
                site.blocked.clear();
            }
            Ok(state.clone())
        })?;
        self.send_blocks(&state).await
    }

    /// Nodes that do not run or are paused get their list when they run again.
    async fn send_blocks(&self, state: &State) -> anyhow::Result<()> {
        let running = state
            .sites
            .iter()
            .filter(|site| site.node_alive() && site.wish != Wish::Paused);
        let sent = running.map(|site| async {
            let client = self.client(&site.profile.name)?;
            client.block(site.blocked.iter()).await
        });
        try_join_all(sent).await?;
        Ok(())
    }

    /// Changes a metric of a site, also for later starts of its node.
    ///
    /// # Errors
    /// When the site or the metric is unknown, the value is impossible, or the node does not
    /// answer.
    pub async fn metric(&self, site: &str, name: &str, value: f64) -> anyhow::Result<()> {
        check_metric(name, value)?;
        let state = self.directory.update(|state| {
            let metrics = &mut state.site_mut(site)?.profile.metrics;
            metrics.insert(name.to_owned(), value);
            Ok(state.clone())
        })?;
        let changed = state.site(site)?;
        self.starter.write_files(changed, &state)?;
        if changed.node_alive() && changed.wish != Wish::Paused {
            self.client(site)?.metric(name, value).await?;
        }
        Ok(())
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

/// What the starts of all sites share.
struct Parts<'a> {
    clusters: &'a Step,
    nodes: &'a Step,
    founder: &'a str,
    /// Sites that belong to no federation yet.
    newcomers: BTreeSet<String>,
    /// Whether the founder is ready, so that others can join.
    open: watch::Sender<bool>,
    /// How many have not joined yet, the founder apart.
    absent: watch::Sender<usize>,
    starts: Semaphore,
}

/// What [`down`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stopped {
    /// Processes that ran.
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
    let own = std::process::id();
    if let Some(holder) = state.holder.filter(|holder| holder.pid != own) {
        // It stops what it is starting just now; what it leaves is ended below.
        holder.signal(Signal::SIGTERM);
        let patience = NODE_PATIENCE + Duration::from_secs(5);
        if !holder.gone_within(patience).await {
            process::kill_now(&[holder]).await;
        }
    }
    let mut processes = 0;
    let mut killed = 0;
    // Twice, for what was started meanwhile.
    for state in [state, directory.require()?] {
        let nodes = state.nodes_alive();
        processes += state.alive().len();
        killed += process::terminate(&nodes, NODE_PATIENCE).await;
        process::terminate(&state.alive(), CLUSTER_PATIENCE).await;
    }
    directory.update(|state| {
        state.holder = None;
        Ok(())
    })?;
    Ok(Stopped { processes, killed })
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

/// A state to start with: the one before, or a new one.
fn prepare(
    directory: &Directory,
    before: Option<State>,
    options: &UpOptions,
) -> anyhow::Result<State> {
    let Some(mut state) = before else {
        return fresh(directory, options);
    };
    let differs = |what: &str, had: String, wanted: String| {
        anyhow::anyhow!(
            "the testnet in {} has {had} {what}, not {wanted}: start it as it is, or remove it first with krake-testnet down --purge",
            directory.path().display()
        )
    };
    let count = options.profiles.len();
    if count > 0 && count != state.sites.len() {
        let (had, wanted) = (state.sites.len().to_string(), count.to_string());
        return Err(differs("sites", had, wanted));
    }
    if let Some(kube) = options.kube.filter(|kube| *kube != state.kube) {
        let (had, wanted) = (state.kube.to_string(), kube.to_string());
        return Err(differs("Kubernetes", had, wanted));
    }
    if let Some(shards) = options.shards.filter(|shards| *shards != state.shards) {
        let (had, wanted) = (state.shards.to_string(), shards.to_string());
        return Err(differs("shards", had, wanted));
    }
    state.settings.extend(options.settings.clone());
    for site in &mut state.sites {
        site.wish = Wish::Running;
        site.node = None;
        site.cluster.clear();
        site.blocked.clear();
    }
    Ok(state)
}

fn fresh(directory: &Directory, options: &UpOptions) -> anyhow::Result<State> {
    let chosen = match options.profiles.len() {
        0 => profiles(SITES),
        1..=SITES_MAX => options.profiles.clone(),
        count => bail!("a testnet has 1 to {SITES_MAX} sites, not {count}"),
    };
    let taken = ports::allocate(directory.path(), chosen.len() * 3)?;
    let sites = chosen
        .into_iter()
        .zip(taken.chunks_exact(3))
        .map(|(profile, ports)| SiteState {
            profile,
            api_port: ports[0],
            peer_port: ports[1],
            cluster_port: ports[2],
            wish: Wish::Running,
            node: None,
            cluster: Vec::new(),
            blocked: BTreeSet::new(),
        })
        .collect();
    Ok(State::new(
        options.kube.unwrap_or_default(),
        options.shards.unwrap_or(16),
        options.settings.clone(),
        sites,
    ))
}

fn check_metric(name: &str, value: f64) -> anyhow::Result<()> {
    let definitions = krake_model::metric::default_definitions();
    let known: Vec<&str> = definitions.keys().map(String::as_str).collect();
    let Some(definition) = definitions.get(name) else {
        return Err(unknown("metric", name, &known));
    };
    if !value.is_finite() || value < definition.min.min(0.0) {
        bail!(
            "{name} cannot be {value}: it is a number of {}, usually {} to {}",
            definition.unit,
            definition.min,
            definition.max
        );
    }
    Ok(())
}

/// Sites in a list from the API that are alive and have reported a healthy cluster.
fn complete_sites(list: &Value) -> usize {
    let complete = |site: &&Value| {
        site["status"]["state"] == "Alive"
            && site["status"]["backends"]["default"]["healthy"] == true
            && site["status"]["backends"]["default"]["kinds"] != 0
    };
    list["items"]
        .as_array()
        .map_or(0, |items| items.iter().filter(complete).count())
}

/// Groups of a node's status that have a leader and so many voters.
fn grown_groups(status: &Value, voters: usize) -> Vec<String> {
    let groups = status["groups"].as_array().into_iter().flatten();
    groups
        .filter(|group| {
            group["leader"].is_string() && group["voters"].as_array().map_or(0, Vec::len) == voters
        })
        .filter_map(|group| group["group"].as_str().map(ToOwned::to_owned))
        .collect()
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn metrics_are_checked_before_anybody_is_asked() {
        check_metric("carbon", 1200.0).unwrap();
        check_metric("pue", 1.2).unwrap();
        let text = check_metric("carbn", 1.0).unwrap_err().to_string();
        assert!(text.contains("did you mean `carbon`?"), "{text}");
        let text = check_metric("carbon", f64::NAN).unwrap_err().to_string();
        assert!(text.contains("usually 0 to 1000"), "{text}");
        assert!(check_metric("price", -0.1).is_err());
    }

    #[test]
    fn a_restart_does_not_change_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::new(dir.path()).unwrap();
        let options = UpOptions::new(dir.path()).sites(3).unwrap();
        let mut before = fresh(&directory, &options).unwrap();
        assert_eq!(before.sites.len(), 3);
        before.sites[0]
            .profile
            .metrics
            .insert("carbon".to_owned(), 7.0);
        before.sites[0].blocked.insert("paris".to_owned());
        let again = prepare(
            &directory,
            Some(before.clone()),
            &UpOptions::new(dir.path()),
        )
        .unwrap();
        assert_eq!(again.sites[0].profile.metrics["carbon"], 7.0);
        assert_eq!(again.sites[1].api_port, before.sites[1].api_port);
        assert!(again.sites[0].blocked.is_empty());
        let other = UpOptions::new(dir.path()).sites(4).unwrap();
        let error = prepare(&directory, Some(before.clone()), &other).unwrap_err();
        assert!(error.to_string().contains("has 3 sites, not 4"), "{error}");
        let real = UpOptions {
            kube: Some(KubeKind::Real),
            ..UpOptions::new(dir.path())
        };
        let error = prepare(&directory, Some(before), &real).unwrap_err();
        assert!(error.to_string().contains("--purge"), "{error}");
    }

    #[test]
    fn only_complete_sites_and_grown_groups_count() {
        let site = |state: &str, healthy: bool| json!({"status": {"state": state, "backends": {"default": {"healthy": healthy}}}});
        let list =
            json!({"items": [site("Alive", true), site("Alive", false), site("Lost", true), {}]});
        assert_eq!(complete_sites(&list), 1);
        let status = json!({"groups": [
            {"group": "meta", "leader": "a", "voters": ["a", "b", "c"]},
            {"group": "0", "leader": null, "voters": ["a", "b", "c"]},
            {"group": "1", "leader": "a", "voters": ["a"]},
        ]});
        assert_eq!(grown_groups(&status, 3), ["meta"]);
        assert_eq!(
            [voters_of(1), voters_of(2), voters_of(4), voters_of(100)],
            [1, 1, 3, 5]
        );
    }
}
