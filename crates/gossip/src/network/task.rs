//! The task that owns the swarm.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures::StreamExt;
use krake_model::codec;
use krake_model::report::{REPORT_BYTES_MAX, SignedReport};
use libp2p::core::Multiaddr;
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{PeerId, Swarm, gossipsub};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, info};

use super::connections::Made;
use super::exchange::EXCHANGE_VERSION;
use super::peer_id;
use super::pinger::Pinger;
use super::shared::{Heard, Shared};
use super::swarm::topic;
use super::transports::Dials;
use crate::behaviour::{Behaviour, BehaviourEvent, InnerEvent};

/// How often connections, silence and missed reports are looked after.
const CARE_INTERVAL: Duration = Duration::from_millis(500);
/// How often reports are exchanged with one member, for what gossip missed.
const EXCHANGE_INTERVAL: Duration = Duration::from_secs(10);
/// When the care task was away for longer, this node was paused, and what it did not hear says
/// nothing about others.
const PAUSE_DETECTED: Duration = Duration::from_secs(2);

pub(super) enum Command {
    /// The members are others than before.
    Members,
    Publish(Vec<u8>),
    /// A connection to this peer is wanted; the answer comes when it is there, or says why not.
    Connect(PeerId, Vec<String>, oneshot::Sender<Result<(), String>>),
    Block(BTreeSet<PeerId>),
    Listening(oneshot::Sender<Vec<Multiaddr>>),
}

pub(super) struct SwarmTask {
    pub(super) swarm: Swarm<Behaviour>,
    pub(super) shared: Weak<Shared>,
    commands: mpsc::Receiver<Command>,
    pub(super) exchange: mpsc::Sender<PeerId>,
    /// When each connection was made, and whether as a member's.
    pub(super) connections: BTreeMap<ConnectionId, Made>,
    /// Since when a member without a connection is wanted.
    pub(super) wanted_since: BTreeMap<PeerId, Instant>,
    pub(super) dials: Dials,
    /// Who waits for a connection to a peer.
    pub(super) awaited: BTreeMap<PeerId, Vec<oneshot::Sender<Result<(), String>>>>,
    last_care: Instant,
    last_exchange: Instant,
    turn: usize,
    pub(super) pinger: Pinger,
    pub(super) unanswered: mpsc::Sender<PeerId>,
    /// Peers that did not answer a ping.
    silent: mpsc::Receiver<PeerId>,
}

impl SwarmTask {
    pub(super) fn new(
        swarm: Swarm<Behaviour>,
        shared: Weak<Shared>,
        commands: mpsc::Receiver<Command>,
        exchange: mpsc::Sender<PeerId>,
        pinger: Pinger,
    ) -> Self {
        let (unanswered, silent) = mpsc::channel(64);
        Self {
            swarm,
            shared,
            commands,
            exchange,
            connections: BTreeMap::new(),
            wanted_since: BTreeMap::new(),
            dials: Dials::default(),
            awaited: BTreeMap::new(),
            last_care: Instant::now(),
            last_exchange: Instant::now(),
            turn: 0,
            pinger,
            unanswered,
            silent,
        }
    }

    pub(super) async fn run(mut self) {
        let mut care = tokio::time::interval(CARE_INTERVAL);
        care.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                command = self.commands.recv() => match command {
                    Some(command) => self.on_command(command),
                    None => return,
                },
                Some(peer) = self.silent.recv() => {
                    self.close_unanswered(peer);
                }
                _ = care.tick() => {
                    let Some(shared) = self.shared.upgrade() else { return };
                    self.care(&shared);
                }
            }
        }
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Members => {
                if let Some(shared) = self.shared.upgrade() {
                    self.wanted_since.retain(|peer, _| shared.is_member(peer));
                    self.dials.retain(|peer| shared.is_member(peer));
                }
                self.close_wrong();
                self.dial_members();
            }
            Command::Publish(bytes) => {
                let Some(shared) = self.shared.upgrade() else {
                    return;
                };
                let topic = topic(&shared.federation);
                let gossipsub = &mut self.swarm.behaviour_mut().members.inner.gossipsub;
                match gossipsub.publish(topic, bytes) {
                    Ok(_) | Err(gossipsub::PublishError::NoPeersSubscribedToTopic) => {}
                    Err(error) => debug!(%error, "a report was not gossiped"),
                }
            }
            Command::Connect(peer, addresses, reply) => self.connect(peer, &addresses, reply),
            Command::Block(peers) => {
                let blocked = &mut self.swarm.behaviour_mut().blocked;
                let old: Vec<PeerId> = blocked.blocked_peers().iter().copied().collect();
                for peer in old {
                    if !peers.contains(&peer) {
                        blocked.unblock_peer(peer);
                    }
                }
                for peer in peers {
                    blocked.block_peer(peer);
                }
            }
            Command::Listening(reply) => {
                let _ = reply.send(self.swarm.listeners().cloned().collect());
            }
        }
    }

    fn care(&mut self, shared: &Arc<Shared>) {
        let now = Instant::now();
        if now.duration_since(self.last_care) > PAUSE_DETECTED {
            info!(
                seconds = now.duration_since(self.last_care).as_secs(),
                "this node was paused; silence is counted anew"
            );
            for heard in shared.heard.write().values_mut() {
                *heard = Heard::now();
            }
        }
        self.last_care = now;
        self.dial_members();
        self.close_wrong();
        self.pinger.look(shared, &self.unanswered, now);
        if now.duration_since(self.last_exchange) >= EXCHANGE_INTERVAL {
            self.last_exchange = now;
            let connected: Vec<PeerId> = shared
                .connected
                .borrow()
                .iter()
                .filter_map(|node| peer_id(*node))
                .collect();
            if !connected.is_empty() {
                self.turn = (self.turn + 1) % connected.len();
                let _ = self.exchange.try_send(connected[self.turn]);
            }
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::ConnectionEstablished {
                peer_id,
                connection_id,
                endpoint,
                ..
            } => self.on_established(peer_id, connection_id, &endpoint),
            SwarmEvent::ConnectionClosed {
                peer_id,
                connection_id,
                ..
            } => self.on_closed(peer_id, connection_id),
            SwarmEvent::Behaviour(BehaviourEvent::Members(InnerEvent::Gossipsub(
                gossipsub::Event::Message {
                    propagation_source,
                    message_id,
                    message,
                },
            ))) => self.on_message(&propagation_source, &message_id, &message.data),
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                debug!(?peer_id, %error, "a dial failed");
                if let Some(peer) = peer_id {
                    self.dials.failed(peer, &error);
                    self.tell_awaiting(&peer, &Err(error.to_string()));
                }
            }
            _ => {}
        }
    }

    fn on_message(&mut self, source: &PeerId, id: &gossipsub::MessageId, data: &[u8]) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let acceptance =
            match codec::decode::<SignedReport>(EXCHANGE_VERSION, data, REPORT_BYTES_MAX + 1024) {
                Ok(report) => {
                    if shared.take_report(report) {
                        shared.traffic.reports.fetch_add(1, Ordering::Relaxed);
                        gossipsub::MessageAcceptance::Accept
                    } else {
                        gossipsub::MessageAcceptance::Ignore
                    }
                }
                Err(error) => {
                    debug!(%source, %error, "a gossiped report is not readable");
                    gossipsub::MessageAcceptance::Reject
                }
            };
        self.swarm
            .behaviour_mut()
            .members
            .inner
            .gossipsub
            .report_message_validation_result(id, source, acceptance);
    }
}
