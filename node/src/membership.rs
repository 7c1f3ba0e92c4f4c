//! Who is a member: what a member has, and following who they are.

pub mod departure;
pub mod door;
pub mod entry;
pub mod publish;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use async_trait::async_trait;
use krake_consensus::{Batch, Expect, Host, MemberInfo, Operation, Owner, Transport};
use krake_gossip::Peer;
use krake_model::codec::CodecError;
use krake_model::{Genesis, GroupId, Member, NodeId};
use serde_json::{Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tracing::{debug, info, warn};

use crate::datadir::{DataDir, Membership};
use crate::federation::Federation;
use crate::kinds::MEMBER_FINALIZER;
use crate::records::{self, Departure};
use crate::rpc::{Reply, Request};

/// A member that is silent for longer than this may be replaced as a voter.
const VOTER_SILENCE: Duration = Duration::from_secs(60);
/// A member that was heard of without a break for this long may vote in the place of another one that
/// is there.
const STEADY: Duration = Duration::from_secs(60);
/// A member with a longer round trip is far: leaders go to where they are asked, rather than spread.
const FAR: Duration = Duration::from_millis(20);
/// How often it is looked who is silent, and who has been there for long enough.
const VOTERS_INTERVAL: Duration = Duration::from_secs(2);
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
    let mut about_site = metadata(&member.site.labels);
    about_site["finalizers"] = json!([MEMBER_FINALIZER]);
    let site = json!({
        "apiVersion": "krake.dev/v1", "kind": "Site", "metadata": about_site,
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

/// A member as the choice of voters and leaders sees it; steady and near, unless it is known not to be.
pub fn info_of(member: &Member, alive: bool) -> MemberInfo {
    MemberInfo {
        replica: member.replica,
        node: member.node,
        operator: member.site.operator.clone(),
        grid_zone: member.site.location.grid_zone.clone(),
        country: member.site.location.country.clone(),
        alive,
        heard: alive,
        steady: alive,
        leaving: false,
        far: false,
    }
}

/// Since when each member has been heard of without a break.
#[derive(Debug, Default)]
struct Presence(BTreeMap<NodeId, Instant>);

impl Presence {
    /// Who is there now.
    fn note(&mut self, there: &BTreeSet<NodeId>, now: Instant) {
        self.0.retain(|node, _| there.contains(node));
        for node in there {
            self.0.entry(*node).or_insert(now);
        }
    }

    fn is_steady(&self, node: &NodeId, now: Instant) -> bool {
        let since = self.0.get(node);
        since.is_some_and(|since| now.saturating_duration_since(*since) >= STEADY)
    }
}

/// The members by what is known here and what the catalog tells: a replica that just begins may lack
/// some that we were told of, but who left is a member no more, whoever else may say so.
fn merged(known: &[Member], told: Vec<Member>, left: &BTreeMap<NodeId, Departure>) -> Vec<Member> {
    let mut members = told;
    let untold = |member: &&Member| members.iter().all(|told| told.node != member.node);
    let untold: Vec<Member> = known.iter().filter(untold).cloned().collect();
    members.extend(untold);
    members.retain(|member| !left.contains_key(&member.node));
    members.sort_by_key(|member| member.node);
    members
}

/// What is seen of the members.
#[derive(Debug, Default)]
struct Seen {
    silence: BTreeMap<NodeId, Duration>,
    rtts: BTreeMap<NodeId, Duration>,
    heard: BTreeSet<NodeId>,
}

/// The members as the choice of voters and leaders is to see them. `giving` are those that are to give
/// their votes away.
fn infos(
    members: &[Member],
    giving: &BTreeSet<NodeId>,
    departures: &BTreeMap<NodeId, Departure>,
    seen: &Seen,
    is_steady: impl Fn(&NodeId) -> bool,
) -> Vec<MemberInfo> {
    let members = members.iter();
    let stays =
        |member: &&Member| member.replica != NO_REPLICA && !departures.contains_key(&member.node);
    members
        .filter(stays)
        .map(|member| {
            let node = &member.node;
            let silence = seen.silence.get(node);
            let alive = silence.is_none_or(|silence| *silence < VOTER_SILENCE);
            MemberInfo {
                heard: seen.heard.contains(node),
                steady: is_steady(node),
                leaving: giving.contains(node),
                far: seen.rtts.get(node).is_some_and(|rtt| *rtt > FAR),
                ..info_of(member, alive)
            }
        })
        .collect()
}

/// Follows who the members are, and tells network and catalog.
#[derive(Debug)]
pub struct Follower {
    federation: Federation,
    data: Arc<DataDir>,
    membership: Membership,
    presence: Presence,
    reluctant: bool,
    turn: usize,
    standing: departure::Standing,
    left: watch::Sender<Option<Departure>>,
}

impl Follower {
    /// A follower that tells the members that were known when the node stopped.
    pub async fn start(federation: Federation, data: Arc<DataDir>, membership: Membership) -> Self {
        let mut follower = Self {
            federation,
            data,
            membership,
            presence: Presence::default(),
            reluctant: false,
            turn: 0,
            standing: departure::Standing::default(),
            left: watch::Sender::default(),
        };
        follower.tell_network().await;
        follower.tell_voters().await;
        follower
    }

    /// Says so when this node is a member no more.
    pub fn left(&self) -> watch::Receiver<Option<Departure>> {
        self.left.subscribe()
    }

    async fn tell_network(&self) {
        let peers = peers(&self.membership.members);
        self.federation.network.set_members(peers).await;
    }

    async fn tell_voters(&mut self) {
        let federation = &self.federation;
        // In this order: the command that lets a member go takes away the one and adds the other, so
        // none is missing in both.
        let giving = federation.catalog.giving_votes();
        let departures = federation.catalog.departures();
        let unheard = federation.network.unheard();
        let now = Instant::now();
        let nodes = self.membership.members.iter().map(|member| member.node);
        let heard = nodes.filter(|node| !unheard.contains_key(node)).collect();
        self.presence.note(&heard, now);
        let seen = Seen {
            silence: federation.network.opinions().silence,
            rtts: federation.network.rtts(),
            heard,
        };
        let infos = infos(
            &self.membership.members,
            &giving,
            &departures,
            &seen,
            |node| self.presence.is_steady(node, now),
        );
        federation.catalog.host.set_members(infos).await;
        *federation.giving_votes.lock() = giving;
    }

    /// Follows until this node has left or the program ends; the members are kept in the data
    /// directory for the next start.
    pub async fn run(mut self) {
        let host = self.federation.catalog.host.clone();
        let mut batches = host.watch(&[
            "sites/",
            records::MEMBERS,
            records::LEAVING,
            records::DEPARTED,
        ]);
        let mut care = tokio::time::interval(VOTERS_INTERVAL);
        let mut catch_up = tokio::time::interval(CATCH_UP_INTERVAL);
        catch_up.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.follow_site().await;
        self.take(self.federation.catalog.members()).await;
        while self.left.borrow().is_none() {
            tokio::select! {
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
                        self.follow_site().await;
                    }
                    if touched(records::MEMBERS) || touched(records::DEPARTED) {
                        self.take(self.federation.catalog.members()).await;
                    }
                    if touched(records::LEAVING) {
                        self.tell_voters().await;
                    }
                }
                _ = care.tick() => self.tell_voters().await,
                _ = catch_up.tick() => self.catch_up().await,
            }
        }
    }

    async fn take(&mut self, told: Vec<Member>) {
        let departures = self.federation.catalog.departures();
        if let Some(departure) = departures.get(&self.federation.own) {
            self.left.send_replace(Some(departure.clone()));
            return;
        }
        let members = merged(&self.membership.members, told, &departures);
        if members == self.membership.members {
            return;
        }
        self.membership.members = members;
        self.tell_network().await;
        self.tell_voters().await;
        if let Err(error) = self.data.store_membership(&self.membership) {
            warn!(%error, "the members could not be noted");
        }
    }

    /// A site that is cordoned or leaves is about to be worked on: its node gives away what it leads.
    async fn follow_site(&mut self) {
        let key = format!("sites/{}", self.federation.site);
        let site = self.federation.catalog.read::<Value>(GroupId::META, &key);
        let Some((site, _)) = site else { return };
        let leaves = site.pointer("/metadata/deletionTimestamp").is_some();
        let cordoned = site["spec"]["cordoned"] == true;
        let reluctant = cordoned || leaves;
        if reluctant != self.reluctant {
            self.reluctant = reluctant;
            info!(
                cordoned,
                leaves, "a site that is cordoned or leaves leads nothing that another one can lead"
            );
            self.federation.catalog.host.set_reluctant(reluctant).await;
        }
    }

    /// Asks another member for the members while the catalog here does not tell them, and whether this
    /// node is one while no majority of them speaks with it.
    async fn catch_up(&mut self) {
        self.turn += 1;
        if self.federation.network.opinions().is_isolated() {
            let own = self.federation.own;
            let members = self.membership.members.iter();
            let others: Vec<&Member> = members.filter(|member| member.node != own).collect();
            if let Some(asked) = others.get(self.turn % others.len().max(1)) {
                let network = &self.federation.network;
                // The federation knows that it wants to leave, so one is enough that says it has.
                let count = match self.federation.is_leaving() {
                    true => 1,
                    false => others.len(),
                };
                let left = self.standing.ask(network, asked, count).await;
                if left.is_some() {
                    self.left.send_replace(left);
                    return;
                }
            }
        } else {
            self.standing.clear();
        }
        if !self.has_meta() {
            let told = self.ask_members().await;
            self.take(told).await;
        }
    }

    /// Whether the members come from the catalog: its replica here has a leader and knows all that we
    /// were told of.
    fn has_meta(&self) -> bool {
        let catalog = &self.federation.catalog;
        let status = catalog.host.status();
        let led = status
            .borrow()
            .get(&GroupId::META)
            .is_some_and(|group| group.leader.is_some());
        let members = catalog.members();
        let known = |member: &Member| members.iter().any(|told| told.node == member.node);
        led && self.membership.members.iter().all(known)
    }

    /// Members that another one knows, and this one does not. A node that was away, or joined just before others did, may
    /// know nobody of those who keep the catalog now; then they do not reach it either, for it lets
    /// members only speak.
    async fn ask_members(&self) -> Vec<Member> {
        let network = &self.federation.network;
        let connected: Vec<NodeId> = network.connected().borrow().iter().copied().collect();
        let Some(asked) = connected.get(self.turn % connected.len().max(1)) else {
            return Vec::new();
        };
        match crate::net::ask(network, *asked, &Request::Members).await {
            Ok(Reply::Members(mut told)) => {
                let known = &self.membership.members;
                told.retain(|told| known.iter().all(|known| known.node != told.node));
                told
            }
            Ok(_) => Vec::new(),
            Err(error) => {
                debug!(%asked, error, "the members could not be asked for");
                Vec::new()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use krake_model::{SiteRecord, Timestamp};

    use super::*;

    fn member(number: u8) -> Member {
        Member {
            node: NodeId::from_bytes([number; 32]),
            replica: u64::from(number),
            site: SiteRecord::default(),
            addresses: Vec::new(),
            joined_at: Timestamp::from_millis(0),
        }
    }

    fn left(number: u8) -> BTreeMap<NodeId, Departure> {
        let departure = Departure {
            site: "oslo".to_owned(),
            left_at: Timestamp::from_millis(1),
            forced: false,
        };
        BTreeMap::from([(member(number).node, departure)])
    }

    #[test]
    fn who_left_is_a_member_no_more_whoever_says_so_and_who_is_not_told_of_is_one() {
        let known = [member(1), member(2), member(3)];
        assert_eq!(merged(&known, vec![member(1)], &BTreeMap::new()), known);
        let told = vec![member(1), member(3), member(4)];
        let members = merged(&known, told, &left(3));
        assert_eq!(members, [member(1), member(2), member(4)]);
    }

    #[test]
    fn who_gave_its_votes_away_gets_none_back_when_it_is_let_go() {
        // The list of the members is a moment older than what the catalog says.
        let members = [member(1), member(2), member(3)];
        let voters = |giving: &[u8], departures| {
            let giving = giving.iter().map(|number| member(*number).node).collect();
            let seen = Seen {
                heard: members.iter().map(|member| member.node).collect(),
                ..Seen::default()
            };
            let infos = infos(&members, &giving, &departures, &seen, |_| true);
            let infos = infos.into_iter().map(|info| (info.replica, info)).collect();
            krake_consensus::desired_voters(GroupId::META, &infos, &BTreeSet::from([2]))
        };
        assert_eq!(voters(&[], BTreeMap::new()).len(), 3);
        assert_eq!(voters(&[3], BTreeMap::new()), BTreeSet::from([2]));
        assert_eq!(voters(&[], left(3)), BTreeSet::from([2]));
    }

    #[test]
    fn one_that_is_silent_for_a_moment_begins_anew_to_be_steady() {
        let mut presence = Presence::default();
        let (node, start) = (member(1).node, Instant::now());
        let (there, away) = (BTreeSet::from([node]), BTreeSet::new());
        presence.note(&there, start);
        presence.note(&there, start + STEADY);
        assert!(!presence.is_steady(&node, start + STEADY / 2));
        assert!(presence.is_steady(&node, start + STEADY));
        presence.note(&away, start + STEADY);
        presence.note(&there, start + STEADY);
        assert!(!presence.is_steady(&node, start + STEADY));
        assert!(presence.is_steady(&node, start + STEADY * 2));
    }
}
