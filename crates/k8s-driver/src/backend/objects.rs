//! Single objects at the cluster: whose they are, applied, removed.

use std::collections::BTreeMap;

use krake_driver::{BackendError, Code, Workload};
use krake_model::AppUid;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::{Value, json};

use super::{Inner, MANAGER};
use crate::cluster::{CALL_TIME, call, call_unless, status_code};
use crate::ledger::{APP_ANNOTATION, ObjectRef, UID_LABEL};

/// The kind that brings kinds.
pub(super) const DEFINITION: &str = "CustomResourceDefinition";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fingerprint {
    generation: Option<i64>,
    version: u64,
}

impl Fingerprint {
    /// Whether `other` is a later version of the object; where there are generations, a later one.
    pub(super) const fn is_before(&self, other: &Self) -> bool {
        match (self.generation, other.generation) {
            (Some(own), Some(other)) => own < other,
            _ => self.version < other.version,
        }
    }
}

pub(super) fn fingerprint(object: &Value) -> Fingerprint {
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

impl Inner {
    /// Refuses to touch what belongs to somebody else.
    pub(super) async fn check_owner(
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

    pub(super) fn admit_kind(
        &self,
        object: &ObjectRef,
        namespaced: bool,
    ) -> Result<(), BackendError> {
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

    pub(super) async fn apply_one(
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
    pub(super) async fn remove_one(
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
}

pub(super) fn taken(object: &ObjectRef, other: &str) -> BackendError {
    BackendError::new(
        Code::Conflict,
        format!("{object} belongs to application {other}; rename one of the two"),
    )
}

pub(super) fn reference(manifest: &Value) -> Result<ObjectRef, BackendError> {
    ObjectRef::of(manifest).ok_or_else(|| {
        BackendError::new(
            Code::Invalid,
            "a manifest has no apiVersion, kind or metadata.name",
        )
    })
}

/// Whether a definition in the same app brings this object's kind, and if so, whether its objects
/// are in namespaces.
pub(super) fn brought(workload: &Workload, object: &ObjectRef) -> Option<bool> {
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
pub(super) fn waves(components: &[Value]) -> Vec<Vec<&Value>> {
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
