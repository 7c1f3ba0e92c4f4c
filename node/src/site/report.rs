//! The site's report: built when something changed or time is up, signed, gossiped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use krake_model::report::{BackendReport, RTTS_MAX, SiteReport};
use krake_model::{NodeId, Resources, SignedReport};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tracing::warn;

use crate::datadir::Identity;
use crate::federation::{Federation, now};
use crate::site::agent::Agent;

/// How often it is looked whether a report is due.
const LOOK: Duration = Duration::from_millis(250);

/// Builds and publishes reports.
pub struct Reporter {
    federation: Federation,
    agent: Agent,
    identity: Arc<Identity>,
    boot: u64,
    interval: Duration,
    metrics: Mutex<BTreeMap<String, f64>>,
    changed: Notify,
}

/// [`RTTS_MAX`] of them, other ones in the next report.
fn in_turns(
    rtts: &BTreeMap<NodeId, Duration>,
    sequence: u64,
) -> impl Iterator<Item = (&NodeId, &Duration)> {
    let turns = rtts.len().div_ceil(RTTS_MAX).max(1) as u64;
    let first = (sequence % turns) as usize * RTTS_MAX;
    rtts.iter().skip(first).take(RTTS_MAX)
}

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reporter").finish_non_exhaustive()
    }
}

impl Reporter {
    /// A reporter with the configured metrics.
    pub fn new(
        federation: Federation,
        agent: Agent,
        identity: Arc<Identity>,
        boot: u64,
        interval: Duration,
        metrics: BTreeMap<String, f64>,
    ) -> Arc<Self> {
        Arc::new(Self {
            federation,
            agent,
            identity,
            boot,
            interval,
            metrics: Mutex::new(metrics),
            changed: Notify::new(),
        })
    }

    /// Changes a metric from now on (a testnet's fault injection).
    pub fn set_metric(&self, name: &str, value: f64) {
        self.metrics.lock().insert(name.to_owned(), value);
        self.changed.notify_one();
    }

    /// Publishes until the program ends.
    pub async fn run(self: Arc<Self>) {
        let mut sequence = 0;
        let mut unheard = self.federation.network.unheard();
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last = tokio::time::Instant::now();
        let mut first = true;
        let mut changed = false;
        let mut site = self.agent.changes();
        loop {
            tokio::select! {
                () = self.changed.notified() => changed = true,
                Ok(()) = site.changed() => changed = true,
                _ = look.tick() => {
                    let now = self.federation.network.unheard();
                    changed |= !now.keys().eq(unheard.keys());
                    unheard = now;
                }
            }
            let members = self.federation.network.member_count();
            let wait = if changed {
                krake_gossip::report_spacing(members)
            } else {
                krake_gossip::report_interval(members).max(self.interval)
            };
            if !first && last.elapsed() < wait {
                continue;
            }
            (first, changed) = (false, false);
            sequence += 1;
            last = tokio::time::Instant::now();
            let report = self.build(sequence);
            let id = self.federation.genesis.federation_id();
            let signed = id
                .and_then(|id| SignedReport::sign(&report, &id, |bytes| self.identity.sign(bytes)));
            match signed {
                Ok(signed) => self.federation.network.publish(signed).await,
                Err(error) => warn!(%error, "the report could not be made"),
            }
        }
    }

    fn build(&self, sequence: u64) -> SiteReport {
        let mut metrics = self.metrics.lock().clone();
        let rtts = self.federation.network.rtts();
        let mut sorted: Vec<Duration> = rtts.values().copied().collect();
        sorted.sort();
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or_default();
        metrics
            .entry("latency".to_owned())
            .or_insert(median.as_secs_f64() * 1000.0);
        let mut backends = BTreeMap::new();
        let (mut total_cpu, mut free_cpu) = (0, 0);
        for backend in self.agent.backends() {
            let report = match self.agent.offer(backend) {
                Ok((total, free, reserved)) => {
                    total_cpu += total.cpu_millis;
                    free_cpu += free.cpu_millis;
                    BackendReport {
                        healthy: true,
                        message: String::new(),
                        total,
                        free,
                        reserved,
                    }
                }
                Err(message) => BackendReport {
                    healthy: false,
                    message,
                    total: Resources::ZERO,
                    free: Resources::ZERO,
                    reserved: Resources::ZERO,
                },
            };
            backends.insert(backend.name.clone(), report);
        }
        if total_cpu > 0 {
            let load = 1.0 - free_cpu as f64 / total_cpu as f64;
            metrics.entry("load".to_owned()).or_insert(load);
        }
        SiteReport {
            node: self.federation.own,
            boot: self.boot,
            sequence,
            observed_at: now(),
            metrics,
            backends,
            rtts_micros: in_turns(&rtts, sequence)
                .map(|(node, rtt)| (*node, rtt.as_micros() as u64))
                .collect(),
            unreachable: self
                .federation
                .network
                .unheard()
                .into_iter()
                .map(|(node, silence)| (node, silence.as_millis() as u64))
                .collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}
