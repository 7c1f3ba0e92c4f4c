//! What is checked and completed when a client writes a built-in kind, as API server and its
//! admission plugins do.

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use krake_kube_api::store::{Freshness, Scope};
use krake_kube_api::{Admission, ApiError, Cause, Hold, Kind, MemoryStore, Store};
use serde_json::{Value, json};

use super::crds;
use super::garbage;
use super::object::{Resource, is_dying, list, name, namespace, number, selects, text};
use super::simulate::pods::is_finished;
use super::typed;

/// Seconds a pod has to end unless it says otherwise.
const GRACE_SECONDS: u64 = 30;
/// Namespaces that are always there.
pub(crate) const OWN_NAMESPACES: [&str; 2] = ["default", "kube-system"];

/// The checks.
#[derive(Debug)]
pub(crate) struct Checks {
    pub(crate) store: Arc<MemoryStore>,
    pub(crate) namespaces: Kind,
    pub(crate) services: Kind,
}

/// A new object of the simulation, with what every object has.
pub(crate) fn complete(mut object: Value, now: &str) -> Value {
    let id = uuid::Uuid::new_v4();
    let metadata = &mut object["metadata"];
    if metadata.get("name").is_none() {
        let prefix = text(metadata, "/generateName").to_owned();
        let suffix = id.simple().to_string();
        metadata["name"] = format!("{prefix}{}", &suffix[..5]).into();
    }
    metadata["uid"] = id.to_string().into();
    metadata["creationTimestamp"] = now.into();
    metadata["generation"] = 1.into();
    object
}

/// What a deletion by the simulation waits for.
pub(crate) fn hold(resource: &Resource, object: &Value, foreground: bool, now: bool) -> Hold {
    let mut hold = standing_hold(resource, object);
    if foreground {
        hold.finalizers.push(garbage::FOREGROUND.to_owned());
    }
    if now {
        hold.grace_seconds = 0;
    }
    if is_dying(object) {
        hold.finalizers.clear();
    }
    hold
}

fn standing_hold(resource: &Resource, object: &Value) -> Hold {
    let mut hold = Hold::default();
    match (resource.0.as_str(), resource.1.as_str()) {
        ("", "pods") if !text(object, "/spec/nodeName").is_empty() && !is_finished(object) => {
            let grace = number(object, "/spec/terminationGracePeriodSeconds");
            hold.grace_seconds = grace
                .and_then(|grace| u64::try_from(grace).ok())
                .unwrap_or(GRACE_SECONDS);
        }
        crds::CRDS => hold.finalizers.push(garbage::CRD_CLEANUP.to_owned()),
        _ => {}
    }
    hold
}

fn invalid(kind: &Kind, object: &Value, field: &str, message: impl Into<String>) -> ApiError {
    let cause = Cause::new(field.to_owned(), message.into());
    ApiError::invalid(&kind.group, &kind.kind, name(object), vec![cause])
}

fn is_label(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    text.len() <= 63
        && ends(text.chars().next())
        && ends(text.chars().last())
        && text
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

fn check_name(kind: &Kind, object: &Value) -> Result<(), ApiError> {
    let name = name(object);
    let good = match kind.kind.as_str() {
        "Role" | "RoleBinding" | "ClusterRole" | "ClusterRoleBinding" => return Ok(()),
        "Namespace" => is_label(name),
        "Service" => is_label(name) && name.starts_with(|c: char| c.is_ascii_lowercase()),
        _ => name.len() <= 253 && name.split('.').all(is_label),
    };
    if good {
        return Ok(());
    }
    Err(invalid(
        kind,
        object,
        "metadata.name",
        format!(
            "Invalid value: \"{name}\": must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character"
        ),
    ))
}

fn is_label_value(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && ends(text.chars().next())
        && ends(text.chars().last())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

fn check_labels(kind: &Kind, object: &Value) -> Result<(), ApiError> {
    let labels = object
        .pointer("/metadata/labels")
        .and_then(Value::as_object);
    for (key, value) in labels.into_iter().flatten() {
        let short = key.rsplit('/').next().unwrap_or_default();
        let value = value.as_str().unwrap_or_default();
        if short.is_empty() || !is_label_value(short) || !is_label_value(value) {
            return Err(invalid(
                kind,
                object,
                "metadata.labels",
                format!(
                    "Invalid value: \"{key}={value}\": a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.'"
                ),
            ));
        }
    }
    Ok(())
}

/// Containers need names and images, and names only once.
fn check_pod(kind: &Kind, object: &Value, at: &str) -> Result<(), ApiError> {
    let field = |path: &str| format!("{}.{path}", at.trim_start_matches('/').replace('/', "."));
    let containers = list(object, &format!("{at}/containers"));
    if containers.is_empty() {
        return Err(invalid(
            kind,
            object,
            &field("containers"),
            "Required value",
        ));
    }
    let mut names = BTreeSet::new();
    for (index, container) in containers.iter().enumerate() {
        let place = field(&format!("containers[{index}]"));
        let own = text(container, "/name");
        if !is_label(own) {
            let message = format!("Invalid value: \"{own}\": must be a lowercase RFC 1123 label");
            return Err(invalid(kind, object, &format!("{place}.name"), message));
        }
        if !names.insert(own) {
            let message = format!("Duplicate value: \"{own}\"");
            return Err(invalid(kind, object, &format!("{place}.name"), message));
        }
        if text(container, "/image").is_empty() {
            return Err(invalid(
                kind,
                object,
                &format!("{place}.image"),
                "Required value",
            ));
        }
    }
    let volumes: BTreeSet<&str> = list(object, &format!("{at}/volumes"))
        .iter()
        .map(|volume| text(volume, "/name"))
        .collect();
    for (index, container) in containers.iter().enumerate() {
        for (mount, volume) in list(container, "/volumeMounts").iter().enumerate() {
            let wanted = text(volume, "/name");
            if !volumes.contains(wanted) && kind.kind != "StatefulSet" {
                let place = field(&format!("containers[{index}].volumeMounts[{mount}].name"));
                return Err(invalid(
                    kind,
                    object,
                    &place,
                    format!("Not found: \"{wanted}\""),
                ));
            }
        }
    }
    Ok(())
}

fn check_workload(kind: &Kind, old: Option<&Value>, object: &Value) -> Result<(), ApiError> {
    let none = json!({});
    let labels = object
        .pointer("/spec/template/metadata/labels")
        .unwrap_or(&none);
    match object.pointer("/spec/selector") {
        None | Some(Value::Null) => {
            return Err(invalid(kind, object, "spec.selector", "Required value"));
        }
        Some(selector) if selector.as_object().is_some_and(serde_json::Map::is_empty) => {
            let message = "Invalid value: empty selector is invalid";
            return Err(invalid(kind, object, "spec.selector", message));
        }
        Some(selector) if !selects(selector, labels) => {
            return Err(invalid(
                kind,
                object,
                "spec.template.metadata.labels",
                "Invalid value: `selector` does not match template `labels`",
            ));
        }
        Some(_) => {}
    }
    unchanged(kind, old, object, &["/spec/selector"])?;
    if kind.kind == "StatefulSet" {
        let fixed = [
            "/spec/serviceName",
            "/spec/volumeClaimTemplates",
            "/spec/podManagementPolicy",
        ];
        unchanged(kind, old, object, &fixed)?;
    }
    check_pod(kind, object, "/spec/template/spec")
}

fn unchanged(
    kind: &Kind,
    old: Option<&Value>,
    object: &Value,
    fields: &[&str],
) -> Result<(), ApiError> {
    let Some(old) = old else {
        return Ok(());
    };
    for field in fields {
        if old.pointer(field) != object.pointer(field) {
            let place = field.trim_start_matches('/').replace('/', ".");
            return Err(invalid(
                kind,
                object,
                &place,
                "Invalid value: field is immutable",
            ));
        }
    }
    Ok(())
}

/// Of a running pod only images may change, and what is outside of the specification.
fn check_running(kind: &Kind, old: &Value, object: &Value) -> Result<(), ApiError> {
    let fixed = |pod: &Value| {
        let mut spec = pod.get("spec").cloned().unwrap_or_default();
        for field in ["containers", "initContainers"] {
            let list = spec.get_mut(field).and_then(Value::as_array_mut);
            for container in list.into_iter().flatten() {
                container["image"] = Value::Null;
            }
        }
        for field in [
            "tolerations",
            "activeDeadlineSeconds",
            "terminationGracePeriodSeconds",
        ] {
            spec[field] = Value::Null;
        }
        spec
    };
    if fixed(old) == fixed(object) {
        return Ok(());
    }
    Err(invalid(
        kind,
        object,
        "spec",
        "Forbidden: pod updates may not change fields other than images, tolerations and deadlines",
    ))
}

fn complete_secret(kind: &Kind, object: &mut Value) -> Result<(), ApiError> {
    if let Some(Value::Object(plain)) = object.get_mut("stringData").map(Value::take) {
        for (key, value) in plain {
            let bytes = value.as_str().unwrap_or_default();
            let encoded = base64::engine::general_purpose::STANDARD.encode(bytes);
            if !object.get("data").is_some_and(Value::is_object) {
                object["data"] = json!({});
            }
            object["data"][key] = encoded.into();
        }
    }
    if let Some(map) = object.as_object_mut() {
        map.remove("stringData");
        map.entry("type").or_insert_with(|| "Opaque".into());
    }
    let data = object.get("data").and_then(Value::as_object);
    for (key, value) in data.into_iter().flatten() {
        let text = value.as_str().unwrap_or_default();
        if base64::engine::general_purpose::STANDARD
            .decode(text)
            .is_err()
        {
            return Err(ApiError::bad_request(format!(
                "{} cannot be handled: data.{key} is not base64",
                kind.kind
            )));
        }
    }
    Ok(())
}

fn check_frozen(kind: &Kind, old: Option<&Value>, object: &Value) -> Result<(), ApiError> {
    let frozen = |old: &Value| old.get("immutable").and_then(Value::as_bool) == Some(true);
    if old.is_some_and(frozen) {
        unchanged(kind, old, object, &["/data", "/binaryData", "/immutable"])?;
    }
    Ok(())
}

fn complete_namespace(old: Option<&Value>, object: &mut Value) {
    let own = name(object).to_owned();
    object["metadata"]["labels"]["kubernetes.io/metadata.name"] = own.into();
    match old {
        None => {
            object["spec"] = json!({"finalizers": ["kubernetes"]});
            object["status"] = json!({"phase": "Active"});
        }
        Some(old) => object["spec"] = old.get("spec").cloned().unwrap_or_default(),
    }
}

fn complete_job(kind: &Kind, old: Option<&Value>, object: &mut Value) -> Result<(), ApiError> {
    let policy = text(object, "/spec/template/spec/restartPolicy");
    if !matches!(policy, "Never" | "OnFailure") {
        return Err(invalid(
            kind,
            object,
            "spec.template.spec.restartPolicy",
            format!("Unsupported value: \"{policy}\": supported values: \"OnFailure\", \"Never\""),
        ));
    }
    if old.is_none() {
        let own = super::object::uid(object).to_owned();
        let labels = json!({"batch.kubernetes.io/controller-uid": own.clone(), "controller-uid": own,
            "batch.kubernetes.io/job-name": name(object), "job-name": name(object)});
        if let (Some(labels), Some(template)) =
            (labels.as_object(), object.pointer_mut("/spec/template"))
        {
            for (key, value) in labels {
                template["metadata"]["labels"][key] = value.clone();
            }
        }
        if object.pointer("/spec/selector").is_none() {
            object["spec"]["selector"] = json!({"matchLabels": {"batch.kubernetes.io/controller-uid": super::object::uid(object)}});
        }
        for (field, value) in [("completions", 1), ("parallelism", 1)] {
            if object.pointer(&format!("/spec/{field}")).is_none() {
                object["spec"][field] = value.into();
            }
        }
    } else {
        // An apply sends the template without the labels that were added to it.
        unchanged(
            kind,
            old,
            object,
            &["/spec/template/spec", "/spec/completions"],
        )?;
    }
    check_pod(kind, object, "/spec/template/spec")
}

impl Checks {
    async fn check_namespace(&self, kind: &Kind, object: &Value) -> Result<(), ApiError> {
        let namespace = namespace(object);
        let found = self
            .store
            .get(&self.namespaces, None, namespace, Freshness::Latest)
            .await?;
        if is_dying(&found) {
            return Err(ApiError::forbidden(format!(
                "{} \"{}\" is forbidden: unable to create new content in namespace {namespace} because it is being terminated",
                kind.plural,
                name(object)
            )));
        }
        Ok(())
    }

    /// Gives a service its addresses and ports.
    async fn complete_service(
        &self,
        kind: &Kind,
        old: Option<&Value>,
        object: &mut Value,
    ) -> Result<(), ApiError> {
        if text(object, "/spec/type") == "ExternalName" {
            return Ok(());
        }
        if let Some(ports) = object
            .pointer_mut("/spec/ports")
            .and_then(Value::as_array_mut)
        {
            for port in ports {
                if port.get("targetPort").is_none() {
                    port["targetPort"] = port["port"].clone();
                }
            }
        }
        let headless = text(object, "/spec/clusterIP") == "None";
        if list(object, "/spec/ports").is_empty() && !headless {
            return Err(invalid(kind, object, "spec.ports", "Required value"));
        }
        // An update that leaves out what was given out keeps it.
        if let Some(old) = old {
            for field in ["clusterIP", "clusterIPs"] {
                if let (None, Some(value)) = (object["spec"].get(field), old["spec"].get(field)) {
                    object["spec"][field] = value.clone();
                }
            }
            unchanged(kind, Some(old), object, &["/spec/clusterIP"])?;
        }
        let others = self
            .store
            .list(&self.services, Scope::default(), Freshness::Latest)
            .await?;
        if text(object, "/spec/clusterIP").is_empty() {
            let taken: BTreeSet<&str> = others
                .objects()
                .map(|service| text(service, "/spec/clusterIP"))
                .collect();
            let free = (2..u32::from(u16::MAX))
                .map(|n| format!("10.96.{}.{}", n >> 8, n & 255))
                .find(|address| !taken.contains(address.as_str()))
                .ok_or_else(|| ApiError::internal("all cluster addresses are in use"))?;
            object["spec"]["clusterIP"] = free.into();
        }
        let address = object["spec"]["clusterIP"].clone();
        object["spec"]["clusterIPs"] = json!([address]);
        for (field, value) in [
            ("ipFamilies", json!(["IPv4"])),
            ("ipFamilyPolicy", "SingleStack".into()),
            ("internalTrafficPolicy", "Cluster".into()),
        ] {
            if object["spec"].get(field).is_none() {
                object["spec"][field] = value;
            }
        }
        if matches!(text(object, "/spec/type"), "NodePort" | "LoadBalancer") {
            give_node_ports(old, object, others.objects());
        }
        Ok(())
    }

    async fn check_kind(
        &self,
        kind: &Kind,
        old: Option<&Value>,
        object: &mut Value,
    ) -> Result<(), ApiError> {
        match kind.kind.as_str() {
            "Namespace" => complete_namespace(old, object),
            "Secret" => {
                complete_secret(kind, object)?;
                check_frozen(kind, old, object)?;
                unchanged(kind, old, object, &["/type"])?;
            }
            "ConfigMap" => check_frozen(kind, old, object)?,
            "Service" => self.complete_service(kind, old, object).await?,
            "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" => {
                check_workload(kind, old, object)?;
            }
            "Job" => complete_job(kind, old, object)?,
            "CronJob" => {
                return Err(ApiError::new(
                    501,
                    "NotImplemented",
                    "the embedded cluster runs no CronJobs; use --kube real",
                ));
            }
            "Pod" => {
                check_pod(kind, object, "/spec")?;
                match old {
                    None => object["status"] = json!({"phase": "Pending"}),
                    Some(old) => check_running(kind, old, object)?,
                }
            }
            "CustomResourceDefinition" => {
                let causes = crds::check(object);
                if !causes.is_empty() {
                    return Err(ApiError::invalid(
                        &kind.group,
                        &kind.kind,
                        name(object),
                        causes,
                    ));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn give_node_ports<'a>(
    old: Option<&Value>,
    object: &mut Value,
    others: impl Iterator<Item = &'a Arc<Value>>,
) {
    let own = super::object::uid(object).to_owned();
    let mut taken: BTreeSet<i64> = others
        .filter(|service| super::object::uid(service) != own)
        .flat_map(|service| list(service, "/spec/ports"))
        .filter_map(|port| number(port, "/nodePort"))
        .collect();
    let before: Vec<Value> = old
        .map(|old| list(old, "/spec/ports").to_vec())
        .unwrap_or_default();
    let ports = object
        .pointer_mut("/spec/ports")
        .and_then(Value::as_array_mut);
    for port in ports.into_iter().flatten() {
        if port.get("nodePort").is_some() {
            continue;
        }
        let known = before
            .iter()
            .find(|old| old.get("port") == port.get("port"))
            .and_then(|old| number(old, "/nodePort"));
        let free = known.or_else(|| (30_000..32_768).find(|port| !taken.contains(port)));
        if let Some(free) = free {
            taken.insert(free);
            port["nodePort"] = free.into();
        }
    }
}

#[async_trait]
impl Admission for Checks {
    async fn admit(
        &self,
        kind: &Kind,
        old: Option<&Value>,
        object: &mut Value,
        subresource: &str,
        _dry_run: bool,
    ) -> Result<(), ApiError> {
        if old.is_none() && kind.namespaced {
            self.check_namespace(kind, object).await?;
        }
        let builtin = super::kinds::is_builtin_group(&kind.group);
        if builtin {
            typed::check(kind, object)?;
        }
        if !subresource.is_empty() {
            return Ok(());
        }
        if old.is_none() {
            check_name(kind, object)?;
        }
        check_labels(kind, object)?;
        if builtin {
            self.check_kind(kind, old, object).await?;
        }
        Ok(())
    }

    async fn admit_delete(&self, kind: &Kind, object: &Value) -> Result<(), ApiError> {
        if kind.kind == "Namespace" && OWN_NAMESPACES.contains(&name(object)) {
            return Err(ApiError::forbidden(format!(
                "namespaces \"{}\" is forbidden: this namespace may not be deleted",
                name(object)
            )));
        }
        Ok(())
    }

    fn hold(&self, kind: &Kind, object: &Value, options: &Value) -> Result<Hold, ApiError> {
        let resource = (kind.group.clone(), kind.plural.clone());
        let mut hold = standing_hold(&resource, object);
        if let Some(seconds) = options.get("gracePeriodSeconds").filter(|s| !s.is_null()) {
            let seconds = seconds.as_u64().ok_or_else(|| {
                ApiError::bad_request("gracePeriodSeconds must be a number of at least 0")
            })?;
            hold.grace_seconds = hold.grace_seconds.min(seconds);
        }
        match options.get("propagationPolicy").filter(|p| !p.is_null()) {
            None => {}
            Some(policy) => match policy.as_str() {
                Some("Background") => {}
                Some("Foreground") => hold.finalizers.push(garbage::FOREGROUND.to_owned()),
                Some("Orphan") => hold.finalizers.push(garbage::ORPHAN.to_owned()),
                _ => {
                    return Err(ApiError::new(
                        422,
                        "Invalid",
                        format!(
                            "propagationPolicy {policy} is not Background, Foreground or Orphan"
                        ),
                    ));
                }
            },
        }
        Ok(hold)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_labels_follow_kubernetes() {
        for good in ["a", "a-b", "0a"] {
            assert!(is_label(good), "{good}");
        }
        for bad in ["", "A", "-a", "a-", "a_b", &"a".repeat(64)] {
            assert!(!is_label(bad), "{bad}");
        }
        assert!(is_label_value("") && is_label_value("a.B_c"));
        assert!(!is_label_value("-a") && !is_label_value("a b"));
    }

    #[test]
    fn a_pod_has_time_to_end_only_where_it_runs() {
        let pods = ("".to_owned(), "pods".to_owned());
        let mut pod = json!({"spec": {"terminationGracePeriodSeconds": 7}});
        assert_eq!(hold(&pods, &pod, false, false), Hold::default());
        pod["spec"]["nodeName"] = "n".into();
        assert_eq!(hold(&pods, &pod, false, false).grace_seconds, 7);
        assert_eq!(hold(&pods, &pod, false, true).grace_seconds, 0);
        pod["status"] = json!({"phase": "Succeeded"});
        assert_eq!(hold(&pods, &pod, false, false).grace_seconds, 0);
    }
}
