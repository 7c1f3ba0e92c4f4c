//! What calls for a look at an app, and who looks.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::OptionFuture;
use krake_consensus::{Batch, Entry};
use krake_model::decision::Target;
use krake_model::{AppKey, ApplicationSpec, GroupId, Revision};
use krake_placement::spec::{Defaults, validate};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::time::Instant;
use tracing::{error, info};

use super::effects::Effects;
use super::news::{News, Silence};
use super::plan::StoredApp;
use super::queue::Queue;
use crate::catalog::{self, Catalog, epoch_of};
use crate::federation::{Federation, now};
use crate::records::{self, AssignRecord, CopyReport, PlacementStatus, ReportedState, Tombstone};

/// Apps decided upon at once.
const AT_ONCE: usize = 64;
/// Before a tombstone that could not be written is tried again.
const RELEASE_PAUSE: Duration = Duration::from_secs(1);
/// How often is looked whether a member fell silent or came back.
const SILENCE_INTERVAL: Duration = Duration::from_millis(500);

/// The owner of the apps in the shards this node leads. Cheap to clone.
#[derive(Clone)]
pub struct Owner {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) federation: Federation,
    pub(super) defaults: Defaults,
    pub(super) agent: crate::site::agent::Agent,
    queue: Mutex<Queue>,
    wake: Notify,
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").finish_non_exhaustive()
    }
}

impl Owner {
    /// An owner; nothing is decided before [`Owner::start`].
    pub fn new(
        federation: Federation,
        defaults: Defaults,
        agent: crate::site::agent::Agent,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                federation,
                defaults,
                agent,
                queue: Mutex::default(),
                wake: Notify::new(),
            }),
        }
    }

    /// Starts the tasks; they run until the program ends. `reports` brings what sites say.
    pub fn start(&self, reports: mpsc::Receiver<CopyReport>) {
        tokio::spawn(self.clone().follow_catalog());
        tokio::spawn(self.clone().follow_leadership());
        tokio::spawn(self.clone().follow_view());
        tokio::spawn(self.clone().follow_reports(reports));
        tokio::spawn(self.clone().follow_silence());
        tokio::spawn(self.clone().dispatch());
    }

    /// Whether this node owns an app.
    pub fn owns(&self, app: &AppKey) -> bool {
        let catalog = &self.inner.federation.catalog;
        catalog.host.leads(catalog.group_of(app))
    }

    /// How many apps this node owns.
    pub fn owned(&self) -> usize {
        self.inner.queue.lock().len()
    }

    /// What was written about the app up to this revision has been looked at.
    pub(super) fn has_seen(&self, app: &AppKey, revision: Revision) {
        self.inner.queue.lock().has_seen(app, revision);
    }

    /// Changes what is to be looked at, and has it looked at.
    fn queue<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        let done = change(&mut self.inner.queue.lock());
        self.inner.wake.notify_one();
        done
    }

    fn look_at(&self, apps: impl IntoIterator<Item = AppKey>) {
        let mut apps = apps.into_iter().peekable();
        if apps.peek().is_some() {
            self.queue(|queue| apps.for_each(|app| queue.look_at(app)));
        }
    }

    async fn follow_catalog(self) {
        let host = &self.inner.federation.catalog.host;
        let mut batches = host.watch(&[
            "sites/",
            "applications/",
            records::ASSIGN,
            records::DEPARTED,
        ]);
        loop {
            match batches.recv().await {
                Ok(round) => round.iter().for_each(|batch| self.take(batch)),
                Err(RecvError::Lagged(_)) => {
                    let led = self.inner.queue.lock().led().clone();
                    for group in &led {
                        self.look_at(self.apps_of(*group));
                    }
                    self.spawn_release(led.into_iter().collect());
                }
                Err(RecvError::Closed) => return,
            }
        }
    }

    fn take(&self, batch: &Batch) {
        if batch.group == GroupId::META {
            if batch.touches("sites/") {
                self.queue(|queue| queue.look_at_all(true));
            }
            if batch.reset || batch.touches(records::DEPARTED) {
                let led = self.inner.queue.lock().led().iter().copied().collect();
                self.spawn_release(led);
            }
            return;
        }
        if batch.reset {
            return self.look_at(self.apps_of(batch.group));
        }
        let mut changed = touched(batch);
        {
            let queue = self.inner.queue.lock();
            changed.retain(|app| queue.is_news(batch.group, app, batch.revision));
        }
        self.look_at(changed);
    }

    fn apps_of(&self, group: GroupId) -> Vec<AppKey> {
        let (entries, _) = self
            .inner
            .federation
            .catalog
            .host
            .list(group, "applications/");
        entries
            .iter()
            .filter_map(|(key, _)| app_of_key(key))
            .collect()
    }

    async fn follow_leadership(self) {
        let mut status = self.inner.federation.catalog.host.status();
        loop {
            let led: BTreeSet<GroupId> = status
                .borrow_and_update()
                .values()
                .filter(|group| group.leads && group.group != GroupId::META)
                .map(|group| group.group)
                .collect();
            let catalog = &self.inner.federation.catalog;
            let new = self.queue(|queue| queue.lead(led, |app| catalog.group_of(app)));
            for group in &new {
                info!(%group, "this node leads the group");
                self.look_at(self.apps_of(*group));
            }
            self.spawn_release(new);
            if status.changed().await.is_err() {
                return;
            }
        }
    }

    async fn follow_view(self) {
        let mut view = self.inner.federation.network.view();
        let mut news = News::new(Instant::now());
        loop {
            news.take(view.borrow_and_update().values().map(|seen| &seen.report));
            let due = news.due(Instant::now(), self.owned());
            if !due.room.is_empty() {
                let has_room = |at: &Target| due.room.contains(&(at.node, at.backend.clone()));
                self.queue(|queue| queue.ask_again(has_room));
            }
            if due.all {
                self.queue(|queue| queue.look_at_all(true));
            }
            let next = OptionFuture::from(news.next().map(tokio::time::sleep_until));
            tokio::select! {
                changed = view.changed() => if changed.is_err() { return },
                Some(()) = next => {}
            }
        }
    }

    async fn follow_silence(self) {
        let mut interval = tokio::time::interval(SILENCE_INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut silence = Silence::default();
        loop {
            interval.tick().await;
            let unheard = self.inner.federation.network.unheard();
            if let Some(back) = silence.take(unheard.into_keys().collect()) {
                self.queue(|queue| {
                    queue.ask_again(|at| back.contains(&at.node));
                    queue.look_at_all(false);
                });
            }
        }
    }

    async fn follow_reports(self, mut reports: mpsc::Receiver<CopyReport>) {
        while let Some(report) = reports.recv().await {
            let app = report.app.clone();
            if !self.owns(&app) {
                continue;
            }
            if report.state == ReportedState::Gone {
                tokio::spawn(self.clone().clear_tombstone(report.clone()));
            }
            {
                let memory = self.inner.queue.lock().memory(&app);
                let key = (report.node, report.backend.clone());
                let mut memory = memory.lock();
                let newer = memory
                    .reports
                    .get(&key)
                    .is_none_or(|old| old.uid != report.uid || old.epoch <= report.epoch);
                if newer {
                    memory.reports.insert(key, report);
                }
            }
            self.look_at([app]);
        }
    }

    /// A site that was away has removed its copy of a deleted app.
    async fn clear_tombstone(self, report: CopyReport) {
        let catalog = &self.inner.federation.catalog;
        let group = catalog.group_of(&report.app);
        let key = records::tomb_key(&report.uid);
        let Some((mut tomb, entry)) = catalog.read::<Tombstone>(group, &key) else {
            return;
        };
        tomb.targets.retain(|target| target.node != report.node);
        if let Err(error) = super::effects::write_tombstone(catalog, &tomb, &entry).await {
            info!(app = %report.app, %error, "a tombstone stays for now");
        }
    }

    pub(super) fn spawn_release(&self, groups: Vec<GroupId>) {
        if !groups.is_empty() {
            tokio::spawn(self.clone().release_departed(groups));
        }
    }

    /// Nobody waits any more for a site that left to remove its copies of deleted apps.
    async fn release_departed(self, groups: Vec<GroupId>) {
        let catalog = &self.inner.federation.catalog;
        let departed = catalog.departures();
        let waits = |target: &Target| !departed.contains_key(&target.node);
        for group in groups {
            while !departed.is_empty() && catalog.host.leads(group) {
                let tombs = catalog.read_all::<Tombstone>(group, records::TOMBS);
                let (mut all_done, mut failed) = (true, false);
                for (_, mut tomb, entry) in tombs {
                    if tomb.targets.iter().all(waits) {
                        continue;
                    }
                    all_done = false;
                    tomb.targets.retain(waits);
                    let written = super::effects::write_tombstone(catalog, &tomb, &entry).await;
                    if let Err(error) = written {
                        failed = true;
                        info!(app = %tomb.app, %error, "a tombstone stays for now");
                    }
                }
                if all_done {
                    break;
                }
                if failed {
                    tokio::time::sleep(RELEASE_PAUSE).await;
                }
            }
        }
    }

    async fn dispatch(self) {
        let slots = Arc::new(Semaphore::new(AT_ONCE));
        loop {
            let next = self.inner.queue.lock().next(Instant::now());
            let (app, memory) = match next {
                Ok(look) => look,
                Err(wait) => {
                    tokio::select! {
                        () = self.inner.wake.notified() => {}
                        () = tokio::time::sleep(wait) => {}
                    }
                    continue;
                }
            };
            let Ok(slot) = Arc::clone(&slots).acquire_owned().await else {
                return;
            };
            let owner = self.clone();
            tokio::spawn(async move {
                let looked = Effects::new(&owner).work_on(&app, &memory).await;
                let group = owner.inner.federation.catalog.group_of(&app);
                owner.queue(|queue| queue.done(app, group, looked, now(), Instant::now()));
                drop(slot);
            });
        }
    }
}

fn app_of_key(key: &str) -> Option<AppKey> {
    let mut parts = key.splitn(3, '/');
    let (_, namespace, name) = (parts.next()?, parts.next()?, parts.next()?);
    Some(AppKey::new(namespace, name))
}

fn touched(batch: &Batch) -> Vec<AppKey> {
    batch
        .changes
        .iter()
        .filter(|change| {
            change.key.starts_with("applications/") || change.key.starts_with(records::ASSIGN)
        })
        .filter_map(|change| app_of_key(&change.key))
        .collect()
}

/// An app with the entries it was read from.
pub(super) struct Loaded {
    pub(super) app: StoredApp,
    pub(super) object: Value,
    pub(super) entry: Entry,
    pub(super) assign: Option<Entry>,
    pub(super) placement: Option<(Value, Entry)>,
    pub(super) status: PlacementStatus,
}

impl Loaded {
    /// Reads the assignment and the placement.
    fn read_rest(&mut self, catalog: &Catalog, group: GroupId) {
        let app = &self.app.app;
        let assign = catalog.read::<AssignRecord>(group, &records::assign_key(app));
        let placement_key = records::object_key("placements", &app.namespace, &app.name);
        let placement = catalog.read::<Value>(group, &placement_key);
        self.status = placement
            .as_ref()
            .and_then(|(object, _)| object.get("status").cloned())
            .and_then(|status| serde_json::from_value(status).ok())
            .unwrap_or_default();
        self.placement = placement;
        self.app.decision.clone_from(&self.status.decision);
        self.app.assign = assign
            .as_ref()
            .map(|(assign, entry)| (assign.clone(), epoch_of(entry)));
        self.assign = assign.map(|(_, entry)| entry);
    }

    /// The newest of the changes it was read from.
    pub(super) fn revision(&self) -> Revision {
        let others = [
            self.assign.as_ref(),
            self.placement.as_ref().map(|(_, entry)| entry),
        ];
        let others = others.into_iter().flatten().map(|entry| entry.modified);
        others.fold(self.entry.modified, Revision::max)
    }
}

/// Reads everything stored about an app; `None`: it is gone or cannot be understood. What has not
/// changed since `before` is taken from it.
pub(super) fn load(
    catalog: &Catalog,
    federation: &Federation,
    defaults: &Defaults,
    app: &AppKey,
    before: Option<Loaded>,
) -> Option<Loaded> {
    let group = catalog.group_of(app);
    let key = records::object_key("applications", &app.namespace, &app.name);
    let entry = catalog.host.get(group, &key)?;
    if let Some(mut before) = before.filter(|before| before.entry.modified == entry.modified) {
        before.read_rest(catalog, group);
        return Some(before);
    }
    let object: Value = catalog::parse(&key, &entry)?;
    let spec = object.get("spec").cloned().unwrap_or_default();
    let spec: ApplicationSpec = match serde_json::from_value(spec) {
        Ok(spec) => spec,
        Err(error) => {
            error!(%app, %error, "the stored spec is not readable; the app stays as it is");
            return None;
        }
    };
    let definitions = &federation.genesis.metrics;
    let (policy, needs) = match validate(&spec, &app.namespace, definitions, defaults) {
        Ok(resolved) => resolved,
        Err(errors) => {
            error!(%app, ?errors, "the stored spec is not valid any more; the app stays as it is");
            return None;
        }
    };
    let uid = object.pointer("/metadata/uid").and_then(Value::as_str)?;
    let mut loaded = Loaded {
        app: StoredApp {
            app: app.clone(),
            uid: uid.parse().ok()?,
            generation: object
                .pointer("/metadata/generation")
                .and_then(Value::as_i64)
                .unwrap_or(1),
            spec,
            needs,
            policy,
            deleting: object.pointer("/metadata/deletionTimestamp").is_some(),
            assign: None,
            decision: None,
        },
        object,
        entry,
        assign: None,
        placement: None,
        status: PlacementStatus::default(),
    };
    loaded.read_rest(catalog, group);
    Some(loaded)
}
