//! Strategic merge patches: what `kubectl apply`, `edit`, `set` and `rollout restart` send for
//! built-in kinds.
//!
//! A kind takes them when its schema's root says `x-kubernetes-patch-strategy`; custom resources
//! never do, as in Kubernetes. A list merges when its schema has `x-kubernetes-patch-strategy:
//! merge`: by `x-kubernetes-patch-merge-key`, or by value without one.

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::{metadata, schema};

const STRATEGY: &str = "x-kubernetes-patch-strategy";
const MERGE_KEY: &str = "x-kubernetes-patch-merge-key";
const ORDER: &str = "$setElementOrder/";
const DELETE_PRIMITIVES: &str = "$deleteFromPrimitiveList/";
const RETAIN: &str = "$retainKeys";
const DIRECTIVE: &str = "$patch";

/// Whether objects with this schema take strategic merge patches.
pub(crate) fn is_supported(schema: Option<&Value>) -> bool {
    schema.is_some_and(|schema| schema.get(STRATEGY).is_some())
}

/// Merges `patch` into `object`.
///
/// # Errors
/// 400 when a directive is unknown or an item lacks its merge key.
pub(crate) fn merge(
    schema: Option<&Value>,
    object: &mut Value,
    patch: &Value,
) -> Result<(), ApiError> {
    let patch = patch
        .as_object()
        .ok_or_else(|| ApiError::bad_request("a strategic merge patch is an object"))?;
    if !object.is_object() {
        *object = Value::Object(Map::new());
    }
    if let Value::Object(map) = object {
        merge_map(schema, map, patch, 0)?;
    }
    Ok(())
}

fn directive(map: &Map<String, Value>) -> Result<Option<&str>, ApiError> {
    match map.get(DIRECTIVE) {
        None => Ok(None),
        Some(Value::String(word)) if matches!(word.as_str(), "merge" | "replace" | "delete") => {
            Ok(Some(word))
        }
        Some(other) => Err(ApiError::bad_request(format!(
            "$patch: {other} is not merge, replace or delete"
        ))),
    }
}

fn without_directives(map: &Map<String, Value>) -> Map<String, Value> {
    map.iter()
        .filter(|(key, _)| !key.starts_with('$'))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn merge_map(
    schema: Option<&Value>,
    map: &mut Map<String, Value>,
    patch: &Map<String, Value>,
    depth: usize,
) -> Result<(), ApiError> {
    match directive(patch)? {
        Some("replace") => {
            *map = without_directives(patch);
            return Ok(());
        }
        Some("delete") => {
            map.clear();
            return Ok(());
        }
        _ => {}
    }
    if let Some(keys) = patch.get(RETAIN).and_then(Value::as_array) {
        map.retain(|key, _| keys.iter().any(|kept| kept == key));
    }
    for (key, list) in patch {
        if let Some(field) = key.strip_prefix(DELETE_PRIMITIVES)
            && let (Some(Value::Array(items)), Some(gone)) = (map.get_mut(field), list.as_array())
        {
            items.retain(|item| !gone.contains(item));
        }
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        let inner = if depth == 0 && key == "metadata" {
            Some(metadata::schema())
        } else {
            schema.and_then(|schema| schema::property(schema, key))
        };
        merge_field(inner, map, key, value, depth)?;
    }
    for (key, order) in patch {
        if let Some(field) = key.strip_prefix(ORDER)
            && let (Some(Value::Array(items)), Some(order)) = (map.get_mut(field), order.as_array())
        {
            let inner = schema.and_then(|schema| schema::property(schema, field));
            sort(items, order, merge_key(inner));
        }
    }
    Ok(())
}

fn merge_field(
    schema: Option<&Value>,
    map: &mut Map<String, Value>,
    key: &str,
    value: &Value,
    depth: usize,
) -> Result<(), ApiError> {
    match value {
        Value::Null => {
            map.remove(key);
        }
        Value::Object(patch) => {
            if directive(patch)? == Some("delete") {
                map.remove(key);
                return Ok(());
            }
            let inner = map
                .entry(key.to_owned())
                .or_insert_with(|| Value::Object(Map::new()));
            if !inner.is_object() {
                *inner = Value::Object(Map::new());
            }
            if let Value::Object(inner) = inner {
                merge_map(schema, inner, patch, depth + 1)?;
            }
        }
        Value::Array(patch) if schema.is_some_and(is_merged_list) => {
            let list = map
                .entry(key.to_owned())
                .or_insert_with(|| Value::Array(Vec::new()));
            if !list.is_array() {
                *list = Value::Array(Vec::new());
            }
            if let Value::Array(list) = list {
                merge_list(schema, list, patch, depth)?;
            }
        }
        other => {
            map.insert(key.to_owned(), other.clone());
        }
    }
    Ok(())
}

fn is_merged_list(schema: &Value) -> bool {
    // Volumes and the like are `merge,retainKeys`.
    let strategy = schema.get(STRATEGY).and_then(Value::as_str);
    strategy.is_some_and(|strategy| strategy.split(',').any(|word| word == "merge"))
}

fn merge_key(schema: Option<&Value>) -> Option<&str> {
    schema?.get(MERGE_KEY)?.as_str()
}

fn merge_list(
    schema: Option<&Value>,
    list: &mut Vec<Value>,
    patch: &[Value],
    depth: usize,
) -> Result<(), ApiError> {
    let Some(key) = merge_key(schema) else {
        for item in patch {
            if !list.contains(item) {
                list.push(item.clone());
            }
        }
        return Ok(());
    };
    let inner = schema.and_then(|schema| schema.get("items"));
    let replaces = |item: &Value| item.get(DIRECTIVE) == Some(&Value::from("replace"));
    if patch.iter().any(replaces) {
        *list = patch.iter().filter(|i| !replaces(i)).cloned().collect();
        return Ok(());
    }
    for item in patch {
        let map = item
            .as_object()
            .ok_or_else(|| ApiError::bad_request("an item of a merged list is not an object"))?;
        let name = map.get(key).ok_or_else(|| {
            ApiError::bad_request(format!(
                "an item of a merged list does not contain its merge key {key}"
            ))
        })?;
        let found = list.iter().position(|own| own.get(key) == Some(name));
        match (directive(map)?, found) {
            (Some("delete"), Some(index)) => {
                list.remove(index);
            }
            (Some("delete"), None) => {}
            (_, Some(index)) => {
                if let Value::Object(own) = &mut list[index] {
                    merge_map(inner, own, map, depth + 1)?;
                }
            }
            (_, None) => list.push(Value::Object(without_directives(map))),
        }
    }
    Ok(())
}

/// Puts the items named in `order` in that order; others stay behind them.
fn sort(items: &mut [Value], order: &[Value], key: Option<&str>) {
    let place = |item: &Value| {
        let position = match key {
            Some(key) => order
                .iter()
                .position(|named| named.get(key) == item.get(key)),
            None => order.iter().position(|named| named == item),
        };
        position.unwrap_or(usize::MAX)
    };
    items.sort_by_key(place);
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({"type": "object", "x-kubernetes-patch-strategy": "merge", "properties": {"spec": {
        "type": "object", "properties": {
            "containers": {"type": "array", "x-kubernetes-patch-strategy": "merge", "x-kubernetes-patch-merge-key": "name",
                "items": {"type": "object"}},
            "words": {"type": "array", "x-kubernetes-patch-strategy": "merge", "items": {"type": "string"}},
            "atomic": {"type": "array"},
        }}}})
    }

    fn merged(patch: &Value) -> Value {
        let mut object = json!({"spec": {
            "containers": [{"name": "a", "image": "x:1", "env": [1]}, {"name": "b", "image": "y"}],
            "words": ["one", "two"], "atomic": [1, 2], "strategy": {"type": "R", "rolling": {"x": 1}}}});
        merge(Some(&schema()), &mut object, patch).unwrap();
        object["spec"].take()
    }

    #[test]
    fn lists_merge_by_key_value_or_not_at_all() {
        let spec = merged(
            &json!({"spec": {"containers": [{"name": "a", "image": "x:2"}, {"name": "c"}],
            "words": ["two", "three"], "atomic": [3]}}),
        );
        assert_eq!(
            spec["containers"],
            json!([{"name": "a", "image": "x:2", "env": [1]}, {"name": "b", "image": "y"}, {"name": "c"}])
        );
        assert_eq!(spec["words"], json!(["one", "two", "three"]));
        assert_eq!(spec["atomic"], json!([3]));
    }

    #[test]
    fn directives_delete_replace_retain_and_order() {
        let spec = merged(
            &json!({"spec": {"$setElementOrder/containers": [{"name": "c"}, {"name": "a"}],
            "containers": [{"name": "b", "$patch": "delete"}, {"name": "c", "image": "z"}],
            "$deleteFromPrimitiveList/words": ["one"],
            "strategy": {"$retainKeys": ["type"], "type": "Recreate"}}}),
        );
        assert_eq!(spec["containers"][0]["name"], "c");
        assert_eq!(spec["containers"][1]["name"], "a");
        assert_eq!(spec["containers"].as_array().unwrap().len(), 2);
        assert_eq!(spec["words"], json!(["two"]));
        assert_eq!(spec["strategy"], json!({"type": "Recreate"}));
        let spec = merged(&json!({"spec": {"strategy": {"$patch": "replace", "a": 1}}}));
        assert_eq!(spec["strategy"], json!({"a": 1}));
        let spec = merged(&json!({"spec": {"strategy": null}}));
        assert!(spec.get("strategy").is_none());
    }

    #[test]
    fn an_unknown_directive_and_a_missing_key_are_refused() {
        let mut object = json!({"spec": {"containers": []}});
        for patch in [
            json!({"spec": {"$patch": "burn"}}),
            json!({"spec": {"containers": [{"image": "x"}]}}),
            json!([]),
        ] {
            let error = merge(Some(&schema()), &mut object, &patch).unwrap_err();
            assert_eq!(error.code, 400, "{patch}");
        }
    }
}
