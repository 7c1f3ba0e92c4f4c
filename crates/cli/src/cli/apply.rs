//! `apply`, and reading the manifests that other commands share.

use futures::{StreamExt, TryStreamExt};
use serde_json::{Value, json};

use super::args::{ApplyArgs, DryRun, Files};
use super::exit::Exit;
use super::format::Format;
use super::kinds;
use super::report::{Failure, Outcome, Report};
use super::session::Session;
use super::wait::{self, Goal, Target};
use crate::client::{Applied, ApplyOptions, ApplyOutcome, ClientError, Resource};
use crate::manifest::{Document, Wrap, check, load};

/// Requests that check at once.
const CONCURRENT: usize = 8;

/// Reads and checks what `-f` names.
///
/// # Errors
/// Everything that is wrong with it; nothing was sent.
pub fn read(files: &Files, namespace: &str, fixed: bool) -> Outcome<Vec<Document>> {
    let wrap = Wrap {
        name: files.name.clone(),
        require: files.require.clone(),
        weights: files.weight.clone(),
    };
    let sources = load::sources(&files.filename, files.recursive)?;
    let mut documents = load::documents(sources, &wrap)?;
    let reports = check::check(&mut documents, namespace, fixed);
    if reports.is_empty() {
        Ok(documents)
    } else {
        Err(Failure::all(reports))
    }
}

/// A node's refusal, at the places in the manifest that it speaks of.
pub fn explain(document: &Document, error: ClientError) -> Failure {
    let ClientError::Refused(refusal) = error else {
        return error.into();
    };
    let exit = Exit::of_status(refusal.code);
    let reports = if exit == Exit::Invalid {
        check::of_causes(document, &refusal.causes)
    } else {
        Vec::new()
    };
    if reports.is_empty() {
        let mut report = Report::from(*refusal);
        if report.exit == Exit::Invalid {
            report = document.point(report, "metadata.name", "in this object");
        }
        return report.into();
    }
    Failure { exit, reports }
}

/// The kind of each document.
///
/// # Errors
/// When a kind is not served, or cannot be applied.
pub async fn resources_of(session: &Session, documents: &[Document]) -> Outcome<Vec<Resource>> {
    if documents
        .iter()
        .all(|d| d.kind() == "Application" && d.text("/apiVersion") == "krake.dev/v1")
    {
        return Ok(vec![Resource::applications(); documents.len()]);
    }
    let served = session.client.resources().await?;
    documents
        .iter()
        .map(|document| {
            let api = document.text("/apiVersion");
            if api != "krake.dev/v1" {
                let report = Report::new(
                    Exit::Invalid,
                    "unknown-version",
                    format!("`{api}` is not served"),
                );
                return Err(document
                    .point(report, "apiVersion", "write krake.dev/v1")
                    .into());
            }
            kinds::find(&served, document.kind())
                .cloned()
                .map_err(|mut failure| {
                    failure.exit = Exit::Invalid;
                    for report in &mut failure.reports {
                        report.exit = Exit::Invalid;
                        report.snippet = document.snippet("kind", "");
                    }
                    failure
                })
        })
        .collect()
}

fn line(resource: &Resource, document: &Document, done: &str, dry_run: DryRun) -> String {
    let suffix = match dry_run {
        DryRun::None => "",
        DryRun::Server => " (server dry run)",
        DryRun::Client => " (client dry run)",
    };
    format!("{} {done}{suffix}", resource.title(document.name()))
}

const fn word(outcome: ApplyOutcome) -> &'static str {
    match outcome {
        ApplyOutcome::Created => "created",
        ApplyOutcome::Configured => "configured",
        ApplyOutcome::Unchanged => "unchanged",
    }
}

/// Lets a node check all documents and changes nothing, so that a set of manifests with an error
/// in one of them changes nothing either.
async fn rehearse(
    session: &Session,
    work: &[(Resource, Document)],
    options: ApplyOptions,
) -> Outcome<Vec<Applied>> {
    let options = ApplyOptions {
        dry_run: true,
        ..options
    };
    let results: Vec<Result<Applied, Failure>> = futures::stream::iter(work)
        .map(|(resource, document)| async move {
            let client = &session.client;
            client
                .apply_object(resource, &document.object, options)
                .await
                .map_err(|error| explain(document, error))
        })
        .buffered(CONCURRENT)
        .collect()
        .await;
    let (good, bad): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    if bad.is_empty() {
        return Ok(good.into_iter().filter_map(Result::ok).collect());
    }
    let failures: Vec<Failure> = bad.into_iter().filter_map(Result::err).collect();
    let exit = failures
        .first()
        .map_or(Exit::Failed, |failure| failure.exit);
    let mut reports: Vec<Report> = failures.into_iter().flat_map(|f| f.reports).collect();
    if let (Some(last), true) = (reports.last_mut(), work.len() > 1) {
        let total = work.len();
        last.help.push(format!(
            "nothing was applied: all {total} objects are checked first"
        ));
    }
    // The same trouble with each (no token, no majority) is said once.
    reports.dedup_by(|a, b| a.message == b.message && a.snippet.is_none());
    Err(Failure { exit, reports })
}

/// Runs the command.
///
/// # Errors
/// When a manifest is wrong, a node refuses it, or it is not ready in time.
pub async fn run(session: &Session, arguments: &ApplyArgs) -> Outcome {
    let documents = {
        let files = arguments.files.clone();
        let (namespace, fixed) = (session.namespace.clone(), session.namespace_fixed);
        blocking(move || read(&files, &namespace, fixed)).await?
    };
    if arguments.dry_run == DryRun::Client {
        return dry(session, arguments, &documents);
    }
    let resources = resources_of(session, &documents).await?;
    let work: Vec<(Resource, Document)> = resources.into_iter().zip(documents).collect();
    let options = ApplyOptions {
        force: arguments.force_conflicts,
        dry_run: false,
    };
    let mut done: Vec<Applied> = Vec::new();
    if arguments.dry_run == DryRun::Server {
        done = rehearse(session, &work, options).await?;
        print(session, arguments, &work, &done)?;
        return Ok(());
    }
    if work.len() > 1 {
        rehearse(session, &work, options).await?;
    }
    for (resource, document) in &work {
        match session
            .client
            .apply_object(resource, &document.object, options)
            .await
        {
            Ok(applied) => done.push(applied),
            Err(error) => {
                print(session, arguments, &work, &done)?;
                return Err(half_done(&work, done.len(), explain(document, error)));
            }
        }
    }
    print(session, arguments, &work, &done)?;
    if !arguments.wait {
        return Ok(());
    }
    let targets = work
        .iter()
        .zip(&done)
        .filter(|((resource, _), _)| resource.kind == "Application")
        .map(|((resource, document), applied)| Target {
            resource: resource.clone(),
            namespace: document.namespace().to_owned(),
            name: document.name().to_owned(),
            uid: uid(&applied.object),
        })
        .collect();
    wait::until(session, targets, &Goal::Running, arguments.timeout).await
}

fn uid(object: &Value) -> Option<String> {
    let uid = object.pointer("/metadata/uid")?.as_str()?;
    Some(uid.to_owned())
}

/// Says what was applied and what was not.
fn half_done(work: &[(Resource, Document)], done: usize, mut failure: Failure) -> Failure {
    if work.len() < 2 {
        return failure;
    }
    let names = |part: &[(Resource, Document)]| {
        let names: Vec<String> = part
            .iter()
            .map(|(_, document)| format!("{}/{}", document.namespace(), document.name()))
            .collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    };
    if let Some(report) = failure.reports.last_mut() {
        report
            .notes
            .push(format!("applied: {}", names(&work[..done])));
        report
            .notes
            .push(format!("not applied: {}", names(&work[done..])));
        report.help.push(
            "apply again when it is mended: what is applied already stays as it is".to_owned(),
        );
    }
    failure
}

fn print(
    session: &Session,
    arguments: &ApplyArgs,
    work: &[(Resource, Document)],
    done: &[Applied],
) -> Outcome {
    for warning in done.iter().flat_map(|applied| &applied.warnings) {
        session.ui.note(&format!("warning: {warning}"));
    }
    let output = &arguments.output;
    match output {
        Format::Table | Format::Wide => {
            let lines: Vec<String> = work
                .iter()
                .zip(done)
                .map(|((resource, document), applied)| {
                    line(resource, document, word(applied.outcome), arguments.dry_run)
                })
                .collect();
            session.ui.out(&lines.join("\n"))
        }
        Format::Name => {
            let lines: Vec<String> = work
                .iter()
                .take(done.len())
                .map(|(resource, document)| resource.title(document.name()))
                .collect();
            session.ui.out(&lines.join("\n"))
        }
        _ => {
            let objects: Vec<&Value> = done.iter().map(|applied| &applied.object).collect();
            let value = match objects[..] {
                [one] if work.len() == 1 => one.clone(),
                _ => json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": objects}),
            };
            session.ui.out(&output.print(&value))
        }
    }
}

/// What `--dry-run=client` shows.
fn dry(session: &Session, arguments: &ApplyArgs, documents: &[Document]) -> Outcome {
    if arguments.output.is_table() || arguments.output == Format::Name {
        let lines: Vec<String> = documents
            .iter()
            .map(|document| {
                let resource = Resource {
                    singular_name: document.kind().to_lowercase(),
                    ..Resource::applications()
                };
                line(&resource, document, "checked", DryRun::Client)
            })
            .collect();
        return session.ui.out(&lines.join("\n"));
    }
    for document in documents {
        session.ui.out(&arguments.output.print(&document.object))?;
    }
    Ok(())
}

/// Runs what blocks (reading stdin) beside the runtime, so that Ctrl-C still ends the program.
///
/// # Errors
/// As `work`.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Outcome<T> + Send + 'static,
) -> Outcome<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(Report::new(
            Exit::Failed,
            "bug",
            format!("reading the manifests broke off: {error}"),
        )
        .into()),
    }
}

/// Deletes what manifests name; used by `delete -f`.
///
/// # Errors
/// When one cannot be read.
pub async fn named(
    session: &Session,
    filename: Vec<std::path::PathBuf>,
    recursive: bool,
) -> Outcome<Vec<(Resource, String, String)>> {
    let documents = blocking(move || {
        let sources = load::sources(&filename, recursive)?;
        load::documents(sources, &Wrap::default())
    })
    .await?;
    let resources = resources_of(session, &documents).await?;
    futures::stream::iter(resources.into_iter().zip(documents))
        .map(|(resource, document)| {
            let namespace = match document.namespace() {
                "" => session.namespace.clone(),
                namespace => namespace.to_owned(),
            };
            if document.name().is_empty() {
                let report = Report::new(
                    Exit::Invalid,
                    "no-name",
                    format!("the {} has no name", document.kind()),
                );
                return Err(document
                    .point(report, "metadata", "`metadata.name` is missing")
                    .into());
            }
            Ok((resource, namespace, document.name().to_owned()))
        })
        .try_collect()
        .await
}
