//! What runs on each connection: everything for members, only the join protocol for others.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::task::{Context, Poll};

use either::Either;
use libp2p::core::transport::PortUse;
use libp2p::core::{Endpoint, Multiaddr};
use libp2p::swarm::{
    ConnectionDenied, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm, dummy,
};
use libp2p::{PeerId, allow_block_list, connection_limits, gossipsub};
use parking_lot::RwLock;

/// The protocols of members.
#[derive(NetworkBehaviour)]
pub(crate) struct Inner {
    pub(crate) gossipsub: gossipsub::Behaviour,
    pub(crate) streams: libp2p_stream::Behaviour,
}

/// All protocols and limits.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    pub(crate) limits: connection_limits::Behaviour,
    pub(crate) blocked: allow_block_list::Behaviour<allow_block_list::BlockedPeers>,
    pub(crate) join: libp2p_stream::Behaviour,
    pub(crate) members: MembersOnly<Inner>,
}

/// Peers that are members.
pub(crate) type MemberSet = Arc<RwLock<BTreeSet<PeerId>>>;

/// Gives the inner behaviour only to connections with peers that were members when the connection
/// was made; on others it does not exist.
pub(crate) struct MembersOnly<B> {
    pub(crate) inner: B,
    members: MemberSet,
    admitted: BTreeSet<ConnectionId>,
}

impl<B> MembersOnly<B> {
    pub(crate) const fn new(inner: B, members: MemberSet) -> Self {
        Self {
            inner,
            members,
            admitted: BTreeSet::new(),
        }
    }

    pub(crate) fn is_admitted(&self, connection: ConnectionId) -> bool {
        self.admitted.contains(&connection)
    }

    fn admits(&mut self, connection: ConnectionId, peer: &PeerId) -> bool {
        let admitted = self.members.read().contains(peer);
        if admitted {
            self.admitted.insert(connection);
        }
        admitted
    }
}

impl<B: NetworkBehaviour> NetworkBehaviour for MembersOnly<B> {
    type ConnectionHandler = Either<B::ConnectionHandler, dummy::ConnectionHandler>;
    type ToSwarm = B::ToSwarm;

    fn handle_established_inbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if self.admits(connection, &peer) {
            self.inner
                .handle_established_inbound_connection(connection, peer, local, remote)
                .map(Either::Left)
        } else {
            Ok(Either::Right(dummy::ConnectionHandler))
        }
    }

    fn handle_established_outbound_connection(
        &mut self,
        connection: ConnectionId,
        peer: PeerId,
        address: &Multiaddr,
        role: Endpoint,
        port_use: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        if self.admits(connection, &peer) {
            self.inner
                .handle_established_outbound_connection(connection, peer, address, role, port_use)
                .map(Either::Left)
        } else {
            Ok(Either::Right(dummy::ConnectionHandler))
        }
    }

    fn on_swarm_event(&mut self, event: FromSwarm) {
        let concerns = match &event {
            FromSwarm::ConnectionEstablished(made) => self.admitted.contains(&made.connection_id),
            FromSwarm::ConnectionClosed(closed) => self.admitted.remove(&closed.connection_id),
            FromSwarm::AddressChange(change) => self.admitted.contains(&change.connection_id),
            FromSwarm::ListenFailure(failure) => {
                self.admitted.remove(&failure.connection_id);
                true
            }
            FromSwarm::DialFailure(failure) => {
                self.admitted.remove(&failure.connection_id);
                true
            }
            _ => true,
        };
        if concerns {
            self.inner.on_swarm_event(event);
        }
    }

    fn on_connection_handler_event(
        &mut self,
        peer: PeerId,
        connection: ConnectionId,
        event: THandlerOutEvent<Self>,
    ) {
        match event {
            Either::Left(event) => self
                .inner
                .on_connection_handler_event(peer, connection, event),
            Either::Right(never) => match never {},
        }
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<ToSwarm<Self::ToSwarm, THandlerInEvent<Self>>> {
        self.inner
            .poll(cx)
            .map(|to_swarm| to_swarm.map_in(Either::Left))
    }
}
