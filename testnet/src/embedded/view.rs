//! What the simulation sees: all objects, with the indexes its steps need.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use krake_model::Resources;
use serde_json::Value;

use super::object::{Key, Resource, is_dying, key, label, list, namespace, resource, text, uid};
use super::simulate::pods;

/// All objects.
#[derive(Debug, Default)]
pub(crate) struct View {
    objects: BTreeMap<Key, Arc<Value>>,
    by_uid: BTreeMap<String, Key>,
    /// Objects by the UID of each of their owners.
    dependents: BTreeMap<String, BTreeSet<Key>>,
    /// What the pods of each node request.
    used: BTreeMap<String, Resources>,
    /// Objects of each namespace.
    inside: BTreeMap<String, BTreeSet<Key>>,
}

impl View {
    /// Notes an object as it is now.
    pub(crate) fn put(&mut self, resource: &Resource, object: Arc<Value>) {
        let key = key(resource, &object);
        self.remove(&key);
        self.by_uid.insert(uid(&object).to_owned(), key.clone());
        for owner in list(&object, "/metadata/ownerReferences") {
            self.dependents
                .entry(text(owner, "/uid").to_owned())
                .or_default()
                .insert(key.clone());
        }
        if !key.1.is_empty() {
            self.inside
                .entry(key.1.clone())
                .or_default()
                .insert(key.clone());
        }
        if let Some((node, requests)) = pods::occupied(&key, &object) {
            let used = self.used.entry(node.to_owned()).or_insert(Resources::ZERO);
            *used = used.saturating_add(&requests);
        }
        self.objects.insert(key, object);
    }

    /// Notes that an object is gone.
    pub(crate) fn remove(&mut self, key: &Key) {
        let Some(object) = self.objects.remove(key) else {
            return;
        };
        self.by_uid.remove(uid(&object));
        for owner in list(&object, "/metadata/ownerReferences") {
            let owner = text(owner, "/uid");
            if let Some(keys) = self.dependents.get_mut(owner) {
                keys.remove(key);
                if keys.is_empty() {
                    self.dependents.remove(owner);
                }
            }
        }
        if let Some(keys) = self.inside.get_mut(&key.1) {
            keys.remove(key);
            if keys.is_empty() {
                self.inside.remove(&key.1);
            }
        }
        if let Some((node, requests)) = pods::occupied(key, &object)
            && let Some(used) = self.used.get_mut(node)
        {
            *used = used.saturating_sub(&requests);
        }
    }

    pub(crate) fn get(&self, key: &Key) -> Option<&Arc<Value>> {
        self.objects.get(key)
    }

    pub(crate) fn by_uid(&self, uid: &str) -> Option<&Arc<Value>> {
        self.objects.get(self.by_uid.get(uid)?)
    }

    /// Where the object with this UID is.
    pub(crate) fn key_of(&self, uid: &str) -> Option<&Key> {
        self.by_uid.get(uid)
    }

    /// Objects that name `uid` as an owner.
    pub(crate) fn dependents<'a>(
        &'a self,
        uid: &str,
    ) -> impl Iterator<Item = (&'a Key, &'a Arc<Value>)> + use<'a> {
        self.dependents
            .get(uid)
            .into_iter()
            .flatten()
            .filter_map(|key| Some((key, self.objects.get(key)?)))
    }

    /// Objects of a resource that `owner` controls.
    pub(crate) fn controlled(&self, owner: &Value, plural: &str) -> Vec<&Arc<Value>> {
        let owner = uid(owner);
        self.dependents(owner)
            .filter(|(key, object)| {
                key.0.1 == plural && super::object::controller(object) == Some(owner)
            })
            .map(|(_, object)| object)
            .collect()
    }

    /// All objects in a namespace.
    pub(crate) fn inside<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = (&'a Key, &'a Arc<Value>)> + use<'a> {
        self.inside
            .get(namespace)
            .into_iter()
            .flatten()
            .filter_map(|key| Some((key, self.objects.get(key)?)))
    }

    /// All objects of a resource.
    pub(crate) fn all<'a>(
        &'a self,
        resource: &Resource,
    ) -> impl Iterator<Item = (&'a Key, &'a Arc<Value>)> + use<'a> {
        let from = (resource.clone(), String::new(), String::new());
        let resource = resource.clone();
        self.objects
            .range(from..)
            .take_while(move |(key, _)| key.0 == resource)
    }

    #[cfg(test)]
    pub(crate) fn keys(&self) -> impl Iterator<Item = &Key> {
        self.objects.keys()
    }

    /// What the pods of a node request.
    pub(crate) fn used(&self, node: &str) -> Resources {
        self.used.get(node).copied().unwrap_or(Resources::ZERO)
    }

    /// Whether new objects may come into a namespace.
    pub(crate) fn is_open(&self, name: &str) -> bool {
        let key = (resource("", "namespaces"), String::new(), name.to_owned());
        self.get(&key).is_some_and(|namespace| !is_dying(namespace))
    }

    /// Pods without a node.
    pub(crate) fn unscheduled(&self) -> Vec<Key> {
        self.all(&resource("", "pods"))
            .filter(|(_, pod)| text(pod, "/spec/nodeName").is_empty())
            .map(|(key, _)| key.clone())
            .collect()
    }

    /// Services that select a pod.
    pub(crate) fn services_of(&self, pod: &Value) -> Vec<Key> {
        let is_selected = |service: &Value| {
            let selector = service.pointer("/spec/selector").and_then(Value::as_object);
            selector.is_some_and(|selector| {
                !selector.is_empty()
                    && selector
                        .iter()
                        .all(|(key, value)| label(pod, key) == value.as_str())
            })
        };
        self.inside(namespace(pod))
            .filter(|(key, service)| key.0.1 == "services" && is_selected(service))
            .map(|(key, _)| key.clone())
            .collect()
    }
}
