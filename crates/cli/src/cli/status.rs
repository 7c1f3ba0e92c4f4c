//! `status`: the federation at a glance.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use tokio::time::Instant;

use super::args::StatusArgs;
use super::exit::Exit;
use super::output::grid;
use super::report::{Failure, Outcome, Report};
use super::session::Session;
use crate::client::{FederationStatus, GroupStatus, Request, SiteStatus};

/// Time between two looks with `--wait`: there is no watch on a node's own view.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// What is wrong.
pub fn problems(status: &FederationStatus) -> Vec<String> {
    let mut problems = Vec::new();
    if status.isolated {
        problems.push(format!(
            "{} has lost sight of most other sites: it decides nothing until it sees them again",
            status.served_by
        ));
    }
    for site in status.sites.iter().filter(|site| site.state != "Alive") {
        problems.push(format!("{} is {}", site.name, site.state.to_lowercase()));
    }
    let alive = |voter: &&String| {
        let site = status.sites.iter().find(|site| site.name == **voter);
        site.is_some_and(|site| site.state == "Alive")
    };
    let leaderless: Vec<&str> = status
        .groups
        .iter()
        .filter(|group| group.leader.is_none())
        .map(|group| group.group.as_str())
        .collect();
    if !leaderless.is_empty() {
        problems.push(format!(
            "no leader for {}: their applications cannot be changed now",
            ranges(&leaderless)
        ));
    }
    let minority: Vec<&str> = status
        .groups
        .iter()
        .filter(|group| {
            let there = group.voters.iter().filter(alive).count();
            group.leader.is_some() && !group.voters.is_empty() && there * 2 <= group.voters.len()
        })
        .map(|group| group.group.as_str())
        .collect();
    if !minority.is_empty() {
        problems.push(format!(
            "no majority of voters is alive for {}",
            ranges(&minority)
        ));
    }
    problems
}

/// `meta, 0–3, 7`
fn ranges(groups: &[&str]) -> String {
    let number = |group: &str| -> Option<u32> {
        let digits = group.trim_start_matches(|c: char| !c.is_ascii_digit());
        digits.parse().ok()
    };
    let mut words: Vec<String> = groups
        .iter()
        .filter(|group| number(group).is_none())
        .map(|group| (*group).to_owned())
        .collect();
    let mut numbers: Vec<u32> = groups.iter().filter_map(|group| number(group)).collect();
    numbers.sort_unstable();
    let mut rest = &numbers[..];
    while let Some((first, _)) = rest.split_first() {
        let length = rest
            .iter()
            .zip(*first..)
            .take_while(|(found, wanted)| **found == *wanted)
            .count();
        let last = rest[length - 1];
        words.push(match length {
            1 => format!("{first}"),
            _ => format!("{first}-{last}"),
        });
        rest = &rest[length..];
    }
    words.join(", ")
}

/// Leader, voters and learners of a group.
type Makeup<'a> = (Option<&'a str>, &'a [String], &'a [String]);

fn group_rows(groups: &[GroupStatus]) -> Vec<Vec<String>> {
    let mut alike: BTreeMap<Makeup<'_>, Vec<&str>> = BTreeMap::new();
    for group in groups {
        let key = (
            group.leader.as_deref(),
            group.voters.as_slice(),
            group.learners.as_slice(),
        );
        alike.entry(key).or_default().push(&group.group);
    }
    let mut rows: Vec<Vec<String>> = alike
        .into_iter()
        .map(|((leader, voters, learners), names)| {
            let list = |sites: &[String]| {
                if sites.is_empty() {
                    "-".to_owned()
                } else {
                    sites.join(" ")
                }
            };
            vec![
                ranges(&names),
                leader.unwrap_or("none").to_owned(),
                list(voters),
                list(learners),
            ]
        })
        .collect();
    // Meta first, then by shard.
    rows.sort_by_key(|row| (!row[0].starts_with("meta"), natural(&row[0])));
    rows
}

/// Numbers in their order.
fn natural(text: &str) -> (u32, String) {
    let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
    (digits.parse().unwrap_or(0), text.to_owned())
}

/// The screen.
pub fn text(status: &FederationStatus) -> String {
    let mut text = format!(
        "federation {} ({} sites, {} shards)   as {} sees it\nid {}\n\n",
        status.federation.name,
        status.sites.len(),
        status.federation.shards,
        status.served_by,
        status.federation.id,
    );
    let count = |matches: &dyn Fn(&GroupStatus) -> bool| {
        let count = status.groups.iter().filter(|group| matches(group)).count();
        count.to_string()
    };
    let mut sites: Vec<&SiteStatus> = status.sites.iter().collect();
    sites.sort_by_key(|site| &site.name);
    let rows: Vec<Vec<String>> = sites
        .into_iter()
        .map(|site| {
            vec![
                site.name.clone(),
                site.state.clone(),
                count(&|group| group.leader.as_deref() == Some(&site.name)),
                count(&|group| group.voters.contains(&site.name)),
                site.addresses
                    .first()
                    .cloned()
                    .unwrap_or_else(|| "-".to_owned()),
            ]
        })
        .collect();
    text.push_str(&grid(
        &["SITE", "STATE", "LEADS", "VOTES", "ADDRESS"],
        &rows,
    ));
    text.push('\n');
    let headings = ["GROUPS", "LEADER", "VOTERS", "LEARNERS"];
    text.push_str(&grid(&headings, &group_rows(&status.groups)));
    text.push('\n');
    let problems = problems(status);
    if problems.is_empty() {
        text.push_str("nothing is wrong\n");
    } else {
        for problem in problems {
            let _ = writeln!(text, "! {problem}");
        }
    }
    text
}

/// Runs the command.
///
/// # Errors
/// When something is wrong, or no node answers.
pub async fn run(session: &Session, arguments: &StatusArgs) -> Outcome {
    let deadline = Instant::now() + arguments.timeout;
    let mut shown = String::new();
    let (raw, status) = loop {
        let error = match look(session).await {
            Ok((raw, status)) => {
                let wrong = problems(&status);
                if wrong.is_empty() || !arguments.wait {
                    break (raw, status);
                }
                let state = wrong.join("; ");
                if state != shown {
                    session.ui.note(&state);
                    shown = state;
                }
                None
            }
            Err(failure) if arguments.wait => Some(failure),
            Err(failure) => return Err(failure),
        };
        if Instant::now() + LOOK_AGAIN > deadline {
            return Err(error.unwrap_or_else(|| {
                let time = humantime::format_duration(arguments.timeout);
                let text = format!("something is still wrong after {time}");
                Report::new(Exit::TimedOut, "timeout", text)
                    .note(shown)
                    .into()
            }));
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    };
    if arguments.output.is_table() {
        session.ui.out(&text(&status))?;
    } else {
        session.ui.out(&arguments.output.print(&raw))?;
    }
    if problems(&status).is_empty() {
        Ok(())
    } else {
        Err(Failure::silent(Exit::Failed))
    }
}

async fn look(session: &Session) -> Outcome<(serde_json::Value, FederationStatus)> {
    let answer = session.client.send(&Request::get("/v1/status")).await?;
    Ok((answer.json()?, answer.json()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> FederationStatus {
        serde_json::from_value(serde_json::json!({
            "federation": {"name": "demo", "id": "f-123", "shards": 4},
            "servedBy": "dresden",
            "sites": [
                {"name": "dresden", "node": "a", "state": "Alive", "addresses": ["127.0.0.1:1"]},
                {"name": "paris", "node": "b", "state": "Alive", "addresses": []},
                {"name": "lisbon", "node": "c", "state": "Alive"},
            ],
            "groups": (0..5).map(|n| serde_json::json!({
                "group": if n == 0 { "meta".to_owned() } else { format!("shard-{}", n - 1) },
                "leader": if n == 2 { "paris" } else { "dresden" },
                "voters": ["dresden", "paris", "lisbon"], "learners": [], "term": 2,
            })).collect::<Vec<_>>(),
        }))
        .unwrap()
    }

    #[test]
    fn a_healthy_federation_has_no_problems() {
        insta::assert_snapshot!(text(&status()));
    }

    #[test]
    fn what_is_wrong_is_said() {
        let mut status = status();
        status.sites[1].state = "Lost".to_owned();
        status.sites[2].state = "Suspect".to_owned();
        status.groups[3].leader = None;
        status.isolated = true;
        assert_eq!(
            problems(&status),
            [
                "dresden has lost sight of most other sites: it decides nothing until it sees them again",
                "paris is lost",
                "lisbon is suspect",
                "no leader for 2: their applications cannot be changed now",
                "no majority of voters is alive for meta, 0-1, 3",
            ]
        );
    }
}
