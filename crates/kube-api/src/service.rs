//! Requests: one path grammar and one set of verbs for all kinds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::body::Body;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::discovery;
use crate::error::{ApiError, Cause};
use crate::kinds::{Kind, Registry};
use crate::managed::Writer;
use crate::openapi_v2;
use crate::selector::{FieldSelector, LabelSelector};
use crate::store::{Event, EventKind, Freshness, Listing, Read, Store};
use crate::strategic;
use crate::table::{self, Include};
use crate::write::{self, Change};

/// A body has at most this many bytes (3 MiB, as in Kubernetes).
pub const BODY_BYTES_MAX: usize = 3 * 1024 * 1024;
/// A watch without a time limit of its own ends after this long; clients start it again.
const WATCH_TIME: Duration = Duration::from_secs(45 * 60);
/// A watch that asked for bookmarks gets one at least this often.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(30);
/// Lists of all kinds return at most this many objects at once.
const LIST_MAX: usize = 50_000;

/// The name of a field manager has at most this many bytes, as in Kubernetes.
const MANAGER_BYTES_MAX: usize = 128;

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

/// The query, decoded.
#[derive(Debug, Default, Clone)]
pub(crate) struct Query(BTreeMap<String, String>);

impl Query {
    fn parse(query: Option<&str>) -> Result<Self, ApiError> {
        let pairs: Vec<(String, String)> = serde_urlencoded::from_str(query.unwrap_or_default())
            .map_err(|error| {
                ApiError::bad_request(format!("the query is not readable: {error}"))
            })?;
        Ok(Self(pairs.into_iter().collect()))
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0
            .get(key)
            .map(String::as_str)
            .filter(|v| !v.is_empty())
    }

    pub(crate) fn flag(&self, key: &str) -> bool {
        matches!(
            self.0.get(key).map(String::as_str),
            Some("true" | "1" | "True")
        )
    }

    pub(crate) fn dry_run(&self) -> bool {
        self.get("dryRun").is_some()
    }

    /// Checks the options of a write, which are `CreateOptions`, `UpdateOptions` or `PatchOptions`.
    fn check_options(&self, name: &str, is_apply: bool) -> Result<(), ApiError> {
        let mut causes = Vec::new();
        if self.get("dryRun").is_some_and(|value| value != "All") {
            causes.push(not_supported("dryRun", "All"));
        }
        let allowed = ["Ignore", "Strict", "Warn"];
        if self
            .get("fieldValidation")
            .is_some_and(|value| !allowed.contains(&value))
        {
            causes.push(not_supported("fieldValidation", &allowed.join(", ")));
        }
        let manager = self.get("fieldManager");
        if manager.is_some_and(|manager| manager.len() > MANAGER_BYTES_MAX) {
            let message = format!("has more than {MANAGER_BYTES_MAX} bytes");
            causes.push(Cause::new("fieldManager", message).because("FieldValueTooLong"));
        }
        if is_apply && manager.is_none() {
            causes.push(
                Cause::new(
                    "fieldManager",
                    "Required value: is required for apply patch",
                )
                .because("FieldValueRequired"),
            );
        }
        if name == "PatchOptions" && !is_apply && self.get("force").is_some() {
            let message = "may not be specified for a patch that is no apply";
            causes.push(Cause::new("force", message).because("FieldValueForbidden"));
        }
        refuse_options(name, causes)
    }

    fn freshness(&self) -> Result<Freshness, ApiError> {
        match self.get("resourceVersion") {
            None => Ok(Freshness::Latest),
            Some("0") => Ok(Freshness::Any),
            Some(text) => Ok(Freshness::AtLeast(number(text)?)),
        }
    }
}

fn not_supported(field: &str, supported: &str) -> Cause {
    Cause::new(
        field,
        format!("Unsupported value: supported values: {supported}"),
    )
    .because("FieldValueNotSupported")
}

fn refuse_options(name: &str, causes: Vec<Cause>) -> Result<(), ApiError> {
    if causes.is_empty() {
        Ok(())
    } else {
        Err(ApiError::invalid("meta.k8s.io", name, "", causes))
    }
}

fn number(text: &str) -> Result<u64, ApiError> {
    text.parse().map_err(|_| {
        ApiError::bad_request(format!("invalid resourceVersion `{text}`: not a number"))
    })
}

/// Whether a query asks for a watch, whose answer does not end by itself.
pub fn is_watch(query: Option<&str>) -> bool {
    Query::parse(query).is_ok_and(|query| query.flag("watch"))
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
                let object = self
                    .store
                    .get(&kind, target.namespace.as_deref(), name, query.freshness()?)
                    .await?;
                Ok(self.one(200, headers, &target, &query, &object))
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
        let (labels, fields) = selectors(query)?;
        let listing = self
            .store
            .list(&target.kind, target.namespace.as_deref(), Freshness::Latest)
            .await?;
        let mut items = Vec::new();
        for object in listing.items {
            if !labels.matches(&object) || !fields.matches(&object) {
                continue;
            }
            let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
            let one = Target {
                namespace: text("/metadata/namespace").map(ToOwned::to_owned),
                name: text("/metadata/name").map(ToOwned::to_owned),
                ..target.clone()
            };
            write::delete(self, &one, options).await?;
            // As they were, like in Kubernetes: a client counts them.
            items.push(typed(&target.kind, &object));
        }
        Ok(respond(
            200,
            &list_object(&target.kind, items, listing.revision),
        ))
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
        let revision = object
            .pointer("/metadata/resourceVersion")
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned();
        let body = table::table(
            &target.kind,
            std::slice::from_ref(&object),
            &revision,
            include,
            true,
            jiff::Timestamp::now(),
        );
        respond(code, &body)
    }

    async fn list(
        &self,
        headers: &HeaderMap,
        target: &Target,
        query: &Query,
    ) -> Result<Response<Body>, ApiError> {
        let (labels, fields) = selectors(query)?;
        // It is not taken (docs/adr/0005), but has to be one.
        if query
            .get("limit")
            .is_some_and(|limit| limit.parse::<i64>().is_err())
        {
            return Err(ApiError::bad_request("limit is not a number"));
        }
        let Listing { items, revision } = self
            .store
            .list(
                &target.kind,
                target.namespace.as_deref(),
                query.freshness()?,
            )
            .await?;
        let items: Vec<Value> = items
            .iter()
            .filter(|object| labels.matches(object) && fields.matches(object))
            .take(LIST_MAX)
            .map(|object| typed(&target.kind, object))
            .collect();
        if wants_table(headers) {
            let body = table::table(
                &target.kind,
                &items,
                &revision.to_string(),
                include(query)?,
                true,
                jiff::Timestamp::now(),
            );
            return Ok(respond(200, &body));
        }
        Ok(respond(200, &list_object(&target.kind, items, revision)))
    }

    async fn watch(
        self: &Arc<Self>,
        headers: &HeaderMap,
        target: &Target,
        query: &Query,
    ) -> Result<Response<Body>, ApiError> {
        let (labels, fields) = selectors(query)?;
        let from = query.get("resourceVersion");
        let send_initial = query.flag("sendInitialEvents");
        let mut initial = Vec::new();
        let position;
        let revision;
        if send_initial || matches!(from, None | Some("0")) {
            let freshness = if from.is_none() {
                Freshness::Latest
            } else {
                query.freshness()?
            };
            // The position is taken first: what happens between is seen twice, never missed.
            position = self.store.events().end();
            let listing = self
                .store
                .list(&target.kind, target.namespace.as_deref(), freshness)
                .await?;
            revision = listing.revision;
            initial = listing.items;
        } else {
            revision = number(from.unwrap_or_default())?;
            position = self.store.events().position_after(revision)?;
        }
        let time = query
            .get("timeoutSeconds")
            .and_then(|text| text.parse().ok())
            .map_or(WATCH_TIME, Duration::from_secs)
            .min(WATCH_TIME);
        let (sender, receiver) = mpsc::channel::<Result<String, std::convert::Infallible>>(64);
        let watch = Watch {
            service: Arc::clone(self),
            target: target.clone(),
            labels,
            fields,
            table: wants_table(headers).then(|| include(query)).transpose()?,
            bookmarks: query.flag("allowWatchBookmarks"),
            sender,
        };
        tokio::spawn(async move {
            let work = watch.run(initial, send_initial, revision, position);
            let _ = tokio::time::timeout(time, work).await;
        });
        let stream = tokio_stream::wrappers::ReceiverStream::new(receiver);
        let mut response = Response::new(Body::from_stream(stream));
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        Ok(response)
    }
}

struct Watch {
    service: Arc<Service>,
    target: Target,
    labels: LabelSelector,
    fields: FieldSelector,
    table: Option<Include>,
    bookmarks: bool,
    sender: mpsc::Sender<Result<String, std::convert::Infallible>>,
}

impl Watch {
    /// Runs until the client goes, the position is gone or the caller's time limit ends it.
    async fn run(
        self,
        initial: Vec<Arc<Value>>,
        mark_end: bool,
        mut revision: u64,
        mut position: u64,
    ) {
        for object in initial {
            if self.selects(&object) && !self.send("ADDED", &object).await {
                return;
            }
        }
        if mark_end && !self.bookmark(revision, true).await {
            return;
        }
        let mut newest = self.service.store.events().newest();
        let mut bookmark = tokio::time::interval(BOOKMARK_INTERVAL);
        bookmark.tick().await;
        loop {
            match self.service.store.events().read(position, 256) {
                Read::Gone => {
                    let error = ApiError::gone("the watch fell too far behind: list again");
                    let line = json!({"type": "ERROR", "object": error.to_status()});
                    let _ = self.sender.send(Ok(format!("{line}\n"))).await;
                    return;
                }
                Read::Events(events, next) => {
                    let more = !events.is_empty();
                    for event in events {
                        revision = event.revision;
                        if !self.deliver(&event).await {
                            return;
                        }
                    }
                    position = next;
                    if more {
                        continue;
                    }
                }
            }
            tokio::select! {
                changed = newest.changed() => if changed.is_err() { return },
                _ = bookmark.tick(), if self.bookmarks => {
                    if !self.bookmark(revision, false).await {
                        return;
                    }
                }
                () = self.sender.closed() => return,
            }
        }
    }

    fn selects_all(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    fn selects(&self, object: &Value) -> bool {
        self.labels.matches(object) && self.fields.matches(object)
    }

    async fn deliver(&self, event: &Event) -> bool {
        let kind = &self.target.kind;
        if event.resource.0 != kind.group || event.resource.1 != kind.plural {
            return true;
        }
        let object = event.object.value();
        if object.is_null() {
            return true;
        }
        let namespace = object
            .pointer("/metadata/namespace")
            .and_then(Value::as_str);
        if self.target.namespace.is_some() && self.target.namespace.as_deref() != namespace {
            return true;
        }
        let selected = self.selects(object);
        let now = event.kind != EventKind::Deleted && selected;
        let before = match &event.previous {
            _ if event.kind == EventKind::Added => false,
            // Without a selector every version is selected, and the one before is not read.
            _ if self.selects_all() => true,
            Some(previous) => self.selects(previous.value()),
            None => selected,
        };
        let word = match (before, now) {
            (false, false) => return true,
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
        };
        self.send(word, object).await
    }

    async fn send(&self, word: &str, object: &Value) -> bool {
        let mut object = typed(&self.target.kind, object);
        if let Some(include) = self.table {
            let revision = object
                .pointer("/metadata/resourceVersion")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned();
            object = table::table(
                &self.target.kind,
                std::slice::from_ref(&object),
                &revision,
                include,
                true,
                jiff::Timestamp::now(),
            );
        }
        let line = json!({"type": word, "object": object});
        self.sender.send(Ok(format!("{line}\n"))).await.is_ok()
    }

    async fn bookmark(&self, revision: u64, end_of_initial: bool) -> bool {
        let kind = &self.target.kind;
        let mut object = json!({
            "kind": kind.kind,
            "apiVersion": kind.api_version(),
            "metadata": {"resourceVersion": revision.to_string()},
        });
        if end_of_initial {
            object["metadata"]["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let line = json!({"type": "BOOKMARK", "object": object});
        self.sender.send(Ok(format!("{line}\n"))).await.is_ok()
    }
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

fn list_object(kind: &Kind, items: Vec<Value>, revision: u64) -> Value {
    json!({
        "kind": format!("{}List", kind.kind),
        "apiVersion": kind.api_version(),
        "metadata": {"resourceVersion": revision.to_string()},
        "items": items,
    })
}

fn selectors(query: &Query) -> Result<(LabelSelector, FieldSelector), ApiError> {
    Ok((
        LabelSelector::parse(query.get("labelSelector").unwrap_or_default())?,
        FieldSelector::parse(query.get("fieldSelector").unwrap_or_default())?,
    ))
}

fn wants_table(headers: &HeaderMap) -> bool {
    let accept = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    accept.contains("as=Table") && accept.contains("v=v1")
}

fn include(query: &Query) -> Result<Include, ApiError> {
    match query.get("includeObject") {
        Some("None") => Ok(Include::None),
        Some("Object") => Ok(Include::Object),
        None | Some("Metadata") => Ok(Include::Metadata),
        Some(other) => Err(ApiError::bad_request(format!(
            "includeObject={other} is not None, Metadata or Object"
        ))),
    }
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

fn media_type(headers: &HeaderMap) -> String {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("application/json")
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase()
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

/// `DeleteOptions` of the body, completed by those of the query: a dry run that is asked for there
/// must never delete.
async fn delete_options(headers: &HeaderMap, query: &Query, body: Body) -> Result<Value, ApiError> {
    let mut options = match parse_body(headers, body).await? {
        Value::Null => json!({}),
        options @ Value::Object(_) => options,
        _ => return Err(ApiError::bad_request("DeleteOptions are an object")),
    };
    for field in ["propagationPolicy", "gracePeriodSeconds"] {
        if let (None, Some(text)) = (options.get(field), query.get(field)) {
            options[field] = text
                .parse::<i64>()
                .map_or_else(|_| text.into(), Value::from);
        }
    }
    if let (None, Some(text)) = (options.get("dryRun"), query.get("dryRun")) {
        options["dryRun"] = json!([text]);
    }
    let mut causes = Vec::new();
    let policies = ["Background", "Foreground", "Orphan"];
    let policy = options.get("propagationPolicy").and_then(Value::as_str);
    if policy.is_some_and(|policy| !policies.contains(&policy)) {
        causes.push(not_supported("propagationPolicy", &policies.join(", ")));
    }
    let runs = options.get("dryRun").and_then(Value::as_array);
    if runs.is_some_and(|runs| runs.iter().any(|run| run != "All")) {
        causes.push(not_supported("dryRun", "All"));
    }
    refuse_options("DeleteOptions", causes)?;
    Ok(options)
}

/// Reads a body of JSON or YAML within its limit; an empty one is null.
pub(crate) async fn parse_body(headers: &HeaderMap, body: Body) -> Result<Value, ApiError> {
    parse(&read_body(headers, body).await?)
}

/// The same of a patch, which is never empty.
async fn parse_patch(headers: &HeaderMap, body: Body) -> Result<Value, ApiError> {
    let bytes = read_body(headers, body).await?;
    if bytes.is_empty() {
        return Err(ApiError::bad_request("a patch needs a body"));
    }
    parse(&bytes)
}

async fn read_body(headers: &HeaderMap, body: Body) -> Result<axum::body::Bytes, ApiError> {
    let media = media_type(headers);
    let is_text = media.ends_with("json") || media.ends_with("yaml");
    if !is_text {
        return Err(ApiError::unsupported_media_type(format!(
            "`{media}` is not supported: send JSON or YAML"
        )));
    }
    axum::body::to_bytes(body, BODY_BYTES_MAX)
        .await
        .map_err(|_| {
            ApiError::too_large(format!(
                "the request has more than {BODY_BYTES_MAX} bytes; split it"
            ))
        })
}

/// Reads one JSON or YAML document; depth and aliases are bounded.
///
/// # Errors
/// 400 with the place.
pub fn parse(bytes: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| ApiError::bad_request(format!("the body is not UTF-8: {error}")))?;
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    let value = if text.trim_start().starts_with(['{', '[']) {
        crate::json::parse(text)
            .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))
    } else {
        yaml(text)
    };
    let mut value = value?;
    whole_numbers(&mut value);
    Ok(value)
}

fn yaml(text: &str) -> Result<Value, ApiError> {
    serde_saphyr::from_str(text).map_err(|error| {
        let mut inner = error.without_snippet();
        while let serde_saphyr::Error::AliasError { error, .. } = inner {
            inner = error.without_snippet();
        }
        let text = match (inner, error.location()) {
            (serde_saphyr::Error::MultipleDocuments { .. }, Some(place)) => format!(
                "line {} begins a second document, a request is for one object",
                place.line()
            ),
            (serde_saphyr::Error::DuplicateMappingKey { key, .. }, Some(place)) => format!(
                "line {} column {} repeats the key `{}`",
                place.line(),
                place.column(),
                key.as_deref().unwrap_or_default()
            ),
            (serde_saphyr::Error::Budget { .. }, Some(place)) => format!(
                "line {} column {} is nested too deeply, or is too much with its aliases expanded",
                place.line(),
                place.column()
            ),
            _ => error.to_string(),
        };
        ApiError::bad_request(format!("the body is not YAML: {text}"))
    })
}

/// `1.0` is kept as `1`, as in Kubernetes: who writes the one for the other changes nothing.
fn whole_numbers(value: &mut Value) {
    /// Up to here every whole number is a float of its own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().unwrap_or_default();
            if float.fract() == 0.0 && float.abs() < EXACT {
                *value = (float as i64).into();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(whole_numbers),
        Value::Object(map) => map.values_mut().for_each(whole_numbers),
        _ => {}
    }
}
