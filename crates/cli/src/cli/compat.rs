//! Krake's old names, for fingers that know them.

use super::apply;
use super::args::{
    ApplyArgs, DeleteArgs, DryRun, Files, GetArgs, KubeApp, KubeAppFile, KubeCommand,
};
use super::exit::Exit;
use super::format::Format;
use super::report::{Outcome, Report};
use super::session::Session;
use super::{delete, get};
use crate::client::Resource;

/// How long `--wait` waits; Krake had no limit.
const WAIT: std::time::Duration = std::time::Duration::from_secs(600);

/// What Krake had and this does not have.
pub fn reserved(what: &str) -> Report {
    let report = Report::new(
        Exit::Invalid,
        "not-here",
        format!("`krakectl {what}` does not exist any more"),
    );
    if what.starts_with("kube cluster") {
        return report
            .note("a cluster belongs to a site now, and its credentials stay there")
            .help("the site's operator names its kubeconfig in the node's configuration and joins: `krakectl token create`, then `krake-node join TOKEN`; `krakectl get sites` lists them");
    }
    if what.starts_with("core") {
        return report
            .note("metrics are reported by the sites themselves")
            .help(
                "`krakectl get sites -o wide` shows them, `krakectl help constraints` names them",
            );
    }
    report.note("making clusters and machines is not in this release")
}

fn selection(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn get_arguments(what: &[&str], all: bool, output: &Format) -> GetArgs {
    GetArgs {
        what: selection(what),
        all_namespaces: all,
        selector: None,
        field_selector: None,
        output: output.clone(),
        watch: false,
        no_headers: false,
    }
}

async fn apply_file(session: &Session, arguments: &KubeAppFile, create: bool) -> Outcome {
    let path = Resource::applications().object(&session.namespace, &arguments.name);
    let exists = match session.client.get(&path).await {
        Ok(_) => true,
        Err(error) if error.is_not_found() => false,
        Err(error) => return Err(error.into()),
    };
    let title = Resource::applications().title(&arguments.name);
    if create && exists {
        return Err(Report::new(
            Exit::Conflict,
            "already-exists",
            format!("{title} exists already"),
        )
        .help(format!(
            "change it with `krakectl kube app update {}`",
            arguments.name
        ))
        .into());
    }
    if !create && !exists {
        return Err(
            Report::new(Exit::NotFound, "not-found", format!("there is no {title}"))
                .help(format!(
                    "make it with `krakectl kube app create {}`",
                    arguments.name
                ))
                .into(),
        );
    }
    let constraints = arguments.cluster_label_constraint.iter();
    let constraints = constraints.chain(&arguments.cluster_metric_constraint);
    let arguments = ApplyArgs {
        files: Files {
            filename: vec![arguments.file.clone()],
            recursive: false,
            name: Some(arguments.name.clone()),
            require: constraints.cloned().collect(),
            weight: Vec::new(),
        },
        wait: arguments.wait.is_some(),
        timeout: WAIT,
        dry_run: DryRun::None,
        force_conflicts: false,
        server_side: true,
        output: Format::Table,
    };
    apply::run(session, &arguments).await
}

/// `kube …`.
///
/// # Errors
/// As the command that it stands for.
pub async fn kube(session: &Session, command: &KubeCommand) -> Outcome {
    let app = match command {
        KubeCommand::Application(app) => app,
        KubeCommand::Cluster(rest) => {
            if matches!(rest.arguments.first().map(String::as_str), Some("list")) {
                let arguments = get_arguments(&["sites"], false, &Format::Wide);
                return get::run(session, &arguments).await;
            }
            let words = rest.arguments.first().map_or("", String::as_str);
            return Err(reserved(format!("kube cluster {words}").trim_end()).into());
        }
    };
    match app {
        KubeApp::Create(arguments) => apply_file(session, arguments, true).await,
        KubeApp::Update(arguments) => apply_file(session, arguments, false).await,
        KubeApp::Get { name, output } => {
            get::run(session, &get_arguments(&["apps", name], false, output)).await
        }
        KubeApp::List { all, output } => {
            get::run(session, &get_arguments(&["apps"], *all, output)).await
        }
        KubeApp::Delete { name } => {
            let arguments = DeleteArgs {
                what: selection(&["app", name]),
                filename: Vec::new(),
                recursive: false,
                ignore_not_found: false,
                force: false,
                wait: false,
                timeout: WAIT,
                dry_run: None,
            };
            delete::run(session, &arguments).await
        }
    }
}
