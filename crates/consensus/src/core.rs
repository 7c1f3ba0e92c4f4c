//! All groups of one node as one step machine: inputs and time in, messages and writes out. No
//! thread, clock, file or socket here.

mod frames;
mod leaders;
mod peers;
mod pieces;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use krake_model::ids::{GroupId, NodeId};
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use tokio::sync::oneshot;
use tracing::{debug, error, warn};

use self::leaders::FADE_TICKS;
use self::peers::Peer;
use crate::command::Command;
use crate::disk::{Change as LogChange, Write};
use crate::gate;
use crate::group::{Group, Outcome};
use crate::inspect::{Counters, GroupDetail};
use crate::log::{GroupLog, HardState};
use crate::machine::Change;
use crate::snapshots::Snapshots;
use crate::voters::MemberInfo;
use crate::wire::{
    Configuration, FRAME_MESSAGES_MAX, Frame, Message, MessageKind, Sleep, Snapshot,
};

/// Ticks between two looks at the groups' memberships.
const RECONCILE_TICKS: u64 = 5;
/// Ticks between two looks at how leaders spread over the nodes.
const BALANCE_TICKS: u64 = 20;
/// Heartbeats that a node sends to replicas that only follow, in all groups, at most: so many a
/// heartbeat interval. The more there are, the less often each hears from its leader while nothing
/// is written.
const FOLLOWERS_PER_INTERVAL: u64 = 8;
/// Followers hear from their leader every so many heartbeat intervals, however few they are.
const FOLLOWER_INTERVALS: u64 = 3;

/// What the core is told once.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) replica: u64,
    pub(crate) election_ticks: usize,
    pub(crate) heartbeat_ticks: usize,
    pub(crate) boot_nonce: u64,
    pub(crate) seed: u64,
    /// Entries of a group after its snapshot that call for the next one, from the least to the most,
    pub(crate) compact_entries: (u64, u64),
    /// and as many in between as all groups together have no more than this.
    pub(crate) compact_entries_together: u64,
    pub(crate) compact_bytes: usize,
    /// Entries kept before a snapshot, for replicas that are a little behind.
    pub(crate) kept_entries: u64,
    /// A snapshot with more data travels in pieces of so many bytes.
    pub(crate) piece_bytes: usize,
    pub(crate) counters: Arc<Counters>,
}

impl Settings {
    /// After how many entries a group's log is to be replaced by a snapshot, where there are so many
    /// groups.
    pub(crate) fn compact_after(&self, groups: usize) -> u64 {
        let (least, most) = self.compact_entries;
        (self.compact_entries_together / groups.max(1) as u64).clamp(least, most)
    }
}

/// Changes of one group, in commit order. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Which group.
    pub group: GroupId,
    /// The group's newest stamp after the batch.
    pub revision: Revision,
    /// A snapshot replaced the whole map: read it anew. `changes` is empty then.
    pub reset: bool,
    /// What changed, all by one command; nothing, when it only checked.
    pub changes: Arc<[Change]>,
}

impl Batch {
    /// Whether something under `prefix` may have changed.
    pub fn touches(&self, prefix: &str) -> bool {
        self.reset || self.changes.iter().any(|one| one.key.starts_with(prefix))
    }
}

/// One group as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupStatus {
    /// Which group.
    pub group: GroupId,
    /// The leader's replica id, when known.
    pub leader: Option<u64>,
    /// Whether this node leads it and its map is complete.
    pub leads: bool,
    /// Current Raft term.
    pub term: u64,
    /// Replicas that vote.
    pub voters: BTreeSet<u64>,
    /// Replicas that only follow.
    pub learners: BTreeSet<u64>,
}

/// Where a command was proposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin {
    /// The replica of that node.
    pub(crate) replica: u64,
    /// Somebody outside submitted it there.
    pub(crate) submitted: bool,
}

/// What one round asks the host to do, in this order: send `first`, write `writes`, then call
/// [`Core::complete`].
#[derive(Debug, Default)]
pub(crate) struct Round {
    pub(crate) first: Vec<(NodeId, Frame)>,
    pub(crate) writes: Vec<Write>,
}

/// The groups.
pub(crate) struct Core {
    pub(crate) settings: Settings,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    members: BTreeMap<u64, MemberInfo>,
    replicas: BTreeMap<NodeId, u64>,
    failed: BTreeSet<GroupId>,
    /// Groups that may have something to do.
    active: BTreeSet<GroupId>,
    /// Groups of the round between its halves.
    working: Vec<GroupId>,
    /// Groups of the round before, whose reads are to be answered.
    answering: Vec<GroupId>,
    /// Groups whose status changed since it was told.
    touched: BTreeSet<GroupId>,
    /// Nodes that this one votes with: both hear of each other every heartbeat interval.
    peers: BTreeMap<u64, Peer>,
    /// Configurations changed since the peers were found.
    peers_stale: bool,
    /// This node gives away what it leads.
    reluctant: bool,
    /// What goes out with the next frames.
    sleeping: BTreeMap<u64, Vec<Sleep>>,
    /// Replicas that look for the leader of a group that is led here: they are not spared a
    /// heartbeat.
    asked_for: BTreeSet<(u64, GroupId)>,
    /// Answers to heartbeats that wait for a frame to the same replica, at most until this node's
    /// own heartbeats: an idle pair of nodes then exchanges two frames an interval, not four.
    answers: BTreeMap<u64, BTreeMap<GroupId, Message>>,
    /// Who is to be told of which groups what is committed. It goes with the next frame to that
    /// replica, or when the host thinks that it has waited long enough.
    untold: BTreeMap<u64, BTreeSet<GroupId>>,
    /// Of these, who is to be told at once.
    hasty: BTreeSet<u64>,
    /// All of them are.
    tell_due: bool,
    /// What the last round let go, until somebody asks for it or the next one has something, too.
    held: Vec<(GroupId, Message)>,
    /// Large snapshots on their way.
    snapshots: Snapshots,
    pulse_due: bool,
    followers_due: bool,
    counter: u64,
    ticks: u64,
    /// The highest stamp that this node has seen, given, or promised to be above: the logical part
    /// of a hybrid clock (Kulkarni et al. 2014). Every frame carries it; a group that is led here
    /// gives no stamp up to it any more.
    clock: Revision,
}

impl Core {
    /// `clock`: no lower than [`Self::clock`] was when this node sent something last.
    pub(crate) fn new(
        settings: Settings,
        logs: Vec<(GroupId, GroupLog)>,
        clock: Revision,
    ) -> Result<Self, String> {
        let mut groups = BTreeMap::new();
        for (id, log) in logs {
            groups.insert(id, Group::new(id, log, &settings)?);
        }
        let stamps = groups.values().map(|group| group.machine.read().last_stamp);
        let clock = stamps.fold(clock, Revision::max);
        let active = groups.keys().copied().collect();
        let snapshots = Snapshots::new(settings.piece_bytes, settings.heartbeat_ticks);
        Ok(Self {
            settings,
            groups,
            members: BTreeMap::new(),
            replicas: BTreeMap::new(),
            failed: BTreeSet::new(),
            active,
            working: Vec::new(),
            answering: Vec::new(),
            touched: BTreeSet::new(),
            peers: BTreeMap::new(),
            peers_stale: true,
            reluctant: false,
            sleeping: BTreeMap::new(),
            asked_for: BTreeSet::new(),
            answers: BTreeMap::new(),
            untold: BTreeMap::new(),
            hasty: BTreeSet::new(),
            tell_due: false,
            held: Vec::new(),
            snapshots,
            pulse_due: false,
            followers_due: false,
            counter: 0,
            ticks: 0,
            clock,
        })
    }

    /// Makes a new group whose only voter is this replica. Its log starts behind a snapshot of
    /// the empty map, so that every other replica begins with a snapshot.
    pub(crate) fn bootstrap(&mut self, id: GroupId) -> Result<Write, String> {
        let snapshot = Snapshot {
            index: 1,
            term: 1,
            configuration: Configuration {
                voters: vec![self.settings.replica],
                learners: Vec::new(),
            },
            data: bytes::Bytes::new(),
        };
        let hard_state = HardState {
            term: 1,
            vote: 0,
            commit: 1,
        };
        let log = GroupLog::new(hard_state, Some(snapshot.clone()), (1, 1), Vec::new());
        let mut group = Group::new(id, log, &self.settings)?;
        // Alone, it need not wait for an election timeout.
        if let Err(error) = group.raw.campaign() {
            debug!(group = %id, %error, "no campaign at bootstrap");
        }
        group.after_change(&self.settings);
        self.groups.insert(id, group);
        self.active.insert(id);
        self.peers_stale = true;
        Ok(Write {
            change: LogChange {
                group: id,
                truncate_from: None,
                entries: Vec::new(),
                hard_state,
                start: (1, 1),
            },
            snapshot: Some(snapshot),
        })
    }

    pub(crate) fn set_members(&mut self, members: Vec<MemberInfo>) {
        self.replicas = members.iter().map(|m| (m.node, m.replica)).collect();
        let members: BTreeMap<u64, MemberInfo> =
            members.into_iter().map(|m| (m.replica, m)).collect();
        if members == self.members {
            return;
        }
        self.answers.retain(|id, _| members.contains_key(id));
        let alive = |known: &BTreeMap<u64, MemberInfo>, id| {
            known.get(&id).is_some_and(|member| member.alive)
        };
        let back: Vec<u64> = members
            .keys()
            .copied()
            .filter(|id| alive(&members, *id) && !alive(&self.members, *id))
            .collect();
        self.members = members;
        for group in self.groups.values_mut() {
            group.settled = false;
            // It may lack what was written while it was away.
            if group.is_leader() && group.lacks(&back) {
                group.awaken(0);
            }
        }
        self.reconcile();
    }

    pub(crate) fn node_of(&self, replica: u64) -> Option<NodeId> {
        self.members.get(&replica).map(|member| member.node)
    }

    pub(crate) fn tick(&mut self) {
        self.ticks += 1;
        let ticks = self.ticks;
        let interval = self.settings.heartbeat_ticks as u64;
        self.pulse_due |= ticks.is_multiple_of(interval);
        let members = self.members.len() as u64;
        let intervals = FOLLOWER_INTERVALS.max(members / FOLLOWERS_PER_INTERVAL);
        self.followers_due = ticks.is_multiple_of(interval * intervals);
        self.watch_peers();
        self.each(None, |group, settings| group.tick(settings, ticks));
        if ticks.is_multiple_of(RECONCILE_TICKS) {
            self.tidy_snapshots();
            for group in self.groups.values_mut() {
                group.reconcile |= group.is_leader() && !group.settled;
            }
        }
        let awake = self.groups.iter().filter(|(_, group)| group.dirty);
        self.active.extend(awake.map(|(id, _)| *id));
        if self.pulse_due {
            self.put_to_sleep();
        }
        let often = if self.reluctant {
            RECONCILE_TICKS
        } else {
            BALANCE_TICKS
        };
        if ticks.is_multiple_of(often) {
            self.balance();
        }
        if ticks.is_multiple_of(FADE_TICKS) {
            for group in self.groups.values_mut() {
                group.submissions.fade();
            }
        }
    }

    /// Runs `work` on these groups, or on every one; one that panics is put aside, the others go
    /// on.
    fn each(&mut self, ids: Option<Vec<GroupId>>, mut work: impl FnMut(&mut Group, &Settings)) {
        let mut broken = Vec::new();
        let settings = &self.settings;
        let mut one = |id: GroupId, group: &mut Group| {
            if catch_unwind(AssertUnwindSafe(|| work(group, settings))).is_err() {
                broken.push(id);
            }
        };
        match ids {
            None => self
                .groups
                .iter_mut()
                .for_each(|(id, group)| one(*id, group)),
            Some(ids) => {
                for id in ids {
                    if let Some(group) = self.groups.get_mut(&id) {
                        one(id, group);
                    }
                }
            }
        }
        self.set_aside(&broken);
    }

    fn set_aside(&mut self, broken: &[GroupId]) {
        for id in broken {
            error!(group = %id, "the replica of this group failed and takes no part until the node restarts; please report this");
            self.groups.remove(id);
            self.failed.insert(*id);
        }
    }

    /// Takes a frame from an authenticated peer.
    pub(crate) fn receive(&mut self, from: NodeId, frame: Frame) {
        let Some(sender) = self.replicas.get(&from).copied() else {
            debug!(%from, "a frame from a node that is no member was dropped");
            return;
        };
        if frame.from != sender
            || frame.to != self.settings.replica
            || frame.messages.len() > FRAME_MESSAGES_MAX
        {
            warn!(%from, "a frame with a wrong address was dropped");
            return;
        }
        self.clock = self.clock.max(frame.clock);
        self.hear(sender, frame.pulse);
        for (id, message) in frame.messages {
            self.receive_one(sender, id, message);
        }
        self.receive_pieces(sender, frame.pieces, frame.received);
        for sleep in frame.sleeping.iter().take(FRAME_MESSAGES_MAX) {
            if let Some(group) = self.groups.get_mut(&sleep.group) {
                group.follow_to_sleep(sender, sleep, &self.settings);
                self.active.insert(sleep.group);
            }
        }
    }

    /// `false`: it was not fit to be taken.
    fn receive_one(&mut self, sender: u64, id: GroupId, message: Message) -> bool {
        if self.failed.contains(&id) || id.number() >= Revision::GROUPS_MAX {
            return false;
        }
        if !self.groups.contains_key(&id) {
            let log = GroupLog::new(HardState::default(), None, (0, 0), Vec::new());
            match Group::new(id, log, &self.settings) {
                Ok(group) => self.groups.insert(id, group),
                Err(error) => {
                    warn!(group = %id, error, "no replica could be made");
                    return false;
                }
            };
        }
        let Some(group) = self.groups.get_mut(&id) else {
            return false;
        };
        let last = group.raw.raft.raft_log.last_index();
        let admitted = gate::admit(
            &message,
            sender,
            self.settings.replica,
            group.raw.raft.term,
            group.raw.store(),
            last,
        );
        match admitted {
            Err(reason) => {
                Counters::add(&self.settings.counters.refused, 1);
                warn!(group = %id, term = group.raw.raft.term, index = last, sender, kind = ?message.kind, %reason, "a Raft message was refused");
                return false;
            }
            Ok(None) => {}
            Ok(Some(map)) => group.expect_map(&message, map),
        }
        self.active.insert(id);
        if matches!(message.kind, MessageKind::Vote | MessageKind::PreVote) {
            // Its own time stood still: how long the leader has been silent its node's pulse says.
            let leader = group.leader().and_then(|leader| self.peers.get(&leader));
            let silence = leader.map_or(0, |leader| self.ticks.saturating_sub(leader.heard_at));
            group.awaken(silence as usize);
        }
        let settings = &self.settings;
        let stepped = catch_unwind(AssertUnwindSafe(|| group.step(message, settings)));
        if stepped.is_err() {
            self.set_aside(&[id]);
        }
        stepped.is_ok()
    }

    pub(crate) fn unreachable(&mut self, node: NodeId) {
        let Some(replica) = self.replicas.get(&node).copied() else {
            return;
        };
        for group in self.groups.values_mut() {
            if group.is_leader() {
                group.raw.report_unreachable(replica);
            }
        }
    }

    fn reconcile(&mut self) {
        for group in self.groups.values_mut() {
            group.reconcile = true;
        }
        self.active.extend(self.groups.keys());
    }

    /// A group that gets something to do; `None`: it is not here.
    pub(crate) fn group_mut(&mut self, id: GroupId) -> Option<&mut Group> {
        let group = self.groups.get_mut(&id)?;
        self.active.insert(id);
        Some(group)
    }

    /// Proposes a command in a group that is led here.
    pub(crate) fn propose(
        &mut self,
        id: GroupId,
        command: Command,
        origin: Origin,
        reply: oneshot::Sender<Outcome>,
        now: Timestamp,
    ) {
        let clock = self.clock;
        let Some(group) = self.group_mut(id) else {
            let _ = reply.send(Outcome::NotLeader(None));
            return;
        };
        if let Some(stamp) = group.propose(command, origin.replica, reply, now, clock) {
            if origin.submitted {
                group.submissions.note(origin.replica);
            }
            self.clock = self.clock.max(stamp);
        }
    }

    /// Closes the stamps of a group up to `at`, see [`Group::close`]. Where another one leads, the
    /// answer is dropped.
    pub(crate) fn close(&mut self, id: GroupId, at: Revision, reply: oneshot::Sender<u64>) {
        self.clock = self.clock.max(at);
        self.tell();
        if let Some(group) = self.group_mut(id) {
            group.close(reply);
        }
    }

    /// See the field.
    pub(crate) const fn clock(&self) -> Revision {
        self.clock
    }

    /// Answers the reads that the last round made possible.
    pub(crate) fn answer_reads(&mut self) {
        for id in std::mem::take(&mut self.answering) {
            if let Some(group) = self.groups.get_mut(&id) {
                group.answer_reads();
            }
        }
    }

    /// All groups in full.
    pub(crate) fn details(&self) -> Vec<GroupDetail> {
        self.groups.values().map(Group::detail).collect()
    }

    /// Takes the first half of a round from all groups with something to do.
    pub(crate) fn collect(&mut self, batches: &mut VecDeque<Batch>) -> Round {
        let mut round = Round::default();
        let mut messages = std::mem::take(&mut self.held);
        let mut broken = Vec::new();
        self.working = std::mem::take(&mut self.active).into_iter().collect();
        for id in &self.working {
            let Some(group) = self.groups.get_mut(id) else {
                continue;
            };
            let result = catch_unwind(AssertUnwindSafe(|| {
                if group.reconcile {
                    group.reconcile(&self.members, &self.settings);
                }
                if !group.dirty {
                    return None;
                }
                let mut out = Vec::new();
                let write = group.collect(&self.settings, &mut self.counter, &mut out, batches);
                Some((write, out))
            }));
            match result {
                Err(_) => broken.push(*id),
                Ok(None) => {}
                Ok(Some((write, out))) => {
                    round.writes.extend(write);
                    messages.extend(out.into_iter().map(|message| (*id, message)));
                }
            }
        }
        self.set_aside(&broken);
        round.first = self.frames(messages);
        round
    }

    /// The second half, after the writes are durable. What it has to say is in the frames of
    /// [`Self::flush`], or of the next [`Self::collect`].
    pub(crate) fn complete(&mut self, batches: &mut VecDeque<Batch>) {
        let mut messages = std::mem::take(&mut self.held);
        let working = std::mem::take(&mut self.working);
        self.answering.clone_from(&working);
        let (mut active, mut news, mut changed) = (Vec::new(), Vec::new(), false);
        let mut untold = Vec::new();
        let compact_after = self.settings.compact_after(self.groups.len());
        self.each(Some(working), |group, settings| {
            let mut out = Vec::new();
            let configuration = group.configuration_number;
            group.complete(settings, compact_after, &mut out, batches);
            messages.extend(out.into_iter().map(|message| (group.id, message)));
            changed |= group.configuration_number != configuration;
            untold.extend(group.untold.drain(..).map(|whom| (whom, group.id)));
            if group.dirty || group.reconcile {
                active.push(group.id);
            }
            if group.has_news() {
                news.push(group.id);
            }
        });
        self.active.extend(active);
        self.touched.extend(news);
        for ((to, hasty), group) in untold {
            self.untold.entry(to).or_default().insert(group);
            if hasty {
                self.hasty.insert(to);
            }
        }
        self.peers_stale |= changed;
        self.held = messages;
    }

    /// Whether somebody is to be told what is committed, see [`Self::tell`].
    pub(crate) fn has_untold(&self) -> bool {
        !self.untold.is_empty()
    }

    /// Whoever does not know yet what is committed is told with the next frames.
    pub(crate) const fn tell(&mut self) {
        self.tell_due = true;
    }

    /// Whether something was let go and not sent yet.
    pub(crate) const fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// What was not sent yet.
    pub(crate) fn flush(&mut self) -> Vec<(NodeId, Frame)> {
        let messages = std::mem::take(&mut self.held);
        self.frames(messages)
    }

    /// Whether another round has something to do.
    pub(crate) fn busy(&self) -> bool {
        let mut active = self.active.iter().filter_map(|id| self.groups.get(id));
        active.any(Group::busy)
    }

    /// Brings what is known of the groups up to date; `true`: something changed.
    pub(crate) fn update_status(&mut self, known: &mut BTreeMap<GroupId, GroupStatus>) -> bool {
        let mut changed = false;
        if known.len() > self.groups.len() {
            known.retain(|id, _| self.groups.contains_key(id));
            changed = true;
        }
        for id in std::mem::take(&mut self.touched) {
            let Some(group) = self.groups.get_mut(&id) else {
                continue;
            };
            changed = true;
            let counters = &self.settings.counters;
            let old = known.insert(id, group.tell_status());
            let (term, leader) = old.map_or((0, None), |old| (old.term, old.leader));
            if group.raw.raft.term > term {
                Counters::add(&counters.terms, group.raw.raft.term - term);
            }
            if leader != group.leader() {
                Counters::add(&counters.leader_changes, 1);
                debug!(group = %id, term = group.raw.raft.term, index = group.raw.raft.raft_log.committed, leader = ?group.leader(), "another leader");
            }
        }
        changed
    }
}
