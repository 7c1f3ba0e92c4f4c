//! What can be said of a manifest before any node is asked: every error, each with its place.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use krake_model::metric::{Direction, MetricDefinition, default_definitions};
use krake_model::{ApplicationSpec, metric};
use krake_placement::constraint;
use krake_placement::spec::{Defaults, FieldError, validate};
use serde_json::Value;

use super::load::Document;
use super::yaml::{Node, Tree};
use crate::cli::exit::Exit;
use crate::cli::report::{Report, closest};
use crate::client::FieldCause;

/// An application has at most this many bytes as JSON.
const APPLICATION_BYTES_MAX: usize = 512 * 1024;

/// What a field holds.
#[derive(Debug)]
enum Shape {
    Text,
    Number,
    Bool,
    Texts,
    /// A map of any name to a number.
    Numbers,
    Choice(&'static [&'static str]),
    /// Kubernetes objects.
    Objects,
    /// A map with these fields.
    Fields(&'static [(&'static str, Shape)]),
}

use Shape::{Bool, Choice, Fields, Number, Numbers, Objects, Text, Texts};

/// `spec` of an Application; a test holds it against the model.
const SPEC: Shape = Fields(&[
    ("source", Fields(&[("manifests", Objects)])),
    (
        "placement",
        Fields(&[
            ("require", Texts),
            ("weights", Numbers),
            ("stickiness", Number),
            ("maxMetricAge", Text),
            (
                "reschedule",
                Fields(&[("interval", Text), ("holdFor", Text)]),
            ),
        ]),
    ),
    (
        "migration",
        Fields(&[
            ("enabled", Bool),
            ("strategy", Choice(&["surge", "recreate"])),
            ("readyTimeout", Text),
        ]),
    ),
    (
        "failover",
        Fields(&[
            ("detectAfter", Text),
            ("mode", Choice(&["prompt", "never"])),
        ]),
    ),
]);

/// Fields of `metadata` (Kubernetes' `ObjectMeta`) that people set.
const METADATA: [&str; 7] = [
    "name",
    "namespace",
    "labels",
    "annotations",
    "generateName",
    "finalizers",
    "ownerReferences",
];

/// Fields of `metadata` that servers set.
const SERVER_METADATA: [&str; 8] = [
    "managedFields",
    "uid",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
    "resourceVersion",
    "selfLink",
];

/// A node takes no longer names, and a path with one could not even be asked for.
const NAME_BYTES_MAX: usize = 253;

/// Unknown fields and wrong types that are looked up in the text; the rest is only counted.
const FINDINGS_MAX: usize = 20;

/// Top level fields of every object.
const TOP: [&str; 5] = ["apiVersion", "kind", "metadata", "spec", "status"];

/// Where in a document an error is.
#[derive(Debug)]
enum Place {
    /// At the key of a field of `path`.
    Key(String),
    /// At the value.
    Value,
}

#[derive(Debug)]
struct Finding {
    slug: &'static str,
    path: String,
    place: Place,
    message: String,
    label: String,
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

fn unknown(path: &str, key: &str, known: &[&str]) -> Finding {
    let label = match closest(key, known.iter().copied()) {
        Some(close) => format!("did you mean `{close}`?"),
        None => format!("known here: {}", known.join(", ")),
    };
    Finding {
        slug: "unknown-field",
        path: path.to_owned(),
        place: Place::Key(key.to_owned()),
        message: format!("unknown field `{}`", join(path, key)),
        label,
    }
}

fn wrong_type(path: &str, wanted: &str) -> Finding {
    Finding {
        slug: "wrong-type",
        path: path.to_owned(),
        place: Place::Value,
        message: format!("`{path}` must be {wanted}"),
        label: format!("write {wanted}"),
    }
}

fn check_shape(shape: &Shape, node: &Node, path: &str, findings: &mut Vec<Finding>) {
    let scalar = match &node.tree {
        Tree::Scalar(value) => Some(value),
        _ => None,
    };
    let mut expect = |good: bool, wanted: &str| {
        if !good {
            findings.push(wrong_type(path, wanted));
        }
    };
    match shape {
        Text => expect(scalar.is_some_and(Value::is_string), "a text"),
        Number => expect(scalar.is_some_and(Value::is_number), "a number"),
        Bool => expect(scalar.is_some_and(Value::is_boolean), "true or false"),
        Choice(words) => {
            let found = scalar.and_then(Value::as_str).unwrap_or_default();
            expect(words.contains(&found), &words.join(" or "));
        }
        Texts | Objects => {
            let Tree::List(items) = &node.tree else {
                return expect(false, "a list");
            };
            for (index, item) in items.iter().enumerate() {
                let path = format!("{path}[{index}]");
                if matches!(shape, Texts) {
                    check_shape(&Text, item, &path, findings);
                }
            }
        }
        Numbers => {
            let Tree::Map(entries) = &node.tree else {
                return expect(false, "a map of names to numbers");
            };
            for (key, value) in entries {
                check_shape(&Number, value, &join(path, &key.text), findings);
            }
        }
        Fields(fields) => {
            let Tree::Map(entries) = &node.tree else {
                return expect(false, "a map");
            };
            for (key, value) in entries {
                match fields.iter().find(|(name, _)| *name == key.text) {
                    Some((name, shape)) => check_shape(shape, value, &join(path, name), findings),
                    None => {
                        let names: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
                        findings.push(unknown(path, &key.text, &names));
                    }
                }
            }
        }
    }
}

/// The title of a document in messages.
fn title(document: &Document) -> String {
    match document.name() {
        "" => document.kind().to_owned(),
        name => format!("{} `{name}`", document.kind()),
    }
}

/// Everything that is wrong with the documents; also puts each into its namespace and takes out
/// what only the server writes.
///
/// `namespace` is where objects go that do not say; `fixed` says that they may say no other.
pub fn check(documents: &mut [Document], namespace: &str, fixed: bool) -> Vec<Report> {
    let mut reports = Vec::new();
    let mut seen = BTreeSet::new();
    for document in documents.iter_mut() {
        check_one(document, namespace, fixed, &mut reports);
        let id = (
            document.kind().to_owned(),
            document.namespace().to_owned(),
            document.name().to_owned(),
        );
        if !document.name().is_empty() && !seen.insert(id) {
            let report = Report::new(
                Exit::Invalid,
                "duplicate",
                format!("{} appears twice", title(document)),
            );
            reports.push(document.point(report, "metadata.name", "here again"));
        }
    }
    reports
}

fn check_one(document: &mut Document, namespace: &str, fixed: bool, reports: &mut Vec<Report>) {
    let error = |slug: &str, message: String| Report::new(Exit::Invalid, slug, message);
    let kind = document.kind().to_owned();
    if kind.is_empty() {
        let report = error("no-kind", "the manifest has no kind".to_owned());
        let report = document.point(report, "", "`kind` is missing");
        reports.push(report.help("write `kind: Application`"));
        return;
    }
    let named = document.object.pointer("/metadata/name");
    if named.is_some_and(|name| !name.is_string() && !name.is_null()) {
        let report = error(
            "wrong-type",
            format!("the name of the {kind} must be a text"),
        );
        let report = document.point(report, "metadata.name", "put it in quotes");
        reports.push(report);
    } else if document.name().len() > NAME_BYTES_MAX {
        let message = format!(
            "the name of the {kind} has {} characters, the limit is {NAME_BYTES_MAX}",
            document.name().len()
        );
        // Without it: what else is wrong would repeat the whole name.
        reports.push(document.point(error("invalid", message), "metadata.name", "shorten it"));
        return;
    } else if document.name().is_empty() {
        let report = error("no-name", format!("the {kind} has no name"));
        let report = document.point(report, "metadata", "`metadata.name` is missing");
        reports.push(report.help("write `metadata: {name: shop}`"));
    }
    let given = document.namespace().to_owned();
    if fixed && !given.is_empty() && given != namespace {
        let message = format!(
            "{} is in namespace `{given}`, but -n says `{namespace}`",
            title(document)
        );
        let report = error("other-namespace", message);
        let report = document.point(report, "metadata.namespace", "here");
        reports.push(report.help("leave one of the two out"));
    }
    if kind != "Application" {
        return;
    }
    if given.is_empty()
        && let Some(metadata) = document.object.get_mut("metadata")
        && metadata.is_object()
    {
        metadata["namespace"] = namespace.into();
    }
    drop_server_fields(&mut document.object);
    let mut findings = Vec::new();
    if let Some(root) = document.root() {
        check_top(root, &mut findings);
    }
    if findings.is_empty() {
        check_spec(document, reports);
    }
    let more = findings.len().saturating_sub(FINDINGS_MAX);
    findings.truncate(FINDINGS_MAX);
    for finding in findings {
        let message = format!("{} in {}", finding.message, title(document));
        let report = error(finding.slug, message);
        let snippet = match &finding.place {
            Place::Key(key) => document.key_snippet(&finding.path, key, finding.label),
            Place::Value => document.snippet(&finding.path, finding.label),
        };
        let report = Report { snippet, ..report };
        reports.push(report);
    }
    if more > 0 {
        let message = format!("{more} more places of {} are wrong", title(document));
        reports.push(error("invalid", message).help("mend the others first"));
    }
    let bytes = document.object.to_string().len();
    if bytes > APPLICATION_BYTES_MAX {
        let message = format!(
            "{} has {} KiB, the limit is {} KiB",
            title(document),
            bytes / 1024,
            APPLICATION_BYTES_MAX / 1024
        );
        reports.push(error("too-large", message).help("split it into several applications"));
    }
}

fn check_top(root: &Node, findings: &mut Vec<Finding>) {
    let Tree::Map(entries) = &root.tree else {
        return;
    };
    for (key, value) in entries {
        match key.text.as_str() {
            "spec" => check_shape(&SPEC, value, "spec", findings),
            "metadata" => match &value.tree {
                Tree::Map(entries) => findings.extend(
                    entries
                        .iter()
                        .filter(|(key, _)| {
                            let key = key.text.as_str();
                            !METADATA.contains(&key) && !SERVER_METADATA.contains(&key)
                        })
                        .map(|(key, _)| unknown("metadata", &key.text, &METADATA[..5])),
                ),
                _ => findings.push(wrong_type("metadata", "a map")),
            },
            name if TOP.contains(&name) => {}
            name => findings.push(unknown("", name, &TOP)),
        }
    }
    if root.get("spec").is_none() {
        findings.push(Finding {
            slug: "no-spec",
            path: String::new(),
            place: Place::Value,
            message: "there is no `spec`".to_owned(),
            label: "`spec.source.manifests` is missing".to_owned(),
        });
    }
}

/// Takes out what `get -o yaml` shows and only the server writes, so that its output can be
/// applied again.
fn drop_server_fields(object: &mut Value) {
    if let Some(map) = object.as_object_mut() {
        map.remove("status");
    }
    let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) else {
        return;
    };
    for field in SERVER_METADATA {
        metadata.remove(field);
    }
    if let Some(list) = metadata.get_mut("finalizers").and_then(Value::as_array_mut) {
        list.retain(|finalizer| finalizer != "krake.dev/copies");
        if list.is_empty() {
            metadata.remove("finalizers");
        }
    }
}

/// A federation may define metrics that are not known here: those are left to the node.
fn generous_definitions(spec: &ApplicationSpec) -> BTreeMap<String, MetricDefinition> {
    let mut definitions = default_definitions();
    let any = MetricDefinition {
        unit: String::new(),
        min: 0.0,
        max: 1.0,
        direction: Direction::LowerIsBetter,
    };
    let placement = spec.placement.clone().unwrap_or_default();
    for name in placement.weights.unwrap_or_default().into_keys() {
        definitions.entry(name).or_insert_with(|| any.clone());
    }
    for text in placement.require {
        let end = text
            .find(|c: char| c.is_whitespace() || "=!<>(),[]".contains(c))
            .unwrap_or(text.len());
        let (key, rest) = text.split_at(end);
        // With `=` it may as well be a label.
        if rest.trim_start().starts_with(['<', '>', 'g', 'l']) {
            definitions
                .entry(key.to_owned())
                .or_insert_with(|| any.clone());
        }
    }
    definitions
}

fn check_spec(document: &Document, reports: &mut Vec<Report>) {
    let spec = document.object.get("spec").cloned().unwrap_or_default();
    let spec: ApplicationSpec = match serde_json::from_value(spec) {
        Ok(spec) => spec,
        Err(problem) => {
            let message = format!("{}: {problem}", title(document));
            let report = Report::new(Exit::Invalid, "invalid", message);
            reports.push(document.point(report, "spec", ""));
            return;
        }
    };
    let definitions = generous_definitions(&spec);
    let unset = Duration::from_secs(60);
    let defaults = Defaults {
        detect_after: unset,
        ready_timeout: unset,
        reschedule_interval: unset,
        hold_for: unset,
        max_metric_age: unset,
    };
    let Err(errors) = validate(&spec, document.namespace(), &definitions, &defaults) else {
        return;
    };
    let require = spec.placement.unwrap_or_default().require;
    for FieldError { path, message } in errors {
        let constraint = path
            .strip_prefix("spec.placement.require[")
            .and_then(|rest| rest.trim_end_matches(']').parse::<usize>().ok())
            .and_then(|index| require.get(index))
            .and_then(|text| constraint::parse(text, &definitions).err());
        reports.push(match constraint {
            Some(error) => {
                bad_constraint(document, &path, &error.text, error.column, &error.message)
            }
            None => bad_field(document, &path, &message),
        });
    }
}

fn bad_constraint(
    document: &Document,
    path: &str,
    text: &str,
    column: usize,
    message: &str,
) -> Report {
    let title = title(document);
    let report = if message.starts_with("unknown metric") {
        Report::new(
            Exit::Invalid,
            "unknown-metric",
            format!("a constraint of {title} names a metric that the federation does not have"),
        )
    } else {
        Report::new(
            Exit::Invalid,
            "constraint",
            format!("a constraint of {title} cannot be read"),
        )
        .help("write `LABEL = X`, `LABEL != X`, `LABEL in (X, Y)`, `LABEL not in (X, Y)`, `METRIC <= 5`; `krakectl help constraints` says more")
    };
    match document.text_snippet(path, text, column, message) {
        Some(snippet) => report.at(snippet),
        None => {
            let report = report.note(format!("{path}: {message}"));
            let report = report.note(format!("  {text}"));
            report.note(format!("  {:>width$}", "^", width = column + 1))
        }
    }
}

fn bad_field(document: &Document, path: &str, message: &str) -> Report {
    let slug = match message {
        _ if message.contains("but the application is in") => "other-namespace",
        _ if message.contains("belongs to a whole cluster") => "cluster-scoped",
        _ if message.contains("is required") => "required",
        _ if message.contains("metric") => "unknown-metric",
        _ => "invalid",
    };
    let first = message.lines().next().unwrap_or_default();
    let title = title(document);
    let report = Report::new(
        Exit::Invalid,
        slug,
        if slug == "required" {
            format!("`{path}` of {title} is missing")
        } else {
            format!("`{path}` of {title} is not valid")
        },
    );
    // Of an unknown metric the name is wrong, not its weight.
    let key = path.rsplit_once('.').filter(|_| slug == "unknown-metric");
    let snippet = key
        .and_then(|(parent, key)| document.key_snippet(parent, key, first))
        .or_else(|| document.snippet(path, first));
    match snippet {
        Some(snippet) => report.at(snippet),
        None => report.note(first),
    }
}

/// What a node says of a document, at the places it speaks of.
pub fn of_causes(document: &Document, causes: &[FieldCause]) -> Vec<Report> {
    causes
        .iter()
        .filter(|cause| !cause.field.is_empty())
        .map(|cause| {
            // `message\n  text\n  ^`: a constraint with a caret under the place.
            let lines: Vec<&str> = cause.message.lines().collect();
            if let [message, text, caret] = lines[..]
                && caret.trim() == "^"
            {
                let indent = text.len() - text.trim_start().len();
                let column = caret.len().saturating_sub(indent + 1);
                return bad_constraint(document, &cause.field, text.trim(), column, message);
            }
            bad_field(document, &cause.field, &cause.message)
        })
        .collect()
}

/// The metrics and weights that are used when a federation defines nothing else, as a text.
pub fn default_metrics() -> String {
    let weights = metric::default_weights();
    default_definitions()
        .into_iter()
        .map(|(name, definition)| {
            let weight = weights
                .get(&name)
                .map_or_else(String::new, |weight| format!(", weight {weight}"));
            format!("  {name:<8} {}{weight}\n", definition.unit)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::load::{Source, Wrap, documents};
    use super::*;
    use crate::cli::report::Look;

    fn load(text: &str) -> Vec<Document> {
        let source = Source {
            name: "shop.yaml".to_owned(),
            text: text.into(),
        };
        documents(vec![source], &Wrap::default()).unwrap()
    }

    fn errors(text: &str) -> String {
        let mut documents = load(text);
        check(&mut documents, "default", false)
            .iter()
            .map(|report| {
                report.render(Look {
                    color: false,
                    unicode: true,
                })
            })
            .collect::<Vec<_>>()
            .join("\n")
    }

    const GOOD: &str = "apiVersion: krake.dev/v1
kind: Application
metadata:
  name: shop
spec:
  source:
    manifests:
      - apiVersion: v1
        kind: ConfigMap
        metadata: {name: a}
  placement:
    require: [\"country in (DE, SE)\", own-metric < 5, tier is gold]
    weights: {carbon: 0.5, own-metric: 1}
    stickiness: 0.2
    maxMetricAge: 15m
    reschedule: {interval: 60s, holdFor: 5m}
  migration: {enabled: true, strategy: surge, readyTimeout: 5m}
  failover: {detectAfter: 15s, mode: prompt}
";

    #[test]
    fn a_full_manifest_is_good_and_gets_its_namespace() {
        let mut documents = load(GOOD);
        assert_eq!(check(&mut documents, "team", false), []);
        assert_eq!(documents[0].namespace(), "team");
    }

    /// The fields known here are exactly those of the model.
    #[test]
    fn the_shape_is_the_models() {
        fn walk(shape: &Shape, path: &mut Vec<&'static str>) {
            let Fields(fields) = shape else { return };
            let mut value = serde_json::json!({"zzz": 1});
            for key in path.iter().rev() {
                value = serde_json::json!({*key: value});
            }
            if !path.contains(&"source") {
                value["source"] = serde_json::json!({"manifests": []});
            }
            let error = serde_json::from_value::<ApplicationSpec>(value).unwrap_err();
            let error = error.to_string();
            let mut wanted: Vec<&str> = error.split('`').skip(3).step_by(2).collect();
            let mut known: Vec<&str> = fields.iter().map(|(name, _)| *name).collect();
            wanted.sort_unstable();
            known.sort_unstable();
            assert_eq!(wanted, known, "{path:?}: {error}");
            for (name, shape) in *fields {
                path.push(name);
                walk(shape, path);
                path.pop();
            }
        }
        walk(&SPEC, &mut Vec::new());
    }

    #[test]
    fn every_error_is_shown_at_its_place() {
        let text = GOOD
            .replace("placement:", "placment:")
            .replace("migration: {enabled: true", "migration: {enabled: maybe")
            .replace("detectAfter", "detectafter")
            .replace(
                "metadata:\n  name: shop",
                "metadata:\n  name: shop\nsepc: 1",
            );
        insta::assert_snapshot!(errors(&text));
    }

    #[test]
    fn bad_values_are_shown_at_their_place() {
        let text = GOOD
            .replace("country in (DE, SE)", "country in (DE SE)")
            .replace("tier is gold", "tier is")
            .replace("stickiness: 0.2", "stickiness: 7")
            .replace("maxMetricAge: 15m", "maxMetricAge: soon")
            .replace("metadata: {name: a}", "metadata: {name: a, namespace: other}\n      - {kind: ConfigMap, apiVersion: v1}\n      - apiVersion: v1\n        kind: Namespace\n        metadata: {name: n}");
        insta::assert_snapshot!(errors(&text));
    }

    #[test]
    fn names_and_namespaces_are_checked() {
        let text = GOOD.replace("  name: shop", "  labels: {}");
        assert!(
            errors(&text).contains("[krake::no-name]"),
            "{}",
            errors(&text)
        );
        let text = format!("{GOOD}---\n{GOOD}");
        assert!(
            errors(&text).contains("[krake::duplicate]"),
            "{}",
            errors(&text)
        );
        let mut documents = load(&GOOD.replace("name: shop", "name: shop\n  namespace: a"));
        let reports = check(&mut documents, "b", true);
        assert_eq!(reports[0].slug, "krake::other-namespace");
    }

    #[test]
    fn what_get_shows_can_be_applied_again() {
        let text = GOOD.replace(
            "  name: shop",
            "  name: shop\n  uid: x\n  resourceVersion: '7'\n  managedFields: []\n  finalizers: [krake.dev/copies]",
        );
        let mut documents = load(&format!("{text}status: {{phase: Running}}\n"));
        assert_eq!(check(&mut documents, "default", false), []);
        let object = &documents[0].object;
        assert_eq!(
            object["metadata"],
            serde_json::json!({"name": "shop", "namespace": "default"})
        );
        assert!(object.get("status").is_none());
    }

    #[test]
    fn a_nodes_causes_are_shown_at_their_place() {
        let documents = load(GOOD);
        let causes = [
            FieldCause {
                field: "spec.placement.require[1]".to_owned(),
                message: "unknown metric `own-metric`\n  own-metric < 5\n  ^".to_owned(),
            },
            FieldCause {
                field: "spec.placement.weights.own-metric".to_owned(),
                message: "unknown metric".to_owned(),
            },
        ];
        let text: Vec<String> = of_causes(&documents[0], &causes)
            .iter()
            .map(|report| {
                report.render(Look {
                    color: false,
                    unicode: true,
                })
            })
            .collect();
        insta::assert_snapshot!(text.join("\n"));
    }
}
