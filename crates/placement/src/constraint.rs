//! Krake's constraint grammar, over labels and raw metric values.
//!
//! ```text
//! constraint = key operator
//! operator   = ("=" | "==" | "is") value | ("!=" | "is not") value
//!            | "in" "(" value {"," value} [","] ")" | "not in" "(" … ")"
//!            | (">" | "gt" | "greater than") number | (">=" | "=>" | "gte" | … ) number
//!            | ("<" | "lt" | "less than" | "lesser than") number | ("<=" | …) number
//! ```
//!
//! A label operator is never true when the label is absent (also `!=` and `not in`), a metric
//! operator never when the metric is not reported.

use std::collections::BTreeMap;
use std::fmt;

use krake_model::metric::MetricDefinition;
use thiserror::Error;

/// A constraint is at most this long.
pub const CONSTRAINT_BYTES_MAX: usize = 1024;

/// How a metric's raw value is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// `=`
    Equal,
    /// `!=`
    NotEqual,
    /// `>`
    Greater,
    /// `>=`
    GreaterOrEqual,
    /// `<`
    Less,
    /// `<=`
    LessOrEqual,
}

impl Comparison {
    fn holds(self, left: f64, right: f64) -> bool {
        match self {
            Self::Equal => left == right,
            Self::NotEqual => left != right,
            Self::Greater => left > right,
            Self::GreaterOrEqual => left >= right,
            Self::Less => left < right,
            Self::LessOrEqual => left <= right,
        }
    }

    const fn symbol(self) -> &'static str {
        match self {
            Self::Equal => "=",
            Self::NotEqual => "!=",
            Self::Greater => ">",
            Self::GreaterOrEqual => ">=",
            Self::Less => "<",
            Self::LessOrEqual => "<=",
        }
    }
}

/// A parsed constraint.
#[derive(Debug, Clone, PartialEq)]
pub enum Constraint {
    /// Over a site's labels.
    Label {
        /// The label.
        key: String,
        /// Whether it must (not) be among the values.
        wanted: bool,
        /// The values.
        values: Vec<String>,
    },
    /// Over a site's raw metric value.
    Metric {
        /// The metric.
        name: String,
        /// How to compare.
        comparison: Comparison,
        /// With what, in the metric's unit.
        value: f64,
    },
}

/// A constraint does not parse; shows itself with a caret under the place.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}\n  {text}\n  {:>width$}", "^", width = column + 1)]
pub struct ConstraintError {
    /// The whole constraint.
    pub text: String,
    /// Where, in characters from 0.
    pub column: usize,
    /// What is wrong and what to write.
    pub message: String,
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label {
                key,
                wanted,
                values,
            } => match (&values[..], wanted) {
                ([value], true) => write!(f, "{key} = {value}"),
                ([value], false) => write!(f, "{key} != {value}"),
                (_, true) => write!(f, "{key} in ({})", values.join(", ")),
                (_, false) => write!(f, "{key} not in ({})", values.join(", ")),
            },
            Self::Metric {
                name,
                comparison,
                value,
            } => write!(f, "{name} {} {value}", comparison.symbol()),
        }
    }
}

impl Constraint {
    /// Whether a site with these labels and metrics satisfies it; if not, a sentence that says
    /// what it has instead.
    ///
    /// # Errors
    /// The sentence.
    pub fn check(
        &self,
        labels: &BTreeMap<String, String>,
        metrics: &BTreeMap<String, f64>,
    ) -> Result<(), String> {
        match self {
            Self::Label {
                key,
                wanted,
                values,
            } => match labels.get(key) {
                None => Err(format!("`{self}`: it has no label {key}")),
                Some(value) if values.contains(value) == *wanted => Ok(()),
                Some(value) => Err(format!("`{self}`: {key} is {value}")),
            },
            Self::Metric {
                name,
                comparison,
                value,
            } => match metrics.get(name) {
                None => Err(format!("`{self}`: it does not report {name}")),
                Some(raw) if comparison.holds(*raw, *value) => Ok(()),
                Some(raw) => Err(format!("`{self}`: {name} is {raw}")),
            },
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
enum Token {
    Word(String),
    Symbol(&'static str),
}

struct Parser<'a> {
    text: &'a str,
    tokens: Vec<(usize, Token)>,
    next: usize,
}

const SYMBOLS: [&str; 12] = [
    "==", "!=", ">=", "=>", "<=", "=<", "=", ">", "<", "(", ")", ",",
];

/// Parses one constraint; `metrics` are those the federation defines.
///
/// # Errors
/// [`ConstraintError`] with the place.
pub fn parse(
    text: &str,
    metrics: &BTreeMap<String, MetricDefinition>,
) -> Result<Constraint, ConstraintError> {
    let mut parser = Parser::new(text)?;
    let constraint = parser.constraint(metrics)?;
    match parser.peek() {
        None => Ok(constraint),
        Some(_) => {
            Err(parser
                .error("nothing may follow here; write each constraint as its own list entry"))
        }
    }
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Result<Self, ConstraintError> {
        let mut parser = Parser {
            text,
            tokens: Vec::new(),
            next: 0,
        };
        if text.len() > CONSTRAINT_BYTES_MAX {
            return Err(ConstraintError {
                text: text.chars().take(60).chain("…".chars()).collect(),
                column: 0,
                message: format!("a constraint has at most {CONSTRAINT_BYTES_MAX} bytes"),
            });
        }
        let mut rest = text;
        let mut column = 0;
        while let Some(first) = rest.chars().next() {
            if first.is_whitespace() {
                rest = &rest[first.len_utf8()..];
                column += 1;
                continue;
            }
            if let Some(symbol) = SYMBOLS.into_iter().find(|symbol| rest.starts_with(symbol)) {
                parser.tokens.push((column, Token::Symbol(symbol)));
                rest = &rest[symbol.len()..];
                column += symbol.len();
                continue;
            }
            let end = rest
                .find(|c: char| c.is_whitespace() || "=!<>(),[]".contains(c))
                .unwrap_or(rest.len());
            if end == 0 {
                return Err(parser.error_at(column, &format!("`{first}` has no meaning here")));
            }
            let word = &rest[..end];
            parser.tokens.push((column, Token::Word(word.to_owned())));
            column += word.chars().count();
            rest = &rest[end..];
        }
        Ok(parser)
    }

    fn error_at(&self, column: usize, message: &str) -> ConstraintError {
        ConstraintError {
            text: self.text.to_owned(),
            column,
            message: message.to_owned(),
        }
    }

    fn error(&self, message: &str) -> ConstraintError {
        let column = self
            .tokens
            .get(self.next)
            .map_or_else(|| self.text.chars().count(), |(column, _)| *column);
        self.error_at(column, message)
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.next).map(|(_, token)| token)
    }

    fn take_word(&mut self, word: &str) -> bool {
        let found = self.peek() == Some(&Token::Word(word.to_owned()));
        self.next += usize::from(found);
        found
    }

    fn take_symbol(&mut self, symbol: &str) -> bool {
        let found = matches!(self.peek(), Some(Token::Symbol(s)) if *s == symbol);
        self.next += usize::from(found);
        found
    }

    fn word(&mut self, what: &str) -> Result<(usize, String), ConstraintError> {
        match self.tokens.get(self.next) {
            Some((column, Token::Word(word))) => {
                self.next += 1;
                Ok((*column, word.clone()))
            }
            _ => Err(self.error(&format!("expected {what}"))),
        }
    }

    fn constraint(
        &mut self,
        metrics: &BTreeMap<String, MetricDefinition>,
    ) -> Result<Constraint, ConstraintError> {
        let (at, key) = self.word("a label or a metric, such as `country` or `carbon`")?;
        check_key(&key).map_err(|message| self.error_at(at, &message))?;
        if self.take_word("not") {
            if !self.take_word("in") {
                return Err(self.error("expected `in`, as in `country not in (DE, SE)`"));
            }
            return self.set(key, false);
        }
        if self.take_word("in") {
            return self.set(key, true);
        }
        let Some(comparison) = self.comparison()? else {
            return Err(self.error(
                "expected an operator: =, !=, in (…), not in (…), or for metrics also <, <=, >, >=",
            ));
        };
        let (place, value) = self.word("a value")?;
        let orders = !matches!(comparison, Comparison::Equal | Comparison::NotEqual);
        if !metrics.contains_key(&key) && !orders {
            check_value(&value).map_err(|message| self.error_at(place, &message))?;
            return Ok(Constraint::Label {
                key,
                wanted: comparison == Comparison::Equal,
                values: vec![value],
            });
        }
        if !metrics.contains_key(&key) {
            return Err(self.error_at(at, &unknown_metric(&key, metrics)));
        }
        match value.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok(Constraint::Metric {
                name: key,
                comparison,
                value: number,
            }),
            _ => Err(self.error_at(place, &format!("`{value}` is not a number"))),
        }
    }

    fn comparison(&mut self) -> Result<Option<Comparison>, ConstraintError> {
        use Comparison as C;
        for (symbol, comparison) in [
            ("==", C::Equal),
            ("=", C::Equal),
            ("!=", C::NotEqual),
            (">=", C::GreaterOrEqual),
            ("=>", C::GreaterOrEqual),
            ("<=", C::LessOrEqual),
            ("=<", C::LessOrEqual),
            (">", C::Greater),
            ("<", C::Less),
        ] {
            if self.take_symbol(symbol) {
                return Ok(Some(comparison));
            }
        }
        for (word, comparison) in [
            ("gt", C::Greater),
            ("gte", C::GreaterOrEqual),
            ("lt", C::Less),
            ("lte", C::LessOrEqual),
        ] {
            if self.take_word(word) {
                return Ok(Some(comparison));
            }
        }
        if self.take_word("is") {
            let negated = self.take_word("not");
            return Ok(Some(if negated { C::NotEqual } else { C::Equal }));
        }
        let (strict, loose) = if self.take_word("greater") {
            (C::Greater, C::GreaterOrEqual)
        } else if self.take_word("less") || self.take_word("lesser") {
            (C::Less, C::LessOrEqual)
        } else {
            return Ok(None);
        };
        if !self.take_word("than") {
            return Err(self.error("expected `than`"));
        }
        if !self.take_word("or") {
            return Ok(Some(strict));
        }
        if !self.take_word("equal") {
            return Err(self.error("expected `equal`"));
        }
        Ok(Some(loose))
    }

    fn set(&mut self, key: String, wanted: bool) -> Result<Constraint, ConstraintError> {
        if !self.take_symbol("(") {
            return Err(self.error("expected `(`, as in `country in (DE, SE)`"));
        }
        let mut values = Vec::new();
        loop {
            if !values.is_empty() && self.take_symbol(")") {
                break;
            }
            let (at, value) = self.word("a value; a set has at least one")?;
            check_value(&value).map_err(|message| self.error_at(at, &message))?;
            values.push(value);
            if self.take_symbol(",") {
                continue;
            }
            if self.take_symbol(")") {
                break;
            }
            return Err(self.error("expected `,` or `)`"));
        }
        Ok(Constraint::Label {
            key,
            wanted,
            values,
        })
    }
}

/// Names the metrics there are, and the one that was probably meant.
pub fn unknown_metric(name: &str, metrics: &BTreeMap<String, MetricDefinition>) -> String {
    let close = metrics
        .keys()
        .map(|known| (strsim::damerau_levenshtein(known, name), known))
        .min()
        .filter(|(distance, _)| *distance <= 2)
        .map(|(_, known)| format!(" Did you mean `{known}`?"))
        .unwrap_or_default();
    let known: Vec<&str> = metrics.keys().map(String::as_str).collect();
    format!(
        "unknown metric `{name}`.{close} The federation defines: {}",
        known.join(", ")
    )
}

fn label_part(text: &str, limit: usize) -> bool {
    let edge = |c: char| c.is_ascii_alphanumeric() || c == '_';
    text.len() <= limit
        && text.chars().all(|c| edge(c) || c == '-' || c == '.')
        && text.starts_with(edge)
        && text.ends_with(edge)
}

/// Checks a label key: a name of at most 63 characters, optionally behind a prefix of at most 253
/// and a slash.
///
/// # Errors
/// The rule that it breaks.
pub fn check_key(key: &str) -> Result<(), String> {
    let good = match key.split_once('/') {
        Some((prefix, name)) => label_part(prefix, 253) && label_part(name, 63),
        None => label_part(key, 63),
    };
    if good {
        Ok(())
    } else {
        Err(format!(
            "`{key}` is not a label or metric name: letters, digits, `-`, `_`, `.`, at most 63, optionally behind a prefix and `/`"
        ))
    }
}

/// Checks a label value: 1 to 63 characters.
///
/// # Errors
/// The rule that it breaks.
pub fn check_value(value: &str) -> Result<(), String> {
    if label_part(value, 63) {
        Ok(())
    } else {
        Err(format!(
            "`{value}` is not a label value: letters, digits, `-`, `_`, `.`, 1 to 63 of them"
        ))
    }
}

#[cfg(test)]
mod tests {
    use krake_model::metric::default_definitions;
    use proptest::prelude::*;

    use super::*;

    fn ok(text: &str) -> Constraint {
        parse(text, &default_definitions()).unwrap_or_else(|error| panic!("{error}"))
    }

    fn error(text: &str) -> ConstraintError {
        parse(text, &default_definitions()).unwrap_err()
    }

    #[test]
    fn every_spelling_of_the_grammar_is_read() {
        for text in [
            "location=DE",
            "location == DE",
            "location is DE",
            "location in (DE,)",
            "location in(DE)",
        ] {
            assert_eq!(ok(text).to_string(), "location = DE", "{text}");
        }
        for text in [
            "location != DE",
            "location is not DE",
            "location not in (DE)",
        ] {
            assert_eq!(ok(text).to_string(), "location != DE", "{text}");
        }
        for text in [
            "carbon<=400",
            "carbon =< 400",
            "carbon lte 4e2",
            "carbon less than or equal 400",
            "carbon lesser than or equal 400",
        ] {
            assert_eq!(ok(text).to_string(), "carbon <= 400", "{text}");
        }
        for text in ["carbon>400", "carbon gt 400", "carbon greater than 400"] {
            assert_eq!(ok(text).to_string(), "carbon > 400", "{text}");
        }
        assert_eq!(ok("a/b = c").to_string(), "a/b = c");
    }

    #[test]
    fn what_is_not_in_the_grammar_is_refused_with_its_place() {
        for (text, column) in [
            ("location in ()", 13),
            ("location in [DE]", 12),
            ("location in DE", 12),
            ("location IN (DE)", 9),
            ("my key = 1", 3),
            ("location > 5", 0),
            ("carbon <= many", 10),
            ("carbon <=", 9),
            ("carbon <= 4 5", 12),
            ("", 0),
            ("-a = b", 0),
        ] {
            let error = error(text);
            assert_eq!(error.column, column, "{text}: {error}");
        }
        let shown = error("carbn <= 400").to_string();
        assert!(shown.contains("Did you mean `carbon`?"), "{shown}");
        assert!(shown.ends_with("  carbn <= 400\n  ^"), "{shown}");
    }

    #[test]
    fn an_absent_label_or_metric_satisfies_nothing() {
        let labels = BTreeMap::from([("country".to_owned(), "DE".to_owned())]);
        let metrics = BTreeMap::from([("carbon".to_owned(), 400.0)]);
        let holds = |text: &str| ok(text).check(&labels, &metrics).is_ok();
        assert!(holds("country in (SE, DE)"));
        assert!(!holds("country != DE"));
        assert!(!holds("tier != gold"));
        assert!(!holds("tier not in (gold)"));
        assert!(holds("carbon <= 400"));
        assert!(!holds("carbon < 400"));
        assert!(!holds("pue > 0"));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic_and_what_it_prints_it_reads(text in ".{0,60}") {
            if let Ok(constraint) = parse(&text, &default_definitions()) {
                let again = parse(&constraint.to_string(), &default_definitions());
                prop_assert_eq!(again, Ok(constraint));
            }
        }
    }
}
