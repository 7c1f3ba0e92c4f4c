//! What the API checks before it writes, beyond schemas.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use krake_kube_api::{Admission, ApiError, Cause, Hold, Kind};
use krake_model::{ApplicationSpec, MetricDefinition};
use krake_placement::spec::{Defaults, validate};
use serde_json::{Value, json};

use crate::config::check::is_dns_label;
use crate::kinds::{FINALIZER, FORCED, MEMBER_FINALIZER};

/// An application has at most this many bytes (DESIGN 13.2).
const APPLICATION_BYTES_MAX: usize = 512 * 1024;

/// The checks of one federation.
#[derive(Clone)]
pub struct KrakeAdmission {
    /// Its metrics.
    pub definitions: BTreeMap<String, MetricDefinition>,
    /// This node's defaults.
    pub defaults: Defaults,
    /// Whether somebody is left to carry on without the site of this name.
    pub may_leave: Arc<dyn Fn(&str) -> bool + Send + Sync>,
}

impl std::fmt::Debug for KrakeAdmission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KrakeAdmission").finish_non_exhaustive()
    }
}

impl KrakeAdmission {
    fn application(&self, object: &mut Value, old: Option<&Value>) -> Result<(), ApiError> {
        let text = |pointer: &str| {
            object
                .pointer(pointer)
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned()
        };
        let (namespace, name) = (text("/metadata/namespace"), text("/metadata/name"));
        let mut causes = Vec::new();
        for (field, value) in [("metadata.name", &name), ("metadata.namespace", &namespace)] {
            if !is_dns_label(value) {
                // kubectl prints this to a terminal as it is.
                causes.push(Cause::new(field.to_owned(), format!(
                    "`{}` must be 1 to 63 lower-case letters, digits and `-`, with a letter or digit at both ends",
                    value.escape_debug()
                )));
            }
        }
        let bytes = object.to_string().len();
        if bytes > APPLICATION_BYTES_MAX {
            causes.push(Cause::new("spec", format!(
                "the application has {bytes} bytes with its annotations, the limit is {APPLICATION_BYTES_MAX}; split it (plain kubectl apply keeps a second copy as an annotation, kubectl apply --server-side does not)"
            )));
        }
        let spec = object.get("spec").cloned().unwrap_or_default();
        match serde_json::from_value::<ApplicationSpec>(spec) {
            Err(error) => causes.push(Cause::new("spec".to_owned(), error.to_string())),
            Ok(spec) => {
                if let Err(errors) = validate(&spec, &namespace, &self.definitions, &self.defaults)
                {
                    causes.extend(
                        errors
                            .into_iter()
                            .map(|error| Cause::new(error.path, error.message)),
                    );
                }
            }
        }
        if !causes.is_empty() {
            return Err(ApiError::invalid("krake.dev", "Application", &name, causes));
        }
        let deleting = old.is_some_and(|old| old.pointer("/metadata/deletionTimestamp").is_some());
        let finalizers = object.pointer("/metadata/finalizers").cloned();
        let mut list: Vec<Value> = finalizers
            .as_ref()
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        if !list.iter().any(|f| f == FINALIZER) {
            if deleting {
                return Err(ApiError::forbidden(format!(
                    "the finalizer {FINALIZER} is removed by the federation when no site holds a copy any more"
                )));
            }
            list.push(FINALIZER.into());
            object["metadata"]["finalizers"] = list.into();
        }
        Ok(())
    }
}

/// Only what an operator decides may change in a site.
fn site(object: &mut Value, old: Option<&Value>) -> Result<(), ApiError> {
    let Some(old) = old else {
        return Err(ApiError::method_not_allowed(
            "sites are made by joining: krakectl token create, then krake-node join",
        ));
    };
    let strip = |object: &Value| {
        let mut spec = object.get("spec").cloned().unwrap_or_else(|| json!({}));
        if let Some(spec) = spec.as_object_mut() {
            spec.remove("cordoned");
        }
        spec
    };
    if strip(object) != strip(old) {
        return Err(ApiError::forbidden(
            "only spec.cordoned of a site can be changed here; the rest comes from its node's configuration",
        ));
    }
    let holds = |object: &Value| {
        let finalizers = object.pointer("/metadata/finalizers");
        let mut finalizers = finalizers.and_then(Value::as_array).into_iter().flatten();
        finalizers.any(|name| name == MEMBER_FINALIZER)
    };
    if !holds(old) || holds(object) {
        return Ok(());
    }
    if old.pointer("/metadata/deletionTimestamp").is_some() {
        return Err(ApiError::forbidden(format!(
            "the finalizer {MEMBER_FINALIZER} is removed by the federation when its node is no member any more"
        )));
    }
    let list = object["metadata"]["finalizers"].as_array().cloned();
    let mut list = list.unwrap_or_default();
    list.push(MEMBER_FINALIZER.into());
    object["metadata"]["finalizers"] = list.into();
    Ok(())
}

#[async_trait]
impl Admission for KrakeAdmission {
    async fn admit(
        &self,
        kind: &Kind,
        old: Option<&Value>,
        object: &mut Value,
        subresource: &str,
        _dry_run: bool,
    ) -> Result<(), ApiError> {
        if subresource == "status" {
            return Err(ApiError::forbidden(
                "the status is written by the federation only",
            ));
        }
        match kind.plural.as_str() {
            "applications" => self.application(object, old),
            "sites" => {
                site(object, old)?;
                // It is the newest report and not kept with the rest: what a client sends back of
                // it is no change.
                if let (Some(status), Some(map)) = (
                    old.and_then(|old| old.get("status")),
                    object.as_object_mut(),
                ) {
                    map.insert("status".to_owned(), status.clone());
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn admit_delete(&self, kind: &Kind, object: &Value) -> Result<(), ApiError> {
        if kind.plural != "sites" {
            return Ok(());
        }
        let name = object.pointer("/metadata/name").and_then(Value::as_str);
        if !(self.may_leave)(name.unwrap_or_default()) {
            return Err(ApiError::forbidden(
                "the last site cannot leave: the federation would be lost with it. Stop its node and remove its data directory, or let another site join first",
            ));
        }
        Ok(())
    }

    fn hold(&self, kind: &Kind, _object: &Value, options: &Value) -> Result<Hold, ApiError> {
        let forced = options.get("gracePeriodSeconds").and_then(Value::as_i64) == Some(0);
        let mut hold = Hold::default();
        if kind.plural == "sites" {
            // Those that joined with an older version do not have it.
            hold.finalizers.push(MEMBER_FINALIZER.to_owned());
            if forced {
                hold.annotations
                    .push((FORCED.to_owned(), "true".to_owned()));
            }
        }
        Ok(hold)
    }
}
