//! The node's API as typed calls.

use http::Method;
use krake_model::application::CopyStatus;
use krake_model::decision::Outcome;
use krake_model::{AppKey, DecisionRecord, Timestamp};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{APPLY_PATCH, Client, ClientError, MERGE_PATCH, Request};

/// Who owns the fields that `krakectl` applies.
pub const FIELD_MANAGER: &str = "krakectl";

/// What may not stand in a path segment or a query value as it is.
const SEGMENT: &AsciiSet = &CONTROLS
    .add(b' ')
    .add(b'"')
    .add(b'#')
    .add(b'%')
    .add(b'&')
    .add(b'+')
    .add(b'/')
    .add(b'<')
    .add(b'=')
    .add(b'>')
    .add(b'?')
    .add(b'`')
    .add(b'{')
    .add(b'}');

/// `text` as one path segment or one query value.
pub fn encode(text: &str) -> String {
    utf8_percent_encode(text, SEGMENT).to_string()
}

/// A kind as the server's discovery lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Resource {
    /// `applications`
    pub name: String,
    /// `application`
    #[serde(default)]
    pub singular_name: String,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
    /// `Application`
    pub kind: String,
    /// `app`
    #[serde(default)]
    pub short_names: Vec<String>,
    /// What can be done with it.
    #[serde(default)]
    pub verbs: Vec<String>,
}

impl Resource {
    /// Applications.
    pub fn applications() -> Self {
        Self {
            name: "applications".to_owned(),
            singular_name: "application".to_owned(),
            namespaced: true,
            kind: "Application".to_owned(),
            short_names: Vec::new(),
            verbs: Vec::new(),
        }
    }

    /// `application.krake.dev/shop`, as kubectl names objects.
    pub fn title(&self, name: &str) -> String {
        format!("{}.krake.dev/{name}", self.singular_name)
    }

    /// Path of all objects; in one namespace when `namespace` is given and the kind has any.
    pub fn collection(&self, namespace: Option<&str>) -> String {
        match namespace.filter(|_| self.namespaced) {
            Some(namespace) => format!(
                "/apis/krake.dev/v1/namespaces/{}/{}",
                encode(namespace),
                self.name
            ),
            None => format!("/apis/krake.dev/v1/{}", self.name),
        }
    }

    /// Path of one object.
    pub fn object(&self, namespace: &str, name: &str) -> String {
        format!("{}/{}", self.collection(Some(namespace)), encode(name))
    }
}

/// How to apply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ApplyOptions {
    /// Take fields that others own.
    pub force: bool,
    /// Check everything, change nothing.
    pub dry_run: bool,
}

/// What an apply did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplyOutcome {
    /// It was not there.
    Created,
    /// It was there and is different now.
    Configured,
    /// It was there already, just so.
    Unchanged,
}

/// An object that was applied.
#[derive(Clone, Debug)]
pub struct Applied {
    /// As it is now.
    pub object: Value,
    /// What was done.
    pub outcome: ApplyOutcome,
    /// What the server warns of.
    pub warnings: Vec<String>,
}

/// The answer of `/v1/why`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Why {
    /// The decision that placed it where it is; none was made yet when absent.
    pub decision: Option<DecisionRecord>,
    /// Earlier decisions, newest first.
    #[serde(default)]
    pub history: Vec<DecisionSummary>,
    /// The copies.
    #[serde(default)]
    pub copies: Vec<CopyStatus>,
}

/// One line of an app's history.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DecisionSummary {
    /// The decision's id.
    pub id: String,
    /// When.
    pub decided_at: Timestamp,
    /// What.
    pub outcome: Outcome,
    /// Where to.
    pub chosen: Option<String>,
    /// Where from.
    pub previous: Option<String>,
    /// Why.
    pub reason: String,
}

/// The answer of `/v1/status`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FederationStatus {
    /// Which federation.
    pub federation: FederationName,
    /// The site whose view this is.
    pub served_by: String,
    /// Whether that node has lost sight of most others.
    #[serde(default)]
    pub isolated: bool,
    /// Its members' sites.
    pub sites: Vec<SiteStatus>,
    /// The groups of the catalog.
    pub groups: Vec<GroupStatus>,
}

/// Name and identity of a federation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FederationName {
    /// Its name.
    pub name: String,
    /// Its id.
    pub id: String,
    /// How many shards its catalog has.
    pub shards: u16,
}

/// One site as a node sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SiteStatus {
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// `Alive`, `Suspect` or `Lost`.
    pub state: String,
    /// Where other nodes reach it.
    #[serde(default)]
    pub addresses: Vec<String>,
}

/// One group as a node sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GroupStatus {
    /// `meta` or a shard.
    pub group: String,
    /// The site that leads it.
    pub leader: Option<String>,
    /// Its Raft term.
    #[serde(default)]
    pub term: u64,
    /// Sites that vote.
    #[serde(default)]
    pub voters: Vec<String>,
    /// Sites that only follow.
    #[serde(default)]
    pub learners: Vec<String>,
}

/// The answer of `/v1/consensus`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsensusStatus {
    /// The site whose view this is.
    pub served_by: String,
    /// The groups of the catalog.
    pub groups: Vec<ConsensusGroup>,
}

/// One Raft group as a node sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsensusGroup {
    /// `meta` or a shard.
    pub group: String,
    /// The site that leads it.
    pub leader: Option<String>,
    /// Its Raft term.
    pub term: u64,
    /// Index of the last entry known committed.
    pub commit: u64,
    /// Index of the last entry applied at the node that answers.
    pub applied: u64,
    /// Index of the last entry in its log.
    pub last: u64,
    /// Index up to which its snapshot reaches.
    pub snapshot: u64,
    /// Keys.
    pub entries: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
    /// Sites that vote.
    pub voters: Vec<String>,
    /// Sites that only follow.
    pub learners: Vec<String>,
    /// Whether a majority of the voters is alive.
    pub quorum: bool,
    /// The most important of `operator`, `country`, `gridZone` that voters share.
    pub unmet_rule: Option<String>,
}

/// The answer of `/v1/consensus/peers`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsensusPeers {
    /// The site whose view this is.
    pub served_by: String,
    /// The members.
    pub peers: Vec<ConsensusPeer>,
}

/// A member as a replica.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ConsensusPeer {
    /// Its site.
    pub site: String,
    /// Its node.
    pub node: String,
    /// Its replica id in every group.
    pub replica: u64,
    /// `Alive`, `Suspect` or `Lost`.
    pub state: String,
    /// Whether the node that answers is connected with it.
    pub connected: bool,
    /// Groups it leads.
    pub leads: u64,
    /// Groups it votes in.
    pub votes: u64,
    /// Groups it follows without a vote.
    pub follows: u64,
    /// Entries it lacks, at worst, in the groups that the node that answers leads.
    pub behind: Option<u64>,
    /// In which of them.
    pub behind_in: Option<String>,
    /// Round trip from the node that answers, in milliseconds.
    pub rtt_millis: Option<f64>,
}

/// What came of a handover.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Transferred {
    /// The group, as it is named everywhere.
    pub group: String,
    /// Who led it.
    pub from: Option<String>,
    /// Who leads it now.
    pub to: String,
    /// Whether anything had to be done.
    pub moved: bool,
    /// Milliseconds it took.
    pub millis: u64,
}

/// An invitation that was just made.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CreatedToken {
    /// The secret itself.
    pub token: String,
    /// Names it for `revoke`.
    pub id: String,
    /// When it expires.
    pub expires_at: Timestamp,
}

/// An invitation as it is listed: never the secret itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TokenInfo {
    /// Names it for `revoke`.
    pub id: String,
    /// `open`, `used`, `revoked` or `expired`.
    pub state: String,
    /// When it expires.
    pub expires_at: Timestamp,
    /// The only site name it admits.
    #[serde(default)]
    pub site: Option<String>,
    /// The site whose node made it.
    #[serde(default)]
    pub issuer: String,
    /// Who used it.
    #[serde(default)]
    pub used_by: Option<String>,
}

/// An object without what changes by itself.
fn essence(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(map) = object.as_object_mut() {
        map.remove("status");
    }
    if let Some(map) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in ["resourceVersion", "managedFields", "generation"] {
            map.remove(field);
        }
    }
    object
}

/// How an object is deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Deletion {
    /// Without waiting for what a site runs.
    pub force: bool,
    /// Not at all: only whether it could be.
    pub dry_run: bool,
}

impl Client {
    /// The kinds under `krake.dev/v1`.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn resources(&self) -> Result<Vec<Resource>, ClientError> {
        #[derive(Deserialize)]
        struct ResourceList {
            resources: Vec<Resource>,
        }
        let answer = self.send(&Request::get("/apis/krake.dev/v1")).await?;
        let list: ResourceList = answer.json()?;
        Ok(list
            .resources
            .into_iter()
            .filter(|resource| !resource.name.contains('/'))
            .collect())
    }

    /// Server-side apply of an Application (JSON of the whole object, with its namespace).
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn apply(&self, app: &Value) -> Result<Applied, ClientError> {
        self.apply_object(&Resource::applications(), app, ApplyOptions::default())
            .await
    }

    /// Server-side apply of any object.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn apply_object(
        &self,
        resource: &Resource,
        object: &Value,
        options: ApplyOptions,
    ) -> Result<Applied, ClientError> {
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
        let namespace = text("/metadata/namespace").unwrap_or("default");
        let path = resource.object(namespace, text("/metadata/name").unwrap_or_default());
        let before = match self.get(&path).await {
            Ok(before) => Some(before),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(error),
        };
        let force = if options.force { "&force=true" } else { "" };
        let dry_run = if options.dry_run { "&dryRun=All" } else { "" };
        let query = format!("fieldManager={FIELD_MANAGER}&fieldValidation=Strict{force}{dry_run}");
        let request = Request::write(
            Method::PATCH,
            format!("{path}?{query}"),
            APPLY_PATCH,
            object.to_string(),
        );
        let answer = self.send(&request.repeatable()).await?;
        let after: Value = answer.json()?;
        let outcome = match before {
            None => ApplyOutcome::Created,
            Some(before) if essence(&before) == essence(&after) => ApplyOutcome::Unchanged,
            Some(_) => ApplyOutcome::Configured,
        };
        Ok(Applied {
            object: after,
            outcome,
            warnings: answer.warnings,
        })
    }

    /// Deletes an object; the one that is there now, and no other of the same name that may come
    /// later. Returns its UID; it may still be there for a while (finalizers).
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn delete_object(
        &self,
        resource: &Resource,
        namespace: &str,
        name: &str,
        how: Deletion,
    ) -> Result<String, ClientError> {
        let path = resource.object(namespace, name);
        let object = self.get(&path).await?;
        let uid = object.pointer("/metadata/uid").and_then(Value::as_str);
        let uid = uid.unwrap_or_default().to_owned();
        let mut options =
            json!({"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}});
        if how.force {
            options["gracePeriodSeconds"] = json!(0);
        }
        if how.dry_run {
            // Kubernetes ignores the query beside a body.
            options["dryRun"] = json!(["All"]);
        }
        let request = Request::write(
            Method::DELETE,
            path,
            "application/json",
            options.to_string(),
        );
        match self.send(&request.repeatable()).await {
            // A repeated request finds its work done.
            Err(error) if error.is_not_found() => Ok(uid),
            other => other.map(|_| uid),
        }
    }

    /// Sets fields of an object by merge patch.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn merge(&self, path: &str, patch: &Value) -> Result<Value, ClientError> {
        let request = Request::write(
            Method::PATCH,
            format!("{path}?fieldManager={FIELD_MANAGER}"),
            MERGE_PATCH,
            patch.to_string(),
        );
        // Setting the same values twice is the same as once.
        self.send(&request.repeatable()).await?.json()
    }

    /// Where these applications would run; changes nothing.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn plan(&self, apps: &[Value]) -> Result<Vec<DecisionRecord>, ClientError> {
        #[derive(Deserialize)]
        struct Plan {
            decisions: Vec<DecisionRecord>,
        }
        let body = json!({"applications": apps}).to_string();
        let request = Request::write(Method::POST, "/v1/plan", "application/json", body);
        let plan: Plan = self.send(&request.repeatable()).await?.json()?;
        Ok(plan.decisions)
    }

    /// Why an application runs where it runs.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn why(&self, app: &AppKey) -> Result<Why, ClientError> {
        let path = format!("/v1/why/{}/{}", encode(&app.namespace), encode(&app.name));
        self.send(&Request::get(path)).await?.json()
    }

    /// The federation as the node that answers sees it.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn status(&self) -> Result<FederationStatus, ClientError> {
        self.send(&Request::get("/v1/status")).await?.json()
    }

    /// Hands leadership of a group to a site's node.
    ///
    /// # Errors
    /// When no node answers, or one says why it did not get there.
    pub async fn transfer(&self, group: &str, site: &str) -> Result<Transferred, ClientError> {
        let path = format!("/v1/consensus/groups/{}/transfer", encode(group));
        let body = json!({"to": site}).to_string();
        let request = Request::write(Method::POST, path, "application/json", body);
        // Asked again, it leads already.
        self.send(&request.repeatable()).await?.json()
    }

    /// Makes an invitation for one new site.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn create_token(
        &self,
        lifetime: std::time::Duration,
        site: Option<&str>,
    ) -> Result<CreatedToken, ClientError> {
        let mut body = json!({"ttlSeconds": lifetime.as_secs()});
        if let Some(site) = site {
            body["site"] = site.into();
        }
        let request = Request::write(
            Method::POST,
            "/v1/tokens",
            "application/json",
            body.to_string(),
        );
        self.send(&request).await?.json()
    }

    /// All invitations.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn tokens(&self) -> Result<Vec<TokenInfo>, ClientError> {
        #[derive(Deserialize)]
        struct Tokens {
            tokens: Vec<TokenInfo>,
        }
        let tokens: Tokens = self.send(&Request::get("/v1/tokens")).await?.json()?;
        Ok(tokens.tokens)
    }

    /// Takes an invitation back.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn revoke_token(&self, id: &str) -> Result<(), ClientError> {
        let path = format!("/v1/tokens/{}", encode(id));
        let request = Request::write(Method::DELETE, path, "application/json", "{}");
        self.send(&request.repeatable()).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_those_of_kubernetes() {
        let apps = Resource::applications();
        assert_eq!(
            apps.object("a b", "x/y"),
            "/apis/krake.dev/v1/namespaces/a%20b/applications/x%2Fy"
        );
        assert_eq!(apps.collection(None), "/apis/krake.dev/v1/applications");
        let sites = Resource {
            namespaced: false,
            name: "sites".to_owned(),
            ..apps
        };
        assert_eq!(
            sites.object("ignored", "osl1"),
            "/apis/krake.dev/v1/sites/osl1"
        );
    }

    #[test]
    fn status_and_counters_do_not_make_a_change() {
        let before = json!({"metadata": {"name": "a", "resourceVersion": "1"}, "spec": {"x": 1}, "status": {"phase": "Pending"}});
        let mut after = before.clone();
        after["metadata"]["resourceVersion"] = "2".into();
        after["status"]["phase"] = "Running".into();
        assert_eq!(essence(&before), essence(&after));
        after["spec"]["x"] = 2.into();
        assert_ne!(essence(&before), essence(&after));
    }
}
