//! Server-side apply and field ownership (KEP-555): who set which field, in `FieldsV1` form.
//!
//! Maps merge by key. Lists merge as the schema says (`x-kubernetes-list-type`): by their keys
//! (`map`), by value (`set`), or not at all (`atomic`, the default): then the owner of a list owns
//! all of it. What no schema describes merges as in a custom resource: maps by key, lists atomic.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::error::{ApiError, Cause};
use crate::schema;

/// A field, from the root, in the notation of `FieldsV1`: `f:name` in a map, `k:{"name":"a"}` for
/// the item of a list with these keys, `v:"a"` for an item of a set.
type Path = Vec<String>;

/// Fields as a set of leaves, with the items of keyed lists beside what is in them.
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
        [root] => matches!(root.as_str(), "f:apiVersion" | "f:kind" | "f:metadata"),
        [root, field] if root == "f:metadata" => matches!(
            field.as_str(),
            "f:name"
                | "f:namespace"
                | "f:uid"
                | "f:resourceVersion"
                | "f:generation"
                | "f:creationTimestamp"
                | "f:deletionTimestamp"
                | "f:deletionGracePeriodSeconds"
                | "f:managedFields"
                | "f:selfLink"
                | "f:generateName"
        ),
        _ => false,
    }
}

fn leaves(schema: Option<&Value>, value: &Value) -> Fields {
    let mut fields = BTreeSet::new();
    collect(schema, value, &mut Vec::new(), &mut fields);
    Fields(fields)
}

/// The schema of a field; of metadata, for which kinds have none, the same for all.
fn inner_schema<'a>(
    schema: Option<&'a Value>,
    depth: usize,
    key: &str,
) -> Option<std::borrow::Cow<'a, Value>> {
    if depth == 0 && key == "metadata" {
        return Some(std::borrow::Cow::Owned(schema::metadata()));
    }
    schema
        .and_then(|schema| schema::property(schema, key))
        .map(std::borrow::Cow::Borrowed)
}

fn collect(schema: Option<&Value>, value: &Value, path: &mut Path, into: &mut BTreeSet<Path>) {
    match value {
        Value::Object(map) if !map.is_empty() && !schema.is_some_and(schema::is_atomic_map) => {
            for (key, inner) in map {
                path.push(format!("f:{key}"));
                if !(is_identity(path) && path.len() == 2) {
                    let inner_schema = inner_schema(schema, path.len() - 1, key);
                    collect(inner_schema.as_deref(), inner, path, into);
                }
                path.pop();
            }
        }
        Value::Array(items) if schema.is_some_and(schema::merges_items) => {
            let inner_schema = schema.and_then(|schema| schema.get("items"));
            for item in items {
                path.push(element(schema, item));
                into.insert(path.clone());
                if item.is_object() {
                    collect(inner_schema, item, path, into);
                }
                path.pop();
            }
        }
        _ if path.is_empty() || is_identity(path) => {}
        _ => {
            into.insert(path.clone());
        }
    }
}

/// How an item of a list that merges is named in a path.
fn element(schema: Option<&Value>, item: &Value) -> String {
    let keys = schema.map(schema::list_keys).unwrap_or_default();
    if keys.is_empty() || !item.is_object() {
        return format!("v:{item}");
    }
    let named: Map<String, Value> = keys
        .into_iter()
        .filter_map(|key| {
            let default = || {
                let pointer = format!("/items/properties/{key}/default");
                schema.and_then(|schema| schema.pointer(&pointer))
            };
            let value = item.get(key).or_else(default)?.clone();
            Some((key.to_owned(), value))
        })
        .collect();
    format!("k:{}", Value::Object(named))
}

/// Whether an item is the one that a path's element names.
fn is_named(item: &Value, element: &str) -> bool {
    if let Some(value) = element.strip_prefix("v:") {
        return serde_json::from_str::<Value>(value).is_ok_and(|value| value == *item);
    }
    let keys: Map<String, Value> = element
        .strip_prefix("k:")
        .and_then(|keys| serde_json::from_str(keys).ok())
        .unwrap_or_default();
    // A key that the item does not carry has its default.
    item.is_object()
        && keys
            .iter()
            .all(|(key, value)| item.get(key).is_none_or(|own| own == value))
        && keys.keys().any(|key| item.get(key).is_some())
}

fn at<'a>(value: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter()
        .try_fold(value, |value, element| match element.strip_prefix("f:") {
            Some(key) => value.get(key),
            None => value
                .as_array()?
                .iter()
                .find(|item| is_named(item, element)),
        })
}

/// Removes what is at `path`, and what is empty then.
fn remove(value: &mut Value, path: &[String]) {
    let [first, rest @ ..] = path else {
        return;
    };
    let is_empty = |value: &Value| match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    };
    match (first.strip_prefix("f:"), value) {
        (Some(key), Value::Object(map)) => {
            if !rest.is_empty()
                && let Some(inner) = map.get_mut(key)
            {
                remove(inner, rest);
                if !is_empty(inner) {
                    return;
                }
            }
            map.remove(key);
        }
        (None, Value::Array(items)) => {
            let Some(index) = items.iter().position(|item| is_named(item, first)) else {
                return;
            };
            if rest.is_empty() {
                items.remove(index);
            } else {
                remove(&mut items[index], rest);
            }
        }
        _ => {}
    }
}

fn merge(schema: Option<&Value>, depth: usize, live: &mut Value, applied: &Value) {
    match (live, applied) {
        (Value::Object(live), Value::Object(applied))
            if !schema.is_some_and(schema::is_atomic_map) =>
        {
            for (key, value) in applied {
                match live.get_mut(key) {
                    Some(inner) => {
                        let schema = inner_schema(schema, depth, key);
                        merge(schema.as_deref(), depth + 1, inner, value);
                    }
                    None => {
                        live.insert(key.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(live), Value::Array(applied)) if schema.is_some_and(schema::merges_items) => {
            *live = merge_items(schema, std::mem::take(live), applied);
        }
        (live, applied) => *live = applied.clone(),
    }
}

/// Items in the applied order; those that only the live list has stay where they were among them.
fn merge_items(schema: Option<&Value>, live: Vec<Value>, applied: &[Value]) -> Vec<Value> {
    let inner = schema.and_then(|schema| schema.get("items"));
    let mut live: Vec<(String, Option<Value>)> = live
        .into_iter()
        .map(|item| (element(schema, &item), Some(item)))
        .collect();
    let names: Vec<String> = applied.iter().map(|item| element(schema, item)).collect();
    let mut merged = Vec::with_capacity(live.len().max(applied.len()));
    let (mut left, mut right) = (0, 0);
    while left < live.len() || right < applied.len() {
        if let Some((name, item)) = live.get_mut(left) {
            if !names.contains(name) {
                merged.extend(item.take());
                left += 1;
                continue;
            }
            let name = name.clone();
            let next_shared = names[right.min(names.len())..]
                .iter()
                .find(|name| live.iter().any(|(other, _)| other == *name));
            if item_is_taken(&live, left) || next_shared.is_some_and(|next| *next != name) {
                left += 1;
                continue;
            }
        }
        let Some(item) = applied.get(right) else {
            left += 1;
            continue;
        };
        let same = live
            .iter_mut()
            .find(|(name, _)| *name == names[right])
            .and_then(|(_, item)| item.take());
        merged.push(match same {
            Some(mut same) => {
                merge(inner, 1, &mut same, item);
                same
            }
            None => item.clone(),
        });
        right += 1;
    }
    merged
}

fn item_is_taken(live: &[(String, Option<Value>)], index: usize) -> bool {
    live.get(index).is_some_and(|(_, item)| item.is_none())
}

impl Fields {
    fn to_json(&self) -> Value {
        let mut root = json!({});
        for path in &self.0 {
            let mut node = &mut root;
            for element in path {
                if node.get(element).is_none() {
                    node[element] = json!({});
                }
                node = &mut node[element];
            }
            let is_item = path.last().is_some_and(|last| last.starts_with("k:"));
            if is_item {
                node["."] = json!({});
            }
        }
        root
    }

    fn from_json(value: &Value) -> Self {
        fn walk(value: &Value, path: &mut Path, into: &mut BTreeSet<Path>) {
            let Some(map) = value.as_object() else {
                return;
            };
            let is_item = path.last().is_some_and(|last| last.starts_with("k:"));
            let inner: Vec<(&String, &Value)> =
                map.iter().filter(|(key, _)| key.as_str() != ".").collect();
            if (inner.is_empty() && !path.is_empty()) || (is_item && map.contains_key(".")) {
                into.insert(path.clone());
            }
            for (key, value) in inner {
                path.push(key.clone());
                walk(value, path, into);
                path.pop();
            }
        }
        let mut fields = BTreeSet::new();
        walk(value, &mut Vec::new(), &mut fields);
        Self(fields)
    }

    /// Whether `path` or something below it is in the set, or something above it that holds all
    /// below it (`live` says what is there).
    fn touches(&self, path: &[String], live: &Value) -> bool {
        self.0.iter().any(|own| is_touched(own, path, live))
    }
}

fn is_touched(own: &[String], path: &[String], live: &Value) -> bool {
    own.starts_with(path) || (path.starts_with(own) && holds_all_below(own, live))
}

/// An empty map or an item of a keyed list does not own what others put in; anything else does.
fn holds_all_below(own: &[String], live: &Value) -> bool {
    !own.last().is_some_and(|last| last.starts_with("k:"))
        && !at(live, own).is_some_and(Value::is_object)
}

/// Only that an item is there, not what is in it.
fn is_membership(path: &[String]) -> bool {
    path.last().is_some_and(|last| !last.starts_with("f:"))
}

/// As people read it: `.spec.containers[name="a"].image`.
fn display(path: &[String]) -> String {
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
///
/// `schema` is the kind's: it says which lists merge.
pub fn record_update(
    schema: Option<&Value>,
    old: Option<&Value>,
    new: &mut Value,
    writer: &Writer,
) {
    let mut entries = old.map(read_entries).unwrap_or_default();
    let empty = Value::Null;
    let old_leaves = leaves(schema, old.unwrap_or(&empty));
    let new_leaves = leaves(schema, new);
    let changed: BTreeSet<Path> = new_leaves
        .0
        .iter()
        .filter(|path| {
            let before = old.and_then(|old| at(old, path));
            if is_membership(path) {
                before.is_none()
            } else {
                before != at(new, path)
            }
        })
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
    schema: Option<&Value>,
    live: Option<&Value>,
    applied: &Value,
    writer: &Writer,
    force: bool,
) -> Result<Value, ApiError> {
    let mut entries = live.map(read_entries).unwrap_or_default();
    let wanted = leaves(schema, applied);
    let mut merged = live.cloned().unwrap_or_else(|| json!({"metadata": {}}));
    let is_own = |entry: &Entry| {
        entry.manager == writer.manager
            && entry.operation == "Apply"
            && entry.subresource == writer.subresource
    };
    let mut conflicts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    if let Some(live) = live {
        for path in &wanted.0 {
            if is_membership(path) || at(live, path) == at(applied, path) {
                continue;
            }
            for entry in entries.iter_mut().filter(|entry| !is_own(entry)) {
                if !entry.fields.touches(path, live) {
                    continue;
                }
                if force {
                    entry.fields.0.retain(|own| !is_touched(own, path, live));
                } else {
                    let owner = format!("\"{}\"", entry.manager);
                    conflicts.entry(owner).or_default().push(display(path));
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
        let live = live.unwrap_or(&Value::Null);
        let others = entries
            .iter()
            .any(|entry| !is_own(entry) && entry.fields.touches(path, live));
        // A leaf that became a map keeps what is below it.
        if !others && !wanted.touches(path, live) {
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
    merge(schema, 0, &mut merged, &content);
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
            None,
            &object(json!({"a": 1, "b": 2})),
            &writer("one"),
            false,
        )
        .unwrap();
        let shared = apply(
            None,
            Some(&first),
            &object(json!({"b": 2})),
            &writer("two"),
            false,
        )
        .unwrap();
        let last = apply(
            None,
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
            None,
            &object(json!({"a": 1, "m": {"x": 1}})),
            &writer("one"),
            false,
        )
        .unwrap();
        let error = apply(
            None,
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
        let taken = apply(
            None,
            Some(&first),
            &object(json!({"a": 2})),
            &writer("two"),
            true,
        )
        .unwrap();
        assert_eq!(taken["spec"]["a"], 2);
        // The first one lost the field: leaving it out does not remove it.
        let kept = apply(
            None,
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
        let first = apply(
            None,
            None,
            &object(json!({"l": [1, 2]})),
            &writer("one"),
            false,
        )
        .unwrap();
        let next = apply(
            None,
            Some(&first),
            &object(json!({"l": [3]})),
            &writer("one"),
            false,
        )
        .unwrap();
        assert_eq!(next["spec"]["l"], json!([3]));
        assert!(
            apply(
                None,
                Some(&next),
                &object(json!({"l": [4]})),
                &writer("two"),
                false
            )
            .is_err()
        );
    }

    fn keyed() -> Value {
        json!({"type": "object", "properties": {"spec": {"type": "object", "properties": {
            "l": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"],
                "items": {"type": "object", "properties": {
                    "ports": {"type": "array", "x-kubernetes-list-type": "map",
                        "x-kubernetes-list-map-keys": ["port", "protocol"],
                        "items": {"type": "object", "properties": {"protocol": {"type": "string", "default": "TCP"}}}}}}},
            "s": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}}}}}})
    }

    fn applied(live: Option<&Value>, spec: Value, manager: &str) -> Result<Value, ApiError> {
        apply(Some(&keyed()), live, &object(spec), &writer(manager), false)
    }

    #[test]
    fn items_of_a_keyed_list_have_owners_of_their_own() {
        let first = json!({"l": [{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]});
        let first = applied(None, first, "one").unwrap();
        let more = json!({"l": [{"name": "side", "image": "z"}, {"name": "a", "cpu": 1}]});
        let both = applied(Some(&first), more, "two").unwrap();
        assert_eq!(
            both["spec"]["l"],
            json!([{"name": "side", "image": "z"}, {"name": "a", "image": "x", "cpu": 1}, {"name": "b", "image": "y"}])
        );
        let error = applied(
            Some(&both),
            json!({"l": [{"name": "a", "image": "other"}]}),
            "two",
        );
        let message = error.unwrap_err().message;
        assert!(message.contains(".spec.l[name=\"a\"].image"), "{message}");
        // What only the first one owned goes; the item that the second one has too stays.
        let last = applied(Some(&both), json!({"l": []}), "one").unwrap();
        assert_eq!(
            last["spec"]["l"],
            json!([{"name": "side", "image": "z"}, {"name": "a", "cpu": 1}])
        );
    }

    #[test]
    fn keys_with_defaults_and_sets_merge() {
        let first = json!({"l": [{"name": "a", "ports": [{"port": 80}]}], "s": ["x", "y"]});
        let first = applied(None, first, "one").unwrap();
        let more = json!({"l": [{"name": "a", "ports": [{"port": 80, "protocol": "TCP", "host": 1}, {"port": 80, "protocol": "UDP"}]}],
            "s": ["z"]});
        let both = applied(Some(&first), more, "two").unwrap();
        assert_eq!(both["spec"]["l"][0]["ports"].as_array().unwrap().len(), 2);
        assert_eq!(both["spec"]["s"].as_array().unwrap().len(), 3);
        let last = applied(
            Some(&both),
            json!({"l": [{"name": "a"}], "s": ["x"]}),
            "one",
        )
        .unwrap();
        assert_eq!(last["spec"]["s"], json!(["x", "z"]));
        let read = read_entries(&last);
        assert_eq!(Fields::from_json(&read[1].fields.to_json()), read[1].fields);
    }

    #[test]
    fn an_unchanged_apply_changes_nothing_not_even_the_time() {
        let first = apply(None, None, &object(json!({"a": 1})), &writer("one"), false).unwrap();
        let mut later = writer("one");
        later.time = "2027-01-01T00:00:00Z".to_owned();
        let again = apply(None, Some(&first), &object(json!({"a": 1})), &later, false).unwrap();
        assert_eq!(first, again);
    }

    #[test]
    fn an_update_takes_the_fields_it_changes() {
        let first = apply(
            None,
            None,
            &object(json!({"a": 1, "b": 1})),
            &writer("one"),
            false,
        )
        .unwrap();
        let mut edited = first.clone();
        edited["spec"]["a"] = json!(5);
        record_update(None, Some(&first), &mut edited, &writer("edit"));
        let error = apply(
            None,
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
