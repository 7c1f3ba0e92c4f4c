//! Object metadata: the same for all kinds, so no kind's schema has it.
//!
//! The rules are those of `k8s.io/apimachinery/pkg/api/validation/objectmeta.go`.

use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use crate::error::{ApiError, Cause};
use crate::kinds::Kind;
use crate::schema;

/// A name, or the part of a key before its `/`, has at most this many bytes.
const SUBDOMAIN_BYTES_MAX: usize = 253;
/// A label's value, or the part of a key behind its `/`, has at most this many bytes.
const WORD_BYTES_MAX: usize = 63;
/// All keys and values of an object's annotations have at most this many bytes together.
const ANNOTATIONS_BYTES_MAX: usize = 256 * 1024;
/// A generated name has this many characters behind its prefix.
const SUFFIX_LENGTH: usize = 5;
/// The longest prefix of a generated name; what is longer is cut.
const PREFIX_BYTES_MAX: usize = WORD_BYTES_MAX - SUFFIX_LENGTH;

/// Its schema, with how its lists merge.
pub(crate) fn schema() -> &'static Value {
    static SCHEMA: LazyLock<Value> = LazyLock::new(|| {
        let text = || json!({"type": "string"});
        let texts = || json!({"type": "object", "additionalProperties": {"type": "string"}});
        let whole = || json!({"type": "integer"});
        let time = || json!({"type": "string", "format": "date-time", "nullable": true});
        json!({"type": "object", "properties": {
            "name": text(),
            "generateName": text(),
            "namespace": text(),
            "selfLink": text(),
            "uid": text(),
            "resourceVersion": text(),
            "generation": whole(),
            "creationTimestamp": time(),
            "deletionTimestamp": time(),
            "deletionGracePeriodSeconds": whole(),
            "labels": texts(),
            "annotations": texts(),
            "finalizers": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"},
                "x-kubernetes-patch-strategy": "merge"},
            "ownerReferences": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["uid"],
                "x-kubernetes-patch-strategy": "merge", "x-kubernetes-patch-merge-key": "uid",
                "items": {"type": "object", "x-kubernetes-map-type": "atomic", "properties": {
                    "apiVersion": text(), "kind": text(), "name": text(), "uid": text(),
                    "controller": {"type": "boolean"}, "blockOwnerDeletion": {"type": "boolean"}}}},
            "managedFields": {"type": "array", "items": {"type": "object", "properties": {
                "manager": text(), "operation": text(), "apiVersion": text(), "time": time(),
                "fieldsType": text(), "subresource": text(),
                "fieldsV1": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}}},
        }})
    });
    &SCHEMA
}

/// What is done about fields that say nothing: null, and empty texts, lists and maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Empty {
    /// They go: no server keeps them.
    Dropped,
    /// They stay: who applies an empty map owns it.
    Kept,
}

/// Removes what metadata does not have, and says so.
///
/// # Errors
/// 400 when a field has another type.
pub(crate) fn clean(object: &mut Value, path: &str, empty: Empty) -> Result<Vec<Cause>, ApiError> {
    let Some(metadata) = object.get_mut("metadata") else {
        return Ok(Vec::new());
    };
    if metadata.is_null() {
        *metadata = json!({});
    }
    let given = metadata.clone();
    drop_nulls(metadata);
    let mut wrong = schema::check(schema(), metadata);
    for field in ["creationTimestamp", "deletionTimestamp"] {
        let text = metadata.get(field).and_then(Value::as_str);
        if text.is_some_and(|text| text.parse::<jiff::Timestamp>().is_err()) {
            wrong.push(Cause::new(
                field.to_owned(),
                "must be a time in RFC 3339".to_owned(),
            ));
        }
    }
    if let Some(cause) = wrong.first() {
        let field = if cause.field.is_empty() { "" } else { "." };
        return Err(ApiError::bad_request(format!(
            "{path}metadata{field}{}: {}",
            cause.field, cause.message
        )));
    }
    if empty == Empty::Kept {
        *metadata = given;
    }
    let unknown = schema::prune_unknown_below(schema(), metadata, &format!("{path}metadata"));
    if empty == Empty::Dropped
        && let Some(map) = metadata.as_object_mut()
    {
        map.retain(|_, value| !is_empty(value));
    }
    Ok(unknown)
}

fn drop_nulls(value: &mut Value) {
    if let Value::Object(map) = value {
        map.retain(|_, value| !value.is_null());
        for field in ["labels", "annotations"] {
            // A text that is null is the empty text.
            for value in map
                .get_mut(field)
                .and_then(Value::as_object_mut)
                .into_iter()
                .flat_map(Map::values_mut)
            {
                if value.is_null() {
                    *value = "".into();
                }
            }
        }
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Number(number) => number.as_i64() == Some(0),
        _ => false,
    }
}

/// A name from a prefix; the suffix has no vowels, so that it is no word.
pub(crate) fn generate_name(prefix: &str) -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let cut = prefix
        .char_indices()
        .map(|(at, _)| at)
        .find(|at| *at > PREFIX_BYTES_MAX);
    let bytes = uuid::Uuid::new_v4().into_bytes();
    let suffix: String = bytes[..SUFFIX_LENGTH]
        .iter()
        .map(|byte| char::from(ALPHABET[usize::from(*byte) % ALPHABET.len()]))
        .collect();
    format!("{}{suffix}", &prefix[..cut.unwrap_or(prefix.len())])
}

fn text<'a>(metadata: &'a Value, field: &str) -> &'a str {
    metadata
        .get(field)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// Everything in `metadata` that is not allowed; `path` is where it is.
pub(crate) fn check(kind: &Kind, metadata: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    if text(metadata, "name").is_empty() {
        causes.push(Cause::required(format!("{path}.name")));
    }
    let mut wrong = |field: &str, message: String| {
        causes.push(Cause::new(format!("{path}.{field}"), message));
    };
    // Objects of RBAC are called like what they are about, such as `system:masters`.
    let is_name = if kind.group == "rbac.authorization.k8s.io" {
        is_path_segment
    } else {
        is_subdomain
    };
    let prefix = text(metadata, "generateName");
    // A prefix may end in what a name may not end in.
    if !prefix.is_empty() && !is_name(&format!("{prefix}x")) {
        wrong(
            "generateName",
            format!("`{prefix}` is no beginning of a name"),
        );
    }
    let name = text(metadata, "name");
    if !name.is_empty() && !is_name(name) {
        wrong(
            "name",
            format!(
                "`{name}` must have 1 to {SUBDOMAIN_BYTES_MAX} lower-case letters, digits, `-` and `.`, with a letter or digit at both ends of each part"
            ),
        );
    }
    check_words(metadata, &mut wrong);
    causes
}

/// An object inside an object: it must say what it is, and may lack a name.
pub(crate) fn check_embedded(object: &Value, path: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    let inside = |field: &str| {
        let dot = if path.is_empty() { "" } else { "." };
        format!("{path}{dot}{field}")
    };
    for field in ["apiVersion", "kind"] {
        let good = match object.get(field) {
            None => {
                causes.push(Cause::required(inside(field)));
                continue;
            }
            Some(Value::String(text)) if field == "kind" => is_domain_label(&text.to_lowercase()),
            Some(Value::String(text)) => !text.is_empty() && text.matches('/').count() < 2,
            Some(_) => false,
        };
        if !good {
            causes.push(Cause::new(inside(field), format!("is no {field}")));
        }
    }
    let Some(metadata) = object
        .get("metadata")
        .filter(|metadata| metadata.is_object())
    else {
        return causes;
    };
    let mut wrong = |field: &str, message: String| {
        causes.push(Cause::new(inside(&format!("metadata.{field}")), message));
    };
    for (field, is_good) in [
        ("generateName", is_path_segment as fn(&str) -> bool),
        ("name", is_path_segment),
        ("namespace", |name| {
            name.len() <= WORD_BYTES_MAX && is_domain_label(name)
        }),
    ] {
        let name = text(metadata, field);
        if !name.is_empty() && !is_good(name) {
            wrong(field, format!("`{name}` is no name"));
        }
    }
    check_words(metadata, &mut wrong);
    causes
}

/// Labels, annotations, finalizers and owners.
fn check_words(metadata: &Value, wrong: &mut impl FnMut(&str, String)) {
    let map = |field: &str| metadata.get(field).and_then(Value::as_object);
    for (key, value) in map("labels").into_iter().flatten() {
        if !is_key(key) {
            wrong("labels", format!("`{key}` is no key of a label"));
        }
        let value = value.as_str().unwrap_or_default();
        if !value.is_empty() && !is_word(value) {
            wrong(
                "labels",
                format!(
                    "`{value}` is no value of a label: at most {WORD_BYTES_MAX} letters, digits, `-`, `_` and `.`, with a letter or digit at both ends"
                ),
            );
        }
    }
    let mut bytes = 0;
    for (key, value) in map("annotations").into_iter().flatten() {
        if !is_key(&key.to_lowercase()) {
            wrong("annotations", format!("`{key}` is no key of an annotation"));
        }
        bytes += key.len() + value.as_str().map_or(0, str::len);
    }
    if bytes > ANNOTATIONS_BYTES_MAX {
        wrong(
            "annotations",
            format!("have {bytes} bytes, at most {ANNOTATIONS_BYTES_MAX} are allowed"),
        );
    }
    let list = |field: &str| metadata.get(field).and_then(Value::as_array);
    for name in list("finalizers")
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        if !is_key(name) {
            wrong("finalizers", format!("`{name}` is no name of a finalizer"));
        }
    }
    let mut controllers = 0;
    for owner in list("ownerReferences").into_iter().flatten() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if text(owner, field).is_empty() {
                wrong(
                    &format!("ownerReferences.{field}"),
                    "must not be empty".to_owned(),
                );
            }
        }
        controllers += usize::from(owner.get("controller") == Some(&Value::Bool(true)));
    }
    if controllers > 1 {
        wrong(
            "ownerReferences",
            "only one owner can be the controller".to_owned(),
        );
    }
}

/// What may not change, and what may not be added while an object is being deleted.
pub(crate) fn check_change(old: &Value, new: &Value) -> Vec<Cause> {
    let (none, mut causes) = (json!({}), Vec::new());
    let (old, new) = (
        old.get("metadata").unwrap_or(&none),
        new.get("metadata").unwrap_or(&none),
    );
    let mut wrong = |field: &str, message: String| {
        causes.push(Cause::new(format!("metadata.{field}"), message));
    };
    for field in [
        "name",
        "namespace",
        "uid",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ] {
        // What is left out stays.
        if new
            .get(field)
            .is_some_and(|value| Some(value) != old.get(field))
        {
            wrong(field, "is immutable".to_owned());
        }
    }
    if old.get("deletionTimestamp").is_some() {
        let list = |metadata: &Value| {
            let list = metadata.get("finalizers").and_then(Value::as_array);
            list.cloned().unwrap_or_default()
        };
        let before = list(old);
        if list(new).iter().any(|name| !before.contains(name)) {
            let message =
                "Forbidden: no new finalizers can be added if the object is being deleted";
            let cause = Cause::new("metadata.finalizers", message);
            causes.push(cause.because("FieldValueForbidden"));
        }
    }
    causes
}

fn is_alphanumeric(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
}

/// A label of a domain name: `web-1`.
fn is_domain_label(text: &str) -> bool {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    bytes.iter().all(|byte| good(*byte) || *byte == b'-')
        && bytes.first().is_some_and(|byte| good(*byte))
        && bytes.last().is_some_and(|byte| good(*byte))
}

/// A domain name, RFC 1123: `web.example.org`.
pub(crate) fn is_subdomain(text: &str) -> bool {
    text.len() <= SUBDOMAIN_BYTES_MAX && text.split('.').all(is_domain_label)
}

/// What can stand between two `/` of a path.
pub(crate) fn is_path_segment(text: &str) -> bool {
    !text.is_empty() && !matches!(text, "." | "..") && !text.contains(['/', '%'])
}

/// The value of a label, or a key without its domain.
pub(crate) fn is_word(text: &str) -> bool {
    let bytes = text.as_bytes();
    bytes.len() <= WORD_BYTES_MAX
        && bytes
            .iter()
            .all(|byte| is_alphanumeric(*byte) || b"-_.".contains(byte))
        && bytes.first().is_some_and(|byte| is_alphanumeric(*byte))
        && bytes.last().is_some_and(|byte| is_alphanumeric(*byte))
}

/// `app` or `example.org/app`.
pub(crate) fn is_key(text: &str) -> bool {
    match text.split_once('/') {
        Some((domain, word)) => is_subdomain(domain) && is_word(word),
        None => is_word(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_keeps_only_what_it_has() {
        let mut object = json!({"metadata": {"name": "a", "labels": {}, "finalizers": [], "creationTimestamp": null,
            "surplus": 1, "annotations": {"a": null}}});
        let unknown = clean(&mut object, "", Empty::Dropped).unwrap();
        assert_eq!(unknown[0].field, "metadata.surplus");
        assert_eq!(
            object["metadata"],
            json!({"name": "a", "annotations": {"a": ""}})
        );
        for wrong in [
            json!({"labels": {"a": 1}}),
            json!("text"),
            json!({"name": 5}),
        ] {
            let mut object = json!({"metadata": wrong});
            assert_eq!(
                clean(&mut object, "", Empty::Dropped).unwrap_err().code,
                400,
                "{object}"
            );
        }
    }

    #[test]
    fn keys_and_names_are_as_in_kubernetes() {
        for good in ["a", "a.b", "A_b-c.d", "example.org/x"] {
            assert!(is_key(good), "{good}");
        }
        for bad in ["", "a b", "-a", "/a", "a/", "Example.org/x", "a/b/c"] {
            assert!(!is_key(bad), "{bad}");
        }
        assert!(is_subdomain("a.b-c.0") && !is_subdomain("a..b") && !is_subdomain("A"));
        assert!(is_subdomain(&generate_name("web-")));
    }
}
