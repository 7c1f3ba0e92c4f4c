//! `delete`.

use super::apply;
use super::args::DeleteArgs;
use super::kinds;
use super::report::{Failure, Outcome};
use super::session::Session;
use super::wait::{self, Goal, Target};
use crate::client::Resource;

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
    let dry_run = arguments.dry_run.is_some();
    let mut targets = Vec::new();
    let mut failure: Option<Failure> = None;
    for (resource, namespace, name) in objects {
        let deleted = session
            .client
            .delete_object(&resource, &namespace, &name, dry_run)
            .await;
        match deleted {
            Ok(uid) => {
                let suffix = if dry_run { " (server dry run)" } else { "" };
                let title = resource.title(&name);
                session.ui.out(&format!("{title} deleted{suffix}"))?;
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
