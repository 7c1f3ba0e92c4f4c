//! Sets of fields, as `FieldsV1` notes them.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::{metadata, schema};

/// A field, from the root, in the notation of `FieldsV1`: `f:name` in a map, `k:{"name":"a"}` for
/// the item of a list with these keys, `v:"a"` for an item of a set.
pub(super) type Path = Vec<String>;

/// Fields as a set of paths. A map or an item is in it apart from what is in them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Fields(pub(super) BTreeSet<Path>);

impl Fields {
    pub(super) fn to_json(&self) -> Value {
        let mut root = json!({});
        for path in &self.0 {
            let mut node = &mut root;
            for element in path {
                if node.get(element).is_none() {
                    node[element] = json!({});
                }
                node = &mut node[element];
            }
            // A path comes before what is below it.
            let next = self.below(path).next();
            if next.is_some() {
                node["."] = json!({});
            }
        }
        root
    }

    pub(super) fn from_json(value: &Value) -> Self {
        fn walk(value: &Value, path: &mut Path, into: &mut BTreeSet<Path>) {
            let Some(map) = value.as_object() else {
                return;
            };
            if !path.is_empty() && (map.is_empty() || map.contains_key(".")) {
                into.insert(path.clone());
            }
            for (key, value) in map.iter().filter(|(key, _)| key.as_str() != ".") {
                path.push(key.clone());
                walk(value, path, into);
                path.pop();
            }
        }
        let mut fields = BTreeSet::new();
        walk(value, &mut Vec::new(), &mut fields);
        Self(fields)
    }

    /// The paths below `path`.
    fn below(&self, path: &Path) -> impl Iterator<Item = &Path> {
        use std::ops::Bound::{Excluded, Unbounded};
        self.0
            .range::<Path, _>((Excluded(path), Unbounded))
            .take_while(move |other| other.starts_with(path))
    }

    pub(super) fn has_below(&self, path: &Path) -> bool {
        self.below(path).next().is_some()
    }

    /// With every field that the schema names on the way to one of these.
    pub(super) fn with_named_fields(&self, schema: Option<&Value>) -> Self {
        let mut all = self.0.clone();
        for path in &self.0 {
            let mut schema = schema;
            for (depth, element) in path.iter().enumerate() {
                let (above, key) = (&path[..depth], element.strip_prefix("f:"));
                if key.is_some_and(|key| is_named_field(schema, above, key)) {
                    all.insert(path[..=depth].to_vec());
                }
                schema = inner(schema, above, element);
            }
        }
        Self(all)
    }
}

/// Fields that belong to the server or name the object; nobody owns them.
pub(super) fn is_identity(path: &[String]) -> bool {
    match path {
        [root] => matches!(root.as_str(), "f:apiVersion" | "f:kind" | "f:metadata"),
        [root, field] if root == "f:metadata" => matches!(
            field.as_str(),
            "f:name"
                | "f:namespace"
                | "f:creationTimestamp"
                | "f:selfLink"
                | "f:uid"
                | "f:clusterName"
                | "f:generation"
                | "f:managedFields"
                | "f:resourceVersion"
        ),
        _ => false,
    }
}

/// The schema below an element of a path; of metadata, for which kinds have none, the same for all.
pub(super) fn inner<'a>(
    schema: Option<&'a Value>,
    path: &[String],
    element: &str,
) -> Option<&'a Value> {
    match element.strip_prefix("f:") {
        Some("metadata") if path.is_empty() => Some(metadata::schema()),
        Some(key) => schema.and_then(|schema| schema::property(schema, key)),
        None => schema.and_then(|schema| schema.get("items")),
    }
}

/// Whether the schema names a field, other than the keys of a map.
pub(super) fn is_named_field(schema: Option<&Value>, path: &[String], key: &str) -> bool {
    let is_root_field = path.is_empty() && matches!(key, "apiVersion" | "kind" | "metadata");
    is_root_field
        || schema
            .and_then(|schema| schema.get("properties"))
            .is_some_and(|properties| properties.get(key).is_some())
}

/// As people read it: `.spec.containers[name="a"].image`.
pub(super) fn display(path: &[String]) -> String {
    let mut text = String::new();
    for element in path {
        if let Some(key) = element.strip_prefix("f:") {
            text.push('.');
            text.push_str(key);
        } else if let Some(value) = element.strip_prefix("v:") {
            text.push_str(&format!("[={value}]"));
        } else if let Some(keys) = element.strip_prefix("k:") {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let list: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
            text.push_str(&format!("[{}]", list.join(",")));
        }
    }
    text
}
