//! Which connections there are, who dials, and which of them are closed.

use std::num::NonZeroU8;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use krake_model::ids::NodeId;
use libp2p::PeerId;
use libp2p::core::ConnectedPoint;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, DialError};
use tokio::sync::oneshot;
use tracing::debug;

use super::shared::{OUTSIDER_TIME, Shared};
use super::task::SwarmTask;
use super::transports::Links;
use super::{node_id, peer_id};
use crate::pace;

/// The side with the larger id waits this long before it dials too, so that two nodes seldom end
/// up with two connections.
const SECOND_DIALLER_WAIT: Duration = Duration::from_secs(3);
/// A dial does not take longer, even on a busy machine (a hundred nodes of one came up with 15 s and
/// not with 6): two nodes that dial each other at once have two connections that
/// are made within this time.
const DIAL_TIME: Duration = Duration::from_secs(15);
/// One dial that tries several addresses may for a moment be seen here as several connections.
const RACE_TIME: Duration = Duration::from_secs(2);
/// Where the peer has made another connection, one on which a ping is not answered for this long is
/// closed.
const DOUBT_TIME: Duration = Duration::from_millis(1500);

/// A connection that is there.
pub(super) struct Made {
    peer: PeerId,
    at: Instant,
    /// It was made to a member, as one.
    member: bool,
    /// The other side dialled.
    incoming: bool,
}

impl SwarmTask {
    pub(super) fn dial(&mut self, peer: PeerId, addresses: &[String], links: &Links) {
        let dial = self.dials.dial(&peer, addresses, links);
        let members = self
            .shared
            .upgrade()
            .map_or(1, |shared| shared.members.read().len());
        let at_once = if dial.in_order {
            NonZeroU8::MIN
        } else {
            pace::addresses_at_once(members)
        };
        let options = DialOpts::peer_id(peer)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(dial.addresses)
            .override_dial_concurrency_factor(at_once)
            .build();
        match self.swarm.dial(options) {
            // Somebody dials already, or it is connected.
            Ok(()) | Err(DialError::DialPeerConditionFalse(_)) => {}
            Err(error) => {
                debug!(%peer, %error, "not dialled");
                self.tell_awaiting(&peer, &Err(error.to_string()));
            }
        }
    }

    /// Dials a peer for somebody who waits for the connection.
    pub(super) fn connect(
        &mut self,
        peer: PeerId,
        addresses: &[String],
        reply: oneshot::Sender<Result<(), String>>,
    ) {
        let waiting = self.awaited.entry(peer).or_default();
        waiting.retain(|reply| !reply.is_closed());
        waiting.push(reply);
        if self.swarm.is_connected(&peer) {
            self.tell_awaiting(&peer, &Ok(()));
        } else {
            self.dial(peer, addresses, &Links::read());
        }
    }

    pub(super) fn tell_awaiting(&mut self, peer: &PeerId, result: &Result<(), String>) {
        for reply in self.awaited.remove(peer).into_iter().flatten() {
            let _ = reply.send(result.clone());
        }
    }

    fn dial_again(&mut self, shared: &Shared, node: NodeId, peer: PeerId) {
        let addresses = {
            let peers = shared.peers.read();
            let known = peers.iter().find(|known| known.node == node);
            known.map(|known| known.addresses.clone())
        };
        if let Some(addresses) = addresses {
            self.dial(peer, &addresses, &Links::read());
        }
    }

    pub(super) fn dial_members(&mut self) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let peers = shared.peers.read().clone();
        let now = Instant::now();
        let mut links = None;
        for known in peers {
            let Some(peer) = peer_id(known.node).filter(|_| known.node != shared.own) else {
                continue;
            };
            if self.swarm.is_connected(&peer) {
                self.wanted_since.remove(&peer);
                continue;
            }
            let since = *self.wanted_since.entry(peer).or_insert(now);
            let mine = shared.own < known.node;
            if mine || now.duration_since(since) >= SECOND_DIALLER_WAIT {
                let links = links.get_or_insert_with(Links::read);
                self.dial(peer, &known.addresses, links);
            }
        }
    }

    pub(super) fn on_established(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        endpoint: &ConnectedPoint,
    ) {
        let incoming = endpoint.is_listener();
        let mut way = endpoint.get_remote_address().iter();
        let over_quic = way.any(|part| part == Protocol::QuicV1);
        if incoming {
            self.close_older(peer);
        }
        if let Some(shared) = self.shared.upgrade() {
            shared.traffic.connections.fetch_add(1, Ordering::Relaxed);
            if over_quic {
                shared
                    .traffic
                    .quic_connections
                    .fetch_add(1, Ordering::Relaxed);
            }
        }
        let member = self.swarm.behaviour().members.is_admitted(connection);
        let made = Made {
            peer,
            at: Instant::now(),
            member,
            incoming,
        };
        self.connections.insert(connection, made);
        self.wanted_since.remove(&peer);
        self.dials.connected(&peer, over_quic);
        self.tell_awaiting(&peer, &Ok(()));
        if member {
            self.on_connected(peer);
        }
    }

    pub(super) fn on_closed(&mut self, peer: PeerId, connection: ConnectionId) {
        let was_member = self
            .connections
            .remove(&connection)
            .is_none_or(|made| made.member);
        let left = self
            .connections
            .values()
            .any(|made| made.member && made.peer == peer);
        if let (false, Some(shared), Some(node)) = (left, self.shared.upgrade(), node_id(&peer)) {
            shared.connected.send_if_modified(|set| set.remove(&node));
            shared.outboxes.lock().remove(&node);
            if !was_member && shared.is_member(&peer) {
                // Whoever saw that the connection was of no use makes the next one.
                self.dial_again(&shared, node, peer);
            }
        }
    }

    fn on_connected(&mut self, peer: PeerId) {
        let (Some(shared), Some(node)) = (self.shared.upgrade(), node_id(&peer)) else {
            return;
        };
        // A connection alone is no sign of life: the other side may refuse it right away.
        let news = shared.connected.send_if_modified(|set| set.insert(node));
        if news {
            debug!(%node, "connected");
            let _ = self.exchange.try_send(peer);
        }
    }

    /// A peer dials when it has no connection: those that it made before are lost to it. One that
    /// was made from here may be of the same moment, when both dialled; if it is old, the peer was
    /// restarted. If it is neither, a ping over it tells; the two sides wait differently long, for
    /// each could close the one that the other one kept.
    fn close_older(&mut self, peer: PeerId) {
        let older = self.connections.iter().filter(|(_, made)| {
            let limit = if made.incoming { RACE_TIME } else { DIAL_TIME };
            made.peer == peer && made.at.elapsed() > limit
        });
        let older: Vec<ConnectionId> = older.map(|(connection, _)| *connection).collect();
        for connection in &older {
            self.swarm.close_connection(*connection);
        }
        let doubtful = self
            .connections
            .iter()
            .any(|(id, made)| made.peer == peer && made.member && !older.contains(id));
        let (Some(shared), Some(node)) = (self.shared.upgrade(), node_id(&peer)) else {
            return;
        };
        if doubtful {
            let patience = DOUBT_TIME * if shared.own < node { 1 } else { 2 };
            self.pinger
                .ping(&shared, &self.unanswered, (node, peer), patience);
        }
    }

    /// A ping goes over one of the peer's connections: a newer one than the others may be well.
    pub(super) fn close_unanswered(&mut self, peer: PeerId) {
        let own = self
            .connections
            .iter()
            .filter(|(_, made)| made.peer == peer);
        let mut own: Vec<(Instant, ConnectionId)> = own
            .map(|(connection, made)| (made.at, *connection))
            .collect();
        own.sort_unstable_by_key(|(at, _)| *at);
        let newest = own.pop();
        debug!(%peer, others = own.len(), "no answer to a ping; the connection is closed");
        if own.is_empty() {
            own.extend(newest);
        }
        for (_, connection) in own {
            self.swarm.close_connection(connection);
        }
    }

    /// Closes connections made before their peer was admitted, or after it left: they carry the
    /// wrong protocols. And those of outsiders that stay too long.
    pub(super) fn close_wrong(&mut self) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let wrong = self.connections.iter().filter(|(_, made)| {
            match (made.member, shared.is_member(&made.peer)) {
                (false, true) => !shared.is_joining(&made.peer),
                (false, false) => made.at.elapsed() > OUTSIDER_TIME,
                (true, is_member) => !is_member,
            }
        });
        let wrong: Vec<ConnectionId> = wrong.map(|(connection, _)| *connection).collect();
        for connection in wrong {
            self.swarm.close_connection(connection);
        }
    }
}
