//! The handle by which others use the catalog.

mod closed;
mod proposals;
mod reads;
#[cfg(test)]
mod tests;
mod transfers;

pub use self::reads::{Listed, Part};

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::TrySendError;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use krake_model::ids::{GroupId, NodeId};
use krake_model::time::Timestamp;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{oneshot, watch};
use tracing::{debug, error};

use crate::core::{GroupStatus, Origin, Settings};
use crate::disk::{DiskError, Home, RealHome};
use crate::engine::{Engine, Input, Load, Machines, Output};
use crate::feeds::Feeds;
use crate::follow::History;
use crate::inputs::{self, Giver};
use crate::inspect::{Counters, GroupDetail};
use crate::replica::Replica;
use crate::voters::MemberInfo;
use crate::wal::Owner;
use crate::wire::{Call, CallReply, Frame};

/// Inputs that wait for the thread at most; beyond that peers' frames are dropped (Raft sends
/// again) and callers wait.
const INPUTS_MAX: usize = 4096;
/// First pause before a proposal is tried again; doubles up to [`RETRY_PAUSE_MAX`].
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(15);
pub(crate) const RETRY_PAUSE_MAX: Duration = Duration::from_millis(120);
/// Bytes in a piece of a snapshot: a few are on their way at once, and heartbeats wait behind them.
const PIECE_BYTES: usize = 256 * 1024;
/// Groups have so many entries after their snapshots together, where each may have at least
/// [`Config::compact_entries`] and at most four times as many: snapshots of few groups cost a
/// twentieth of the writes (docs/benchmarks.md, 2026-11-28, late at night), logs of many much memory.
const ENTRIES_TOGETHER: u64 = 64_000;

/// How far a replica may be behind, see [`Host::staleness`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Staleness {
    /// Index of the last log entry in the replica's map.
    pub index: u64,
    /// How long ago the node heard last from the one it knows as the group's leader. Zero for the
    /// leader itself, which steps down when no majority answers it for an election timeout; `None`
    /// when no leader is known.
    pub age: Option<Duration>,
}

/// How bytes reach another member.
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Sends a frame, best effort, without waiting. `false`: it is known not to have left.
    fn send(&self, to: NodeId, frame: Vec<u8>) -> bool;
    /// Asks a question and waits for the answer, at most `timeout`.
    ///
    /// # Errors
    /// A text that says why there is no answer.
    async fn call(&self, to: NodeId, bytes: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, String>;
}

/// What a host needs to start.
#[derive(Debug, Clone)]
pub struct Config {
    /// This node and its federation.
    pub owner: Owner,
    /// Its replica id in every group, from 1; the same for ever.
    pub replica: u64,
    /// The catalog's directory, made with [`crate::create`].
    pub path: PathBuf,
    /// Counts this node's starts: read contexts never repeat.
    pub boot: u64,
    /// Raft's unit of time.
    pub tick: Duration,
    /// Ticks without a leader after which an election starts (to twice as many, spread).
    pub election_ticks: usize,
    /// Ticks between heartbeats.
    pub heartbeat_ticks: usize,
    /// Entries after which a group's log is replaced by a snapshot, at least; up to four times as
    /// many where there are few groups.
    pub compact_entries: u64,
}

impl Config {
    /// The timing of production nodes: heartbeats every 300 ms, elections after 0.6 to 1.2 s.
    pub fn new(owner: Owner, replica: u64, path: PathBuf, boot: u64) -> Self {
        Self {
            owner,
            replica,
            path,
            boot,
            tick: Duration::from_millis(100),
            election_ticks: 6,
            heartbeat_ticks: 3,
            compact_entries: 1000,
        }
    }
}

pub(crate) struct Shared {
    pub(crate) inputs: Giver<Input>,
    pub(crate) machines: Machines,
    pub(crate) members: RwLock<BTreeMap<u64, NodeId>>,
    /// When a frame of each node came last.
    heard: Mutex<BTreeMap<NodeId, Instant>>,
    pub(crate) feeds: Arc<Feeds>,
    pub(crate) history: Arc<History>,
    pub(crate) status: watch::Receiver<BTreeMap<GroupId, GroupStatus>>,
    pub(crate) failure: watch::Receiver<Option<String>>,
    pub(crate) full: watch::Receiver<bool>,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) replica: u64,
}

/// The handle; cheap to clone.
#[derive(Clone)]
pub struct Host {
    pub(crate) shared: Arc<Shared>,
    thread: Arc<parking_lot::Mutex<Option<std::thread::JoinHandle<()>>>>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host")
            .field("replica", &self.shared.replica)
            .finish_non_exhaustive()
    }
}

/// How long somebody else waits for an answer, who said so in milliseconds.
fn patience_of(millis: u32) -> Duration {
    Duration::from_millis(u64::from(millis.min(60_000)))
}

impl Host {
    /// Opens the catalog, replays every group and starts the thread. `clock` gives wall time, for
    /// stamps only.
    ///
    /// # Errors
    /// When the catalog is not there, is another node's, is damaged or cannot be read.
    pub fn start(
        config: &Config,
        transport: Arc<dyn Transport>,
        clock: impl Fn() -> Timestamp + Send + 'static,
    ) -> Result<Self, DiskError> {
        let home = RealHome {
            path: config.path.clone(),
            owner: config.owner,
        };
        Self::start_at(Box::new(home), config, transport, clock)
    }

    fn start_at(
        home: Box<dyn Home>,
        config: &Config,
        transport: Arc<dyn Transport>,
        clock: impl Fn() -> Timestamp + Send + 'static,
    ) -> Result<Self, DiskError> {
        let mut seed = [0_u8; 8];
        seed.copy_from_slice(&config.owner.node.as_bytes()[..8]);
        let settings = Settings {
            replica: config.replica,
            election_ticks: config.election_ticks,
            heartbeat_ticks: config.heartbeat_ticks,
            boot_nonce: (config.replica << 32) | (config.boot & 0xffff_ffff),
            seed: u64::from_le_bytes(seed) ^ config.boot,
            compact_entries: (config.compact_entries, 4 * config.compact_entries),
            compact_entries_together: ENTRIES_TOGETHER,
            compact_bytes: 8 * 1024 * 1024,
            kept_entries: 200,
            piece_bytes: PIECE_BYTES,
            counters: Arc::default(),
        };
        let counters = Arc::clone(&settings.counters);
        let (disk, groups) = home.open()?;
        let replica = Replica::new(settings.clone(), disk, groups)?;
        let (inputs, receiver) = inputs::queue(INPUTS_MAX);
        let feeds = Arc::<Feeds>::default();
        let (status_sender, status) = watch::channel(BTreeMap::new());
        let (failure_sender, failure) = watch::channel(None);
        let (full_sender, full) = watch::channel(false);
        let machines: Machines = Arc::default();
        let history = Arc::<History>::default();
        // What the log has beyond the snapshot is noted when it is applied.
        for (id, group) in &replica.core.groups {
            history.begin(*id, group.machine.read().last_stamp);
        }
        let mut engine = Engine {
            replica,
            settings,
            home,
            members: Vec::new(),
            lives: 0,
            reluctant: false,
            slow: false,
            full: full_sender,
            output: Output {
                inputs: receiver,
                transport: Arc::clone(&transport),
                machines: Arc::clone(&machines),
                feeds: Arc::clone(&feeds),
                history: Arc::clone(&history),
                counters: Arc::clone(&counters),
                writing_since: Instant::now(),
                write_time: Duration::ZERO,
            },
            status: status_sender,
            load: Load::default(),
            clock: Box::new(clock),
            tick: config.tick,
        };
        // What was committed before the restart is applied before anybody reads.
        engine.rounds()?;
        let thread = std::thread::Builder::new()
            .name("krake-consensus".to_owned())
            .spawn(move || {
                let ended = catch_unwind(AssertUnwindSafe(|| engine.run()))
                    .unwrap_or_else(|_| Err(DiskError::Io("its thread panicked".to_owned())));
                if let Err(failure) = ended {
                    error!(%failure, "the catalog stops: nothing may be acknowledged that is not on disk");
                    failure_sender.send_replace(Some(failure.to_string()));
                }
            })
            .map_err(|error| DiskError::Io(format!("no thread for the catalog: {error}")))?;
        Ok(Self {
            shared: Arc::new(Shared {
                inputs,
                machines,
                members: RwLock::default(),
                heard: Mutex::default(),
                feeds,
                history,
                status,
                failure,
                full,
                transport,
                counters,
                replica: config.replica,
            }),
            thread: Arc::new(parking_lot::Mutex::new(Some(thread))),
        })
    }

    pub(crate) async fn input(&self, input: Input) -> bool {
        let mut input = input;
        loop {
            match self.shared.inputs.try_send(input) {
                Ok(()) => return true,
                Err(TrySendError::Disconnected(_)) => return false,
                Err(TrySendError::Full(back)) => {
                    input = back;
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
        }
    }

    /// Makes new groups with this node as their only replica; those that exist are left alone.
    ///
    /// # Errors
    /// When they cannot be written.
    pub async fn bootstrap(&self, groups: Vec<GroupId>) -> Result<(), DiskError> {
        let (reply, answer) = oneshot::channel();
        self.input(Input::Bootstrap(groups, reply)).await;
        answer
            .await
            .unwrap_or_else(|_| Err(DiskError::Io("the catalog has stopped".to_owned())))
    }

    /// Tells who the members are; the groups' replicas follow.
    pub async fn set_members(&self, members: Vec<MemberInfo>) {
        *self.shared.members.write() = members.iter().map(|m| (m.replica, m.node)).collect();
        self.input(Input::Members(members)).await;
    }

    /// Takes a frame from an authenticated peer; drops it when the thread is far behind.
    pub fn receive(&self, from: NodeId, frame: &[u8]) {
        match Frame::decode(frame) {
            Ok(frame) => {
                self.shared.heard.lock().insert(from, Instant::now());
                if let Err(TrySendError::Full(_)) =
                    self.shared.inputs.try_send(Input::Frame(from, frame))
                {
                    debug!(%from, "too busy: a frame was dropped");
                }
            }
            Err(error) => debug!(%from, %error, "a frame is not readable"),
        }
    }

    /// Answers a question that another member's [`Transport::call`] brought.
    ///
    /// # Errors
    /// When the question is not readable.
    pub async fn handle_call(&self, from: NodeId, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let reply = match Call::decode(bytes).map_err(|error| error.to_string())? {
            Call::Propose {
                group,
                command,
                patience,
            } => {
                let origin = self.origin(from, false);
                self.handle_propose(group, command, origin, patience).await
            }
            Call::Submit {
                group,
                command,
                patience,
            } => {
                let origin = self.origin(from, true);
                self.handle_propose(group, command, origin, patience).await
            }
            Call::Transfer { group, to } => match self.begin_transfer(group, to).await {
                Ok(begun) => CallReply::Transferred(Ok(begun)),
                Err(Some(error)) => CallReply::Transferred(Err(error)),
                Err(None) => CallReply::NotLeader(self.leader(group)),
            },
            Call::Close {
                groups,
                at,
                patience,
            } => CallReply::Closed(self.close_led(groups, at, patience_of(patience)).await),
        };
        reply.encode().map_err(|error| error.to_string())
    }

    /// This node's replica id.
    pub fn replica(&self) -> u64 {
        self.shared.replica
    }

    /// The replica that leads a group, as far as this node knows.
    pub fn leader(&self, group: GroupId) -> Option<u64> {
        let status = self.shared.status.borrow();
        status.get(&group).and_then(|status| status.leader)
    }

    /// All groups in full, as this node has them now; `None` when the host has stopped, is out of
    /// room, or does not answer within `timeout`.
    pub async fn details(&self, timeout: Duration) -> Option<Vec<GroupDetail>> {
        let (reply, answer) = oneshot::channel();
        let looked = async {
            if !self.input(Input::Look(reply)).await {
                return None;
            }
            answer.await.ok()
        };
        tokio::time::timeout(timeout, looked).await.ok().flatten()
    }

    /// What was counted since the start.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Asks another member, which is thought to lead something. `None`: there is no answer, or it is
    /// not readable.
    async fn ask(&self, leader: u64, call: &Call, patience: Duration) -> Option<CallReply> {
        let node = self.node_of(leader)?;
        let asked = match call.encode() {
            Ok(bytes) => self.shared.transport.call(node, bytes, patience).await,
            Err(error) => Err(error.to_string()),
        };
        let reply =
            asked.and_then(|bytes| CallReply::decode(&bytes).map_err(|error| error.to_string()));
        if let Err(reason) = &reply {
            debug!(%node, reason, "the leader did not answer");
        }
        reply.ok()
    }

    /// Of what another node asks; one that is not known to be a member counts as this one.
    fn origin(&self, from: NodeId, submitted: bool) -> Origin {
        let members = self.shared.members.read();
        let found = members.iter().find(|(_, known)| **known == from);
        Origin {
            replica: found.map_or(self.shared.replica, |(replica, _)| *replica),
            submitted: submitted && found.is_some(),
        }
    }

    /// The node with a replica id.
    pub fn node_of(&self, replica: u64) -> Option<NodeId> {
        self.shared.members.read().get(&replica).copied()
    }

    /// Leaders and voters of all groups as this node sees them; changes wake the receiver.
    pub fn status(&self) -> watch::Receiver<BTreeMap<GroupId, GroupStatus>> {
        self.shared.status.clone()
    }

    /// Whether this node leads the group with a complete map.
    pub fn leads(&self, group: GroupId) -> bool {
        self.shared
            .status
            .borrow()
            .get(&group)
            .is_some_and(|status| status.leads)
    }

    /// Why the host has failed, if it has.
    pub fn failure(&self) -> Option<String> {
        self.shared.failure.borrow().clone()
    }

    /// Wakes when the host fails.
    pub fn failed(&self) -> watch::Receiver<Option<String>> {
        self.shared.failure.clone()
    }

    /// Whether the disk is full: this node takes no part in decisions and answers stale reads only,
    /// until there is room again.
    pub fn is_full(&self) -> bool {
        *self.shared.full.borrow()
    }

    /// Stops the thread after the round it is in; everything acknowledged is on disk.
    pub async fn stop(&self) {
        self.input(Input::Stop).await;
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}
