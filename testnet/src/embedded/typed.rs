//! Whether an object has only fields that its built-in kind has, with values of their types.
//!
//! The types are `k8s-openapi`'s: what they lose on the way in and out is unknown to Kubernetes.

use k8s_openapi::api::{
    apps::v1 as apps, autoscaling::v2 as autoscaling, batch::v1 as batch,
    coordination::v1 as coordination, core::v1 as core, networking::v1 as networking,
    policy::v1 as policy, rbac::v1 as rbac,
};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1 as extensions;
use krake_kube_api::{ApiError, Cause, Kind};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn through<T: DeserializeOwned + Serialize>(object: &Value) -> Result<Value, String> {
    let typed = T::deserialize(object).map_err(|error| error.to_string())?;
    serde_json::to_value(typed).map_err(|error| error.to_string())
}

fn round_trip(kind: &Kind, object: &Value) -> Option<Result<Value, String>> {
    Some(match kind.kind.as_str() {
        "Namespace" => through::<core::Namespace>(object),
        "Node" => through::<core::Node>(object),
        "Pod" => through::<core::Pod>(object),
        "Service" => through::<core::Service>(object),
        "ConfigMap" => through::<core::ConfigMap>(object),
        "Secret" => through::<core::Secret>(object),
        "ServiceAccount" => through::<core::ServiceAccount>(object),
        "PersistentVolumeClaim" => through::<core::PersistentVolumeClaim>(object),
        "Event" => through::<core::Event>(object),
        "Endpoints" => through::<core::Endpoints>(object),
        "Deployment" => through::<apps::Deployment>(object),
        "ReplicaSet" => through::<apps::ReplicaSet>(object),
        "StatefulSet" => through::<apps::StatefulSet>(object),
        "DaemonSet" => through::<apps::DaemonSet>(object),
        "Job" => through::<batch::Job>(object),
        "CronJob" => through::<batch::CronJob>(object),
        "Ingress" => through::<networking::Ingress>(object),
        "NetworkPolicy" => through::<networking::NetworkPolicy>(object),
        "PodDisruptionBudget" => through::<policy::PodDisruptionBudget>(object),
        "HorizontalPodAutoscaler" => through::<autoscaling::HorizontalPodAutoscaler>(object),
        "Role" => through::<rbac::Role>(object),
        "RoleBinding" => through::<rbac::RoleBinding>(object),
        "ClusterRole" => through::<rbac::ClusterRole>(object),
        "ClusterRoleBinding" => through::<rbac::ClusterRoleBinding>(object),
        "CustomResourceDefinition" => through::<extensions::CustomResourceDefinition>(object),
        "Lease" => through::<coordination::Lease>(object),
        _ => return None,
    })
}

/// Checks an object of a built-in kind.
///
/// # Errors
/// 400 with every field that the kind does not have, or the value that is of another type.
pub(crate) fn check(kind: &Kind, object: &Value) -> Result<(), ApiError> {
    if !super::kinds::is_builtin_group(&kind.group) {
        return Ok(());
    }
    let name = format!(
        "{} in version \"{}\" cannot be handled as a {}",
        kind.kind, kind.version, kind.kind
    );
    match round_trip(kind, object) {
        None => Ok(()),
        Some(Err(error)) => Err(ApiError::bad_request(format!("{name}: {error}"))),
        Some(Ok(known)) => {
            let mut causes = Vec::new();
            lost(object, &known, "", &mut causes);
            if causes.is_empty() {
                return Ok(());
            }
            let list: Vec<&str> = causes.iter().map(|cause| cause.message.as_str()).collect();
            let mut error = ApiError::bad_request(format!(
                "{name}: strict decoding error: {}",
                list.join(", ")
            ));
            error.causes = causes;
            Err(error)
        }
    }
}

fn lost(object: &Value, known: &Value, path: &str, causes: &mut Vec<Cause>) {
    match (object, known) {
        (Value::Object(object), Value::Object(known)) => {
            for (key, value) in object {
                let field = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                match known.get(key) {
                    Some(known) => lost(value, known, &field, causes),
                    None if is_nothing(value) => {}
                    None => causes.push(Cause::new(&field, format!("unknown field \"{field}\""))),
                }
            }
        }
        (Value::Array(object), Value::Array(known)) => {
            for (index, (item, known)) in object.iter().zip(known).enumerate() {
                lost(item, known, &format!("{path}[{index}]"), causes);
            }
        }
        _ => {}
    }
}

/// Empty values may be left out on the way.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn deployment() -> Kind {
        let kinds = super::super::kinds::builtin();
        kinds.into_iter().find(|k| k.kind == "Deployment").unwrap()
    }

    fn manifest(container: Value) -> Value {
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a", "creationTimestamp": null},
            "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {}, "spec": {"containers": [container]}}}})
    }

    #[test]
    fn unknown_fields_and_wrong_types_are_named() {
        let good = json!({"name": "a", "image": "x", "env": [], "resources": {"limits": {"cpu": "1"}},
            "ports": [{"containerPort": 80}], "livenessProbe": {"httpGet": {"port": "http"}}});
        assert_eq!(check(&deployment(), &manifest(good)), Ok(()));
        let error = check(
            &deployment(),
            &manifest(json!({"name": "a", "imagee": "x"})),
        )
        .unwrap_err();
        assert_eq!(
            error.causes[0].field,
            "spec.template.spec.containers[0].imagee"
        );
        let error = check(&deployment(), &manifest(json!({"name": 5}))).unwrap_err();
        assert!(error.message.contains("invalid type"), "{error}");
    }
}
