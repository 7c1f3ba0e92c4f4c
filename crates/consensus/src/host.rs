//! The handle by which others use the catalog.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use krake_model::codec::CodecError;
use krake_model::ids::{GroupId, NodeId};
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use parking_lot::{Mutex, RwLock};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, oneshot, watch};
use tracing::{debug, error};

use crate::command::{Command, Committed, ProposeError, ReadError};
use crate::core::{Batch, GroupStatus, Settings};
use crate::disk::{DiskError, Home, RealHome};
use crate::engine::{Engine, Input, Machines, Output, TransferStart};
use crate::follow::{Compacted, Following, History};
use crate::group::Outcome;
use crate::inspect::{Counters, GroupDetail, TransferError};
use crate::machine::{Entry, Machine};
use crate::replica::Replica;
use crate::voters::MemberInfo;
use crate::wal::Owner;
use crate::wire::{Call, CallReply, Frame};

/// Inputs that wait for the thread at most; beyond that peers' frames are dropped (Raft sends
/// again) and callers wait.
const INPUTS_MAX: usize = 4096;
/// Batches a slow watcher may be behind.
const WATCH_BACKLOG: usize = 8192;
/// First pause before a proposal is tried again; doubles up to [`RETRY_PAUSE_MAX`].
pub(crate) const RETRY_PAUSE: Duration = Duration::from_millis(15);
pub(crate) const RETRY_PAUSE_MAX: Duration = Duration::from_millis(120);
/// Bytes in a piece of a snapshot: a few are on their way at once, and heartbeats wait behind them.
const PIECE_BYTES: usize = 256 * 1024;

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
    /// Entries after which the log is replaced by a snapshot.
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
    pub(crate) inputs: SyncSender<Input>,
    pub(crate) machines: Machines,
    pub(crate) members: RwLock<BTreeMap<u64, NodeId>>,
    /// When a frame of each node came last.
    heard: Mutex<BTreeMap<NodeId, Instant>>,
    pub(crate) batches: broadcast::Sender<Batch>,
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
            compact_entries: config.compact_entries,
            compact_bytes: 8 * 1024 * 1024,
            kept_entries: 200,
            piece_bytes: PIECE_BYTES,
            counters: Arc::default(),
        };
        let counters = Arc::clone(&settings.counters);
        let (disk, groups) = home.open()?;
        let replica = Replica::new(settings.clone(), disk, groups)?;
        let (inputs, receiver) = sync_channel(INPUTS_MAX);
        let (batches, _) = broadcast::channel(WATCH_BACKLOG);
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
            inputs: receiver,
            output: Output {
                transport: Arc::clone(&transport),
                machines: Arc::clone(&machines),
                batches: batches.clone(),
                history: Arc::clone(&history),
                counters: Arc::clone(&counters),
                writing_since: Instant::now(),
                write_time: Duration::ZERO,
            },
            status: status_sender,
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
                batches,
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
            } => self.handle_propose(group, command, None, patience).await,
            Call::Submit {
                group,
                command,
                patience,
            } => {
                let origin = self.replica_of(from);
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
            } => {
                let patience = Duration::from_millis(u64::from(patience.min(60_000)));
                CallReply::Closed(self.close_led(groups, at, patience).await)
            }
        };
        reply.encode().map_err(|error| error.to_string())
    }

    async fn handle_propose(
        &self,
        group: GroupId,
        command: Command,
        origin: Option<u64>,
        patience: u32,
    ) -> CallReply {
        let patience = Duration::from_millis(u64::from(patience.min(60_000)));
        if let Err(error) = command.validate() {
            return CallReply::Proposed(Err(error));
        }
        match tokio::time::timeout(patience, self.attempt(group, command, origin)).await {
            Err(_) => CallReply::Proposed(Err(ProposeError::Timeout { group })),
            Ok(Outcome::Done(result)) => CallReply::Proposed(result),
            Ok(Outcome::NotLeader(leader)) => CallReply::NotLeader(leader),
        }
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

    async fn begin_transfer(&self, group: GroupId, to: u64) -> TransferStart {
        let (reply, answer) = oneshot::channel();
        if !self.input(Input::Transfer(group, to, reply)).await {
            return Err(Some(TransferError::Stopped));
        }
        answer.await.unwrap_or(Err(None))
    }

    /// Hands leadership of `group` to the voter `to`, wherever it is led, and waits until this
    /// node sees it there. `false`: it leads already. Dropping the future takes nothing back.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn transfer(
        &self,
        group: GroupId,
        to: u64,
        timeout: Duration,
    ) -> Result<bool, TransferError> {
        let deadline = tokio::time::Instant::now() + timeout;
        let mut status = self.status();
        let mut begun = false;
        loop {
            let leader = {
                let known = status.borrow_and_update();
                let Some(known) = known.get(&group) else {
                    return Err(TransferError::UnknownGroup { group });
                };
                known.leader
            };
            if leader == Some(to) {
                return Ok(begun);
            }
            if let Some(leader) = leader.filter(|_| !begun) {
                match self.ask_transfer(group, to, leader, deadline).await {
                    Ok(true) => begun = true,
                    Ok(false) => return Ok(false),
                    Err(Some(error)) => return Err(error),
                    // Leadership moved meanwhile: ask whoever has it next.
                    Err(None) => {}
                }
            }
            let again = deadline.min(tokio::time::Instant::now() + RETRY_PAUSE_MAX);
            if let Ok(Err(_)) = tokio::time::timeout_at(again, status.changed()).await {
                return Err(TransferError::Stopped);
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(if begun {
                    TransferError::Timeout { group, to }
                } else {
                    TransferError::NoLeader { group }
                });
            }
        }
    }

    async fn ask_transfer(
        &self,
        group: GroupId,
        to: u64,
        leader: u64,
        deadline: tokio::time::Instant,
    ) -> TransferStart {
        if leader == self.shared.replica {
            return self.begin_transfer(group, to).await;
        }
        let node = self.node_of(leader).ok_or(None)?;
        let bytes = Call::Transfer { group, to }.encode().map_err(|_| None)?;
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        match self.shared.transport.call(node, bytes, left).await {
            Err(reason) => {
                debug!(%node, reason, "the leader did not answer");
                Err(None)
            }
            Ok(bytes) => match CallReply::decode(&bytes) {
                Ok(CallReply::Transferred(result)) => result.map_err(Some),
                _ => Err(None),
            },
        }
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

    async fn attempt(&self, group: GroupId, command: Command, origin: Option<u64>) -> Outcome {
        let (reply, answer) = oneshot::channel();
        let input = Input::Propose(group, command, origin, reply);
        if !self.input(input).await {
            return Outcome::Done(Err(ProposeError::Stopped));
        }
        answer.await.unwrap_or(Outcome::NotLeader(None))
    }

    /// Proposes a command to `group`'s leader, wherever it is, and waits until it took effect.
    /// Repeats under the same request id while leaders change. Dropping the future does not
    /// withdraw what was proposed.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose(
        &self,
        group: GroupId,
        command: Command,
        timeout: Duration,
    ) -> Result<Committed, ProposeError> {
        self.propose_as(group, command, false, timeout).await
    }

    /// As [`Self::propose`], for somebody outside. Where most of a group's writes are submitted its
    /// leader goes, if that is far from where it is.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn submit(
        &self,
        group: GroupId,
        command: Command,
        timeout: Duration,
    ) -> Result<Committed, ProposeError> {
        self.propose_as(group, command, true, timeout).await
    }

    async fn propose_as(
        &self,
        group: GroupId,
        command: Command,
        submitted: bool,
        timeout: Duration,
    ) -> Result<Committed, ProposeError> {
        command.validate()?;
        let deadline = tokio::time::Instant::now() + timeout;
        let mut pause = RETRY_PAUSE;
        let mut hint = None;
        loop {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            if left.is_zero() {
                return Err(self.late(group));
            }
            if self.failure().is_some() {
                return Err(ProposeError::Stopped);
            }
            let known = self.leader(group);
            let leader = hint.take().or(known);
            let attempt = self.try_once(group, &command, submitted, leader, left);
            let answer = tokio::select! {
                answer = tokio::time::timeout(left, attempt) => answer,
                // Whoever was asked may be gone and leave the question open.
                () = self.superseded(group, known, leader) => continue,
            };
            match answer {
                Err(_) => return Err(self.late(group)),
                Ok(Outcome::Done(Err(ProposeError::Timeout { .. }))) => {}
                Ok(Outcome::Done(result)) => return result,
                Ok(Outcome::NotLeader(leader)) => {
                    hint = leader.filter(|id| *id != self.shared.replica);
                    if hint.is_some() && pause == RETRY_PAUSE {
                        pause *= 2;
                        continue;
                    }
                }
            }
            tokio::time::sleep(pause.min(left)).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    fn late(&self, group: GroupId) -> ProposeError {
        if self.is_full() {
            ProposeError::DiskFull
        } else {
            ProposeError::Timeout { group }
        }
    }

    /// Ends when another one leads the group than was known when `asked` was asked.
    async fn superseded(&self, group: GroupId, known: Option<u64>, asked: Option<u64>) {
        let asked = asked.filter(|id| *id != self.shared.replica);
        let mut status = self.status();
        while asked.is_some() {
            let now = status
                .borrow_and_update()
                .get(&group)
                .and_then(|g| g.leader);
            if now.is_some() && now != known && now != asked {
                return;
            }
            if status.changed().await.is_err() {
                break;
            }
        }
        std::future::pending().await
    }

    async fn try_once(
        &self,
        group: GroupId,
        command: &Command,
        submitted: bool,
        leader: Option<u64>,
        left: Duration,
    ) -> Outcome {
        let Some(leader) = leader.filter(|id| *id != self.shared.replica) else {
            let origin = submitted.then_some(self.shared.replica);
            return self.attempt(group, command.clone(), origin).await;
        };
        let Some(node) = self.node_of(leader) else {
            return Outcome::NotLeader(None);
        };
        // A leader that does not answer may be gone: after a second we look for another.
        let patience = left.min(Duration::from_secs(1));
        let (command, patience_ms) = (command.clone(), patience.as_millis() as u32);
        let call = if submitted {
            Call::Submit {
                group,
                command,
                patience: patience_ms,
            }
        } else {
            Call::Propose {
                group,
                command,
                patience: patience_ms,
            }
        };
        let bytes = match call.encode() {
            Ok(bytes) => bytes,
            Err(error) => return Outcome::Done(Err(ProposeError::Invalid(error.to_string()))),
        };
        match self.shared.transport.call(node, bytes, patience).await {
            Err(reason) => {
                debug!(%node, reason, "the leader did not answer");
                Outcome::NotLeader(None)
            }
            Ok(bytes) => match CallReply::decode(&bytes) {
                Ok(CallReply::Proposed(result)) => Outcome::Done(result),
                Ok(CallReply::NotLeader(leader)) => Outcome::NotLeader(leader),
                Ok(CallReply::Transferred(_) | CallReply::Closed(_)) => Outcome::NotLeader(None),
                Err(error) => Outcome::Done(Err(ProposeError::Invalid(error.to_string()))),
            },
        }
    }

    /// The node with a replica id.
    pub fn node_of(&self, replica: u64) -> Option<NodeId> {
        self.shared.members.read().get(&replica).copied()
    }

    fn replica_of(&self, node: NodeId) -> Option<u64> {
        let members = self.shared.members.read();
        let found = members.iter().find(|(_, known)| **known == node);
        found.map(|(replica, _)| *replica)
    }

    fn machine(&self, group: GroupId) -> Option<Arc<RwLock<Machine>>> {
        self.shared.machines.read().get(&group).cloned()
    }

    /// Reads one key from this node's replica, as new as it has it.
    pub fn get(&self, group: GroupId, key: &str) -> Option<Entry> {
        self.machine(group)?.read().get(key).cloned()
    }

    /// Reads all entries whose key starts with `prefix` from this node's replica, in key order,
    /// and the group's newest stamp at that moment.
    pub fn list(&self, group: GroupId, prefix: &str) -> (Vec<(String, Entry)>, Revision) {
        let Some(machine) = self.machine(group) else {
            return (Vec::new(), Revision::NONE);
        };
        let machine = machine.read();
        let entries = machine
            .range(prefix)
            .map(|(key, entry)| (key.clone(), entry.clone()))
            .collect();
        (entries, machine.last_stamp)
    }

    /// As [`Self::list`], as it was when the group's newest stamp was not above `at`. Whether all
    /// of that is here is for the caller to know, see [`Self::close`].
    ///
    /// # Errors
    /// [`Compacted`] when changes after `at` are not kept any more.
    pub async fn list_at(
        &self,
        group: GroupId,
        prefix: &str,
        at: Revision,
    ) -> Result<Vec<(String, Entry)>, Compacted> {
        let mut batches = self.watch();
        loop {
            let (entries, newest) = self.list(group, prefix);
            if newest <= at {
                return Ok(entries);
            }
            let mut entries = entries.into_iter().collect();
            if self
                .shared
                .history
                .undo(group, at, newest, prefix, &mut entries)?
            {
                return Ok(entries.into_iter().collect());
            }
            // What was applied a moment ago is noted in the same breath.
            if let Err(RecvError::Closed) = batches.recv().await {
                return Ok(Vec::new());
            }
        }
    }

    /// A group for [`crate::BackupWriter::group`], as this node's replica has it; `None`: it has
    /// none.
    ///
    /// # Errors
    /// When it is too large for a record.
    pub fn group_backup(&self, group: GroupId) -> Option<Result<(u64, Bytes), CodecError>> {
        let machine = self.machine(group)?;
        let term = self.shared.status.borrow().get(&group)?.term;
        let encoded = machine.read().encode();
        Some(encoded.map(|bytes| (term, bytes.into())))
    }

    /// How far this node's replica of a group may be behind.
    pub fn staleness(&self, group: GroupId) -> Staleness {
        let machine = self.machine(group);
        let index = machine.map_or(0, |machine| machine.read().applied);
        let age = match self.leader(group) {
            Some(leader) if leader == self.shared.replica => Some(Duration::ZERO),
            leader => leader
                .and_then(|leader| self.node_of(leader))
                .and_then(|node| self.shared.heard.lock().get(&node).map(Instant::elapsed)),
        };
        Staleness { index, age }
    }

    /// The newest stamp this node's replica of a group has applied.
    pub fn revision(&self, group: GroupId) -> Revision {
        self.machine(group)
            .map_or(Revision::NONE, |machine| machine.read().last_stamp)
    }

    /// Entries and bytes this node's replica of a group holds.
    pub fn size(&self, group: GroupId) -> (usize, u64) {
        self.machine(group).map_or((0, 0), |machine| {
            let machine = machine.read();
            (machine.len(), machine.bytes())
        })
    }

    /// Waits until this node's replicas of `groups` have everything that was committed before the
    /// call, by `ReadIndex` (Ongaro 2014, §6.4): what is read after it is linearizable.
    ///
    /// # Errors
    /// [`ReadError::Timeout`] names the first group without an answer.
    pub async fn read_barrier(
        &self,
        groups: &[GroupId],
        timeout: Duration,
    ) -> Result<(), ReadError> {
        let deadline = tokio::time::Instant::now() + timeout;
        let reads = groups
            .iter()
            .map(|group| self.barrier_one(*group, deadline));
        futures::future::try_join_all(reads).await.map(|_| ())
    }

    async fn barrier_one(
        &self,
        group: GroupId,
        deadline: tokio::time::Instant,
    ) -> Result<(), ReadError> {
        loop {
            let (reply, answer) = oneshot::channel();
            if self.is_full() {
                return Err(ReadError::DiskFull);
            }
            let input = self.input(Input::Read(group, reply));
            match tokio::time::timeout_at(deadline, input).await {
                Err(_) => return Err(ReadError::Timeout { group }),
                Ok(taken) if !taken || self.failure().is_some() => return Err(ReadError::Stopped),
                Ok(_) => {}
            }
            match tokio::time::timeout_at(deadline, answer).await {
                Err(_) => return Err(ReadError::Timeout { group }),
                Ok(Ok(())) => return Ok(()),
                // Turned away, or the group is not here yet.
                Ok(Err(_)) => {
                    let wait = tokio::time::Instant::now() + RETRY_PAUSE_MAX;
                    if wait >= deadline {
                        return Err(ReadError::Timeout { group });
                    }
                    tokio::time::sleep_until(wait).await;
                }
            }
        }
    }

    /// Every change from now on, in order within a group. A receiver that falls far behind gets
    /// `Lagged` and must read anew.
    pub fn watch(&self) -> broadcast::Receiver<Batch> {
        self.shared.batches.subscribe()
    }

    /// Every change of a group above a revision, in order, each once; at whichever node that
    /// revision was seen.
    ///
    /// # Errors
    /// [`Compacted`] when this node does not keep changes that old.
    pub fn follow(&self, group: GroupId, after: Revision) -> Result<Following, Compacted> {
        let (history, batches) = (
            Arc::clone(&self.shared.history),
            self.shared.batches.clone(),
        );
        Following::new(group, after, history, batches)
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

    /// Hands all leadership to others, waiting at most `timeout`; `true` when none is left here.
    pub async fn hand_over(&self, timeout: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let (reply, answer) = oneshot::channel();
            if !self.input(Input::HandOver(reply)).await {
                return false;
            }
            match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(0)) => return true,
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => return false,
            }
            let next = tokio::time::Instant::now() + Duration::from_millis(30);
            if next >= deadline {
                return false;
            }
            tokio::time::sleep_until(next).await;
        }
    }

    /// Tells that this node should lead no group that another live voter can lead (`true`), as before
    /// it is taken away; a node with a slow disk finds out for itself. It goes on voting.
    pub async fn set_reluctant(&self, reluctant: bool) {
        self.input(Input::Reluctant(reluctant)).await;
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use krake_model::ids::FederationId;

    use super::*;
    use crate::command::{Expect, Operation};
    use crate::disk::{Disk, create_in, has_room};
    use crate::log::GroupLog;
    use crate::medium::memory::MemoryDirectory;

    const LIMIT: Duration = Duration::from_secs(20);

    struct Alone;

    #[async_trait]
    impl Transport for Alone {
        fn send(&self, _: NodeId, _: Vec<u8>) -> bool {
            false
        }

        async fn call(&self, _: NodeId, _: Vec<u8>, _: Duration) -> Result<Vec<u8>, String> {
            Err("there is nobody else".to_owned())
        }
    }

    struct InMemory(Arc<MemoryDirectory>, Owner);

    impl Home for InMemory {
        fn open(&self) -> Result<(Disk, Vec<(GroupId, GroupLog)>), DiskError> {
            Disk::open_in(Box::new(Arc::clone(&self.0)), Path::new("memory"), self.1)
        }

        fn has_room(&self) -> Result<bool, DiskError> {
            has_room(&*self.0, Path::new("memory"))
        }
    }

    fn write(key: &str) -> Command {
        Command::new(vec![Operation::Put {
            key: key.to_owned(),
            value: Bytes::from(vec![7; 100_000]),
            expect: Expect::Any,
        }])
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_full_disk_makes_the_node_read_only_until_there_is_room() {
        let owner = Owner {
            federation: FederationId::from_bytes([1; 32]),
            node: NodeId::from_bytes([2; 32]),
        };
        let directory = Arc::<MemoryDirectory>::default();
        create_in(&*directory, owner).ok().unwrap();
        let config = Config::new(owner, 1, PathBuf::new(), 1);
        let home = Box::new(InMemory(Arc::clone(&directory), owner));
        let clock = || Timestamp::from_millis(1);
        let host = Host::start_at(home, &config, Arc::new(Alone), clock).unwrap();
        let meta = GroupId::META;
        host.set_members(vec![MemberInfo {
            replica: 1,
            node: owner.node,
            operator: String::new(),
            grid_zone: String::new(),
            country: String::new(),
            alive: true,
            far: false,
        }])
        .await;
        host.bootstrap(vec![meta]).await.unwrap();
        host.propose(meta, write("before"), LIMIT).await.unwrap();

        directory.limit_room(Some(1_500_000));
        let mut number = 0;
        let error = loop {
            number += 1;
            let short = Duration::from_secs(2);
            match host.propose(meta, write(&number.to_string()), short).await {
                Ok(_) => assert!(number < 100, "there was no room for long"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, ProposeError::DiskFull), "{error}");
        assert!(host.is_full() && host.failure().is_none());
        assert!(!host.leads(meta));
        assert!(host.get(meta, "before").is_some(), "stale reads go on");
        let read = host.read_barrier(&[meta], LIMIT).await;
        assert!(matches!(read, Err(ReadError::DiskFull)), "{read:?}");

        directory.limit_room(None);
        host.propose(meta, write("after"), LIMIT).await.unwrap();
        assert!(!host.is_full());
        host.read_barrier(&[meta], LIMIT).await.unwrap();
        for key in ["before", "1", "after"] {
            assert!(host.get(meta, key).is_some(), "{key} is lost");
        }
        host.stop().await;
    }
}
