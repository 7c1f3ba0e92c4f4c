//! The decision: filter, score, choose, account for it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use krake_model::application::AppKey;
use krake_model::decision::{
    Candidate, DECISION_BYTES_MAX, DecisionRecord, Filter, Outcome, Rejection, Target, Term,
    Trigger, Verdict,
};
use krake_model::ids::AppUid;
use krake_model::metric::MetricDefinition;
use krake_model::resources::Resources;
use krake_model::time::Timestamp;

use crate::needs::Needs;
use crate::spec::ResolvedPolicy;

/// A site's backend as the decider sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct SiteState {
    /// Which.
    pub target: Target,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its raw metric values.
    pub metrics: BTreeMap<String, f64>,
    /// What is free.
    pub free: Resources,
    /// Kinds its cluster serves, as `group/version/Kind`.
    pub kinds: Arc<BTreeSet<String>>,
    /// Why its cluster cannot be used now, if it cannot.
    pub unhealthy: Option<String>,
    /// Its operator takes no new apps.
    pub cordoned: bool,
    /// Its node leaves the federation: what runs there has to go.
    pub leaving: bool,
    /// It counts as lost for this app.
    pub lost: bool,
    /// How long ago its report arrived; `None`: it never reported.
    pub report_age: Option<Duration>,
    /// Why it refused or failed this app lately.
    pub refusals: Vec<String>,
}

/// All a decision rests on.
#[derive(Debug, Clone)]
pub struct Problem {
    /// The app's name,
    pub app: AppKey,
    /// identity (none for a plan),
    pub uid: Option<AppUid>,
    /// and generation.
    pub generation: i64,
    /// What it needs.
    pub needs: Needs,
    /// What it asks for.
    pub policy: ResolvedPolicy,
    /// The sites.
    pub sites: Vec<SiteState>,
    /// Where it runs.
    pub current: Option<Target>,
    /// What metrics mean.
    pub definitions: BTreeMap<String, MetricDefinition>,
    /// The deciding site's name.
    pub decided_by: String,
    /// Why now.
    pub trigger: Trigger,
    /// The decider's clock.
    pub now: Timestamp,
    /// Since when another site has been better, from the decision before.
    pub better_since: Option<(Target, Timestamp)>,
}

/// A decision and what to remember for the next one.
#[derive(Debug, Clone, PartialEq)]
pub struct Decision {
    /// The account of it.
    pub record: DecisionRecord,
    /// Since when another site has been better than the current one by more than the stickiness.
    pub better_since: Option<(Target, Timestamp)>,
}

struct Judged<'a> {
    site: &'a SiteState,
    candidate: Candidate,
    tie: [u8; 32],
}

/// Decides. Scores are weighted means of normalised metrics (0 worst, 1 best; a metric that a site
/// does not report counts as worst), the current site gets the stickiness on top, ties are broken
/// by rendezvous hash of app and node (Thaler and Ravishankar 1998).
pub fn decide(problem: &Problem) -> Decision {
    let mut judged: Vec<Judged<'_>> = problem
        .sites
        .iter()
        .map(|site| judge(problem, site))
        .collect();
    judged.sort_by(|a, b| {
        let score = |j: &Judged<'_>| j.candidate.score.unwrap_or(f64::NEG_INFINITY);
        score(b)
            .total_cmp(&score(a))
            .then_with(|| match (a.candidate.score, b.candidate.score) {
                (None, None) => Ordering::Equal,
                _ => b.tie.cmp(&a.tie),
            })
            .then_with(|| a.site.target.site.cmp(&b.site.target.site))
            .then_with(|| a.site.target.cmp(&b.site.target))
    });
    let choice = choose(problem, &judged);
    for entry in &mut judged {
        if choice.chosen.as_ref() == Some(&entry.site.target) {
            entry.candidate.verdict = Verdict::Chosen;
        }
    }
    let mut record = DecisionRecord {
        id: String::new(),
        app: problem.app.clone(),
        uid: problem.uid,
        generation: problem.generation,
        decided_at: problem.now,
        decided_by: problem.decided_by.clone(),
        trigger: problem.trigger,
        outcome: choice.outcome,
        chosen: choice.chosen,
        previous: problem.current.clone(),
        reason: choice.reason,
        weights: problem.policy.weights.clone(),
        stickiness: problem.policy.stickiness,
        needs: problem.needs.resources,
        required_kinds: problem.needs.kinds.iter().cloned().collect(),
        candidates: judged.into_iter().map(|entry| entry.candidate).collect(),
    };
    record.id = identify(&record);
    shorten(&mut record);
    Decision {
        record,
        better_since: choice.better_since,
    }
}

fn judge<'a>(problem: &Problem, site: &'a SiteState) -> Judged<'a> {
    let is_current = problem.current.as_ref() == Some(&site.target);
    let rejections = filter(problem, site, is_current);
    let mut terms = Vec::new();
    let (mut sum, mut weight_sum) = (0.0, 0.0);
    for (metric, weight) in &problem.policy.weights {
        let raw = site.metrics.get(metric).copied();
        let normalized = match (raw, problem.definitions.get(metric)) {
            (Some(raw), Some(definition)) => definition.normalize(raw),
            _ => 0.0,
        };
        sum += weight * normalized;
        weight_sum += weight;
        terms.push(Term {
            metric: metric.clone(),
            raw,
            normalized,
            weight: *weight,
        });
    }
    let stickiness = if is_current {
        problem.policy.stickiness
    } else {
        0.0
    };
    let mean = if weight_sum > 0.0 {
        sum / weight_sum
    } else {
        0.0
    };
    let suitable = rejections.is_empty();
    let age = site.report_age.unwrap_or(Duration::MAX).as_millis();
    let candidate = Candidate {
        target: site.target.clone(),
        verdict: if suitable {
            Verdict::Suitable
        } else {
            Verdict::Filtered
        },
        score: suitable.then_some(mean + stickiness),
        stickiness,
        terms,
        rejections,
        report_age_ms: u64::try_from(age).unwrap_or(u64::MAX),
        free: site.free,
    };
    let mut hasher = blake3::Hasher::new();
    match problem.uid {
        Some(uid) => hasher.update(uid.as_uuid().as_bytes()),
        None => hasher.update(problem.app.to_string().as_bytes()),
    };
    hasher.update(site.target.node.as_bytes());
    hasher.update(site.target.backend.as_bytes());
    Judged {
        site,
        candidate,
        tie: *hasher.finalize().as_bytes(),
    }
}

/// Every reason against a site. The site where the app runs is not asked whether it takes new apps
/// or has room for it once more.
fn filter(problem: &Problem, site: &SiteState, is_current: bool) -> Vec<Rejection> {
    let mut rejections = Vec::new();
    let mut reject = |filter: Filter, message: String| {
        rejections.push(Rejection { filter, message });
    };
    if site.lost {
        reject(Filter::Lost, "it is not heard of".to_owned());
    } else if let Some(why) = &site.unhealthy {
        reject(Filter::Lost, format!("its cluster does not answer: {why}"));
    }
    if site.leaving {
        reject(Filter::Cordoned, "it is leaving the federation".to_owned());
    } else if site.cordoned && !is_current {
        reject(
            Filter::Cordoned,
            "its operator takes no new apps".to_owned(),
        );
    }
    match site.report_age {
        None => reject(Filter::Stale, "it has not reported yet".to_owned()),
        Some(age) if age > problem.policy.max_metric_age => reject(
            Filter::Stale,
            format!(
                "its report is {} s old, at most {} s are allowed",
                age.as_secs(),
                problem.policy.max_metric_age.as_secs()
            ),
        ),
        Some(_) => {}
    }
    for constraint in &problem.policy.require {
        if let Err(message) = constraint.check(&site.labels, &site.metrics) {
            let kind = match constraint {
                crate::constraint::Constraint::Label { .. } => Filter::Label,
                crate::constraint::Constraint::Metric { .. } => Filter::Metric,
            };
            reject(kind, message);
        }
    }
    let missing: Vec<&str> = problem
        .needs
        .kinds
        .iter()
        .filter(|kind| !site.kinds.contains(*kind))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() && site.report_age.is_some() {
        reject(
            Filter::Kind,
            format!("its cluster does not serve {}", missing.join(", ")),
        );
    }
    let needs = &problem.needs.resources;
    if !is_current && !needs.fits(&site.free) {
        reject(Filter::Capacity, capacity_message(needs, &site.free));
    }
    for reason in &site.refusals {
        reject(Filter::Refused, reason.clone());
    }
    rejections
}

fn capacity_message(needs: &Resources, free: &Resources) -> String {
    let mut parts = Vec::new();
    if needs.cpu_millis > free.cpu_millis {
        parts.push(format!(
            "needs {}m CPU, {}m are free",
            needs.cpu_millis, free.cpu_millis
        ));
    }
    if needs.memory_bytes > free.memory_bytes {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        parts.push(format!(
            "needs {} MiB of memory, {} MiB are free",
            mib(needs.memory_bytes),
            free.memory_bytes >> 20
        ));
    }
    if needs.pods > free.pods {
        parts.push(format!("needs {} pods, {} are free", needs.pods, free.pods));
    }
    parts.join("; ")
}

struct Choice {
    outcome: Outcome,
    chosen: Option<Target>,
    reason: String,
    better_since: Option<(Target, Timestamp)>,
}

fn choose(problem: &Problem, judged: &[Judged<'_>]) -> Choice {
    let best = judged.first().filter(|j| j.candidate.score.is_some());
    let own = judged
        .iter()
        .find(|j| problem.current.as_ref() == Some(&j.site.target));
    let stay = |reason: String, better_since| Choice {
        outcome: Outcome::Kept,
        chosen: problem.current.clone(),
        reason,
        better_since,
    };
    let Some(best) = best else {
        // A running copy is not given up while nowhere is better.
        if let Some(own) = own.filter(|own| !own.site.lost) {
            let why = first_rejection(own);
            return stay(
                format!(
                    "{} stays although {why}: no other site fits",
                    own.site.target
                ),
                None,
            );
        }
        return Choice {
            outcome: Outcome::Unplaceable,
            chosen: None,
            reason: unplaceable(judged),
            better_since: None,
        };
    };
    let Some(current) = &problem.current else {
        return Choice {
            outcome: Outcome::Placed,
            chosen: Some(best.site.target.clone()),
            reason: best_of(judged),
            better_since: None,
        };
    };
    let moved = |reason: String| Choice {
        outcome: Outcome::Moved,
        chosen: Some(best.site.target.clone()),
        reason,
        better_since: None,
    };
    if best.site.target == *current {
        let next = judged.get(1).and_then(|j| Some((j, j.candidate.score?)));
        let reason = match (next, best.candidate.score) {
            (Some((next, score)), Some(own)) => format!(
                "{current} stays: {} is better by {:.3} at most, the stickiness is {}",
                next.site.target,
                (score - (own - best.candidate.stickiness)).max(0.0),
                problem.policy.stickiness
            ),
            _ => format!("{current} stays: no other site fits"),
        };
        return stay(reason, None);
    }
    if own.is_none_or(|own| own.site.lost) {
        return moved(format!("{current} is lost; {}", best_of(judged)));
    }
    if !problem.policy.migration_enabled {
        return stay(
            format!("{current} stays: migration is disabled (spec.migration.enabled)"),
            None,
        );
    }
    timed(problem, current, own, best, judged, moved, stay)
}

/// A better site must stay better for a while, unless the user just changed the spec or the
/// current site breaks a hard condition.
fn timed(
    problem: &Problem,
    current: &Target,
    own: Option<&Judged<'_>>,
    best: &Judged<'_>,
    judged: &[Judged<'_>],
    moved: impl Fn(String) -> Choice,
    stay: impl Fn(String, Option<(Target, Timestamp)>) -> Choice,
) -> Choice {
    let broken = own.filter(|own| own.candidate.score.is_none());
    let hard = broken.is_some_and(|own| {
        own.candidate
            .rejections
            .iter()
            .any(|r| !matches!(r.filter, Filter::Stale | Filter::Lost))
    });
    let why = match broken {
        Some(own) => format!("{current}: {}", first_rejection(own)),
        None => format!(
            "{} is better than {current} by more than the stickiness {}",
            best.site.target, problem.policy.stickiness
        ),
    };
    let since = problem
        .better_since
        .as_ref()
        .map_or(problem.now, |(_, since)| *since);
    let lasted = problem.now.millis_since(since);
    let hold = problem.policy.hold_for.as_millis() as u64;
    if hard || problem.trigger == Trigger::SpecChanged || lasted >= hold {
        return moved(format!("{why}; {}", best_of(judged)));
    }
    stay(
        format!(
            "{why} for {} s; it moves after {} s",
            lasted / 1000,
            hold / 1000
        ),
        Some((best.site.target.clone(), since)),
    )
}

fn first_rejection(judged: &Judged<'_>) -> String {
    judged
        .candidate
        .rejections
        .first()
        .map_or_else(String::new, |rejection| rejection.message.clone())
}

fn best_of(judged: &[Judged<'_>]) -> String {
    let suitable: Vec<(&Judged<'_>, f64)> = judged
        .iter()
        .filter_map(|j| Some((j, j.candidate.score?)))
        .collect();
    match &suitable[..] {
        [] => "no site fits".to_owned(),
        [(only, score)] => format!(
            "{} is the only site that fits, of {} (score {score:.3})",
            only.site.target,
            judged.len()
        ),
        [(best, score), (next, second), ..] => format!(
            "{} scores best of {} sites that fit ({score:.3}; next is {} with {second:.3})",
            best.site.target,
            suitable.len(),
            next.site.target
        ),
    }
}

fn unplaceable(judged: &[Judged<'_>]) -> String {
    if judged.is_empty() {
        return "no site is in the federation".to_owned();
    }
    let parts: Vec<String> = judged
        .iter()
        .take(5)
        .map(|j| format!("{}: {}", j.site.target, first_rejection(j)))
        .collect();
    let more = judged.len().saturating_sub(5);
    let rest = if more > 0 {
        format!("; and {more} more")
    } else {
        String::new()
    };
    format!(
        "none of {} sites fits: {}{rest}",
        judged.len(),
        parts.join("; ")
    )
}

/// Equal inputs give equal ids: the time of the decision and ages of reports do not count.
fn identify(record: &DecisionRecord) -> String {
    let mut bare = record.clone();
    bare.decided_at = Timestamp::from_millis(0);
    for candidate in &mut bare.candidates {
        candidate.report_age_ms = 0;
    }
    let json = serde_json::to_vec(&bare).unwrap_or_default();
    let hash = blake3::hash(&json).to_hex();
    format!("d-{}", &hash[..8])
}

/// Keeps the record within its limit: first the terms of the worst candidates go, then they.
fn shorten(record: &mut DecisionRecord) {
    let size = |record: &DecisionRecord| serde_json::to_vec(record).map_or(0, |json| json.len());
    let mut last = record.candidates.len();
    while size(record) > DECISION_BYTES_MAX && last > 10 {
        last -= 5;
        for candidate in record.candidates.iter_mut().skip(last) {
            candidate.terms.clear();
            candidate.rejections.truncate(1);
        }
    }
    while size(record) > DECISION_BYTES_MAX && record.candidates.len() > 1 {
        record.candidates.pop();
    }
}

#[cfg(test)]
mod tests {
    use krake_model::application::{FailoverMode, MigrationStrategy};
    use krake_model::ids::NodeId;
    use krake_model::metric::{default_definitions, default_weights};

    use super::*;
    use crate::constraint;

    fn target(name: &str) -> Target {
        Target {
            node: NodeId::from_bytes([name.as_bytes()[0]; 32]),
            site: name.to_owned(),
            backend: "default".to_owned(),
        }
    }

    fn site(name: &str, carbon: f64) -> SiteState {
        SiteState {
            target: target(name),
            labels: BTreeMap::from([("country".to_owned(), name[..2].to_uppercase())]),
            metrics: BTreeMap::from([
                ("carbon".to_owned(), carbon),
                ("price".to_owned(), 0.1),
                ("latency".to_owned(), 10.0),
            ]),
            free: Resources {
                cpu_millis: 4000,
                memory_bytes: 1 << 33,
                pods: 100,
            },
            kinds: BTreeSet::from(["v1/ConfigMap".to_owned()]).into(),
            unhealthy: None,
            cordoned: false,
            leaving: false,
            lost: false,
            report_age: Some(Duration::from_secs(1)),
            refusals: Vec::new(),
        }
    }

    fn problem(sites: Vec<SiteState>) -> Problem {
        Problem {
            app: AppKey::new("default", "shop"),
            uid: None,
            generation: 1,
            needs: Needs {
                resources: Resources {
                    cpu_millis: 500,
                    memory_bytes: 1 << 20,
                    pods: 2,
                },
                kinds: BTreeSet::from(["v1/ConfigMap".to_owned()]),
            },
            policy: ResolvedPolicy {
                require: Vec::new(),
                weights: default_weights(),
                stickiness: 0.1,
                max_metric_age: Duration::from_secs(60),
                reschedule_interval: Duration::from_secs(60),
                hold_for: Duration::from_secs(30),
                migration_enabled: true,
                migration_strategy: MigrationStrategy::Surge,
                ready_timeout: Duration::from_secs(60),
                detect_after: Duration::from_secs(15),
                failover_mode: FailoverMode::Prompt,
            },
            sites,
            current: None,
            definitions: default_definitions(),
            decided_by: "dresden".to_owned(),
            trigger: Trigger::Timer,
            now: Timestamp::from_millis(1_000_000),
            better_since: None,
        }
    }

    fn chosen(problem: &Problem) -> Option<String> {
        decide(problem).record.chosen.map(|target| target.site)
    }

    #[test]
    fn the_best_score_wins_and_each_site_is_accounted_for() {
        let decision = decide(&problem(vec![
            site("dresden", 400.0),
            site("stockholm", 20.0),
        ]));
        assert_eq!(decision.record.outcome, Outcome::Placed);
        assert_eq!(decision.record.candidates.len(), 2);
        assert_eq!(decision.record.candidates[0].target.site, "stockholm");
        assert_eq!(decision.record.candidates[0].verdict, Verdict::Chosen);
        assert!(
            decision
                .record
                .reason
                .contains("stockholm scores best of 2")
        );
    }

    #[test]
    fn each_filter_excludes_and_says_why() {
        type Change = fn(&mut SiteState);
        let cases: [(Filter, Change); 8] = [
            (Filter::Lost, |s| s.lost = true),
            (Filter::Lost, |s| s.unhealthy = Some("timeout".to_owned())),
            (Filter::Cordoned, |s| s.cordoned = true),
            (Filter::Cordoned, |s| s.leaving = true),
            (Filter::Stale, |s| {
                s.report_age = Some(Duration::from_secs(61))
            }),
            (Filter::Kind, |s| s.kinds = Arc::default()),
            (Filter::Capacity, |s| s.free.cpu_millis = 499),
            (Filter::Refused, |s| s.refusals.push("full".to_owned())),
        ];
        for (filter, change) in cases {
            let mut best = site("stockholm", 20.0);
            change(&mut best);
            let decision = decide(&problem(vec![best, site("dresden", 400.0)]));
            assert_eq!(decision.record.chosen.unwrap().site, "dresden", "{filter}");
            let last = decision.record.candidates.last().unwrap();
            assert_eq!(last.rejections[0].filter, filter);
        }
        let mut constrained = problem(vec![site("stockholm", 20.0), site("dresden", 400.0)]);
        constrained.policy.require =
            vec![constraint::parse("country = DR", &constrained.definitions).unwrap()];
        assert_eq!(chosen(&constrained).unwrap(), "dresden");
        constrained.policy.require =
            vec![constraint::parse("carbon > 1000", &constrained.definitions).unwrap()];
        let decision = decide(&constrained);
        assert_eq!(decision.record.outcome, Outcome::Unplaceable);
        assert!(
            decision.record.reason.contains("carbon is 20"),
            "{}",
            decision.record.reason
        );
    }

    #[test]
    fn a_running_app_moves_only_for_a_lasting_gain_above_the_stickiness() {
        let mut running = problem(vec![site("dresden", 150.0), site("stockholm", 20.0)]);
        running.current = Some(target("dresden"));
        // 130 g of 1000 at weight 0.5 are 0.065: less than 0.1.
        assert_eq!(decide(&running).record.outcome, Outcome::Kept);
        running.sites[0].metrics.insert("carbon".to_owned(), 400.0);
        let first = decide(&running);
        assert_eq!(first.record.outcome, Outcome::Kept);
        let since = first.better_since.clone().unwrap();
        running.better_since = Some(since);
        running.now = running.now.plus_millis(29_000);
        assert_eq!(decide(&running).record.outcome, Outcome::Kept);
        running.now = running.now.plus_millis(1_000);
        assert_eq!(decide(&running).record.outcome, Outcome::Moved);
        running.policy.migration_enabled = false;
        assert_eq!(decide(&running).record.outcome, Outcome::Kept);
        running.sites[0].lost = true;
        assert_eq!(decide(&running).record.outcome, Outcome::Moved);
    }

    #[test]
    fn cordon_and_full_do_not_drive_out_what_runs_there() {
        let mut running = problem(vec![site("dresden", 20.0), site("stockholm", 20.0)]);
        running.current = Some(target("dresden"));
        running.sites[0].cordoned = true;
        running.sites[0].free = Resources::ZERO;
        assert_eq!(decide(&running).record.outcome, Outcome::Kept);
    }

    #[test]
    fn what_runs_at_a_site_that_leaves_moves_at_once_if_it_can() {
        let mut running = problem(vec![site("dresden", 20.0), site("stockholm", 400.0)]);
        running.current = Some(target("dresden"));
        running.sites[0].leaving = true;
        let moved = decide(&running).record;
        assert_eq!(moved.outcome, Outcome::Moved);
        assert!(moved.reason.contains("leaving"), "{}", moved.reason);
        running.policy.migration_enabled = false;
        assert_eq!(decide(&running).record.outcome, Outcome::Kept);
        running.policy.migration_enabled = true;
        running.sites[1].cordoned = true;
        let kept = decide(&running).record;
        assert_eq!(kept.outcome, Outcome::Kept);
        assert!(
            kept.reason.contains("no other site fits"),
            "{}",
            kept.reason
        );
    }

    #[test]
    fn order_of_the_sites_does_not_matter_and_ties_spread() {
        let names = ["ab", "bc", "cd", "de", "ef"];
        let mut used = BTreeSet::new();
        for app in 0..50 {
            let mut forward = problem(names.iter().map(|n| site(n, 100.0)).collect());
            forward.app.name = format!("app-{app}");
            let mut backward = forward.clone();
            backward.sites.reverse();
            assert_eq!(decide(&forward), decide(&backward));
            used.insert(chosen(&forward).unwrap());
        }
        assert!(used.len() >= 4, "{used:?}");
    }

    #[test]
    fn a_record_stays_within_its_limit() {
        let sites = (0..400)
            .map(|n| {
                let mut s = site("stockholm", f64::from(n));
                s.target.site = format!("site-{n}");
                s.target.node = NodeId::from_bytes([(n % 251) as u8; 32]);
                s
            })
            .collect();
        let record = decide(&problem(sites)).record;
        assert!(serde_json::to_vec(&record).unwrap().len() <= DECISION_BYTES_MAX);
        assert!(record.candidates[0].verdict == Verdict::Chosen);
    }
}
