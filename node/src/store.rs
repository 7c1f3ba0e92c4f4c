//! The API's store over the catalog.

mod follow;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use itertools::Itertools as _;
use krake_consensus::{Command, Entry, Expect, Listed, Operation, Part, ProposeError, ReadError};
use krake_kube_api::store::{modified, set_revision};
use krake_kube_api::{
    ApiError, EventLog, Freshness, Kind, LazyObject, Listing, Scope, Staleness, Store,
};
use krake_model::{AppKey, GroupId, Revision};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::Instant;

use self::follow::follow;
use crate::catalog::{self, Catalog, PATIENCE};
use crate::merge::Merge;
use crate::records;

/// Events kept for watches over all shards: with an application of 10 KiB about 40 MiB.
const EVENTS_KEPT: usize = 2_000;
/// Of one group at least, for watches of what is in it alone.
const GROUP_EVENTS_MIN: usize = 64;

/// Adds to an object what is not committed: a site's newest report.
pub trait Overlay: Send + Sync + 'static {
    /// Changes a copy of the committed object for display.
    fn add(&self, plural: &str, object: &mut Value);
}

/// Objects in the catalog.
pub struct CatalogStore {
    catalog: Catalog,
    /// Of all shards.
    events: EventLog,
    /// Of each group for itself, at once.
    group_events: BTreeMap<GroupId, EventLog>,
    merge: Mutex<Merge>,
    /// Up to where each group's changes were known when the store was made.
    known: BTreeMap<GroupId, Revision>,
    /// All shards are known up to this revision.
    closed: AtomicU64,
    /// Somebody asked for the events of all shards.
    wanted: Arc<Notify>,
    overlay: Arc<dyn Overlay>,
}

/// Keys of the objects that can be watched, by the plural of their kind.
const WATCHED: [&str; 5] = [
    "applications/",
    "sites/",
    "placements/",
    "nodes/",
    "events/",
];

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
    /// A store whose watches may go on from as far back as changes are kept.
    pub fn new(catalog: Catalog, overlay: Arc<dyn Overlay>) -> Arc<Self> {
        let batches = catalog.host.watch(&WATCHED);
        let groups = Catalog::all_groups(catalog.shards);
        let of_shard = (EVENTS_KEPT / groups.len()).max(GROUP_EVENTS_MIN);
        let (mut group_events, mut known) = (BTreeMap::new(), BTreeMap::new());
        let (mut floor, mut past) = (0, Vec::new());
        for group in groups {
            let kept = catalog.host.kept_changes(group);
            let is_shard = group != GroupId::META;
            if is_shard {
                floor = kept.floor.number().max(floor);
            }
            let capacity = if is_shard { of_shard } else { EVENTS_KEPT };
            group_events.insert(group, EventLog::new(capacity, kept.floor.number()));
            known.insert(group, kept.newest);
            past.push((group, kept.changes));
        }
        let store = Arc::new(Self {
            catalog,
            events: EventLog::new(EVENTS_KEPT, floor),
            group_events,
            merge: Mutex::new(Merge::new(EVENTS_KEPT)),
            known,
            closed: AtomicU64::new(0),
            wanted: Arc::default(),
            overlay,
        });
        for (group, changes) in past {
            for change in changes {
                store.take_changes(group, change.revision, &change.changes);
            }
        }
        tokio::spawn(follow(Arc::downgrade(&store), batches));
        store
    }

    /// A list over all shards as they were at one moment, and the revision of that moment.
    async fn cut(
        &self,
        groups: &[GroupId],
        part: Part<'_>,
    ) -> Result<(Vec<Listed>, Revision), ApiError> {
        let host = &self.catalog.host;
        let deadline = Instant::now() + PATIENCE;
        let left = || deadline.saturating_duration_since(Instant::now());
        'again: loop {
            let closed = |at| async move {
                let stamp = Revision::from_number(at);
                let closed = host.close(groups, stamp, left()).await;
                closed.map_err(|error| read_error(&error))
            };
            let mut at = newest(&self.catalog, groups);
            closed(at).await?;
            // What was committed before is here now, and may be above.
            let now = newest(&self.catalog, groups);
            if now > at {
                at = now;
                closed(at).await?;
            }
            self.closed.fetch_max(at, Ordering::Relaxed);
            let mut found = Vec::new();
            for group in groups {
                match host.list_at(*group, part, Revision::from_number(at)).await {
                    Ok(listed) => found.push(listed),
                    // Very much was written meanwhile.
                    Err(_) => continue 'again,
                }
            }
            return Ok((found, Revision::from_number(at)));
        }
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

    /// Where objects of a kind can be.
    fn groups(&self, kind: &Kind, scope: Scope<'_>) -> Vec<GroupId> {
        match (kind.plural.as_str(), scope.namespace, scope.name) {
            ("sites" | "nodes", ..) => vec![GroupId::META],
            (_, Some(namespace), Some(name)) => vec![self.group(kind, Some(namespace), name)],
            _ => self.catalog.shard_groups(),
        }
    }

    /// Whether everything of the groups up to `revision` is here for certain.
    fn has(&self, groups: &[GroupId], revision: u64) -> bool {
        let closed = if groups.contains(&GroupId::META) {
            0 // Only shards are closed.
        } else {
            self.closed.load(Ordering::Relaxed)
        };
        let own = match groups {
            // Its own revisions come in order.
            [group] if Revision::from_number(revision).group_number() == group.number() => {
                self.catalog.host.revision(*group).number()
            }
            _ => 0,
        };
        own.max(closed) >= revision
    }

    async fn freshen(&self, groups: &[GroupId], freshness: Freshness) -> Result<(), ApiError> {
        match freshness {
            Freshness::Any => Ok(()),
            Freshness::AtLeast(revision) if self.has(groups, revision) => Ok(()),
            Freshness::Latest | Freshness::AtLeast(_) => self
                .catalog
                .host
                .read_barrier(groups, PATIENCE)
                .await
                .map_err(|error| read_error(&error)),
        }
    }

    /// Waits until everything of the groups up to `at` is here and nothing more will be stamped so,
    /// or says that no such revision was given. What a client claims must not move the stamps:
    /// nothing is closed beyond what was committed.
    async fn reach(&self, groups: &[GroupId], at: Revision) -> Result<(), ApiError> {
        if self.has(groups, at.number()) {
            return Ok(());
        }
        let host = &self.catalog.host;
        let deadline = Instant::now() + PATIENCE;
        let left = || deadline.saturating_duration_since(Instant::now());
        let newest = || newest(&self.catalog, &Catalog::all_groups(self.catalog.shards));
        if newest() < at.number() {
            let read = host.read_barrier(groups, left()).await;
            read.map_err(|error| read_error(&error))?;
        }
        if newest() < at.number() {
            return Err(ApiError::too_new(at.number(), newest()));
        }
        let closed = host.close(groups, at, left()).await;
        closed.map_err(|error| read_error(&error))?;
        if groups == self.catalog.shard_groups() {
            self.closed.fetch_max(at.number(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// What was found in each group, in order and as it is shown.
    fn listing(
        &self,
        kind: &Kind,
        scope: Scope<'_>,
        groups: Vec<Listed>,
        revision: Revision,
    ) -> Listing {
        let mut more = groups.iter().map(|listed| listed.more).sum();
        let groups = groups.into_iter().map(|listed| listed.entries);
        let mut found: Vec<(String, Entry)> = groups
            .kmerge_by(|(one, _), (other, _)| one < other)
            .filter(|(key, _)| {
                let name = key.rsplit('/').next();
                scope.name.is_none_or(|wanted| name == Some(wanted))
            })
            .collect();
        let most = scope.most.unwrap_or(usize::MAX);
        more += found.len().saturating_sub(most);
        found.truncate(most);
        let items = found.into_iter().map(|(key, entry)| {
            let (overlay, plural) = (Arc::clone(&self.overlay), kind.plural.clone());
            LazyObject::later(move || {
                let mut object = object(&key, &entry)?;
                overlay.add(&plural, &mut object);
                Some(object)
            })
        });
        Listing {
            items: items.collect(),
            more,
            revision: revision.number(),
        }
    }

    async fn propose(&self, group: GroupId, operation: Operation) -> Result<u64, ProposeError> {
        let command = Command::new(vec![operation]);
        let committed = self.catalog.host.submit(group, command, PATIENCE).await?;
        Ok(committed.revision.number())
    }
}

/// The keys of the objects that are meant, but for their name.
struct Range {
    prefix: String,
    after: Option<String>,
    most: usize,
}

impl Range {
    fn of(kind: &Kind, scope: Scope<'_>) -> Self {
        let after = scope.after;
        Self {
            prefix: match scope.namespace {
                Some(namespace) => format!("{}/{namespace}/", kind.plural),
                None => format!("{}/", kind.plural),
            },
            after: after
                .map(|(namespace, name)| records::object_key(&kind.plural, namespace, name)),
            // Which of them have the name is seen later.
            most: scope
                .most
                .filter(|_| scope.name.is_none())
                .unwrap_or(usize::MAX),
        }
    }

    fn part(&self) -> Part<'_> {
        Part {
            prefix: &self.prefix,
            after: self.after.as_deref(),
            most: self.most,
        }
    }
}

/// The highest revision that this node has of these groups.
fn newest(catalog: &Catalog, groups: &[GroupId]) -> u64 {
    let revisions = groups.iter().map(|group| catalog.host.revision(*group));
    revisions.max().unwrap_or(Revision::NONE).number()
}

/// Why a read could not be confirmed, as the API says it.
pub fn read_error(error: &ReadError) -> ApiError {
    let text = format!("{error}; resourceVersion=0 reads what this node has");
    match error {
        ReadError::Timeout { .. } => waited(text),
        ReadError::UnknownGroup { .. } | ReadError::DiskFull | ReadError::Stopped => {
            ApiError::unavailable(text)
        }
    }
}

/// Why a write was not made, as the API says it.
pub fn write_error(error: &ProposeError) -> ApiError {
    match error {
        ProposeError::TooLarge { .. } | ProposeError::Full { .. } => {
            ApiError::too_large(error.to_string())
        }
        ProposeError::Conflict { .. } => ApiError::conflict(error.to_string()),
        ProposeError::Invalid(_) => ApiError::bad_request(error.to_string()),
        ProposeError::Timeout { .. } => waited(error.to_string()),
        ProposeError::UnknownGroup { .. } | ProposeError::DiskFull | ProposeError::Stopped => {
            ApiError::unavailable(error.to_string())
        }
    }
}

/// This node has tried for as long as anybody should wait. Where it says when to try again, kubectl
/// does so ten times, and its user learns after two minutes that there is no majority.
fn waited(text: String) -> ApiError {
    ApiError {
        retry_after: None,
        ..ApiError::unavailable(text)
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
        scope: Scope<'_>,
        freshness: Freshness,
    ) -> Result<Listing, ApiError> {
        let (groups, range) = (self.groups(kind, scope), Range::of(kind, scope));
        let as_it_is = match freshness {
            Freshness::Any => true,
            Freshness::AtLeast(revision) => self.has(&groups, revision),
            Freshness::Latest => false,
        };
        let (found, revision) = match groups[..] {
            [group] => {
                self.freshen(&groups, freshness).await?;
                let (listed, revision) = self.catalog.host.list_part(group, range.part());
                (vec![listed], revision)
            }
            // A watch from there may show again what is here already, and misses nothing.
            _ if as_it_is => {
                let closed = self.closed.load(Ordering::Relaxed);
                let lists = groups.iter();
                let lists = lists.map(|group| self.catalog.host.list_part(*group, range.part()).0);
                (lists.collect(), Revision::from_number(closed))
            }
            _ => self.cut(&groups, range.part()).await?,
        };
        Ok(self.listing(kind, scope, found, revision))
    }

    async fn list_as_of(
        &self,
        kind: &Kind,
        scope: Scope<'_>,
        revision: u64,
    ) -> Result<Listing, ApiError> {
        let groups = self.groups(kind, scope);
        let at = Revision::from_number(revision);
        self.reach(&groups, at).await?;
        let range = Range::of(kind, scope);
        let mut found = Vec::new();
        for group in groups {
            let listed = self.catalog.host.list_at(group, range.part(), at).await;
            found.push(listed.map_err(|error| ApiError::gone(error.to_string()))?);
        }
        Ok(self.listing(kind, scope, found, at))
    }

    fn staleness(&self, kind: &Kind, scope: Scope<'_>) -> Option<Staleness> {
        let groups = self.groups(kind, scope);
        let all = groups
            .iter()
            .map(|group| self.catalog.host.staleness(*group));
        let all: Vec<krake_consensus::Staleness> = all.collect();
        let ages: Option<Vec<Duration>> = all.iter().map(|one| one.age).collect();
        Some(Staleness {
            age: ages.and_then(|ages| ages.into_iter().max()),
            index: match all[..] {
                [one] => Some(one.index),
                _ => None,
            },
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

    fn events(&self, kind: &Kind, scope: Scope<'_>) -> &EventLog {
        if let [group] = self.groups(kind, scope)[..]
            && let Some(events) = self.group_events.get(&group)
        {
            return events;
        }
        self.wanted.notify_one();
        &self.events
    }
}
