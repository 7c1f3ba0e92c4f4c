//! What a request's query asks for.

use std::collections::BTreeMap;

use crate::error::{ApiError, Cause};
use crate::selector::{FieldSelector, LabelSelector};
use crate::store::Freshness;
use crate::table::Include;

/// The name of a field manager has at most this many bytes, as in Kubernetes.
const MANAGER_BYTES_MAX: usize = 128;

/// The query, decoded.
#[derive(Debug, Default, Clone)]
pub(crate) struct Query(BTreeMap<String, String>);

impl Query {
    pub(super) fn parse(query: Option<&str>) -> Result<Self, ApiError> {
        let pairs: Vec<(String, String)> = serde_urlencoded::from_str(query.unwrap_or_default())
            .map_err(|error| {
                ApiError::bad_request(format!("the query is not readable: {error}"))
            })?;
        Ok(Self(pairs.into_iter().collect()))
    }

    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        self.0
            .get(key)
            .map(String::as_str)
            .filter(|v| !v.is_empty())
    }

    pub(crate) fn flag(&self, key: &str) -> bool {
        matches!(
            self.0.get(key).map(String::as_str),
            Some("true" | "1" | "True")
        )
    }

    pub(crate) fn dry_run(&self) -> bool {
        self.get("dryRun").is_some()
    }

    /// Checks the options of a write, which are `CreateOptions`, `UpdateOptions` or `PatchOptions`.
    pub(super) fn check_options(&self, name: &str, is_apply: bool) -> Result<(), ApiError> {
        let mut causes = Vec::new();
        if self.get("dryRun").is_some_and(|value| value != "All") {
            causes.push(not_supported("dryRun", "All"));
        }
        let allowed = ["Ignore", "Strict", "Warn"];
        if self
            .get("fieldValidation")
            .is_some_and(|value| !allowed.contains(&value))
        {
            causes.push(not_supported("fieldValidation", &allowed.join(", ")));
        }
        let manager = self.get("fieldManager");
        if manager.is_some_and(|manager| manager.len() > MANAGER_BYTES_MAX) {
            let message = format!("has more than {MANAGER_BYTES_MAX} bytes");
            causes.push(Cause::new("fieldManager", message).because("FieldValueTooLong"));
        }
        if is_apply && manager.is_none() {
            causes.push(
                Cause::new(
                    "fieldManager",
                    "Required value: is required for apply patch",
                )
                .because("FieldValueRequired"),
            );
        }
        if name == "PatchOptions" && !is_apply && self.get("force").is_some() {
            let message = "may not be specified for a patch that is no apply";
            causes.push(Cause::new("force", message).because("FieldValueForbidden"));
        }
        refuse_options(name, causes)
    }

    pub(super) fn freshness(&self) -> Result<Freshness, ApiError> {
        match self.get("resourceVersion") {
            None => Ok(Freshness::Latest),
            Some("0") => Ok(Freshness::Any),
            Some(text) => Ok(Freshness::AtLeast(number(text)?)),
        }
    }
}

pub(super) fn not_supported(field: &str, supported: &str) -> Cause {
    Cause::new(
        field,
        format!("Unsupported value: supported values: {supported}"),
    )
    .because("FieldValueNotSupported")
}

pub(super) fn refuse_options(name: &str, causes: Vec<Cause>) -> Result<(), ApiError> {
    if causes.is_empty() {
        Ok(())
    } else {
        Err(ApiError::invalid("meta.k8s.io", name, "", causes))
    }
}

pub(super) fn number(text: &str) -> Result<u64, ApiError> {
    text.parse().map_err(|_| {
        ApiError::bad_request(format!("invalid resourceVersion `{text}`: not a number"))
    })
}

/// Whether a query asks for a watch, whose answer does not end by itself.
pub fn is_watch(query: Option<&str>) -> bool {
    Query::parse(query).is_ok_and(|query| query.flag("watch"))
}

pub(super) fn selectors(query: &Query) -> Result<(LabelSelector, FieldSelector), ApiError> {
    Ok((
        LabelSelector::parse(query.get("labelSelector").unwrap_or_default())?,
        FieldSelector::parse(query.get("fieldSelector").unwrap_or_default())?,
    ))
}

pub(super) fn include(query: &Query) -> Result<Include, ApiError> {
    match query.get("includeObject") {
        Some("None") => Ok(Include::None),
        Some("Object") => Ok(Include::Object),
        None | Some("Metadata") => Ok(Include::Metadata),
        Some(other) => Err(ApiError::bad_request(format!(
            "includeObject={other} is not None, Metadata or Object"
        ))),
    }
}
