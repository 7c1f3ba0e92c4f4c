//! The program `krakectl`.

mod apply;
mod args;
mod compat;
mod consensus;
mod decision;
mod delete;
mod describe;
pub(crate) mod exit;
mod format;
mod get;
mod kinds;
mod manage;
mod output;
pub(crate) mod report;
mod session;
mod status;
mod topics;
mod wait;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command, Reserved};
use exit::Exit;
use output::Ui;
use report::{Failure, Outcome, Report};
use session::Session;

/// Runs `krakectl` with the arguments of this process.
pub fn main() -> ExitCode {
    let arguments = translate(std::env::args_os().collect());
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        // Help and versions come this way too, with code 0.
        Err(error) => {
            let code = u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8);
            return match error.print() {
                Ok(()) => ExitCode::from(code),
                Err(_) => Exit::BrokenPipe.into(),
            };
        }
    };
    let ui = session::ui(&cli.global);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            let text = format!("the program cannot start: {error}");
            ui.report(&Report::new(Exit::Failed, "runtime", text));
            return Exit::Failed.into();
        }
    };
    let result = runtime.block_on(async {
        tokio::select! {
            result = run(&cli, ui) => result,
            _ = tokio::signal::ctrl_c() => {
                ui.note("interrupted; what was sent to the federation goes on");
                Err(Failure::silent(Exit::Interrupted))
            }
        }
    });
    // A thread that reads stdin cannot be stopped, and is not waited for.
    runtime.shutdown_background();
    match result {
        Ok(()) => Exit::Done.into(),
        Err(failure) => {
            let (shown, more) = failure.shown();
            for report in shown {
                ui.report(report);
            }
            if more > 0 {
                ui.note(&format!("and {more} more errors; mend these first"));
            }
            failure.exit.into()
        }
    }
}

/// Krake's `--print-completion SHELL`.
fn translate(mut arguments: Vec<OsString>) -> Vec<OsString> {
    if let Some(flag) = arguments.get_mut(1)
        && flag == "--print-completion"
    {
        *flag = "completion".into();
    }
    arguments
}

async fn run(cli: &Cli, ui: Ui) -> Outcome {
    // What needs no node.
    match &cli.command {
        Command::Init(arguments) => return manage::init(ui, arguments),
        Command::Config(command) => return manage::config(&cli.global, ui, command),
        Command::Completion { shell } => return manage::completion(ui, *shell),
        Command::Help { topic } => return topics::run(ui, topic),
        Command::Man { directory } => return manage::man(ui, directory),
        Command::Version { client } => {
            ui.out(&format!("krakectl  {}", env!("CARGO_PKG_VERSION")))?;
            if *client {
                return Ok(());
            }
        }
        Command::Core(rest) => return refuse("core", rest),
        Command::Infra(rest) => return refuse("infra", rest),
        Command::Os(rest) => return refuse("os", rest),
        _ => {}
    }
    let session = Session::new(&cli.global, ui)?;
    let session = &session;
    match &cli.command {
        Command::Status(arguments) => status::run(session, arguments).await,
        Command::Plan(arguments) => decision::plan(session, arguments).await,
        Command::Apply(arguments) => apply::run(session, arguments).await,
        Command::Why(arguments) => decision::why(session, arguments).await,
        Command::Get(arguments) => get::run(session, arguments).await,
        Command::Describe(arguments) => describe::run(session, arguments).await,
        Command::Delete(arguments) => delete::run(session, arguments).await,
        Command::Wait(arguments) => wait::run(session, arguments).await,
        Command::Site(command) => manage::site(session, command).await,
        Command::Consensus(command) => consensus::run(session, command).await,
        Command::Token(command) => manage::token(session, command).await,
        Command::Kube(command) => compat::kube(session, command).await,
        Command::Version { .. } => manage::version(session).await,
        Command::Init(_)
        | Command::Config(_)
        | Command::Completion { .. }
        | Command::Help { .. }
        | Command::Man { .. }
        | Command::Core(_)
        | Command::Infra(_)
        | Command::Os(_) => Ok(()),
    }
}

fn refuse(name: &str, rest: &Reserved) -> Outcome {
    let first = rest.arguments.first().map_or("", String::as_str);
    Err(compat::reserved(format!("{name} {first}").trim_end()).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_old_completion_flag_is_understood() {
        let old = ["krakectl", "--print-completion", "bash"].map(OsString::from);
        let cli = Cli::try_parse_from(translate(old.to_vec())).unwrap();
        assert!(matches!(cli.command, Command::Completion { .. }));
    }
}
