//! Server-side apply and field ownership (KEP-555): who set which field, in `FieldsV1` form.
//!
//! Maps merge by key; lists are atomic: the owner of a list owns all of it. That holds for every
//! list of Krake's kinds, and for custom resources whose schema does not say otherwise.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::error::{ApiError, Cause};

/// A field: keys from the root.
type Path = Vec<String>;

/// Fields as a set of leaves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Fields(BTreeSet<Path>);

/// One entry of `metadata.managedFields`.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    manager: String,
    operation: String,
    subresource: String,
    api_version: String,
    time: Value,
    fields: Fields,
}

/// Who changes an object, and how.
#[derive(Debug, Clone)]
pub struct Writer {
    /// The field manager.
    pub manager: String,
    /// `status`, or empty.
    pub subresource: String,
    /// The version written.
    pub api_version: String,
    /// RFC 3339, whole seconds.
    pub time: String,
}

/// Fields that belong to the server or name the object; nobody owns them.
fn is_identity(path: &[String]) -> bool {
    match path {
        [root] => matches!(root.as_str(), "apiVersion" | "kind" | "metadata"),
        [root, field] if root == "metadata" => matches!(
            field.as_str(),
            "name"
                | "namespace"
                | "uid"
                | "resourceVersion"
                | "generation"
                | "creationTimestamp"
                | "deletionTimestamp"
                | "deletionGracePeriodSeconds"
                | "managedFields"
                | "selfLink"
                | "generateName"
        ),
        _ => false,
    }
}

fn leaves(value: &Value) -> Fields {
    let mut fields = BTreeSet::new();
    collect(value, &mut Vec::new(), &mut fields);
    Fields(fields)
}

fn collect(value: &Value, path: &mut Path, into: &mut BTreeSet<Path>) {
    let leaf = |path: &Path, into: &mut BTreeSet<Path>| {
        if !path.is_empty() && !is_identity(path) {
            into.insert(path.clone());
        }
    };
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (key, inner) in map {
                path.push(key.clone());
                if is_identity(path) && path.len() == 2 {
                    path.pop();
                    continue;
                }
                collect(inner, path, into);
                path.pop();
            }
        }
        _ => leaf(path, into),
    }
}

fn at<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, key| value.get(key))
}

fn remove(value: &mut Value, path: &[String]) {
    let [first, rest @ ..] = path else {
        return;
    };
    let Some(map) = value.as_object_mut() else {
        return;
    };
    if rest.is_empty() {
        map.remove(first);
        return;
    }
    if let Some(inner) = map.get_mut(first) {
        remove(inner, rest);
        if inner.as_object().is_some_and(Map::is_empty) {
            map.remove(first);
        }
    }
}

fn merge(live: &mut Value, applied: &Value) {
    match (live, applied) {
        (Value::Object(live), Value::Object(applied)) => {
            for (key, value) in applied {
                match live.get_mut(key) {
                    Some(inner) if inner.is_object() && value.is_object() => merge(inner, value),
                    _ => {
                        live.insert(key.clone(), value.clone());
                    }
                }
            }
        }
        (live, applied) => *live = applied.clone(),
    }
}

impl Fields {
    fn to_json(&self) -> Value {
        let mut root = json!({});
        for path in &self.0 {
            let mut node = &mut root;
            for key in path {
                let name = format!("f:{key}");
                if node.get(&name).is_none() {
                    node[&name] = json!({});
                }
                node = &mut node[&name];
            }
        }
        root
    }

    fn from_json(value: &Value) -> Self {
        fn walk(value: &Value, path: &mut Path, into: &mut BTreeSet<Path>) {
            let Some(map) = value.as_object() else {
                return;
            };
            let inner: Vec<(&String, &Value)> = map
                .iter()
                .filter(|(key, _)| key.starts_with("f:"))
                .collect();
            if inner.is_empty() && !path.is_empty() {
                into.insert(path.clone());
            }
            for (key, value) in inner {
                path.push(key[2..].to_owned());
                walk(value, path, into);
                path.pop();
            }
        }
        let mut fields = BTreeSet::new();
        walk(value, &mut Vec::new(), &mut fields);
        Self(fields)
    }

    /// Whether `path`, something above it or something below it is in the set.
    fn touches(&self, path: &[String]) -> bool {
        self.0
            .iter()
            .any(|own| own.starts_with(path) || path.starts_with(own))
    }
}

fn read_entries(object: &Value) -> Vec<Entry> {
    let list = object
        .pointer("/metadata/managedFields")
        .and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .map(|entry| {
            let text = |key: &str| {
                entry
                    .get(key)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
                    .to_owned()
            };
            Entry {
                manager: text("manager"),
                operation: text("operation"),
                subresource: text("subresource"),
                api_version: text("apiVersion"),
                time: entry.get("time").cloned().unwrap_or(Value::Null),
                fields: Fields::from_json(entry.get("fieldsV1").unwrap_or(&Value::Null)),
            }
        })
        .collect()
}

fn write_entries(object: &mut Value, entries: Vec<Entry>) {
    let list: Vec<Value> = entries
        .into_iter()
        .filter(|entry| !entry.fields.0.is_empty())
        .map(|entry| {
            let mut json = json!({
                "manager": entry.manager,
                "operation": entry.operation,
                "apiVersion": entry.api_version,
                "time": entry.time,
                "fieldsType": "FieldsV1",
                "fieldsV1": entry.fields.to_json(),
            });
            if !entry.subresource.is_empty() {
                json["subresource"] = entry.subresource.into();
            }
            json
        })
        .collect();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        if list.is_empty() {
            metadata.remove("managedFields");
        } else {
            metadata.insert("managedFields".to_owned(), list.into());
        }
    }
}

/// Notes in `new` that `writer` made it from `old` by a create, update or patch.
pub fn record_update(old: Option<&Value>, new: &mut Value, writer: &Writer) {
    let mut entries = old.map(read_entries).unwrap_or_default();
    let empty = Value::Null;
    let old_leaves = leaves(old.unwrap_or(&empty));
    let new_leaves = leaves(new);
    let changed: BTreeSet<Path> = new_leaves
        .0
        .iter()
        .filter(|path| old.and_then(|old| at(old, path)) != at(new, path))
        .cloned()
        .collect();
    for entry in &mut entries {
        entry
            .fields
            .0
            .retain(|path| new_leaves.0.contains(path) && !changed.contains(path));
    }
    if old.is_some() && changed.is_empty() && old_leaves.0 == new_leaves.0 {
        write_entries(new, entries);
        return;
    }
    let own = entries.iter_mut().find(|entry| {
        entry.manager == writer.manager
            && entry.operation == "Update"
            && entry.subresource == writer.subresource
    });
    match own {
        Some(entry) => {
            entry.fields.0.extend(changed);
            entry.time = writer.time.clone().into();
        }
        None => entries.push(Entry {
            manager: writer.manager.clone(),
            operation: "Update".to_owned(),
            subresource: writer.subresource.clone(),
            api_version: writer.api_version.clone(),
            time: writer.time.clone().into(),
            fields: Fields(changed),
        }),
    }
    write_entries(new, entries);
}

/// Applies `applied` on `live` for `writer`: sets its fields, removes those it no longer has and
/// nobody else owns.
///
/// # Errors
/// 409 naming the fields and their owners when another manager owns a field with another value
/// and `force` is not set.
pub fn apply(
    live: Option<&Value>,
    applied: &Value,
    writer: &Writer,
    force: bool,
) -> Result<Value, ApiError> {
    let mut entries = live.map(read_entries).unwrap_or_default();
    let wanted = leaves(applied);
    let mut merged = live.cloned().unwrap_or_else(|| json!({"metadata": {}}));
    let is_own = |entry: &Entry| {
        entry.manager == writer.manager
            && entry.operation == "Apply"
            && entry.subresource == writer.subresource
    };
    let mut conflicts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    if let Some(live) = live {
        for path in &wanted.0 {
            if at(live, path) == at(applied, path) {
                continue;
            }
            for entry in entries.iter_mut().filter(|entry| !is_own(entry)) {
                if !entry.fields.touches(path) {
                    continue;
                }
                if force {
                    entry
                        .fields
                        .0
                        .retain(|own| !own.starts_with(path) && !path.starts_with(own));
                } else {
                    let owner = format!("\"{}\"", entry.manager);
                    conflicts
                        .entry(owner)
                        .or_default()
                        .push(format!(".{}", path.join(".")));
                }
            }
        }
    }
    if !conflicts.is_empty() {
        return Err(conflict(&conflicts));
    }
    let own = entries.iter().find(|entry| is_own(entry));
    let before = own.map(|entry| entry.fields.clone()).unwrap_or_default();
    for path in before.0.difference(&wanted.0) {
        let others = entries
            .iter()
            .any(|entry| !is_own(entry) && entry.fields.touches(path));
        // A leaf that became a map keeps what is below it.
        if !others && !wanted.touches(path) {
            remove(&mut merged, path);
        }
    }
    let mut content = applied.clone();
    if let Some(metadata) = content.get_mut("metadata").and_then(Value::as_object_mut) {
        for field in [
            "managedFields",
            "resourceVersion",
            "uid",
            "creationTimestamp",
        ] {
            metadata.remove(field);
        }
    }
    merge(&mut merged, &content);
    let unchanged = live.is_some_and(|live| {
        let strip = |value: &Value| {
            let mut value = value.clone();
            if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
                metadata.remove("managedFields");
            }
            value
        };
        before == wanted && strip(live) == strip(&merged)
    });
    if unchanged {
        return Ok(merged);
    }
    match entries.iter_mut().find(|entry| is_own(entry)) {
        Some(entry) => {
            entry.fields = wanted;
            entry.time = writer.time.clone().into();
            entry.api_version.clone_from(&writer.api_version);
        }
        None => entries.push(Entry {
            manager: writer.manager.clone(),
            operation: "Apply".to_owned(),
            subresource: writer.subresource.clone(),
            api_version: writer.api_version.clone(),
            time: writer.time.clone().into(),
            fields: wanted,
        }),
    }
    write_entries(&mut merged, entries);
    Ok(merged)
}

fn conflict(conflicts: &BTreeMap<String, Vec<String>>) -> ApiError {
    let count: usize = conflicts.values().map(Vec::len).sum();
    let parts: Vec<String> = conflicts
        .iter()
        .map(|(owner, fields)| format!("conflict with {owner}: {}", fields.join(", ")))
        .collect();
    let noun = if count == 1 { "conflict" } else { "conflicts" };
    let mut error = ApiError::conflict(format!(
        "Apply failed with {count} {noun}: {}",
        parts.join("; ")
    ));
    error.causes = conflicts
        .iter()
        .flat_map(|(owner, fields)| {
            fields.iter().map(move |field| Cause {
                field: field.clone(),
                message: format!("conflict with {owner}"),
            })
        })
        .collect();
    error
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(manager: &str) -> Writer {
        Writer {
            manager: manager.to_owned(),
            subresource: String::new(),
            api_version: "v1".to_owned(),
            time: "2026-01-01T00:00:00Z".to_owned(),
        }
    }

    fn object(spec: Value) -> Value {
        json!({"apiVersion": "v1", "kind": "X", "metadata": {"name": "a"}, "spec": spec})
    }

    #[test]
    fn applying_again_without_a_field_removes_it_unless_another_owns_it() {
        let first = apply(
            None,
            &object(json!({"a": 1, "b": 2})),
            &writer("one"),
            false,
        )
        .unwrap();
        let shared = apply(
            Some(&first),
            &object(json!({"b": 2})),
            &writer("two"),
            false,
        )
        .unwrap();
        let last = apply(
            Some(&shared),
            &object(json!({"c": 3})),
            &writer("one"),
            false,
        )
        .unwrap();
        assert_eq!(last["spec"], json!({"b": 2, "c": 3}));
    }

    #[test]
    fn another_value_in_anothers_field_is_a_conflict_that_force_takes_over() {
        let first = apply(
            None,
            &object(json!({"a": 1, "m": {"x": 1}})),
            &writer("one"),
            false,
        )
        .unwrap();
        let error = apply(
            Some(&first),
            &object(json!({"a": 2})),
            &writer("two"),
            false,
        )
        .unwrap_err();
        assert_eq!(error.code, 409);
        assert!(
            error.message.contains("conflict with \"one\": .spec.a"),
            "{error}"
        );
        let taken = apply(Some(&first), &object(json!({"a": 2})), &writer("two"), true).unwrap();
        assert_eq!(taken["spec"]["a"], 2);
        // The first one lost the field: leaving it out does not remove it.
        let kept = apply(
            Some(&taken),
            &object(json!({"m": {"x": 1}})),
            &writer("one"),
            false,
        )
        .unwrap();
        assert_eq!(kept["spec"]["a"], 2);
    }

    #[test]
    fn lists_are_atomic() {
        let first = apply(None, &object(json!({"l": [1, 2]})), &writer("one"), false).unwrap();
        let next = apply(
            Some(&first),
            &object(json!({"l": [3]})),
            &writer("one"),
            false,
        )
        .unwrap();
        assert_eq!(next["spec"]["l"], json!([3]));
        assert!(
            apply(
                Some(&next),
                &object(json!({"l": [4]})),
                &writer("two"),
                false
            )
            .is_err()
        );
    }

    #[test]
    fn an_unchanged_apply_changes_nothing_not_even_the_time() {
        let first = apply(None, &object(json!({"a": 1})), &writer("one"), false).unwrap();
        let mut later = writer("one");
        later.time = "2027-01-01T00:00:00Z".to_owned();
        let again = apply(Some(&first), &object(json!({"a": 1})), &later, false).unwrap();
        assert_eq!(first, again);
    }

    #[test]
    fn an_update_takes_the_fields_it_changes() {
        let first = apply(
            None,
            &object(json!({"a": 1, "b": 1})),
            &writer("one"),
            false,
        )
        .unwrap();
        let mut edited = first.clone();
        edited["spec"]["a"] = json!(5);
        record_update(Some(&first), &mut edited, &writer("edit"));
        let error = apply(
            Some(&edited),
            &object(json!({"a": 1, "b": 1})),
            &writer("one"),
            false,
        );
        assert!(error.is_err());
        let read = read_entries(&edited);
        assert_eq!(read.len(), 2);
        assert_eq!(Fields::from_json(&read[0].fields.to_json()), read[0].fields);
    }
}
