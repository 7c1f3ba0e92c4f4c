//! The Application: what a user asks for, and what the federation says of it.
//!
//! The types accept exactly what is implemented (DESIGN 13.15): any other field is an error.
//! They live in JSON (the API) and never in bincode directly.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::epoch::Epoch;
use crate::ids::AppUid;
use crate::time::Timestamp;

/// `namespace/name` of an application: for people; the identity is [`AppUid`].
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AppKey {
    /// The federation namespace.
    pub namespace: String,
    /// The name in it.
    pub name: String,
}

impl AppKey {
    /// Joins both parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for AppKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// `spec` of an Application.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApplicationSpec {
    /// What runs.
    pub source: Source,
    /// Where it may and should run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<PlacementSpec>,
    /// How it moves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationSpec>,
    /// What happens when its site is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failover: Option<FailoverSpec>,
}

/// Where the manifests come from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Source {
    /// Kubernetes objects, in the order given; one atomic list for server-side apply.
    pub manifests: Vec<Value>,
}

/// `spec.placement`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct PlacementSpec {
    /// Hard constraints in Krake's grammar, over labels (`location in (DE, SE)`) and raw metric
    /// values (`carbon <= 400`); all must hold.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub require: Vec<String>,
    /// Weight of each metric in the score; replaces the federation's default weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<BTreeMap<String, f64>>,
    /// How much better (0..=1, in score) another site must be before the app moves there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stickiness: Option<f64>,
    /// Sites whose report is older are not considered (a duration such as `15m`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_metric_age: Option<String>,
    /// How often a better site is looked for, and how long a gain must last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reschedule: Option<RescheduleSpec>,
}

/// `spec.placement.reschedule`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RescheduleSpec {
    /// Time between two looks at all sites (a duration, default 60 s).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    /// How long another site must have been better before the app moves (a duration).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hold_for: Option<String>,
}

/// How an application moves between sites.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MigrationStrategy {
    /// The new copy is ready before the old one is deleted.
    #[default]
    Surge,
    /// The old copy is gone before the new one starts.
    Recreate,
}

/// `spec.migration`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct MigrationSpec {
    /// Whether the app may move to a better site (default true); failover is apart from this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub enabled: Option<bool>,
    /// New first or old first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub strategy: Option<MigrationStrategy>,
    /// How long the new copy may take to become ready before the move is given up (default 5 m).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ready_timeout: Option<String>,
}

/// What happens to an application whose site is lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FailoverMode {
    /// It runs elsewhere as soon as the site counts as lost.
    #[default]
    Prompt,
    /// It waits for its site.
    Never,
}

/// `spec.failover`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct FailoverSpec {
    /// How long a site must have been silent before this app runs elsewhere (default 15 s).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detect_after: Option<String>,
    /// Whether it runs elsewhere at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<FailoverMode>,
}

/// `status` of an Application; server-owned.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ApplicationStatus {
    /// The generation of the spec that this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// One word for tables: see [`AppPhase`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub phase: Option<AppPhase>,
    /// `Ready`, `Placed`, `Synced` in Kubernetes' condition form.
    pub conditions: Vec<Condition>,
    /// Each site that runs, or still holds, a copy.
    pub copies: Vec<CopyStatus>,
    /// The id of the decision that placed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub decision: Option<String>,
}

/// Where an application is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AppPhase {
    /// Not placed yet.
    Pending,
    /// No site fits.
    Unplaceable,
    /// Placed; its objects are being applied or become ready.
    Progressing,
    /// Ready at its site.
    Running,
    /// Ready at the old site while the new copy is prepared.
    Moving,
    /// Applied but not healthy.
    Degraded,
    /// Its site is lost and it has no other yet.
    Lost,
    /// Could not be applied; the reason is in the conditions.
    Failed,
    /// Being removed everywhere.
    Deleting,
}

impl fmt::Display for AppPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A Kubernetes condition (`metav1.Condition`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Ready`, `Placed`, `Synced`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
    /// CamelCase, for machines.
    pub reason: String,
    /// A sentence, for people.
    pub message: String,
    /// When `status` last changed (RFC 3339, whole seconds).
    pub last_transition_time: String,
    /// The generation it speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
}

/// Why a copy exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum CopyRole {
    /// The copy that should run.
    Active,
    /// The old copy, kept until the new one is ready.
    Outgoing,
    /// To be deleted; an entry stays until the site has confirmed (I11).
    Deleting,
}

/// One site's copy of an application.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CopyStatus {
    /// The site's name.
    pub site: String,
    /// The backend at it.
    pub backend: String,
    /// The Kubernetes namespace at that site.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// Why it exists.
    pub role: CopyRole,
    /// What the site says of it.
    pub state: CopyState,
    /// `3/3`: ready and wanted pods (or objects that have no pods).
    pub ready: String,
    /// A sentence when the state is not `Ready`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Since when the state holds.
    pub since: Timestamp,
    /// The epoch of its placement.
    pub epoch: Epoch,
}

/// The state of a copy at its site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CopyState {
    /// Assigned; the site has not reported yet.
    Pending,
    /// Objects are being applied or are not ready yet.
    Progressing,
    /// All objects are ready.
    Ready,
    /// Applied, but not healthy.
    Degraded,
    /// Cannot be applied.
    Failed,
    /// Being deleted.
    Deleting,
    /// The site is lost: nobody knows.
    Unknown,
}

impl fmt::Display for CopyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One site's part of a placement: what an owner sends and a site persists (DESIGN §2).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Assignment {
    /// The application's identity.
    pub uid: AppUid,
    /// Its name, for people and for namespaces.
    pub app: AppKey,
    /// Which backend of the site.
    pub backend: String,
    /// The fence: a site obeys only the highest epoch it has seen for the UID.
    pub epoch: Epoch,
    /// `true`: nothing of the app may remain at this site.
    pub delete: bool,
    /// The generation of the spec.
    pub generation: i64,
    /// The objects; empty when `delete`.
    pub manifests: Vec<Value>,
}
