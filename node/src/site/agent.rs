//! The agent: makes each backend run exactly what the catalog assigns to this site.
//!
//! Level-triggered per app: look at the catalog, look at the backend, act, report; again whenever
//! one of them changes, and after a pause when something failed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use krake_consensus::Batch;
use krake_driver::{Backend, BackendError, Code, Deletion, Inventory, Observed, Phase, Workload};
use krake_model::application::{Assignment, CopyRole};
use krake_model::{AppKey, AppUid, ApplicationSpec, Epoch, Resources};
use krake_placement::needs::needs_of;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::{Notify, broadcast::error::RecvError, mpsc, watch};
use tracing::{debug, info, warn};

use crate::catalog::{PATIENCE, epoch_of};
use crate::federation::{Federation, now};
use crate::records::{self, AssignRecord, CopyReport, ReportedState, Tombstone};
use crate::rpc::{Reply, Request, Reserve};
use crate::site::ledger::{Ledger, Offer};
use crate::site::reservations::{Refusal, Reservations};

/// Pauses after a failure, doubling.
const PAUSE_MIN: Duration = Duration::from_millis(200);
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// Apps worked on at once.
const AT_ONCE: usize = 32;
/// How often a backend's capacity is read, and leftovers are looked for.
const INVENTORY_INTERVAL: Duration = Duration::from_secs(5);
/// An app that is being deleted is looked at again after this.
const DELETION_PAUSE: Duration = Duration::from_millis(300);
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

/// What the catalog wants of this site for one app.
enum Wanted {
    /// Run it.
    Run(String, Box<Assignment>),
    /// Nothing of it may be at these backends.
    Delete(Epoch),
    /// The catalog is between two states: it will change soon.
    Wait,
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

    /// Wakes when capacity, health or served kinds changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// API kinds that each backend serves; without the backends that do not say.
    pub fn served(&self) -> BTreeMap<String, Vec<String>> {
        let backends = self.inner.backends.iter();
        backends
            .filter_map(|backend| {
                let inventory = backend.inventory.lock();
                let kinds = inventory.as_ref().ok()?.kinds.clone();
                Some((backend.name.clone(), kinds))
            })
            .collect()
    }

    /// What a backend offers: (total, free after promises, promised).
    pub fn offer(
        &self,
        backend: &SiteBackend,
    ) -> Result<(Resources, Resources, Resources), String> {
        let inventory = backend.inventory.lock().clone()?;
        let total = minimum(&inventory.total, &self.inner.limit);
        let used = inventory.total.saturating_sub(&inventory.free);
        let free = total.saturating_sub(&used);
        let held = backend.reservations.lock().held();
        Ok((total, free.saturating_sub(&held), held))
    }

    /// An owner asks for capacity.
    pub async fn reserve(&self, request: Reserve) -> Reply {
        let refused = |reason: String| Reply::Refused { reason };
        let backend = self
            .inner
            .backends
            .iter()
            .find(|backend| backend.name == request.backend);
        let Some(backend) = backend else {
            return refused(format!("this site has no backend `{}`", request.backend));
        };
        let Ok(components) = serde_json::from_slice(&request.manifests) else {
            return refused("the manifests cannot be read".to_owned());
        };
        let workload = Workload {
            uid: request.uid,
            app: AppKey::new(request.app.0, request.app.1),
            epoch: Epoch::default(),
            components,
        };
        if let Err(error) = backend.driver.admit(&workload).await {
            return refused(error.message);
        }
        let inventory = match backend.inventory.lock().clone() {
            Ok(inventory) => inventory,
            Err(reason) => return refused(format!("its cluster does not answer: {reason}")),
        };
        let total = minimum(&inventory.total, &self.inner.limit);
        let used = inventory.total.saturating_sub(&inventory.free);
        let free = total.saturating_sub(&used);
        let now = now();
        let deadline = now.plus_millis(self.inner.reservation_ttl.as_millis() as i64);
        let mut table = backend.reservations.lock();
        table.expire(now);
        match table.reserve(request.uid, request.term, request.needs, &free, deadline) {
            Ok(()) => Reply::Reserved,
            Err(Refusal::NoCapacity { free }) => refused(format!(
                "not enough is free: {}m CPU, {} MiB of memory and {} pods are left",
                free.cpu_millis,
                free.memory_bytes >> 20,
                free.pods
            )),
            Err(Refusal::Stale { term }) => {
                refused(format!("an owner of term {term} has asked already"))
            }
        }
    }

    fn look_at(&self, apps: impl IntoIterator<Item = AppKey>) {
        self.inner.work.lock().dirty.extend(apps);
        self.inner.wake.notify_one();
    }

    /// Apps that concern this site: assigned to it, or once run here.
    fn all_apps(&self) -> Vec<AppKey> {
        let catalog = &self.inner.federation.catalog;
        let own = self.inner.federation.own;
        let noted = self.inner.ledger.all().into_iter();
        let mut apps: Vec<AppKey> = noted.filter(|a| !a.delete).map(|a| a.app).collect();
        apps.extend(self.inner.work.lock().orphans.keys().cloned());
        for group in catalog.shard_groups() {
            for (_, assign, _) in catalog.read_all::<AssignRecord>(group, records::ASSIGN) {
                if assign.copies.iter().any(|copy| copy.target.node == own) {
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
        let mut batches = self.inner.federation.catalog.host.watch();
        let mut resync = tokio::time::interval(RESYNC_INTERVAL);
        loop {
            tokio::select! {
                received = batches.recv() => match received {
                    Ok(batch) if batch.reset => self.look_at(self.all_apps()),
                    Ok(batch) => self.look_at(self.concerned(&batch)),
                    Err(RecvError::Lagged(_)) => self.look_at(self.all_apps()),
                    Err(RecvError::Closed) => return,
                },
                _ = resync.tick() => self.look_at(self.all_apps()),
            }
        }
    }

    fn concerned(&self, batch: &Batch) -> Vec<AppKey> {
        let own = self.inner.federation.own;
        let mut apps = Vec::new();
        for change in &batch.changes {
            let versions = [&change.entry, &change.previous];
            for entry in versions.into_iter().flatten() {
                if change.key.starts_with(records::ASSIGN) {
                    if let Ok(assign) = records::read::<AssignRecord>(&change.key, &entry.value)
                        && assign.copies.iter().any(|copy| copy.target.node == own)
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

    async fn follow_inventory(self, backend: Arc<SiteBackend>) {
        let mut first = true;
        let mut interval = tokio::time::interval(INVENTORY_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let settled: Vec<CopyKey> = {
                let mut work = self.inner.work.lock();
                std::mem::take(&mut work.settled).into_iter().collect()
            };
            let read = backend.driver.inventory().await;
            let healthy = read.is_ok();
            let news = {
                let mut known = backend.inventory.lock();
                let read = read.map_err(|error| error.message);
                let news = *known != read;
                if let (true, Err(error)) = (news, &read) {
                    warn!(backend = backend.name, %error, "the site's backend does not answer; nothing new is run there until it does");
                }
                *known = read;
                news
            };
            if healthy {
                let mut table = backend.reservations.lock();
                table.expire(now());
                for (uid, _) in settled.iter().filter(|(_, name)| *name == backend.name) {
                    table.release(uid);
                }
            } else {
                self.inner.work.lock().settled.extend(settled);
            }
            if news {
                self.inner.changed.send_modify(|number| *number += 1);
            }
            if healthy && first {
                first = false;
                self.find_orphans(&backend).await;
            }
            if healthy && let Err(error) = backend.driver.tidy().await {
                debug!(backend = backend.name, %error, "not tidied");
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

    /// One look at an app; returns when to look again, if not on a change.
    async fn reconcile(&self, app: &AppKey) -> Option<Duration> {
        match self.wanted(app).await {
            Err(error) => {
                debug!(%app, %error, "the catalog cannot be read; this copy stays as it is");
                self.observe_only(app).await;
                Some(self.pause(app))
            }
            Ok(wanted) => {
                let mut again = None;
                for (uid, wanted) in wanted {
                    let pause = match wanted {
                        Wanted::Run(backend, assignment) => self.run(&backend, *assignment).await,
                        Wanted::Delete(epoch) => self.delete(app, uid, epoch).await,
                        Wanted::Wait => None,
                    };
                    again = match (again, pause) {
                        (Some(a), Some(b)) => Some(std::cmp::min(a, b)),
                        (a, b) => a.or(b),
                    };
                }
                if again.is_none() {
                    self.inner.work.lock().pauses.remove(app);
                }
                again
            }
        }
    }

    /// What is to be done about each identity that goes or went by this name.
    async fn wanted(&self, app: &AppKey) -> Result<Vec<(AppUid, Wanted)>, String> {
        let catalog = &self.inner.federation.catalog;
        let group = catalog.group_of(app);
        let own = self.inner.federation.own;
        let key = records::assign_key(app);
        let mut wanted = Vec::new();
        let mut known: BTreeSet<AppUid> = self
            .inner
            .ledger
            .of(app)
            .into_iter()
            .filter(|assignment| !assignment.delete)
            .map(|assignment| assignment.uid)
            .collect();
        if let Some(orphans) = self.inner.work.lock().orphans.get(app) {
            known.extend(orphans);
        }
        for (_, tomb, _) in catalog.read_all::<Tombstone>(group, records::TOMBS) {
            if tomb.app == *app && tomb.targets.iter().any(|target| target.node == own) {
                known.insert(tomb.uid);
            }
        }
        let mut assign = catalog.read::<AssignRecord>(group, &key);
        let listed = |assign: &Option<(AssignRecord, krake_consensus::Entry)>, uid: &AppUid| {
            assign.as_ref().is_some_and(|(assign, _)| {
                assign.uid == *uid && assign.copies.iter().any(|copy| copy.target.node == own)
            })
        };
        if known.iter().any(|uid| !listed(&assign, uid)) {
            // Something here that the catalog does not give to us: only the newest catalog may
            // say that it has to go.
            catalog
                .host
                .read_barrier(&[group], PATIENCE)
                .await
                .map_err(|error| error.to_string())?;
            assign = catalog.read::<AssignRecord>(group, &key);
        }
        if let Some((assign, entry)) = assign.as_ref().filter(|(a, _)| listed_in(a, own)) {
            known.remove(&assign.uid);
            let epoch = epoch_of(entry);
            let copy = assign.copies.iter().find(|copy| copy.target.node == own);
            if let Some(copy) = copy {
                let next = if copy.role == CopyRole::Deleting {
                    Wanted::Delete(epoch)
                } else {
                    self.assignment(assign, epoch, &copy.target.backend)
                };
                wanted.push((assign.uid, next));
            }
        }
        let last = Epoch {
            incarnation: u32::MAX,
            term: u64::MAX,
            index: u64::MAX,
        };
        wanted.extend(known.into_iter().map(|uid| (uid, Wanted::Delete(last))));
        Ok(wanted)
    }

    fn assignment(&self, assign: &AssignRecord, epoch: Epoch, backend: &str) -> Wanted {
        let catalog = &self.inner.federation.catalog;
        let group = catalog.group_of(&assign.app);
        let key = records::object_key("applications", &assign.app.namespace, &assign.app.name);
        let Some((object, _)) = catalog.read::<Value>(group, &key) else {
            return Wanted::Wait;
        };
        let generation = object
            .pointer("/metadata/generation")
            .and_then(Value::as_i64);
        let uid = object.pointer("/metadata/uid").and_then(Value::as_str);
        if generation != Some(assign.generation) || uid != Some(assign.uid.to_string().as_str()) {
            return Wanted::Wait;
        }
        let spec = object.get("spec").cloned().unwrap_or_default();
        match serde_json::from_value::<ApplicationSpec>(spec) {
            Ok(spec) => Wanted::Run(
                backend.to_owned(),
                Box::new(Assignment {
                    uid: assign.uid,
                    app: assign.app.clone(),
                    backend: backend.to_owned(),
                    epoch,
                    delete: false,
                    generation: assign.generation,
                    manifests: spec.source.manifests,
                }),
            ),
            Err(error) => {
                warn!(app = %assign.app, %error, "the spec in the catalog is not readable");
                Wanted::Wait
            }
        }
    }

    fn backend(&self, name: &str) -> Option<&Arc<SiteBackend>> {
        self.inner.backends.iter().find(|b| b.name == name)
    }

    async fn offer_to_ledger(&self, assignment: &Assignment) -> Result<bool, BackendError> {
        let ledger = Arc::clone(&self.inner.ledger);
        let offered = assignment.clone();
        let offer = tokio::task::spawn_blocking(move || ledger.offer(&offered)).await;
        match offer {
            Ok(Ok(Offer::Stale { .. })) => Ok(false),
            Ok(Ok(_)) => Ok(true),
            Ok(Err(error)) => Err(BackendError::new(Code::Busy, error.to_string())),
            Err(error) => Err(BackendError::new(Code::Busy, error.to_string())),
        }
    }

    async fn run(&self, backend: &str, assignment: Assignment) -> Option<Duration> {
        let Some(backend) = self.backend(backend).map(Arc::clone) else {
            let message = format!("this site has no backend `{backend}`");
            self.note(
                &assignment,
                None,
                ReportedState::Failed,
                Some(message),
                true,
            );
            return None;
        };
        match self.offer_to_ledger(&assignment).await {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => {
                warn!(app = %assignment.app, %error, "the assignment could not be noted");
                return Some(self.pause(&assignment.app));
            }
        }
        let key = (assignment.uid, backend.name.clone());
        let applied = self.inner.work.lock().applied.get(&key).copied();
        let observed = match backend.driver.observe_one(assignment.uid).await {
            Ok(observed) => observed,
            Err(error) => {
                let message = error.message;
                self.note(
                    &assignment,
                    None,
                    ReportedState::Progressing,
                    Some(message),
                    false,
                );
                return Some(self.pause(&assignment.app));
            }
        };
        let current =
            applied == Some(assignment.epoch) && observed.as_ref().is_some_and(|o| !o.drifted);
        if current && let Some(observed) = observed {
            self.note_observed(&backend, &assignment, &observed);
            return None;
        }
        if applied.is_none() || applied.is_some_and(|epoch| epoch != assignment.epoch) {
            let needs = needs_of(&assignment.manifests)
                .unwrap_or_default()
                .resources;
            let settled = observed.as_ref().is_some_and(|o| o.phase == Phase::Ready);
            if !settled {
                backend.reservations.lock().assigned(assignment.uid, needs);
            }
        }
        self.apply(&backend, &assignment, key).await
    }

    async fn apply(
        &self,
        backend: &Arc<SiteBackend>,
        assignment: &Assignment,
        key: CopyKey,
    ) -> Option<Duration> {
        match backend.driver.apply(&workload_of(assignment)).await {
            Ok(()) => {
                debug!(app = %assignment.app, epoch = %assignment.epoch, "applied");
                self.inner.work.lock().applied.insert(key, assignment.epoch);
                match backend.driver.observe_one(assignment.uid).await {
                    Ok(Some(observed)) => self.note_observed(backend, assignment, &observed),
                    Ok(None) | Err(_) => return Some(PAUSE_MIN),
                }
                None
            }
            Err(error) if error.code == Code::Outdated => None,
            Err(error) => {
                info!(app = %assignment.app, code = ?error.code, %error, "could not be applied");
                let temporary = error.code.is_temporary();
                let state = if temporary {
                    ReportedState::Progressing
                } else {
                    ReportedState::Failed
                };
                let elsewhere = error.code.elsewhere();
                self.note(assignment, None, state, Some(error.message), elsewhere);
                let pause = self.pause(&assignment.app);
                Some(if temporary {
                    pause
                } else {
                    pause.max(Duration::from_secs(5))
                })
            }
        }
    }

    fn note_observed(&self, backend: &SiteBackend, assignment: &Assignment, observed: &Observed) {
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

    fn note(
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

    /// While the catalog is out of reach the copy runs on and is looked at.
    async fn observe_only(&self, app: &AppKey) {
        for assignment in self.inner.ledger.of(app) {
            if assignment.delete {
                continue;
            }
            let Some(backend) = self.backend(&assignment.backend).map(Arc::clone) else {
                continue;
            };
            if let Ok(Some(observed)) = backend.driver.observe_one(assignment.uid).await {
                self.note_observed(&backend, &assignment, &observed);
            }
        }
    }

    async fn delete(&self, app: &AppKey, uid: AppUid, epoch: Epoch) -> Option<Duration> {
        let mut again = None;
        for backend in self.inner.backends.clone() {
            let noted = Assignment {
                uid,
                app: app.clone(),
                backend: backend.name.clone(),
                epoch,
                delete: true,
                generation: 0,
                manifests: Vec::new(),
            };
            // Before the assignment goes: its first apply may have been cut short.
            let before = self.inner.ledger.get(&uid);
            let adopted = match before.filter(|before| !before.delete) {
                Some(before) if before.backend == backend.name => {
                    backend.driver.adopt(&workload_of(&before)).await
                }
                _ => Ok(()),
            };
            if adopted.is_ok()
                && epoch.incarnation != u32::MAX
                && !matches!(self.offer_to_ledger(&noted).await, Ok(true))
            {
                return None;
            }
            let deleted = match adopted {
                Ok(()) => backend.driver.delete(uid, epoch).await,
                Err(error) => Err(error),
            };
            match deleted {
                Ok(Deletion::Gone) => {
                    backend.reservations.lock().release(&uid);
                    self.gone(&noted).await;
                }
                Ok(Deletion::InProgress(left)) => {
                    let message = format!("still there: {}", left.join(", "));
                    self.note(&noted, None, ReportedState::Deleting, Some(message), false);
                    again = Some(DELETION_PAUSE);
                }
                Err(error) if error.code == Code::Outdated => {}
                Err(error) => {
                    info!(%app, %error, "could not be deleted yet");
                    self.note(
                        &noted,
                        None,
                        ReportedState::Deleting,
                        Some(error.message),
                        false,
                    );
                    again = Some(self.pause(app));
                }
            }
        }
        again
    }

    async fn gone(&self, noted: &Assignment) {
        let key = (noted.uid, noted.backend.clone());
        {
            let mut work = self.inner.work.lock();
            work.applied.remove(&key);
            if let Some(orphans) = work.orphans.get_mut(&noted.app) {
                orphans.remove(&noted.uid);
                if orphans.is_empty() {
                    work.orphans.remove(&noted.app);
                }
            }
        }
        // The newest epoch this site knows is the one the owner waits to hear of.
        let epoch = if noted.epoch.incarnation == u32::MAX {
            self.inner
                .ledger
                .get(&noted.uid)
                .map_or(Epoch::default(), |a| a.epoch)
        } else {
            noted.epoch
        };
        let mut report = noted.clone();
        report.epoch = epoch;
        self.note(&report, None, ReportedState::Gone, None, false);
        if noted.epoch.incarnation == u32::MAX && self.inner.ledger.get(&noted.uid).is_some() {
            let mut settled = noted.clone();
            settled.epoch = epoch;
            if let Err(error) = self.offer_to_ledger(&settled).await {
                warn!(app = %noted.app, %error, "the removal could not be noted");
            }
        }
    }

    async fn send_reports(self) {
        let mut retry = tokio::time::interval(Duration::from_millis(500));
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
        let mut by_leader: BTreeMap<krake_model::NodeId, Vec<(CopyKey, CopyReport)>> =
            BTreeMap::new();
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

    async fn send_to(&self, node: krake_model::NodeId, reports: Vec<(CopyKey, CopyReport)>) {
        for chunk in reports.chunks(100) {
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
                match crate::net::ask(
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

fn workload_of(assignment: &Assignment) -> Workload {
    Workload {
        uid: assignment.uid,
        app: assignment.app.clone(),
        epoch: assignment.epoch,
        components: assignment.manifests.clone(),
    }
}

fn listed_in(assign: &AssignRecord, own: krake_model::NodeId) -> bool {
    assign.copies.iter().any(|copy| copy.target.node == own)
}

fn minimum(a: &Resources, b: &Resources) -> Resources {
    Resources {
        cpu_millis: a.cpu_millis.min(b.cpu_millis),
        memory_bytes: a.memory_bytes.min(b.memory_bytes),
        pods: a.pods.min(b.pods),
    }
}
