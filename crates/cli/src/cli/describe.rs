//! `describe`: everything about one object, whatever its kind.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::args::DescribeArgs;
use super::kinds;
use super::output::{cell, grid};
use super::report::Outcome;
use super::session::Session;
use crate::client::{Resource, encode};

/// Column at which values of the top level stand.
const INDENT: usize = 2;
/// A map of at most this many scalars is shown as a row of a table.
const COLUMNS_MAX: usize = 10;

fn heading(key: &str) -> String {
    let mut text = String::new();
    for (index, c) in key.chars().enumerate() {
        if index == 0 {
            text.extend(c.to_uppercase());
        } else if c.is_ascii_uppercase() {
            text.push(' ');
            text.push(c.to_ascii_lowercase());
        } else {
            text.push(c);
        }
    }
    text
}

fn is_scalar(value: &Value) -> bool {
    !value.is_object() && !value.is_array()
}

fn scalar(value: &Value) -> String {
    match value {
        Value::Object(map) if map.is_empty() => "-".to_owned(),
        Value::Array(items) if items.is_empty() => "-".to_owned(),
        Value::Object(map) => {
            let parts: Vec<String> = map
                .iter()
                .map(|(k, v)| format!("{k}={}", scalar(v)))
                .collect();
            parts.join(" ")
        }
        Value::Array(items) => {
            let parts: Vec<String> = items.iter().map(scalar).collect();
            parts.join(",")
        }
        other => cell(other),
    }
}

/// Objects of a list as `Kind/name`: manifests are long, and `get -o yaml` shows them.
fn titles(items: &[Value]) -> Option<Vec<String>> {
    items
        .iter()
        .map(|item| {
            let kind = item.get("kind")?.as_str()?;
            let name = item.pointer("/metadata/name")?.as_str()?;
            Some(format!("{kind}/{name}"))
        })
        .collect()
}

/// A list of small maps as a table.
fn table(items: &[Value], pad: &str) -> Option<String> {
    let maps: Vec<&Map<String, Value>> =
        items.iter().map(Value::as_object).collect::<Option<_>>()?;
    let keys: BTreeSet<&String> = maps.iter().flat_map(|map| map.keys()).collect();
    let small = keys.len() <= COLUMNS_MAX
        && maps.iter().all(|map| {
            map.values().all(|value| {
                is_scalar(value) || value.as_object().is_some_and(|m| m.values().all(is_scalar))
            })
        });
    if !small || keys.is_empty() {
        return None;
    }
    // What says which row it is comes first, long texts last.
    let rank = |key: &str| match key {
        "type" | "name" | "site" => 0,
        "status" | "state" | "role" | "outcome" => 1,
        "reason" => 3,
        "message" => 4,
        _ => 2,
    };
    let mut keys: Vec<&String> = keys.into_iter().collect();
    keys.sort_by_key(|key| (rank(key), (*key).clone()));
    let headings: Vec<String> = keys
        .iter()
        .enumerate()
        .map(|(index, key)| {
            let text = heading(key).to_uppercase();
            if index == 0 {
                format!("{pad}{text}")
            } else {
                text
            }
        })
        .collect();
    let rows: Vec<Vec<String>> = maps
        .iter()
        .map(|map| {
            keys.iter()
                .enumerate()
                .map(|(index, key)| {
                    let text = map.get(*key).map_or_else(|| "-".to_owned(), scalar);
                    if index == 0 {
                        format!("{pad}{text}")
                    } else {
                        text
                    }
                })
                .collect()
        })
        .collect();
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    Some(grid(&headings, &rows))
}

fn write_value(out: &mut String, key: &str, value: &Value, depth: usize) {
    let label = format!("{}{}:", " ".repeat(depth * INDENT), heading(key));
    write_under(out, &label, key, value, depth);
}

fn write_under(out: &mut String, label: &str, key: &str, value: &Value, depth: usize) {
    let pad = " ".repeat(depth * INDENT);
    match value {
        Value::Object(map) if !map.is_empty() => {
            let _ = writeln!(out, "{label}");
            let names = matches!(
                key,
                "labels" | "annotations" | "weights" | "metrics" | "backends"
            );
            let chosen = |key: &str| {
                let small = key.chars().next().is_some_and(|c| c.is_ascii_lowercase());
                !small || key.contains(['/', '.', '-'])
            };
            for (key, value) in map {
                // Names that people chose stay as they are.
                if is_scalar(value) && (names || chosen(key)) {
                    let _ = writeln!(out, "{pad}  {key}: {}", scalar(value));
                } else if names {
                    write_under(out, &format!("{pad}  {key}:"), key, value, depth + 1);
                } else {
                    write_value(out, key, value, depth + 1);
                }
            }
        }
        Value::Array(items) if !items.is_empty() => {
            let inner = " ".repeat((depth + 1) * INDENT);
            let _ = writeln!(out, "{label}");
            if let Some(titles) = titles(items) {
                for title in titles {
                    let _ = writeln!(out, "{inner}{title}");
                }
            } else if let Some(table) = table(items, &inner) {
                out.push_str(&table);
            } else {
                for item in items {
                    match item {
                        Value::Object(map) => {
                            let _ = writeln!(out, "{inner}-");
                            for (key, value) in map {
                                write_value(out, key, value, depth + 2);
                            }
                        }
                        other => {
                            let _ = writeln!(out, "{inner}{}", scalar(other));
                        }
                    }
                }
            }
        }
        other => {
            let _ = writeln!(out, "{label:<16} {}", scalar(other));
        }
    }
}

/// An object and its events.
pub fn text(object: &Value, events: &[Value]) -> String {
    let mut out = String::new();
    let pick = |pointer: &str| object.pointer(pointer).cloned().unwrap_or_default();
    for (key, pointer) in [
        ("name", "/metadata/name"),
        ("namespace", "/metadata/namespace"),
        ("kind", "/kind"),
        ("uid", "/metadata/uid"),
        ("created", "/metadata/creationTimestamp"),
        ("deleting", "/metadata/deletionTimestamp"),
        ("generation", "/metadata/generation"),
    ] {
        let value = pick(pointer);
        if !value.is_null() {
            write_value(&mut out, key, &value, 0);
        }
    }
    for key in ["labels", "annotations"] {
        let Value::Object(map) = pick(&format!("/metadata/{key}")) else {
            continue;
        };
        let _ = writeln!(out, "{}:", heading(key));
        for (name, value) in map {
            let _ = writeln!(out, "  {name}: {}", scalar(&value));
        }
    }
    for (key, value) in object.as_object().into_iter().flatten() {
        if !matches!(key.as_str(), "metadata" | "kind" | "apiVersion") {
            write_value(&mut out, key, value, 0);
        }
    }
    if events.is_empty() {
        out.push_str("Events:          -\n");
        return out;
    }
    let field = |event: &Value, name: &str| cell(event.get(name).unwrap_or(&Value::Null));
    let mut rows: Vec<Vec<String>> = events
        .iter()
        .map(|event| {
            vec![
                format!("  {}", field(event, "lastTimestamp")),
                field(event, "type"),
                field(event, "reason"),
                field(event, "message"),
            ]
        })
        .collect();
    rows.sort();
    out.push_str("Events:\n");
    out.push_str(&grid(&["  LAST SEEN", "TYPE", "REASON", "MESSAGE"], &rows));
    out
}

async fn events(session: &Session, resource: &Resource, object: &Value) -> Outcome<Vec<Value>> {
    let name = object.pointer("/metadata/name").and_then(Value::as_str);
    let namespace = object
        .pointer("/metadata/namespace")
        .and_then(Value::as_str);
    let selector = format!(
        "involvedObject.name={},involvedObject.kind={}",
        name.unwrap_or_default(),
        resource.kind
    );
    let path = format!(
        "/apis/krake.dev/v1/namespaces/{}/events?fieldSelector={}",
        encode(namespace.unwrap_or("default")),
        encode(&selector)
    );
    Ok(session.client.list(&path, false).await?.items)
}

/// Runs the command.
///
/// # Errors
/// When an object is not there, or no node answers.
pub async fn run(session: &Session, arguments: &DescribeArgs) -> Outcome {
    let mut first = true;
    for selection in kinds::select_named(session, &arguments.what).await? {
        for name in &selection.names {
            let path = selection.resource.object(&session.namespace, name);
            let object = session.client.get(&path).await?;
            let events = events(session, &selection.resource, &object).await?;
            let gap = if std::mem::take(&mut first) { "" } else { "\n" };
            session
                .ui
                .out(&format!("{gap}{}", text(&object, &events)))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_application_is_described() {
        let object = json!({
            "apiVersion": "krake.dev/v1", "kind": "Application",
            "metadata": {"name": "shop", "namespace": "default", "uid": "u-1", "creationTimestamp": "2026-01-01T00:00:00Z",
                "labels": {"team": "web"}, "managedFields": [{"manager": "krakectl"}]},
            "spec": {"source": {"manifests": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v"}}]},
                "placement": {"require": ["country = DE"], "weights": {"carbon": 1.0}}},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True", "reason": "Running", "message": "all is well"}],
                "copies": [{"site": "dresden", "ready": "2/2", "role": "active", "epoch": {"term": 1, "index": 7}}]},
        });
        let events = [
            json!({"lastTimestamp": "2026-01-01T00:00:05Z", "type": "Normal", "reason": "Placed", "message": "at dresden"}),
        ];
        insta::assert_snapshot!(text(&object, &events));
    }
}
