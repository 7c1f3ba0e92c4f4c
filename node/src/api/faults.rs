//! What a testnet does to a node, through its socket.

use axum::Json;
use axum::extract::{Request, State};
use http::StatusCode;
use serde::Deserialize;
use serde_json::json;

use super::form::{Answer, ProblemJson, body_of};
use super::{Context_, Shared};

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

pub(super) async fn block(State(shared): State<Context_>, request: Request) -> Answer {
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

pub(super) async fn metric(State(shared): State<Context_>, request: Request) -> Answer {
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
