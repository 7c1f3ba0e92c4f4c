//! The owner's decision about one app: a pure step from what is stored, reported and seen to what
//! is to be done next. No IO, no clock, no randomness.
//!
//! Level-triggered: [`plan`] is called again after each change of its inputs and after each effect,
//! until it says [`Step::Wait`]. It never acts twice on the same inputs.

use std::collections::BTreeMap;
use std::time::Duration;

use krake_model::application::{ApplicationSpec, CopyRole, FailoverMode, MigrationStrategy};
use krake_model::decision::{Outcome, Target, Trigger};
use krake_model::metric::MetricDefinition;
use krake_model::{AppKey, AppUid, DecisionRecord, Epoch, NodeId, Timestamp};
use krake_placement::decide::{Decision, Problem, SiteState, decide};
use krake_placement::needs::Needs;
use krake_placement::spec::ResolvedPolicy;

use crate::records::{AssignRecord, AssignedCopy, CopyReport, ReportedState, Tombstone};

/// How long a site at which an app failed is not asked again for it.
const FAILURE_TTL_MS: i64 = 60_000;
/// How long a site that said no, or could not be asked, is not asked again, unless something speaks
/// for it before.
const REFUSAL_TTL_MS: i64 = 10_000;
/// An app that no site can take is tried again when it has waited twice as long, between these: as
/// Kubernetes' scheduler does (`podInitialBackoffSeconds`, `podMaxBackoffSeconds`). News of a site,
/// or more room in it, is another reason to try.
const RETRY_MS_MIN: i64 = 1_000;
const RETRY_MS_MAX: i64 = 10_000;

/// How often an app is looked at that has a copy at a suspect site,
const SUSPECT_LOOK_MS: i64 = 500;
/// or at a lost one.
const LOST_LOOK_MS: i64 = 10_000;

/// Everything stored about one app.
#[derive(Clone, Debug)]
pub struct StoredApp {
    /// Its name.
    pub app: AppKey,
    /// Its identity.
    pub uid: AppUid,
    /// The spec's generation.
    pub generation: i64,
    /// The spec.
    pub spec: ApplicationSpec,
    /// What the spec needs.
    pub needs: Needs,
    /// The spec's policy with defaults filled in.
    pub policy: ResolvedPolicy,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Who runs it, and the epoch of that record.
    pub assign: Option<(AssignRecord, Epoch)>,
    /// The decision it runs by.
    pub decision: Option<DecisionRecord>,
}

/// What the owner remembers of an app between steps; lost with leadership, rebuilt from reports.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// The newest report of each copy.
    pub reports: BTreeMap<(NodeId, String), CopyReport>,
    /// Sites that refused or failed it.
    pub refusals: BTreeMap<Target, Refusal>,
    /// A granted reservation and the decision it is for.
    pub reserved: Option<(Target, DecisionRecord)>,
    /// Since when which other site has been better.
    pub better_since: Option<(Target, Timestamp)>,
    /// When all sites are looked at again.
    pub next_look: Timestamp,
    /// The decision shown while it is unplaceable.
    pub unplaceable: Option<DecisionRecord>,
    /// Which generation of it waits for a site, and since when.
    pub waiting: Option<(i64, Timestamp)>,
}

/// A site is not asked again for an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    until: Timestamp,
    reason: String,
    /// The app failed there; else the site said no, or could not be asked.
    failed: bool,
}

impl Memory {
    /// `target` said no, or could not be asked.
    pub fn refuse(&mut self, target: Target, reason: String, now: Timestamp) {
        let until = now.plus_millis(REFUSAL_TTL_MS);
        self.note(
            target,
            Refusal {
                until,
                reason,
                failed: false,
            },
        );
    }

    /// The app failed at `target`.
    fn fail(&mut self, target: Target, reason: String, now: Timestamp) {
        let until = now.plus_millis(FAILURE_TTL_MS);
        self.note(
            target,
            Refusal {
                until,
                reason,
                failed: true,
            },
        );
    }

    fn note(&mut self, target: Target, refusal: Refusal) {
        self.reserved = None;
        // What else there is, is looked for at once.
        self.next_look = Timestamp::default();
        if !refusal.failed {
            // All that say no are asked before the first one is asked again, however long that takes.
            for known in self.refusals.values_mut().filter(|known| !known.failed) {
                known.until = refusal.until;
            }
        }
        self.refusals.insert(target, refusal);
    }

    /// Something speaks for asking these again: they have more room, or are back. `true`: the app
    /// waits for it.
    pub fn ask_again(&mut self, is_meant: impl Fn(&Target) -> bool) -> bool {
        self.refusals
            .retain(|target, refusal| refusal.failed || !is_meant(target));
        let waits = self.waiting.is_some();
        if waits {
            self.next_look = Timestamp::default();
        }
        waits
    }

    /// When to look again, if not now; `longest` milliseconds from now at most, or the clock was set
    /// back.
    fn not_before(&self, now: Timestamp, longest: i64) -> Option<Timestamp> {
        let later = now < self.next_look && self.next_look <= now.plus_millis(longest);
        later.then_some(self.next_look)
    }
}

/// How a site appears to this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sight {
    /// Heard of lately.
    Alive,
    /// Silent, but not (yet) lost.
    Suspect,
    /// Lost by the verdict of a majority of observers.
    Lost,
}

impl Sight {
    /// As shown to people and programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Alive => "Alive",
            Self::Suspect => "Suspect",
            Self::Lost => "Lost",
        }
    }
}

/// What the owner sees of the federation.
pub trait World {
    /// All sites as candidates for an app; `lost` is filled in by [`plan`].
    fn sites(&self) -> &[SiteState];
    /// How the site appears for an app that waits `detect_after`.
    fn sight(&self, node: &NodeId, detect_after: Duration) -> Sight;
    /// The site's node left the federation for ever: it says nothing of its copies any more, and what
    /// is still there is its operator's.
    fn has_left(&self, node: &NodeId) -> bool;
    /// This node sees too little of the federation to judge others.
    fn isolated(&self) -> bool;
    /// Metric definitions.
    fn definitions(&self) -> &BTreeMap<String, MetricDefinition>;
    /// This site's name.
    fn decided_by(&self) -> &str;
    /// Now.
    fn now(&self) -> Timestamp;
}

/// What to do next.
#[derive(Clone, Debug)]
pub enum Step {
    /// Nothing until something changes, or this time.
    Wait(Timestamp),
    /// Ask the site to hold capacity, then plan again.
    Reserve(Target, Box<DecisionRecord>),
    /// Store this assignment, then plan again.
    Assign(Box<AssignRecord>, Option<Box<DecisionRecord>>),
    /// No site fits: show this decision.
    Unplaceable(Box<DecisionRecord>),
    /// Nothing is left at any site that is alive: remove the app.
    Finish(Option<Tombstone>),
}

/// One look at an app: see the module.
pub fn plan(app: &StoredApp, memory: &mut Memory, world: &dyn World) -> Step {
    match step(app, memory, world) {
        Step::Wait(until) => Step::Wait(until.min(next_verdict(app, world))),
        step => step,
    }
}

/// When to look at the silent sites among the app's again: the verdict on one comes with time and
/// from what others say, not with anything that happens here.
fn next_verdict(app: &StoredApp, world: &dyn World) -> Timestamp {
    let copies = app.assign.iter().flat_map(|(assign, _)| &assign.copies);
    let waits =
        copies.filter_map(
            |copy| match world.sight(&copy.target.node, app.policy.detect_after) {
                Sight::Alive => None,
                Sight::Suspect => Some(SUSPECT_LOOK_MS),
                Sight::Lost => Some(LOST_LOOK_MS),
            },
        );
    let wait = waits.min().unwrap_or(i64::MAX);
    world.now().plus_millis(wait)
}

fn step(app: &StoredApp, memory: &mut Memory, world: &dyn World) -> Step {
    let now = world.now();
    let latest = now.plus_millis(FAILURE_TTL_MS);
    memory
        .refusals
        .retain(|_, refusal| now < refusal.until && refusal.until <= latest);
    if world.isolated() {
        // A node that sees little of the federation is itself the partitioned one (DESIGN §5).
        return Step::Wait(now.plus_millis(1000));
    }
    if app.deleting {
        return plan_deletion(app, memory, world);
    }
    let Some((assign, epoch)) = &app.assign else {
        let waits = memory
            .waiting
            .is_some_and(|(generation, _)| generation == app.generation);
        let later = memory.not_before(now, RETRY_MS_MAX);
        if let Some(later) = later.filter(|_| waits && memory.reserved.is_none()) {
            return Step::Wait(later);
        }
        return plan_placement(app, memory, world, None, Trigger::SpecChanged);
    };
    if let Some(next) = settle(app, assign, *epoch, memory, world) {
        return Step::Assign(Box::new(next), None);
    }
    plan_running(app, assign, *epoch, memory, world)
}

fn report<'a>(memory: &'a Memory, target: &Target, epoch: Epoch) -> Option<&'a CopyReport> {
    memory
        .reports
        .get(&(target.node, target.backend.clone()))
        .filter(|report| report.epoch == epoch)
}

fn is_gone(memory: &Memory, target: &Target, epoch: Epoch) -> bool {
    report(memory, target, epoch).is_some_and(|r| r.state == ReportedState::Gone)
}

fn plan_deletion(app: &StoredApp, memory: &Memory, world: &dyn World) -> Step {
    let Some((assign, epoch)) = &app.assign else {
        return Step::Finish(None);
    };
    let now = world.now();
    if assign.pending.is_some() || assign.copies.iter().any(|c| c.role != CopyRole::Deleting) {
        let mut next = assign.clone();
        next.pending = None;
        for copy in &mut next.copies {
            set_role(copy, CopyRole::Deleting, now);
        }
        return Step::Assign(Box::new(next), None);
    }
    let left: Vec<&AssignedCopy> = assign
        .copies
        .iter()
        .filter(|c| !is_gone(memory, &c.target, *epoch) && !world.has_left(&c.target.node))
        .collect();
    let detect_after = app.policy.detect_after;
    if left
        .iter()
        .any(|c| world.sight(&c.target.node, detect_after) != Sight::Lost)
    {
        return Step::Wait(now.plus_millis(1000));
    }
    if left.is_empty() {
        return Step::Finish(None);
    }
    Step::Finish(Some(Tombstone {
        uid: app.uid,
        app: app.app.clone(),
        targets: left.into_iter().map(|c| c.target.clone()).collect(),
        deleted_at: now,
    }))
}

fn set_role(copy: &mut AssignedCopy, role: CopyRole, now: Timestamp) {
    if copy.role != role {
        copy.role = role;
        copy.since = now;
    }
}

/// Moves an assignment on by what the sites have reported; `None` when nothing follows.
fn settle(
    app: &StoredApp,
    assign: &AssignRecord,
    epoch: Epoch,
    memory: &mut Memory,
    world: &dyn World,
) -> Option<AssignRecord> {
    let now = world.now();
    let lost = |target: &Target| world.sight(&target.node, app.policy.detect_after) == Sight::Lost;
    let mut next = assign.clone();
    next.copies.retain(|copy| {
        let settled = copy.role == CopyRole::Deleting && is_gone(memory, &copy.target, epoch);
        !settled && !world.has_left(&copy.target.node)
    });
    next.pending = next.pending.filter(|target| !world.has_left(&target.node));
    if let Some(outgoing) = next.copy(CopyRole::Outgoing).cloned() {
        settle_surge(app, epoch, memory, world, &outgoing, &mut next);
    }
    let waits_for_old = next
        .copies
        .iter()
        .any(|c| c.role == CopyRole::Deleting && !lost(&c.target));
    if let Some(target) = next.pending.clone().filter(|_| !waits_for_old) {
        next.pending = None;
        next.copies.push(AssignedCopy {
            target,
            role: CopyRole::Active,
            since: now,
        });
    }
    next.generation = if next.copy(CopyRole::Active).is_some() || next.pending.is_some() {
        next.generation
    } else {
        app.generation
    };
    (next != *assign).then_some(next)
}

/// A move with the new copy first: switch when the new one is ready, give up when it cannot be.
fn settle_surge(
    app: &StoredApp,
    epoch: Epoch,
    memory: &mut Memory,
    world: &dyn World,
    outgoing: &AssignedCopy,
    next: &mut AssignRecord,
) {
    let now = world.now();
    let lost = |target: &Target| world.sight(&target.node, app.policy.detect_after) == Sight::Lost;
    let active = next.copy(CopyRole::Active).cloned();
    let turn = |next: &mut AssignRecord, target: &Target, role| {
        for copy in next.copies.iter_mut().filter(|c| c.target == *target) {
            set_role(copy, role, now);
        }
    };
    let Some(active) = active else {
        turn(next, &outgoing.target, CopyRole::Active);
        return;
    };
    let reported = report(memory, &active.target, epoch).map(|r| (r.state, r.message.clone()));
    if matches!(reported, Some((ReportedState::Ready, _))) || lost(&outgoing.target) {
        turn(next, &outgoing.target, CopyRole::Deleting);
        return;
    }
    let late = now.millis_since(active.since) > app.policy.ready_timeout.as_millis() as u64;
    let failed = matches!(reported, Some((ReportedState::Failed, _)));
    if late || failed || lost(&active.target) {
        let why = match reported.and_then(|(_, message)| message) {
            Some(message) => message,
            None if late => format!("not ready within {} s", app.policy.ready_timeout.as_secs()),
            None => "the site was lost".to_owned(),
        };
        memory.fail(active.target.clone(), why, now);
        turn(next, &active.target, CopyRole::Deleting);
        turn(next, &outgoing.target, CopyRole::Active);
    }
}

fn plan_running(
    app: &StoredApp,
    assign: &AssignRecord,
    epoch: Epoch,
    memory: &mut Memory,
    world: &dyn World,
) -> Step {
    let now = world.now();
    let Some(active) = assign.copy(CopyRole::Active) else {
        if assign.pending.is_some() {
            return Step::Wait(now.plus_millis(1000));
        }
        return plan_placement(app, memory, world, Some(assign), Trigger::SpecChanged);
    };
    let reported = report(memory, &active.target, epoch);
    if let Some(failed) = reported.filter(|r| r.state == ReportedState::Failed && r.retry_elsewhere)
    {
        let why = failed
            .message
            .clone()
            .unwrap_or_else(|| "the site could not run it".to_owned());
        if !memory.refusals.contains_key(&active.target) {
            memory.fail(active.target.clone(), why, now);
            return plan_placement(app, memory, world, Some(assign), Trigger::SiteFailed);
        }
    }
    if world.sight(&active.target.node, app.policy.detect_after) == Sight::Lost
        && app.policy.failover_mode == FailoverMode::Prompt
    {
        return plan_placement(app, memory, world, Some(assign), Trigger::SiteLost);
    }
    if assign.generation != app.generation {
        return plan_placement(app, memory, world, Some(assign), Trigger::SpecChanged);
    }
    let moving = assign.copy(CopyRole::Outgoing).is_some();
    if moving {
        let timeout = app.policy.ready_timeout.as_millis() as i64 + 1;
        return Step::Wait(active.since.plus_millis(timeout).max(now.plus_millis(100)));
    }
    let later = memory.not_before(now, app.policy.reschedule_interval.as_millis() as i64);
    if let Some(later) = later.filter(|_| memory.reserved.is_none()) {
        return Step::Wait(later);
    }
    plan_placement(app, memory, world, Some(assign), Trigger::Timer)
}

/// Decides, reserves, and turns the decision into an assignment.
fn plan_placement(
    app: &StoredApp,
    memory: &mut Memory,
    world: &dyn World,
    assign: Option<&AssignRecord>,
    trigger: Trigger,
) -> Step {
    let now = world.now();
    let current = assign
        .and_then(|a| a.copy(CopyRole::Active))
        .map(|c| c.target.clone());
    let decision = decide_for(app, memory, world, current.clone(), trigger);
    memory.next_look = now.plus_millis(app.policy.reschedule_interval.as_millis() as i64);
    let record = decision.record;
    let Some(chosen) = record.chosen.clone() else {
        memory.reserved = None;
        let before = memory
            .waiting
            .filter(|(generation, _)| *generation == record.generation);
        let (_, since) = *memory
            .waiting
            .insert(before.unwrap_or((record.generation, now)));
        let waited = now.millis_since(since) as i64;
        memory.next_look = now.plus_millis(waited.clamp(RETRY_MS_MIN, RETRY_MS_MAX));
        let shown = memory
            .unplaceable
            .as_ref()
            .is_some_and(|d| d.reason == record.reason && d.generation == record.generation);
        if shown {
            return Step::Wait(memory.next_look);
        }
        memory.unplaceable = Some(record.clone());
        return Step::Unplaceable(Box::new(record));
    };
    memory.unplaceable = None;
    if Some(&chosen) == current.as_ref() {
        memory.waiting = None;
        // While a move is on its way its lead counts on: see the reservation below.
        memory.better_since = decision.better_since;
        return keep(app, assign, record, world, memory);
    }
    match memory.reserved.take() {
        Some((target, record)) if target == chosen => Step::Assign(
            Box::new(moved(app, assign, chosen, world)),
            Some(Box::new(record)),
        ),
        _ => Step::Reserve(chosen, Box::new(record)),
    }
}

fn decide_for(
    app: &StoredApp,
    memory: &Memory,
    world: &dyn World,
    current: Option<Target>,
    trigger: Trigger,
) -> Decision {
    let sites = world
        .sites()
        .iter()
        .map(|site| {
            let mut site = site.clone();
            let sight = world.sight(&site.target.node, app.policy.detect_after);
            let is_current = current.as_ref() == Some(&site.target);
            let is_lost = sight == Sight::Lost;
            let prompt = app.policy.failover_mode == FailoverMode::Prompt;
            // Nobody knows whether an app that must not run twice still runs there.
            site.leaving &= prompt || !is_current || sight == Sight::Alive;
            site.lost = sight != Sight::Alive && (!is_current || (prompt && is_lost));
            if let Some(refusal) = memory.refusals.get(&site.target) {
                site.refusals.push(refusal.reason.clone());
            }
            site
        })
        .collect();
    decide(&Problem {
        app: app.app.clone(),
        uid: Some(app.uid),
        generation: app.generation,
        needs: app.needs.clone(),
        policy: app.policy.clone(),
        sites,
        current,
        definitions: world.definitions().clone(),
        decided_by: world.decided_by().to_owned(),
        trigger,
        now: world.now(),
        better_since: memory.better_since.clone(),
    })
}

fn keep(
    app: &StoredApp,
    assign: Option<&AssignRecord>,
    record: DecisionRecord,
    world: &dyn World,
    memory: &mut Memory,
) -> Step {
    memory.reserved = None;
    match assign {
        Some(assign) if assign.generation != app.generation => {
            let mut next = assign.clone();
            next.generation = app.generation;
            Step::Assign(Box::new(next), Some(Box::new(record)))
        }
        _ => {
            // A better site is only watched closely while its lead is being timed.
            let now = world.now();
            if memory.better_since.is_some() {
                memory.next_look = memory.next_look.min(now.plus_millis(1000));
            }
            Step::Wait(memory.next_look)
        }
    }
}

/// The assignment after a decision to run at `chosen`.
fn moved(
    app: &StoredApp,
    assign: Option<&AssignRecord>,
    chosen: Target,
    world: &dyn World,
) -> AssignRecord {
    let now = world.now();
    let mut next = assign.cloned().unwrap_or_else(|| AssignRecord {
        uid: app.uid,
        app: app.app.clone(),
        generation: app.generation,
        copies: Vec::new(),
        pending: None,
    });
    next.generation = app.generation;
    let old = next.copy(CopyRole::Active).map(|c| c.target.clone());
    let old_lost = old
        .as_ref()
        .is_some_and(|target| world.sight(&target.node, app.policy.detect_after) == Sight::Lost);
    let recreate = app.policy.migration_strategy == MigrationStrategy::Recreate;
    let old_role = if recreate || old_lost {
        CopyRole::Deleting
    } else {
        CopyRole::Outgoing
    };
    for copy in next
        .copies
        .iter_mut()
        .filter(|c| c.role == CopyRole::Active)
    {
        set_role(copy, old_role, now);
    }
    // A copy that was being deleted at the chosen site is wanted again.
    next.copies.retain(|copy| copy.target != chosen);
    if recreate && old.is_some() && !old_lost {
        next.pending = Some(chosen);
    } else {
        next.pending = None;
        next.copies.push(AssignedCopy {
            target: chosen,
            role: CopyRole::Active,
            since: now,
        });
    }
    next
}

/// Whether an outcome is worth an event and a place in the history.
pub const fn is_change(outcome: Outcome) -> bool {
    matches!(
        outcome,
        Outcome::Placed | Outcome::Moved | Outcome::Unplaceable
    )
}

#[cfg(test)]
mod tests;
