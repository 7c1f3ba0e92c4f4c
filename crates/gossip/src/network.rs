//! The swarm's task and the handle others use.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::StreamExt;
use futures::io::BufReader;
use krake_model::codec;
use krake_model::ids::{FederationId, NodeId};
use krake_model::report::{REPORT_BYTES_MAX, SignedReport};
use libp2p::core::{Multiaddr, upgrade};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{
    PeerId, Stream, Swarm, SwarmBuilder, allow_block_list, connection_limits, gossipsub, identity,
    noise, tcp, yamux,
};
use parking_lot::{Mutex, RwLock};
use thiserror::Error;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::behaviour::{Behaviour, BehaviourEvent, Inner, InnerEvent, MemberSet, MembersOnly};
use crate::calls::{self, Fault, Lines};
use crate::pace;
use crate::streams::{self, CALL_BYTES_MAX, CallError, Gathered, JOIN_BYTES_MAX};
use crate::verdict::{self, Opinions};
use crate::view::{self, Digest, Missing, View};

/// Version of the messages of the report exchange.
const EXCHANGE_VERSION: u8 = 1;
/// Frames that wait for one peer at most; more are dropped, and Raft sends again.
const FRAME_QUEUE: usize = 256;
/// Questions answered at once at most; more wait in their streams.
const CALLS_AT_ONCE: usize = 512;
/// How often connections, silence and missed reports are looked after.
const CARE_INTERVAL: Duration = Duration::from_millis(500);
/// How often reports are exchanged with one member, for what gossip missed.
const EXCHANGE_INTERVAL: Duration = Duration::from_secs(10);
/// The side with the larger id waits this long before it dials too, so that two nodes seldom end
/// up with two connections.
const SECOND_DIALLER_WAIT: Duration = Duration::from_secs(3);
/// A peer that is no member may stay this long: long enough to join.
const OUTSIDER_TIME: Duration = Duration::from_secs(30);
/// A connection that somebody asked to join on is kept this long after it was admitted: the answer
/// may still be on the way.
const JOIN_ANSWER_TIME: Duration = Duration::from_secs(1);
/// A dial does not take longer, even on a busy machine (a hundred nodes of one came up with 15 s and
/// not with 6): two nodes that dial each other at once have two connections that
/// are made within this time.
const DIAL_TIME: Duration = Duration::from_secs(15);
/// One dial that tries several addresses may for a moment be seen here as several connections.
const RACE_TIME: Duration = Duration::from_secs(2);
/// As [`PING_TIME`], where the peer has made another connection.
const DOUBT_TIME: Duration = Duration::from_millis(1500);
/// A connection on which a ping is not answered for this long is closed.
const PING_TIME: Duration = Duration::from_secs(4);
/// When the care task was away for longer, this node was paused, and what it did not hear says
/// nothing about others.
const PAUSE_DETECTED: Duration = Duration::from_secs(2);

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

enum Command {
    /// The members are others than before.
    Members,
    Publish(Vec<u8>),
    Dial(PeerId, Vec<Multiaddr>),
    Block(BTreeSet<PeerId>),
    Listening(oneshot::Sender<Vec<Multiaddr>>),
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
}

pub(crate) struct Shared {
    own: NodeId,
    federation: FederationId,
    members: MemberSet,
    peers: RwLock<Vec<Peer>>,
    view: watch::Sender<View>,
    heard: RwLock<BTreeMap<NodeId, Instant>>,
    rtts: RwLock<BTreeMap<NodeId, Duration>>,
    connected: watch::Sender<BTreeSet<NodeId>>,
    queues: Mutex<BTreeMap<NodeId, mpsc::Sender<Vec<u8>>>>,
    /// Who asked to join within [`OUTSIDER_TIME`], and when last.
    joining: Mutex<BTreeMap<PeerId, Instant>>,
    pub(crate) calls: Arc<Semaphore>,
    pub(crate) traffic: Traffic,
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

/// The QUIC and the TCP address of an `IP:PORT` or `HOST:PORT`.
fn multiaddrs(address: &str) -> Vec<Multiaddr> {
    let host_port = address.rsplit_once(':').and_then(|(host, port)| {
        let port: u16 = port.parse().ok()?;
        Some((host.trim_matches(['[', ']']), port))
    });
    let Some((host, port)) = host_port else {
        return Vec::new();
    };
    let first = match host.parse::<std::net::IpAddr>() {
        Ok(ip) => Protocol::from(ip),
        Err(_) => Protocol::Dns(host.into()),
    };
    let base = Multiaddr::empty().with(first);
    vec![
        base.clone()
            .with(Protocol::Udp(port))
            .with(Protocol::QuicV1),
        base.with(Protocol::Tcp(port)),
    ]
}

fn build_swarm(
    config: &NetworkConfig,
    members: &MemberSet,
) -> Result<Swarm<Behaviour>, NetworkError> {
    let start = |reason: String| NetworkError::Start(reason);
    let mut secret = config.secret_key;
    let key = identity::Keypair::ed25519_from_bytes(&mut secret)
        .map_err(|error| start(error.to_string()))?;
    let gossip = gossipsub::ConfigBuilder::default()
        .validation_mode(gossipsub::ValidationMode::Anonymous)
        .validate_messages()
        .max_transmit_size(REPORT_BYTES_MAX + 1024)
        .heartbeat_interval(Duration::from_secs(1))
        // Everybody is connected with everybody, and an exchange makes up for what is lost: fewer
        // copies than the library's defaults, which are for networks of strangers.
        .flood_publish(false)
        .mesh_n(3)
        .mesh_n_low(2)
        .mesh_n_high(4)
        .mesh_outbound_min(1)
        .gossip_lazy(2)
        .gossip_factor(0.0)
        .message_id_fn(|message| {
            gossipsub::MessageId::from(blake3::hash(&message.data).as_bytes().to_vec())
        })
        .build()
        .map_err(|error| start(error.to_string()))?;
    let mut gossipsub =
        gossipsub::Behaviour::new(gossipsub::MessageAuthenticity::Anonymous, gossip)
            .map_err(|error| start(error.to_owned()))?;
    gossipsub
        .subscribe(&topic(&config.federation))
        .map_err(|error| start(error.to_string()))?;
    let inner = Inner {
        gossipsub,
        streams: libp2p_stream::Behaviour::new(),
    };
    let limits = connection_limits::ConnectionLimits::default()
        .with_max_pending_incoming(Some(64))
        .with_max_established_per_peer(Some(4))
        .with_max_established(Some(config.connections_max));
    let behaviour = Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        blocked: allow_block_list::Behaviour::default(),
        join: libp2p_stream::Behaviour::new(),
        members: MembersOnly::new(inner, Arc::clone(members)),
    };
    let swarm = SwarmBuilder::with_existing_identity(key)
        .with_tokio()
        .with_tcp(
            tcp::Config::default().nodelay(true),
            noise::Config::new,
            yamux::Config::default,
        )
        .map_err(|error| start(error.to_string()))?
        .with_quic_config(|mut quic| {
            // Pings find a dead peer sooner; this is for what nobody pings any more.
            quic.max_idle_timeout = 30_000;
            quic.keep_alive_interval = Duration::from_secs(10);
            quic
        })
        .with_dns()
        .map_err(|error| start(error.to_string()))?
        .with_behaviour(|_| behaviour)
        .map_err(|error| start(error.to_string()))?
        .with_swarm_config(|config| {
            config
                .with_idle_connection_timeout(Duration::from_secs(u64::from(u32::MAX)))
                // Each of our streams has one protocol only: its first bytes need not wait a
                // round trip for the other side's consent.
                .with_substream_upgrade_protocol_override(upgrade::Version::V1Lazy)
        })
        .build();
    Ok(swarm)
}

fn topic(federation: &FederationId) -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(format!("krake/reports/1/{federation}"))
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
        let mut swarm = build_swarm(&config, &members)?;
        let own = node_id(swarm.local_peer_id())
            .ok_or_else(|| NetworkError::Start("the key is not an Ed25519 key".to_owned()))?;
        listen(&mut swarm, &config.listen).await?;
        let mut streams = swarm.behaviour().members.inner.streams.new_control();
        let mut join = swarm.behaviour().join.new_control();
        let shared = Arc::new(Shared {
            own,
            federation: config.federation,
            members,
            peers: RwLock::default(),
            view: watch::channel(View::new()).0,
            heard: RwLock::default(),
            rtts: RwLock::default(),
            connected: watch::channel(BTreeSet::new()).0,
            queues: Mutex::default(),
            joining: Mutex::default(),
            calls: Arc::new(Semaphore::new(CALLS_AT_ONCE)),
            traffic: Traffic::default(),
        });
        let (commands, receiver) = mpsc::channel(1024);
        let network = Self {
            shared: Arc::clone(&shared),
            commands,
            streams: streams.clone(),
            join: join.clone(),
            runtime: tokio::runtime::Handle::current(),
            lines: Arc::default(),
        };
        let registered = |_| NetworkError::Start("a protocol is registered twice".to_owned());
        let frames = streams.accept(streams::FRAMES).map_err(registered)?;
        let calls_incoming = streams.accept(streams::CALLS).map_err(registered)?;
        let reports = streams.accept(streams::REPORTS).map_err(registered)?;
        let joins = join.accept(streams::JOIN).map_err(registered)?;
        tokio::spawn(take_frames(
            frames,
            Arc::clone(&shared),
            Arc::clone(&handler),
        ));
        tokio::spawn(calls::take_calls(
            calls_incoming,
            Arc::clone(&shared),
            Arc::clone(&handler),
        ));
        tokio::spawn(take_reports(reports, Arc::clone(&shared)));
        tokio::spawn(take_joins(joins, Arc::clone(&shared), handler));
        let (exchange, wanted) = mpsc::channel(64);
        let (unanswered, silent) = mpsc::channel(64);
        let pings = streams.clone();
        tokio::spawn(exchange_reports(wanted, Arc::downgrade(&shared), streams));
        tokio::spawn(
            SwarmTask {
                swarm,
                shared: Arc::downgrade(&shared),
                commands: receiver,
                exchange,
                connections: BTreeMap::new(),
                wanted_since: BTreeMap::new(),
                last_care: Instant::now(),
                last_exchange: Instant::now(),
                turn: 0,
                pinger: Pinger {
                    lines: Arc::clone(&network.lines),
                    streams: pings,
                    asked: BTreeMap::new(),
                },
                unanswered,
                silent,
            }
            .run(),
        );
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
            let now = Instant::now();
            let mut heard = self.shared.heard.write();
            heard.retain(|id, _| ids.contains(id));
            for id in &ids {
                heard.entry(*id).or_insert(now);
            }
            drop(heard);
            self.shared.queues.lock().retain(|id, _| ids.contains(id));
            self.lines.retain(|id| ids.contains(id));
            self.shared
                .view
                .send_modify(|view| view.retain(|id, _| ids.contains(id)));
            *self.shared.peers.write() = peers;
        }
        let _ = self.commands.send(Command::Members).await;
    }

    /// Queues a frame for a member, in order behind those before it. `false`: it is not connected
    /// or too far behind, and the frame is dropped.
    pub fn send_frame(&self, to: NodeId, frame: Vec<u8>) -> bool {
        let Some(peer) = peer_id(to) else {
            return false;
        };
        if !self.shared.connected.borrow().contains(&to) {
            return false;
        }
        let mut queues = self.shared.queues.lock();
        let queue = queues.entry(to).or_insert_with(|| {
            let (sender, receiver) = mpsc::channel(FRAME_QUEUE);
            // The caller may be a thread of its own, outside the runtime.
            self.runtime
                .spawn(write_frames(receiver, self.streams.clone(), peer));
            sender
        });
        queue.try_send(frame).is_ok()
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
        let addresses: Vec<Multiaddr> = addresses.iter().flat_map(|a| multiaddrs(a)).collect();
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            // Again in each round: a dial may fail because the other node is busy. While one is
            // under way or the connection is there, this does nothing.
            let dial = Command::Dial(peer, addresses.clone());
            let _ = self.commands.send(dial).await;
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            let mut control = self.join.clone();
            let result = streams::ask(&mut control, peer, streams::JOIN, request, left).await;
            match result {
                Err(CallError::Unreachable { .. }) if left > Duration::from_millis(300) => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                other => return other,
            }
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

impl Shared {
    /// The node behind a peer that is a member.
    pub(crate) fn member(&self, peer: &PeerId) -> Option<NodeId> {
        node_id(peer).filter(|_| self.is_member(peer))
    }

    pub(crate) fn heard(&self, node: NodeId) {
        if let Some(at) = self.heard.write().get_mut(&node) {
            *at = Instant::now();
        }
    }

    /// A ping was answered after `rtt`.
    fn measured(&self, node: NodeId, rtt: Duration) {
        self.heard(node);
        let mut rtts = self.rtts.write();
        // Smoothed as in RFC 6298 §2.
        rtts.entry(node)
            .and_modify(|old| *old = (*old * 7 + rtt) / 8)
            .or_insert(rtt);
    }

    fn asks_to_join(&self, peer: PeerId) {
        let mut joining = self.joining.lock();
        joining.retain(|_, at| at.elapsed() < OUTSIDER_TIME);
        joining.insert(peer, Instant::now());
    }

    fn is_joining(&self, peer: &PeerId) -> bool {
        let joining = self.joining.lock();
        joining
            .get(peer)
            .is_some_and(|at| at.elapsed() < JOIN_ANSWER_TIME)
    }

    fn is_member(&self, peer: &PeerId) -> bool {
        self.members.read().contains(peer)
    }

    /// `true`: it was news.
    fn take_report(&self, signed: SignedReport) -> bool {
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
    fn silence(&self, now: Instant) -> BTreeMap<NodeId, Duration> {
        let heard = self.heard.read();
        heard
            .iter()
            .filter(|(node, _)| **node != self.own)
            .map(|(node, at)| (*node, now.saturating_duration_since(*at)))
            .collect()
    }

    fn opinions(&self, now: Instant) -> Opinions {
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

async fn listen(
    swarm: &mut Swarm<Behaviour>,
    addresses: &[SocketAddr],
) -> Result<(), NetworkError> {
    for address in addresses {
        // A port of 0 gets its number from TCP, and QUIC takes the same one.
        let mut port = address.port();
        let failed = |reason: String| NetworkError::Listen {
            address: *address,
            reason,
        };
        for quic in [false, true] {
            let base = Multiaddr::empty().with(Protocol::from(address.ip()));
            let multiaddr = if quic {
                base.with(Protocol::Udp(port)).with(Protocol::QuicV1)
            } else {
                base.with(Protocol::Tcp(port))
            };
            let listener = swarm
                .listen_on(multiaddr)
                .map_err(|error| failed(innermost(&error)))?;
            loop {
                match swarm.select_next_some().await {
                    SwarmEvent::NewListenAddr {
                        listener_id,
                        address,
                    } if listener_id == listener => {
                        if let Some(Protocol::Tcp(number)) = address.iter().nth(1) {
                            port = number;
                        }
                        break;
                    }
                    SwarmEvent::ListenerClosed {
                        listener_id,
                        reason,
                        ..
                    } if listener_id == listener => {
                        let reason = reason.err().map(|error| innermost(&error));
                        return Err(failed(
                            reason.unwrap_or_else(|| "the listener was closed".to_owned()),
                        ));
                    }
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

/// The innermost cause: transports wrap the system's error in others whose texts are empty.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    loop {
        let inner = error
            .source()
            // An error of IO may hold another one without calling it its source.
            .or_else(|| Some(error.downcast_ref::<std::io::Error>()?.get_ref()? as _));
        match inner {
            Some(inner) => error = inner,
            None => return error.to_string(),
        }
    }
}

async fn write_frames(
    mut queue: mpsc::Receiver<Vec<u8>>,
    mut control: libp2p_stream::Control,
    peer: PeerId,
) {
    let mut stream: Option<Stream> = None;
    let mut gathered = Gathered::default();
    while let Some(frame) = queue.recv().await {
        if stream.is_none() {
            let opening = control.open_stream(peer, streams::FRAMES);
            match tokio::time::timeout(Duration::from_secs(3), opening).await {
                Ok(Ok(opened)) => stream = Some(opened),
                Ok(Err(error)) => debug!(%peer, %error, "no stream for frames"),
                Err(_) => debug!(%peer, "no stream for frames in time"),
            }
        }
        let Some(open) = stream.as_mut() else {
            // What waited meanwhile is out of date.
            while queue.try_recv().is_ok() {}
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        gathered.push(&[&frame]);
        while !gathered.is_full()
            && let Ok(next) = queue.try_recv()
        {
            gathered.push(&[&next]);
        }
        if let Err(error) = gathered.write(open).await {
            debug!(%peer, %error, "the stream for frames broke");
            stream = None;
        }
    }
}

async fn take_frames(
    mut incoming: libp2p_stream::IncomingStreams,
    shared: Arc<Shared>,
    handler: Arc<dyn Handler>,
) {
    while let Some((peer, stream)) = incoming.next().await {
        let (shared, handler) = (Arc::downgrade(&shared), Arc::clone(&handler));
        tokio::spawn(async move {
            let Some(node) = node_id(&peer) else {
                return;
            };
            let mut stream = BufReader::with_capacity(streams::READ_BYTES, stream);
            loop {
                match streams::read(&mut stream, CALL_BYTES_MAX).await {
                    Ok(Some(frame)) => {
                        let Some(shared) = shared.upgrade() else {
                            return;
                        };
                        if !shared.is_member(&peer) {
                            return;
                        }
                        shared.heard(node);
                        shared.traffic.frames.fetch_add(1, Ordering::Relaxed);
                        handler.frame(node, &frame);
                    }
                    Ok(None) => return,
                    Err(error) => {
                        debug!(%peer, %error, "frames end");
                        return;
                    }
                }
            }
        });
    }
}

async fn take_reports(mut incoming: libp2p_stream::IncomingStreams, shared: Arc<Shared>) {
    while let Some((peer, mut stream)) = incoming.next().await {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            if !shared.is_member(&peer) {
                return;
            }
            let Ok(Some(question)) = streams::read(&mut stream, REPORT_BYTES_MAX * 4).await else {
                return;
            };
            let result = codec::decode::<Digest>(EXCHANGE_VERSION, &question, REPORT_BYTES_MAX * 4)
                .and_then(|digest| {
                    let missing = view::missing(&shared.view.borrow(), &digest, CALL_BYTES_MAX / 2);
                    codec::encode(EXCHANGE_VERSION, &missing)
                })
                .map_err(|error| error.to_string());
            if let Err(error) = streams::answer(&mut stream, result).await {
                debug!(%peer, %error, "reports could not be sent");
            }
        });
    }
}

async fn take_joins(
    mut incoming: libp2p_stream::IncomingStreams,
    shared: Arc<Shared>,
    handler: Arc<dyn Handler>,
) {
    let at_once = Arc::new(Semaphore::new(8));
    while let Some((peer, mut stream)) = incoming.next().await {
        let Ok(permit) = Arc::clone(&at_once).try_acquire_owned() else {
            debug!(%peer, "too many requests to join at once");
            continue;
        };
        let (handler, shared) = (Arc::clone(&handler), Arc::clone(&shared));
        tokio::spawn(async move {
            let _permit = permit;
            shared.asks_to_join(peer);
            let work = async {
                let node = node_id(&peer)?;
                let request = streams::read(&mut stream, JOIN_BYTES_MAX).await.ok()??;
                let result = handler.join(node, &request).await;
                shared.asks_to_join(peer);
                streams::answer(&mut stream, result).await.ok()
            };
            let _ = tokio::time::timeout(OUTSIDER_TIME, work).await;
        });
    }
}

async fn exchange_reports(
    mut wanted: mpsc::Receiver<PeerId>,
    shared: std::sync::Weak<Shared>,
    mut control: libp2p_stream::Control,
) {
    while let Some(peer) = wanted.recv().await {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let digest = view::digest(&shared.view.borrow());
        let Ok(question) = codec::encode(EXCHANGE_VERSION, &digest) else {
            continue;
        };
        let timeout = Duration::from_secs(5);
        match streams::ask(&mut control, peer, streams::REPORTS, &question, timeout).await {
            Ok(answer) => {
                match codec::decode::<Missing>(EXCHANGE_VERSION, &answer, CALL_BYTES_MAX) {
                    Ok(missing) => {
                        for report in missing.0 {
                            shared.take_report(report);
                        }
                    }
                    Err(error) => debug!(%peer, %error, "an exchange of reports is not readable"),
                }
            }
            Err(error) => debug!(%error, "no exchange of reports"),
        }
    }
}

struct SwarmTask {
    swarm: Swarm<Behaviour>,
    shared: std::sync::Weak<Shared>,
    commands: mpsc::Receiver<Command>,
    exchange: mpsc::Sender<PeerId>,
    /// When each connection was made, and whether as a member's.
    connections: BTreeMap<ConnectionId, Made>,
    /// Since when a member without a connection is wanted.
    wanted_since: BTreeMap<PeerId, Instant>,
    last_care: Instant,
    last_exchange: Instant,
    turn: usize,
    pinger: Pinger,
    unanswered: mpsc::Sender<PeerId>,
    /// Peers that did not answer a ping.
    silent: mpsc::Receiver<PeerId>,
}

/// Asks for signs of life.
struct Pinger {
    lines: Arc<Lines>,
    streams: libp2p_stream::Control,
    /// When each member was asked last.
    asked: BTreeMap<NodeId, Instant>,
}

impl Pinger {
    /// Pings members that were silent for long or whose round-trip time is old.
    fn look(&mut self, shared: &Arc<Shared>, unanswered: &mpsc::Sender<PeerId>, now: Instant) {
        let count = shared.members.read().len();
        let (silence, interval) = (pace::ping_after(count), pace::rtt_interval(count));
        let connected = shared.connected.borrow().clone();
        self.asked.retain(|node, _| connected.contains(node));
        let heard = shared.heard.read().clone();
        for node in connected {
            let since = |at: Option<&Instant>| {
                at.map_or(Duration::MAX, |at| now.saturating_duration_since(*at))
            };
            let asked = since(self.asked.get(&node));
            let due = asked >= interval || asked.min(since(heard.get(&node))) >= silence;
            let Some(peer) = peer_id(node).filter(|_| due) else {
                continue;
            };
            self.asked.insert(node, now);
            self.ping(shared, unanswered, (node, peer), PING_TIME);
        }
    }

    fn ping(
        &self,
        shared: &Arc<Shared>,
        unanswered: &mpsc::Sender<PeerId>,
        (node, peer): (NodeId, PeerId),
        patience: Duration,
    ) {
        let (lines, streams) = (Arc::clone(&self.lines), self.streams.clone());
        let (shared, unanswered) = (Arc::downgrade(shared), unanswered.clone());
        tokio::spawn(async move {
            let runtime = tokio::runtime::Handle::current();
            let start = Instant::now();
            let ping = lines.ping(&runtime, &streams, (node, peer));
            match tokio::time::timeout(patience, ping).await {
                Ok(Ok(())) => {
                    if let Some(shared) = shared.upgrade() {
                        shared.measured(node, start.elapsed());
                    }
                }
                Ok(Err(fault)) => debug!(%node, ?fault, "no ping"),
                Err(_) => {
                    let _ = unanswered.send(peer).await;
                }
            }
        });
    }
}

/// A connection that is there.
struct Made {
    peer: PeerId,
    at: Instant,
    /// It was made to a member, as one.
    member: bool,
    /// The other side dialled.
    incoming: bool,
}

impl SwarmTask {
    async fn run(mut self) {
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
            Command::Dial(peer, addresses) => self.dial(peer, addresses),
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

    fn dial(&mut self, peer: PeerId, addresses: Vec<Multiaddr>) {
        let members = self
            .shared
            .upgrade()
            .map_or(1, |shared| shared.members.read().len());
        let at_once = pace::addresses_at_once(members);
        let options = DialOpts::peer_id(peer)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(addresses)
            .override_dial_concurrency_factor(at_once)
            .build();
        if let Err(error) = self.swarm.dial(options) {
            debug!(%peer, %error, "not dialled");
        }
    }

    fn dial_again(&mut self, shared: &Shared, node: NodeId, peer: PeerId) {
        let addresses = {
            let peers = shared.peers.read();
            let known = peers.iter().find(|known| known.node == node);
            known.map(|known| known.addresses.iter().flat_map(|a| multiaddrs(a)).collect())
        };
        if let Some(addresses) = addresses {
            self.dial(peer, addresses);
        }
    }

    fn dial_members(&mut self) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let peers = shared.peers.read().clone();
        let now = Instant::now();
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
                let addresses = known.addresses.iter().flat_map(|a| multiaddrs(a)).collect();
                self.dial(peer, addresses);
            }
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
    fn close_unanswered(&mut self, peer: PeerId) {
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
    fn close_wrong(&mut self) {
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

    fn care(&mut self, shared: &Arc<Shared>) {
        let now = Instant::now();
        if now.duration_since(self.last_care) > PAUSE_DETECTED {
            info!(
                seconds = now.duration_since(self.last_care).as_secs(),
                "this node was paused; silence is counted anew"
            );
            for at in shared.heard.write().values_mut() {
                *at = now;
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
            } => {
                if endpoint.is_listener() {
                    self.close_older(peer_id);
                }
                if let Some(shared) = self.shared.upgrade() {
                    shared.traffic.connections.fetch_add(1, Ordering::Relaxed);
                }
                let member = self.swarm.behaviour().members.is_admitted(connection_id);
                let made = Made {
                    peer: peer_id,
                    at: Instant::now(),
                    member,
                    incoming: endpoint.is_listener(),
                };
                self.connections.insert(connection_id, made);
                self.wanted_since.remove(&peer_id);
                if member {
                    self.on_connected(peer_id);
                }
            }
            SwarmEvent::ConnectionClosed {
                peer_id,
                connection_id,
                ..
            } => {
                let was_member = self
                    .connections
                    .remove(&connection_id)
                    .is_none_or(|made| made.member);
                let left = self
                    .connections
                    .values()
                    .any(|made| made.member && made.peer == peer_id);
                if let (false, Some(shared), Some(node)) =
                    (left, self.shared.upgrade(), node_id(&peer_id))
                {
                    shared.connected.send_if_modified(|set| set.remove(&node));
                    shared.queues.lock().remove(&node);
                    if !was_member && shared.is_member(&peer_id) {
                        // Whoever saw that the connection was of no use makes the next one.
                        self.dial_again(&shared, node, peer_id);
                    }
                }
            }
            SwarmEvent::Behaviour(BehaviourEvent::Members(InnerEvent::Gossipsub(
                gossipsub::Event::Message {
                    propagation_source,
                    message_id,
                    message,
                },
            ))) => self.on_message(&propagation_source, &message_id, &message.data),
            SwarmEvent::OutgoingConnectionError { peer_id, error, .. } => {
                debug!(?peer_id, %error, "a dial failed");
            }
            _ => {}
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

    fn on_message(&mut self, source: &PeerId, id: &gossipsub::MessageId, data: &[u8]) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let acceptance =
            match codec::decode::<SignedReport>(EXCHANGE_VERSION, data, REPORT_BYTES_MAX + 1024) {
                Ok(report) => {
                    shared.traffic.reports.fetch_add(1, Ordering::Relaxed);
                    if shared.take_report(report) {
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
