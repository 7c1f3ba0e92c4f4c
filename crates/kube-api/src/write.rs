//! Creating, changing and deleting objects.

mod checks;
mod delete;
mod patch;

use std::sync::Arc;

use serde_json::{Map, Value, json};

use self::checks::{
    check_fields, check_type, check_types, drop_nulls, fill_defaults, malformed_patch,
    name_in_place, patched_type, validate,
};
pub(crate) use self::delete::delete;
pub use self::delete::{finalizers, marked};
use self::patch::patched;
use crate::error::{ApiError, Cause};
use crate::kinds::Kind;
use crate::managed::{self, Writer};
use crate::metadata::{self as object_metadata, Empty};
use crate::service::query::Query;
use crate::service::{Service, Target};
use crate::store::{Freshness, revision_of};
use crate::table;

/// A change that meets a newer object is computed anew this often.
const RETRIES: usize = 8;

/// How an object is to change.
pub(crate) enum Change {
    Replace(Value),
    Merge(Value),
    Strategic(Value),
    Json(Value),
    Apply(Value),
}

/// A change that was made.
pub(crate) struct Done {
    pub(crate) object: Arc<Value>,
    pub(crate) created: bool,
    /// The store took it, so what it was made from was the newest.
    written: bool,
    pub(crate) warnings: Vec<Cause>,
}

fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    if !object.get("metadata").is_some_and(Value::is_object) {
        object["metadata"] = json!({});
    }
    match &mut object["metadata"] {
        Value::Object(map) => map,
        _ => unreachable!("just set to an object"),
    }
}

fn text<'a>(object: &'a Value, pointer: &str) -> Option<&'a str> {
    object.pointer(pointer).and_then(Value::as_str)
}

fn now() -> String {
    table::whole_seconds(jiff::Timestamp::now())
}

pub(crate) async fn create(
    service: &Service,
    target: &Target,
    query: &Query,
    mut object: Value,
    writer: &Writer,
) -> Result<(Arc<Value>, Vec<Cause>), ApiError> {
    let generated = text(&object, "/metadata/generateName").map(ToOwned::to_owned);
    if text(&object, "/metadata/name").is_none()
        && let Some(prefix) = generated
    {
        let name = object_metadata::generate_name(&prefix);
        metadata(&mut object).insert("name".to_owned(), name.into());
    }
    check_type(&target.kind, &object)?;
    drop_nulls(&target.kind, &mut object);
    let (mut object, warnings) = prepare_new(service, target, query, object).await?;
    managed::record_update(target.kind.schema.as_ref(), None, &mut object, writer);
    if query.dry_run() {
        let name = text(&object, "/metadata/name").unwrap_or_default();
        let namespace = target.namespace.as_deref();
        let found = service
            .store
            .get(&target.kind, namespace, name, Freshness::Latest)
            .await;
        return match found {
            Ok(_) => Err(ApiError::already_exists(
                &target.kind.group,
                &target.kind.plural,
                name,
            )),
            Err(error) if error.code == 404 => Ok((Arc::new(object), warnings)),
            Err(error) => Err(error),
        };
    }
    Ok((service.store.create(&target.kind, object).await?, warnings))
}

async fn prepare_new(
    service: &Service,
    target: &Target,
    query: &Query,
    mut object: Value,
) -> Result<(Value, Vec<Cause>), ApiError> {
    let kind = &target.kind;
    let warnings = check_fields(service, query, kind, &mut object, Empty::Dropped)?;
    fill_defaults(kind, &mut object);
    name_in_place(target, &mut object)?;
    if kind.status
        && let Some(map) = object.as_object_mut()
    {
        map.remove("status");
    }
    let map = metadata(&mut object);
    for field in [
        "managedFields",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "selfLink",
    ] {
        map.remove(field);
    }
    map.insert("uid".to_owned(), uuid::Uuid::new_v4().to_string().into());
    map.insert("creationTimestamp".to_owned(), now().into());
    map.insert("generation".to_owned(), 1.into());
    validate(kind, &object, Vec::new())?;
    if text(&object, "/metadata/resourceVersion").is_some_and(|rv| !rv.is_empty()) {
        return Err(ApiError::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    service
        .admission
        .admit(kind, None, &mut object, "", query.dry_run())
        .await?;
    Ok((object, warnings))
}

/// Checks what was sent, before anything is looked up: with what it does not know.
fn prepare(
    service: &Service,
    target: &Target,
    query: &Query,
    change: Change,
) -> Result<(Change, Vec<Cause>), ApiError> {
    let kind = &target.kind;
    match change {
        Change::Replace(mut object) => {
            check_type(kind, &object)?;
            let warnings = check_fields(service, query, kind, &mut object, Empty::Dropped)?;
            drop_nulls(kind, &mut object);
            name_in_place(target, &mut object)?;
            Ok((Change::Replace(object), warnings))
        }
        Change::Apply(mut object) => {
            // Nothing can be made of it, so that it is no object that is invalid.
            check_type(kind, &object).map_err(|error| ApiError::bad_request(error.message))?;
            if object.pointer("/metadata/managedFields").is_some() {
                return Err(ApiError::bad_request("metadata.managedFields must be nil"));
            }
            let warnings = check_fields(service, query, kind, &mut object, Empty::Kept)?;
            // Its name is that of what comes of it, and is checked then.
            check_types(kind, &object)?;
            keep_own_part(kind, &target.subresource, &mut object);
            Ok((Change::Apply(object), warnings))
        }
        other => Ok((other, Vec::new())),
    }
}

pub(crate) async fn change(
    service: &Service,
    target: &Target,
    query: &Query,
    change: Change,
    writer: &Writer,
) -> Result<Done, ApiError> {
    let name = target.name.as_deref().unwrap_or_default();
    // A write is a compare-and-swap, so what it starts from need not be confirmed to be the
    // newest: the store says so by taking it. Whatever else comes of it is done again on what is.
    let mut freshness = if query.dry_run() {
        Freshness::Latest
    } else {
        Freshness::Any
    };
    let is_apply = matches!(change, Change::Apply(_));
    if is_apply && !target.subresource.is_empty() {
        // An apply makes objects, but not their status.
        let namespace = target.namespace.as_deref();
        service
            .store
            .get(&target.kind, namespace, name, Freshness::Latest)
            .await?;
    }
    let (change, warnings) = match prepare(service, target, query, change) {
        Ok(prepared) => prepared,
        Err(error) => {
            if error.code == 422 && !is_apply {
                // An object is invalid only when there is one.
                let namespace = target.namespace.as_deref();
                service
                    .store
                    .get(&target.kind, namespace, name, Freshness::Latest)
                    .await?;
            }
            return Err(error);
        }
    };
    for attempt in 0.. {
        let namespace = target.namespace.as_deref();
        let found = service
            .store
            .get(&target.kind, namespace, name, freshness)
            .await;
        let result = match found {
            Ok(old) => update(service, target, query, &change, writer, &old).await,
            Err(error) if error.code == 404 => {
                if let Change::Apply(object) = &change
                    && target.subresource.is_empty()
                {
                    apply_new(service, target, query, object, writer).await
                } else {
                    Err(error)
                }
            }
            Err(error) => Err(error),
        };
        if freshness == Freshness::Any {
            freshness = Freshness::Latest;
            let settled = match &result {
                Ok(done) => done.written,
                // It may have been written or not: that is for the client to find out.
                Err(error) => error.code >= 500,
            };
            if !settled {
                continue;
            }
        }
        let pinned = match &change {
            Change::Replace(object)
            | Change::Merge(object)
            | Change::Strategic(object)
            | Change::Apply(object) => {
                text(object, "/metadata/resourceVersion").is_some_and(|rv| !rv.is_empty())
            }
            Change::Json(_) => false,
        };
        match result {
            Err(error)
                if matches!(error.reason, "Conflict" | "AlreadyExists")
                    && error.causes.is_empty()
                    && !pinned
                    && attempt < RETRIES => {}
            other => {
                return other.map(|mut done| {
                    done.warnings.extend(warnings);
                    done
                });
            }
        }
    }
    unreachable!("the loop returns")
}

async fn apply_new(
    service: &Service,
    target: &Target,
    query: &Query,
    object: &Value,
    writer: &Writer,
) -> Result<Done, ApiError> {
    if text(object, "/metadata/uid").is_some() {
        // It means an object that was there.
        let name = target.name.as_deref().unwrap_or_default();
        return Err(crate::store::modified(&target.kind, name));
    }
    let mut new = object.clone();
    metadata(&mut new).remove("resourceVersion");
    let (mut prepared, _) = prepare_new(service, target, query, new).await?;
    // Only what the client sent is its own, not what was added on the way.
    let mut owned = managed::apply(target.kind.schema.as_ref(), None, object, writer, true)?;
    if let Some(fields) = metadata(&mut owned).remove("managedFields") {
        metadata(&mut prepared).insert("managedFields".to_owned(), fields);
    }
    let written = !query.dry_run();
    let object = if written {
        service.store.create(&target.kind, prepared).await?
    } else {
        Arc::new(prepared)
    };
    Ok(Done {
        object,
        created: true,
        written,
        warnings: Vec::new(),
    })
}

/// What an apply on the other subresource would set is not owned by this one.
fn keep_own_part(kind: &Kind, subresource: &str, object: &mut Value) {
    if let Some(map) = object.as_object_mut() {
        if subresource == "status" {
            map.retain(|key, _| {
                matches!(key.as_str(), "apiVersion" | "kind" | "metadata" | "status")
            });
            let names = ["name", "namespace", "uid", "resourceVersion"];
            metadata(object).retain(|key, _| names.contains(&key.as_str()));
        } else if kind.status {
            map.remove("status");
        }
    }
}

/// What names an object and what the server counts stays as it was.
fn restore_identity(mut object: Value, old: &Value) -> Value {
    let map = metadata(&mut object);
    for field in [
        "uid",
        "creationTimestamp",
        "generation",
        "resourceVersion",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "name",
        "namespace",
        "selfLink",
    ] {
        match old.pointer(&format!("/metadata/{field}")) {
            Some(value) => map.insert(field.to_owned(), value.clone()),
            None => map.remove(field),
        };
    }
    object
}

async fn update(
    service: &Service,
    target: &Target,
    query: &Query,
    change: &Change,
    writer: &Writer,
    old: &Arc<Value>,
) -> Result<Done, ApiError> {
    let kind = &target.kind;
    let mut change_warnings = Vec::new();
    let mut object = patched(kind.schema.as_ref(), change, old, writer, query)?;
    check_type(kind, &object).map_err(|error| match change {
        Change::Merge(_) | Change::Json(_) | Change::Strategic(_) => {
            patched_type(kind, &object).unwrap_or_else(|| malformed_patch(error))
        }
        Change::Replace(_) | Change::Apply(_) => error,
    })?;
    match change {
        Change::Replace(_) => {}
        // What was applied is checked; what came of it may have something empty.
        Change::Apply(_) => {
            object_metadata::clean(&mut object, "", Empty::Dropped)?;
        }
        Change::Merge(_) | Change::Json(_) | Change::Strategic(_) => {
            change_warnings = check_fields(service, query, kind, &mut object, Empty::Dropped)
                .map_err(malformed_patch)?;
            drop_nulls(kind, &mut object);
        }
    }
    // After the patch: what an apply leaves out keeps its value, and nobody owns a default.
    fill_defaults(kind, &mut object);
    name_in_place(target, &mut object)?;
    let expected = revision_of(old);
    if let Some(uid) = text(&object, "/metadata/uid").filter(|uid| !uid.is_empty())
        && Some(uid) != text(old, "/metadata/uid")
        && matches!(change, Change::Replace(_))
    {
        let name = target.name.as_deref().unwrap_or_default();
        let message = format!(
            "Precondition failed: UID in precondition: {uid}, UID in object meta: {}",
            text(old, "/metadata/uid").unwrap_or_default()
        );
        return Err(ApiError::conflict(message).about(&kind.group, &kind.plural, name));
    }
    let given = text(&object, "/metadata/resourceVersion").unwrap_or_default();
    if given.is_empty() && kind.is_custom() {
        let cause = Cause::new(
            "metadata.resourceVersion".to_owned(),
            "must be specified for an update".to_owned(),
        );
        let name = target.name.as_deref().unwrap_or_default();
        return Err(ApiError::invalid(
            &kind.group,
            &kind.plural,
            name,
            vec![cause],
        ));
    }
    if !given.is_empty() && given != expected.to_string() {
        return Err(crate::store::modified(
            kind,
            target.name.as_deref().unwrap_or_default(),
        ));
    }
    let changes = if target.subresource.is_empty() {
        object_metadata::check_change(old, &object)
    } else {
        Vec::new()
    };
    object = restore_identity(object, old);
    separate_status(kind, &target.subresource, old, &mut object);
    if !matches!(change, Change::Apply(_)) {
        let given = object.pointer("/metadata/managedFields").cloned();
        let entries = match given {
            // Nobody owns anything any more.
            Some(given) if given == json!([{}]) => None,
            Some(given) if target.subresource.is_empty() => Some(given),
            _ => old.pointer("/metadata/managedFields").cloned(),
        };
        match entries {
            Some(entries) => metadata(&mut object).insert("managedFields".to_owned(), entries),
            None => metadata(&mut object).remove("managedFields"),
        };
    }
    validate(kind, &object, changes)?;
    service
        .admission
        .admit(
            kind,
            Some(old),
            &mut object,
            &target.subresource,
            query.dry_run(),
        )
        .await?;
    if content(kind, &object) != content(kind, old) {
        let generation = old
            .pointer("/metadata/generation")
            .and_then(Value::as_i64)
            .unwrap_or(1);
        metadata(&mut object).insert("generation".to_owned(), (generation + 1).into());
    }
    if !matches!(change, Change::Apply(_)) {
        managed::record_update(kind.schema.as_ref(), Some(old), &mut object, writer);
    }
    finish(service, target, query, old, object, change_warnings).await
}

async fn finish(
    service: &Service,
    target: &Target,
    query: &Query,
    old: &Arc<Value>,
    object: Value,
    warnings: Vec<Cause>,
) -> Result<Done, ApiError> {
    let done = |object: Arc<Value>, written| Done {
        object,
        created: false,
        written,
        warnings: warnings.clone(),
    };
    // That somebody wrote the same again is no change.
    if managed::without_times(&object) == managed::without_times(old) {
        return Ok(done(Arc::clone(old), false));
    }
    if query.dry_run() {
        return Ok(done(Arc::new(object), false));
    }
    let expected = revision_of(old);
    let deleting = text(&object, "/metadata/deletionTimestamp").is_some();
    let grace = object.pointer("/metadata/deletionGracePeriodSeconds");
    let graceful = grace.and_then(Value::as_u64).unwrap_or(0) > 0;
    if deleting && !graceful && finalizers(&object).is_empty() {
        let name = target.name.as_deref().unwrap_or_default();
        service
            .store
            .remove(&target.kind, target.namespace.as_deref(), name, expected)
            .await?;
        return Ok(done(Arc::new(object), true));
    }
    let object = service.store.update(&target.kind, object, expected).await?;
    Ok(done(object, true))
}

/// A write to the object leaves its status alone, and a write to the status everything else.
fn separate_status(kind: &Kind, subresource: &str, old: &Value, object: &mut Value) {
    if subresource == "status" {
        let status = object
            .get("status")
            .filter(|status| !status.is_null())
            .cloned();
        let entries = object.pointer("/metadata/managedFields").cloned();
        *object = old.clone();
        if let Some(entries) = entries {
            metadata(object).insert("managedFields".to_owned(), entries);
        }
        set_or_remove(object, "status", status);
    } else if kind.status {
        set_or_remove(object, "status", old.get("status").cloned());
    }
}

fn set_or_remove(object: &mut Value, key: &str, value: Option<Value>) {
    if let Some(map) = object.as_object_mut() {
        match value {
            Some(value) => map.insert(key.to_owned(), value),
            None => map.remove(key),
        };
    }
}

/// What makes a new generation: everything but metadata, and a status that is written apart.
fn content(kind: &Kind, object: &Value) -> Value {
    let mut content = object.clone();
    if let Some(map) = content.as_object_mut() {
        map.remove("metadata");
        if kind.status {
            map.remove("status");
        }
    }
    content
}
