//! One request, the same for both servers.

use std::fmt;

use http::Method;
use serde_json::Value;

/// A change to an object that a client read before.
#[derive(Debug, Clone)]
pub enum Edit {
    /// Puts a value at a pointer.
    Set(String, Value),
    /// Removes what is at a pointer.
    Remove(String),
}

/// What is sent.
#[derive(Debug, Clone)]
pub enum Body {
    /// Nothing.
    None,
    /// This, with placeholders.
    Json(Value),
    /// The object at the path as it is, edited: what a client does that reads and writes back.
    Edited(Vec<Edit>),
    /// These bytes.
    Text(String),
}

/// One request. In the path, the query and the body stand placeholders for what only the server
/// knows of the object at the path: `${rv}` and `${rv-old}` (its revision and the one before),
/// `${uid}`, and `${generated}` (the name made last from a `generateName`).
#[derive(Debug, Clone)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The path, without query.
    pub path: String,
    /// The query.
    pub query: Vec<(&'static str, String)>,
    /// `Accept`.
    pub accept: &'static str,
    /// `Content-Type`; empty: none.
    pub content_type: &'static str,
    /// The body.
    pub body: Body,
    /// The path of the object it is about, to look at before and after; empty: none.
    pub object: String,
}

impl Request {
    /// A request without a body.
    pub fn new(method: Method, path: impl Into<String>) -> Self {
        Self {
            method,
            path: path.into(),
            query: Vec::new(),
            accept: "application/json",
            content_type: "",
            body: Body::None,
            object: String::new(),
        }
    }

    /// Whether it may have changed something.
    pub fn writes(&self) -> bool {
        self.method != Method::GET
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.path)?;
        let mut separator = '?';
        for (key, value) in &self.query {
            write!(f, "{separator}{key}={value}")?;
            separator = '&';
        }
        if self.accept != "application/json" {
            write!(f, " Accept: {}", self.accept)?;
        }
        if !self.content_type.is_empty() {
            write!(f, " {}", self.content_type)?;
        }
        match &self.body {
            Body::None => Ok(()),
            Body::Json(value) => write!(f, "\n      {value}"),
            Body::Text(text) => write!(f, "\n      {text:?}"),
            Body::Edited(edits) => {
                write!(f, "\n      the object as read")?;
                for edit in edits {
                    match edit {
                        Edit::Set(pointer, value) => write!(f, ", {pointer} = {value}")?,
                        Edit::Remove(pointer) => write!(f, ", without {pointer}")?,
                    }
                }
                Ok(())
            }
        }
    }
}
