//! How the groups' large snapshots go out and come in: [`Snapshots`](crate::snapshots::Snapshots)
//! between the library and the frames.

use std::collections::BTreeMap;

use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use raft::{ProgressState, SnapshotStatus, eraftpb as pb};
use tracing::{debug, info, warn};

use super::Core;
use crate::group::Group;
use crate::inspect::Counters;
use crate::snapshots::{Ended, Own, Parcel, Taken, is_sound};
use crate::wire::{
    FRAME_MESSAGES_MAX, Got, Message, MessageKind, Piece, Received, Snapshot, SnapshotId,
};

impl Core {
    /// Lets a message pass that can go as it is; of a large snapshot only pieces go.
    pub(super) fn begin_snapshot(&mut self, id: GroupId, message: Message) -> Option<Message> {
        if message.kind != MessageKind::Snapshot {
            return Some(message);
        }
        let group = self.groups.get_mut(&id)?;
        let (to, term) = (message.to, message.term);
        if !self.members.contains_key(&to) {
            group.raw.report_snapshot(to, SnapshotStatus::Failure);
            return None;
        }
        match message.snapshot {
            Some(snapshot) if self.snapshots.is_large(&snapshot) => {
                info!(group = %id, term, index = snapshot.index, to, bytes = snapshot.data.len(), "snapshot begun");
                self.snapshots.begin(to, id, term, snapshot, self.ticks);
                None
            }
            snapshot => {
                // Whether it arrives shows in the next answer; without this no other is sent.
                group.raw.report_snapshot(to, SnapshotStatus::Finish);
                Counters::add(&self.settings.counters.snapshots_sent, 1);
                info!(group = %id, term, index = snapshot.as_ref().map_or(0, |s| s.index), to, bytes = snapshot.as_ref().map_or(0, |s| s.data.len()), "snapshot sent");
                Some(Message {
                    snapshot,
                    ..message
                })
            }
        }
    }

    /// Pieces and answers that go out now.
    pub(super) fn parcels(&mut self) -> BTreeMap<u64, Parcel> {
        let (groups, members) = (&self.groups, &self.members);
        let is_wanted = |to, id: GroupId, term, snapshot| {
            let group = groups.get(&id);
            members.contains_key(&to)
                && group.is_some_and(|group| is_awaited(group, to, term, snapshot))
        };
        let (parcels, ended) = self.snapshots.due(self.ticks, is_wanted);
        for ended in ended {
            self.end_snapshot(&ended);
        }
        let pieces = parcels.values().flat_map(|parcel| &parcel.pieces);
        let count = pieces.filter(|piece| !piece.data.is_empty()).count();
        Counters::add(&self.settings.counters.snapshot_pieces_sent, count as u64);
        parcels
    }

    fn end_snapshot(&mut self, ended: &Ended) {
        let Ended {
            to,
            group: id,
            id: snapshot,
            status,
        } = ended;
        let Some(group) = self.groups.get_mut(id) else {
            return;
        };
        group.raw.report_snapshot(*to, *status);
        let (term, index) = (group.raw.raft.term, snapshot.index);
        // The library may hear of it first.
        let progress = group.raw.raft.prs().get(*to);
        let is_there = group.is_leader() && progress.is_some_and(|known| known.matched >= index);
        if *status == SnapshotStatus::Finish || is_there {
            Counters::add(&self.settings.counters.snapshots_sent, 1);
            info!(group = %id, term, index, to, bytes = snapshot.bytes, "snapshot sent");
        } else {
            debug!(group = %id, term, index, to, "a snapshot was given up");
        }
    }

    /// What a member's frame brought of large snapshots.
    pub(super) fn receive_pieces(
        &mut self,
        sender: u64,
        pieces: Vec<Piece>,
        received: Vec<Received>,
    ) {
        for received in received.into_iter().take(FRAME_MESSAGES_MAX) {
            if let Some(ended) = self.snapshots.confirm(sender, received, self.ticks) {
                self.end_snapshot(&ended);
            }
        }
        for piece in pieces.iter().take(FRAME_MESSAGES_MAX) {
            self.receive_piece(sender, piece);
        }
    }

    fn receive_piece(&mut self, sender: u64, piece: &Piece) {
        let (id, term, index) = (piece.group, piece.term, piece.snapshot.index);
        if self.failed.contains(&id) || id.number() >= Revision::GROUPS_MAX {
            return;
        }
        if !is_sound(piece) {
            Counters::add(&self.settings.counters.refused, 1);
            warn!(group = %id, term, index, sender, "a piece of a snapshot was refused");
            return;
        }
        let own = self.groups.get(&id).map_or_else(Own::default, |group| Own {
            term: group.raw.raft.term,
            committed: group.raw.raft.raft_log.committed,
        });
        match self.snapshots.take(sender, piece, own, self.ticks) {
            Taken::Noted => {}
            Taken::Damaged => {
                Counters::add(&self.settings.counters.refused, 1);
                warn!(group = %id, term, index, sender, "a snapshot was refused: it is not what its checksum says");
            }
            Taken::Whole(snapshot) => {
                let message = whole(sender, self.settings.replica, term, snapshot);
                let taken = message.is_some_and(|message| self.receive_one(sender, id, message));
                let got = if taken {
                    Got::Bytes(piece.snapshot.bytes)
                } else {
                    Got::Refused
                };
                self.snapshots.answer(sender, id, piece.snapshot, got);
            }
        }
    }

    pub(super) fn tidy_snapshots(&mut self) {
        let groups = &self.groups;
        self.snapshots.tidy(self.ticks, |id| {
            let group = groups.get(&id);
            group.map_or(0, |group| group.raw.raft.raft_log.committed)
        });
    }
}

/// The message that the leader's library made.
fn whole(sender: u64, own: u64, term: u64, snapshot: Snapshot) -> Option<Message> {
    let mut message = pb::Message::default();
    message.set_msg_type(pb::MessageType::MsgSnapshot);
    (message.from, message.to, message.term) = (sender, own, term);
    message.set_snapshot(snapshot.into_raft());
    Message::from_raft(&message)
}

/// Whether the library sends this snapshot in this term and waits for what comes of it.
fn is_awaited(group: &Group, to: u64, term: u64, snapshot: SnapshotId) -> bool {
    let raft = &group.raw.raft;
    let progress = raft.prs().get(to);
    group.is_leader()
        && raft.term == term
        && progress.is_some_and(|progress| {
            progress.state == ProgressState::Snapshot && progress.pending_snapshot == snapshot.index
        })
}
