//! Where applications would go, and why one is where it is.

use axum::Json;
use axum::extract::{Path, Request, State};
use http::StatusCode;
use krake_model::decision::Trigger;
use krake_model::{AppKey, ApplicationSpec};
use krake_placement::decide::{Problem, decide};
use krake_placement::spec::validate;
use serde::Deserialize;
use serde_json::{Value, json};

use super::form::{Answer, ProblemJson, body_of, unavailable};
use super::{ApiParts, Context_};
use crate::catalog::PATIENCE;
use crate::federation::{Moment, now};
use crate::owner::plan::{Sight, World};
use crate::records::{self, PlacementStatus};

/// Applications in one plan.
const PLAN_MAX: usize = 200;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanRequest {
    applications: Vec<Value>,
}

pub(super) async fn plan(State(shared): State<Context_>, request: Request) -> Answer {
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
    moment: &Moment,
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
    let invalid = |errors: Vec<Value>, detail: String| {
        ProblemJson::new(
            StatusCode::UNPROCESSABLE_ENTITY,
            "krake::invalid-application",
            detail,
        )
        .listing(errors)
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

pub(super) async fn why(
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
