//! The nodes of a cluster.

use anyhow::Context as _;
use krake_model::resources::{parse_quantity, parse_quantity_millis};
use serde_json::{Value, json};

/// Pods a kubelet runs unless told otherwise: what a cluster has is cut into nodes of that size.
const PODS_PER_NODE: u64 = 110;
/// Nodes of a cluster at most.
const NODES_MAX: u64 = 100;

/// Nodes that have `cpu`, `memory` and `pods` in all.
///
/// # Errors
/// When a quantity is not readable.
pub(crate) fn nodes(
    site: &str,
    cpu: &str,
    memory: &str,
    pods: u64,
    now: &str,
) -> anyhow::Result<Vec<Value>> {
    let millis =
        parse_quantity_millis(cpu).with_context(|| format!("--cpu {cpu} is not a quantity"))?;
    let bytes =
        parse_quantity(memory).with_context(|| format!("--memory {memory} is not a quantity"))?;
    let count = pods.div_ceil(PODS_PER_NODE).clamp(1, NODES_MAX);
    let share = |all: u64, index: u64| all / count + u64::from(index < all % count);
    Ok((0..count)
        .map(|index| {
            let has = json!({
                "cpu": format!("{}m", share(millis, index)),
                "memory": share(bytes, index).to_string(),
                "pods": share(pods, index).to_string(),
            });
            node(&format!("{site}-{}", index + 1), &has, now)
        })
        .collect())
}

fn node(name: &str, has: &Value, now: &str) -> Value {
    let condition = |kind: &str, status: &str, reason: &str| {
        json!({"type": kind, "status": status, "reason": reason, "message": "simulated",
            "lastHeartbeatTime": now, "lastTransitionTime": now})
    };
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}},
        "spec": {},
        "status": {
            "capacity": has,
            "allocatable": has,
            "conditions": [
                condition("MemoryPressure", "False", "KubeletHasSufficientMemory"),
                condition("DiskPressure", "False", "KubeletHasNoDiskPressure"),
                condition("PIDPressure", "False", "KubeletHasSufficientPID"),
                condition("Ready", "True", "KubeletReady"),
            ],
            "addresses": [{"type": "Hostname", "address": name}],
            "nodeInfo": {"kubeletVersion": super::super::VERSION, "operatingSystem": "linux", "architecture": "amd64",
                "osImage": "simulated", "containerRuntimeVersion": "simulated://1", "kernelVersion": "0",
                "kubeProxyVersion": "", "machineID": name, "systemUUID": name, "bootID": name},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_have_in_all_what_was_asked_for() {
        let nodes = nodes("s", "16", "64Gi", 441, "t").unwrap();
        assert_eq!(nodes.len(), 5);
        let sum = |field: &str, parse: fn(&str) -> u64| -> u64 {
            let value =
                |node: &Value| parse(node["status"]["allocatable"][field].as_str().unwrap());
            nodes.iter().map(value).sum()
        };
        assert_eq!(sum("cpu", |t| parse_quantity_millis(t).unwrap()), 16_000);
        assert_eq!(sum("memory", |t| parse_quantity(t).unwrap()), 64 << 30);
        assert_eq!(sum("pods", |t| parse_quantity(t).unwrap()), 441);
        let error = super::nodes("s", "many", "1", 1, "t").unwrap_err();
        assert_eq!(error.to_string(), "--cpu many is not a quantity");
    }
}
