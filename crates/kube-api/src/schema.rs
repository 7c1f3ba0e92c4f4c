//! Structural schemas: checks an object, and finds fields that the schema does not know.

use serde_json::{Map, Value};

use crate::error::Cause;

/// Fields the schema does not know, removed from `object`, with the one that was probably meant.
pub fn prune_unknown(schema: &Value, object: &mut Value) -> Vec<Cause> {
    let mut unknown = Vec::new();
    let Some(map) = object.as_object_mut() else {
        return unknown;
    };
    for (key, value) in map.iter_mut() {
        // Type and object metadata have their own rules.
        if matches!(key.as_str(), "apiVersion" | "kind" | "metadata") {
            continue;
        }
        if let Some(schema) = property(schema, key) {
            prune(schema, value, key, &mut unknown);
        }
    }
    let keys: Vec<String> = map.keys().cloned().collect();
    for key in keys {
        let known = matches!(key.as_str(), "apiVersion" | "kind" | "metadata");
        if !known && property(schema, &key).is_none() && !preserves(schema) {
            map.remove(&key);
            unknown.push(unknown_field(schema, "", &key));
        }
    }
    unknown
}

/// Removes the fields of `metadata` that `ObjectMeta` does not have and returns them.
pub fn prune_metadata(object: &mut Value) -> Vec<Cause> {
    const KNOWN: [&str; 15] = [
        "annotations",
        "creationTimestamp",
        "deletionGracePeriodSeconds",
        "deletionTimestamp",
        "finalizers",
        "generateName",
        "generation",
        "labels",
        "managedFields",
        "name",
        "namespace",
        "ownerReferences",
        "resourceVersion",
        "selfLink",
        "uid",
    ];
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else {
        return Vec::new();
    };
    let unknown: Vec<String> = metadata
        .keys()
        .filter(|key| !KNOWN.contains(&key.as_str()))
        .cloned()
        .collect();
    let properties: Map<String, Value> = KNOWN
        .map(|key| (key.to_owned(), Value::Null))
        .into_iter()
        .collect();
    let schema = serde_json::json!({"properties": properties});
    unknown
        .iter()
        .map(|key| {
            metadata.remove(key);
            unknown_field(&schema, "metadata", key)
        })
        .collect()
}

pub(crate) fn property<'a>(schema: &'a Value, key: &str) -> Option<&'a Value> {
    schema
        .get("properties")
        .and_then(|properties| properties.get(key))
        .or_else(|| {
            schema
                .get("additionalProperties")
                .filter(|additional| additional.is_object())
        })
}

fn extension<'a>(schema: &'a Value, name: &str) -> Option<&'a str> {
    schema.get(name).and_then(Value::as_str)
}

/// Whether a map has one owner as a whole.
pub(crate) fn is_atomic_map(schema: &Value) -> bool {
    extension(schema, "x-kubernetes-map-type") == Some("atomic")
}

/// Whether a list's items have owners of their own.
pub(crate) fn merges_items(schema: &Value) -> bool {
    matches!(
        extension(schema, "x-kubernetes-list-type"),
        Some("map" | "set")
    )
}

/// The keys by which a list of type `map` tells its items apart.
pub(crate) fn list_keys(schema: &Value) -> Vec<&str> {
    let keys = schema
        .get("x-kubernetes-list-map-keys")
        .and_then(Value::as_array);
    keys.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

/// Of object metadata, as far as lists in it merge.
pub(crate) fn metadata() -> Value {
    serde_json::json!({"type": "object", "properties": {
        "finalizers": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"},
            "x-kubernetes-patch-strategy": "merge"},
        "ownerReferences": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["uid"],
            "x-kubernetes-patch-strategy": "merge", "x-kubernetes-patch-merge-key": "uid",
            "items": {"type": "object", "x-kubernetes-map-type": "atomic"}},
    }})
}

fn preserves(schema: &Value) -> bool {
    let flag = |name: &str| schema.get(name).and_then(Value::as_bool) == Some(true);
    flag("x-kubernetes-preserve-unknown-fields")
        || flag("additionalProperties")
        || (schema.get("properties").is_none() && schema.get("additionalProperties").is_none())
}

fn unknown_field(schema: &Value, path: &str, key: &str) -> Cause {
    let known = schema.get("properties").and_then(Value::as_object);
    let close = known
        .into_iter()
        .flat_map(Map::keys)
        .map(|name| (strsim::damerau_levenshtein(name, key), name))
        .min()
        .filter(|(distance, name)| *distance <= 2.max(name.len() / 3))
        .map(|(_, name)| format!("; did you mean `{name}`?"))
        .unwrap_or_default();
    let field = join(path, key);
    Cause {
        message: format!("unknown field \"{field}\"{close}"),
        field,
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

fn prune(schema: &Value, value: &mut Value, path: &str, unknown: &mut Vec<Cause>) {
    match value {
        Value::Object(map) => {
            if preserves(schema) && schema.get("properties").is_none() {
                return;
            }
            let keys: Vec<String> = map.keys().cloned().collect();
            for key in keys {
                match property(schema, &key) {
                    Some(inner) => {
                        if let Some(value) = map.get_mut(&key) {
                            prune(inner, value, &join(path, &key), unknown);
                        }
                    }
                    None if preserves(schema) => {}
                    None => {
                        map.remove(&key);
                        unknown.push(unknown_field(schema, path, &key));
                    }
                }
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                for (index, item) in items.iter_mut().enumerate() {
                    prune(schema, item, &format!("{path}[{index}]"), unknown);
                }
            }
        }
        _ => {}
    }
}

/// Everything in `value` that breaks the schema.
pub fn check(schema: &Value, value: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    check_at(schema, value, "", &mut causes);
    causes
}

fn check_at(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    let mut wrong = |message: String| {
        causes.push(Cause {
            field: path.to_owned(),
            message,
        });
    };
    if value.is_null() {
        if schema.get("nullable").and_then(Value::as_bool) != Some(true) && !path.is_empty() {
            wrong("must not be null".to_owned());
        }
        return;
    }
    let int_or_string = schema
        .get("x-kubernetes-int-or-string")
        .and_then(Value::as_bool)
        == Some(true);
    if let Some(wanted) = schema.get("type").and_then(Value::as_str)
        && !int_or_string
        && !has_type(value, wanted)
    {
        wrong(format!(
            "must be of type {wanted}, not {}",
            type_name(value)
        ));
        return;
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let list: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        wrong(format!(
            "unsupported value {value}: supported values: {}",
            list.join(", ")
        ));
    }
    if let Some(number) = value.as_f64() {
        let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
        if bound("minimum").is_some_and(|minimum| number < minimum) {
            wrong(format!("must be at least {}", schema["minimum"]));
        }
        if bound("maximum").is_some_and(|maximum| number > maximum) {
            wrong(format!("must be at most {}", schema["maximum"]));
        }
    }
    let size = match value {
        Value::String(text) => Some(("Length", text.chars().count())),
        Value::Array(items) => Some(("Items", items.len())),
        Value::Object(map) => Some(("Properties", map.len())),
        _ => None,
    };
    if let Some((what, size)) = size {
        let bound = |prefix: &str| {
            let limit = schema
                .get(format!("{prefix}{what}"))
                .and_then(Value::as_u64);
            limit.map(|limit| limit as usize)
        };
        if let Some(limit) = bound("min").filter(|limit| size < *limit) {
            wrong(format!(
                "has {size} {}, at least {limit} are needed",
                what.to_lowercase()
            ));
        }
        if let Some(limit) = bound("max").filter(|limit| size > *limit) {
            wrong(format!(
                "has {size} {}, at most {limit} are allowed",
                what.to_lowercase()
            ));
        }
    }
    match value {
        Value::Object(map) => check_object(schema, map, path, causes),
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                for (index, item) in items.iter().enumerate() {
                    check_at(schema, item, &format!("{path}[{index}]"), causes);
                }
            }
        }
        _ => {}
    }
}

fn check_object(schema: &Value, map: &Map<String, Value>, path: &str, causes: &mut Vec<Cause>) {
    let required = schema.get("required").and_then(Value::as_array);
    for name in required.into_iter().flatten().filter_map(Value::as_str) {
        if !map.contains_key(name) {
            causes.push(Cause {
                field: join(path, name),
                message: "Required value".to_owned(),
            });
        }
    }
    for (key, value) in map {
        let own = path.is_empty() && matches!(key.as_str(), "apiVersion" | "kind" | "metadata");
        if let (false, Some(schema)) = (own, property(schema, key)) {
            check_at(schema, value, &join(path, key), causes);
        }
    }
}

fn has_type(value: &Value, wanted: &str) -> bool {
    match wanted {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => {
            value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|n| n.fract() == 0.0)
        }
        "number" => value.is_number(),
        _ => true,
    }
}

const fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Fills in the schema's defaults where an object has no value.
pub fn fill_defaults(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(map) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            for (key, inner) in properties.into_iter().flatten() {
                if let (false, Some(default)) = (map.contains_key(key), inner.get("default")) {
                    map.insert(key.clone(), default.clone());
                }
                if let Some(value) = map.get_mut(key) {
                    fill_defaults(inner, value);
                }
            }
        }
        Value::Array(items) => {
            if let Some(inner) = schema.get("items") {
                for item in items {
                    fill_defaults(inner, item);
                }
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({"type": "object", "required": ["spec"], "properties": {
            "spec": {"type": "object", "required": ["size"], "properties": {
                "size": {"type": "integer", "minimum": 1, "maximum": 5},
                "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                "list": {"type": "array", "maxItems": 2, "items": {"type": "object", "properties": {"x": {"type": "string"}}}}
            }}
        }})
    }

    #[test]
    fn unknown_fields_are_found_with_the_likely_one() {
        let mut object = json!({"kind": "X", "metadata": {"anything": 1}, "spec": {
            "sise": 1, "free": {"deep": {"er": 1}}, "list": [{"x": "1", "y": 2}]}, "statu": {}});
        let unknown = prune_unknown(&schema(), &mut object);
        let fields: Vec<&str> = unknown.iter().map(|c| c.field.as_str()).collect();
        assert_eq!(fields, ["spec.list[0].y", "spec.sise", "statu"]);
        assert!(unknown[1].message.contains("did you mean `size`?"));
        assert_eq!(object["spec"]["free"]["deep"]["er"], 1);
        assert!(object["spec"].get("sise").is_none());
    }

    #[test]
    fn unknown_metadata_is_found_with_the_likely_one() {
        let mut object = json!({"metadata": {"name": "a", "lables": {}}});
        let unknown = prune_metadata(&mut object);
        assert_eq!(unknown[0].field, "metadata.lables");
        assert!(unknown[0].message.contains("did you mean `labels`?"));
        assert_eq!(object, json!({"metadata": {"name": "a"}}));
    }

    #[test]
    fn every_violation_is_found() {
        let bad = json!({"spec": {"size": 9, "mode": "c", "list": [1, {}, {}]}});
        let fields: Vec<String> = check(&schema(), &bad)
            .into_iter()
            .map(|c| c.field)
            .collect();
        assert_eq!(
            fields,
            ["spec.list", "spec.list[0]", "spec.mode", "spec.size"]
        );
        assert_eq!(check(&schema(), &json!({}))[0].field, "spec");
        assert!(check(&schema(), &json!({"spec": {"size": 2}})).is_empty());
    }

    #[test]
    fn defaults_fill_gaps() {
        let mut object = json!({"spec": {"size": 1}});
        fill_defaults(&schema(), &mut object);
        assert_eq!(object["spec"]["mode"], "a");
    }
}
