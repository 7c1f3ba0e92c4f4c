//! The small commands: sites, tokens, contexts, versions, an example to begin with.

use std::io::Write;

use clap::CommandFactory;
use serde_json::{Value, json};

use super::args::{Cli, ConfigCommand, Global, Goal, InitArgs, SiteCommand, TokenCommand};
use super::exit::Exit;
use super::format::Format;
use super::output::{Ui, grid};
use super::report::{Failure, Outcome, Report};
use super::session::{self, Session};
use crate::client::{Request, Resource};
use crate::context::{Context, ContextFile};

/// `site cordon|uncordon`.
///
/// # Errors
/// When a site is not there, or no node answers.
pub async fn site(session: &Session, command: &SiteCommand) -> Outcome {
    let (sites, cordoned) = match command {
        SiteCommand::Cordon { sites } => (sites, true),
        SiteCommand::Uncordon { sites } => (sites, false),
    };
    let resource = Resource {
        name: "sites".to_owned(),
        singular_name: "site".to_owned(),
        namespaced: false,
        kind: "Site".to_owned(),
        short_names: Vec::new(),
        verbs: Vec::new(),
    };
    for name in sites {
        let path = resource.object("", name);
        let site = session.client.get(&path).await?;
        let before = site.pointer("/spec/cordoned").and_then(Value::as_bool) == Some(true);
        let word = match (before, cordoned) {
            (true, true) => "already cordoned",
            (false, false) => "already uncordoned",
            (_, true) => "cordoned",
            (_, false) => "uncordoned",
        };
        if before != cordoned {
            let patch = json!({"spec": {"cordoned": cordoned}});
            session.client.merge(&path, &patch).await?;
        }
        session
            .ui
            .out(&format!("{} {word}", resource.title(name)))?;
    }
    Ok(())
}

/// `token …`.
///
/// # Errors
/// When a token is not there, or no node answers.
pub async fn token(session: &Session, command: &TokenCommand) -> Outcome {
    match command {
        TokenCommand::Create { ttl, site, output } => {
            let token = session.client.create_token(*ttl, site.as_deref()).await?;
            if !output.is_table() {
                return session.ui.out(&output.print(&json!(token)));
            }
            session.ui.out(&token.token)?;
            let who = site
                .as_deref()
                .map_or_else(String::new, |site| format!(" as {site}"));
            session.ui.note(&format!(
                "one site can join{who} until {} (id {}): krake-node join TOKEN",
                token.expires_at.to_seconds_string(),
                token.id
            ));
            Ok(())
        }
        TokenCommand::List { output } => {
            let tokens = session.client.tokens().await?;
            if !output.is_table() {
                return session.ui.out(&output.print(&json!({"tokens": tokens})));
            }
            if tokens.is_empty() {
                session
                    .ui
                    .note("no invitations; `krakectl token create` makes one");
                return Ok(());
            }
            let dash = || "-".to_owned();
            let rows: Vec<Vec<String>> = tokens
                .into_iter()
                .map(|token| {
                    vec![
                        token.id,
                        token.state,
                        token.expires_at.to_seconds_string(),
                        token.site.unwrap_or_else(dash),
                        token.issuer,
                        token.used_by.unwrap_or_else(dash),
                    ]
                })
                .collect();
            let headings = ["ID", "STATE", "EXPIRES", "SITE", "MADE BY", "USED BY"];
            session.ui.out(&grid(&headings, &rows))
        }
        TokenCommand::Revoke { id } => {
            for id in id {
                session.client.revoke_token(id).await?;
                session.ui.out(&format!("token {id} revoked"))?;
            }
            Ok(())
        }
    }
}

/// `config …`.
///
/// # Errors
/// When the file cannot be read or written, or has no such context.
pub fn config(global: &Global, ui: Ui, command: &ConfigCommand) -> Outcome {
    let path = session::config_path(global)?;
    let mut file = ContextFile::load(&path)?;
    match command {
        ConfigCommand::GetContexts { output } => {
            if *output == Format::Name {
                let names: Vec<&str> = file.contexts.keys().map(String::as_str).collect();
                return ui.out(&names.join("\n"));
            }
            if file.contexts.is_empty() {
                ui.note(&format!("no contexts in {}", path.display()));
                return Ok(());
            }
            let rows: Vec<Vec<String>> = file
                .contexts
                .iter()
                .map(|(name, context)| {
                    let current = file.current_context.as_ref() == Some(name);
                    let token = context.token_path(&path);
                    vec![
                        if current { "*" } else { "" }.to_owned(),
                        name.clone(),
                        context.servers.join(","),
                        context
                            .namespace
                            .clone()
                            .unwrap_or_else(|| "default".to_owned()),
                        token.map_or_else(|| "-".to_owned(), |token| token.display().to_string()),
                    ]
                })
                .collect();
            let headings = ["CURRENT", "NAME", "SERVERS", "NAMESPACE", "TOKEN FILE"];
            ui.out(&grid(&headings, &rows))
        }
        ConfigCommand::UseContext { name } => {
            file.select(Some(name), &path)?;
            file.current_context = Some(name.clone());
            file.save(&path)?;
            ui.out(&format!("context {name} is current now"))
        }
        ConfigCommand::CurrentContext => match &file.current_context {
            Some(name) => ui.out(name),
            None => Err(Report::new(
                Exit::NotFound,
                "no-context",
                format!("no context is current in {}", path.display()),
            )
            .help("`krakectl config use-context NAME` makes one current")
            .into()),
        },
        ConfigCommand::View => {
            ui.note(&format!("# {}", path.display()));
            ui.out(&toml::to_string(&file).unwrap_or_default())
        }
        ConfigCommand::SetContext { name, current } => {
            let new = !file.contexts.contains_key(name);
            if new && global.server.is_empty() {
                return Err(Report::new(
                    Exit::Usage,
                    "usage",
                    format!("the new context `{name}` needs an address"),
                )
                .help(format!(
                    "krakectl config set-context {name} --server http://127.0.0.1:7443 --token-file FILE"
                ))
                .into());
            }
            set_context(global, file.contexts.entry(name.clone()).or_default());
            if *current || file.current_context.is_none() {
                file.current_context = Some(name.clone());
            }
            file.save(&path)?;
            let word = if new { "created" } else { "changed" };
            ui.out(&format!("context {name} {word}"))
        }
        ConfigCommand::DeleteContext { name } => {
            file.select(Some(name), &path)?;
            file.contexts.remove(name);
            if file.current_context.as_ref() == Some(name) {
                file.current_context = None;
            }
            file.save(&path)?;
            ui.out(&format!("context {name} deleted"))
        }
    }
}

fn set_context(global: &Global, context: &mut Context) {
    if !global.server.is_empty() {
        context.servers.clone_from(&global.server);
    }
    if let Some(file) = &global.token_file {
        // What is relative on the command line is relative to the working directory.
        let absolute = std::path::absolute(file).unwrap_or_else(|_| file.clone());
        context.token_file = Some(absolute);
    }
    if let Some(namespace) = &global.namespace {
        context.namespace = Some(namespace.clone());
    }
}

/// `version`.
///
/// # Errors
/// When no node answers.
pub async fn version(session: &Session) -> Outcome {
    let answer = session.client.send(&Request::get("/version")).await?;
    let version: Value = answer.json()?;
    let name = version.get("gitVersion").and_then(Value::as_str);
    let site = answer.served_by.as_deref().unwrap_or("?");
    session.ui.out(&format!(
        "node      {} (of {site}, at {})",
        name.unwrap_or("unknown"),
        answer.address
    ))
}

/// The example that `init` writes.
pub fn example(arguments: &InitArgs) -> String {
    let weights = match arguments.goal {
        Goal::Green => "{carbon: 0.8, price: 0.1, latency: 0.1}",
        Goal::Cheap => "{price: 0.8, carbon: 0.1, latency: 0.1}",
        Goal::Fast => "{latency: 0.8, carbon: 0.1, price: 0.1}",
    };
    include_str!("example.yaml")
        .replace("NAME", &arguments.name)
        .replace("IMAGE", &arguments.image)
        .replace("REPLICAS", &arguments.replicas.to_string())
        .replace("WEIGHTS", weights)
}

/// `init`.
///
/// # Errors
/// When the file is there already, or cannot be written.
pub fn init(ui: Ui, arguments: &InitArgs) -> Outcome {
    let text = example(arguments);
    if arguments.directory.as_os_str() == "-" {
        return ui.out(&text);
    }
    let path = if arguments.directory.as_os_str() == "." {
        "app.yaml".into()
    } else {
        arguments.directory.join("app.yaml")
    };
    let mut options = std::fs::OpenOptions::new();
    options.write(true);
    if arguments.force {
        options.create(true).truncate(true);
    } else {
        options.create_new(true);
    }
    let written = std::fs::create_dir_all(&arguments.directory)
        .and_then(|()| options.open(&path))
        .and_then(|mut file| file.write_all(text.as_bytes()));
    if let Err(error) = written {
        let exists = error.kind() == std::io::ErrorKind::AlreadyExists;
        let report = if exists {
            Report::new(
                Exit::Conflict,
                "exists",
                format!("{} is there already", path.display()),
            )
            .help("--force overwrites it; name another directory; or `-` to print")
        } else {
            Report::new(
                Exit::Failed,
                "file",
                format!("cannot write {}", path.display()),
            )
            .note(error.to_string())
        };
        return Err(report.into());
    }
    ui.out(&format!("{} written", path.display()))?;
    ui.note(&format!("next: krakectl plan -f {}", path.display()));
    Ok(())
}

/// `completion SHELL`.
///
/// # Errors
/// When it cannot be printed.
pub fn completion(ui: Ui, shell: clap_complete::Shell) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "krakectl", &mut script);
    ui.out(&String::from_utf8_lossy(&script))
}

/// `man DIR`.
///
/// # Errors
/// When they cannot be written.
pub fn man(ui: Ui, directory: &std::path::Path) -> Outcome {
    let written = std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), directory));
    written.map_err(|error| {
        let text = format!("cannot write manual pages to {}", directory.display());
        Failure::from(Report::new(Exit::Failed, "file", text).note(error.to_string()))
    })?;
    ui.out(&format!("manual pages written to {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::{Wrap, check, load};

    #[test]
    fn the_example_is_a_good_manifest_for_every_goal() {
        for goal in [Goal::Green, Goal::Cheap, Goal::Fast] {
            let arguments = InitArgs {
                directory: "-".into(),
                name: "web".to_owned(),
                image: "example.org/a:1".to_owned(),
                replicas: 3,
                goal,
                force: false,
            };
            let source = load::Source {
                name: "app.yaml".to_owned(),
                text: example(&arguments).into(),
            };
            let mut documents = load::documents(vec![source], &Wrap::default()).unwrap();
            assert_eq!(check::check(&mut documents, "default", false), []);
            assert_eq!(documents[0].name(), "web");
            let manifests = &documents[0].object["spec"]["source"]["manifests"];
            assert_eq!(manifests[0]["spec"]["replicas"], 3);
        }
    }
}
