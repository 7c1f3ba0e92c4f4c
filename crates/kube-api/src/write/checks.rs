//! What is wrong with an object that is to be written.

use serde_json::Value;

use super::{metadata, text};
use crate::error::{ApiError, Cause};
use crate::kinds::Kind;
use crate::metadata::{self as object_metadata, Empty};
use crate::schema;
use crate::service::query::Query;
use crate::service::{FieldValidation, Service, Target};

/// So many wrong places are told; an object full of nonsense is not answered with megabytes.
const CAUSES_MAX: usize = 20;

pub(super) fn check_type(kind: &Kind, object: &Value) -> Result<(), ApiError> {
    if !object.is_object() {
        return Err(ApiError::bad_request("the body is not an object"));
    }
    for (field, wanted) in [
        ("apiVersion", kind.api_version()),
        ("kind", kind.kind.clone()),
    ] {
        let found = object.get(field).and_then(Value::as_str);
        if found.is_none_or(str::is_empty) && kind.is_custom() {
            return Err(ApiError::bad_request(format!(
                "the body has no {field}: write `{field}: {wanted}`"
            )));
        }
        if found.is_some_and(|found| found != wanted) && field == "kind" && kind.is_custom() {
            let other = found.unwrap_or_default();
            let name = text(object, "/metadata/name").unwrap_or_default();
            let cause = Cause::new("kind", format!("must be {wanted}"));
            return Err(ApiError::invalid(&kind.group, other, name, vec![cause]));
        }
        if found.is_some_and(|found| found != wanted) {
            return Err(ApiError::bad_request(format!(
                "the body has {field} `{}`, the path is for `{wanted}`",
                found.unwrap_or_default()
            )));
        }
    }
    Ok(())
}

/// Puts name and namespace of the path into the object, which must not say otherwise.
pub(super) fn name_in_place(target: &Target, object: &mut Value) -> Result<(), ApiError> {
    let kind = &target.kind;
    object["apiVersion"] = kind.api_version().into();
    object["kind"] = kind.kind.clone().into();
    let map = metadata(object);
    if let Some(namespace) = &target.namespace {
        let given = map.get("namespace").and_then(Value::as_str);
        if given.is_some_and(|given| given != namespace) {
            return Err(ApiError::bad_request(format!(
                "the namespace of the provided object does not match the namespace sent on the request ({} and {namespace})",
                given.unwrap_or_default()
            )));
        }
        map.insert("namespace".to_owned(), namespace.clone().into());
    } else {
        map.remove("namespace");
    }
    let given = map
        .get("name")
        .and_then(Value::as_str)
        .map(ToOwned::to_owned);
    match (&target.name, given) {
        (Some(name), Some(given)) if *name != given => Err(ApiError::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({name})"
        ))),
        (Some(name), None) if kind.is_custom() => Err(ApiError::bad_request(format!(
            "the object has no name, the one on the URL is {name}"
        ))),
        (Some(name), _) => {
            map.insert("name".to_owned(), name.clone().into());
            Ok(())
        }
        // Whether it has a name at all is checked with all the rest.
        (None, _) => Ok(()),
    }
}

pub(super) fn drop_nulls(kind: &Kind, object: &mut Value) {
    if let Some(schema) = &kind.schema {
        schema::drop_nulls(schema, object);
    }
}

pub(super) fn fill_defaults(kind: &Kind, object: &mut Value) {
    if let Some(schema) = &kind.schema {
        schema::fill_defaults(schema, object);
    }
}

pub(super) fn check_fields(
    service: &Service,
    query: &Query,
    kind: &Kind,
    object: &mut Value,
    empty: Empty,
) -> Result<Vec<Cause>, ApiError> {
    let mode = match query.get("fieldValidation") {
        None => service.field_validation,
        Some("Ignore") => FieldValidation::Ignore,
        Some("Warn") => FieldValidation::Warn,
        // Anything else was refused before.
        Some(_) => FieldValidation::Strict,
    };
    let mut unknown = object_metadata::clean(object, "", empty)?;
    if let Some(wanted) = &kind.schema {
        unknown.extend(schema::clean_embedded(wanted, object, "")?);
        unknown.extend(schema::prune_unknown(wanted, object));
    }
    match mode {
        FieldValidation::Ignore => Ok(Vec::new()),
        FieldValidation::Warn => Ok(unknown),
        FieldValidation::Strict if unknown.is_empty() => Ok(unknown),
        FieldValidation::Strict => {
            let more = unknown.len().saturating_sub(CAUSES_MAX);
            let mut list: Vec<&str> = unknown
                .iter()
                .take(CAUSES_MAX)
                .map(|c| c.message.as_str())
                .collect();
            let more = format!("and {more} more");
            if unknown.len() > CAUSES_MAX {
                list.push(&more);
            }
            let mut error = ApiError::bad_request(format!(
                "{} in version \"{}\" cannot be handled as a {}: strict decoding error: {}",
                kind.kind,
                kind.version,
                kind.kind,
                list.join(", ")
            ));
            error.causes = unknown;
            error.causes.truncate(CAUSES_MAX);
            Err(error)
        }
    }
}

pub(super) fn validate(kind: &Kind, object: &Value, changes: Vec<Cause>) -> Result<(), ApiError> {
    let metadata = object.get("metadata").unwrap_or(&Value::Null);
    let mut causes = object_metadata::check(kind, metadata, "metadata");
    causes.extend(changes);
    if let Some(wanted) = &kind.schema {
        causes.extend(schema::check(wanted, object));
    }
    if causes.is_empty() {
        return Ok(());
    }
    let more = causes.len().saturating_sub(CAUSES_MAX);
    causes.truncate(CAUSES_MAX);
    if more > 0 {
        let message = format!("and {more} more places are wrong");
        causes.push(Cause::new("", message));
    }
    let name = text(object, "/metadata/name").unwrap_or_default();
    Err(ApiError::invalid(&kind.group, &kind.kind, name, causes))
}

/// What is applied must have the types of the schema: merged, a wrong one would be lost.
pub(super) fn check_types(kind: &Kind, object: &Value) -> Result<(), ApiError> {
    let schema = kind.schema.as_ref();
    let causes: Vec<Cause> = schema.map_or_else(Vec::new, |schema| {
        let mut causes = schema::check(schema, object);
        // These merge with anything.
        causes.retain(|cause| {
            let merges = [schema::NOT_NULL, schema::NOT_INT_OR_STRING];
            cause.reason == schema::WRONG_TYPE && !merges.contains(&cause.message.as_str())
        });
        causes
    });
    if causes.is_empty() {
        return Ok(());
    }
    let name = text(object, "/metadata/name").unwrap_or_default();
    Err(ApiError::invalid(&kind.group, &kind.kind, name, causes))
}

/// What is wrong with an object that a patch has moved to another version.
pub(super) fn patched_type(kind: &Kind, object: &Value) -> Option<ApiError> {
    let given = text(object, "/apiVersion").filter(|given| !given.is_empty())?;
    if given == kind.api_version() {
        return None;
    }
    let group = given.rsplit_once('/').map_or("", |(group, _)| group);
    let cause = Cause::new("apiVersion", format!("must be {}", kind.api_version()));
    let word = text(object, "/kind").filter(|word| !word.is_empty())?;
    let name = text(object, "/metadata/name").unwrap_or_default();
    Some(ApiError::invalid(group, word, name, vec![cause]))
}

/// What a patch makes of an object is checked like what is sent, and the patch is what is wrong.
pub(super) fn malformed_patch(error: ApiError) -> ApiError {
    if error.code != 400 {
        return error;
    }
    ApiError {
        causes: vec![Cause::new("patch", error.message.clone())],
        ..ApiError::new(422, "Invalid", error.message)
    }
}
