//! What `kubectl get` shows of built-in kinds (after `pkg/printers/internalversion`).

use krake_kube_api::Column;
use serde_json::Value;

use super::object::{list, number, text};

fn age() -> Column {
    Column::new("Age", ".metadata.creationTimestamp", "Its age.").date()
}

pub(crate) fn age_only() -> Vec<Column> {
    vec![age()]
}

fn integer(name: &str, path: &str) -> Column {
    Column {
        kind: "integer".to_owned(),
        ..Column::new(name, path, "A count.")
    }
}

fn count(name: &str, compute: fn(&Value) -> Value) -> Column {
    Column {
        kind: "integer".to_owned(),
        ..Column::computed(name, "A count.", compute)
    }
}

macro_rules! counts {
    ($($function:ident: $pointer:literal or $default:literal;)*) => {
        $(fn $function(object: &Value) -> Value {
            number(object, $pointer).unwrap_or($default).into()
        })*
    };
}

counts! {
    updated_replicas: "/status/updatedReplicas" or 0;
    available_replicas: "/status/availableReplicas" or 0;
    status_replicas: "/status/replicas" or 0;
    ready_replicas: "/status/readyReplicas" or 0;
    spec_replicas: "/spec/replicas" or 1;
    desired_scheduled: "/status/desiredNumberScheduled" or 0;
    current_scheduled: "/status/currentNumberScheduled" or 0;
    number_ready: "/status/numberReady" or 0;
    updated_scheduled: "/status/updatedNumberScheduled" or 0;
    number_available: "/status/numberAvailable" or 0;
}

fn of(have: i64, want: i64) -> Value {
    format!("{have}/{want}").into()
}

fn or_none(text: &str) -> Value {
    if text.is_empty() { "<none>" } else { text }.into()
}

pub(crate) fn namespace() -> Vec<Column> {
    vec![Column::new("Status", ".status.phase", "Its phase."), age()]
}

pub(crate) fn node() -> Vec<Column> {
    let status = |node: &Value| {
        let ready = super::object::is_true(node, "Ready");
        let word = if ready { "Ready" } else { "NotReady" };
        if node.pointer("/spec/unschedulable").and_then(Value::as_bool) == Some(true) {
            return format!("{word},SchedulingDisabled").into();
        }
        word.into()
    };
    vec![
        Column::computed("Status", "Whether it is ready.", status),
        Column::computed("Roles", "Its roles.", |_| "<none>".into()),
        age(),
        Column::new(
            "Version",
            ".status.nodeInfo.kubeletVersion",
            "Its kubelet's version.",
        ),
    ]
}

fn pod_ready(pod: &Value) -> Value {
    let statuses = list(pod, "/status/containerStatuses");
    let ready = statuses
        .iter()
        .filter(|status| status.get("ready").and_then(Value::as_bool) == Some(true))
        .count();
    of(ready as i64, list(pod, "/spec/containers").len() as i64)
}

fn pod_status(pod: &Value) -> Value {
    if super::object::is_dying(pod) {
        return "Terminating".into();
    }
    let reason = list(pod, "/status/containerStatuses")
        .iter()
        .flat_map(|status| {
            [
                text(status, "/state/waiting/reason"),
                text(status, "/state/terminated/reason"),
            ]
        })
        .find(|reason| !reason.is_empty());
    reason.unwrap_or(text(pod, "/status/phase")).into()
}

fn pod_restarts(pod: &Value) -> Value {
    let restarts: i64 = list(pod, "/status/containerStatuses")
        .iter()
        .filter_map(|status| number(status, "/restartCount"))
        .sum();
    restarts.into()
}

pub(crate) fn pod() -> Vec<Column> {
    vec![
        Column::computed("Ready", "Containers that are ready.", pod_ready),
        Column::computed("Status", "What it does.", pod_status),
        count("Restarts", pod_restarts),
        age(),
        Column::computed("IP", "Its address.", |pod| {
            or_none(text(pod, "/status/podIP"))
        })
        .wide(),
        Column::computed("Node", "Where it runs.", |pod| {
            or_none(text(pod, "/spec/nodeName"))
        })
        .wide(),
    ]
}

fn ports(service: &Value) -> Value {
    let ports: Vec<String> = list(service, "/spec/ports")
        .iter()
        .map(|port| {
            let number_of = |pointer| number(port, pointer).unwrap_or(0);
            let (own, outside) = (number_of("/port"), number_of("/nodePort"));
            let protocol = text(port, "/protocol");
            if outside == 0 {
                format!("{own}/{protocol}")
            } else {
                format!("{own}:{outside}/{protocol}")
            }
        })
        .collect();
    or_none(&ports.join(","))
}

fn external(service: &Value) -> Value {
    match text(service, "/spec/type") {
        "LoadBalancer" => "<pending>".into(),
        "ExternalName" => text(service, "/spec/externalName").into(),
        _ => "<none>".into(),
    }
}

pub(crate) fn service() -> Vec<Column> {
    vec![
        Column::new("Type", ".spec.type", "Its type."),
        Column::computed("Cluster-IP", "Its address.", |service| {
            or_none(text(service, "/spec/clusterIP"))
        }),
        Column::computed("External-IP", "Its address outside.", external),
        Column::computed("Port(s)", "Its ports.", ports),
        age(),
    ]
}

fn entries(object: &Value) -> Value {
    let of = |field: &str| {
        let map = object.get(field).and_then(Value::as_object);
        map.map_or(0, serde_json::Map::len)
    };
    (of("data") + of("binaryData")).into()
}

pub(crate) fn config_map() -> Vec<Column> {
    vec![count("Data", entries), age()]
}

pub(crate) fn secret() -> Vec<Column> {
    vec![
        Column::new("Type", ".type", "Its type."),
        count("Data", entries),
        age(),
    ]
}

pub(crate) fn claim() -> Vec<Column> {
    vec![
        Column::new("Status", ".status.phase", "Its phase."),
        Column::new("Volume", ".spec.volumeName", "Its volume."),
        Column::new("Capacity", ".status.capacity.storage", "Its size."),
        Column::new("Access Modes", ".status.accessModes", "How it is used."),
        Column::new("StorageClass", ".spec.storageClassName", "Its class."),
        age(),
    ]
}

pub(crate) fn event() -> Vec<Column> {
    vec![
        Column::new("Last Seen", ".lastTimestamp", "When it was seen.").date(),
        Column::new("Type", ".type", "Normal or Warning."),
        Column::new("Reason", ".reason", "One word."),
        Column::computed("Object", "What it is about.", |event| {
            let kind = text(event, "/involvedObject/kind").to_ascii_lowercase();
            format!("{kind}/{}", text(event, "/involvedObject/name")).into()
        }),
        Column::new("Message", ".message", "What happened."),
    ]
}

pub(crate) fn endpoints() -> Vec<Column> {
    let addresses = |endpoints: &Value| {
        let mut found = Vec::new();
        for subset in list(endpoints, "/subsets") {
            for address in list(subset, "/addresses") {
                for port in list(subset, "/ports") {
                    let port = number(port, "/port").unwrap_or(0);
                    found.push(format!("{}:{port}", text(address, "/ip")));
                }
            }
        }
        or_none(&found.join(","))
    };
    vec![
        Column::computed("Endpoints", "Addresses.", addresses),
        age(),
    ]
}

fn replicas_ready(object: &Value) -> Value {
    let wanted = number(object, "/spec/replicas").unwrap_or(1);
    of(number(object, "/status/readyReplicas").unwrap_or(0), wanted)
}

pub(crate) fn deployment() -> Vec<Column> {
    vec![
        Column::computed("Ready", "Ready and wanted pods.", replicas_ready),
        count("Up-to-date", updated_replicas),
        count("Available", available_replicas),
        age(),
        Column::new(
            "Containers",
            ".spec.template.spec.containers[*].name",
            "Names.",
        )
        .wide(),
        Column::new(
            "Images",
            ".spec.template.spec.containers[*].image",
            "Images.",
        )
        .wide(),
    ]
}

pub(crate) fn replica_set() -> Vec<Column> {
    vec![
        count("Desired", spec_replicas),
        count("Current", status_replicas),
        count("Ready", ready_replicas),
        age(),
    ]
}

pub(crate) fn stateful_set() -> Vec<Column> {
    vec![
        Column::computed("Ready", "Ready and wanted pods.", replicas_ready),
        age(),
    ]
}

pub(crate) fn daemon_set() -> Vec<Column> {
    vec![
        count("Desired", desired_scheduled),
        count("Current", current_scheduled),
        count("Ready", number_ready),
        count("Up-to-date", updated_scheduled),
        count("Available", number_available),
        Column::computed("Node Selector", "Which nodes.", |object| {
            let selector = object.pointer("/spec/template/spec/nodeSelector");
            let pairs: Vec<String> = selector
                .and_then(Value::as_object)
                .into_iter()
                .flatten()
                .map(|(key, value)| format!("{key}={}", value.as_str().unwrap_or_default()))
                .collect();
            or_none(&pairs.join(","))
        }),
        age(),
    ]
}

pub(crate) fn job() -> Vec<Column> {
    let status = |job: &Value| {
        for (condition, word) in [
            ("Complete", "Complete"),
            ("Failed", "Failed"),
            ("Suspended", "Suspended"),
        ] {
            if super::object::is_true(job, condition) {
                return word.into();
            }
        }
        "Running".into()
    };
    let completions = |job: &Value| {
        let wanted = number(job, "/spec/completions").unwrap_or(1);
        of(number(job, "/status/succeeded").unwrap_or(0), wanted)
    };
    vec![
        Column::computed("Status", "How it is.", status),
        Column::computed("Completions", "Done and wanted.", completions),
        age(),
    ]
}

pub(crate) fn cron_job() -> Vec<Column> {
    vec![
        Column::new("Schedule", ".spec.schedule", "When."),
        Column {
            kind: "boolean".to_owned(),
            ..Column::new("Suspend", ".spec.suspend", "Whether it rests.")
        },
        Column::new("Last Schedule", ".status.lastScheduleTime", "Last time.").date(),
        age(),
    ]
}

pub(crate) fn ingress() -> Vec<Column> {
    vec![
        Column::computed("Class", "Its class.", |ingress| {
            or_none(text(ingress, "/spec/ingressClassName"))
        }),
        Column::computed("Hosts", "Host names.", |ingress| {
            let hosts: Vec<&str> = list(ingress, "/spec/rules")
                .iter()
                .map(|rule| text(rule, "/host"))
                .filter(|host| !host.is_empty())
                .collect();
            if hosts.is_empty() {
                "*".into()
            } else {
                hosts.join(",").into()
            }
        }),
        Column::new("Address", ".status.loadBalancer.ingress[*].ip", "Address."),
        Column::computed("Ports", "Ports.", |ingress| {
            if list(ingress, "/spec/tls").is_empty() {
                "80".into()
            } else {
                "80, 443".into()
            }
        }),
        age(),
    ]
}

pub(crate) fn budget() -> Vec<Column> {
    vec![
        Column::new("Min Available", ".spec.minAvailable", "Least pods."),
        Column::new("Max Unavailable", ".spec.maxUnavailable", "Most away."),
        integer("Allowed Disruptions", ".status.disruptionsAllowed"),
        age(),
    ]
}

pub(crate) fn autoscaler() -> Vec<Column> {
    vec![
        Column::computed("Reference", "What it scales.", |object| {
            let target =
                |field: &str| text(object, &format!("/spec/scaleTargetRef/{field}")).to_owned();
            format!("{}/{}", target("kind"), target("name")).into()
        }),
        integer("Minpods", ".spec.minReplicas"),
        integer("Maxpods", ".spec.maxReplicas"),
        integer("Replicas", ".status.currentReplicas"),
        age(),
    ]
}

pub(crate) fn definition() -> Vec<Column> {
    vec![Column::new(
        "Created At",
        ".metadata.creationTimestamp",
        "When.",
    )]
}

pub(crate) fn lease() -> Vec<Column> {
    vec![
        Column::new("Holder", ".spec.holderIdentity", "Who has it."),
        age(),
    ]
}
