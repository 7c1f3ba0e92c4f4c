//! Capacity from nodes and pods: what the scheduler would count. Both are watched, so that asking
//! often costs the cluster nothing, however many pods it has.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{Node, Pod};
use krake_driver::{BackendError, Code};
use krake_model::Resources;
use krake_model::resources::{parse_quantity, parse_quantity_millis};
use kube::api::{Api, DynamicObject};
use kube::core::ApiResource;
use kube::runtime::watcher::{self, Event};
use serde_json::Value;
use tokio::sync::watch;
use tracing::debug;

use crate::cluster::{CALL_TIME, WATCH_PAUSE, WATCH_PAUSE_MAX, WATCH_SECONDS};

/// What nodes offer or what pods take, by namespace and name.
#[derive(Debug, Default)]
struct Part {
    counted: BTreeMap<String, Resources>,
    /// Read so far by a list that is under way.
    listed: BTreeMap<String, Resources>,
    synced: bool,
}

impl Part {
    fn take(&mut self, event: Event<DynamicObject>, weigh: fn(&Value) -> Option<Resources>) {
        let key = |object: &DynamicObject| {
            let text = |text: &Option<String>| text.clone().unwrap_or_default();
            let metadata = &object.metadata;
            format!("{}/{}", text(&metadata.namespace), text(&metadata.name))
        };
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(object) => {
                if let Some(resources) = weigh(&object.data) {
                    self.listed.insert(key(&object), resources);
                }
            }
            Event::InitDone => {
                self.counted = std::mem::take(&mut self.listed);
                self.synced = true;
            }
            Event::Apply(object) => {
                match weigh(&object.data) {
                    Some(resources) => self.counted.insert(key(&object), resources),
                    None => self.counted.remove(&key(&object)),
                };
            }
            Event::Delete(object) => {
                self.counted.remove(&key(&object));
            }
        }
    }

    fn sum(&self) -> Resources {
        let all = self.counted.values();
        all.fold(Resources::ZERO, |sum, one| sum.saturating_add(one))
    }
}

#[derive(Debug, Default)]
struct State {
    nodes: Part,
    pods: Part,
    failure: Option<String>,
}

impl State {
    const fn synced(&self) -> bool {
        self.nodes.synced && self.pods.synced
    }
}

/// The capacity of a cluster, kept up to date by watches that end when it is dropped.
#[derive(Debug)]
pub(crate) struct Capacity {
    state: watch::Sender<State>,
}

impl Capacity {
    /// Starts to watch.
    pub(crate) fn follow(client: &kube::Client) -> Arc<Self> {
        let capacity = Arc::new(Self {
            state: watch::channel(State::default()).0,
        });
        let nodes = ApiResource::erase::<Node>(&());
        let pods = ApiResource::erase::<Pod>(&());
        tokio::spawn(follow(
            Api::all_with(client.clone(), &nodes),
            Arc::downgrade(&capacity),
            |state| &mut state.nodes,
            offered,
        ));
        tokio::spawn(follow(
            Api::all_with(client.clone(), &pods),
            Arc::downgrade(&capacity),
            |state| &mut state.pods,
            taken,
        ));
        capacity
    }

    /// What all nodes that take pods have, and what of it pods do not request.
    ///
    /// # Errors
    /// When nodes and pods have not been read within [`CALL_TIME`], with the reason if there is
    /// one.
    pub(crate) async fn read(&self) -> Result<(Resources, Resources), BackendError> {
        let mut state = self.state.subscribe();
        let synced = tokio::time::timeout(CALL_TIME, state.wait_for(State::synced)).await;
        let Ok(Ok(state)) = synced else {
            let failure = self.state.borrow().failure.clone();
            let failure = failure.unwrap_or_else(|| "they were not read in time".to_owned());
            let message = format!("reading the nodes and pods: {failure}");
            return Err(BackendError::new(Code::Unreachable, message));
        };
        let total = state.nodes.sum();
        Ok((total, total.saturating_sub(&state.pods.sum())))
    }
}

async fn follow(
    api: Api<DynamicObject>,
    capacity: Weak<Capacity>,
    part: fn(&mut State) -> &mut Part,
    weigh: fn(&Value) -> Option<Resources>,
) {
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let mut events = watcher::watcher(api, config).boxed();
    let mut pause = WATCH_PAUSE;
    loop {
        let event = events.try_next().await;
        let Some(capacity) = capacity.upgrade() else {
            return;
        };
        match event {
            Ok(Some(event)) => {
                pause = WATCH_PAUSE;
                capacity
                    .state
                    .send_modify(|state| part(state).take(event, weigh));
            }
            Ok(None) => return,
            Err(error) => {
                debug!(%error, "a watch for capacity broke and starts anew");
                capacity
                    .state
                    .send_modify(|state| state.failure = Some(error.to_string()));
                drop(capacity);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(WATCH_PAUSE_MAX);
            }
        }
    }
}

fn quantity(value: Option<&Value>, parse: fn(&str) -> Option<u64>) -> u64 {
    match value {
        Some(Value::String(text)) => parse(text).unwrap_or(0),
        Some(Value::Number(number)) => parse(&number.to_string()).unwrap_or(0),
        _ => 0,
    }
}

fn cpu(text: &str) -> Option<u64> {
    parse_quantity_millis(text).ok()
}

fn bytes(text: &str) -> Option<u64> {
    parse_quantity(text).ok()
}

/// What a node has for pods; `None`: it takes none.
fn offered(node: &Value) -> Option<Resources> {
    let allocatable = node.pointer("/status/allocatable");
    let field = |name: &str| allocatable.and_then(|a| a.get(name));
    takes_pods(node).then(|| Resources {
        cpu_millis: quantity(field("cpu"), cpu),
        memory_bytes: quantity(field("memory"), bytes),
        pods: quantity(field("pods"), bytes),
    })
}

/// What a pod takes; `None`: nothing, it has ended or fits nowhere.
fn taken(pod: &Value) -> Option<Resources> {
    let phase = pod.pointer("/status/phase").and_then(Value::as_str);
    let counts = !matches!(phase, Some("Succeeded" | "Failed")) && !is_unplaceable(pod);
    counts.then(|| requests(pod))
}

/// A pod that fits nowhere takes no room from others.
fn is_unplaceable(pod: &Value) -> bool {
    let text = |value: &Value, field: &str| {
        value
            .get(field)
            .and_then(Value::as_str)
            .map(ToOwned::to_owned)
    };
    pod.pointer("/status/conditions")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .any(|condition| {
            text(condition, "type").as_deref() == Some("PodScheduled")
                && text(condition, "reason").as_deref() == Some("Unschedulable")
        })
}

fn takes_pods(node: &Value) -> bool {
    let cordoned = node.pointer("/spec/unschedulable").and_then(Value::as_bool) == Some(true);
    let ready = node
        .pointer("/status/conditions")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .any(|c| {
            c.get("type").and_then(Value::as_str) == Some("Ready")
                && c.get("status").and_then(Value::as_str) == Some("True")
        });
    ready && !cordoned
}

fn requests(pod: &Value) -> Resources {
    let containers = pod.pointer("/spec/containers").and_then(Value::as_array);
    let mut sum = Resources {
        pods: 1,
        ..Resources::ZERO
    };
    for container in containers.into_iter().flatten() {
        let request = |name: &str| container.pointer(&format!("/resources/requests/{name}"));
        sum = sum.saturating_add(&Resources {
            cpu_millis: quantity(request("cpu"), cpu),
            memory_bytes: quantity(request("memory"), bytes),
            pods: 0,
        });
    }
    sum
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn free_is_what_ready_nodes_have_and_live_pods_do_not_request() {
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let allocatable = json!({"cpu": "4", "memory": "8Gi", "pods": "110"});
        let nodes = [
            json!({"status": {"conditions": ready, "allocatable": allocatable}}),
            json!({"spec": {"unschedulable": true}, "status": {"conditions": ready, "allocatable": allocatable}}),
            json!({"status": {"conditions": [], "allocatable": allocatable}}),
        ];
        let pods = [
            json!({"spec": {"containers": [{"resources": {"requests": {"cpu": "500m", "memory": "1Gi"}}}]}}),
            json!({"spec": {"containers": [{"resources": {"requests": {"cpu": "100"}}}]},
                "status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}}),
            json!({"status": {"phase": "Succeeded"}, "spec": {"containers": [{"resources": {"requests": {"cpu": "3"}}}]}}),
        ];
        let sum = |objects: &[Value], weigh: fn(&Value) -> Option<Resources>| {
            let mut part = Part::default();
            part.take(Event::Init, weigh);
            for (number, object) in objects.iter().enumerate() {
                let mut object: DynamicObject = serde_json::from_value(object.clone()).unwrap();
                object.metadata.name = Some(number.to_string());
                part.take(Event::InitApply(object), weigh);
            }
            assert!(!part.synced);
            part.take(Event::InitDone, weigh);
            assert!(part.synced);
            part
        };
        let total = sum(&nodes, offered).sum();
        let free = total.saturating_sub(&sum(&pods, taken).sum());
        assert_eq!(total.cpu_millis, 4000);
        assert_eq!(free.cpu_millis, 3500);
        assert_eq!(free.memory_bytes, 7 << 30);
        assert_eq!(free.pods, 109);
    }
}
