//! The node's configuration: defaults < file < environment < flags, one TOML tree.
//!
//! Every key can be given three ways: in the file (`[site] name = "oslo"`), as an environment
//! variable (`KRAKE_SITE__NAME=oslo`) and as a flag (`--site.name oslo`). Values from environment
//! and flags are read as TOML and, where that fails, taken as text. Unknown keys are errors.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use krake_model::member::Location;
use krake_model::resources::{parse_quantity, parse_quantity_millis};
use krake_model::{Resources, SiteRecord};
use serde::{Deserialize, Deserializer};
use thiserror::Error;
use toml::{Table, Value};

/// How krake-node ends when its configuration is not valid; as krakectl does for manifests.
pub const EXIT_INVALID: u8 = 9;
/// A configuration file has at most this many bytes; a wrong path may lead to anything.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// A line of the file that is longer is not shown in an error.
const LINE_BYTES_MAX: usize = 240;
/// Text about the site or the federation has at most this many bytes.
const TEXT_BYTES_MAX: usize = 253;
/// No wait is longer than a week.
const DURATION_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// Prefix of environment variables.
const ENV_PREFIX: &str = "KRAKE_";

/// Every key, with what it is for: the source of flags, of `krake-node config keys` and of
/// suggestions for mistyped keys.
pub const KEYS: &[(&str, &str)] = &[
    (
        "site.name",
        "The site's name, unique in the federation (a DNS-1123 label)",
    ),
    ("site.operator", "The organisation that runs the site"),
    (
        "site.labels",
        "Labels that constraints see, as a TOML table",
    ),
    ("site.location.place", "City, for people"),
    ("site.location.country", "ISO 3166-1 alpha-2"),
    (
        "site.location.grid_zone",
        "Electricity grid zone, such as SE-SE3",
    ),
    ("site.location.latitude", "Degrees north"),
    ("site.location.longitude", "Degrees east"),
    (
        "node.data_dir",
        "Where the node keeps its key, its catalog and its assignments",
    ),
    ("node.log", "Log filter, such as info,krake_node=debug"),
    ("node.log_format", "text or json"),
    (
        "api.listen",
        "Loopback addresses of the API, as an array of IP:PORT",
    ),
    (
        "api.socket",
        "Path of the API's Unix socket (default: DATA_DIR/api.sock)",
    ),
    (
        "peers.listen",
        "IP:PORT for other nodes, QUIC (udp) and TCP on the same number",
    ),
    (
        "peers.advertise",
        "IP:PORT at which other nodes reach this one (default: peers.listen)",
    ),
    (
        "backends",
        "Array of {name, kubeconfig, context, namespace_template, cluster_scoped_kinds, denied_kinds}",
    ),
    (
        "metrics",
        "Raw values of the site's metrics, as a table: carbon, price, pue, erf, load, …",
    ),
    ("capacity.cpu", "Offer at most this much CPU (a quantity)"),
    (
        "capacity.memory",
        "Offer at most this much memory (a quantity)",
    ),
    ("capacity.pods", "Offer at most this many pods"),
    (
        "federation.name",
        "Name of a new federation (krake-node init)",
    ),
    (
        "federation.shards",
        "Shards of a new federation's catalog, for ever (krake-node init)",
    ),
    (
        "defaults.detect_after",
        "Silence after which a site counts as lost",
    ),
    (
        "defaults.ready_timeout",
        "Time a new copy may take to become ready",
    ),
    (
        "defaults.reschedule_interval",
        "Time between two looks at all sites for an app",
    ),
    (
        "defaults.hold_for",
        "How long another site must have been better before an app moves",
    ),
    (
        "defaults.max_metric_age",
        "Reports older than this are not used",
    ),
    (
        "limits.report_interval",
        "Time between two reports of this site",
    ),
    (
        "limits.reservation_ttl",
        "How long a reservation holds capacity",
    ),
    (
        "testnet.fault_injection",
        "Accept faults through the Unix socket: for krake-testnet only",
    ),
];

/// A configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not text, or more than will be read.
    #[error("the configuration {} {problem}", path.display())]
    NoText {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The file is no TOML.
    #[error("{}:{line}:{column}: {problem}{}", path.display(), shown.as_ref().map(|text| format!("\n  {text}\n  {:>1$}", "^", column)).unwrap_or_default())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// Why.
        problem: String,
        /// The line's text, unless it is long.
        shown: Option<String>,
    },
    /// A key is not one.
    #[error("unknown key `{key}` from {origin}{}", suggestion.as_ref().map(|s| format!("; did you mean `{s}`?")).unwrap_or_default())]
    UnknownKey {
        /// The key.
        key: String,
        /// File, environment variable or flag.
        origin: String,
        /// The nearest known key.
        suggestion: Option<String>,
    },
    /// A value does not fit its key.
    #[error("the configuration does not fit: {}", one_line(.0))]
    Value(Box<toml::de::Error>),
    /// A value parses but cannot be used.
    #[error("`{key}` {problem}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
}

/// The library tells the key on a line of its own, and calls an array a sequence.
fn one_line(error: &toml::de::Error) -> String {
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    lines.join(" ").replace(
        "expected a sequence",
        "expected an array, such as [\"127.0.0.1:7443\"],",
    )
}

/// The whole configuration.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Who and where the site is.
    pub site: SiteConfig,
    /// The process.
    pub node: NodeConfig,
    /// The HTTP API.
    pub api: ApiConfig,
    /// The network of nodes.
    pub peers: PeersConfig,
    /// What the site runs apps on.
    pub backends: Vec<BackendConfig>,
    /// Raw metric values, in the units of the federation's definitions.
    pub metrics: BTreeMap<String, f64>,
    /// Upper bounds of what is offered.
    pub capacity: CapacityConfig,
    /// Only read by `init`.
    pub federation: FederationConfig,
    /// Waits that applications may override.
    pub defaults: DefaultsConfig,
    /// Bounds and intervals.
    pub limits: LimitsConfig,
    /// For `krake-testnet`.
    pub testnet: TestnetConfig,
}

/// `[site]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SiteConfig {
    /// Unique name.
    pub name: String,
    /// The organisation.
    pub operator: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Where it is.
    pub location: LocationConfig,
}

/// `[site.location]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LocationConfig {
    /// City.
    pub place: String,
    /// ISO 3166-1 alpha-2.
    pub country: String,
    /// Electricity grid zone.
    pub grid_zone: String,
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
}

/// `[node]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NodeConfig {
    /// Data directory.
    pub data_dir: PathBuf,
    /// `tracing` filter.
    pub log: String,
    /// Form of the log.
    pub log_format: LogFormat,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// The gossip library warns of each message that is late; what is lost is made up for.
const LOG: &str = "info,libp2p_gossipsub=off,yamux=error";

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            data_dir: PathBuf::from("krake-data"),
            log: LOG.to_owned(),
            log_format: LogFormat::Text,
        }
    }
}

/// `[api]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApiConfig {
    /// Loopback addresses.
    pub listen: Vec<String>,
    /// Unix socket; `None` is `DATA_DIR/api.sock`.
    pub socket: Option<PathBuf>,
}

impl Default for ApiConfig {
    fn default() -> Self {
        Self {
            listen: vec!["127.0.0.1:7443".to_owned()],
            socket: None,
        }
    }
}

/// `[peers]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PeersConfig {
    /// Where other nodes reach this one.
    pub listen: Vec<String>,
    /// What other nodes are told, when it differs from `listen`.
    pub advertise: Vec<String>,
}

impl Default for PeersConfig {
    fn default() -> Self {
        Self {
            listen: vec!["0.0.0.0:7444".to_owned()],
            advertise: Vec::new(),
        }
    }
}

/// One of `[[backends]]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackendConfig {
    /// Its name; the first one is usually `default`.
    #[serde(default = "default_backend_name")]
    pub name: String,
    /// The kubeconfig; without it, `KUBECONFIG`, `~/.kube/config` or the pod's service account.
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
    /// The context in it.
    #[serde(default)]
    pub context: Option<String>,
    /// `{namespace}` is the federation namespace (DESIGN 13.9).
    #[serde(default = "default_namespace_template")]
    pub namespace_template: String,
    /// Cluster-scoped kinds (`group/Kind`) that the operator admits; none by default.
    #[serde(default)]
    pub cluster_scoped_kinds: Vec<String>,
    /// Kinds (`group/Kind`, or `Kind` for the core group) that the operator refuses.
    #[serde(default)]
    pub denied_kinds: Vec<String>,
}

fn default_backend_name() -> String {
    "default".to_owned()
}

fn default_namespace_template() -> String {
    "krake-{namespace}".to_owned()
}

/// `[capacity]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CapacityConfig {
    /// A quantity such as `64` or `500m`.
    pub cpu: Option<String>,
    /// A quantity such as `256Gi`.
    pub memory: Option<String>,
    /// A count.
    pub pods: Option<u64>,
}

/// `[federation]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FederationConfig {
    /// The name of a new federation.
    pub name: String,
    /// The number of shards of a new federation.
    pub shards: u16,
}

impl Default for FederationConfig {
    fn default() -> Self {
        Self {
            name: "krake".to_owned(),
            shards: 16,
        }
    }
}

/// `[defaults]`: production waits are calm (interface.md §4.1).
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DefaultsConfig {
    /// Silence after which a site counts as lost.
    #[serde(deserialize_with = "duration")]
    pub detect_after: Duration,
    /// Time a new copy may take to become ready.
    #[serde(deserialize_with = "duration")]
    pub ready_timeout: Duration,
    /// Time between two looks at all sites.
    #[serde(deserialize_with = "duration")]
    pub reschedule_interval: Duration,
    /// How long a gain must last.
    #[serde(deserialize_with = "duration")]
    pub hold_for: Duration,
    /// Reports older than this are not used.
    #[serde(deserialize_with = "duration")]
    pub max_metric_age: Duration,
}

impl Default for DefaultsConfig {
    fn default() -> Self {
        Self {
            detect_after: Duration::from_secs(15),
            ready_timeout: Duration::from_secs(300),
            reschedule_interval: Duration::from_secs(60),
            hold_for: Duration::from_secs(600),
            max_metric_age: Duration::from_secs(900),
        }
    }
}

/// `[limits]`.
#[derive(Clone, Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsConfig {
    /// Time between two reports when nothing changed.
    #[serde(deserialize_with = "duration")]
    pub report_interval: Duration,
    /// How long a reservation holds capacity.
    #[serde(deserialize_with = "duration")]
    pub reservation_ttl: Duration,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            report_interval: Duration::from_secs(5),
            reservation_ttl: Duration::from_secs(30),
        }
    }
}

/// `[testnet]`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TestnetConfig {
    /// Accept faults through the Unix socket.
    pub fault_injection: bool,
}

fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    humantime::parse_duration(&text).map_err(|error| {
        serde::de::Error::custom(format!(
            "`{text}` is not a duration such as 15s or 5m: {error}"
        ))
    })
}

impl Config {
    /// Merges file, environment and flags and checks the result.
    ///
    /// `environment` are all variables of the process; `flags` are (key, value) in order.
    ///
    /// # Errors
    /// See [`ConfigError`]: each says which key from where, and what to do.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
        flags: &[(String, String)],
    ) -> Result<Self, ConfigError> {
        let mut tree = match file {
            None => Table::new(),
            Some(path) => read_file(path)?,
        };
        for (name, value) in environment {
            if let Some(key) = key_of_variable(&name) {
                set(
                    &mut tree,
                    &key,
                    &value,
                    &format!("environment variable {name}"),
                )?;
            }
        }
        for (key, value) in flags {
            set(&mut tree, key, value, &format!("flag --{key}"))?;
        }
        let config: Self = Value::Table(tree)
            .try_into()
            .map_err(|e| ConfigError::Value(Box::new(e)))?;
        config.check()?;
        Ok(config)
    }

    /// Checks that the federation defines the metrics whose values the site gives.
    ///
    /// # Errors
    /// The first that it does not, with the likely one.
    pub fn check_metrics(
        &self,
        definitions: &BTreeMap<String, krake_model::MetricDefinition>,
    ) -> Result<(), ConfigError> {
        match self
            .metrics
            .keys()
            .find(|name| !definitions.contains_key(*name))
        {
            None => Ok(()),
            Some(name) => Err(ConfigError::Invalid {
                key: "metrics",
                problem: format!(
                    "has an {}",
                    krake_placement::constraint::unknown_metric(name, definitions)
                ),
            }),
        }
    }

    fn check_waits(&self) -> Result<(), ConfigError> {
        let (defaults, limits) = (&self.defaults, &self.limits);
        let tenth = Duration::from_millis(100);
        let seconds = Duration::from_secs;
        for (key, value, least) in [
            ("defaults.detect_after", defaults.detect_after, seconds(3)),
            ("defaults.ready_timeout", defaults.ready_timeout, seconds(1)),
            (
                "defaults.reschedule_interval",
                defaults.reschedule_interval,
                seconds(1),
            ),
            ("defaults.hold_for", defaults.hold_for, seconds(0)),
            (
                "defaults.max_metric_age",
                defaults.max_metric_age,
                seconds(1),
            ),
            ("limits.report_interval", limits.report_interval, tenth),
            ("limits.reservation_ttl", limits.reservation_ttl, seconds(1)),
        ] {
            if value < least || value > DURATION_MAX {
                return Err(ConfigError::Invalid {
                    key,
                    problem: format!(
                        "is {}: it must be between {} and 7days",
                        humantime::format_duration(value),
                        humantime::format_duration(least)
                    ),
                });
            }
        }
        Ok(())
    }

    /// What is told to the whole federation must be text that can be shown.
    fn check_texts(&self) -> Result<(), ConfigError> {
        let location = &self.site.location;
        for (key, text) in [
            ("federation.name", &self.federation.name),
            ("site.operator", &self.site.operator),
            ("site.location.place", &location.place),
            ("site.location.country", &location.country),
            ("site.location.grid_zone", &location.grid_zone),
        ] {
            if text.len() > TEXT_BYTES_MAX || text.contains(char::is_control) {
                return Err(ConfigError::Invalid {
                    key,
                    problem: format!(
                        "must have at most {TEXT_BYTES_MAX} bytes and no control characters"
                    ),
                });
            }
        }
        if self.federation.name.is_empty() {
            return Err(ConfigError::Invalid {
                key: "federation.name",
                problem: "must not be empty".to_owned(),
            });
        }
        for (key, degrees, most) in [
            ("site.location.latitude", location.latitude, 90.0),
            ("site.location.longitude", location.longitude, 180.0),
        ] {
            // Not a number is in no range.
            if !(-most..=most).contains(&degrees) {
                return Err(ConfigError::Invalid {
                    key,
                    problem: format!("is {degrees:?}: write degrees from -{most} to {most}"),
                });
            }
        }
        Ok(())
    }

    fn check(&self) -> Result<(), ConfigError> {
        let invalid = |key, problem: String| Err(ConfigError::Invalid { key, problem });
        if self.site.name.is_empty() {
            return invalid(
                "site.name",
                "is not set: give the site a name, such as `dresden`".into(),
            );
        }
        if !is_dns_label(&self.site.name) {
            return invalid(
                "site.name",
                format!(
                    "is `{}`: use a-z, 0-9 and `-`, at most 63 characters, starting and ending with a letter or digit",
                    self.site.name
                ),
            );
        }
        for address in &self.api.listen {
            let parsed: std::net::SocketAddr = match address.parse() {
                Ok(parsed) => parsed,
                Err(_) => {
                    return invalid(
                        "api.listen",
                        format!("has `{address}`: write IP:PORT, such as 127.0.0.1:7443"),
                    );
                }
            };
            if !parsed.ip().is_loopback() {
                return invalid(
                    "api.listen",
                    format!(
                        "has `{address}`: the API has no TLS yet and listens on loopback addresses only"
                    ),
                );
            }
        }
        if self.peers.listen.is_empty() {
            return invalid(
                "peers.listen",
                "is empty: other nodes must be able to reach this one; write [\"0.0.0.0:7444\"]"
                    .into(),
            );
        }
        for address in self.peers.listen.iter().chain(&self.peers.advertise) {
            if address.parse::<std::net::SocketAddr>().is_err() {
                return invalid(
                    "peers.listen",
                    format!("has `{address}`: write IP:PORT, such as 0.0.0.0:7444"),
                );
            }
        }
        if let Some((name, _)) = self.metrics.iter().find(|(_, value)| !value.is_finite()) {
            return invalid(
                "metrics",
                format!("has `{name}`, which is not a finite number"),
            );
        }
        let mut names = std::collections::BTreeSet::new();
        for backend in &self.backends {
            if !names.insert(&backend.name) {
                return invalid("backends", format!("has `{}` twice", backend.name));
            }
            if !backend.namespace_template.contains("{namespace}") {
                return invalid(
                    "backends",
                    format!(
                        "`{}`: namespace_template must contain {{namespace}}",
                        backend.name
                    ),
                );
            }
        }
        if self.federation.shards == 0
            || u32::from(self.federation.shards) + 1 > krake_model::Revision::GROUPS_MAX
        {
            return invalid("federation.shards", "must be between 1 and 1023".into());
        }
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&self.node.log) {
            return invalid(
                "node.log",
                format!(
                    "is `{}`, which is no filter such as info,krake_node=debug: {error}",
                    self.node.log
                ),
            );
        }
        self.check_waits()?;
        self.check_texts()?;
        self.capacity_limit().map(|_| ())
    }

    /// The upper bound of what is offered; `u64::MAX` where nothing is set.
    ///
    /// # Errors
    /// When a quantity cannot be read.
    pub fn capacity_limit(&self) -> Result<Resources, ConfigError> {
        let read = |key, text: &Option<String>, parse: fn(&str) -> Result<u64, krake_model::resources::ParseQuantityError>| match text {
            None => Ok(u64::MAX),
            Some(text) => parse(text).map_err(|error| {
                ConfigError::Invalid { key, problem: format!("is not usable: {error}") }
            }),
        };
        Ok(Resources {
            cpu_millis: read("capacity.cpu", &self.capacity.cpu, parse_quantity_millis)?,
            memory_bytes: read("capacity.memory", &self.capacity.memory, parse_quantity)?,
            pods: self.capacity.pods.unwrap_or(u64::MAX),
        })
    }

    /// The site as it is told to the federation.
    pub fn site_record(&self) -> SiteRecord {
        let location = &self.site.location;
        SiteRecord {
            name: self.site.name.clone(),
            operator: if self.site.operator.is_empty() {
                self.site.name.clone()
            } else {
                self.site.operator.clone()
            },
            location: Location {
                place: location.place.clone(),
                country: location.country.clone(),
                grid_zone: location.grid_zone.clone(),
                latitude: location.latitude,
                longitude: location.longitude,
            },
            labels: self.site.labels.clone(),
        }
    }

    /// The API's Unix socket.
    pub fn socket_path(&self) -> PathBuf {
        self.api
            .socket
            .clone()
            .unwrap_or_else(|| self.node.data_dir.join("api.sock"))
    }

    /// Where other nodes reach this one.
    pub fn advertised(&self) -> &[String] {
        if self.peers.advertise.is_empty() {
            &self.peers.listen
        } else {
            &self.peers.advertise
        }
    }
}

/// Whether `name` is a DNS-1123 label (RFC 1123 §2.1 as Kubernetes uses it).
pub fn is_dns_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let read = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let no_text = |problem: String| ConfigError::NoText {
        path: path.to_owned(),
        problem,
    };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(read)?;
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(no_text(format!(
            "has more than {FILE_BYTES_MAX} bytes; is it the right file?"
        )));
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| no_text("is not UTF-8 text; is it the right file?".to_owned()))?;
    let table: Table = text
        .parse()
        .map_err(|error: toml::de::Error| syntax(path, &text, &error))?;
    check_keys(&table, "", &path.display().to_string())?;
    Ok(table)
}

/// An error of the grammar with its place.
fn syntax(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start);
    let before = text.get(..at).unwrap_or(text);
    let start = before.rfind('\n').map_or(0, |at| at + 1);
    let line = text[start..].lines().next().unwrap_or_default();
    ConfigError::Syntax {
        path: path.to_owned(),
        line: before.matches('\n').count() + 1,
        column: before[start..].chars().count() + 1,
        problem: error.message().replace('\n', ", "),
        shown: (line.len() <= LINE_BYTES_MAX).then(|| line.to_owned()),
    }
}

/// Refuses keys that no entry of [`KEYS`] names, so that the message can suggest one.
fn check_keys(table: &Table, prefix: &str, origin: &str) -> Result<(), ConfigError> {
    for (name, value) in table {
        let key = if prefix.is_empty() {
            name.clone()
        } else {
            format!("{prefix}.{name}")
        };
        if is_leaf(&key) {
            continue;
        }
        let is_section = KEYS
            .iter()
            .any(|(known, _)| known.starts_with(&format!("{key}.")));
        match value {
            Value::Table(inner) if is_section => check_keys(inner, &key, origin)?,
            _ => return Err(unknown(&key, origin)),
        }
    }
    Ok(())
}

/// Whether `key` is a whole key, or lies inside one that holds a table (`metrics.carbon`).
fn is_leaf(key: &str) -> bool {
    KEYS.iter().any(|(known, _)| {
        key == *known
            || (matches!(*known, "metrics" | "site.labels")
                && key.starts_with(&format!("{known}.")))
    })
}

fn unknown(key: &str, origin: &str) -> ConfigError {
    // Sections count too: a mistyped one is not near to any whole key.
    let sections = KEYS
        .iter()
        .filter_map(|(known, _)| known.rsplit_once('.').map(|(section, _)| section));
    let suggestion = KEYS
        .iter()
        .map(|(known, _)| *known)
        .chain(sections)
        .map(|known| (strsim::damerau_levenshtein(known, key), known))
        .min()
        .filter(|(distance, known)| *distance <= (known.len() / 3).clamp(1, 3))
        .map(|(_, known)| known.to_owned());
    ConfigError::UnknownKey {
        key: key.to_owned(),
        origin: origin.to_owned(),
        suggestion,
    }
}

/// `KRAKE_SITE__NAME` → `site.name`. Variables of krakectl (`KRAKE_SERVER`, …) have no `__` and
/// are not ours, apart from whole sections given as TOML (`KRAKE_BACKENDS`, `KRAKE_METRICS`).
fn key_of_variable(name: &str) -> Option<String> {
    let rest = name.strip_prefix(ENV_PREFIX)?;
    let key = rest.to_ascii_lowercase().replace("__", ".");
    (rest.contains("__") || matches!(key.as_str(), "backends" | "metrics")).then_some(key)
}

fn set(tree: &mut Table, key: &str, text: &str, origin: &str) -> Result<(), ConfigError> {
    if !is_leaf(key) {
        return Err(unknown(key, origin));
    }
    // `x = TEXT` as TOML gives numbers, booleans, arrays and tables their types.
    let value = format!("x = {text}")
        .parse::<Table>()
        .ok()
        .and_then(|mut table| table.remove("x"))
        .unwrap_or_else(|| Value::String(text.to_owned()));
    let value = if matches!(key, "site.name" | "capacity.cpu" | "capacity.memory") {
        Value::String(
            value
                .as_str()
                .map_or_else(|| text.to_owned(), str::to_owned),
        )
    } else {
        value
    };
    let mut parts: Vec<&str> = key.split('.').collect();
    let Some(last) = parts.pop() else {
        return Err(unknown(key, origin));
    };
    let mut table = tree;
    for part in parts {
        let entry = table
            .entry(part.to_owned())
            .or_insert_with(|| Value::Table(Table::new()));
        match entry {
            Value::Table(inner) => table = inner,
            _ => return Err(unknown(key, origin)),
        }
    }
    table.insert(last.to_owned(), value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[test]
    fn flags_win_over_environment_and_environment_over_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.toml");
        std::fs::write(
            &file,
            "[site]\nname = \"file\"\noperator = \"file\"\n[site.location]\nplace = \"file\"\n",
        )
        .unwrap();
        let config = Config::load(
            Some(&file),
            variables(&[
                ("KRAKE_SITE__NAME", "env"),
                ("KRAKE_SITE__OPERATOR", "env"),
                ("KRAKE_SERVER", "x"),
            ]),
            &variables(&[
                ("site.name", "flag"),
                ("metrics.carbon", "21.5"),
                ("capacity.cpu", "4"),
            ]),
        )
        .unwrap();
        assert_eq!(config.site.name, "flag");
        assert_eq!(config.site.operator, "env");
        assert_eq!(config.site.location.place, "file");
        assert_eq!(config.metrics["carbon"], 21.5);
        assert_eq!(config.capacity_limit().unwrap().cpu_millis, 4000);
    }

    #[test]
    fn bad_configurations_say_what_to_do() {
        let error = |flags: &[(&str, &str)]| {
            Config::load(None, vec![], &variables(flags))
                .unwrap_err()
                .to_string()
        };
        assert!(error(&[]).contains("site.name"));
        assert!(error(&[("site.nmae", "x")]).contains("did you mean `site.name`?"));
        assert!(error(&[("site.name", "Bad_Name")]).contains("a-z"));
        assert!(
            error(&[("site.name", "a"), ("api.listen", "[\"0.0.0.0:1\"]")]).contains("loopback")
        );
        assert!(error(&[("site.name", "a"), ("defaults.hold_for", "soon")]).contains("duration"));
        assert!(error(&[("site.name", "a"), ("capacity.memory", "lots")]).contains("quantity"));
        for (key, value, says) in [
            ("defaults.detect_after", "0s", "between 3s and 7days"),
            ("limits.report_interval", "0s", "between 100ms and 7days"),
            ("limits.reservation_ttl", "100000h", "between 1s and 7days"),
            ("site.location.latitude", "91", "from -90 to 90"),
            ("site.location.longitude", "nan", "from -180 to 180"),
            ("federation.name", "a\u{1b}[31m", "no control characters"),
            ("peers.listen", "[]", "0.0.0.0:7444"),
            ("api.listen", "127.0.0.1:1", "expected an array"),
            ("node.log", "a=b=c", "no filter"),
            ("metrics.carbon", "inf", "finite"),
        ] {
            let text = error(&[("site.name", "a"), (key, value)]);
            assert!(
                text.contains(says) && text.contains(key.split('.').next().unwrap()),
                "{key}: {text}"
            );
        }
    }

    #[test]
    fn files_that_are_no_configuration_say_where_and_why() {
        let dir = tempfile::tempdir().unwrap();
        let error = |bytes: &[u8]| {
            let file = dir.path().join("node.toml");
            std::fs::write(&file, bytes).unwrap();
            Config::load(Some(&file), vec![], &[])
                .unwrap_err()
                .to_string()
        };
        let text = error(b"[site]\nname = \"a\"\nname = \"b\"\n");
        assert!(
            text.contains("node.toml:3:1: duplicate key\n  name = \"b\"\n  ^"),
            "{text}"
        );
        assert!(error(b"[sitte]\nname = 1\n").contains("did you mean `site`?"));
        assert!(error(&[0xff, 0xfe, 0]).contains("not UTF-8"));
        assert!(error(&vec![b'#'; 2 << 20]).contains("1048576 bytes"));
        let long = error(format!("[site]\nname = \"{}\n", "x".repeat(400_000)).as_bytes());
        assert!(long.len() < 300 && long.contains("node.toml:2:"), "{long}");
    }

    #[test]
    fn a_metric_the_federation_does_not_define_is_refused() {
        let config = Config {
            metrics: [("carbn".to_owned(), 5.0)].into(),
            ..Config::default()
        };
        let definitions = krake_model::metric::default_definitions();
        let text = config.check_metrics(&definitions).unwrap_err().to_string();
        assert!(text.contains("unknown metric `carbn`"), "{text}");
        assert!(text.contains("Did you mean `carbon`"), "{text}");
    }
}
