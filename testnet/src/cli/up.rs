//! `krake-testnet up`.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use krake_testnet::state::{Directory, State, Wish};
use krake_testnet::{Testnet, UpOptions};
use serde_json::{Value, json};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::arguments::UpArguments;
use super::output::{self, Output, notice, print, print_json};
use super::status::{View, plain_table, site_table};

/// How often the processes are looked at.
const LOOK: Duration = Duration::from_millis(300);
/// Exit code after Ctrl-C while it starts, as shells have it (128 + SIGINT).
const INTERRUPTED: u8 = 130;
/// More sites than this are not listed one by one where they can be reached.
const LISTED_MAX: usize = 10;

struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn any(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hangup.recv() => {}
        }
    }
}

/// Starts, shows, and stays unless it is told to detach.
pub async fn up(directory: Directory, arguments: UpArguments) -> anyhow::Result<ExitCode> {
    let mut signals = Signals::new()?;
    let mut options = UpOptions {
        kube: arguments.kube,
        shards: arguments.shards,
        settings: arguments.settings.into_iter().collect(),
        demo: arguments.demo,
        progress: output::progress(),
        ..UpOptions::new(directory.path())
    };
    if let Some(count) = arguments.sites {
        options = options.sites(count)?;
    }
    options.progress.line(&format!(
        "krake-testnet {} in {}{}",
        env!("CARGO_PKG_VERSION"),
        short(directory.path()),
        match directory.load()? {
            Some(_) => ": the testnet that is there, with its data (down --purge removes it)",
            None => "",
        }
    ));
    let started = Instant::now();
    let testnet = tokio::select! {
        started = Testnet::up(options) => started?,
        // What was started until now ends with the future.
        () = signals.any() => {
            notice("interrupted; everything that was started is stopped");
            return Ok(ExitCode::from(INTERRUPTED));
        }
    };
    let state = directory.require()?;
    if arguments.output == Output::Json {
        print_json(&json!({
            "dir": directory.path(),
            "sites": krake_testnet::sites(&directory, &state),
        }))?;
    } else {
        show(&testnet, &state, arguments.demo, arguments.detach).await;
        let time = started.elapsed().saturating_sub(testnet.built_in());
        print(&format!("Up in {:.1} s.", time.as_secs_f32()));
    }
    if arguments.detach {
        testnet.detach()?;
        return Ok(ExitCode::SUCCESS);
    }
    stay(&testnet, &directory, &mut signals).await?;
    testnet.down().await?;
    if arguments.purge {
        directory.remove()?;
        notice("stopped and removed");
    } else {
        notice(&format!(
            "stopped; the data stays in {}, and up starts it again",
            short(directory.path())
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Watches until it is told to stop, here or by `down`.
async fn stay(
    testnet: &Testnet,
    directory: &Directory,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let words = Words::new(testnet, directory);
    let mut told = BTreeSet::new();
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            () = signals.any() => {
                notice("\nstopping …");
                return Ok(());
            }
            _ = look.tick() => {}
        }
        let Some(state) = directory.load()? else {
            return Ok(());
        };
        if state.sites.iter().all(|site| site.wish == Wish::Stopped) {
            return Ok(());
        }
        for death in testnet.unexpected_deaths()? {
            if told.insert((death.process.pid, death.process.start_ticks)) {
                notice(&format!(
                    "{death}\n  start it again: {} chaos restart {}",
                    words.testnet, death.site
                ));
            }
        }
    }
}

/// A path as short as it can be typed from here.
fn short(path: &Path) -> String {
    let current = std::env::current_dir().unwrap_or_default();
    match path.strip_prefix(&current) {
        Ok(rest) if rest.components().count() > 0 => format!("./{}", rest.display()),
        _ => path.display().to_string(),
    }
}

/// How this program is called from here.
fn own_command() -> String {
    std::env::current_exe().map_or_else(|_| "krake-testnet".to_owned(), |path| short(&path))
}

struct Words {
    testnet: String,
    krakectl: String,
}

impl Words {
    fn new(testnet: &Testnet, directory: &Directory) -> Self {
        let default = std::env::current_dir()
            .is_ok_and(|current| directory.path() == current.join(".krake-testnet"));
        let place = if default {
            String::new()
        } else {
            format!(" --dir {}", short(directory.path()))
        };
        let krakectl = short(&testnet.programs().krakectl);
        Self {
            testnet: format!("{}{place}", own_command()),
            krakectl: format!("{krakectl} --config {}", short(&directory.contexts())),
        }
    }
}

async fn show(testnet: &Testnet, state: &State, demo: bool, detach: bool) {
    let directory = testnet.directory();
    let words = Words::new(testnet, directory);
    let view = View::of(directory, state).await;
    let mut lines = vec![
        String::new(),
        site_table(directory, state, &view),
        String::new(),
    ];
    let mut runs_at = None;
    if demo {
        let why = async {
            let founder = &state.sites.first()?.profile.name;
            let client = testnet.client(founder).ok()?;
            client.get("/v1/why/default/shop").await.ok()
        };
        let why = why.await.unwrap_or_default();
        lines.extend(because(&why));
        lines.push(String::new());
        runs_at = why["decision"]["chosen"]["site"]
            .as_str()
            .map(ToOwned::to_owned);
    }
    lines.extend(reach(directory, state, &words));
    lines.push(String::new());
    lines.extend(try_next(state, &words, runs_at.as_deref()));
    lines.push(String::new());
    lines.push(if detach {
        format!(
            "It goes on in the background. Stop it: {} down",
            words.testnet
        )
    } else {
        format!(
            "Ctrl-C stops everything. From another terminal: {} status | logs SITE | down",
            words.testnet
        )
    });
    print(&lines.join("\n"));
}

/// Where the demo app runs, and the scores that say why.
fn because(why: &Value) -> Vec<String> {
    let decision = &why["decision"];
    let Some(site) = decision["chosen"]["site"].as_str() else {
        return vec!["The app shop runs; its decision cannot be read just now.".to_owned()];
    };
    let mut lines = vec![format!(
        "The app shop runs at {site}: {}",
        decision["reason"].as_str().unwrap_or_default()
    )];
    for candidate in decision["candidates"]
        .as_array()
        .into_iter()
        .flatten()
        .take(LISTED_MAX)
    {
        let name = candidate["target"]["site"].as_str().unwrap_or_default();
        let line = match candidate["score"].as_f64() {
            Some(score) => {
                let terms = candidate["terms"].as_array().into_iter().flatten();
                let terms = terms.filter_map(|term| {
                    Some(format!(
                        "{} {}",
                        term["metric"].as_str()?,
                        short_number(&term["raw"])?
                    ))
                });
                format!(
                    "  {name:<14} {score:.3}  {}",
                    terms.collect::<Vec<_>>().join(", ")
                )
            }
            None => {
                let reasons = candidate["rejections"].as_array().into_iter().flatten();
                let reasons = reasons.filter_map(|reason| reason["message"].as_str());
                format!(
                    "  {name:<14} out    {}",
                    reasons.collect::<Vec<_>>().join("; ")
                )
            }
        };
        lines.push(line);
    }
    lines
}

fn short_number(value: &Value) -> Option<String> {
    let number = value.as_f64()?;
    Some(if number.fract() == 0.0 {
        format!("{number:.0}")
    } else {
        format!("{number:.3}").trim_end_matches('0').to_owned()
    })
}

fn reach(directory: &Directory, state: &State, words: &Words) -> Vec<String> {
    let sites = krake_testnet::sites(directory, state);
    let mut lines = vec![
        "How to reach them:".to_owned(),
        format!("  all nodes: {} get apps", words.krakectl),
    ];
    let mut table = plain_table();
    table.set_header([
        "SITE",
        "API",
        "KUBECTL TO ITS NODE: --kubeconfig",
        "KUBECTL TO ITS KUBERNETES: --kubeconfig",
    ]);
    for site in sites.iter().take(LISTED_MAX) {
        table.add_row([
            site.name.clone(),
            site.api.clone(),
            short(&site.api_kubeconfig),
            short(&site.kubeconfig),
        ]);
    }
    lines.extend(table.lines().map(|line| format!(" {}", line.trim_end())));
    if sites.len() > LISTED_MAX {
        lines.push(format!(
            "  … and {} more: {} status -o json",
            sites.len() - LISTED_MAX,
            words.testnet
        ));
    }
    lines
}

/// Three things that work as they stand here.
fn try_next(state: &State, words: &Words, runs_at: Option<&str>) -> Vec<String> {
    let Words { testnet, krakectl } = words;
    let Some(site) = runs_at else {
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/shop.yaml");
        let example = match Path::new(example).canonicalize() {
            Ok(path) => short(&path),
            Err(_) => "shop.yaml".to_owned(),
        };
        let first = state
            .sites
            .first()
            .map_or("", |site| site.profile.name.as_str());
        return vec![
            "Three things to try:".to_owned(),
            format!("  {krakectl} plan -f {example}"),
            format!("  {krakectl} apply -f {example} --wait"),
            format!(
                "  {testnet} chaos kill {first}      # and then: {testnet} chaos restart {first}"
            ),
        ];
    };
    vec![
        "Three things to try:".to_owned(),
        format!("  1 {krakectl} why shop"),
        format!("  2 {testnet} chaos metric {site} carbon=900"),
        format!("      {site} becomes dirty: within half a minute the app moves; watch it with"),
        format!("      {krakectl} get apps -w"),
        format!("  3 {testnet} chaos kill {site}"),
        "      the site is gone, node and cluster: the app runs elsewhere after about 20 s."
            .to_owned(),
        format!("      {testnet} chaos restart {site} brings it back; its stale copy is removed."),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_told_with_its_numbers() {
        let why = json!({"decision": {"chosen": {"site": "oslo"}, "reason": "it has the best score",
            "candidates": [
                {"target": {"site": "oslo"}, "score": 0.91, "terms": [{"metric": "carbon", "raw": 28.0}]},
                {"target": {"site": "bonn"}, "score": null, "rejections": [{"message": "it is lost"}]}]}});
        let lines = because(&why);
        assert_eq!(lines[0], "The app shop runs at oslo: it has the best score");
        assert!(lines[1].contains("0.910  carbon 28"), "{}", lines[1]);
        assert!(lines[2].contains("it is lost"), "{}", lines[2]);
    }
}
