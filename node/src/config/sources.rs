//! File, environment variables and flags, merged into one tree of known keys.

use std::io::Read;
use std::path::Path;

use toml::{Table, Value};

use super::ConfigError;

/// A configuration file has at most this many bytes; a wrong path may lead to anything.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// A line of the file that is longer is not shown in an error.
const LINE_BYTES_MAX: usize = 240;
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

pub(super) fn read_file(path: &Path) -> Result<Table, ConfigError> {
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
pub(super) fn key_of_variable(name: &str) -> Option<String> {
    let rest = name.strip_prefix(ENV_PREFIX)?;
    let key = rest.to_ascii_lowercase().replace("__", ".");
    (rest.contains("__") || matches!(key.as_str(), "backends" | "metrics")).then_some(key)
}

pub(super) fn set(
    tree: &mut Table,
    key: &str,
    text: &str,
    origin: &str,
) -> Result<(), ConfigError> {
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
