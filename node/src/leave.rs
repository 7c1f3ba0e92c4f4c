//! `krake-node leave`: this site's operator takes it out of the federation.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use krake_model::Timestamp;
use serde_json::{Value, json};

use crate::config::Config;
use crate::datadir::{DataDir, DataDirError};
use crate::kinds::{GROUP, VERSION};

/// How often the site is looked at.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long the node may tell nothing: it restarts, or stops because it was let go.
const STALL: Duration = Duration::from_secs(60);
/// How long one answer may take.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// What became of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Left {
    /// The node is no member any more, since this time, and has stopped.
    Gone(Timestamp),
    /// It is asked for, and goes on by itself.
    Begun,
}

/// Asks the running node of this site to leave, and waits until it has stopped: first its applications
/// move to other sites, then its votes; with `force` nothing waits for the applications, and those that
/// are still here go on without the federation. `say` is told what it waits for, each time that this
/// changes. Where the waiting is cancelled, the site goes on leaving.
///
/// # Errors
/// When the node does not run, may not leave, tells nothing for a minute, or its leaving was called off
/// because every other site was to leave, too.
pub async fn leave(
    config: &Config,
    force: bool,
    wait: bool,
    mut say: impl FnMut(&str),
) -> anyhow::Result<Left> {
    if let Some(left_at) = DataDir::left_at(&config.node.data_dir)? {
        return Ok(Left::Gone(left_at));
    }
    let site = &config.site.name;
    let socket = config.socket_path();
    let http = reqwest::Client::builder()
        .unix_socket(socket.as_path())
        .timeout(ANSWER_TIME)
        .build()?;
    let url = format!("http://node/apis/{GROUP}/{VERSION}/sites/{site}");
    let mut options = json!({"apiVersion": "v1", "kind": "DeleteOptions"});
    if force {
        options["gracePeriodSeconds"] = json!(0);
    }
    let answer = http.delete(&url).json(&options).send().await.with_context(|| {
        format!(
            "the node does not answer at {}; it has to run, for its applications and its votes move to other sites first. When it never will again, take it out at another site: krakectl delete site {site} --force",
            socket.display()
        )
    })?;
    let status = answer.status();
    let body: Value = answer.json().await.unwrap_or_default();
    if !status.is_success() {
        let message = body["message"].as_str().unwrap_or("no reason is given");
        bail!("{message} [{}]", status.as_u16());
    }
    if !wait {
        return Ok(Left::Begun);
    }
    let mut told = String::new();
    let mut answered_at = Instant::now();
    loop {
        tokio::time::sleep(INTERVAL).await;
        if let Some(left_at) = DataDir::left_at(&config.node.data_dir)? {
            stopped(config).await?;
            return Ok(Left::Gone(left_at));
        }
        let object: Option<Value> = match http.get(&url).send().await {
            Ok(answer) if answer.status().is_success() => answer.json().await.ok(),
            // It may have been let go a moment ago, or have no majority to read from.
            _ => None,
        };
        let Some(object) = object else {
            if answered_at.elapsed() > STALL {
                bail!(
                    "the node has not told about its site for {} s: it goes on leaving, or has left and nobody could tell it so; krakectl get sites at another site and its log tell which. Start it where it has stopped",
                    STALL.as_secs()
                );
            }
            continue;
        };
        answered_at = Instant::now();
        if object.pointer("/metadata/deletionTimestamp").is_none() {
            bail!(
                "the leaving was called off: every other site was to leave, too, and this one stays"
            );
        }
        let waits = object.pointer("/status/leaving").and_then(Value::as_str);
        if let Some(waits) = waits.filter(|waits| *waits != told) {
            waits.clone_into(&mut told);
            say(waits);
        }
    }
}

/// Waits until the node lets go of its data directory.
async fn stopped(config: &Config) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        match DataDir::open_existing(&config.node.data_dir) {
            Err(DataDirError::Locked { .. }) if begun.elapsed() < STALL => {
                tokio::time::sleep(INTERVAL / 4).await;
            }
            opened => return Ok(opened.map(drop)?),
        }
    }
}
