//! `/v1/consensus`: the groups, the members as replicas, and handing leadership over.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use http::StatusCode;
use krake_consensus::{GroupDetail, MemberInfo, Rule, TransferError, unmet_rule};
use krake_model::{GroupId, Member};
use serde_json::{Value, json};

use crate::federation::{Federation, now};
use crate::membership::{NO_REPLICA, info_of};
use crate::owner::plan::{Sight, World as _};

/// How long the consensus thread may take to describe itself.
const LOOK_TIME: Duration = Duration::from_secs(5);
/// How long a handover may take: the library gives up after an election timeout, and krakectl asks
/// another node after four seconds.
const TRANSFER_TIME: Duration = Duration::from_secs(3);

/// What went wrong, as the API says it.
#[derive(Debug)]
pub struct Problem {
    /// Of the answer.
    pub status: StatusCode,
    /// Stable, for programs.
    pub code: &'static str,
    /// For people.
    pub detail: String,
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
        }
    }
}

/// What is needed to name replicas.
struct Names {
    members: BTreeMap<u64, Member>,
    /// Members that have no replica id until they come back after a restore.
    waiting: Vec<Member>,
}

impl Names {
    fn new(federation: &Federation) -> Self {
        let members = federation.catalog.members().into_iter();
        let (waiting, members): (Vec<Member>, Vec<Member>) =
            members.partition(|member| member.replica == NO_REPLICA);
        Self {
            members: members.into_iter().map(|m| (m.replica, m)).collect(),
            waiting,
        }
    }

    fn everybody(&self) -> impl Iterator<Item = &Member> {
        self.members.values().chain(&self.waiting)
    }

    /// The site's name, or the replica's number when its member has left.
    fn of(&self, replica: u64) -> String {
        self.members
            .get(&replica)
            .map_or_else(|| replica.to_string(), |member| member.site.name.clone())
    }

    fn all<'a>(&self, replicas: impl IntoIterator<Item = &'a u64>) -> Vec<String> {
        replicas.into_iter().map(|id| self.of(*id)).collect()
    }
}

async fn details(federation: &Federation) -> Result<Vec<GroupDetail>, Problem> {
    federation
        .catalog
        .host
        .details(LOOK_TIME)
        .await
        .ok_or_else(|| {
            Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "krake::unavailable",
                "the catalog of this node has stopped, has no room on its disk, or is overloaded; ask another node",
            )
        })
}

const fn rule_name(rule: Rule) -> &'static str {
    match rule {
        Rule::Operator => "operator",
        Rule::Country => "country",
        Rule::GridZone => "gridZone",
    }
}

/// All groups, as this node sees them now.
///
/// # Errors
/// When the consensus thread does not answer.
pub async fn groups(federation: &Federation) -> Result<Value, Problem> {
    let details = details(federation).await?;
    let names = Names::new(federation);
    let moment = federation.moment();
    let alive = |replica: &u64| {
        names
            .members
            .get(replica)
            .is_some_and(|member| moment.sight(&member.node, federation.lost_after) == Sight::Alive)
    };
    let groups: Vec<Value> = details
        .iter()
        .map(|detail| {
            let status = &detail.status;
            let infos: Vec<MemberInfo> = status
                .voters
                .iter()
                .filter_map(|id| names.members.get(id))
                .map(|member| info_of(member, true))
                .collect();
            let there = status.voters.iter().filter(|id| alive(id)).count();
            let (entries, bytes) = federation.catalog.host.size(status.group);
            json!({
                "group": status.group.to_string(),
                "leader": status.leader.map(|id| names.of(id)),
                "term": status.term,
                "commit": detail.commit,
                "applied": detail.applied,
                "last": detail.last,
                "snapshot": detail.snapshot,
                "logBytes": detail.log_bytes,
                "asleep": detail.asleep,
                "entries": entries,
                "bytes": bytes,
                "voters": names.all(&status.voters),
                "learners": names.all(&status.learners),
                "quorum": there * 2 > status.voters.len(),
                "unmetRule": unmet_rule(infos.iter()).map(rule_name),
            })
        })
        .collect();
    Ok(json!({
        "servedBy": &*federation.site,
        "observedAt": now(),
        "groups": groups,
    }))
}

/// How far a replica is behind, at worst, in the groups that this node leads.
#[derive(Debug, Default)]
struct Lag {
    known: bool,
    entries: u64,
    group: Option<GroupId>,
}

/// All members as replicas, as this node sees them now. How far each is behind is known for the
/// groups that this node leads.
///
/// # Errors
/// When the consensus thread does not answer.
pub async fn peers(federation: &Federation) -> Result<Value, Problem> {
    let details = details(federation).await?;
    let names = Names::new(federation);
    let moment = federation.moment();
    let connected = federation.network.connected().borrow().clone();
    let round_trips = federation.network.rtts();
    let mut lags: BTreeMap<u64, Lag> = BTreeMap::new();
    for detail in &details {
        for peer in &detail.peers {
            let lag = lags.entry(peer.replica).or_default();
            let behind = detail.last.saturating_sub(peer.matched);
            lag.known = true;
            if behind > lag.entries {
                (lag.entries, lag.group) = (behind, Some(detail.status.group));
            }
        }
    }
    let count = |holds: &dyn Fn(&GroupDetail) -> bool| details.iter().filter(|d| holds(d)).count();
    let peers: Vec<Value> = names
        .everybody()
        .map(|member| {
            let own = member.node == federation.own;
            let state = moment.sight(&member.node, federation.lost_after).name();
            let replica = member.replica;
            let lag = lags.get(&replica).filter(|lag| lag.known);
            json!({
                "site": member.site.name,
                "node": member.node,
                "replica": replica,
                "operator": member.site.operator,
                "country": member.site.location.country,
                "gridZone": member.site.location.grid_zone,
                "state": state,
                "connected": own || connected.contains(&member.node),
                "addresses": member.addresses,
                "leads": count(&|d| d.status.leader == Some(replica)),
                "votes": count(&|d| d.status.voters.contains(&replica)),
                "follows": count(&|d| d.status.learners.contains(&replica)),
                "behind": lag.map(|lag| lag.entries),
                "behindIn": lag.and_then(|lag| lag.group).map(|group| group.to_string()),
                "rttMillis": round_trips.get(&member.node).map(Duration::as_secs_f64).map(|s| s * 1e3),
            })
        })
        .collect();
    Ok(json!({
        "servedBy": &*federation.site,
        "observedAt": now(),
        "peers": peers,
    }))
}

/// `meta`, `shard-3`, or `3`.
fn parse_group(text: &str, shards: u16) -> Result<GroupId, Problem> {
    if text == "meta" {
        return Ok(GroupId::META);
    }
    let number = text.strip_prefix("shard-").unwrap_or(text);
    match number.parse::<u16>() {
        Ok(shard) if shard < shards => Ok(GroupId::of_shard(shard)),
        _ => Err(Problem::new(
            StatusCode::NOT_FOUND,
            "krake::unknown-group",
            format!(
                "there is no group `{text}`; there are meta and shard-0 to shard-{}",
                shards.saturating_sub(1)
            ),
        )),
    }
}

/// Hands leadership of a group to the node of a site, wherever it is led now.
///
/// # Errors
/// When group or site are not known, the site's node cannot lead it, or it did not get there.
pub async fn transfer(federation: &Federation, group: &str, site: &str) -> Result<Value, Problem> {
    let group = parse_group(group, federation.catalog.shards)?;
    let names = Names::new(federation);
    let found = names.everybody().find(|m| m.site.name == site);
    let Some(member) = found else {
        let known: Vec<&str> = names.everybody().map(|m| m.site.name.as_str()).collect();
        let known = known.join(", ");
        return Err(Problem::new(
            StatusCode::NOT_FOUND,
            "krake::unknown-site",
            format!("there is no site `{site}`; there are {known}"),
        ));
    };
    let host = &federation.catalog.host;
    let status = host.status().borrow().get(&group).cloned();
    let from = status.as_ref().and_then(|status| status.leader);
    let voters = || {
        let voters = status.iter().flat_map(|status| &status.voters);
        names.all(voters).join(", ")
    };
    let begun = Instant::now();
    match host.transfer(group, member.replica, TRANSFER_TIME).await {
        Ok(moved) => Ok(json!({
            "group": group.to_string(),
            "from": from.map(|id| names.of(id)),
            "to": site,
            "moved": moved,
            "millis": begun.elapsed().as_millis() as u64,
        })),
        Err(error) => Err(match error {
            TransferError::NotVoter { .. } => Problem::new(
                StatusCode::CONFLICT,
                "krake::not-a-voter",
                format!(
                    "{site} does not vote in {group}: only one of its voters can lead it ({})",
                    voters()
                ),
            ),
            TransferError::Silent { .. } => Problem::new(
                StatusCode::CONFLICT,
                "krake::unreachable",
                format!(
                    "{site} has not answered the leader of {group} lately: it could not lead it"
                ),
            ),
            TransferError::Timeout { .. } => Problem::new(
                StatusCode::GATEWAY_TIMEOUT,
                "krake::timeout",
                format!(
                    "leadership of {group} did not reach {site} within {} s; `krakectl consensus status` shows where it is",
                    TRANSFER_TIME.as_secs()
                ),
            ),
            TransferError::NoLeader { .. } => Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "krake::no-leader",
                format!(
                    "{group} has no leader now that could hand over; voters: {}",
                    voters()
                ),
            ),
            TransferError::UnknownGroup { .. } | TransferError::Stopped => Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "krake::unavailable",
                error.to_string(),
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_named_as_they_are_shown() {
        for group in [GroupId::META, GroupId::of_shard(0), GroupId::of_shard(15)] {
            assert_eq!(parse_group(&group.to_string(), 16).unwrap(), group);
        }
        assert_eq!(parse_group("3", 16).unwrap(), GroupId::of_shard(3));
        for wrong in ["", "16", "shard-16", "shard-", "shard--1", "Meta"] {
            let problem = parse_group(wrong, 16).unwrap_err();
            assert_eq!(problem.code, "krake::unknown-group", "{wrong}");
            assert!(problem.detail.contains("shard-15"));
        }
    }
}
