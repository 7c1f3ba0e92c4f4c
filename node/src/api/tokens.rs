//! Invitations: made, listed, revoked.

use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Request, State};
use http::StatusCode;
use krake_consensus::{Command, Expect};
use krake_model::GroupId;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Context_;
use super::form::{Answer, ProblemJson, body_of, unavailable};
use crate::catalog::PATIENCE;
use crate::federation::now;
use crate::membership::{door, put};
use crate::records::{self, TokenRecord, TokenState};

/// Tokens live this long when nothing is said, and at most.
const TOKEN_LIFETIME: u64 = 3600;
const TOKEN_LIFETIME_MAX: u64 = 30 * 24 * 3600;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TokenRequest {
    ttl_seconds: Option<u64>,
    site: Option<String>,
}

pub(super) async fn create_token(State(shared): State<Context_>, request: Request) -> Answer {
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
        door::invite(&parts.federation, &parts.identity, lifetime, request.site)
            .await
            .map_err(unavailable)?;
    Ok(Json(
        json!({"token": token, "id": id, "expiresAt": expires_at}),
    ))
}

pub(super) async fn list_tokens(State(shared): State<Context_>) -> Answer {
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

pub(super) async fn revoke_token(State(shared): State<Context_>, Path(id): Path<String>) -> Answer {
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
    let expect = Expect::Revision(entry.modified);
    let command = Command::new(vec![put(key, records::write(&revoked), expect)]);
    catalog
        .host
        .propose(GroupId::META, command, PATIENCE)
        .await
        .map_err(unavailable)?;
    Ok(Json(json!({"id": id, "state": "revoked"})))
}
