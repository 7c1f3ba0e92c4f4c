//! Waiting for a state, on a watch that survives its node.

use std::str::FromStr;
use std::time::Duration;

use futures::StreamExt;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;
use tokio::time::Instant;

use super::args::WaitArgs;
use super::exit::Exit;
use super::kinds;
use super::output::Ui;
use super::report::{Failure, Outcome, Report, closest};
use super::session::Session;
use crate::client::{Resource, WatchEventKind, encode};

/// Objects waited for at once.
const CONCURRENT: usize = 32;
/// A watch shows what its node hears; a node that is cut off hears nothing. This often the
/// object is read with a majority's consent, which such a node cannot give.
const CONFIRM: Duration = Duration::from_secs(10);

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Goal {
    /// The condition `Ready` is true for the newest spec.
    Ready,
    /// The newest spec runs and nothing is being moved; that no site fits is an error at once.
    Running,
    /// The object is gone.
    Deleted,
    /// A condition has a status.
    Condition {
        /// Its type.
        name: String,
        /// The status wanted.
        status: String,
    },
    /// `status.phase` is this.
    Phase(String),
}

impl FromStr for Goal {
    type Err = Report;

    fn from_str(text: &str) -> Result<Self, Report> {
        let lower = text.to_lowercase();
        let condition = |name: &str, status: &str| Self::Condition {
            name: name.to_owned(),
            status: status.to_owned(),
        };
        match (lower.as_str(), text.split_once('=')) {
            ("ready" | "running", _) => Ok(Self::Ready),
            ("delete" | "deleted", _) => Ok(Self::Deleted),
            ("placed", _) => Ok(condition("Placed", "True")),
            (_, Some(("condition", rest))) if !rest.is_empty() => {
                let (name, status) = rest.split_once('=').unwrap_or((rest, "True"));
                Ok(condition(name, status))
            }
            (_, Some(("phase" | "state", phase))) if !phase.is_empty() => {
                Ok(Self::Phase(phase.to_owned()))
            }
            _ => {
                let known = ["ready", "placed", "deleted", "condition=", "phase="];
                let report = Report::new(
                    Exit::Usage,
                    "usage",
                    format!("--for={text} is nothing that can be waited for"),
                );
                Err(match closest(&lower, known.into_iter()) {
                    Some(close) => report.help(format!("did you mean --for={close}?")),
                    None => report.help(
                        "there are: ready, placed, deleted, condition=NAME[=STATUS], phase=PHASE",
                    ),
                })
            }
        }
    }
}

/// One object that is waited for.
#[derive(Debug, Clone)]
pub struct Target {
    /// Its kind.
    pub resource: Resource,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its identity, when it is known: one of the same name that comes later is another.
    pub uid: Option<String>,
}

/// An application that could not be applied is tried again, elsewhere too; after this long it is
/// taken as it is.
const FAILED_GRACE: Duration = Duration::from_secs(5);

/// How far an object is.
enum Progress {
    Done,
    NotYet,
    Failed(Box<Failure>),
}

fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    let found = object.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_default()
}

/// Whether what `part` of the status says is about the newest spec.
fn is_current(object: &Value, part: &Value) -> bool {
    let number = |value: &Value, pointer: &str| value.pointer(pointer).and_then(Value::as_i64);
    let observed = number(part, "/observedGeneration")
        .or_else(|| number(object, "/status/observedGeneration"));
    match (observed, number(object, "/metadata/generation")) {
        (Some(observed), Some(generation)) => observed >= generation,
        _ => true,
    }
}

fn condition<'a>(object: &'a Value, name: &str) -> Option<&'a Value> {
    object
        .pointer("/status/conditions")?
        .as_array()?
        .iter()
        .find(|condition| text(condition, "/type").eq_ignore_ascii_case(name))
}

fn has_condition(object: &Value, name: &str, status: &str) -> bool {
    condition(object, name).is_some_and(|condition| {
        text(condition, "/status").eq_ignore_ascii_case(status) && is_current(object, condition)
    })
}

/// One line about an object's state.
pub fn summary(object: &Value) -> String {
    if !is_current(object, &Value::Null) {
        return "Pending  the new spec was not looked at yet".to_owned();
    }
    let phase = match text(object, "/status/phase") {
        "" => text(object, "/status/state"),
        phase => phase,
    };
    let mut line = if phase.is_empty() { "Pending" } else { phase }.to_owned();
    let copies = object.pointer("/status/copies").and_then(Value::as_array);
    let copies: Vec<String> = copies
        .into_iter()
        .flatten()
        .map(|copy| {
            let role = match text(copy, "/role") {
                "active" => String::new(),
                role => format!(" ({role})"),
            };
            let (site, ready) = (text(copy, "/site"), text(copy, "/ready"));
            format!("{ready} at {site}{role}").trim().to_owned()
        })
        .collect();
    if !copies.is_empty() {
        line.push_str("  ");
        line.push_str(&copies.join(", "));
    }
    let message = condition(object, "Ready")
        .filter(|condition| text(condition, "/status") != "True")
        .map(|condition| text(condition, "/message"))
        .unwrap_or_default();
    if let Some(first) = message.lines().next() {
        line.push_str("  ");
        line.push_str(first);
    }
    line
}

/// Shows the state of what is waited for.
#[derive(Debug)]
struct Board {
    ui: Ui,
    bars: Option<MultiProgress>,
}

#[derive(Debug)]
struct Line {
    name: String,
    last: String,
    bar: Option<ProgressBar>,
}

impl Board {
    fn new(ui: Ui) -> Self {
        Self {
            ui,
            bars: (ui.terminal && !ui.quiet).then(MultiProgress::new),
        }
    }

    fn line(&self, name: String) -> Line {
        let bar = self.bars.as_ref().map(|bars| {
            let bar = bars.add(ProgressBar::new_spinner());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed:.dim}") {
                bar.set_style(style);
            }
            bar.set_message(name.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Line {
            name,
            last: String::new(),
            bar,
        }
    }

    fn show(&self, line: &mut Line, state: &str) {
        if line.last == state {
            return;
        }
        state.clone_into(&mut line.last);
        let text = format!("{}  {state}", line.name);
        match (&self.bars, &line.bar) {
            (Some(bars), Some(bar)) => {
                bar.set_message(text.clone());
                let _ = bars.println(text);
            }
            _ => self.ui.note(&text),
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Waits until every target has reached the goal.
///
/// # Errors
/// When time is over, an object goes away, or no node answers.
pub async fn until(
    session: &Session,
    targets: Vec<Target>,
    goal: &Goal,
    timeout: Duration,
) -> Outcome {
    let deadline = Instant::now() + timeout;
    let board = Board::new(session.ui);
    let results: Vec<Outcome> = futures::stream::iter(targets)
        .map(|target| one(session, target, goal, deadline, timeout, &board))
        .buffer_unordered(CONCURRENT)
        .collect()
        .await;
    let failures: Vec<Failure> = results.into_iter().filter_map(Result::err).collect();
    let Some(first) = failures.first() else {
        return Ok(());
    };
    Err(Failure {
        exit: first.exit,
        reports: failures.into_iter().flat_map(|f| f.reports).collect(),
    })
}

async fn one(
    session: &Session,
    target: Target,
    goal: &Goal,
    deadline: Instant,
    timeout: Duration,
    board: &Board,
) -> Outcome {
    let mut line = board.line(target.name.clone());
    let mut state = None;
    let work = follow(session, &target, goal, board, &mut line, &mut state);
    match tokio::time::timeout_at(deadline, work).await {
        Ok(done) => done,
        Err(_) => Err(timed_out(&target, goal, timeout, state.as_ref()).into()),
    }
}

async fn follow(
    session: &Session,
    target: &Target,
    goal: &Goal,
    board: &Board,
    line: &mut Line,
    state: &mut Option<Value>,
) -> Outcome {
    let client = &session.client;
    let path = format!(
        "{}?fieldSelector={}",
        target.resource.collection(Some(&target.namespace)),
        encode(&format!("metadata.name={}", target.name))
    );
    let object_path = target.resource.object(&target.namespace, &target.name);
    let (listing, mut watch) = client.watch(&path, false).await?;
    let mut object = listing.items.into_iter().next();
    let mut confirm = tokio::time::interval_at(Instant::now() + CONFIRM, CONFIRM);
    let mut failed_at = None;
    loop {
        if let Some(object) = &object {
            board.show(line, &summary(object));
            *state = Some(object.clone());
        }
        match judge(target, goal, object.as_ref()) {
            Progress::Done => return Ok(()),
            Progress::NotYet => {}
            Progress::Failed(failure) => return Err(*failure),
        }
        let failed = object.as_ref().filter(|object| {
            *goal == Goal::Running
                && text(object, "/status/phase") == "Failed"
                && is_current(object, &Value::Null)
        });
        failed_at = failed.and(failed_at.or_else(|| Some(Instant::now())));
        let give_up = failed_at.map_or(Instant::now() + CONFIRM, |at| at + FAILED_GRACE);
        tokio::select! {
            () = tokio::time::sleep_until(give_up), if failed_at.is_some() => {
                return Err(failed_report(target, object.as_ref()).into());
            }
            event = watch.next() => {
                let event = event?;
                object = (event.kind != WatchEventKind::Deleted).then_some(event.item);
            }
            _ = confirm.tick() => match client.get(&object_path).await {
                Ok(found) => object = Some(found),
                Err(error) if error.is_not_found() => object = None,
                // The watch goes on as long as any node lives; it says when none does.
                Err(_) => {}
            },
        }
    }
}

fn judge(target: &Target, goal: &Goal, object: Option<&Value>) -> Progress {
    let object = object.filter(|object| {
        let uid = target.uid.as_deref();
        uid.is_none_or(|uid| text(object, "/metadata/uid") == uid)
    });
    let Some(object) = object else {
        if *goal == Goal::Deleted {
            return Progress::Done;
        }
        let title = target.resource.title(&target.name);
        let message = match target.uid {
            Some(_) => format!("{title} was deleted"),
            None => format!("there is no {title} in namespace {}", target.namespace),
        };
        let report = Report::new(Exit::NotFound, "not-found", message);
        return Progress::Failed(Box::new(report.into()));
    };
    let reached = match goal {
        Goal::Ready => has_condition(object, "Ready", "True"),
        // While it moves it is ready at its old site, which is not what was applied.
        Goal::Running => {
            has_condition(object, "Ready", "True") && text(object, "/status/phase") == "Running"
        }
        Goal::Condition { name, status } => has_condition(object, name, status),
        Goal::Phase(phase) => {
            let current = is_current(object, &Value::Null);
            let found = ["/status/phase", "/status/state"]
                .into_iter()
                .any(|pointer| text(object, pointer).eq_ignore_ascii_case(phase));
            found && current
        }
        Goal::Deleted => false,
    };
    if reached {
        return Progress::Done;
    }
    let unplaceable = text(object, "/status/phase") == "Unplaceable"
        && is_current(object, &Value::Null)
        && *goal == Goal::Running;
    if unplaceable {
        let message = condition(object, "Placed").map(|c| text(c, "/message"));
        let name = format!("{}/{}", target.namespace, target.name);
        let report = Report::new(
            Exit::Unplaceable,
            "no-suitable-site",
            format!("no site fits {name} now"),
        );
        let report = match message {
            Some(message) if !message.is_empty() => report.note(message),
            _ => report,
        };
        let report = report.help(format!(
            "`krakectl why {name}` says why for each site; it is placed as soon as one fits"
        ));
        return Progress::Failed(Box::new(report.into()));
    }
    Progress::NotYet
}

fn failed_report(target: &Target, object: Option<&Value>) -> Report {
    let title = target.resource.title(&target.name);
    let report = Report::new(Exit::Failed, "failed", format!("{title} cannot run"));
    let message = object
        .and_then(|object| condition(object, "Ready"))
        .map(|condition| text(condition, "/message"));
    let report = match message {
        Some(message) if !message.is_empty() => report.note(message),
        _ => report,
    };
    report.help(format!(
        "mend it and apply again; `krakectl describe {} {}` shows its events",
        target.resource.singular_name, target.name
    ))
}

fn timed_out(target: &Target, goal: &Goal, timeout: Duration, state: Option<&Value>) -> Report {
    let wanted = match goal {
        Goal::Ready | Goal::Running => "ready".to_owned(),
        Goal::Deleted => "gone".to_owned(),
        Goal::Condition { name, status } => format!("{name}={status}"),
        Goal::Phase(phase) => phase.clone(),
    };
    let title = target.resource.title(&target.name);
    let time = humantime::format_duration(timeout);
    let mut report = Report::new(
        Exit::TimedOut,
        "timeout",
        format!("{title} is not {wanted} after {time}"),
    );
    if let Some(object) = state {
        report = report.note(format!("last seen: {}", summary(object)));
        if *goal == Goal::Deleted {
            let finalizers = object.pointer("/metadata/finalizers");
            if let Some(finalizers) =
                finalizers.filter(|f| f.as_array().is_some_and(|f| !f.is_empty()))
            {
                report = report.note(format!(
                    "kept by {finalizers} until every site has confirmed"
                ));
            }
        }
    }
    report.help(format!(
        "the federation goes on; `krakectl describe {} {}` shows its events",
        target.resource.singular_name, target.name
    ))
}

/// Runs the command.
///
/// # Errors
/// As [`until`].
pub async fn run(session: &Session, arguments: &WaitArgs) -> Outcome {
    let goal: Goal = arguments.state.parse()?;
    let targets: Vec<Target> = kinds::select_named(session, &arguments.what)
        .await?
        .into_iter()
        .flat_map(|selection| {
            let resource = selection.resource;
            selection.names.into_iter().map(move |name| Target {
                resource: resource.clone(),
                namespace: session.namespace.clone(),
                name,
                uid: None,
            })
        })
        .collect();
    let titles: Vec<String> = targets
        .iter()
        .map(|target| target.resource.title(&target.name))
        .collect();
    until(session, targets, &goal, arguments.timeout).await?;
    let met = if goal == Goal::Deleted {
        "deleted"
    } else {
        "condition met"
    };
    let lines: Vec<String> = titles
        .iter()
        .map(|title| format!("{title} {met}"))
        .collect();
    session.ui.out(&lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn target() -> Target {
        Target {
            resource: Resource::applications(),
            namespace: "default".to_owned(),
            name: "shop".to_owned(),
            uid: Some("u".to_owned()),
        }
    }

    fn app(generation: i64, observed: i64, ready: &str, phase: &str) -> Value {
        json!({"metadata": {"uid": "u", "generation": generation}, "status": {"observedGeneration": observed,
            "phase": phase, "conditions": [{"type": "Ready", "status": ready, "message": "1 of 2 pods"}],
            "copies": [{"site": "osl1", "ready": "1/2", "role": "active"}, {"site": "par1", "ready": "2/2", "role": "outgoing"}]}})
    }

    fn done(goal: &Goal, object: Option<&Value>) -> bool {
        matches!(judge(&target(), goal, object), Progress::Done)
    }

    #[test]
    fn ready_is_of_the_newest_spec() {
        assert!(done(&Goal::Ready, Some(&app(2, 2, "True", "Running"))));
        assert!(!done(&Goal::Ready, Some(&app(2, 1, "True", "Running"))));
        assert!(done(&Goal::Ready, Some(&app(2, 2, "True", "Moving"))));
        assert!(!done(&Goal::Running, Some(&app(2, 2, "True", "Moving"))));
        assert!(done(&Goal::Running, Some(&app(2, 2, "True", "Running"))));
        assert!(!done(
            &Goal::Ready,
            Some(&app(2, 2, "False", "Progressing"))
        ));
        assert!(done(
            &Goal::Phase("running".to_owned()),
            Some(&app(1, 1, "True", "Running"))
        ));
    }

    #[test]
    fn an_object_that_is_another_is_gone() {
        let mut other = app(1, 1, "True", "Running");
        assert!(!done(&Goal::Deleted, Some(&other)));
        other["metadata"]["uid"] = "v".into();
        assert!(done(&Goal::Deleted, Some(&other)));
        assert!(done(&Goal::Deleted, None));
        assert!(
            matches!(judge(&target(), &Goal::Ready, None), Progress::Failed(f) if f.exit == Exit::NotFound)
        );
    }

    #[test]
    fn unplaceable_ends_the_wait_for_running_only() {
        let object = app(1, 1, "False", "Unplaceable");
        assert!(
            matches!(judge(&target(), &Goal::Running, Some(&object)), Progress::Failed(f) if f.exit == Exit::Unplaceable)
        );
        assert!(matches!(
            judge(&target(), &Goal::Ready, Some(&object)),
            Progress::NotYet
        ));
    }

    #[test]
    fn the_summary_names_sites_and_reason() {
        assert_eq!(
            summary(&app(1, 1, "False", "Moving")),
            "Moving  1/2 at osl1, 2/2 at par1 (outgoing)  1 of 2 pods"
        );
    }

    #[test]
    fn goals_are_read() {
        assert_eq!("Ready".parse::<Goal>().unwrap(), Goal::Ready);
        assert_eq!("delete".parse::<Goal>().unwrap(), Goal::Deleted);
        let condition = "condition=Synced=False".parse::<Goal>().unwrap();
        assert!(
            matches!(condition, Goal::Condition { name, status } if name == "Synced" && status == "False")
        );
        assert_eq!(
            "redy".parse::<Goal>().unwrap_err().help,
            ["did you mean --for=ready?"]
        );
    }
}
