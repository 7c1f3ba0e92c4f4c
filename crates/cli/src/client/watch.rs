//! Lists, and watches that survive their node.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::{Client, ClientError, LogLevel, Refusal, Request, Response, chain, header_text};

/// A watch that is quiet for this long asks whether its node still lives. Nodes send bookmarks
/// only every 30 s, which is long for somebody who waits.
const QUIET: Duration = Duration::from_secs(5);
/// Time between two tries to get a watch running again.
const RETRY_PAUSE: Duration = Duration::from_millis(300);
/// A list is read in pages of so many objects, as kubectl does: no answer is too large then.
const PAGE: usize = 500;
/// One line of a watch has at most this many bytes.
const LINE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A list: objects, or the rows of a table.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// The columns, when it is a table.
    pub columns: Vec<Value>,
    /// The objects or rows.
    pub items: Vec<Value>,
    /// A watch from here misses nothing, at any node.
    pub revision: String,
    /// The site of the node that answered.
    pub served_by: Option<String>,
}

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WatchEventKind {
    /// It is new, or selected from now on.
    Added,
    /// It changed.
    Modified,
    /// It is gone, or no longer selected.
    Deleted,
}

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub struct WatchEvent {
    /// What happened.
    pub kind: WatchEventKind,
    /// The object, or its row in a table (whose metadata is under `object`).
    pub item: Value,
    /// The columns, when it is a row.
    pub columns: Vec<Value>,
}

/// Namespace and name.
type Key = (String, String);

/// Events of a list from a point on, each once, whatever happens to nodes in between.
///
/// It goes on from the last revision, at the same node or at another: they all have the same events
/// in the same order. After 410 it lists again and reports the difference to what it has reported
/// so far.
#[derive(Debug)]
pub struct Watch {
    client: Client,
    path: String,
    table: bool,
    /// What was reported, with its revision.
    known: BTreeMap<Key, (u64, Value)>,
    revision: String,
    /// `revision` is too old to go on from.
    gone: bool,
    /// The node that the stream comes from.
    server: usize,
    stream: Option<Lines>,
    pending: VecDeque<WatchEvent>,
    /// Since when no node serves it.
    lost_since: Option<Instant>,
}

/// A response that comes in lines.
#[derive(Debug)]
struct Lines {
    response: reqwest::Response,
    buffer: Vec<u8>,
}

impl Lines {
    /// The next line; `None` at the end. May be dropped while it waits without losing anything.
    async fn next(&mut self) -> Result<Option<Vec<u8>>, String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(end + 1);
                return Ok(Some(std::mem::replace(&mut self.buffer, rest)));
            }
            match self.response.chunk().await {
                Ok(Some(chunk)) if self.buffer.len() + chunk.len() > LINE_BYTES_MAX => {
                    return Err(format!("a line has more than {LINE_BYTES_MAX} bytes"));
                }
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                Ok(None) => return Ok(None),
                Err(error) => return Err(chain(&error)),
            }
        }
    }
}

fn metadata_of(item: &Value) -> Option<&Value> {
    item.get("metadata")
        .or_else(|| item.pointer("/object/metadata"))
}

fn key_and_revision(item: &Value) -> (Key, u64) {
    let text = |name: &str| {
        metadata_of(item)
            .and_then(|metadata| metadata.get(name))
            .and_then(Value::as_str)
            .unwrap_or_default()
    };
    let key = (text("namespace").to_owned(), text("name").to_owned());
    (key, text("resourceVersion").parse().unwrap_or(0))
}

fn array(value: &mut Value, name: &str) -> Vec<Value> {
    match value.get_mut(name).map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => Vec::new(),
    }
}

fn revision_text(value: &Value) -> String {
    let found = value.pointer("/metadata/resourceVersion");
    found.and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// The list, and where it goes on.
fn listing(response: &Response) -> Result<(Listing, Option<String>), ClientError> {
    let mut raw: Value = response.json()?;
    let table = raw.get("kind").and_then(Value::as_str) == Some("Table");
    let listing = Listing {
        columns: array(&mut raw, "columnDefinitions"),
        items: array(&mut raw, if table { "rows" } else { "items" }),
        revision: revision_text(&raw),
        served_by: response.served_by.clone(),
    };
    let rest = raw.pointer("/metadata/continue").and_then(Value::as_str);
    let rest = rest
        .filter(|token| !token.is_empty())
        .map(ToOwned::to_owned);
    Ok((listing, rest))
}

fn with_query(path: &str, more: &str) -> String {
    let separator = if path.contains('?') { '&' } else { '?' };
    format!("{path}{separator}{more}")
}

impl Client {
    /// Lists `path` (with its query), as objects or as a table: all of it as it was at one moment,
    /// whichever nodes answer.
    ///
    /// # Errors
    /// When no node answers, or one says no.
    pub async fn list(&self, path: &str, table: bool) -> Result<Listing, ClientError> {
        let first = with_query(path, &format!("limit={PAGE}"));
        let (mut whole, mut rest) = self.page(&first, table).await?;
        while let Some(token) = rest {
            let page = format!("limit={PAGE}&continue={token}");
            match self.page(&with_query(path, &page), table).await {
                Ok((page, next)) => {
                    whole.items.extend(page.items);
                    rest = next;
                }
                // So much was written meanwhile that nobody knows any more what the rest was.
                Err(error) if error.refusal().is_some_and(|refusal| refusal.code == 410) => {
                    self.log(LogLevel::Debug, || {
                        format!("{error}; asking for all of {path} at once")
                    });
                    return Ok(self.page(path, table).await?.0);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(whole)
    }

    /// One answer, and what to ask for the next one with.
    async fn page(
        &self,
        path: &str,
        table: bool,
    ) -> Result<(Listing, Option<String>), ClientError> {
        let request = Request::get(path);
        let request = if table { request.table() } else { request };
        listing(&self.send(&request).await?)
    }

    /// Lists `path` and follows what happens after.
    ///
    /// # Errors
    /// When the list fails.
    pub async fn watch(&self, path: &str, table: bool) -> Result<(Listing, Watch), ClientError> {
        let listing = self.list(path, table).await?;
        let mut watch = Watch {
            client: self.clone(),
            path: path.to_owned(),
            table,
            known: BTreeMap::new(),
            revision: String::new(),
            gone: false,
            server: self.current(),
            stream: None,
            pending: VecDeque::new(),
            lost_since: None,
        };
        watch.take_list(&listing);
        watch.pending.clear();
        Ok((listing, watch))
    }
}

impl Watch {
    /// The next event. Waits for ever if none comes; may be dropped while it waits.
    ///
    /// # Errors
    /// When no node has served the watch for the client's request timeout, or one refuses it.
    pub async fn next(&mut self) -> Result<WatchEvent, ClientError> {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return Ok(event);
            }
            if self.stream.is_none() {
                self.reopen().await?;
                continue;
            }
            self.read().await?;
        }
    }

    /// Reads one line into `pending`, or gives the stream up.
    async fn read(&mut self) -> Result<(), ClientError> {
        let Some(lines) = self.stream.as_mut() else {
            return Ok(());
        };
        let index = self.server;
        let line = match tokio::time::timeout(QUIET, lines.next()).await {
            Err(_) => {
                if !self.client.server(index).lives().await {
                    let address = &self.client.server(index).address;
                    self.client.log(LogLevel::Notice, || {
                        format!("{address} does not answer any more; the watch goes on elsewhere")
                    });
                    self.client.leave(index);
                    self.stream = None;
                }
                return Ok(());
            }
            Ok(Ok(Some(line))) => line,
            Ok(ended) => {
                if let Err(reason) = ended {
                    let address = &self.client.server(index).address;
                    self.client.log(LogLevel::Debug, || {
                        format!("the watch at {address} broke: {reason}")
                    });
                }
                self.stream = None;
                return Ok(());
            }
        };
        if line.iter().all(u8::is_ascii_whitespace) {
            return Ok(());
        }
        let event: Value = serde_json::from_slice(&line).map_err(|source| ClientError::Answer {
            address: self.client.server(index).address.clone(),
            path: self.path.clone(),
            source,
        })?;
        self.take_event(&event, index)
    }

    fn take_event(&mut self, event: &Value, index: usize) -> Result<(), ClientError> {
        let mut object = event.get("object").cloned().unwrap_or_default();
        let kind = match event.get("type").and_then(Value::as_str) {
            Some("ADDED") => WatchEventKind::Added,
            Some("MODIFIED") => WatchEventKind::Modified,
            Some("DELETED") => WatchEventKind::Deleted,
            Some("BOOKMARK") => {
                self.revision = revision_text(&object);
                return Ok(());
            }
            _ => {
                self.stream = None;
                let code = object.get("code").and_then(Value::as_u64).unwrap_or(500);
                if code == 410 {
                    self.gone = true;
                    return Ok(());
                }
                let code = u16::try_from(code).unwrap_or(500);
                let address = &self.client.server(index).address;
                let refusal = Refusal::parse(code, object.to_string().as_bytes(), address, None);
                if matches!(code, 429 | 503) {
                    self.client.log(LogLevel::Notice, || {
                        format!("the watch ended: {refusal}; trying again")
                    });
                    self.client.leave(index);
                    return Ok(());
                }
                return Err(ClientError::Refused(Box::new(refusal)));
            }
        };
        let table = object.get("kind").and_then(Value::as_str) == Some("Table");
        let columns = array(&mut object, "columnDefinitions");
        let items = if table {
            array(&mut object, "rows")
        } else {
            vec![object]
        };
        for item in items {
            let (key, revision) = key_and_revision(&item);
            let known = self.known.get(&key).map(|(revision, _)| *revision);
            // A server may send an event twice around the point where a watch begins.
            let repeated = match kind {
                WatchEventKind::Deleted => known.is_none_or(|known| revision < known),
                _ => known.is_some_and(|known| revision <= known),
            };
            if revision > 0 {
                self.revision = revision.to_string();
            }
            if repeated {
                continue;
            }
            if kind == WatchEventKind::Deleted {
                self.known.remove(&key);
            } else {
                self.known.insert(key, (revision, item.clone()));
            }
            self.pending.push_back(WatchEvent {
                kind,
                item,
                columns: columns.clone(),
            });
        }
        Ok(())
    }

    /// The difference between a fresh list and what was reported becomes events.
    fn take_list(&mut self, listing: &Listing) {
        let mut seen = BTreeSet::new();
        let event = |kind, item: &Value| WatchEvent {
            kind,
            item: item.clone(),
            columns: listing.columns.clone(),
        };
        for item in &listing.items {
            let (key, revision) = key_and_revision(item);
            seen.insert(key.clone());
            match self.known.get(&key) {
                None => self.pending.push_back(event(WatchEventKind::Added, item)),
                Some((known, _)) if revision > *known => {
                    self.pending
                        .push_back(event(WatchEventKind::Modified, item));
                }
                Some(_) => continue,
            }
            self.known.insert(key, (revision, item.clone()));
        }
        let pending = &mut self.pending;
        self.known.retain(|key, (_, item)| {
            let there = seen.contains(key);
            if !there {
                pending.push_back(event(WatchEventKind::Deleted, item));
            }
            there
        });
        self.revision.clone_from(&listing.revision);
        self.gone = false;
    }

    /// Gets the stream running again, at whichever node answers.
    async fn reopen(&mut self) -> Result<(), ClientError> {
        let since = *self.lost_since.get_or_insert_with(Instant::now);
        match self.open().await {
            Ok(()) => {
                self.lost_since = None;
                Ok(())
            }
            Err(error) => {
                let busy = error
                    .refusal()
                    .is_none_or(|refusal| matches!(refusal.code, 410 | 429 | 503));
                if !busy || since.elapsed() >= self.client.inner.timeout {
                    return Err(error);
                }
                self.client.log(LogLevel::Debug, || {
                    format!("the watch is not served: {error}; trying again")
                });
                tokio::time::sleep(RETRY_PAUSE).await;
                Ok(())
            }
        }
    }

    async fn open(&mut self) -> Result<(), ClientError> {
        if self.gone {
            let listing = self.client.list(&self.path, self.table).await?;
            self.take_list(&listing);
        }
        let index = self.client.current();
        self.server = index;
        let server = self.client.server(index).clone();
        let query = format!(
            "watch=true&allowWatchBookmarks=true&resourceVersion={}",
            self.revision
        );
        let request = Request::get(with_query(&self.path, &query));
        let request = if self.table { request.table() } else { request };
        let sent = server.request(&request, self.client.inner.token.as_deref());
        let deadline = Instant::now() + self.client.inner.timeout;
        let answer = server
            .attend(deadline, async {
                sent.send().await.map_err(|error| super::failure(&error))
            })
            .await;
        let answer = match answer {
            Ok(answer) => answer,
            Err(failure) => {
                self.client.leave(index);
                return Err(ClientError::Unreachable {
                    tried: vec![super::Attempt {
                        address: server.address,
                        reason: failure.reason,
                    }],
                });
            }
        };
        if answer.status().is_success() {
            self.stream = Some(Lines {
                response: answer,
                buffer: Vec::new(),
            });
            return Ok(());
        }
        let code = answer.status().as_u16();
        let served_by = header_text(answer.headers(), "krake-served-by");
        let body = answer.bytes().await.unwrap_or_default();
        match code {
            410 => self.gone = true,
            429 | 503 => self.client.leave(index),
            _ => {}
        }
        let refusal = Refusal::parse(code, &body, &server.address, served_by);
        Err(ClientError::Refused(Box::new(refusal)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use krake_kube_api::{
        AdmitAll, FieldValidation, Kind, MemoryStore, Registry, Service, Store as _,
    };
    use serde_json::json;

    use super::*;

    const COUNT: usize = 2 * PAGE + 3;

    fn kind() -> Kind {
        Kind {
            group: "example.org".to_owned(),
            version: "v1".to_owned(),
            kind: "Widget".to_owned(),
            plural: "widgets".to_owned(),
            singular: "widget".to_owned(),
            short_names: Vec::new(),
            categories: Vec::new(),
            namespaced: true,
            read_only: false,
            status: false,
            schema: None,
            columns: Vec::new(),
        }
    }

    fn widget(number: usize) -> Value {
        json!({"metadata": {"namespace": "default", "name": format!("w-{number:05}")}})
    }

    /// A server with so many widgets, which makes more with every request; and its requests.
    async fn serve(more: usize) -> (Client, Arc<AtomicUsize>) {
        let store = Arc::new(MemoryStore::default().with_events(100));
        for number in 0..COUNT {
            store.create(&kind(), widget(number)).await.unwrap();
        }
        let service = Arc::new(Service {
            registry: Arc::new(Registry::new(vec![kind()])),
            store: Arc::clone(&store) as _,
            admission: Arc::new(AdmitAll),
            version: json!({}),
            field_validation: FieldValidation::Strict,
        });
        let requests = Arc::<AtomicUsize>::default();
        let counter = Arc::clone(&requests);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = axum::Router::new().fallback(move |request: axum::extract::Request| {
            let (service, store) = (Arc::clone(&service), Arc::clone(&store));
            let round = counter.fetch_add(1, Ordering::SeqCst);
            async move {
                let answer = service.handle(request).await;
                for number in 0..more {
                    let new = widget(COUNT + round * more + number);
                    store.create(&kind(), new).await.unwrap();
                }
                answer
            }
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        let client = Client::new([format!("http://{address}")], None).unwrap();
        (client, requests)
    }

    async fn names_in(client: &Client) -> Vec<String> {
        let path = "/apis/example.org/v1/namespaces/default/widgets";
        let listing = client.list(path, false).await.unwrap();
        let names = listing.items.iter().map(|item| key_and_revision(item).0.1);
        names.collect()
    }

    #[tokio::test]
    async fn a_list_of_several_pages_is_one_list_of_one_moment() {
        let (client, requests) = serve(1).await;
        let expected: Vec<String> = (0..COUNT).map(|number| format!("w-{number:05}")).collect();
        assert_eq!(names_in(&client).await, expected);
        assert_eq!(requests.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn a_list_whose_moment_is_gone_is_asked_for_in_one() {
        let (client, requests) = serve(101).await;
        // Two requests were answered before the one that got all.
        assert_eq!(names_in(&client).await.len(), COUNT + 2 * 101);
        assert_eq!(requests.load(Ordering::SeqCst), 3);
    }
}
