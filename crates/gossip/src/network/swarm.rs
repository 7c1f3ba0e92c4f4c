//! The swarm with all that it carries, and where it listens.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use krake_model::ids::FederationId;
use krake_model::report::REPORT_BYTES_MAX;
use libp2p::core::{Multiaddr, Transport as _, upgrade};
use libp2p::multiaddr::Protocol;
use libp2p::swarm::SwarmEvent;
use libp2p::{Swarm, SwarmBuilder, allow_block_list, connection_limits, gossipsub, identity, tcp};

use super::abrupt::Abrupt;
use super::upgrade::Upgrade;
use super::{NetworkConfig, NetworkError};
use crate::behaviour::{Behaviour, Inner, MemberSet, MembersOnly};

pub(super) fn build_swarm(
    config: &NetworkConfig,
    key: identity::Keypair,
    members: &MemberSet,
    upgrade: Upgrade,
) -> Result<Swarm<Behaviour>, NetworkError> {
    let start = |reason: String| NetworkError::Start(reason);
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
        .with_quic_config(|mut quic| {
            // Pings find a dead peer sooner; this is for what nobody pings any more.
            quic.max_idle_timeout = 30_000;
            quic.keep_alive_interval = Duration::from_secs(10);
            quic
        })
        .with_other_transport(|_| {
            tcp::tokio::Transport::new(tcp::Config::default().nodelay(true))
                .and_then(|socket, point| async move {
                    if point.is_dialer() {
                        upgrade.outbound(socket).await
                    } else {
                        upgrade.inbound(socket).await
                    }
                })
                .map(|(peer, muxer), _| (peer, Abrupt(muxer)))
        })
        .map_err(|error| start(error.to_string()))?
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

pub(super) fn topic(federation: &FederationId) -> gossipsub::IdentTopic {
    gossipsub::IdentTopic::new(format!("krake/reports/1/{federation}"))
}

pub(super) async fn listen(
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
