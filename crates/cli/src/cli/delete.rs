//! `delete`.

use super::apply;
use super::args::DeleteArgs;
use super::exit::Exit;
use super::kinds;
use super::report::{Failure, Outcome, Report};
use super::session::Session;
use super::wait::{self, Goal, Target};
use crate::client::{Deletion, Resource};

/// Runs the command.
///
/// # Errors
/// When an object is not there, cannot be deleted, or is not gone in time.
pub async fn run(session: &Session, arguments: &DeleteArgs) -> Outcome {
    let objects: Vec<(Resource, String, String)> = if arguments.filename.is_empty() {
        kinds::select_named(session, &arguments.what)
            .await?
            .into_iter()
            .flat_map(|selection| {
                let resource = selection.resource;
                let namespace = session.namespace.clone();
                selection
                    .names
                    .into_iter()
                    .map(move |name| (resource.clone(), namespace.clone(), name))
            })
            .collect()
    } else {
        apply::named(session, arguments.filename.clone(), arguments.recursive).await?
    };
    let unforced = objects
        .iter()
        .find(|(resource, ..)| resource.kind != "Site");
    if let Some((resource, ..)) = unforced.filter(|_| arguments.force) {
        let text = format!(
            "--force is for sites; {} is gone when every site has removed its copy",
            resource.kind
        );
        return Err(Report::new(Exit::Usage, "usage", text).into());
    }
    let dry_run = arguments.dry_run.is_some();
    let how = Deletion {
        force: arguments.force,
        dry_run,
    };
    let mut targets = Vec::new();
    let mut failure: Option<Failure> = None;
    for (resource, namespace, name) in objects {
        let deleted = session
            .client
            .delete_object(&resource, &namespace, &name, how)
            .await;
        match deleted {
            Ok(uid) => {
                let suffix = if dry_run { " (server dry run)" } else { "" };
                let title = resource.title(&name);
                // Its applications and its votes move first: `--wait` waits for that.
                let word = if resource.kind == "Site" {
                    "is leaving"
                } else {
                    "deleted"
                };
                session.ui.out(&format!("{title} {word}{suffix}"))?;
                targets.push(Target {
                    resource,
                    namespace,
                    name,
                    uid: Some(uid),
                });
            }
            Err(error) if error.is_not_found() && arguments.ignore_not_found => {}
            // The others are deleted nevertheless: that one cannot be is no reason to keep them.
            Err(error) => {
                let more = Failure::from(error);
                match &mut failure {
                    Some(failure) => failure.reports.extend(more.reports),
                    None => failure = Some(more),
                }
            }
        }
    }
    if arguments.wait && !dry_run {
        wait::until(session, targets, &Goal::Deleted, arguments.timeout).await?;
    }
    failure.map_or(Ok(()), Err)
}
