//! What became of the copies, noted and told to their owners until they have it.

use std::collections::BTreeMap;
use std::time::Duration;

use krake_driver::{Observed, Phase};
use krake_model::NodeId;
use krake_model::application::Assignment;
use tracing::debug;

use super::{Agent, CopyKey, SiteBackend};
use crate::net::ask;
use crate::records::{self, CopyReport, ReportedState};
use crate::rpc::{Reply, Request};

/// How often reports are sent that their owner has not taken.
const SEND_INTERVAL: Duration = Duration::from_millis(500);
/// Reports in one call.
const REPORTS_AT_ONCE: usize = 100;

impl Agent {
    pub(super) fn note_observed(
        &self,
        backend: &SiteBackend,
        assignment: &Assignment,
        observed: &Observed,
    ) {
        let state = match observed.phase {
            Phase::Progressing => ReportedState::Progressing,
            Phase::Ready => ReportedState::Ready,
            Phase::Degraded => ReportedState::Degraded,
        };
        if observed.phase == Phase::Ready {
            let key = (assignment.uid, backend.name.clone());
            self.inner.work.lock().settled.insert(key);
        }
        self.note(
            assignment,
            Some(observed),
            state,
            observed.message.clone(),
            false,
        );
    }

    pub(super) fn note(
        &self,
        assignment: &Assignment,
        observed: Option<&Observed>,
        state: ReportedState,
        message: Option<String>,
        retry_elsewhere: bool,
    ) {
        let report = CopyReport {
            uid: assignment.uid,
            app: assignment.app.clone(),
            node: self.inner.federation.own,
            backend: assignment.backend.clone(),
            epoch: assignment.epoch,
            state,
            ready: observed.map_or(0, |o| o.ready),
            wanted: observed.map_or(0, |o| o.wanted),
            namespace: observed.map(|o| o.namespace.clone()),
            message,
            retry_elsewhere,
        };
        self.keep_report(report);
    }

    fn keep_report(&self, report: CopyReport) {
        let key = (report.uid, report.backend.clone());
        {
            let mut work = self.inner.work.lock();
            if work.reports.get(&key) == Some(&report) {
                return;
            }
            work.reports.insert(key.clone(), report);
            work.unsent.insert(key);
        }
        self.inner.unsent.notify_one();
    }

    pub(super) async fn send_reports(self) {
        let mut retry = tokio::time::interval(SEND_INTERVAL);
        retry.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.inner.unsent.notified() => {}
                _ = retry.tick() => {}
            }
            let unsent: Vec<(CopyKey, CopyReport)> = {
                let work = self.inner.work.lock();
                work.unsent
                    .iter()
                    .filter_map(|key| Some((key.clone(), work.reports.get(key)?.clone())))
                    .collect()
            };
            if !unsent.is_empty() {
                self.send(unsent).await;
            }
        }
    }

    async fn send(&self, unsent: Vec<(CopyKey, CopyReport)>) {
        let catalog = &self.inner.federation.catalog;
        let mut by_leader: BTreeMap<NodeId, Vec<(CopyKey, CopyReport)>> = BTreeMap::new();
        let status = catalog.host.status().borrow().clone();
        for (key, report) in unsent {
            let group = catalog.group_of(&report.app);
            let leader = status.get(&group).and_then(|s| s.leader);
            let node = leader.and_then(|replica| catalog.host.node_of(replica));
            if let Some(node) = node {
                by_leader.entry(node).or_default().push((key, report));
            }
        }
        let sends = by_leader
            .into_iter()
            .map(|(node, reports)| self.send_to(node, reports));
        futures::future::join_all(sends).await;
    }

    async fn send_to(&self, node: NodeId, reports: Vec<(CopyKey, CopyReport)>) {
        for chunk in reports.chunks(REPORTS_AT_ONCE) {
            let taken: Vec<bool> = if node == self.inner.federation.own {
                let mut taken = Vec::new();
                for (_, report) in chunk {
                    taken.push(self.inner.local_owner.send(report.clone()).await.is_ok());
                }
                taken
            } else {
                let bodies = chunk
                    .iter()
                    .map(|(_, report)| records::write(report).to_vec())
                    .collect();
                match ask(
                    &self.inner.federation.network,
                    node,
                    &Request::Copies(bodies),
                )
                .await
                {
                    Ok(Reply::Noted(taken)) => taken,
                    Ok(_) => return,
                    Err(error) => {
                        debug!(%node, error, "an owner could not be told");
                        return;
                    }
                }
            };
            let mut work = self.inner.work.lock();
            for ((key, sent), taken) in chunk.iter().zip(taken) {
                if taken && work.reports.get(key) == Some(sent) {
                    work.unsent.remove(key);
                    if sent.state == ReportedState::Gone {
                        work.reports.remove(key);
                    }
                }
            }
        }
    }
}
