//! Where objects are kept, and the log of events that watches follow.

mod events;
mod memory;

use std::sync::{Arc, LazyLock};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;

pub use self::events::{Event, EventKind, EventLog, Read};
pub use self::memory::{Journal, MemoryStore};
use crate::error::ApiError;
use crate::kinds::Kind;

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

/// A list and the revision to watch from.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// The objects, by namespace and name. One that is `null` could not be read.
    pub items: Vec<LazyObject>,
    /// How many there are after them that the scope left out for being too many.
    pub more: usize,
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
    /// So many of them at most, from the first one on.
    pub most: Option<usize>,
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

/// Namespace (empty: the kind has none) and name of an object.
pub(crate) fn names(object: &Value) -> (String, String) {
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

/// 409: the object changed meanwhile.
pub fn modified(kind: &Kind, name: &str) -> ApiError {
    ApiError::conflict(format!(
        "Operation cannot be fulfilled on {} \"{name}\": the object has been modified; please apply your changes to the latest version and try again",
        kind.plural
    ))
    .about(&kind.group, &kind.plural, name)
}
