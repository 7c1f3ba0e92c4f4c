//! The cluster as a backend.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, StreamExt};
use krake_driver::{Backend, BackendError, Code, Deletion, Inventory, Observed, Phase, Workload};
use krake_model::{AppKey, AppUid, Epoch};
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions,
};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::ApiResource;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::{OnceCell, broadcast, mpsc};
use tracing::{debug, info};

use crate::cache::{Cache, Noticed};
use crate::capacity::Capacity;
use crate::cluster::{CALL_TIME, Cluster, call, call_unless, status_code};
use crate::ledger::{APP_ANNOTATION, LEDGER_LABEL, Ledger, NAMESPACE_LABEL, ObjectRef, UID_LABEL};
use crate::readiness;

/// The field manager of everything we apply.
const MANAGER: &str = "krake";
/// The kind that brings kinds.
const DEFINITION: &str = "CustomResourceDefinition";
/// Objects of one app applied at the same time.
const AT_ONCE: usize = 8;
/// A namespace of ours that has been without an app for this long is removed. Kubernetes takes
/// seconds to remove one, and an app that comes meanwhile has to wait.
const NAMESPACE_GRACE: Duration = Duration::from_secs(10);

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

#[derive(Debug, Clone, PartialEq, Eq)]
struct Fingerprint {
    generation: Option<i64>,
    version: u64,
}

impl Fingerprint {
    /// Whether `other` is a later version of the object; where there are generations, a later one.
    const fn is_before(&self, other: &Self) -> bool {
        match (self.generation, other.generation) {
            (Some(own), Some(other)) => own < other,
            _ => self.version < other.version,
        }
    }
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

fn fingerprint(object: &Value) -> Fingerprint {
    Fingerprint {
        generation: object
            .pointer("/metadata/generation")
            .and_then(Value::as_i64),
        version: object
            .pointer("/metadata/resourceVersion")
            .and_then(Value::as_str)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0),
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
    fn on_noticed(&self, noticed: &Noticed) {
        let mut known = self.known.lock();
        let Some(entry) = known.get_mut(&noticed.uid) else {
            return;
        };
        if entry.applying || entry.deleting || entry.ledger.namespace != noticed.namespace {
            return;
        }
        let is_ledger = noticed.object.name == Ledger::name(noticed.uid);
        let Some(applied) = entry.applied.get(&noticed.object) else {
            if is_ledger && noticed.value.is_none() {
                entry.drifted = true;
            }
            return;
        };
        match &noticed.value {
            None => entry.drifted = true,
            Some(value) => {
                let changed = applied.is_before(&fingerprint(value));
                let terminating = value.pointer("/metadata/deletionTimestamp").is_some();
                entry.drifted |= changed && !terminating;
            }
        }
    }

    fn api(&self, resource: &ApiResource, namespace: Option<&str>) -> Api<DynamicObject> {
        match namespace {
            Some(namespace) => {
                Api::namespaced_with(self.cluster.client.clone(), namespace, resource)
            }
            None => Api::all_with(self.cluster.client.clone(), resource),
        }
    }

    fn namespace_for(&self, app: &AppKey) -> String {
        self.config
            .namespace_template
            .replace("{namespace}", &app.namespace)
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

    async fn ensure_namespace(&self, name: &str, app: &AppKey) -> Result<(), BackendError> {
        if self.namespaces.lock().contains(name) {
            return Ok(());
        }
        let (resource, _) = self.cluster.resource("v1", "Namespace").await?;
        let api = self.api(&resource, None);
        let what = format!("namespace `{name}`");
        let found = call(&what, api.get_opt(name)).await?;
        match found {
            Some(found) if found.metadata.deletion_timestamp.is_some() => {
                return Err(BackendError::new(
                    Code::Busy,
                    format!("{what} is still being removed"),
                ));
            }
            Some(found) => {
                let ours = found
                    .metadata
                    .labels
                    .as_ref()
                    .and_then(|labels| labels.get(NAMESPACE_LABEL))
                    .is_some_and(|label| *label == app.namespace);
                if !ours {
                    return Err(BackendError::new(
                        Code::Conflict,
                        format!(
                            "{what} exists and was not made by Krake for `{}`; the site's operator can rename it or set another backend.namespace_template",
                            app.namespace
                        ),
                    ));
                }
            }
            None => {
                let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {
                    "name": name,
                    "labels": {NAMESPACE_LABEL: app.namespace, "app.kubernetes.io/managed-by": "krake"}}});
                let params = PatchParams::apply(MANAGER).force();
                call(&what, api.patch(name, &params, &Patch::Apply(&object))).await?;
            }
        }
        self.namespaces.lock().insert(name.to_owned());
        Ok(())
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

    /// Refuses to touch what belongs to somebody else.
    async fn check_owner(
        &self,
        workload: &Workload,
        object: &ObjectRef,
        namespace: &str,
    ) -> Result<(), BackendError> {
        let found = self
            .cluster
            .resource(&object.api_version, &object.kind)
            .await;
        let (resource, namespaced) = match found {
            // Without the kind there is nobody's object.
            Err(error)
                if error.code == Code::Unsupported && brought(workload, object).is_some() =>
            {
                return Ok(());
            }
            found => found?,
        };
        let api = self.api(&resource, namespaced.then_some(namespace));
        // Not from the API server's cache: an object that is not in it yet may be there, and would
        // be taken over.
        let what = object.to_string();
        let found = call_unless(404, &what, api.get(&object.name)).await?;
        let Some(found) = found else {
            return Ok(());
        };
        let label = found
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(UID_LABEL));
        match label {
            Some(uid) if *uid == workload.uid.to_string() => {
                if found.metadata.deletion_timestamp.is_some() {
                    return Err(BackendError::new(
                        Code::Busy,
                        format!("{object} is still being removed"),
                    ));
                }
                Ok(())
            }
            Some(uid) => {
                let other = found
                    .metadata
                    .annotations
                    .as_ref()
                    .and_then(|annotations| annotations.get(APP_ANNOTATION))
                    .unwrap_or(uid);
                Err(taken(object, other))
            }
            None => Err(BackendError::new(
                Code::Conflict,
                format!(
                    "{object} exists in {namespace} and was not made by Krake; rename or remove it"
                ),
            )),
        }
    }

    fn admit_kind(&self, object: &ObjectRef, namespaced: bool) -> Result<(), BackendError> {
        let name = match object.api_version.split_once('/') {
            Some((group, _)) => format!("{group}/{}", object.kind),
            None => object.kind.clone(),
        };
        let reason = if self.config.denied_kinds.contains(&name) {
            format!("this site does not admit {name}")
        } else if !namespaced && !self.config.cluster_scoped_kinds.contains(&name) {
            format!("{object} belongs to the whole cluster, which this site does not admit")
        } else {
            return Ok(());
        };
        Err(BackendError::new(Code::Forbidden, reason))
    }

    async fn apply_one(
        &self,
        workload: &Workload,
        manifest: &Value,
        namespace: &str,
    ) -> Result<(ObjectRef, Fingerprint), BackendError> {
        let object = reference(manifest)?;
        let (resource, namespaced) = self
            .cluster
            .resource(&object.api_version, &object.kind)
            .await
            .map_err(|error| match brought(workload, &object) {
                Some(_) if error.code == Code::Unsupported => BackendError::new(
                    Code::Busy,
                    format!("{object}: its definition is applied but not served yet"),
                ),
                _ => error,
            })?;
        self.admit_kind(&object, namespaced)?;
        let mut manifest = manifest.clone();
        let metadata = &mut manifest["metadata"];
        if namespaced {
            metadata["namespace"] = namespace.into();
        }
        for (kind, key, value) in [
            ("labels", UID_LABEL, workload.uid.to_string()),
            ("annotations", APP_ANNOTATION, workload.app.to_string()),
        ] {
            if !metadata.get(kind).is_some_and(Value::is_object) {
                metadata[kind] = json!({});
            }
            metadata[kind][key] = value.into();
        }
        self.cache.watch(&self.cluster.client, &resource);
        let api = self.api(&resource, namespaced.then_some(namespace));
        let params = PatchParams::apply(MANAGER).force();
        let applied = call(
            &object.to_string(),
            api.patch(&object.name, &params, &Patch::Apply(&manifest)),
        )
        .await?;
        let applied = serde_json::to_value(&applied).unwrap_or_default();
        Ok((object, fingerprint(&applied)))
    }

    /// Removes one object if it is ours; `true` when it is gone.
    async fn remove_one(
        &self,
        uid: AppUid,
        object: &ObjectRef,
        namespace: &str,
    ) -> Result<bool, BackendError> {
        let resource = self
            .cluster
            .resource(&object.api_version, &object.kind)
            .await;
        let (resource, namespaced) = match resource {
            Ok(found) => found,
            // Without the kind there are no objects of it.
            Err(error) if error.code == Code::Unsupported => return Ok(true),
            Err(error) => return Err(error),
        };
        let api = self.api(&resource, namespaced.then_some(namespace));
        let what = format!("removing {object}");
        let found = match tokio::time::timeout(CALL_TIME, api.get_opt(&object.name)).await {
            // Not the object but its kind is not there any more; the next call looks.
            Ok(Err(error)) if status_code(&error) == Some(404) => {
                self.cluster.forget(&object.api_version, &object.kind);
                return Ok(false);
            }
            Ok(found) => call(&what, std::future::ready(found)).await?,
            Err(_) => return Ok(false),
        };
        let Some(found) = found else {
            return Ok(true);
        };
        let ours = found
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(UID_LABEL))
            .is_some_and(|label| *label == uid.to_string());
        if !ours {
            return Ok(true);
        }
        if found.metadata.deletion_timestamp.is_some() {
            return Ok(false);
        }
        let params = DeleteParams {
            preconditions: Some(Preconditions {
                uid: found.metadata.uid.clone(),
                resource_version: None,
            }),
            ..DeleteParams::background()
        };
        match tokio::time::timeout(CALL_TIME, api.delete(&object.name, &params)).await {
            Ok(Ok(either::Either::Right(_))) => Ok(true),
            Ok(Ok(either::Either::Left(_))) => Ok(false),
            Ok(Err(error)) if status_code(&error) == Some(404) => Ok(true),
            Ok(Err(error)) if status_code(&error) == Some(409) => Ok(false),
            Ok(Err(error)) => call(&what, std::future::ready(Err(error))).await,
            Err(_) => Ok(false),
        }
    }

    fn observe_known(&self, known: &Known) -> Observed {
        let ledger = &known.ledger;
        let (mut ready, mut wanted, mut all, mut broken) = (0_u32, 0_u32, true, false);
        let mut message = None;
        let mut have_pods = false;
        let mut plain = (0_u32, 0_u32);
        for object in &ledger.objects {
            let mut namespace = ledger.namespace.as_str();
            let mut found = self.cache.get(ledger.uid, object, namespace);
            if found.is_none() {
                namespace = "";
                found = self.cache.get(ledger.uid, object, namespace);
            }
            // What the watch still shows of the version before says nothing about this one.
            let applied = known.applied.get(object);
            let is_old = found
                .as_ref()
                .zip(applied)
                .is_some_and(|(value, applied)| fingerprint(value).is_before(applied));
            let Some(value) = found.filter(|_| !is_old) else {
                plain.1 += 1;
                all = false;
                message.get_or_insert_with(|| {
                    if !is_old && self.cache.is_synced(&object.api_version, &object.kind) {
                        format!("{object} is not there yet")
                    } else {
                        format!("{object} is not observed yet")
                    }
                });
                continue;
            };
            let health = readiness::judge(&object.api_version, &object.kind, &value);
            let pods = matches!(
                object.kind.as_str(),
                "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet" | "Pod" | "Job"
            );
            if pods {
                have_pods = true;
                ready += health.ready;
                wanted += health.wanted;
            } else {
                plain.0 += u32::from(health.is_ready());
                plain.1 += 1;
            }
            if !health.is_ready() {
                all = false;
                broken |= health.broken;
                message.get_or_insert_with(|| {
                    format!("{object}: {}", health.message.unwrap_or_default())
                });
            }
        }
        if !have_pods {
            (ready, wanted) = plain;
        }
        let phase = if all {
            Phase::Ready
        } else if broken || known.was_ready {
            Phase::Degraded
        } else {
            Phase::Progressing
        };
        Observed {
            uid: ledger.uid,
            app: ledger.app.clone(),
            epoch: ledger.epoch,
            phase,
            ready,
            wanted,
            namespace: ledger.namespace.clone(),
            message,
            drifted: known.drifted,
        }
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

fn taken(object: &ObjectRef, other: &str) -> BackendError {
    BackendError::new(
        Code::Conflict,
        format!("{object} belongs to application {other}; rename one of the two"),
    )
}

fn outdated(newest: Epoch, asked: Epoch) -> BackendError {
    BackendError::new(
        Code::Outdated,
        format!("a newer assignment is known here ({newest}, not {asked})"),
    )
}

fn reference(manifest: &Value) -> Result<ObjectRef, BackendError> {
    ObjectRef::of(manifest).ok_or_else(|| {
        BackendError::new(
            Code::Invalid,
            "a manifest has no apiVersion, kind or metadata.name",
        )
    })
}

/// Whether a definition in the same app brings this object's kind, and if so, whether its objects
/// are in namespaces.
fn brought(workload: &Workload, object: &ObjectRef) -> Option<bool> {
    let text = |manifest: &Value, pointer: &str| {
        manifest
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let group = object.api_version.split_once('/')?.0;
    workload
        .components
        .iter()
        .find(|manifest| {
            text(manifest, "/kind") == DEFINITION
                && text(manifest, "/spec/group") == group
                && text(manifest, "/spec/names/kind") == object.kind
        })
        .map(|definition| text(definition, "/spec/scope") == "Namespaced")
}

/// What others need comes first: definitions, then what pods mount and run as, then the rest.
fn waves(components: &[Value]) -> Vec<Vec<&Value>> {
    let rank = |manifest: &Value| match manifest.get("kind").and_then(Value::as_str) {
        Some(DEFINITION) => 0,
        Some(
            "ServiceAccount"
            | "ConfigMap"
            | "Secret"
            | "PersistentVolumeClaim"
            | "Role"
            | "RoleBinding"
            | "ResourceQuota"
            | "LimitRange",
        ) => 1,
        _ => 2,
    };
    let mut waves: BTreeMap<u8, Vec<&Value>> = BTreeMap::new();
    for manifest in components {
        waves.entry(rank(manifest)).or_default().push(manifest);
    }
    waves.into_values().collect()
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
        let inner = &self.inner;
        inner.load().await?;
        let (resource, _) = inner.cluster.resource("v1", "Namespace").await?;
        let api = inner.api(&resource, None);
        let params = ListParams::default().labels(NAMESPACE_LABEL);
        let list = call("reading the namespaces", api.list(&params)).await?;
        for namespace in list.items {
            let Some(name) = namespace.metadata.name.clone() else {
                continue;
            };
            let used = inner
                .known
                .lock()
                .values()
                .any(|known| known.ledger.namespace == name);
            {
                let mut empty_since = inner.empty_since.lock();
                if used || namespace.metadata.deletion_timestamp.is_some() {
                    empty_since.remove(&name);
                    continue;
                }
                let since = *empty_since.entry(name.clone()).or_insert_with(Instant::now);
                if since.elapsed() < NAMESPACE_GRACE {
                    continue;
                }
                empty_since.remove(&name);
            }
            inner.namespaces.lock().remove(&name);
            call(
                &format!("removing namespace `{name}`"),
                api.delete(&name, &DeleteParams::background()),
            )
            .await?;
            info!(name, "an empty namespace was removed");
        }
        Ok(())
    }

    fn changes(&self) -> broadcast::Receiver<AppUid> {
        self.inner.changes.subscribe()
    }
}
