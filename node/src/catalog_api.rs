//! The catalog's own protocol (`krake_catalog_client::protocol`) on the API's listeners.
//!
//! A connection has one task that reads and answers, one that writes, and one for each list and watch. What
//! a client can make a node hold is bounded: connections, requests of a connection, bytes of all
//! requests, lists that are not read to their end, replies that wait to be written. A client that
//! does not read its replies is read from no more.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response as HttpResponse;
use futures::stream::{FuturesUnordered, StreamExt, TryStreamExt, try_unfold};
use http::{StatusCode, header};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use krake_catalog_client::protocol::{
    self, Ask, Changed, Freshness, PAGE_BYTES, PAGE_ENTRIES_MAX, REQUEST_BYTES_MAX, Refusal, Reply,
    Request, Response, UNASKED, UPGRADE, write_frame,
};
use krake_consensus::{Change, Compacted, Entry, Staleness};
use krake_model::{GroupId, Revision};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::catalog::{Catalog, PATIENCE};

/// Connections of a node at most.
const CONNECTIONS_MAX: usize = 2048;
/// Requests of a connection that may run at once; more are refused as busy.
const IN_FLIGHT_MAX: u32 = 256;
/// The same with refusals that wait to be written; beyond, the connection is not read.
const RUNNING_MAX: usize = 3 * IN_FLIGHT_MAX as usize;
/// Bytes of all requests that run at a node (64 MiB), in KiB; beyond, connections are not read.
const REQUEST_KIB_MAX: usize = 64 * 1024;
/// Watches of a connection.
const WATCHES_MAX: usize = 64;
/// Lists of a connection whose end was not read; the oldest is forgotten for another.
const LISTS_MAX: usize = 4;
/// The same at a node; more are refused as busy.
const NODE_LISTS_MAX: usize = 64;
/// A list is forgotten after this time.
const LIST_LIFETIME: Duration = Duration::from_secs(60);
/// Replies of a connection that wait to be written.
const REPLIES_WAITING: usize = 512;
/// How often a watch is told how far it is, where nothing that it wants changes.
const BOOKMARK_INTERVAL: Duration = Duration::from_secs(1);
/// What a client that is told to come back should wait.
const RETRY_AFTER_MS: u32 = 20;
/// A frame that has begun must end within this time.
const FRAME_TIME: Duration = Duration::from_secs(10);
/// A client must take what is written to it within this time.
const WRITE_TIME: Duration = Duration::from_secs(30);
/// How long a closed connection is read, so that its last words reach the client.
const LINGER_TIME: Duration = Duration::from_secs(1);
/// Frames are gathered up to this size into one write.
const WRITE_BYTES: usize = 64 * 1024;
/// What is read at once.
const READ_BYTES: usize = 64 * 1024;

/// The node's end of the protocol. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CatalogApi {
    catalog: Catalog,
    connections: Arc<Semaphore>,
    request_kib: Arc<Semaphore>,
    lists: Arc<Semaphore>,
    stop: CancellationToken,
}

fn refuse(status: StatusCode, text: &'static str) -> HttpResponse {
    let mut response = HttpResponse::new(Body::from(text));
    *response.status_mut() = status;
    if status == StatusCode::UPGRADE_REQUIRED {
        let value = header::HeaderValue::from_static(UPGRADE);
        response.headers_mut().insert(header::UPGRADE, value);
    }
    response
}

impl CatalogApi {
    /// Serves `catalog` until `stop` is cancelled.
    pub fn new(catalog: Catalog, stop: CancellationToken) -> Self {
        Self {
            catalog,
            connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
            request_kib: Arc::new(Semaphore::new(REQUEST_KIB_MAX)),
            lists: Arc::new(Semaphore::new(NODE_LISTS_MAX)),
            stop,
        }
    }

    /// Answers an authorised HTTP request with 101 and serves its connection from then on.
    pub fn upgrade(&self, mut request: http::Request<Body>) -> HttpResponse {
        let asked = request.headers().get(header::UPGRADE);
        let asked =
            asked.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(UPGRADE.as_bytes()));
        let Some(upgrade) = request
            .extensions_mut()
            .remove::<OnUpgrade>()
            .filter(|_| asked)
        else {
            return refuse(
                StatusCode::UPGRADE_REQUIRED,
                "ask for `Connection: upgrade` and `Upgrade: krake-catalog/1` by HTTP/1.1\n",
            );
        };
        let Ok(slot) = Arc::clone(&self.connections).try_acquire_owned() else {
            return refuse(
                StatusCode::SERVICE_UNAVAILABLE,
                "the catalog has as many connections as this node takes: try again later, or at another node\n",
            );
        };
        let api = self.clone();
        tokio::spawn(async move {
            match upgrade.await {
                Ok(stream) => api.serve(stream).await,
                Err(error) => debug!(%error, "a catalog connection was not upgraded"),
            }
            drop(slot);
        });
        let mut response = refuse(StatusCode::SWITCHING_PROTOCOLS, "");
        for (name, value) in [(header::CONNECTION, "upgrade"), (header::UPGRADE, UPGRADE)] {
            let value = header::HeaderValue::from_static(value);
            response.headers_mut().insert(name, value);
        }
        response
    }

    async fn serve(self, stream: Upgraded) {
        let (reading, writing) = tokio::io::split(TokioIo::new(stream));
        let mut reading = BufReader::with_capacity(READ_BYTES, reading);
        let (replies, queue) = mpsc::channel(REPLIES_WAITING);
        let gone = self.stop.child_token();
        let _gone = gone.clone().drop_guard();
        let mut writer = tokio::spawn(write(queue, writing));
        let connection = Arc::new(Connection {
            api: self,
            replies,
            // A client that has read an answer may ask again before this side notes that it was
            // written.
            in_flight: Arc::new(Semaphore::new(2 * IN_FLIGHT_MAX as usize)),
            lists: Mutex::default(),
            watches: Mutex::default(),
            gone: gone.clone(),
        });
        let ended = tokio::select! {
            ended = Arc::clone(&connection).run(&mut reading) => ended,
            // It takes nothing any more.
            _ = &mut writer => Ok(()),
            () = gone.cancelled() => Ok(()),
        };
        if let Err(error) = ended {
            debug!(%error, "a catalog connection is closed");
            if error.kind() == io::ErrorKind::InvalidData {
                let reason = error.to_string();
                let refusal = Reply::Refused(Refusal::Protocol { reason });
                connection.say(UNASKED, refusal, None).await;
            }
        }
        gone.cancel();
        drop(connection);
        if !writer.is_finished() {
            let _ = tokio::time::timeout(WRITE_TIME, writer).await;
            // Bytes that nobody read would make the kernel drop what was just written.
            let mut rest = reading.take(REQUEST_BYTES_MAX as u64);
            let mut nowhere = tokio::io::sink();
            let drained = tokio::io::copy(&mut rest, &mut nowhere);
            let _ = tokio::time::timeout(LINGER_TIME, drained).await;
        }
    }
}

/// What a watch is about.
struct Watched {
    group: GroupId,
    prefix: String,
    after: Option<Revision>,
}

/// What a request holds until its reply is written.
type Held = (OwnedSemaphorePermit, OwnedSemaphorePermit);
type Outgoing = (Response, Option<Held>);

/// The rest of a list, as it was at a revision.
struct Rest {
    revision: Revision,
    entries: VecDeque<(String, Entry)>,
    _slot: OwnedSemaphorePermit,
}

#[derive(Default)]
struct Lists {
    last: u64,
    rests: BTreeMap<u64, Rest>,
}

struct Connection {
    api: CatalogApi,
    replies: mpsc::Sender<Outgoing>,
    in_flight: Arc<Semaphore>,
    lists: Mutex<Lists>,
    watches: Mutex<BTreeMap<u64, CancellationToken>>,
    gone: CancellationToken,
}

async fn write(mut queue: mpsc::Receiver<Outgoing>, mut stream: impl AsyncWrite + Unpin) {
    let mut buffer = Vec::new();
    let mut held = Vec::new();
    while let Some(first) = queue.recv().await {
        let mut next = Some(first);
        while let Some((response, permits)) = next {
            held.extend(permits);
            if let Err(error) = write_frame(&mut buffer, &response) {
                let reason = error.to_string();
                let reply = Reply::Refused(Refusal::Read { reason });
                let number = response.number;
                // A refusal is far below any limit.
                let _ = write_frame(&mut buffer, &Response { number, reply });
            }
            next = (buffer.len() < WRITE_BYTES)
                .then(|| queue.try_recv().ok())
                .flatten();
        }
        match tokio::time::timeout(WRITE_TIME, stream.write_all(&buffer)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return,
        }
        buffer.clear();
        buffer.shrink_to(WRITE_BYTES);
        held.clear();
    }
    let _ = stream.shutdown().await;
}

fn invalid(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

impl Connection {
    async fn say(&self, number: u64, reply: Reply, held: Option<Held>) {
        // Without a writer the connection ends, and with it who would read this.
        let _ = self.replies.send((Response { number, reply }, held)).await;
    }

    /// Runs what is asked until the client is done. Writes and gets, which mostly wait, run in this
    /// task: what a round of the consensus answers together wakes it once.
    async fn run(self: Arc<Self>, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
        let welcome = Reply::Welcome {
            shards: self.api.catalog.shards,
            in_flight_max: IN_FLIGHT_MAX,
            replica: self.api.catalog.host.replica(),
        };
        self.say(UNASKED, welcome, None).await;
        let buffer = Vec::with_capacity(READ_BYTES);
        let requests = try_unfold((stream, buffer), |(stream, mut buffer)| async {
            let request = self.read(stream, &mut buffer).await?;
            Ok::<_, io::Error>(request.map(|request| (request, (stream, buffer))))
        });
        let mut requests = pin!(requests);
        let mut running = FuturesUnordered::new();
        loop {
            tokio::select! {
                request = requests.try_next(), if running.len() < RUNNING_MAX => match request? {
                    Some((request, bytes)) => running.extend(self.begin(request, bytes)?),
                    None => return Ok(()),
                },
                Some(()) = running.next() => {}
            }
        }
    }

    /// The next request, with what it takes of the bytes that a node holds.
    async fn read(
        &self,
        stream: &mut (impl AsyncRead + Unpin),
        buffer: &mut Vec<u8>,
    ) -> io::Result<Option<(Request, OwnedSemaphorePermit)>> {
        let Some(length) = protocol::read_length(stream, REQUEST_BYTES_MAX).await? else {
            return Ok(None);
        };
        let kib = length.div_ceil(1024) as u32;
        let bytes = Arc::clone(&self.api.request_kib).acquire_many_owned(kib);
        let bytes = bytes.await.map_err(io::Error::other)?;
        buffer.resize(length, 0);
        tokio::time::timeout(FRAME_TIME, stream.read_exact(buffer)).await??;
        let request: Request = protocol::decode(buffer).map_err(invalid)?;
        buffer.shrink_to(READ_BYTES);
        if request.number == UNASKED {
            return Err(invalid("requests are numbered from 1"));
        }
        Ok(Some((request, bytes)))
    }

    /// Begins what is asked; what is returned goes on with it. Nothing is waited for here: what
    /// runs in this task would stand still.
    fn begin(
        self: &Arc<Self>,
        request: Request,
        bytes: OwnedSemaphorePermit,
    ) -> io::Result<Option<impl Future<Output = ()> + Send + use<>>> {
        let number = request.number;
        match (request.ask, Arc::clone(&self.in_flight).try_acquire_owned()) {
            (Ask::Unwatch { watch }, _) => {
                if let Some(watch) = self.watches.lock().remove(&watch) {
                    watch.cancel();
                }
            }
            (_, Err(_)) => {
                let busy = Refusal::Busy {
                    retry_after_ms: RETRY_AFTER_MS,
                };
                return Ok(Some(Arc::clone(self).handle(number, Err(busy), None)));
            }
            (
                Ask::Watch {
                    group,
                    prefix,
                    after,
                },
                Ok(slot),
            ) => {
                if self.watches.lock().contains_key(&number) {
                    return Err(invalid("the number is that of a watch"));
                }
                let connection = Arc::clone(self);
                let held = (slot, bytes);
                match self.begin_watch(number, group) {
                    Ok(ended) => {
                        let watched = Watched {
                            group,
                            prefix,
                            after,
                        };
                        tokio::spawn(connection.watch(number, watched, ended, held));
                    }
                    Err(refusal) => {
                        return Ok(Some(connection.handle(number, Err(refusal), Some(held))));
                    }
                }
            }
            // They have work of their own.
            (ask @ (Ask::List { .. } | Ask::Next { .. }), Ok(slot)) => {
                let connection = Arc::clone(self);
                let gone = self.gone.clone();
                let handled = connection.handle(number, Ok(ask), Some((slot, bytes)));
                tokio::spawn(async move { gone.run_until_cancelled(handled).await });
            }
            (ask, Ok(slot)) => {
                let held = Some((slot, bytes));
                return Ok(Some(Arc::clone(self).handle(number, Ok(ask), held)));
            }
        }
        Ok(None)
    }

    async fn handle(self: Arc<Self>, number: u64, ask: Result<Ask, Refusal>, held: Option<Held>) {
        let answer = match ask {
            Err(refusal) => Err(refusal),
            // Seen to where they begin.
            Ok(Ask::Watch { .. } | Ask::Unwatch { .. }) => return,
            Ok(Ask::Write { group, command }) => self.propose(group, command).await,
            Ok(Ask::Get {
                group,
                key,
                freshness,
            }) => self.get(group, &key, freshness).await,
            Ok(Ask::List {
                group,
                prefix,
                limit,
                freshness,
            }) => self.list(group, &prefix, limit, freshness).await,
            Ok(Ask::Next { list, limit }) => self.next(list, limit),
        };
        let reply = answer.unwrap_or_else(Reply::Refused);
        self.say(number, reply, held).await;
    }

    async fn propose(
        &self,
        group: GroupId,
        command: krake_consensus::Command,
    ) -> Result<Reply, Refusal> {
        protocol::check_write(group, &command, self.api.catalog.shards)?;
        let proposed = self.api.catalog.host.submit(group, command, PATIENCE);
        let committed = proposed.await.map_err(Refusal::Write)?;
        let leader = self.api.catalog.host.leader(group);
        Ok(Reply::Committed { committed, leader })
    }

    /// Any group that there is may be read.
    fn check_group(&self, group: GroupId) -> Result<(), Refusal> {
        if group.shard().is_some_and(|s| s >= self.api.catalog.shards) {
            return Err(Refusal::UnknownGroup { group });
        }
        Ok(())
    }

    /// Waits until this node's replica is as new as asked.
    async fn fresh(&self, group: GroupId, freshness: Freshness) -> Result<(), Refusal> {
        self.check_group(group)?;
        let host = &self.api.catalog.host;
        match freshness {
            Freshness::Stale => return Ok(()),
            Freshness::AtLeast(revision) if host.revision(group) >= revision => return Ok(()),
            Freshness::AtLeast(_) | Freshness::Linearizable => {}
        }
        let barrier = host.read_barrier(&[group], PATIENCE).await;
        barrier.map_err(|error| Refusal::Read {
            reason: error.to_string(),
        })?;
        match freshness {
            Freshness::AtLeast(revision) if host.revision(group) < revision => {
                let reason = format!("nothing of {group} has revision {} yet", revision.number());
                Err(Refusal::Read { reason })
            }
            _ => Ok(()),
        }
    }

    async fn get(&self, group: GroupId, key: &str, freshness: Freshness) -> Result<Reply, Refusal> {
        self.fresh(group, freshness).await?;
        // In this order: the entry is at least as new as the others say.
        let host = &self.api.catalog.host;
        let Staleness { index, age } = host.staleness(group);
        let revision = host.revision(group);
        let entry = host.get(group, key);
        Ok(if freshness == Freshness::Stale {
            Reply::Stale {
                revision,
                index,
                age_ms: age.map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
                entry,
            }
        } else {
            Reply::Value {
                revision,
                entry,
                leader: host.leader(group),
            }
        })
    }

    async fn list(
        self: &Arc<Self>,
        group: GroupId,
        prefix: &str,
        limit: u32,
        freshness: Freshness,
    ) -> Result<Reply, Refusal> {
        let Ok(slot) = Arc::clone(&self.api.lists).try_acquire_owned() else {
            return Err(Refusal::Busy {
                retry_after_ms: RETRY_AFTER_MS,
            });
        };
        self.fresh(group, freshness).await?;
        let (entries, revision) = self.api.catalog.host.list(group, prefix);
        let rest = Rest {
            revision,
            entries: entries.into(),
            _slot: slot,
        };
        let number = {
            let mut lists = self.lists.lock();
            lists.last += 1;
            lists.last
        };
        let (page, more) = self.page(number, rest, limit);
        if more {
            let (connection, gone) = (Arc::downgrade(self), self.gone.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = tokio::time::sleep(LIST_LIFETIME) => {}
                    () = gone.cancelled() => {}
                }
                if let Some(connection) = connection.upgrade() {
                    connection.lists.lock().rests.remove(&number);
                }
            });
        }
        Ok(page)
    }

    fn next(&self, list: u64, limit: u32) -> Result<Reply, Refusal> {
        let rest = self.lists.lock().rests.remove(&list);
        let (page, _) = self.page(list, rest.ok_or(Refusal::ListGone)?, limit);
        Ok(page)
    }

    /// Takes a page off a list and keeps the rest, where there is one.
    fn page(&self, list: u64, mut rest: Rest, limit: u32) -> (Reply, bool) {
        let limit = limit.clamp(1, PAGE_ENTRIES_MAX) as usize;
        let (mut entries, mut bytes) = (Vec::new(), 0);
        while entries.len() < limit && bytes < PAGE_BYTES {
            let Some((key, entry)) = rest.entries.pop_front() else {
                break;
            };
            bytes += key.len() + entry.value.len();
            entries.push((key, entry));
        }
        let revision = rest.revision;
        let more = !rest.entries.is_empty();
        if more {
            let mut lists = self.lists.lock();
            lists.rests.insert(list, rest);
            if lists.rests.len() > LISTS_MAX {
                lists.rests.pop_first();
            }
        }
        let page = Reply::Page {
            revision,
            entries,
            more: more.then_some(list),
        };
        (page, more)
    }

    /// Notes a watch; an [`Ask::Unwatch`] that comes next must find it.
    fn begin_watch(&self, number: u64, group: GroupId) -> Result<CancellationToken, Refusal> {
        self.check_group(group)?;
        let mut watches = self.watches.lock();
        if watches.len() >= WATCHES_MAX {
            let limit = WATCHES_MAX as u32;
            return Err(Refusal::TooManyWatches { limit });
        }
        let ended = self.gone.child_token();
        watches.insert(number, ended.clone());
        Ok(ended)
    }

    async fn watch(
        self: Arc<Self>,
        number: u64,
        watched: Watched,
        ended: CancellationToken,
        held: Held,
    ) {
        let followed = tokio::select! {
            followed = self.follow(number, watched, held) => followed,
            () = ended.cancelled() => Ok(()),
        };
        if let Err(Compacted { oldest, .. }) = followed {
            let refusal = Reply::Refused(Refusal::Compacted { oldest });
            self.say(number, refusal, None).await;
        }
        self.watches.lock().remove(&number);
    }

    async fn follow(&self, number: u64, watched: Watched, held: Held) -> Result<(), Compacted> {
        let Watched {
            group,
            prefix,
            after,
        } = watched;
        let host = &self.api.catalog.host;
        let revision = after.unwrap_or_else(|| host.revision(group));
        let mut following = host.follow(group, revision)?;
        let watching = Reply::Watching { revision };
        self.say(number, watching, Some(held)).await;
        let mut told = revision;
        let mut bookmark = tokio::time::interval(BOOKMARK_INTERVAL);
        bookmark.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let changes: Vec<Changed> = tokio::select! {
                followed = following.next() => {
                    let Some(all) = followed? else {
                        self.say(number, Reply::WatchEnded, None).await;
                        return Ok(());
                    };
                    let wanted = all.changes.iter().filter(|one| one.key.starts_with(&prefix));
                    let changed = |one: &Change| Changed {
                        key: one.key.clone(),
                        entry: one.entry.clone(),
                    };
                    let wanted: Vec<Changed> = wanted.map(changed).collect();
                    if wanted.is_empty() {
                        continue;
                    }
                    wanted
                }
                _ = bookmark.tick() => {
                    if following.last() <= told {
                        continue;
                    }
                    Vec::new()
                }
            };
            told = following.last();
            let changes = Reply::Changes {
                revision: told,
                changes,
            };
            self.say(number, changes, None).await;
        }
    }
}
