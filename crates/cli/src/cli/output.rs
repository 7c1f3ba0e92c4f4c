//! Printing: data to stdout, talk to stderr.

use std::io::{IsTerminal, Write};

use comfy_table::{ColumnConstraint, ContentArrangement, Table, TableStyle, Width};
use serde_json::Value;

use super::report::{Look, Outcome, Report};

/// Where and how to print.
#[derive(Debug, Clone, Copy)]
pub struct Ui {
    /// Nothing but data and errors.
    pub quiet: bool,
    /// Every request.
    pub verbose: bool,
    /// Somebody looks at stderr.
    pub terminal: bool,
    /// How errors are drawn.
    pub look: Look,
}

impl Ui {
    /// From the flags and the surroundings.
    pub fn new(color: anstream::ColorChoice, quiet: bool, verbose: bool) -> Self {
        color.write_global();
        let stderr = std::io::stderr();
        let choice = anstream::AutoStream::choice(&stderr);
        let locale = ["LC_ALL", "LC_CTYPE", "LANG"]
            .into_iter()
            .find_map(|name| std::env::var(name).ok().filter(|value| !value.is_empty()));
        let unicode = locale.is_none_or(|locale| {
            let locale = locale.to_lowercase();
            locale.contains("utf-8") || locale.contains("utf8")
        });
        Self {
            quiet,
            verbose,
            terminal: stderr.is_terminal() && std::env::var_os("TERM").is_none_or(|t| t != "dumb"),
            look: Look {
                color: choice != anstream::ColorChoice::Never,
                unicode,
            },
        }
    }

    /// Data.
    pub fn out(&self, text: &str) -> Outcome {
        let mut stdout = anstream::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        if !text.is_empty() && !text.ends_with('\n') {
            stdout.write_all(b"\n")?;
        }
        stdout.flush()?;
        Ok(())
    }

    /// Talk.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(anstream::stderr(), "{text}");
        }
    }

    /// An error.
    pub fn report(&self, report: &Report) {
        let _ = write!(anstream::stderr(), "{}", report.render(self.look));
    }
}

/// Text as YAML would write the value.
pub fn to_yaml(value: &Value) -> String {
    serde_saphyr::to_string(value).unwrap_or_else(|_| value.to_string())
}

/// Rows under headings, without borders. Widths only grow, so that rows printed later (a watch)
/// stand under the same headings.
#[derive(Debug, Clone)]
pub struct Grid {
    headings: Vec<String>,
    widths: Vec<u16>,
}

impl Grid {
    /// With these headings.
    pub fn new(headings: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let headings: Vec<String> = headings.into_iter().map(Into::into).collect();
        Self {
            widths: vec![0; headings.len()],
            headings,
        }
    }

    /// Rows, under the headings when `headings` is set.
    pub fn render(&mut self, rows: &[Vec<String>], headings: bool) -> String {
        let mut table = Table::new();
        table
            .load_style(TableStyle::new())
            .set_content_arrangement(ContentArrangement::Disabled);
        if headings {
            table.add_row(&self.headings);
        }
        for row in rows {
            table.add_row(row.iter().map(|cell| {
                // A cell is one line, whatever a message contains.
                cell.replace(super::report::is_unseen, " ")
            }));
        }
        let content = table.column_max_content_widths();
        for (index, width) in self.widths.iter_mut().enumerate() {
            *width = (*width).max(content.get(index).copied().unwrap_or(0));
            if let Some(column) = table.column_mut(index) {
                column.set_padding((0, 3));
                let least = width.saturating_add(3);
                column.set_constraint(ColumnConstraint::LowerBoundary(Width::Fixed(least)));
            }
        }
        let mut text = String::new();
        for line in table.lines() {
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Rows under headings, once.
pub fn grid(headings: &[&str], rows: &[Vec<String>]) -> String {
    Grid::new(headings.iter().copied()).render(rows, true)
}

/// A cell of a server's table.
pub fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) => number
            .as_f64()
            .map_or_else(|| number.to_string(), number_text),
        other => other.to_string(),
    }
}

/// A number with at most three decimals.
pub fn number_text(number: f64) -> String {
    let text = format!("{number:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text.is_empty() || text == "-0" {
        "0".to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_under_their_headings_also_later() {
        let mut grid = Grid::new(["NAME", "SITE"]);
        let row = |name: &str, site: &str| vec![name.to_owned(), site.to_owned()];
        assert_eq!(
            grid.render(&[row("shop", "-"), row("long-name", "a b")], true),
            "NAME        SITE\nshop        -\nlong-name   a b\n"
        );
        assert_eq!(
            grid.render(&[row("x", "osl1\ny")], false),
            "x           osl1 y\n"
        );
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(number_text(0.300_000_1), "0.3");
        assert_eq!(number_text(41.0), "41");
        assert_eq!(number_text(-0.000_01), "0");
        assert_eq!(cell(&Value::Null), "-");
        assert_eq!(cell(&serde_json::json!(1.25)), "1.25");
    }
}
