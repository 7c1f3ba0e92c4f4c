//! The form of requests and answers under `/v1`: JSON or YAML in, JSON or a problem (RFC 9457) out.

use axum::Json;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use krake_kube_api::service::body::{self, BODY_BYTES_MAX};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::consensus;

/// RFC 9457.
pub(super) struct ProblemJson {
    status: StatusCode,
    code: &'static str,
    detail: String,
    errors: Vec<Value>,
}

impl ProblemJson {
    pub(super) fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        Self {
            status,
            code,
            detail: detail.into(),
            errors: Vec::new(),
        }
    }

    /// With what is wrong, one by one.
    pub(super) fn listing(self, errors: Vec<Value>) -> Self {
        Self { errors, ..self }
    }
}

impl IntoResponse for ProblemJson {
    fn into_response(self) -> Response {
        let body = json!({
            "type": format!("https://krake.dev/errors/{}", self.code.trim_start_matches("krake::")),
            "title": self.status.canonical_reason().unwrap_or("error"),
            "status": self.status.as_u16(),
            "code": self.code,
            "detail": self.detail,
            "errors": self.errors,
        });
        let mut response = (self.status, body.to_string()).into_response();
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/problem+json"),
        );
        // RFC 9110, 10.2.3.
        if self.status == StatusCode::SERVICE_UNAVAILABLE
            || self.status == StatusCode::TOO_MANY_REQUESTS
        {
            let seconds = HeaderValue::from_static("1");
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
        }
        response
    }
}

impl From<consensus::Problem> for ProblemJson {
    fn from(problem: consensus::Problem) -> Self {
        Self::new(problem.status, problem.code, problem.detail)
    }
}

pub(super) type Answer = Result<Json<Value>, ProblemJson>;

pub(super) fn unavailable(error: impl std::fmt::Display) -> ProblemJson {
    ProblemJson::new(
        StatusCode::SERVICE_UNAVAILABLE,
        "krake::unavailable",
        error.to_string(),
    )
}

pub(super) async fn body_of<T: DeserializeOwned>(request: Request) -> Result<T, ProblemJson> {
    let bytes = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX)
        .await
        .map_err(|_| {
            ProblemJson::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "krake::too-large",
                format!("the body has more than {BODY_BYTES_MAX} bytes"),
            )
        })?;
    let invalid =
        |message: String| ProblemJson::new(StatusCode::BAD_REQUEST, "krake::invalid-body", message);
    let value = body::parse(&bytes).map_err(|error| invalid(error.message))?;
    serde_json::from_value(value).map_err(|error| invalid(error.to_string()))
}
