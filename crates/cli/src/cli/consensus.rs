//! `consensus …`: the catalog's Raft groups.

use super::args::{ConsensusCommand, TableOutput};
use super::exit::Exit;
use super::output::grid;
use super::report::{Failure, Outcome};
use super::session::Session;
use crate::client::{ConsensusGroup, ConsensusPeer, ConsensusPeers, ConsensusStatus, Request};

/// Runs the command.
///
/// # Errors
/// When something is wrong, or no node answers.
pub async fn run(session: &Session, command: &ConsensusCommand) -> Outcome {
    match command {
        ConsensusCommand::Status(output) => status(session, output).await,
        ConsensusCommand::Peers(output) => peers(session, output).await,
        ConsensusCommand::Transfer { group, site } => {
            let done = session.client.transfer(group, site).await?;
            let text = if done.moved {
                let from = done.from.as_deref().unwrap_or("nobody");
                format!(
                    "{} is led by {} now (before: {from}; {} ms)",
                    done.group, done.to, done.millis
                )
            } else {
                format!("{} is led by {} already", done.group, done.to)
            };
            session.ui.out(&text)
        }
    }
}

async fn status(session: &Session, output: &TableOutput) -> Outcome {
    let answer = session.client.send(&Request::get("/v1/consensus")).await?;
    let status: ConsensusStatus = answer.json()?;
    if output.output.is_table() {
        session.ui.out(&status_text(&status))?;
    } else {
        session.ui.out(&output.output.print(&answer.json()?))?;
    }
    if problems(&status.groups).is_empty() {
        Ok(())
    } else {
        Err(Failure::silent(Exit::Failed))
    }
}

async fn peers(session: &Session, output: &TableOutput) -> Outcome {
    let request = Request::get("/v1/consensus/peers");
    let answer = session.client.send(&request).await?;
    if !output.output.is_table() {
        return session.ui.out(&output.output.print(&answer.json()?));
    }
    let peers: ConsensusPeers = answer.json()?;
    session.ui.out(&peers_text(&peers))
}

fn problems(groups: &[ConsensusGroup]) -> Vec<String> {
    groups
        .iter()
        .filter_map(|group| {
            if group.leader.is_none() {
                Some(format!("{} has no leader", group.group))
            } else if !group.quorum {
                Some(format!(
                    "no majority of the voters of {} is alive",
                    group.group
                ))
            } else {
                None
            }
        })
        .collect()
}

fn list(sites: &[String]) -> String {
    if sites.is_empty() {
        "-".to_owned()
    } else {
        sites.join(" ")
    }
}

fn status_text(status: &ConsensusStatus) -> String {
    let rows: Vec<Vec<String>> = status
        .groups
        .iter()
        .map(|group| {
            vec![
                group.group.clone(),
                group.leader.clone().unwrap_or_else(|| "none".to_owned()),
                group.term.to_string(),
                group.commit.to_string(),
                group.applied.to_string(),
                group.last.saturating_sub(group.snapshot).to_string(),
                group.entries.to_string(),
                group.bytes.to_string(),
                list(&group.voters),
                list(&group.learners),
                group.unmet_rule.clone().unwrap_or_else(|| "-".to_owned()),
            ]
        })
        .collect();
    let headings = [
        "GROUP", "LEADER", "TERM", "COMMIT", "APPLIED", "LOG", "KEYS", "BYTES", "VOTERS",
        "LEARNERS", "SHARED",
    ];
    let mut text = format!("as {} sees it\n\n", status.served_by);
    text.push_str(&grid(&headings, &rows));
    text.push('\n');
    let shared = status.groups.iter().any(|group| group.unmet_rule.is_some());
    if shared {
        text.push_str(
            "SHARED: what several voters have in common, so that they can be lost together\n",
        );
    }
    let problems = problems(&status.groups);
    for problem in &problems {
        text.push_str("! ");
        text.push_str(problem);
        text.push('\n');
    }
    if problems.is_empty() {
        text.push_str("every group has a leader and a majority\n");
    }
    text
}

fn behind(peer: &ConsensusPeer) -> String {
    match (peer.behind, &peer.behind_in) {
        (None, _) => "-".to_owned(),
        (Some(entries), Some(group)) => format!("{entries} in {group}"),
        (Some(entries), None) => entries.to_string(),
    }
}

fn peers_text(peers: &ConsensusPeers) -> String {
    let rows: Vec<Vec<String>> = peers
        .peers
        .iter()
        .map(|peer| {
            let rtt = peer.rtt_millis;
            vec![
                peer.site.clone(),
                peer.replica.to_string(),
                peer.state.clone(),
                if peer.connected { "yes" } else { "no" }.to_owned(),
                rtt.map_or_else(|| "-".to_owned(), |millis| format!("{millis:.1} ms")),
                peer.leads.to_string(),
                peer.votes.to_string(),
                peer.follows.to_string(),
                behind(peer),
                peer.node.clone(),
            ]
        })
        .collect();
    let headings = [
        "SITE",
        "REPLICA",
        "STATE",
        "CONNECTED",
        "RTT",
        "LEADS",
        "VOTES",
        "FOLLOWS",
        "BEHIND",
        "NODE",
    ];
    format!(
        "as {} sees it; BEHIND is known for the groups it leads\n\n{}",
        peers.served_by,
        grid(&headings, &rows)
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn group(name: &str, leader: Option<&str>, quorum: bool) -> serde_json::Value {
        json!({
            "group": name, "leader": leader, "term": 3, "commit": 120, "applied": 120,
            "last": 121, "snapshot": 100, "entries": 7, "bytes": 4096,
            "voters": ["lisbon", "oslo", "paris"], "learners": [], "quorum": quorum,
            "unmetRule": "country",
        })
    }

    #[test]
    fn the_screen_shows_what_is_wrong() {
        let answer = json!({"servedBy": "oslo", "observedAt": 0, "groups": [
            group("meta", Some("oslo"), true), group("shard-0", None, true), group("shard-1", Some("oslo"), false)]});
        let status: ConsensusStatus = serde_json::from_value(answer).unwrap();
        let text = status_text(&status);
        assert!(text.contains("as oslo sees it"), "{text}");
        assert!(text.contains("! shard-0 has no leader"), "{text}");
        assert!(
            text.contains("! no majority of the voters of shard-1 is alive"),
            "{text}"
        );
        assert!(!text.contains("! meta"), "{text}");
        assert!(
            text.contains("21 "),
            "21 entries since the snapshot: {text}"
        );
        assert!(text.contains("country"), "{text}");
    }

    #[test]
    fn lag_is_shown_where_it_is_known() {
        let peer = |behind: Option<u64>, group: Option<&str>| {
            json!({"site": "oslo", "node": "12D3", "replica": 4, "state": "Alive", "connected": true,
                "leads": 1, "votes": 17, "follows": 0, "behind": behind, "behindIn": group, "rttMillis": 1.25})
        };
        let answer = json!({"servedBy": "paris", "peers": [
            peer(None, None), peer(Some(0), None), peer(Some(12), Some("shard-3"))]});
        let text = peers_text(&serde_json::from_value(answer).unwrap());
        assert!(text.contains("12 in shard-3"), "{text}");
        assert!(text.contains("1.2 ms"), "{text}");
    }
}
