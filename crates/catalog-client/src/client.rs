//! A client of one connection to one node.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request as HttpRequest, StatusCode, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use krake_consensus::{Command, Committed, Entry};
use krake_model::GroupId;
use krake_model::codec::CodecError;
use krake_model::revision::Revision;
use parking_lot::Mutex;
use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;

use crate::protocol::{
    self, Ask, Changed, Freshness, PATH, REPLY_BYTES_MAX, Refusal, Reply, Response, UNASKED,
    UPGRADE,
};

/// Events of a watch that wait for its reader at most; beyond it ends.
const EVENTS_WAITING: usize = 4096;
/// Requests that wait to be written at most, encoded.
const WRITES_WAITING: usize = 64;
/// Frames are gathered up to this size into one write.
const WRITE_BYTES: usize = 64 * 1024;
/// What is read at once.
const READ_BYTES: usize = 64 * 1024;
/// Of a refusal's body this much is shown.
const PROBLEM_BYTES_MAX: usize = 64 * 1024;

/// Where a node is.
#[derive(Debug, Clone)]
pub enum Endpoint {
    /// Its API address, such as `127.0.0.1:7443`, with the admin token.
    Tcp {
        /// Host and port.
        address: String,
        /// The token.
        token: String,
    },
    /// Its socket; the file's mode says who may use it.
    Unix(PathBuf),
}

/// A request failed.
#[derive(Debug, Error)]
pub enum CatalogError {
    /// There is no connection to the node.
    #[error("cannot connect to the node")]
    Connect(#[source] io::Error),
    /// The node's HTTP does not answer as it should.
    #[error("the node does not speak HTTP")]
    Http(#[source] hyper::Error),
    /// The node does not open the catalog to this client.
    #[error("the node answers {status}: {body}")]
    Denied {
        /// The HTTP status.
        status: StatusCode,
        /// What it says.
        body: String,
    },
    /// The connection ended; a write that had no answer may still take effect. Connect again, to
    /// any node, and repeat it under the same request id.
    #[error("the connection ended: {reason}")]
    Closed {
        /// Why, as far as known.
        reason: String,
    },
    /// The node refused the request.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The request is too large.
    #[error("the request cannot be sent")]
    Encode(#[source] CodecError),
    /// The key is not one that clients may write.
    #[error("key `{key}` cannot be written: clients write kv/NAMESPACE/NAME")]
    NotWritable {
        /// Which.
        key: String,
    },
    /// The node answered something else than was asked.
    #[error("the node's answer is not one to this request")]
    Unexpected,
}

enum Waiter {
    One(oneshot::Sender<Reply>),
    Watch(mpsc::Sender<Reply>),
}

#[derive(Default)]
struct Waiting {
    waiters: BTreeMap<u64, Waiter>,
    ended: Option<String>,
}

struct Shared {
    /// Encoded, without their length.
    requests: mpsc::Sender<Vec<u8>>,
    waiting: Mutex<Waiting>,
    next: AtomicU64,
    slots: Semaphore,
    shards: u16,
    replica: u64,
}

/// A connection to a node's catalog. Cheap to clone; all clones share the connection, which ends
/// with the last of them.
#[derive(Clone)]
pub struct CatalogClient {
    shared: Arc<Shared>,
    _tasks: Arc<Tasks>,
}

struct Tasks(Vec<JoinHandle<()>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl std::fmt::Debug for CatalogClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CatalogClient").finish_non_exhaustive()
    }
}

fn closed(reason: impl ToString) -> CatalogError {
    CatalogError::Closed {
        reason: reason.to_string(),
    }
}

/// The group of a key that clients may write.
pub(crate) fn writable_group(key: &str, shards: u16) -> Result<GroupId, CatalogError> {
    protocol::group_of(key, shards).ok_or_else(|| CatalogError::NotWritable {
        key: key.to_owned(),
    })
}

pub(crate) fn get(group: GroupId, key: &str, freshness: Freshness) -> Ask {
    Ask::Get {
        group,
        key: key.to_owned(),
        freshness,
    }
}

/// What a node's replica has of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StaleValue {
    /// `None`: there is no such key.
    pub entry: Option<Entry>,
    /// The replica had at least everything up to here.
    pub revision: Revision,
    /// Index of the last log entry that it had applied.
    pub index: u64,
    /// How long ago the node heard last from the group's leader; zero where it leads, `None` when it
    /// knows of no leader.
    pub age: Option<Duration>,
}

/// What a write is answered with.
pub(crate) fn committed(reply: Reply) -> Result<Committed, CatalogError> {
    match reply {
        Reply::Committed { committed, .. } => Ok(committed),
        _ => Err(CatalogError::Unexpected),
    }
}

/// What a get is answered with.
pub(crate) fn value(reply: Reply) -> Result<(Option<Entry>, Revision), CatalogError> {
    match reply {
        Reply::Value {
            revision, entry, ..
        }
        | Reply::Stale {
            revision, entry, ..
        } => Ok((entry, revision)),
        _ => Err(CatalogError::Unexpected),
    }
}

/// Asks for the upgrade and waits for the 101.
async fn upgrade<S>(stream: S, host: &str, token: Option<&str>) -> Result<Upgraded, CatalogError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(CatalogError::Http)?;
    tokio::spawn(connection.with_upgrades());
    let mut request = HttpRequest::get(PATH)
        .header(header::HOST, host)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, UPGRADE);
    if let Some(token) = token {
        request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
    }
    let request = request
        .body(Empty::<Bytes>::new())
        .map_err(|error| CatalogError::Connect(io::Error::other(error)))?;
    let response = sender
        .send_request(request)
        .await
        .map_err(CatalogError::Http)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        let status = response.status();
        let body = Limited::new(response.into_body(), PROBLEM_BYTES_MAX).collect();
        let body = body.await.map(|body| body.to_bytes()).unwrap_or_default();
        let body = String::from_utf8_lossy(&body).trim().to_owned();
        return Err(CatalogError::Denied { status, body });
    }
    let upgraded = hyper::upgrade::on(response)
        .await
        .map_err(CatalogError::Http)?;
    Ok(TokioIo::new(upgraded))
}

type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

async fn read_response(
    stream: &mut (impl AsyncRead + Unpin),
    buffer: &mut Vec<u8>,
) -> io::Result<Option<Response>> {
    let Some(length) = protocol::read_length(stream, REPLY_BYTES_MAX).await? else {
        return Ok(None);
    };
    buffer.resize(length, 0);
    stream.read_exact(buffer).await?;
    protocol::decode(buffer)
        .map(Some)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

impl CatalogClient {
    /// Connects and waits for the node's welcome.
    ///
    /// # Errors
    /// When there is no node, or it does not let this client in.
    pub async fn connect(endpoint: &Endpoint) -> Result<Self, CatalogError> {
        let stream = match endpoint {
            Endpoint::Tcp { address, token } => {
                let stream = TcpStream::connect(address).await;
                let stream = stream.map_err(CatalogError::Connect)?;
                stream.set_nodelay(true).map_err(CatalogError::Connect)?;
                upgrade(stream, address, Some(token)).await?
            }
            Endpoint::Unix(path) => {
                let stream = UnixStream::connect(path).await;
                upgrade(stream.map_err(CatalogError::Connect)?, "localhost", None).await?
            }
        };
        let (reading, writing) = tokio::io::split(stream);
        let mut reading = BufReader::with_capacity(READ_BYTES, reading);
        let first = read_response(&mut reading, &mut Vec::new())
            .await
            .map_err(closed)?;
        let (shards, in_flight_max, replica) = match first.map(|response| response.reply) {
            Some(Reply::Welcome {
                shards,
                in_flight_max,
                replica,
            }) => (shards, in_flight_max, replica),
            Some(Reply::Refused(refusal)) => return Err(refusal.into()),
            Some(_) => return Err(CatalogError::Unexpected),
            None => return Err(closed("the node said nothing")),
        };
        let (requests, queue) = mpsc::channel(WRITES_WAITING);
        let shared = Arc::new(Shared {
            requests,
            waiting: Mutex::default(),
            next: AtomicU64::new(UNASKED + 1),
            slots: Semaphore::new(in_flight_max as usize),
            shards,
            replica,
        });
        let tasks = vec![
            tokio::spawn(write(queue, writing, Arc::clone(&shared))),
            tokio::spawn(read(reading, Arc::clone(&shared))),
        ];
        Ok(Self {
            shared,
            _tasks: Arc::new(Tasks(tasks)),
        })
    }

    /// How many shards the federation has.
    pub fn shards(&self) -> u16 {
        self.shared.shards
    }

    /// The replica of the node at the other end.
    pub fn replica(&self) -> u64 {
        self.shared.replica
    }

    /// Whether the connection still stands, as far as known.
    pub fn is_open(&self) -> bool {
        self.shared.waiting.lock().ended.is_none()
    }

    /// The group of a key that clients may write.
    ///
    /// # Errors
    /// [`CatalogError::NotWritable`].
    pub fn group_of(&self, key: &str) -> Result<GroupId, CatalogError> {
        writable_group(key, self.shared.shards)
    }

    /// Applies a command to the group that all keys it writes belong to.
    ///
    /// # Errors
    /// With a conflict nothing was written; after a timeout or a lost connection that is not known.
    pub async fn write(&self, group: GroupId, command: Command) -> Result<Committed, CatalogError> {
        committed(self.ask(&Ask::Write { group, command }).await?)
    }

    /// Reads a key: what it holds, and up to which revision at least the node's replica was.
    ///
    /// # Errors
    /// When the node cannot confirm a linearizable read, or is gone.
    pub async fn get(
        &self,
        group: GroupId,
        key: &str,
        freshness: Freshness,
    ) -> Result<(Option<Entry>, Revision), CatalogError> {
        value(self.ask(&get(group, key, freshness)).await?)
    }

    /// Reads a key as the node's replica has it, with how far behind it may be.
    ///
    /// # Errors
    /// As of [`CatalogClient::get`].
    pub async fn get_stale(&self, group: GroupId, key: &str) -> Result<StaleValue, CatalogError> {
        match self.ask(&get(group, key, Freshness::Stale)).await? {
            Reply::Stale {
                revision,
                index,
                age_ms,
                entry,
            } => Ok(StaleValue {
                entry,
                revision,
                index,
                age: age_ms.map(Duration::from_millis),
            }),
            _ => Err(CatalogError::Unexpected),
        }
    }

    /// Reads the first page of what begins with `prefix`.
    ///
    /// # Errors
    /// As of [`CatalogClient::get`].
    pub async fn list(
        &self,
        group: GroupId,
        prefix: &str,
        limit: u32,
        freshness: Freshness,
    ) -> Result<Page, CatalogError> {
        let prefix = prefix.to_owned();
        let ask = Ask::List {
            group,
            prefix,
            limit,
            freshness,
        };
        self.page(ask).await
    }

    /// Reads the page that [`Page::more`] names.
    ///
    /// # Errors
    /// [`Refusal::ListGone`] when the node has forgotten the list.
    pub async fn next_page(&self, more: u64, limit: u32) -> Result<Page, CatalogError> {
        self.page(Ask::Next { list: more, limit }).await
    }

    async fn page(&self, ask: Ask) -> Result<Page, CatalogError> {
        match self.ask(&ask).await? {
            Reply::Page {
                revision,
                entries,
                more,
            } => Ok(Page {
                revision,
                entries,
                more,
            }),
            _ => Err(CatalogError::Unexpected),
        }
    }

    /// Follows the keys of a group that begin with `prefix`, from a revision on that any node told,
    /// or from now on.
    ///
    /// # Errors
    /// [`Refusal::Compacted`] when changes that old are not kept; when the connection has too many
    /// watches already, or is gone.
    pub async fn watch(
        &self,
        group: GroupId,
        prefix: &str,
        after: Option<Revision>,
    ) -> Result<Watch, CatalogError> {
        let (sender, mut events) = mpsc::channel(EVENTS_WAITING);
        let prefix = prefix.to_owned();
        let ask = Ask::Watch {
            group,
            prefix,
            after,
        };
        let number = self.send(&ask, Waiter::Watch(sender)).await?;
        // From here on the watch is ended when it is dropped, also while it begins.
        let mut watch = Watch {
            client: self.clone(),
            number,
            revision: Revision::NONE,
            events: None,
        };
        match events.recv().await {
            Some(Reply::Watching { revision }) => {
                watch.revision = revision;
                watch.events = Some(events);
                Ok(watch)
            }
            Some(Reply::Refused(refusal)) => Err(refusal.into()),
            Some(_) => Err(CatalogError::Unexpected),
            None => Err(self.ended()),
        }
    }

    pub(crate) async fn ask(&self, ask: &Ask) -> Result<Reply, CatalogError> {
        // The semaphore is never closed.
        let _slot = self.shared.slots.acquire().await.map_err(closed)?;
        let (sender, answer) = oneshot::channel();
        self.send(ask, Waiter::One(sender)).await?;
        match answer.await {
            Ok(Reply::Refused(refusal)) => Err(refusal.into()),
            Ok(reply) => Ok(reply),
            Err(_) => Err(self.ended()),
        }
    }

    /// Nothing is waited for between noting who waits and giving the request away: whoever is
    /// dropped here has asked nothing.
    async fn send(&self, ask: &Ask, waiter: Waiter) -> Result<u64, CatalogError> {
        let place = self.shared.requests.reserve().await;
        let place = place.map_err(|_| self.ended())?;
        let number = self.shared.next.fetch_add(1, Ordering::Relaxed);
        // Others use the connection, too: the node would end it for one request that is too large.
        let request = protocol::encode_request(number, ask).map_err(CatalogError::Encode)?;
        let mut waiting = self.shared.waiting.lock();
        if let Some(reason) = &waiting.ended {
            return Err(closed(reason));
        }
        waiting.waiters.insert(number, waiter);
        drop(waiting);
        place.send(request);
        Ok(number)
    }

    fn ended(&self) -> CatalogError {
        let waiting = self.shared.waiting.lock();
        closed(waiting.ended.as_deref().unwrap_or("this side fell behind"))
    }
}

impl Shared {
    fn end(&self, reason: impl ToString) {
        let mut waiting = self.waiting.lock();
        waiting.ended.get_or_insert_with(|| reason.to_string());
        waiting.waiters.clear();
    }

    fn answer(&self, Response { number, reply }: Response) {
        let mut waiting = self.waiting.lock();
        match waiting.waiters.remove(&number) {
            Some(Waiter::One(waiter)) => {
                // Who asked may be gone.
                let _ = waiter.send(reply);
            }
            Some(Waiter::Watch(events)) => {
                let last = matches!(reply, Reply::WatchEnded | Reply::Refused(_));
                if events.try_send(reply).is_ok() && !last {
                    waiting.waiters.insert(number, Waiter::Watch(events));
                }
            }
            None => {}
        }
    }
}

async fn write(
    mut queue: mpsc::Receiver<Vec<u8>>,
    mut stream: impl AsyncWrite + Unpin,
    shared: Arc<Shared>,
) {
    let mut buffer = Vec::new();
    while let Some(first) = queue.recv().await {
        let mut next = Some(first);
        while let Some(request) = next {
            protocol::append_frame(&mut buffer, &request);
            next = (buffer.len() < WRITE_BYTES)
                .then(|| queue.try_recv().ok())
                .flatten();
        }
        if let Err(error) = stream.write_all(&buffer).await {
            return shared.end(error);
        }
        buffer.clear();
        buffer.shrink_to(WRITE_BYTES);
    }
}

async fn read(mut stream: impl AsyncRead + Unpin, shared: Arc<Shared>) {
    let mut buffer = Vec::new();
    loop {
        match read_response(&mut stream, &mut buffer).await {
            Ok(Some(Response {
                number: UNASKED,
                reply: Reply::Refused(refusal),
            })) => return shared.end(refusal),
            Ok(Some(response)) => shared.answer(response),
            Ok(None) => return shared.end("the node closed it"),
            Err(error) => return shared.end(error),
        }
    }
}

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The same for all pages of a list.
    pub revision: Revision,
    /// In the order of the keys.
    pub entries: Vec<(String, Entry)>,
    /// For [`CatalogClient::next_page`]; `None` at the end.
    pub more: Option<u64>,
}

/// What one command changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The group's revision after it: a watch can go on from here, at any node.
    pub revision: Revision,
    /// What changed; nothing where this is a bookmark.
    pub changes: Vec<Changed>,
}

/// A group that is followed; dropping it ends that.
#[derive(Debug)]
pub struct Watch {
    client: CatalogClient,
    number: u64,
    /// Every change above it is told: as asked for, or what the replica had when the watch began.
    pub revision: Revision,
    events: Option<mpsc::Receiver<Reply>>,
}

impl Watch {
    /// The next event.
    ///
    /// # Errors
    /// [`Refusal::Compacted`]: changes were missed, list and watch from there.
    /// [`CatalogError::Closed`]: watch again from the last event's revision, at any node.
    pub async fn next(&mut self) -> Result<Event, CatalogError> {
        let events = self.events.as_mut();
        let event = match events {
            Some(events) => events.recv().await,
            None => None,
        };
        match event {
            Some(Reply::Changes { revision, changes }) => Ok(Event { revision, changes }),
            Some(Reply::Refused(refusal)) => Err(refusal.into()),
            Some(Reply::WatchEnded) => Err(closed("the node stops")),
            Some(_) => Err(CatalogError::Unexpected),
            None => Err(self.client.ended()),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let ask = Ask::Unwatch { watch: self.number };
        let known = self.client.shared.waiting.lock();
        let running = known.waiters.contains_key(&self.number);
        drop(known);
        let number = self.client.shared.next.fetch_add(1, Ordering::Relaxed);
        // With a full queue the node tells on until this side forgets it below.
        if running && let Ok(request) = protocol::encode_request(number, &ask) {
            let _ = self.client.shared.requests.try_send(request);
        }
        let mut waiting = self.client.shared.waiting.lock();
        waiting.waiters.remove(&self.number);
    }
}
