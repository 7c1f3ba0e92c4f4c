//! Server-side apply and field ownership (KEP-555): who set which field, in `FieldsV1` form.
//!
//! The algorithms are those of Kubernetes (`sigs.k8s.io/structured-merge-diff` v6, packages `typed`
//! and `merge`, and `k8s.io/apimachinery/pkg/util/managedfields`), step by step, so that owners,
//! conflicts and what a removal takes with it are the same; `tests/tests/differential.rs` compares.
//!
//! Maps merge by key. Lists merge as the schema says (`x-kubernetes-list-type`): by their keys
//! (`map`), by value (`set`), or not at all (`atomic`, the default): then the owner of a list owns
//! all of it. What no schema describes merges as in a custom resource: maps by key, lists atomic.

mod fields;
mod typed;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use self::fields::{Fields, Path, display, is_identity};
use self::typed::{Comparison, fields_of, merge, without};
use crate::error::{ApiError, Cause};

/// Who owned the fields of an object that was made before ownership was noted.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";

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
    /// The part of the object that such a write does not touch.
    pub leaves_alone: Option<&'static str>,
    /// The version written.
    pub api_version: String,
    /// RFC 3339, whole seconds.
    pub time: String,
}

impl Writer {
    fn entry(&self, operation: &str, fields: Fields) -> Entry {
        Entry {
            manager: self.manager.clone(),
            operation: operation.to_owned(),
            subresource: self.subresource.clone(),
            api_version: self.api_version.clone(),
            time: self.time.clone().into(),
            fields,
        }
    }

    /// Whether an entry is this writer's. Who applies keeps an entry over all versions.
    fn owns(&self, entry: &Entry, operation: &str) -> bool {
        entry.manager == self.manager
            && entry.operation == operation
            && entry.subresource == self.subresource
            && (operation == "Apply" || entry.api_version == self.api_version)
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

fn write_entries(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.fields.0.is_empty());
    // Who applies comes first, then who was there first.
    entries.sort_by(|one, other| {
        let key = |entry: &Entry| {
            (
                entry.operation.clone(),
                entry.time.as_str().unwrap_or_default().to_owned(),
                entry.manager.clone(),
                entry.api_version.clone(),
                entry.subresource.clone(),
            )
        };
        key(one).cmp(&key(other))
    });
    let list: Vec<Value> = entries
        .into_iter()
        .map(|entry| {
            let mut json = json!({
                "manager": entry.manager,
                "operation": entry.operation,
                "apiVersion": entry.api_version,
                "fieldsType": "FieldsV1",
                "fieldsV1": entry.fields.to_json(),
            });
            if !entry.time.is_null() {
                json["time"] = entry.time;
            }
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

/// Notes in `new` that `writer` made it from `old` by a create, update or patch. The owners before
/// are those that `new` carries, for a client may hand fields over.
///
/// `schema` is the kind's: it says which lists merge.
pub fn record_update(
    schema: Option<&Value>,
    old: Option<&Value>,
    new: &mut Value,
    writer: &Writer,
) {
    let mut entries = read_entries(new);
    if old.is_some() && entries.is_empty() {
        // Nobody notes who owns it, and it stays so until somebody applies.
        write_entries(new, entries);
        return;
    }
    update(schema, old, new, &mut entries, writer);
    write_entries(new, entries);
}

fn update(
    schema: Option<&Value>,
    old: Option<&Value>,
    new: &Value,
    entries: &mut Vec<Entry>,
    writer: &Writer,
) {
    let comparison = Comparison::of(schema, old, new);
    if comparison.is_empty() {
        return;
    }
    let Comparison {
        added,
        modified,
        removed,
    } = comparison;
    let mut taken: BTreeSet<Path> = added.into_iter().chain(modified).collect();
    for entry in entries.iter_mut() {
        let is_lost = |path: &Path| taken.contains(path) || removed.contains(path);
        entry.fields.0.retain(|path| !is_lost(path));
    }
    let alone = writer.leaves_alone.map(|field| format!("f:{field}"));
    taken.retain(|path| !is_identity(path) && path.first() != alone.as_ref());
    if taken.is_empty() {
        return;
    }
    match entries
        .iter_mut()
        .find(|entry| writer.owns(entry, "Update"))
    {
        Some(entry) => {
            entry.fields.0.extend(taken);
            entry.time = writer.time.clone().into();
        }
        None => entries.push(writer.entry("Update", Fields(taken))),
    }
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
    if let Some(live) = live.filter(|_| entries.is_empty()) {
        let before = Writer {
            manager: BEFORE_FIRST_APPLY.to_owned(),
            ..writer.clone()
        };
        update(schema, None, live, &mut entries, &before);
    }
    let empty = json!({});
    let old = unmanaged(live.unwrap_or(&empty));
    let config = unmanaged(applied);
    let mut wanted = fields_of(schema, &config);
    let before = entries
        .iter()
        .find(|entry| writer.owns(entry, "Apply"))
        .map(|entry| entry.fields.clone());
    // What is sent stays, its name too.
    let mut managed: BTreeSet<Path> = wanted.0.clone();
    for entry in entries.iter().filter(|entry| !writer.owns(entry, "Apply")) {
        managed.extend(entry.fields.0.iter().cloned());
    }
    wanted.0.retain(|path| !is_identity(path));
    let mut new = merge(schema, Some(&old), Some(&config), &mut Vec::new()).unwrap_or(json!({}));
    if let Some(before) = &before {
        new = prune(schema, &new, before, &Fields(managed));
    }
    let comparison = Comparison::of(schema, Some(&old), &new);
    let changed: BTreeSet<Path> = comparison
        .added
        .iter()
        .chain(&comparison.modified)
        .cloned()
        .collect();
    let mut conflicts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| !writer.owns(entry, "Apply")) {
        let fields = entry.fields.0.intersection(&changed);
        let fields: Vec<String> = fields.map(|path| display(path)).collect();
        if !fields.is_empty() {
            conflicts
                .entry(format!("\"{}\"", entry.manager))
                .or_default()
                .extend(fields);
        }
    }
    if !force && !conflicts.is_empty() {
        return Err(conflict(&conflicts));
    }
    for entry in entries
        .iter_mut()
        .filter(|entry| !writer.owns(entry, "Apply"))
    {
        let is_lost = |path: &Path| changed.contains(path) || comparison.removed.contains(path);
        entry.fields.0.retain(|path| !is_lost(path));
    }
    let is_same = new == old;
    match entries.iter_mut().find(|entry| writer.owns(entry, "Apply")) {
        Some(entry) => {
            entry.fields = wanted;
            entry.api_version.clone_from(&writer.api_version);
            if !is_same {
                entry.time = writer.time.clone().into();
            }
        }
        None => {
            let mut entry = writer.entry("Apply", wanted);
            if is_same {
                // It owns what others wrote.
                entry.time = Value::Null;
            }
            entries.push(entry);
        }
    }
    if !new.get("metadata").is_some_and(Value::is_object) {
        new["metadata"] = json!({});
    }
    write_entries(&mut new, entries);
    Ok(new)
}

/// Without when its fields were written.
pub(crate) fn without_times(object: &Value) -> Value {
    let mut object = object.clone();
    let entries = object.pointer_mut("/metadata/managedFields");
    for entry in entries.and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(entry) = entry.as_object_mut() {
            entry.remove("time");
        }
    }
    object
}

/// Without what notes who owns it.
fn unmanaged(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    object
}

/// `merged` without what its applier had before and neither it nor anybody else has now.
fn prune(schema: Option<&Value>, merged: &Value, before: &Fields, managed: &Fields) -> Value {
    let remove = |gone: BTreeSet<Path>| without(schema, merged, &Fields(gone), &mut Vec::new());
    let named = |fields: &Fields| fields.with_named_fields(schema).0;
    let all = named(&fields_of(schema, merged));
    let managed = named(managed);
    let last = named(before);
    let pruned = remove(last.clone());
    // Back comes what somebody owns …
    let left = named(&fields_of(schema, &pruned));
    let pruned = remove(
        all.iter()
            .filter(|path| !left.contains(*path) && !managed.contains(*path))
            .cloned()
            .collect(),
    );
    // … and what nobody owned, nor the applier before.
    let left = named(&fields_of(schema, &pruned));
    remove(
        all.into_iter()
            .filter(|path| !left.contains(path) && last.contains(path))
            .collect(),
    )
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
            fields.iter().map(move |field| {
                Cause::new(field, format!("conflict with {owner}")).because("FieldManagerConflict")
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
            leaves_alone: None,
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
        let message = error.unwrap_err().message;
        assert!(
            message.contains("conflict with \"edit\": .spec.a"),
            "{message}"
        );
        let read = read_entries(&edited);
        assert_eq!(read.len(), 2);
        assert_eq!(Fields::from_json(&read[0].fields.to_json()), read[0].fields);
    }
}
