//! One replica of one group: the library's state machine, our map, and who waits for what.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use parking_lot::RwLock;
use raft::eraftpb as pb;
use raft::{ProgressState, RawNode, StateRole};
use tokio::sync::oneshot;
use tracing::{error, warn};

use crate::command::{Command, Committed, ProposeError, RequestId};
use crate::core::{Batch, GroupStatus, Settings};
use crate::disk::{Change as LogChange, Write};
use crate::home::Submissions;
use crate::inspect::{Counters, GroupDetail, PeerProgress, TransferError};
use crate::log::{GroupLog, HardState};
use crate::machine::{Answer, GROUP_BYTES_MAX, LogEntry, Machine};
use crate::planted::{self, Bug};
use crate::voters::{self, MemberInfo, Step};
use crate::wire::{Configuration, Entry, Message, MessageKind, Sleep, Snapshot};

/// Answers to a proposal from the engine.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done(Result<Committed, ProposeError>),
    NotLeader(Option<u64>),
}

type Waiter = oneshot::Sender<Outcome>;

/// A membership change travels in the entry's context in our own form.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
enum ConfigurationChange {
    AddVoter(u64),
    /// Several at once: they have no part in any majority.
    AddLearners(Vec<u64>),
    Remove(u64),
    /// The first votes instead of the second, by way of a joint configuration.
    Replace(u64, u64),
}

impl ConfigurationChange {
    fn steps(&self) -> Vec<(pb::ConfChangeType, u64)> {
        use pb::ConfChangeType as T;
        match self {
            Self::AddVoter(id) => vec![(T::AddNode, *id)],
            Self::AddLearners(ids) => ids.iter().map(|id| (T::AddLearnerNode, *id)).collect(),
            Self::Remove(id) => vec![(T::RemoveNode, *id)],
            Self::Replace(by, old) => vec![(T::AddNode, *by), (T::AddLearnerNode, *old)],
        }
    }

    /// What the library is told, one after another. It leaves a joint configuration by itself.
    fn to_raft(&self) -> Vec<pb::ConfChangeV2> {
        let single = |(kind, id)| {
            let mut single = pb::ConfChangeSingle::default();
            single.set_change_type(kind);
            single.node_id = id;
            single
        };
        let change = |singles: Vec<pb::ConfChangeSingle>| {
            let mut change = pb::ConfChangeV2::default();
            change.set_changes(singles.into());
            change
        };
        let singles = self.steps().into_iter().map(single);
        if matches!(self, Self::Replace(..)) {
            vec![change(singles.collect())]
        } else {
            singles.map(|single| change(vec![single])).collect()
        }
    }
}

const CHANGE_VERSION: u8 = 1;
/// Bytes of one membership change at most.
const CHANGE_BYTES_MAX: usize = 16 * 1024;
/// Reads that wait at one group at most; more are turned away.
const READS_MAX: usize = 4096;
/// Ticks after which an unanswered read is asked again under a new context.
const READ_RETRY_TICKS: u64 = 3;
/// Ticks without anything to do after which a leader lets its group fall silent. Longer than a
/// heartbeat interval, so that all followers know what is committed.
const QUIET_TICKS: u64 = 10;

/// Entries after a snapshot before another one is made for the log's bytes: the entries kept before
/// a snapshot may be as large.
const ENTRIES_BETWEEN: u64 = 64;
/// Counted for each entry of a log beyond its data, when it is compared with the map.
const ENTRY_BYTES: usize = 64;

/// Who waits until a majority has confirmed that this replica's leader still leads.
#[derive(Debug)]
enum Reader {
    /// Reads when everything committed before is applied.
    Read(oneshot::Sender<()>),
    /// Closed the stamps up to some moment, as leader in a term with a log up to `last`: a majority
    /// knows of it if the leader is still the same.
    Close {
        term: u64,
        last: u64,
        reply: oneshot::Sender<u64>,
    },
}

impl Reader {
    fn is_gone(&self) -> bool {
        match self {
            Self::Read(reply) => reply.is_closed(),
            Self::Close { reply, .. } => reply.is_closed(),
        }
    }

    fn answer(self, now: u64) {
        match self {
            Self::Read(reply) => {
                let _ = reply.send(());
            }
            Self::Close { term, last, reply } if term == now => {
                let _ = reply.send(last);
            }
            Self::Close { .. } => {}
        }
    }
}

#[derive(Debug, Default)]
struct Reads {
    /// Not yet asked.
    queued: Vec<Reader>,
    /// Asked under a context at a tick.
    asked: BTreeMap<Vec<u8>, (u64, Vec<Reader>)>,
    /// Confirmed, waiting until the index is applied.
    confirmed: Vec<(u64, Vec<Reader>)>,
    /// To be answered when the changes were told to those who watch.
    done: Vec<Reader>,
}

impl Reads {
    fn is_empty(&self) -> bool {
        self.queued.is_empty() && self.asked.is_empty() && self.confirmed.is_empty()
    }

    fn waiting(&self) -> usize {
        let asked = self.asked.values().map(|(_, readers)| readers.len());
        let confirmed = self.confirmed.iter().map(|(_, readers)| readers.len());
        self.queued.len() + asked.sum::<usize>() + confirmed.sum::<usize>()
    }
}

/// Whether a replica's own time runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    /// It counts ticks: a leader sends heartbeats, the others wait for them.
    Awake,
    /// Nothing happens in the group. A leader sends nothing, the others trust its node's pulse.
    Asleep,
    /// It slept, and counts ticks because the leader's node is silent.
    Startled,
}

/// A group's replica.
pub(crate) struct Group {
    pub(crate) id: GroupId,
    pub(crate) raw: RawNode<GroupLog>,
    pub(crate) machine: Arc<RwLock<Machine>>,
    proposals: BTreeMap<RequestId, Vec<Waiter>>,
    reads: Reads,
    last_stamp: Revision,
    role: (u64, StateRole),
    backlog: Vec<pb::Entry>,
    ready: Option<raft::Ready>,
    compaction: Option<Write>,
    /// The map of a snapshot that came and may be installed in this round, with its bytes.
    expected: Option<(Bytes, Machine)>,
    /// A replica was added that the snapshot does not know; it could not start from it.
    snapshot_wanted: bool,
    /// Rises when other replicas vote or follow.
    pub(crate) configuration_number: u64,
    /// The membership is to be looked at.
    pub(crate) reconcile: bool,
    /// It was as it should be when it was looked at last.
    pub(crate) settled: bool,
    pub(crate) leader_since_tick: u64,
    ticks: u64,
    pub(crate) dirty: bool,
    pub(crate) wake: Wake,
    /// When something happened last.
    active_at: u64,
    /// As leader: what each other replica has been told is committed.
    told: BTreeMap<u64, u64>,
    /// To whom [`Self::tell_commit`] spoke in this round.
    pub(crate) telling: Vec<u64>,
    /// As leader: where its writes come from.
    pub(crate) submissions: Submissions,
}

impl Group {
    pub(crate) fn new(id: GroupId, log: GroupLog, settings: &Settings) -> Result<Self, String> {
        let machine = Machine::decode(
            &log.snapshot
                .as_ref()
                .map_or_else(Bytes::new, |snapshot| snapshot.data.clone()),
        )
        .map_err(|error| format!("the snapshot of group {id} is damaged: {error}"))?;
        let applied = log.snapshot_index();
        let config = raft::Config {
            id: settings.replica,
            election_tick: settings.election_ticks,
            heartbeat_tick: settings.heartbeat_ticks,
            applied,
            max_size_per_msg: 1024 * 1024,
            max_inflight_msgs: 256,
            check_quorum: true,
            pre_vote: true,
            batch_append: true,
            // See `tell_commit`.
            skip_bcast_commit: true,
            max_uncommitted_size: 32 * 1024 * 1024,
            ..raft::Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raw = RawNode::new(&config, log, &logger).map_err(|error| error.to_string())?;
        let last_stamp = machine.last_stamp;
        let role = (raw.raft.term, raw.raft.state);
        let mut group = Self {
            id,
            raw,
            machine: Arc::new(RwLock::new(machine)),
            proposals: BTreeMap::new(),
            reads: Reads::default(),
            last_stamp,
            role,
            backlog: Vec::new(),
            ready: None,
            compaction: None,
            expected: None,
            snapshot_wanted: false,
            configuration_number: 0,
            reconcile: true,
            settled: false,
            leader_since_tick: 0,
            ticks: 0,
            dirty: true,
            wake: Wake::Awake,
            active_at: 0,
            told: BTreeMap::new(),
            telling: Vec::new(),
            submissions: Submissions::default(),
        };
        group.fix_timeout(settings);
        Ok(group)
    }

    pub(crate) fn is_leader(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// Leader, and an entry of its own term is committed: its map is complete.
    pub(crate) fn leads(&self) -> bool {
        self.is_leader()
            && self.raw.raft.commit_to_current_term()
            && self.machine.read().applied >= self.raw.raft.raft_log.committed
    }

    pub(crate) fn leader(&self) -> Option<u64> {
        Some(self.raw.raft.leader_id).filter(|id| *id != 0)
    }

    pub(crate) fn voters(&self) -> BTreeSet<u64> {
        self.raw.raft.prs().conf().voters().ids().iter().collect()
    }

    pub(crate) fn learners(&self) -> BTreeSet<u64> {
        self.raw
            .raft
            .prs()
            .conf()
            .learners()
            .iter()
            .copied()
            .collect()
    }

    pub(crate) fn status(&self) -> GroupStatus {
        GroupStatus {
            group: self.id,
            leader: self.leader(),
            leads: self.leads(),
            term: self.raw.raft.term,
            voters: self.voters(),
            learners: self.learners(),
        }
    }

    pub(crate) fn detail(&self) -> GroupDetail {
        let raft = &self.raw.raft;
        let peers = raft.prs().iter().filter(|(id, _)| **id != raft.id);
        GroupDetail {
            status: self.status(),
            commit: raft.raft_log.committed,
            applied: self.machine.read().applied,
            last: raft.raft_log.last_index(),
            snapshot: self.raw.store().snapshot_index(),
            log_bytes: self.raw.store().bytes(),
            asleep: self.wake == Wake::Asleep,
            peers: if self.is_leader() {
                peers
                    .map(|(id, progress)| PeerProgress {
                        replica: *id,
                        matched: progress.matched,
                        active: self.is_active(progress),
                    })
                    .collect()
            } else {
                Vec::new()
            },
        }
    }

    /// Whether this replica only follows and has the whole log: its answers decide nothing.
    pub(crate) fn is_idle_follower(&self, id: u64) -> bool {
        let tracker = self.raw.raft.prs();
        tracker.conf().learners().contains(&id)
            && tracker
                .get(id)
                .is_some_and(|progress| progress.matched >= self.raw.raft.raft_log.last_index())
    }

    /// The library draws election timeouts from the thread's random numbers; ours come from a
    /// hash of who, where and when, so that a simulation repeats.
    fn fix_timeout(&mut self, settings: &Settings) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&settings.seed.to_le_bytes());
        hasher.update(&self.id.number().to_le_bytes());
        hasher.update(&self.raw.raft.term.to_le_bytes());
        hasher.update(&self.ticks.to_le_bytes());
        let spread = u64::from(hasher.finalize().as_bytes()[0]) % settings.election_ticks as u64;
        self.raw
            .raft
            .set_randomized_election_timeout(settings.election_ticks + spread as usize);
    }

    pub(crate) fn after_change(&mut self, settings: &Settings) {
        self.dirty = true;
        let role = (self.raw.raft.term, self.raw.raft.state);
        if role == self.role {
            return;
        }
        if role.1 != self.role.1 && role.1 == StateRole::Leader {
            self.leader_since_tick = self.ticks;
            self.reconcile = true;
            self.settled = false;
        }
        self.role = role;
        self.told.clear();
        self.submissions = Submissions::default();
        self.rouse();
        self.fix_timeout(settings);
        if role.1 != StateRole::Leader {
            let leader = self.leader();
            for waiter in std::mem::take(&mut self.proposals).into_values().flatten() {
                let _ = waiter.send(Outcome::NotLeader(leader));
            }
        }
    }

    /// `now`: the ticks of the node. All groups it leads send their heartbeats at the same ones, so
    /// that they share a frame.
    pub(crate) fn tick(&mut self, settings: &Settings, now: u64) {
        self.ticks = now;
        if self.wake == Wake::Asleep {
            return;
        }
        if self.raw.tick() {
            self.dirty = true;
        }
        let phase = (now % settings.heartbeat_ticks as u64) as usize;
        if self.is_leader() && self.raw.raft.heartbeat_elapsed() != phase && self.raw.tick() {
            self.dirty = true;
        }
        self.after_tick_reads();
        self.after_change(settings);
    }

    /// Something happens in the group.
    fn rouse(&mut self) {
        if self.wake == Wake::Asleep && self.is_leader() {
            // It counts who answers from now on.
            self.raw.raft.election_elapsed = 0;
        }
        self.wake = Wake::Awake;
        self.active_at = self.ticks;
    }

    /// Whether another replica has answered lately; while the group sleeps nobody is asked, and a
    /// node that fell silent would have woken it.
    fn is_active(&self, progress: &raft::Progress) -> bool {
        progress.recent_active || self.wake == Wake::Asleep
    }

    /// Its time runs again, as if it had run all along and `silence` ticks had passed since the
    /// leader was heard.
    pub(crate) fn awaken(&mut self, silence: usize) {
        if self.wake == Wake::Asleep {
            self.rouse();
            if !self.is_leader() {
                self.raw.raft.election_elapsed = silence;
            }
            self.dirty = true;
        }
    }

    /// The node that leads the group has been silent for `silence` ticks.
    pub(crate) fn startle(&mut self, silence: usize) {
        if self.wake == Wake::Asleep {
            self.awaken(silence);
            self.wake = Wake::Startled;
        }
    }

    /// The node that leads the group is heard again.
    pub(crate) fn calm(&mut self) {
        if self.wake == Wake::Startled && self.raw.raft.state == StateRole::Follower {
            self.raw.raft.election_elapsed = 0;
            self.wake = Wake::Asleep;
        }
    }

    /// As leader: lets the group fall silent when nothing happens in it, and says to whom that is
    /// to be told. Everybody has the whole log then, apart from members that are away; those are
    /// seen to when they come back. A voter that is silent and not known to be away keeps it awake.
    pub(crate) fn fall_silent(
        &mut self,
        is_away: impl Fn(u64) -> bool,
        is_silent: impl Fn(u64) -> bool,
    ) -> Option<Vec<(u64, Sleep)>> {
        let quiet = self.ticks.saturating_sub(self.active_at) >= QUIET_TICKS;
        if self.wake != Wake::Awake || !quiet || !self.settled || !self.leads() {
            return None;
        }
        let raft = &self.raw.raft;
        let busy = !self.proposals.is_empty()
            || !self.reads.is_empty()
            || !self.backlog.is_empty()
            || self.compaction.is_some()
            || raft.lead_transferee.is_some()
            || raft.has_pending_conf();
        let last = raft.raft_log.last_index();
        if busy || raft.raft_log.committed != last {
            return None;
        }
        let (own, voters) = (raft.id, self.voters());
        let mut there = 1;
        for id in voters.iter().filter(|id| **id != own && !is_away(**id)) {
            if is_silent(*id) {
                return None;
            }
            there += 1;
        }
        if there * 2 <= voters.len() {
            return None;
        }
        let sleep = Sleep {
            group: self.id,
            term: raft.term,
            last,
        };
        let mut told = Vec::new();
        for (id, progress) in raft.prs().iter().filter(|(id, _)| **id != own) {
            if progress.matched == last {
                told.push((*id, sleep));
            } else if !is_away(*id) {
                return None;
            }
        }
        self.wake = Wake::Asleep;
        Some(told)
    }

    /// Falls silent with its leader, when it has everything. The leader tells only replicas whose
    /// whole log it has confirmed in this term, and the whole of it is committed.
    pub(crate) fn follow_to_sleep(&mut self, sender: u64, sleep: &Sleep, settings: &Settings) {
        let raft = &self.raw.raft;
        let same = raft.state == StateRole::Follower
            && raft.leader_id == sender
            && raft.term == sleep.term
            && raft.raft_log.last_index() == sleep.last;
        if !same || !self.reads.is_empty() {
            return;
        }
        if raft.raft_log.committed < sleep.last {
            let mut heartbeat = pb::Message::default();
            heartbeat.set_msg_type(pb::MessageType::MsgHeartbeat);
            heartbeat.from = sender;
            heartbeat.to = raft.id;
            heartbeat.term = sleep.term;
            heartbeat.commit = sleep.last;
            if let Err(error) = self.raw.step(heartbeat) {
                tracing::debug!(group = %self.id, %error, "a group stays awake");
                return;
            }
            self.after_change(settings);
        }
        self.wake = Wake::Asleep;
    }

    /// Whether a replica of one of these members is not known to have the whole log.
    pub(crate) fn lacks(&self, members: &[u64]) -> bool {
        let raft = &self.raw.raft;
        let last = raft.raft_log.last_index();
        members
            .iter()
            .filter_map(|id| raft.prs().get(*id))
            .any(|progress| progress.matched < last)
    }

    /// Nobody is known to lead it.
    pub(crate) fn is_leaderless(&self) -> bool {
        self.leader().is_none()
    }

    /// Replicas of the group apart from this one.
    pub(crate) fn others(&self) -> Vec<u64> {
        let tracker = self.raw.raft.prs();
        let own = self.raw.raft.id;
        let all = tracker.iter().map(|(id, _)| *id);
        all.filter(|id| *id != own).collect()
    }

    /// As leader: heartbeats now.
    pub(crate) fn ping(&mut self) {
        self.rouse();
        self.raw.ping();
        self.dirty = true;
    }

    fn after_tick_reads(&mut self) {
        let ticks = self.ticks;
        for (_, readers) in &mut self.reads.confirmed {
            readers.retain(|reader| !reader.is_gone());
        }
        self.reads
            .confirmed
            .retain(|(_, readers)| !readers.is_empty());
        let late: Vec<Vec<u8>> = self
            .reads
            .asked
            .iter()
            .filter(|(_, (asked, _))| ticks.saturating_sub(*asked) >= READ_RETRY_TICKS)
            .map(|(context, _)| context.clone())
            .collect();
        for context in late {
            if let Some((_, waiters)) = self.reads.asked.remove(&context) {
                self.reads
                    .queued
                    .extend(waiters.into_iter().filter(|waiter| !waiter.is_gone()));
            }
        }
    }

    pub(crate) fn step(&mut self, message: Message, settings: &Settings) {
        if !self.is_only_heartbeat(&message) {
            self.rouse();
        }
        if let Err(error) = self.raw.step(message.into_raft()) {
            tracing::debug!(group = %self.id, %error, "a message was not taken");
        }
        self.after_change(settings);
    }

    /// Heartbeats of a group where nothing else happens, and their answers.
    fn is_only_heartbeat(&self, message: &Message) -> bool {
        let raft = &self.raw.raft;
        message.term == raft.term
            && match message.kind {
                MessageKind::Heartbeat => {
                    message.from == raft.leader_id && message.commit <= raft.raft_log.committed
                }
                MessageKind::HeartbeatResponse => true,
                _ => false,
            }
    }

    /// Returns the stamp, above `clock` and not before `now`, of what was proposed.
    pub(crate) fn propose(
        &mut self,
        command: Command,
        waiter: Waiter,
        now: Timestamp,
        clock: Revision,
    ) -> Option<Revision> {
        self.dirty = true;
        if let Some(answer) = self.machine.read().answer(command.request) {
            let _ = waiter.send(Outcome::Done(self.to_result(answer.clone())));
            return None;
        }
        if !self.is_leader() {
            let _ = waiter.send(Outcome::NotLeader(self.leader()));
            return None;
        }
        if let Some(waiters) = self.proposals.get_mut(&command.request) {
            waiters.push(waiter);
            return None;
        }
        let floor = if planted::has(Bug::StampsStartAnew) {
            Revision::NONE
        } else {
            let own = self.last_stamp.max(self.machine.read().last_stamp);
            own.max(clock)
        };
        let stamp = Revision::next(floor, now, self.id.number());
        let request = command.request;
        let data = match (LogEntry { stamp, command }).encode() {
            Ok(data) => data,
            Err(error) => {
                let _ = waiter.send(Outcome::Done(Err(ProposeError::Invalid(error.to_string()))));
                return None;
            }
        };
        self.rouse();
        match self.raw.propose(Vec::new(), data) {
            Ok(()) => {
                self.last_stamp = stamp;
                self.proposals.entry(request).or_default().push(waiter);
                Some(stamp)
            }
            // Dropped while leadership is handed over or too much is in flight: ask again.
            Err(_) => {
                let _ = waiter.send(Outcome::NotLeader(None));
                None
            }
        }
    }

    fn to_result(&self, answer: Answer) -> Result<Committed, ProposeError> {
        match answer {
            Answer::Committed(committed) => Ok(committed),
            Answer::Conflict { key, actual } => Err(ProposeError::Conflict { key, actual }),
            Answer::Full => Err(ProposeError::Full {
                group: self.id,
                limit: GROUP_BYTES_MAX,
            }),
        }
    }

    pub(crate) fn read(&mut self, waiter: oneshot::Sender<()>) {
        self.dirty = true;
        if planted::has(Bug::ReadWithoutQuorum) && self.leads() {
            let _ = waiter.send(());
            return;
        }
        self.ask(Reader::Read(waiter));
    }

    /// As leader, when the node's clock has just been set: tells the index of the log up to which
    /// all stamps are that the clock has passed, as soon as it is certain that no other leader will
    /// give one of them. A majority has seen the clock then, and whoever is elected hears of it
    /// from one of them. The commit index would not do: what is not committed yet has its stamp.
    pub(crate) fn close(&mut self, reply: oneshot::Sender<u64>) {
        self.dirty = true;
        let raft = &self.raw.raft;
        let log = &raft.raft_log;
        let last = if planted::has(Bug::ClosedAtCommit) {
            log.committed
        } else {
            log.last_index()
        };
        let term = raft.term;
        if self.is_leader() {
            self.ask(Reader::Close { term, last, reply });
        }
    }

    /// Answers when the log is applied up to `index`.
    pub(crate) fn await_applied(&mut self, index: u64, waiter: oneshot::Sender<()>) {
        self.dirty = true;
        if self.reads.waiting() < READS_MAX {
            self.reads
                .confirmed
                .push((index, vec![Reader::Read(waiter)]));
        }
    }

    fn ask(&mut self, reader: Reader) {
        if self.reads.waiting() < READS_MAX {
            // A sleeping leader answers heartbeats only while it sends them; a follower's time
            // must run for the read to be asked again.
            self.awaken(0);
            self.active_at = self.ticks;
            self.reads.queued.push(reader);
        }
    }

    /// To be called when the changes that [`Self::complete`] made were told to those who watch.
    pub(crate) fn answer_reads(&mut self) {
        let term = self.raw.raft.term;
        for reader in self.reads.done.drain(..) {
            reader.answer(term);
        }
    }

    /// Asks for all queued reads at once, under a context that was never used before.
    fn ask_reads(&mut self, settings: &Settings, counter: &mut u64) {
        if self.reads.queued.is_empty() {
            return;
        }
        let can_ask = if self.is_leader() {
            self.raw.raft.commit_to_current_term()
        } else {
            self.leader().is_some()
        };
        if !can_ask {
            self.reads.queued.retain(|reader| !reader.is_gone());
            return;
        }
        if !planted::has(Bug::ReusedReadContext) {
            *counter += 1;
        }
        let mut context = settings.boot_nonce.to_le_bytes().to_vec();
        context.extend_from_slice(&counter.to_le_bytes());
        let waiters = std::mem::take(&mut self.reads.queued);
        let asked = self.reads.asked.entry(context.clone());
        asked.or_insert((self.ticks, Vec::new())).1.extend(waiters);
        self.raw.read_index(context);
    }

    /// First half of a round: what to send at once, what to write.
    pub(crate) fn collect(
        &mut self,
        settings: &Settings,
        counter: &mut u64,
        out: &mut Vec<Message>,
    ) -> Option<Write> {
        self.dirty = false;
        self.ask_reads(settings, counter);
        let mut write = self.compaction.take();
        if !self.raw.has_ready() {
            if write.is_none() && !has_configuration_change(&self.backlog) {
                return None;
            }
            let mut write = write.unwrap_or_else(|| self.empty_write());
            write.change.hard_state = self.raw.store().hard_state;
            return Some(write);
        }
        let mut ready = self.raw.ready();
        self.note_told(ready.messages());
        send(ready.take_messages(), out);
        let mut must_write = has_configuration_change(&self.backlog)
            || has_configuration_change(ready.committed_entries())
            || ready.must_sync();
        if planted::has(Bug::TermNotWritten) && ready.entries().is_empty() {
            must_write = false;
        }
        if let Some(state) = ready.hs() {
            self.raw.mut_store().hard_state = HardState {
                term: state.term,
                vote: state.vote,
                commit: state.commit,
            };
        }
        let mut truncate_from = None;
        let mut snapshot = None;
        if !ready.snapshot().is_empty() {
            let installed = Snapshot::from_raft(ready.snapshot());
            self.raw.mut_store().install(installed.clone());
            truncate_from = Some(0);
            snapshot = Some(installed);
            must_write = true;
        }
        let entries = ready.take_entries();
        if let Some(first) = entries.first() {
            if snapshot.is_none() && first.index <= self.raw.store().last() {
                truncate_from =
                    Some(first.index).filter(|_| !planted::has(Bug::TruncationNotWritten));
            }
            must_write = true;
        }
        let records = entries.iter().map(Entry::from_raft).collect();
        self.raw.mut_store().append(entries);
        self.ready = Some(ready);
        if !must_write && write.is_none() {
            return None;
        }
        let mut write = write.take().unwrap_or_else(|| self.empty_write());
        if snapshot.is_some() {
            write.snapshot = snapshot;
        }
        write.change = LogChange {
            group: self.id,
            truncate_from,
            entries: records,
            hard_state: self.raw.store().hard_state,
            start: self.raw.store().start(),
        };
        if planted::has(Bug::VoteNotWritten) {
            write.change.hard_state.vote = 0;
        }
        Some(write)
    }

    fn empty_write(&self) -> Write {
        Write {
            change: LogChange {
                group: self.id,
                truncate_from: None,
                entries: Vec::new(),
                hard_state: self.raw.store().hard_state,
                start: self.raw.store().start(),
            },
            snapshot: None,
        }
    }

    /// All entries once more, for a log whose old part is to go. Between rounds only.
    pub(crate) fn written_again(&self) -> Write {
        let mut write = self.empty_write();
        write.change.entries = self.raw.store().entries().map(Entry::from_raft).collect();
        write
    }

    /// Second half of a round, after the write is on disk: what was promised may be sent, what is
    /// committed is applied.
    pub(crate) fn complete(
        &mut self,
        settings: &Settings,
        out: &mut Vec<Message>,
        batches: &mut VecDeque<Batch>,
    ) {
        let mut committed = std::mem::take(&mut self.backlog);
        let mut installed = None;
        if let Some(mut ready) = self.ready.take() {
            send(ready.take_persisted_messages(), out);
            if !ready.snapshot().is_empty() {
                Counters::add(&settings.counters.snapshots_installed, 1);
                self.install(ready.snapshot(), batches);
                installed = Some(ready.snapshot().get_metadata().index);
                committed.clear();
            }
            for state in ready.take_read_states() {
                if let Some((_, waiters)) = self.reads.asked.remove(&state.request_ctx) {
                    self.reads.confirmed.push((state.index, waiters));
                }
            }
            committed.extend(ready.take_committed_entries());
            let mut light = self.raw.advance_append(ready);
            self.note_told(light.messages());
            send(light.take_messages(), out);
            if let Some(commit) = light.commit_index() {
                self.raw.mut_store().hard_state.commit = commit;
            }
            self.backlog = light.take_committed_entries();
            self.dirty = true;
        }
        self.expected = None;
        self.tell_commit(out);
        let last = committed.last().map(|entry| entry.index).or(installed);
        Counters::add(&settings.counters.applied, committed.len() as u64);
        for entry in committed {
            self.apply(entry, batches);
        }
        if let Some(last) = last {
            self.raw.advance_apply_to(last);
            self.after_change(settings);
        }
        self.snapshot_wanted |= self.raw.store().take_snapshot_asked();
        if last.is_some() || self.snapshot_wanted {
            self.compact(settings);
        }
        let applied = self.machine.read().applied;
        let (done, waiting) = std::mem::take(&mut self.reads.confirmed)
            .into_iter()
            .partition(|(index, _)| *index <= applied || planted::has(Bug::ReadBeforeApplied));
        self.reads.confirmed = waiting;
        let done: Vec<(u64, Vec<Reader>)> = done;
        let done = done.into_iter().flat_map(|(_, readers)| readers);
        self.reads.done.extend(done);
    }

    fn note_told(&mut self, messages: &[pb::Message]) {
        for message in messages {
            if message.get_msg_type() == pb::MessageType::MsgAppend {
                let reaches = message.index + message.entries.len() as u64;
                let told = self.told.entry(message.to).or_default();
                *told = message.commit.min(reaches).max(*told);
            }
        }
    }

    /// As leader: tells the others what is committed, unless the next entries will. The library
    /// would send an empty append instead, and each is answered at once; the answer to a heartbeat
    /// waits for a frame that goes anyway. One that is lost is made good by the next heartbeat.
    fn tell_commit(&mut self, out: &mut Vec<Message>) {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader || raft.raft_log.committed < raft.raft_log.last_index() {
            return;
        }
        let committed = raft.raft_log.committed;
        for (id, progress) in raft.prs().iter().filter(|(id, _)| **id != raft.id) {
            let known = progress.matched.min(committed);
            let told = self.told.entry(*id).or_default();
            if known <= *told {
                continue;
            }
            *told = known;
            let mut message = pb::Message::default();
            message.set_msg_type(pb::MessageType::MsgHeartbeat);
            message.from = raft.id;
            message.to = *id;
            message.term = raft.term;
            message.commit = known;
            out.extend(Message::from_raft(&message));
            self.telling.push(*id);
        }
    }

    /// The gate has read the map of a snapshot that comes with the next message.
    pub(crate) fn expect_map(&mut self, message: &Message, map: Machine) {
        let snapshot = message.snapshot.as_ref();
        self.expected = snapshot.map(|snapshot| (snapshot.data.clone(), map));
    }

    pub(crate) fn busy(&self) -> bool {
        self.dirty
            && (self.raw.has_ready() || !self.backlog.is_empty() || self.compaction.is_some())
    }

    fn install(&mut self, snapshot: &pb::Snapshot, batches: &mut VecDeque<Batch>) {
        self.configuration_number += 1;
        let same = |known: &Bytes| {
            (known.as_ptr(), known.len()) == (snapshot.data.as_ptr(), snapshot.data.len())
        };
        let decoded = match self.expected.take() {
            Some((data, machine)) if same(&data) => Ok(machine),
            _ => Machine::decode(&snapshot.data),
        };
        match decoded {
            Ok(mut machine) => {
                machine.applied = snapshot.get_metadata().index;
                let revision = machine.last_stamp;
                *self.machine.write() = machine;
                batches.push_back(Batch {
                    group: self.id,
                    revision,
                    reset: true,
                    changes: Vec::new(),
                });
            }
            // The gate decoded it before it was taken.
            Err(error) => error!(group = %self.id, %error, "a snapshot could not be installed"),
        }
    }

    fn apply(&mut self, entry: pb::Entry, batches: &mut VecDeque<Batch>) {
        if entry.get_entry_type() != pb::EntryType::EntryNormal {
            self.apply_configuration(&entry);
            self.machine.write().skip(entry.index);
            return;
        }
        if entry.data.is_empty() {
            self.machine.write().skip(entry.index);
            return;
        }
        let decoded = match LogEntry::decode(&entry.data) {
            Ok(decoded) => decoded,
            Err(error) => {
                // Every replica reads the same bytes, so every replica skips it.
                error!(group = %self.id, index = entry.index, %error, "a log entry is not readable and has no effect");
                self.machine.write().skip(entry.index);
                return;
            }
        };
        let request = decoded.command.request;
        let (answer, changes, revision) = {
            let mut machine = self.machine.write();
            let (answer, changes) = machine.apply(entry.term, entry.index, decoded);
            (answer, changes, machine.last_stamp)
        };
        if !changes.is_empty() {
            batches.push_back(Batch {
                group: self.id,
                revision,
                reset: false,
                changes,
            });
        }
        if let Some(waiters) = self.proposals.remove(&request) {
            let result = self.to_result(answer);
            for waiter in waiters {
                let _ = waiter.send(Outcome::Done(result.clone()));
            }
        }
    }

    fn apply_configuration(&mut self, entry: &pb::Entry) {
        self.reconcile = true;
        self.settled = false;
        self.configuration_number += 1;
        if entry.context.is_empty() && entry.data.is_empty() {
            // The library's own: the joint configuration is left.
            if let Err(error) = self.raw.apply_conf_change(&pb::ConfChangeV2::default()) {
                error!(group = %self.id, index = entry.index, %error, "a joint configuration could not be left");
            }
            return;
        }
        let change: ConfigurationChange = match krake_model::codec::decode(
            CHANGE_VERSION,
            &entry.context,
            CHANGE_BYTES_MAX,
        ) {
            Ok(change) => change,
            Err(error) => {
                error!(group = %self.id, index = entry.index, %error, "a membership change is not readable and has no effect");
                return;
            }
        };
        for one in change.to_raft() {
            if let Err(error) = self.raw.apply_conf_change(&one) {
                warn!(group = %self.id, ?change, %error, "a membership change had no effect");
            }
        }
    }

    /// Two sets of voters decide together until the change from one to the other is done.
    fn is_joint(&self) -> bool {
        let state = self.raw.raft.prs().conf().to_conf_state();
        !state.voters_outgoing.is_empty()
    }

    fn configuration(&self) -> Configuration {
        Configuration::from_raft(&self.raw.raft.prs().conf().to_conf_state())
    }

    /// Whether the log, with `since` applied entries after the snapshot, is to be replaced by a new
    /// one. Where the map is larger than a log may be, only by one of its own size: what is written
    /// for snapshots is then never more than for entries.
    fn is_long(&self, since: u64, settings: &Settings) -> bool {
        // A replica that a snapshot is on its way to needs the entries after it.
        let mut others = self.raw.raft.prs().iter();
        let awaited = others.any(|(_, progress)| progress.state == ProgressState::Snapshot);
        let patience = if awaited { 2 } else { 1 };
        let (log, map) = (self.raw.store(), self.machine.read().bytes() as usize);
        if map > settings.compact_bytes {
            return log.bytes_since() + since as usize * ENTRY_BYTES > map * patience;
        }
        let (entries, bytes) = (
            settings.compact_entries * patience as u64,
            settings.compact_bytes * patience,
        );
        since >= entries || (log.bytes() > bytes && since > ENTRIES_BETWEEN)
    }

    fn compact(&mut self, settings: &Settings) {
        let mut applied = self.machine.read().applied;
        let log = self.raw.store();
        if planted::has(Bug::SnapshotAheadOfItself) {
            applied = log.last().min(applied + 1);
        }
        // A snapshot has one set of voters.
        if self.is_joint() {
            return;
        }
        let since = applied.saturating_sub(log.snapshot_index());
        if !(self.is_long(since, settings) || std::mem::take(&mut self.snapshot_wanted)) {
            return;
        }
        let (Ok(term), Ok(data)) = (
            raft::Storage::term(log, applied),
            self.machine.read().encode(),
        ) else {
            error!(group = %self.id, "no snapshot could be made; the log stays longer");
            return;
        };
        let snapshot = Snapshot {
            index: applied,
            term,
            configuration: self.configuration(),
            data: data.into(),
        };
        let kept = settings.kept_entries;
        let log = self.raw.mut_store();
        log.compact(snapshot.clone(), kept, GROUP_BYTES_MAX);
        let mut write = self.empty_write();
        write.snapshot = Some(snapshot);
        self.compaction = Some(write);
        self.dirty = true;
    }

    /// Moves the group's membership one step towards what it should be.
    pub(crate) fn reconcile(&mut self, members: &BTreeMap<u64, MemberInfo>, settings: &Settings) {
        let own = settings.replica;
        self.reconcile = false;
        self.settled = false;
        if !self.leads() || members.is_empty() || self.raw.raft.has_pending_conf() {
            return;
        }
        if self.is_joint() {
            // The library does this when it applies the change, but not for a leader that has
            // applied it before it was elected.
            if let Err(error) = self
                .raw
                .propose_conf_change(Vec::new(), pb::ConfChangeV2::default())
            {
                tracing::debug!(group = %self.id, %error, "a joint configuration is not left yet");
            }
            self.dirty = true;
            return;
        }
        let (voters, learners) = (self.voters(), self.learners());
        let desired = voters::desired_voters(self.id, members, &voters);
        self.settled = voters == desired
            && members.len() == voters.len() + learners.len()
            && learners.iter().all(|id| members.contains_key(id));
        if self.settled {
            return;
        }
        let last = self.raw.raft.raft_log.last_index();
        let caught_up: BTreeSet<u64> = learners
            .iter()
            .filter(|id| {
                self.raw.raft.prs().get(**id).is_some_and(|progress| {
                    progress.matched > 0 && progress.matched + settings.kept_entries >= last
                })
            })
            .copied()
            .collect();
        let step = voters::next_step(members, &voters, &learners, &desired, &caught_up, own);
        let change = match step {
            None => return,
            Some(Step::AddLearners(ids)) => ConfigurationChange::AddLearners(ids),
            Some(Step::Promote(id)) => ConfigurationChange::AddVoter(id),
            Some(Step::Demote(id) | Step::Remove(id) | Step::Replace { old: id, .. })
                if id == own =>
            {
                if let Some(next) = desired.iter().find(|id| **id != own && voters.contains(id)) {
                    self.rouse();
                    self.raw.transfer_leader(*next);
                }
                return;
            }
            Some(Step::Replace { by, old }) => ConfigurationChange::Replace(by, old),
            Some(Step::Demote(id)) => ConfigurationChange::AddLearners(vec![id]),
            Some(Step::Remove(id)) => ConfigurationChange::Remove(id),
        };
        let Ok(context) = krake_model::codec::encode(CHANGE_VERSION, &change) else {
            return;
        };
        // What it changes is read from the context; the library wants to see one change.
        let Some(first) = change.to_raft().into_iter().next() else {
            return;
        };
        self.rouse();
        if let Err(error) = self.raw.propose_conf_change(context, first) {
            tracing::debug!(group = %self.id, ?change, %error, "a membership change waits");
        }
        self.dirty = true;
    }

    /// Hands leadership to the voter `to`, as an operator wishes: one that is a little behind gets
    /// what it lacks first (Ongaro 2014, §3.10). See [`crate::core::Core::transfer`].
    pub(crate) fn transfer_to(&mut self, to: u64, own: u64) -> Result<bool, Option<TransferError>> {
        if !self.is_leader() {
            return Err(None);
        }
        if to == own {
            return Ok(false);
        }
        let group = self.id;
        if !self.voters().contains(&to) {
            return Err(Some(TransferError::NotVoter { group, to }));
        }
        let progress = self.raw.raft.prs().get(to);
        if !progress.is_some_and(|progress| self.is_active(progress)) {
            return Err(Some(TransferError::Silent { group, to }));
        }
        self.rouse();
        self.raw.transfer_leader(to);
        self.dirty = true;
        Ok(true)
    }

    /// Hands leadership to a voter that has the whole log; `false` when there is none.
    pub(crate) fn transfer(&mut self, to: Option<u64>, own: u64) -> bool {
        if !self.is_leader() {
            return false;
        }
        let last = self.raw.raft.raft_log.last_index();
        let ready =
            |id: &u64| {
                *id != own
                    && self.raw.raft.prs().get(*id).is_some_and(|progress| {
                        self.is_active(progress) && progress.matched >= last
                    })
            };
        let target = match to {
            Some(id) => Some(id).filter(|id| ready(id) && self.voters().contains(id)),
            None => self.voters().into_iter().find(ready),
        };
        let Some(target) = target else {
            return false;
        };
        self.rouse();
        self.raw.transfer_leader(target);
        self.dirty = true;
        true
    }
}

fn has_configuration_change(entries: &[pb::Entry]) -> bool {
    entries
        .iter()
        .any(|entry| entry.get_entry_type() != pb::EntryType::EntryNormal)
}

fn send(messages: impl IntoIterator<Item = pb::Message>, out: &mut Vec<Message>) {
    out.extend(messages.into_iter().filter_map(|m| Message::from_raft(&m)));
}
