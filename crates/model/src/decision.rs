//! Decision records: every input, verdict and score of a decision, kept with it (I8).

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::application::AppKey;
use crate::ids::{AppUid, NodeId};
use crate::resources::Resources;
use crate::time::Timestamp;

/// A decision record is at most this large as JSON (DESIGN 13.2).
pub const DECISION_BYTES_MAX: usize = 32 * 1024;

/// What made the owner decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trigger {
    /// The application is new or its spec changed.
    SpecChanged,
    /// A site's report changed.
    ReportChanged,
    /// The application's site counts as lost.
    SiteLost,
    /// Time to look again.
    Timer,
    /// The chosen site refused to reserve.
    ReservationRefused,
    /// The site could not run it.
    SiteFailed,
    /// Somebody asked with `plan`; nothing is stored.
    Plan,
}

/// What was decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Placed for the first time (or again after it had no site).
    Placed,
    /// It stays where it is.
    Kept,
    /// It moves to another site.
    Moved,
    /// No site fits.
    Unplaceable,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A site's backend, as placement names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Target {
    /// The site's node.
    pub node: NodeId,
    /// The site's name.
    pub site: String,
    /// The backend's name.
    pub backend: String,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.backend == "default" {
            f.write_str(&self.site)
        } else {
            write!(f, "{}/{}", self.site, self.backend)
        }
    }
}

/// The full account of one decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DecisionRecord {
    /// `d-` and eight characters of the hash of the inputs: equal inputs, equal id.
    pub id: String,
    /// The application's name.
    pub app: AppKey,
    /// Its identity; absent for a plan of an app that does not exist yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<AppUid>,
    /// The generation of the spec decided upon.
    pub generation: i64,
    /// When (the decider's clock).
    pub decided_at: Timestamp,
    /// The site whose node decided.
    pub decided_by: String,
    /// Why it was decided now.
    pub trigger: Trigger,
    /// What was decided.
    pub outcome: Outcome,
    /// Where it runs from now on; `None` when unplaceable.
    pub chosen: Option<Target>,
    /// Where it ran before.
    pub previous: Option<Target>,
    /// One sentence for people.
    pub reason: String,
    /// The weights used, by metric.
    pub weights: BTreeMap<String, f64>,
    /// The stickiness used.
    pub stickiness: f64,
    /// What the app needs, summed over its manifests.
    pub needs: Resources,
    /// API kinds the app needs, as `group/version/Kind`.
    pub required_kinds: Vec<String>,
    /// Every site considered, best first, then the filtered ones by name.
    pub candidates: Vec<Candidate>,
}

/// What became of a candidate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// It runs here.
    Chosen,
    /// It could have run here.
    Suitable,
    /// A filter excluded it.
    Filtered,
}

/// One site in a decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Candidate {
    /// Which backend of which site.
    pub target: Target,
    /// What became of it.
    pub verdict: Verdict,
    /// The weighted mean of the terms, stickiness included; `None` when filtered.
    pub score: Option<f64>,
    /// What the stickiness added to the score (0 where the app does not run).
    pub stickiness: f64,
    /// How the score came about, in order of metric name.
    pub terms: Vec<Term>,
    /// Why it was filtered: every reason, not only the first.
    pub rejections: Vec<Rejection>,
    /// Age of its report in milliseconds when decided.
    pub report_age_ms: u64,
    /// Free capacity it was judged by.
    pub free: Resources,
}

/// One metric's part of a score.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Term {
    /// The metric.
    pub metric: String,
    /// The value reported, in the metric's unit; `None` when the site does not report it.
    pub raw: Option<f64>,
    /// 0 (worst) ..= 1 (best).
    pub normalized: f64,
    /// The weight.
    pub weight: f64,
}

/// One reason against a site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rejection {
    /// Which filter.
    pub filter: Filter,
    /// A sentence with the numbers used.
    pub message: String,
}

/// The filters, in the order they are applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Filter {
    /// The site counts as lost, or never reported.
    Lost,
    /// The operator takes no new apps.
    Cordoned,
    /// Its report is older than allowed.
    Stale,
    /// A label constraint does not hold.
    Label,
    /// A metric constraint does not hold.
    Metric,
    /// Its cluster does not serve a kind the app needs.
    Kind,
    /// Not enough free capacity.
    Capacity,
    /// The site refused or failed to run it lately.
    Refused,
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lost => "lost",
            Self::Cordoned => "cordoned",
            Self::Stale => "stale",
            Self::Label => "label",
            Self::Metric => "metric",
            Self::Kind => "kind",
            Self::Capacity => "capacity",
            Self::Refused => "refused",
        })
    }
}
