//! A group in which nothing happens falls silent: its own time stands still until something wakes
//! it.

use raft::StateRole;
use raft::eraftpb as pb;
use tracing::debug;

use super::Group;
use crate::core::Settings;
use crate::wire::{Message, MessageKind, Sleep};

/// Ticks without anything to do after which a leader lets its group fall silent. Longer than a
/// heartbeat interval, so that all followers know what is committed.
const QUIET_TICKS: u64 = 10;

/// Whether a replica's own time runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wake {
    /// It counts ticks: a leader sends heartbeats, the others wait for them.
    Awake,
    /// Nothing happens in the group. A leader sends nothing, the others trust its node's pulse.
    Asleep,
    /// It slept, and counts ticks because the leader's node is silent.
    Startled,
}

impl Group {
    /// Something happens in the group.
    pub(super) fn rouse(&mut self) {
        if self.wake == Wake::Asleep && self.is_leader() {
            // It counts who answers from now on.
            self.raw.raft.election_elapsed = 0;
        }
        self.wake = Wake::Awake;
        self.active_at = self.ticks;
    }

    /// Whether another replica has answered lately; while the group sleeps nobody is asked, and a
    /// node that fell silent would have woken it.
    pub(super) fn is_active(&self, progress: &raft::Progress) -> bool {
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
                debug!(group = %self.id, %error, "a group stays awake");
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

    /// Heartbeats of a group where nothing else happens, and their answers.
    pub(super) fn is_only_heartbeat(&self, message: &Message) -> bool {
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
}
