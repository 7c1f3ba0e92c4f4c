//! The handle others use, and the tasks behind it.

mod abrupt;
mod connections;
mod direct;
mod exchange;
mod frames;
mod joins;
mod pinger;
pub(crate) mod shared;
mod swarm;
mod task;
mod transports;
mod upgrade;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use krake_model::codec;
use krake_model::ids::{FederationId, NodeId};
use krake_model::report::SignedReport;
use libp2p::multiaddr::Protocol;
use libp2p::{PeerId, identity};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot, watch};
use tracing::warn;

use self::exchange::EXCHANGE_VERSION;
use self::frames::Outbox;
use self::pinger::Pinger;
use self::shared::{Heard, Shared};
use self::task::{Command, SwarmTask};
use self::upgrade::{Dialler, Upgrade};
use crate::behaviour::MemberSet;
use crate::calls::{self, Fault, Lines};
use crate::streams::{self, CallError};
use crate::verdict::{self, Opinions};
use crate::view::View;

/// What the network needs to start.
pub struct NetworkConfig {
    /// The node's Ed25519 secret key; it is wiped after use.
    pub secret_key: [u8; 32],
    /// Separates federations: reports of another one are not read.
    pub federation: FederationId,
    /// Addresses to listen at, QUIC and TCP on the same number each; may be empty.
    pub listen: Vec<SocketAddr>,
    /// Connections at most, in all.
    pub connections_max: u32,
}

/// The network could not start.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// An address cannot be listened at.
    #[error(
        "cannot listen at {address} for other nodes (peers.listen): {reason}; stop what uses it, or set another address"
    )]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        reason: String,
    },
    /// Something inside failed.
    #[error("the network cannot start: {0}")]
    Start(String),
}

/// A member to be connected with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Who.
    pub node: NodeId,
    /// `IP:PORT` or `HOST:PORT` where it listens, QUIC and TCP.
    pub addresses: Vec<String>,
}

/// Who takes what the network brings.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// A consensus frame from a member. Must not block.
    fn frame(&self, from: NodeId, bytes: &[u8]);
    /// A question from a member.
    ///
    /// # Errors
    /// A text for the asker.
    async fn call(&self, from: NodeId, bytes: &[u8]) -> Result<Vec<u8>, String>;
    /// A request to join from somebody who need not be a member.
    ///
    /// # Errors
    /// A text for the asker.
    async fn join(&self, from: NodeId, bytes: &[u8]) -> Result<Vec<u8>, String>;
}

/// What arrived from other members since the start.
#[derive(Debug, Default)]
pub struct Traffic {
    /// Consensus frames.
    pub frames: AtomicU64,
    /// Questions, pings among them.
    pub questions: AtomicU64,
    /// Reports over gossip that were new here.
    pub reports: AtomicU64,
    /// Connections made, by either side.
    pub connections: AtomicU64,
    /// Those of them over QUIC; the others are over TCP.
    pub quic_connections: AtomicU64,
    /// Connections beside those, made by either side for frames alone.
    pub direct_connections: AtomicU64,
}

/// The handle; cheap to clone.
#[derive(Clone)]
pub struct Network {
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    streams: libp2p_stream::Control,
    join: libp2p_stream::Control,
    runtime: tokio::runtime::Handle,
    lines: Arc<Lines>,
    dialler: Arc<Dialler>,
}

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Network")
            .field("own", &self.shared.own)
            .finish_non_exhaustive()
    }
}

fn peer_id(node: NodeId) -> Option<PeerId> {
    PeerId::from_bytes(&node.to_peer_id_bytes()).ok()
}

fn node_id(peer: &PeerId) -> Option<NodeId> {
    NodeId::from_peer_id_bytes(&peer.to_bytes())
}

impl Network {
    /// Binds the addresses and starts the tasks. They end when the last handle is dropped.
    ///
    /// # Errors
    /// [`NetworkError::Listen`] when an address is taken or not there.
    pub async fn start(
        config: NetworkConfig,
        handler: Arc<dyn Handler>,
    ) -> Result<Self, NetworkError> {
        let members = MemberSet::default();
        let start = |reason: String| NetworkError::Start(reason);
        let mut secret = config.secret_key;
        let key = identity::Keypair::ed25519_from_bytes(&mut secret)
            .map_err(|error| start(error.to_string()))?;
        let dialler = Dialler::new(&key).map_err(start)?;
        let (upgrade, accepted) = Upgrade::new(&key).map_err(start)?;
        let mut swarm = swarm::build_swarm(&config, key, &members, upgrade)?;
        let own = node_id(swarm.local_peer_id())
            .ok_or_else(|| start("the key is not an Ed25519 key".to_owned()))?;
        swarm::listen(&mut swarm, &config.listen).await?;
        let mut streams = swarm.behaviour().members.inner.streams.new_control();
        let mut join = swarm.behaviour().join.new_control();
        let shared = Arc::new(Shared::new(own, config.federation, members));
        let (commands, receiver) = mpsc::channel(1024);
        let network = Self {
            shared: Arc::clone(&shared),
            commands,
            streams: streams.clone(),
            join: join.clone(),
            runtime: tokio::runtime::Handle::current(),
            lines: Arc::default(),
            dialler: Arc::new(dialler),
        };
        let registered = |_| start("a protocol is registered twice".to_owned());
        let frames = streams.accept(streams::FRAMES).map_err(registered)?;
        let calls_incoming = streams.accept(streams::CALLS).map_err(registered)?;
        let reports = streams.accept(streams::REPORTS).map_err(registered)?;
        let joins = join.accept(streams::JOIN).map_err(registered)?;
        tokio::spawn(frames::take_frames(
            frames,
            Arc::clone(&shared),
            Arc::clone(&handler),
        ));
        tokio::spawn(direct::take(
            accepted,
            Arc::downgrade(&shared),
            Arc::clone(&handler),
        ));
        tokio::spawn(calls::take_calls(
            calls_incoming,
            Arc::clone(&shared),
            Arc::clone(&handler),
        ));
        tokio::spawn(exchange::take_reports(reports, Arc::clone(&shared)));
        tokio::spawn(joins::take_joins(joins, Arc::clone(&shared), handler));
        let (exchange, wanted) = mpsc::channel(64);
        let pinger = Pinger::new(Arc::clone(&network.lines), streams.clone());
        let shared = Arc::downgrade(&shared);
        tokio::spawn(exchange::exchange_reports(
            wanted,
            Weak::clone(&shared),
            streams,
        ));
        tokio::spawn(SwarmTask::new(swarm, shared, receiver, exchange, pinger).run());
        Ok(network)
    }

    /// This node's id.
    pub fn own(&self) -> NodeId {
        self.shared.own
    }

    /// Tells who the members are; others lose their connections, members are dialled.
    pub async fn set_members(&self, peers: Vec<Peer>) {
        {
            let ids: BTreeSet<NodeId> = peers.iter().map(|peer| peer.node).collect();
            *self.shared.members.write() = ids.iter().filter_map(|id| peer_id(*id)).collect();
            let mut heard = self.shared.heard.write();
            heard.retain(|id, _| ids.contains(id));
            for id in &ids {
                heard.entry(*id).or_insert_with(Heard::now);
            }
            drop(heard);
            self.shared.outboxes.lock().retain(|id, _| ids.contains(id));
            self.shared.rtts.write().retain(|id, _| ids.contains(id));
            self.lines.retain(|id| ids.contains(id));
            self.shared
                .view
                .send_modify(|view| view.retain(|id, _| ids.contains(id)));
            *self.shared.peers.write() = peers;
        }
        let _ = self.commands.send(Command::Members).await;
    }

    /// Sends a frame to a member without waiting, behind those before it but for the moment at which
    /// a better way is found. `false`: it is not connected or too far behind, and the frame is
    /// dropped.
    pub fn send_frame(&self, to: NodeId, frame: Vec<u8>) -> bool {
        let Some(peer) = peer_id(to) else {
            return false;
        };
        let outbox = {
            let mut outboxes = self.shared.outboxes.lock();
            // Whoever finds that it is gone takes it out of the one, then out of the other.
            if !self.shared.connected.borrow().contains(&to) {
                return false;
            }
            let outbox = outboxes.entry(to).or_insert_with(|| {
                Arc::new(Outbox::new(
                    &self.runtime,
                    (to, peer),
                    self.streams.clone(),
                    Arc::downgrade(&self.shared),
                    Arc::clone(&self.dialler),
                ))
            });
            Arc::clone(outbox)
        };
        outbox.push(frame)
    }

    /// Asks a member and waits for its answer. A question whose stream breaks is asked once more:
    /// it has to be one that may be heard twice.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(
        &self,
        to: NodeId,
        question: &[u8],
        timeout: Duration,
    ) -> Result<Vec<u8>, CallError> {
        let peer = self.reachable(to)?;
        let ask = || {
            let (runtime, control) = (&self.runtime, &self.streams);
            self.lines
                .ask(runtime, control, (to, peer), question.to_vec())
        };
        let work = async {
            match ask().await {
                Err(Fault::Broken(_)) => ask().await,
                answer => answer,
            }
        };
        let fault = match tokio::time::timeout(timeout, work).await {
            Ok(Ok(answer)) => {
                self.shared.heard(to);
                return Ok(answer);
            }
            Ok(Err(fault)) => Some(fault),
            Err(_) => None,
        };
        let peer = peer.to_string();
        Err(match fault {
            Some(Fault::Broken(reason)) => CallError::Unreachable { peer, reason },
            Some(Fault::Refused(reason)) => CallError::Refused { peer, reason },
            None => CallError::Timeout { peer, timeout },
        })
    }

    fn reachable(&self, to: NodeId) -> Result<PeerId, CallError> {
        peer_id(to)
            .filter(|_| self.shared.connected.borrow().contains(&to))
            .ok_or_else(|| CallError::Unreachable {
                peer: to.to_string(),
                reason: "there is no connection".to_owned(),
            })
    }

    /// Dials a member of a federation we do not belong to yet and asks it to let us join.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn join(
        &self,
        to: NodeId,
        addresses: &[String],
        request: &[u8],
        timeout: Duration,
    ) -> Result<Vec<u8>, CallError> {
        let Some(peer) = peer_id(to) else {
            return Err(CallError::Unreachable {
                peer: to.to_string(),
                reason: "its id is no Ed25519 key".to_owned(),
            });
        };
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let result = match self.connect(peer, addresses, left).await {
                Ok(()) => {
                    let mut control = self.join.clone();
                    let left = deadline.saturating_duration_since(tokio::time::Instant::now());
                    streams::ask(&mut control, peer, streams::JOIN, request, left).await
                }
                Err(error) => Err(error),
            };
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            match result {
                // A dial may fail because the other node is busy.
                Err(CallError::Unreachable { .. }) if left > Duration::from_millis(300) => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                other => return other,
            }
        }
    }

    /// Waits until there is a connection: a stream that is asked for while one is being made may be
    /// forgotten (`libp2p-stream` notes it for new streams a moment before it notes that it is
    /// there; who asks in between waits for a dial that is not made).
    async fn connect(
        &self,
        peer: PeerId,
        addresses: &[String],
        timeout: Duration,
    ) -> Result<(), CallError> {
        let (reply, connected) = oneshot::channel();
        let command = Command::Connect(peer, addresses.to_vec(), reply);
        let _ = self.commands.send(command).await;
        let unreachable = |reason: String| CallError::Unreachable {
            peer: peer.to_string(),
            reason,
        };
        match tokio::time::timeout(timeout, connected).await {
            Ok(Ok(result)) => result.map_err(unreachable),
            Ok(Err(_)) => Err(unreachable("the network is ending".to_owned())),
            Err(_) => Err(CallError::Timeout {
                peer: peer.to_string(),
                timeout,
            }),
        }
    }

    /// Puts this node's newest report into the view and gossips it.
    pub async fn publish(&self, report: SignedReport) {
        let Ok(bytes) = codec::encode(EXCHANGE_VERSION, &report) else {
            warn!("a report could not be encoded");
            return;
        };
        self.shared.take_report(report);
        let _ = self.commands.send(Command::Publish(bytes)).await;
    }

    /// The newest report of each member; changes wake the receiver.
    pub fn view(&self) -> watch::Receiver<View> {
        self.shared.view.subscribe()
    }

    /// Members with a connection now; changes wake the receiver.
    pub fn connected(&self) -> watch::Receiver<BTreeSet<NodeId>> {
        self.shared.connected.subscribe()
    }

    /// Smoothed round-trip time to each member that was measured.
    pub fn rtts(&self) -> BTreeMap<NodeId, Duration> {
        self.shared.rtts.read().clone()
    }

    /// What this node hears and what others say they hear.
    pub fn opinions(&self) -> Opinions {
        self.shared.opinions(Instant::now())
    }

    /// Members this node has not heard for [`crate::suspect_after`], with their silence: its
    /// opinion for its report.
    pub fn unheard(&self) -> BTreeMap<NodeId, Duration> {
        let silence = self.shared.silence(Instant::now());
        verdict::unheard(silence, self.member_count())
    }

    /// What arrived since the start.
    pub fn traffic(&self) -> &Traffic {
        &self.shared.traffic
    }

    /// How many members there are.
    pub fn member_count(&self) -> usize {
        self.shared.members.read().len()
    }

    /// Cuts the connections with `nodes` and refuses new ones, until called without them. For
    /// testnets: a partition.
    pub async fn block(&self, nodes: &BTreeSet<NodeId>) {
        let peers = nodes.iter().filter_map(|node| peer_id(*node)).collect();
        let _ = self.commands.send(Command::Block(peers)).await;
    }

    /// Addresses this node listens at, as `IP:PORT`.
    pub async fn listening(&self) -> Vec<SocketAddr> {
        let (reply, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Listening(reply)).await;
        let addresses = answer.await.unwrap_or_default();
        addresses
            .iter()
            .filter_map(|address| {
                let mut parts = address.iter();
                let ip = match parts.next()? {
                    Protocol::Ip4(ip) => ip.into(),
                    Protocol::Ip6(ip) => ip.into(),
                    _ => return None,
                };
                match parts.next()? {
                    Protocol::Tcp(port) => Some(SocketAddr::new(ip, port)),
                    _ => None,
                }
            })
            .collect()
    }
}
