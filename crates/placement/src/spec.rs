//! Checks an application's spec and fills in what it leaves open.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use krake_model::application::{ApplicationSpec, FailoverMode, MigrationStrategy};
use krake_model::metric::{DEFAULT_STICKINESS, MetricDefinition, default_weights};
use serde_json::Value;

use crate::constraint::{self, Constraint};
use crate::needs::{self, Needs};

/// An application has at most this many manifests,
pub const MANIFESTS_MAX: usize = 200;
/// and they have at most this many bytes as JSON.
pub const MANIFEST_BYTES_MAX: usize = 1024 * 1024;
/// Constraints of one application: each is evaluated for each site at each decision.
pub const REQUIRE_MAX: usize = 100;
/// An application that is wrong in more places than this is shown only the first of them.
pub const ERRORS_MAX: usize = 20;
/// Durations are at most a week.
const DURATION_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a node is configured to use where a spec is silent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defaults {
    /// Silence after which a site counts as lost.
    pub detect_after: Duration,
    /// Time a new copy may take to become ready.
    pub ready_timeout: Duration,
    /// Time between two looks at all sites.
    pub reschedule_interval: Duration,
    /// How long another site must have been better.
    pub hold_for: Duration,
    /// Older reports are not used.
    pub max_metric_age: Duration,
}

/// A spec's policy with nothing left open.
#[derive(Debug, Clone, PartialEq)]
pub struct ResolvedPolicy {
    /// All must hold.
    pub require: Vec<Constraint>,
    /// Weight of each metric; not negative, one at least above 0.
    pub weights: BTreeMap<String, f64>,
    /// Bonus of the current site, 0..=1.
    pub stickiness: f64,
    /// Older reports are not used.
    pub max_metric_age: Duration,
    /// Time between two looks at all sites.
    pub reschedule_interval: Duration,
    /// How long another site must have been better.
    pub hold_for: Duration,
    /// Whether it may move to a better site.
    pub migration_enabled: bool,
    /// New first or old first.
    pub migration_strategy: MigrationStrategy,
    /// Time a new copy may take to become ready.
    pub ready_timeout: Duration,
    /// Silence after which its site counts as lost.
    pub detect_after: Duration,
    /// Whether it then runs elsewhere.
    pub failover_mode: FailoverMode,
}

/// One thing that is wrong with a spec.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldError {
    /// Where, such as `spec.placement.require[0]`.
    pub path: String,
    /// What and what to do.
    pub message: String,
}

/// Kinds known to belong to a whole cluster. Sites refuse them by default; what is not listed the
/// site finds out from its cluster.
const CLUSTER_SCOPED: [(&str, &str); 24] = [
    ("", "Namespace"),
    ("", "Node"),
    ("", "PersistentVolume"),
    ("", "ComponentStatus"),
    (
        "admissionregistration.k8s.io",
        "MutatingWebhookConfiguration",
    ),
    ("admissionregistration.k8s.io", "ValidatingAdmissionPolicy"),
    (
        "admissionregistration.k8s.io",
        "ValidatingAdmissionPolicyBinding",
    ),
    (
        "admissionregistration.k8s.io",
        "ValidatingWebhookConfiguration",
    ),
    ("apiextensions.k8s.io", "CustomResourceDefinition"),
    ("apiregistration.k8s.io", "APIService"),
    ("certificates.k8s.io", "CertificateSigningRequest"),
    ("certificates.k8s.io", "ClusterTrustBundle"),
    ("flowcontrol.apiserver.k8s.io", "FlowSchema"),
    ("flowcontrol.apiserver.k8s.io", "PriorityLevelConfiguration"),
    ("networking.k8s.io", "IngressClass"),
    ("networking.k8s.io", "ServiceCIDR"),
    ("node.k8s.io", "RuntimeClass"),
    ("rbac.authorization.k8s.io", "ClusterRole"),
    ("rbac.authorization.k8s.io", "ClusterRoleBinding"),
    ("resource.k8s.io", "DeviceClass"),
    ("scheduling.k8s.io", "PriorityClass"),
    ("storage.k8s.io", "CSIDriver"),
    ("storage.k8s.io", "CSINode"),
    ("storage.k8s.io", "StorageClass"),
];

/// Whether a kind is known to belong to a whole cluster.
pub fn is_cluster_scoped(api_version: &str, kind: &str) -> bool {
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    CLUSTER_SCOPED.contains(&(group, kind))
}

/// Checks `spec` of an app in `namespace`; finds every error, not only the first.
///
/// # Errors
/// All that is wrong.
pub fn validate(
    spec: &ApplicationSpec,
    namespace: &str,
    definitions: &BTreeMap<String, MetricDefinition>,
    defaults: &Defaults,
) -> Result<(ResolvedPolicy, Needs), Vec<FieldError>> {
    let mut check = Check { errors: Vec::new() };
    check.manifests(&spec.source.manifests, namespace);
    let needs = needs::needs_of(&spec.source.manifests).unwrap_or_else(|errors| {
        for (path, message) in errors {
            check.error(path, message);
        }
        Needs::default()
    });
    let placement = spec.placement.clone().unwrap_or_default();
    let reschedule = placement.reschedule.clone().unwrap_or_default();
    let migration = spec.migration.clone().unwrap_or_default();
    let failover = spec.failover.clone().unwrap_or_default();
    let mut require = Vec::new();
    if placement.require.len() > REQUIRE_MAX {
        check.error(
            "spec.placement.require",
            format!(
                "an application has at most {REQUIRE_MAX} constraints, not {}; write `LABEL in (X, Y)` for several values of one label",
                placement.require.len()
            ),
        );
    }
    for (index, text) in placement.require.iter().take(REQUIRE_MAX).enumerate() {
        match constraint::parse(text, definitions) {
            Ok(constraint) => require.push(constraint),
            Err(error) => check.error(
                format!("spec.placement.require[{index}]"),
                error.to_string(),
            ),
        }
    }
    let policy = ResolvedPolicy {
        require,
        weights: check.weights(placement.weights, definitions),
        stickiness: check.stickiness(placement.stickiness),
        max_metric_age: check.duration(
            "spec.placement.maxMetricAge",
            placement.max_metric_age,
            defaults.max_metric_age,
            1,
        ),
        reschedule_interval: check.duration(
            "spec.placement.reschedule.interval",
            reschedule.interval,
            defaults.reschedule_interval,
            1,
        ),
        hold_for: check.duration(
            "spec.placement.reschedule.holdFor",
            reschedule.hold_for,
            defaults.hold_for,
            0,
        ),
        migration_enabled: migration.enabled.unwrap_or(true),
        migration_strategy: migration.strategy.unwrap_or_default(),
        ready_timeout: check.duration(
            "spec.migration.readyTimeout",
            migration.ready_timeout,
            defaults.ready_timeout,
            1,
        ),
        detect_after: check.duration(
            "spec.failover.detectAfter",
            failover.detect_after,
            defaults.detect_after,
            3,
        ),
        failover_mode: failover.mode.unwrap_or_default(),
    };
    if check.errors.is_empty() {
        Ok((policy, needs))
    } else {
        Err(shortened(check.errors))
    }
}

/// The first errors, and how many more there are: a program that writes nonsense must not get
/// megabytes back.
fn shortened(mut errors: Vec<FieldError>) -> Vec<FieldError> {
    let more = errors.len().saturating_sub(ERRORS_MAX);
    errors.truncate(ERRORS_MAX);
    if more > 0 {
        errors.push(FieldError {
            path: "spec".to_owned(),
            message: format!("{more} more places are wrong; mend these first"),
        });
    }
    errors
}

/// Whether Kubernetes takes `name` for an object of `group`: a DNS-1123 subdomain (RFC 1123 §2.1),
/// or, for the objects of access control, anything that can stand in a path.
fn is_object_name(group: &str, name: &str) -> bool {
    if name.len() > 253 {
        return false;
    }
    if group == "rbac.authorization.k8s.io" {
        let odd = |c: char| c.is_control() || c == '/' || c == '%';
        return !matches!(name, "." | "..") && !name.contains(odd);
    }
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    name.split('.').all(|label| {
        !label.is_empty()
            && label.chars().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    })
}

struct Check {
    errors: Vec<FieldError>,
}

const fn kind_of_value(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}

impl Check {
    fn error(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.errors.push(FieldError {
            path: path.into(),
            message: message.into(),
        });
    }

    fn duration(
        &mut self,
        path: &str,
        text: Option<String>,
        default: Duration,
        least_seconds: u64,
    ) -> Duration {
        let Some(text) = text else {
            return default;
        };
        let least = Duration::from_secs(least_seconds);
        match humantime::parse_duration(&text) {
            Ok(duration) if duration >= least && duration <= DURATION_MAX => duration,
            Ok(_) => {
                self.error(
                    path,
                    format!("`{text}` must be between {least_seconds}s and 7d"),
                );
                default
            }
            Err(error) => {
                let message = format!(
                    "`{text}` is not a duration ({error}); write for example 90s, 15m or 1h"
                );
                self.error(path, message);
                default
            }
        }
    }

    fn weights(
        &mut self,
        weights: Option<BTreeMap<String, f64>>,
        definitions: &BTreeMap<String, MetricDefinition>,
    ) -> BTreeMap<String, f64> {
        let Some(weights) = weights else {
            return default_weights();
        };
        for (name, weight) in &weights {
            let path = format!("spec.placement.weights.{name}");
            if !definitions.contains_key(name) {
                self.error(path, constraint::unknown_metric(name, definitions));
            } else if !(0.0..=1e6).contains(weight) {
                self.error(
                    path,
                    // `{:?}` writes 1e308 so, and not with 308 zeros.
                    format!("the weight {weight:?} must be between 0 and 1000000"),
                );
            }
        }
        if weights.values().sum::<f64>() <= 0.0 {
            self.error(
                "spec.placement.weights",
                "at least one weight must be above 0; leave weights out for the default",
            );
        }
        weights
    }

    fn stickiness(&mut self, stickiness: Option<f64>) -> f64 {
        let value = stickiness.unwrap_or(DEFAULT_STICKINESS);
        if !(0.0..=1.0).contains(&value) {
            self.error(
                "spec.placement.stickiness",
                format!("{value} must be between 0 and 1"),
            );
        }
        value
    }

    fn manifests(&mut self, manifests: &[Value], namespace: &str) {
        let path = "spec.source.manifests";
        if manifests.is_empty() || manifests.len() > MANIFESTS_MAX {
            let message = format!(
                "an application has 1 to {MANIFESTS_MAX} manifests, not {}",
                manifests.len()
            );
            self.error(path, message);
        }
        let bytes: usize = manifests.iter().map(|m| m.to_string().len()).sum();
        if bytes > MANIFEST_BYTES_MAX {
            self.error(
                path,
                format!(
                    "the manifests have {bytes} bytes together, the limit is {MANIFEST_BYTES_MAX}"
                ),
            );
        }
        let mut seen = BTreeSet::new();
        for (index, manifest) in manifests.iter().enumerate() {
            self.manifest(&format!("{path}[{index}]"), manifest, namespace, &mut seen);
        }
    }

    fn manifest(
        &mut self,
        path: &str,
        manifest: &Value,
        namespace: &str,
        seen: &mut BTreeSet<(String, String)>,
    ) {
        if !manifest.is_object() {
            self.error(
                path,
                "a manifest is a Kubernetes object with apiVersion, kind and metadata.name",
            );
            return;
        }
        let text = |pointer: &str| {
            manifest
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or("")
        };
        let (api, kind, name) = (text("/apiVersion"), text("/kind"), text("/metadata/name"));
        for (field, pointer, example) in [
            ("apiVersion", "/apiVersion", "apiVersion: apps/v1"),
            ("kind", "/kind", "kind: Deployment"),
            ("metadata.name", "/metadata/name", "metadata: {name: web}"),
        ] {
            let field_path = format!("{path}.{field}");
            match manifest.pointer(pointer) {
                Some(Value::String(text)) if !text.is_empty() => {}
                None | Some(Value::Null | Value::String(_)) => {
                    self.error(field_path, format!("is required, such as `{example}`"))
                }
                Some(other) => self.error(
                    field_path,
                    format!(
                        "must be a text, not {}; put it in quotes",
                        kind_of_value(other)
                    ),
                ),
            }
        }
        let group = api.split_once('/').map_or("", |(group, _)| group);
        if !name.is_empty() && !is_object_name(group, name) {
            self.error(
                format!("{path}.metadata.name"),
                "must be a name that Kubernetes takes: 1 to 253 lower-case letters, digits, `-` and `.`, with a letter or digit at both ends",
            );
        }
        if let Some(other) = manifest.pointer("/metadata/namespace")
            && other.as_str() != Some(namespace)
        {
            self.error(
                format!("{path}.metadata.namespace"),
                format!("is {other}, but the application is in `{namespace}`; leave it out"),
            );
        }
        if is_cluster_scoped(api, kind) {
            self.error(
                path,
                format!("{kind} belongs to a whole cluster; an application brings only objects in its namespace. Leave it out, and let the operators of the sites create it"),
            );
        }
        if kind.ends_with("List") && manifest.get("items").is_some() {
            self.error(
                path,
                "a list is not one object; write its items as manifests",
            );
        }
        if !name.is_empty() && !seen.insert((format!("{group}/{kind}"), name.to_owned())) {
            self.error(
                path,
                format!("{kind} `{name}` appears twice; leave one out, or rename it"),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use krake_model::metric::default_definitions;
    use serde_json::json;

    use super::*;

    fn defaults() -> Defaults {
        Defaults {
            detect_after: Duration::from_secs(15),
            ready_timeout: Duration::from_secs(300),
            reschedule_interval: Duration::from_secs(60),
            hold_for: Duration::from_secs(300),
            max_metric_age: Duration::from_secs(900),
        }
    }

    fn errors(spec: Value) -> Vec<FieldError> {
        let spec: ApplicationSpec = serde_json::from_value(spec).unwrap();
        validate(&spec, "shop", &default_definitions(), &defaults())
            .err()
            .unwrap_or_default()
    }

    fn manifest(name: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}})
    }

    #[test]
    fn a_plain_spec_is_good_and_gets_the_defaults() {
        let spec: ApplicationSpec =
            serde_json::from_value(json!({"source": {"manifests": [manifest("a")]}})).unwrap();
        let (policy, _) = validate(&spec, "shop", &default_definitions(), &defaults()).unwrap();
        assert_eq!(policy.detect_after, Duration::from_secs(15));
        assert_eq!(policy.weights, default_weights());
    }

    #[test]
    fn every_error_is_found_with_its_path() {
        let found = errors(json!({
            "source": {"manifests": [
                manifest("a"), manifest("a"), {"kind": "ConfigMap"}, 7,
                {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}},
                {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s", "namespace": "other"}}
            ]},
            "placement": {
                "require": ["country in (DE", "carbn < 4"],
                "weights": {"carbon": -1.0, "prize": 1.0},
                "stickiness": 7.0,
                "maxMetricAge": "soon"
            },
            "failover": {"detectAfter": "1s"}
        }));
        let paths: BTreeSet<&str> = found.iter().map(|error| error.path.as_str()).collect();
        for path in [
            "spec.source.manifests[1]",
            "spec.source.manifests[2].apiVersion",
            "spec.source.manifests[2].metadata.name",
            "spec.source.manifests[3]",
            "spec.source.manifests[4]",
            "spec.source.manifests[5].metadata.namespace",
            "spec.placement.require[0]",
            "spec.placement.require[1]",
            "spec.placement.weights.carbon",
            "spec.placement.weights.prize",
            "spec.placement.stickiness",
            "spec.placement.maxMetricAge",
            "spec.failover.detectAfter",
        ] {
            assert!(paths.contains(path), "{path} in {found:#?}");
        }
    }

    #[test]
    fn names_that_kubernetes_would_refuse_are_refused() {
        let named = |api: &str, name: Value| {
            let manifest = json!({"apiVersion": api, "kind": "Any", "metadata": {"name": name}});
            errors(json!({"source": {"manifests": [manifest]}}))
        };
        let rbac = "rbac.authorization.k8s.io/v1";
        for (api, name) in [("v1", "a.b-c.9"), (rbac, "system:Node")] {
            assert_eq!(named(api, name.into()), [], "{name}");
        }
        for (api, name) in [
            ("v1", json!("Settings")),
            ("v1", json!("a\u{1b}[31m")),
            ("v1", json!("a..b")),
            ("v1", json!("-a")),
            ("v1", json!("a".repeat(254))),
            ("v1", json!(5)),
            (rbac, json!("a/b")),
            (rbac, json!("..")),
        ] {
            let found = named(api, name.clone());
            assert_eq!(found.len(), 1, "{name}: {found:?}");
            assert_eq!(found[0].path, "spec.source.manifests[0].metadata.name");
        }
    }

    #[test]
    fn the_list_of_errors_and_of_constraints_is_bounded() {
        let found = errors(json!({"source": {"manifests": vec![json!({}); 20_000]}}));
        assert_eq!(found.len(), ERRORS_MAX + 1);
        assert!(
            found[ERRORS_MAX].message.contains("59981 more"),
            "{found:?}"
        );
        let found = errors(json!({
            "source": {"manifests": [manifest("a")]},
            "placement": {"require": vec!["carbon < 5"; REQUIRE_MAX + 1]},
        }));
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].message.contains("not 101"), "{found:?}");
    }
}
