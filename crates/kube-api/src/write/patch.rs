//! What a change makes of an object.

use serde_json::Value;

use super::Change;
use crate::error::ApiError;
use crate::managed::{self, Writer};
use crate::service::query::Query;
use crate::strategic;

/// Operations of one JSON patch.
const JSON_PATCH_MAX: usize = 10_000;

pub(super) fn patched(
    schema: Option<&Value>,
    change: &Change,
    old: &Value,
    writer: &Writer,
    query: &Query,
) -> Result<Value, ApiError> {
    match change {
        Change::Replace(object) => Ok(object.clone()),
        Change::Merge(patch) => {
            if !patch.is_object() {
                return Err(ApiError::bad_request("a merge patch is an object"));
            }
            let mut object = old.clone();
            json_patch::merge(&mut object, patch);
            Ok(object)
        }
        Change::Strategic(patch) => {
            let mut object = old.clone();
            strategic::merge(schema, &mut object, patch)?;
            Ok(object)
        }
        Change::Json(patch) => {
            if patch.is_null() {
                return Ok(old.clone());
            }
            if !patch.is_array() {
                return Err(ApiError::bad_request(
                    "a JSON patch is a list of operations",
                ));
            }
            let patch: json_patch::Patch =
                serde_json::from_value(patch.clone()).map_err(|error| {
                    ApiError::new(422, "Invalid", format!("not a JSON patch: {error}"))
                })?;
            if patch.0.len() > JSON_PATCH_MAX {
                return Err(ApiError::too_large(format!(
                    "a JSON patch has at most {JSON_PATCH_MAX} operations"
                )));
            }
            let mut object = old.clone();
            json_patch::patch(&mut object, &patch).map_err(|error| {
                ApiError::new(
                    422,
                    "Invalid",
                    format!("the JSON patch cannot be applied: {error}"),
                )
            })?;
            Ok(object)
        }
        Change::Apply(object) => {
            managed::apply(schema, Some(old), object, writer, query.flag("force"))
        }
    }
}
