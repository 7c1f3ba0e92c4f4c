//! A server under comparison, and what is remembered of its objects.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use futures::{AsyncBufRead, AsyncBufReadExt as _};
use http::Method;
use kube::Client;
use serde_json::{Value, json};

use super::request::{Body, Edit, Request};

/// An answer, or the next event of a watch, comes within this time, also on a busy machine.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);
/// Who asks; the name of the field manager where a request names none.
const USER_AGENT: &str = "differential/1";

/// What a server answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The status code.
    pub code: u16,
    /// The text of each warning.
    pub warnings: Vec<String>,
    /// The body; a text when it is not JSON.
    pub body: Value,
}

/// One of the two servers.
pub struct Server {
    client: Client,
    /// What each object's path was answered with last, and its revision before.
    objects: BTreeMap<String, (Value, String)>,
    generated: String,
    /// Where the last page of each collection ended.
    rests: BTreeMap<String, String>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    /// The server that `client` reaches.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            objects: BTreeMap::new(),
            generated: String::new(),
            rests: BTreeMap::new(),
        }
    }

    /// Sends a request and reads the answer.
    ///
    /// # Errors
    /// When there is no answer: every answer of a server, also a refusal, is one.
    pub async fn send(&mut self, request: &Request) -> anyhow::Result<Answer> {
        let answer = self.exchange(request).await;
        let answer = answer.with_context(|| format!("no answer to {request}"))?;
        if answer.code == 201
            && let Some(name) = answer
                .body
                .pointer("/metadata/name")
                .and_then(Value::as_str)
            && answer.body.pointer("/metadata/generateName").is_some()
        {
            name.clone_into(&mut self.generated);
        }
        let rest = text(&answer.body, "/metadata/continue");
        if !rest.is_empty() {
            self.rests.insert(request.path.clone(), rest);
        }
        Ok(answer)
    }

    async fn exchange(&self, request: &Request) -> anyhow::Result<Answer> {
        let request = self.resolve(request)?;
        let exchange = async {
            let response = self.client.send(request).await?;
            let (parts, body) = response.into_parts();
            let bytes = body.collect_bytes().await?;
            let text = String::from_utf8_lossy(&bytes);
            let warnings = parts.headers.get_all(http::header::WARNING);
            Ok(Answer {
                code: parts.status.as_u16(),
                warnings: warnings
                    .iter()
                    .map(|value| value.to_str().unwrap_or_default().to_owned())
                    .collect(),
                body: serde_json::from_str(&text).unwrap_or_else(|_| text.trim().into()),
            })
        };
        tokio::time::timeout(ANSWER_WITHIN, exchange)
            .await
            .context("it takes too long")?
    }

    /// Looks at the object at `path` and remembers it for placeholders.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn look(&mut self, path: &str) -> anyhow::Result<Answer> {
        let answer = self.send(&Request::new(Method::GET, path)).await?;
        if answer.code == 200 {
            let revision = |object: &Value| text(object, "/metadata/resourceVersion");
            let before = match self.objects.get(path) {
                Some((object, before)) if revision(object) == revision(&answer.body) => {
                    before.clone()
                }
                Some((object, _)) => revision(object),
                None => String::new(),
            };
            self.objects
                .insert(path.to_owned(), (answer.body.clone(), before));
        }
        Ok(answer)
    }

    fn resolve(&self, request: &Request) -> anyhow::Result<http::Request<kube::client::Body>> {
        let empty = (json!({"metadata": {}}), String::new());
        let (object, before) = self.objects.get(&request.object).unwrap_or(&empty);
        // An object that never was has a revision and a uid that no other has.
        let or = |found: String, none: &str| {
            if found.is_empty() {
                none.to_owned()
            } else {
                found
            }
        };
        let revision = or(text(object, "/metadata/resourceVersion"), "1");
        let uid = or(
            text(object, "/metadata/uid"),
            "00000000-0000-4000-8000-000000000000",
        );
        let rest = self.rests.get(&request.path).cloned();
        let rest = rest.unwrap_or_else(|| "none".to_owned());
        let fill = |text: &str| {
            text.replace("${rv}", &revision)
                .replace("${rv-old}", &or(before.clone(), "1"))
                .replace("${uid}", &uid)
                .replace("${continue}", &rest)
                .replace("${generated}", &or(self.generated.clone(), "none"))
        };
        let body = match &request.body {
            Body::None => String::new(),
            Body::Json(value) => fill(&value.to_string()),
            Body::Text(text) => text.clone(),
            Body::Edited(edits) => {
                let mut object = object.clone();
                for edit in edits {
                    apply(&mut object, edit);
                }
                fill(&object.to_string())
            }
        };
        let mut uri = fill(&request.path);
        for (index, (key, value)) in request.query.iter().enumerate() {
            uri.push(if index == 0 { '?' } else { '&' });
            uri.push_str(&format!("{key}={}", encode(&fill(value))));
        }
        let mut builder = http::Request::builder()
            .method(request.method.clone())
            .uri(uri)
            .header(http::header::ACCEPT, request.accept)
            .header(http::header::USER_AGENT, USER_AGENT);
        if !request.content_type.is_empty() {
            builder = builder.header(http::header::CONTENT_TYPE, request.content_type);
        }
        Ok(builder.body(body.into_bytes().into())?)
    }

    /// Starts a watch at `path` with `query`, from now on.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn watch(&mut self, path: &str, query: &str) -> anyhow::Result<Watch> {
        let list = self.send(&Request::new(Method::GET, path)).await?;
        ensure!(list.code == 200, "{path} cannot be listed: {list:?}");
        let revision = text(&list.body, "/metadata/resourceVersion");
        let uri = format!("{path}?watch=true&resourceVersion={revision}{query}");
        let request = http::Request::get(uri)
            .header(http::header::ACCEPT, "application/json")
            .body(Vec::new())?;
        let lines = self.client.request_stream(request).await?;
        Ok(Watch {
            lines: Box::pin(lines),
        })
    }
}

/// A running watch.
pub struct Watch {
    lines: Pin<Box<dyn AsyncBufRead + Send>>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// The next event.
    ///
    /// # Errors
    /// When there is none, or it is not JSON.
    pub async fn next(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        tokio::time::timeout(ANSWER_WITHIN, self.lines.read_line(&mut line))
            .await
            .context("the watch shows nothing")??;
        serde_json::from_str(&line).with_context(|| format!("an event that is not JSON: {line:?}"))
    }
}

fn text(object: &Value, pointer: &str) -> String {
    let found = object.pointer(pointer).and_then(Value::as_str);
    found.unwrap_or_default().to_owned()
}

fn encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => {
                char::from(byte).to_string()
            }
            other => format!("%{other:02X}"),
        })
        .collect()
}

fn apply(object: &mut Value, edit: &Edit) {
    let (pointer, value) = match edit {
        Edit::Set(pointer, value) => (pointer, Some(value)),
        Edit::Remove(pointer) => (pointer, None),
    };
    let Some((parent, key)) = pointer.rsplit_once('/') else {
        return;
    };
    if object.pointer(parent).is_none() && value.is_some() {
        apply(object, &Edit::Set(parent.to_owned(), json!({})));
    }
    if let Some(Value::Object(map)) = object.pointer_mut(parent) {
        match value {
            Some(value) => map.insert(key.to_owned(), value.clone()),
            None => map.remove(key),
        };
    }
}
