//! `get`: lists, objects, and what changes.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::args::GetArgs;
use super::exit::Exit;
use super::format::Format;
use super::kinds::{self, Selection};
use super::output::{Grid, cell};
use super::report::{Failure, Outcome, Report};
use super::session::Session;
use crate::client::{Listing, Request, Resource, WatchEvent, WatchEventKind, encode};

/// Which columns of a server's table are shown.
struct Columns {
    indexes: Vec<usize>,
    headings: Vec<String>,
    namespace: bool,
}

impl Columns {
    fn new(definitions: &[Value], wide: bool, namespace: bool) -> Self {
        let shown = definitions.iter().enumerate().filter(|(_, column)| {
            wide || column.get("priority").and_then(Value::as_i64).unwrap_or(0) == 0
        });
        let (indexes, mut headings): (Vec<usize>, Vec<String>) = shown
            .map(|(index, column)| {
                let name = column.get("name").and_then(Value::as_str);
                (index, name.unwrap_or_default().to_uppercase())
            })
            .unzip();
        if namespace {
            headings.insert(0, "NAMESPACE".to_owned());
        }
        Self {
            indexes,
            headings,
            namespace,
        }
    }

    /// A row without its ages, which change by themselves.
    fn state(&self, row: &Value) -> Vec<String> {
        let cells = self.headings.iter().zip(self.row(row));
        cells
            .filter(|(heading, _)| heading.as_str() != "AGE")
            .map(|(_, cell)| cell)
            .collect()
    }

    fn row(&self, row: &Value) -> Vec<String> {
        let cells = row.get("cells").and_then(Value::as_array);
        let mut texts: Vec<String> = self
            .indexes
            .iter()
            .map(|index| {
                cell(
                    cells
                        .and_then(|cells| cells.get(*index))
                        .unwrap_or(&Value::Null),
                )
            })
            .collect();
        if self.namespace {
            let namespace = row.pointer("/object/metadata/namespace");
            texts.insert(0, cell(namespace.unwrap_or(&Value::Null)));
        }
        texts
    }
}

/// Namespace and name of a row.
fn id_of(row: &Value) -> String {
    let text = |name: &str| {
        let found = row.pointer(&format!("/object/metadata/{name}"));
        found.and_then(Value::as_str).unwrap_or_default()
    };
    format!("{}/{}", text("namespace"), text("name"))
}

fn name_of(item: &Value) -> &str {
    let name = item
        .pointer("/metadata/name")
        .or_else(|| item.pointer("/object/metadata/name"));
    name.and_then(Value::as_str).unwrap_or_default()
}

fn query(arguments: &GetArgs, name: Option<&str>) -> String {
    let mut pairs = Vec::new();
    if let Some(selector) = &arguments.selector {
        pairs.push(format!("labelSelector={}", encode(selector)));
    }
    let by_name = name.map(|name| format!("metadata.name={name}"));
    let fields: Vec<String> = arguments
        .field_selector
        .iter()
        .cloned()
        .chain(by_name)
        .collect();
    if !fields.is_empty() {
        pairs.push(format!("fieldSelector={}", encode(&fields.join(","))));
    }
    if pairs.is_empty() {
        String::new()
    } else {
        format!("?{}", pairs.join("&"))
    }
}

fn collection(
    session: &Session,
    resource: &Resource,
    arguments: &GetArgs,
    name: Option<&str>,
) -> String {
    let namespace = (!arguments.all_namespaces).then_some(session.namespace.as_str());
    format!(
        "{}{}",
        resource.collection(namespace),
        query(arguments, name)
    )
}

/// Runs the command.
///
/// # Errors
/// When something is not there, or no node answers.
pub async fn run(session: &Session, arguments: &GetArgs) -> Outcome {
    let selections = kinds::select(session, &arguments.what).await?;
    if arguments.watch {
        return watch(session, arguments, &selections).await;
    }
    let usage = |text: &str| Failure::from(Report::new(Exit::Usage, "usage", text));
    let named = selections.iter().any(|s| !s.names.is_empty());
    if named && arguments.all_namespaces {
        return Err(usage("a name and all namespaces do not go together"));
    }
    if named && (arguments.selector.is_some() || arguments.field_selector.is_some()) {
        return Err(usage("names and selectors do not go together"));
    }
    if arguments.output.is_table() {
        return tables(session, arguments, &selections).await;
    }
    let mut items = Vec::new();
    let mut failure = None;
    for selection in &selections {
        if selection.names.is_empty() {
            let path = collection(session, &selection.resource, arguments, None);
            let listing = session.client.list(&path, false).await?;
            items.extend(listing.items.into_iter().map(|item| (selection, item)));
        }
        for name in &selection.names {
            let path = selection.resource.object(&session.namespace, name);
            match session.client.get(&path).await {
                Ok(object) => items.push((selection, object)),
                Err(error) if error.is_not_found() => collect(&mut failure, error.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }
    print_objects(session, arguments, &selections, items)?;
    failure.map_or(Ok(()), Err)
}

/// Adds the errors of another object.
fn collect(all: &mut Option<Failure>, failure: Failure) {
    match all {
        Some(all) => all.reports.extend(failure.reports),
        None => *all = Some(failure),
    }
}

fn print_objects(
    session: &Session,
    arguments: &GetArgs,
    selections: &[Selection],
    items: Vec<(&Selection, Value)>,
) -> Outcome {
    if arguments.output == Format::Name {
        let lines: Vec<String> = items
            .iter()
            .map(|(selection, item)| selection.resource.title(name_of(item)))
            .collect();
        return session.ui.out(&lines.join("\n"));
    }
    let mut objects: Vec<Value> = items.into_iter().map(|(_, item)| item).collect();
    let single = matches!(selections, [selection] if selection.names.len() == 1);
    let value = match objects.pop() {
        Some(object) if single => object,
        None if single => return Ok(()),
        last => {
            objects.extend(last);
            json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": objects})
        }
    };
    session.ui.out(&arguments.output.print(&value))
}

async fn tables(session: &Session, arguments: &GetArgs, selections: &[Selection]) -> Outcome {
    let wide = arguments.output == Format::Wide;
    let mut failure = None;
    let mut printed = false;
    for selection in selections {
        let resource = &selection.resource;
        let mut listing = Listing::default();
        if selection.names.is_empty() {
            let path = collection(session, resource, arguments, None);
            listing = session.client.list(&path, true).await?;
        }
        for name in &selection.names {
            let path = resource.object(&session.namespace, name);
            match session.client.list(&path, true).await {
                Ok(one) => {
                    listing.columns = one.columns;
                    listing.served_by = one.served_by;
                    listing.items.extend(one.items);
                }
                Err(error) if error.is_not_found() => collect(&mut failure, error.into()),
                Err(error) => return Err(error.into()),
            }
        }
        if listing.items.is_empty() {
            if selection.names.is_empty() {
                let place = match (resource.namespaced, arguments.all_namespaces) {
                    (true, false) => format!(" in namespace {} (-A: in all)", session.namespace),
                    _ => String::new(),
                };
                session.ui.note(&format!("no {}{place}", resource.name));
            }
            continue;
        }
        let namespace = arguments.all_namespaces && resource.namespaced;
        let columns = Columns::new(&listing.columns, wide, namespace);
        let rows: Vec<Vec<String>> = listing.items.iter().map(|row| columns.row(row)).collect();
        let text = Grid::new(columns.headings).render(&rows, !arguments.no_headers);
        let gap = if printed { "\n" } else { "" };
        session.ui.out(&format!("{gap}{text}"))?;
        printed = true;
        session.footer(listing.served_by.as_deref());
    }
    failure.map_or(Ok(()), Err)
}

async fn watch(session: &Session, arguments: &GetArgs, selections: &[Selection]) -> Outcome {
    let ([selection], true) = (selections, selections.iter().all(|s| s.names.len() <= 1)) else {
        let text = "a watch is of one kind, and at most one name";
        return Err(Report::new(Exit::Usage, "usage", text).into());
    };
    let resource = &selection.resource;
    let name = selection.names.first().map(String::as_str);
    if let Some(name) = name {
        // A name that is not there is an error, as without -w.
        let path = resource.object(&session.namespace, name);
        session.client.send(&Request::get(path)).await?;
    }
    let table = arguments.output.is_table();
    let path = collection(session, resource, arguments, name);
    let (listing, mut watch) = session.client.watch(&path, table).await?;
    let namespace = arguments.all_namespaces && resource.namespaced;
    let wide = arguments.output == Format::Wide;
    let columns = Columns::new(&listing.columns, wide, namespace);
    let mut grid = Grid::new(columns.headings.clone());
    if table {
        let rows: Vec<Vec<String>> = listing.items.iter().map(|row| columns.row(row)).collect();
        session.ui.out(&grid.render(&rows, !arguments.no_headers))?;
    } else {
        for item in &listing.items {
            print_one(session, arguments, resource, item)?;
        }
    }
    let mut shown: BTreeMap<String, Vec<String>> = listing
        .items
        .iter()
        .map(|item| (id_of(item), columns.state(item)))
        .collect();
    loop {
        let WatchEvent { kind, item, .. } = watch.next().await?;
        if table {
            let mut row = columns.row(&item);
            let state = columns.state(&item);
            if kind == WatchEventKind::Deleted {
                shown.remove(&id_of(&item));
            } else if shown.insert(id_of(&item), state.clone()) == Some(state) {
                // What changed is not in the columns shown.
                continue;
            }
            if kind == WatchEventKind::Deleted {
                row.push("(deleted)".to_owned());
            }
            session.ui.out(&grid.render(&[row], false))?;
        } else if kind != WatchEventKind::Deleted {
            print_one(session, arguments, resource, &item)?;
        }
    }
}

fn print_one(session: &Session, arguments: &GetArgs, resource: &Resource, item: &Value) -> Outcome {
    let text = match &arguments.output {
        Format::Name => resource.title(name_of(item)),
        // Documents of a stream.
        Format::Yaml => format!("---\n{}", arguments.output.print(item)),
        Format::Json => item.to_string(),
        other => other.print(item),
    };
    session.ui.out(&text)
}
