//! One replica of one group: the library's state machine, our map, and who waits for what.

mod compaction;
mod membership;
mod reads;
mod rounds;
mod silence;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use parking_lot::RwLock;
use raft::eraftpb as pb;
use raft::{RawNode, StateRole};
use tokio::sync::oneshot;
use tracing::debug;

use self::reads::Reads;
use self::silence::Wake;
use crate::command::{Command, Committed, ProposeError, RequestId};
use crate::core::{GroupStatus, Settings};
use crate::disk::Write;
use crate::home::Submissions;
use crate::inspect::{GroupDetail, PeerProgress};
use crate::log::GroupLog;
use crate::machine::{Answer, GROUP_BYTES_MAX, LogEntry, Machine};
use crate::planted::{self, Bug};
use crate::wire::Message;

/// Answers to a proposal from the engine.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done(Result<Committed, ProposeError>),
    NotLeader(Option<u64>),
}

type Waiter = oneshot::Sender<Outcome>;

/// What is to be told when it changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shown {
    term: u64,
    leader: Option<u64>,
    leads: bool,
    configuration_number: u64,
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
    /// Committed, to be applied.
    backlog: Vec<pb::Entry>,
    /// Up to where this round applied, which the library learns at its end.
    applied_to: Option<u64>,
    ready: Option<raft::Ready>,
    compaction: Option<Write>,
    /// The map of a snapshot that came and may be installed in this round, with its bytes.
    expected: Option<(Bytes, Machine)>,
    /// A replica was added that the snapshot does not know; it could not start from it.
    snapshot_wanted: bool,
    /// What its status shows.
    shown: Option<Shown>,
    /// Rises when other replicas vote or follow.
    pub(crate) configuration_number: u64,
    /// The membership is to be looked at.
    pub(crate) reconcile: bool,
    /// It was as it should be when it was looked at last.
    pub(crate) settled: bool,
    pub(crate) leader_since_tick: u64,
    ticks: u64,
    pub(crate) dirty: bool,
    wake: Wake,
    /// When something happened last.
    active_at: u64,
    /// As leader: what each other replica has been told is committed.
    told: BTreeMap<u64, u64>,
    /// Who does not know yet all that this round showed to be committed, and whether it waits for
    /// it.
    pub(crate) untold: Vec<(u64, bool)>,
    /// As leader: other replicas at whose nodes something was proposed that they do not know to be
    /// committed.
    askers: BTreeSet<u64>,
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
            // See `note_untold`.
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
            applied_to: None,
            ready: None,
            compaction: None,
            expected: None,
            snapshot_wanted: false,
            shown: None,
            configuration_number: 0,
            reconcile: true,
            settled: false,
            leader_since_tick: 0,
            ticks: 0,
            dirty: true,
            wake: Wake::Awake,
            active_at: 0,
            told: BTreeMap::new(),
            untold: Vec::new(),
            askers: BTreeSet::new(),
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

    fn shows(&self) -> Shown {
        Shown {
            term: self.raw.raft.term,
            leader: self.leader(),
            leads: self.leads(),
            configuration_number: self.configuration_number,
        }
    }

    /// Whether its status shows something else than it did when it was told last.
    pub(crate) fn has_news(&self) -> bool {
        self.shown != Some(self.shows())
    }

    /// Its status, to be told.
    pub(crate) fn tell_status(&mut self) -> GroupStatus {
        self.shown = Some(self.shows());
        self.status()
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
        self.askers.clear();
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

    pub(crate) fn step(&mut self, message: Message, settings: &Settings) {
        if !self.is_only_heartbeat(&message) {
            self.rouse();
        }
        if let Err(error) = self.raw.step(message.into_raft()) {
            debug!(group = %self.id, %error, "a message was not taken");
        }
        self.after_change(settings);
    }

    /// Returns the stamp, above `clock` and not before `now`, of what was proposed at the node of
    /// replica `asker`.
    pub(crate) fn propose(
        &mut self,
        command: Command,
        asker: u64,
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
                if asker != self.raw.raft.id {
                    self.askers.insert(asker);
                }
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
}
