//! A client of several nodes: what a group's leader has to do is asked where it is, and what one
//! node cannot do another is asked for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use krake_consensus::{Command, Committed, Entry, ProposeError};
use krake_model::GroupId;
use krake_model::revision::Revision;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout_at};

use crate::client::{self, CatalogClient, CatalogError, Endpoint, Event, Watch};
use crate::protocol::{Ask, Freshness, Refusal, Reply};

/// First pause before something is tried at another node; doubles up to [`PAUSE_MAX`].
const PAUSE: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Connections to several nodes of one federation, made when they are first needed and again when
/// they end. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CatalogPool(Arc<Nodes>);

#[derive(Debug)]
struct Nodes {
    nodes: Vec<Node>,
    /// Which node keeps which replica.
    replicas: Mutex<BTreeMap<u64, usize>>,
    leaders: Mutex<BTreeMap<GroupId, u64>>,
    next: AtomicUsize,
    shards: u16,
}

#[derive(Debug)]
struct Node {
    endpoint: Endpoint,
    /// One connects, the others wait for it.
    client: tokio::sync::Mutex<Option<CatalogClient>>,
}

impl CatalogPool {
    /// Connects to the first of these nodes that answers; to the others when they are needed.
    ///
    /// # Errors
    /// The last one, when there is no node that can be asked.
    pub async fn connect(endpoints: Vec<Endpoint>) -> Result<Self, CatalogError> {
        let nodes: Vec<Node> = endpoints
            .into_iter()
            .map(|endpoint| Node {
                endpoint,
                client: tokio::sync::Mutex::default(),
            })
            .collect();
        let mut last = CatalogError::Unexpected;
        for (first, node) in nodes.iter().enumerate() {
            match CatalogClient::connect(&node.endpoint).await {
                Ok(client) => {
                    let (shards, replica) = (client.shards(), client.replica());
                    *node.client.lock().await = Some(client);
                    return Ok(Self(Arc::new(Nodes {
                        nodes,
                        replicas: Mutex::new(BTreeMap::from([(replica, first)])),
                        leaders: Mutex::default(),
                        next: AtomicUsize::new(first),
                        shards,
                    })));
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// How many shards the federation has.
    pub fn shards(&self) -> u16 {
        self.0.shards
    }

    /// The group of a key that clients may write.
    ///
    /// # Errors
    /// [`CatalogError::NotWritable`].
    pub fn group_of(&self, key: &str) -> Result<GroupId, CatalogError> {
        client::writable_group(key, self.0.shards)
    }

    /// Applies a command, at whichever node it takes, for at most `patience`. It is repeated under
    /// its request id, so that it takes effect once.
    ///
    /// # Errors
    /// A conflict or what else another node could not do either; or the last failure when the time
    /// is over, and then the command may still take effect.
    pub async fn write(
        &self,
        group: GroupId,
        command: &Command,
        patience: Duration,
    ) -> Result<Committed, CatalogError> {
        let command = command.clone();
        let ask = Ask::Write { group, command };
        client::committed(self.ask(group, &ask, patience).await?)
    }

    /// Reads a key; see [`CatalogClient::get`].
    ///
    /// # Errors
    /// The last failure when the time is over.
    pub async fn get(
        &self,
        group: GroupId,
        key: &str,
        freshness: Freshness,
        patience: Duration,
    ) -> Result<(Option<Entry>, Revision), CatalogError> {
        let ask = client::get(group, key, freshness);
        client::value(self.ask(group, &ask, patience).await?)
    }

    /// Follows the keys of a group that begin with `prefix`, from a revision on or from now on, and
    /// goes on at another node when one is lost. Nothing is asked before the first
    /// [`PoolWatch::next`].
    pub fn watch(&self, group: GroupId, prefix: &str, after: Option<Revision>) -> PoolWatch {
        PoolWatch {
            pool: self.clone(),
            group,
            prefix: prefix.to_owned(),
            last: after,
            watch: None,
            node: self.node_for(group),
            compacted: 0,
        }
    }

    async fn ask(
        &self,
        group: GroupId,
        ask: &Ask,
        patience: Duration,
    ) -> Result<Reply, CatalogError> {
        let deadline = Instant::now() + patience;
        let mut pause = PAUSE;
        loop {
            let at = self.node_for(group);
            let failed = match timeout_at(deadline, self.ask_at(at, group, ask)).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => error,
                Err(_) => return Err(late()),
            };
            if !passes(&failed) || Instant::now() + pause >= deadline {
                return Err(failed);
            }
            if !matches!(failed, CatalogError::Refused(Refusal::Busy { .. })) {
                self.forget(at, group);
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn ask_at(&self, at: usize, group: GroupId, ask: &Ask) -> Result<Reply, CatalogError> {
        let reply = self.client(at).await?.ask(ask).await?;
        let leader = match &reply {
            Reply::Committed { leader, .. } | Reply::Value { leader, .. } => *leader,
            _ => None,
        };
        if let Some(leader) = leader {
            self.learn(group, leader).await;
        }
        Ok(reply)
    }

    async fn client(&self, at: usize) -> Result<CatalogClient, CatalogError> {
        let node = &self.0.nodes[at];
        let mut client = node.client.lock().await;
        if let Some(client) = client.as_ref().filter(|client| client.is_open()) {
            return Ok(client.clone());
        }
        let made = CatalogClient::connect(&node.endpoint).await?;
        self.0.replicas.lock().insert(made.replica(), at);
        *client = Some(made.clone());
        Ok(made)
    }

    /// Notes who leads a group; a leader at a node that was never asked is looked for.
    async fn learn(&self, group: GroupId, leader: u64) {
        let known = self.0.leaders.lock().insert(group, leader);
        if known == Some(leader) || self.0.replicas.lock().contains_key(&leader) {
            return;
        }
        for at in 0..self.0.nodes.len() {
            let asked = self.0.replicas.lock().values().any(|known| *known == at);
            // Whoever is not there leads nothing.
            if !asked && matches!(self.client(at).await, Ok(client) if client.replica() == leader) {
                return;
            }
        }
    }

    /// The node that leads the group, or the next one in turn.
    fn node_for(&self, group: GroupId) -> usize {
        let leader = self.0.leaders.lock().get(&group).copied();
        let known = leader.and_then(|leader| self.0.replicas.lock().get(&leader).copied());
        known.unwrap_or_else(|| self.0.next.load(Ordering::Relaxed) % self.0.nodes.len())
    }

    fn forget(&self, at: usize, group: GroupId) {
        self.0.leaders.lock().remove(&group);
        // The next one, however many find out at once.
        let next = self.0.next.load(Ordering::Relaxed);
        if next % self.0.nodes.len() == at {
            let _ = self.0.next.compare_exchange(
                next,
                next.wrapping_add(1),
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
    }
}

/// A group that is followed at whichever node is there.
#[derive(Debug)]
pub struct PoolWatch {
    pool: CatalogPool,
    group: GroupId,
    prefix: String,
    last: Option<Revision>,
    watch: Option<Watch>,
    node: usize,
    /// So many nodes in turn do not keep changes that old.
    compacted: usize,
}

impl PoolWatch {
    /// The revision up to which everything was told; `None` before the first node has answered.
    pub const fn last(&self) -> Option<Revision> {
        self.last
    }

    /// The next event, each once and in order. Waits for as long as no node can be reached; it may
    /// be dropped and asked again.
    ///
    /// # Errors
    /// [`Refusal::Compacted`] when no node keeps changes that old: list, and watch from there.
    /// What else waiting does not mend.
    pub async fn next(&mut self) -> Result<Event, CatalogError> {
        let mut pause = PAUSE;
        loop {
            let failed = match self.try_next().await {
                Ok(event) => return Ok(event),
                Err(failed) => failed,
            };
            self.watch = None;
            if matches!(failed, CatalogError::Refused(Refusal::Compacted { .. })) {
                self.compacted += 1;
                if self.compacted >= self.pool.0.nodes.len() {
                    return Err(failed);
                }
            } else if !passes(&failed) {
                return Err(failed);
            }
            self.node = (self.node + 1) % self.pool.0.nodes.len();
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn try_next(&mut self) -> Result<Event, CatalogError> {
        if self.watch.is_none() {
            let client = self.pool.client(self.node).await?;
            let watch = client.watch(self.group, &self.prefix, self.last).await?;
            self.last = Some(watch.revision);
            self.compacted = 0;
            self.watch = Some(watch);
        }
        let event = match &mut self.watch {
            Some(watch) => watch.next().await?,
            None => return Err(CatalogError::Unexpected),
        };
        self.last = Some(event.revision);
        Ok(event)
    }
}

fn late() -> CatalogError {
    CatalogError::Closed {
        reason: "there was no answer in time".to_owned(),
    }
}

/// Whether another node, or the same one later, may answer better.
fn passes(error: &CatalogError) -> bool {
    match error {
        CatalogError::Connect(_)
        | CatalogError::Http(_)
        | CatalogError::Closed { .. }
        | CatalogError::Unexpected => true,
        CatalogError::Denied { status, .. } => status.is_server_error() || *status == 429,
        CatalogError::Refused(refusal) => matches!(
            refusal,
            Refusal::Busy { .. }
                | Refusal::Read { .. }
                | Refusal::Write(
                    ProposeError::Timeout { .. } | ProposeError::DiskFull | ProposeError::Stopped
                )
        ),
        CatalogError::Encode(_) | CatalogError::NotWritable { .. } => false,
    }
}
