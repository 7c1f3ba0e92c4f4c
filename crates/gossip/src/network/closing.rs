//! A close that comes to an end.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt;
use libp2p::core::StreamMuxer;
use libp2p::core::muxing::StreamMuxerEvent;
use tokio::time::Sleep;

/// What is still on its way to the peer has this long when a connection is closed.
const CLOSE_TIME: Duration = Duration::from_secs(1);

/// A connection that is closed [`CLOSE_TIME`] after it was asked to close, whatever the peer does.
/// The multiplexer itself waits until all it has written is taken, and where the peer takes nothing
/// any more that is until the system gives the connection up, many minutes later; so long the library
/// counts the peer as connected and nobody dials it.
pub(super) struct Closing<M> {
    muxer: M,
    ends: Option<Pin<Box<Sleep>>>,
}

impl<M> Closing<M> {
    pub(super) const fn new(muxer: M) -> Self {
        Self { muxer, ends: None }
    }
}

impl<M: StreamMuxer + Unpin> StreamMuxer for Closing<M> {
    type Substream = M::Substream;
    type Error = M::Error;

    fn poll_inbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.muxer).poll_inbound(cx)
    }

    fn poll_outbound(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Self::Substream, Self::Error>> {
        Pin::new(&mut self.muxer).poll_outbound(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        if let Poll::Ready(closed) = Pin::new(&mut self.muxer).poll_close(cx) {
            return Poll::Ready(closed);
        }
        let ends = self
            .ends
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(CLOSE_TIME)));
        ends.poll_unpin(cx).map(Ok)
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<StreamMuxerEvent, Self::Error>> {
        Pin::new(&mut self.muxer).poll(cx)
    }
}
