//! Scheduler and kubelets: a pod gets a node with room, starts, is ready a little later, and ends.
//!
//! Annotations of a pod (of its template) let it fail or take long:
//! `testnet.krake.dev/ready-after: 5s` and `testnet.krake.dev/fail: CrashLoopBackOff`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use krake_model::Resources;
use krake_model::resources::{parse_quantity, parse_quantity_millis};
use serde_json::{Value, json};

use super::super::object::{
    Key, annotation, is_dying, is_true, label, list, next_condition, number, resource, text, uid,
};
use super::super::view::View;
use super::{Clock, Outcome, Write};

/// How long containers take to be ready after they were started.
const READY_AFTER: Duration = Duration::from_millis(30);
/// How long a job's pod runs.
const RUN_TIME: Duration = Duration::from_millis(50);
/// How long containers take to end.
const END_TIME: Duration = Duration::from_millis(20);
/// Annotation: how long until ready, such as `5s`.
pub(crate) const READY_AFTER_ANNOTATION: &str = "testnet.krake.dev/ready-after";
/// Annotation: the reason for which its containers wait for ever.
pub(crate) const FAIL_ANNOTATION: &str = "testnet.krake.dev/fail";

/// What kubelets know beside the objects: since when pods run, in this process. After a power cut
/// they know nothing, and start everything anew.
#[derive(Debug, Default)]
pub(crate) struct Kubelets {
    started: BTreeMap<String, Timestamp>,
    ending: BTreeMap<String, Timestamp>,
}

impl Kubelets {
    /// A pod is gone.
    pub(crate) fn forget(&mut self, uid: &str) {
        self.started.remove(uid);
        self.ending.remove(uid);
    }
}

fn quantity(value: Option<&Value>, parse: impl Fn(&str) -> Option<u64>) -> u64 {
    match value {
        Some(Value::String(text)) => parse(text).unwrap_or(0),
        Some(Value::Number(number)) => parse(&number.to_string()).unwrap_or(0),
        _ => 0,
    }
}

fn resources(of: Option<&Value>) -> Resources {
    let field = |name: &str| of.and_then(|of| of.get(name));
    Resources {
        cpu_millis: quantity(field("cpu"), |text| parse_quantity_millis(text).ok()),
        memory_bytes: quantity(field("memory"), |text| parse_quantity(text).ok()),
        pods: quantity(field("pods"), |text| parse_quantity(text).ok()),
    }
}

/// What a pod requests.
pub(crate) fn requests(pod: &Value) -> Resources {
    let one = Resources {
        pods: 1,
        ..Resources::ZERO
    };
    list(pod, "/spec/containers")
        .iter()
        .fold(one, |sum, container| {
            sum.saturating_add(&resources(container.pointer("/resources/requests")))
        })
}

pub(crate) fn is_finished(pod: &Value) -> bool {
    matches!(text(pod, "/status/phase"), "Succeeded" | "Failed")
}

/// The node on which a pod takes room, and how much.
pub(crate) fn occupied<'a>(key: &Key, object: &'a Value) -> Option<(&'a str, Resources)> {
    if !key.0.0.is_empty() || key.0.1 != "pods" {
        return None;
    }
    let node = text(object, "/spec/nodeName");
    (!node.is_empty() && !is_finished(object)).then(|| (node, requests(object)))
}

/// One step of a pod.
pub(crate) fn step(
    view: &View,
    kubelets: &mut Kubelets,
    key: &Key,
    pod: &Arc<Value>,
    clock: &Clock,
) -> Outcome {
    if is_dying(pod) {
        return end(kubelets, key, pod, clock);
    }
    if is_finished(pod) {
        return Outcome::default();
    }
    if text(pod, "/spec/nodeName").is_empty() {
        return schedule(view, key, pod, clock);
    }
    run(kubelets, key, pod, clock)
}

fn end(kubelets: &mut Kubelets, key: &Key, pod: &Arc<Value>, clock: &Clock) -> Outcome {
    let grace = number(pod, "/metadata/deletionGracePeriodSeconds").unwrap_or(0);
    if grace == 0 {
        // Only finalizers hold it now.
        return Outcome::default();
    }
    let since = *kubelets
        .ending
        .entry(uid(pod).to_owned())
        .or_insert(clock.now);
    let over = clock.after(since, END_TIME);
    let mut outcome = Outcome::default();
    if clock.now < over {
        outcome.wake_at(over);
        return outcome;
    }
    Outcome::write(Write::Delete {
        key: key.clone(),
        object: Arc::clone(pod),
        foreground: false,
        now: true,
    })
}

/// Why a node does not take a pod.
fn refusal(view: &View, node: &Value, pod: &Value, wanted: &Resources) -> Option<&'static str> {
    let is_cordoned = node.pointer("/spec/unschedulable").and_then(Value::as_bool) == Some(true);
    if is_cordoned {
        return Some("node(s) were unschedulable");
    }
    if !is_true(node, "Ready") {
        return Some("node(s) were not ready");
    }
    let selector = pod.pointer("/spec/nodeSelector").and_then(Value::as_object);
    let selected = selector
        .into_iter()
        .flatten()
        .all(|(key, value)| label(node, key) == value.as_str());
    if !selected {
        return Some("node(s) didn't match Pod's node affinity/selector");
    }
    if list(node, "/spec/taints")
        .iter()
        .any(|taint| !tolerates(pod, taint))
    {
        return Some("node(s) had untolerated taint");
    }
    let has = resources(node.pointer("/status/allocatable"));
    let used = view
        .used(text(node, "/metadata/name"))
        .saturating_add(wanted);
    if used.cpu_millis > has.cpu_millis && wanted.cpu_millis > 0 {
        return Some("Insufficient cpu");
    }
    if used.memory_bytes > has.memory_bytes && wanted.memory_bytes > 0 {
        return Some("Insufficient memory");
    }
    (used.pods > has.pods).then_some("Too many pods")
}

fn tolerates(pod: &Value, taint: &Value) -> bool {
    if text(taint, "/effect") == "PreferNoSchedule" {
        return true;
    }
    list(pod, "/spec/tolerations").iter().any(|toleration| {
        let fits = |pointer: &str| {
            let own = text(toleration, pointer);
            own.is_empty() || own == text(taint, pointer)
        };
        let exists = text(toleration, "/operator") == "Exists";
        fits("/key")
            && fits("/effect")
            && (exists || text(toleration, "/value") == text(taint, "/value"))
    })
}

/// The node with the fewest pods that takes this one, or why none does.
pub(crate) fn place(view: &View, pod: &Value) -> Result<String, String> {
    let wanted = requests(pod);
    let mut best: Option<(u64, &str)> = None;
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    let mut count = 0;
    for (key, node) in view.all(&resource("", "nodes")) {
        count += 1;
        if let Some(reason) = refusal(view, node, pod, &wanted) {
            *reasons.entry(reason).or_default() += 1;
            continue;
        }
        let load = view.used(&key.2).pods;
        if best.is_none_or(|(least, _)| load < least) {
            best = Some((load, &key.2));
        }
    }
    if let Some((_, node)) = best {
        return Ok(node.to_owned());
    }
    let list: Vec<String> = reasons
        .iter()
        .map(|(reason, count)| format!("{count} {reason}"))
        .collect();
    Err(format!(
        "0/{count} nodes are available: {}.",
        list.join(", ")
    ))
}

fn schedule(view: &View, key: &Key, pod: &Value, clock: &Clock) -> Outcome {
    if !list(pod, "/spec/schedulingGates").is_empty() {
        return Outcome::default();
    }
    let mut object = pod.clone();
    match place(view, pod) {
        Ok(node) => {
            object["spec"]["nodeName"] = node.into();
            object["status"] = status(&object, pod, &State::Starting, clock);
        }
        Err(reason) => {
            object["status"]["phase"] = "Pending".into();
            object["status"]["conditions"] = json!([next_condition(
                pod,
                "PodScheduled",
                false,
                "Unschedulable",
                &reason,
                &clock.text
            )]);
            if object["status"] == pod["status"] {
                return Outcome::default();
            }
        }
    }
    Outcome::write(Write::update(key, object))
}

enum State<'a> {
    Starting,
    /// Its containers run again after a power cut, not ready yet.
    Restarting,
    Ready,
    Succeeded,
    /// Its containers wait for this reason.
    Waiting(&'a str),
    Failed(&'a str),
}

fn ready_after(pod: &Value) -> Duration {
    annotation(pod, READY_AFTER_ANNOTATION)
        .and_then(|text| humantime::parse_duration(text).ok())
        .unwrap_or(READY_AFTER)
}

fn is_of_job(pod: &Value) -> bool {
    list(pod, "/metadata/ownerReferences")
        .iter()
        .any(|owner| text(owner, "/kind") == "Job")
}

fn run(kubelets: &mut Kubelets, key: &Key, pod: &Value, clock: &Clock) -> Outcome {
    let id = uid(pod);
    let was_running = text(pod, "/status/phase") == "Running";
    let is_known = kubelets.started.contains_key(id);
    let since = *kubelets.started.entry(id.to_owned()).or_insert(clock.now);
    let mut wake = None;
    let state = if let Some(reason) = annotation(pod, FAIL_ANNOTATION) {
        if is_of_job(pod) || text(pod, "/spec/restartPolicy") == "Never" {
            State::Failed(reason)
        } else {
            State::Waiting(reason)
        }
    } else {
        let ready = clock.after(since, ready_after(pod));
        let done = clock.after(ready, RUN_TIME);
        if clock.now < ready {
            wake = Some(ready);
            if was_running && !is_known {
                State::Restarting
            } else if was_running {
                return waiting_for(ready);
            } else {
                State::Starting
            }
        } else if !is_of_job(pod) {
            State::Ready
        } else if clock.now < done {
            wake = Some(done);
            State::Ready
        } else {
            State::Succeeded
        }
    };
    let mut outcome = super::with_status(key, pod, status(pod, pod, &state, clock));
    if let Some(wake) = wake {
        outcome.wake_at(wake);
    }
    outcome
}

fn waiting_for(time: Timestamp) -> Outcome {
    Outcome {
        writes: Vec::new(),
        wake: Some(time),
    }
}

/// An address in the pods' network that stays with the pod.
fn address(pod: &Value) -> String {
    let hash = blake3::hash(uid(pod).as_bytes());
    let bytes = hash.as_bytes();
    format!("10.244.{}.{}", bytes[0], 1 + bytes[1] % 254)
}

fn status(pod: &Value, old: &Value, state: &State<'_>, clock: &Clock) -> Value {
    let now = &clock.text;
    let (phase, ready, reason) = match state {
        State::Starting => ("Pending", false, "ContainersNotReady"),
        State::Waiting(_) => (waiting_phase(state), false, "ContainersNotReady"),
        State::Restarting => ("Running", false, "ContainersNotReady"),
        State::Ready => ("Running", true, ""),
        State::Succeeded => ("Succeeded", false, "PodCompleted"),
        State::Failed(_) => ("Failed", false, "PodFailed"),
    };
    let names: Vec<&str> = list(pod, "/spec/containers")
        .iter()
        .map(|container| text(container, "/name"))
        .collect();
    let message = if ready || reason.is_empty() || matches!(state, State::Succeeded) {
        String::new()
    } else {
        format!("containers with unready status: [{}]", names.join(" "))
    };
    let started = match text(old, "/status/startTime") {
        "" => now,
        time => time,
    };
    let mut status = json!({
        "phase": phase,
        "conditions": [
            next_condition(old, "Initialized", true, "", "", now),
            next_condition(old, "Ready", ready, reason, &message, now),
            next_condition(old, "ContainersReady", ready, reason, &message, now),
            next_condition(old, "PodScheduled", true, "", "", now),
        ],
        "startTime": started,
        "qosClass": text(old, "/status/qosClass"),
        "containerStatuses": list(pod, "/spec/containers")
            .iter()
            .map(|container| container_status(container, old, state, started, now))
            .collect::<Vec<_>>(),
    });
    if status["qosClass"] == "" {
        status["qosClass"] = quality(pod).into();
    }
    if !matches!(state, State::Starting) {
        let own = match text(old, "/status/podIP") {
            "" => address(pod),
            known => known.to_owned(),
        };
        status["podIPs"] = json!([{"ip": own}]);
        status["podIP"] = own.into();
    }
    status
}

fn waiting_phase(state: &State<'_>) -> &'static str {
    // Containers whose image or configuration is missing never ran.
    match state {
        State::Waiting(reason) if !reason.contains("CrashLoop") => "Pending",
        _ => "Running",
    }
}

fn quality(pod: &Value) -> &'static str {
    let requests = requests(pod);
    if requests.cpu_millis == 0 && requests.memory_bytes == 0 {
        "BestEffort"
    } else {
        "Burstable"
    }
}

fn container_status(
    container: &Value,
    old: &Value,
    state: &State<'_>,
    started: &str,
    now: &str,
) -> Value {
    let name = text(container, "/name");
    let before = list(old, "/status/containerStatuses")
        .iter()
        .find(|status| text(status, "/name") == name);
    let restarts = before
        .and_then(|before| number(before, "/restartCount"))
        .unwrap_or(0);
    let running_since = before
        .map(|before| text(before, "/state/running/startedAt"))
        .filter(|since| !since.is_empty())
        .unwrap_or(now);
    let ended = |reason: &str, code: i64| json!({"terminated": {"reason": reason, "exitCode": code, "startedAt": started, "finishedAt": now}});
    let (ready, restarts, what) = match state {
        State::Starting => (
            false,
            restarts,
            json!({"waiting": {"reason": "ContainerCreating"}}),
        ),
        State::Restarting => (false, restarts + 1, json!({"running": {"startedAt": now}})),
        State::Ready => (
            true,
            restarts,
            json!({"running": {"startedAt": running_since}}),
        ),
        State::Succeeded => (false, restarts, ended("Completed", 0)),
        State::Failed(reason) => (false, restarts, ended(reason, 1)),
        State::Waiting(reason) => (
            false,
            restarts.max(i64::from(reason.contains("CrashLoop"))),
            json!({"waiting": {"reason": reason, "message": format!("told to fail by {FAIL_ANNOTATION}")}}),
        ),
    };
    json!({
        "name": name,
        "image": text(container, "/image"),
        "imageID": "",
        "ready": ready,
        "started": ready,
        "restartCount": restarts,
        "state": what,
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{World, template};
    use super::*;

    fn pod(world: &mut World, name: &str, annotations: Value, cpu: &str) -> Key {
        let mut pod = template("web", annotations, cpu);
        pod["metadata"]["name"] = name.into();
        pod["metadata"]["namespace"] = "default".into();
        world.create("", "pods", pod)
    }

    #[test]
    fn a_pod_is_scheduled_and_ready_after_its_time() {
        let mut world = World::new("4", 10);
        let fast = pod(&mut world, "fast", json!({}), "1");
        let slow = pod(
            &mut world,
            "slow",
            json!({READY_AFTER_ANNOTATION: "5s"}),
            "1",
        );
        world.run(Duration::from_secs(1), &mut |_| {});
        assert!(is_true(world.object(&fast), "Ready"));
        assert!(!is_true(world.object(&slow), "Ready"));
        assert_eq!(world.object(&slow)["status"]["phase"], "Pending");
        world.run_quietly();
        assert!(is_true(world.object(&slow), "Ready"));
    }

    #[test]
    fn a_pod_without_room_waits_until_there_is() {
        let mut world = World::new("4", 10);
        let first = pod(&mut world, "a", json!({}), "3");
        let second = pod(&mut world, "b", json!({}), "2");
        world.run_quietly();
        let waiting = world.object(&second);
        let scheduled = super::super::super::object::condition(waiting, "PodScheduled").unwrap();
        assert_eq!(scheduled["reason"], "Unschedulable");
        assert_eq!(
            scheduled["message"],
            "0/1 nodes are available: 1 Insufficient cpu."
        );
        world.view.remove(&first);
        world.run_quietly();
        assert!(is_true(world.object(&second), "Ready"));
    }

    #[test]
    fn a_pod_told_to_fail_is_never_ready() {
        let mut world = World::new("4", 10);
        let key = pod(
            &mut world,
            "a",
            json!({FAIL_ANNOTATION: "CrashLoopBackOff"}),
            "1",
        );
        let image = pod(
            &mut world,
            "b",
            json!({FAIL_ANNOTATION: "ImagePullBackOff"}),
            "1",
        );
        world.run_quietly();
        let status = &world.object(&key)["status"];
        assert_eq!(status["phase"], "Running");
        assert_eq!(
            status["containerStatuses"][0]["state"]["waiting"]["reason"],
            "CrashLoopBackOff"
        );
        assert!(!is_true(world.object(&key), "Ready"));
        assert_eq!(world.object(&image)["status"]["phase"], "Pending");
    }

    #[test]
    fn after_a_power_cut_pods_become_ready_anew() {
        let mut world = World::new("4", 10);
        let key = pod(&mut world, "a", json!({}), "1");
        world.run_quietly();
        world.kubelets = Kubelets::default();
        let mut not_ready = 0;
        world.run(Duration::from_secs(1), &mut |world| {
            not_ready += u32::from(!is_true(world.object(&key), "Ready"));
        });
        assert_eq!(not_ready, 1);
        let object = world.object(&key);
        assert!(is_true(object, "Ready"));
        assert_eq!(object["status"]["containerStatuses"][0]["restartCount"], 1);
    }

    #[test]
    fn taints_and_selectors_keep_pods_away() {
        let mut world = World::new("4", 10);
        let node = (resource("", "nodes"), String::new(), "t-1".to_owned());
        world.edit(&node, |node| {
            node["spec"]["taints"] = json!([{"key": "a", "value": "b", "effect": "NoSchedule"}]);
        });
        let plain = json!({"spec": {"containers": []}});
        let refused = |pod| place(&world.view, pod).unwrap_err();
        assert!(refused(&plain).contains("had untolerated taint"));
        let tolerant = json!({"spec": {"containers": [], "tolerations": [{"key": "a", "operator": "Exists"}]}});
        assert_eq!(place(&world.view, &tolerant), Ok("t-1".to_owned()));
        let choosy = json!({"spec": {"containers": [], "nodeSelector": {"x": "y"}, "tolerations": [{"operator": "Exists"}]}});
        assert!(refused(&choosy).contains("didn't match Pod's node affinity/selector"));
    }
}
