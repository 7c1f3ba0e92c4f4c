//! The one place that prints: answers on standard output, the rest on standard error.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use clap::CommandFactory;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use krake_testnet::progress::{Event, Progress};
use parking_lot::Mutex;

use super::arguments::Arguments;

/// Form of an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Table,
    /// For programs: one JSON object.
    Json,
}

/// A line or more of an answer. A reader that went away is no error.
pub fn print(text: &str) {
    let mut out = anstream::stdout();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// A value of an answer.
pub fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Something to notice.
pub fn notice(text: &str) {
    let _ = writeln!(anstream::stderr(), "{text}");
}

/// Raw bytes of a log; whether somebody still reads.
pub fn pass_on(bytes: &[u8]) -> bool {
    let mut out = std::io::stdout();
    out.write_all(bytes).and_then(|()| out.flush()).is_ok()
}

/// The error with its causes.
pub fn failed(error: &anyhow::Error) -> ExitCode {
    let mut text = format!("error: {error}");
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text = format!("{text}\n  because: {cause}");
        }
    }
    notice(&text);
    ExitCode::FAILURE
}

/// The completion script.
pub fn completion(shell: clap_complete::Shell) {
    let mut script = Vec::new();
    clap_complete::generate(
        shell,
        &mut Arguments::command(),
        "krake-testnet",
        &mut script,
    );
    pass_on(&script);
}

/// Bars on a terminal; a line for each finished step elsewhere.
pub fn progress() -> Progress {
    if std::io::stderr().is_terminal() {
        bars()
    } else {
        Progress::default()
    }
}

fn bars() -> Progress {
    let all = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("  {prefix:<20} {bar:24} {pos:>3}/{len:<3} {msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("█▌░");
    let steps: Arc<Mutex<Vec<(String, ProgressBar)>>> = Arc::default();
    Progress::new(move |event| match event {
        Event::Line(line) => {
            let _ = all.println(line);
        }
        Event::Step {
            name,
            done,
            total,
            elapsed,
        } => {
            let mut steps = steps.lock();
            let known = steps.iter().find(|(known, _)| known == name);
            let bar = match known {
                Some((_, bar)) => bar.clone(),
                None => {
                    let bar = all.add(ProgressBar::new(total as u64));
                    bar.set_style(style.clone());
                    bar.set_prefix(name.to_owned());
                    steps.push((name.to_owned(), bar.clone()));
                    bar
                }
            };
            bar.set_position(done as u64);
            if done == total {
                bar.finish_with_message(format!("{:.1} s", elapsed.as_secs_f32()));
            }
        }
    })
}
