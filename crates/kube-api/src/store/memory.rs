//! Everything in memory.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use serde_json::Value;

use super::{
    Event, EventKind, EventLog, Freshness, LazyObject, Listing, Scope, Store, modified, names,
    revision_of, set_revision,
};
use crate::error::ApiError;
use crate::kinds::Kind;

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

fn within(scope: Scope<'_>, objects: &Objects, revision: u64) -> Listing {
    let objects = objects.iter().filter(|((namespace, name), _)| {
        scope.namespace.is_none_or(|wanted| wanted == namespace)
            && scope.name.is_none_or(|wanted| wanted == name)
            && scope
                .after
                .is_none_or(|after| (namespace.as_str(), name.as_str()) > after)
    });
    let mut objects = objects.map(|(_, object)| Arc::clone(object).into());
    Listing {
        items: objects
            .by_ref()
            .take(scope.most.unwrap_or(usize::MAX))
            .collect(),
        more: objects.count(),
        revision,
    }
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
        Ok(within(scope, state.of(kind), state.revision))
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
        Ok(within(scope, &objects, revision))
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
