//! A client of the node's API that works against any node and goes on with the next.
//!
//! - A node that refuses the connection, does not answer or says 503 is left for the next one, in
//!   the order given; the first that answers is kept for the rest of the run.
//! - A request whose outcome is not known is sent again only when doing it twice is the same as
//!   once: reads, server-side apply, deletes that name the object's identity.
//! - When every node is there but says 503 (a group elects its leader), the round is repeated
//!   until the request's time is over.

mod api;
mod error;
mod watch;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::time::Instant;

pub use api::{
    Applied, ApplyOptions, ApplyOutcome, ConsensusGroup, ConsensusPeer, ConsensusPeers,
    ConsensusStatus, CreatedToken, DecisionSummary, Deletion, FIELD_MANAGER, FederationName,
    FederationStatus, GroupStatus, Resource, SiteStatus, TokenInfo, Transferred, Why, encode,
};
pub use error::{Attempt, ClientError, FieldCause, Refusal};
pub use watch::{Listing, Watch, WatchEvent, WatchEventKind};

/// How long a request may take when nobody says otherwise.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long connecting to one node may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A node that is silent for this long is asked whether it lives.
const SILENCE: Duration = Duration::from_secs(2);
/// And has this long to say so: a node that is stopped still accepts connections.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// A node that lives but is silent for this long is left for another, when the request may be
/// repeated: one that is cut off from the others waits for a majority in vain.
const PATIENCE: Duration = Duration::from_secs(4);
/// Time between two rounds when all nodes said 503 and none said for how long.
const ROUND_PAUSE: Duration = Duration::from_millis(500);
/// An answer has at most this many bytes.
const ANSWER_BYTES_MAX: usize = 256 * 1024 * 1024;
/// HTTP libraries take paths up to 64 KiB; names are far shorter.
const PATH_BYTES_MAX: usize = 16 * 1024;

/// Asks for JSON.
pub const ACCEPT_JSON: &str = "application/json";
/// Asks for a table as the server renders it, or JSON when it cannot.
pub const ACCEPT_TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";
/// The body is a server-side apply (JSON is YAML).
pub const APPLY_PATCH: &str = "application/apply-patch+yaml";
/// The body is a merge patch.
pub const MERGE_PATCH: &str = "application/merge-patch+json";

/// Takes what a client has to tell while it works.
pub type Log = dyn Fn(LogLevel, &str) + Send + Sync;

/// How much a line of the log matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogLevel {
    /// A node was left for another.
    Notice,
    /// A request.
    Debug,
}

/// A client; cheap to clone, clones share which node answered last.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    servers: Vec<Server>,
    /// Index of the node that answered last.
    current: AtomicUsize,
    token: Option<String>,
    timeout: Duration,
    log: Option<Arc<Log>>,
}

#[derive(Debug, Clone)]
struct Server {
    /// As given.
    address: String,
    base: String,
    http: reqwest::Client,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// Path and query.
    pub path: String,
    /// What the body is.
    pub content_type: Option<&'static str>,
    /// What the answer should be.
    pub accept: &'static str,
    /// The body.
    pub body: Bytes,
    /// Whether doing it twice is the same as doing it once.
    pub repeatable: bool,
}

/// An answer that says yes.
#[derive(Debug, Clone)]
pub struct Response {
    /// HTTP status code, 2xx.
    pub status: u16,
    /// The address that answered.
    pub address: String,
    /// The site of the node that answered.
    pub served_by: Option<String>,
    /// Warnings of the server.
    pub warnings: Vec<String>,
    /// The path asked for.
    path: String,
    /// The body.
    pub body: Bytes,
}

/// Why an attempt at one node failed.
struct Failure {
    reason: String,
    /// Whether the request may have been carried out.
    sent: bool,
    /// Whether the node is there, and time was over.
    late: bool,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses: Vec<&str> = self.addresses().collect();
        f.debug_struct("Client")
            .field("servers", &addresses)
            .finish_non_exhaustive()
    }
}

impl Request {
    /// Reads `path`.
    pub fn get(path: impl Into<String>) -> Self {
        Self {
            method: Method::GET,
            path: path.into(),
            content_type: None,
            accept: ACCEPT_JSON,
            body: Bytes::new(),
            repeatable: true,
        }
    }

    /// Sends `body`; taken as one that must not be done twice.
    pub fn write(
        method: Method,
        path: impl Into<String>,
        content_type: &'static str,
        body: impl Into<Bytes>,
    ) -> Self {
        Self {
            method,
            path: path.into(),
            content_type: Some(content_type),
            accept: ACCEPT_JSON,
            body: body.into(),
            repeatable: false,
        }
    }

    /// Asks for a table.
    #[must_use]
    pub const fn table(mut self) -> Self {
        self.accept = ACCEPT_TABLE;
        self
    }

    /// Doing it twice is the same as doing it once.
    #[must_use]
    pub const fn repeatable(mut self) -> Self {
        self.repeatable = true;
        self
    }
}

impl Response {
    /// The body as JSON.
    ///
    /// # Errors
    /// When it is something else.
    pub fn json<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_slice(&self.body).map_err(|source| ClientError::Answer {
            address: self.address.clone(),
            path: self.path.clone(),
            source,
        })
    }
}

impl Server {
    fn new(address: &str) -> Result<Self, ClientError> {
        let wrong = |problem: &str| ClientError::Address {
            address: address.to_owned(),
            problem: problem.to_owned(),
        };
        let builder = reqwest::Client::builder()
            .user_agent(concat!("krakectl/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            // Nodes are named by address; a proxy of the surroundings must not see the token.
            .no_proxy();
        let socket = address
            .strip_prefix("unix://")
            .or_else(|| address.strip_prefix("unix:"));
        let (builder, base) = if let Some(path) = socket {
            if !path.starts_with('/') {
                return Err(wrong("a socket is written unix:///ABSOLUTE/PATH"));
            }
            let builder = builder.unix_socket(PathBuf::from(path));
            (builder, "http://localhost".to_owned())
        } else if address.starts_with("https://") {
            return Err(wrong(
                "krakectl speaks to nodes on its own machine, without TLS: write http://, or unix:///PATH of the node's socket",
            ));
        } else {
            let with_scheme = if address.contains("://") {
                address.to_owned()
            } else {
                format!("http://{address}")
            };
            let url: reqwest::Url = with_scheme
                .parse()
                .map_err(|error| wrong(&format!("{error}; write http://HOST:PORT")))?;
            if url.scheme() != "http" || url.host().is_none() {
                return Err(wrong("write http://HOST:PORT or unix:///PATH"));
            }
            (builder, with_scheme.trim_end_matches('/').to_owned())
        };
        let http = builder.build().map_err(|error| wrong(&chain(&error)))?;
        Ok(Self {
            address: address.to_owned(),
            base,
            http,
        })
    }

    fn request(&self, request: &Request, token: Option<&str>) -> reqwest::RequestBuilder {
        let mut builder = self
            .http
            .request(
                request.method.clone(),
                format!("{}{}", self.base, request.path),
            )
            .header(http::header::ACCEPT, request.accept);
        if let Some(token) = token {
            builder = builder.bearer_auth(token);
        }
        if let Some(content_type) = request.content_type {
            builder = builder
                .header(http::header::CONTENT_TYPE, content_type)
                .body(request.body.clone());
        }
        builder
    }

    /// Whether the node says anything at all.
    async fn lives(&self) -> bool {
        let request = self.http.get(format!("{}/livez", self.base));
        matches!(
            tokio::time::timeout(PROBE_TIMEOUT, request.send()).await,
            Ok(Ok(_))
        )
    }

    /// Waits for `work` as long as the node lives and `deadline` is not over.
    async fn attend<T>(
        &self,
        deadline: Instant,
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let mut work = std::pin::pin!(work);
        loop {
            let pause = SILENCE.min(deadline.saturating_duration_since(Instant::now()));
            if let Ok(done) = tokio::time::timeout(pause, &mut work).await {
                return done;
            }
            let late = Instant::now() >= deadline;
            if !late && self.lives().await {
                continue;
            }
            let reason = if late {
                "no answer in time"
            } else {
                "accepts connections but does not answer"
            };
            return Err(Failure {
                reason: reason.to_owned(),
                sent: true,
                late,
            });
        }
    }
}

/// An error with its causes, without what repeats.
fn chain(error: &dyn std::error::Error) -> String {
    let mut last = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        // reqwest's and hyper's outer texts only say that something failed.
        last = inner.to_string();
        source = inner.source();
    }
    last
}

fn failure(error: &reqwest::Error) -> Failure {
    let text = chain(error);
    let reason = match text.split_once(" (os error") {
        Some((text, _)) => text.to_lowercase(),
        None => text,
    };
    Failure {
        reason,
        // Nothing was sent when there was no connection.
        sent: !error.is_connect(),
        late: false,
    }
}

fn header_text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .map(ToOwned::to_owned)
}

/// The text of `299 - "text"` headers.
fn warnings(headers: &HeaderMap) -> Vec<String> {
    headers
        .get_all(http::header::WARNING)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .map(|value| {
            let text = value.splitn(3, ' ').nth(2).unwrap_or(value);
            let inner = text
                .strip_prefix('"')
                .and_then(|text| text.strip_suffix('"'));
            inner.unwrap_or(text).replace("\\\"", "\"")
        })
        .collect()
}

impl Client {
    /// A client for nodes at `servers` (`http://HOST:PORT`, `unix:///PATH`), tried in this order.
    ///
    /// # Errors
    /// When there is no address, or one that cannot be used.
    pub fn new(
        servers: impl IntoIterator<Item = impl AsRef<str>>,
        token: Option<String>,
    ) -> Result<Self, ClientError> {
        let servers = servers
            .into_iter()
            .map(|address| Server::new(address.as_ref()))
            .collect::<Result<Vec<_>, _>>()?;
        if servers.is_empty() {
            return Err(ClientError::NoAddress);
        }
        Ok(Self {
            inner: Arc::new(Inner {
                servers,
                current: AtomicUsize::new(0),
                token,
                timeout: REQUEST_TIMEOUT,
                log: None,
            }),
        })
    }

    /// The same with another limit for one request, failovers included.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        self.changed(|inner| inner.timeout = timeout)
    }

    /// The same, which tells `log` of every request and failover.
    #[must_use]
    pub fn with_log(self, log: Arc<Log>) -> Self {
        self.changed(|inner| inner.log = Some(log))
    }

    fn changed(self, change: impl FnOnce(&mut Inner)) -> Self {
        let mut inner = Inner {
            servers: self.inner.servers.clone(),
            current: AtomicUsize::new(self.inner.current.load(Ordering::Relaxed)),
            token: self.inner.token.clone(),
            timeout: self.inner.timeout,
            log: self.inner.log.clone(),
        };
        change(&mut inner);
        Self {
            inner: Arc::new(inner),
        }
    }

    /// The addresses, in the order they are tried.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        self.inner
            .servers
            .iter()
            .map(|server| server.address.as_str())
    }

    /// The address that answered last (at first: the first one).
    pub fn current_address(&self) -> &str {
        &self.server(self.current()).address
    }

    fn current(&self) -> usize {
        self.inner.current.load(Ordering::Relaxed)
    }

    fn server(&self, index: usize) -> &Server {
        &self.inner.servers[index % self.inner.servers.len()]
    }

    /// From now on the node after `index` is tried first, if `index` still is.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.inner.servers.len();
        let _ =
            self.inner
                .current
                .compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The node `index` answered, after those in `tried` did not.
    fn settle(&self, index: usize, tried: &[Attempt]) {
        self.inner.current.store(index, Ordering::Relaxed);
        if let Some(Attempt { address, reason }) = tried.first() {
            let instead = &self.server(index).address;
            self.log(LogLevel::Notice, || {
                format!("{address}: {reason}; asking {instead} instead")
            });
        }
    }

    fn log(&self, level: LogLevel, text: impl FnOnce() -> String) {
        if let Some(log) = &self.inner.log {
            log(level, &text());
        }
    }

    /// Reads `path` (with its query) as JSON.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.send(&Request::get(path)).await?.json()
    }

    /// Sends a request of any kind. A server-side apply counts as one that may be repeated, as
    /// reads do; anything else is not repeated when its outcome is not known.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn request(
        &self,
        method: Method,
        path: &str,
        content_type: &'static str,
        body: impl Into<Bytes>,
    ) -> Result<Response, ClientError> {
        let mut request = if method == Method::GET {
            Request::get(path)
        } else {
            Request::write(method, path, content_type, body)
        };
        request.repeatable |= content_type == APPLY_PATCH;
        self.send(&request).await
    }

    /// Sends a request, failing over as this module promises.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn send(&self, request: &Request) -> Result<Response, ClientError> {
        let deadline = Instant::now() + self.inner.timeout;
        let mut refused: Option<Refusal> = None;
        loop {
            let (tried, busy, late) = match self.round(request, deadline).await? {
                Round::Done(response) => return Ok(response),
                Round::Failed { tried, busy, late } => (tried, busy, late),
            };
            let Some(busy) = busy else {
                return Err(match refused {
                    // What a node said in an earlier round says more than that time was over.
                    Some(busy) if late => ClientError::Refused(Box::new(busy)),
                    _ if late => ClientError::Timeout { tried },
                    _ => ClientError::Unreachable { tried },
                });
            };
            let pause = busy.retry_after.map_or(ROUND_PAUSE, Duration::from_secs);
            if Instant::now() + pause >= deadline {
                return Err(ClientError::Refused(Box::new(busy)));
            }
            self.log(LogLevel::Debug, || {
                format!("all nodes are busy ({}), trying again", busy.message)
            });
            refused = Some(busy);
            tokio::time::sleep(pause).await;
        }
    }

    /// Tries every node once.
    async fn round(&self, request: &Request, deadline: Instant) -> Result<Round, ClientError> {
        if request.path.len() > PATH_BYTES_MAX {
            return Err(ClientError::PathTooLong {
                bytes: request.path.len(),
            });
        }
        let first = self.current();
        let (mut tried, mut busy, mut late) = (Vec::new(), None, false);
        for step in 0..self.inner.servers.len() {
            let index = (first + step) % self.inner.servers.len();
            let server = self.server(index);
            let last = step + 1 == self.inner.servers.len();
            let until = if request.repeatable && !last {
                deadline.min(Instant::now() + PATIENCE)
            } else {
                deadline
            };
            let reason = match self.attempt(server, request, until).await {
                Ok(response) => {
                    self.settle(index, &tried);
                    return Ok(Round::Done(response));
                }
                Err(AttemptError::Refused(refusal)) => {
                    // 429: it was not begun. 503: it may have been.
                    let again = refusal.code == 429 || (refusal.code == 503 && request.repeatable);
                    if !again {
                        self.settle(index, &tried);
                        return Err(ClientError::Refused(refusal));
                    }
                    let reason = refusal.message.clone();
                    busy = Some(*refusal);
                    reason
                }
                Err(AttemptError::Failed(failure)) if failure.sent && !request.repeatable => {
                    return Err(ClientError::Unknown {
                        address: server.address.clone(),
                        reason: failure.reason,
                    });
                }
                Err(AttemptError::Failed(failure)) => {
                    late |= failure.late && Instant::now() >= deadline;
                    failure.reason
                }
            };
            self.log(LogLevel::Debug, || format!("{}: {reason}", server.address));
            tried.push(Attempt {
                address: server.address.clone(),
                reason,
            });
        }
        Ok(Round::Failed { tried, busy, late })
    }

    async fn attempt(
        &self,
        server: &Server,
        request: &Request,
        deadline: Instant,
    ) -> Result<Response, AttemptError> {
        let work = async {
            let sent = server.request(request, self.inner.token.as_deref()).send();
            let mut answer = sent.await.map_err(|error| failure(&error))?;
            let mut body = Vec::new();
            while let Some(chunk) = answer.chunk().await.map_err(|error| failure(&error))? {
                if body.len() + chunk.len() > ANSWER_BYTES_MAX {
                    return Err(Failure {
                        reason: format!("its answer has more than {ANSWER_BYTES_MAX} bytes"),
                        sent: true,
                        late: false,
                    });
                }
                body.extend_from_slice(&chunk);
            }
            Ok((answer.status().as_u16(), answer.headers().clone(), body))
        };
        let begun = Instant::now();
        let (status, headers, body) = server
            .attend(deadline, work)
            .await
            .map_err(AttemptError::Failed)?;
        self.log(LogLevel::Debug, || {
            let took = begun.elapsed().as_millis();
            let (method, path) = (&request.method, &request.path);
            format!("{method} {}{path} → {status} in {took} ms", server.address)
        });
        let served_by = header_text(&headers, "krake-served-by");
        if !(200..300).contains(&status) {
            let mut refusal = Refusal::parse(status, &body, &server.address, served_by);
            let seconds = header_text(&headers, "retry-after").and_then(|text| text.parse().ok());
            refusal.retry_after = refusal.retry_after.or(seconds);
            return Err(AttemptError::Refused(Box::new(refusal)));
        }
        Ok(Response {
            status,
            address: server.address.clone(),
            served_by,
            warnings: warnings(&headers),
            path: request.path.clone(),
            body: body.into(),
        })
    }
}

enum Round {
    Done(Response),
    Failed {
        tried: Vec<Attempt>,
        busy: Option<Refusal>,
        late: bool,
    },
}

enum AttemptError {
    Refused(Box<Refusal>),
    Failed(Failure),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        for good in [
            "http://127.0.0.1:1",
            "http://[::1]:7443/",
            "127.0.0.1:7443",
            "unix:///run/a.sock",
            "unix:/run/a.sock",
        ] {
            assert!(Client::new([good], None).is_ok(), "{good}");
        }
        for (bad, why) in [
            ("https://osl1:7443", "TLS"),
            ("unix://relative", "ABSOLUTE"),
            ("ftp://a", "http://HOST:PORT"),
            ("", "http://HOST:PORT"),
        ] {
            let error = Client::new([bad], None).unwrap_err().to_string();
            assert!(error.contains(why), "{bad}: {error}");
        }
        let none: [&str; 0] = [];
        assert!(matches!(
            Client::new(none, None),
            Err(ClientError::NoAddress)
        ));
    }

    #[test]
    fn the_token_is_not_in_debug_output() {
        let client = Client::new(["127.0.0.1:1"], Some("secret".to_owned())).unwrap();
        assert!(!format!("{client:?}").contains("secret"));
    }

    #[test]
    fn warnings_are_unquoted() {
        let mut headers = HeaderMap::new();
        headers.append(
            "warning",
            "299 - \"unknown field \\\"a\\\"\"".parse().unwrap(),
        );
        assert_eq!(warnings(&headers), ["unknown field \"a\""]);
    }
}
