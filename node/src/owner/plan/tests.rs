//! The owner's plan, stepped through with sites, time and reports made up.

use std::collections::{BTreeMap, BTreeSet};

use krake_model::Resources;
use krake_model::application::Source;
use krake_placement::spec::{Defaults, validate};
use serde_json::json;

use super::*;

const HOLD: i64 = 10_000;

struct Sky {
    sites: Vec<SiteState>,
    lost: BTreeSet<NodeId>,
    suspect: BTreeSet<NodeId>,
    left: BTreeSet<NodeId>,
    isolated: bool,
    definitions: BTreeMap<String, MetricDefinition>,
    now: Timestamp,
}

impl World for Sky {
    fn sites(&self) -> &[SiteState] {
        &self.sites
    }
    fn sight(&self, node: &NodeId, _: Duration) -> Sight {
        if self.lost.contains(node) {
            Sight::Lost
        } else if self.suspect.contains(node) {
            Sight::Suspect
        } else {
            Sight::Alive
        }
    }
    fn has_left(&self, node: &NodeId) -> bool {
        self.left.contains(node)
    }
    fn isolated(&self) -> bool {
        self.isolated
    }
    fn definitions(&self) -> &BTreeMap<String, MetricDefinition> {
        &self.definitions
    }
    fn decided_by(&self) -> &'static str {
        "here"
    }
    fn now(&self) -> Timestamp {
        self.now
    }
}

fn node(number: u8) -> NodeId {
    NodeId::from_bytes([number; 32])
}

fn site(number: u8, carbon: f64) -> SiteState {
    SiteState {
        target: Target {
            node: node(number),
            site: format!("site{number}"),
            backend: "default".to_owned(),
        },
        labels: BTreeMap::new(),
        metrics: BTreeMap::from([("carbon".to_owned(), carbon)]),
        free: Resources {
            cpu_millis: 1000,
            memory_bytes: 1 << 30,
            pods: 10,
        },
        kinds: BTreeSet::from(["v1/ConfigMap".to_owned()]).into(),
        unhealthy: None,
        cordoned: false,
        leaving: false,
        lost: false,
        report_age: Some(Duration::ZERO),
        refusals: Vec::new(),
    }
}

struct Play {
    app: StoredApp,
    memory: Memory,
    world: Sky,
    index: u64,
    tombstone: Option<Tombstone>,
    finished: bool,
    /// Reservations asked for, and whether sites say yes.
    asked: Vec<String>,
    refusing: BTreeSet<NodeId>,
    /// How long a site takes to answer, in milliseconds.
    answer_time: i64,
}

impl Play {
    fn new(carbon: &[f64]) -> Self {
        Self::with(carbon, json!({}))
    }

    fn with(carbon: &[f64], extra: serde_json::Value) -> Self {
        let definitions = krake_model::metric::default_definitions();
        let mut spec = json!({
            "source": {"manifests": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}}]},
            "placement": {"weights": {"carbon": 1.0}},
        });
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        let spec: ApplicationSpec = serde_json::from_value(spec).unwrap();
        assert_ne!(spec.source, Source::default());
        let defaults = Defaults {
            detect_after: Duration::from_secs(15),
            ready_timeout: Duration::from_secs(60),
            reschedule_interval: Duration::from_secs(5),
            hold_for: Duration::from_millis(HOLD as u64),
            max_metric_age: Duration::from_secs(60),
        };
        let (policy, needs) = validate(&spec, "default", &definitions, &defaults).unwrap();
        Self {
            app: StoredApp {
                app: AppKey::new("default", "shop"),
                uid: AppUid::new(uuid::Uuid::from_u128(1)),
                generation: 1,
                spec,
                needs,
                policy,
                deleting: false,
                assign: None,
                decision: None,
            },
            memory: Memory::default(),
            world: Sky {
                sites: carbon
                    .iter()
                    .zip(1..)
                    .map(|(carbon, number)| site(number, *carbon))
                    .collect(),
                lost: BTreeSet::new(),
                suspect: BTreeSet::new(),
                left: BTreeSet::new(),
                isolated: false,
                definitions,
                now: Timestamp::from_millis(1_000_000),
            },
            index: 1,
            tombstone: None,
            finished: false,
            asked: Vec::new(),
            refusing: BTreeSet::new(),
            answer_time: 0,
        }
    }

    /// Plans and carries out until there is nothing to do now; at most a few steps.
    fn settle(&mut self) -> Timestamp {
        for _ in 0..12 {
            match plan(&self.app, &mut self.memory, &self.world) {
                Step::Wait(until) => return until,
                Step::Reserve(target, record) => {
                    self.asked.push(target.site.clone());
                    self.world.now = self.world.now.plus_millis(self.answer_time);
                    if self.refusing.contains(&target.node) {
                        self.memory
                            .refuse(target, "full".to_owned(), self.world.now);
                    } else {
                        self.memory.reserved = Some((target, *record));
                    }
                }
                Step::Assign(next, decision) => {
                    self.index += 1;
                    let epoch = Epoch {
                        incarnation: 0,
                        term: 1,
                        index: self.index,
                    };
                    self.app.assign = Some((*next, epoch));
                    self.app.decision = decision.map(|d| *d).or(self.app.decision.take());
                    self.memory.reserved = None;
                    self.memory.waiting = None;
                    self.memory.better_since = None;
                }
                Step::Unplaceable(_) => {}
                Step::Finish(tombstone) => {
                    self.tombstone = tombstone;
                    self.finished = true;
                    return self.world.now;
                }
            }
        }
        panic!("it does not come to rest");
    }

    fn report(&mut self, number: u8, state: ReportedState) {
        let (_, epoch) = self.app.assign.clone().unwrap();
        let report = CopyReport {
            uid: self.app.uid,
            app: self.app.app.clone(),
            node: node(number),
            backend: "default".to_owned(),
            epoch,
            state,
            ready: 1,
            wanted: 1,
            namespace: None,
            message: None,
            retry_elsewhere: state == ReportedState::Failed,
        };
        self.memory
            .reports
            .insert((node(number), "default".to_owned()), report);
    }

    /// `site1:active site2:deleting`
    fn copies(&self) -> String {
        let Some((assign, _)) = &self.app.assign else {
            return String::new();
        };
        let copies: Vec<String> = assign
            .copies
            .iter()
            .map(|copy| {
                let role = serde_json::to_value(copy.role).unwrap();
                format!("{}:{}", copy.target.site, role.as_str().unwrap())
            })
            .collect();
        copies.join(" ")
    }

    fn pass(&mut self, millis: i64) {
        self.world.now = self.world.now.plus_millis(millis);
        self.memory.next_look = Timestamp::default();
    }
}

#[test]
fn the_best_site_is_asked_and_gets_the_app() {
    let mut play = Play::new(&[300.0, 20.0, 500.0]);
    play.settle();
    assert_eq!(play.asked, ["site2"]);
    assert_eq!(play.copies(), "site2:active");
}

#[test]
fn what_runs_at_a_site_that_leaves_moves_before_its_old_copy_goes() {
    let mut play = Play::new(&[20.0, 300.0]);
    play.settle();
    play.report(1, ReportedState::Ready);
    play.world.sites[0].leaving = true;
    play.pass(0);
    play.settle();
    assert_eq!(play.copies(), "site1:outgoing site2:active");
    play.report(2, ReportedState::Ready);
    play.settle();
    assert_eq!(play.copies(), "site1:deleting site2:active");
    play.report(1, ReportedState::Gone);
    play.settle();
    assert_eq!(play.copies(), "site2:active");
}

#[test]
fn an_app_that_must_not_run_twice_waits_for_its_lost_site_until_that_has_left() {
    let failover = json!({"failover": {"mode": "never"}});
    let mut play = Play::with(&[20.0, 300.0], failover);
    play.settle();
    play.report(1, ReportedState::Ready);
    play.world.sites[0].leaving = true;
    play.world.suspect.insert(node(1));
    play.pass(60_000);
    play.settle();
    assert_eq!(play.copies(), "site1:active");
    play.world.lost.insert(node(1));
    play.pass(60_000);
    play.settle();
    assert_eq!(play.copies(), "site1:active");
    // It was taken out by force: what is there is its operator's.
    play.world.sites.remove(0);
    play.world.left.insert(node(1));
    play.pass(0);
    play.settle();
    assert_eq!(play.copies(), "site2:active");
}

#[test]
fn what_a_site_that_left_should_confirm_is_not_waited_for() {
    // Half moved: the new copy's site goes, the old one's stays.
    let mut play = Play::new(&[20.0, 300.0, 400.0]);
    play.settle();
    play.report(1, ReportedState::Ready);
    play.world.sites[0].leaving = true;
    play.pass(0);
    play.settle();
    assert_eq!(play.copies(), "site1:outgoing site2:active");
    play.world.sites.remove(1);
    play.world.left.insert(node(2));
    play.pass(0);
    play.settle();
    assert_eq!(play.copies(), "site1:outgoing site3:active");
    // Deleted: the one that left is in no tombstone.
    play.world.sites.remove(0);
    play.world.left.insert(node(1));
    play.app.deleting = true;
    play.settle();
    play.report(3, ReportedState::Gone);
    play.settle();
    assert!(play.finished && play.tombstone.is_none());
}

#[test]
fn a_refusal_leads_to_the_next_best() {
    let mut play = Play::new(&[300.0, 20.0, 500.0]);
    play.refusing.insert(node(2));
    play.settle();
    assert_eq!(play.asked, ["site2", "site1"]);
    assert_eq!(play.copies(), "site1:active");
}

#[test]
fn an_app_that_fits_nowhere_is_tried_again_less_and_less_often() {
    let mut play = Play::new(&[30.0]);
    play.world.lost.insert(node(1));
    let mut waits = Vec::new();
    for _ in 0..7 {
        let wait = play.settle().millis_since(play.world.now);
        waits.push(wait);
        play.pass(wait as i64);
    }
    assert_eq!(waits, [1000, 1000, 2000, 4000, 8000, 10_000, 10_000]);
    // A changed spec begins to wait anew.
    play.app.generation += 1;
    assert_eq!(play.settle().millis_since(play.world.now), 1000);
    // It is not decided before its time, unless something speaks for it.
    play.world.lost.clear();
    play.settle();
    assert_eq!(play.copies(), "");
    play.memory.ask_again(|_| false);
    play.settle();
    assert_eq!(play.copies(), "site1:active");
}

#[test]
fn a_site_that_said_no_is_asked_again_when_something_speaks_for_it_or_after_a_while() {
    let mut play = Play::new(&[30.0]);
    play.refusing.insert(node(1));
    play.settle();
    play.pass(1000);
    play.settle();
    assert_eq!(play.asked.len(), 1, "it said no a second ago");
    assert!(play.memory.ask_again(|at| at.node == node(2)));
    play.settle();
    assert_eq!(play.asked.len(), 1, "another one has more room");
    assert!(play.memory.ask_again(|at| at.node == node(1)));
    play.settle();
    assert_eq!(play.asked.len(), 2, "it may still say no");
    // Asking it was no end of the wait.
    assert_eq!(play.settle().millis_since(play.world.now), 1000);
    play.pass(9_999);
    play.settle();
    assert_eq!(play.asked.len(), 2);
    play.refusing.clear();
    play.pass(1);
    play.settle();
    assert_eq!(play.copies(), "site1:active");
    assert!(!play.memory.ask_again(|_| true), "it waits for nothing");
}

#[test]
fn sites_that_take_long_to_say_no_are_asked_once_each() {
    let mut play = Play::new(&[30.0, 40.0, 50.0, 60.0]);
    play.refusing.extend((1..=4).map(node));
    // More than a refusal lasts, for all of them.
    play.answer_time = 4_000;
    play.settle();
    assert_eq!(play.asked, ["site1", "site2", "site3", "site4"]);
    play.pass(10_000);
    play.settle();
    assert_eq!(play.asked.len(), 8);
}

#[test]
fn nothing_speaks_for_a_site_where_the_app_failed() {
    let mut play = Play::new(&[30.0]);
    play.settle();
    play.report(1, ReportedState::Failed);
    play.settle();
    let refused = play.memory.refusals.clone();
    assert_eq!(refused.len(), 1);
    play.memory.ask_again(|_| true);
    assert_eq!(play.memory.refusals, refused);
}

#[test]
fn a_clock_that_is_set_back_stops_nothing() {
    let mut play = Play::new(&[30.0]);
    play.refusing.insert(node(1));
    play.settle();
    play.refusing.clear();
    play.world.now = play.world.now.plus_millis(-3_600_000);
    play.settle();
    assert_eq!(play.copies(), "site1:active");
}

#[test]
fn a_move_waits_for_its_time_and_the_old_copy_for_the_new() {
    let mut play = Play::new(&[300.0, 20.0]);
    play.settle();
    play.report(2, ReportedState::Ready);
    play.world.sites[0].metrics.insert("carbon".to_owned(), 0.0);
    play.pass(1);
    play.settle();
    assert_eq!(play.copies(), "site2:active", "a small gain moves nothing");
    play.world.sites[1]
        .metrics
        .insert("carbon".to_owned(), 400.0);
    play.pass(1);
    play.settle();
    assert_eq!(play.copies(), "site2:active", "the gain must last");
    play.pass(HOLD - 1);
    play.settle();
    assert_eq!(play.copies(), "site2:active");
    play.pass(1);
    play.settle();
    assert_eq!(play.copies(), "site2:outgoing site1:active");
    play.report(1, ReportedState::Progressing);
    play.settle();
    assert_eq!(play.copies(), "site2:outgoing site1:active");
    play.report(1, ReportedState::Ready);
    play.settle();
    assert_eq!(play.copies(), "site2:deleting site1:active");
    play.report(1, ReportedState::Ready);
    play.report(2, ReportedState::Gone);
    play.settle();
    assert_eq!(play.copies(), "site1:active");
}

#[test]
fn a_new_copy_that_fails_leaves_the_old_one_running() {
    let mut play = Play::new(&[500.0, 300.0]);
    play.settle();
    play.world.sites[0].metrics.insert("carbon".to_owned(), 0.0);
    play.pass(1);
    play.settle();
    play.pass(HOLD);
    play.settle();
    assert_eq!(play.copies(), "site2:outgoing site1:active");
    play.report(1, ReportedState::Failed);
    play.settle();
    assert_eq!(play.copies(), "site2:active site1:deleting");
}

#[test]
fn the_apps_of_a_lost_site_run_elsewhere_and_its_copy_is_removed_when_it_returns() {
    let mut play = Play::new(&[300.0, 20.0]);
    play.settle();
    play.world.lost.insert(node(2));
    play.settle();
    assert_eq!(play.copies(), "site2:deleting site1:active");
    play.report(1, ReportedState::Ready);
    play.settle();
    assert_eq!(
        play.copies(),
        "site2:deleting site1:active",
        "unseen is not gone (I11)"
    );
    play.world.lost.clear();
    play.report(2, ReportedState::Gone);
    play.settle();
    assert_eq!(play.copies(), "site1:active");
}

#[test]
fn an_app_at_a_suspect_site_is_looked_at_often() {
    let mut play = Play::new(&[300.0, 20.0]);
    play.settle();
    play.report(2, ReportedState::Ready);
    let calm = play.settle();
    assert_eq!(calm.millis_since(play.world.now), 5000);
    play.world.suspect.insert(node(1));
    assert_eq!(play.settle(), calm, "it does not run there");
    play.world.suspect.insert(node(2));
    assert_eq!(play.settle().millis_since(play.world.now), 500);
    assert_eq!(play.copies(), "site2:active");
    play.world.suspect.clear();
    // Others may hear a lost one again.
    play.world.lost.insert(node(2));
    play.settle();
    assert_eq!(play.copies(), "site2:deleting site1:active");
    play.report(1, ReportedState::Ready);
    play.memory.next_look = play.world.now.plus_millis(3_600_000);
    play.app.policy.reschedule_interval = Duration::from_secs(3_600);
    assert_eq!(play.settle().millis_since(play.world.now), 10_000);
}

#[test]
fn who_is_cut_off_decides_nothing() {
    let mut play = Play::new(&[300.0, 20.0]);
    play.settle();
    play.world.lost.insert(node(2));
    play.world.isolated = true;
    play.settle();
    assert_eq!(play.copies(), "site2:active");
}

#[test]
fn with_failover_never_the_app_waits_for_its_site() {
    let mut play = Play::with(&[300.0, 20.0], json!({"failover": {"mode": "never"}}));
    play.settle();
    play.world.lost.insert(node(2));
    play.pass(1);
    play.settle();
    assert_eq!(play.copies(), "site2:active");
}

#[test]
fn recreate_removes_the_old_copy_first() {
    let mut play = Play::with(
        &[500.0, 300.0],
        json!({"migration": {"strategy": "recreate"}}),
    );
    play.settle();
    play.world.sites[0].metrics.insert("carbon".to_owned(), 0.0);
    play.pass(1);
    play.settle();
    play.pass(HOLD);
    play.settle();
    assert_eq!(play.copies(), "site2:deleting");
    play.report(2, ReportedState::Gone);
    play.settle();
    assert_eq!(play.copies(), "site1:active");
}

#[test]
fn a_deleted_app_goes_when_every_site_has_confirmed_or_leaves_a_tombstone() {
    let mut play = Play::new(&[300.0, 20.0]);
    play.settle();
    play.app.deleting = true;
    play.settle();
    assert_eq!(play.copies(), "site2:deleting");
    assert!(!play.finished);
    play.report(2, ReportedState::Gone);
    play.settle();
    assert!(play.finished && play.tombstone.is_none());

    let mut play = Play::new(&[300.0, 20.0]);
    play.settle();
    play.world.lost.insert(node(2));
    play.app.deleting = true;
    play.settle();
    assert!(play.finished);
    assert_eq!(play.tombstone.unwrap().targets[0].site, "site2");
}
