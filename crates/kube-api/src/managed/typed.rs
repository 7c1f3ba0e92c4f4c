//! Values compared and merged field by field, as their schema says.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::fields::{Fields, Path, inner, is_named_field};
use crate::schema;

/// As what a value is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Map,
    Scalar,
    List,
}

/// By its schema; where that leaves it open, by itself.
fn shape(schema: Option<&Value>, value: &Value) -> Shape {
    let kind = schema.and_then(|schema| schema.get("type")?.as_str());
    match (kind, value) {
        (Some("object"), _) | (None, Value::Object(_)) => Shape::Map,
        (Some("array"), _) | (None, Value::Array(_)) => Shape::List,
        (None, Value::Null) => Shape::Map,
        _ => Shape::Scalar,
    }
}

fn map_of(value: Option<&Value>) -> Option<&Map<String, Value>> {
    value.and_then(Value::as_object)
}

fn items_of(value: Option<&Value>) -> &[Value] {
    value.and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn keys_of(left: Option<&Value>, right: Option<&Value>) -> BTreeSet<String> {
    let keys = |value| map_of(value).into_iter().flat_map(Map::keys).cloned();
    keys(left).chain(keys(right)).collect()
}

/// Whether two values of this shape are compared and merged as a whole. Empty ones are: otherwise
/// empty and null would be the same.
fn is_leaf(
    schema: Option<&Value>,
    shape: Shape,
    left: Option<&Value>,
    right: Option<&Value>,
) -> bool {
    let is_empty = |value| match shape {
        Shape::Map => map_of(value).is_none_or(Map::is_empty),
        Shape::List => items_of(value).is_empty(),
        Shape::Scalar => true,
    };
    let is_atomic = match shape {
        Shape::Map => schema.is_some_and(schema::is_atomic_map),
        Shape::List => !schema.is_some_and(schema::merges_items),
        Shape::Scalar => true,
    };
    is_atomic || (is_empty(left) && is_empty(right))
}

/// The fields that an applied object has.
pub(super) fn fields_of(schema: Option<&Value>, value: &Value) -> Fields {
    let mut fields = BTreeSet::new();
    collect(schema, value, &mut Vec::new(), &mut fields);
    Fields(fields)
}

fn collect(schema: Option<&Value>, value: &Value, path: &mut Path, into: &mut BTreeSet<Path>) {
    match shape(schema, value) {
        Shape::Map if !schema.is_some_and(schema::is_atomic_map) => {
            for (key, value) in value.as_object().into_iter().flatten() {
                let element = format!("f:{key}");
                let inner = inner(schema, path, &element);
                let is_named = is_named_field(schema, path, key);
                path.push(element);
                collect(inner, value, path, into);
                let is_empty = value.as_object().is_some_and(Map::is_empty);
                if value.is_null() || is_empty || !is_named {
                    into.insert(path.clone());
                }
                path.pop();
            }
        }
        Shape::List if schema.is_some_and(schema::merges_items) => {
            let items = items_of(Some(value));
            let names: Vec<String> = items.iter().map(|item| element(schema, item)).collect();
            let inner = schema.and_then(|schema| schema.get("items"));
            for (item, name) in items.iter().zip(&names) {
                path.push(name.clone());
                // What is there twice has no fields of its own.
                if names.iter().filter(|other| *other == name).count() == 1 {
                    collect(inner, item, path, into);
                }
                into.insert(path.clone());
                path.pop();
            }
        }
        _ => {
            into.insert(path.clone());
        }
    }
}

/// How an item of a list that merges is named in a path.
fn element(schema: Option<&Value>, item: &Value) -> String {
    let keys = schema.map(schema::list_keys).unwrap_or_default();
    if keys.is_empty() || !item.is_object() {
        return format!("v:{item}");
    }
    let named: BTreeMap<&str, &Value> = keys
        .into_iter()
        .filter_map(|key| {
            let default = || {
                let pointer = format!("/items/properties/{key}/default");
                schema.and_then(|schema| schema.pointer(&pointer))
            };
            Some((key, item.get(key).or_else(default)?))
        })
        .collect();
    format!("k:{}", json!(named))
}

/// What changed between two objects.
#[derive(Debug, Default)]
pub(super) struct Comparison {
    pub(super) added: BTreeSet<Path>,
    pub(super) modified: BTreeSet<Path>,
    pub(super) removed: BTreeSet<Path>,
}

impl Comparison {
    pub(super) fn of(schema: Option<&Value>, old: Option<&Value>, new: &Value) -> Self {
        let mut comparison = Self::default();
        let empty = json!({});
        let old = old.unwrap_or(&empty);
        comparison.compare(schema, Some(old), Some(new), &mut Vec::new());
        comparison
    }

    pub(super) fn is_empty(&self) -> bool {
        self.added.is_empty() && self.modified.is_empty() && self.removed.is_empty()
    }

    fn compare(
        &mut self,
        schema: Option<&Value>,
        old: Option<&Value>,
        new: Option<&Value>,
        path: &mut Path,
    ) {
        let shapes = (
            old.map(|value| shape(schema, value)),
            new.map(|value| shape(schema, value)),
        );
        let was_leaf = match shapes {
            (None, None) => return,
            (Some(shape), None) => self.compare_as(shape, schema, old, new, path),
            (Some(before), Some(after)) if before != after => {
                self.compare_as(before, schema, old, new, path);
                self.compare_as(after, schema, old, new, path)
            }
            (_, Some(shape)) => self.compare_as(shape, schema, old, new, path),
        };
        if !was_leaf {
            match (old, new) {
                (None, _) => self.added.insert(path.clone()),
                (_, None) => self.removed.insert(path.clone()),
                _ => false,
            };
        }
    }

    /// Compares as values of one shape; says whether as a whole.
    fn compare_as(
        &mut self,
        shape: Shape,
        schema: Option<&Value>,
        old: Option<&Value>,
        new: Option<&Value>,
        path: &mut Path,
    ) -> bool {
        if is_leaf(schema, shape, old, new) {
            match (old, new) {
                (None, _) => self.added.insert(path.clone()),
                (_, None) => self.removed.insert(path.clone()),
                _ => old != new && self.modified.insert(path.clone()),
            };
            return true;
        }
        if shape == Shape::List {
            self.compare_items(schema, items_of(old), items_of(new), path);
            return false;
        }
        for key in keys_of(old, new) {
            let element = format!("f:{key}");
            let inner = inner(schema, path, &element);
            let of = |value| map_of(value).and_then(|map| map.get(&key));
            path.push(element);
            self.compare(inner, of(old), of(new), path);
            path.pop();
        }
        false
    }

    fn compare_items(
        &mut self,
        schema: Option<&Value>,
        old: &[Value],
        new: &[Value],
        path: &mut Path,
    ) {
        let inner = schema.and_then(|schema| schema.get("items"));
        let mut named: BTreeMap<String, [Vec<&Value>; 2]> = BTreeMap::new();
        for (side, items) in [old, new].into_iter().enumerate() {
            for item in items {
                named.entry(element(schema, item)).or_default()[side].push(item);
            }
        }
        for (name, [old, new]) in named {
            path.push(name);
            match (&old[..], &new[..]) {
                ([] | [_], [] | [_]) => {
                    self.compare(inner, old.first().copied(), new.first().copied(), path);
                }
                // What is there twice is compared as a whole.
                ([], _) => {
                    self.added.insert(path.clone());
                }
                (_, []) => {
                    self.removed.insert(path.clone());
                }
                _ if old != new => {
                    self.modified.insert(path.clone());
                }
                _ => {}
            }
            path.pop();
        }
    }
}

/// `old` with what `new` has over it.
pub(super) fn merge(
    schema: Option<&Value>,
    old: Option<&Value>,
    new: Option<&Value>,
    path: &mut Path,
) -> Option<Value> {
    let value = new.or(old)?;
    let shape = shape(schema, value);
    if is_leaf(schema, shape, old, new) {
        return Some(value.clone());
    }
    if shape == Shape::List {
        let items = merge_items(schema, items_of(old), items_of(new), path);
        return (!items.is_empty()).then(|| items.into());
    }
    let mut map = Map::new();
    for key in keys_of(old, new) {
        let element = format!("f:{key}");
        let inner = inner(schema, path, &element);
        let of = |value| map_of(value).and_then(|map| map.get(&key));
        path.push(element);
        let merged = merge(inner, of(old), of(new), path);
        path.pop();
        if let Some(value) = merged {
            map.insert(key, value);
        }
    }
    (!map.is_empty()).then(|| map.into())
}

/// Items in the applied order; those that only the old list has stay where they were among them.
fn merge_items(
    schema: Option<&Value>,
    old: &[Value],
    new: &[Value],
    path: &mut Path,
) -> Vec<Value> {
    let inner = schema.and_then(|schema| schema.get("items"));
    let named = |items: &[Value]| -> Vec<String> {
        items.iter().map(|item| element(schema, item)).collect()
    };
    let (old_names, new_names) = (named(old), named(new));
    // Of what is there twice nothing can be merged.
    let before = |name: &String| {
        let mut found = old_names.iter().zip(old).filter(|(own, _)| *own == name);
        match (found.next(), found.next()) {
            (Some((_, item)), None) => Some(item),
            _ => None,
        }
    };
    let mut shared = new_names.iter().filter(|name| old_names.contains(name));
    let mut next_shared = shared.next();
    let mut taken: BTreeSet<&String> = BTreeSet::new();
    let mut merged = Vec::with_capacity(old.len().max(new.len()));
    let mut add = |old: Option<&Value>, new: Option<&Value>, name: &String| {
        path.push(name.clone());
        merged.extend(merge(inner, old, new, path));
        path.pop();
    };
    let (mut left, mut right) = (0, 0);
    while left < old.len() || right < new.len() {
        if let (Some(name), Some(wanted)) = (old_names.get(left), new_names.get(right)) {
            if name == wanted {
                taken.insert(name);
                add(before(name), Some(&new[right]), name);
                (left, right) = (left + 1, right + 1);
                next_shared = shared.next();
                continue;
            }
            if new_names.contains(name) && next_shared.is_some_and(|next| next != name) {
                // Its turn comes later.
                left += 1;
                continue;
            }
        }
        if let Some(name) = old_names.get(left) {
            if !new_names.contains(name) {
                add(Some(&old[left]), None, name);
                left += 1;
                continue;
            }
            if taken.contains(name) {
                left += 1;
            }
        }
        if let Some(name) = new_names.get(right) {
            taken.insert(name);
            add(before(name), Some(&new[right]), name);
            right += 1;
            if next_shared == Some(name) {
                next_shared = shared.next();
            }
        }
    }
    merged
}

/// `value` without the fields in `gone`; null when nothing is left.
pub(super) fn without(
    schema: Option<&Value>,
    value: &Value,
    gone: &Fields,
    path: &mut Path,
) -> Value {
    let shape = shape(schema, value);
    if shape == Shape::Scalar {
        return value.clone();
    }
    // An atomic one goes as a whole, with what names something in it.
    if is_leaf(schema, shape, Some(value), None) {
        return Value::Null;
    }
    if shape == Shape::List {
        let inner = schema.and_then(|schema| schema.get("items"));
        let items: Vec<Value> = items_of(Some(value))
            .iter()
            .filter_map(|item| kept(inner, item, element(schema, item), gone, path))
            .collect();
        return if items.is_empty() {
            Value::Null
        } else {
            items.into()
        };
    }
    let mut map = Map::new();
    for (key, value) in map_of(Some(value)).into_iter().flatten() {
        let element = format!("f:{key}");
        let inner = inner(schema, path, &element);
        if let Some(value) = kept(inner, value, element, gone, path) {
            map.insert(key.clone(), value);
        }
    }
    if map.is_empty() {
        Value::Null
    } else {
        map.into()
    }
}

/// What remains of the value at an element below `path`; `None`: it goes.
fn kept(
    schema: Option<&Value>,
    value: &Value,
    element: String,
    gone: &Fields,
    path: &mut Path,
) -> Option<Value> {
    path.push(element);
    let kept = if gone.0.contains(path) {
        None
    } else if gone.has_below(path) {
        Some(without(schema, value, gone, path))
    } else {
        Some(value.clone())
    };
    path.pop();
    kept
}
