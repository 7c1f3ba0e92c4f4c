//! What two answers must have in common.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::server::Answer;

/// The names that one server made, by the order in which they were first seen: both servers must
/// make the same new ones at the same places.
#[derive(Debug, Default, Clone)]
pub struct Names(BTreeMap<&'static str, Vec<String>>);

impl Names {
    fn number(&mut self, what: &'static str, name: &str) -> Value {
        let seen = self.0.entry(what).or_default();
        let index = seen.iter().position(|own| own == name).unwrap_or_else(|| {
            seen.push(name.to_owned());
            seen.len() - 1
        });
        format!("<{what} {index}>").into()
    }
}

/// An answer without what may differ between two servers.
pub fn normal(answer: &Answer, names: &mut Names) -> Value {
    json!({
        "code": answer.code,
        // The real one warns also of what it refuses.
        "warnings": if answer.code < 400 { answer.warnings.len() } else { 0 },
        "body": normal_body(&answer.body, names),
    })
}

/// A body, or an event of a watch, without what may differ.
fn normal_body(body: &Value, names: &mut Names) -> Value {
    let kind = body.get("kind").and_then(Value::as_str).unwrap_or_default();
    match kind {
        "Status" => normal_status(body, names),
        "Table" => normal_table(body, names),
        _ if body.get("items").is_some_and(Value::is_array) => {
            let items = body["items"].as_array().into_iter().flatten();
            let items: Vec<Value> = items.map(|item| normal_object(item, names)).collect();
            json!({
                "kind": body["kind"],
                "apiVersion": body["apiVersion"],
                "items": items,
                "continue": body.pointer("/metadata/continue").is_some_and(|token| token != ""),
                "remainingItemCount": body.pointer("/metadata/remainingItemCount"),
                // Not every server counts from the same number, or only what the client writes.
                "resourceVersion": body.pointer("/metadata/resourceVersion").is_some(),
            })
        }
        _ if body.is_object() && body.get("type").is_some() && body.get("object").is_some() => {
            json!({"type": body["type"], "object": normal_body(&body["object"], names)})
        }
        _ if body.is_object() => normal_object(body, names),
        // A text is for people.
        _ if body.is_string() => json!("<text>"),
        _ => body.clone(),
    }
}

/// Everything but the sentences.
fn normal_status(status: &Value, names: &mut Names) -> Value {
    let mut normal = status.clone();
    if let Some(map) = normal.as_object_mut() {
        map.remove("message");
    }
    if let Some(details) = normal.get_mut("details").and_then(Value::as_object_mut) {
        if let Some(Value::String(name)) = details.get("name")
            && is_generated(name)
        {
            let name = names.number("name", name);
            details.insert("name".to_owned(), name);
        }
        if let Some(Value::String(uid)) = details.get("uid") {
            let uid = names.number("uid", uid);
            details.insert("uid".to_owned(), uid);
        }
        for cause in details
            .get_mut("causes")
            .and_then(Value::as_array_mut)
            .into_iter()
            .flatten()
        {
            if let Some(cause) = cause.as_object_mut() {
                cause.remove("message");
            }
        }
        if let Some(Value::Array(causes)) = details.get_mut("causes") {
            causes.sort_by_key(ToString::to_string);
            causes.dedup();
        }
    }
    if normal.get("details") == Some(&json!({}))
        && let Some(map) = normal.as_object_mut()
    {
        map.remove("details");
    }
    normal
}

fn normal_table(table: &Value, names: &mut Names) -> Value {
    let mut normal = table.clone();
    if let Some(Value::Object(metadata)) = normal.get_mut("metadata") {
        let known = metadata.contains_key("resourceVersion");
        metadata.insert("resourceVersion".to_owned(), known.into());
        // Each server's own.
        if let Some(token) = metadata.get_mut("continue") {
            *token = "<token>".into();
        }
    }
    if let Some(name) = normal.pointer_mut("/columnDefinitions/0") {
        // The words for it are those of the API's documentation.
        name["description"] = Value::Null;
    }
    let headings: Vec<String> = table["columnDefinitions"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|column| column["name"].as_str().unwrap_or_default().to_owned())
        .collect();
    for row in normal["rows"].as_array_mut().into_iter().flatten() {
        if let Some(object) = row.get_mut("object") {
            *object = normal_object(object, names);
        }
        for (index, cell) in row["cells"]
            .as_array_mut()
            .into_iter()
            .flatten()
            .enumerate()
        {
            if headings.get(index).is_some_and(|name| name == "Age") {
                *cell = "<age>".into();
            } else if index == 0 && cell.as_str().is_some_and(is_generated) {
                *cell = names.number("name", cell.as_str().unwrap_or_default());
            }
        }
    }
    normal
}

fn is_generated(name: &str) -> bool {
    name.starts_with("zz-") || name.starts_with("Not_A_Prefix")
}

fn normal_object(object: &Value, names: &mut Names) -> Value {
    let mut normal = object.clone();
    numbers_by_value(&mut normal);
    let Some(metadata) = normal.get_mut("metadata").and_then(Value::as_object_mut) else {
        return normal;
    };
    for (field, what) in [("uid", "uid"), ("resourceVersion", "revision")] {
        if let Some(Value::String(value)) = metadata.get(field) {
            let value = names.number(what, value);
            metadata.insert(field.to_owned(), value);
        }
    }
    if let Some(Value::String(name)) = metadata.get("name")
        && is_generated(name)
    {
        let name = names.number("name", name);
        metadata.insert("name".to_owned(), name);
    }
    for field in ["creationTimestamp", "deletionTimestamp"] {
        if metadata.get(field).is_some_and(Value::is_string) {
            metadata.insert(field.to_owned(), "<time>".into());
        }
    }
    if let Some(Value::Array(entries)) = metadata.get_mut("managedFields") {
        for entry in entries.iter_mut().filter_map(Value::as_object_mut) {
            entry.remove("time");
        }
        // Among others they are ordered by their times, in which both servers differ.
        entries.sort_by_key(|entry| {
            ["operation", "manager", "subresource"].map(|field| entry[field].to_string())
        });
    }
    normal
}

/// `1.0` and `1` are one number; who writes which is not compared.
fn numbers_by_value(value: &mut Value) {
    match value {
        Value::Number(number) => {
            if let Some(float) = number.as_f64()
                && float.fract() == 0.0
                && float.abs() < 1e15
            {
                *value = json!(float as i64);
            }
        }
        Value::Array(items) => items.iter_mut().for_each(numbers_by_value),
        Value::Object(map) => map.values_mut().for_each(numbers_by_value),
        _ => {}
    }
}

/// Where two normal answers differ first, as a sentence; `None`: they do not.
pub fn differences(real: &Value, own: &Value) -> Option<String> {
    let mut found = Vec::new();
    walk(real, own, "", &mut found);
    (!found.is_empty()).then(|| found.join("\n      "))
}

fn walk(real: &Value, own: &Value, path: &str, found: &mut Vec<String>) {
    match (real, own) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let (a, b) = (a.get(key), b.get(key));
                match (a, b) {
                    (Some(a), Some(b)) => walk(a, b, &format!("{path}/{key}"), found),
                    _ => found.push(one(&format!("{path}/{key}"), a, b)),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                walk(a, b, &format!("{path}/{index}"), found);
            }
        }
        _ if real == own => {}
        _ => found.push(one(path, Some(real), Some(own))),
    }
}

fn one(path: &str, real: Option<&Value>, own: Option<&Value>) -> String {
    let show = |value: Option<&Value>| value.map_or("nothing".to_owned(), ToString::to_string);
    format!("{path}: real {}, kube-api {}", show(real), show(own))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(body: Value) -> Answer {
        Answer {
            code: 200,
            warnings: Vec::new(),
            body,
        }
    }

    fn object(revision: &str, uid: &str, size: i64) -> Value {
        json!({"kind": "X", "metadata": {"name": "a", "resourceVersion": revision, "uid": uid,
            "creationTimestamp": "2026-01-01T00:00:00Z"}, "spec": {"size": size}})
    }

    /// What is found between what two servers answered, one after the other.
    fn compared(real: &[Value], own: &[Value]) -> Option<String> {
        let (mut left, mut right) = (Names::default(), Names::default());
        real.iter().zip(own).find_map(|(real, own)| {
            differences(
                &normal(&answer(real.clone()), &mut left),
                &normal(&answer(own.clone()), &mut right),
            )
        })
    }

    #[test]
    fn what_a_server_makes_up_may_differ_but_not_when_it_changes() {
        let real = [object("7", "u", 1), object("9", "u", 1)];
        assert_eq!(
            compared(&real, &[object("1", "v", 1), object("2", "v", 1)]),
            None
        );
        let same = compared(&real, &[object("1", "v", 1), object("1", "v", 1)]);
        assert!(same.unwrap().contains("resourceVersion"));
        let other = compared(&real, &[object("1", "v", 1), object("2", "w", 1)]);
        assert!(other.unwrap().contains("uid"));
    }

    #[test]
    fn everything_else_must_be_equal() {
        let real = [object("7", "u", 1)];
        let found = compared(&real, &[object("7", "u", 2)]).unwrap();
        assert_eq!(found, "/body/spec/size: real 1, kube-api 2");
        let mut more = object("7", "u", 1);
        more["spec"]["b"] = json!({"c": 1});
        let found = compared(&real, &[more]).unwrap();
        assert_eq!(found, "/body/spec/b: real nothing, kube-api {\"c\":1}");
        let status = |code, reason, message| json!({"kind": "Status", "code": code, "reason": reason, "message": message});
        let refused = [status(409, "Conflict", "a")];
        assert_eq!(compared(&refused, &[status(409, "Conflict", "b")]), None);
        assert!(compared(&refused, &[status(409, "Invalid", "a")]).is_some());
        assert!(compared(&refused, &[status(422, "Conflict", "a")]).is_some());
    }
}
