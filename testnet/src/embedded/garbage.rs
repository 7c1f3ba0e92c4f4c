//! Garbage collection by `ownerReferences`, and the end of namespaces and definitions.
//!
//! An object whose owners are all gone goes too (background). An owner that waits for its
//! dependents has the finalizer `foregroundDeletion`, one that leaves them has `orphan`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::crds;
use super::object::{Key, is_dying, list, name, next_condition, resource, text, uid};
use super::simulate::{Outcome, Write};
use super::view::View;

pub(crate) const FOREGROUND: &str = "foregroundDeletion";
pub(crate) const ORPHAN: &str = "orphan";
pub(crate) const CRD_CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";

fn has_finalizer(object: &Value, finalizer: &str) -> bool {
    list(object, "/metadata/finalizers")
        .iter()
        .any(|own| own == finalizer)
}

fn without_finalizer(object: &Value, finalizer: &str) -> Value {
    let mut object = object.clone();
    if let Some(list) = object
        .pointer_mut("/metadata/finalizers")
        .and_then(Value::as_array_mut)
    {
        list.retain(|own| own != finalizer);
    }
    object
}

/// What ownership asks of one object; `None`: nothing, its own controller may go on.
pub(crate) fn step(view: &View, key: &Key, object: &Arc<Value>, now: &str) -> Option<Outcome> {
    let owners = list(object, "/metadata/ownerReferences");
    let orphaned = !owners.is_empty()
        && owners
            .iter()
            .all(|owner| view.by_uid(text(owner, "/uid")).is_none());
    if orphaned && !is_dying(object) {
        return Some(Outcome::write(Write::delete(key, object)));
    }
    if !is_dying(object) {
        return None;
    }
    if has_finalizer(object, ORPHAN) {
        return Some(orphan(view, key, object));
    }
    if has_finalizer(object, FOREGROUND) {
        return Some(foreground(view, key, object));
    }
    match key.0.1.as_str() {
        "namespaces" => Some(end_namespace(view, key, object, now)),
        plural if (key.0.0.as_str(), plural) == crds::CRDS => {
            Some(end_definition(view, key, object))
        }
        _ => None,
    }
}

fn orphan(view: &View, key: &Key, object: &Arc<Value>) -> Outcome {
    let own = uid(object);
    let mut writes: Vec<Write> = view
        .dependents(own)
        .map(|(key, dependent)| {
            let mut freed = (**dependent).clone();
            let left: Vec<Value> = list(dependent, "/metadata/ownerReferences")
                .iter()
                .filter(|owner| text(owner, "/uid") != own)
                .cloned()
                .collect();
            if let Some(metadata) = freed.get_mut("metadata").and_then(Value::as_object_mut) {
                if left.is_empty() {
                    metadata.remove("ownerReferences");
                } else {
                    metadata.insert("ownerReferences".to_owned(), left.into());
                }
            }
            Write::update(key, freed)
        })
        .collect();
    writes.push(Write::update(key, without_finalizer(object, ORPHAN)));
    Outcome::writes(writes)
}

fn foreground(view: &View, key: &Key, object: &Arc<Value>) -> Outcome {
    let mut writes = Vec::new();
    let mut blocked = false;
    for (key, dependent) in view.dependents(uid(object)) {
        let blocks = list(dependent, "/metadata/ownerReferences")
            .iter()
            .any(|owner| {
                text(owner, "/uid") == uid(object)
                    && owner.get("blockOwnerDeletion").and_then(Value::as_bool) == Some(true)
            });
        blocked |= blocks;
        if !is_dying(dependent) {
            writes.push(Write::Delete {
                key: key.clone(),
                object: Arc::clone(dependent),
                foreground: true,
                now: false,
            });
        }
    }
    if !blocked {
        writes.push(Write::update(key, without_finalizer(object, FOREGROUND)));
    }
    Outcome::writes(writes)
}

fn end_namespace(view: &View, key: &Key, namespace: &Arc<Value>, now: &str) -> Outcome {
    let mut left = 0;
    let mut writes = Vec::new();
    for (key, object) in view.inside(name(namespace)) {
        left += 1;
        if !is_dying(object) {
            writes.push(Write::delete(key, object));
        }
    }
    let mut object = (**namespace).clone();
    if left == 0 {
        object["spec"]["finalizers"] = json!([]);
        return Outcome::write(Write::update(key, object));
    }
    let waiting = writes.is_empty();
    let reason = if waiting {
        "SomeFinalizersRemain"
    } else {
        "ContentRemoved"
    };
    object["status"] = json!({
        "phase": "Terminating",
        "conditions": [next_condition(namespace, "NamespaceFinalizersRemaining", waiting, reason,
            if waiting { "Some content in the namespace has finalizers or is still ending" } else { "" }, now)],
    });
    if object != **namespace {
        writes.push(Write::update(key, object));
    }
    Outcome::writes(writes)
}

fn end_definition(view: &View, key: &Key, definition: &Arc<Value>) -> Outcome {
    let instances = resource(
        text(definition, "/spec/group"),
        text(definition, "/spec/names/plural"),
    );
    let mut left = false;
    let mut writes = Vec::new();
    for (key, object) in view.all(&instances) {
        left = true;
        if !is_dying(object) {
            writes.push(Write::delete(key, object));
        }
    }
    if !left && has_finalizer(definition, CRD_CLEANUP) {
        writes.push(Write::update(
            key,
            without_finalizer(definition, CRD_CLEANUP),
        ));
    }
    Outcome::writes(writes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(view: &mut View, plural: &str, name: &str, metadata: Value) -> (Key, Arc<Value>) {
        let mut object = json!({"metadata": {"name": name, "namespace": "n", "uid": name}});
        for (key, value) in metadata.as_object().unwrap() {
            object["metadata"][key] = value.clone();
        }
        let resource = resource("", plural);
        let object = Arc::new(object);
        view.put(&resource, Arc::clone(&object));
        (super::super::object::key(&resource, &object), object)
    }

    fn owner(uid: &str) -> Value {
        json!({"ownerReferences": [{"uid": uid, "blockOwnerDeletion": true}]})
    }

    #[test]
    fn an_object_without_its_owners_goes() {
        let mut view = View::default();
        let (key, object) = put(&mut view, "pods", "p", owner("gone"));
        let outcome = step(&view, &key, &object, "t").unwrap();
        assert!(matches!(outcome.writes[..], [Write::Delete { .. }]));
        put(&mut view, "configmaps", "gone", json!({}));
        assert!(step(&view, &key, &object, "t").is_none());
    }

    #[test]
    fn foreground_waits_for_dependents_that_block() {
        let mut view = View::default();
        let dying = json!({"deletionTimestamp": "t", "finalizers": [FOREGROUND]});
        let (owner_key, owner_object) = put(&mut view, "configmaps", "o", dying);
        let (pod, object) = put(&mut view, "pods", "p", owner("o"));
        let outcome = step(&view, &owner_key, &owner_object, "t").unwrap();
        assert!(matches!(outcome.writes[..], [Write::Delete { .. }]));
        drop(object);
        view.remove(&pod);
        let outcome = step(&view, &owner_key, &owner_object, "t").unwrap();
        let [Write::Update { object, .. }] = &outcome.writes[..] else {
            panic!("{outcome:?}")
        };
        assert_eq!(object["metadata"]["finalizers"], json!([]));
    }

    #[test]
    fn orphan_lets_dependents_live() {
        let mut view = View::default();
        let dying = json!({"deletionTimestamp": "t", "finalizers": [ORPHAN]});
        let (key, object) = put(&mut view, "configmaps", "o", dying);
        put(&mut view, "pods", "p", owner("o"));
        let outcome = step(&view, &key, &object, "t").unwrap();
        let [
            Write::Update { object: pod, .. },
            Write::Update { object: owner, .. },
        ] = &outcome.writes[..]
        else {
            panic!("{outcome:?}")
        };
        assert!(pod["metadata"].get("ownerReferences").is_none());
        assert_eq!(owner["metadata"]["finalizers"], json!([]));
    }

    #[test]
    fn a_namespace_ends_when_it_is_empty() {
        let mut view = View::default();
        let object = Arc::new(
            json!({"metadata": {"name": "n", "uid": "n", "deletionTimestamp": "t"},
            "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}),
        );
        let namespaces = resource("", "namespaces");
        view.put(&namespaces, Arc::clone(&object));
        let key = super::super::object::key(&namespaces, &object);
        let (pod, _) = put(&mut view, "pods", "p", json!({}));
        let outcome = step(&view, &key, &object, "t").unwrap();
        assert!(matches!(
            outcome.writes[..],
            [Write::Delete { .. }, Write::Update { .. }]
        ));
        view.remove(&pod);
        let outcome = step(&view, &key, &object, "t").unwrap();
        let [Write::Update { object, .. }] = &outcome.writes[..] else {
            panic!("{outcome:?}")
        };
        assert_eq!(object["spec"]["finalizers"], json!([]));
    }
}
