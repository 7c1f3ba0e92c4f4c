//! The driver's contract: one suite of cases for any Kubernetes, embedded or real.
//!
//! Every case has namespaces of its own, so all of them run at the same time on one cluster. A case
//! waits for states, never for time.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use krake_driver::{Backend, BackendError, Code, Deletion, Observed, Phase, Workload};
use krake_k8s_driver::{Config, KubernetesBackend};
use krake_model::{AppKey, AppUid, Epoch};
use kube::Client;
use serde_json::{Value, json};

/// A state comes about within this time, also on a busy machine.
const WITHIN: Duration = Duration::from_secs(60);
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(25);
const UID_LABEL: &str = "krake.dev/app-uid";

type Running = Pin<Box<dyn Future<Output = Result<()>> + Send>>;
type Case = (&'static str, fn(Site) -> Running);

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// All cases, by name.
        const CASES: &[Case] = &[$((stringify!($name), |site| Box::pin($name(site)))),*];
    };
}

cases![
    six_kinds_become_ready,
    applying_again_changes_nothing,
    custom_objects_are_applied,
    a_definition_and_its_objects_come_together,
    what_a_new_version_lacks_is_removed,
    drift_is_noticed_and_repaired,
    fields_of_others_stay,
    a_new_image_is_rolled_out,
    what_cannot_run_is_not_ready_and_says_why,
    two_apps_that_want_the_same_object_conflict,
    what_krake_did_not_make_is_left_alone,
    an_existing_namespace_is_never_adopted,
    an_older_epoch_is_refused_also_after_a_restart,
    cluster_scoped_kinds_are_refused,
    denied_kinds_are_refused,
    an_unknown_kind_is_unsupported,
    a_wrong_manifest_is_invalid,
    a_deletion_waits_for_finalizers_and_leaves_nothing,
    a_deletion_ends_when_the_namespace_is_gone,
    an_app_comes_back_after_its_namespace_was_removed,
    a_restarted_driver_sees_what_runs,
    a_first_apply_that_was_cut_short_is_removed,
    changes_are_told,
    the_inventory_counts_what_pods_request,
    a_kubeconfig_that_points_nowhere_is_named,
    an_api_that_does_not_answer_is_unreachable,
    a_wrong_token_is_unreachable,
];

/// Runs every case on the cluster of `kubeconfig`.
///
/// # Panics
/// When a case fails: with the names of all that did, and why.
pub async fn run(kubeconfig: &Path) {
    let mut cases = tokio::task::JoinSet::new();
    for (name, case) in CASES {
        let site = Site {
            kubeconfig: kubeconfig.to_owned(),
            case: name,
        };
        cases.spawn(async move {
            let started = Instant::now();
            let outcome = tokio::time::timeout(WITHIN * 2, case(site)).await;
            let outcome = outcome.unwrap_or_else(|_| bail!("it does not end"));
            (*name, started.elapsed(), outcome)
        });
    }
    let mut failed = Vec::new();
    while let Some(ended) = cases.join_next().await {
        let (name, took, outcome) = ended.expect("a case does not panic");
        if let Err(error) = outcome {
            failed.push(format!("{name} ({} ms): {error:#}", took.as_millis()));
        }
    }
    assert!(
        failed.is_empty(),
        "{} of {} cases failed:\n{}",
        failed.len(),
        CASES.len(),
        failed.join("\n")
    );
}

/// What a case works on.
#[derive(Debug, Clone)]
struct Site {
    kubeconfig: PathBuf,
    case: &'static str,
}

impl Site {
    /// The federation's namespace of this case.
    fn namespace(&self) -> String {
        let mut name = self.case.replace('_', "-");
        name.truncate(50);
        name.trim_matches('-').to_owned()
    }

    /// The namespace at the site.
    fn place(&self) -> String {
        format!("krake-{}", self.namespace())
    }

    fn config(&self) -> Config {
        Config {
            kubeconfig: Some(self.kubeconfig.clone()),
            context: None,
            namespace_template: "krake-{namespace}".to_owned(),
            cluster_scoped_kinds: Vec::new(),
            denied_kinds: Vec::new(),
        }
    }

    async fn backend(&self) -> Result<KubernetesBackend> {
        Ok(KubernetesBackend::new(self.config()).await?)
    }

    fn app(&self, name: &str, components: Vec<Value>) -> Workload {
        Workload {
            uid: AppUid::new(uuid::Uuid::new_v4()),
            app: AppKey::new(self.namespace(), name),
            epoch: epoch(1),
            components,
        }
    }

    async fn api(&self) -> Result<Api> {
        let kubeconfig = kube::config::Kubeconfig::read_from(&self.kubeconfig)?;
        let options = kube::config::KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        Ok(Api(Client::try_from(config)?))
    }
}

fn epoch(index: u64) -> Epoch {
    Epoch {
        incarnation: 0,
        term: 1,
        index,
    }
}

/// The cluster's API, by paths: what an operator does beside the driver.
struct Api(Client);

impl Api {
    async fn send(&self, method: &str, path: &str, media: &str, body: &Value) -> Result<Value> {
        let body = if body.is_null() {
            Vec::new()
        } else {
            body.to_string().into_bytes()
        };
        let request = http::Request::builder()
            .method(method)
            .uri(path)
            .header("content-type", media)
            .body(body)?;
        Ok(self.0.request::<Value>(request).await?)
    }

    async fn get(&self, path: &str) -> Result<Option<Value>> {
        match self
            .0
            .request::<Value>(http::Request::get(path).body(Vec::new())?)
            .await
        {
            Ok(value) => Ok(Some(value)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    async fn need(&self, path: &str) -> Result<Value> {
        self.get(path)
            .await?
            .with_context(|| format!("{path} is not there"))
    }

    async fn create(&self, path: &str, object: &Value) -> Result<Value> {
        self.send("POST", path, "application/json", object).await
    }

    async fn merge(&self, path: &str, patch: &Value) -> Result<Value> {
        self.send("PATCH", path, "application/merge-patch+json", patch)
            .await
    }

    async fn delete(&self, path: &str) -> Result<Value> {
        self.send("DELETE", path, "application/json", &Value::Null)
            .await
    }
}

/// Looks until `look` finds something.
async fn eventually<T, F: Future<Output = Result<Option<T>>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> Result<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        if started.elapsed() > WITHIN {
            bail!("it was never seen that {what}");
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Applies, again while the cluster says that it cannot now.
async fn apply(backend: &KubernetesBackend, workload: &Workload) -> Result<()> {
    let last = std::sync::Mutex::new(String::new());
    let accepted = eventually("the app is accepted", || async {
        match backend.apply(workload).await {
            Ok(()) => Ok(Some(())),
            Err(error) if error.code.is_temporary() => {
                note(&last, &error);
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    })
    .await;
    accepted.with_context(|| format!("last answer: {last:?}"))
}

fn note(last: &std::sync::Mutex<String>, what: &dyn std::fmt::Debug) {
    if let Ok(mut last) = last.lock() {
        *last = format!("{what:?}");
    }
}

async fn observed(
    backend: &KubernetesBackend,
    uid: AppUid,
    what: &str,
    is: impl Fn(&Observed) -> bool + Sync,
) -> Result<Observed> {
    let last = std::sync::Mutex::new(String::new());
    let found = eventually(what, || async {
        let seen = backend.observe_one(uid).await?;
        note(&last, &seen);
        Ok(seen.filter(|seen| is(seen)))
    })
    .await;
    found.with_context(|| format!("last seen: {last:?}"))
}

async fn ready(backend: &KubernetesBackend, uid: AppUid) -> Result<Observed> {
    observed(backend, uid, "the app is ready", |seen| {
        seen.phase == Phase::Ready
    })
    .await
}

async fn delete(backend: &KubernetesBackend, workload: &Workload) -> Result<()> {
    let last = std::sync::Mutex::new(String::new());
    let gone = eventually("the app is gone", || async {
        let answer = backend.delete(workload.uid, workload.epoch).await;
        note(&last, &answer);
        match answer {
            Ok(Deletion::Gone) => Ok(Some(())),
            Ok(Deletion::InProgress(_)) => Ok(None),
            Err(error) if error.code.is_temporary() => Ok(None),
            Err(error) => Err(error.into()),
        }
    })
    .await;
    gone.with_context(|| format!("last answer: {last:?}"))
}

fn refused<T: std::fmt::Debug>(
    result: std::result::Result<T, BackendError>,
    code: Code,
    words: &[&str],
) -> Result<()> {
    let error = match result {
        Ok(value) => bail!("it was not refused but gave {value:?}"),
        Err(error) => error,
    };
    ensure!(
        error.code == code,
        "{code:?} was due, not {:?}: {error}",
        error.code
    );
    for word in words {
        ensure!(error.message.contains(word), "`{word}` is not in: {error}");
    }
    Ok(())
}

fn deployment(name: &str, replicas: i64, image: &str, cpu: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": {
        "replicas": replicas, "selector": {"matchLabels": {"app": name}},
        "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [
            {"name": "main", "image": image, "ports": [{"containerPort": 80}],
                "resources": {"requests": {"cpu": cpu, "memory": "16Mi"}}}]}}}})
}

fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"key": value}})
}

fn definition(plural: &str, kind: &str) -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.contract.example.org")}, "spec": {
            "group": "contract.example.org", "scope": "Namespaced",
            "names": {"plural": plural, "singular": kind.to_lowercase(), "kind": kind},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "properties": {"spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}}}]}})
}

fn custom(kind: &str, name: &str) -> Value {
    json!({"apiVersion": "contract.example.org/v1", "kind": kind, "metadata": {"name": name}, "spec": {"size": 3}})
}

async fn six_kinds_become_ready(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let mut set = deployment("db", 1, "x:1", "10m");
    set["kind"] = "StatefulSet".into();
    set["spec"]["serviceName"] = "db".into();
    let backend_service = json!({"service": {"name": "web", "port": {"number": 80}}});
    let workload = site.app("shop", vec![
        deployment("web", 2, "x:1", "10m"),
        set,
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}),
        config_map("settings", "1"),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"key": "s"}}),
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "web"},
            "spec": {"rules": [{"host": "shop.example.org", "http": {"paths": [
                {"path": "/", "pathType": "Prefix", "backend": backend_service}]}}]}}),
    ]);
    apply(&backend, &workload).await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!((seen.ready, seen.wanted) == (3, 3), "{seen:?}");
    ensure!(seen.namespace == place, "{seen:?}");
    ensure!(!seen.drifted && seen.message.is_none(), "{seen:?}");
    for path in [
        "apis/apps/v1/namespaces/{}/deployments/web",
        "apis/apps/v1/namespaces/{}/statefulsets/db",
        "api/v1/namespaces/{}/services/web",
        "api/v1/namespaces/{}/configmaps/settings",
        "api/v1/namespaces/{}/secrets/key",
        "apis/networking.k8s.io/v1/namespaces/{}/ingresses/web",
    ] {
        let object = api
            .need(&format!("/{}", path.replace("{}", &place)))
            .await?;
        let metadata = &object["metadata"];
        ensure!(
            metadata["labels"][UID_LABEL] == workload.uid.to_string(),
            "{object}"
        );
        ensure!(
            metadata["annotations"]["krake.dev/app"] == workload.app.to_string(),
            "{object}"
        );
    }
    let service = api
        .need(&format!("/api/v1/namespaces/{place}/services/web"))
        .await?;
    ensure!(service["spec"]["clusterIP"].is_string(), "{service}");
    delete(&backend, &workload).await
}

async fn applying_again_changes_nothing(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app(
        "shop",
        vec![
            deployment("web", 1, "x:1", "10m"),
            config_map("settings", "1"),
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}),
        ],
    );
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let look = || async {
        let mut seen = Vec::new();
        for path in ["services/web", "configmaps/settings"] {
            let object = api
                .need(&format!("/api/v1/namespaces/{place}/{path}"))
                .await?;
            seen.push(object["metadata"]["resourceVersion"].clone());
        }
        let web = format!("/apis/apps/v1/namespaces/{place}/deployments/web");
        seen.push(api.need(&web).await?["metadata"]["generation"].clone());
        anyhow::Ok(seen)
    };
    let before = look().await?;
    for _ in 0..3 {
        backend.apply(&workload).await?;
    }
    let after = look().await?;
    ensure!(before == after, "{before:?} became {after:?}");
    let seen = ready(&backend, workload.uid).await?;
    ensure!(!seen.drifted, "{seen:?}");
    delete(&backend, &workload).await
}

async fn custom_objects_are_applied(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    api.create(definitions, &definition("gears", "Gear"))
        .await?;
    let workload = site.app(
        "machine",
        vec![custom("Gear", "a"), config_map("settings", "1")],
    );
    eventually("the kind is served", || async {
        match backend.apply(&workload).await {
            Ok(()) => Ok(Some(())),
            Err(error) if error.code == Code::Unsupported || error.code.is_temporary() => Ok(None),
            Err(error) => Err(error.into()),
        }
    })
    .await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!((seen.ready, seen.wanted) == (2, 2), "{seen:?}");
    let gear = format!("/apis/contract.example.org/v1/namespaces/{place}/gears/a");
    ensure!(api.need(&gear).await?["spec"]["size"] == 3);
    let kinds = backend.inventory().await?.kinds;
    ensure!(kinds.contains(&"contract.example.org/v1/Gear".to_owned()));
    // Without its definition nothing of it is left, which the driver must be able to tell.
    api.delete(&format!("{definitions}/gears.contract.example.org"))
        .await?;
    delete(&backend, &workload).await
}

async fn a_definition_and_its_objects_come_together(site: Site) -> Result<()> {
    let (api, place) = (site.api().await?, site.place());
    let backend = KubernetesBackend::new(Config {
        cluster_scoped_kinds: vec!["apiextensions.k8s.io/CustomResourceDefinition".to_owned()],
        ..site.config()
    })
    .await?;
    let workload = site.app(
        "machine",
        vec![custom("Wheel", "a"), definition("wheels", "Wheel")],
    );
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let wheel = format!("/apis/contract.example.org/v1/namespaces/{place}/wheels/a");
    ensure!(api.need(&wheel).await?["spec"]["size"] == 3);
    delete(&backend, &workload).await?;
    let definition =
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/wheels.contract.example.org";
    ensure!(api.get(definition).await?.is_none());
    Ok(())
}

async fn what_a_new_version_lacks_is_removed(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let mut workload = site.app("shop", vec![config_map("a", "1"), config_map("b", "1")]);
    apply(&backend, &workload).await?;
    workload.epoch = epoch(2);
    workload.components = vec![config_map("b", "2"), config_map("c", "1")];
    apply(&backend, &workload).await?;
    let path = |name: &str| format!("/api/v1/namespaces/{place}/configmaps/{name}");
    ensure!(api.get(&path("a")).await?.is_none(), "a is still there");
    ensure!(api.need(&path("b")).await?["data"]["key"] == "2");
    ensure!(api.need(&path("c")).await?["data"]["key"] == "1");
    let seen = ready(&backend, workload.uid).await?;
    ensure!(seen.epoch == epoch(2) && seen.wanted == 2, "{seen:?}");
    delete(&backend, &workload).await
}

async fn drift_is_noticed_and_repaired(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app(
        "shop",
        vec![
            deployment("web", 1, "x:1", "10m"),
            config_map("settings", "1"),
        ],
    );
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let web = format!("/apis/apps/v1/namespaces/{place}/deployments/web");
    let settings = format!("/api/v1/namespaces/{place}/configmaps/settings");
    let drifted = || {
        observed(&backend, workload.uid, "drift is noticed", |seen| {
            seen.drifted
        })
    };

    api.merge(&settings, &json!({"data": {"key": "other"}}))
        .await?;
    drifted().await?;
    apply(&backend, &workload).await?;
    ensure!(api.need(&settings).await?["data"]["key"] == "1");

    let image = json!([{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "evil:1"}]);
    api.send("PATCH", &web, "application/json-patch+json", &image)
        .await?;
    drifted().await?;
    apply(&backend, &workload).await?;
    let object = api.need(&web).await?;
    ensure!(
        object["spec"]["template"]["spec"]["containers"][0]["image"] == "x:1",
        "{object}"
    );

    api.delete(&settings).await?;
    drifted().await?;
    apply(&backend, &workload).await?;
    api.need(&settings).await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!(!seen.drifted, "{seen:?}");
    delete(&backend, &workload).await
}

async fn fields_of_others_stay(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app("shop", vec![deployment("web", 1, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    let web = format!("/apis/apps/v1/namespaces/{place}/deployments/web");
    let side = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "annotations": {"note": "mine"}},
        "spec": {"template": {"spec": {"containers": [{"name": "side", "image": "s:1"}]}}}});
    let path = format!("{web}?fieldManager=mesh");
    api.send("PATCH", &path, "application/apply-patch+yaml", &side)
        .await?;
    apply(&backend, &workload).await?;
    let object = api.need(&web).await?;
    ensure!(
        object["metadata"]["annotations"]["note"] == "mine",
        "{object}"
    );
    let containers = &object["spec"]["template"]["spec"]["containers"];
    let names: Vec<&str> = containers
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|container| container["name"].as_str())
        .collect();
    ensure!(
        names.contains(&"main") && names.contains(&"side"),
        "{containers}"
    );
    ready(&backend, workload.uid).await?;
    delete(&backend, &workload).await
}

async fn a_new_image_is_rolled_out(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let mut workload = site.app("shop", vec![deployment("web", 2, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    workload.components = vec![deployment("web", 2, "x:2", "10m")];
    workload.epoch = epoch(2);
    apply(&backend, &workload).await?;
    let pods = format!("/api/v1/namespaces/{place}/pods?labelSelector=app%3Dweb");
    eventually("only new pods are left", || async {
        let list = api.need(&pods).await?;
        let images: Vec<Value> = list["items"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|pod| pod["spec"]["containers"][0]["image"].clone())
            .collect();
        Ok((images == ["x:2", "x:2"]).then_some(()))
    })
    .await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!(
        (seen.ready, seen.wanted, seen.epoch) == (2, 2, epoch(2)),
        "{seen:?}"
    );
    delete(&backend, &workload).await
}

async fn what_cannot_run_is_not_ready_and_says_why(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app("shop", vec![deployment("web", 1, "x:1", "100000")]);
    apply(&backend, &workload).await?;
    let pods = format!("/api/v1/namespaces/{place}/pods");
    eventually("the pod has no place", || async {
        let list = api.need(&pods).await?;
        let conditions = list["items"][0]["status"]["conditions"].as_array();
        let unplaced = conditions.is_some_and(|list| {
            list.iter().any(|condition| {
                condition["type"] == "PodScheduled" && condition["reason"] == "Unschedulable"
            })
        });
        Ok(unplaced.then_some(()))
    })
    .await?;
    let seen = observed(&backend, workload.uid, "it says why", |seen| {
        seen.message
            .as_deref()
            .is_some_and(|message| message.contains("0 of 1 pods are ready"))
    })
    .await?;
    ensure!(seen.phase == Phase::Progressing, "{seen:?}");
    delete(&backend, &workload).await
}

async fn two_apps_that_want_the_same_object_conflict(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let first = site.app("first", vec![config_map("settings", "1")]);
    apply(&backend, &first).await?;
    let second = site.app("second", vec![config_map("settings", "2")]);
    let name = first.app.to_string();
    refused(
        backend.apply(&second).await,
        Code::Conflict,
        &["settings", &name],
    )?;
    let object = api
        .need(&format!("/api/v1/namespaces/{place}/configmaps/settings"))
        .await?;
    ensure!(object["data"]["key"] == "1", "{object}");
    delete(&backend, &second).await?;
    delete(&backend, &first).await
}

async fn what_krake_did_not_make_is_left_alone(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let first = site.app("first", vec![config_map("own", "1")]);
    apply(&backend, &first).await?;
    let path = format!("/api/v1/namespaces/{place}/configmaps");
    api.create(&path, &config_map("foreign", "theirs")).await?;
    let second = site.app("second", vec![config_map("foreign", "ours")]);
    refused(
        backend.apply(&second).await,
        Code::Conflict,
        &["foreign", "not made by Krake"],
    )?;
    delete(&backend, &second).await?;
    let object = api.need(&format!("{path}/foreign")).await?;
    ensure!(object["data"]["key"] == "theirs", "{object}");
    delete(&backend, &first).await
}

async fn an_existing_namespace_is_never_adopted(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": place}});
    api.create("/api/v1/namespaces", &namespace).await?;
    let workload = site.app("shop", vec![config_map("settings", "1")]);
    refused(
        backend.apply(&workload).await,
        Code::Conflict,
        &[&place, "not made by Krake"],
    )?;
    let path = format!("/api/v1/namespaces/{place}");
    let labels = &api.need(&path).await?["metadata"]["labels"];
    ensure!(labels["krake.dev/namespace"].is_null(), "{labels}");
    let settings = format!("{path}/configmaps/settings");
    ensure!(api.get(&settings).await?.is_none());
    Ok(())
}

async fn an_older_epoch_is_refused_also_after_a_restart(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let mut workload = site.app("shop", vec![config_map("settings", "2")]);
    workload.epoch = epoch(5);
    apply(&backend, &workload).await?;
    let old = Workload {
        epoch: epoch(4),
        components: vec![config_map("settings", "1")],
        ..workload.clone()
    };
    for backend in [backend, site.backend().await?] {
        refused(backend.apply(&old).await, Code::Outdated, &[])?;
        refused(
            backend.delete(old.uid, old.epoch).await,
            Code::Outdated,
            &[],
        )?;
        let seen = ready(&backend, workload.uid).await?;
        ensure!(seen.epoch == epoch(5), "{seen:?}");
    }
    let api = site.api().await?;
    let object = api
        .need(&format!(
            "/api/v1/namespaces/{}/configmaps/settings",
            site.place()
        ))
        .await?;
    ensure!(object["data"]["key"] == "2", "{object}");
    delete(&site.backend().await?, &workload).await
}

async fn cluster_scoped_kinds_are_refused(site: Site) -> Result<()> {
    let (backend, api) = (site.backend().await?, site.api().await?);
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": "contract-all"}, "rules": []});
    let workload = site.app("shop", vec![config_map("settings", "1"), role]);
    refused(
        backend.admit(&workload).await,
        Code::Forbidden,
        &["contract-all", "whole cluster"],
    )?;
    refused(
        backend.apply(&workload).await,
        Code::Forbidden,
        &["contract-all", "whole cluster"],
    )?;
    // Nothing at all was made.
    ensure!(
        api.get(&format!("/api/v1/namespaces/{}", site.place()))
            .await?
            .is_none()
    );
    let path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/contract-all";
    ensure!(api.get(path).await?.is_none());
    Ok(())
}

async fn denied_kinds_are_refused(site: Site) -> Result<()> {
    let backend = KubernetesBackend::new(Config {
        denied_kinds: vec!["Secret".to_owned(), "apps/StatefulSet".to_owned()],
        ..site.config()
    })
    .await?;
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}});
    let workload = site.app("shop", vec![config_map("settings", "1"), secret]);
    refused(backend.admit(&workload).await, Code::Forbidden, &["Secret"])?;
    refused(backend.apply(&workload).await, Code::Forbidden, &["Secret"])?;
    let api = site.api().await?;
    ensure!(
        api.get(&format!("/api/v1/namespaces/{}", site.place()))
            .await?
            .is_none()
    );
    Ok(())
}

async fn an_unknown_kind_is_unsupported(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let object =
        json!({"apiVersion": "nowhere.example.org/v1", "kind": "Thing", "metadata": {"name": "t"}});
    let workload = site.app("shop", vec![object]);
    refused(
        backend.apply(&workload).await,
        Code::Unsupported,
        &["Thing"],
    )
}

async fn a_wrong_manifest_is_invalid(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let mut no_template = deployment("web", 1, "x:1", "10m");
    no_template["spec"]["template"] = json!({});
    let mut bad_name = config_map("settings", "1");
    bad_name["metadata"]["name"] = "No_Good".into();
    let mut wrong_type = config_map("settings", "1");
    wrong_type["data"] = "text".into();
    let mut unmatched = deployment("web", 1, "x:1", "10m");
    unmatched["spec"]["selector"]["matchLabels"] = json!({"app": "other"});
    let nameless = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {}});
    let mut unknown = deployment("web", 1, "x:1", "10m");
    unknown["spec"]["replica"] = 3.into();
    for (what, component) in [
        ("no template", no_template),
        ("bad name", bad_name),
        ("wrong type", wrong_type),
        ("selector", unmatched),
        ("no name", nameless),
        ("unknown field", unknown),
    ] {
        let workload = site.app("shop", vec![component]);
        refused(backend.apply(&workload).await, Code::Invalid, &[]).context(what)?;
        delete(&backend, &workload).await?;
    }
    Ok(())
}

async fn a_deletion_waits_for_finalizers_and_leaves_nothing(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let mut held = config_map("held", "1");
    held["metadata"]["finalizers"] = json!(["example.org/wait"]);
    let workload = site.app("shop", vec![held, deployment("web", 2, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let left = eventually("only the held object is left", || async {
        match backend.delete(workload.uid, workload.epoch).await? {
            Deletion::InProgress(left) if left.len() == 1 => Ok(Some(left)),
            Deletion::InProgress(_) => Ok(None),
            Deletion::Gone => bail!("it is gone in spite of a finalizer"),
        }
    })
    .await?;
    ensure!(left[0].contains("held"), "{left:?}");
    let path = format!("/api/v1/namespaces/{place}/configmaps/held");
    api.merge(&path, &json!({"metadata": {"finalizers": null}}))
        .await?;
    delete(&backend, &workload).await?;
    ensure!(backend.observe_one(workload.uid).await?.is_none());
    for kind in ["api/v1|configmaps", "apis/apps/v1|deployments"] {
        let (group, plural) = kind.split_once('|').unwrap_or_default();
        let path = format!("/{group}/namespaces/{place}/{plural}?labelSelector={UID_LABEL}");
        let list = api.need(&path).await?;
        ensure!(
            list["items"].as_array().is_some_and(Vec::is_empty),
            "{list}"
        );
    }
    eventually("no pod is left", || async {
        let list = api
            .need(&format!("/api/v1/namespaces/{place}/pods"))
            .await?;
        Ok(list["items"]
            .as_array()
            .is_some_and(Vec::is_empty)
            .then_some(()))
    })
    .await?;
    // Deleting again is no error.
    ensure!(backend.delete(workload.uid, workload.epoch).await? == Deletion::Gone);
    eventually("the namespace goes", || async {
        // Another case's driver may have removed it first.
        match backend.tidy().await {
            Ok(()) => {}
            Err(error) if error.code.is_temporary() => {}
            Err(error) => return Err(error.into()),
        }
        let found = api.get(&format!("/api/v1/namespaces/{place}")).await?;
        Ok(found.is_none().then_some(()))
    })
    .await
}

async fn a_deletion_ends_when_the_namespace_is_gone(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app(
        "shop",
        vec![
            deployment("web", 1, "x:1", "10m"),
            config_map("settings", "1"),
        ],
    );
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let path = format!("/api/v1/namespaces/{place}");
    api.delete(&path).await?;
    eventually("the namespace is gone", || async {
        Ok(api.get(&path).await?.is_none().then_some(()))
    })
    .await?;
    delete(&backend, &workload).await
}

async fn an_app_comes_back_after_its_namespace_was_removed(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app("shop", vec![deployment("web", 1, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    api.delete(&format!("/api/v1/namespaces/{place}")).await?;
    observed(&backend, workload.uid, "drift is noticed", |seen| {
        seen.drifted
    })
    .await?;
    // As a node does: apply whenever something is not as it was applied.
    eventually("the app is ready again", || async {
        let seen = backend.observe_one(workload.uid).await?;
        if seen.as_ref().is_none_or(|seen| seen.drifted) {
            return match backend.apply(&workload).await {
                Err(error) if !error.code.is_temporary() => Err(error.into()),
                _ => Ok(None),
            };
        }
        Ok(seen.filter(|seen| seen.phase == Phase::Ready))
    })
    .await?;
    // Its ledger is there again too.
    let restarted = site.backend().await?;
    ready(&restarted, workload.uid).await?;
    delete(&backend, &workload).await
}

async fn a_restarted_driver_sees_what_runs(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let mut workload = site.app("shop", vec![deployment("web", 1, "x:1", "10m")]);
    workload.epoch = epoch(9);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    drop(backend);
    let backend = site.backend().await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!(
        seen.epoch == epoch(9) && seen.app == workload.app,
        "{seen:?}"
    );
    let all = backend.observe().await?;
    ensure!(all.iter().any(|seen| seen.uid == workload.uid), "{all:?}");
    delete(&backend, &workload).await
}

async fn a_first_apply_that_was_cut_short_is_removed(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app("shop", vec![config_map("settings", "1")]);
    apply(&backend, &workload).await?;
    drop(backend);
    // As if the node had ended before the ledger was there.
    let uid = workload.uid;
    let ledgers = format!("/api/v1/namespaces/{place}/configmaps");
    api.delete(&format!("{ledgers}/krake-app-{uid}")).await?;
    let backend = site.backend().await?;
    let seen = backend.observe_one(uid).await?;
    ensure!(seen.is_none(), "without a ledger {seen:?} was seen");
    backend.adopt(&workload).await?;
    delete(&backend, &workload).await?;
    ensure!(
        api.get(&format!("{ledgers}/settings")).await?.is_none()
            && api
                .get(&format!("{ledgers}/krake-app-{uid}"))
                .await?
                .is_none(),
        "something was left"
    );
    // Of what never got to the cluster there is nothing to remove.
    let never = Workload {
        app: AppKey::new("nowhere", "shop"),
        ..site.app("shop", vec![config_map("settings", "1")])
    };
    backend.adopt(&never).await?;
    delete(&backend, &never).await
}

async fn changes_are_told(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let mut changes = backend.changes();
    let workload = site.app("shop", vec![deployment("web", 1, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    // Only looks when told to: a change that is not told is never seen.
    let wait = async {
        loop {
            match backend.observe_one(workload.uid).await? {
                Some(seen) if seen.phase == Phase::Ready => return anyhow::Ok(()),
                _ => {}
            }
            while changes.recv().await? != workload.uid {}
        }
    };
    tokio::time::timeout(WITHIN, wait)
        .await
        .context("no change was told")??;
    delete(&backend, &workload).await
}

async fn the_inventory_counts_what_pods_request(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let inventory = backend.inventory().await?;
    ensure!(
        inventory.total.cpu_millis > 0 && inventory.total.memory_bytes > 0,
        "{inventory:?}"
    );
    ensure!(inventory.kinds.contains(&"apps/v1/Deployment".to_owned()));
    ensure!(inventory.kinds.contains(&"v1/ConfigMap".to_owned()));
    // Other cases run pods too, but none that requests so much.
    let workload = site.app("shop", vec![deployment("web", 2, "x:1", "1500m")]);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    eventually("the room is taken", || async {
        let used = backend.inventory().await?;
        let taken = used.total.cpu_millis - used.free.cpu_millis;
        ensure!(taken < 6000, "{used:?}");
        Ok((taken >= 3000).then_some(()))
    })
    .await?;
    delete(&backend, &workload).await?;
    eventually("the room is free again", || async {
        let now = backend.inventory().await?;
        Ok((now.total.cpu_millis - now.free.cpu_millis < 3000).then_some(()))
    })
    .await
}

async fn a_kubeconfig_that_points_nowhere_is_named(site: Site) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let missing = scratch.path().join("missing");
    let broken = scratch.path().join("broken");
    std::fs::write(&broken, "clusters: [")?;
    for path in [missing, broken] {
        let config = Config {
            kubeconfig: Some(path.clone()),
            ..site.config()
        };
        let name = path.display().to_string();
        refused(
            KubernetesBackend::new(config).await,
            Code::Unreachable,
            &[&name],
        )?;
    }
    Ok(())
}

/// The kubeconfig with another server or token.
async fn altered(
    site: &Site,
    path: &Path,
    alter: impl FnOnce(&mut kube::config::Kubeconfig),
) -> Result<KubernetesBackend> {
    let mut kubeconfig = kube::config::Kubeconfig::read_from(&site.kubeconfig)?;
    alter(&mut kubeconfig);
    std::fs::write(path, serde_json::to_string(&kubeconfig)?)?;
    let config = Config {
        kubeconfig: Some(path.to_owned()),
        ..site.config()
    };
    Ok(KubernetesBackend::new(config).await?)
}

async fn an_api_that_does_not_answer_is_unreachable(site: Site) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    // Bound and never accepted from; the second is closed at once.
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    let closed = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    for address in [closed, silent.local_addr()?] {
        let path = scratch.path().join("kubeconfig");
        let backend = altered(&site, &path, |kubeconfig| {
            for cluster in &mut kubeconfig.clusters {
                if let Some(cluster) = &mut cluster.cluster {
                    cluster.server = Some(format!("https://{address}"));
                }
            }
        })
        .await?;
        let workload = site.app("shop", vec![config_map("settings", "1")]);
        let (inventory, observed, applied) = tokio::join!(
            backend.inventory(),
            backend.observe(),
            backend.apply(&workload)
        );
        refused(inventory, Code::Unreachable, &[])?;
        refused(observed, Code::Unreachable, &[])?;
        refused(applied, Code::Unreachable, &[])?;
    }
    Ok(())
}

async fn a_wrong_token_is_unreachable(site: Site) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join("kubeconfig");
    let backend = altered(&site, &path, |kubeconfig| {
        for user in &mut kubeconfig.auth_infos {
            if let Some(user) = &mut user.auth_info {
                user.token = Some("wrong".to_owned().into());
                user.client_certificate = None;
                user.client_certificate_data = None;
                user.client_key = None;
                user.client_key_data = None;
            }
        }
    })
    .await?;
    refused(backend.observe().await, Code::Unreachable, &[])
}
