//! What can be said on the command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Parser, Subcommand};
use krake_testnet::embedded;
use krake_testnet::state::KubeKind;

use super::output::Output;

const AFTER_HELP: &str = "\
Examples:
  krake-testnet up --demo                       five sites and an app; Ctrl-C stops all
  krake-testnet up --sites 3 --detach           three sites in the background
  krake-testnet chaos metric stockholm carbon=900
  krake-testnet chaos partition lisbon,paris:dresden,stockholm,warsaw
  krake-testnet down --purge                    stop all and remove the data";

/// A whole Krake federation on this machine: real nodes, embedded or real Kubernetes, and faults.
#[derive(Debug, Parser)]
#[command(name = "krake-testnet", version, after_help = AFTER_HELP, max_term_width = 100)]
pub struct Arguments {
    /// Where the testnet keeps everything
    #[arg(
        long,
        global = true,
        default_value = ".krake-testnet",
        value_name = "DIR"
    )]
    pub dir: PathBuf,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a federation, or the stopped one in DIR again with its data
    Up(UpArguments),
    /// Show sites, processes and faults
    Status {
        /// Form of the answer
        #[arg(short, long, value_enum, default_value_t)]
        output: Output,
    },
    /// Stop everything that runs; the data stays
    Down {
        /// Remove the directory, too
        #[arg(long)]
        purge: bool,
    },
    /// Show logs of a site
    Logs(LogsArguments),
    /// Cause faults, and end them
    #[command(subcommand)]
    Chaos(Chaos),
    /// Build real Kubernetes for tests where it is missing, and show where it is
    Assets {
        /// Print only the directory, for KUBEBUILDER_ASSETS
        #[arg(long)]
        path: bool,
    },
    /// Print the completion script for a shell
    #[command(alias = "completions")]
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
    /// One site's embedded Kubernetes, in the foreground
    #[command(hide = true)]
    EmbeddedCluster(embedded::Options),
}

/// How to start.
#[derive(Debug, clap::Args)]
pub struct UpArguments {
    /// How many sites [default: 5, or as many as DIR has]
    #[arg(long, value_name = "N")]
    pub sites: Option<usize>,
    /// Deploy the example app and show where it runs and why
    #[arg(long)]
    pub demo: bool,
    /// Return as soon as the federation is formed; it goes on in the background
    #[arg(long)]
    pub detach: bool,
    /// What the sites run apps on [default: embedded, or as DIR has it]
    #[arg(long, value_enum)]
    pub kube: Option<KubeKind>,
    /// Shards of the catalog, for ever [default: 16]
    #[arg(long, value_name = "N")]
    pub shards: Option<u16>,
    /// Configuration of all nodes (krake-node config keys), such as defaults.detect_after=5s
    #[arg(long = "set", value_name = "KEY=VALUE", value_parser = setting)]
    pub settings: Vec<(String, String)>,
    /// Remove the data when it is stopped with Ctrl-C
    #[arg(long, conflicts_with = "detach")]
    pub purge: bool,
    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t)]
    pub output: Output,
}

/// Which logs to show.
#[derive(Debug, clap::Args)]
pub struct LogsArguments {
    /// Which site
    pub site: String,
    /// Wait for more
    #[arg(short, long)]
    pub follow: bool,
    /// Whose log: node, embedded, etcd, kube-apiserver, …
    #[arg(long, default_value = "node")]
    pub component: String,
    /// Begin with the last N lines
    #[arg(short = 'n', long, default_value_t = 200, value_name = "N")]
    pub lines: usize,
}

/// Faults.
#[derive(Debug, Subcommand)]
pub enum Chaos {
    /// Kill a site as a power cut would: node and cluster
    Kill {
        /// Which site
        site: String,
        /// Kill the node alone; its cluster goes on
        #[arg(long)]
        node_only: bool,
    },
    /// Start what was killed, with its data
    Restart {
        /// Which site
        site: String,
    },
    /// Stop a site in time: it is there and says nothing
    Pause {
        /// Which site
        site: String,
    },
    /// Let a paused site go on
    Resume {
        /// Which site
        site: String,
    },
    /// Cut sites off from each other; partitions add up
    Partition {
        /// Both sides, such as lisbon,paris:dresden,stockholm
        #[arg(value_name = "SITES:SITES")]
        sides: Sides,
    },
    /// End all partitions
    Heal,
    /// Change what a site says of itself, such as carbon=900
    Metric {
        /// Which site
        site: String,
        /// The metrics and their new values
        #[arg(required = true, value_name = "NAME=VALUE")]
        changes: Vec<MetricChange>,
    },
}

/// The sides of a partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sides {
    /// One side.
    pub one: Vec<String>,
    /// The other one.
    pub other: Vec<String>,
}

impl FromStr for Sides {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "write both sides with a colon between, such as lisbon,paris:dresden";
        let Some((one, other)) = text.split_once(':') else {
            return Err(format!("there is no colon; {example}"));
        };
        if other.contains(':') {
            return Err(format!("there is more than one colon; {example}"));
        }
        let names = |side: &str| -> Result<Vec<String>, String> {
            let names: Vec<String> = side.split(',').map(|name| name.trim().to_owned()).collect();
            if names.iter().any(String::is_empty) {
                return Err(format!("a name is empty; {example}"));
            }
            Ok(names)
        };
        Ok(Self {
            one: names(one)?,
            other: names(other)?,
        })
    }
}

/// A metric's new value.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricChange {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: f64,
}

impl FromStr for MetricChange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((name, value)) = text.split_once('=') else {
            return Err("write NAME=VALUE, such as carbon=900".to_owned());
        };
        let number = value
            .trim()
            .parse()
            .map_err(|_| format!("`{value}` is not a number"))?;
        Ok(Self {
            name: name.trim().to_owned(),
            value: number,
        })
    }
}

fn setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if key.contains('.') => Ok((key.to_owned(), value.to_owned())),
        _ => Err(
            "write SECTION.KEY=VALUE, such as defaults.detect_after=5s (krake-node config keys lists them)"
                .to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_commands_are_well_formed() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sides_are_read_or_refused_with_an_example() {
        let sides: Sides = "lisbon,paris:dresden".parse().unwrap();
        assert_eq!(sides.one, ["lisbon", "paris"]);
        assert_eq!(sides.other, ["dresden"]);
        for bad in ["lisbon", "a:b:c", "a,:b", ":b", "a:"] {
            let error = bad.parse::<Sides>().unwrap_err();
            assert!(
                error.contains("such as lisbon,paris:dresden"),
                "{bad}: {error}"
            );
        }
    }

    #[test]
    fn metric_changes_are_read_or_refused() {
        let change: MetricChange = "carbon=12.5".parse().unwrap();
        assert_eq!((change.name.as_str(), change.value), ("carbon", 12.5));
        assert!(
            "carbon"
                .parse::<MetricChange>()
                .unwrap_err()
                .contains("NAME=VALUE")
        );
        assert!(
            "carbon=much"
                .parse::<MetricChange>()
                .unwrap_err()
                .contains("`much`")
        );
    }
}
