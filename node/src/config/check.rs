//! What makes a configuration that can be read one that can be used.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use super::{Config, ConfigError};

/// Text about the site or the federation has at most this many bytes.
const TEXT_BYTES_MAX: usize = 253;
/// No wait is longer than a week.
const DURATION_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

impl Config {
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

    pub(super) fn check(&self) -> Result<(), ConfigError> {
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
            let parsed: SocketAddr = match address.parse() {
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
            if address.parse::<SocketAddr>().is_err() {
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
        let mut names = BTreeSet::new();
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
}

/// Whether `name` is a DNS-1123 label (RFC 1123 §2.1 as Kubernetes uses it).
pub fn is_dns_label(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=63).contains(&name.len())
        && name.bytes().all(inner)
        && !name.starts_with('-')
        && !name.ends_with('-')
}
