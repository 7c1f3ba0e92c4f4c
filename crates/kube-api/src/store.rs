//! Where objects are kept, and the log of events that watches follow.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::watch;

use crate::error::ApiError;
use crate::kinds::Kind;

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It is new.
    Added,
    /// It changed.
    Modified,
    /// It is gone.
    Deleted,
}

/// An object that is only read from its bytes when somebody looks at it: nobody does at most events,
/// and at most of what a page of a list leaves out. Cheap to clone.
#[derive(Clone)]
pub struct LazyObject(Form);

type Later = LazyLock<Arc<Value>, Box<dyn FnOnce() -> Arc<Value> + Send>>;

#[derive(Clone)]
enum Form {
    Ready(Arc<Value>),
    Later(Arc<Later>),
}

impl LazyObject {
    /// An object that `read` makes when it is first asked for; `null` when it cannot.
    pub fn later(read: impl FnOnce() -> Option<Value> + Send + 'static) -> Self {
        let read = move || Arc::new(read().unwrap_or_default());
        Self(Form::Later(Arc::new(LazyLock::new(Box::new(read)))))
    }

    /// The object; `null` when it could not be read.
    pub fn value(&self) -> &Arc<Value> {
        match &self.0 {
            Form::Ready(value) => value,
            Form::Later(value) => value,
        }
    }
}

impl From<Arc<Value>> for LazyObject {
    fn from(value: Arc<Value>) -> Self {
        Self(Form::Ready(value))
    }
}

impl std::fmt::Debug for LazyObject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LazyObject").finish_non_exhaustive()
    }
}

/// One event.
#[derive(Debug, Clone)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// Group and plural of the object's kind.
    pub resource: (String, String),
    /// The object after the event (before it, when deleted), with `resourceVersion` set.
    pub object: LazyObject,
    /// The object before the event.
    pub previous: Option<LazyObject>,
    /// The event's revision.
    pub revision: u64,
}

/// A list and the revision to watch from.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// The objects, by namespace and name. One that is `null` could not be read.
    pub items: Vec<LazyObject>,
    /// A watch from here misses nothing.
    pub revision: u64,
}

impl Listing {
    /// The objects that can be read.
    pub fn objects(&self) -> impl Iterator<Item = &Arc<Value>> {
        let objects = self.items.iter().map(LazyObject::value);
        objects.filter(|object| !object.is_null())
    }
}

/// Which objects of a kind are meant: all, those of a namespace, or one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scope<'a> {
    /// Those of this namespace only.
    pub namespace: Option<&'a str>,
    /// Those of this name only.
    pub name: Option<&'a str>,
    /// Those only that a list shows after the one of this namespace (empty: the kind has none) and
    /// name, whether that is there or not.
    pub after: Option<(&'a str, &'a str)>,
}

/// How far behind a read with [`Freshness::Any`] may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Staleness {
    /// How long ago this server heard last from whoever decides about what was read; `None`: it does
    /// not know who that is.
    pub age: Option<Duration>,
    /// How far its log was applied, where what was read is in one log.
    pub index: Option<u64>,
}

/// How new a read must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// Everything committed before the request.
    Latest,
    /// Whatever this server has (`resourceVersion=0`).
    Any,
    /// At least this revision.
    AtLeast(u64),
}

/// Keeps objects. Implementations stamp `metadata.resourceVersion` on what they return.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// One object.
    ///
    /// # Errors
    /// 404, or why it cannot be read.
    async fn get(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
        freshness: Freshness,
    ) -> Result<Arc<Value>, ApiError>;

    /// Objects of a kind.
    ///
    /// # Errors
    /// Why they cannot be read.
    async fn list(
        &self,
        kind: &Kind,
        scope: Scope<'_>,
        freshness: Freshness,
    ) -> Result<Listing, ApiError>;

    /// Objects of a kind as they were at a revision that a list returned, here or at another server.
    ///
    /// # Errors
    /// 410 when what changed since is not kept any more, 504 when there is no such revision yet, or
    /// why they cannot be read.
    async fn list_as_of(
        &self,
        kind: &Kind,
        scope: Scope<'_>,
        revision: u64,
    ) -> Result<Listing, ApiError>;

    /// How far behind a read of these objects with [`Freshness::Any`] may be; `None`: it is not,
    /// there is no other copy.
    fn staleness(&self, kind: &Kind, scope: Scope<'_>) -> Option<Staleness> {
        let _ = (kind, scope);
        None
    }

    /// Writes a new object.
    ///
    /// # Errors
    /// 409 `AlreadyExists`, or why it cannot be written.
    async fn create(&self, kind: &Kind, object: Value) -> Result<Arc<Value>, ApiError>;

    /// Replaces an object that still has `expected` as its revision.
    ///
    /// # Errors
    /// 409 `Conflict`, 404, or why it cannot be written.
    async fn update(
        &self,
        kind: &Kind,
        object: Value,
        expected: u64,
    ) -> Result<Arc<Value>, ApiError>;

    /// Removes an object that still has `expected` as its revision.
    ///
    /// # Errors
    /// 409 `Conflict`, 404, or why it cannot be removed.
    async fn remove(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
        expected: u64,
    ) -> Result<(), ApiError>;

    /// The log that watches of these objects follow; there may be more in it. A revision that any
    /// read of the same scope returned, here or at another server, is one to go on from.
    fn events(&self, kind: &Kind, scope: Scope<'_>) -> &EventLog;
}

/// Events in the order of their revisions, the newest `capacity` of them. Watches read it by
/// position: none has a queue of its own.
#[derive(Debug)]
pub struct EventLog {
    inner: Mutex<Log>,
    newest: watch::Sender<u64>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Log {
    /// Position of the first event kept.
    first: u64,
    events: VecDeque<Event>,
    /// Resuming from a revision below this may miss something.
    floor: u64,
    /// A reset: everything before is invalid.
    resets: u64,
}

/// Reading on from a position.
#[derive(Debug)]
pub enum Read {
    /// Events and the next position.
    Events(Vec<Event>, u64),
    /// The position is no longer kept.
    Gone,
}

impl EventLog {
    /// An empty log; resuming from revisions below `floor` is refused.
    pub fn new(capacity: usize, floor: u64) -> Self {
        Self {
            inner: Mutex::new(Log {
                floor,
                ..Log::default()
            }),
            newest: watch::channel(0).0,
            capacity,
        }
    }

    /// Appends events, none of which may have a lower revision than one that is there.
    pub fn append(&self, events: impl IntoIterator<Item = Event>) {
        let end = {
            let mut log = self.inner.lock();
            for event in events {
                log.events.push_back(event);
                if log.events.len() > self.capacity
                    && let Some(dropped) = log.events.pop_front()
                {
                    log.first += 1;
                    log.floor = log.floor.max(dropped.revision);
                }
            }
            log.first + log.events.len() as u64
        };
        self.newest.send_replace(end);
    }

    /// Everything known is void (a snapshot replaced the state): all watches must start anew.
    pub fn reset(&self, floor: u64) {
        let end = {
            let mut log = self.inner.lock();
            log.first += log.events.len() as u64 + 1;
            log.events.clear();
            log.floor = log.floor.max(floor);
            log.resets += 1;
            log.first
        };
        self.newest.send_replace(end);
    }

    /// The position after the newest event.
    pub fn end(&self) -> u64 {
        let log = self.inner.lock();
        log.first + log.events.len() as u64
    }

    /// The position from which a watch goes on that has seen `revision`. Events up to `revision`
    /// that another server has shown already may still come, and are to be passed over.
    ///
    /// # Errors
    /// 410 when that is no longer kept.
    pub fn position_after(&self, revision: u64) -> Result<u64, ApiError> {
        let log = self.inner.lock();
        if revision < log.floor {
            return Err(ApiError::gone(format!(
                "resourceVersion {revision} is too old (the oldest kept is {}): list again",
                log.floor
            )));
        }
        let seen = log
            .events
            .partition_point(|event| event.revision <= revision);
        Ok(log.first + seen as u64)
    }

    /// Up to `limit` events from `position` on.
    pub fn read(&self, position: u64, limit: usize) -> Read {
        let log = self.inner.lock();
        let end = log.first + log.events.len() as u64;
        if position < log.first {
            return Read::Gone;
        }
        let from = (position - log.first) as usize;
        let events: Vec<Event> = log.events.iter().skip(from).take(limit).cloned().collect();
        let next = (position + events.len() as u64).min(end.max(position));
        Read::Events(events, next)
    }

    /// All events after a revision.
    ///
    /// # Errors
    /// 410 when they are not all kept.
    fn after(&self, revision: u64) -> Result<Vec<Event>, ApiError> {
        match self.read(self.position_after(revision)?, usize::MAX) {
            Read::Events(events, _) => Ok(events),
            Read::Gone => Err(ApiError::gone("the log was begun anew: list again")),
        }
    }

    /// Whether somebody waits for events.
    pub fn is_watched(&self) -> bool {
        self.newest.receiver_count() > 0
    }

    /// Wakes when events were appended.
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

/// Events a memory store keeps for watches unless told otherwise.
const EVENTS_MAX: usize = 10_000;

/// By namespace and name.
type Objects = BTreeMap<(String, String), Arc<Value>>;

/// Everything in memory, for the embedded Kubernetes and for tests.
pub struct MemoryStore {
    state: Mutex<MemoryState>,
    events: EventLog,
    journal: Option<Box<dyn Journal>>,
}

/// Where a [`MemoryStore`] writes what it holds, to have it again after a crash.
pub trait Journal: Send + Sync + 'static {
    /// Notes that an object is now this, or gone.
    ///
    /// # Errors
    /// A text; the change is then refused.
    fn note(
        &self,
        revision: u64,
        resource: &(String, String),
        object: &Value,
        gone: bool,
    ) -> Result<(), String>;
}

#[derive(Debug, Default)]
struct MemoryState {
    revision: u64,
    /// By resource.
    objects: BTreeMap<(String, String), Objects>,
}

impl MemoryState {
    fn of(&self, kind: &Kind) -> &Objects {
        static NONE: Objects = BTreeMap::new();
        let resource = (kind.group.clone(), kind.plural.clone());
        self.objects.get(&resource).unwrap_or(&NONE)
    }
}

fn within(scope: Scope<'_>, objects: &Objects) -> Vec<LazyObject> {
    let objects = objects.iter().filter(|((namespace, name), _)| {
        scope.namespace.is_none_or(|wanted| wanted == namespace)
            && scope.name.is_none_or(|wanted| wanted == name)
            && scope
                .after
                .is_none_or(|after| (namespace.as_str(), name.as_str()) > after)
    });
    objects
        .map(|(_, object)| Arc::clone(object).into())
        .collect()
}

impl std::fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryStore").finish_non_exhaustive()
    }
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new(None, 0, Vec::new())
    }
}

fn names(object: &Value) -> (String, String) {
    let text = |key: &str| {
        object
            .get("metadata")
            .and_then(|metadata| metadata.get(key))
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    (text("namespace"), text("name"))
}

/// The revision an object carries.
pub fn revision_of(object: &Value) -> u64 {
    object
        .pointer("/metadata/resourceVersion")
        .and_then(Value::as_str)
        .and_then(|text| text.parse().ok())
        .unwrap_or(0)
}

/// Sets the revision an object carries.
pub fn set_revision(object: &mut Value, revision: u64) {
    object["metadata"]["resourceVersion"] = revision.to_string().into();
}

impl MemoryStore {
    /// With a journal and what it held: `(resource, object)` in any order, at `revision`.
    pub fn new(
        journal: Option<Box<dyn Journal>>,
        revision: u64,
        objects: Vec<((String, String), Value)>,
    ) -> Self {
        let mut state = MemoryState {
            revision,
            objects: BTreeMap::new(),
        };
        for (resource, object) in objects {
            let key = names(&object);
            state
                .objects
                .entry(resource)
                .or_default()
                .insert(key, Arc::new(object));
        }
        Self {
            state: Mutex::new(state),
            events: EventLog::new(EVENTS_MAX, revision),
            journal,
        }
    }

    /// The same, with room for `capacity` events: a watch that falls further behind lists anew.
    #[must_use]
    pub fn with_events(self, capacity: usize) -> Self {
        let revision = self.state.lock().revision;
        Self {
            events: EventLog::new(capacity, revision),
            ..self
        }
    }

    /// All events of all kinds.
    pub const fn log(&self) -> &EventLog {
        &self.events
    }

    /// The revision of the newest change.
    pub fn revision(&self) -> u64 {
        self.state.lock().revision
    }

    /// All objects of all kinds, with their resource.
    pub fn all(&self) -> Vec<((String, String), Arc<Value>)> {
        let state = self.state.lock();
        state
            .objects
            .iter()
            .flat_map(|(resource, objects)| {
                objects
                    .values()
                    .map(|object| (resource.clone(), Arc::clone(object)))
            })
            .collect()
    }

    fn write(
        &self,
        state: &mut MemoryState,
        kind: &Kind,
        mut object: Value,
        gone: bool,
    ) -> Result<Arc<Value>, ApiError> {
        let resource = (kind.group.clone(), kind.plural.clone());
        let revision = state.revision + 1;
        set_revision(&mut object, revision);
        if let Some(journal) = &self.journal {
            journal
                .note(revision, &resource, &object, gone)
                .map_err(ApiError::internal)?;
        }
        state.revision = revision;
        let key = names(&object);
        let object = Arc::new(object);
        let objects = state.objects.entry(resource.clone()).or_default();
        let previous = if gone {
            objects.remove(&key)
        } else {
            objects.insert(key, Arc::clone(&object))
        };
        let event = match (gone, &previous) {
            (true, _) => EventKind::Deleted,
            (false, None) => EventKind::Added,
            (false, Some(_)) => EventKind::Modified,
        };
        self.events.append([Event {
            kind: event,
            resource,
            object: Arc::clone(&object).into(),
            previous: previous.map(LazyObject::from),
            revision,
        }]);
        Ok(object)
    }

    fn expect(
        state: &MemoryState,
        kind: &Kind,
        key: &(String, String),
        expected: u64,
    ) -> Result<Arc<Value>, ApiError> {
        let current = state
            .of(kind)
            .get(key)
            .ok_or_else(|| ApiError::not_found(&kind.group, &kind.plural, &key.1))?;
        if revision_of(current) != expected {
            return Err(modified(kind, &key.1));
        }
        Ok(Arc::clone(current))
    }
}

/// 409: the object changed meanwhile.
pub fn modified(kind: &Kind, name: &str) -> ApiError {
    ApiError::conflict(format!(
        "Operation cannot be fulfilled on {} \"{name}\": the object has been modified; please apply your changes to the latest version and try again",
        kind.plural
    ))
    .about(&kind.group, &kind.plural, name)
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
        _freshness: Freshness,
    ) -> Result<Arc<Value>, ApiError> {
        let key = (namespace.unwrap_or_default().to_owned(), name.to_owned());
        let state = self.state.lock();
        let found = state.of(kind).get(&key).cloned();
        found.ok_or_else(|| ApiError::not_found(&kind.group, &kind.plural, name))
    }

    async fn list(
        &self,
        kind: &Kind,
        scope: Scope<'_>,
        _freshness: Freshness,
    ) -> Result<Listing, ApiError> {
        let state = self.state.lock();
        Ok(Listing {
            items: within(scope, state.of(kind)),
            revision: state.revision,
        })
    }

    async fn list_as_of(
        &self,
        kind: &Kind,
        scope: Scope<'_>,
        revision: u64,
    ) -> Result<Listing, ApiError> {
        let state = self.state.lock();
        if revision > state.revision {
            return Err(ApiError::too_new(revision, state.revision));
        }
        let resource = (kind.group.clone(), kind.plural.clone());
        let mut objects = state.of(kind).clone();
        let later = self.events.after(revision)?.into_iter().rev();
        for event in later.filter(|event| event.resource == resource) {
            let key = names(event.object.value());
            match event.previous {
                Some(previous) => objects.insert(key, Arc::clone(previous.value())),
                None => objects.remove(&key),
            };
        }
        Ok(Listing {
            items: within(scope, &objects),
            revision,
        })
    }

    async fn create(&self, kind: &Kind, object: Value) -> Result<Arc<Value>, ApiError> {
        let mut state = self.state.lock();
        let key = names(&object);
        if state.of(kind).contains_key(&key) {
            return Err(ApiError::already_exists(&kind.group, &kind.plural, &key.1));
        }
        self.write(&mut state, kind, object, false)
    }

    async fn update(
        &self,
        kind: &Kind,
        object: Value,
        expected: u64,
    ) -> Result<Arc<Value>, ApiError> {
        let mut state = self.state.lock();
        Self::expect(&state, kind, &names(&object), expected)?;
        self.write(&mut state, kind, object, false)
    }

    async fn remove(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        name: &str,
        expected: u64,
    ) -> Result<(), ApiError> {
        let mut state = self.state.lock();
        let key = (namespace.unwrap_or_default().to_owned(), name.to_owned());
        let current = Self::expect(&state, kind, &key, expected)?;
        self.write(&mut state, kind, (*current).clone(), true)?;
        Ok(())
    }

    fn events(&self, _: &Kind, _: Scope<'_>) -> &EventLog {
        &self.events
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(revision: u64) -> Event {
        Event {
            kind: EventKind::Added,
            resource: (String::new(), "x".to_owned()),
            object: Arc::new(json!({})).into(),
            previous: None,
            revision,
        }
    }

    #[test]
    fn a_watch_resumes_exactly_where_it_was_or_is_told_that_it_cannot() {
        let log = EventLog::new(3, 10);
        log.append([event(11), event(12), event(14)]);
        for (seen, later) in [
            (11, vec![12, 14]),
            (13, vec![14]),
            (14, vec![]),
            (99, vec![]),
        ] {
            let Read::Events(events, _) = log.read(log.position_after(seen).unwrap(), 10) else {
                panic!("gone")
            };
            assert_eq!(events.iter().map(|e| e.revision).collect::<Vec<_>>(), later);
        }
        assert_eq!(log.position_after(9).unwrap_err().code, 410);
        let old = log.position_after(10).unwrap();
        log.append([event(20)]);
        assert!(matches!(log.read(old, 10), Read::Gone));
        let now = log.end();
        log.reset(30);
        assert!(matches!(log.read(now, 10), Read::Gone));
    }
}
