//! `CustomResourceDefinition`s: the kinds they bring, and what is wrong with one.

use krake_kube_api::{Cause, Column, Kind};
use serde_json::{Value, json};

use super::object::{condition, list, name, next_condition, number, text};

/// Group, kind and short names as CRDs are stored.
pub(crate) const CRDS: (&str, &str) = ("apiextensions.k8s.io", "customresourcedefinitions");

/// The kinds of a definition, one for each version it serves.
pub(crate) fn kinds(definition: &Value) -> Vec<Kind> {
    let names = |field: &str| text(definition, &format!("/spec/names/{field}")).to_owned();
    let words = |field: &str| {
        list(definition, &format!("/spec/names/{field}"))
            .iter()
            .filter_map(Value::as_str)
            .map(ToOwned::to_owned)
            .collect::<Vec<_>>()
    };
    let singular = match names("singular") {
        empty if empty.is_empty() => names("kind").to_ascii_lowercase(),
        given => given,
    };
    let served = list(definition, "/spec/versions")
        .iter()
        .filter(|version| version.get("served").and_then(Value::as_bool) == Some(true));
    served
        .map(|version| Kind {
            group: text(definition, "/spec/group").to_owned(),
            version: text(version, "/name").to_owned(),
            kind: names("kind"),
            plural: names("plural"),
            singular: singular.clone(),
            short_names: words("shortNames"),
            categories: words("categories"),
            namespaced: text(definition, "/spec/scope") == "Namespaced",
            status: version.pointer("/subresources/status").is_some(),
            read_only: false,
            schema: version.pointer("/schema/openAPIV3Schema").cloned(),
            columns: columns(version),
        })
        .collect()
}

fn columns(version: &Value) -> Vec<Column> {
    let given = list(version, "/additionalPrinterColumns");
    if given.is_empty() {
        return super::columns::age_only();
    }
    given
        .iter()
        .map(|column| Column {
            kind: text(column, "/type").to_owned(),
            priority: number(column, "/priority").unwrap_or(0),
            ..Column::new(
                text(column, "/name"),
                text(column, "/jsonPath"),
                text(column, "/description"),
            )
        })
        .collect()
}

/// Everything that is wrong with a definition.
pub(crate) fn check(definition: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let mut wrong = |field: &str, message: String| {
        causes.push(Cause::new(field.to_owned(), message));
    };
    let group = text(definition, "/spec/group");
    let wanted = format!("{}.{group}", text(definition, "/spec/names/plural"));
    if name(definition) != wanted {
        wrong(
            "metadata.name",
            format!("must be spec.names.plural+\".\"+spec.group: {wanted}"),
        );
    }
    if super::kinds::is_builtin_group(group) {
        wrong("spec.group", format!("{group} is built in"));
    }
    if !matches!(text(definition, "/spec/scope"), "Namespaced" | "Cluster") {
        wrong("spec.scope", "must be Namespaced or Cluster".to_owned());
    }
    let versions = list(definition, "/spec/versions");
    let stored = versions
        .iter()
        .filter(|version| version.get("storage").and_then(Value::as_bool) == Some(true));
    if stored.count() != 1 {
        wrong(
            "spec.versions",
            "must have exactly one version marked as storage version".to_owned(),
        );
    }
    for (index, version) in versions.iter().enumerate() {
        if text(version, "/schema/openAPIV3Schema/type") != "object" {
            wrong(
                &format!("spec.versions[{index}].schema.openAPIV3Schema"),
                "schemas are required, and their root is of type object".to_owned(),
            );
        }
        if version.pointer("/subresources/scale").is_some() {
            wrong(
                &format!("spec.versions[{index}].subresources.scale"),
                "the embedded cluster has no scale subresource".to_owned(),
            );
        }
    }
    if text(definition, "/spec/conversion/strategy") == "Webhook" {
        wrong(
            "spec.conversion.strategy",
            "the embedded cluster calls no webhooks".to_owned(),
        );
    }
    causes
}

/// A definition's status when its kinds are served; `None` when it says so already.
pub(crate) fn established(definition: &Value, now: &str) -> Option<Value> {
    let named = condition(definition, "NamesAccepted").is_some();
    let spec_names = definition.pointer("/spec/names").cloned()?;
    if named && definition.pointer("/status/acceptedNames") == Some(&spec_names) {
        return None;
    }
    let storage = list(definition, "/spec/versions")
        .iter()
        .find(|version| version.get("storage").and_then(Value::as_bool) == Some(true))
        .map(|version| text(version, "/name").to_owned());
    Some(json!({
        "conditions": [
            next_condition(definition, "NamesAccepted", true, "NoConflicts", "no conflicts found", now),
            next_condition(definition, "Established", true, "InitialNamesAccepted",
                "the initial names have been accepted", now),
        ],
        "acceptedNames": spec_names,
        "storedVersions": storage.into_iter().collect::<Vec<_>>(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn definition() -> Value {
        json!({"metadata": {"name": "widgets.example.org"}, "spec": {"group": "example.org", "scope": "Namespaced",
            "names": {"plural": "widgets", "kind": "Widget", "shortNames": ["wi"]},
            "versions": [
                {"name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": {"type": "object"}}},
                {"name": "v0", "served": false, "storage": false, "schema": {"openAPIV3Schema": {"type": "object"}}}]}})
    }

    #[test]
    fn served_versions_become_kinds() {
        let kinds = kinds(&definition());
        assert_eq!(kinds.len(), 1);
        assert_eq!(kinds[0].full_name(), "example.org/v1/Widget");
        assert_eq!(kinds[0].singular, "widget");
        assert!(kinds[0].namespaced && kinds[0].status);
    }

    #[test]
    fn an_accepted_definition_is_left_alone() {
        let mut definition = definition();
        definition["status"] = established(&definition, "now").unwrap();
        assert_eq!(established(&definition, "later"), None);
        definition["spec"]["names"]["shortNames"] = json!(["wg"]);
        assert!(established(&definition, "later").is_some());
    }

    #[test]
    fn what_is_wrong_is_named() {
        assert!(check(&definition()).is_empty());
        let mut bad = definition();
        bad["metadata"]["name"] = "x".into();
        bad["spec"]["group"] = "apps".into();
        bad["spec"]["versions"][0]["storage"] = false.into();
        let fields: Vec<String> = check(&bad).into_iter().map(|cause| cause.field).collect();
        assert_eq!(fields, ["metadata.name", "spec.group", "spec.versions"]);
    }
}
