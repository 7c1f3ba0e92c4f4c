//! What an app's status says: a pure function of its assignment, the sites' reports and what this
//! node sees. While a site is lost nothing is said to be ready there.

use std::time::Duration;

use krake_model::application::{
    AppPhase, ApplicationStatus, Condition, CopyRole, CopyState, CopyStatus,
};
use krake_model::decision::Trigger;
use krake_model::{DecisionRecord, Epoch, Timestamp};

use super::plan::{Memory, Sight, StoredApp, World};
use crate::records::{AssignRecord, AssignedCopy, CopyReport};

/// What a status is made from.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// What is stored of the app.
    pub app: &'a StoredApp,
    /// What the sites have reported.
    pub memory: &'a Memory,
    /// The status so far: unchanged states and conditions keep their times.
    pub before: &'a ApplicationStatus,
}

/// The status that is true now.
pub fn status(inputs: Inputs<'_>, world: &dyn World, lost_after: Duration) -> ApplicationStatus {
    let Inputs {
        app,
        memory,
        before,
    } = inputs;
    let now = world.now();
    let copies: Vec<CopyStatus> = match &app.assign {
        None => Vec::new(),
        Some((assign, epoch)) => assign
            .copies
            .iter()
            .map(|copy| copy_status(copy, *epoch, inputs, world, lost_after))
            .collect(),
    };
    let (phase, message) = phase(app, memory, &copies);
    let placed = app
        .assign
        .as_ref()
        .and_then(|(assign, _)| assign.copy(CopyRole::Active));
    let ready = matches!(phase, AppPhase::Running | AppPhase::Moving);
    let synced = copies.iter().any(|copy| {
        copy.role == CopyRole::Active
            && matches!(
                copy.state,
                CopyState::Ready | CopyState::Progressing | CopyState::Degraded
            )
    }) && app
        .assign
        .as_ref()
        .is_some_and(|(a, _)| a.generation == app.generation);
    let condition = |kind: &str, holds: bool, reason: String, message: String| {
        let status = if holds { "True" } else { "False" };
        let old = before.conditions.iter().find(|c| c.kind == kind);
        Condition {
            kind: kind.to_owned(),
            status: status.to_owned(),
            reason,
            message,
            last_transition_time: old.filter(|c| c.status == status).map_or_else(
                || now.to_seconds_string(),
                |c| c.last_transition_time.clone(),
            ),
            observed_generation: Some(app.generation),
        }
    };
    let placed_text = match (&placed, &memory.unplaceable) {
        (Some(copy), _) => format!("runs at {}", copy.target),
        (None, Some(decision)) => decision.reason.clone(),
        (None, None) => "waits for a decision".to_owned(),
    };
    let placed_reason = match phase {
        AppPhase::Unplaceable => "NoSuitableSite",
        AppPhase::Lost => "SiteLost",
        _ if placed.is_some() => "Placed",
        _ => "Pending",
    };
    let conditions = vec![
        condition("Ready", ready, format!("{phase:?}"), message.clone()),
        condition(
            "Placed",
            placed.is_some(),
            placed_reason.to_owned(),
            placed_text,
        ),
        condition(
            "Synced",
            synced,
            if synced { "Applied" } else { "NotApplied" }.to_owned(),
            if synced {
                "the spec is applied at its site"
            } else {
                message.as_str()
            }
            .to_owned(),
        ),
    ];
    ApplicationStatus {
        observed_generation: Some(app.generation),
        phase: Some(phase),
        conditions,
        copies,
        decision: app.decision.as_ref().map(|d: &DecisionRecord| d.id.clone()),
    }
}

fn copy_status(
    copy: &AssignedCopy,
    epoch: Epoch,
    inputs: Inputs<'_>,
    world: &dyn World,
    lost_after: Duration,
) -> CopyStatus {
    let reported = inputs
        .memory
        .reports
        .get(&(copy.target.node, copy.target.backend.clone()))
        .filter(|report| report.epoch == epoch || copy.role == CopyRole::Outgoing);
    let lost = world.sight(&copy.target.node, lost_after) == Sight::Lost;
    let state = match (copy.role, lost, reported) {
        (_, true, _) => CopyState::Unknown,
        (CopyRole::Deleting, false, _) => CopyState::Deleting,
        (_, false, Some(report)) => report.state.copy_state(),
        (_, false, None) => CopyState::Pending,
    };
    let message = match (lost, reported) {
        (true, _) => Some("the site is lost: nobody knows".to_owned()),
        (
            false,
            Some(CopyReport {
                message: Some(message),
                ..
            }),
        ) => Some(message.clone()),
        _ => None,
    };
    let old = inputs
        .before
        .copies
        .iter()
        .find(|c| c.site == copy.target.site && c.backend == copy.target.backend);
    let (ready, wanted) = match (lost, reported) {
        (false, Some(report)) => (report.ready, report.wanted),
        (true, Some(report)) => (0, report.wanted),
        (_, None) => (
            0,
            inputs.app.needs.resources.pods.min(u64::from(u32::MAX)) as u32,
        ),
    };
    CopyStatus {
        site: copy.target.site.clone(),
        backend: copy.target.backend.clone(),
        namespace: reported
            .and_then(|r| r.namespace.clone())
            .or_else(|| old.and_then(|c| c.namespace.clone())),
        role: copy.role,
        state,
        ready: format!("{ready}/{wanted}"),
        message,
        since: old
            .filter(|c| c.state == state)
            .map_or_else(|| world.now(), |c| c.since),
        epoch,
    }
}

fn phase(app: &StoredApp, memory: &Memory, copies: &[CopyStatus]) -> (AppPhase, String) {
    if app.deleting {
        let left: Vec<&str> = copies.iter().map(|c| c.site.as_str()).collect();
        let message = match left.as_slice() {
            [] => "nothing is left of it".to_owned(),
            sites => format!("is being removed at {}", sites.join(", ")),
        };
        return (AppPhase::Deleting, message);
    }
    let active = copies.iter().find(|c| c.role == CopyRole::Active);
    let outgoing = copies.iter().find(|c| c.role == CopyRole::Outgoing);
    match (active, outgoing, &memory.unplaceable) {
        (Some(new), Some(old), _) if old.state == CopyState::Ready => (
            AppPhase::Moving,
            format!("moves from {} to {}", old.site, new.site),
        ),
        (Some(copy), _, unplaceable) => phase_of_active(copy, unplaceable.as_ref()),
        (None, _, Some(decision)) => (AppPhase::Unplaceable, decision.reason.clone()),
        (None, _, None) => (AppPhase::Pending, "waits for a decision".to_owned()),
    }
}

fn phase_of_active(copy: &CopyStatus, unplaceable: Option<&DecisionRecord>) -> (AppPhase, String) {
    let detail = |text: &str| match &copy.message {
        Some(message) => format!("{text} at {}: {message}", copy.site),
        None => format!("{text} at {}", copy.site),
    };
    match copy.state {
        CopyState::Ready => (AppPhase::Running, format!("ready at {}", copy.site)),
        CopyState::Pending | CopyState::Progressing => {
            (AppPhase::Progressing, detail("becomes ready"))
        }
        CopyState::Degraded => (AppPhase::Degraded, detail("is not healthy")),
        CopyState::Failed => (AppPhase::Failed, detail("cannot run")),
        CopyState::Deleting => (AppPhase::Progressing, detail("is being replaced")),
        CopyState::Unknown => {
            let next = unplaceable.map_or_else(String::new, |d| format!("; {}", d.reason));
            (AppPhase::Lost, format!("site {} is lost{next}", copy.site))
        }
    }
}

/// A Kubernetes-shaped event about an app.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventDraft {
    /// `Normal` or `Warning`.
    pub kind: &'static str,
    /// CamelCase.
    pub reason: &'static str,
    /// A sentence.
    pub message: String,
}

/// The event that a new assignment is worth.
pub fn assign_event(
    old: Option<&AssignRecord>,
    new: &AssignRecord,
    decision: Option<&DecisionRecord>,
) -> Option<EventDraft> {
    let active = |assign: &AssignRecord| {
        assign
            .copy(CopyRole::Active)
            .map(|copy| copy.target.to_string())
    };
    let (decision, before) = (decision?, old.and_then(active));
    if before == active(new) {
        return None;
    }
    let pending = || new.pending.as_ref().map(ToString::to_string);
    let site = active(new).or_else(pending)?;
    let reason = match decision.trigger {
        Trigger::SiteLost => "FailedOver",
        _ if before.is_some() => "Moving",
        _ => "Placed",
    };
    Some(EventDraft {
        kind: "Normal",
        reason,
        message: format!("{site}: {}", decision.reason),
    })
}

/// The event that a change of phase is worth.
pub fn phase_event(before: &ApplicationStatus, after: &ApplicationStatus) -> Option<EventDraft> {
    if before.phase == after.phase {
        return None;
    }
    let (kind, reason) = match after.phase? {
        AppPhase::Running => ("Normal", "Ready"),
        AppPhase::Unplaceable => ("Warning", "NoSuitableSite"),
        AppPhase::Degraded => ("Warning", "Degraded"),
        AppPhase::Failed => ("Warning", "Failed"),
        AppPhase::Lost => ("Warning", "SiteLost"),
        AppPhase::Deleting => ("Normal", "Deleting"),
        AppPhase::Pending | AppPhase::Progressing | AppPhase::Moving => return None,
    };
    let ready = after.conditions.iter().find(|c| c.kind == "Ready")?;
    Some(EventDraft {
        kind,
        reason,
        message: ready.message.clone(),
    })
}

/// Whether two statuses say the same: times alone make no difference.
pub fn says_the_same(a: &ApplicationStatus, b: &ApplicationStatus) -> bool {
    let strip = |status: &ApplicationStatus| {
        let mut status = status.clone();
        for copy in &mut status.copies {
            copy.since = Timestamp::default();
        }
        for condition in &mut status.conditions {
            condition.last_transition_time.clear();
        }
        status
    };
    strip(a) == strip(b)
}
