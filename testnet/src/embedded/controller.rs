//! The edge of the simulation: follows the store's events, asks [`simulate::step`] about every
//! object that may be concerned, and makes the changes. At rest it waits, without a timer.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use jiff::Timestamp;
use krake_kube_api::store::{Read, revision_of};
use krake_kube_api::{Event, EventKind, Kind, MemoryStore, Registry, Store};
use serde_json::Value;
use tracing::debug;

use super::admission;
use super::crds;
use super::object::{Key, Resource, is_dying, key, list, namespace, resource, text, uid};
use super::simulate::pods::Kubelets;
use super::simulate::{Clock, Write, step};
use super::view::View;

/// Events read at once.
const EVENTS_AT_ONCE: usize = 512;
/// Steps before requests get their turn.
const STEPS_AT_ONCE: usize = 32;

pub(crate) struct Controller {
    store: Arc<MemoryStore>,
    registry: Arc<Registry>,
    view: View,
    kubelets: Kubelets,
    position: u64,
    due: BTreeSet<Key>,
    wakes: BTreeMap<Key, Timestamp>,
}

/// A kind as far as the store needs one.
fn bare(resource: &Resource) -> Kind {
    Kind {
        group: resource.0.clone(),
        version: String::new(),
        kind: String::new(),
        plural: resource.1.clone(),
        singular: String::new(),
        short_names: Vec::new(),
        categories: Vec::new(),
        namespaced: true,
        status: true,
        read_only: false,
        schema: None,
        columns: Vec::new(),
    }
}

impl Controller {
    pub(crate) fn new(store: Arc<MemoryStore>, registry: Arc<Registry>) -> Self {
        let mut controller = Self {
            store,
            registry,
            view: View::default(),
            kubelets: Kubelets::default(),
            position: 0,
            due: BTreeSet::new(),
            wakes: BTreeMap::new(),
        };
        controller.read_all();
        controller
    }

    /// Starts from all objects, as at the start or when events were missed.
    fn read_all(&mut self) {
        self.position = self.store.log().end();
        self.view = View::default();
        for (resource, object) in self.store.all() {
            self.due.insert(key(&resource, &object));
            self.serve(&resource, &object, false);
            self.view.put(&resource, object);
        }
    }

    /// Definitions change which kinds are served.
    fn serve(&self, resource: &Resource, object: &Value, gone: bool) {
        if (resource.0.as_str(), resource.1.as_str()) != crds::CRDS {
            return;
        }
        let (group, plural) = (
            text(object, "/spec/group"),
            text(object, "/spec/names/plural"),
        );
        self.registry.remove(group, plural);
        if !gone {
            for kind in crds::kinds(object) {
                self.registry.insert(kind);
            }
        }
    }

    /// Takes in what happened.
    fn follow(&mut self) {
        loop {
            match self.store.log().read(self.position, EVENTS_AT_ONCE) {
                Read::Gone => {
                    debug!("events were missed; everything is looked at again");
                    self.read_all();
                    return;
                }
                Read::Events(events, next) => {
                    self.position = next;
                    if events.is_empty() {
                        return;
                    }
                    for event in events {
                        self.take(event);
                    }
                }
            }
        }
    }

    fn take(&mut self, event: Event) {
        let Event {
            kind,
            resource,
            object,
            previous,
            ..
        } = event;
        let object = object.value();
        let gone = kind == EventKind::Deleted;
        let key = key(&resource, object);
        self.serve(&resource, object, gone);
        if gone {
            self.view.remove(&key);
            self.kubelets.forget(uid(object));
            self.wakes.remove(&key);
        } else {
            self.view.put(&resource, Arc::clone(object));
            self.due.insert(key);
        }
        self.concern(&resource, object, gone);
        if let Some(previous) = previous {
            self.concern_owners(previous.value());
        }
    }

    fn concern_owners(&mut self, object: &Value) {
        for owner in list(object, "/metadata/ownerReferences") {
            if let Some(key) = self.view.key_of(text(owner, "/uid")) {
                self.due.insert(key.clone());
            }
        }
    }

    /// Whom a change of this object concerns.
    fn concern(&mut self, changed: &Resource, object: &Value, gone: bool) {
        self.concern_owners(object);
        if gone || is_dying(object) {
            let dependents = self.view.dependents(uid(object));
            let dependents: Vec<Key> = dependents.map(|(key, _)| key.clone()).collect();
            self.due.extend(dependents);
            let namespace = (
                resource("", "namespaces"),
                String::new(),
                namespace(object).to_owned(),
            );
            let definition = (
                resource(crds::CRDS.0, crds::CRDS.1),
                String::new(),
                format!("{}.{}", changed.1, changed.0),
            );
            for key in [namespace, definition] {
                if self.view.get(&key).is_some_and(|object| is_dying(object)) {
                    self.due.insert(key);
                }
            }
        }
        match (changed.0.as_str(), changed.1.as_str()) {
            ("", "pods") => {
                self.due.extend(self.view.services_of(object));
                if gone || super::simulate::pods::is_finished(object) {
                    self.due.extend(self.view.unscheduled());
                }
            }
            ("", "nodes") => {
                self.due.extend(self.view.unscheduled());
                let sets = resource("apps", "daemonsets");
                let sets: Vec<Key> = self.view.all(&sets).map(|(key, _)| key.clone()).collect();
                self.due.extend(sets);
            }
            _ => {}
        }
    }

    /// Until the store is dropped.
    pub(crate) async fn run(mut self) {
        let mut newest = self.store.log().newest();
        let mut steps = 0;
        loop {
            newest.mark_unchanged();
            self.follow();
            self.wake(Timestamp::now());
            if let Some(key) = self.due.pop_first() {
                self.one(&key).await;
                steps += 1;
                if steps % STEPS_AT_ONCE == 0 {
                    tokio::task::yield_now().await;
                }
                continue;
            }
            let wait = self.wakes.values().min().map(|wake| {
                let wait = wake.duration_since(Timestamp::now());
                std::time::Duration::try_from(wait).unwrap_or_default()
            });
            match wait {
                None => {
                    if newest.changed().await.is_err() {
                        return;
                    }
                }
                Some(wait) => tokio::select! {
                    changed = newest.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(wait) => {}
                },
            }
        }
    }

    /// Objects whose time has come are due.
    fn wake(&mut self, now: Timestamp) {
        let ready: Vec<Key> = self
            .wakes
            .iter()
            .filter(|(_, wake)| **wake <= now)
            .map(|(key, _)| key.clone())
            .collect();
        for key in ready {
            self.wakes.remove(&key);
            self.due.insert(key);
        }
    }

    async fn one(&mut self, key: &Key) {
        let Some(object) = self.view.get(key).cloned() else {
            return;
        };
        let clock = Clock::at(Timestamp::now());
        let outcome = step(&self.view, &mut self.kubelets, key, &object, &clock);
        match outcome.wake {
            Some(wake) => {
                self.wakes.insert(key.clone(), wake);
            }
            None => {
                self.wakes.remove(key);
            }
        }
        for write in outcome.writes {
            if let Err(error) = self.make(write, &clock).await {
                // Somebody else was faster: the step is taken again on what is there now.
                debug!(?key, %error, "a change of the simulation was refused");
                self.due.insert(key.clone());
                tokio::task::yield_now().await;
                return;
            }
        }
    }

    async fn make(&self, write: Write, clock: &Clock) -> Result<(), krake_kube_api::ApiError> {
        match write {
            Write::Create { resource, object } => {
                let object = admission::complete(object, &clock.text);
                let result = self.store.create(&bare(&resource), object).await;
                match result {
                    // It was made in the step before the newest events were known.
                    Err(error) if error.reason == "AlreadyExists" => Ok(()),
                    other => other.map(|_| ()),
                }
            }
            Write::Update { key, object } => self.update(&key, object).await,
            Write::Delete {
                key,
                object,
                foreground,
                now,
            } => {
                let hold = admission::hold(&key.0, &object, foreground, now);
                let stays = !krake_kube_api::finalizers(&object).is_empty()
                    || !hold.finalizers.is_empty()
                    || hold.grace_seconds > 0;
                if stays {
                    let marked = krake_kube_api::marked(&object, &hold, clock.now);
                    if marked == *object {
                        return Ok(());
                    }
                    return self.update(&key, marked).await;
                }
                self.remove(&key, revision_of(&object)).await
            }
        }
    }

    async fn remove(&self, key: &Key, revision: u64) -> Result<(), krake_kube_api::ApiError> {
        let namespace = Some(key.1.as_str());
        self.store
            .remove(&bare(&key.0), namespace, &key.2, revision)
            .await
    }

    async fn update(&self, key: &Key, mut object: Value) -> Result<(), krake_kube_api::ApiError> {
        let revision = revision_of(&object);
        let grace = object.pointer("/metadata/deletionGracePeriodSeconds");
        let over = grace.and_then(Value::as_u64).unwrap_or(0) == 0;
        if is_dying(&object) && over && krake_kube_api::finalizers(&object).is_empty() {
            return self.remove(key, revision).await;
        }
        let old = self.view.get(key);
        if old.is_some_and(|old| old.get("spec") != object.get("spec")) && key.0.1 != "pods" {
            let generation = object
                .pointer("/metadata/generation")
                .and_then(Value::as_i64);
            object["metadata"]["generation"] = (generation.unwrap_or(0) + 1).into();
        }
        self.store.update(&bare(&key.0), object, revision).await?;
        Ok(())
    }
}
