//! Errors as people read them: what, where, why, what to do, and a name to search for.

use std::fmt::Write as _;
use std::ops::Range;
use std::sync::Arc;

use anstyle::{AnsiColor, Style};
use miette::{
    GraphicalReportHandler, GraphicalTheme, LabeledSpan, MietteDiagnostic, NamedSource,
    ThemeCharacters, ThemeStyles,
};

use super::exit::Exit;
use crate::client::{Attempt, ClientError, Refusal};
use crate::context::ContextError;

/// Lines longer than this are not shown; the place is named instead.
const LINE_BYTES_MAX: usize = 240;
/// So many errors are shown at once, a little more than one document may have; whoever mends them
/// sees the others then.
const REPORTS_MAX: usize = 25;

/// One error.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// How the command ends because of it.
    pub exit: Exit,
    /// Its name, such as `krake::unknown-field`.
    pub slug: String,
    /// What is wrong.
    pub message: String,
    /// Lines that say more.
    pub notes: Vec<String>,
    /// The place in a text.
    pub snippet: Option<Snippet>,
    /// What to do.
    pub help: Vec<String>,
}

/// A place in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snippet {
    /// What the text is called: a file's name.
    pub name: String,
    /// The text.
    pub text: Arc<str>,
    /// Where to point, and what to say there.
    pub labels: Vec<(Range<usize>, String)>,
}

/// Why a command did not succeed.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// How it ends.
    pub exit: Exit,
    /// What to show; may be nothing when the output says it already.
    pub reports: Vec<Report>,
}

/// The result of a command.
pub type Outcome<T = ()> = Result<T, Failure>;

/// How errors are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// With colours.
    pub color: bool,
    /// With box drawing characters.
    pub unicode: bool,
}

impl Failure {
    /// Ends with `exit` and shows nothing more.
    pub const fn silent(exit: Exit) -> Self {
        Self {
            exit,
            reports: Vec::new(),
        }
    }

    /// From several errors: the code is that of the first.
    pub fn all(reports: Vec<Report>) -> Self {
        Self {
            exit: reports.first().map_or(Exit::Failed, |report| report.exit),
            reports,
        }
    }

    /// The errors that are shown, and how many more there are.
    pub fn shown(&self) -> (&[Report], usize) {
        let shown = &self.reports[..self.reports.len().min(REPORTS_MAX)];
        (shown, self.reports.len() - shown.len())
    }
}

/// Whether a terminal would obey `c` rather than show it: control characters, and those that turn
/// the direction of what follows (Unicode TR 36 §2.12).
pub fn is_unseen(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Names and values come from files and from other people's objects: what a terminal would obey
/// is written out.
fn visible(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unseen(c) && c != '\n' {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}

/// The same for a text in which places are counted in bytes: each such character is replaced by
/// others of its length.
fn visible_in_place(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => shown.push(c),
            _ if !is_unseen(c) => shown.push(c),
            '\r' => shown.push(' '),
            _ if c.len_utf8() == 3 => shown.push(char::REPLACEMENT_CHARACTER),
            _ => shown.extend(std::iter::repeat_n('?', c.len_utf8())),
        }
    }
    shown
}

impl From<Report> for Failure {
    fn from(report: Report) -> Self {
        Self::all(vec![report])
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Report::from(error).into()
    }
}

impl From<ContextError> for Failure {
    fn from(error: ContextError) -> Self {
        Report::from(error).into()
    }
}

impl From<std::io::Error> for Failure {
    /// An error while printing.
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::silent(Exit::BrokenPipe);
        }
        Report::new(
            Exit::Failed,
            "output",
            format!("the output cannot be written: {error}"),
        )
        .into()
    }
}

impl Report {
    /// An error named `krake::SLUG`.
    pub fn new(exit: Exit, slug: &str, message: impl Into<String>) -> Self {
        let slug = if slug.starts_with("krake::") {
            slug.to_owned()
        } else {
            format!("krake::{slug}")
        };
        Self {
            exit,
            slug,
            message: message.into(),
            notes: Vec::new(),
            snippet: None,
            help: Vec::new(),
        }
    }

    /// Adds what to do.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help.push(help.into());
        self
    }

    /// Adds a line that says more.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Points at a place.
    #[must_use]
    pub fn at(mut self, snippet: Snippet) -> Self {
        self.snippet = Some(snippet);
        self
    }

    /// The text for a terminal; ends with a line break.
    pub fn render(&self, look: Look) -> String {
        let paint = |style: Style, text: &str| {
            if look.color {
                format!("{style}{text}{style:#}")
            } else {
                text.to_owned()
            }
        };
        let message = visible(&self.message);
        let mut lines = message.lines();
        let mut text = format!(
            "{} {}  {}\n",
            paint(AnsiColor::Red.on_default().bold(), "error:"),
            paint(Style::new().bold(), lines.next().unwrap_or_default()),
            paint(Style::new().dimmed(), &format!("[{}]", self.slug)),
        );
        for line in lines {
            let _ = writeln!(text, "  {line}");
        }
        if let Some(snippet) = &self.snippet {
            text.push_str(&snippet.render(look));
        }
        for note in &self.notes {
            let _ = writeln!(text, "  {}", visible(note));
        }
        for help in &self.help {
            let word = paint(AnsiColor::Cyan.on_default(), "help:");
            let _ = writeln!(text, "  {word} {}", visible(help));
        }
        text
    }
}

impl Snippet {
    /// The place as `file:line:column`.
    pub fn place(&self) -> String {
        let at = self.labels.first().map_or(0, |(range, _)| range.start);
        let before = &self.text[..at.min(self.text.len())];
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|c| *c != '\n').count() + 1;
        format!("{}:{line}:{column}", self.name)
    }

    fn has_long_lines(&self) -> bool {
        self.labels.iter().any(|(range, _)| {
            let start = self.text[..range.start].rfind('\n').map_or(0, |at| at + 1);
            // The line itself and its neighbours, which are shown too.
            let before = self.text[..start.saturating_sub(1)]
                .rfind('\n')
                .map_or(start, |at| start - at);
            let after = self.text[start..].split('\n').take(2).map(str::len).max();
            before.max(after.unwrap_or(0)) > LINE_BYTES_MAX
        })
    }

    fn render(&self, look: Look) -> String {
        if self.has_long_lines() {
            let mut text = format!("  at {}\n", self.place());
            for (_, label) in self.labels.iter().filter(|(_, label)| !label.is_empty()) {
                let _ = writeln!(text, "  {}", visible(label));
            }
            return text;
        }
        let labels = self.labels.iter().map(|(range, label)| {
            let text = (!label.is_empty()).then(|| visible(label));
            LabeledSpan::new(text, range.start, range.len())
        });
        let diagnostic = MietteDiagnostic::new(String::new()).with_labels(labels);
        let source = NamedSource::new(visible(&self.name), visible_in_place(&self.text));
        let report = miette::Report::new(diagnostic).with_source_code(source);
        let theme = GraphicalTheme {
            characters: if look.unicode {
                ThemeCharacters::unicode()
            } else {
                ThemeCharacters::ascii()
            },
            styles: if look.color {
                ThemeStyles::ansi()
            } else {
                ThemeStyles::none()
            },
        };
        let mut text = String::new();
        let handler = GraphicalReportHandler::new_themed(theme)
            .with_links(false)
            .with_context_lines(1)
            .with_wrap_lines(false)
            .with_width(200);
        if handler.render_report(&mut text, report.as_ref()).is_err() {
            return format!("  at {}\n", self.place());
        }
        // The first line repeats the message, which stands above already.
        let start = text
            .find(['╭', ','])
            .and_then(|at| text[..at].rfind('\n'))
            .map_or(0, |at| at + 1);
        let mut rest = text[start..].trim_end().to_owned();
        rest.push('\n');
        rest
    }
}

impl From<ContextError> for Report {
    fn from(error: ContextError) -> Self {
        let report = Self::new(Exit::Invalid, "context", error.to_string());
        match error {
            ContextError::Read { source, .. } | ContextError::Write { source, .. } => {
                report.note(source.to_string())
            }
            ContextError::Parse { source, .. } => {
                let mut report = report;
                report.notes = source.to_string().lines().map(str::to_owned).collect();
                report.help("a context has `servers`, `token_file` and `namespace`; `krakectl config set-context` writes one")
            }
            ContextError::Unknown { known, name, .. } => {
                let report = Self {
                    exit: Exit::NotFound,
                    slug: "krake::unknown-context".to_owned(),
                    ..report
                };
                if let Some(close) = closest(&name, known.iter().map(String::as_str)) {
                    return report.help(format!("did you mean `{close}`?"));
                }
                if known.is_empty() {
                    return report.help(
                        "there is none yet: `krakectl config set-context NAME --server URL`",
                    );
                }
                report.help(format!("there is: {}", known.join(", ")))
            }
            ContextError::NoHome => report.help("name a file: --config FILE or KRAKE_CONFIG"),
            ContextError::TooLarge { .. } => report.help("is that the right file?"),
        }
    }
}

/// Each address with why it did not answer.
fn addresses(mut report: Report, tried: &[Attempt]) -> Report {
    let width = tried.iter().map(|t| t.address.len()).max().unwrap_or(0);
    for (index, Attempt { address, reason }) in tried.iter().enumerate() {
        let word = if index == 0 { "tried" } else { "     " };
        report = report.note(format!("{word}  {address:<width$}   {reason}"));
    }
    report
}

impl From<ClientError> for Report {
    fn from(error: ClientError) -> Self {
        let message = error.to_string();
        match error {
            ClientError::Address { .. } => Self::new(Exit::Invalid, "address", message),
            ClientError::NoAddress => Self::new(Exit::Invalid, "address", message)
                .help("name one: --server http://127.0.0.1:7443"),
            ClientError::Timeout { tried } => {
                let report = Self::new(Exit::TimedOut, "timeout", message);
                addresses(report, &tried)
                    .help("give it longer with --request-timeout; `krakectl status` shows whether a majority is there")
            }
            ClientError::Unreachable { tried } => {
                let report = Self::new(Exit::Unreachable, "unreachable", message);
                addresses(report, &tried)
                    .help("is a node running here? `systemctl status krake-node`; or start a playground: `krake-testnet up`")
                    .help("another address: --server http://HOST:PORT[,…], KRAKE_SERVER, or `krakectl config use-context NAME`")
            }
            ClientError::Unknown { .. } => Self::new(Exit::Failed, "unknown-outcome", message)
                .help("look whether it was done before you do it again"),
            ClientError::PathTooLong { .. } => Self::new(Exit::Invalid, "name-too-long", message)
                .help("a name has at most 253 characters"),
            ClientError::Refused(refusal) => Self::from(*refusal),
            ClientError::Answer { source, .. } => Self::new(Exit::Failed, "answer", message)
                .note(source.to_string())
                .help("is there a krake-node at this address? `krakectl version` compares the versions"),
        }
    }
}

/// `NotFound` as `not-found`.
fn kebab(reason: &str) -> String {
    let mut text = String::new();
    for c in reason.chars() {
        if c.is_ascii_uppercase() && !text.is_empty() {
            text.push('-');
        }
        text.push(c.to_ascii_lowercase());
    }
    text
}

impl From<Refusal> for Report {
    fn from(refusal: Refusal) -> Self {
        let exit = Exit::of_status(refusal.code);
        let slug = match refusal.reason.as_str() {
            "" => format!("http-{}", refusal.code),
            code if code.starts_with("krake::") => code.to_owned(),
            reason => kebab(reason),
        };
        // A list of causes says the same as the message, one to a line.
        let (message, notes) = if refusal.causes.is_empty() {
            (refusal.message.clone(), Vec::new())
        } else {
            let notes = refusal
                .causes
                .iter()
                .flat_map(|cause| {
                    let text = if cause.field.is_empty() {
                        cause.message.clone()
                    } else {
                        format!("{}: {}", cause.field, cause.message)
                    };
                    text.lines().map(str::to_owned).collect::<Vec<_>>()
                })
                .collect();
            let message = refusal.message.lines().next().unwrap_or_default();
            let message = message.split(": ").next().unwrap_or(message);
            (message.trim_end_matches([':', ' ']).to_owned(), notes)
        };
        let mut report = Self::new(exit, &slug, message);
        report.notes = notes;
        match (refusal.code, refusal.reason.as_str()) {
            (401, _) => report.help("name a token: --token-file FILE, KRAKE_TOKEN_FILE, or a context with token_file; the founder's data directory has admin.token"),
            (403, _) => report,
            (409, "Conflict") if refusal.message.contains("conflict") && !refusal.causes.is_empty() => report
                .help("somebody else set these fields; take them over with --force-conflicts, or leave them out"),
            (409, _) => report,
            (404, "NotFound") => report.help(format!(
                "asked {}; `krakectl get … -A` lists all namespaces",
                refusal.served_by.as_deref().unwrap_or(&refusal.address)
            )),
            (429 | 503, _) => report.help(
                "try again; if it stays, `krakectl status` shows which groups have no leader or no majority",
            ),
            (500, _) => report.help(format!(
                "this is a fault of the node at {}; its log says more",
                refusal.address
            )),
            _ => report,
        }
    }
}

/// The one of `known` that was probably meant.
pub fn closest<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known
        .map(|name| (strsim::damerau_levenshtein(name, word), name))
        .filter(|(distance, name)| *distance <= 2.max(name.len() / 3).min(word.len().max(1) - 1))
        .min()
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Look = Look {
        color: false,
        unicode: true,
    };

    #[test]
    fn a_place_is_drawn_with_its_label() {
        let text = "spec:\n  placement:\n    constrants:\n      - a\n";
        let start = text.find("constrants").unwrap();
        let report = Report::new(Exit::Invalid, "unknown-field", "unknown field `constrants`")
            .at(Snippet {
                name: "shop.yaml".to_owned(),
                text: text.into(),
                labels: vec![(start..start + 10, "did you mean `constraints`?".to_owned())],
            })
            .help("`krakectl init` writes an example");
        insta::assert_snapshot!(report.render(PLAIN));
        let ascii = Look {
            unicode: false,
            ..PLAIN
        };
        assert!(report.render(ascii).is_ascii());
    }

    #[test]
    fn an_endless_line_is_not_printed() {
        let text = "[".repeat(100_000);
        let report = Report::new(Exit::Invalid, "yaml", "too deep").at(Snippet {
            name: "x.yaml".to_owned(),
            text: text.into(),
            labels: vec![(300..301, "here".to_owned())],
        });
        let text = report.render(PLAIN);
        assert!(text.len() < 500 && text.contains("x.yaml:1:301"), "{text}");
    }

    #[test]
    fn all_addresses_are_named() {
        let error = ClientError::Unreachable {
            tried: vec![
                Attempt {
                    address: "http://127.0.0.1:7443".to_owned(),
                    reason: "connection refused".to_owned(),
                },
                Attempt {
                    address: "unix:///run/a.sock".to_owned(),
                    reason: "no such file or directory".to_owned(),
                },
            ],
        };
        insta::assert_snapshot!(Report::from(error).render(PLAIN));
    }

    #[test]
    fn only_close_words_are_proposed() {
        let known = ["constraints", "weights"];
        assert_eq!(
            closest("constrants", known.into_iter()),
            Some("constraints")
        );
        assert_eq!(closest("zebra", known.into_iter()), None);
        assert_eq!(closest("x", ["y"].into_iter()), None);
    }
}
