//! Errors as Kubernetes clients read them.

use serde_json::{Value, json};

/// One thing that is wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// Where, such as `spec.replicas`.
    pub field: String,
    /// What.
    pub message: String,
    /// CamelCase reason, as in `metav1.CauseType`.
    pub reason: &'static str,
}

impl Cause {
    /// A value that is not allowed.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            message: message.into(),
            reason: "FieldValueInvalid",
        }
    }

    /// The same for another reason.
    #[must_use]
    pub fn because(mut self, reason: &'static str) -> Self {
        self.reason = reason;
        self
    }

    /// Something that has to be there is not.
    pub fn required(field: impl Into<String>) -> Self {
        Self::new(field, "Required value").because("FieldValueRequired")
    }
}

/// An answer other than success: becomes a `Status` object (`meta/v1`).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status code.
    pub code: u16,
    /// CamelCase reason, as in `metav1.StatusReason`.
    pub reason: &'static str,
    /// A sentence.
    pub message: String,
    /// Which object: group, kind or resource, name.
    pub subject: Option<Box<(String, String, String)>>,
    /// Each field that is wrong.
    pub causes: Vec<Cause>,
    /// Seconds after which to try again, if that helps.
    pub retry_after: Option<u32>,
    /// With this as `continue` the rest of a list can be read that cannot be what it was any more.
    pub resume: Option<String>,
}

impl ApiError {
    /// Any error.
    pub fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            subject: None,
            causes: Vec::new(),
            retry_after: None,
            resume: None,
        }
    }

    /// 400
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 404 for an object.
    pub fn not_found(group: &str, plural: &str, name: &str) -> Self {
        let resource = if group.is_empty() {
            plural.to_owned()
        } else {
            format!("{plural}.{group}")
        };
        Self {
            subject: Some(Box::new((
                group.to_owned(),
                plural.to_owned(),
                name.to_owned(),
            ))),
            ..Self::new(404, "NotFound", format!("{resource} \"{name}\" not found"))
        }
    }

    /// 404 for a path.
    pub fn no_such_path(path: &str) -> Self {
        Self::new(404, "NotFound", format!("there is nothing at {path}"))
    }

    /// 409: it is there already.
    pub fn already_exists(group: &str, plural: &str, name: &str) -> Self {
        Self {
            subject: Some(Box::new((
                group.to_owned(),
                plural.to_owned(),
                name.to_owned(),
            ))),
            ..Self::new(
                409,
                "AlreadyExists",
                format!("{plural} \"{name}\" already exists"),
            )
        }
    }

    /// 409: somebody else was faster, or owns the field.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(409, "Conflict", message)
    }

    /// The same, about an object.
    #[must_use]
    pub fn about(mut self, group: &str, plural: &str, name: &str) -> Self {
        self.subject = Some(Box::new((
            group.to_owned(),
            plural.to_owned(),
            name.to_owned(),
        )));
        self
    }

    /// 405
    pub fn method_not_allowed(message: impl Into<String>) -> Self {
        Self::new(405, "MethodNotAllowed", message)
    }

    /// 415
    pub fn unsupported_media_type(message: impl Into<String>) -> Self {
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 410: the revision is too old to resume from.
    pub fn gone(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 504: the revision is one that was not given yet.
    pub fn too_new(revision: u64, newest: u64) -> Self {
        let message =
            format!("resourceVersion {revision} is not reached yet, the newest is {newest}");
        Self {
            causes: vec![Cause::new("", &message).because("ResourceVersionTooLarge")],
            retry_after: Some(1),
            ..Self::new(504, "Timeout", message)
        }
    }

    /// 413
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(413, "RequestEntityTooLarge", message)
    }

    /// 403
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(403, "Forbidden", message)
    }

    /// 503, to be tried again.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self {
            retry_after: Some(1),
            ..Self::new(503, "ServiceUnavailable", message)
        }
    }

    /// 500
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(500, "InternalError", message)
    }

    /// 422 with every field that is wrong.
    pub fn invalid(group: &str, kind: &str, name: &str, causes: Vec<Cause>) -> Self {
        let list: Vec<String> = causes
            .iter()
            .map(|cause| {
                if cause.field.is_empty() {
                    cause.message.clone()
                } else {
                    format!("{}: {}", cause.field, cause.message)
                }
            })
            .collect();
        let text = if let [one] = &list[..] {
            one.clone()
        } else {
            format!("[{}]", list.join(", "))
        };
        let full = if group.is_empty() {
            kind.to_owned()
        } else {
            format!("{kind}.{group}")
        };
        Self {
            subject: Some(Box::new((
                group.to_owned(),
                kind.to_owned(),
                name.to_owned(),
            ))),
            causes,
            ..Self::new(
                422,
                "Invalid",
                format!("{full} \"{name}\" is invalid: {text}"),
            )
        }
    }

    /// As a `Status` object.
    pub fn to_status(&self) -> Value {
        let mut details = json!({});
        if let Some((group, kind, name)) = self.subject.as_deref() {
            for (field, value) in [("name", name), ("group", group), ("kind", kind)] {
                if !value.is_empty() {
                    details[field] = value.clone().into();
                }
            }
        }
        if !self.causes.is_empty() {
            let causes: Vec<Value> = self
                .causes
                .iter()
                .map(|cause| {
                    json!({"reason": cause.reason, "message": cause.message, "field": cause.field})
                })
                .collect();
            details["causes"] = causes.into();
        }
        if let Some(seconds) = self.retry_after {
            details["retryAfterSeconds"] = seconds.into();
        }
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        if details != json!({}) {
            status["details"] = details;
        }
        if let Some(token) = &self.resume {
            status["metadata"]["continue"] = token.clone().into();
        }
        status
    }
}
