//! Reading manifests from files, directories and stdin.

use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::yaml::{self, Node, Tree};
use crate::cli::exit::Exit;
use crate::cli::report::{Failure, Outcome, Report, Snippet};

/// A file has at most this many bytes: more no node would take in one request.
const FILE_BYTES_MAX: u64 = 3 * 1024 * 1024;
/// Files of one directory.
const FILES_MAX: usize = 1000;

/// A text with its name.
#[derive(Debug, Clone)]
pub struct Source {
    /// The file's name.
    pub name: String,
    /// What is in it.
    pub text: Arc<str>,
}

/// One document of a source.
#[derive(Debug, Clone)]
pub struct Part {
    /// Where it is from.
    pub source: Source,
    /// The values with their places.
    pub node: Node,
}

/// An object to apply, which knows where each of its fields was written.
#[derive(Debug, Clone)]
pub struct Document {
    /// The object.
    pub object: Value,
    /// What it was made of: the document itself, or (when wrapped) its manifests.
    parts: Vec<Part>,
    wrapped: bool,
}

/// How plain Kubernetes manifests become one Application.
#[derive(Debug, Clone, Default)]
pub struct Wrap {
    /// The Application's name; without it plain manifests are an error.
    pub name: Option<String>,
    /// `spec.placement.require`.
    pub require: Vec<String>,
    /// `spec.placement.weights`.
    pub weights: Vec<(String, f64)>,
}

impl Part {
    fn snippet(&self, span: Range<usize>, label: impl Into<String>) -> Snippet {
        Snippet {
            name: self.source.name.clone(),
            text: Arc::clone(&self.source.text),
            labels: vec![(span, label.into())],
        }
    }

    fn is_ours(&self) -> bool {
        self.node
            .text("apiVersion")
            .is_some_and(|api| api.split('/').next() == Some("krake.dev"))
    }
}

impl Document {
    fn whole(part: Part) -> Self {
        Self {
            object: part.node.to_value(),
            parts: vec![part],
            wrapped: false,
        }
    }

    /// The text at `pointer`, or nothing.
    pub fn text(&self, pointer: &str) -> &str {
        let found = self.object.pointer(pointer).and_then(Value::as_str);
        found.unwrap_or_default()
    }

    /// `metadata.name`
    pub fn name(&self) -> &str {
        self.text("/metadata/name")
    }

    /// `metadata.namespace`
    pub fn namespace(&self) -> &str {
        self.text("/metadata/namespace")
    }

    /// `kind`
    pub fn kind(&self) -> &str {
        self.text("/kind")
    }

    /// The part that holds `path`, and the path in it.
    fn part<'a>(&self, path: &'a str) -> Option<(&Part, &'a str)> {
        if !self.wrapped {
            return Some((self.parts.first()?, path));
        }
        let rest = path.strip_prefix("spec.source.manifests[")?;
        let (index, rest) = rest.split_once(']')?;
        let part = self.parts.get(index.parse::<usize>().ok()?)?;
        Some((part, rest.trim_start_matches('.')))
    }

    /// The root of what was written, when the object is one document.
    pub fn root(&self) -> Option<&Node> {
        (!self.wrapped).then(|| self.parts.first().map(|part| &part.node))?
    }

    /// Points at a field such as `spec.placement.require[0]`.
    pub fn snippet(&self, path: &str, label: impl Into<String>) -> Option<Snippet> {
        let (part, path) = self.part(path)?;
        Some(part.snippet(part.node.place(path), label))
    }

    /// Points at the key of a field.
    pub fn key_snippet(&self, path: &str, key: &str, label: impl Into<String>) -> Option<Snippet> {
        let (part, path) = self.part(path)?;
        let span = part.node.at(path)?.entry(key)?.0.span.clone();
        Some(part.snippet(span, label))
    }

    /// Points into a text field, `column` characters from its start.
    pub fn text_snippet(
        &self,
        path: &str,
        text: &str,
        column: usize,
        label: impl Into<String>,
    ) -> Option<Snippet> {
        let (part, path) = self.part(path)?;
        let span = part.node.place(path);
        let source = &part.source.text;
        // The text may be written with quotes and escapes; only where it stands verbatim can a
        // place in it be shown.
        let end = (span.end + 2).min(source.len());
        let found = source.get(span.start..end).and_then(|area| area.find(text));
        let span = found.map_or(span.clone(), |at| {
            let start = span.start + at;
            let here = text.char_indices().nth(column);
            match here {
                Some((offset, c)) => {
                    let word = text[offset..]
                        .find(|c: char| c.is_whitespace() || "=!<>(),[]".contains(c))
                        .filter(|width| *width > 0)
                        .unwrap_or(c.len_utf8().max(if c.is_alphanumeric() {
                            text.len() - offset
                        } else {
                            0
                        }));
                    start + offset..start + offset + word
                }
                None => start + text.len()..start + text.len(),
            }
        });
        Some(part.snippet(span, label))
    }

    /// Adds a place to a report when the field is known.
    pub fn point(&self, report: Report, path: &str, label: impl Into<String>) -> Report {
        match self.snippet(path, label) {
            Some(snippet) => report.at(snippet),
            None => report,
        }
    }
}

fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    let exit = if error.kind() == std::io::ErrorKind::NotFound {
        Exit::NotFound
    } else {
        Exit::Failed
    };
    Report::new(exit, "file", format!("cannot read {}", path.display()))
        .note(
            error
                .to_string()
                .split(" (os error")
                .next()
                .unwrap_or_default()
                .to_lowercase(),
        )
        .into()
}

fn too_large(name: &str) -> Failure {
    Report::new(
        Exit::Invalid,
        "too-large",
        format!("{name} has more than {} MiB", FILE_BYTES_MAX / 1024 / 1024),
    )
    .help("an Application has at most 512 KiB; write one file for each")
    .into()
}

fn read(reader: impl Read, path: &Path, name: &str) -> Outcome<Source> {
    let mut bytes = Vec::new();
    reader
        .take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| unreadable(path, &error))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(too_large(name));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        Failure::from(
            Report::new(
                Exit::Invalid,
                "encoding",
                format!("{name} is not UTF-8 text"),
            )
            .note(error.utf8_error().to_string())
            .help("is it a manifest? YAML and JSON are read"),
        )
    })?;
    Ok(Source {
        name: name.to_owned(),
        text: text.into(),
    })
}

fn files_in(directory: &Path, recursive: bool) -> Outcome<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut waiting = vec![directory.to_owned()];
    while let Some(directory) = waiting.pop() {
        let entries =
            std::fs::read_dir(&directory).map_err(|error| unreadable(&directory, &error))?;
        for entry in entries {
            let path = entry
                .map_err(|error| unreadable(&directory, &error))?
                .path();
            let extension = path
                .extension()
                .and_then(|e| e.to_str())
                .unwrap_or_default();
            if path.is_dir() && recursive {
                waiting.push(path);
            } else if path.is_file() && ["yaml", "yml", "json"].contains(&extension) {
                files.push(path);
            }
        }
        if files.len() > FILES_MAX {
            return Err(Report::new(
                Exit::Invalid,
                "too-many-files",
                format!(
                    "{} has more than {FILES_MAX} manifests",
                    directory.display()
                ),
            )
            .into());
        }
    }
    files.sort();
    Ok(files)
}

/// Reads what `-f` names: files, directories (their `.yaml`, `.yml` and `.json`), `-` for stdin.
///
/// # Errors
/// What cannot be read.
pub fn sources(inputs: &[PathBuf], recursive: bool) -> Outcome<Vec<Source>> {
    let mut sources = Vec::new();
    for input in inputs {
        if input.as_os_str() == "-" {
            sources.push(read(std::io::stdin().lock(), input, "<stdin>")?);
            continue;
        }
        let files = if input.is_dir() {
            let files = files_in(input, recursive)?;
            if files.is_empty() {
                return Err(Report::new(
                    Exit::NotFound,
                    "no-manifests",
                    format!(
                        "there is no .yaml, .yml or .json file in {}",
                        input.display()
                    ),
                )
                .help("-R looks into its directories too")
                .into());
            }
            files
        } else {
            vec![input.clone()]
        };
        for path in files {
            let file = std::fs::File::open(&path).map_err(|error| unreadable(&path, &error))?;
            sources.push(read(file, &path, &path.display().to_string())?);
        }
    }
    Ok(sources)
}

/// Splits sources into documents; a `List` becomes its items.
fn parts(sources: Vec<Source>) -> Outcome<Vec<Part>> {
    let mut parts = Vec::new();
    let mut reports = Vec::new();
    for source in sources {
        match yaml::parse(&source.text) {
            Ok(nodes) => {
                for node in nodes {
                    let items = node.get("items").map(|items| &items.tree);
                    let is_list = node.text("kind").is_some_and(|kind| kind.ends_with("List"));
                    match items {
                        Some(Tree::List(items)) if is_list => {
                            parts.extend(items.iter().map(|item| Part {
                                source: source.clone(),
                                node: item.clone(),
                            }));
                        }
                        _ => parts.push(Part {
                            source: source.clone(),
                            node,
                        }),
                    }
                }
            }
            Err(error) => reports.push(broken(&source, error)),
        }
    }
    if reports.is_empty() {
        Ok(parts)
    } else {
        Err(Failure::all(reports))
    }
}

fn broken(source: &Source, error: yaml::YamlError) -> Report {
    let report = if error.limit {
        Report::new(
            Exit::Invalid,
            "yaml-limit",
            format!("{} is nested too deeply, or is too much", source.name),
        )
        .help("nothing was sent; a file has at most 64 levels and 250000 values, aliases expanded. Is this really a manifest?")
    } else {
        Report::new(
            Exit::Invalid,
            "yaml",
            format!("{} is not valid YAML", source.name),
        )
        .help("nothing was sent; mind the indentation and the quotes around `:` and `{`")
    };
    match error.span {
        Some(span) => report.at(Snippet {
            name: source.name.clone(),
            text: Arc::clone(&source.text),
            labels: vec![(span, error.message)],
        }),
        None => report.note(error.message),
    }
}

fn plain_manifest(part: &Part) -> Report {
    let kind = part.node.text("kind").unwrap_or_default();
    let report = if kind.is_empty() {
        let span = part.node.place("");
        Report::new(Exit::Invalid, "no-kind", "the manifest has no kind")
            .at(part.snippet(span, "`kind` is missing"))
    } else {
        let span = part.node.place("kind");
        let known = matches!(
            kind,
            "Application" | "Site" | "Placement" | "Node" | "Event"
        );
        let message = if known {
            format!(
                "{kind} is in krake.dev/v1, not in `{}`",
                part.node.text("apiVersion").unwrap_or_default()
            )
        } else {
            format!("{kind} is a Kubernetes object, not an Application")
        };
        Report::new(Exit::Invalid, "not-an-application", message).at(part.snippet(
            span,
            if known {
                "write `apiVersion: krake.dev/v1`"
            } else {
                ""
            },
        ))
    };
    report.help("an Application starts with `apiVersion: krake.dev/v1` and `kind: Application`; `krakectl init` writes one")
        .help("to put plain manifests into one: --name NAME")
}

/// Reads objects from sources.
///
/// # Errors
/// Everything that is not a manifest, or has no place to go.
pub fn documents(sources: Vec<Source>, wrap: &Wrap) -> Outcome<Vec<Document>> {
    let names = sources
        .iter()
        .map(|source| source.name.clone())
        .collect::<Vec<_>>();
    let (ours, plain): (Vec<Part>, Vec<Part>) =
        parts(sources)?.into_iter().partition(Part::is_ours);
    let mut documents: Vec<Document> = ours.into_iter().map(Document::whole).collect();
    if let (false, Some(name)) = (plain.is_empty(), &wrap.name) {
        let manifests: Vec<Value> = plain.iter().map(|part| part.node.to_value()).collect();
        let mut spec = json!({"source": {"manifests": manifests}});
        if !wrap.require.is_empty() {
            spec["placement"]["require"] = wrap.require.clone().into();
        }
        for (metric, weight) in &wrap.weights {
            spec["placement"]["weights"][metric] = (*weight).into();
        }
        documents.push(Document {
            object: json!({"apiVersion": "krake.dev/v1", "kind": "Application", "metadata": {"name": name}, "spec": spec}),
            parts: plain,
            wrapped: true,
        });
    } else if !plain.is_empty() {
        return Err(Failure::all(plain.iter().map(plain_manifest).collect()));
    }
    if documents.is_empty() {
        return Err(Report::new(
            Exit::Invalid,
            "no-manifests",
            format!("there is no manifest in {}", names.join(", ")),
        )
        .help("`krakectl init` writes an example")
        .into());
    }
    Ok(documents)
}
