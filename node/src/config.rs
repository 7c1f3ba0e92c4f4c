//! The node's configuration: defaults < file < environment < flags, one TOML tree.
//!
//! Every key can be given three ways: in the file (`[site] name = "oslo"`), as an environment
//! variable (`KRAKE_SITE__NAME=oslo`) and as a flag (`--site.name oslo`). Values from environment
//! and flags are read as TOML and, where that fails, taken as text. Unknown keys are errors.

pub mod check;
pub mod sources;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use krake_model::member::Location;
use krake_model::resources::{parse_quantity, parse_quantity_millis};
use krake_model::{Resources, SiteRecord};
use serde::{Deserialize, Deserializer};
use thiserror::Error;
use toml::{Table, Value};

use self::sources::{key_of_variable, read_file, set};

/// How krake-node ends when its configuration is not valid; as krakectl does for manifests.
pub const EXIT_INVALID: u8 = 9;

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
