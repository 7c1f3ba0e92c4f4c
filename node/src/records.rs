//! What the node keeps in the catalog, and under which keys.
//!
//! API objects (Application, Placement, Event in a shard; Site, Node in the meta group) are stored
//! as canonical JSON bytes under `PLURAL/NAMESPACE/NAME`. Beside them are records that are no API
//! objects: `assign/…` (who runs an app: the epoch of that entry fences the sites), `tombs/UID`
//! (copies of deleted apps at sites that are away), and in the meta group `members/…`, `tokens/…`,
//! `leaving/NODE` (what still keeps a member that is to leave) and `departed/NODE` (one that left).

use krake_model::application::{AppKey, CopyRole, CopyState};
use krake_model::decision::Target;
use krake_model::ids::{AppUid, NodeId, shard_of};
use krake_model::{DecisionRecord, Epoch, GroupId, Timestamp};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error;

/// A catalog record is not what its key promises.
#[derive(Debug, Error)]
#[error("the catalog's record `{key}` cannot be read")]
pub struct RecordError {
    key: String,
    source: serde_json::Error,
}

/// Reads a record.
///
/// # Errors
/// When the bytes are not the JSON of a `T`.
pub fn read<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, RecordError> {
    serde_json::from_slice(bytes).map_err(|source| RecordError {
        key: key.to_owned(),
        source,
    })
}

/// Canonical JSON: keys sorted, as `serde_json`'s map is.
///
/// # Panics
/// Never: the record types serialise to JSON.
pub fn write<T: Serialize>(value: &T) -> bytes::Bytes {
    let value = serde_json::to_value(value).unwrap_or(Value::Null);
    bytes::Bytes::from(value.to_string())
}

/// The meta group's key of the genesis record.
pub const GENESIS: &str = "genesis";
/// The meta group's key of the next replica id.
pub const NEXT_REPLICA: &str = "next-replica";
/// The meta group's key of the admin token's hash.
pub const ADMIN_HASH: &str = "admin-token";
/// Prefix of members.
pub const MEMBERS: &str = "members/";
/// Prefix of invitations.
pub const TOKENS: &str = "tokens/";
/// Prefix of assignments.
pub const ASSIGN: &str = "assign/";
/// Prefix of tombstones.
pub const TOMBS: &str = "tombs/";
/// Prefix of what keeps the members that are leaving.
pub const LEAVING: &str = "leaving/";
/// Prefix of members that left.
pub const DEPARTED: &str = "departed/";

/// Key of a member.
pub fn member_key(node: &NodeId) -> String {
    format!("{MEMBERS}{node}")
}

/// Key of what keeps a member that is leaving.
pub fn leaving_key(node: &NodeId) -> String {
    format!("{LEAVING}{node}")
}

/// Key of a member that left.
pub fn departed_key(node: &NodeId) -> String {
    format!("{DEPARTED}{node}")
}

/// Key of an invitation.
pub fn token_key(id: &[u8; 16]) -> String {
    format!("{TOKENS}{}", hex::encode(id))
}

/// Key of an API object; `namespace` is empty for cluster-scoped kinds.
pub fn object_key(plural: &str, namespace: &str, name: &str) -> String {
    if namespace.is_empty() {
        format!("{plural}/{name}")
    } else {
        format!("{plural}/{namespace}/{name}")
    }
}

/// Key of an app's assignment.
pub fn assign_key(app: &AppKey) -> String {
    format!("{ASSIGN}{}/{}", app.namespace, app.name)
}

/// Key of a deleted app's tombstone.
pub fn tomb_key(uid: &AppUid) -> String {
    format!("{TOMBS}{uid}")
}

/// The group that holds an app and everything that belongs to it.
pub fn group_of(app: &AppKey, shard_count: u16) -> GroupId {
    GroupId::of_shard(shard_of(&app.namespace, &app.name, shard_count))
}

/// One site's copy in an assignment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AssignedCopy {
    /// Which backend of which site.
    pub target: Target,
    /// Why it exists.
    pub role: CopyRole,
    /// When it got this role.
    pub since: Timestamp,
}

/// Who runs an app. Its catalog entry's (term, index) is the epoch of all its copies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AssignRecord {
    /// The app's identity.
    pub uid: AppUid,
    /// Its name.
    pub app: AppKey,
    /// The generation of the spec that the copies run.
    pub generation: i64,
    /// All copies, removed ones included until their site has confirmed.
    pub copies: Vec<AssignedCopy>,
    /// Where it runs next, once the old copy is gone (migration `recreate`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Target>,
}

impl AssignRecord {
    /// The copy with `role`, if there is one.
    pub fn copy(&self, role: CopyRole) -> Option<&AssignedCopy> {
        self.copies.iter().find(|copy| copy.role == role)
    }
}

/// Copies of a deleted app at sites that were away when it was deleted (I11).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tombstone {
    /// The app's identity.
    pub uid: AppUid,
    /// Its name.
    pub app: AppKey,
    /// Who may still hold a copy.
    pub targets: Vec<Target>,
    /// When it was deleted.
    pub deleted_at: Timestamp,
}

/// What a site says of its copy, to the app's owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CopyReport {
    /// The app's identity.
    pub uid: AppUid,
    /// Its name.
    pub app: AppKey,
    /// Who reports.
    pub node: NodeId,
    /// Which backend.
    pub backend: String,
    /// The assignment that the site has acted upon.
    pub epoch: Epoch,
    /// What became of it.
    pub state: ReportedState,
    /// Ready pods (or objects).
    pub ready: u32,
    /// Wanted pods (or objects).
    pub wanted: u32,
    /// The namespace at the site.
    pub namespace: Option<String>,
    /// Why, when it is not ready.
    pub message: Option<String>,
    /// Whether another site might do better: no capacity, refused by policy.
    pub retry_elsewhere: bool,
}

/// The state in a [`CopyReport`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReportedState {
    /// Being applied, or not ready yet.
    Progressing,
    /// All objects are ready.
    Ready,
    /// Applied, not healthy.
    Degraded,
    /// Cannot be applied.
    Failed,
    /// Being deleted.
    Deleting,
    /// Nothing of it is left.
    Gone,
}

impl ReportedState {
    /// As shown in a status.
    pub const fn copy_state(self) -> CopyState {
        match self {
            Self::Progressing => CopyState::Progressing,
            Self::Ready => CopyState::Ready,
            Self::Degraded => CopyState::Degraded,
            Self::Failed => CopyState::Failed,
            Self::Deleting | Self::Gone => CopyState::Deleting,
        }
    }
}

/// `status` of a Placement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PlacementStatus {
    /// The copies, as in the application's status.
    pub copies: Vec<krake_model::application::CopyStatus>,
    /// The decision that placed it where it is.
    pub decision: Option<DecisionRecord>,
    /// Earlier decisions, newest first, bounded.
    pub history: Vec<DecisionSummary>,
}

/// One line of a placement's history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DecisionSummary {
    /// The decision's id.
    pub id: String,
    /// When.
    pub decided_at: Timestamp,
    /// What.
    pub outcome: krake_model::decision::Outcome,
    /// Where to.
    pub chosen: Option<String>,
    /// Where from.
    pub previous: Option<String>,
    /// Why.
    pub reason: String,
}

/// How many earlier decisions a placement keeps.
pub const HISTORY_MAX: usize = 10;

impl From<&DecisionRecord> for DecisionSummary {
    fn from(record: &DecisionRecord) -> Self {
        Self {
            id: record.id.clone(),
            decided_at: record.decided_at,
            outcome: record.outcome,
            chosen: record.chosen.as_ref().map(ToString::to_string),
            previous: record.previous.as_ref().map(ToString::to_string),
            reason: record.reason.clone(),
        }
    }
}

/// A member that is leaving, beside its site.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Leaving {
    /// What it waits for, for people.
    pub waits: String,
    /// Whether that is only its votes: they go to others.
    pub gives_votes: bool,
}

/// A member that left. Its node's id never comes back: a site that joins again has another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Departure {
    /// Its site's name, which another one may have by now.
    pub site: String,
    /// When (the clock of the meta group's leader).
    pub left_at: Timestamp,
    /// Whether copies of applications may still be there.
    pub forced: bool,
}

/// An invitation in the meta group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenRecord {
    /// When it expires.
    pub expires_at: Timestamp,
    /// The only site name it admits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
    /// The site whose node made it.
    pub issuer: String,
    /// What became of it.
    pub state: TokenState,
    /// Who used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<String>,
}

/// What became of an invitation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum TokenState {
    /// It can be used once.
    Open,
    /// It was used.
    Used,
    /// It was taken back.
    Revoked,
}
