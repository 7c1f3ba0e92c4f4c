//! The command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

use super::format::Format;

/// Exit codes and topics, shown under the top level help.
const AFTER_HELP: &str = "\
Topics: krakectl help exit-codes | constraints | output | config

First steps: krake-testnet up --demo; krakectl init; krakectl plan -f app.yaml;
             krakectl apply -f app.yaml --wait; krakectl why APP";

/// Runs applications on the best site of a federation, asked through any of its nodes.
#[derive(Debug, Parser)]
#[command(name = "krakectl", version, after_help = AFTER_HELP, disable_help_subcommand = true,
    max_term_width = 100)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Nodes to try, in order: http://HOST:PORT or unix:///PATH, separated by commas
    /// [default: the context's, else /run/krake/api.sock, else http://127.0.0.1:7443]
    #[arg(
        short,
        long,
        global = true,
        env = "KRAKE_SERVER",
        hide_env_values = true,
        value_delimiter = ',',
        value_name = "URL"
    )]
    pub server: Vec<String>,
    /// File with the token; the token itself only by KRAKE_TOKEN
    #[arg(long, global = true, env = "KRAKE_TOKEN_FILE", hide_env_values = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub token_file: Option<PathBuf>,
    /// Context to use [default: the current one]
    #[arg(
        long,
        global = true,
        env = "KRAKE_CONTEXT",
        hide_env_values = true,
        value_name = "NAME"
    )]
    pub context: Option<String>,
    /// File with the contexts [default: $XDG_CONFIG_HOME/krake/krakectl.toml]
    #[arg(long, global = true, env = "KRAKE_CONFIG", hide_env_values = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,
    /// Namespace [default: the context's, else default]
    #[arg(
        short,
        long,
        global = true,
        env = "KRAKE_NAMESPACE",
        hide_env_values = true,
        value_name = "NS"
    )]
    pub namespace: Option<String>,
    /// How long one request may take, failing over included
    #[arg(long, global = true, env = "KRAKE_TIMEOUT", hide_env_values = true, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub request_timeout: Duration,
    /// Show every request
    #[arg(short, long, global = true)]
    pub verbose: bool,
    /// Show data and errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Colours
    #[arg(long, global = true, value_enum, default_value_t = Color::Auto, value_name = "WHEN")]
    pub color: Color,
}

/// When to use colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, unless `NO_COLOR` is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write a commented example Application to begin with
    Init(InitArgs),
    /// Show the federation: sites, groups, whose view it is; ends with 1 when something is wrong
    Status(StatusArgs),
    /// Show where applications would run and why, without changing anything
    Plan(PlanArgs),
    /// Make the federation run what manifests say (server-side apply)
    Apply(ApplyArgs),
    /// Explain why an application runs where it runs
    Why(WhyArgs),
    /// List objects: apps, sites, placements, nodes, events
    Get(GetArgs),
    /// Show everything about one object, with its events
    Describe(DescribeArgs),
    /// Delete objects
    Delete(DeleteArgs),
    /// Wait until an object is ready, placed, deleted, or has a condition
    Wait(WaitArgs),
    /// Cordon and uncordon sites
    #[command(subcommand)]
    Site(SiteCommand),
    /// Invite sites into the federation
    #[command(subcommand)]
    Token(TokenCommand),
    /// Look at the catalog's Raft groups, and move their leaders
    #[command(subcommand)]
    Consensus(ConsensusCommand),
    /// Show and change contexts
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the completion script for a shell
    Completion {
        /// The shell
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Print the versions of krakectl and of the node
    Version {
        /// Ask no node
        #[arg(long)]
        client: bool,
    },
    /// Print help for a command or a topic
    Help {
        /// A command, or: exit-codes, constraints, output, config
        topic: Vec<String>,
    },
    /// Write the manual pages to a directory
    #[command(hide = true)]
    Man {
        /// The directory
        directory: PathBuf,
    },
    /// Krake's names
    #[command(hide = true, visible_alias = "kubernetes", subcommand)]
    Kube(KubeCommand),
    /// Krake's names
    #[command(hide = true)]
    Core(Reserved),
    /// Krake's names
    #[command(hide = true)]
    Infra(Reserved),
    /// Krake's names
    #[command(hide = true, alias = "openstack")]
    Os(Reserved),
}

/// Where manifests come from.
#[derive(Debug, Clone, Args)]
pub struct Files {
    /// File, directory (its .yaml, .yml and .json files), or - for stdin; may be repeated
    #[arg(short, long = "filename", required = true, value_name = "FILE|DIR|-", value_hint = ValueHint::AnyPath)]
    pub filename: Vec<PathBuf>,
    /// Look into the directories of directories too
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// Put plain Kubernetes manifests into one Application of this name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// With --name: a constraint, such as 'country in (DE, SE)'; may be repeated
    #[arg(short = 'L', long, requires = "name", value_name = "CONSTRAINT")]
    pub require: Vec<String>,
    /// With --name: weight of a metric, such as carbon=0.5; may be repeated
    #[arg(long, requires = "name", value_name = "METRIC=WEIGHT", value_parser = weight)]
    pub weight: Vec<(String, f64)>,
}

/// Arguments of `init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Where to write app.yaml; - prints it
    #[arg(default_value = ".", value_hint = ValueHint::DirPath)]
    pub directory: PathBuf,
    /// Name of the application
    #[arg(long, default_value = "shop")]
    pub name: String,
    /// Container image
    #[arg(long, default_value = "ghcr.io/nginxinc/nginx-unprivileged:stable")]
    pub image: String,
    /// Number of pods
    #[arg(long, default_value_t = 2)]
    pub replicas: u32,
    /// What matters most
    #[arg(long, value_enum, default_value_t = Goal::Green)]
    pub goal: Goal,
    /// Overwrite app.yaml
    #[arg(long)]
    pub force: bool,
}

/// What an application should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Goal {
    /// Least carbon.
    Green,
    /// Least price.
    Cheap,
    /// Least latency.
    Fast,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Output format
    #[arg(
        short,
        long,
        default_value = "table",
        env = "KRAKE_OUTPUT",
        hide_env_values = true,
        value_name = "table|json|yaml"
    )]
    pub output: Format,
    /// Wait until nothing is wrong
    #[arg(long)]
    pub wait: bool,
    /// How long to wait
    #[arg(long, default_value = "5m", value_parser = duration, requires = "wait", alias = "wait-duration", value_name = "TIME")]
    pub timeout: Duration,
}

/// Output of a table.
#[derive(Debug, Args)]
pub struct TableOutput {
    /// Output format
    #[arg(
        short,
        long,
        default_value = "table",
        env = "KRAKE_OUTPUT",
        hide_env_values = true,
        value_name = "table|json|yaml"
    )]
    pub output: Format,
}

/// What to do with the catalog's groups.
#[derive(Debug, Subcommand)]
pub enum ConsensusCommand {
    /// Show each group: leader, term, log, voters; ends with 1 when one has no leader or no majority
    Status(TableOutput),
    /// Show each member as a replica: what it leads, votes in, and how far it is behind
    Peers(TableOutput),
    /// Hand leadership of a group to a site's node, and wait until it is there
    ///
    /// Any node can be asked. Leaders spread evenly: a node that leads two groups more than
    /// another voter hands one on again after some seconds.
    Transfer {
        /// meta, or a shard such as shard-3 or 3
        group: String,
        /// Name of the site; its node must vote in the group
        site: String,
    },
}

/// Arguments of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The manifests.
    #[command(flatten)]
    pub files: Files,
    /// Output format
    #[arg(
        short,
        long,
        default_value = "table",
        env = "KRAKE_OUTPUT",
        hide_env_values = true,
        value_name = "table|json|yaml"
    )]
    pub output: Format,
}

/// Arguments of `apply`.
#[derive(Debug, Args)]
pub struct ApplyArgs {
    /// The manifests.
    #[command(flatten)]
    pub files: Files,
    /// Wait until everything runs
    #[arg(long)]
    pub wait: bool,
    /// How long to wait
    #[arg(long, default_value = "5m", value_parser = duration, alias = "wait-timeout", value_name = "TIME")]
    pub timeout: Duration,
    /// Check everything on the node (server), or without one (client), and change nothing
    #[arg(long, value_enum, num_args = 0..=1, default_value = "none", hide_default_value = true, default_missing_value = "server", require_equals = true, value_name = "server|client")]
    pub dry_run: DryRun,
    /// Take over fields that others have set
    #[arg(long)]
    pub force_conflicts: bool,
    /// Always so; accepted because kubectl has it
    #[arg(long, hide = true)]
    pub server_side: bool,
    /// Output format
    #[arg(short, long, default_value = "table", value_name = "name|json|yaml")]
    pub output: Format,
}

/// What is only pretended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DryRun {
    /// Nothing.
    #[value(hide = true)]
    None,
    /// The node checks everything and changes nothing.
    Server,
    /// Only what can be checked without a node.
    Client,
}

/// Arguments of `why`.
#[derive(Debug, Args)]
pub struct WhyArgs {
    /// The application, as NAME or NAMESPACE/NAME
    #[arg(value_name = "[NS/]APP")]
    pub app: String,
    /// Output format
    #[arg(
        short,
        long,
        default_value = "table",
        env = "KRAKE_OUTPUT",
        hide_env_values = true,
        value_name = "table|json|yaml"
    )]
    pub output: Format,
}

/// Arguments of `get`.
#[derive(Debug, Args)]
pub struct GetArgs {
    /// Kind (apps, sites, placements, nodes, events), then names; or KIND/NAME
    #[arg(required = true, value_name = "KIND [NAME…]")]
    pub what: Vec<String>,
    /// All namespaces
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    /// Only objects with these labels, such as team=web,tier!=dev
    #[arg(short = 'l', long, value_name = "SELECTOR")]
    pub selector: Option<String>,
    /// Only objects with these fields, such as metadata.name=shop
    #[arg(long, value_name = "SELECTOR")]
    pub field_selector: Option<String>,
    /// table, wide, json, yaml, name, jsonpath={.status.phase}
    #[arg(
        short,
        long,
        default_value = "table",
        env = "KRAKE_OUTPUT",
        hide_env_values = true,
        value_name = "FORMAT"
    )]
    pub output: Format,
    /// Then show what changes
    #[arg(short, long)]
    pub watch: bool,
    /// No headings
    #[arg(long)]
    pub no_headers: bool,
}

/// Arguments of `describe`.
#[derive(Debug, Args)]
pub struct DescribeArgs {
    /// Kind and names, or KIND/NAME
    #[arg(required = true, value_name = "KIND NAME…")]
    pub what: Vec<String>,
}

/// Arguments of `delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Kind and names, or KIND/NAME
    #[arg(
        value_name = "KIND NAME…",
        required_unless_present = "filename",
        conflicts_with = "filename"
    )]
    pub what: Vec<String>,
    /// Delete what these manifests name
    #[arg(short, long = "filename", value_name = "FILE|DIR|-", value_hint = ValueHint::AnyPath)]
    pub filename: Vec<PathBuf>,
    /// Look into the directories of directories too
    #[arg(short = 'R', long, requires = "filename")]
    pub recursive: bool,
    /// No error when it is not there
    #[arg(long)]
    pub ignore_not_found: bool,
    /// Of a site: do not wait for the applications that run there, such as when it is lost for ever
    #[arg(long)]
    pub force: bool,
    /// Wait until nothing is left at any site
    #[arg(long)]
    pub wait: bool,
    /// How long to wait
    #[arg(long, default_value = "5m", value_parser = duration, alias = "wait-timeout", value_name = "TIME")]
    pub timeout: Duration,
    /// Check everything on the node and change nothing
    #[arg(long, num_args = 0..=1, default_missing_value = "server", require_equals = true, value_name = "server")]
    pub dry_run: Option<DryRun>,
}

/// Arguments of `wait`.
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// Kind and names, or KIND/NAME
    #[arg(required = true, value_name = "KIND NAME…")]
    pub what: Vec<String>,
    /// ready, placed, deleted, condition=NAME[=STATUS], phase=PHASE
    #[arg(long = "for", default_value = "ready", value_name = "STATE")]
    pub state: String,
    /// How long to wait
    #[arg(long, default_value = "5m", value_parser = duration, alias = "wait-timeout", value_name = "TIME")]
    pub timeout: Duration,
}

/// `site …`
#[derive(Debug, Subcommand)]
pub enum SiteCommand {
    /// Let a site take no new applications; what runs there goes on
    Cordon {
        /// The sites
        #[arg(required = true)]
        sites: Vec<String>,
    },
    /// Let a site take new applications again
    Uncordon {
        /// The sites
        #[arg(required = true)]
        sites: Vec<String>,
    },
}

/// `token …`
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make an invitation for one new site, and print it
    Create {
        /// How long it can be used
        #[arg(long, default_value = "1h", value_parser = duration, value_name = "TIME")]
        ttl: Duration,
        /// The only name the new site may have
        #[arg(long, value_name = "NAME")]
        site: Option<String>,
        /// Output format
        #[arg(short, long, default_value = "table", value_name = "json|yaml")]
        output: Format,
    },
    /// List the invitations (never the secrets)
    List {
        /// Output format
        #[arg(
            short,
            long,
            default_value = "table",
            env = "KRAKE_OUTPUT",
            hide_env_values = true,
            value_name = "table|json|yaml"
        )]
        output: Format,
    },
    /// Take invitations back
    Revoke {
        /// Their ids, as `token list` shows them
        #[arg(required = true)]
        id: Vec<String>,
    },
}

/// `config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// List the contexts
    GetContexts {
        /// Output format
        #[arg(short, long, default_value = "table", value_name = "table|name")]
        output: Format,
    },
    /// Make a context the current one
    UseContext {
        /// Its name
        name: String,
    },
    /// Print the name of the current context
    CurrentContext,
    /// Print the context file
    View,
    /// Add or change a context
    SetContext {
        /// Its name
        name: String,
        /// Make it the current one
        #[arg(long)]
        current: bool,
    },
    /// Remove a context
    DeleteContext {
        /// Its name
        name: String,
    },
}

/// `kube …`: what Krake's users have in their fingers.
#[derive(Debug, Subcommand)]
pub enum KubeCommand {
    /// Applications
    #[command(alias = "app", subcommand)]
    Application(KubeApp),
    /// Clusters
    Cluster(Reserved),
}

/// `kube app …`
#[derive(Debug, Subcommand)]
pub enum KubeApp {
    /// Make an application of a file of manifests
    Create(KubeAppFile),
    /// Change an application
    Update(KubeAppFile),
    /// Show one
    Get {
        /// Its name
        name: String,
        /// Output format
        #[arg(short, long, default_value = "table", value_name = "FORMAT")]
        output: Format,
    },
    /// List all
    List {
        /// All namespaces
        #[arg(short = 'a', visible_short_alias = 'A', long = "all")]
        all: bool,
        /// Output format
        #[arg(short, long, default_value = "table", value_name = "FORMAT")]
        output: Format,
    },
    /// Delete one
    Delete {
        /// Its name
        name: String,
    },
}

/// Arguments of `kube app create` and `update`.
#[derive(Debug, Args)]
pub struct KubeAppFile {
    /// Its name
    pub name: String,
    /// File with Kubernetes manifests
    #[arg(short, long, required = true, value_hint = ValueHint::FilePath)]
    pub file: PathBuf,
    /// Label constraint; may be repeated
    #[arg(short = 'L', long)]
    pub cluster_label_constraint: Vec<String>,
    /// Metric constraint; may be repeated
    #[arg(short = 'M', long)]
    pub cluster_metric_constraint: Vec<String>,
    /// Wait until it runs
    #[arg(long, num_args = 0..=1, default_missing_value = "running")]
    pub wait: Option<String>,
}

/// What Krake had and this does not have (yet).
#[derive(Debug, Args)]
pub struct Reserved {
    /// Anything
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<String>,
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration = match text.parse::<u64>() {
        // kubectl takes a bare number as seconds.
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => humantime::parse_duration(text)
            .map_err(|error| format!("{error}; write for example 90s, 5m or 1h"))?,
    };
    if duration.is_zero() || duration > Duration::from_secs(365 * 86_400) {
        return Err("must be more than nothing and at most a year".to_owned());
    }
    Ok(duration)
}

fn weight(text: &str) -> Result<(String, f64), String> {
    let (metric, weight) = text
        .split_once('=')
        .ok_or_else(|| "write METRIC=WEIGHT, such as carbon=0.5".to_owned())?;
    let weight = f64::from_str(weight).map_err(|_| format!("`{weight}` is not a number"))?;
    Ok((metric.to_owned(), weight))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_top_level_help_reads_well() {
        insta::assert_snapshot!(Cli::command().render_help());
    }

    #[test]
    fn times_are_read() {
        assert_eq!(duration("90"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("5m"), Ok(Duration::from_secs(300)));
        assert!(duration("soon").is_err());
        assert!(duration("0s").is_err());
    }
}
