//! How lists of built-in kinds merge, and their defaults (`k8s.io/api` types.go: `listType`,
//! `listMapKey`, `patchStrategy`, `patchMergeKey`, and the defaults of `pkg/apis/*/v1`).

use serde_json::{Map, Value, json};

const PRESERVE: &str = "x-kubernetes-preserve-unknown-fields";

fn object(properties: Value) -> Value {
    json!({"type": "object", PRESERVE: true, "properties": properties})
}

fn any() -> Value {
    json!({"type": "object", PRESERVE: true})
}

/// The schema of a whole object: its root says that it takes strategic merge patches.
fn root(properties: Value) -> Value {
    let mut schema = object(properties);
    schema["x-kubernetes-patch-strategy"] = "merge".into();
    schema
}

/// A list whose items are told apart by `keys`; strategic merge patches use only the first.
fn keyed(keys: &[&str], items: Value) -> Value {
    json!({"type": "array", "items": items,
        "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": keys,
        "x-kubernetes-patch-strategy": "merge", "x-kubernetes-patch-merge-key": keys[0]})
}

fn atomic() -> Value {
    json!({"type": "object", PRESERVE: true, "x-kubernetes-map-type": "atomic"})
}

fn default(schema: Value, value: Value) -> Value {
    let mut schema = schema;
    schema["default"] = value;
    schema
}

fn text(value: &str) -> Value {
    json!({"type": "string", "default": value})
}

fn integer(value: i64) -> Value {
    json!({"type": "integer", "default": value})
}

fn conditions() -> Value {
    keyed(&["type"], any())
}

fn extend(base: Value, more: Value) -> Value {
    let mut base: Map<String, Value> = match base {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    if let Value::Object(more) = more {
        base.extend(more);
    }
    Value::Object(base)
}

fn container() -> Value {
    object(json!({
        "ports": keyed(&["containerPort", "protocol"], object(json!({"protocol": text("TCP")}))),
        "env": keyed(&["name"], any()),
        "volumeMounts": keyed(&["mountPath"], any()),
        "volumeDevices": keyed(&["devicePath"], any()),
        "terminationMessagePath": text("/dev/termination-log"),
        "terminationMessagePolicy": text("File"),
        "resources": default(any(), json!({})),
    }))
}

fn pod_spec(restarts: Option<&str>) -> Value {
    let mut properties = json!({
        "containers": keyed(&["name"], container()),
        "initContainers": keyed(&["name"], container()),
        "ephemeralContainers": keyed(&["name"], any()),
        "volumes": keyed(&["name"], any()),
        "imagePullSecrets": keyed(&["name"], any()),
        "hostAliases": keyed(&["ip"], any()),
        "topologySpreadConstraints": keyed(&["topologyKey", "whenUnsatisfiable"], any()),
        "schedulingGates": keyed(&["name"], any()),
        "resourceClaims": keyed(&["name"], any()),
        "nodeSelector": atomic(),
        "terminationGracePeriodSeconds": integer(30),
        "dnsPolicy": text("ClusterFirst"),
        "schedulerName": text("default-scheduler"),
        "securityContext": default(any(), json!({})),
    });
    if let Some(policy) = restarts {
        properties["restartPolicy"] = text(policy);
    }
    object(properties)
}

fn template(restarts: Option<&str>) -> Value {
    object(json!({"spec": pod_spec(restarts)}))
}

/// A kind without lists that merge.
pub(crate) fn plain() -> Value {
    root(json!({"spec": any(), "status": any()}))
}

/// The same, with conditions in its status.
pub(crate) fn with_conditions() -> Value {
    root(json!({
        "spec": object(json!({"selector": atomic()})),
        "status": object(json!({"conditions": conditions()})),
    }))
}

pub(crate) fn namespace() -> Value {
    with_conditions()
}

pub(crate) fn node() -> Value {
    root(json!({
        "spec": any(),
        "status": object(json!({"conditions": conditions(), "addresses": keyed(&["type"], any())})),
    }))
}

pub(crate) fn pod() -> Value {
    root(json!({
        "spec": pod_spec(Some("Always")),
        "status": object(json!({"conditions": conditions()})),
    }))
}

pub(crate) fn service() -> Value {
    root(json!({
        "spec": object(json!({
            "ports": keyed(&["port", "protocol"], object(json!({"protocol": text("TCP")}))),
            "selector": atomic(),
            "type": text("ClusterIP"),
            "sessionAffinity": text("None"),
        })),
        "status": object(json!({"conditions": conditions(), "loadBalancer": default(any(), json!({}))})),
    }))
}

pub(crate) fn service_account() -> Value {
    root(json!({"secrets": keyed(&["name"], any())}))
}

fn controlled(more: Value) -> Value {
    let base = json!({"selector": atomic(), "template": template(Some("Always"))});
    root(json!({
        "spec": object(extend(base, more)),
        "status": object(json!({"conditions": conditions()})),
    }))
}

/// Deployment, `ReplicaSet`, `StatefulSet`.
pub(crate) fn workload() -> Value {
    controlled(json!({"replicas": {"type": "integer", "default": 1, "minimum": 0}}))
}

pub(crate) fn daemon_set() -> Value {
    controlled(json!({}))
}

fn job_spec() -> Value {
    object(json!({
        "selector": atomic(),
        "template": template(None),
        "backoffLimit": integer(6),
    }))
}

pub(crate) fn job() -> Value {
    root(json!({
        "spec": job_spec(),
        "status": object(json!({"conditions": conditions()})),
    }))
}

pub(crate) fn cron_job() -> Value {
    root(json!({
        "spec": object(json!({
            "jobTemplate": object(json!({"spec": job_spec()})),
            "concurrencyPolicy": text("Allow"),
            "suspend": {"type": "boolean", "default": false},
            "successfulJobsHistoryLimit": integer(3),
            "failedJobsHistoryLimit": integer(1),
        })),
        "status": any(),
    }))
}
