//! The agent: makes each backend run exactly what the catalog assigns to this site.
//!
//! Level-triggered per app: look at the catalog, look at the backend, act, report; again whenever
//! one of them changes, and after a pause when something failed.

mod capacity;
mod reconcile;
mod reports;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use krake_consensus::Batch;
use krake_driver::{Backend, Inventory};
use krake_model::{AppKey, AppUid, Epoch, NodeId, Resources};
use parking_lot::Mutex;
use tokio::sync::{Notify, broadcast::error::RecvError, mpsc, watch};
use tracing::warn;

use crate::federation::Federation;
use crate::records::{self, AssignRecord, CopyReport, Tombstone};
use crate::site::ledger::Ledger;
use crate::site::reservations::Reservations;

/// Pauses after a failure, doubling.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// Apps worked on at once.
const AT_ONCE: usize = 32;
/// Everything is looked at again this often, whatever was or was not noticed.
const RESYNC_INTERVAL: Duration = Duration::from_secs(60);

/// One backend of the site.
pub struct SiteBackend {
    /// Its name.
    pub name: String,
    /// It.
    pub driver: Arc<dyn Backend>,
    /// What it had when it was last asked, or why it did not answer.
    pub inventory: Mutex<Result<Inventory, String>>,
    /// Capacity promised to owners.
    pub reservations: Mutex<Reservations>,
}

impl std::fmt::Debug for SiteBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SiteBackend")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Copies by app and backend.
type CopyKey = (AppUid, String);

#[derive(Debug, Default)]
struct Work {
    /// Apps to look at.
    dirty: BTreeSet<AppKey>,
    /// Apps being worked on; looked at again afterwards when they are dirty then.
    busy: BTreeSet<AppKey>,
    /// Pause after the next failure.
    pauses: BTreeMap<AppKey, Duration>,
    /// What was last found out about each copy.
    reports: BTreeMap<CopyKey, CopyReport>,
    /// Reports the owner does not have yet.
    unsent: BTreeSet<CopyKey>,
    /// The assignment each copy was brought to, in this run of the program.
    applied: BTreeMap<CopyKey, Epoch>,
    /// What carried our mark when this node started, until it is known to be gone.
    orphans: BTreeMap<AppKey, BTreeSet<AppUid>>,
    /// Ready copies whose promise ends when capacity is next read.
    settled: BTreeSet<CopyKey>,
}

/// The agent. Cheap to clone.
#[derive(Clone)]
pub struct Agent {
    inner: Arc<Inner>,
}

struct Inner {
    federation: Federation,
    backends: Vec<Arc<SiteBackend>>,
    ledger: Arc<Ledger>,
    limit: Resources,
    reservation_ttl: Duration,
    work: Mutex<Work>,
    wake: Notify,
    unsent: Notify,
    /// Rises when capacity, health or served kinds changed.
    changed: watch::Sender<u64>,
    local_owner: mpsc::Sender<CopyReport>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").finish_non_exhaustive()
    }
}

impl Agent {
    /// An agent; `local_owner` takes reports of apps that this very node owns.
    pub fn new(
        federation: Federation,
        backends: Vec<Arc<SiteBackend>>,
        ledger: Ledger,
        limit: Resources,
        reservation_ttl: Duration,
        local_owner: mpsc::Sender<CopyReport>,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                federation,
                backends,
                ledger: Arc::new(ledger),
                limit,
                reservation_ttl,
                work: Mutex::default(),
                wake: Notify::new(),
                unsent: Notify::new(),
                changed: watch::Sender::new(0),
                local_owner,
            }),
        }
    }

    /// Starts the tasks; they run until the program ends.
    pub fn start(&self) {
        for backend in &self.inner.backends {
            tokio::spawn(self.clone().follow_backend(Arc::clone(backend)));
            tokio::spawn(self.clone().follow_inventory(Arc::clone(backend)));
        }
        tokio::spawn(self.clone().follow_catalog());
        tokio::spawn(self.clone().follow_leaders());
        tokio::spawn(self.clone().dispatch());
        tokio::spawn(self.clone().send_reports());
    }

    /// The backends.
    pub fn backends(&self) -> &[Arc<SiteBackend>] {
        &self.inner.backends
    }

    /// Apps that this site runs, or was told to run and could not be told otherwise.
    pub fn apps(&self) -> Vec<AppKey> {
        self.inner.ledger.apps()
    }

    /// Wakes when capacity, health or served kinds changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    fn look_at(&self, apps: impl IntoIterator<Item = AppKey>) {
        let mut apps = apps.into_iter().peekable();
        if apps.peek().is_none() {
            return;
        }
        self.inner.work.lock().dirty.extend(apps);
        self.inner.wake.notify_one();
    }

    /// Apps that concern this site: assigned to it, or once run here.
    fn all_apps(&self) -> Vec<AppKey> {
        let catalog = &self.inner.federation.catalog;
        let own = self.inner.federation.own;
        let mut apps = self.inner.ledger.apps();
        apps.extend(self.inner.work.lock().orphans.keys().cloned());
        for group in catalog.shard_groups() {
            for (_, assign, _) in catalog.read_all::<AssignRecord>(group, records::ASSIGN) {
                if listed_in(&assign, own) {
                    apps.push(assign.app);
                }
            }
            for (_, tomb, _) in catalog.read_all::<Tombstone>(group, records::TOMBS) {
                if tomb.targets.iter().any(|target| target.node == own) {
                    apps.push(tomb.app);
                }
            }
        }
        apps
    }

    async fn follow_catalog(self) {
        let host = &self.inner.federation.catalog.host;
        let mut batches = host.watch(&[records::ASSIGN, records::TOMBS]);
        let mut resync = tokio::time::interval(RESYNC_INTERVAL);
        loop {
            tokio::select! {
                received = batches.recv() => match received {
                    Ok(round) if round.iter().any(|batch| batch.reset) => {
                        self.look_at(self.all_apps());
                    }
                    Ok(round) => self.look_at(self.concerned(&round)),
                    Err(RecvError::Lagged(_)) => self.look_at(self.all_apps()),
                    Err(RecvError::Closed) => return,
                },
                _ = resync.tick() => self.look_at(self.all_apps()),
            }
        }
    }

    fn concerned(&self, round: &[Batch]) -> Vec<AppKey> {
        let own = self.inner.federation.own;
        let mut apps = Vec::new();
        for change in round.iter().flat_map(|batch| &*batch.changes) {
            let versions = [&change.entry, &change.previous];
            for entry in versions.into_iter().flatten() {
                if change.key.starts_with(records::ASSIGN) {
                    if let Ok(assign) = records::read::<AssignRecord>(&change.key, &entry.value)
                        && listed_in(&assign, own)
                    {
                        apps.push(assign.app);
                    }
                } else if change.key.starts_with(records::TOMBS)
                    && let Ok(tomb) = records::read::<Tombstone>(&change.key, &entry.value)
                    && tomb.targets.iter().any(|target| target.node == own)
                {
                    apps.push(tomb.app);
                }
            }
        }
        apps
    }

    /// A new owner knows nothing: it is told again. What is gone is no longer among the reports, and
    /// the one before may have been told and not have written it down; a look at it says it again.
    async fn follow_leaders(self) {
        let mut status = self.inner.federation.catalog.host.status();
        let mut leaders = BTreeMap::new();
        while status.changed().await.is_ok() {
            let now: BTreeMap<_, _> = status
                .borrow_and_update()
                .iter()
                .map(|(group, status)| (*group, (status.leader, status.leads)))
                .collect();
            let catalog = &self.inner.federation.catalog;
            let changed = |app: &AppKey| {
                let group = catalog.group_of(app);
                now.get(&group) != leaders.get(&group)
            };
            if now != leaders {
                let mut apps = self.all_apps();
                apps.retain(changed);
                let mut work = self.inner.work.lock();
                let again: Vec<CopyKey> = work
                    .reports
                    .iter()
                    .filter(|(_, report)| changed(&report.app))
                    .map(|(key, _)| key.clone())
                    .collect();
                work.unsent.extend(again);
                work.dirty.extend(apps);
            }
            self.inner.wake.notify_one();
            leaders = now;
            self.inner.unsent.notify_one();
        }
    }

    async fn follow_backend(self, backend: Arc<SiteBackend>) {
        let mut changes = backend.driver.changes();
        loop {
            match changes.recv().await {
                Ok(uid) => {
                    let app = self.inner.ledger.get(&uid).map(|assignment| assignment.app);
                    self.look_at(app);
                }
                Err(RecvError::Lagged(_)) => self.look_at(self.all_apps()),
                Err(RecvError::Closed) => return,
            }
        }
    }

    /// What carries our mark and is not in the ledger: left by an earlier life of this node.
    async fn find_orphans(&self, backend: &SiteBackend) {
        match backend.driver.observe().await {
            Ok(observed) => {
                let mut apps = Vec::new();
                {
                    let mut work = self.inner.work.lock();
                    for found in observed {
                        let orphans = work.orphans.entry(found.app.clone()).or_default();
                        orphans.insert(found.uid);
                        apps.push(found.app);
                    }
                }
                self.look_at(apps);
            }
            Err(error) => warn!(backend = backend.name, %error, "its apps could not be read"),
        }
    }

    async fn dispatch(self) {
        let slots = Arc::new(tokio::sync::Semaphore::new(AT_ONCE));
        loop {
            let next = {
                let mut work = self.inner.work.lock();
                let Work { dirty, busy, .. } = &mut *work;
                let next = dirty.iter().find(|app| !busy.contains(*app)).cloned();
                if let Some(app) = &next {
                    dirty.remove(app);
                    busy.insert(app.clone());
                }
                next
            };
            let Some(app) = next else {
                self.inner.wake.notified().await;
                continue;
            };
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            let agent = self.clone();
            tokio::spawn(async move {
                let again = agent.reconcile(&app).await;
                agent.done(&app, again);
                drop(slot);
            });
        }
    }

    fn done(&self, app: &AppKey, again: Option<Duration>) {
        self.inner.work.lock().busy.remove(app);
        self.inner.wake.notify_one();
        if let Some(pause) = again {
            let agent = self.clone();
            let app = app.clone();
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                agent.look_at([app]);
            });
        }
    }

    fn pause(&self, app: &AppKey) -> Duration {
        let mut work = self.inner.work.lock();
        let next = work
            .pauses
            .get(app)
            .map_or(PAUSE_MIN, |pause| (*pause * 2).min(PAUSE_MAX));
        work.pauses.insert(app.clone(), next);
        next
    }
}

fn listed_in(assign: &AssignRecord, own: NodeId) -> bool {
    assign.copies.iter().any(|copy| copy.target.node == own)
}
