//! One app: what the catalog wants of it here, and making it so.

use std::sync::Arc;
use std::time::Duration;

use krake_driver::{BackendError, Code, Deletion, Phase, Workload};
use krake_model::application::{Assignment, CopyRole};
use krake_model::{AppKey, AppUid, ApplicationSpec, Epoch};
use krake_placement::needs::needs_of;
use serde_json::Value;
use tracing::{debug, info, warn};

use super::{Agent, CopyKey, PAUSE_MIN, SiteBackend, listed_in};
use crate::catalog::{PATIENCE, epoch_of};
use crate::records::{self, AssignRecord, ReportedState, Tombstone};
use crate::site::ledger::Offer;

/// An app that is being deleted is looked at again after this.
const DELETION_PAUSE: Duration = Duration::from_millis(300);
/// What the cluster refused for good is tried again after this at the earliest.
const FAILED_PAUSE: Duration = Duration::from_secs(5);

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
    /// One look at an app; returns when to look again, if not on a change.
    pub(super) async fn reconcile(&self, app: &AppKey) -> Option<Duration> {
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
        let mut known = self.inner.ledger.uids_of(app);
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
            assign
                .as_ref()
                .is_some_and(|(assign, _)| assign.uid == *uid && listed_in(assign, own))
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
                    pause.max(FAILED_PAUSE)
                })
            }
        }
    }

    /// While the catalog is out of reach the copy runs on and is looked at.
    async fn observe_only(&self, app: &AppKey) {
        for assignment in self.inner.ledger.of(app) {
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
}

fn workload_of(assignment: &Assignment) -> Workload {
    Workload {
        uid: assignment.uid,
        app: assignment.app.clone(),
        epoch: assignment.epoch,
        components: assignment.manifests.clone(),
    }
}
