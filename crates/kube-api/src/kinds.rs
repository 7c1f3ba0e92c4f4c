//! Kinds as data: a kind is a schema, columns and flags, no code.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::RwLock;
use serde_json::Value;

/// A column of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Its heading.
    pub name: String,
    /// `string`, `integer`, `date`, …
    pub kind: String,
    /// What it shows.
    pub description: String,
    /// Where the value is, as in `additionalPrinterColumns`: `.spec.replicas`.
    pub json_path: String,
    /// Above 0: only with `-o wide`.
    pub priority: i64,
    /// What it shows when no path can say it.
    pub compute: Option<Compute>,
}

/// A cell that is worked out from the whole object.
#[derive(Clone, Copy)]
pub struct Compute(pub fn(&Value) -> Value);

impl std::fmt::Debug for Compute {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compute")
    }
}

impl PartialEq for Compute {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::fn_addr_eq(self.0, other.0)
    }
}

impl Eq for Compute {}

impl Column {
    /// A column of kind `string` that is always shown.
    pub fn new(name: &str, json_path: &str, description: &str) -> Self {
        Self {
            name: name.to_owned(),
            kind: "string".to_owned(),
            description: description.to_owned(),
            json_path: json_path.to_owned(),
            priority: 0,
            compute: None,
        }
    }

    /// A column whose cells are worked out.
    pub fn computed(name: &str, description: &str, compute: fn(&Value) -> Value) -> Self {
        Self {
            compute: Some(Compute(compute)),
            ..Self::new(name, "", description)
        }
    }

    /// The same, only with `-o wide`.
    #[must_use]
    pub fn wide(mut self) -> Self {
        self.priority = 1;
        self
    }

    /// The same, as an age.
    #[must_use]
    pub fn date(mut self) -> Self {
        "date".clone_into(&mut self.kind);
        self
    }
}

/// A kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Kind {
    /// API group; empty for the core group.
    pub group: String,
    /// API version.
    pub version: String,
    /// `Application`
    pub kind: String,
    /// `applications`
    pub plural: String,
    /// `application`
    pub singular: String,
    /// `app`
    pub short_names: Vec<String>,
    /// `all`
    pub categories: Vec<String>,
    /// Whether its objects are in namespaces.
    pub namespaced: bool,
    /// Whether `status` is a subresource: written apart from the rest.
    pub status: bool,
    /// Whether clients may only read.
    pub read_only: bool,
    /// `OpenAPI` v3 schema of the object; without one anything goes.
    pub schema: Option<Value>,
    /// Columns after the name.
    pub columns: Vec<Column>,
}

impl Kind {
    /// `group/version`, or `version` in the core group.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.clone()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `group/version/Kind`, as reports list it.
    pub fn full_name(&self) -> String {
        format!("{}/{}", self.api_version(), self.kind)
    }

    /// Whether it behaves as a custom resource and not as a built-in kind of Kubernetes: it takes no
    /// strategic merge patches, what replaces an object must name the revision it replaces, and
    /// subresources that it has not are not there.
    pub fn is_custom(&self) -> bool {
        !crate::strategic::is_supported(self.schema.as_ref())
    }

    /// Verbs that clients may use.
    pub fn verbs(&self) -> Vec<&'static str> {
        if self.read_only {
            vec!["get", "list", "watch"]
        } else {
            vec![
                "create",
                "delete",
                "deletecollection",
                "get",
                "list",
                "patch",
                "update",
                "watch",
            ]
        }
    }
}

/// The kinds an API serves; may change while it runs.
#[derive(Debug, Default)]
pub struct Registry {
    kinds: RwLock<BTreeMap<(String, String, String), Arc<Kind>>>,
}

impl Registry {
    /// With these kinds.
    pub fn new(kinds: Vec<Kind>) -> Self {
        let registry = Self::default();
        for kind in kinds {
            registry.insert(kind);
        }
        registry
    }

    /// Adds or replaces a kind.
    pub fn insert(&self, kind: Kind) {
        let key = (
            kind.group.clone(),
            kind.version.clone(),
            kind.plural.clone(),
        );
        self.kinds.write().insert(key, Arc::new(kind));
    }

    /// Removes all versions of a resource.
    pub fn remove(&self, group: &str, plural: &str) {
        self.kinds
            .write()
            .retain(|(g, _, p), _| g != group || p != plural);
    }

    /// Finds a kind by its path.
    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<Arc<Kind>> {
        let key = (group.to_owned(), version.to_owned(), plural.to_owned());
        self.kinds.read().get(&key).cloned()
    }

    /// All kinds, by group, version and plural.
    pub fn all(&self) -> Vec<Arc<Kind>> {
        self.kinds.read().values().cloned().collect()
    }
}
