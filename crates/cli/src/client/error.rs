//! What can go wrong between a client and the nodes.

use serde_json::Value;
use thiserror::Error;

/// A request did not do what it should.
#[derive(Debug, Error)]
pub enum ClientError {
    /// An address cannot be used.
    #[error("`{address}` is not an address of a node: {problem}")]
    Address {
        /// The address.
        address: String,
        /// What is wrong with it.
        problem: String,
    },
    /// No address was given.
    #[error("no address of a node is known")]
    NoAddress,
    /// No node answered.
    #[error("no node answered")]
    Unreachable {
        /// Each address with the reason.
        tried: Vec<Attempt>,
    },
    /// Nodes are there, but none answered in time.
    #[error("no answer in time")]
    Timeout {
        /// Each address with the reason.
        tried: Vec<Attempt>,
    },
    /// A write was sent and no answer came, and sending it again could do it twice.
    #[error(
        "{address} did not answer ({reason}); whether the request was carried out is not known"
    )]
    Unknown {
        /// The node it was sent to.
        address: String,
        /// Why there was no answer.
        reason: String,
    },
    /// No node would take a request with such a path.
    #[error("the names in the request have {bytes} bytes together, which no node takes")]
    PathTooLong {
        /// Its length.
        bytes: usize,
    },
    /// A node said no.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The answer is not what the API promises.
    #[error("{address} answered {path} with something this krakectl does not understand")]
    Answer {
        /// The node.
        address: String,
        /// The path asked for.
        path: String,
        /// Why.
        source: serde_json::Error,
    },
}

/// One address that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The address as it was given.
    pub address: String,
    /// Why it did not answer.
    pub reason: String,
}

/// An answer other than success: a `Status` of the Kubernetes API, a problem of RFC 9457, or text.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct Refusal {
    /// HTTP status code.
    pub code: u16,
    /// CamelCase reason (`NotFound`) or code (`krake::not-found`); empty when the answer has none.
    pub reason: String,
    /// A sentence.
    pub message: String,
    /// Each field that is wrong, with what is wrong.
    pub causes: Vec<FieldCause>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
    /// The address that answered.
    pub address: String,
    /// The site of the node that answered.
    pub served_by: Option<String>,
}

/// One field of a request that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldCause {
    /// Where, such as `spec.placement.require[0]`.
    pub field: String,
    /// What is wrong.
    pub message: String,
}

impl ClientError {
    /// The node's answer, when there was one that said no.
    pub fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// Whether a node said that the object is not there.
    pub fn is_not_found(&self) -> bool {
        self.refusal().is_some_and(|refusal| refusal.code == 404)
    }

    /// Whether a node said that a revision is too old to resume from.
    pub fn is_gone(&self) -> bool {
        self.refusal().is_some_and(|refusal| refusal.code == 410)
    }
}

impl Refusal {
    /// Reads a body of any of the three forms.
    pub fn parse(code: u16, body: &[u8], address: &str, served_by: Option<String>) -> Self {
        let mut refusal = Self {
            code,
            reason: String::new(),
            message: String::new(),
            causes: Vec::new(),
            retry_after: None,
            address: address.to_owned(),
            served_by,
        };
        let Ok(value) = serde_json::from_slice::<Value>(body) else {
            let text = String::from_utf8_lossy(body);
            let text: String = text.trim().chars().take(500).collect();
            refusal.message = if text.is_empty() {
                format!("HTTP status {code} without an explanation")
            } else {
                text
            };
            return refusal;
        };
        let text = |names: &[&str]| {
            names
                .iter()
                .find_map(|name| value.get(name).and_then(Value::as_str))
                .unwrap_or_default()
                .to_owned()
        };
        refusal.message = text(&["message", "detail", "title"]);
        refusal.reason = text(&["code", "reason"]);
        let causes = value
            .pointer("/details/causes")
            .or_else(|| value.get("errors"));
        refusal.causes = causes
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .map(|cause| {
                let text = |names: &[&str]| {
                    names
                        .iter()
                        .find_map(|name| cause.get(name).and_then(Value::as_str))
                        .unwrap_or_default()
                        .to_owned()
                };
                FieldCause {
                    field: text(&["field", "pointer"]),
                    message: text(&["message", "detail"]),
                }
            })
            .collect();
        refusal.retry_after = value
            .pointer("/details/retryAfterSeconds")
            .or_else(|| value.get("retryAfterSeconds"))
            .and_then(Value::as_u64);
        if refusal.message.is_empty() {
            refusal.message = format!("HTTP status {code} without an explanation");
        }
        refusal
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_a_problem_and_a_text_are_read() {
        let status = br#"{"kind":"Status","message":"m","reason":"Invalid","code":422,
            "details":{"causes":[{"field":"spec.x","message":"bad"}],"retryAfterSeconds":2}}"#;
        let refusal = Refusal::parse(422, status, "http://a", Some("osl1".to_owned()));
        assert_eq!(
            (refusal.message.as_str(), refusal.reason.as_str()),
            ("m", "Invalid")
        );
        assert_eq!(refusal.causes[0].field, "spec.x");
        assert_eq!(refusal.retry_after, Some(2));

        let problem = br#"{"status":404,"code":"krake::not-found","detail":"no app","title":"Not Found","errors":[]}"#;
        let refusal = Refusal::parse(404, problem, "http://a", None);
        assert_eq!(
            (refusal.message.as_str(), refusal.reason.as_str()),
            ("no app", "krake::not-found")
        );

        let refusal = Refusal::parse(502, b"", "http://a", None);
        assert!(refusal.message.contains("502"), "{refusal}");
    }
}
