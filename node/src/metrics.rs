//! What `/metrics` shows, in the OpenMetrics text format.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::federation::Federation;

/// Of the answer.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Everything this node counts. `owned`: the applications it decides about.
///
/// # Errors
/// When it cannot be written as text.
pub fn text(federation: &Federation, owned: usize) -> Result<String, std::fmt::Error> {
    let mut registry = Registry::with_prefix("krake");
    gauges(&mut registry, federation, owned);
    counters(&mut registry, federation);
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

fn gauges(registry: &mut Registry, federation: &Federation, owned: usize) {
    let mut gauge = |name: &str, help: &str, value: usize| {
        let gauge: Gauge = Gauge::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    };
    let groups = federation.catalog.host.status().borrow().clone();
    gauge("groups", "Groups with a replica here", groups.len());
    let led = groups.values().filter(|group| group.leads).count();
    gauge("groups_led", "Groups this node leads", led);
    let counters = federation.catalog.host.counters();
    let ahead = counters.stamps_ahead_ms.load(Ordering::Relaxed) / 1000;
    gauge(
        "stamps_ahead_seconds",
        "How far the catalog's stamps are ahead of this node's clock",
        ahead as usize,
    );
    let leaderless = groups
        .values()
        .filter(|group| group.leader.is_none())
        .count();
    gauge(
        "groups_without_leader",
        "Groups whose leader is not known here",
        leaderless,
    );
    gauge("apps_owned", "Applications this node decides about", owned);
    gauge(
        "members",
        "Members of the federation",
        federation.catalog.members().len(),
    );
    let connected = federation.network.connected().borrow().len();
    gauge(
        "peers_connected",
        "Members with a connection now",
        connected,
    );
    gauge(
        "peers_silent",
        "Members not heard of lately",
        federation.network.unheard().len(),
    );
    gauge(
        "disk_full",
        "1 while there is no room for the catalog and this node is read-only",
        usize::from(federation.catalog.host.is_full()),
    );
    let bytes: u64 = groups
        .keys()
        .map(|group| federation.catalog.host.size(*group).1)
        .sum();
    gauge("catalog_bytes", "Bytes the catalog holds", bytes as usize);
    let followed = groups.values().filter(|group| !group.leads).count();
    gauge(
        "groups_followed",
        "Groups with a replica here that another node leads, or nobody",
        followed,
    );
}

fn counters(registry: &mut Registry, federation: &Federation) {
    let traffic = federation.network.traffic();
    let consensus = federation.catalog.host.counters();
    for (name, help, counted) in [
        (
            "consensus_terms",
            "Terms that began, over all groups",
            &consensus.terms,
        ),
        (
            "consensus_leader_changes",
            "Times another leader, or none, was found",
            &consensus.leader_changes,
        ),
        (
            "consensus_proposals",
            "Commands proposed here",
            &consensus.proposals,
        ),
        (
            "consensus_applied_entries",
            "Log entries applied",
            &consensus.applied,
        ),
        (
            "consensus_reads",
            "Reads that asked for confirmation",
            &consensus.reads,
        ),
        (
            "consensus_writes",
            "Rounds written to the log and synced",
            &consensus.writes,
        ),
        (
            "consensus_refused_messages",
            "Messages of other members that were refused",
            &consensus.refused,
        ),
        (
            "consensus_snapshots_sent",
            "Snapshots sent to other replicas",
            &consensus.snapshots_sent,
        ),
        (
            "consensus_snapshot_pieces_sent",
            "Pieces of large snapshots sent to other replicas, repeated ones too",
            &consensus.snapshot_pieces_sent,
        ),
        (
            "consensus_snapshots_installed",
            "Snapshots of other replicas that were installed",
            &consensus.snapshots_installed,
        ),
        (
            "frames",
            "Consensus frames from other nodes",
            &traffic.frames,
        ),
        (
            "questions",
            "Questions and pings from other nodes",
            &traffic.questions,
        ),
        ("reports", "Reports over gossip", &traffic.reports),
        (
            "connections",
            "Connections made with other nodes",
            &traffic.connections,
        ),
        (
            "quic_connections",
            "Connections made with other nodes over QUIC; the others are over TCP",
            &traffic.quic_connections,
        ),
        (
            "direct_connections",
            "Connections made with other nodes on one link for consensus frames alone, beside the others",
            &traffic.direct_connections,
        ),
    ] {
        let counter: Counter = Counter::default();
        counter.inc_by(counted.load(Ordering::Relaxed));
        registry.register(name, help, counter);
    }
    let seconds: Counter<f64, AtomicU64> = Counter::default();
    seconds.inc_by(consensus.write_micros.load(Ordering::Relaxed) as f64 / 1e6);
    registry.register_with_unit(
        "consensus_write",
        "Time that rounds took to be written and synced",
        Unit::Seconds,
        seconds,
    );
}
