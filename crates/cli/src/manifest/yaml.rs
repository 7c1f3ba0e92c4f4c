//! YAML (and with it JSON) in which every value knows its place in the text.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::{Location, Spanned};

/// A value and where it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The value.
    pub tree: Tree,
    /// Its bytes in the text; empty when not known.
    pub span: Range<usize>,
}

/// A value whose parts know where they are.
#[derive(Debug, Clone, PartialEq)]
pub enum Tree {
    /// A text, a number, a truth value, or null.
    Scalar(Value),
    /// A list.
    List(Vec<Node>),
    /// A map, in the order written.
    Map(Vec<(Key, Node)>),
}

/// A key and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The key.
    pub text: String,
    /// Its bytes in the text.
    pub span: Range<usize>,
}

/// The text is not YAML, or more than will be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct YamlError {
    /// What is wrong.
    pub message: String,
    /// Where, when it is known.
    pub span: Option<Range<usize>>,
    /// Whether a limit was exceeded, rather than the grammar broken.
    pub limit: bool,
}

fn range(location: &Location) -> Range<usize> {
    let span = location.span();
    let start = span.byte_offset().unwrap_or(0) as usize;
    start..start + span.byte_len().unwrap_or(0) as usize
}

impl From<Spanned<Tree>> for Node {
    fn from(spanned: Spanned<Tree>) -> Self {
        Self {
            span: range(&spanned.referenced),
            tree: spanned.value,
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Tree, E> {
        Ok(Tree::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Tree, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
        Ok(Tree::Scalar(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
        Ok(Tree::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
        Ok(Tree::Scalar(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
        Ok(Tree::Scalar(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
        Ok(Tree::Scalar(value.into()))
    }

    fn visit_string<E>(self, value: String) -> Result<Tree, E> {
        Ok(Tree::Scalar(value.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Tree, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element::<Spanned<Tree>>()? {
            items.push(item.into());
        }
        Ok(Tree::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Tree, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let value = access.next_value::<Spanned<Tree>>()?;
            let key = Key {
                span: range(&key.referenced),
                text: key.value,
            };
            entries.push((key, value.into()));
        }
        Ok(Tree::Map(entries))
    }
}

/// One step into a value.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step<'a> {
    Key(&'a str),
    Index(usize),
}

/// Splits `spec.source.manifests[3].metadata.labels[a.b/c]`.
fn steps(path: &str) -> Vec<Step<'_>> {
    let mut steps = Vec::new();
    for part in path.split('.').filter(|part| !part.is_empty()) {
        let (key, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
        if !key.is_empty() {
            steps.push(Step::Key(key));
        }
        while let Some((index, after)) =
            rest.strip_prefix('[').and_then(|rest| rest.split_once(']'))
        {
            match index.parse() {
                Ok(index) => steps.push(Step::Index(index)),
                Err(_) => steps.push(Step::Key(index.trim_matches(['"', '\'']))),
            }
            rest = after;
        }
    }
    steps
}

impl Node {
    /// Without the places.
    pub fn to_value(&self) -> Value {
        match &self.tree {
            Tree::Scalar(value) => value.clone(),
            Tree::List(items) => items.iter().map(Self::to_value).collect(),
            Tree::Map(entries) => Value::Object(
                entries
                    .iter()
                    .map(|(key, value)| (key.text.clone(), value.to_value()))
                    .collect::<Map<_, _>>(),
            ),
        }
    }

    /// The value under `key`.
    pub fn get(&self, key: &str) -> Option<&Self> {
        self.entry(key).map(|(_, value)| value)
    }

    /// Key and value under `key`.
    pub fn entry(&self, key: &str) -> Option<(&Key, &Self)> {
        let Tree::Map(entries) = &self.tree else {
            return None;
        };
        entries
            .iter()
            .find(|(found, _)| found.text == key)
            .map(|(key, value)| (key, value))
    }

    /// The text under `key`.
    pub fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.tree {
            Tree::Scalar(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The place of a field such as `spec.placement.require[0]`: the value when it is a scalar,
    /// else its key; of a field that is not there, its nearest parent that is.
    pub fn place(&self, path: &str) -> Range<usize> {
        let mut node = self;
        let mut place = self.first();
        for step in steps(path) {
            match (step, &node.tree) {
                (Step::Index(index), Tree::List(items)) if index < items.len() => {
                    node = &items[index];
                    place = node.first();
                }
                (Step::Key(name), Tree::Map(_)) => match node.entry(name) {
                    Some((key, value)) => {
                        node = value;
                        place = match value.tree {
                            Tree::Scalar(_) if !value.span.is_empty() => value.span.clone(),
                            _ => key.span.clone(),
                        };
                    }
                    None => return place,
                },
                _ => return place,
            }
        }
        place
    }

    /// The value at a field, if it is there.
    pub fn at(&self, path: &str) -> Option<&Self> {
        steps(path)
            .into_iter()
            .try_fold(self, |node, step| match (step, &node.tree) {
                (Step::Index(index), Tree::List(items)) => items.get(index),
                (Step::Key(name), Tree::Map(_)) => node.get(name),
                _ => None,
            })
    }

    /// A short place that stands for the value: a scalar, or the first key in it.
    fn first(&self) -> Range<usize> {
        match &self.tree {
            Tree::Scalar(_) => self.span.clone(),
            Tree::List(items) => items.first().map_or_else(|| self.span.clone(), Self::first),
            Tree::Map(entries) => entries
                .first()
                .map_or_else(|| self.span.clone(), |(key, _)| key.span.clone()),
        }
    }
}

/// Reads all documents; those that are empty are left out.
///
/// # Errors
/// Where and why the text is not YAML. Depth, aliases and the number of values are bounded, so
/// that a hostile text is refused quickly.
pub fn parse(text: &str) -> Result<Vec<Node>, YamlError> {
    let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
    let documents: Vec<Spanned<Tree>> = serde_saphyr::from_multiple_with_options(text, options)
        .map_err(|error| yaml_error(&error, text))?;
    Ok(documents
        .into_iter()
        .map(Node::from)
        .filter(|node| node.tree != Tree::Scalar(Value::Null))
        .collect())
}

/// The place of a line and a column (both from 1). What is past the end of its line has no
/// width: the last character that can be seen stands in.
fn position(text: &str, line: u64, column: u64) -> Range<usize> {
    let line_start = text
        .split_inclusive('\n')
        .take(line.saturating_sub(1) as usize)
        .map(str::len)
        .sum::<usize>();
    let rest = text[line_start..].split('\n').next().unwrap_or_default();
    let column = column.saturating_sub(1) as usize;
    let at = rest
        .char_indices()
        .nth(column)
        .map(|(at, _)| line_start + at);
    let visible = |at: &usize| !text[*at..].trim_start_matches([' ', '\t', '\r']).is_empty();
    let at = at.filter(visible).unwrap_or_else(|| {
        let before = text[..line_start + rest.len()].trim_end();
        before.char_indices().next_back().map_or(0, |(at, _)| at)
    });
    let width = text[at..].chars().next().map_or(0, char::len_utf8);
    at..at + width
}

/// What the library says to programmers, said to the author of the text; and whether it is a limit.
fn in_our_words(error: &serde_saphyr::Error) -> Option<(String, bool)> {
    use serde_saphyr::Error;
    use serde_saphyr::budget::BudgetBreach;
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "the library's other errors are plain already"
    )]
    Some(match error {
        Error::DuplicateMappingKey { key, .. } => (
            match key {
                Some(key) => format!("duplicate key `{key}`: it stands above already"),
                None => "duplicate key: it stands above already".to_owned(),
            },
            false,
        ),
        Error::NonFiniteFloat { value, .. } => (format!("`{value}` is not a finite number"), false),
        Error::NullIntoString { .. } => (
            "a key must be a text, not null; put it in quotes".to_owned(),
            false,
        ),
        Error::RecursiveReferencesRequireWeakTypes { .. } => (
            "an alias stands inside what it stands for".to_owned(),
            false,
        ),
        Error::Budget { breach, .. } => (
            match breach {
                BudgetBreach::Nodes { .. } => "more values than that, aliases expanded".to_owned(),
                BudgetBreach::Depth { .. } => "nested deeper than that".to_owned(),
                BudgetBreach::Documents { documents } => {
                    format!(
                        "more than {} documents in one file; split it",
                        documents - 1
                    )
                }
                other => format!("more than is read of one file ({other:?})"),
            },
            true,
        ),
        _ => return None,
    })
}

fn yaml_error(error: &serde_saphyr::Error, text: &str) -> YamlError {
    let span = error
        .location()
        .map(|location| position(text, location.line(), location.column()));
    let mut inner = error.without_snippet();
    while let serde_saphyr::Error::AliasError { error, .. } = inner {
        inner = error.without_snippet();
    }
    if let Some((message, limit)) = in_our_words(inner) {
        return YamlError {
            message,
            span,
            limit,
        };
    }
    let message = error.render();
    // The place is shown in the snippet.
    let message = message.lines().next().unwrap_or_default();
    let message = match message.find(" at line ") {
        Some(at) if span.is_some() => &message[..at],
        _ => message,
    };
    let lower = message.to_lowercase();
    YamlError {
        limit: [
            "budget",
            "limit",
            "exceed",
            "too deep",
            "too many",
            "recursion",
        ]
        .iter()
        .any(|word| lower.contains(word)),
        message: message.to_owned(),
        span,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TEXT: &str =
        "a: 1\nlist:\n  - name: x\n  - {name: y, deep: [1, 2]}\n\"80\": text\n---\n---\nb: true\n";

    #[test]
    fn values_and_places_are_right() {
        let documents = parse(TEXT).unwrap();
        assert_eq!(documents.len(), 2);
        assert_eq!(
            documents[0].to_value(),
            json!({"a": 1, "list": [{"name": "x"}, {"name": "y", "deep": [1, 2]}], "80": "text"})
        );
        let shown = |path: &str| &TEXT[documents[0].place(path)];
        assert_eq!(shown("list[1].name"), "y");
        assert_eq!(shown("list[1].deep"), "deep");
        assert_eq!(shown("list[1].deep[1]"), "2");
        assert_eq!(shown("list[1].deep[1].more"), "2");
        assert_eq!(shown("list[0].missing"), "name");
        assert_eq!(&TEXT[documents[1].place("b")], "true");
    }

    #[test]
    fn scalars_are_typed_as_kubernetes_types_them() {
        let value = parse("a: 1.5\nb: '1'\nc: ~\nd: 0.1e2\ne: no\nf: 8080\ng: -3")
            .unwrap()
            .remove(0)
            .to_value();
        assert_eq!(
            value,
            json!({"a": 1.5, "b": "1", "c": null, "d": 10.0, "e": "no", "f": 8080, "g": -3})
        );
    }

    #[test]
    fn broken_text_names_the_place() {
        let text = "a: 1\nb: [1, 2\nc: 3\n";
        let error = parse(text).unwrap_err();
        assert!(!error.limit, "{error:?}");
        let line = text[..error.span.clone().unwrap().start].lines().count();
        assert!((2..=4).contains(&line), "{error:?}");
        let error = parse("a: {b: 1\n").unwrap_err();
        assert!(error.span.is_some(), "{error:?}");
        let error = parse("a: 1\na: 2\n").unwrap_err();
        assert!(error.message.contains("dupl"), "{error:?}");
    }

    #[test]
    fn brackets_and_alias_bombs_are_refused_quickly() {
        let begun = std::time::Instant::now();
        let brackets = "[".repeat(2 * 1024 * 1024);
        let error = parse(&brackets).unwrap_err();
        assert!(error.limit, "{error:?}");
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let before = level - 1;
            let list = vec![format!("*a{before}"); 10].join(", ");
            bomb.push_str(&format!("a{level}: &a{level} [{list}]\n"));
        }
        let error = parse(&bomb).unwrap_err();
        assert!(error.limit, "{error:?}");
        assert_eq!(error.message, "more values than that, aliases expanded");
        assert!(begun.elapsed().as_secs() < 10, "{:?}", begun.elapsed());
    }

    #[test]
    fn paths_with_brackets_are_split() {
        assert_eq!(
            steps("spec.a[3][0].b[\"x/y\"]"),
            [
                Step::Key("spec"),
                Step::Key("a"),
                Step::Index(3),
                Step::Index(0),
                Step::Key("b"),
                Step::Key("x/y")
            ]
        );
    }
}
