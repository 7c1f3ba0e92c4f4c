//! `help TOPIC`.

use clap::CommandFactory;

use super::args::Cli;
use super::exit::{self, Exit};
use super::output::Ui;
use super::report::{Outcome, Report, closest};
use crate::manifest::check;

const CONSTRAINTS: &str = "\
A constraint is one text in spec.placement.require; a site must satisfy all of them.

Over labels of the site (one that does not have the label never fits):
  country = DE              country is DE
  tier != dev               tier is not dev
  country in (DE, SE)       country not in (DE, SE)

Over raw values of metrics (one that does not report the metric never fits):
  carbon <= 400             carbon < 400
  price > 0.1               price greater than 0.1
  load lesser than 0.8

Labels of a site: `krakectl describe site NAME`. Metrics unless the federation defines others:
";

const OUTPUT: &str = "\
Data goes to stdout, everything else to stderr; -q leaves only data and errors.

  -o table                 columns for people (default)
  -o wide                  more columns
  -o json, -o yaml         the objects
  -o name                  application.krake.dev/shop
  -o jsonpath={.status.phase}
                           values, as kubectl writes paths; {\"\\n\"} is a line break

Colours and moving lines only on a terminal; NO_COLOR or --color never turns them off.
";

const CONFIG: &str = "\
krakectl tries the addresses of a context in their order and keeps the first that answers.
Contexts are in $XDG_CONFIG_HOME/krake/krakectl.toml, or where --config or KRAKE_CONFIG says:

  current_context = \"home\"

  [contexts.home]
  servers = [\"http://127.0.0.1:7443\", \"unix:///run/krake/api.sock\"]
  token_file = \"admin.token\"       # relative to this file
  namespace = \"default\"

`krakectl config set-context NAME --server URL --token-file FILE -n NS` writes one,
`krakectl config use-context NAME` makes it the current one.

Flags win over the environment, the environment over the context:
  --server      KRAKE_SERVER        addresses, separated by commas
  --token-file  KRAKE_TOKEN_FILE    file with the token
                KRAKE_TOKEN         the token itself
  --context     KRAKE_CONTEXT       context
  --config      KRAKE_CONFIG        file with the contexts
  --namespace   KRAKE_NAMESPACE     namespace
  --output      KRAKE_OUTPUT        output format
  --request-timeout KRAKE_TIMEOUT   time for one request

A node's own socket (unix:///PATH) needs no token: its file mode says who may.
";

/// The topics.
const TOPICS: [&str; 4] = ["exit-codes", "constraints", "output", "config"];

/// Prints help for a topic or a command.
///
/// # Errors
/// When there is none of that name.
pub fn run(ui: Ui, words: &[String]) -> Outcome {
    let mut command = Cli::command();
    command.build();
    match words {
        [] => return ui.out(&command.render_long_help().ansi().to_string()),
        [topic] if topic == "exit-codes" => return ui.out(exit::TEXT),
        [topic] if topic == "constraints" => {
            return ui.out(&format!("{CONSTRAINTS}{}", check::default_metrics()));
        }
        [topic] if topic == "output" => return ui.out(OUTPUT),
        // `config` is a command too; its help names the flags of its own.
        [topic] if topic == "config" => ui.out(CONFIG)?,
        _ => {}
    }
    let mut found = &mut command;
    for word in words {
        let names: Vec<String> = found
            .get_subcommands()
            .filter(|command| !command.is_hide_set())
            .map(|command| command.get_name().to_owned())
            .collect();
        match found.find_subcommand_mut(word) {
            Some(inner) => found = inner,
            None => {
                let report = Report::new(Exit::Usage, "usage", format!("no help for `{word}`"));
                let known = names.iter().map(String::as_str).chain(TOPICS);
                return Err(match closest(word, known) {
                    Some(close) => report.help(format!("did you mean `krakectl help {close}`?")),
                    None => report.help(format!("topics: {}", TOPICS.join(", "))),
                }
                .into());
            }
        }
    }
    ui.out(&found.render_long_help().ansi().to_string())
}
