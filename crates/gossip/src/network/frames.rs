//! Consensus frames: one ordered stream to each member.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures::StreamExt;
use futures::io::BufReader;
use libp2p::{PeerId, Stream};
use tokio::sync::mpsc;
use tracing::debug;

use super::shared::Shared;
use super::{Handler, node_id};
use crate::streams::{self, CALL_BYTES_MAX, Gathered};

pub(super) async fn write_frames(
    mut queue: mpsc::Receiver<Vec<u8>>,
    mut control: libp2p_stream::Control,
    peer: PeerId,
) {
    let mut stream: Option<Stream> = None;
    let mut gathered = Gathered::default();
    while let Some(frame) = queue.recv().await {
        if stream.is_none() {
            match streams::open(&mut control, peer, streams::FRAMES).await {
                Ok(opened) => stream = Some(opened),
                Err(error) => debug!(%peer, error, "no stream for frames"),
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

pub(super) async fn take_frames(
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
