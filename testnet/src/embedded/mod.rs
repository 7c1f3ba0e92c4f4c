//! A Kubernetes API in memory, for `--kube embedded`: one process per site.
//!
//! It does what the driver, ordinary applications and `kubectl` touch: the built-in kinds of
//! `kinds`, custom resources by `CustomResourceDefinition`, list, watch, patches, server-side
//! apply, finalizers, garbage collection, namespaces that end; workloads and pods become ready by
//! simulation (`simulate`). Objects are in a journal and are there again after a kill; pods become
//! ready anew then, as after a power cut. What it does not offer (logs, exec, binding, eviction,
//! scale, protobuf, `CronJob`) is answered with 405, 415 or 501 and a text, never with success.
//!
//! Two annotations of a pod template let pods fail or take long:
//!
//! | annotation | effect |
//! |---|---|
//! | `testnet.krake.dev/ready-after: 5s` | ready only after that time |
//! | `testnet.krake.dev/fail: CrashLoopBackOff` | never ready; the containers wait for this reason (a job's pods fail) |

mod admission;
mod columns;
mod controller;
mod crds;
mod garbage;
mod journal;
mod kinds;
mod object;
mod schemas;
mod server;
mod simulate;
mod typed;
mod view;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use krake_kube_api::{
    FieldValidation, Kind, MemoryStore, Registry, Service, Store as _, store::Journal,
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use self::admission::Checks;
use self::controller::Controller;
use self::journal::FileJournal;

/// The version it says it has.
pub(crate) const VERSION: &str = "v1.33.0";
/// Events kept for watches: one that falls further behind lists anew.
const EVENTS_MAX: usize = 1000;
/// Requests under way get this long when it stops.
const STOP_TIME: Duration = Duration::from_millis(300);

/// What one embedded cluster needs to know.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Where it keeps its objects, its token and its kubeconfig (`kubeconfig`).
    #[arg(long)]
    pub dir: PathBuf,
    /// Where it listens (loopback).
    #[arg(long)]
    pub listen: SocketAddr,
    /// CPU of its nodes in all (a quantity).
    #[arg(long, default_value = "16")]
    pub cpu: String,
    /// Memory of its nodes in all (a quantity).
    #[arg(long, default_value = "64Gi")]
    pub memory: String,
    /// Pods its nodes can run in all.
    #[arg(long, default_value_t = 440)]
    pub pods: u64,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// When the directory cannot be used or the address is taken.
pub async fn run(options: Options) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopping.cancel();
    });
    serve(options, stop).await
}

/// The same, until `stop` is cancelled: for tests.
///
/// # Errors
/// When the directory cannot be used or the address is taken.
pub async fn serve(options: Options, stop: CancellationToken) -> anyhow::Result<()> {
    anyhow::ensure!(
        options.listen.ip().is_loopback(),
        "{} is not a loopback address; an embedded cluster is for this machine only",
        options.listen
    );
    std::fs::create_dir_all(&options.dir)
        .with_context(|| format!("{} cannot be made", options.dir.display()))?;
    let dir = options
        .dir
        .canonicalize()
        .with_context(|| format!("{} cannot be used", options.dir.display()))?;
    let _lock = server::lock(&dir)?;
    let listener = tokio::net::TcpListener::bind(options.listen)
        .await
        .with_context(|| format!("{} cannot be listened on", options.listen))?;
    let address = listener.local_addr()?;
    let (journal, held) = FileJournal::open(&dir)?;
    let journal: Box<dyn Journal> = Box::new(journal);
    let store = MemoryStore::new(Some(journal), held.revision, held.objects);
    let store = Arc::new(store.with_events(EVENTS_MAX));
    let registry = Arc::new(Registry::new(kinds::builtin()));
    furnish(&store, &registry, &server::site_of(&dir), &options).await?;
    let find = |plural: &str| {
        let found = registry.find("", "v1", plural);
        found.map(|kind| (*kind).clone()).context("a built-in kind")
    };
    let checks = Checks {
        store: Arc::clone(&store),
        namespaces: find("namespaces")?,
        services: find("services")?,
    };
    let service = Arc::new(Service {
        registry: Arc::clone(&registry),
        store: Arc::clone(&store) as Arc<dyn krake_kube_api::Store>,
        admission: Arc::new(checks),
        version: json!({"major": "1", "minor": "33", "gitVersion": format!("{VERSION}+krake-embedded"), "platform": "linux/amd64"}),
        field_validation: FieldValidation::Warn,
    });
    let controller = tokio::spawn(Controller::new(store, registry).run());
    let served = server::serve(&dir, listener, address, service, stop).await;
    controller.abort();
    served
}

/// Namespaces and nodes that are always there.
async fn furnish(
    store: &MemoryStore,
    registry: &Registry,
    site: &str,
    options: &Options,
) -> anyhow::Result<()> {
    let now = krake_kube_api::table::whole_seconds(Timestamp::now());
    let kind = |plural: &str| {
        let found = registry.find("", "v1", plural);
        found.context("a built-in kind")
    };
    let namespaces = kind("namespaces")?;
    for name in admission::OWN_NAMESPACES {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name,
            "labels": {"kubernetes.io/metadata.name": name}},
            "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}});
        ensure(store, &namespaces, object, &now).await?;
    }
    let nodes = kind("nodes")?;
    let wanted = simulate::nodes::nodes(site, &options.cpu, &options.memory, options.pods, &now)?;
    for node in wanted {
        ensure(store, &nodes, node, &now).await?;
    }
    Ok(())
}

/// Makes an object, or gives the one that is there its status.
async fn ensure(
    store: &MemoryStore,
    kind: &Kind,
    object: Value,
    now: &str,
) -> Result<(), krake_kube_api::ApiError> {
    let freshness = krake_kube_api::Freshness::Latest;
    let name = object::name(&object).to_owned();
    match store.get(kind, None, &name, freshness).await {
        Err(_) => {
            let object = admission::complete(object, now);
            store.create(kind, object).await?;
        }
        Ok(found) if kind.kind == "Node" => {
            let mut changed = (*found).clone();
            for field in ["capacity", "allocatable"] {
                changed["status"][field] = object["status"][field].clone();
            }
            if changed != *found {
                let revision = krake_kube_api::store::revision_of(&found);
                store.update(kind, changed, revision).await?;
            }
        }
        Ok(_) => {}
    }
    Ok(())
}
