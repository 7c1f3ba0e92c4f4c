//! Requests: one path grammar and one set of verbs for all kinds.

pub mod body;
mod list;
pub mod query;
mod watch;

use std::sync::Arc;

use async_trait::async_trait;
use axum::body::Body;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use serde_json::{Value, json};

use self::body::{delete_options, media_type, parse_body, parse_patch};
use self::list::{Chosen, list_object};
use self::query::{Query, include};
use crate::discovery;
use crate::error::{ApiError, Cause};
use crate::kinds::{Kind, Registry};
use crate::managed::Writer;
use crate::openapi_v2;
use crate::selector::FieldSelector;
use crate::store::{Freshness, Scope, Staleness, Store, names};
use crate::strategic;
use crate::table;
use crate::write::{self, Change};

/// Checks and completes what is written, kind by kind.
#[async_trait]
pub trait Admission: Send + Sync + 'static {
    /// Before an object is written; `old` is what it replaces. `subresource` is `status` or empty.
    ///
    /// # Errors
    /// Why not.
    async fn admit(
        &self,
        kind: &Kind,
        old: Option<&Value>,
        object: &mut Value,
        subresource: &str,
        dry_run: bool,
    ) -> Result<(), ApiError>;

    /// Before an object is deleted.
    ///
    /// # Errors
    /// Why not.
    async fn admit_delete(&self, kind: &Kind, object: &Value) -> Result<(), ApiError> {
        let _ = (kind, object);
        Ok(())
    }

    /// What a deletion has to wait for; `options` are the client's `DeleteOptions`.
    ///
    /// # Errors
    /// 400 or 422 when the options ask for what cannot be.
    fn hold(&self, kind: &Kind, object: &Value, options: &Value) -> Result<Hold, ApiError> {
        let _ = (kind, object, options);
        Ok(Hold::default())
    }
}

/// What an object that is to be deleted has to wait for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Hold {
    /// Finalizers the server adds: whoever serves them removes them.
    pub finalizers: Vec<String>,
    /// Seconds that somebody has to end it: it stays, marked, until it is deleted again with none.
    pub grace_seconds: u64,
    /// Annotations for whoever serves the finalizers; also of one that is on its way already.
    pub annotations: Vec<(String, String)>,
}

/// Admits everything.
#[derive(Debug, Clone, Copy, Default)]
pub struct AdmitAll;

#[async_trait]
impl Admission for AdmitAll {
    async fn admit(
        &self,
        _kind: &Kind,
        _old: Option<&Value>,
        _object: &mut Value,
        _subresource: &str,
        _dry_run: bool,
    ) -> Result<(), ApiError> {
        Ok(())
    }
}

/// What is done about fields that a schema does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldValidation {
    /// They are dropped.
    Ignore,
    /// They are dropped, with a warning.
    Warn,
    /// They are an error.
    Strict,
}

/// An API: kinds, where their objects are, and what is checked.
pub struct Service {
    /// The kinds.
    pub registry: Arc<Registry>,
    /// The objects.
    pub store: Arc<dyn Store>,
    /// The checks.
    pub admission: Arc<dyn Admission>,
    /// What `/version` says.
    pub version: Value,
    /// What happens to unknown fields when a client does not say.
    pub field_validation: FieldValidation,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").finish_non_exhaustive()
    }
}

/// Where a request points.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) kind: Arc<Kind>,
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) subresource: String,
}

impl Target {
    /// What a list or a watch of it with this selector can return.
    fn scope<'a>(&'a self, fields: &'a FieldSelector) -> Scope<'a> {
        Scope {
            namespace: self.namespace.as_deref(),
            name: fields.name(),
            ..Scope::default()
        }
    }
}

/// An answer with a JSON body.
pub fn respond(code: u16, body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() =
        StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    response
}

/// An error as a `Status` object, with `Retry-After` where trying again may help (RFC 9110, 10.2.3).
pub fn failure(error: &ApiError) -> Response<Body> {
    let mut response = respond(error.code, &error.to_status());
    if let Some(seconds) = error.retry_after {
        response
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

impl Service {
    /// Answers a request; never fails, errors become `Status` objects.
    pub async fn handle(self: &Arc<Self>, request: Request<Body>) -> Response<Body> {
        match self.route(request).await {
            Ok(response) => response,
            Err(error) => failure(&error),
        }
    }

    async fn route(self: &Arc<Self>, request: Request<Body>) -> Result<Response<Body>, ApiError> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path().to_owned();
        let query = Query::parse(parts.uri.query())?;
        let segments: Vec<String> = path
            .split('/')
            .filter(|part| !part.is_empty())
            .map(|part| {
                percent_encoding::percent_decode_str(part)
                    .decode_utf8_lossy()
                    .into_owned()
            })
            .collect();
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        if parts.method == Method::GET && segments == ["openapi", "v2"] {
            return Ok(openapi_v2::answer(&parts.headers));
        }
        if parts.method == Method::GET
            && let Some(document) = self.document(&segments)
        {
            return Ok(respond(200, &document));
        }
        let target = self
            .resolve(&segments)
            .ok_or_else(|| ApiError::no_such_path(&path))?;
        if !accepts_json(&parts.headers) {
            return Err(ApiError::new(
                406,
                "NotAcceptable",
                "only the following media types are accepted: application/json",
            ));
        }
        if !matches!(target.subresource.as_str(), "" | "status")
            || (target.subresource == "status" && !target.kind.status)
        {
            if target.kind.is_custom() {
                let name = target.name.as_deref().unwrap_or_default();
                let kind = &target.kind;
                return Err(ApiError::not_found(&kind.group, &kind.plural, name));
            }
            return Err(ApiError::new(
                501,
                "NotImplemented",
                format!(
                    "{} has no subresource {} here",
                    target.kind.plural, target.subresource
                ),
            ));
        }
        self.verb(&parts.method, &parts.headers, target, query, body)
            .await
    }

    fn document(&self, segments: &[&str]) -> Option<Value> {
        let registry = &self.registry;
        match segments {
            ["version"] => Some(self.version.clone()),
            ["api"] => Some(discovery::core_versions(registry)),
            ["apis"] => Some(discovery::groups(registry)),
            ["api", version] => discovery::resources(registry, "", version),
            ["apis", group] => discovery::group(registry, group),
            ["apis", group, version] => discovery::resources(registry, group, version),
            ["openapi", "v3"] => Some(discovery::openapi_index(registry)),
            ["openapi", "v3", "api", version] => {
                Some(discovery::openapi_document(registry, "", version))
            }
            ["openapi", "v3", "apis", group, version] => {
                Some(discovery::openapi_document(registry, group, version))
            }
            _ => None,
        }
    }

    fn resolve(&self, segments: &[&str]) -> Option<Target> {
        let (group, version, rest) = match segments {
            ["api", version, rest @ ..] => ("", *version, rest),
            ["apis", group, version, rest @ ..] => (*group, *version, rest),
            _ => return None,
        };
        let find = |plural: &str| self.registry.find(group, version, plural);
        let target = |kind, namespace: Option<&str>, name: Option<&str>, sub: &str| Target {
            kind,
            namespace: namespace.map(ToOwned::to_owned),
            name: name.map(ToOwned::to_owned),
            subresource: sub.to_owned(),
        };
        match rest {
            ["namespaces", ns, plural, tail @ ..] if find(plural).is_some_and(|k| k.namespaced) => {
                let kind = find(plural)?;
                match tail {
                    [] => Some(target(kind, Some(ns), None, "")),
                    [name] => Some(target(kind, Some(ns), Some(name), "")),
                    [name, sub @ ..] => Some(target(kind, Some(ns), Some(name), &sub.join("/"))),
                }
            }
            [plural] => Some(target(find(plural)?, None, None, "")),
            [plural, name] => {
                let kind = find(plural).filter(|kind| !kind.namespaced)?;
                Some(target(kind, None, Some(name), ""))
            }
            [plural, name, sub @ ..] => {
                let kind = find(plural).filter(|kind| !kind.namespaced)?;
                Some(target(kind, None, Some(name), &sub.join("/")))
            }
            [] => None,
        }
    }

    async fn verb(
        self: &Arc<Self>,
        method: &Method,
        headers: &HeaderMap,
        target: Target,
        query: Query,
        body: Body,
    ) -> Result<Response<Body>, ApiError> {
        let kind = Arc::clone(&target.kind);
        if *method != Method::GET && kind.read_only {
            return Err(ApiError::method_not_allowed(format!(
                "{} are written by the federation itself and can only be read",
                kind.plural
            )));
        }
        match (method, &target.name) {
            (&Method::GET, None) if query.flag("watch") => {
                self.watch(headers, &target, &query).await
            }
            (&Method::GET, None) => self.list(headers, &target, &query).await,
            (&Method::GET, Some(name)) => {
                let (namespace, freshness) = (target.namespace.as_deref(), query.freshness()?);
                let scope = Scope {
                    namespace,
                    name: Some(name),
                    ..Scope::default()
                };
                // Before the read, which is at least as new.
                let staleness = self.staleness(&kind, scope, freshness);
                let object = self.store.get(&kind, namespace, name, freshness).await?;
                let response = self.one(200, headers, &target, &query, &object);
                Ok(with_staleness(response, staleness))
            }
            (&Method::POST, None) => {
                if kind.namespaced && target.namespace.is_none() {
                    return Err(ApiError::method_not_allowed(format!(
                        "{} are created in a namespace",
                        kind.plural
                    )));
                }
                query.check_options("CreateOptions", false)?;
                let object = parse_body(headers, body).await?;
                let writer = writer(headers, &target, &query, "");
                let (object, warnings) =
                    write::create(self, &target, &query, object, &writer).await?;
                Ok(with_warnings(
                    self.one(201, headers, &target, &query, &object),
                    &warnings,
                ))
            }
            (&Method::PUT, Some(_)) => {
                query.check_options("UpdateOptions", false)?;
                let object = parse_body(headers, body).await?;
                let writer = writer(headers, &target, &query, "");
                let change = Change::Replace(object);
                self.change(headers, &target, &query, change, &writer).await
            }
            (&Method::PATCH, Some(name)) => {
                let media = media_type(headers);
                let is_apply = media.starts_with("application/apply-patch");
                query.check_options("PatchOptions", is_apply)?;
                let kind_of = patch_kind(&media, &kind)?;
                let change = match parse_patch(headers, body).await {
                    Ok(patch) => kind_of(patch),
                    Err(error) => {
                        // A patch is read when there is something to patch.
                        if !is_apply {
                            let namespace = target.namespace.as_deref();
                            self.store
                                .get(&kind, namespace, name, Freshness::Latest)
                                .await?;
                        }
                        return Err(error);
                    }
                };
                let writer = writer(headers, &target, &query, "");
                self.change(headers, &target, &query, change, &writer).await
            }
            (&Method::DELETE, Some(_)) => {
                let options = delete_options(headers, &query, body).await?;
                let (object, gone) = write::delete(self, &target, &options).await?;
                if gone {
                    let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
                        "details": {"name": target.name, "group": kind.group, "kind": kind.plural,
                            "uid": object.pointer("/metadata/uid")}});
                    return Ok(respond(200, &body));
                }
                Ok(self.one(200, headers, &target, &query, &object))
            }
            (&Method::DELETE, None) => {
                let options = delete_options(headers, &query, body).await?;
                self.delete_all(&target, &query, &options).await
            }
            _ => Err(ApiError::method_not_allowed(format!(
                "{method} is not possible on this path"
            ))),
        }
    }

    async fn change(
        self: &Arc<Self>,
        headers: &HeaderMap,
        target: &Target,
        query: &Query,
        change: Change,
        writer: &Writer,
    ) -> Result<Response<Body>, ApiError> {
        let done = write::change(self, target, query, change, writer).await?;
        let code = if done.created { 201 } else { 200 };
        Ok(with_warnings(
            self.one(code, headers, target, query, &done.object),
            &done.warnings,
        ))
    }

    async fn delete_all(
        self: &Arc<Self>,
        target: &Target,
        query: &Query,
        options: &Value,
    ) -> Result<Response<Body>, ApiError> {
        // As they were, like in Kubernetes: a client counts them.
        let Chosen {
            objects, metadata, ..
        } = self.choose(target, query).await?;
        for object in &objects {
            let (namespace, name) = names(object);
            let one = Target {
                namespace: Some(namespace).filter(|namespace| !namespace.is_empty()),
                name: Some(name),
                ..target.clone()
            };
            match write::delete(self, &one, options).await {
                // Somebody else was faster.
                Err(error) if error.code == 404 => {}
                deleted => drop(deleted?),
            }
        }
        Ok(respond(200, &list_object(&target.kind, objects, metadata)))
    }

    /// One object, as itself or as a table.
    fn one(
        &self,
        code: u16,
        headers: &HeaderMap,
        target: &Target,
        query: &Query,
        object: &Value,
    ) -> Response<Body> {
        let include = match include(query) {
            Ok(include) if wants_table(headers) => include,
            Err(error) if wants_table(headers) => return failure(&error),
            _ => return respond(code, &typed(&target.kind, object)),
        };
        let object = typed(&target.kind, object);
        respond(code, &table::of_one(&target.kind, object, include))
    }

    fn staleness(&self, kind: &Kind, scope: Scope<'_>, freshness: Freshness) -> Option<Staleness> {
        match freshness {
            Freshness::Any => self.store.staleness(kind, scope),
            Freshness::Latest | Freshness::AtLeast(_) => None,
        }
    }
}

/// Says in headers how far behind an answer may be: `krake-age-ms`, milliseconds or `unknown`, and
/// `krake-index`.
fn with_staleness(mut response: Response<Body>, staleness: Option<Staleness>) -> Response<Body> {
    let Some(Staleness { age, index }) = staleness else {
        return response;
    };
    let headers = response.headers_mut();
    let age = age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
    let age = age.map_or(HeaderValue::from_static("unknown"), HeaderValue::from);
    headers.insert("krake-age-ms", age);
    if let Some(index) = index {
        headers.insert("krake-index", HeaderValue::from(index));
    }
    response
}

/// What a patch of this media type does.
fn patch_kind(media: &str, kind: &Kind) -> Result<fn(Value) -> Change, ApiError> {
    match media {
        "application/merge-patch+json" => Ok(Change::Merge),
        "application/json-patch+json" => Ok(Change::Json),
        "application/apply-patch+yaml" | "application/apply-patch+cbor" => Ok(Change::Apply),
        "application/strategic-merge-patch+json"
            if strategic::is_supported(kind.schema.as_ref()) =>
        {
            Ok(Change::Strategic)
        }
        "application/strategic-merge-patch+json" => Err(ApiError::unsupported_media_type(
            "strategic merge patch is not supported here; use merge patch (kubectl patch --type=merge), JSON patch or server-side apply",
        )),
        other => Err(ApiError::unsupported_media_type(format!(
            "`{other}` is no patch that is supported: application/merge-patch+json, application/json-patch+json, application/apply-patch+yaml"
        ))),
    }
}

/// An object with the `apiVersion` and `kind` it is asked under.
fn typed(kind: &Kind, object: &Value) -> Value {
    let mut object = object.clone();
    object["apiVersion"] = kind.api_version().into();
    object["kind"] = kind.kind.clone().into();
    object
}

fn wants_table(headers: &HeaderMap) -> bool {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    accept.contains("as=Table") && accept.contains("v=v1")
}

/// Whether an answer in JSON is acceptable.
fn accepts_json(headers: &HeaderMap) -> bool {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let is_good = |part: &str| {
        let media = part.split(';').next().unwrap_or_default().trim();
        matches!(media, "application/json" | "application/*" | "*/*")
    };
    accept.trim().is_empty() || accept.split(',').any(is_good)
}

fn writer(headers: &HeaderMap, target: &Target, query: &Query, default: &str) -> Writer {
    let agent = headers
        .get(header::USER_AGENT)
        .and_then(|value| value.to_str().ok())
        .and_then(|agent| agent.split('/').next())
        .filter(|agent| !agent.is_empty())
        .unwrap_or("unknown");
    let manager =
        query
            .get("fieldManager")
            .unwrap_or(if default.is_empty() { agent } else { default });
    Writer {
        manager: manager.chars().take(128).collect(),
        subresource: target.subresource.clone(),
        leaves_alone: match target.subresource.as_str() {
            "status" => Some("spec"),
            _ if target.kind.status => Some("status"),
            _ => None,
        },
        api_version: target.kind.api_version(),
        time: table::whole_seconds(jiff::Timestamp::now()),
    }
}

fn with_warnings(mut response: Response<Body>, warnings: &[Cause]) -> Response<Body> {
    for warning in warnings {
        let text = format!("299 - \"{}\"", warning.message.replace('"', "\\\""));
        if let Ok(value) = HeaderValue::from_str(&text) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    response
}
