//! Label and field selectors.

use serde_json::Value;

use crate::error::ApiError;
use crate::metadata;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Requirement {
    In(String, Vec<String>),
    NotIn(String, Vec<String>),
    Exists(String),
    Greater(String, i64),
    Less(String, i64),
    Absent(String),
}

/// `app=web,tier in (a,b),!old`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<Requirement>);

impl LabelSelector {
    /// Whether every object matches.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Parses the query parameter `labelSelector`.
    ///
    /// # Errors
    /// 400 with the part that is wrong.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        split_outside_parentheses(text)
            .into_iter()
            .map(str::trim)
            .map(requirement)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether an object's labels satisfy it.
    pub fn matches(&self, object: &Value) -> bool {
        let number = |label: Option<&str>| label.and_then(|text| text.parse::<i64>().ok());
        let label = |key: &str| {
            object
                .get("metadata")
                .and_then(|m| m.get("labels"))
                .and_then(|l| l.get(key))
                .and_then(Value::as_str)
        };
        self.0.iter().all(|requirement| match requirement {
            Requirement::In(key, values) => {
                label(key).is_some_and(|value| values.iter().any(|v| v == value))
            }
            Requirement::NotIn(key, values) => {
                label(key).is_none_or(|value| values.iter().all(|v| v != value))
            }
            Requirement::Exists(key) => label(key).is_some(),
            Requirement::Greater(key, bound) => number(label(key)).is_some_and(|n| n > *bound),
            Requirement::Less(key, bound) => number(label(key)).is_some_and(|n| n < *bound),
            Requirement::Absent(key) => label(key).is_none(),
        })
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0_i32, 0, Vec::new());
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn requirement(part: &str) -> Result<Requirement, ApiError> {
    let wrong = || ApiError::bad_request(format!("unable to parse requirement: `{part}`"));
    let key = |text: &str| {
        let text = text.trim();
        let good = metadata::is_key(text);
        if good {
            Ok(text.to_owned())
        } else {
            Err(wrong())
        }
    };
    let value = |text: &str| {
        let text = text.trim();
        if text.is_empty() || metadata::is_word(text) {
            Ok(text.to_owned())
        } else {
            Err(wrong())
        }
    };
    if let Some(rest) = part.strip_prefix('!') {
        return Ok(Requirement::Absent(key(rest)?));
    }
    if let Some(open) = part.find('(') {
        let list = part[open + 1..].strip_suffix(')').ok_or_else(wrong)?;
        let values = list.split(',').map(value).collect::<Result<_, _>>()?;
        let words: Vec<&str> = part[..open].split_whitespace().collect();
        return match &words[..] {
            [name, "in"] => Ok(Requirement::In(key(name)?, values)),
            [name, "notin"] => Ok(Requirement::NotIn(key(name)?, values)),
            _ => Err(wrong()),
        };
    }
    if let Some((name, text)) = part.split_once("!=") {
        return Ok(Requirement::NotIn(key(name)?, vec![value(text)?]));
    }
    if let Some((name, text)) = part.split_once("==").or_else(|| part.split_once('=')) {
        return Ok(Requirement::In(key(name)?, vec![value(text)?]));
    }
    let number = |text: &str| text.trim().parse::<i64>().map_err(|_| wrong());
    if let Some((name, bound)) = part.split_once('>') {
        return Ok(Requirement::Greater(key(name)?, number(bound)?));
    }
    if let Some((name, bound)) = part.split_once('<') {
        return Ok(Requirement::Less(key(name)?, number(bound)?));
    }
    Ok(Requirement::Exists(key(part)?))
}

/// `metadata.name=web,involvedObject.kind!=Pod`: any field that holds a scalar.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector(Vec<(Vec<String>, bool, String)>);

impl FieldSelector {
    /// Whether every object matches.
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Parses the query parameter `fieldSelector`.
    ///
    /// # Errors
    /// 400 with the part that is wrong.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let mut terms = Vec::new();
        for part in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
            let (path, equal, value) = if let Some((path, value)) = part.split_once("!=") {
                (path, false, value)
            } else if let Some((path, value)) =
                part.split_once("==").or_else(|| part.split_once('='))
            {
                (path, true, value)
            } else {
                return Err(ApiError::bad_request(format!(
                    "invalid field selector `{part}`: write path=value"
                )));
            };
            let path = path.split('.').map(ToOwned::to_owned).collect();
            terms.push((path, equal, value.to_owned()));
        }
        Ok(Self(terms))
    }

    /// The only name that an object may have, when it says one.
    pub fn name(&self) -> Option<&str> {
        let mut names = self.0.iter().filter(|(path, equal, _)| {
            *equal && path.iter().map(String::as_str).eq(["metadata", "name"])
        });
        names.next().map(|(_, _, name)| name.as_str())
    }

    /// Whether an object satisfies it; an absent field is the empty text.
    pub fn matches(&self, object: &Value) -> bool {
        self.0.iter().all(|(path, equal, wanted)| {
            let found = path
                .iter()
                .try_fold(object, |value, part| value.get(part.as_str()));
            let text = match found {
                None | Some(Value::Null) => String::new(),
                Some(Value::String(text)) => text.clone(),
                Some(other) => other.to_string(),
            };
            (text == *wanted) == *equal
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn label_selectors_follow_kubernetes() {
        let object = json!({"metadata": {"labels": {"app": "web", "tier": "a"}}});
        let matches = |text: &str| LabelSelector::parse(text).unwrap().matches(&object);
        for text in [
            "app=web",
            "app==web,tier!=b",
            "tier in (a, b)",
            "app",
            "!old",
            "old!=x",
            "x notin (a)",
            "",
        ] {
            assert!(matches(text), "{text}");
        }
        for text in ["app=x", "!app", "old", "tier notin (a,b)", "x in (a)"] {
            assert!(!matches(text), "{text}");
        }
        for text in ["tier in a", "app in (a", "=x", "a b"] {
            assert!(LabelSelector::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn field_selectors_read_any_scalar() {
        let object = json!({"metadata": {"name": "web"}, "spec": {"n": 3}});
        let matches = |text: &str| FieldSelector::parse(text).unwrap().matches(&object);
        assert!(matches("metadata.name=web,spec.n=3,spec.x="));
        assert!(!matches("metadata.name!=web"));
        assert!(FieldSelector::parse("metadata.name").is_err());
    }
}
