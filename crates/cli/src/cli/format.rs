//! Output formats.

use std::str::FromStr;

use jsonpath_rust::JsonPath;
use serde_json::Value;

use super::output::{cell, to_yaml};

/// How data is printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// A table for people.
    Table,
    /// The same with more columns.
    Wide,
    /// JSON.
    Json,
    /// YAML.
    Yaml,
    /// `kind/name`
    Name,
    /// Text with values in it, as kubectl writes it: `{.metadata.name}{"\n"}`.
    JsonPath(Vec<Piece>),
}

/// A piece of a jsonpath template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// As it is.
    Text(String),
    /// What a query finds, separated by spaces.
    Query(String),
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "table" => Ok(Self::Table),
            "wide" => Ok(Self::Wide),
            "json" => Ok(Self::Json),
            "yaml" => Ok(Self::Yaml),
            "name" => Ok(Self::Name),
            _ => match text.strip_prefix("jsonpath=") {
                Some(template) => template_pieces(template).map(Self::JsonPath),
                None => Err(
                    "there are: table, wide, json, yaml, name, jsonpath={.status.phase}".to_owned(),
                ),
            },
        }
    }
}

fn template_pieces(template: &str) -> Result<Vec<Piece>, String> {
    let template = template.trim_matches('\'');
    if !template.contains('{') {
        return query(template).map(|piece| vec![piece]);
    }
    let mut pieces = Vec::new();
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        if start > 0 {
            pieces.push(Piece::Text(unescape(&rest[..start])));
        }
        // A brace inside quotes (`{"}"}`) is rare enough to be left out.
        let end = rest[start..]
            .find('}')
            .ok_or_else(|| "a `{` is not closed".to_owned())?;
        let inner = rest[start + 1..start + end].trim();
        let quoted = inner.strip_prefix('"').and_then(|t| t.strip_suffix('"'));
        pieces.push(match quoted {
            Some(text) => Piece::Text(unescape(text)),
            None if inner.starts_with("range ") || inner == "end" => {
                return Err("range is not supported; use [*] or `-o json`".to_owned());
            }
            None => query(inner)?,
        });
        rest = &rest[start + end + 1..];
    }
    if !rest.is_empty() {
        pieces.push(Piece::Text(unescape(rest)));
    }
    Ok(pieces)
}

fn unescape(text: &str) -> String {
    text.replace("\\n", "\n").replace("\\t", "\t")
}

fn query(text: &str) -> Result<Piece, String> {
    let text = text.trim_start_matches('$').trim_start_matches('@');
    let query = if text.starts_with(['.', '[']) {
        format!("${text}")
    } else {
        format!("$.{text}")
    };
    // Keys with an escaped dot become quoted keys.
    let marked = query.replace("\\.", "\u{1}");
    let query: String = if marked.contains('\u{1}') {
        marked
            .split('.')
            .enumerate()
            .map(|(index, part)| match part {
                part if part.contains('\u{1}') => {
                    format!("['{}']", part.replace('\u{1}', "."))
                }
                part if index == 0 => part.to_owned(),
                part => format!(".{part}"),
            })
            .collect()
    } else {
        query
    };
    Value::Null
        .query(&query)
        .map_err(|error| format!("`{text}` is not a path: {error}"))?;
    Ok(Piece::Query(query))
}

impl Format {
    /// Whether the server makes the table.
    pub const fn is_table(&self) -> bool {
        matches!(self, Self::Table | Self::Wide)
    }

    /// A value in a format that needs no server: JSON, YAML, jsonpath.
    pub fn print(&self, value: &Value) -> String {
        match self {
            Self::Yaml => to_yaml(value),
            Self::JsonPath(pieces) => pieces
                .iter()
                .map(|piece| match piece {
                    Piece::Text(text) => text.clone(),
                    Piece::Query(query) => {
                        let found = value.query(query).unwrap_or_default();
                        let texts: Vec<String> = found.into_iter().map(plain).collect();
                        texts.join(" ")
                    }
                })
                .collect(),
            _ => format!("{value:#}"),
        }
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::Object(_) | Value::Array(_) => value.to_string(),
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => cell(other),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn templates_print_what_they_find() {
        let object = json!({"metadata": {"name": "shop", "labels": {"a.b/c": "x"}},
            "status": {"copies": [{"site": "osl1"}, {"site": "par1"}]}});
        let print = |template: &str| {
            let format: Format = format!("jsonpath={template}").parse().unwrap();
            format.print(&object)
        };
        assert_eq!(print("{.metadata.name}"), "shop");
        assert_eq!(print(".metadata.name"), "shop");
        assert_eq!(print("{.status.copies[*].site}"), "osl1 par1");
        assert_eq!(print(r"{.metadata.labels.a\.b/c}"), "x");
        assert_eq!(print(r#"{.metadata.name}:{"\n"}"#), "shop:\n");
        assert_eq!(print("{.nothing}"), "");
    }

    #[test]
    fn wrong_formats_name_the_right_ones() {
        assert!("xml".parse::<Format>().unwrap_err().contains("yaml"));
        assert!("jsonpath={.a".parse::<Format>().is_err());
        assert!("jsonpath={range .items[*]}".parse::<Format>().is_err());
    }
}
