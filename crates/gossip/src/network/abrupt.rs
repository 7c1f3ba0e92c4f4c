//! Connections over TCP that end at once.

use std::pin::Pin;
use std::task::{Context, Poll};

use libp2p::core::StreamMuxer;
use libp2p::core::muxing::StreamMuxerEvent;

/// A connection that is dropped where it would be closed. Yamux closes when the peer has taken all
/// that was written to it. A peer that was cut off takes nothing: until the system gives the
/// connection up, many minutes later, the library would count it as connected and dial nobody. And
/// whoever reads from a stream of a connection that was closed here would never be woken; of one that
/// is dropped it is (`yamux` 0.14, `connection.rs`).
///
/// What was written last may be lost. It is closed only where nothing is expected of it any more.
pub(super) struct Abrupt<M>(pub(super) M);

impl<M: StreamMuxer + Unpin> StreamMuxer for Abrupt<M> {
    type Substream = M::Substream;
    type Error = M::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.0).poll_inbound(cx)
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.0).poll_outbound(cx)
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<StreamMuxerEvent, Self::Error>> {
        Pin::new(&mut self.0).poll(cx)
    }
}
