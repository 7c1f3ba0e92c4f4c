//! What the cases share: a place in the cluster, its API, waiting, and what apps are made of.

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use krake_driver::{Backend, BackendError, Code, Deletion, Observed, Phase, Workload};
use krake_k8s_driver::{Config, KubernetesBackend};
use krake_model::{AppKey, AppUid, Epoch};
use kube::Client;
use serde_json::{Value, json};

/// A state comes about within this time, also on a busy machine.
pub(super) const WITHIN: Duration = Duration::from_secs(60);
/// How often a state is looked at.
const LOOK: Duration = Duration::from_millis(25);
pub(super) const UID_LABEL: &str = "krake.dev/app-uid";

/// What a case works on.
#[derive(Debug, Clone)]
pub(super) struct Site {
    pub(super) kubeconfig: PathBuf,
    pub(super) case: &'static str,
}

impl Site {
    /// The federation's namespace of this case.
    pub(super) fn namespace(&self) -> String {
        let mut name = self.case.replace('_', "-");
        name.truncate(50);
        name.trim_matches('-').to_owned()
    }

    /// The namespace at the site.
    pub(super) fn place(&self) -> String {
        format!("krake-{}", self.namespace())
    }

    pub(super) fn config(&self) -> Config {
        Config {
            kubeconfig: Some(self.kubeconfig.clone()),
            context: None,
            namespace_template: "krake-{namespace}".to_owned(),
            cluster_scoped_kinds: Vec::new(),
            denied_kinds: Vec::new(),
        }
    }

    pub(super) async fn backend(&self) -> Result<KubernetesBackend> {
        Ok(KubernetesBackend::new(self.config()).await?)
    }

    pub(super) fn app(&self, name: &str, components: Vec<Value>) -> Workload {
        Workload {
            uid: AppUid::new(uuid::Uuid::new_v4()),
            app: AppKey::new(self.namespace(), name),
            epoch: epoch(1),
            components,
        }
    }

    /// An app with something that becomes ready and something that does not have to.
    pub(super) fn shop(&self) -> Workload {
        let components = vec![
            deployment("web", 1, "x:1", "10m"),
            config_map("settings", "1"),
        ];
        self.app("shop", components)
    }

    pub(super) async fn api(&self) -> Result<Api> {
        let kubeconfig = kube::config::Kubeconfig::read_from(&self.kubeconfig)?;
        let options = kube::config::KubeConfigOptions::default();
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        Ok(Api(Client::try_from(config)?))
    }
}

pub(super) fn epoch(index: u64) -> Epoch {
    Epoch {
        incarnation: 0,
        term: 1,
        index,
    }
}

/// The cluster's API, by paths: what an operator does beside the driver.
pub(super) struct Api(Client);

impl Api {
    pub(super) async fn send(
        &self,
        method: &str,
        path: &str,
        media: &str,
        body: &Value,
    ) -> Result<Value> {
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

    pub(super) async fn get(&self, path: &str) -> Result<Option<Value>> {
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

    pub(super) async fn need(&self, path: &str) -> Result<Value> {
        self.get(path)
            .await?
            .with_context(|| format!("{path} is not there"))
    }

    pub(super) async fn create(&self, path: &str, object: &Value) -> Result<Value> {
        self.send("POST", path, "application/json", object).await
    }

    pub(super) async fn merge(&self, path: &str, patch: &Value) -> Result<Value> {
        self.send("PATCH", path, "application/merge-patch+json", patch)
            .await
    }

    pub(super) async fn delete(&self, path: &str) -> Result<Value> {
        self.send("DELETE", path, "application/json", &Value::Null)
            .await
    }
}

/// Looks until `look` finds something.
pub(super) async fn eventually<T, F: Future<Output = Result<Option<T>>>>(
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
pub(super) async fn apply(backend: &KubernetesBackend, workload: &Workload) -> Result<()> {
    let last = Mutex::new(String::new());
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

fn note(last: &Mutex<String>, what: &dyn Debug) {
    if let Ok(mut last) = last.lock() {
        *last = format!("{what:?}");
    }
}

pub(super) async fn observed(
    backend: &KubernetesBackend,
    uid: AppUid,
    what: &str,
    is: impl Fn(&Observed) -> bool + Sync,
) -> Result<Observed> {
    let last = Mutex::new(String::new());
    let found = eventually(what, || async {
        let seen = backend.observe_one(uid).await?;
        note(&last, &seen);
        Ok(seen.filter(|seen| is(seen)))
    })
    .await;
    found.with_context(|| format!("last seen: {last:?}"))
}

pub(super) async fn ready(backend: &KubernetesBackend, uid: AppUid) -> Result<Observed> {
    observed(backend, uid, "the app is ready", |seen| {
        seen.phase == Phase::Ready
    })
    .await
}

pub(super) async fn delete(backend: &KubernetesBackend, workload: &Workload) -> Result<()> {
    let last = Mutex::new(String::new());
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

pub(super) fn refused<T: Debug>(
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

pub(super) fn deployment(name: &str, replicas: i64, image: &str, cpu: &str) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": {
        "replicas": replicas, "selector": {"matchLabels": {"app": name}},
        "template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [
            {"name": "main", "image": image, "ports": [{"containerPort": 80}],
                "resources": {"requests": {"cpu": cpu, "memory": "16Mi"}}}]}}}})
}

pub(super) fn config_map(name: &str, value: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"key": value}})
}

pub(super) fn definition(plural: &str, kind: &str) -> Value {
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": format!("{plural}.contract.example.org")}, "spec": {
            "group": "contract.example.org", "scope": "Namespaced",
            "names": {"plural": plural, "singular": kind.to_lowercase(), "kind": kind},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {
                "type": "object", "properties": {"spec": {"type": "object", "properties": {"size": {"type": "integer"}}}}}}}]}})
}

pub(super) fn custom(kind: &str, name: &str) -> Value {
    json!({"apiVersion": "contract.example.org/v1", "kind": kind, "metadata": {"name": name}, "spec": {"size": 3}})
}
