//! What clients ask first: which groups and kinds there are, and their schemas.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::kinds::{Kind, Registry};

/// `GET /api`
pub fn core_versions(registry: &Registry) -> Value {
    let versions: BTreeSet<String> = registry
        .all()
        .iter()
        .filter(|kind| kind.group.is_empty())
        .map(|kind| kind.version.clone())
        .collect();
    json!({"kind": "APIVersions", "versions": versions, "serverAddressByClientCIDRs": []})
}

/// `GET /apis`
pub fn groups(registry: &Registry) -> Value {
    let names: BTreeSet<String> = registry
        .all()
        .iter()
        .filter(|kind| !kind.group.is_empty())
        .map(|kind| kind.group.clone())
        .collect();
    let groups: Vec<Value> = names
        .iter()
        .filter_map(|name| group(registry, name))
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// `GET /apis/{group}`
pub fn group(registry: &Registry, name: &str) -> Option<Value> {
    let versions: BTreeSet<String> = registry
        .all()
        .iter()
        .filter(|kind| kind.group == name && !name.is_empty())
        .map(|kind| kind.version.clone())
        .collect();
    // Newer versions sort after older ones; v2 is preferred over v1, v1 over v1beta1.
    let mut ordered: Vec<String> = versions.into_iter().collect();
    ordered.sort_by_key(|version| {
        (
            version.contains("alpha"),
            version.contains("beta"),
            std::cmp::Reverse(version.clone()),
        )
    });
    let list: Vec<Value> = ordered
        .iter()
        .map(|version| json!({"groupVersion": format!("{name}/{version}"), "version": version}))
        .collect();
    let preferred = list.first()?.clone();
    Some(json!({
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": name,
        "versions": list,
        "preferredVersion": preferred,
    }))
}

/// `GET /api/v1` and `GET /apis/{group}/{version}`
pub fn resources(registry: &Registry, group: &str, version: &str) -> Option<Value> {
    let kinds: Vec<_> = registry
        .all()
        .into_iter()
        .filter(|kind| kind.group == group && kind.version == version)
        .collect();
    let first = kinds.first()?;
    let mut list = Vec::new();
    for kind in &kinds {
        list.push(json!({
            "name": kind.plural,
            "singularName": kind.singular,
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": kind.verbs(),
            "shortNames": kind.short_names,
            "categories": kind.categories,
        }));
        if kind.status {
            list.push(json!({
                "name": format!("{}/status", kind.plural),
                "singularName": "",
                "namespaced": kind.namespaced,
                "kind": kind.kind,
                "verbs": if kind.read_only { vec!["get"] } else { vec!["get", "patch", "update"] },
            }));
        }
    }
    Some(json!({
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": first.api_version(),
        "resources": list,
    }))
}

fn path_of(kind: &Kind) -> String {
    if kind.group.is_empty() {
        format!("/api/{}", kind.version)
    } else {
        format!("/apis/{}/{}", kind.group, kind.version)
    }
}

/// `GET /openapi/v3`
pub fn openapi_index(registry: &Registry) -> Value {
    let mut paths = BTreeMap::new();
    for kind in registry.all() {
        let path = path_of(&kind);
        let document = openapi_document(registry, &kind.group, &kind.version);
        let hash = blake3::hash(document.to_string().as_bytes()).to_hex();
        paths.insert(
            path.trim_start_matches('/').to_owned(),
            json!({"serverRelativeURL": format!("/openapi/v3{path}?hash={}", &hash[..32])}),
        );
    }
    json!({"paths": paths})
}

/// `GET /openapi/v3/apis/{group}/{version}`: schemas, and enough of the paths for kubectl's
/// `explain` and its check whether the server validates fields.
pub fn openapi_document(registry: &Registry, group: &str, version: &str) -> Value {
    let mut schemas = BTreeMap::new();
    let mut paths = BTreeMap::new();
    for kind in registry.all() {
        if kind.group != group || kind.version != version {
            continue;
        }
        let gvk = json!({"group": kind.group, "version": kind.version, "kind": kind.kind});
        let name = schema_name(&kind);
        let mut schema = kind.schema.clone().unwrap_or_else(
            || json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}),
        );
        if schema.get("properties").is_some() {
            for (field, text) in [
                ("apiVersion", "The version of the schema of this object."),
                ("kind", "What this object is."),
            ] {
                schema["properties"][field] = json!({"type": "string", "description": text});
            }
            schema["properties"]["metadata"] =
                json!({"type": "object", "description": "Standard object metadata."});
        }
        schema["x-kubernetes-group-version-kind"] = json!([gvk]);
        schemas.insert(name.clone(), schema);
        let content = json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{name}")}}});
        let operation = |action: &str| {
            json!({
                "x-kubernetes-action": action,
                "x-kubernetes-group-version-kind": gvk,
                "parameters": [
                    {"name": "dryRun", "in": "query", "schema": {"type": "string"}},
                    {"name": "fieldManager", "in": "query", "schema": {"type": "string"}},
                    {"name": "fieldValidation", "in": "query", "schema": {"type": "string"}},
                ],
                "responses": {"200": {"description": "OK", "content": content}},
            })
        };
        let base = if kind.namespaced {
            format!(
                "{}/namespaces/{{namespace}}/{}",
                path_of(&kind),
                kind.plural
            )
        } else {
            format!("{}/{}", path_of(&kind), kind.plural)
        };
        paths.insert(
            base.clone(),
            json!({"get": operation("list"), "post": operation("post")}),
        );
        paths.insert(
            format!("{base}/{{name}}"),
            json!({"get": operation("get"), "put": operation("put"), "patch": operation("patch"), "delete": operation("delete")}),
        );
    }
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Krake", "version": version},
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

fn schema_name(kind: &Kind) -> String {
    let mut parts: Vec<&str> = kind.group.split('.').filter(|p| !p.is_empty()).collect();
    parts.reverse();
    parts.push(&kind.version);
    parts.push(&kind.kind);
    parts.join(".")
}
