//! Watches.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::{HeaderMap, HeaderValue, Response, header};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::list::check_watch_options;
use super::query::{Query, include, number, selectors};
use super::{Service, Target, typed, wants_table};
use crate::error::ApiError;
use crate::selector::{FieldSelector, LabelSelector};
use crate::store::{Event, EventKind, EventLog, Freshness, Read};
use crate::table::{self, Include};

/// A watch without a time limit of its own ends after this long; clients start it again.
const WATCH_TIME: Duration = Duration::from_secs(45 * 60);
/// A watch that asked for bookmarks gets one at least this often.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(30);

impl Service {
    pub(super) async fn watch(
        self: &Arc<Self>,
        headers: &HeaderMap,
        target: &Target,
        query: &Query,
    ) -> Result<Response<Body>, ApiError> {
        let (labels, fields) = selectors(query)?;
        check_watch_options(query)?;
        let from = query.get("resourceVersion");
        // Said of neither way, it depends on where the watch begins.
        let initially = query
            .get("sendInitialEvents")
            .map(|said| !matches!(said.to_ascii_lowercase().as_str(), "false" | "0"));
        let from_now = matches!(from, None | Some("0"));
        let mut scope = target.scope(&fields);
        self.store.events(&target.kind, scope).check_flow()?;
        let mut initial = Vec::new();
        let position;
        let revision;
        if initially == Some(true) || from_now {
            let freshness = if from.is_none() {
                Freshness::Latest
            } else {
                query.freshness()?
            };
            // The position is taken first, so that nothing is missed.
            position = self.store.events(&target.kind, scope).end();
            if initially == Some(false) {
                scope.most = Some(0);
            }
            let listing = self.store.list(&target.kind, scope, freshness).await?;
            revision = listing.revision;
            initial = listing.objects().cloned().collect();
        } else {
            revision = number(from.unwrap_or_default())?;
            let events = self.store.events(&target.kind, scope);
            position = events.position_after(revision)?;
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
            let work = watch.run(initial, initially == Some(true), revision, position);
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
    async fn run(self, initial: Vec<Arc<Value>>, mark_end: bool, after: u64, mut position: u64) {
        let mut revision = after;
        for object in initial {
            if self.selects(&object) && !self.send("ADDED", &object).await {
                return;
            }
        }
        if mark_end && !self.bookmark(revision, true).await {
            return;
        }
        let mut newest = self.events().newest();
        let mut bookmark = tokio::time::interval(BOOKMARK_INTERVAL);
        bookmark.tick().await;
        loop {
            match self.events().read(position, 256) {
                Read::Gone => {
                    let error = ApiError::gone("the watch fell too far behind: list again");
                    return self.end(&error).await;
                }
                Read::Events(events, next) => {
                    let more = !events.is_empty();
                    for event in events.into_iter().filter(|event| event.revision > after) {
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
            if let Err(error) = self.events().check_flow() {
                return self.end(&error).await;
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

    async fn end(&self, error: &ApiError) {
        let line = json!({"type": "ERROR", "object": error.to_status()});
        let _ = self.sender.send(Ok(format!("{line}\n"))).await;
    }

    fn events(&self) -> &EventLog {
        let scope = self.target.scope(&self.fields);
        self.service.store.events(&self.target.kind, scope)
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
            object = table::of_one(&self.target.kind, object, include);
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
