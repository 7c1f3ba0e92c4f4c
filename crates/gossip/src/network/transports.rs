//! By which transport a member is dialled (ADR 0013).

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use libp2p::PeerId;
use libp2p::core::Multiaddr;
use libp2p::core::transport::TransportError;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::DialError;
use tracing::debug;

/// Whoever is on the same link and refuses TCP is not there, or something on the way refuses it:
/// one dial of so many, that is every twenty seconds, tries QUIC, too. Not more often: the library
/// waits five seconds for an answer over QUIC, and whoever comes back meanwhile is met over it.
const QUIC_EVERY: u32 = 40;

/// Networks this node is attached to: its own machine, and links that are no point-to-point tunnels.
pub(super) struct Links(Vec<IpNet>);

impl Links {
    /// As they are now; without any where the system does not say.
    pub(super) fn read() -> Self {
        let interfaces = if_addrs::get_if_addrs().unwrap_or_else(|error| {
            debug!(%error, "the network interfaces cannot be read: every member counts as far away");
            Vec::new()
        });
        let near = interfaces.iter().filter(|interface| !interface.is_p2p());
        let networks = near.filter_map(|interface| match &interface.addr {
            if_addrs::IfAddr::V4(own) => IpNet::new(own.ip.into(), own.prefixlen).ok(),
            if_addrs::IfAddr::V6(own) => IpNet::new(own.ip.into(), own.prefixlen).ok(),
        });
        // Without a mask everybody would be near.
        Self(
            networks
                .filter(|network| network.prefix_len() > 0)
                .collect(),
        )
    }

    fn has(&self, ip: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&ip))
    }

    /// Those of these addresses that are on one of them.
    pub(super) fn near(&self, addresses: &[String]) -> Vec<SocketAddr> {
        let parsed = addresses.iter().filter_map(|address| address.parse().ok());
        parsed.filter(|at: &SocketAddr| self.has(at.ip())).collect()
    }
}

/// What came of the last dials of a peer over TCP.
#[derive(Debug, Clone, Copy, Default)]
struct Tcp {
    /// In a row.
    refused: u32,
    /// It did not even say that nobody listens.
    blocked: bool,
}

/// What dialling each peer has shown.
#[derive(Default)]
pub(super) struct Dials(BTreeMap<PeerId, Tcp>);

/// A dial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Dial {
    /// Where to, best first.
    pub(super) addresses: Vec<Multiaddr>,
    /// The next one only when the one before has failed.
    pub(super) in_order: bool,
}

impl Dials {
    /// How to dial a peer that listens at these `IP:PORT` or `HOST:PORT`: on the same link over TCP,
    /// which takes fewer computations; anywhere else over QUIC or, where that does not come through,
    /// TCP.
    pub(super) fn dial(&self, peer: &PeerId, addresses: &[String], links: &Links) -> Dial {
        let split = addresses.iter().filter_map(|a| host_port(a));
        let (near, far): (Vec<_>, Vec<_>) = split.partition(|(host, _)| match host {
            Protocol::Ip4(ip) => links.has((*ip).into()),
            Protocol::Ip6(ip) => links.has((*ip).into()),
            _ => false,
        });
        let seen = self.0.get(peer).copied().unwrap_or_default();
        let quic_too = seen.blocked || seen.refused % QUIC_EVERY == QUIC_EVERY - 1;
        let mut addresses: Vec<Multiaddr> = near.iter().map(tcp).collect();
        let in_order = !near.is_empty() && !quic_too;
        if quic_too {
            addresses.extend(near.iter().map(quic));
        }
        addresses.extend(far.iter().flat_map(|at| [quic(at), tcp(at)]));
        Dial {
            addresses,
            in_order,
        }
    }

    /// A connection was made: over TCP, everything before it is forgotten.
    pub(super) fn connected(&mut self, peer: &PeerId, over_quic: bool) {
        if !over_quic {
            self.0.remove(peer);
        }
    }

    pub(super) fn failed(&mut self, peer: PeerId, error: &DialError) {
        let seen = self.0.entry(peer).or_default();
        match error {
            DialError::Transport(attempts) => {
                let over_tcp =
                    |address: &Multiaddr| address.iter().any(|p| matches!(p, Protocol::Tcp(_)));
                let tried = attempts.iter().filter(|(address, _)| over_tcp(address));
                let (refused, not): (Vec<_>, Vec<_>) = tried.partition(|(_, e)| refused(e));
                seen.blocked = !not.is_empty();
                if !refused.is_empty() {
                    seen.refused = seen.refused.wrapping_add(1);
                }
            }
            // Somebody else has that address.
            DialError::WrongPeerId { .. } | DialError::LocalPeerId { .. } => seen.blocked = true,
            // It was not dialled, or did not come to an end.
            _ => {}
        }
    }

    /// Forgets peers that are no members any more.
    pub(super) fn retain(&mut self, keep: impl Fn(&PeerId) -> bool) {
        self.0.retain(|peer, _| keep(peer));
    }
}

/// The system's error is below wrappers that do not tell it as their source; they only print it.
fn refused(error: &TransportError<io::Error>) -> bool {
    let kind = format!("{:?}", io::ErrorKind::ConnectionRefused);
    format!("{error:?}").contains(&kind)
}

fn host_port(address: &str) -> Option<(Protocol<'_>, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let host = host.trim_matches(['[', ']']);
    let host = match host.parse::<IpAddr>() {
        Ok(ip) => Protocol::from(ip),
        Err(_) => Protocol::Dns(host.into()),
    };
    Some((host, port))
}

fn quic((host, port): &(Protocol<'_>, u16)) -> Multiaddr {
    Multiaddr::empty()
        .with(host.clone())
        .with(Protocol::Udp(*port))
        .with(Protocol::QuicV1)
}

fn tcp((host, port): &(Protocol<'_>, u16)) -> Multiaddr {
    Multiaddr::empty()
        .with(host.clone())
        .with(Protocol::Tcp(*port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dialled(dials: &Dials, peer: &PeerId, addresses: &[&str]) -> Vec<String> {
        let links = ["127.0.0.1/8", "10.1.2.3/24", "fd00::1/64"];
        let links = Links(links.map(|link| link.parse().unwrap()).to_vec());
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let dial = dials.dial(peer, &addresses, &links);
        dial.addresses.iter().map(ToString::to_string).collect()
    }

    /// What a dial over TCP that ended so says, when one over QUIC was not answered either.
    fn failure(kind: io::ErrorKind) -> DialError {
        let wrapped = |kind| io::Error::other(io::Error::other(io::Error::from(kind)));
        let attempt = |at: &str, kind| (at.parse().unwrap(), TransportError::Other(wrapped(kind)));
        DialError::Transport(vec![
            attempt("/ip4/127.0.0.1/tcp/1", kind),
            attempt("/ip4/127.0.0.1/udp/1/quic-v1", io::ErrorKind::TimedOut),
        ])
    }

    #[test]
    fn who_is_near_is_dialled_over_tcp_and_everybody_else_over_quic_first() {
        let (dials, peer) = (Dials::default(), PeerId::random());
        let of = |addresses: &[&str]| dialled(&dials, &peer, addresses);
        assert_eq!(of(&["127.0.0.2:7070"]), ["/ip4/127.0.0.2/tcp/7070"]);
        assert_eq!(of(&["10.1.2.200:1"]), ["/ip4/10.1.2.200/tcp/1"]);
        assert_eq!(of(&["[fd00::9]:1"]), ["/ip6/fd00::9/tcp/1"]);
        assert_eq!(
            of(&["10.1.3.1:1"]),
            ["/ip4/10.1.3.1/udp/1/quic-v1", "/ip4/10.1.3.1/tcp/1"]
        );
        let far = ["/dns/a.example/udp/1/quic-v1", "/dns/a.example/tcp/1"];
        assert_eq!(of(&["a.example:1", "no port"]), far);
        // The link first: somebody else may have that address there.
        let both = of(&["a.example:1", "10.1.2.200:1"]);
        assert_eq!(both, ["/ip4/10.1.2.200/tcp/1", far[0], far[1]]);
    }

    #[test]
    fn quic_is_tried_where_tcp_does_not_come_through() {
        let (mut dials, peer) = (Dials::default(), PeerId::random());
        let tries_quic = |dials: &Dials| dialled(dials, &peer, &["127.0.0.1:1"]).len() == 2;
        let refused = failure(io::ErrorKind::ConnectionRefused);
        let tried: Vec<bool> = (0..2 * QUIC_EVERY)
            .map(|_| {
                let tried = tries_quic(&dials);
                dials.failed(peer, &refused);
                tried
            })
            .collect();
        let wanted = (1..=2 * QUIC_EVERY).map(|number| number % QUIC_EVERY == 0);
        assert!(tried.into_iter().eq(wanted));

        dials.connected(&peer, false);
        dials.failed(peer, &failure(io::ErrorKind::TimedOut));
        assert!(tries_quic(&dials));
        dials.failed(peer, &DialError::Aborted);
        assert!(tries_quic(&dials), "it was not dialled");
        dials.connected(&peer, true);
        assert!(tries_quic(&dials), "that says nothing of TCP");
        dials.connected(&peer, false);
        assert!(!tries_quic(&dials));
    }

    #[test]
    fn this_machine_is_on_its_own_link() {
        assert!(Links::read().has([127, 0, 0, 1].into()));
    }
}
