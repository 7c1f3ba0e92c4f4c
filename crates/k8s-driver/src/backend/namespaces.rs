//! The namespaces at the site: made for apps, and removed when they are without one.

use std::time::{Duration, Instant};

use krake_driver::{BackendError, Code};
use krake_model::AppKey;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde_json::json;
use tracing::info;

use super::{Inner, MANAGER};
use crate::cluster::call;
use crate::ledger::NAMESPACE_LABEL;

/// A namespace of ours that has been without an app for this long is removed. Kubernetes takes
/// seconds to remove one, and an app that comes meanwhile has to wait.
const NAMESPACE_GRACE: Duration = Duration::from_secs(10);

impl Inner {
    pub(super) fn namespace_for(&self, app: &AppKey) -> String {
        self.config
            .namespace_template
            .replace("{namespace}", &app.namespace)
    }

    pub(super) async fn ensure_namespace(
        &self,
        name: &str,
        app: &AppKey,
    ) -> Result<(), BackendError> {
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

    /// Removes those that have been without an app for [`NAMESPACE_GRACE`].
    pub(super) async fn remove_empty_namespaces(&self) -> Result<(), BackendError> {
        let (resource, _) = self.cluster.resource("v1", "Namespace").await?;
        let api = self.api(&resource, None);
        let params = ListParams::default().labels(NAMESPACE_LABEL);
        let list = call("reading the namespaces", api.list(&params)).await?;
        for namespace in list.items {
            let Some(name) = namespace.metadata.name.clone() else {
                continue;
            };
            let used = self
                .known
                .lock()
                .values()
                .any(|known| known.ledger.namespace == name);
            {
                let mut empty_since = self.empty_since.lock();
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
            self.namespaces.lock().remove(&name);
            call(
                &format!("removing namespace `{name}`"),
                api.delete(&name, &DeleteParams::background()),
            )
            .await?;
            info!(name, "an empty namespace was removed");
        }
        Ok(())
    }
}
