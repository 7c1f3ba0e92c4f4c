//! The built-in kinds: what driver and ordinary applications touch.
//!
//! Their schemas say how lists merge (server-side apply and strategic merge patch) and what the
//! defaults are; which fields there are at all is checked in [`super::typed`].

use krake_kube_api::{Column, Kind};
use serde_json::Value;

use super::columns;
use super::schemas;

struct Names {
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
    namespaced: bool,
}

fn kind(names: &Names, schema: Value, columns: Vec<Column>) -> Kind {
    let is_in_all = matches!(
        names.kind,
        "Pod"
            | "Service"
            | "Deployment"
            | "ReplicaSet"
            | "StatefulSet"
            | "DaemonSet"
            | "Job"
            | "CronJob"
            | "HorizontalPodAutoscaler"
    );
    let has_status = !matches!(
        names.kind,
        "ConfigMap"
            | "Secret"
            | "ServiceAccount"
            | "Event"
            | "Endpoints"
            | "NetworkPolicy"
            | "Role"
            | "RoleBinding"
            | "ClusterRole"
            | "ClusterRoleBinding"
            | "Lease"
    );
    Kind {
        group: names.group.to_owned(),
        version: names.version.to_owned(),
        kind: names.kind.to_owned(),
        plural: names.plural.to_owned(),
        singular: names.kind.to_ascii_lowercase(),
        short_names: names.short.iter().map(|name| (*name).to_owned()).collect(),
        categories: if is_in_all {
            vec!["all".to_owned()]
        } else {
            Vec::new()
        },
        namespaced: names.namespaced,
        status: has_status,
        read_only: false,
        schema: Some(schema),
        columns,
    }
}

const fn names(
    group: &'static str,
    version: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
) -> Names {
    Names {
        group,
        version,
        kind,
        plural,
        short,
        namespaced: true,
    }
}

const fn cluster_wide(
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
) -> Names {
    Names {
        namespaced: false,
        ..names(group, "v1", kind, plural, short)
    }
}

const RBAC: &str = "rbac.authorization.k8s.io";
const NETWORK: &str = "networking.k8s.io";

fn core() -> Vec<Kind> {
    let simple = schemas::plain;
    vec![
        kind(
            &cluster_wide("", "Namespace", "namespaces", &["ns"]),
            schemas::namespace(),
            columns::namespace(),
        ),
        kind(
            &cluster_wide("", "Node", "nodes", &["no"]),
            schemas::node(),
            columns::node(),
        ),
        kind(
            &names("", "v1", "Pod", "pods", &["po"]),
            schemas::pod(),
            columns::pod(),
        ),
        kind(
            &names("", "v1", "Service", "services", &["svc"]),
            schemas::service(),
            columns::service(),
        ),
        kind(
            &names("", "v1", "ConfigMap", "configmaps", &["cm"]),
            simple(),
            columns::config_map(),
        ),
        kind(
            &names("", "v1", "Secret", "secrets", &[]),
            simple(),
            columns::secret(),
        ),
        kind(
            &names("", "v1", "ServiceAccount", "serviceaccounts", &["sa"]),
            schemas::service_account(),
            columns::age_only(),
        ),
        kind(
            &names(
                "",
                "v1",
                "PersistentVolumeClaim",
                "persistentvolumeclaims",
                &["pvc"],
            ),
            schemas::with_conditions(),
            columns::claim(),
        ),
        kind(
            &names("", "v1", "Event", "events", &["ev"]),
            simple(),
            columns::event(),
        ),
        kind(
            &names("", "v1", "Endpoints", "endpoints", &["ep"]),
            simple(),
            columns::endpoints(),
        ),
    ]
}

fn workloads() -> Vec<Kind> {
    vec![
        kind(
            &names("apps", "v1", "Deployment", "deployments", &["deploy"]),
            schemas::workload(),
            columns::deployment(),
        ),
        kind(
            &names("apps", "v1", "ReplicaSet", "replicasets", &["rs"]),
            schemas::workload(),
            columns::replica_set(),
        ),
        kind(
            &names("apps", "v1", "StatefulSet", "statefulsets", &["sts"]),
            schemas::workload(),
            columns::stateful_set(),
        ),
        kind(
            &names("apps", "v1", "DaemonSet", "daemonsets", &["ds"]),
            schemas::daemon_set(),
            columns::daemon_set(),
        ),
        kind(
            &names("batch", "v1", "Job", "jobs", &[]),
            schemas::job(),
            columns::job(),
        ),
        kind(
            &names("batch", "v1", "CronJob", "cronjobs", &["cj"]),
            schemas::cron_job(),
            columns::cron_job(),
        ),
    ]
}

fn others() -> Vec<Kind> {
    let simple = schemas::plain;
    let conditions = schemas::with_conditions;
    let age = columns::age_only;
    vec![
        kind(
            &names(NETWORK, "v1", "Ingress", "ingresses", &["ing"]),
            simple(),
            columns::ingress(),
        ),
        kind(
            &names(
                NETWORK,
                "v1",
                "NetworkPolicy",
                "networkpolicies",
                &["netpol"],
            ),
            simple(),
            age(),
        ),
        kind(
            &names(
                "policy",
                "v1",
                "PodDisruptionBudget",
                "poddisruptionbudgets",
                &["pdb"],
            ),
            conditions(),
            columns::budget(),
        ),
        kind(
            &names(
                "autoscaling",
                "v2",
                "HorizontalPodAutoscaler",
                "horizontalpodautoscalers",
                &["hpa"],
            ),
            conditions(),
            columns::autoscaler(),
        ),
        kind(&names(RBAC, "v1", "Role", "roles", &[]), simple(), age()),
        kind(
            &names(RBAC, "v1", "RoleBinding", "rolebindings", &[]),
            simple(),
            age(),
        ),
        kind(
            &cluster_wide(RBAC, "ClusterRole", "clusterroles", &[]),
            simple(),
            age(),
        ),
        kind(
            &cluster_wide(RBAC, "ClusterRoleBinding", "clusterrolebindings", &[]),
            simple(),
            age(),
        ),
        kind(
            &cluster_wide(
                "apiextensions.k8s.io",
                "CustomResourceDefinition",
                "customresourcedefinitions",
                &["crd", "crds"],
            ),
            conditions(),
            columns::definition(),
        ),
        kind(
            &names("coordination.k8s.io", "v1", "Lease", "leases", &[]),
            simple(),
            columns::lease(),
        ),
    ]
}

/// All of them.
pub(crate) fn builtin() -> Vec<Kind> {
    [core(), workloads(), others()].concat()
}

/// Whether a group is served by built-in kinds.
pub(crate) fn is_builtin_group(group: &str) -> bool {
    matches!(
        group,
        "" | "apps"
            | "batch"
            | NETWORK
            | "policy"
            | "autoscaling"
            | RBAC
            | "apiextensions.k8s.io"
            | "coordination.k8s.io"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let kinds = builtin();
        let mut seen = std::collections::BTreeSet::new();
        for kind in &kinds {
            assert!(is_builtin_group(&kind.group), "{}", kind.group);
            assert!(seen.insert(kind.full_name()), "{}", kind.full_name());
            for short in &kind.short_names {
                assert!(seen.insert(short.clone()), "{short}");
            }
        }
    }
}
