//! The view: the newest report of each site, as this node has it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use krake_model::ids::NodeId;
use krake_model::report::{SignedReport, SiteReport};
use serde::{Deserialize, Serialize};

/// A report in the view.
#[derive(Debug, Clone)]
pub struct Seen {
    /// What it says.
    pub report: Arc<SiteReport>,
    /// As it travels.
    pub signed: Arc<SignedReport>,
    /// When it arrived here, by this node's monotonic clock: staleness never rests on the
    /// reporter's clock.
    pub arrived: Instant,
}

impl Seen {
    /// How long ago it arrived.
    pub fn age(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.arrived)
    }
}

/// Newest report per node.
pub type View = BTreeMap<NodeId, Seen>;

/// Which report of each node somebody has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Digest(pub(crate) BTreeMap<NodeId, (u64, u64)>);

/// Answer to a digest: what the asker lacks.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Missing(pub(crate) Vec<SignedReport>);

pub(crate) fn digest(view: &View) -> Digest {
    Digest(
        view.iter()
            .map(|(node, seen)| (*node, seen.report.freshness()))
            .collect(),
    )
}

/// The reports of `view` that are newer than what `digest` has, at most `bytes` of them.
pub(crate) fn missing(view: &View, digest: &Digest, bytes: usize) -> Missing {
    let mut left = bytes;
    let mut reports = Vec::new();
    for (node, seen) in view {
        let known = digest.0.get(node).copied();
        if known.is_some_and(|known| known >= seen.report.freshness()) {
            continue;
        }
        let size = seen.signed.payload.len() + 64;
        if size > left {
            break;
        }
        left -= size;
        reports.push((*seen.signed).clone());
    }
    Missing(reports)
}

/// Takes a report if it is newer than the one there; `true` when it was taken.
pub(crate) fn insert(
    view: &mut View,
    signed: SignedReport,
    report: SiteReport,
    now: Instant,
) -> bool {
    let node = report.node;
    if view
        .get(&node)
        .is_some_and(|old| old.report.freshness() >= report.freshness())
    {
        return false;
    }
    view.insert(
        node,
        Seen {
            report: Arc::new(report),
            signed: Arc::new(signed),
            arrived: now,
        },
    );
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use krake_model::time::Timestamp;

    fn report(node: u8, boot: u64, sequence: u64) -> (SignedReport, SiteReport) {
        let report = SiteReport {
            node: NodeId::from_bytes([node; 32]),
            boot,
            sequence,
            observed_at: Timestamp::from_millis(0),
            metrics: BTreeMap::new(),
            backends: BTreeMap::new(),
            rtts_micros: BTreeMap::new(),
            unreachable: BTreeMap::new(),
            version: String::new(),
        };
        let signed = SignedReport {
            payload: vec![0; 100],
            signature: [[0; 32]; 2],
        };
        (signed, report)
    }

    fn view(reports: &[(u8, u64, u64)]) -> View {
        let mut view = View::new();
        for (node, boot, sequence) in reports {
            let (signed, report) = report(*node, *boot, *sequence);
            insert(&mut view, signed, report, Instant::now());
        }
        view
    }

    #[test]
    fn newest_wins_and_a_restart_is_newer() {
        let mut view = view(&[(1, 1, 50)]);
        let (signed, old) = report(1, 1, 49);
        assert!(!insert(&mut view, signed, old, Instant::now()));
        let (signed, restarted) = report(1, 2, 0);
        assert!(insert(&mut view, signed, restarted, Instant::now()));
    }

    #[test]
    fn one_exchange_brings_everything_a_late_joiner_lacks() {
        let full = view(&[(1, 1, 5), (2, 1, 7), (3, 4, 0)]);
        let late = view(&[(3, 4, 0)]);
        assert_eq!(missing(&full, &digest(&late), usize::MAX).0.len(), 2);
        assert_eq!(missing(&full, &digest(&late), 200).0.len(), 1);
        assert!(missing(&full, &digest(&full), usize::MAX).0.is_empty());
    }
}
