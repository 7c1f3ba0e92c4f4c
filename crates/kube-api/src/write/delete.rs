//! Deleting objects: at once, or when nothing holds them any more.

use std::sync::Arc;

use serde_json::{Value, json};

use super::{RETRIES, metadata, text};
use crate::error::ApiError;
use crate::service::{Hold, Service, Target};
use crate::store::{Freshness, revision_of};
use crate::table;

/// What holds an object that is being deleted; namespaces have theirs in the specification.
pub fn finalizers(object: &Value) -> Vec<String> {
    ["/metadata/finalizers", "/spec/finalizers"]
        .into_iter()
        .filter(|pointer| {
            *pointer == "/metadata/finalizers"
                || (text(object, "/kind"), text(object, "/apiVersion"))
                    == (Some("Namespace"), Some("v1"))
        })
        .filter_map(|pointer| object.pointer(pointer).and_then(Value::as_array))
        .flatten()
        .filter_map(Value::as_str)
        .map(ToOwned::to_owned)
        .collect()
}

/// Deletes: at once, or when the finalizers are gone. Returns the object and whether it is gone.
pub(crate) async fn delete(
    service: &Service,
    target: &Target,
    options: &Value,
) -> Result<(Arc<Value>, bool), ApiError> {
    let name = target.name.as_deref().unwrap_or_default();
    let kind = &target.kind;
    let namespace = target.namespace.as_deref();
    for _ in 0..RETRIES {
        let old = service
            .store
            .get(kind, namespace, name, Freshness::Latest)
            .await?;
        let wanted = |field: &str| text(options, &format!("/preconditions/{field}"));
        for field in ["uid", "resourceVersion"] {
            let found = text(&old, &format!("/metadata/{field}"));
            if wanted(field).is_some_and(|wanted| Some(wanted) != found) {
                let message = format!(
                    "Precondition failed: {field} is {}",
                    found.unwrap_or_default()
                );
                return Err(ApiError::conflict(message).about(&kind.group, &kind.kind, name));
            }
        }
        service.admission.admit_delete(kind, &old).await?;
        let dry_run = options
            .get("dryRun")
            .and_then(Value::as_array)
            .is_some_and(|l| !l.is_empty());
        let mut hold = service.admission.hold(kind, &old, options)?;
        let dying = text(&old, "/metadata/deletionTimestamp").is_some();
        if dying {
            // It is on its way; asking for more would start it anew.
            hold.finalizers.clear();
            let left = old.pointer("/metadata/deletionGracePeriodSeconds");
            let left = left.and_then(Value::as_u64).unwrap_or(0);
            hold.grace_seconds = hold.grace_seconds.min(left);
        }
        let stays =
            !finalizers(&old).is_empty() || !hold.finalizers.is_empty() || hold.grace_seconds > 0;
        if dry_run {
            let object = if stays {
                Arc::new(marked(&old, &hold, jiff::Timestamp::now()))
            } else {
                old
            };
            return Ok((object, !stays));
        }
        let result = if stays {
            let object = marked(&old, &hold, jiff::Timestamp::now());
            if object == *old {
                return Ok((old, false));
            }
            service
                .store
                .update(kind, object, revision_of(&old))
                .await
                .map(|object| (object, false))
        } else {
            service
                .store
                .remove(kind, namespace, name, revision_of(&old))
                .await
                .map(|()| (old, true))
        };
        match result {
            Err(error) if error.reason == "Conflict" => {}
            other => return other,
        }
    }
    Err(crate::store::modified(kind, name))
}

/// An object marked for deletion.
pub fn marked(old: &Value, hold: &Hold, now: jiff::Timestamp) -> Value {
    let mut object = old.clone();
    let seconds = i64::try_from(hold.grace_seconds).unwrap_or(i64::MAX);
    let until = now.saturating_add(jiff::SignedDuration::from_secs(seconds));
    let map = metadata(&mut object);
    let dying = map.contains_key("deletionTimestamp");
    let grace = map
        .get("deletionGracePeriodSeconds")
        .and_then(Value::as_u64);
    if !dying || grace.unwrap_or(0) > hold.grace_seconds {
        let until = until.unwrap_or(now);
        map.insert(
            "deletionTimestamp".to_owned(),
            table::whole_seconds(until).into(),
        );
        map.insert(
            "deletionGracePeriodSeconds".to_owned(),
            hold.grace_seconds.into(),
        );
    }
    if !hold.finalizers.is_empty() {
        let list = map
            .entry("finalizers".to_owned())
            .or_insert_with(|| json!([]));
        if let Some(list) = list.as_array_mut() {
            for name in &hold.finalizers {
                if !list.iter().any(|own| own == name) {
                    list.push(name.clone().into());
                }
            }
        }
    }
    if !hold.annotations.is_empty() {
        let notes = map
            .entry("annotations".to_owned())
            .or_insert_with(|| json!({}));
        if let Some(notes) = notes.as_object_mut() {
            let own = hold.annotations.iter().cloned();
            notes.extend(own.map(|(key, value)| (key, value.into())));
        }
    }
    if !dying {
        let generation = map.get("generation").and_then(Value::as_i64).unwrap_or(0);
        map.insert("generation".to_owned(), (generation + 1).into());
    }
    object
}
