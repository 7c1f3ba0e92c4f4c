//! Capacity from nodes and pods: what the scheduler would count.

use krake_model::Resources;
use krake_model::resources::{parse_quantity, parse_quantity_millis};
use serde_json::Value;

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

/// What all nodes that take pods have, and what of it pods do not request; of the objects only
/// `spec` and `status` are read.
pub(crate) fn capacity(nodes: &[Value], pods: &[Value]) -> (Resources, Resources) {
    let mut total = Resources::ZERO;
    for node in nodes.iter().filter(|node| takes_pods(node)) {
        let allocatable = node.pointer("/status/allocatable");
        let field = |name: &str| allocatable.and_then(|a| a.get(name));
        total = total.saturating_add(&Resources {
            cpu_millis: quantity(field("cpu"), cpu),
            memory_bytes: quantity(field("memory"), bytes),
            pods: quantity(field("pods"), bytes),
        });
    }
    let used = pods
        .iter()
        .filter(|pod| {
            let phase = pod.pointer("/status/phase").and_then(Value::as_str);
            !matches!(phase, Some("Succeeded" | "Failed")) && !is_unplaceable(pod)
        })
        .fold(Resources::ZERO, |sum, pod| {
            sum.saturating_add(&requests(pod))
        });
    (total, total.saturating_sub(&used))
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
        let (total, free) = capacity(&nodes, &pods);
        assert_eq!(total.cpu_millis, 4000);
        assert_eq!(free.cpu_millis, 3500);
        assert_eq!(free.memory_bytes, 7 << 30);
        assert_eq!(free.pods, 109);
    }
}
