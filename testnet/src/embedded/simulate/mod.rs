//! What controllers, scheduler and kubelets would do: one pure step for each object.
//!
//! [`step`] gets all objects, one of them, and the time, and says what to write and when to look
//! again; [`super::controller`] does it. Nothing is asked twice: a step that finds its object as it
//! should be writes nothing.

pub(crate) mod deployments;
pub(crate) mod jobs;
pub(crate) mod network;
pub(crate) mod nodes;
pub(crate) mod pods;
pub(crate) mod sets;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::crds;
use super::garbage;
use super::object::{Key, Resource, is_dying};
use super::view::View;

/// A change to make.
#[derive(Debug, Clone)]
pub(crate) enum Write {
    /// A new object; its UID and, with `generateName`, its name are made at the edge.
    Create { resource: Resource, object: Value },
    /// Replaces the object of which this is a later version.
    Update { key: Key, object: Value },
    /// Deletes, as a client would: finalizers and grace hold it.
    Delete {
        key: Key,
        object: Arc<Value>,
        /// Its dependents go first.
        foreground: bool,
        /// Its grace is over.
        now: bool,
    },
}

impl Write {
    pub(crate) fn update(key: &Key, object: Value) -> Self {
        Self::Update {
            key: key.clone(),
            object,
        }
    }

    pub(crate) fn delete(key: &Key, object: &Arc<Value>) -> Self {
        Self::Delete {
            key: key.clone(),
            object: Arc::clone(object),
            foreground: false,
            now: false,
        }
    }
}

/// What a step decided.
#[derive(Debug, Clone, Default)]
pub(crate) struct Outcome {
    pub(crate) writes: Vec<Write>,
    /// When to look at the object again if nothing happens.
    pub(crate) wake: Option<Timestamp>,
}

impl Outcome {
    pub(crate) fn write(write: Write) -> Self {
        Self::writes(vec![write])
    }

    pub(crate) fn writes(writes: Vec<Write>) -> Self {
        Self { writes, wake: None }
    }

    pub(crate) fn wake_at(&mut self, at: Timestamp) {
        self.wake = Some(self.wake.map_or(at, |wake| wake.min(at)));
    }
}

/// The time of a step.
#[derive(Debug, Clone)]
pub(crate) struct Clock {
    pub(crate) now: Timestamp,
    /// In whole seconds, as objects carry it.
    pub(crate) text: String,
}

impl Clock {
    pub(crate) fn at(now: Timestamp) -> Self {
        Self {
            now,
            text: krake_kube_api::table::whole_seconds(now),
        }
    }

    pub(crate) fn after(&self, time: Timestamp, wait: Duration) -> Timestamp {
        let wait = jiff::SignedDuration::try_from(wait).unwrap_or(jiff::SignedDuration::MAX);
        time.saturating_add(wait).unwrap_or(Timestamp::MAX)
    }
}

/// One step for one object.
pub(crate) fn step(
    view: &View,
    kubelets: &mut pods::Kubelets,
    key: &Key,
    object: &Arc<Value>,
    clock: &Clock,
) -> Outcome {
    if let Some(outcome) = garbage::step(view, key, object, &clock.text) {
        return outcome;
    }
    let dying = is_dying(object);
    match (key.0.0.as_str(), key.0.1.as_str()) {
        ("", "pods") => pods::step(view, kubelets, key, object, clock),
        _ if dying => Outcome::default(),
        ("apps", "deployments") => deployments::step(view, key, object, clock),
        ("apps", "replicasets") => sets::replica_set(view, key, object, clock),
        ("apps", "statefulsets") => sets::stateful_set(view, key, object),
        ("apps", "daemonsets") => sets::daemon_set(view, key, object),
        ("batch", "jobs") => jobs::step(view, key, object, clock),
        ("", "services") => network::endpoints(view, object),
        ("", "persistentvolumeclaims") => bind(key, object),
        crds::CRDS => match crds::established(object, &clock.text) {
            Some(status) => with_status(key, object, status),
            None => Outcome::default(),
        },
        _ => Outcome::default(),
    }
}

/// Writes a status if it is another one.
pub(crate) fn with_status(key: &Key, object: &Value, status: Value) -> Outcome {
    if object.get("status") == Some(&status) {
        return Outcome::default();
    }
    let mut object = object.clone();
    object["status"] = status;
    Outcome::write(Write::update(key, object))
}

/// A claim has its volume at once.
fn bind(key: &Key, claim: &Value) -> Outcome {
    if claim.pointer("/status/phase").and_then(Value::as_str) == Some("Bound") {
        return Outcome::default();
    }
    let mut object = claim.clone();
    object["spec"]["volumeName"] = format!("pvc-{}", super::object::uid(claim)).into();
    object["status"] = json!({
        "phase": "Bound",
        "accessModes": claim.pointer("/spec/accessModes").cloned().unwrap_or_else(|| json!([])),
        "capacity": claim.pointer("/spec/resources/requests").cloned().unwrap_or_else(|| json!({})),
    });
    Outcome::write(Write::update(key, object))
}

/// A pod from a template.
pub(crate) fn pod_of(owner: &Value, template: &Value, labels: &[(&str, &str)]) -> Value {
    let mut metadata = json!({
        "namespace": super::object::namespace(owner),
        "ownerReferences": super::object::owned_by(owner),
    });
    for field in ["labels", "annotations", "finalizers"] {
        if let Some(value) = template.pointer(&format!("/metadata/{field}")) {
            metadata[field] = value.clone();
        }
    }
    for (key, value) in labels {
        metadata["labels"][*key] = (*value).into();
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": template.get("spec").cloned().unwrap_or_else(|| json!({})),
        "status": {"phase": "Pending"},
    })
}

#[cfg(test)]
pub(crate) mod tests {
    //! A cluster in which nothing happens but steps: writes are made at once, time stands still
    //! until nothing is left to do, and jumps to the next wake then.

    use std::collections::BTreeMap;

    use super::super::object::{key, name, namespace, resource};
    use super::*;

    pub(crate) struct World {
        pub(crate) view: View,
        pub(crate) kubelets: pods::Kubelets,
        pub(crate) now: Timestamp,
        counter: u64,
    }

    impl World {
        pub(crate) fn new(cpu: &str, pods: u64) -> Self {
            let mut world = Self {
                view: View::default(),
                kubelets: pods::Kubelets::default(),
                now: Timestamp::from_second(1_000_000).unwrap(),
                counter: 0,
            };
            let namespace = json!({"metadata": {"name": "default"}, "status": {"phase": "Active"}});
            world.create("", "namespaces", namespace);
            for node in nodes::nodes("t", cpu, "64Gi", pods, "t").unwrap() {
                world.create("", "nodes", node);
            }
            world
        }

        pub(crate) fn create(&mut self, group: &str, plural: &str, mut object: Value) -> Key {
            self.counter += 1;
            object["metadata"]["uid"] = format!("uid-{}", self.counter).into();
            if object["metadata"].get("name").is_none() {
                let prefix = object["metadata"]["generateName"].as_str().unwrap();
                object["metadata"]["name"] = format!("{prefix}{}", self.counter).into();
            }
            object["metadata"]["generation"] = 1.into();
            object["metadata"]["creationTimestamp"] = Clock::at(self.now).text.into();
            let resource = resource(group, plural);
            let key = key(&resource, &object);
            self.view.put(&resource, Arc::new(object));
            key
        }

        pub(crate) fn object(&self, key: &Key) -> &Value {
            self.view.get(key).unwrap()
        }

        pub(crate) fn edit(&mut self, key: &Key, edit: impl FnOnce(&mut Value)) {
            let mut object = self.object(key).clone();
            edit(&mut object);
            let generation = object["metadata"]["generation"].as_i64().unwrap();
            object["metadata"]["generation"] = (generation + 1).into();
            self.view.put(&key.0, Arc::new(object));
        }

        pub(crate) fn pods(&self) -> Vec<&Value> {
            let pods = self.view.all(&resource("", "pods"));
            pods.map(|(_, pod)| &**pod).collect()
        }

        pub(crate) fn ready_pods(&self) -> usize {
            let is_ready = |pod: &&Value| super::super::object::is_true(pod, "Ready");
            self.pods().into_iter().filter(is_ready).count()
        }

        fn write(&mut self, write: Write) {
            match write {
                Write::Create { resource, object } => {
                    self.create(&resource.0, &resource.1, object);
                }
                Write::Update { key, object } => self.view.put(&key.0, Arc::new(object)),
                Write::Delete { key, .. } => self.view.remove(&key),
            }
        }

        /// Does all that is to be done at this time; calls `check` after every write.
        fn settle(&mut self, check: &mut dyn FnMut(&Self)) -> BTreeMap<Key, Timestamp> {
            for _ in 0..1000 {
                let mut wakes = BTreeMap::new();
                let mut quiet = true;
                let keys: Vec<Key> = self.view.keys().cloned().collect();
                for key in keys {
                    let Some(object) = self.view.get(&key).cloned() else {
                        continue;
                    };
                    let clock = Clock::at(self.now);
                    let outcome = step(&self.view, &mut self.kubelets, &key, &object, &clock);
                    if let Some(wake) = outcome.wake {
                        wakes.insert(key, wake);
                    }
                    quiet &= outcome.writes.is_empty();
                    for write in outcome.writes {
                        self.write(write);
                        check(self);
                    }
                }
                if quiet {
                    return wakes;
                }
            }
            panic!("the steps never come to rest");
        }

        /// Until nothing more happens, or `limit` has passed.
        pub(crate) fn run(&mut self, limit: Duration, check: &mut dyn FnMut(&Self)) {
            let end = Clock::at(self.now).after(self.now, limit);
            loop {
                let wakes = self.settle(check);
                match wakes.values().min() {
                    Some(wake) if *wake <= end => self.now = (*wake).max(self.now),
                    _ => return,
                }
            }
        }

        pub(crate) fn run_quietly(&mut self) {
            self.run(Duration::from_secs(10), &mut |_| {});
        }
    }

    pub(crate) fn template(app: &str, annotations: Value, cpu: &str) -> Value {
        json!({"metadata": {"labels": {"app": app}, "annotations": annotations},
            "spec": {"containers": [{"name": "main", "image": "x:1", "resources": {"requests": {"cpu": cpu}}}]}})
    }

    pub(crate) fn workload(kind: &str, replicas: i64, template: &Value) -> Value {
        json!({"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": "web", "namespace": "default"},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "template": template}})
    }

    #[test]
    fn a_claim_is_bound() {
        let mut world = World::new("4", 10);
        let claim = json!({"metadata": {"name": "c", "namespace": "default"}, "spec": {"accessModes": ["ReadWriteOnce"]}});
        let key = world.create("", "persistentvolumeclaims", claim);
        world.run_quietly();
        assert_eq!(world.object(&key)["status"]["phase"], "Bound");
        assert_eq!(
            (namespace(world.object(&key)), name(world.object(&key))),
            ("default", "c")
        );
    }
}
