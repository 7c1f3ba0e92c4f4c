//! Puts a node together and takes it apart again.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use krake_driver::{Backend, Inventory};
use krake_gossip::{Network, NetworkConfig};
use krake_k8s_driver::KubernetesBackend;
use krake_kube_api::{FieldValidation, Registry, Service};
use krake_model::AppKey;
use krake_placement::spec::Defaults;
use parking_lot::Mutex;
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tracing::{error, info, warn};

use crate::admission::KrakeAdmission;
use crate::api::{Api, ApiParts};
use crate::catalog::Catalog;
use crate::config::{BackendConfig, Config};
use crate::datadir::{DataDir, Membership};
use crate::federation::{Federation, now};
use crate::membership::door::Door;
use crate::membership::{self, Follower, departure, entry, publish};
use crate::net::{NetworkTransport, NodeHandler, Parts};
use crate::owner::controller::Owner;
use crate::records::Departure;
use crate::site::agent::{Agent, SiteBackend};
use crate::site::ledger::Ledger;
use crate::site::report::Reporter;
use crate::store::CatalogStore;

/// How long a stop waits for others to take over what this node leads.
const HAND_OVER_TIME: Duration = Duration::from_secs(3);

/// The defaults of a configuration.
pub const fn defaults(config: &Config) -> Defaults {
    Defaults {
        detect_after: config.defaults.detect_after,
        ready_timeout: config.defaults.ready_timeout,
        reschedule_interval: config.defaults.reschedule_interval,
        hold_for: config.defaults.hold_for,
        max_metric_age: config.defaults.max_metric_age,
    }
}

async fn open_backend(config: &BackendConfig) -> anyhow::Result<Arc<SiteBackend>> {
    let driver = KubernetesBackend::new(krake_k8s_driver::Config {
        kubeconfig: config.kubeconfig.clone(),
        context: config.context.clone(),
        namespace_template: config.namespace_template.clone(),
        cluster_scoped_kinds: config.cluster_scoped_kinds.clone(),
        denied_kinds: config.denied_kinds.clone(),
    })
    .await
    .with_context(|| {
        format!(
            "the backend `{}` cannot be used; see its kubeconfig and context under `backends` in the configuration",
            config.name
        )
    })?;
    Ok(Arc::new(SiteBackend {
        name: config.name.clone(),
        driver: Arc::new(driver) as Arc<dyn Backend>,
        inventory: Mutex::new(Err::<Inventory, _>("it has not been asked yet".to_owned())),
        reservations: Mutex::default(),
    }))
}

fn peer_addresses(config: &Config) -> anyhow::Result<Vec<SocketAddr>> {
    config
        .peers
        .listen
        .iter()
        .map(|address| {
            address
                .parse()
                .with_context(|| format!("peers.listen: `{address}` is not IP:PORT"))
        })
        .collect()
}

/// Runs a node until it is told to stop.
///
/// # Errors
/// When it cannot start, or its catalog fails.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let data = Arc::new(DataDir::open_existing(&config.node.data_dir)?);
    let (mut stored, genesis) = data.require_membership()?;
    let identity = Arc::new(data.identity(rand::random)?);
    data.check_own(&stored, identity.node(), &config.site.name)?;
    config.check_metrics(&genesis.metrics)?;
    let boot = data.next_boot()?;
    // Before anything is acknowledged to anybody: ports that are taken, kubeconfigs that are wrong.
    let mut backends = Vec::new();
    for backend in &config.backends {
        backends.push(open_backend(backend).await?);
    }
    let handler = Arc::<NodeHandler>::default();
    let network = Network::start(
        NetworkConfig {
            secret_key: *identity.seed(),
            federation: genesis.federation_id()?,
            listen: peer_addresses(&config)?,
            connections_max: 1000,
        },
        Arc::clone(&handler) as Arc<dyn krake_gossip::Handler>,
    )
    .await?;
    let catalog_owner = membership::owner_of(&genesis, identity.node())?;
    if membership::catalog_is_gone(&data) {
        warn!(
            directory = %membership::catalog_path(&data).display(),
            "the catalog is gone; the other members are asked for another replica id, and for what it held"
        );
        stored = entry::readmit(&network, &data, catalog_owner, stored)
            .await
            .with_context(|| {
                format!(
                    "there is no catalog in {}: what this node promised to the others is lost",
                    membership::catalog_path(&data).display()
                )
            })?;
    }
    let transport = Arc::<NetworkTransport>::default();
    transport.connect(network.clone());
    let host = krake_consensus::Host::start(
        &krake_consensus::Config::new(
            catalog_owner,
            stored.replica,
            membership::catalog_path(&data),
            boot,
        ),
        transport,
        now,
    )
    .with_context(|| {
        format!(
            "the catalog in {} cannot be used. While the other members run, `krake-node rejoin` puts it aside and gets everything from them; after the loss of a majority, `krake-node restore FILE` begins again from a backup",
            data.path().display()
        )
    })?;
    let federation = Federation {
        catalog: Catalog::new(host.clone(), &genesis),
        network,
        genesis: Arc::new(genesis),
        own: identity.node(),
        site: config.site.name.as_str().into(),
        lost_after: config.defaults.detect_after,
        sites: Arc::default(),
        giving_votes: Arc::default(),
    };
    let mut node = compose(
        &config, &data, stored, &identity, boot, federation, backends, &handler,
    )
    .await?;
    info!(
        site = config.site.name,
        node = %node.federation.own,
        federation = node.federation.genesis.name,
        "the node runs"
    );
    let result = wait(&mut node).await;
    stop(&node, &config).await;
    if let Some(departure) = result? {
        end_membership(&data, &departure, &node.agent.apps())?;
    }
    Ok(())
}

/// The node is a member no more: it does not start as one again, and its site may join anew.
fn end_membership(data: &DataDir, departure: &Departure, apps: &[AppKey]) -> anyhow::Result<()> {
    let aside = data.put_membership_aside(departure.left_at)?;
    info!(
        site = departure.site,
        at = %departure.left_at,
        files = %aside.display(),
        "this site left the federation; krake-node join TOKEN takes it into one again"
    );
    if !apps.is_empty() {
        let names: Vec<String> = apps.iter().map(ToString::to_string).collect();
        warn!(
            apps = names.join(", "),
            "what this site ran for the federation is still there, and nobody's but its operator's now: remove it by the label {}, or join a federation again: what it does not run here is removed then",
            krake_k8s_driver::UID_LABEL
        );
    }
    Ok(())
}

struct Node {
    federation: Federation,
    api: Api,
    left: watch::Receiver<Option<Departure>>,
    agent: Agent,
}

#[allow(clippy::too_many_arguments, reason = "the parts of a node, once")]
async fn compose(
    config: &Config,
    data: &Arc<DataDir>,
    stored: Membership,
    identity: &Arc<crate::datadir::Identity>,
    boot: u64,
    federation: Federation,
    backends: Vec<Arc<SiteBackend>>,
    handler: &Arc<NodeHandler>,
) -> anyhow::Result<Node> {
    let ledger = Ledger::open(&data.path().join("site.redb"))?;
    let (owner_sender, owner_reports) = mpsc::channel(4096);
    let agent = Agent::new(
        federation.clone(),
        backends,
        ledger,
        config.capacity_limit()?,
        config.limits.reservation_ttl,
        owner_sender.clone(),
    );
    let defaults = defaults(config);
    let owner = Owner::new(federation.clone(), defaults.clone(), agent.clone());
    let store = CatalogStore::new(federation.catalog.clone(), Arc::new(federation.clone()));
    let service = Arc::new(Service {
        registry: Arc::new(Registry::new(crate::kinds::all())),
        store,
        admission: Arc::new(KrakeAdmission {
            definitions: federation.genesis.metrics.clone(),
            defaults: defaults.clone(),
            may_leave: {
                let federation = federation.clone();
                Arc::new(move |site: &str| federation.may_leave(site))
            },
        }),
        version: json!({
            "major": "1", "minor": "33", "gitVersion": format!("v1.33.0+krake-{}", env!("CARGO_PKG_VERSION")),
            "platform": format!("{}/{}", std::env::consts::OS, std::env::consts::ARCH),
        }),
        field_validation: FieldValidation::Strict,
    });
    let reporter = Reporter::new(
        federation.clone(),
        agent.clone(),
        Arc::clone(identity),
        boot,
        config.limits.report_interval,
        config.metrics.clone(),
    );
    let api = Api::start(
        config,
        ApiParts {
            federation: federation.clone(),
            service,
            owner: owner.clone(),
            identity: Arc::clone(identity),
            reporter: Arc::clone(&reporter),
            defaults,
        },
    )
    .await?;
    let owns = {
        let owner = owner.clone();
        Arc::new(move |app: &krake_model::AppKey| owner.owns(app))
    };
    handler.complete(Parts {
        host: federation.catalog.host.clone(),
        agent: agent.clone(),
        owner: owner_sender,
        owns,
        members: {
            let catalog = federation.catalog.clone();
            Arc::new(move || catalog.members())
        },
        giving_votes: Arc::clone(&federation.giving_votes),
        door: Arc::new(Door::new(federation.clone())),
    });
    let follower = Follower::start(federation.clone(), Arc::clone(data), stored).await;
    let left = follower.left();
    tokio::spawn(follower.run());
    tokio::spawn(departure::let_go(federation.clone()));
    tokio::spawn(publish::publish_own(
        federation.clone(),
        config.clone(),
        agent.clone(),
    ));
    agent.start();
    owner.start(owner_reports);
    tokio::spawn(reporter.run());
    Ok(Node {
        federation,
        api,
        left,
        agent,
    })
}

/// Waits until the node is to stop; says so when that is because it is a member no more.
async fn wait(node: &mut Node) -> anyhow::Result<Option<Departure>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut failed = node.federation.catalog.host.failed();
    tokio::select! {
        Ok(left) = node.left.wait_for(Option::is_some) => return Ok(left.clone()),
        _ = terminate.recv() => info!("told to stop"),
        _ = interrupt.recv() => info!("interrupted"),
        failure = failed.wait_for(Option::is_some) => {
            let text = failure.ok().and_then(|f| f.clone()).unwrap_or_default();
            error!(reason = text, "the catalog failed");
            anyhow::bail!("the catalog failed: {text}");
        }
    }
    Ok(None)
}

async fn stop(node: &Node, config: &Config) {
    node.api.stop();
    if !node.federation.catalog.host.hand_over(HAND_OVER_TIME).await {
        warn!("not all leadership could be handed over");
    }
    node.federation.catalog.host.stop().await;
    let _ = std::fs::remove_file(config.socket_path());
    info!("stopped");
}
