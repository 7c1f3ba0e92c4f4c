//! What an application's manifests need of a site.

use std::collections::BTreeSet;

use krake_model::resources::{Resources, parse_quantity, parse_quantity_millis};
use serde_json::Value;

/// Capacity and API kinds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Needs {
    /// Requests of all pods together.
    pub resources: Resources,
    /// Kinds, as `group/version/Kind` (`v1/ConfigMap` for the core group).
    pub kinds: BTreeSet<String>,
}

/// Sums up what `manifests` need. Kinds that a `CustomResourceDefinition` among them defines are
/// not asked of the site.
///
/// # Errors
/// A request that is no quantity, or a number of pods that is none, as `(path, message)`.
pub fn needs_of(manifests: &[Value]) -> Result<Needs, Vec<(String, String)>> {
    let mut needs = Needs::default();
    let mut errors = Vec::new();
    let own = defined_kinds(manifests);
    for (index, manifest) in manifests.iter().enumerate() {
        let kind = kind_of(manifest);
        if !own.contains(&kind) {
            needs.kinds.insert(kind);
        }
        let path = format!("spec.source.manifests[{index}]");
        match workload(manifest, &path) {
            Ok(resources) => needs.resources = needs.resources.saturating_add(&resources),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() {
        Ok(needs)
    } else {
        Err(errors)
    }
}

/// `group/version/Kind` of a manifest.
pub fn kind_of(manifest: &Value) -> String {
    let text = |key: &str| {
        manifest
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    format!("{}/{}", text("apiVersion"), text("kind"))
}

fn defined_kinds(manifests: &[Value]) -> BTreeSet<String> {
    let mut kinds = BTreeSet::new();
    for manifest in manifests {
        if manifest.get("kind").and_then(Value::as_str) != Some("CustomResourceDefinition") {
            continue;
        }
        let group = manifest.pointer("/spec/group").and_then(Value::as_str);
        let kind = manifest.pointer("/spec/names/kind").and_then(Value::as_str);
        let versions = manifest.pointer("/spec/versions").and_then(Value::as_array);
        if let (Some(group), Some(kind), Some(versions)) = (group, kind, versions) {
            for version in versions {
                if let Some(name) = version.get("name").and_then(Value::as_str) {
                    kinds.insert(format!("{group}/{name}/{kind}"));
                }
            }
        }
    }
    kinds
}

type Problem = (String, String);

fn workload(manifest: &Value, path: &str) -> Result<Resources, Problem> {
    let kind = manifest.get("kind").and_then(Value::as_str).unwrap_or("");
    let api = manifest
        .get("apiVersion")
        .and_then(Value::as_str)
        .unwrap_or("");
    // Kubernetes keeps these numbers in 32 bits.
    let count = |pointer: &str| match manifest.pointer(pointer) {
        None | Some(Value::Null) => Ok(1),
        Some(value) => value
            .as_u64()
            .filter(|count| i32::try_from(*count).is_ok())
            .ok_or_else(|| {
                let mut shown = value.to_string();
                shown.truncate(shown.floor_char_boundary(40));
                let message = format!("`{shown}` is not a number of pods: write 0 to {}", i32::MAX);
                (format!("{path}{}", pointer.replace('/', ".")), message)
            }),
    };
    let (pointer, copies) = match (api, kind) {
        ("v1", "Pod") => ("/spec", 1),
        ("apps/v1", "Deployment" | "StatefulSet" | "ReplicaSet")
        | ("v1", "ReplicationController") => ("/spec/template/spec", count("/spec/replicas")?),
        // One per node: at least one.
        ("apps/v1", "DaemonSet") => ("/spec/template/spec", 1),
        ("batch/v1", "Job") => ("/spec/template/spec", count("/spec/parallelism")?),
        ("batch/v1", "CronJob") => (
            "/spec/jobTemplate/spec/template/spec",
            count("/spec/jobTemplate/spec/parallelism")?,
        ),
        _ => return Ok(Resources::ZERO),
    };
    let Some(pod) = manifest.pointer(pointer) else {
        return Ok(Resources::ZERO);
    };
    let path = format!("{path}{}", pointer.replace('/', "."));
    Ok(pod_needs(pod, &path)?.times(copies))
}

/// Kubernetes' rule: the containers together, or the largest init container if that is more.
fn pod_needs(pod: &Value, path: &str) -> Result<Resources, Problem> {
    let mut together = Resources::ZERO;
    for (index, container) in list(pod, "containers").iter().enumerate() {
        let needs = container_needs(container, &format!("{path}.containers[{index}]"))?;
        together = together.saturating_add(&needs);
    }
    for (index, container) in list(pod, "initContainers").iter().enumerate() {
        let needs = container_needs(container, &format!("{path}.initContainers[{index}]"))?;
        together.cpu_millis = together.cpu_millis.max(needs.cpu_millis);
        together.memory_bytes = together.memory_bytes.max(needs.memory_bytes);
    }
    together.pods = 1;
    Ok(together)
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value
        .get(key)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn container_needs(container: &Value, path: &str) -> Result<Resources, Problem> {
    // A limit without a request is also the request.
    let wanted = |name: &str| {
        ["requests", "limits"].into_iter().find_map(|kind| {
            let value = container.pointer(&format!("/resources/{kind}/{name}"))?;
            let text = match value {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            Some((format!("{path}.resources.{kind}.{name}"), text))
        })
    };
    let read = |name: &str, parse: fn(&str) -> Option<u64>| match wanted(name) {
        None => Ok(0),
        Some((path, text)) => parse(&text).ok_or_else(|| {
            let message = format!("`{text}` is not a quantity, such as 500m or 128Mi");
            (path, message)
        }),
    };
    Ok(Resources {
        cpu_millis: read("cpu", |text| parse_quantity_millis(text).ok())?,
        memory_bytes: read("memory", |text| parse_quantity(text).ok())?,
        pods: 0,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn requests_are_summed_over_replicas_and_containers() {
        let needs = needs_of(&[
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": 3, "template": {"spec": {
                "containers": [
                    {"resources": {"requests": {"cpu": "250m", "memory": "64Mi"}}},
                    {"resources": {"limits": {"cpu": 1}}}
                ],
                "initContainers": [{"resources": {"requests": {"memory": "1Gi"}}}]
            }}}}),
            json!({"apiVersion": "v1", "kind": "ConfigMap"}),
        ])
        .unwrap();
        assert_eq!(needs.resources.cpu_millis, 3 * 1250);
        assert_eq!(needs.resources.memory_bytes, 3 << 30);
        assert_eq!(needs.resources.pods, 3);
        assert!(needs.kinds.contains("apps/v1/Deployment"));
        assert!(needs.kinds.contains("v1/ConfigMap"));
    }

    #[test]
    fn a_bad_quantity_is_named_with_its_path() {
        let errors = needs_of(&[json!({"apiVersion": "v1", "kind": "Pod", "spec": {
            "containers": [{"resources": {"requests": {"cpu": "lots"}}}]}})])
        .unwrap_err();
        assert_eq!(
            errors[0].0,
            "spec.source.manifests[0].spec.containers[0].resources.requests.cpu"
        );
    }

    #[test]
    fn a_number_of_pods_that_is_none_is_named_with_its_path() {
        for replicas in [
            json!(-5),
            json!(1e23),
            json!("3"),
            json!(2.5),
            json!(1_u64 << 31),
        ] {
            let errors = needs_of(&[json!({"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": replicas}})])
                .unwrap_err();
            assert_eq!(errors[0].0, "spec.source.manifests[0].spec.replicas");
        }
    }

    #[test]
    fn a_kind_the_app_brings_itself_is_not_asked_of_the_site() {
        let needs = needs_of(&[
            json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "spec": {
                "group": "example.org", "names": {"kind": "Widget"}, "versions": [{"name": "v1"}]}}),
            json!({"apiVersion": "example.org/v1", "kind": "Widget"}),
        ])
        .unwrap();
        assert!(!needs.kinds.contains("example.org/v1/Widget"));
    }
}
