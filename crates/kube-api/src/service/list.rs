//! Lists, whole and in pages.
//!
//! A page says with `continue` where the next one begins and of which revision the list is. Nothing of
//! it is kept here: any server can go on with it, as long as it knows what changed since then.

use axum::body::Body;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{HeaderMap, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::query::{Query, include, not_supported, refuse_options, selectors};
use super::{Service, Target, respond, typed, wants_table, with_staleness};
use crate::error::{ApiError, Cause};
use crate::kinds::Kind;
use crate::store::{Freshness, Listing, Staleness, names};
use crate::table;

/// What `continue` says.
#[derive(Debug, Serialize, Deserialize)]
struct Token {
    /// The list is as it was then; `None`: that cannot be told any more, what follows is of now.
    revision: Option<u64>,
    /// Namespace and name of the last object that was looked at.
    after: (String, String),
}

impl Token {
    fn encode(&self) -> String {
        URL_SAFE_NO_PAD.encode(json!(self).to_string())
    }

    fn decode(text: &str) -> Result<Self, ApiError> {
        let bytes = URL_SAFE_NO_PAD.decode(text).ok();
        let token = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        token.ok_or_else(|| {
            ApiError::bad_request(
                "continue is not what a list returned as metadata.continue: leave it out to begin the list anew",
            )
        })
    }
}

/// Of when a list is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    Fresh(Freshness),
    AsOf(u64),
}

/// Which part of a list is asked for.
#[derive(Debug)]
struct Part {
    when: When,
    limit: Option<usize>,
    token: Option<Token>,
}

impl Part {
    fn of(query: &Query) -> Result<Self, ApiError> {
        let limit = match query.get("limit").map(str::parse::<i64>) {
            None => None,
            Some(Ok(limit)) => usize::try_from(limit).ok().filter(|limit| *limit > 0),
            Some(Err(_)) => return Err(ApiError::bad_request("limit is not a number")),
        };
        let asked = query.get("resourceVersion");
        let matched = query.get("resourceVersionMatch");
        check_options(query)?;
        if let Some(text) = query.get("continue") {
            if asked.is_some_and(|asked| asked != "0") {
                return Err(ApiError::bad_request(
                    "a list that goes on is of the revision it was begun with: leave out resourceVersion or continue",
                ));
            }
            let token = Token::decode(text)?;
            let when = token
                .revision
                .map_or(When::Fresh(Freshness::Latest), When::AsOf);
            let token = Some(token);
            return Ok(Self { when, limit, token });
        }
        let (when, limit) = match (query.freshness()?, matched, limit) {
            // As in Kubernetes: whatever is here is no moment that a next page could be of.
            (Freshness::Any, ..) => (When::Fresh(Freshness::Any), None),
            (Freshness::AtLeast(revision), Some("Exact"), _)
            | (Freshness::AtLeast(revision), None, Some(_)) => (When::AsOf(revision), limit),
            (Freshness::AtLeast(_), _, Some(_)) => (When::Fresh(Freshness::Latest), limit),
            (freshness, ..) => (When::Fresh(freshness), limit),
        };
        let token = None;
        Ok(Self { when, limit, token })
    }
}

const MATCH: &str = "resourceVersionMatch";
const INITIAL: &str = "sendInitialEvents";

fn forbidden(field: &'static str, why: &str) -> Cause {
    Cause::new(field, format!("Forbidden: {why}")).because("FieldValueForbidden")
}

/// Options that a list cannot have, or not together, as Kubernetes refuses them.
fn check_options(query: &Query) -> Result<(), ApiError> {
    let mut causes = Vec::new();
    if let Some(matched) = query.get(MATCH) {
        let revision = query.get("resourceVersion");
        if revision.is_none() {
            causes.push(forbidden(MATCH, "there is no resourceVersion to match"));
        }
        if query.get("continue").is_some() {
            causes.push(forbidden(MATCH, "continue says which revision is read"));
        }
        if !matches!(matched, "Exact" | "NotOlderThan") {
            causes.push(not_supported(MATCH, "Exact, NotOlderThan"));
        }
        if matched == "Exact" && revision == Some("0") {
            causes.push(forbidden(MATCH, "resourceVersion 0 is no exact one"));
        }
    }
    if query.get(INITIAL).is_some() {
        causes.push(forbidden(INITIAL, "a list has no events, only a watch has"));
    }
    refuse_options("ListOptions", causes)
}

/// The same for a watch.
pub(super) fn check_watch_options(query: &Query) -> Result<(), ApiError> {
    let mut causes = Vec::new();
    let (matched, initial) = (query.get(MATCH), query.get(INITIAL));
    if initial.is_some() && matched != Some("NotOlderThan") {
        let why = "sendInitialEvents goes with resourceVersionMatch=NotOlderThan only";
        causes.push(forbidden(MATCH, why));
    }
    if let Some(matched) = matched {
        if initial.is_none() {
            causes.push(forbidden(
                MATCH,
                "a watch has it with sendInitialEvents only",
            ));
        }
        if matched != "NotOlderThan" {
            causes.push(not_supported(MATCH, "NotOlderThan"));
        }
        if query.get("continue").is_some() {
            causes.push(forbidden(MATCH, "continue is for lists"));
        }
    }
    refuse_options("ListOptions", causes)
}

/// What a list selects.
pub(super) struct Chosen {
    pub(super) objects: Vec<Value>,
    /// Of the list: its revision, and where it goes on.
    pub(super) metadata: Value,
    staleness: Option<Staleness>,
}

impl Service {
    /// The objects that a query selects, or a page of them.
    pub(super) async fn choose(&self, target: &Target, query: &Query) -> Result<Chosen, ApiError> {
        let (labels, fields) = selectors(query)?;
        let Part { when, limit, token } = Part::of(query)?;
        let mut scope = target.scope(&fields);
        let after = token.as_ref().map(|token| &token.after);
        scope.after = after.map(|(namespace, name)| (namespace.as_str(), name.as_str()));
        // With a selector nobody knows how many have to be looked at.
        let whole = query.get("labelSelector").is_none() && query.get("fieldSelector").is_none();
        scope.most = limit.filter(|_| whole);
        let kind = &target.kind;
        let staleness = match when {
            When::Fresh(freshness) => self.staleness(kind, scope, freshness),
            When::AsOf(_) => None,
        };
        let listed = |scope| async move {
            let listed = match when {
                When::Fresh(freshness) => self.store.list(kind, scope, freshness).await,
                When::AsOf(revision) => self.store.list_as_of(kind, scope, revision).await,
            };
            listed.map_err(|error| match after {
                Some(after) if error.code == 410 => ended(error, after.clone()),
                _ => error,
            })
        };
        let mut listing = listed(scope).await?;
        if listing.more > 0 && listing.objects().count() < listing.items.len() {
            // Others take the place of those that cannot be read.
            scope.most = None;
            listing = listed(scope).await?;
        }
        let Listing {
            items,
            more,
            revision,
        } = listing;
        let (mut rest, mut objects, mut last) = (items.into_iter(), Vec::new(), None);
        while limit.is_none_or(|limit| objects.len() < limit) {
            let Some(item) = rest.next() else { break };
            let object = item.value();
            if object.is_null() {
                continue;
            }
            if labels.matches(object) && fields.matches(object) {
                objects.push(typed(kind, object));
            }
            last = limit.map(|_| names(object));
        }
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if let (Some(after), left @ 1..) = (last, rest.len() + more) {
            let revision = Some(revision);
            metadata["continue"] = Token { revision, after }.encode().into();
            if whole {
                metadata["remainingItemCount"] = left.into();
            }
        }
        Ok(Chosen {
            objects,
            metadata,
            staleness,
        })
    }

    pub(super) async fn list(
        &self,
        headers: &HeaderMap,
        target: &Target,
        query: &Query,
    ) -> Result<Response<Body>, ApiError> {
        let kind = &target.kind;
        let Chosen {
            objects,
            metadata,
            staleness,
        } = self.choose(target, query).await?;
        let body = if wants_table(headers) {
            let now = jiff::Timestamp::now();
            table::table(kind, &objects, metadata, include(query)?, true, now)
        } else {
            list_object(kind, objects, metadata)
        };
        Ok(with_staleness(respond(200, &body), staleness))
    }
}

/// The moment of a list that goes on is not known any more.
fn ended(error: ApiError, after: (String, String)) -> ApiError {
    let revision = None;
    ApiError {
        message: format!(
            "the rest of this list as it was when it was begun is not kept any more ({error}): begin anew without continue, or go on with the continue of this answer, which shows the rest as it is now"
        ),
        resume: Some(Token { revision, after }.encode()),
        ..error
    }
}

pub(super) fn list_object(kind: &Kind, items: Vec<Value>, metadata: Value) -> Value {
    json!({
        "kind": format!("{}List", kind.kind),
        "apiVersion": kind.api_version(),
        "metadata": metadata,
        "items": items,
    })
}
