//! Connections that carry frames and nothing else, from whoever dialled to whoever was dialled.
//!
//! They are made beside the swarm's, at the same port (`upgrade.rs`). Over them a frame goes from the
//! thread that sends it to the task that reads it: no task that cares for a stream, a multiplexer
//! and all protocols is woken on either side (ADR 0013).

use std::collections::{BTreeMap, BTreeSet};
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::AsyncRead;
use krake_model::ids::NodeId;
use libp2p::{PeerId, tcp};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::debug;

use super::frames::{self, Queue};
use super::shared::Shared;
use super::transports::Links;
use super::upgrade::{Accepted, Dialler, Outgoing};
use super::{Handler, node_id};
use crate::streams::{Gathered, STALL};

/// A connection is there after this time, or it will not be.
const DIAL_TIME: Duration = Duration::from_secs(5);
/// When one has failed, the next one is dialled after this time, then after twice as long each time,
const WAIT_MIN: Duration = Duration::from_secs(1);
/// until it is this.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// What has carried frames for this long was no failure.
const LASTING: Duration = Duration::from_secs(10);
/// The system asks an idle connection for a sign of life this often: what is between the two keeps
/// it, and one that is dead is found soon.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// One that has little to do for this long is closed.
const QUIET_TIME: Duration = Duration::from_secs(60);
/// The first frame may be here before the swarm has noted its connection with the sender.
const ACQUAINTANCE_TIME: Duration = Duration::from_secs(3);

/// Bytes for one member that go out whenever the system takes them.
pub(super) struct Direct {
    stream: Outgoing,
    gathered: Gathered,
}

impl Direct {
    pub(super) fn over(stream: Outgoing) -> Self {
        Self {
            stream,
            gathered: Gathered::default(),
        }
    }

    /// The system has taken all that was gathered.
    pub(super) const fn is_idle(&self) -> bool {
        self.gathered.is_empty()
    }

    /// What goes out next; more may be added while it is idle.
    pub(super) const fn gathered(&mut self) -> &mut Gathered {
        &mut self.gathered
    }

    /// Ready when the peer has closed it.
    pub(super) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.stream)
            .poll_read(cx, &mut [0])
            .map(|_| ())
    }

    /// Writes what was gathered.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.gathered.poll_write(&mut self.stream, cx)
    }
}

/// Dials a peer at these addresses, one after the other, or says why it is not at the last one.
async fn dial(
    dialler: &Dialler,
    peer: PeerId,
    addresses: Vec<SocketAddr>,
) -> Result<Direct, String> {
    let mut reason = "it has no address on a link of this node".to_owned();
    for address in addresses {
        match tokio::time::timeout(DIAL_TIME, dial_at(dialler, address)).await {
            Ok(Ok((there, stream))) if there == peer => return Ok(Direct::over(stream)),
            Ok(Ok((there, _))) => reason = format!("{there} is there"),
            Ok(Err(error)) => reason = error.to_string(),
            Err(_) => reason = "no answer in time".to_owned(),
        }
    }
    Err(reason)
}

async fn dial_at(dialler: &Dialler, address: SocketAddr) -> io::Result<(PeerId, Outgoing)> {
    let socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    watch_over(&socket);
    dialler.direct(tcp::tokio::TcpStream(socket)).await
}

/// Nobody answers over such a connection: the system has to notice that the peer is gone.
fn watch_over(socket: &TcpStream) {
    let socket = SockRef::from(socket);
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE);
    let set = socket.set_tcp_keepalive(&keepalive);
    // RFC 5482. Elsewhere it takes as long as the system tries to send again.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let set = set.and_then(|()| socket.set_tcp_user_timeout(Some(STALL)));
    if let Err(error) = set {
        debug!(%error, "a connection for frames will be found dead late");
    }
}

/// Keeps a direct connection for the frames to one member while there are many, if it is on a link of
/// this node.
pub(super) async fn keep(
    queue: Arc<Queue>,
    shared: Weak<Shared>,
    dialler: Arc<Dialler>,
    (node, peer): (NodeId, PeerId),
) {
    let mut wait = WAIT_MIN;
    loop {
        poll_fn(|cx| queue.poll_wanted(cx)).await;
        let addresses = {
            let Some(shared) = shared.upgrade() else {
                return;
            };
            let peers = shared.peers.read();
            let known = peers.iter().find(|known| known.node == node);
            known.map_or_else(Vec::new, |known| Links::read().near(&known.addresses))
        };
        match dial(&dialler, peer, addresses).await {
            Ok(direct) => {
                let since = Instant::now();
                queue.set_direct(direct);
                if let Some(shared) = shared.upgrade() {
                    shared.count_direct();
                }
                loop {
                    let lost = poll_fn(|cx| queue.poll_keep(cx));
                    let ended = tokio::time::timeout(QUIET_TIME, lost).await;
                    if ended.is_ok() || queue.end_if_quiet() {
                        break;
                    }
                }
                if since.elapsed() > LASTING {
                    wait = WAIT_MIN;
                }
            }
            Err(reason) => debug!(%peer, reason, "no connection for frames"),
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(WAIT_MAX);
    }
}

/// Reads what comes over the connections that members make: of one member, the newest.
pub(super) async fn take(mut accepted: Accepted, shared: Weak<Shared>, handler: Arc<dyn Handler>) {
    let mut readers = BTreeMap::<NodeId, AbortHandle>::new();
    while let Some((peer, stream)) = accepted.recv().await {
        let (Some(strong), Some(node)) = (shared.upgrade(), node_id(&peer)) else {
            continue;
        };
        if !strong.is_member(&peer) {
            debug!(%peer, "a connection for frames is not from a member");
            continue;
        }
        strong.count_direct();
        let connected = strong.connected.subscribe();
        let reading = frames::read_frames(
            stream,
            peer,
            Weak::clone(&shared),
            Arc::clone(&handler),
            Shared::heard_directly,
        );
        let reader = tokio::spawn(while_connected(connected, node, reading));
        readers.retain(|_, reader| !reader.is_finished());
        if let Some(older) = readers.insert(node, reader.abort_handle()) {
            older.abort();
        }
    }
}

/// The swarm finds out who is gone or blocked: over this connection nothing is ever sent back.
async fn while_connected(
    mut connected: watch::Receiver<BTreeSet<NodeId>>,
    node: NodeId,
    reading: impl Future<Output = ()>,
) {
    let met = connected.wait_for(|set| set.contains(&node));
    match tokio::time::timeout(ACQUAINTANCE_TIME, met).await {
        Ok(Ok(_)) => {}
        _ => return,
    }
    tokio::select! {
        () = reading => {}
        _ = connected.wait_for(|set| !set.contains(&node)) => {}
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use async_trait::async_trait;
    use krake_model::ids::FederationId;
    use libp2p::identity;

    use super::*;
    use crate::{Network, NetworkConfig, Peer};

    #[derive(Default)]
    struct Counter(AtomicUsize);

    #[async_trait]
    impl Handler for Counter {
        fn frame(&self, _: NodeId, _: &[u8]) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }

        async fn call(&self, _: NodeId, _: &[u8]) -> Result<Vec<u8>, String> {
            Err("nobody asks".to_owned())
        }

        async fn join(&self, _: NodeId, _: &[u8]) -> Result<Vec<u8>, String> {
            Err("nobody asks".to_owned())
        }
    }

    /// Writes a frame and waits until the other side has closed the connection.
    async fn is_turned_away(mut direct: Direct, within: Duration) {
        direct.gathered().push(&[b"frame"]);
        poll_fn(|cx| direct.poll_write(cx)).await.unwrap();
        let turned_away = poll_fn(|cx| direct.poll_closed(cx));
        tokio::time::timeout(within, turned_away).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn only_members_that_are_connected_are_heard() {
        let handler = Arc::<Counter>::default();
        let config = NetworkConfig {
            secret_key: [1; 32],
            federation: FederationId::from_bytes([3; 32]),
            listen: vec!["127.0.0.1:0".parse().unwrap()],
            connections_max: 10,
        };
        let network = Network::start(config, Arc::clone(&handler) as Arc<dyn Handler>)
            .await
            .unwrap();
        let at = network.listening().await;
        let there = super::super::peer_id(network.own()).unwrap();
        let key = identity::Keypair::generate_ed25519();
        let own = PeerId::from(key.public());
        let dialler = Dialler::new(&key).unwrap();

        let wrong = dial(&dialler, own, at.clone()).await.err().unwrap();
        assert!(wrong.contains(&there.to_string()), "{wrong}");
        let nowhere = dial(&dialler, there, Vec::new()).await.err().unwrap();
        assert!(nowhere.contains("no address"), "{nowhere}");

        let direct = dial(&dialler, there, at.clone()).await.unwrap();
        is_turned_away(direct, ACQUAINTANCE_TIME / 2).await;
        let member = Peer {
            node: node_id(&own).unwrap(),
            addresses: Vec::new(),
        };
        network.set_members(vec![member]).await;
        let direct = dial(&dialler, there, at).await.unwrap();
        let since = Instant::now();
        is_turned_away(direct, ACQUAINTANCE_TIME * 5).await;
        assert!(since.elapsed() > ACQUAINTANCE_TIME / 2, "it was waited for");
        assert_eq!(handler.0.load(Ordering::Relaxed), 0);
    }
}
