//! The node's HTTP: the API in Kubernetes' conventions, `/v1/…`, health and metrics; on loopback
//! with a token, on the Unix socket by peer credentials.

mod faults;
mod form;
mod plan;
mod tokens;

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
use krake_model::GroupId;
use krake_placement::spec::Defaults;
use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::form::{Answer, ProblemJson, body_of, unavailable};
use crate::backup;
use crate::catalog_api::CatalogApi;
use crate::config::Config;
use crate::consensus;
use crate::datadir::Identity;
use crate::federation::Federation;
use crate::limits::{self, Limits};
use crate::owner::controller::Owner;
use crate::owner::plan::World;
use crate::records;
use crate::site::report::Reporter;

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
        .route("/v1/plan", post(plan::plan))
        .route("/v1/why/{namespace}/{app}", get(plan::why))
        .route(
            "/v1/tokens",
            get(tokens::list_tokens).post(tokens::create_token),
        )
        .route("/v1/tokens/{id}", delete(tokens::revoke_token))
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
            .route("/v1/testnet/block", post(faults::block))
            .route("/v1/testnet/metric", post(faults::metric));
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
