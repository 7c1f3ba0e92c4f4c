//! `krake-node leave`: this site's operator takes it out of the federation.

use std::time::Duration;

use anyhow::{Context, bail};
use krake_model::Timestamp;
use reqwest::StatusCode;
use serde_json::{Value, json};

use crate::config::Config;
use crate::datadir::{DataDir, DataDirError};
use crate::kinds::{GROUP, VERSION};

/// How often the site is looked at.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long the node may take to stop once its site is no member any more.
const STOP_TIME: Duration = Duration::from_secs(30);
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

/// Asks the running node of this site to leave, and waits until it has: first its applications move
/// to other sites, then its votes; with `force` nothing waits for the applications. `say` is told
/// what it waits for, each time that this changes. Where the waiting is cancelled, the site goes on
/// leaving.
///
/// # Errors
/// When the node does not run, may not leave, or stopped before it was let go.
pub async fn leave(
    config: &Config,
    force: bool,
    wait: bool,
    mut say: impl FnMut(&str),
) -> anyhow::Result<Left> {
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
    loop {
        tokio::time::sleep(INTERVAL).await;
        let Ok(answer) = http.get(&url).send().await else {
            break;
        };
        if answer.status() == StatusCode::NOT_FOUND {
            break;
        }
        let object: Value = answer.json().await.unwrap_or_default();
        let waits = object.pointer("/status/leaving").and_then(Value::as_str);
        if let Some(waits) = waits.filter(|waits| *waits != told) {
            waits.clone_into(&mut told);
            say(waits);
        }
    }
    ended(config).await
}

/// Waits until the node has stopped, and looks why.
async fn ended(config: &Config) -> anyhow::Result<Left> {
    let deadline = tokio::time::Instant::now() + STOP_TIME;
    loop {
        match DataDir::open_existing(&config.node.data_dir) {
            Ok(data) => {
                return match data.require_membership() {
                    Err(DataDirError::Left { left_at, .. }) => Ok(Left::Gone(left_at)),
                    Err(error) => Err(error.into()),
                    Ok(_) => bail!(
                        "the node stopped before it was let go; start it with krake-node run: it goes on leaving"
                    ),
                };
            }
            Err(DataDirError::Locked { .. }) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(INTERVAL / 4).await;
            }
            Err(DataDirError::Locked { .. }) => bail!(
                "the site is no member any more, but its node still runs after {} s: see its log",
                STOP_TIME.as_secs()
            ),
            Err(error) => return Err(error.into()),
        }
    }
}
