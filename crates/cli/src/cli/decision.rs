//! Decisions as people read them: `plan` and `why`.

use std::fmt::Write as _;

use krake_model::application::CopyStatus;
use krake_model::decision::{Candidate, DecisionRecord, Outcome as Decided, Verdict};
use krake_model::{AppKey, Timestamp};
use serde_json::json;

use super::apply;
use super::args::{PlanArgs, WhyArgs};
use super::exit::Exit;
use super::output::{grid, number_text};
use super::report::{Failure, Outcome, Report};
use super::session::Session;
use crate::client::{ClientError, Request, Resource, Why, encode};
use crate::manifest::check;

/// `09:41:02Z`, with the day when it is not today's.
fn clock(time: Timestamp, now: Timestamp) -> String {
    let text = time.to_seconds_string();
    let (day, clock) = text.split_once('T').unwrap_or(("", &text));
    if now.to_seconds_string().starts_with(day) {
        clock.to_owned()
    } else {
        format!("{day} {clock}")
    }
}

fn now() -> Timestamp {
    Timestamp::from_millis(jiff::Timestamp::now().as_millisecond())
}

/// `12s`, `3m`, `4h`, `2d`
pub fn short_duration(millis: u64) -> String {
    let seconds = millis / 1000;
    match seconds {
        0..=119 => format!("{seconds}s"),
        120..=7199 => format!("{}m", seconds / 60),
        7200..=172_799 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn note(candidate: &Candidate) -> String {
    let rejections: Vec<String> = candidate
        .rejections
        .iter()
        .map(|rejection| format!("{}: {}", rejection.filter, rejection.message))
        .collect();
    rejections.join("; ")
}

/// All candidates with how their scores came about.
fn candidates(record: &DecisionRecord, past: bool) -> String {
    let metrics: Vec<&String> = record
        .weights
        .iter()
        .filter(|(_, weight)| **weight > 0.0)
        .map(|(metric, _)| metric)
        .collect();
    let mut headings = vec![
        "  SITE".to_owned(),
        "VERDICT".to_owned(),
        "SCORE".to_owned(),
    ];
    headings.extend(
        metrics
            .iter()
            .map(|metric| format!("{metric}×{}", number_text(record.weights[*metric]))),
    );
    headings.extend(["STICKY", "REPORT", "NOTE"].map(str::to_owned));
    let mut next = true;
    let rows: Vec<Vec<String>> = record
        .candidates
        .iter()
        .map(|candidate| {
            let verdict = match candidate.verdict {
                Verdict::Chosen if past => "chosen",
                Verdict::Chosen if record.outcome == Decided::Kept => "stay",
                Verdict::Chosen => "place",
                Verdict::Suitable if std::mem::take(&mut next) => "next",
                Verdict::Suitable => "suitable",
                Verdict::Filtered => "filtered",
            };
            let score = candidate.score;
            let mut row = vec![
                format!("  {}", candidate.target),
                verdict.to_owned(),
                score.map_or_else(|| "-".to_owned(), |score| format!("{score:.3}")),
            ];
            row.extend(metrics.iter().map(|metric| {
                let term = candidate.terms.iter().find(|term| term.metric == **metric);
                term.map_or_else(
                    || "-".to_owned(),
                    |term| {
                        let raw = term.raw.map_or_else(|| "?".to_owned(), number_text);
                        format!("{:.2} ({raw})", term.normalized)
                    },
                )
            }));
            row.push(if candidate.stickiness > 0.0 {
                format!("+{:.2}", candidate.stickiness)
            } else {
                "-".to_owned()
            });
            row.push(if candidate.report_age_ms == u64::MAX {
                "never".to_owned()
            } else {
                short_duration(candidate.report_age_ms)
            });
            row.push(note(candidate));
            row
        })
        .collect();
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    grid(&headings, &rows)
}

fn footer(record: &DecisionRecord) -> String {
    let mut text = format!("  needs {}", record.needs);
    if !record.required_kinds.is_empty() {
        let _ = write!(text, "; kinds {}", record.required_kinds.join(", "));
    }
    text.push('\n');
    text
}

/// What a plan says of one application.
pub fn plan_text(record: &DecisionRecord) -> String {
    let chosen = record.chosen.as_ref().map(ToString::to_string);
    let headline = match (record.outcome, &chosen, &record.previous) {
        (Decided::Kept, Some(site), _) => format!("stays at {site}"),
        (Decided::Moved, Some(site), Some(from)) => format!("would move from {from} to {site}"),
        (_, Some(site), _) => format!("would run at {site}"),
        (_, None, _) => "no site fits".to_owned(),
    };
    format!(
        "Plan for {}: {headline}   (view of {}, nothing was changed)\n  {}\n\n{}\n{}",
        record.app,
        record.decided_by,
        record.reason,
        candidates(record, false),
        footer(record)
    )
}

/// Runs `plan`.
///
/// # Errors
/// When a manifest is wrong, or some application fits nowhere.
pub async fn plan(session: &Session, arguments: &PlanArgs) -> Outcome {
    let files = arguments.files.clone();
    let (namespace, fixed) = (session.namespace.clone(), session.namespace_fixed);
    let documents = apply::blocking(move || apply::read(&files, &namespace, fixed)).await?;
    if let Some(other) = documents.iter().find(|d| d.kind() != "Application") {
        let report = Report::new(
            Exit::Invalid,
            "not-an-application",
            format!("a {} is not placed anywhere", other.kind()),
        );
        return Err(other.point(report, "kind", "only Applications are").into());
    }
    let apps: Vec<_> = documents.iter().map(|d| d.object.clone()).collect();
    let records = match session.client.plan(&apps).await {
        Ok(records) => records,
        Err(ClientError::Refused(mut refusal)) => {
            // `applications[3].spec…`
            let mut reports = Vec::new();
            for cause in &refusal.causes {
                let Some((index, field)) = cause
                    .field
                    .strip_prefix("applications[")
                    .and_then(|rest| rest.split_once("]."))
                else {
                    continue;
                };
                let document = index.parse().ok().and_then(|i: usize| documents.get(i));
                if let Some(document) = document {
                    let mut cause = cause.clone();
                    field.clone_into(&mut cause.field);
                    reports.extend(check::of_causes(document, &[cause]));
                }
            }
            if !reports.is_empty() {
                return Err(Failure::all(reports));
            }
            refusal.message = refusal.message.replace("applications[0].", "");
            return Err(ClientError::Refused(refusal).into());
        }
        Err(error) => return Err(error.into()),
    };
    if arguments.output.is_table() {
        let texts: Vec<String> = records.iter().map(plan_text).collect();
        session.ui.out(&texts.join("\n"))?;
    } else {
        let value = json!({"decisions": records});
        session.ui.out(&arguments.output.print(&value))?;
    }
    // One that stays where its policy forbids it fits nowhere either.
    let fits = |record: &DecisionRecord| {
        record.candidates.iter().any(|candidate| {
            candidate.verdict == Verdict::Chosen && candidate.rejections.is_empty()
        })
    };
    if !records.iter().all(fits) {
        return Err(Failure::silent(Exit::Unplaceable));
    }
    Ok(())
}

fn weights(record: &DecisionRecord) -> String {
    let weights: Vec<String> = record
        .weights
        .iter()
        .map(|(metric, weight)| format!("{metric} {}", number_text(*weight)))
        .collect();
    weights.join(", ")
}

fn copies(copies: &[CopyStatus], now: Timestamp) -> String {
    let rows: Vec<Vec<String>> = copies
        .iter()
        .map(|copy| {
            let role = json!(copy.role);
            vec![
                format!("  {}", copy.site),
                role.as_str().unwrap_or_default().to_owned(),
                copy.state.to_string(),
                copy.ready.clone(),
                copy.namespace.clone().unwrap_or_else(|| "-".to_owned()),
                clock(copy.since, now),
                copy.message.clone().unwrap_or_default(),
            ]
        })
        .collect();
    let headings = [
        "  COPY AT",
        "ROLE",
        "STATE",
        "READY",
        "NAMESPACE",
        "SINCE",
        "MESSAGE",
    ];
    grid(&headings, &rows)
}

/// What `why` says.
pub fn why_text(app: &AppKey, why: &Why, now: Timestamp) -> String {
    let Some(record) = &why.decision else {
        return format!(
            "{app} has not been decided upon yet; its shard's owner does so within moments\n"
        );
    };
    let mut text = match &record.chosen {
        Some(site) => format!("{app} runs at {site}"),
        None => format!("{app} runs nowhere"),
    };
    let _ = writeln!(text, ": {}", record.reason);
    let trigger = json!(record.trigger);
    let _ = writeln!(
        text,
        "  decided     {} at {} by {} ({}, because {})",
        record.id,
        clock(record.decided_at, now),
        record.decided_by,
        record.outcome,
        trigger.as_str().unwrap_or_default()
    );
    let _ = writeln!(
        text,
        "  weights     {}; stickiness {}",
        weights(record),
        number_text(record.stickiness)
    );
    let _ = write!(text, "\n{}\n{}", candidates(record, true), footer(record));
    if !why.copies.is_empty() {
        let _ = write!(text, "\n{}", copies(&why.copies, now));
    }
    if !why.history.is_empty() {
        let rows: Vec<Vec<String>> = why
            .history
            .iter()
            .map(|entry| {
                let dash = || "-".to_owned();
                vec![
                    format!("  {}", clock(entry.decided_at, now)),
                    entry.outcome.to_string(),
                    entry.previous.clone().unwrap_or_else(dash),
                    entry.chosen.clone().unwrap_or_else(dash),
                    entry.reason.clone(),
                ]
            })
            .collect();
        let headings = ["  EARLIER", "OUTCOME", "FROM", "TO", "REASON"];
        let _ = write!(text, "\n{}", grid(&headings, &rows));
    }
    text
}

/// Runs `why`.
///
/// # Errors
/// When there is no such application, or no node answers.
pub async fn why(session: &Session, arguments: &WhyArgs) -> Outcome {
    let word = arguments.app.trim_start_matches("app/");
    let (namespace, name) = word
        .split_once('/')
        .unwrap_or((session.namespace.as_str(), word));
    let app = AppKey::new(namespace, name);
    if !arguments.output.is_table() {
        let path = format!("/v1/why/{}/{}", encode(namespace), encode(name));
        let value = session.client.send(&Request::get(path)).await;
        let value = value.map_err(|error| missing(&app, error))?;
        return session.ui.out(&arguments.output.print(&value.json()?));
    }
    let why = session.client.why(&app).await;
    let why = why.map_err(|error| missing(&app, error))?;
    session.ui.out(&why_text(&app, &why, now()))
}

/// An application that is not there, with where else to look.
fn missing(app: &AppKey, error: ClientError) -> Failure {
    if !error.is_not_found() {
        return error.into();
    }
    let title = Resource::applications().title(&app.name);
    Report::new(
        Exit::NotFound,
        "not-found",
        format!("there is no {title} in namespace {}", app.namespace),
    )
    .help("`krakectl get apps -A` lists all; write NAMESPACE/NAME for another namespace")
    .into()
}
