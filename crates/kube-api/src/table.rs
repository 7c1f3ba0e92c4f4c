//! Tables (`meta.k8s.io/v1` Table): how `kubectl get` shows a kind.

use jiff::{Timestamp, Unit};
use serde_json::{Value, json};

use crate::kinds::{Column, Kind};

/// What a row carries of its object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    /// Nothing.
    None,
    /// Its metadata.
    Metadata,
    /// All of it.
    Object,
}

/// A table of `objects`, with the metadata of their list; headings only where `headings` (a watch
/// sends them once).
pub fn table(
    kind: &Kind,
    objects: &[Value],
    metadata: Value,
    include: Include,
    headings: bool,
    now: Timestamp,
) -> Value {
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            let mut cells = vec![
                object
                    .pointer("/metadata/name")
                    .cloned()
                    .unwrap_or_default(),
            ];
            cells.extend(kind.columns.iter().map(|column| cell(column, object, now)));
            let mut row = json!({"cells": cells});
            match include {
                Include::None => row["object"] = Value::Null,
                Include::Metadata => {
                    row["object"] = json!({
                        "kind": "PartialObjectMetadata",
                        "apiVersion": "meta.k8s.io/v1",
                        "metadata": object.get("metadata").cloned().unwrap_or_default(),
                    });
                }
                Include::Object => row["object"] = object.clone(),
            }
            row
        })
        .collect();
    let mut definitions = vec![json!({
        "name": "Name", "type": "string", "format": "name", "description": "Name of the object", "priority": 0
    })];
    definitions.extend(kind.columns.iter().map(|column| {
        json!({
            "name": column.name,
            "type": column.kind,
            "format": "",
            "description": column.description,
            "priority": column.priority,
        })
    }));
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": metadata,
        "columnDefinitions": if headings { definitions } else { Vec::new() },
        "rows": rows,
    })
}

/// A table of one object of now.
pub fn of_one(kind: &Kind, object: Value, include: Include) -> Value {
    let metadata = match object.pointer("/metadata/resourceVersion") {
        Some(revision) => json!({"resourceVersion": revision}),
        None => json!({}),
    };
    table(kind, &[object], metadata, include, true, Timestamp::now())
}

fn cell(column: &Column, object: &Value, now: Timestamp) -> Value {
    if let Some(compute) = column.compute {
        return (compute.0)(object);
    }
    let found = lookup(object, &column.json_path);
    if column.kind == "date" {
        let text = found
            .first()
            .and_then(|value| value.as_str().map(ToOwned::to_owned));
        return text
            .and_then(|text| text.parse::<Timestamp>().ok())
            .map_or(Value::Null, |time| age(time, now).into());
    }
    match (column.kind.as_str(), &found[..]) {
        (_, [] | [Value::Null]) => Value::Null,
        ("integer" | "number", [one, ..]) => Some(one.clone())
            .filter(Value::is_number)
            .unwrap_or_default(),
        ("boolean", [one, ..]) => Some(one.clone())
            .filter(Value::is_boolean)
            .unwrap_or_default(),
        (_, many) => many.iter().map(plain).collect::<Vec<_>>().join(",").into(),
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(","),
        other => other.to_string(),
    }
}

/// All values at a path in the notation of `additionalPrinterColumns`: `.a.b[0].c`, `.a\.b`,
/// `.a[*].b`, `.a[?(@.type=="Ready")].status`.
pub fn lookup(object: &Value, path: &str) -> Vec<Value> {
    use jsonpath_rust::JsonPath;
    let query = format!("${}", escape(path));
    object
        .query(&query)
        .map(|found| found.into_iter().cloned().collect())
        .unwrap_or_default()
}

/// Keys with an escaped dot become quoted keys.
fn escape(path: &str) -> String {
    if !path.contains('\\') {
        return path.to_owned();
    }
    let marked = path.replace("\\.", "\u{1}");
    marked
        .split('.')
        .map(|part| {
            if part.contains('\u{1}') {
                format!("['{}']", part.replace('\u{1}', "."))
            } else if part.is_empty() {
                String::new()
            } else {
                format!(".{part}")
            }
        })
        .collect()
}

/// An age as kubectl prints it: `5s`, `3m20s`, `7h`, `2d4h`, `40d`.
pub fn age(time: Timestamp, now: Timestamp) -> String {
    let seconds = now.as_second().saturating_sub(time.as_second()).max(0);
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    if seconds < 120 {
        format!("{seconds}s")
    } else if minutes < 10 && seconds % 60 != 0 {
        format!("{minutes}m{}s", seconds % 60)
    } else if minutes < 180 {
        format!("{minutes}m")
    } else if hours < 8 && minutes % 60 != 0 {
        format!("{hours}h{}m", minutes % 60)
    } else if hours < 48 {
        format!("{hours}h")
    } else if days < 8 && hours % 24 != 0 {
        format!("{days}d{}h", hours % 24)
    } else if days < 730 {
        format!("{days}d")
    } else {
        format!("{}y", days / 365)
    }
}

/// The time in RFC 3339 with whole seconds, as Kubernetes writes it.
pub fn whole_seconds(now: Timestamp) -> String {
    let round = now
        .round(
            jiff::TimestampRound::new()
                .smallest(Unit::Second)
                .mode(jiff::RoundMode::Trunc),
        )
        .unwrap_or(now);
    round.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_find_what_columns_name() {
        let object = json!({"metadata": {"labels": {"a.b/c": "x"}}, "spec": {"list": [{"n": 1}, {"n": 2}]},
            "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "Synced", "status": "False"}]}});
        assert_eq!(lookup(&object, ".spec.list[1].n"), [json!(2)]);
        assert_eq!(lookup(&object, ".spec.list[*].n"), [json!(1), json!(2)]);
        assert_eq!(
            lookup(&object, ".status.conditions[?(@.type==\"Ready\")].status"),
            [json!("True")]
        );
        assert_eq!(lookup(&object, ".metadata.labels.a\\.b/c"), [json!("x")]);
        assert!(lookup(&object, ".nothing.here").is_empty());
    }

    #[test]
    fn ages_read_as_kubectls() {
        let now = Timestamp::from_second(10_000_000).unwrap();
        let ago = |seconds: i64| age(Timestamp::from_second(10_000_000 - seconds).unwrap(), now);
        assert_eq!(ago(5), "5s");
        assert_eq!(ago(200), "3m20s");
        assert_eq!(ago(3600), "60m");
        assert_eq!(ago(4 * 3600 + 60), "4h1m");
        assert_eq!(ago(3 * 86_400 + 7200), "3d2h");
        assert_eq!(ago(40 * 86_400), "40d");
    }
}
