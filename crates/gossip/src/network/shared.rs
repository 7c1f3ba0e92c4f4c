//! What the handle, the tasks and the streams know together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use krake_model::ids::{FederationId, NodeId};
use krake_model::report::SignedReport;
use libp2p::PeerId;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, watch};
use tracing::debug;

use super::frames::Outbox;
use super::{Peer, Traffic, node_id, peer_id};
use crate::behaviour::MemberSet;
use crate::verdict::Opinions;
use crate::view::{self, View};

/// Questions answered at once at most; more wait in their streams.
const CALLS_AT_ONCE: usize = 512;
/// A peer that is no member may stay this long: long enough to join.
pub(super) const OUTSIDER_TIME: Duration = Duration::from_secs(30);
/// A connection that somebody asked to join on is kept this long after it was admitted: the answer
/// may still be on the way.
const JOIN_ANSWER_TIME: Duration = Duration::from_secs(1);

pub(crate) struct Shared {
    pub(super) own: NodeId,
    pub(super) federation: FederationId,
    pub(super) members: MemberSet,
    pub(super) peers: RwLock<Vec<Peer>>,
    pub(super) view: watch::Sender<View>,
    pub(super) heard: RwLock<BTreeMap<NodeId, Heard>>,
    pub(super) rtts: RwLock<BTreeMap<NodeId, Duration>>,
    pub(super) connected: watch::Sender<BTreeSet<NodeId>>,
    pub(super) outboxes: Mutex<BTreeMap<NodeId, Arc<Outbox>>>,
    /// Who asked to join within [`OUTSIDER_TIME`], and when last.
    joining: Mutex<BTreeMap<PeerId, Instant>>,
    pub(crate) calls: Arc<Semaphore>,
    pub(crate) traffic: Traffic,
}

/// When a member was heard last.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heard {
    pub(super) last: Instant,
    /// Over a connection of the swarm.
    pub(super) over_swarm: Instant,
}

impl Heard {
    pub(super) fn now() -> Self {
        let now = Instant::now();
        Self {
            last: now,
            over_swarm: now,
        }
    }
}

impl Shared {
    pub(super) fn new(own: NodeId, federation: FederationId, members: MemberSet) -> Self {
        Self {
            own,
            federation,
            members,
            peers: RwLock::default(),
            view: watch::channel(View::new()).0,
            heard: RwLock::default(),
            rtts: RwLock::default(),
            connected: watch::channel(BTreeSet::new()).0,
            outboxes: Mutex::default(),
            joining: Mutex::default(),
            calls: Arc::new(Semaphore::new(CALLS_AT_ONCE)),
            traffic: Traffic::default(),
        }
    }

    /// The node behind a peer that is a member.
    pub(crate) fn member(&self, peer: &PeerId) -> Option<NodeId> {
        node_id(peer).filter(|_| self.is_member(peer))
    }

    pub(crate) fn heard(&self, node: NodeId) {
        if let Some(heard) = self.heard.write().get_mut(&node) {
            *heard = Heard::now();
        }
    }

    /// It is alive; that says nothing of the swarm's connection with it.
    pub(super) fn heard_directly(&self, node: NodeId) {
        if let Some(heard) = self.heard.write().get_mut(&node) {
            heard.last = Instant::now();
        }
    }

    pub(super) fn count_direct(&self) {
        self.traffic
            .direct_connections
            .fetch_add(1, Ordering::Relaxed);
    }

    /// A ping was answered after `rtt`.
    pub(super) fn measured(&self, node: NodeId, rtt: Duration) {
        self.heard(node);
        let mut rtts = self.rtts.write();
        // Smoothed as in RFC 6298 §2.
        rtts.entry(node)
            .and_modify(|old| *old = (*old * 7 + rtt) / 8)
            .or_insert(rtt);
    }

    pub(super) fn asks_to_join(&self, peer: PeerId) {
        let mut joining = self.joining.lock();
        joining.retain(|_, at| at.elapsed() < OUTSIDER_TIME);
        joining.insert(peer, Instant::now());
    }

    pub(super) fn is_joining(&self, peer: &PeerId) -> bool {
        let joining = self.joining.lock();
        joining
            .get(peer)
            .is_some_and(|at| at.elapsed() < JOIN_ANSWER_TIME)
    }

    pub(super) fn is_member(&self, peer: &PeerId) -> bool {
        self.members.read().contains(peer)
    }

    /// `true`: it was news.
    pub(super) fn take_report(&self, signed: SignedReport) -> bool {
        let report = match signed.open(&self.federation) {
            Ok(report) => report,
            Err(error) => {
                debug!(%error, "a report was refused");
                return false;
            }
        };
        let node = report.node;
        if node != self.own && !peer_id(node).is_some_and(|peer| self.is_member(&peer)) {
            return false;
        }
        let now = Instant::now();
        let taken = self
            .view
            .send_if_modified(|view| view::insert(view, signed, report, now));
        if taken {
            self.heard(node);
        }
        taken
    }

    /// How long each other member has been silent.
    pub(super) fn silence(&self, now: Instant) -> BTreeMap<NodeId, Duration> {
        let heard = self.heard.read();
        heard
            .iter()
            .filter(|(node, _)| **node != self.own)
            .map(|(node, heard)| (*node, now.saturating_duration_since(heard.last)))
            .collect()
    }

    pub(super) fn opinions(&self, now: Instant) -> Opinions {
        let members = self.heard.read().keys().copied().collect::<Vec<_>>();
        let view = self.view.borrow();
        Opinions {
            own: Some(self.own),
            members: members.into_iter().chain([self.own]).collect(),
            silence: self.silence(now),
            reported: view
                .iter()
                .filter(|(node, _)| **node != self.own)
                .map(|(node, seen)| (*node, seen.report.unreachable.keys().copied().collect()))
                .collect(),
        }
    }
}
