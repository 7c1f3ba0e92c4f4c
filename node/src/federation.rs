//! What this node sees of the federation at one moment: for decisions, and for display.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use krake_gossip::{Network, Opinions, Verdict, View, verdict};
use krake_model::decision::Target;
use krake_model::report::BackendReport;
use krake_model::{Genesis, GroupId, MetricDefinition, NodeId, Resources, Revision, Timestamp};
use krake_placement::decide::SiteState;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::catalog::Catalog;
use crate::owner::plan::{Sight, World};
use crate::records::{self, Leaving};
use crate::store::Overlay;

/// Wall time.
pub fn now() -> Timestamp {
    Timestamp::from_millis(jiff::Timestamp::now().as_millisecond())
}

/// What everything in a node shares. Cheap to clone.
#[derive(Clone)]
pub struct Federation {
    /// The catalog.
    pub catalog: Catalog,
    /// The network.
    pub network: Network,
    /// The founding record.
    pub genesis: Arc<Genesis>,
    /// This node.
    pub own: NodeId,
    /// Its site's name.
    pub site: Arc<str>,
    /// Silence after which displays call a site lost.
    pub lost_after: Duration,
    /// What is committed of the sites, as of a revision of the meta group: every decision needs it.
    pub sites: Arc<Mutex<(Revision, Arc<Committed>)>>,
    /// Members that this node's groups know to be giving their votes away.
    pub giving_votes: Arc<Mutex<BTreeSet<NodeId>>>,
}

impl std::fmt::Debug for Federation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Federation")
            .field("site", &self.site)
            .finish_non_exhaustive()
    }
}

/// A moment of it.
#[derive(Debug, Clone)]
pub struct Moment {
    sites: Vec<SiteState>,
    committed: Arc<Committed>,
    opinions: Opinions,
    definitions: BTreeMap<String, MetricDefinition>,
    decided_by: String,
    now: Timestamp,
}

impl Moment {
    /// Replaces the time, for decisions that follow one another on the same view.
    #[must_use]
    pub const fn at(mut self, now: Timestamp) -> Self {
        self.now = now;
        self
    }
}

/// How a node appears to whoever has these opinions.
pub fn sight(opinions: &Opinions, node: &NodeId, detect_after: Duration) -> Sight {
    match verdict(opinions, *node, detect_after) {
        Verdict::Alive => Sight::Alive,
        Verdict::Lost => Sight::Lost,
        Verdict::Suspect | Verdict::Isolated => Sight::Suspect,
    }
}

impl World for Moment {
    fn sites(&self) -> &[SiteState] {
        &self.sites
    }

    fn sight(&self, node: &NodeId, detect_after: Duration) -> Sight {
        sight(&self.opinions, node, detect_after)
    }

    fn has_left(&self, node: &NodeId) -> bool {
        self.committed.departed.contains(node)
    }

    fn isolated(&self) -> bool {
        self.opinions.is_isolated()
    }

    fn definitions(&self) -> &BTreeMap<String, MetricDefinition> {
        &self.definitions
    }

    fn decided_by(&self) -> &str {
        &self.decided_by
    }

    fn now(&self) -> Timestamp {
        self.now
    }
}

/// The sites that there are, and who left.
#[derive(Debug, Default)]
pub struct Committed {
    sites: Vec<CommittedSite>,
    departed: BTreeSet<NodeId>,
}

/// The parts of a committed site that decisions use.
#[derive(Debug)]
pub struct CommittedSite {
    name: String,
    node: NodeId,
    labels: BTreeMap<String, String>,
    cordoned: bool,
    leaving: bool,
    /// API kinds that each backend serves. Shared: every decision looks at them.
    kinds: BTreeMap<String, Arc<BTreeSet<String>>>,
}

impl Federation {
    fn committed(&self) -> Arc<Committed> {
        let revision = self.catalog.host.revision(GroupId::META);
        let mut known = self.sites.lock();
        if known.0 != revision {
            // What is read may be newer than `revision`; then it is read once more than needed.
            let sites = self
                .catalog
                .read_all::<Value>(GroupId::META, "sites/")
                .into_iter()
                .filter_map(|(_, object, _)| committed_site(&object))
                .collect();
            let departed = self.catalog.departures().into_keys().collect();
            *known = (revision, Arc::new(Committed { sites, departed }));
        }
        Arc::clone(&known.1)
    }

    /// The nodes whose sites are to leave the federation.
    pub fn leaving(&self) -> BTreeSet<NodeId> {
        let committed = self.committed();
        let leaving = committed.sites.iter().filter(|site| site.leaving);
        leaving.map(|site| site.node).collect()
    }

    /// Whether this very site is to leave.
    pub fn is_leaving(&self) -> bool {
        let committed = self.committed();
        let mut sites = committed.sites.iter();
        sites.any(|site| site.node == self.own && site.leaving)
    }

    /// Whether somebody is left to carry on without the site of this name: another one that is not
    /// leaving, or, where it is not heard of itself, one whose leaving is called off then.
    pub fn may_leave(&self, name: &str) -> bool {
        let committed = self.committed();
        let sites = &committed.sites;
        let unheard = |site: &CommittedSite| self.is_unheard(&site.node);
        let gone = sites.iter().any(|site| site.name == name && unheard(site));
        let mut others = sites.iter().filter(|site| site.name != name);
        others.any(|site| !site.leaving || (gone && !unheard(site)))
    }

    /// Whether this node has not heard of another one for so long that displays may call it lost.
    pub fn is_unheard(&self, node: &NodeId) -> bool {
        let silence = self.network.opinions().silence.get(node).copied();
        silence.is_some_and(|silence| silence >= self.lost_after)
    }

    /// What is seen now.
    pub fn moment(&self) -> Moment {
        let committed = self.committed();
        let at = Instant::now();
        let sites = {
            // Borrowed for this only: borrowing it again, as `opinions` does, would wait for a
            // writer that waits for us.
            let view = self.network.view();
            let view = view.borrow();
            committed
                .sites
                .iter()
                .flat_map(|site| site_states(site, &view, at))
                .collect()
        };
        Moment {
            sites,
            committed,
            opinions: self.network.opinions(),
            definitions: self.genesis.metrics.clone(),
            decided_by: self.site.to_string(),
            now: now(),
        }
    }

    fn state_of(&self, node: &NodeId) -> &'static str {
        sight(&self.network.opinions(), node, self.lost_after).name()
    }

    fn add_site(&self, object: &mut Value) {
        let node = object.pointer("/spec/node").and_then(Value::as_str);
        let Some(node) = node.and_then(|text| text.parse::<NodeId>().ok()) else {
            return;
        };
        let view = self.network.view();
        let seen = view.borrow().get(&node).cloned();
        let mut status = json!({"state": self.state_of(&node)});
        if object.pointer("/metadata/deletionTimestamp").is_some() {
            let key = records::leaving_key(&node);
            let leaving = self.catalog.read::<Leaving>(GroupId::META, &key);
            let waits = leaving.map(|(leaving, _)| leaving.waits);
            status["leaving"] = waits
                .unwrap_or_else(|| "it has just begun to leave".to_owned())
                .into();
            if status["state"] == "Alive" {
                status["state"] = "Leaving".into();
            }
        }
        if let Some(seen) = seen {
            let served = |name: &str| {
                let kinds = object["spec"]["backends"][name]["kinds"].as_array();
                kinds.map_or(0, Vec::len)
            };
            let backends: BTreeMap<&String, Value> = seen
                .report
                .backends
                .iter()
                .map(|(name, backend)| (name, backend_json(backend, served(name))))
                .collect();
            status["reportAge"] = age(seen.age(Instant::now())).into();
            status["observedAt"] = json!(seen.report.observed_at);
            status["metrics"] = json!(seen.report.metrics);
            status["backends"] = json!(backends);
        }
        object["status"] = status;
    }

    fn add_node(&self, object: &mut Value) {
        let node = object.pointer("/spec/node").and_then(Value::as_str);
        let Some(node) = node.and_then(|text| text.parse::<NodeId>().ok()) else {
            return;
        };
        let replica = object.pointer("/spec/replica").and_then(Value::as_u64);
        let groups = self.catalog.host.status();
        let leads = groups
            .borrow()
            .values()
            .filter(|group| group.leader.is_some() && group.leader == replica)
            .count();
        let version = self
            .network
            .view()
            .borrow()
            .get(&node)
            .map(|seen| seen.report.version.clone());
        let rtt = self.network.rtts().get(&node).copied();
        let mut status = json!({"state": self.state_of(&node), "leads": leads});
        if let Some(version) = version {
            status["version"] = version.into();
        }
        if let Some(rtt) = rtt {
            status["rttMillis"] = format!("{:.1}", rtt.as_secs_f64() * 1000.0).into();
        }
        object["status"] = status;
    }
}

fn committed_site(object: &Value) -> Option<CommittedSite> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    let location = |field: &str| {
        text(&format!("/spec/location/{field}"))
            .filter(|value| !value.is_empty())
            .map(ToOwned::to_owned)
    };
    let name = text("/metadata/name")?.to_owned();
    let mut labels: BTreeMap<String, String> = BTreeMap::from([("site".to_owned(), name.clone())]);
    // What the site says of its place can be constrained like any label.
    for (label, field) in [
        ("country", "country"),
        ("place", "place"),
        ("grid-zone", "gridZone"),
    ] {
        if let Some(value) = location(field) {
            labels.insert(label.to_owned(), value);
        }
    }
    if let Some(operator) = text("/spec/operator") {
        labels.insert("operator".to_owned(), operator.to_owned());
    }
    let own = object.pointer("/spec/labels").and_then(Value::as_object);
    for (key, value) in own.into_iter().flatten() {
        if let Some(value) = value.as_str() {
            labels.insert(key.clone(), value.to_owned());
        }
    }
    let backends = object.pointer("/spec/backends").and_then(Value::as_object);
    let kinds = backends
        .into_iter()
        .flatten()
        .map(|(backend, record)| (backend.clone(), Arc::new(served(record))))
        .collect();
    Some(CommittedSite {
        kinds,
        name,
        node: text("/spec/node")?.parse().ok()?,
        labels,
        cordoned: object.pointer("/spec/cordoned").and_then(Value::as_bool) == Some(true),
        leaving: object.pointer("/metadata/deletionTimestamp").is_some(),
    })
}

fn served(backend: &Value) -> BTreeSet<String> {
    let kinds = backend.get("kinds").and_then(Value::as_array);
    kinds
        .into_iter()
        .flatten()
        .filter_map(|kind| kind.as_str().map(ToOwned::to_owned))
        .collect()
}

fn site_states(site: &CommittedSite, view: &View, at: Instant) -> Vec<SiteState> {
    let state = |backend: &str| SiteState {
        target: Target {
            node: site.node,
            site: site.name.clone(),
            backend: backend.to_owned(),
        },
        labels: site.labels.clone(),
        metrics: BTreeMap::new(),
        free: Resources::ZERO,
        kinds: Arc::default(),
        unhealthy: None,
        cordoned: site.cordoned,
        leaving: site.leaving,
        lost: false,
        report_age: None,
        refusals: Vec::new(),
    };
    let Some(seen) = view.get(&site.node) else {
        return vec![state("default")];
    };
    if seen.report.backends.is_empty() {
        return vec![SiteState {
            unhealthy: Some("it has no backend".to_owned()),
            report_age: Some(seen.age(at)),
            ..state("default")
        }];
    }
    seen.report
        .backends
        .iter()
        .map(|(name, backend)| SiteState {
            metrics: seen.report.metrics.clone(),
            free: backend.free,
            kinds: site.kinds.get(name).cloned().unwrap_or_default(),
            unhealthy: (!backend.healthy).then(|| backend.message.clone()),
            report_age: Some(seen.age(at)),
            ..state(name)
        })
        .collect()
}

fn backend_json(backend: &BackendReport, kinds: usize) -> Value {
    let cores = |millis: u64| format!("{:.1}", millis as f64 / 1000.0);
    let mib = |bytes: u64| format!("{}Mi", bytes >> 20);
    json!({
        "healthy": backend.healthy,
        "message": backend.message,
        "freeCpu": cores(backend.free.cpu_millis),
        "freeMemory": mib(backend.free.memory_bytes),
        "freePods": backend.free.pods,
        "totalCpu": cores(backend.total.cpu_millis),
        "totalMemory": mib(backend.total.memory_bytes),
        "totalPods": backend.total.pods,
        "reservedCpu": cores(backend.reserved.cpu_millis),
        "kinds": kinds,
    })
}

fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    if seconds < 120 {
        format!("{seconds}s")
    } else {
        format!("{}m", seconds / 60)
    }
}

impl Overlay for Federation {
    fn add(&self, plural: &str, object: &mut Value) {
        match plural {
            "sites" => self.add_site(object),
            "nodes" => self.add_node(object),
            _ => {}
        }
    }
}
