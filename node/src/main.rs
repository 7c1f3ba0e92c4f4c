//! `krake-node`: one site's node.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use krake_node::backup::Restored;
use krake_node::config::sources::KEYS;
use krake_node::config::{Config, ConfigError, LogFormat};
use krake_node::leave::{Left, leave};

/// Many short-lived JSON documents on several threads: with the system's allocator a busy node was
/// seen to spend a good part of its time giving memory back and taking it again.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// One site's node of a Krake federation.
///
/// Every configuration key can be given in the file, as an environment variable
/// (KRAKE_SITE__NAME) and as a flag (--site.name); `krake-node config keys` lists them.
#[derive(Debug, Parser)]
#[command(name = "krake-node", version, subcommand_required = true)]
struct Arguments {
    /// The configuration file (TOML).
    #[arg(long, short, global = true, env = "KRAKE_NODE_CONFIG")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Found a new federation with this site as its first member.
    Init {
        /// --KEY VALUE for any configuration key.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Run the node until SIGTERM or SIGINT.
    Run {
        /// --KEY VALUE for any configuration key.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Join a federation with a token from `krakectl token create`.
    Join {
        /// The token, or @FILE to read it from a file.
        token: String,
        /// --KEY VALUE for any configuration key.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Take this site out of its federation, and stop its node.
    ///
    /// The node has to run. Its applications move to other sites, then its votes; it is told what is
    /// still there. It goes on by itself when this command is interrupted or the node restarts.
    Leave {
        /// Do not wait for the applications: what has not moved yet goes on here without the
        /// federation, which runs it elsewhere as soon as it can.
        #[arg(long)]
        force: bool,
        /// Do not wait until the site has left.
        #[arg(long)]
        no_wait: bool,
        /// --KEY VALUE for any configuration key.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Save the whole catalog of the federation in a file: through the running node, or from the
    /// files of one that is stopped.
    Backup {
        /// The file to make. It holds what the apps' manifests hold; its mode is 0600.
        file: PathBuf,
        /// --KEY VALUE for any configuration key.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Begin the federation again from a backup, when a majority of its nodes is lost for ever.
    ///
    /// This node is then the only one that has the catalog; run `krake-node rejoin` on the others.
    /// Every record gets a higher incarnation, so that all sites obey it. What was committed after
    /// the backup is lost. If any node of the old federation may still run, stop it first.
    Restore {
        /// What `krake-node backup` made.
        file: PathBuf,
        /// --KEY VALUE for any configuration key.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Put the node's catalog aside and get everything from the other members at the next start:
    /// after damage to its files, and after a restore on another node.
    Rejoin {
        /// --KEY VALUE for any configuration key.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        flags: Vec<String>,
    },
    /// Look at the configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// List every key and what it is for.
    Keys,
}

/// A token has less than a kibibyte; a wrong path may lead to anything.
const TOKEN_BYTES_MAX: u64 = 64 * 1024;

fn read_token(path: &str) -> std::io::Result<String> {
    let mut text = String::new();
    let file = std::fs::File::open(path)?;
    std::io::Read::read_to_string(&mut std::io::Read::take(file, TOKEN_BYTES_MAX), &mut text)?;
    Ok(text)
}

/// A configuration file and keys with their values.
type Given = (Option<PathBuf>, Vec<(String, String)>);

/// Flags of the form `--key value` or `--key=value`; `--config` may stand among them.
fn split_flags(flags: &[String]) -> anyhow::Result<Given> {
    let mut pairs = Vec::new();
    let mut file = None;
    let mut rest = flags.iter();
    while let Some(flag) = rest.next() {
        let Some(key) = flag.strip_prefix("--") else {
            anyhow::bail!(
                "`{flag}` is not a flag: write --KEY VALUE (krake-node config keys lists them)"
            );
        };
        let (key, value) = match key.split_once('=') {
            Some((key, value)) => (key, value.to_owned()),
            None => (
                key,
                rest.next()
                    .ok_or_else(|| anyhow::anyhow!("--{key} needs a value"))?
                    .clone(),
            ),
        };
        if key == "config" {
            file = Some(PathBuf::from(value));
        } else {
            pairs.push((key.to_owned(), value));
        }
    }
    Ok((file, pairs))
}

fn load(file: Option<PathBuf>, flags: &[String]) -> anyhow::Result<Config> {
    let (given, pairs) = split_flags(flags)?;
    let file = given.or(file);
    let environment = std::env::vars().filter(|(name, _)| name != "KRAKE_NODE_CONFIG");
    Ok(Config::load(file.as_deref(), environment, &pairs)?)
}

fn start_log(config: &Config) {
    let filter = tracing_subscriber::EnvFilter::try_new(&config.node.log)
        .expect("the configuration was checked");
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match config.node.log_format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

/// The program's output. What it tells is done already: a reader that went away changes nothing.
fn say(text: std::fmt::Arguments<'_>) {
    let _ = std::io::Write::write_fmt(&mut std::io::stdout(), format_args!("{text}\n"));
}

fn say_restored(restored: &Restored) {
    say(format_args!(
        "federation {} restored as of {}: {} records in {} groups, incarnation {}",
        restored.summary.federation,
        restored.summary.taken_at,
        restored.summary.records,
        restored.summary.groups,
        restored.incarnation
    ));
    say(format_args!("next: krake-node run"));
    if !restored.others.is_empty() {
        say(format_args!(
            "then, on each of the other sites ({}): krake-node rejoin, krake-node run",
            restored.others.join(", ")
        ));
    }
}

fn execute(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(
            std::thread::available_parallelism()
                .map_or(2, usize::from)
                .clamp(2, 4),
        )
        .enable_all()
        .build()?;
    match arguments.command {
        Command::Init { flags } => {
            let config = load(arguments.config, &flags)?;
            let founded = runtime.block_on(krake_node::membership::entry::init(&config))?;
            say(format_args!("federation {} founded", founded.federation));
            say(format_args!(
                "admin token: {}",
                founded.token_file.display()
            ));
            say(format_args!("next: krake-node run"));
        }
        Command::Join { token, flags } => {
            let config = load(arguments.config, &flags)?;
            let token = match token.strip_prefix('@') {
                Some(path) => read_token(path).map_err(|error| {
                    anyhow::anyhow!("cannot read the token from {path}: {error}")
                })?,
                None => token,
            };
            let name =
                runtime.block_on(krake_node::membership::entry::join(&config, token.trim()))?;
            say(format_args!(
                "joined federation {name} as site {}",
                config.site.name
            ));
            say(format_args!("next: krake-node run"));
        }
        Command::Leave {
            force,
            no_wait,
            flags,
        } => {
            let config = load(arguments.config, &flags)?;
            let told = |text: &str| say(format_args!("{text}"));
            match runtime.block_on(leave(&config, force, !no_wait, told))? {
                Left::Gone(at) => {
                    say(format_args!("site {} left at {at}", config.site.name));
                }
                Left::Begun => say(format_args!(
                    "site {0} is leaving; krakectl describe site {0} tells what is still there",
                    config.site.name
                )),
            }
        }
        Command::Backup { file, flags } => {
            let config = load(arguments.config, &flags)?;
            let saved = runtime.block_on(krake_node::backup::save(&config, &file))?;
            say(format_args!(
                "federation {}: {} records in {} groups, {} KiB, to {}",
                saved.federation,
                saved.records,
                saved.groups,
                saved.bytes.div_ceil(1024),
                saved.path.display()
            ));
        }
        Command::Restore { file, flags } => {
            let config = load(arguments.config, &flags)?;
            let restored = runtime.block_on(krake_node::backup::restore(&config, &file))?;
            say_restored(&restored);
        }
        Command::Rejoin { flags } => {
            let config = load(arguments.config, &flags)?;
            match krake_node::backup::rejoin(&config)? {
                Some(aside) => say(format_args!(
                    "the old catalog is in {}; remove it when the node is well again",
                    aside.display()
                )),
                None => say(format_args!("there was no catalog")),
            }
            say(format_args!("next: krake-node run"));
        }
        Command::Run { flags } => {
            let config = load(arguments.config, &flags)?;
            start_log(&config);
            runtime.block_on(krake_node::run::run(config))?;
        }
        Command::Config {
            command: ConfigCommand::Keys,
        } => {
            let width = KEYS.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
            for (key, text) in KEYS {
                say(format_args!("{key:width$}  {text}"));
            }
        }
    }
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    Ok(())
}

#[allow(clippy::print_stderr, reason = "the program's error message")]
fn main() -> ExitCode {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    match execute(Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            for cause in error.chain().skip(1) {
                let text = cause.to_string();
                if !error.to_string().contains(&text) {
                    eprintln!("  because: {text}");
                }
            }
            exit_code(&error)
        }
    }
}

/// As krakectl's: 9 for a configuration that is not valid, 1 for everything else.
fn exit_code(error: &anyhow::Error) -> ExitCode {
    if error.is::<ConfigError>() {
        ExitCode::from(krake_node::config::EXIT_INVALID)
    } else {
        ExitCode::FAILURE
    }
}
