//! The command line: a thin layer over [`krake_testnet::Testnet`].

mod arguments;
mod logs;
mod output;
mod status;
mod up;

use std::process::ExitCode;

use anyhow::bail;
use clap::Parser;
use krake_testnet::progress::Progress;
use krake_testnet::state::Directory;
use krake_testnet::{Testnet, embedded, kube};

use arguments::{Arguments, Chaos, Command};
use output::print;

/// Runs the program.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return output::failed(&error.into()),
    };
    let result = runtime.block_on(execute(arguments));
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    match result {
        Ok(code) => code,
        Err(error) => output::failed(&error),
    }
}

async fn execute(arguments: Arguments) -> anyhow::Result<ExitCode> {
    if let Command::EmbeddedCluster(options) = arguments.command {
        tracing_subscriber::fmt()
            .with_writer(std::io::stderr)
            .with_ansi(false)
            .init();
        embedded::run(options).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let directory = Directory::new(&arguments.dir)?;
    match arguments.command {
        Command::EmbeddedCluster(_) => bail!("handled above"),
        Command::Up(options) => return up::up(directory, options).await,
        Command::Status { output } => status::status(&directory, output).await?,
        Command::Down { purge } => return down(&directory, purge).await,
        Command::Logs(options) => logs::logs(&directory, &options).await?,
        Command::Chaos(chaos) => return cause(directory, chaos).await,
        Command::Assets { path } => assets(path).await?,
        Command::Completion { shell } => output::completion(shell),
    }
    Ok(ExitCode::SUCCESS)
}

async fn down(directory: &Directory, purge: bool) -> anyhow::Result<ExitCode> {
    let path = directory.path().display();
    if directory.load()?.is_none() && purge {
        print(&format!("there is no testnet in {path}"));
        return Ok(ExitCode::SUCCESS);
    }
    let stopped = krake_testnet::down(directory).await?;
    match (stopped.processes, stopped.killed) {
        (0, _) => print(&format!("nothing was running in {path}")),
        (all, 0) => print(&format!("stopped {all} processes of {path}")),
        (all, killed) => print(&format!(
            "stopped {all} processes of {path}; {killed} nodes did not end by themselves and were killed"
        )),
    }
    if purge {
        directory.remove()?;
        print(&format!("removed {path}"));
    }
    Ok(ExitCode::SUCCESS)
}

async fn cause(directory: Directory, chaos: Chaos) -> anyhow::Result<ExitCode> {
    let testnet = Testnet::open(directory, &Progress::default()).await?;
    match chaos {
        Chaos::Kill { site, node_only } => {
            testnet.kill(&site, node_only).await?;
            let what = if node_only { "the node of " } else { "" };
            print(&format!("killed {what}{site}"));
        }
        Chaos::Restart { site } => {
            if testnet.restart(&site).await? {
                print(&format!("{site} runs again"));
            } else {
                print(&format!(
                    "{site} runs again, but is not ready: not all groups have a leader that it hears (are others away, or cut off?)"
                ));
            }
        }
        Chaos::Pause { site } => {
            testnet.pause(&site).await?;
            print(&format!("paused {site}"));
        }
        Chaos::Resume { site } => {
            testnet.resume(&site).await?;
            print(&format!("{site} goes on"));
        }
        Chaos::Partition { sides } => {
            testnet.partition(&sides.one, &sides.other).await?;
            print(&format!(
                "{} and {} do not hear each other",
                sides.one.join(", "),
                sides.other.join(", ")
            ));
        }
        Chaos::Heal => {
            testnet.heal().await?;
            print("all sites hear each other");
        }
        Chaos::Metric { site, changes } => {
            for change in &changes {
                testnet.metric(&site, &change.name, change.value).await?;
                print(&format!("{site}: {} is {}", change.name, change.value));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

async fn assets(path_only: bool) -> anyhow::Result<()> {
    let assets = kube::assets(&Progress::default()).await?;
    if path_only {
        let directory = kube::directory()?;
        // KUBEBUILDER_ASSETS may have some or all of them.
        let directory = assets.kube_apiserver.parent().unwrap_or(&directory);
        print(&directory.display().to_string());
        return Ok(());
    }
    for (name, path) in assets.all() {
        print(&format!("{name:<24} {}", path.display()));
    }
    Ok(())
}
