//! Who is a member: what a member has, and following who they are.

pub mod door;
pub mod entry;
pub mod publish;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use krake_consensus::{Batch, Expect, Host, MemberInfo, Operation, Owner, Transport};
use krake_gossip::Peer;
use krake_model::codec::CodecError;
use krake_model::{Genesis, GroupId, Member, NodeId};
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tracing::{debug, info, warn};

use crate::datadir::{DataDir, Membership};
use crate::federation::Federation;
use crate::records;
use crate::rpc::{Reply, Request};

/// A member that is silent for longer than this may be replaced as a voter.
const VOTER_SILENCE: Duration = Duration::from_secs(60);
/// A member with a longer round trip is far: leaders go to where they are asked, rather than spread.
const FAR: Duration = Duration::from_millis(20);
/// How often it is looked whose silence has come to that.
const VOTERS_INTERVAL: Duration = Duration::from_secs(5);
/// How often another member is asked for the members while the catalog here does not tell them.
const CATCH_UP_INTERVAL: Duration = Duration::from_secs(1);
/// The replica id of a member that has none: the catalog was restored without it, and what it has
/// is of another incarnation. It asks for one when it comes back.
pub const NO_REPLICA: u64 = 0;

/// Of a catalog that is written before its node runs.
pub(crate) struct NoTransport;

#[async_trait]
impl Transport for NoTransport {
    fn send(&self, _to: NodeId, _frame: Vec<u8>) -> bool {
        false
    }

    async fn call(&self, _: NodeId, _: Vec<u8>, _: Duration) -> Result<Vec<u8>, String> {
        Err("there is no other node yet".to_owned())
    }
}

/// The catalog in a data directory.
pub fn catalog_path(data: &DataDir) -> PathBuf {
    data.path().join("catalog")
}

/// Whether a member has no catalog any more.
pub fn catalog_is_gone(data: &DataDir) -> bool {
    let entries = std::fs::read_dir(catalog_path(data));
    match entries {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Removes what an attempt left that did not get to its end: nobody has seen it.
pub(crate) fn remove_unfinished(catalog: &Path) -> anyhow::Result<()> {
    if catalog.exists() {
        std::fs::remove_dir_all(catalog)
            .with_context(|| format!("cannot remove {}", catalog.display()))?;
    }
    Ok(())
}

/// Whose a node's catalog is.
pub(crate) fn owner_of(genesis: &Genesis, node: NodeId) -> Result<Owner, CodecError> {
    Ok(Owner {
        federation: genesis.federation_id()?,
        node,
    })
}

pub(crate) fn put(key: impl Into<String>, value: bytes::Bytes, expect: Expect) -> Operation {
    Operation::Put {
        key: key.into(),
        value,
        expect,
    }
}

/// The objects that show a member: its site and its node.
pub(crate) fn objects(member: &Member) -> (Value, Value) {
    let metadata = |labels: &BTreeMap<String, String>| {
        json!({
            "name": member.site.name,
            "uid": uuid::Uuid::new_v4(),
            "creationTimestamp": member.joined_at.to_seconds_string(),
            "generation": 1,
            "labels": labels,
        })
    };
    let site = json!({
        "apiVersion": "krake.dev/v1", "kind": "Site", "metadata": metadata(&member.site.labels),
        "spec": {
            "operator": member.site.operator,
            "node": member.node,
            "cordoned": false,
            "location": member.site.location,
            "labels": member.site.labels,
        },
    });
    let node = json!({
        "apiVersion": "krake.dev/v1", "kind": "Node", "metadata": metadata(&BTreeMap::new()),
        "spec": {
            "site": member.site.name,
            "node": member.node,
            "replica": member.replica,
            "addresses": member.addresses,
        },
    });
    (site, node)
}

/// What stopped the catalog, such as a full disk; else what was said of the attempt.
pub(crate) fn failure_of(host: &Host, error: impl Into<anyhow::Error>) -> anyhow::Error {
    match host.failure() {
        Some(failure) => anyhow::anyhow!("the catalog cannot be written: {failure}"),
        None if host.is_full() => anyhow::anyhow!("there is no room left on the disk"),
        None => error.into(),
    }
}

fn peers(members: &[Member]) -> Vec<Peer> {
    let peer = |member: &Member| Peer {
        node: member.node,
        addresses: member.addresses.clone(),
    };
    members.iter().map(peer).collect()
}

/// A member as the choice of voters and leaders sees it; near, unless it is known to be far.
pub fn info_of(member: &Member, alive: bool) -> MemberInfo {
    MemberInfo {
        replica: member.replica,
        node: member.node,
        operator: member.site.operator.clone(),
        grid_zone: member.site.location.grid_zone.clone(),
        country: member.site.location.country.clone(),
        alive,
        far: false,
    }
}

/// Tells network and catalog who the members are.
pub async fn apply_members(federation: &Federation, members: &[Member]) {
    federation.network.set_members(peers(members)).await;
    apply_voters(federation, members).await;
}

async fn apply_voters(federation: &Federation, members: &[Member]) {
    let opinions = federation.network.opinions();
    let rtts = federation.network.rtts();
    let infos = members
        .iter()
        .filter(|member| member.replica != NO_REPLICA)
        .map(|member| {
            let silence = opinions.silence.get(&member.node);
            let alive = member.node == federation.own
                || silence.is_none_or(|silence| *silence < VOTER_SILENCE);
            MemberInfo {
                far: rtts.get(&member.node).is_some_and(|rtt| *rtt > FAR),
                ..info_of(member, alive)
            }
        })
        .collect();
    federation.catalog.host.set_members(infos).await;
}

/// Follows the members until the program ends; they are kept in the data directory for the next
/// start.
pub async fn follow(federation: Federation, data: Arc<DataDir>, mut membership: Membership) {
    let mut batches = federation.catalog.host.watch(&["sites/", records::MEMBERS]);
    let mut care = tokio::time::interval(VOTERS_INTERVAL);
    let mut catch_up = tokio::time::interval(CATCH_UP_INTERVAL);
    catch_up.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut turn = 0;
    let mut cordoned = false;
    follow_cordon(&federation, &mut cordoned).await;
    loop {
        let members = tokio::select! {
            round = batches.recv() => {
                let round = match round {
                    Ok(round) => Some(round),
                    Err(RecvError::Lagged(_)) => None,
                    Err(RecvError::Closed) => return,
                };
                let touched = |prefix| {
                    let touches = |batch: &Batch| {
                        batch.group == GroupId::META && batch.touches(prefix)
                    };
                    round.as_ref().is_none_or(|round| round.iter().any(touches))
                };
                if touched("sites/") {
                    follow_cordon(&federation, &mut cordoned).await;
                }
                if !touched(records::MEMBERS) {
                    continue;
                }
                federation.catalog.members()
            }
            _ = care.tick() => {
                apply_voters(&federation, &membership.members).await;
                continue;
            }
            _ = catch_up.tick() => {
                if has_meta(&federation, &membership) {
                    continue;
                }
                turn += 1;
                ask_members(&federation, &membership.members, turn).await
            }
        };
        // A replica that just begins may know fewer members than we were told when we joined.
        if members.len() < membership.members.len() || members == membership.members {
            continue;
        }
        apply_members(&federation, &members).await;
        membership.members = members;
        if let Err(error) = data.store_membership(&membership) {
            warn!(%error, "the members could not be noted");
        }
    }
}

/// A cordoned site is about to be worked on: its node gives away what it leads.
async fn follow_cordon(federation: &Federation, cordoned: &mut bool) {
    let key = format!("sites/{}", federation.site);
    let Some((site, _)) = federation.catalog.read::<Value>(GroupId::META, &key) else {
        return;
    };
    let now = site["spec"]["cordoned"] == true;
    if now != *cordoned {
        *cordoned = now;
        info!(
            cordoned,
            "this site's cordon changed: a cordoned one leads nothing that another one can lead"
        );
        federation.catalog.host.set_reluctant(now).await;
    }
}

/// Whether the members come from the catalog: its replica here has a leader and knows all that we
/// were told of.
fn has_meta(federation: &Federation, membership: &Membership) -> bool {
    let status = federation.catalog.host.status();
    let led = status
        .borrow()
        .get(&GroupId::META)
        .is_some_and(|group| group.leader.is_some());
    led && federation.catalog.members().len() >= membership.members.len()
}

/// The members we know and those that another one knows. A node that was away, or joined just
/// before others did, may know nobody of those who keep the catalog now; then they do not reach it
/// either, for it lets members only speak.
async fn ask_members(federation: &Federation, known: &[Member], turn: usize) -> Vec<Member> {
    let mut members = known.to_vec();
    let connected: Vec<NodeId> = federation
        .network
        .connected()
        .borrow()
        .iter()
        .copied()
        .collect();
    let Some(asked) = connected.get(turn % connected.len().max(1)) else {
        return members;
    };
    match crate::net::ask(&federation.network, *asked, &Request::Members).await {
        Ok(Reply::Members(told)) => {
            let news = told
                .into_iter()
                .filter(|member| known.iter().all(|known| known.node != member.node));
            members.extend(news);
        }
        Ok(_) => {}
        Err(error) => debug!(%asked, error, "the members could not be asked for"),
    }
    members
}
