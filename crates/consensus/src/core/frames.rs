//! Which messages go out together, and which wait for a frame or need not go at all.

use std::collections::{BTreeMap, BTreeSet};

use krake_model::ids::{GroupId, NodeId};

use super::Core;
use crate::group::Group;
use crate::wire::{ENTRY_BYTES, FRAME_MESSAGES_MAX, Frame, Message, MessageKind};

/// A frame is closed when it holds about this many bytes.
const FRAME_BYTES: usize = 4 * 1024 * 1024;

impl Core {
    pub(super) fn frames(&mut self, messages: Vec<(GroupId, Message)>) -> Vec<(NodeId, Frame)> {
        let mut open: BTreeMap<u64, (usize, Vec<(GroupId, Message)>)> = BTreeMap::new();
        let mut frames = Vec::new();
        let (own, clock) = (self.settings.replica, self.clock);
        let frame = |to, messages| Frame {
            from: own,
            to,
            messages,
            sleeping: Vec::new(),
            pulse: None,
            pieces: Vec::new(),
            received: Vec::new(),
            clock,
        };
        for (group, message) in messages {
            let Some(message) = self.begin_snapshot(group, message) else {
                continue;
            };
            let to = message.to;
            let Some(node) = self.members.get(&to).map(|member| member.node) else {
                continue;
            };
            let spared = message.kind == MessageKind::Heartbeat
                && self
                    .groups
                    .get(&group)
                    .is_some_and(|group| group.is_idle_follower(to))
                && !(self.followers_due && message.context.is_empty())
                && !self.asked_for.remove(&(to, group));
            if spared {
                continue;
            }
            // One that confirms a read is waited for.
            if message.kind == MessageKind::HeartbeatResponse && message.context.is_empty() {
                self.answers.entry(to).or_default().insert(group, message);
                continue;
            }
            let size = 128
                + message.snapshot.as_ref().map_or(0, |s| s.data.len())
                + message
                    .entries
                    .iter()
                    .map(|e| e.data.len() + ENTRY_BYTES)
                    .sum::<usize>();
            let slot = open.entry(to).or_default();
            let full = slot.0 + size > FRAME_BYTES || slot.1.len() >= FRAME_MESSAGES_MAX;
            if full && !slot.1.is_empty() {
                frames.push((node, frame(to, std::mem::take(&mut slot.1))));
                slot.0 = 0;
            }
            slot.0 += size;
            slot.1.push((group, message));
        }
        let pulse = std::mem::take(&mut self.pulse_due).then(|| self.pulse());
        if let Some(pulse) = &pulse {
            // Who only follows hears of those it follows, too, if less often: a connection over
            // which nothing is sent is not missed when it is lost.
            let leads = || self.groups.values().any(Group::is_leader);
            let everybody = !pulse.leaderless.is_empty() || self.followers_due && leads();
            let members = self.members.keys().filter(|id| everybody && **id != own);
            let to = self.answers.keys().chain(self.peers.keys()).chain(members);
            for to in to {
                open.entry(*to).or_default();
            }
        }
        let mut parcels = self.parcels();
        for to in self.sleeping.keys().chain(parcels.keys()) {
            open.entry(*to).or_default();
        }
        for to in self.take_hasty() {
            open.entry(to).or_default();
        }
        for (to, (_, mut messages)) in open {
            let Some(node) = self.node_of(to) else {
                self.untold.remove(&to);
                continue;
            };
            let answers = self.answers.remove(&to).unwrap_or_default();
            let tellings = self.tellings(to);
            for more in [answers, tellings] {
                if messages.len() + more.len() > FRAME_MESSAGES_MAX {
                    frames.push((node, frame(to, std::mem::take(&mut messages))));
                }
                messages.extend(more);
            }
            let parcel = parcels.remove(&to).unwrap_or_default();
            frames.push((
                node,
                Frame {
                    pieces: parcel.pieces,
                    received: parcel.received,
                    sleeping: self.sleeping.remove(&to).unwrap_or_default(),
                    pulse: pulse.clone(),
                    ..frame(to, messages)
                },
            ));
        }
        self.sleeping.clear();
        self.asked_for.clear();
        frames
    }

    /// Who is to be told now what is committed, whether another frame goes there or not.
    fn take_hasty(&mut self) -> BTreeSet<u64> {
        let hasty = std::mem::take(&mut self.hasty);
        if std::mem::take(&mut self.tell_due) {
            return self.untold.keys().copied().collect();
        }
        hasty
    }

    fn tellings(&mut self, to: u64) -> BTreeMap<GroupId, Message> {
        let untold = self.untold.remove(&to).unwrap_or_default();
        let telling = |id| Some((id, self.groups.get_mut(&id)?.tell(to)?));
        untold.into_iter().filter_map(telling).collect()
    }
}
