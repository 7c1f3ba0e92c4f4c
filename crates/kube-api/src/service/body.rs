//! What a request's body says: JSON or YAML, within bounds.

use axum::body::Body;
use http::{HeaderMap, header};
use serde_json::{Value, json};

use super::query::{Query, not_supported, refuse_options};
use crate::error::ApiError;

/// A body has at most this many bytes (3 MiB, as in Kubernetes).
pub const BODY_BYTES_MAX: usize = 3 * 1024 * 1024;

pub(super) fn media_type(headers: &HeaderMap) -> String {
    headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("application/json")
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase()
}

/// `DeleteOptions` of the body, completed by those of the query: a dry run that is asked for there
/// must never delete.
pub(super) async fn delete_options(
    headers: &HeaderMap,
    query: &Query,
    body: Body,
) -> Result<Value, ApiError> {
    let mut options = match parse_body(headers, body).await? {
        Value::Null => json!({}),
        options @ Value::Object(_) => options,
        _ => return Err(ApiError::bad_request("DeleteOptions are an object")),
    };
    for field in ["propagationPolicy", "gracePeriodSeconds"] {
        if let (None, Some(text)) = (options.get(field), query.get(field)) {
            options[field] = text
                .parse::<i64>()
                .map_or_else(|_| text.into(), Value::from);
        }
    }
    if let (None, Some(text)) = (options.get("dryRun"), query.get("dryRun")) {
        options["dryRun"] = json!([text]);
    }
    let mut causes = Vec::new();
    let policies = ["Background", "Foreground", "Orphan"];
    let policy = options.get("propagationPolicy").and_then(Value::as_str);
    if policy.is_some_and(|policy| !policies.contains(&policy)) {
        causes.push(not_supported("propagationPolicy", &policies.join(", ")));
    }
    let runs = options.get("dryRun").and_then(Value::as_array);
    if runs.is_some_and(|runs| runs.iter().any(|run| run != "All")) {
        causes.push(not_supported("dryRun", "All"));
    }
    refuse_options("DeleteOptions", causes)?;
    Ok(options)
}

/// Reads a body of JSON or YAML within its limit; an empty one is null.
pub(super) async fn parse_body(headers: &HeaderMap, body: Body) -> Result<Value, ApiError> {
    parse(&read_body(headers, body).await?)
}

/// The same of a patch, which is never empty.
pub(super) async fn parse_patch(headers: &HeaderMap, body: Body) -> Result<Value, ApiError> {
    let bytes = read_body(headers, body).await?;
    if bytes.is_empty() {
        return Err(ApiError::bad_request("a patch needs a body"));
    }
    parse(&bytes)
}

async fn read_body(headers: &HeaderMap, body: Body) -> Result<axum::body::Bytes, ApiError> {
    let media = media_type(headers);
    let is_text = media.ends_with("json") || media.ends_with("yaml");
    if !is_text {
        return Err(ApiError::unsupported_media_type(format!(
            "`{media}` is not supported: send JSON or YAML"
        )));
    }
    axum::body::to_bytes(body, BODY_BYTES_MAX)
        .await
        .map_err(|_| {
            ApiError::too_large(format!(
                "the request has more than {BODY_BYTES_MAX} bytes; split it"
            ))
        })
}

/// Reads one JSON or YAML document; depth and aliases are bounded.
///
/// # Errors
/// 400 with the place.
pub fn parse(bytes: &[u8]) -> Result<Value, ApiError> {
    let text = std::str::from_utf8(bytes)
        .map_err(|error| ApiError::bad_request(format!("the body is not UTF-8: {error}")))?;
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    let value = if text.trim_start().starts_with(['{', '[']) {
        crate::json::parse(text)
            .map_err(|error| ApiError::bad_request(format!("the body is not JSON: {error}")))
    } else {
        yaml(text)
    };
    let mut value = value?;
    whole_numbers(&mut value);
    Ok(value)
}

fn yaml(text: &str) -> Result<Value, ApiError> {
    serde_saphyr::from_str(text).map_err(|error| {
        let mut inner = error.without_snippet();
        while let serde_saphyr::Error::AliasError { error, .. } = inner {
            inner = error.without_snippet();
        }
        let text = match (inner, error.location()) {
            (serde_saphyr::Error::MultipleDocuments { .. }, Some(place)) => format!(
                "line {} begins a second document, a request is for one object",
                place.line()
            ),
            (serde_saphyr::Error::DuplicateMappingKey { key, .. }, Some(place)) => format!(
                "line {} column {} repeats the key `{}`",
                place.line(),
                place.column(),
                key.as_deref().unwrap_or_default()
            ),
            (serde_saphyr::Error::Budget { .. }, Some(place)) => format!(
                "line {} column {} is nested too deeply, or is too much with its aliases expanded",
                place.line(),
                place.column()
            ),
            _ => error.to_string(),
        };
        ApiError::bad_request(format!("the body is not YAML: {text}"))
    })
}

/// `1.0` is kept as `1`, as in Kubernetes: who writes the one for the other changes nothing.
fn whole_numbers(value: &mut Value) {
    /// Up to here every whole number is a float of its own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) if number.is_f64() => {
            let float = number.as_f64().unwrap_or_default();
            if float.fract() == 0.0 && float.abs() < EXACT {
                *value = (float as i64).into();
            }
        }
        Value::Array(items) => items.iter_mut().for_each(whole_numbers),
        Value::Object(map) => map.values_mut().for_each(whole_numbers),
        _ => {}
    }
}
