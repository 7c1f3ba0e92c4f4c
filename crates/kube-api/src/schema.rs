//! Structural schemas: checks an object, and finds fields that the schema does not know.

use serde_json::{Map, Value};

use crate::error::{ApiError, Cause};
use crate::metadata::{self, Empty};

/// The reason of a cause: a value has another type.
pub(crate) const WRONG_TYPE: &str = "FieldValueTypeInvalid";

/// What is wrong with a null.
pub(crate) const NOT_NULL: &str = "must not be null";

/// What is wrong with what is neither a whole number nor a text.
pub(crate) const NOT_INT_OR_STRING: &str = "must be a whole number or a text";

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

/// The same below the root: nothing has rules of its own there. `path` is where `value` is.
pub(crate) fn prune_unknown_below(schema: &Value, value: &mut Value, path: &str) -> Vec<Cause> {
    let mut unknown = Vec::new();
    prune(schema, value, path, &mut unknown);
    unknown
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
    let message = format!("unknown field \"{field}\"{close}");
    Cause::new(field, message)
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
    let flag = |name: &str| schema.get(name).and_then(Value::as_bool) == Some(true);
    if value.is_null() {
        if !flag("nullable") && !path.is_empty() {
            causes.push(Cause::new(path, NOT_NULL).because(WRONG_TYPE));
            check_enum(schema, value, path, causes);
        }
        return;
    }
    if let Some(wanted) = schema.get("type").and_then(Value::as_str)
        && !flag("x-kubernetes-int-or-string")
        && !has_type(value, wanted)
    {
        let message = format!("must be of type {wanted}, not {}", type_name(value));
        causes.push(Cause::new(path, message).because(WRONG_TYPE));
        check_enum(schema, value, path, causes);
        return;
    }
    if flag("x-kubernetes-int-or-string") && !(value.is_string() || has_type(value, "integer")) {
        causes.push(Cause::new(path, NOT_INT_OR_STRING).because(WRONG_TYPE));
        return;
    }
    check_enum(schema, value, path, causes);
    check_bounds(schema, value, path, causes);
    match value {
        Value::Object(map) => {
            if flag("x-kubernetes-embedded-resource") {
                causes.extend(metadata::check_embedded(value, path));
            }
            check_object(schema, map, path, causes);
        }
        Value::Array(items) => check_items(schema, items, path, causes),
        _ => {}
    }
}

fn check_enum(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array)
        && !allowed.contains(value)
    {
        let list: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        let message = format!(
            "unsupported value {value}: supported values: {}",
            list.join(", ")
        );
        causes.push(Cause::new(path, message).because("FieldValueNotSupported"));
    }
}

fn check_bounds(schema: &Value, value: &Value, path: &str, causes: &mut Vec<Cause>) {
    if let Some(number) = value.as_f64() {
        let bound = |name: &str| schema.get(name).and_then(Value::as_f64);
        if bound("minimum").is_some_and(|minimum| number < minimum) {
            let message = format!("must be at least {}", schema["minimum"]);
            causes.push(Cause::new(path, message));
        }
        if bound("maximum").is_some_and(|maximum| number > maximum) {
            let message = format!("must be at most {}", schema["maximum"]);
            causes.push(Cause::new(path, message));
        }
    }
    let (what, size, too_many) = match value {
        Value::String(text) => ("Length", text.chars().count(), "FieldValueTooLong"),
        Value::Array(items) => ("Items", items.len(), "FieldValueTooMany"),
        Value::Object(map) => ("Properties", map.len(), "FieldValueTooMany"),
        _ => return,
    };
    let bound = |prefix: &str| {
        let limit = schema
            .get(format!("{prefix}{what}"))
            .and_then(Value::as_u64);
        limit.map(|limit| limit as usize)
    };
    let what = what.to_lowercase();
    if let Some(limit) = bound("min").filter(|limit| size < *limit) {
        let message = format!("has {size} {what}, at least {limit} are needed");
        causes.push(Cause::new(path, message));
    }
    if let Some(limit) = bound("max").filter(|limit| size > *limit) {
        let message = format!("has {size} {what}, at most {limit} are allowed");
        causes.push(Cause::new(path, message).because(too_many));
    }
}

fn check_items(schema: &Value, items: &[Value], path: &str, causes: &mut Vec<Cause>) {
    let inner = schema.get("items");
    for (index, item) in items.iter().enumerate() {
        let path = format!("{path}[{index}]");
        if !list_keys(schema).is_empty() && !item.is_object() && !item.is_null() {
            let message = "must be an object in a list that merges by keys";
            causes.push(Cause::new(&path, message));
        }
        // Each value that is there more than once is named once.
        let before = items[..index]
            .iter()
            .filter(|other| is_same_item(schema, other, item))
            .count();
        if before == 1 {
            let message = format!("Duplicate value: {item}");
            causes.push(Cause::new(&path, message).because("FieldValueDuplicate"));
        }
        if let Some(schema) = inner {
            check_at(schema, item, &path, causes);
        }
    }
}

/// Whether two items cannot both be in a list that merges.
fn is_same_item(schema: &Value, one: &Value, other: &Value) -> bool {
    let keys = list_keys(schema);
    if keys.is_empty() || !one.is_object() || !other.is_object() {
        return merges_items(schema) && one == other;
    }
    keys.iter().all(|key| one.get(key) == other.get(key))
}

fn check_object(schema: &Value, map: &Map<String, Value>, path: &str, causes: &mut Vec<Cause>) {
    let required = schema.get("required").and_then(Value::as_array);
    for name in required.into_iter().flatten().filter_map(Value::as_str) {
        if !map.contains_key(name) {
            causes.push(Cause::required(join(path, name)));
        }
    }
    for (key, value) in map {
        let own = path.is_empty() && matches!(key.as_str(), "apiVersion" | "kind" | "metadata");
        if let (false, Some(schema)) = (own, property(schema, key)) {
            check_at(schema, value, &join(path, key), causes);
        }
    }
}

/// Cleans the metadata of the objects inside an object.
///
/// # Errors
/// 400 when one's metadata is none.
pub(crate) fn clean_embedded(
    schema: &Value,
    value: &mut Value,
    path: &str,
) -> Result<Vec<Cause>, ApiError> {
    let mut unknown = Vec::new();
    match value {
        Value::Object(_) => {
            let is_embedded = schema.get("x-kubernetes-embedded-resource");
            if is_embedded.and_then(Value::as_bool) == Some(true) {
                let path = format!("{path}.");
                unknown.extend(metadata::clean(value, &path, Empty::Dropped)?);
            }
            for (key, value) in value.as_object_mut().into_iter().flatten() {
                if let Some(schema) = property(schema, key) {
                    unknown.extend(clean_embedded(schema, value, &join(path, key))?);
                }
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                for (index, item) in items.iter_mut().enumerate() {
                    unknown.extend(clean_embedded(schema, item, &format!("{path}[{index}]"))?);
                }
            }
        }
        _ => {}
    }
    Ok(unknown)
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

fn is_nullable(schema: &Value) -> bool {
    schema.get("nullable").and_then(Value::as_bool) == Some(true)
}

/// Removes each null that the schema does not allow: it says no more than that there is no value.
pub(crate) fn drop_nulls(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, value| {
                !value.is_null() || property(schema, key).is_none_or(is_nullable)
            });
            for (key, value) in map {
                if let Some(inner) = property(schema, key) {
                    drop_nulls(inner, value);
                }
            }
        }
        Value::Array(items) => {
            if let Some(inner) = schema.get("items") {
                for item in items {
                    drop_nulls(inner, item);
                }
            }
        }
        _ => {}
    }
}

/// Fills in the schema's defaults where an object has no value.
pub fn fill_defaults(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(map) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            for (key, inner) in properties.into_iter().flatten() {
                let is_missing = match map.get(key) {
                    None => true,
                    Some(value) => value.is_null() && !is_nullable(inner),
                };
                if let (true, Some(default)) = (is_missing, inner.get("default")) {
                    map.insert(key.clone(), default.clone());
                }
            }
            for (key, value) in map {
                if let Some(inner) = property(schema, key) {
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
