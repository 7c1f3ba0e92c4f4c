//! Real swarms on loopback.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use ed25519_dalek::{Signer, SigningKey};
use krake_gossip::{Handler, Network, NetworkConfig, NetworkError, Peer};
use krake_model::ids::{FederationId, NodeId};
use krake_model::report::{SignedReport, SiteReport};
use krake_model::time::Timestamp;
use parking_lot::Mutex;
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::sync::watch;

const LIMIT: Duration = Duration::from_secs(20);
const FEDERATION: FederationId = FederationId::from_bytes([3; 32]);

#[derive(Default)]
struct Recorder {
    frames: Mutex<Vec<(NodeId, Vec<u8>)>>,
}

#[async_trait]
impl Handler for Recorder {
    fn frame(&self, from: NodeId, bytes: &[u8]) {
        self.frames.lock().push((from, bytes.to_vec()));
    }

    async fn call(&self, _from: NodeId, bytes: &[u8]) -> Result<Vec<u8>, String> {
        if bytes == b"no" {
            return Err("not today".to_owned());
        }
        Ok([b"echo ", bytes].concat())
    }

    async fn join(&self, from: NodeId, bytes: &[u8]) -> Result<Vec<u8>, String> {
        Ok([from.to_string().as_bytes(), b" ", bytes].concat())
    }
}

struct Member {
    key: SigningKey,
    network: Network,
    recorder: Arc<Recorder>,
    peer: Peer,
}

async fn start(number: u8) -> Member {
    start_at(number, "127.0.0.1:0").await
}

async fn start_at(number: u8, listen: &str) -> Member {
    let key = SigningKey::from_bytes(&[number; 32]);
    let recorder = Arc::<Recorder>::default();
    let network = Network::start(
        NetworkConfig {
            secret_key: key.to_bytes(),
            federation: FEDERATION,
            listen: vec![listen.parse().unwrap()],
            connections_max: 100,
        },
        Arc::clone(&recorder) as Arc<dyn Handler>,
    )
    .await
    .unwrap();
    let peer = Peer {
        node: network.own(),
        addresses: network
            .listening()
            .await
            .iter()
            .map(ToString::to_string)
            .collect(),
    };
    Member {
        key,
        network,
        recorder,
        peer,
    }
}

async fn started(count: u8) -> Vec<Member> {
    let mut members = Vec::new();
    for number in 1..=count {
        members.push(start(number).await);
    }
    members
}

/// Asks until there is an answer.
async fn answers(asker: &Member, asked: &Member, limit: Duration) {
    let start = Instant::now();
    while let Err(error) = asker.network.call(asked.peer.node, b"there?", LIMIT).await {
        assert!(start.elapsed() < limit, "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn admit(members: &[&Member]) {
    let peers: Vec<Peer> = members.iter().map(|member| member.peer.clone()).collect();
    for member in members {
        member.network.set_members(peers.clone()).await;
    }
    // A connection made before the other side knew of its admission is replaced. One that carried
    // an answer stays.
    for asker in members {
        for asked in members {
            if asker.peer.node == asked.peer.node {
                continue;
            }
            answers(asker, asked, LIMIT).await;
        }
    }
}

fn report(member: &Member, sequence: u64) -> SignedReport {
    let report = SiteReport {
        node: member.peer.node,
        boot: 1,
        sequence,
        observed_at: Timestamp::from_millis(0),
        metrics: BTreeMap::from([("pue".to_owned(), 1.1)]),
        backends: BTreeMap::new(),
        rtts_micros: BTreeMap::new(),
        unreachable: BTreeMap::new(),
        version: "test".to_owned(),
    };
    SignedReport::sign(&report, &FEDERATION, |bytes| {
        member.key.sign(bytes).to_bytes()
    })
    .unwrap()
}

async fn has_report(member: &Member, of: &Member, sequence: u64) {
    let mut view = member.network.view();
    let there = view.wait_for(|view| {
        view.get(&of.peer.node)
            .is_some_and(|seen| seen.report.sequence >= sequence)
    });
    tokio::time::timeout(LIMIT, there).await.unwrap().unwrap();
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        if start.elapsed() > LIMIT {
            panic!("still not: {what}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_exchange_frames_calls_and_reports() {
    let members = started(3).await;
    admit(&members.iter().collect::<Vec<_>>()).await;
    let [a, b, c] = &members[..] else {
        panic!("three")
    };
    for number in 0..100 {
        assert!(a.network.send_frame(b.peer.node, vec![number]));
    }
    until("all frames are there", || {
        b.recorder.frames.lock().len() == 100
    })
    .await;
    let mut frames = b.recorder.frames.lock().clone();
    assert!(frames.iter().all(|(from, _)| *from == a.peer.node));
    // They may overtake each other where their way changes.
    frames.sort_unstable();
    assert!(
        frames
            .into_iter()
            .map(|(_, frame)| frame)
            .eq((0..100).map(|number| vec![number]))
    );

    let answer = a.network.call(c.peer.node, b"hello", LIMIT).await.unwrap();
    assert_eq!(answer, b"echo hello");
    let refused = a.network.call(c.peer.node, b"no", LIMIT).await.unwrap_err();
    assert!(refused.to_string().contains("not today"), "{refused}");

    for sequence in 1..4 {
        a.network.publish(report(a, sequence)).await;
        has_report(b, a, sequence).await;
        has_report(c, a, sequence).await;
    }
}

fn connections(member: &Member) -> (u64, u64) {
    let traffic = member.network.traffic();
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    (
        count(&traffic.connections),
        count(&traffic.quic_connections),
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_one_link_connections_are_over_tcp() {
    let members = started(3).await;
    admit(&members.iter().collect::<Vec<_>>()).await;
    for member in &members {
        let (all, quic) = connections(member);
        assert!(all >= 2 && quic == 0, "{quic} of {all} over QUIC");
    }
}

/// For longer than QUIC would wait for it, and than its retries need.
const AWAY: Duration = Duration::from_secs(6);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_on_one_link_is_met_over_tcp_again() {
    for away in [1, 2] {
        let members = [start(1).await, start(2).await];
        admit(&[&members[0], &members[1]]).await;
        let [first, second] = members;
        let (stays, leaves) = match away {
            1 => (second, first),
            _ => (first, second),
        };
        let address = leaves.peer.addresses[0].clone();
        drop(leaves);
        tokio::time::sleep(AWAY).await;
        let back = start_at(away, &address).await;
        admit(&[&stays, &back]).await;
        for member in [&stays, &back] {
            let (all, quic) = connections(member);
            assert!(all >= 1 && quic == 0, "{quic} of {all} over QUIC");
        }
    }
}

/// Two members of which only the first one dials, at another address than the second one's own.
async fn dials_at(dialler: &Member, other: &Member, at: SocketAddr) {
    let known = |member: &Member, addresses| Peer {
        node: member.peer.node,
        addresses,
    };
    let seen = vec![known(dialler, Vec::new()), other.peer.clone()];
    other.network.set_members(seen).await;
    let seen = vec![dialler.peer.clone(), known(other, vec![at.to_string()])];
    dialler.network.set_members(seen).await;
}

/// Passes datagrams on to `to`, and what comes from there back to whoever sent last.
async fn relay(to: SocketAddr) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut sender, mut datagram) = (None, vec![0; 65_536]);
        while let Ok((length, from)) = socket.recv_from(&mut datagram).await {
            if from != to {
                sender = Some(from);
            }
            let next = if from == to { sender } else { Some(to) };
            if let Some(next) = next {
                let _ = socket.send_to(&datagram[..length], next).await;
            }
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_tcp_is_refused_quic_gets_through() {
    let members = started(2).await;
    let (a, b) = (&members[0], &members[1]);
    let at = relay(b.peer.addresses[0].parse().unwrap()).await;
    dials_at(a, b, at).await;
    // It is tried every twenty seconds.
    answers(a, b, 2 * LIMIT).await;
    let (all, quic) = connections(a);
    assert!(all >= 1 && quic == all, "{quic} of {all} over QUIC");
    for (from, to) in [(a, b), (b, a)] {
        // More than the relay takes at once: what it drops is sent again.
        let frames: Vec<Vec<u8>> = (0..20).map(|number| vec![number; 100_000]).collect();
        for frame in &frames {
            assert!(from.network.send_frame(to.peer.node, frame.clone()));
        }
        until("all frames are there", || {
            to.recorder.frames.lock().len() == frames.len()
        })
        .await;
        let arrived = to.recorder.frames.lock().clone();
        assert!(arrived.into_iter().map(|(_, frame)| frame).eq(frames));
        from.network.publish(report(from, 1)).await;
        has_report(to, from, 1).await;
    }
}

/// What becomes of a connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Open,
    /// It carries nothing any more and stays, as after a power cut.
    Still,
    Closed,
}

/// Passes connections on to a member.
struct Relay {
    at: SocketAddr,
    /// In the order in which they were made.
    connections: Arc<Mutex<Vec<watch::Sender<Way>>>>,
}

impl Relay {
    async fn to(member: &Member) -> Self {
        let to: SocketAddr = member.peer.addresses[0].parse().unwrap();
        // It holds little: the sender's buffers are full soon.
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 * 1024).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(16).unwrap();
        let relay = Self {
            at: listener.local_addr().unwrap(),
            connections: Arc::default(),
        };
        let connections = Arc::clone(&relay.connections);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let (sender, mut way) = watch::channel(Way::Open);
                connections.lock().push(sender);
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(to).await.unwrap();
                    tokio::select! {
                        biased;
                        _ = way.wait_for(|way| *way != Way::Open) => {}
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                    }
                    let _ = way.wait_for(|way| *way != Way::Still).await;
                });
            }
        });
        relay
    }

    fn set(
        &self,
        connections: impl std::slice::SliceIndex<[watch::Sender<Way>], Output = [watch::Sender<Way>]>,
        way: Way,
    ) {
        for connection in &self.connections.lock()[connections] {
            connection.send_replace(way);
        }
    }
}

/// So few that they take the stream.
const FRAMES: usize = 31;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_died_with_frames_in_it_is_replaced() {
    let members = started(2).await;
    let (a, b) = (&members[0], &members[1]);
    let relay = Relay::to(b).await;
    dials_at(a, b, relay.at).await;
    let mut connected = a.network.connected();
    let there = connected.wait_for(|set| set.contains(&b.peer.node));
    tokio::time::timeout(LIMIT, there).await.unwrap().unwrap();
    a.network.call(b.peer.node, b"there?", LIMIT).await.unwrap();
    // So that the stream's window grows beyond what the system's buffers take.
    for _ in 0..FRAMES {
        assert!(a.network.send_frame(b.peer.node, vec![0; 4_000_000]));
    }
    until("some of them are there", || {
        b.recorder.frames.lock().len() > FRAMES / 5
    })
    .await;
    relay.set(.., Way::Still);
    assert!(b.recorder.frames.lock().len() < FRAMES);
    assert_eq!(direct_connections(a), 0);
    let (before, _) = connections(a);
    until("it is dialled again", || connections(a).0 > before).await;
    answers(a, b, LIMIT).await;
}

fn direct_connections(member: &Member) -> u64 {
    let traffic = member.network.traffic();
    traffic.direct_connections.load(Ordering::Relaxed)
}

/// Sends frames until they have another connection than everything else, and all are there.
async fn frames_go_directly(from: &Member, to: &Member) {
    let (before, arrived) = (direct_connections(from), to.recorder.frames.lock().len());
    let mut sent = 0;
    until("frames go directly", || {
        for _ in 0..10 {
            sent += usize::from(from.network.send_frame(to.peer.node, vec![0]));
        }
        direct_connections(from) > before
    })
    .await;
    until("the first ones are there", || {
        to.recorder.frames.lock().len() >= arrived + sent
    })
    .await;
}

/// Two members that are connected, the first by way of a relay.
async fn neighbours() -> ([Member; 2], Relay) {
    let (a, b) = (start(1).await, start(2).await);
    let relay = Relay::to(&b).await;
    dials_at(&a, &b, relay.at).await;
    answers(&a, &b, LIMIT).await;
    ([a, b], relay)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_on_one_link_have_a_connection_of_their_own() {
    let ([a, b], relay) = neighbours().await;
    frames_go_directly(&a, &b).await;
    // The first is the swarm's. Only questions wait for it.
    let swarm = 0..1;
    relay.set(swarm.clone(), Way::Still);
    b.recorder.frames.lock().clear();
    let sizes = [1, 1_000, 50_000, 1];
    let frames: Vec<Vec<u8>> = (0..100_u8)
        .map(|number| vec![number; sizes[usize::from(number) % sizes.len()]])
        .chain([vec![100; 500_000], vec![101]])
        .collect();
    for frame in &frames {
        assert!(a.network.send_frame(b.peer.node, frame.clone()));
    }
    until("all frames are there", || {
        b.recorder.frames.lock().len() == frames.len()
    })
    .await;
    let arrived = b.recorder.frames.lock().clone();
    assert!(arrived.iter().all(|(from, _)| *from == a.peer.node));
    assert!(arrived.into_iter().map(|(_, frame)| frame).eq(frames));
    // It ends with the swarm's.
    let direct = relay.connections.lock().len();
    until("the swarm dials again", || {
        relay.connections.lock().len() > direct
    })
    .await;
    frames_go_directly(&a, &b).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_connection_of_their_own_frames_take_a_stream() {
    let ([a, b], relay) = neighbours().await;
    frames_go_directly(&a, &b).await;
    let (before, _) = connections(&a);
    let mut ways = vec![Way::Closed];
    // Elsewhere the system goes on for many minutes.
    if cfg!(any(target_os = "linux", target_os = "android")) {
        ways.push(Way::Still);
    }
    for (way, mark) in ways.into_iter().zip(1..) {
        let (direct, count) = (direct_connections(&a), relay.connections.lock().len());
        relay.set(count - 1..count, way);
        // So large that the relay is full soon, so many that they are worth another connection.
        let frame = vec![mark; 50_000];
        until(
            "a frame takes the stream, and there is another connection",
            || {
                for _ in 0..5 {
                    a.network.send_frame(b.peer.node, frame.clone());
                }
                let arrived = b.recorder.frames.lock().iter().any(|(_, f)| *f == frame);
                arrived && direct_connections(&a) > direct
            },
        )
        .await;
    }
    assert_eq!(
        connections(&a).0,
        before,
        "the swarm's connection has stayed"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_that_come_at_once_are_all_answered() {
    let members = started(2).await;
    let (a, b) = (&members[0], &members[1]);
    admit(&[a, b]).await;
    let calls = (0..500_u32).map(|number| async move {
        let question = number.to_be_bytes();
        let answer = a.network.call(b.peer.node, &question, LIMIT).await.unwrap();
        assert_eq!(answer, [b"echo ", &question[..]].concat());
    });
    futures::future::join_all(calls).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_joiner_has_all_reports_after_one_exchange() {
    let members = started(3).await;
    let [a, b, late] = &members[..] else {
        panic!("three")
    };
    admit(&[a, b]).await;
    a.network.publish(report(a, 7)).await;
    has_report(b, a, 7).await;
    admit(&[a, b, late]).await;
    has_report(late, a, 7).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outsider_can_ask_to_join_and_nothing_else() {
    let members = started(3).await;
    let [a, b, outsider] = &members[..] else {
        panic!("three")
    };
    admit(&[a, b]).await;
    let answer = outsider
        .network
        .join(a.peer.node, &a.peer.addresses, b"please", LIMIT)
        .await
        .unwrap();
    assert_eq!(
        String::from_utf8(answer).unwrap(),
        format!("{} please", outsider.peer.node)
    );
    // It believes to be a member; the others do not.
    let peers = members.iter().map(|member| member.peer.clone()).collect();
    outsider.network.set_members(peers).await;
    a.network.publish(report(a, 1)).await;
    has_report(b, a, 1).await;
    let short = Duration::from_millis(500);
    assert!(
        outsider
            .network
            .call(a.peer.node, b"hi", short)
            .await
            .is_err()
    );
    assert!(outsider.network.view().borrow().is_empty());
    outsider.network.send_frame(a.peer.node, vec![1]);
    assert!(a.network.call(b.peer.node, b"hi", LIMIT).await.is_ok());
    assert!(a.recorder.frames.lock().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_is_noticed_and_heals() {
    let members = started(3).await;
    let all: Vec<&Member> = members.iter().collect();
    admit(&all).await;
    let [a, b, c] = &members[..] else {
        panic!("three")
    };
    c.network
        .block(&BTreeSet::from([a.peer.node, b.peer.node]))
        .await;
    for member in [a, b] {
        let node = c.peer.node;
        until("the silence shows", || {
            member.network.unheard().contains_key(&node)
        })
        .await;
        assert_eq!(member.network.unheard().len(), 1);
    }
    c.network.block(&BTreeSet::new()).await;
    let mut connected = c.network.connected();
    let healed = connected.wait_for(|set| set.len() == 2);
    tokio::time::timeout(LIMIT, healed).await.unwrap().unwrap();
    until("it is heard again", || a.network.unheard().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_reads_from_a_connection_that_was_closed_ends() {
    let members = started(2).await;
    let (a, b) = (&members[0], &members[1]);
    admit(&[a, b]).await;
    // Each task that reads what a peer sends holds it.
    let readers = || Arc::strong_count(&b.recorder);
    let before = readers();
    let mut connected = b.network.connected();
    for _ in 0..3 {
        frames_go_directly(a, b).await;
        b.network.block(&BTreeSet::from([a.peer.node])).await;
        let cut = connected.wait_for(BTreeSet::is_empty);
        tokio::time::timeout(LIMIT, cut).await.unwrap().unwrap();
        b.network.block(&BTreeSet::new()).await;
        admit(&[a, b]).await;
    }
    until("old readers are gone", || readers() <= before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_a_clear_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let error = Network::start(
        NetworkConfig {
            secret_key: [9; 32],
            federation: FEDERATION,
            listen: vec![address],
            connections_max: 10,
        },
        Arc::<Recorder>::default(),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, NetworkError::Listen { .. }));
    let text = error.to_string();
    for word in [&address.to_string(), "in use", "peers.listen"] {
        assert!(text.contains(word), "`{word}` is not in: {text}");
    }
}
