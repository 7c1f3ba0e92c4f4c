//! Requests to join, from those who need not be members.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::Semaphore;
use tracing::debug;

use super::shared::{OUTSIDER_TIME, Shared};
use super::{Handler, node_id};
use crate::streams::{self, JOIN_BYTES_MAX};

/// Whoever asks to join says so at once: others wait for the place.
const REQUEST_TIME: Duration = Duration::from_secs(3);

pub(super) async fn take_joins(
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
                let request = streams::read(&mut stream, JOIN_BYTES_MAX);
                let request = tokio::time::timeout(REQUEST_TIME, request).await.ok()?;
                let request = request.ok()??;
                let result = handler.join(node, &request).await;
                shared.asks_to_join(peer);
                streams::answer(&mut stream, result).await.ok()
            };
            let _ = tokio::time::timeout(OUTSIDER_TIME, work).await;
        });
    }
}
