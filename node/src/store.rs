//! The API's store over the catalog.

use std::sync::Arc;

use async_trait::async_trait;
use krake_consensus::{Batch, Command, Entry, Expect, Operation, ProposeError, ReadError};
use krake_kube_api::store::{modified, set_revision};
use krake_kube_api::{
    ApiError, Event, EventKind, EventLog, EventObject, Freshness, Kind, Listing, Store,
};
use krake_model::{AppKey, GroupId, Revision};
use serde_json::Value;
use tokio::sync::broadcast::error::RecvError;

use crate::catalog::{self, Catalog, PATIENCE};
use crate::records;

/// Events kept for watches: with an application of 10 KiB about 40 MiB.
const EVENTS_KEPT: usize = 2_000;

/// Adds to an object what is not committed: a site's newest report.
pub trait Overlay: Send + Sync + 'static {
    /// Changes a copy of the committed object for display.
    fn add(&self, plural: &str, object: &mut Value);
}

/// Objects in the catalog.
pub struct CatalogStore {
    catalog: Catalog,
    events: EventLog,
    overlay: Arc<dyn Overlay>,
}

impl std::fmt::Debug for CatalogStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CatalogStore").finish_non_exhaustive()
    }
}

/// The app that an event's name begins with: `shop.18c5…` belongs to `shop`.
fn app_of_event(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(app, _)| app)
}

impl CatalogStore {
    /// A store whose watches begin now.
    pub fn new(catalog: Catalog, overlay: Arc<dyn Overlay>) -> Arc<Self> {
        let mut batches = catalog.host.watch();
        let floor = Catalog::all_groups(catalog.shards)
            .into_iter()
            .map(|group| catalog.host.revision(group).number())
            .max()
            .unwrap_or(0);
        let store = Arc::new(Self {
            catalog,
            events: EventLog::new(EVENTS_KEPT, floor),
            overlay,
        });
        let weak = Arc::downgrade(&store);
        tokio::spawn(async move {
            loop {
                let received = batches.recv().await;
                let Some(store) = weak.upgrade() else {
                    return;
                };
                match received {
                    Ok(batch) => store.take(batch),
                    Err(RecvError::Lagged(_)) => store.events.reset(store.newest()),
                    Err(RecvError::Closed) => return,
                }
            }
        });
        store
    }

    fn newest(&self) -> u64 {
        Catalog::all_groups(self.catalog.shards)
            .into_iter()
            .map(|group| self.catalog.host.revision(group).number())
            .max()
            .unwrap_or(0)
    }

    fn take(self: &Arc<Self>, batch: Batch) {
        if batch.reset {
            self.events.reset(batch.revision.number());
            return;
        }
        let mut events = Vec::new();
        for change in batch.changes {
            let Some((plural, _)) = change.key.split_once('/') else {
                continue;
            };
            if !matches!(
                plural,
                "applications" | "sites" | "placements" | "nodes" | "events"
            ) {
                continue;
            }
            let plural = plural.to_owned();
            let revision = batch.revision.number();
            let gone = change.entry.is_none();
            let later = |entry: Entry| {
                let (overlay, key) = (Arc::clone(&self.overlay), change.key.clone());
                let plural = plural.clone();
                EventObject::later(move || {
                    let mut object = object(&key, &entry)?;
                    overlay.add(&plural, &mut object);
                    if gone {
                        set_revision(&mut object, revision);
                    }
                    Some(object)
                })
            };
            let previous = change.previous.map(later);
            let (kind, object) = match (change.entry.map(later), &previous) {
                (Some(object), None) => (EventKind::Added, object),
                (Some(object), Some(_)) => (EventKind::Modified, object),
                (None, Some(previous)) => (EventKind::Deleted, previous.clone()),
                (None, None) => continue,
            };
            let groups: &[&str] = if plural == "events" {
                &["krake.dev", ""]
            } else {
                &["krake.dev"]
            };
            for group in groups {
                events.push(Event {
                    kind,
                    resource: ((*group).to_owned(), plural.clone()),
                    object: object.clone(),
                    previous: previous.clone(),
                    revision,
                });
            }
        }
        self.events.append(events);
    }

    fn group(&self, kind: &Kind, namespace: Option<&str>, name: &str) -> GroupId {
        let namespace = namespace.unwrap_or_default();
        match kind.plural.as_str() {
            "sites" | "nodes" => GroupId::META,
            "events" => self
                .catalog
                .group_of(&AppKey::new(namespace, app_of_event(name))),
            _ => self.catalog.group_of(&AppKey::new(namespace, name)),
        }
    }

    fn groups(&self, kind: &Kind) -> Vec<GroupId> {
        match kind.plural.as_str() {
            "sites" | "nodes" => vec![GroupId::META],
            _ => self.catalog.shard_groups(),
        }
    }

    async fn freshen(&self, groups: &[GroupId], freshness: Freshness) -> Result<(), ApiError> {
        let newest = || {
            groups
                .iter()
                .map(|group| self.catalog.host.revision(*group).number())
                .max()
                .unwrap_or(0)
        };
        match freshness {
            Freshness::Any => Ok(()),
            Freshness::AtLeast(revision) if newest() >= revision => Ok(()),
            Freshness::Latest | Freshness::AtLeast(_) => self
                .catalog
                .host
                .read_barrier(groups, PATIENCE)
                .await
                .map_err(|error| read_error(&error)),
        }
    }

    async fn propose(&self, group: GroupId, operation: Operation) -> Result<u64, ProposeError> {
        let command = Command::new(vec![operation]);
        let committed = self.catalog.host.propose(group, command, PATIENCE).await?;
        Ok(committed.revision.number())
    }
}

/// Why a read could not be confirmed, as the API says it.
pub fn read_error(error: &ReadError) -> ApiError {
    ApiError::unavailable(format!(
        "{error}; resourceVersion=0 reads what this node has"
    ))
}

/// Why a write was not made, as the API says it.
pub fn write_error(error: &ProposeError) -> ApiError {
    match error {
        ProposeError::TooLarge { .. } | ProposeError::Full { .. } => {
            ApiError::too_large(error.to_string())
        }
        ProposeError::Conflict { .. } => ApiError::conflict(error.to_string()),
        ProposeError::Invalid(_) => ApiError::bad_request(error.to_string()),
        ProposeError::Timeout { .. }
        | ProposeError::UnknownGroup { .. }
        | ProposeError::DiskFull
        | ProposeError::Stopped => ApiError::unavailable(error.to_string()),
    }
}

fn object(key: &str, entry: &Entry) -> Option<Value> {
    let mut object: Value = catalog::parse(key, entry)?;
    set_revision(&mut object, entry.modified.number());
    Some(object)
}

fn names(object: &Value) -> (Option<String>, String) {
    let text = |pointer: &str| {
        object
            .pointer(pointer)
            .and_then(Value::as_str)
            .map(ToOwned::to_owned)
    };
    (
        text("/metadata/namespace"),
        text("/metadata/name").unwrap_or_default(),
    )
}

/// An object as it is stored: the revision is the entry's own.
pub fn stored(object: &Value) -> bytes::Bytes {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("resourceVersion");
    }
    records::write(&object)
}

#[async_trait]
impl Store for CatalogStore {
    async fn get(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
        freshness: Freshness,
    ) -> Result<Arc<Value>, ApiError> {
        let group = self.group(kind, namespace, name);
        self.freshen(&[group], freshness).await?;
        let key = records::object_key(&kind.plural, namespace.unwrap_or_default(), name);
        let entry = self.catalog.host.get(group, &key);
        let mut object = entry
            .and_then(|entry| object(&key, &entry))
            .ok_or_else(|| ApiError::not_found(&kind.group, &kind.plural, name))?;
        self.overlay.add(&kind.plural, &mut object);
        Ok(Arc::new(object))
    }

    async fn list(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        freshness: Freshness,
    ) -> Result<Listing, ApiError> {
        let groups = self.groups(kind);
        self.freshen(&groups, freshness).await?;
        let prefix = match namespace {
            Some(namespace) => format!("{}/{namespace}/", kind.plural),
            None => format!("{}/", kind.plural),
        };
        let mut revision = Revision::NONE;
        let mut found = Vec::new();
        for group in groups {
            let (entries, stamp) = self.catalog.host.list(group, &prefix);
            revision = revision.max(stamp);
            for (key, entry) in entries {
                if let Some(mut object) = object(&key, &entry) {
                    self.overlay.add(&kind.plural, &mut object);
                    found.push((key, Arc::new(object)));
                }
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(Listing {
            items: found.into_iter().map(|(_, object)| object).collect(),
            revision: revision.number(),
        })
    }

    async fn create(&self, kind: &Kind, mut object: Value) -> Result<Arc<Value>, ApiError> {
        let (namespace, name) = names(&object);
        let group = self.group(kind, namespace.as_deref(), &name);
        let key = records::object_key(
            &kind.plural,
            namespace.as_deref().unwrap_or_default(),
            &name,
        );
        let operation = Operation::Put {
            key,
            value: stored(&object),
            expect: Expect::Absent,
        };
        match self.propose(group, operation).await {
            Ok(revision) => {
                set_revision(&mut object, revision);
                Ok(Arc::new(object))
            }
            Err(ProposeError::Conflict { .. }) => {
                Err(ApiError::already_exists(&kind.group, &kind.plural, &name))
            }
            Err(error) => Err(write_error(&error)),
        }
    }

    async fn update(
        &self,
        kind: &Kind,
        mut object: Value,
        expected: u64,
    ) -> Result<Arc<Value>, ApiError> {
        let (namespace, name) = names(&object);
        let group = self.group(kind, namespace.as_deref(), &name);
        let key = records::object_key(
            &kind.plural,
            namespace.as_deref().unwrap_or_default(),
            &name,
        );
        if kind.plural == "sites"
            && let Some(map) = object.as_object_mut()
        {
            map.remove("status");
        }
        let operation = Operation::Put {
            key,
            value: stored(&object),
            expect: Expect::Revision(Revision::from_number(expected)),
        };
        match self.propose(group, operation).await {
            Ok(revision) => {
                set_revision(&mut object, revision);
                Ok(Arc::new(object))
            }
            Err(ProposeError::Conflict { actual: None, .. }) => {
                Err(ApiError::not_found(&kind.group, &kind.plural, &name))
            }
            Err(ProposeError::Conflict { .. }) => Err(modified(kind, &name)),
            Err(error) => Err(write_error(&error)),
        }
    }

    async fn remove(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
        expected: u64,
    ) -> Result<(), ApiError> {
        let group = self.group(kind, namespace, name);
        let operation = Operation::Delete {
            key: records::object_key(&kind.plural, namespace.unwrap_or_default(), name),
            expect: Expect::Revision(Revision::from_number(expected)),
        };
        match self.propose(group, operation).await {
            Ok(_) => Ok(()),
            Err(ProposeError::Conflict { actual: None, .. }) => {
                Err(ApiError::not_found(&kind.group, &kind.plural, name))
            }
            Err(ProposeError::Conflict { .. }) => Err(modified(kind, name)),
            Err(error) => Err(write_error(&error)),
        }
    }

    fn events(&self) -> &EventLog {
        &self.events
    }
}
