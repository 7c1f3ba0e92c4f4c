//! What is on disk of a testnet: its directory and `state.json`.
//!
//! ```text
//! DIR/state.json        what runs, with pids and start times; what faults are on
//! DIR/lock              held while state.json is changed
//! DIR/krakectl.toml     context `testnet` for krakectl
//! DIR/sites/NAME/       node.toml, node.log, api.kubeconfig, data/ (of the node), cluster/
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use crate::process::{ProcessId, write_private};
use crate::profile::Profile;

const FORMAT: u32 = 1;
/// A Unix socket's path has at most 107 bytes (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// What a site's apps run on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum KubeKind {
    /// A Kubernetes API in memory; needs nothing but this program.
    #[default]
    Embedded,
    /// A real control plane with simulated kubelets.
    Real,
}

impl std::fmt::Display for KubeKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Embedded => "embedded",
            Self::Real => "real",
        })
    }
}

/// What was last asked of a site.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wish {
    /// Nothing yet, or it was stopped.
    #[default]
    Stopped,
    /// It runs.
    Running,
    /// `chaos kill`.
    Killed,
    /// `chaos kill --node-only`.
    NodeKilled,
    /// `chaos pause`.
    Paused,
}

/// A process of a site's cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// Such as `kube-apiserver`.
    pub name: String,
    /// The process.
    pub process: ProcessId,
}

/// One site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteState {
    /// What it is like; metrics as changed by `chaos metric`.
    pub profile: Profile,
    /// Port of the node's API.
    pub api_port: u16,
    /// Port for other nodes.
    pub peer_port: u16,
    /// Port of the embedded cluster.
    pub cluster_port: u16,
    /// What was last asked of it.
    pub wish: Wish,
    /// The node's process, as last started.
    pub node: Option<ProcessId>,
    /// The cluster's processes, as last started.
    pub cluster: Vec<Component>,
    /// Sites it does not hear and does not speak to.
    pub blocked: BTreeSet<String>,
}

impl SiteState {
    /// All its processes that are alive.
    pub fn alive(&self) -> Vec<ProcessId> {
        let cluster = self.cluster.iter().map(|component| component.process);
        self.node
            .into_iter()
            .chain(cluster)
            .filter(|process| process.is_alive())
            .collect()
    }

    /// The cluster's processes that are alive.
    pub fn cluster_alive(&self) -> Vec<ProcessId> {
        let cluster = self.cluster.iter().map(|component| component.process);
        cluster.filter(|process| process.is_alive()).collect()
    }

    /// Whether its node runs.
    pub fn node_alive(&self) -> bool {
        self.node.is_some_and(ProcessId::is_alive)
    }
}

/// All that is remembered of a testnet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    format: u32,
    /// What the sites' apps run on.
    pub kube: KubeKind,
    /// Shards of the catalog.
    pub shards: u16,
    /// Configuration of all nodes that differs from the testnet's, by key.
    pub settings: BTreeMap<String, String>,
    /// The sites; the first one is the founder.
    pub sites: Vec<SiteState>,
    /// Who starts it, or stays in the foreground with it.
    pub holder: Option<ProcessId>,
}

impl State {
    /// A testnet that has not started yet.
    pub const fn new(
        kube: KubeKind,
        shards: u16,
        settings: BTreeMap<String, String>,
        sites: Vec<SiteState>,
    ) -> Self {
        Self {
            format: FORMAT,
            kube,
            shards,
            settings,
            sites,
            holder: None,
        }
    }

    /// How many sites there are.
    pub fn site_count(&self) -> u32 {
        u32::try_from(self.sites.len()).unwrap_or(u32::MAX)
    }

    /// The names of all sites.
    pub fn names(&self) -> Vec<&str> {
        self.sites
            .iter()
            .map(|site| site.profile.name.as_str())
            .collect()
    }

    /// The site of this name.
    ///
    /// # Errors
    /// When there is none: with the nearest name and the list of all.
    pub fn site(&self, name: &str) -> anyhow::Result<&SiteState> {
        let found = self.sites.iter().find(|site| site.profile.name == name);
        found.ok_or_else(|| unknown("site", name, &self.names()))
    }

    /// As [`State::site`], to change it.
    ///
    /// # Errors
    /// As there.
    pub fn site_mut(&mut self, name: &str) -> anyhow::Result<&mut SiteState> {
        let error = unknown("site", name, &self.names());
        let found = self.sites.iter_mut().find(|site| site.profile.name == name);
        found.ok_or(error)
    }

    /// All nodes that are alive.
    pub fn nodes_alive(&self) -> Vec<ProcessId> {
        let nodes = self.sites.iter().filter_map(|site| site.node);
        nodes.filter(|node| node.is_alive()).collect()
    }

    /// All processes that are alive.
    pub fn alive(&self) -> Vec<ProcessId> {
        self.sites.iter().flat_map(SiteState::alive).collect()
    }
}

/// An error for a name that is not one.
pub fn unknown(what: &str, name: &str, known: &[&str]) -> anyhow::Error {
    let nearest = known
        .iter()
        .map(|known| {
            (
                strsim::damerau_levenshtein(known, &name.to_lowercase()),
                known,
            )
        })
        .min()
        .filter(|(distance, known)| *distance <= known.len() / 3 + 1)
        .map_or_else(
            || ".".to_owned(),
            |(_, known)| format!("; did you mean `{known}`?"),
        );
    let shown: Vec<&str> = known.iter().copied().take(30).collect();
    let more = if known.len() > shown.len() {
        ", …"
    } else {
        ""
    };
    anyhow::anyhow!(
        "there is no {what} `{name}`{nearest} There are: {}{more}",
        shown.join(", ")
    )
}

/// The directory of a testnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory {
    path: PathBuf,
}

impl Directory {
    /// A directory, which need not exist yet.
    ///
    /// # Errors
    /// When the current directory is not known.
    pub fn new(path: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            path: std::path::absolute(path)?,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes it (mode 0700).
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(&self, site: Option<&str>) -> anyhow::Result<()> {
        let path = site.map_or_else(|| self.path.clone(), |site| self.site(site));
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot create {}", path.display()))
    }

    /// A site's directory.
    pub fn site(&self, site: &str) -> PathBuf {
        self.path.join("sites").join(site)
    }

    /// The data directory of a site's node.
    pub fn data(&self, site: &str) -> PathBuf {
        self.site(site).join("data")
    }

    /// The configuration of a site's node.
    pub fn node_config(&self, site: &str) -> PathBuf {
        self.site(site).join("node.toml")
    }

    /// The log of a site's node.
    pub fn node_log(&self, site: &str) -> PathBuf {
        self.site(site).join("node.log")
    }

    /// kubectl's way to a site's node.
    pub fn api_kubeconfig(&self, site: &str) -> PathBuf {
        self.site(site).join("api.kubeconfig")
    }

    /// A site's cluster.
    pub fn cluster(&self, site: &str) -> PathBuf {
        self.site(site).join("cluster")
    }

    /// kubectl's way to a site's cluster.
    pub fn kubeconfig(&self, site: &str) -> PathBuf {
        self.cluster(site).join("kubeconfig")
    }

    /// krakectl's contexts.
    pub fn contexts(&self) -> PathBuf {
        self.path.join("krakectl.toml")
    }

    /// The admin token, which `founder` holds.
    pub fn token(&self, founder: &str) -> PathBuf {
        self.data(founder).join("admin.token")
    }

    /// The Unix socket of a site's node: in its data directory where the path is short enough.
    pub fn socket(&self, site: &str) -> PathBuf {
        let near = self.data(site).join("api.sock");
        if near.as_os_str().len() <= SOCKET_PATH_MAX {
            return near;
        }
        let hash = blake3::hash(self.path.as_os_str().as_encoded_bytes()).to_hex();
        self.far_sockets(&hash[..16]).join(format!("{site}.sock"))
    }

    #[allow(
        clippy::unused_self,
        reason = "it reads as what belongs to the directory"
    )]
    fn far_sockets(&self, hash: &str) -> PathBuf {
        std::env::temp_dir().join(format!("krake-testnet-{hash}"))
    }

    /// Makes what the sockets lie in.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_socket_directory(&self, site: &str) -> anyhow::Result<()> {
        let socket = self.socket(site);
        let Some(parent) = socket.parent() else {
            return Ok(());
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(parent)
            .with_context(|| format!("cannot create {}", parent.display()))
    }

    fn state_path(&self) -> PathBuf {
        self.path.join("state.json")
    }

    /// The state; `None` when there never was a testnet here.
    ///
    /// # Errors
    /// When it is damaged, of another format, or cannot be read.
    pub fn load(&self) -> anyhow::Result<Option<State>> {
        let path = self.state_path();
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let state: State = serde_json::from_slice(&bytes).with_context(|| {
            format!(
                "{} is damaged or of another version; remove {} and start anew",
                path.display(),
                self.path.display()
            )
        })?;
        if state.format != FORMAT {
            bail!(
                "{} has format {}, this program knows {FORMAT}; remove {} and start anew",
                path.display(),
                state.format,
                self.path.display()
            );
        }
        Ok(Some(state))
    }

    /// As [`Directory::load`], where there must be one.
    ///
    /// # Errors
    /// When there is none.
    pub fn require(&self) -> anyhow::Result<State> {
        self.load()?.with_context(|| {
            format!(
                "there is no testnet in {}: start one with krake-testnet up, or say where it is with --dir",
                self.path.display()
            )
        })
    }

    fn lock(&self) -> anyhow::Result<Flock<File>> {
        let path = self.path.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| anyhow::anyhow!("cannot lock {}: {error}", path.display()))
    }

    /// Changes the state; nobody else can in between.
    ///
    /// # Errors
    /// When there is none, `change` fails, or it cannot be written.
    pub fn update<T>(
        &self,
        change: impl FnOnce(&mut State) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let _lock = self.lock()?;
        let mut state = self.require()?;
        let result = change(&mut state)?;
        self.write(&state)?;
        Ok(result)
    }

    /// Takes the directory for a new start; `prepare` gets the state so far and says the new one.
    ///
    /// # Errors
    /// When a testnet runs here, or `prepare` fails.
    pub fn claim(
        &self,
        prepare: impl FnOnce(Option<State>) -> anyhow::Result<State>,
    ) -> anyhow::Result<State> {
        self.create(None)?;
        let _lock = self.lock()?;
        let before = self.load()?;
        if before.is_none() && !self.is_empty()? {
            bail!(
                "{} is not empty and holds no testnet: give this one another --dir",
                self.path.display()
            );
        }
        if let Some(state) = &before {
            let alive = state.alive().len();
            let held = state.holder.is_some_and(ProcessId::is_alive);
            if alive > 0 || held {
                bail!(
                    "a testnet is running in {} ({} sites, {alive} processes): stop it with krake-testnet down, look at it with krake-testnet status, or give this one another --dir",
                    self.path.display(),
                    state.sites.len()
                );
            }
        }
        let mut state = prepare(before)?;
        state.holder = ProcessId::of(std::process::id());
        self.write(&state)?;
        Ok(state)
    }

    fn is_empty(&self) -> anyhow::Result<bool> {
        let entries = std::fs::read_dir(&self.path)
            .with_context(|| format!("cannot read {}", self.path.display()))?;
        for entry in entries {
            if entry?.file_name() != "lock" {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn write(&self, state: &State) -> anyhow::Result<()> {
        write_private(&self.state_path(), &serde_json::to_vec_pretty(state)?)
    }

    /// Removes everything.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self) -> anyhow::Result<()> {
        let hash = blake3::hash(self.path.as_os_str().as_encoded_bytes()).to_hex();
        for path in [self.far_sockets(&hash[..16]), self.path.clone()] {
            match std::fs::remove_dir_all(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::profiles;

    fn state() -> State {
        let sites = profiles(3)
            .into_iter()
            .map(|profile| SiteState {
                profile,
                api_port: 1,
                peer_port: 2,
                cluster_port: 3,
                wish: Wish::Stopped,
                node: None,
                cluster: Vec::new(),
                blocked: BTreeSet::new(),
            })
            .collect();
        State::new(KubeKind::Embedded, 16, BTreeMap::new(), sites)
    }

    #[test]
    fn the_state_is_kept_and_private() {
        use std::os::unix::fs::PermissionsExt;
        let temporary = tempfile::tempdir().unwrap();
        let directory = Directory::new(&temporary.path().join("net")).unwrap();
        assert!(
            directory
                .require()
                .unwrap_err()
                .to_string()
                .contains("krake-testnet up")
        );
        directory
            .claim(|before| {
                assert_eq!(before, None);
                Ok(state())
            })
            .unwrap();
        directory
            .update(|state| {
                state.holder = None;
                state
                    .site_mut("paris")?
                    .blocked
                    .insert("dresden".to_owned());
                Ok(())
            })
            .unwrap();
        let kept = directory.require().unwrap();
        assert!(kept.site("paris").unwrap().blocked.contains("dresden"));
        let mode = |path: PathBuf| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(directory.state_path()), 0o600);
        assert_eq!(mode(directory.path().to_owned()), 0o700);
        directory.remove().unwrap();
        assert!(!directory.path().exists());
    }

    #[test]
    fn a_directory_in_use_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = Directory::new(temporary.path()).unwrap();
        directory.claim(|_| Ok(state())).unwrap();
        // The holder is this test itself.
        let error = directory.claim(|_| Ok(state())).unwrap_err().to_string();
        assert!(error.contains("is running in"), "{error}");
        directory
            .update(|state| {
                state.holder = None;
                let own = ProcessId::of(std::process::id());
                state.site_mut("paris")?.node = own;
                Ok(())
            })
            .unwrap();
        let error = directory.claim(|_| Ok(state())).unwrap_err().to_string();
        assert!(error.contains("1 processes"), "{error}");
        // The same pid with another start time is somebody else.
        directory
            .update(|state| {
                let node = &mut state.site_mut("paris")?.node;
                *node = node.map(|node| ProcessId {
                    start_ticks: node.start_ticks + 1,
                    ..node
                });
                Ok(())
            })
            .unwrap();
        directory.claim(|before| Ok(before.unwrap())).unwrap();
    }

    #[test]
    fn a_directory_with_other_things_is_left_alone() {
        let temporary = tempfile::tempdir().unwrap();
        std::fs::write(temporary.path().join("thesis.tex"), "").unwrap();
        let directory = Directory::new(temporary.path()).unwrap();
        let error = directory.claim(|_| Ok(state())).unwrap_err().to_string();
        assert!(error.contains("is not empty"), "{error}");
    }

    #[test]
    fn a_damaged_state_says_what_to_do() {
        let temporary = tempfile::tempdir().unwrap();
        let directory = Directory::new(temporary.path()).unwrap();
        std::fs::write(directory.state_path(), "{").unwrap();
        let error = directory.require().unwrap_err().to_string();
        assert!(error.contains("start anew"), "{error}");
    }

    #[test]
    fn unknown_names_get_a_suggestion_and_the_list() {
        let text = state().site("Pariss").unwrap_err().to_string();
        assert!(text.contains("did you mean `paris`?"), "{text}");
        assert!(text.contains("dresden, stockholm, paris"), "{text}");
        let text = state().site("x").unwrap_err().to_string();
        assert!(!text.contains("did you mean"), "{text}");
    }

    #[test]
    fn a_deep_directory_has_its_sockets_elsewhere() {
        let near = Directory::new(Path::new("/tmp/net")).unwrap();
        assert_eq!(
            near.socket("paris"),
            Path::new("/tmp/net/sites/paris/data/api.sock")
        );
        let deep = Directory::new(&Path::new("/tmp").join("d".repeat(90))).unwrap();
        let socket = deep.socket("paris");
        assert!(
            socket.as_os_str().len() <= SOCKET_PATH_MAX,
            "{}",
            socket.display()
        );
        assert_ne!(socket, deep.socket("dresden"));
    }
}
