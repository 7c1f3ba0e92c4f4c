//! Kinds as CustomResourceDefinitions.

use krake_kube_api::Kind;
use serde_json::{Value, json};

/// The definition that makes a real API server serve `kind`.
pub fn definition(kind: &Kind) -> Value {
    let schema = kind
        .schema
        .clone()
        .unwrap_or_else(|| json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}));
    let columns: Vec<Value> = kind
        .columns
        .iter()
        .map(|column| {
            json!({
                "name": column.name,
                "type": column.kind,
                "jsonPath": column.json_path,
                "description": column.description,
                "priority": column.priority,
            })
        })
        .collect();
    let mut version = json!({
        "name": kind.version,
        "served": true,
        "storage": true,
        "schema": {"openAPIV3Schema": schema},
        "additionalPrinterColumns": columns,
    });
    if kind.status {
        version["subresources"] = json!({"status": {}});
    }
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{}.{}", kind.plural, kind.group),
            // Kubernetes wants to have agreed to definitions in its own groups.
            "annotations": {"api-approved.kubernetes.io": "unapproved, a test"},
        },
        "spec": {
            "group": kind.group,
            "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
            "names": {
                "plural": kind.plural,
                "singular": kind.singular,
                "kind": kind.kind,
                "shortNames": kind.short_names,
                "categories": kind.categories,
            },
            "versions": [version],
        },
    })
}
