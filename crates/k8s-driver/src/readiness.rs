//! When an object is ready, from its status alone.

use serde_json::Value;

/// What an object's status says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Health {
    pub(crate) ready: u32,
    pub(crate) wanted: u32,
    /// It will not become ready by waiting.
    pub(crate) broken: bool,
    pub(crate) message: Option<String>,
}

impl Health {
    const fn done() -> Self {
        Self {
            ready: 1,
            wanted: 1,
            broken: false,
            message: None,
        }
    }

    fn waiting(message: impl Into<String>) -> Self {
        Self {
            ready: 0,
            wanted: 1,
            broken: false,
            message: Some(message.into()),
        }
    }

    pub(crate) const fn is_ready(&self) -> bool {
        self.ready >= self.wanted && self.message.is_none()
    }
}

fn number(object: &Value, pointer: &str) -> Option<u64> {
    object.pointer(pointer).and_then(Value::as_u64)
}

fn condition<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
    object
        .pointer("/status/conditions")?
        .as_array()?
        .iter()
        .find(|condition| condition.get("type").and_then(Value::as_str) == Some(kind))
}

fn status_of<'a>(condition: &'a Value, field: &str) -> &'a str {
    condition.get(field).and_then(Value::as_str).unwrap_or("")
}

/// Judges an object; `api` is its `apiVersion`.
pub(crate) fn judge(api: &str, kind: &str, object: &Value) -> Health {
    let group = api.split_once('/').map_or("", |(group, _)| group);
    match (group, kind) {
        ("apps", "Deployment") => deployment(object),
        ("apps", "StatefulSet") => {
            replicas(object, "/status/readyReplicas", "/status/updatedReplicas")
        }
        ("apps", "ReplicaSet") | ("", "ReplicationController") => {
            replicas(object, "/status/readyReplicas", "/status/readyReplicas")
        }
        ("apps", "DaemonSet") => daemon_set(object),
        ("batch", "Job") => job(object),
        ("", "Pod") => pod(object),
        ("", "PersistentVolumeClaim") => {
            match object.pointer("/status/phase").and_then(Value::as_str) {
                Some("Bound") => Health::done(),
                // Waits for its first consumer: its pods tell.
                Some("Pending") | None => Health::done(),
                Some(phase) => Health::waiting(format!("the claim is {phase}")),
            }
        }
        ("apiextensions.k8s.io", "CustomResourceDefinition") => {
            match condition(object, "Established") {
                Some(found) if status_of(found, "status") == "True" => Health::done(),
                _ => Health::waiting("the definition is not established yet"),
            }
        }
        _ => custom(object),
    }
}

fn observed(object: &Value) -> bool {
    let generation = number(object, "/metadata/generation").unwrap_or(0);
    number(object, "/status/observedGeneration").unwrap_or(0) >= generation
}

fn counted(ready: u64, wanted: u64, current: bool, what: &str) -> Health {
    let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    let complete = current && ready >= wanted;
    Health {
        ready: small(ready.min(wanted)),
        wanted: small(wanted),
        broken: false,
        message: (!complete).then(|| {
            if ready >= wanted {
                "the newest version is being rolled out".to_owned()
            } else {
                format!("{ready} of {wanted} {what} are ready")
            }
        }),
    }
}

fn deployment(object: &Value) -> Health {
    let wanted = number(object, "/spec/replicas").unwrap_or(1);
    let updated = number(object, "/status/updatedReplicas").unwrap_or(0);
    let total = number(object, "/status/replicas").unwrap_or(0);
    let available = number(object, "/status/availableReplicas").unwrap_or(0);
    let current = observed(object) && updated >= wanted && total <= updated;
    let mut health = counted(available, wanted, current, "pods");
    if let Some(progressing) = condition(object, "Progressing")
        && status_of(progressing, "reason") == "ProgressDeadlineExceeded"
    {
        health.broken = true;
        health.message = Some(status_of(progressing, "message").to_owned());
    }
    if let Some(failure) = condition(object, "ReplicaFailure")
        && status_of(failure, "status") == "True"
    {
        health.message = Some(status_of(failure, "message").to_owned());
    }
    health
}

fn replicas(object: &Value, ready: &str, updated: &str) -> Health {
    let wanted = number(object, "/spec/replicas").unwrap_or(1);
    let ready = number(object, ready).unwrap_or(0);
    let updated = number(object, updated).unwrap_or(0);
    counted(ready, wanted, observed(object) && updated >= wanted, "pods")
}

fn daemon_set(object: &Value) -> Health {
    let wanted = number(object, "/status/desiredNumberScheduled").unwrap_or(0);
    let ready = number(object, "/status/numberReady").unwrap_or(0);
    let updated = number(object, "/status/updatedNumberScheduled").unwrap_or(0);
    counted(ready, wanted, observed(object) && updated >= wanted, "pods")
}

fn job(object: &Value) -> Health {
    if let Some(failed) = condition(object, "Failed")
        && status_of(failed, "status") == "True"
    {
        return Health {
            broken: true,
            ..Health::waiting(format!("the job failed: {}", status_of(failed, "message")))
        };
    }
    match condition(object, "Complete") {
        Some(found) if status_of(found, "status") == "True" => Health::done(),
        _ => Health::waiting("the job has not completed yet"),
    }
}

fn pod(object: &Value) -> Health {
    let phase = object
        .pointer("/status/phase")
        .and_then(Value::as_str)
        .unwrap_or("Pending");
    let ready = condition(object, "Ready").is_some_and(|c| status_of(c, "status") == "True");
    match phase {
        "Succeeded" => Health::done(),
        "Failed" => Health {
            broken: true,
            ..Health::waiting("the pod failed")
        },
        _ if ready => Health::done(),
        other => Health::waiting(format!("the pod is {other}, not ready")),
    }
}

/// Anything else is ready when it is there, unless it says otherwise in a `Ready` condition.
fn custom(object: &Value) -> Health {
    match condition(object, "Ready") {
        Some(ready) if status_of(ready, "status") != "True" => {
            let message = status_of(ready, "message");
            Health::waiting(if message.is_empty() {
                "it is not ready yet"
            } else {
                message
            })
        }
        _ => Health::done(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_deployment_is_ready_when_the_newest_version_is_available() {
        let mut object = json!({"metadata": {"generation": 2}, "spec": {"replicas": 2}, "status": {
            "observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}});
        assert!(!judge("apps/v1", "Deployment", &object).is_ready());
        object["status"]["observedGeneration"] = json!(2);
        assert!(judge("apps/v1", "Deployment", &object).is_ready());
        object["status"]["availableReplicas"] = json!(1);
        let health = judge("apps/v1", "Deployment", &object);
        assert_eq!((health.ready, health.wanted), (1, 2));
        object["status"]["conditions"] = json!([{"type": "Progressing", "reason": "ProgressDeadlineExceeded", "message": "too late"}]);
        assert!(judge("apps/v1", "Deployment", &object).broken);
    }

    #[test]
    fn what_has_no_status_is_ready_when_it_is_there() {
        assert!(judge("v1", "ConfigMap", &json!({})).is_ready());
        assert!(judge("example.org/v1", "Widget", &json!({})).is_ready());
        let waiting = json!({"status": {"conditions": [{"type": "Ready", "status": "False", "message": "soon"}]}});
        assert_eq!(
            judge("example.org/v1", "Widget", &waiting).message.unwrap(),
            "soon"
        );
    }

    #[test]
    fn jobs_and_pods_can_fail() {
        let failed = json!({"status": {"conditions": [{"type": "Failed", "status": "True", "message": "no"}]}});
        assert!(judge("batch/v1", "Job", &failed).broken);
        assert!(judge("v1", "Pod", &json!({"status": {"phase": "Failed"}})).broken);
        assert!(!judge("v1", "Pod", &json!({})).is_ready());
    }
}
