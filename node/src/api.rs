//! The node's HTTP: the API in Kubernetes' conventions, `/v1/…`, health and metrics; on loopback
//! with a token, on the Unix socket by peer credentials.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use http::{HeaderValue, StatusCode, header};
use krake_kube_api::Service;
use krake_kube_api::serve::{Certificate, serve};
use krake_model::decision::Trigger;
use krake_model::{AppKey, ApplicationSpec, GroupId};
use krake_placement::decide::{Problem, decide};
use krake_placement::spec::{Defaults, validate};
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::backup;
use crate::catalog::PATIENCE;
use crate::catalog_api::CatalogApi;
use crate::config::Config;
use crate::consensus;
use crate::datadir::Identity;
use crate::federation::{Federation, now};
use crate::limits::{self, Limits};
use crate::owner::controller::Owner;
use crate::owner::plan::{Sight, World};
use crate::records::{self, PlacementStatus, TokenRecord, TokenState};
use crate::site::report::Reporter;

/// A request under `/v1` has at most this many bytes.
const BODY_BYTES_MAX: usize = 3 * 1024 * 1024;
/// Applications in one plan.
const PLAN_MAX: usize = 200;
/// Tokens live this long when nothing is said, and at most.
const TOKEN_LIFETIME: u64 = 3600;
const TOKEN_LIFETIME_MAX: u64 = 30 * 24 * 3600;

/// What the API serves from.
pub struct ApiParts {
    /// The federation.
    pub federation: Federation,
    /// The kinds.
    pub service: Arc<Service>,
    /// The owner.
    pub owner: Owner,
    /// The node's key, for invitations.
    pub identity: Arc<Identity>,
    /// The site's report, for fault injection.
    pub reporter: Arc<Reporter>,
    /// The node's defaults.
    pub defaults: Defaults,
}

impl std::fmt::Debug for ApiParts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiParts").finish_non_exhaustive()
    }
}

struct Shared {
    parts: ApiParts,
    faults: bool,
    limits: Limits,
    /// The catalog's own protocol.
    catalog: CatalogApi,
    blocked: Mutex<std::collections::BTreeSet<krake_model::NodeId>>,
}

type Context_ = Arc<Shared>;

/// How a request came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Loopback,
    Socket,
}

/// The running listeners.
#[derive(Debug)]
pub struct Api {
    stop: CancellationToken,
}

/// RFC 9457.
struct ProblemJson {
    status: StatusCode,
    code: &'static str,
    detail: String,
    errors: Vec<Value>,
}

impl ProblemJson {
    fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
            errors: Vec::new(),
        }
    }
}

impl IntoResponse for ProblemJson {
    fn into_response(self) -> Response {
        let body = json!({
            "type": format!("https://krake.dev/errors/{}", self.code.trim_start_matches("krake::")),
            "title": self.status.canonical_reason().unwrap_or("error"),
            "status": self.status.as_u16(),
            "code": self.code,
            "detail": self.detail,
            "errors": self.errors,
        });
        let mut response = (self.status, body.to_string()).into_response();
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        // RFC 9110, 10.2.3.
        if self.status == StatusCode::SERVICE_UNAVAILABLE
            || self.status == StatusCode::TOO_MANY_REQUESTS
        {
            let seconds = HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}

type Answer = Result<Json<Value>, ProblemJson>;

fn unavailable(error: impl std::fmt::Display) -> ProblemJson {
    ProblemJson::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "krake::unavailable",
        error.to_string(),
    )
}

impl Api {
    /// Binds the addresses and the socket and serves.
    ///
    /// # Errors
    /// When an address or the socket cannot be bound.
    pub async fn start(config: &Config, parts: ApiParts) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            catalog: CatalogApi::new(parts.federation.catalog.clone(), stop.clone()),
            parts,
            faults: config.testnet.fault_injection,
            limits: Limits::default(),
            blocked: Mutex::default(),
        });
        let certificate =
            Certificate::load_or_create(&config.node.data_dir).with_context(|| {
                format!(
                    "the API's certificate in {} cannot be used; remove tls.key and tls.crt there, and new ones are made",
                    config.node.data_dir.display()
                )
            })?;
        for address in &config.api.listen {
            let listener = tokio::net::TcpListener::bind(address)
                .await
                .with_context(|| format!("cannot listen at {address} for the API (api.listen); stop what uses it, or set another address"))?;
            let app = router(&shared, Way::Loopback);
            let (stop, certificate) = (stop.clone(), certificate.clone());
            tokio::spawn(async move {
                if let Err(error) = serve(listener, &certificate, app, stop).await {
                    warn!(%error, "the API stopped");
                }
            });
        }
        let path = config.socket_path();
        let _ = std::fs::remove_file(&path);
        let listener = tokio::net::UnixListener::bind(&path)
            .with_context(|| format!("cannot make the socket {} (api.socket)", path.display()))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))
            .with_context(|| format!("cannot protect the socket {}", path.display()))?;
        let app = router(&shared, Way::Socket);
        let ended = stop.clone();
        tokio::spawn(async move {
            let served = axum::serve(listener, app)
                .with_graceful_shutdown(ended.cancelled_owned())
                .await;
            if let Err(error) = served {
                warn!(%error, "the socket stopped");
            }
        });
        info!(listen = ?config.api.listen, socket = %path.display(), "the API is served");
        Ok(Self { stop })
    }

    /// Takes no more requests.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

async fn metrics(State(shared): State<Context_>) -> Response {
    match crate::metrics::text(&shared.parts.federation, shared.parts.owner.owned()) {
        Ok(text) => ([(header::CONTENT_TYPE, crate::metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn router(shared: &Context_, way: Way) -> Router {
    let mut protected = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/plan", post(plan))
        .route("/v1/why/{namespace}/{app}", get(why))
        .route("/v1/tokens", get(list_tokens).post(create_token))
        .route("/v1/tokens/{id}", delete(revoke_token))
        .route("/v1/consensus", get(consensus_groups))
        .route("/v1/consensus/peers", get(consensus_peers))
        .route(
            "/v1/consensus/groups/{group}/transfer",
            post(consensus_transfer),
        )
        .route(krake_catalog_client::protocol::PATH, get(catalog))
        .route(backup::PATH, get(take_backup))
        .route("/metrics", get(metrics));
    if way == Way::Socket {
        protected = protected
            .route("/v1/testnet/block", post(block))
            .route("/v1/testnet/metric", post(metric));
    }
    let protected = protected
        .fallback(kinds)
        .layer(middleware::from_fn_with_state(
            shared.limits.clone(),
            limits::limit,
        ))
        .layer(middleware::from_fn_with_state(
            (Arc::clone(shared), way),
            authorize,
        ));
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .merge(protected)
        .layer(middleware::from_fn_with_state(Arc::clone(shared), stamp))
        .with_state(Arc::clone(shared))
}

/// Says which node answered.
async fn stamp(State(shared): State<Context_>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    if let Ok(site) = HeaderValue::from_str(&shared.parts.federation.site) {
        response.headers_mut().insert("krake-served-by", site);
    }
    response
}

/// The socket's file mode lets only its owner in; loopback needs the admin token.
async fn authorize(
    State((shared, way)): State<(Context_, Way)>,
    request: Request,
    next: Next,
) -> Response {
    if way == Way::Socket {
        return next.run(request).await;
    }
    let token = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .unwrap_or_default();
    let catalog = &shared.parts.federation.catalog;
    let Some((hash, _)) = catalog.read::<String>(GroupId::META, records::ADMIN_HASH) else {
        let error = krake_kube_api::ApiError::unavailable(
            "this node does not have the federation's state yet; try again",
        );
        return krake_kube_api::service::failure(&error);
    };
    // Comparing hashes takes no time that tells anything about the token.
    if blake3::Hash::from_hex(&hash).is_ok_and(|hash| hash == blake3::hash(token.as_bytes())) {
        return next.run(request).await;
    }
    let error = krake_kube_api::ApiError::new(
        401,
        "Unauthorized",
        if token.is_empty() {
            "a token is needed: Authorization: Bearer TOKEN (krakectl --token-file; the founder's data directory has admin.token)"
        } else {
            "the token is not the federation's admin token"
        },
    );
    krake_kube_api::service::respond(error.code, &error.to_status()).into_response()
}

async fn kinds(State(shared): State<Context_>, request: Request) -> Response<Body> {
    shared.parts.service.handle(request).await
}

async fn catalog(State(shared): State<Context_>, request: Request) -> Response {
    shared.catalog.upgrade(request)
}

/// `?consistency=local`: what this node has, however old.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BackupQuery {
    #[serde(default)]
    consistency: Consistency,
}

#[derive(Deserialize, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Consistency {
    #[default]
    Strong,
    Local,
}

async fn take_backup(
    State(shared): State<Context_>,
    request: Request,
) -> Result<Response, ProblemJson> {
    let query = request.uri().query().unwrap_or_default();
    let query: BackupQuery = serde_urlencoded::from_str(query).map_err(|error| {
        let text = format!("{error}; there is consistency=strong and consistency=local");
        ProblemJson::new(StatusCode::BAD_REQUEST, "krake::invalid", text)
    })?;
    let local = query.consistency == Consistency::Local;
    backup::respond(&shared.parts.federation, local)
        .await
        .map_err(|error| {
            unavailable(format!(
                "{error}; consistency=local takes what this node has"
            ))
        })
}

async fn livez(State(shared): State<Context_>) -> Response {
    match shared.parts.federation.catalog.host.failure() {
        None => "ok\n".into_response(),
        Some(failure) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("{failure}\n")).into_response()
        }
    }
}

/// Ready: every group has a leader here, and the meta group can be read.
async fn readyz(State(shared): State<Context_>) -> Response {
    let federation = &shared.parts.federation;
    if federation.catalog.host.is_full() {
        let text = "the disk is full: this node is read-only until there is room again\n";
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    }
    let expected = usize::from(federation.genesis.shard_count) + 1;
    let with_leader = federation
        .catalog
        .host
        .status()
        .borrow()
        .values()
        .filter(|group| group.leader.is_some())
        .count();
    if with_leader < expected {
        let text = format!("{with_leader} of {expected} groups have a leader\n");
        return (StatusCode::SERVICE_UNAVAILABLE, text).into_response();
    }
    let barrier = federation
        .catalog
        .host
        .read_barrier(&[GroupId::META], Duration::from_secs(2));
    match barrier.await {
        Ok(()) => "ok\n".into_response(),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    }
}

impl From<consensus::Problem> for ProblemJson {
    fn from(problem: consensus::Problem) -> Self {
        Self::new(problem.status, problem.code, problem.detail)
    }
}

async fn consensus_groups(State(shared): State<Context_>) -> Answer {
    Ok(Json(consensus::groups(&shared.parts.federation).await?))
}

async fn consensus_peers(State(shared): State<Context_>) -> Answer {
    Ok(Json(consensus::peers(&shared.parts.federation).await?))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct TransferRequest {
    /// The site whose node should lead.
    to: String,
}

async fn consensus_transfer(
    State(shared): State<Context_>,
    Path(group): Path<String>,
    request: Request,
) -> Answer {
    let TransferRequest { to } = body_of(request).await?;
    let answer = consensus::transfer(&shared.parts.federation, &group, &to).await?;
    info!(group, to, "an operator had leadership handed over");
    Ok(Json(answer))
}

async fn status(State(shared): State<Context_>) -> Answer {
    let federation = &shared.parts.federation;
    let members = federation.catalog.members();
    let names: BTreeMap<u64, String> = members
        .iter()
        .map(|member| (member.replica, member.site.name.clone()))
        .collect();
    let name = |replica: &u64| {
        names
            .get(replica)
            .cloned()
            .unwrap_or_else(|| replica.to_string())
    };
    let groups: Vec<Value> = federation
        .catalog
        .host
        .status()
        .borrow()
        .values()
        .map(|group| {
            let (entries, bytes) = federation.catalog.host.size(group.group);
            json!({
                "group": group.group.to_string(),
                "leader": group.leader.as_ref().map(name),
                "term": group.term,
                "voters": group.voters.iter().map(name).collect::<Vec<_>>(),
                "learners": group.learners.iter().map(name).collect::<Vec<_>>(),
                "entries": entries,
                "bytes": bytes,
            })
        })
        .collect();
    let moment = federation.moment();
    let sites: Vec<Value> = members
        .iter()
        .map(|member| {
            let state = moment.sight(&member.node, federation.lost_after).name();
            json!({"name": member.site.name, "node": member.node, "state": state, "addresses": member.addresses})
        })
        .collect();
    let id = federation.genesis.federation_id().map_err(unavailable)?;
    Ok(Json(json!({
        "federation": {"name": federation.genesis.name, "id": id, "shards": federation.genesis.shard_count},
        "servedBy": &*federation.site,
        "isolated": moment.isolated(),
        "sites": sites,
        "groups": groups,
    })))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanRequest {
    applications: Vec<Value>,
}

async fn body_of<T: serde::de::DeserializeOwned>(request: Request) -> Result<T, ProblemJson> {
    let bytes = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX)
        .await
        .map_err(|_| {
            ProblemJson::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "krake::too-large",
                format!("the body has more than {BODY_BYTES_MAX} bytes"),
            )
        })?;
    let invalid =
        |message: String| ProblemJson::new(StatusCode::BAD_REQUEST, "krake::invalid-body", message);
    let value =
        krake_kube_api::service::body::parse(&bytes).map_err(|error| invalid(error.message))?;
    serde_json::from_value(value).map_err(|error| invalid(error.to_string()))
}

async fn plan(State(shared): State<Context_>, request: Request) -> Answer {
    let request: PlanRequest = body_of(request).await?;
    if request.applications.len() > PLAN_MAX {
        return Err(ProblemJson::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "krake::too-large",
            format!("a plan has at most {PLAN_MAX} applications"),
        ));
    }
    let federation = &shared.parts.federation;
    let moment = federation.moment();
    let mut decisions = Vec::new();
    for (index, object) in request.applications.iter().enumerate() {
        decisions.push(plan_one(&shared.parts, &moment, index, object)?);
    }
    Ok(Json(json!({"decisions": decisions})))
}

fn plan_one(
    parts: &ApiParts,
    moment: &crate::federation::Moment,
    index: usize,
    object: &Value,
) -> Result<Value, ProblemJson> {
    let text = |pointer: &str, default: &str| {
        let found = object.pointer(pointer).and_then(Value::as_str);
        found.unwrap_or(default).to_owned()
    };
    let app = AppKey::new(
        text("/metadata/namespace", "default"),
        text("/metadata/name", "unnamed"),
    );
    let invalid = |errors: Vec<Value>, detail: String| ProblemJson {
        errors,
        ..ProblemJson::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "krake::invalid-application",
            detail,
        )
    };
    let spec = object.get("spec").cloned().unwrap_or_default();
    let spec: ApplicationSpec = serde_json::from_value(spec)
        .map_err(|error| invalid(Vec::new(), format!("applications[{index}].spec: {error}")))?;
    let definitions = &parts.federation.genesis.metrics;
    let (policy, needs) =
        validate(&spec, &app.namespace, definitions, &parts.defaults).map_err(|errors| {
            let list: Vec<Value> = errors
                .iter()
                .map(|e| json!({"field": format!("applications[{index}].{}", e.path), "message": e.message}))
                .collect();
            let detail = errors
                .iter()
                .map(|e| format!("{}: {}", e.path, e.message))
                .collect::<Vec<_>>()
                .join("\n");
            invalid(list, format!("{app}: {detail}"))
        })?;
    let sites = moment
        .sites()
        .iter()
        .cloned()
        .map(|mut site| {
            site.lost = moment.sight(&site.target.node, policy.detect_after) != Sight::Alive;
            site
        })
        .collect();
    let catalog = &parts.federation.catalog;
    let current = catalog
        .read::<records::AssignRecord>(catalog.group_of(&app), &records::assign_key(&app))
        .and_then(|(assign, _)| {
            assign
                .copy(krake_model::application::CopyRole::Active)
                .map(|copy| copy.target.clone())
        });
    let decision = decide(&Problem {
        app,
        uid: None,
        generation: 0,
        needs,
        policy,
        sites,
        current,
        definitions: definitions.clone(),
        decided_by: parts.federation.site.to_string(),
        trigger: Trigger::Plan,
        now: now(),
        better_since: None,
    });
    Ok(json!(decision.record))
}

async fn why(
    State(shared): State<Context_>,
    Path((namespace, app)): Path<(String, String)>,
) -> Answer {
    let catalog = &shared.parts.federation.catalog;
    let key = AppKey::new(namespace, app);
    let group = catalog.group_of(&key);
    catalog
        .host
        .read_barrier(&[group], PATIENCE)
        .await
        .map_err(unavailable)?;
    let object_key = |plural: &str| records::object_key(plural, &key.namespace, &key.name);
    let placement = catalog.read::<Value>(group, &object_key("placements"));
    let status: Option<PlacementStatus> = placement
        .and_then(|(object, _)| object.get("status").cloned())
        .and_then(|status| serde_json::from_value(status).ok());
    match status {
        Some(status) => Ok(Json(
            json!({"decision": status.decision, "history": status.history, "copies": status.copies}),
        )),
        None if catalog
            .host
            .get(group, &object_key("applications"))
            .is_some() =>
        {
            Ok(Json(json!({"decision": null, "history": [], "copies": []})))
        }
        None => Err(ProblemJson::new(
            StatusCode::NOT_FOUND,
            "krake::not-found",
            format!("there is no application {key}"),
        )),
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TokenRequest {
    ttl_seconds: Option<u64>,
    site: Option<String>,
}

async fn create_token(State(shared): State<Context_>, request: Request) -> Answer {
    let request: TokenRequest = body_of(request).await?;
    let seconds = request.ttl_seconds.unwrap_or(TOKEN_LIFETIME);
    if seconds == 0 || seconds > TOKEN_LIFETIME_MAX {
        return Err(ProblemJson::new(
            StatusCode::BAD_REQUEST,
            "krake::invalid-lifetime",
            format!("a token lives 1 s to {} days", TOKEN_LIFETIME_MAX / 86_400),
        ));
    }
    let parts = &shared.parts;
    let lifetime = Duration::from_secs(seconds);
    let (token, id, expires_at) =
        crate::membership::door::invite(&parts.federation, &parts.identity, lifetime, request.site)
            .await
            .map_err(unavailable)?;
    Ok(Json(
        json!({"token": token, "id": id, "expiresAt": expires_at}),
    ))
}

async fn list_tokens(State(shared): State<Context_>) -> Answer {
    let catalog = &shared.parts.federation.catalog;
    catalog
        .host
        .read_barrier(&[GroupId::META], PATIENCE)
        .await
        .map_err(unavailable)?;
    let tokens: Vec<Value> = catalog
        .read_all::<TokenRecord>(GroupId::META, records::TOKENS)
        .into_iter()
        .map(|(key, record, _)| {
            let mut value = json!(record);
            value["id"] = key.trim_start_matches(records::TOKENS).into();
            if record.state == TokenState::Open && record.expires_at < now() {
                value["state"] = "expired".into();
            }
            value
        })
        .collect();
    Ok(Json(json!({"tokens": tokens})))
}

async fn revoke_token(State(shared): State<Context_>, Path(id): Path<String>) -> Answer {
    let catalog = &shared.parts.federation.catalog;
    let key = format!("{}{id}", records::TOKENS);
    catalog
        .host
        .read_barrier(&[GroupId::META], PATIENCE)
        .await
        .map_err(unavailable)?;
    let Some((record, entry)) = catalog.read::<TokenRecord>(GroupId::META, &key) else {
        return Err(ProblemJson::new(
            StatusCode::NOT_FOUND,
            "krake::not-found",
            format!("there is no token {id}"),
        ));
    };
    if record.state == TokenState::Used {
        return Err(ProblemJson::new(
            StatusCode::CONFLICT,
            "krake::token-used",
            "the token was used already; its node is a member",
        ));
    }
    let revoked = TokenRecord {
        state: TokenState::Revoked,
        ..record
    };
    let operation = krake_consensus::Operation::Put {
        key,
        value: records::write(&revoked),
        expect: krake_consensus::Expect::Revision(entry.modified),
    };
    let command = krake_consensus::Command::new(vec![operation]);
    catalog
        .host
        .propose(GroupId::META, command, PATIENCE)
        .await
        .map_err(unavailable)?;
    Ok(Json(json!({"id": id, "state": "revoked"})))
}

fn faults_only(shared: &Shared) -> Result<(), ProblemJson> {
    if shared.faults {
        Ok(())
    } else {
        Err(ProblemJson::new(
            StatusCode::FORBIDDEN,
            "krake::no-faults",
            "this node does not accept faults (testnet.fault_injection)",
        ))
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BlockRequest {
    /// Names of sites that are not heard and not spoken to; all others are.
    sites: Vec<String>,
}

async fn block(State(shared): State<Context_>, request: Request) -> Answer {
    faults_only(&shared)?;
    let request: BlockRequest = body_of(request).await?;
    let federation = &shared.parts.federation;
    let nodes = federation
        .catalog
        .members()
        .into_iter()
        .filter(|member| request.sites.contains(&member.site.name))
        .map(|member| member.node)
        .collect();
    federation.network.block(&nodes).await;
    *shared.blocked.lock() = nodes;
    Ok(Json(json!({"blocked": request.sites})))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct MetricRequest {
    name: String,
    value: f64,
}

async fn metric(State(shared): State<Context_>, request: Request) -> Answer {
    faults_only(&shared)?;
    let request: MetricRequest = body_of(request).await?;
    let known = &shared.parts.federation.genesis.metrics;
    if !known.contains_key(&request.name) {
        return Err(ProblemJson::new(
            StatusCode::BAD_REQUEST,
            "krake::unknown-metric",
            krake_placement::constraint::unknown_metric(&request.name, known),
        ));
    }
    shared
        .parts
        .reporter
        .set_metric(&request.name, request.value);
    Ok(Json(json!({"name": request.name, "value": request.value})))
}
