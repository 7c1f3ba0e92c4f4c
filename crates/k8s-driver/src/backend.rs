//! The cluster as a backend.

mod namespaces;
mod objects;
mod observe;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, StreamExt};
use krake_driver::{Backend, BackendError, Code, Deletion, Inventory, Observed, Phase, Workload};
use krake_model::{AppUid, Epoch};
use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::ApiResource;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, broadcast, mpsc};
use tracing::{debug, info};

use self::objects::{DEFINITION, Fingerprint, brought, reference, taken, waves};
use crate::cache::{Cache, Noticed};
use crate::capacity::Capacity;
use crate::cluster::{Cluster, call, call_unless};
use crate::ledger::{LEDGER_LABEL, Ledger, ObjectRef};

/// The field manager of everything we apply.
const MANAGER: &str = "krake";
/// Objects of one app applied at the same time.
const AT_ONCE: usize = 8;

/// How a site uses its cluster.
#[derive(Debug, Clone)]
pub struct Config {
    /// The kubeconfig; `None`: the one of the pod this runs in, or `~/.kube/config`.
    pub kubeconfig: Option<PathBuf>,
    /// Its context; `None`: the current one.
    pub context: Option<String>,
    /// Namespace at the site for a namespace of the federation, with `{namespace}` in it.
    pub namespace_template: String,
    /// Kinds of the whole cluster that apps may bring, as `group/Kind` (`Kind` in the core group).
    pub cluster_scoped_kinds: Vec<String>,
    /// Kinds that apps may not bring, written alike.
    pub denied_kinds: Vec<String>,
}

#[derive(Debug, Clone)]
struct Known {
    ledger: Ledger,
    applied: BTreeMap<ObjectRef, Fingerprint>,
    applying: bool,
    deleting: bool,
    /// The ledger at the cluster says the same as `ledger`.
    noted: bool,
    drifted: bool,
    was_ready: bool,
}

impl Known {
    /// As it is when its ledger is read, or written.
    const fn at_cluster(ledger: Ledger) -> Self {
        Self {
            ledger,
            applied: BTreeMap::new(),
            applying: false,
            deleting: false,
            noted: true,
            drifted: false,
            was_ready: false,
        }
    }
}

struct Inner {
    cluster: Cluster,
    config: Config,
    cache: Arc<Cache>,
    known: Mutex<BTreeMap<AppUid, Known>>,
    namespaces: Mutex<BTreeSet<String>>,
    /// Since when a namespace of ours has been without an app.
    empty_since: Mutex<BTreeMap<String, Instant>>,
    loaded: OnceCell<()>,
    capacity: std::sync::OnceLock<Arc<Capacity>>,
    changes: broadcast::Sender<AppUid>,
}

/// A Kubernetes cluster. Cheap to clone.
#[derive(Clone)]
pub struct KubernetesBackend {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for KubernetesBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KubernetesBackend").finish_non_exhaustive()
    }
}

impl KubernetesBackend {
    /// Reads the kubeconfig. The cluster need not answer yet.
    ///
    /// # Errors
    /// When the kubeconfig cannot be read or used.
    pub async fn new(config: Config) -> Result<Self, BackendError> {
        let unusable = |error: String| {
            let path = config.kubeconfig.as_ref().map_or_else(
                || "the default kubeconfig".to_owned(),
                |p| p.display().to_string(),
            );
            BackendError::new(Code::Unreachable, format!("{path} cannot be used: {error}"))
        };
        let mut client_config = match &config.kubeconfig {
            Some(path) => {
                let kubeconfig =
                    Kubeconfig::read_from(path).map_err(|error| unusable(error.to_string()))?;
                let options = KubeConfigOptions {
                    context: config.context.clone(),
                    ..KubeConfigOptions::default()
                };
                kube::Config::from_custom_kubeconfig(kubeconfig, &options)
                    .await
                    .map_err(|error| unusable(error.to_string()))?
            }
            None => kube::Config::infer()
                .await
                .map_err(|error| unusable(error.to_string()))?,
        };
        client_config.connect_timeout = Some(Duration::from_secs(5));
        let client =
            kube::Client::try_from(client_config).map_err(|error| unusable(error.to_string()))?;
        let (noticed, receiver) = mpsc::channel(1024);
        let inner = Arc::new(Inner {
            cluster: Cluster::new(client),
            config,
            cache: Arc::new(Cache::new(noticed)),
            known: Mutex::default(),
            namespaces: Mutex::default(),
            empty_since: Mutex::default(),
            loaded: OnceCell::new(),
            capacity: std::sync::OnceLock::new(),
            changes: broadcast::channel(4096).0,
        });
        tokio::spawn(notice(Arc::downgrade(&inner), receiver));
        Ok(Self { inner })
    }
}

async fn notice(inner: std::sync::Weak<Inner>, mut receiver: mpsc::Receiver<Noticed>) {
    while let Some(noticed) = receiver.recv().await {
        let Some(inner) = inner.upgrade() else {
            return;
        };
        inner.on_noticed(&noticed);
        // Nobody listening is fine.
        let _ = inner.changes.send(noticed.uid);
    }
}

impl Inner {
    fn api(&self, resource: &ApiResource, namespace: Option<&str>) -> Api<DynamicObject> {
        match namespace {
            Some(namespace) => {
                Api::namespaced_with(self.cluster.client.clone(), namespace, resource)
            }
            None => Api::all_with(self.cluster.client.clone(), resource),
        }
    }

    /// Reads the ledgers once, as soon as the cluster answers.
    async fn load(&self) -> Result<(), BackendError> {
        self.loaded
            .get_or_try_init(|| async {
                let (resource, _) = self.cluster.resource("v1", "ConfigMap").await?;
                let api = self.api(&resource, None);
                let params = ListParams::default().labels(LEDGER_LABEL);
                let list = call("reading the ledgers", api.list(&params)).await?;
                self.cache.watch(&self.cluster.client, &resource);
                for object in list.items {
                    let Ok(value) = serde_json::to_value(&object) else {
                        continue;
                    };
                    let Some(ledger) = Ledger::from_config_map(&value) else {
                        info!(name = ?object.metadata.name, "a ledger is not readable and left alone");
                        continue;
                    };
                    for object in &ledger.objects {
                        self.watch(object).await;
                    }
                    self.known.lock().entry(ledger.uid).or_insert(Known::at_cluster(ledger));
                }
                Ok(())
            })
            .await
            .copied()
    }

    async fn watch(&self, object: &ObjectRef) {
        match self
            .cluster
            .resource(&object.api_version, &object.kind)
            .await
        {
            Ok((resource, _)) => self.cache.watch(&self.cluster.client, &resource),
            Err(error) => debug!(%object, %error, "not watched"),
        }
    }

    async fn write_ledger(&self, ledger: &Ledger, new: bool) -> Result<(), BackendError> {
        let what = "writing the ledger";
        let (resource, _) = self.cluster.resource("v1", "ConfigMap").await?;
        let api = self.api(&resource, Some(&ledger.namespace));
        let object = ledger.to_config_map();
        if new && let Ok(object) = serde_json::from_value(object.clone()) {
            // There is nothing to merge with yet, so a plain create will do.
            let params = PostParams {
                field_manager: Some(MANAGER.to_owned()),
                ..PostParams::default()
            };
            let created = call_unless(409, what, api.create(&params, &object)).await?;
            if created.is_some() {
                return Ok(());
            }
        }
        let params = PatchParams::apply(MANAGER).force();
        let name = Ledger::name(ledger.uid);
        call(what, api.patch(&name, &params, &Patch::Apply(&object))).await?;
        Ok(())
    }

    /// Notes in memory that an app is being applied, unless another one has what it brings: two
    /// that come at the same time must not both find an object free.
    fn claim(&self, noted: &Ledger, fresh: &[&ObjectRef]) -> Result<(), BackendError> {
        let mut known = self.known.lock();
        let others = known
            .values()
            .map(|known| &known.ledger)
            .filter(|ledger| ledger.uid != noted.uid && ledger.namespace == noted.namespace);
        for ledger in others {
            if let Some(object) = fresh.iter().find(|o| ledger.objects.contains(**o)) {
                return Err(taken(object, &ledger.app.to_string()));
            }
        }
        let entry = known.entry(noted.uid).or_insert_with(|| Known {
            noted: false,
            ..Known::at_cluster(noted.clone())
        });
        entry.was_ready &= entry.ledger.epoch == noted.epoch;
        entry.noted &= entry.ledger == *noted;
        entry.ledger = noted.clone();
        entry.applying = true;
        entry.deleting = false;
        Ok(())
    }

    /// Makes sure that the app may have what it brings. A later version's objects are noted before
    /// they are applied; a first version's are left to be noted beside, see [`Begun::unnoted`].
    async fn begin(&self, workload: &Workload) -> Result<Begun, BackendError> {
        let objects: Vec<ObjectRef> = workload
            .components
            .iter()
            .map(reference)
            .collect::<Result<_, _>>()?;
        let namespace = self.namespace_for(&workload.app);
        let before = self.known.lock().get(&workload.uid).cloned();
        if let Some(before) = &before
            && before.ledger.epoch > workload.epoch
        {
            return Err(outdated(before.ledger.epoch, workload.epoch));
        }
        let old: BTreeSet<ObjectRef> = before
            .iter()
            .flat_map(|known| known.ledger.objects.iter().cloned())
            .collect();
        self.ensure_namespace(&namespace, &workload.app).await?;
        let fresh: Vec<&ObjectRef> = objects.iter().filter(|o| !old.contains(*o)).collect();
        let dropped: Vec<ObjectRef> = old
            .iter()
            .filter(|object| !objects.contains(object))
            .cloned()
            .collect();
        let noted = Ledger {
            uid: workload.uid,
            app: workload.app.clone(),
            epoch: workload.epoch,
            namespace: namespace.clone(),
            objects: objects.iter().chain(&dropped).cloned().collect(),
        };
        self.claim(&noted, &fresh)?;
        let checks = fresh
            .iter()
            .map(|object| self.check_owner(workload, object, &namespace));
        let write = async {
            match &before {
                None => Ok(()),
                // The ledger may be among what somebody else removed.
                Some(known) if known.noted && !known.drifted && known.ledger == noted => Ok(()),
                Some(known) => self.note(&noted, !known.noted).await,
            }
        };
        // Both at once: a ledger may list what turns out to belong to others, as only what carries
        // the app's label is ever removed for it.
        let (checked, wrote) = tokio::join!(futures::future::try_join_all(checks), write);
        if let Err(error) = checked.and(wrote) {
            // What it lists stays claimed until the app is applied or deleted.
            if let Some(entry) = self.known.lock().get_mut(&workload.uid) {
                entry.applying = false;
                entry.noted = false;
            }
            return Err(error);
        }
        Ok(Begun {
            unnoted: before.is_none().then(|| noted.clone()),
            ledger: Ledger { objects, ..noted },
            dropped,
        })
    }

    async fn note(&self, ledger: &Ledger, new: bool) -> Result<(), BackendError> {
        self.write_ledger(ledger, new).await?;
        if let Some(entry) = self.known.lock().get_mut(&ledger.uid) {
            entry.noted = entry.ledger == *ledger;
        }
        Ok(())
    }

    async fn apply_all(
        &self,
        workload: &Workload,
        ledger: &Ledger,
    ) -> Result<BTreeMap<ObjectRef, Fingerprint>, BackendError> {
        let mut applied = BTreeMap::new();
        for wave in waves(&workload.components) {
            let calls: Vec<BoxFuture<'_, _>> = wave
                .into_iter()
                .map(|manifest| {
                    self.apply_one(workload, manifest, &ledger.namespace)
                        .boxed()
                })
                .collect();
            let mut results = stream::iter(calls).buffer_unordered(AT_ONCE);
            while let Some(result) = results.next().await {
                let (object, fingerprint) = result?;
                if object.kind == DEFINITION {
                    self.cluster.look_again();
                }
                applied.insert(object, fingerprint);
            }
        }
        Ok(applied)
    }
}

/// An app that may be applied now.
struct Begun {
    /// What it has afterwards.
    ledger: Ledger,
    /// What it had and has no longer.
    dropped: Vec<ObjectRef>,
    /// To be noted while the objects are applied: of a first version nothing is there that a
    /// ledger would have to remember, and the node has the assignment, which it gives to
    /// [`Backend::adopt`] when it was interrupted.
    unnoted: Option<Ledger>,
}

fn outdated(newest: Epoch, asked: Epoch) -> BackendError {
    BackendError::new(
        Code::Outdated,
        format!("a newer assignment is known here ({newest}, not {asked})"),
    )
}

#[async_trait]
impl Backend for KubernetesBackend {
    fn kind(&self) -> &'static str {
        "kubernetes"
    }

    async fn inventory(&self) -> Result<Inventory, BackendError> {
        let inner = &self.inner;
        let kinds = inner.cluster.kinds().await?;
        // The watches say nothing of a cluster that does not answer any more.
        let (namespaces, _) = inner.cluster.resource("v1", "Namespace").await?;
        let namespace = inner.api(&namespaces, None);
        call_unless(404, "asking for a sign of life", namespace.get("default")).await?;
        let capacity = inner
            .capacity
            .get_or_init(|| Capacity::follow(&inner.cluster.client));
        let (total, free) = capacity.read().await?;
        inner.load().await?;
        Ok(Inventory { total, free, kinds })
    }

    async fn admit(&self, workload: &Workload) -> Result<(), BackendError> {
        for manifest in &workload.components {
            let object = reference(manifest)?;
            let found = self
                .inner
                .cluster
                .resource(&object.api_version, &object.kind)
                .await;
            let namespaced = match (found, brought(workload, &object)) {
                (Ok((_, namespaced)), _) => namespaced,
                (Err(error), Some(namespaced)) if error.code == Code::Unsupported => namespaced,
                (Err(error), _) => return Err(error),
            };
            self.inner.admit_kind(&object, namespaced)?;
        }
        Ok(())
    }

    async fn apply(&self, workload: &Workload) -> Result<(), BackendError> {
        let inner = &self.inner;
        inner.load().await?;
        self.admit(workload).await?;
        let Begun {
            ledger,
            dropped,
            unnoted,
        } = inner.begin(workload).await.inspect_err(|error| {
            if error.code.is_temporary() {
                // The namespace may have gone meanwhile.
                let namespace = inner.namespace_for(&workload.app);
                inner.namespaces.lock().remove(&namespace);
            }
        })?;
        let result = async {
            let note = async {
                match &unnoted {
                    Some(ledger) => inner.note(ledger, true).await,
                    None => Ok(()),
                }
            };
            let (applied, noted) = tokio::join!(inner.apply_all(workload, &ledger), note);
            let applied = applied?;
            noted?;
            let removals = dropped
                .iter()
                .map(|object| inner.remove_one(workload.uid, object, &ledger.namespace));
            let removed = futures::future::try_join_all(removals).await?;
            if removed.contains(&false) {
                return Err(BackendError::new(
                    Code::Busy,
                    "objects of the earlier version are still being removed",
                ));
            }
            if !dropped.is_empty() {
                inner.write_ledger(&ledger, false).await?;
            }
            Ok(applied)
        }
        .await;
        let mut known = inner.known.lock();
        if let Some(entry) = known.get_mut(&workload.uid) {
            entry.applying = false;
            match &result {
                Ok(applied) => {
                    entry.ledger = ledger;
                    entry.applied.clone_from(applied);
                    entry.drifted = false;
                }
                Err(error) if error.code.is_temporary() => {
                    // A namespace or kind may have gone meanwhile.
                    let namespace = entry.ledger.namespace.clone();
                    inner.namespaces.lock().remove(&namespace);
                }
                Err(_) => {}
            }
        }
        drop(known);
        result.map(|_| ())
    }

    async fn observe(&self) -> Result<Vec<Observed>, BackendError> {
        self.inner.load().await?;
        let known = self.inner.known.lock();
        Ok(known
            .values()
            .map(|known| self.inner.observe_known(known))
            .collect())
    }

    async fn observe_one(&self, uid: AppUid) -> Result<Option<Observed>, BackendError> {
        self.inner.load().await?;
        let mut known = self.inner.known.lock();
        let Some(entry) = known.get_mut(&uid) else {
            return Ok(None);
        };
        let observed = self.inner.observe_known(entry);
        entry.was_ready |= observed.phase == Phase::Ready;
        Ok(Some(observed))
    }

    async fn adopt(&self, workload: &Workload) -> Result<(), BackendError> {
        let inner = &self.inner;
        inner.load().await?;
        if inner.known.lock().contains_key(&workload.uid) {
            return Ok(());
        }
        let objects: Result<_, _> = workload.components.iter().map(reference).collect();
        let ledger = Ledger {
            uid: workload.uid,
            app: workload.app.clone(),
            epoch: workload.epoch,
            namespace: inner.namespace_for(&workload.app),
            objects: objects?,
        };
        let (resource, _) = inner.cluster.resource("v1", "Namespace").await?;
        let api = inner.api(&resource, None);
        let what = "looking for the namespace";
        let Some(_) = call_unless(404, what, api.get(&ledger.namespace)).await? else {
            // Without it nothing of the app is there.
            return Ok(());
        };
        inner.write_ledger(&ledger, true).await?;
        inner
            .known
            .lock()
            .entry(ledger.uid)
            .or_insert(Known::at_cluster(ledger));
        Ok(())
    }

    async fn delete(&self, uid: AppUid, epoch: Epoch) -> Result<Deletion, BackendError> {
        let inner = &self.inner;
        inner.load().await?;
        let ledger = {
            let mut known = inner.known.lock();
            let Some(entry) = known.get_mut(&uid) else {
                return Ok(Deletion::Gone);
            };
            if entry.ledger.epoch > epoch {
                return Err(outdated(entry.ledger.epoch, epoch));
            }
            entry.deleting = true;
            entry.ledger.clone()
        };
        let namespace = ledger.namespace.as_str();
        let removals: Vec<BoxFuture<'_, _>> = ledger
            .objects
            .iter()
            .map(|object| {
                let removal = async move {
                    let gone = inner.remove_one(uid, object, namespace).await?;
                    Ok::<_, BackendError>((object, gone))
                };
                removal.boxed()
            })
            .collect();
        let results: Vec<_> = stream::iter(removals)
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let mut left = Vec::new();
        for result in results {
            let (object, gone) = result?;
            if !gone {
                left.push(object.to_string());
            }
        }
        if !left.is_empty() {
            return Ok(Deletion::InProgress(left));
        }
        let own = ObjectRef {
            api_version: "v1".to_owned(),
            kind: "ConfigMap".to_owned(),
            name: Ledger::name(uid),
        };
        if !inner.remove_one(uid, &own, &ledger.namespace).await? {
            return Ok(Deletion::InProgress(vec![own.to_string()]));
        }
        inner.known.lock().remove(&uid);
        Ok(Deletion::Gone)
    }

    async fn tidy(&self) -> Result<(), BackendError> {
        self.inner.load().await?;
        self.inner.remove_empty_namespaces().await
    }

    fn changes(&self) -> broadcast::Receiver<AppUid> {
        self.inner.changes.subscribe()
    }
}
