//! By which transport a member is dialled (ADR 0013).

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use libp2p::PeerId;
use libp2p::core::Multiaddr;
use libp2p::core::transport::TransportError;
use libp2p::multiaddr::Protocol;
use libp2p::swarm::DialError;
use tracing::warn;

/// Whoever is on the same link and refuses TCP is not there, or something on the way refuses it:
/// one dial of so many tries QUIC, too.
const QUIC_EVERY: u32 = 8;

/// Networks this node is attached to: its own machine, and links that are no tunnels.
pub(super) struct Links(Vec<IpNet>);

impl Links {
    /// As they are now; without any where the system does not say.
    pub(super) fn read() -> Self {
        let interfaces = if_addrs::get_if_addrs().unwrap_or_else(|error| {
            warn!(%error, "the network interfaces cannot be read: every member counts as far away");
            Vec::new()
        });
        let near = interfaces.iter().filter(|interface| !interface.is_p2p());
        let networks = near.filter_map(|interface| match &interface.addr {
            if_addrs::IfAddr::V4(own) => IpNet::new(own.ip.into(), own.prefixlen).ok(),
            if_addrs::IfAddr::V6(own) => IpNet::new(own.ip.into(), own.prefixlen).ok(),
        });
        Self(networks.collect())
    }

    fn has(&self, ip: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&ip))
    }
}

/// Dials that failed, since the last one of a peer that did not.
#[derive(Default)]
pub(super) struct Dials(BTreeMap<PeerId, u32>);

impl Dials {
    /// Where to dial a peer that listens at these `IP:PORT` or `HOST:PORT`, best first: on the same
    /// link over TCP, which takes fewer computations; anywhere else over QUIC or, where that does
    /// not come through, TCP.
    pub(super) fn addresses(
        &self,
        peer: &PeerId,
        addresses: &[String],
        links: &Links,
    ) -> Vec<Multiaddr> {
        let split: Vec<(Protocol<'_>, u16)> =
            addresses.iter().filter_map(|a| host_port(a)).collect();
        let near: Vec<&(Protocol<'_>, u16)> = split
            .iter()
            .filter(|(host, _)| match host {
                Protocol::Ip4(ip) => links.has((*ip).into()),
                Protocol::Ip6(ip) => links.has((*ip).into()),
                _ => false,
            })
            .collect();
        let failed = self.0.get(peer).copied().unwrap_or(0);
        if near.is_empty() || failed % QUIC_EVERY == QUIC_EVERY - 1 {
            let both = split.iter().flat_map(|at| [quic(at), tcp(at)]);
            both.collect()
        } else {
            near.into_iter().map(tcp).collect()
        }
    }

    pub(super) fn connected(&mut self, peer: &PeerId) {
        self.0.remove(peer);
    }

    /// What does not say at once that nobody listens does not come through: the next dial tries
    /// everything.
    pub(super) fn failed(&mut self, peer: PeerId, error: &DialError) {
        let failed = self.0.entry(peer).or_default();
        match error {
            DialError::Transport(attempts) if attempts.iter().all(|(_, error)| refused(error)) => {
                *failed = failed.wrapping_add(1);
            }
            DialError::Transport(_) => *failed = QUIC_EVERY - 1,
            // It was not dialled, or did not come to an end.
            _ => {}
        }
    }

    /// Forgets peers that are no members any more.
    pub(super) fn retain(&mut self, keep: impl Fn(&PeerId) -> bool) {
        self.0.retain(|peer, _| keep(peer));
    }
}

fn refused(error: &TransportError<io::Error>) -> bool {
    let TransportError::Other(error) = error else {
        return false;
    };
    // Each transport wraps it once more.
    let mut error: &(dyn std::error::Error + 'static) = error;
    loop {
        let io = error.downcast_ref::<io::Error>();
        if io.is_some_and(|io| io.kind() == io::ErrorKind::ConnectionRefused) {
            return true;
        }
        match super::swarm::cause(error) {
            Some(inner) => error = inner,
            None => return false,
        }
    }
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
        let dialled = dials.addresses(peer, &addresses, &links);
        dialled.iter().map(ToString::to_string).collect()
    }

    fn failure(kind: io::ErrorKind) -> DialError {
        let wrapped = io::Error::other(io::Error::other(io::Error::from(kind)));
        DialError::Transport(vec![(Multiaddr::empty(), TransportError::Other(wrapped))])
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
        assert_eq!(
            of(&["a.example:1", "no port"]),
            ["/dns/a.example/udp/1/quic-v1", "/dns/a.example/tcp/1"]
        );
        // The way over the link is the shorter one.
        assert_eq!(
            of(&["a.example:1", "10.1.2.200:1"]),
            ["/ip4/10.1.2.200/tcp/1"]
        );
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
        assert_eq!(tried.iter().filter(|tried| **tried).count(), 2);
        assert!(!tried[0] && tried[QUIC_EVERY as usize - 1]);

        dials.connected(&peer);
        dials.failed(peer, &failure(io::ErrorKind::TimedOut));
        assert!(tries_quic(&dials));
        dials.failed(peer, &DialError::Aborted);
        assert!(tries_quic(&dials), "it was not dialled");
        dials.connected(&peer);
        assert!(!tries_quic(&dials));
    }

    #[test]
    fn this_machine_is_on_its_own_link() {
        assert!(Links::read().has([127, 0, 0, 1].into()));
    }
}
