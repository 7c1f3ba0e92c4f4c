//! Pings: signs of life from members that were silent for long, and round-trip times.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use krake_model::ids::NodeId;
use libp2p::PeerId;
use tokio::sync::mpsc;
use tracing::debug;

use super::peer_id;
use super::shared::Shared;
use crate::calls::Lines;
use crate::pace;

/// A connection on which a ping is not answered for this long is closed.
const PING_TIME: Duration = Duration::from_secs(4);

/// Asks for signs of life.
pub(super) struct Pinger {
    lines: Arc<Lines>,
    streams: libp2p_stream::Control,
    /// When each member was asked last.
    asked: BTreeMap<NodeId, Instant>,
}

impl Pinger {
    pub(super) const fn new(lines: Arc<Lines>, streams: libp2p_stream::Control) -> Self {
        Self {
            lines,
            streams,
            asked: BTreeMap::new(),
        }
    }

    /// Pings members that were silent for long or whose round-trip time is old.
    pub(super) fn look(
        &mut self,
        shared: &Arc<Shared>,
        unanswered: &mpsc::Sender<PeerId>,
        now: Instant,
    ) {
        let count = shared.members.read().len();
        let (silence, interval) = (pace::ping_after(count), pace::rtt_interval(count));
        let connected = shared.connected.borrow().clone();
        self.asked.retain(|node, _| connected.contains(node));
        let heard = shared.heard.read().clone();
        for node in connected {
            let since = |at: Option<&Instant>| {
                at.map_or(Duration::MAX, |at| now.saturating_duration_since(*at))
            };
            let asked = since(self.asked.get(&node));
            let silent = since(heard.get(&node).map(|heard| &heard.over_swarm));
            let due = asked >= interval || asked.min(silent) >= silence;
            let Some(peer) = peer_id(node).filter(|_| due) else {
                continue;
            };
            self.asked.insert(node, now);
            self.ping(shared, unanswered, (node, peer), PING_TIME);
        }
    }

    pub(super) fn ping(
        &self,
        shared: &Arc<Shared>,
        unanswered: &mpsc::Sender<PeerId>,
        (node, peer): (NodeId, PeerId),
        patience: Duration,
    ) {
        let (lines, streams) = (Arc::clone(&self.lines), self.streams.clone());
        let (shared, unanswered) = (Arc::downgrade(shared), unanswered.clone());
        tokio::spawn(async move {
            let runtime = tokio::runtime::Handle::current();
            let start = Instant::now();
            let ping = lines.ping(&runtime, &streams, (node, peer));
            match tokio::time::timeout(patience, ping).await {
                Ok(Ok(())) => {
                    if let Some(shared) = shared.upgrade() {
                        shared.measured(node, start.elapsed());
                    }
                }
                Ok(Err(fault)) => debug!(%node, ?fault, "no ping"),
                Err(_) => {
                    let _ = unanswered.send(peer).await;
                }
            }
        });
    }
}
