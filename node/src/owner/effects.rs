//! Carries out what [`super::plan`] says, and writes down what came of it.

use std::sync::Arc;

use krake_consensus::{Command, Entry, Expect, Operation, Part, ProposeError};
use krake_model::application::{AppPhase, ApplicationStatus};
use krake_model::decision::Target;
use krake_model::{AppKey, DecisionRecord, GroupId, Revision, Timestamp};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tracing::{debug, info};

use super::controller::{Loaded, Owner, load};
use super::plan::{Memory, Step, is_change, plan};
use super::queue::Looked;
use super::status::{EventDraft, Inputs, assign_event, phase_event, says_the_same, status};
use crate::catalog::{Catalog, PATIENCE};
use crate::federation::now;
use crate::kinds::FINALIZER;
use crate::records::{
    self, AssignRecord, DecisionSummary, HISTORY_MAX, PlacementStatus, Tombstone,
};
use crate::rpc::{Reply, Request, Reserve};

/// Events kept per app.
const EVENTS_MAX: usize = 20;
/// Steps on one app in a row; more would be a loop without end.
const STEPS_MAX: usize = 32;
/// After something failed, the app is looked at again this much later.
const RETRY_MS: i64 = 300;
/// A copy that is on its way may become ready within this time before its state is written.
const SETTLING_MS: u64 = 250;

pub(super) struct Effects<'a> {
    owner: &'a Owner,
}

/// Something could not be done now.
type Later = String;

/// After something failed.
fn soon() -> Looked {
    Looked::Again(now().plus_millis(RETRY_MS))
}

impl<'a> Effects<'a> {
    pub(super) const fn new(owner: &'a Owner) -> Self {
        Self { owner }
    }

    fn catalog(&self) -> &Catalog {
        &self.owner.inner.federation.catalog
    }

    fn load(&self, app: &AppKey, before: Option<Loaded>) -> Option<Loaded> {
        let inner = &self.owner.inner;
        load(
            &inner.federation.catalog,
            &inner.federation,
            &inner.defaults,
            app,
            before,
        )
    }

    /// Works on an app until there is nothing to do.
    pub(super) async fn work_on(&self, app: &AppKey, memory: &Arc<Mutex<Memory>>) -> Looked {
        let mut before = None;
        for _ in 0..STEPS_MAX {
            if !self.owner.owns(app) {
                return Looked::NotOurs;
            }
            let Some(loaded) = self.load(app, before.take()) else {
                return Looked::Gone;
            };
            self.owner.has_seen(app, loaded.revision());
            forget_others(&loaded, memory);
            let step = {
                // In this order: news that speak for another look come after what is seen here.
                let mut memory = memory.lock();
                let world = self.owner.inner.federation.moment();
                plan(&loaded.app, &mut memory, &world)
            };
            let result = match step {
                Step::Wait(until) => {
                    return Looked::Again(match self.write_status(&loaded, memory, None).await {
                        Ok(()) => until,
                        Err(error) => {
                            debug!(%app, error, "the status is written later");
                            until.min(now().plus_millis(RETRY_MS))
                        }
                    });
                }
                Step::Reserve(target, record) => {
                    self.reserve(&loaded, memory, target, *record).await;
                    Ok(())
                }
                Step::Assign(next, decision) => {
                    let decision = decision.map(|decision| *decision);
                    self.assign(&loaded, memory, *next, decision).await
                }
                Step::Unplaceable(decision) => {
                    info!(%app, reason = decision.reason, "no site fits");
                    let written = self.write_status(&loaded, memory, Some(&decision)).await;
                    if written.is_err() {
                        // It is not shown yet.
                        memory.lock().unplaceable = None;
                    }
                    written
                }
                Step::Finish(tombstone) => {
                    return match self.finish(&loaded, tombstone).await {
                        Ok(()) => Looked::Gone,
                        Err(error) => {
                            debug!(%app, error, "the app is removed later");
                            soon()
                        }
                    };
                }
            };
            if let Err(error) = result {
                debug!(%app, error, "tried again later");
                // It is to be decided anew.
                memory.lock().next_look = Timestamp::default();
                return soon();
            }
            before = Some(loaded);
        }
        soon()
    }

    async fn reserve(
        &self,
        loaded: &Loaded,
        memory: &Arc<Mutex<Memory>>,
        target: Target,
        record: DecisionRecord,
    ) {
        let inner = &self.owner.inner;
        let group = self.catalog().group_of(&loaded.app.app);
        let term = self
            .catalog()
            .host
            .status()
            .borrow()
            .get(&group)
            .map_or(0, |status| status.term);
        let app = &loaded.app;
        let request = Reserve {
            uid: app.uid,
            app: (app.app.namespace.clone(), app.app.name.clone()),
            backend: target.backend.clone(),
            needs: app.needs.resources,
            term,
            generation: app.generation,
            manifests: serde_json::to_vec(&app.spec.source.manifests).unwrap_or_default(),
        };
        let reply = if target.node == inner.federation.own {
            Ok(inner.agent.reserve(request).await)
        } else {
            let request = Request::Reserve(request);
            crate::net::ask(&inner.federation.network, target.node, &request).await
        };
        let mut memory = memory.lock();
        match reply {
            Ok(Reply::Reserved) => memory.reserved = Some((target, record)),
            Ok(Reply::Refused { reason }) => {
                info!(app = %app.app, site = %target, reason, "the site refused");
                memory.refuse(target, reason, now());
            }
            Ok(Reply::Noted(_) | Reply::Members(_) | Reply::Readmitted { .. }) => {}
            Ok(Reply::Error { message }) | Err(message) => {
                let reason = format!("it could not be asked: {message}");
                debug!(app = %app.app, site = %target, reason, "no reservation");
                memory.refuse(target, reason, now());
            }
        }
    }

    async fn propose(&self, group: GroupId, operations: Vec<Operation>) -> Result<Revision, Later> {
        let command = Command::new(operations);
        match self.catalog().host.propose(group, command, PATIENCE).await {
            Ok(committed) => Ok(committed.revision),
            Err(ProposeError::Conflict { key, .. }) => Err(format!("{key} changed meanwhile")),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn assign(
        &self,
        loaded: &Loaded,
        memory: &Arc<Mutex<Memory>>,
        next: AssignRecord,
        decision: Option<DecisionRecord>,
    ) -> Result<(), Later> {
        let app = &loaded.app.app;
        let group = self.catalog().group_of(app);
        if let Some(decision) = &decision {
            info!(%app, outcome = %decision.outcome, reason = decision.reason, "decided");
        }
        let mut operations = vec![
            Operation::Check {
                key: records::object_key("applications", &app.namespace, &app.name),
                expect: Expect::Revision(loaded.entry.modified),
            },
            Operation::Put {
                key: records::assign_key(app),
                value: records::write(&next),
                expect: expect(loaded.assign.as_ref()),
            },
        ];
        if let Some(decision) = &decision {
            let mut placement = loaded.status.clone();
            push_decision(&mut placement, decision);
            operations.push(put_placement(loaded, &placement));
        }
        let old = loaded.app.assign.as_ref().map(|(assign, _)| assign);
        let draft = assign_event(old, &next, decision.as_ref());
        operations.extend(self.event_operations(loaded, draft.as_slice()));
        self.propose(group, operations).await?;
        {
            let mut memory = memory.lock();
            memory.reserved = None;
            memory.unplaceable = None;
            memory.waiting = None;
            memory.better_since = None;
        }
        // The status follows when the next plan says that there is nothing to do.
        Ok(())
    }

    async fn write_status(
        &self,
        loaded: &Loaded,
        memory: &Arc<Mutex<Memory>>,
        decision: Option<&DecisionRecord>,
    ) -> Result<(), Later> {
        let before: ApplicationStatus = loaded
            .object
            .get("status")
            .cloned()
            .and_then(|status| serde_json::from_value(status).ok())
            .unwrap_or_default();
        let world = self.owner.inner.federation.moment();
        let after = {
            let memory = memory.lock();
            let inputs = Inputs {
                app: &loaded.app,
                memory: &memory,
                before: &before,
            };
            status(inputs, &world, loaded.app.policy.detect_after)
        };
        let started = loaded
            .assign
            .as_ref()
            .map(|entry| entry.modified.timestamp());
        if decision.is_none()
            && matches!(after.phase, Some(AppPhase::Progressing | AppPhase::Moving))
            && started.is_some_and(|at| now() >= at && now().millis_since(at) < SETTLING_MS)
        {
            // Most copies are ready a moment later: one write instead of three.
            return Err("the copies have only just been assigned".to_owned());
        }
        let draft = phase_event(&before, &after);
        let drafts = draft.as_slice();
        if says_the_same(&before, &after) && drafts.is_empty() {
            return Ok(());
        }
        let app = &loaded.app.app;
        let mut object = loaded.object.clone();
        object["status"] = json!(after);
        let mut placement = loaded.status.clone();
        placement.copies.clone_from(&after.copies);
        if let Some(decision) = decision {
            push_decision(&mut placement, decision);
        }
        let mut operations = vec![Operation::Put {
            key: records::object_key("applications", &app.namespace, &app.name),
            value: records::write(&object),
            expect: Expect::Revision(loaded.entry.modified),
        }];
        if loaded.placement.is_some() || decision.is_some() {
            operations.push(put_placement(loaded, &placement));
        }
        operations.extend(self.event_operations(loaded, drafts));
        let group = self.catalog().group_of(app);
        let revision = self.propose(group, operations).await?;
        // It was made from what is stored, so it calls for nothing new.
        self.owner.has_seen(app, revision);
        Ok(())
    }

    fn event_operations(&self, loaded: &Loaded, drafts: &[EventDraft]) -> Vec<Operation> {
        let app = &loaded.app.app;
        let group = self.catalog().group_of(app);
        let prefix = format!("events/{}/{}.", app.namespace, app.name);
        let (known, _) = self.catalog().host.list(group, &prefix);
        let mut operations = Vec::new();
        let surplus = (known.len() + drafts.len()).saturating_sub(EVENTS_MAX);
        let mut oldest: Vec<_> = known.iter().collect();
        oldest.sort_by_key(|(_, entry)| entry.created);
        for (key, _) in oldest.into_iter().take(surplus) {
            operations.push(Operation::Delete {
                key: key.clone(),
                expect: Expect::Any,
            });
        }
        for draft in drafts {
            let suffix = uuid::Uuid::new_v4().simple().to_string();
            let name = format!("{}.{}", app.name, &suffix[..16]);
            operations.push(Operation::Put {
                key: records::object_key("events", &app.namespace, &name),
                value: records::write(&event(loaded, draft, &name, now())),
                expect: Expect::Any,
            });
        }
        operations
    }

    /// Removes the app and everything about it; sites that are away get a tombstone.
    async fn finish(&self, loaded: &Loaded, tombstone: Option<Tombstone>) -> Result<(), Later> {
        let app = &loaded.app.app;
        let group = self.catalog().group_of(app);
        let others: Vec<Value> = loaded
            .object
            .pointer("/metadata/finalizers")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter(|finalizer| *finalizer != FINALIZER)
            .cloned()
            .collect();
        let key = records::object_key("applications", &app.namespace, &app.name);
        let unchanged = Expect::Revision(loaded.entry.modified);
        let mut operations = Vec::new();
        if others.is_empty() {
            operations.push(Operation::Delete {
                key,
                expect: unchanged,
            });
        } else {
            // Somebody else still holds it; we do not any more.
            let mut object = loaded.object.clone();
            object["metadata"]["finalizers"] = others.into();
            operations.push(Operation::Put {
                key,
                value: records::write(&object),
                expect: unchanged,
            });
        }
        operations.push(Operation::Delete {
            key: records::assign_key(app),
            expect: Expect::Any,
        });
        operations.push(Operation::Delete {
            key: records::object_key("placements", &app.namespace, &app.name),
            expect: Expect::Any,
        });
        let prefix = format!("events/{}/{}.", app.namespace, app.name);
        let events = Part {
            most: 200,
            ..Part::all(&prefix)
        };
        let (events, _) = self.catalog().host.list_part(group, events);
        for (key, _) in events.entries {
            operations.push(Operation::Delete {
                key,
                expect: Expect::Any,
            });
        }
        if let Some(tombstone) = &tombstone {
            operations.push(Operation::Put {
                key: records::tomb_key(&tombstone.uid),
                value: records::write(tombstone),
                expect: Expect::Any,
            });
        }
        self.propose(group, operations).await?;
        if tombstone.is_some() {
            // It may have been decided before one of its sites left.
            self.owner.spawn_release(vec![group]);
        }
        info!(%app, "the app is gone");
        Ok(())
    }
}

/// What was remembered of an earlier app of the same name is not about this one.
fn forget_others(loaded: &Loaded, memory: &Arc<Mutex<Memory>>) {
    let uid = loaded.app.uid;
    memory.lock().reports.retain(|_, report| report.uid == uid);
}

fn expect(entry: Option<&Entry>) -> Expect {
    entry.map_or(Expect::Absent, |entry| Expect::Revision(entry.modified))
}

fn push_decision(placement: &mut PlacementStatus, decision: &DecisionRecord) {
    if let Some(old) = placement.decision.take()
        && is_change(old.outcome)
    {
        placement.history.insert(0, DecisionSummary::from(&old));
        placement.history.truncate(HISTORY_MAX);
    }
    placement.decision = Some(decision.clone());
}

fn put_placement(loaded: &Loaded, placement: &PlacementStatus) -> Operation {
    let app = &loaded.app.app;
    let metadata = loaded.placement.as_ref().map_or_else(
        || {
            json!({
                "name": app.name,
                "namespace": app.namespace,
                "uid": uuid::Uuid::new_v4(),
                "creationTimestamp": now().to_seconds_string(),
                "ownerReferences": [{"apiVersion": "krake.dev/v1", "kind": "Application",
                    "name": app.name, "uid": loaded.app.uid, "controller": true}],
            })
        },
        |(object, _)| object.get("metadata").cloned().unwrap_or_default(),
    );
    Operation::Put {
        key: records::object_key("placements", &app.namespace, &app.name),
        value: records::write(&json!({
            "apiVersion": "krake.dev/v1",
            "kind": "Placement",
            "metadata": metadata,
            "status": placement,
        })),
        expect: expect(loaded.placement.as_ref().map(|(_, entry)| entry)),
    }
}

fn event(loaded: &Loaded, draft: &EventDraft, name: &str, at: Timestamp) -> Value {
    let app = &loaded.app.app;
    let time = at.to_seconds_string();
    json!({
        "apiVersion": "krake.dev/v1",
        "kind": "Event",
        "metadata": {
            "name": name,
            "namespace": app.namespace,
            "uid": uuid::Uuid::new_v4(),
            "creationTimestamp": time,
        },
        "involvedObject": {
            "apiVersion": "krake.dev/v1",
            "kind": "Application",
            "namespace": app.namespace,
            "name": app.name,
            "uid": loaded.app.uid,
        },
        "type": draft.kind,
        "reason": draft.reason,
        "message": draft.message,
        "source": {"component": "krake"},
        "reportingComponent": "krake",
        "reportingInstance": "",
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    })
}

/// Writes a tombstone back, or removes it when no site is left in it.
pub(super) async fn write_tombstone(
    catalog: &Catalog,
    tomb: &Tombstone,
    entry: &Entry,
) -> Result<(), ProposeError> {
    let key = records::tomb_key(&tomb.uid);
    let expect = Expect::Revision(entry.modified);
    let operation = if tomb.targets.is_empty() {
        Operation::Delete { key, expect }
    } else {
        Operation::Put {
            key,
            value: records::write(tomb),
            expect,
        }
    };
    let group = catalog.group_of(&tomb.app);
    let command = Command::new(vec![operation]);
    catalog.host.propose(group, command, PATIENCE).await?;
    Ok(())
}
