//! Reading objects as they are stored: plain JSON.

use serde_json::{Value, json};

/// Group and plural of a kind.
pub(crate) type Resource = (String, String);

/// Where an object is: resource, namespace (empty for the whole cluster), name.
pub(crate) type Key = (Resource, String, String);

/// A resource from its parts.
pub(crate) fn resource(group: &str, plural: &str) -> Resource {
    (group.to_owned(), plural.to_owned())
}

/// The text at a pointer; empty when there is none.
pub(crate) fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// The number at a pointer.
pub(crate) fn number(object: &Value, pointer: &str) -> Option<i64> {
    object.pointer(pointer).and_then(Value::as_i64)
}

/// The list at a pointer; empty when there is none.
pub(crate) fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

pub(crate) fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

pub(crate) fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

pub(crate) fn uid(object: &Value) -> &str {
    text(object, "/metadata/uid")
}

pub(crate) fn key(resource: &Resource, object: &Value) -> Key {
    (
        resource.clone(),
        namespace(object).to_owned(),
        name(object).to_owned(),
    )
}

pub(crate) fn is_dying(object: &Value) -> bool {
    object.pointer("/metadata/deletionTimestamp").is_some()
}

pub(crate) fn annotation<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object
        .get("metadata")?
        .get("annotations")?
        .get(key)?
        .as_str()
}

pub(crate) fn label<'a>(object: &'a Value, key: &str) -> Option<&'a str> {
    object.get("metadata")?.get("labels")?.get(key)?.as_str()
}

/// A condition of a status.
pub(crate) fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    list(object, "/status/conditions")
        .iter()
        .find(|condition| text(condition, "/type") == kind)
}

pub(crate) fn is_true(object: &Value, kind: &str) -> bool {
    condition(object, kind).is_some_and(|condition| text(condition, "/status") == "True")
}

/// A condition for a new status: its transition time stays while its status does.
pub(crate) fn next_condition(
    old: &Value,
    kind: &str,
    status: bool,
    reason: &str,
    message: &str,
    now: &str,
) -> Value {
    let status = if status { "True" } else { "False" };
    let before = condition(old, kind).filter(|before| text(before, "/status") == status);
    let since = before.map_or(now, |before| text(before, "/lastTransitionTime"));
    let mut next = json!({"type": kind, "status": status, "lastTransitionTime": since});
    if !reason.is_empty() {
        next["reason"] = reason.into();
    }
    if !message.is_empty() {
        next["message"] = message.into();
    }
    next
}

/// The UID of the controller that owns an object.
pub(crate) fn controller(object: &Value) -> Option<&str> {
    list(object, "/metadata/ownerReferences")
        .iter()
        .find(|owner| owner.get("controller").and_then(Value::as_bool) == Some(true))
        .map(|owner| text(owner, "/uid"))
}

/// The reference by which `owner` controls what it makes.
pub(crate) fn owned_by(owner: &Value) -> Value {
    json!([{"apiVersion": text(owner, "/apiVersion"), "kind": text(owner, "/kind"), "name": name(owner),
        "uid": uid(owner), "controller": true, "blockOwnerDeletion": true}])
}

/// Whether a label selector (`matchLabels`, `matchExpressions`) selects these labels.
pub(crate) fn selects(selector: &Value, labels: &Value) -> bool {
    let label = |key: &str| labels.get(key).and_then(Value::as_str);
    let pairs = selector.get("matchLabels").and_then(Value::as_object);
    let pairs = pairs
        .into_iter()
        .flatten()
        .all(|(key, value)| label(key) == value.as_str());
    pairs
        && list(selector, "/matchExpressions").iter().all(|term| {
            let found = label(text(term, "/key"));
            let listed =
                found.is_some_and(|found| list(term, "/values").iter().any(|value| value == found));
            match text(term, "/operator") {
                "In" => listed,
                "NotIn" => !listed,
                "Exists" => found.is_some(),
                "DoesNotExist" => found.is_none(),
                _ => false,
            }
        })
}

/// A number, or a percentage of `of`, as in `maxSurge`.
pub(crate) fn share(value: Option<&Value>, of: i64, default: &str, round_up: bool) -> i64 {
    let text = match value {
        Some(Value::Number(number)) => return number.as_i64().unwrap_or(0),
        Some(Value::String(text)) => text,
        _ => default,
    };
    match text.strip_suffix('%').map(str::parse::<i64>) {
        Some(Ok(percent)) if round_up => (of * percent + 99) / 100,
        Some(Ok(percent)) => of * percent / 100,
        Some(Err(_)) => 0,
        None => text.parse().unwrap_or(0),
    }
}

/// A short name for some content, the same for the same content.
pub(crate) fn short_hash(content: &Value) -> String {
    // The letters Kubernetes uses: no vowels, so no words.
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let hash = blake3::hash(content.to_string().as_bytes());
    hash.as_bytes()[..10]
        .iter()
        .map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_and_shares_read_as_in_kubernetes() {
        let labels = json!({"app": "web", "tier": "a"});
        assert!(selects(&json!({"matchLabels": {"app": "web"}}), &labels));
        assert!(!selects(&json!({"matchLabels": {"app": "x"}}), &labels));
        let term = |operator: &str| json!({"matchExpressions": [{"key": "tier", "operator": operator, "values": ["a", "b"]}]});
        assert!(selects(&term("In"), &labels) && selects(&term("Exists"), &labels));
        assert!(!selects(&term("NotIn"), &labels) && !selects(&term("DoesNotExist"), &labels));
        assert_eq!(share(Some(&json!("25%")), 3, "", true), 1);
        assert_eq!(share(Some(&json!("25%")), 3, "", false), 0);
        assert_eq!(share(Some(&json!(2)), 3, "", false), 2);
        assert_eq!(share(None, 8, "25%", true), 2);
    }

    #[test]
    fn a_condition_keeps_its_time_while_its_status_stays() {
        let old = json!({"status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "a"}]}});
        assert_eq!(
            next_condition(&old, "Ready", true, "", "", "b")["lastTransitionTime"],
            "a"
        );
        assert_eq!(
            next_condition(&old, "Ready", false, "", "", "b")["lastTransitionTime"],
            "b"
        );
    }
}
