//! `ReplicaSet`, `StatefulSet` and `DaemonSet`: as many pods as wanted, of the newest version.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use super::super::object::{
    Key, condition, is_dying, is_true, label, list, name, namespace, number, resource, share,
    short_hash, text,
};
use super::super::view::View;
use super::{Clock, Outcome, Write, pod_of, pods, with_status};

/// Label with the version of a pod of a `StatefulSet` or `DaemonSet`.
const REVISION_LABEL: &str = "controller-revision-hash";

pub(crate) fn pod_key(pod: &Value) -> Key {
    super::super::object::key(&resource("", "pods"), pod)
}

/// The pods that count: neither ending nor finished.
fn active<'a>(view: &'a View, owner: &Value) -> Vec<&'a Arc<Value>> {
    view.controlled(owner, "pods")
        .into_iter()
        .filter(|pod| !is_dying(pod) && !pods::is_finished(pod))
        .collect()
}

fn create(object: Value) -> Write {
    Write::Create {
        resource: resource("", "pods"),
        object,
    }
}

/// When a pod has been ready for as long as it must be to be available; `None`: it is not ready.
fn available_from(pod: &Value, clock: &Clock, wait: Duration) -> Option<Timestamp> {
    if !is_true(pod, "Ready") {
        return None;
    }
    if wait.is_zero() {
        return Some(clock.now);
    }
    let since = text(condition(pod, "Ready")?, "/lastTransitionTime");
    Some(clock.after(since.parse().unwrap_or(clock.now), wait))
}

/// A status in which counts of zero are left out, as Go writes it.
pub(crate) fn counts(pairs: &[(&str, i64)]) -> Value {
    let mut status = json!({});
    for (field, count) in pairs.iter().filter(|(_, count)| *count != 0) {
        status[*field] = (*count).into();
    }
    status
}

/// One step of a `ReplicaSet`.
pub(crate) fn replica_set(view: &View, key: &Key, set: &Value, clock: &Clock) -> Outcome {
    let wanted = number(set, "/spec/replicas").unwrap_or(1).max(0);
    let wait = number(set, "/spec/minReadySeconds").unwrap_or(0);
    let wait = Duration::from_secs(u64::try_from(wait).unwrap_or(0));
    let mut pods = active(view, set);
    // The last ones to go are those that run longest.
    pods.sort_by_key(|pod| {
        (
            !is_true(pod, "Ready"),
            text(pod, "/metadata/creationTimestamp"),
        )
    });
    let mut available = 0;
    let mut wake = None;
    for from in pods
        .iter()
        .filter_map(|pod| available_from(pod, clock, wait))
    {
        if from <= clock.now {
            available += 1;
        } else {
            wake = Some(wake.map_or(from, |wake: Timestamp| wake.min(from)));
        }
    }
    let ready = pods.iter().filter(|pod| is_true(pod, "Ready")).count() as i64;
    let there = pods.len() as i64;
    let mut status = counts(&[
        ("fullyLabeledReplicas", there),
        ("readyReplicas", ready),
        ("availableReplicas", available),
    ]);
    status["replicas"] = there.into();
    status["observedGeneration"] = number(set, "/metadata/generation").unwrap_or(0).into();
    let mut outcome = with_status(key, set, status);
    outcome.wake = wake;
    if there < wanted && view.is_open(namespace(set)) {
        let template = set.pointer("/spec/template").cloned().unwrap_or_default();
        for _ in there..wanted {
            let mut pod = pod_of(set, &template, &[]);
            pod["metadata"]["generateName"] = format!("{}-", name(set)).into();
            outcome.writes.push(create(pod));
        }
    }
    let keep = usize::try_from(wanted).unwrap_or(0);
    for pod in pods.iter().skip(keep) {
        outcome.writes.push(Write::delete(&pod_key(pod), pod));
    }
    outcome
}

/// One step of a `StatefulSet`: pods by number, one after the other.
pub(crate) fn stateful_set(view: &View, key: &Key, set: &Value) -> Outcome {
    let wanted = number(set, "/spec/replicas").unwrap_or(1).max(0);
    let first = number(set, "/spec/ordinals/start").unwrap_or(0);
    let template = set.pointer("/spec/template").cloned().unwrap_or_default();
    let revision = format!("{}-{}", name(set), short_hash(&template));
    let pods: BTreeMap<String, &Arc<Value>> = view
        .controlled(set, "pods")
        .into_iter()
        .map(|pod| (name(pod).to_owned(), pod))
        .collect();
    let mut outcome = stateful_status(key, set, &pods, &revision);
    if !view.is_open(namespace(set)) {
        return outcome;
    }
    let in_order = text(set, "/spec/podManagementPolicy") != "Parallel";
    for number in first..first + wanted {
        let pod_name = format!("{}-{number}", name(set));
        match pods.get(&pod_name) {
            None => {
                outcome.writes.extend(claims(view, set, &pod_name));
                let pod = stateful_pod(set, &template, &pod_name, number, &revision);
                outcome.writes.push(create(pod));
            }
            Some(pod) if pods::is_finished(pod) && !is_dying(pod) => {
                outcome.writes.push(Write::delete(&pod_key(pod), pod));
            }
            Some(pod) if is_true(pod, "Ready") && !is_dying(pod) => continue,
            Some(_) => {}
        }
        if in_order {
            return outcome;
        }
    }
    // Too many go from the highest number down, then old versions are replaced alike.
    let ordinal = |pod: &Value| -> i64 {
        let number = name(pod).rsplit('-').next();
        number.and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    let mut by_number: Vec<&Arc<Value>> = pods.values().copied().collect();
    by_number.sort_by_key(|pod| std::cmp::Reverse(ordinal(pod)));
    let partition = number(set, "/spec/updateStrategy/rollingUpdate/partition").unwrap_or(0);
    let by_hand = text(set, "/spec/updateStrategy/type") == "OnDelete";
    for pod in by_number {
        let excess = ordinal(pod) >= first + wanted || ordinal(pod) < first;
        let old =
            !by_hand && ordinal(pod) >= partition && label(pod, REVISION_LABEL) != Some(&revision);
        if !excess && !old {
            continue;
        }
        if !is_dying(pod) {
            outcome.writes.push(Write::delete(&pod_key(pod), pod));
        }
        if in_order || !excess {
            return outcome;
        }
    }
    outcome
}

fn stateful_status(
    key: &Key,
    set: &Value,
    pods: &BTreeMap<String, &Arc<Value>>,
    revision: &str,
) -> Outcome {
    let count =
        |which: &dyn Fn(&Value) -> bool| pods.values().filter(|pod| which(pod)).count() as i64;
    let ready = count(&|pod| is_true(pod, "Ready"));
    let updated = count(&|pod| label(pod, REVISION_LABEL) == Some(revision));
    let all = pods.len() as i64;
    let wanted = number(set, "/spec/replicas").unwrap_or(1);
    let complete = updated == all && all == wanted && ready == wanted;
    let current = match text(set, "/status/currentRevision") {
        "" => revision,
        _ if complete => revision,
        known => known,
    };
    let mut status = counts(&[
        ("readyReplicas", ready),
        ("updatedReplicas", updated),
        (
            "currentReplicas",
            count(&|pod| label(pod, REVISION_LABEL) == Some(current)),
        ),
    ]);
    status["replicas"] = all.into();
    status["availableReplicas"] = ready.into();
    status["currentRevision"] = current.into();
    status["updateRevision"] = revision.into();
    status["collisionCount"] = 0.into();
    status["observedGeneration"] = number(set, "/metadata/generation").unwrap_or(0).into();
    with_status(key, set, status)
}

fn stateful_pod(
    set: &Value,
    template: &Value,
    pod_name: &str,
    number: i64,
    revision: &str,
) -> Value {
    let number = number.to_string();
    let labels = [
        (REVISION_LABEL, revision),
        ("statefulset.kubernetes.io/pod-name", pod_name),
        ("apps.kubernetes.io/pod-index", &number),
    ];
    let mut pod = pod_of(set, template, &labels);
    pod["metadata"]["name"] = pod_name.into();
    pod["spec"]["hostname"] = pod_name.into();
    pod["spec"]["subdomain"] = text(set, "/spec/serviceName").into();
    let mut volumes = list(&pod, "/spec/volumes").to_vec();
    for claim in list(set, "/spec/volumeClaimTemplates") {
        volumes.push(json!({"name": name(claim), "persistentVolumeClaim": {"claimName": format!("{}-{pod_name}", name(claim))}}));
    }
    if !volumes.is_empty() {
        pod["spec"]["volumes"] = volumes.into();
    }
    pod
}

/// The claims of a pod that are not there yet.
fn claims(view: &View, set: &Value, pod_name: &str) -> Vec<Write> {
    let claims = resource("", "persistentvolumeclaims");
    list(set, "/spec/volumeClaimTemplates")
        .iter()
        .filter_map(|template| {
            let claim_name = format!("{}-{pod_name}", name(template));
            let key = (claims.clone(), namespace(set).to_owned(), claim_name.clone());
            if view.get(&key).is_some() {
                return None;
            }
            let object = json!({
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": claim_name, "namespace": namespace(set),
                    "labels": set.pointer("/spec/selector/matchLabels").cloned().unwrap_or_else(|| json!({}))},
                "spec": template.get("spec").cloned().unwrap_or_default(),
                "status": {"phase": "Pending"},
            });
            Some(Write::Create {
                resource: claims.clone(),
                object,
            })
        })
        .collect()
}

/// Pins a pod to a node, as the `DaemonSet` controller does.
fn pinned(set: &Value, template: &Value, node: &str, revision: &str) -> Value {
    let mut pod = pod_of(set, template, &[(REVISION_LABEL, revision)]);
    pod["metadata"]["generateName"] = format!("{}-", name(set)).into();
    pod["spec"]["nodeName"] = node.into();
    pod
}

/// One step of a `DaemonSet`: one pod on every node that takes it.
pub(crate) fn daemon_set(view: &View, key: &Key, set: &Value) -> Outcome {
    let template = set.pointer("/spec/template").cloned().unwrap_or_default();
    let revision = short_hash(&template);
    let selector = template
        .pointer("/spec/nodeSelector")
        .and_then(Value::as_object);
    let nodes: Vec<&str> = view
        .all(&resource("", "nodes"))
        .filter(|(_, node)| {
            let mut pairs = selector.into_iter().flatten();
            pairs.all(|(key, value)| label(node, key) == value.as_str())
        })
        .map(|(key, _)| key.2.as_str())
        .collect();
    let pods = view.controlled(set, "pods");
    let on = |node: &str| pods.iter().find(|pod| text(pod, "/spec/nodeName") == node);
    let count = |which: &dyn Fn(&Value) -> bool| {
        let placed = nodes.iter().filter_map(|node| on(node));
        placed.filter(|pod| !is_dying(pod) && which(pod)).count() as i64
    };
    let wanted = nodes.len() as i64;
    let ready = count(&|pod| is_true(pod, "Ready"));
    let is_new = |pod: &Value| label(pod, REVISION_LABEL) == Some(&revision);
    let mut status = counts(&[
        ("numberAvailable", ready),
        ("numberUnavailable", wanted - ready),
        ("updatedNumberScheduled", count(&is_new)),
    ]);
    status["currentNumberScheduled"] = count(&|_| true).into();
    status["desiredNumberScheduled"] = wanted.into();
    status["numberMisscheduled"] = 0.into();
    status["numberReady"] = ready.into();
    status["observedGeneration"] = number(set, "/metadata/generation").unwrap_or(0).into();
    let mut outcome = with_status(key, set, status);
    let limit = set.pointer("/spec/updateStrategy/rollingUpdate/maxUnavailable");
    let mut budget = share(limit, wanted, "1", true).max(1) - (wanted - ready);
    let by_hand = text(set, "/spec/updateStrategy/type") == "OnDelete";
    for node in &nodes {
        match on(node) {
            None if view.is_open(namespace(set)) => {
                let pod = pinned(set, &template, node, &revision);
                outcome.writes.push(create(pod));
            }
            None => {}
            Some(pod) if is_dying(pod) => {}
            Some(pod) if pods::is_finished(pod) => {
                outcome.writes.push(Write::delete(&pod_key(pod), pod));
            }
            Some(pod) if is_new(pod) || by_hand => {}
            Some(pod) if !is_true(pod, "Ready") || budget > 0 => {
                budget -= i64::from(is_true(pod, "Ready"));
                outcome.writes.push(Write::delete(&pod_key(pod), pod));
            }
            Some(_) => {}
        }
    }
    let elsewhere = pods
        .iter()
        .filter(|pod| !nodes.contains(&text(pod, "/spec/nodeName")) && !is_dying(pod));
    for pod in elsewhere {
        outcome.writes.push(Write::delete(&pod_key(pod), pod));
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::super::tests::{World, template, workload};
    use super::*;

    #[test]
    fn a_stateful_set_makes_its_pods_in_order_and_replaces_them_backwards() {
        let mut world = World::new("8", 10);
        let mut set = workload("StatefulSet", 3, &template("web", json!({}), "1"));
        set["spec"]["volumeClaimTemplates"] = json!([{"metadata": {"name": "data"}, "spec": {}}]);
        let key = world.create("apps", "statefulsets", set);
        world.run(Duration::from_secs(5), &mut |world| {
            let waiting = world.pods().len() - world.ready_pods();
            assert!(waiting <= 1, "one after the other");
        });
        let names: Vec<&str> = world.pods().into_iter().map(name).collect();
        assert_eq!(names, ["web-0", "web-1", "web-2"]);
        assert_eq!(world.object(&key)["status"]["readyReplicas"], 3);
        let claims = resource("", "persistentvolumeclaims");
        assert_eq!(world.view.all(&claims).count(), 3);
        world.edit(&key, |set| {
            set["spec"]["template"]["spec"]["containers"][0]["image"] = "x:2".into();
        });
        world.run(Duration::from_secs(5), &mut |world| {
            assert!(world.ready_pods() >= 2);
        });
        let status = &world.object(&key)["status"];
        assert_eq!(status["updatedReplicas"], 3);
        assert_eq!(status["currentRevision"], status["updateRevision"]);
        world.edit(&key, |set| set["spec"]["replicas"] = 1.into());
        world.run_quietly();
        assert_eq!(world.pods().len(), 1);
    }

    #[test]
    fn a_daemon_set_has_one_pod_on_every_node() {
        let mut world = World::new("8", 330);
        let set = workload("DaemonSet", 0, &template("web", json!({}), "100m"));
        let key = world.create("apps", "daemonsets", set);
        world.run_quietly();
        assert_eq!(world.object(&key)["status"]["numberReady"], 3);
        world.edit(&key, |set| {
            set["spec"]["template"]["spec"]["containers"][0]["image"] = "x:2".into();
        });
        world.run(Duration::from_secs(5), &mut |world| {
            assert!(world.ready_pods() >= 2);
        });
        assert_eq!(world.object(&key)["status"]["updatedNumberScheduled"], 3);
    }

    #[test]
    fn a_replica_set_counts_as_available_after_its_time() {
        let mut world = World::new("8", 10);
        let mut set = workload("ReplicaSet", 2, &template("web", json!({}), "1"));
        set["spec"]["minReadySeconds"] = 5.into();
        let key = world.create("apps", "replicasets", set);
        world.run(Duration::from_secs(1), &mut |_| {});
        let status = &world.object(&key)["status"];
        assert_eq!(status["readyReplicas"], 2);
        assert!(status.get("availableReplicas").is_none());
        world.run_quietly();
        assert_eq!(world.object(&key)["status"]["availableReplicas"], 2);
        world.edit(&key, |set| set["spec"]["replicas"] = 1.into());
        world.run_quietly();
        assert_eq!(world.pods().len(), 1);
    }
}
