//! Snapshots that are too large for one message travel in pieces, so that heartbeats never wait
//! behind a whole one, and go on where they were after a connection or a leader was lost.
//!
//! Steps without IO: [`Snapshots`] is told what is to be sent, what has come and what time it is,
//! and says what to send. The sender first asks what the receiver has, then keeps a few pieces on
//! their way; the receiver answers each with how much it has from the beginning. When nothing
//! moves, the sender asks again and goes back to the answer.

use std::collections::BTreeMap;

use krake_model::codec::LARGE_RECORD_BYTES_MAX;
use krake_model::ids::GroupId;
use raft::SnapshotStatus;

use crate::planted::{self, Bug};
use crate::wire::{Got, Piece, Received, Snapshot, SnapshotId};

/// Pieces of one snapshot on their way at most.
const PIECES_OF_ONE: u64 = 3;
/// Pieces of all snapshots on their way to one node at most: one that does not move leaves room for
/// others.
const PIECES_TO_NODE: u64 = 4;
/// Heartbeat intervals without progress after which the sender asks what has come.
const ASK_INTERVALS: u64 = 3;
/// The same, after which it gives up. Raft tries again when the receiver is heard; what has come is
/// not sent again.
const GIVE_UP_INTERVALS: u64 = 20;
/// A snapshot that was refused so often in a row is given up, too.
const REFUSALS_MAX: u32 = 3;
/// Heartbeat intervals for which a receiver keeps a part that does not grow.
const KEPT_INTERVALS: u64 = 1000;
/// Bytes that all parts of a receiver may grow to: two of the largest snapshots.
const PARTS_BYTES_MAX: u64 = 2 * LARGE_RECORD_BYTES_MAX as u64;

/// A snapshot on its way to one replica.
#[derive(Debug)]
struct Sending {
    /// In which this replica leads the group.
    term: u64,
    id: SnapshotId,
    snapshot: Snapshot,
    /// Bytes that the receiver has.
    confirmed: u64,
    /// Bytes that were sent; what is between may be on its way.
    sent: u64,
    /// An answer is waited for before anything else is sent.
    asking: bool,
    asked_at: Option<u64>,
    moved_at: u64,
    refusals: u32,
}

impl Sending {
    fn on_their_way(&self, piece: u64) -> u64 {
        let all = self.sent - self.confirmed;
        if self.asking { all.min(piece) } else { all }
    }

    fn is_to_ask(&self, now: u64, interval: u64) -> bool {
        let waits = self.asking || self.sent > self.confirmed;
        let since = self.asked_at.map(|at| at.max(self.moved_at));
        waits && since.is_none_or(|at| now.saturating_sub(at) >= interval * ASK_INTERVALS)
    }

    /// What is sent now, when `others` bytes of other snapshots are on their way to the same node.
    fn next(
        &mut self,
        group: GroupId,
        now: u64,
        interval: u64,
        piece: u64,
        others: u64,
    ) -> Vec<Piece> {
        if self.is_to_ask(now, interval) {
            (self.asking, self.asked_at) = (true, Some(now));
            return vec![self.piece(group, self.confirmed, self.confirmed)];
        }
        let mut pieces = Vec::new();
        while !self.asking && self.sent < self.id.bytes {
            let to = self.id.bytes.min(self.sent + piece);
            let bytes = to - self.confirmed;
            if bytes > piece * PIECES_OF_ONE || others + bytes > piece * PIECES_TO_NODE {
                break;
            }
            pieces.push(self.piece(group, self.sent, to));
            self.sent = to;
        }
        if !self.asking && self.sent == self.confirmed {
            // It waits for others, not for its receiver.
            self.moved_at = now;
        }
        pieces
    }

    fn piece(&self, group: GroupId, from: u64, to: u64) -> Piece {
        Piece {
            group,
            term: self.term,
            snapshot: self.id,
            configuration: self.snapshot.configuration.clone(),
            offset: from,
            data: self.snapshot.data.slice(from as usize..to as usize),
        }
    }
}

/// What a receiver has of a snapshot.
#[derive(Debug)]
struct Part {
    /// The highest in which somebody sent it.
    term: u64,
    id: SnapshotId,
    data: Vec<u8>,
    /// Of `data`.
    hasher: blake3::Hasher,
    /// When a piece of it came last.
    heard_at: u64,
}

impl Part {
    fn new(term: u64, id: SnapshotId, now: u64) -> Self {
        Self {
            term,
            id,
            data: Vec::with_capacity(id.bytes as usize),
            hasher: blake3::Hasher::new(),
            heard_at: now,
        }
    }

    /// Takes what is new of a piece that follows what is there or overlaps it.
    fn append(&mut self, piece: &Piece) {
        let there = self.data.len() as u64;
        let mut known = there.checked_sub(piece.offset);
        if planted::has(Bug::PieceOrderIgnored) {
            known = Some(0);
        }
        let new = known.and_then(|known| piece.data.get(known as usize..));
        if let Some(new) = new {
            let room = self.id.bytes - there;
            let new = &new[..new.len().min(room as usize)];
            self.hasher.update(new);
            self.data.extend_from_slice(new);
        }
    }

    fn is_whole(&self) -> bool {
        self.data.len() as u64 == self.id.bytes
    }

    fn is_undamaged(&self) -> bool {
        planted::has(Bug::PieceOrderIgnored)
            || *self.hasher.finalize().as_bytes() == self.id.checksum
    }
}

/// What a replica of this node has itself.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Own {
    pub(crate) term: u64,
    pub(crate) committed: u64,
}

/// What came of a piece.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Nothing more to do.
    Noted,
    /// It was the last one: the snapshot is to be taken, and [`Snapshots::answer`] told.
    Whole(Snapshot),
    /// It was the last one, and the whole is not what its checksum says.
    Damaged,
}

/// A snapshot is not on its way any more.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) to: u64,
    pub(crate) group: GroupId,
    pub(crate) id: SnapshotId,
    pub(crate) status: SnapshotStatus,
}

/// What goes out to one replica's node.
#[derive(Debug, Default)]
pub(crate) struct Parcel {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) received: Vec<Received>,
}

/// All large snapshots that this node sends or receives.
#[derive(Debug)]
pub(crate) struct Snapshots {
    /// Bytes in a piece at most.
    piece: u64,
    /// Ticks.
    interval: u64,
    sending: BTreeMap<(u64, GroupId), Sending>,
    parts: BTreeMap<GroupId, Part>,
    /// Answers that wait for the next frames.
    answers: BTreeMap<(u64, GroupId), Received>,
}

impl Snapshots {
    pub(crate) fn new(piece_bytes: usize, heartbeat_ticks: usize) -> Self {
        Self {
            piece: piece_bytes.max(1) as u64,
            interval: heartbeat_ticks as u64,
            sending: BTreeMap::new(),
            parts: BTreeMap::new(),
            answers: BTreeMap::new(),
        }
    }

    /// Whether a snapshot is to be sent in pieces.
    pub(crate) fn is_large(&self, snapshot: &Snapshot) -> bool {
        snapshot.data.len() as u64 > self.piece
    }

    /// The replica `to` is to get a snapshot from this one, which leads the group in `term`. It
    /// takes the place of another one that is on its way there.
    pub(crate) fn begin(
        &mut self,
        to: u64,
        group: GroupId,
        term: u64,
        snapshot: Snapshot,
        now: u64,
    ) {
        // Several replicas may get the same one: it is read for its checksum once.
        let same = |sending: &&Sending| {
            let (known, data) = (&sending.snapshot.data, &snapshot.data);
            (known.as_ptr(), known.len()) == (data.as_ptr(), data.len())
                && (sending.id.index, sending.id.term) == (snapshot.index, snapshot.term)
        };
        let known = self.sending.values().find(same).map(|sending| sending.id);
        let id = known.unwrap_or_else(|| SnapshotId {
            index: snapshot.index,
            term: snapshot.term,
            bytes: snapshot.data.len() as u64,
            checksum: *blake3::hash(&snapshot.data).as_bytes(),
        });
        let sending = Sending {
            term,
            id,
            snapshot,
            confirmed: 0,
            sent: 0,
            asking: true,
            asked_at: None,
            moved_at: now,
            refusals: 0,
        };
        self.sending.insert((to, group), sending);
    }

    /// What goes out now, and which snapshots are given up. `is_wanted`: whether the replica still
    /// waits for the snapshot of the group that was begun in a term.
    pub(crate) fn due(
        &mut self,
        now: u64,
        is_wanted: impl Fn(u64, GroupId, u64, SnapshotId) -> bool,
    ) -> (BTreeMap<u64, Parcel>, Vec<Ended>) {
        let mut parcels: BTreeMap<u64, Parcel> = BTreeMap::new();
        for ((to, _), received) in std::mem::take(&mut self.answers) {
            parcels.entry(to).or_default().received.push(received);
        }
        let ended = self.give_up(now, is_wanted);
        let mut on_their_way: BTreeMap<u64, u64> = BTreeMap::new();
        for ((to, _), sending) in &self.sending {
            *on_their_way.entry(*to).or_default() += sending.on_their_way(self.piece);
        }
        for ((to, group), sending) in &mut self.sending {
            let to_node = on_their_way.entry(*to).or_default();
            *to_node -= sending.on_their_way(self.piece);
            let pieces = sending.next(*group, now, self.interval, self.piece, *to_node);
            *to_node += sending.on_their_way(self.piece);
            if !pieces.is_empty() {
                parcels.entry(*to).or_default().pieces.extend(pieces);
            }
        }
        (parcels, ended)
    }

    fn give_up(
        &mut self,
        now: u64,
        is_wanted: impl Fn(u64, GroupId, u64, SnapshotId) -> bool,
    ) -> Vec<Ended> {
        let (limit, mut ended) = (self.interval * GIVE_UP_INTERVALS, Vec::new());
        self.sending.retain(|(to, group), sending| {
            let moves = now.saturating_sub(sending.moved_at) < limit;
            let kept = moves && is_wanted(*to, *group, sending.term, sending.id);
            if !kept {
                ended.push(Ended {
                    to: *to,
                    group: *group,
                    id: sending.id,
                    status: SnapshotStatus::Failure,
                });
            }
            kept
        });
        ended
    }

    /// An answer of the replica `from`.
    pub(crate) fn confirm(&mut self, from: u64, received: Received, now: u64) -> Option<Ended> {
        let key = (from, received.group);
        let sending = self.sending.get_mut(&key)?;
        if sending.id != received.snapshot {
            return None;
        }
        let status = match received.got {
            Got::Bytes(bytes) if bytes == sending.id.bytes => Some(SnapshotStatus::Finish),
            Got::Bytes(bytes) if bytes > sending.id.bytes => None,
            Got::Bytes(bytes) if bytes > sending.confirmed => {
                sending.confirmed = bytes;
                sending.sent = sending.sent.max(bytes);
                (sending.asking, sending.moved_at) = (false, now);
                None
            }
            // What was on its way is lost, or all of it with a restart.
            Got::Bytes(bytes) if sending.asking => {
                if bytes < sending.confirmed {
                    sending.moved_at = now;
                }
                (sending.confirmed, sending.sent) = (bytes, bytes);
                (sending.asking, sending.asked_at) = (false, Some(now));
                None
            }
            // Of a piece that came out of order.
            Got::Bytes(_) => None,
            Got::Refused => {
                sending.refusals += 1;
                (sending.confirmed, sending.sent) = (0, 0);
                sending.moved_at = now;
                (sending.refusals >= REFUSALS_MAX).then_some(SnapshotStatus::Failure)
            }
        };
        let id = sending.id;
        status.map(|status| {
            self.sending.remove(&key);
            Ended {
                to: from,
                group: received.group,
                id,
                status,
            }
        })
    }

    /// Takes a piece from the replica `sender`.
    pub(crate) fn take(&mut self, sender: u64, piece: &Piece, own: Own, now: u64) -> Taken {
        let (group, id) = (piece.group, piece.snapshot);
        // Of a leader that was replaced.
        if piece.term < own.term {
            return Taken::Noted;
        }
        if id.index <= own.committed {
            self.parts
                .retain(|of, part| *of != group || part.id.index > own.committed);
            self.answer(sender, group, id, Got::Bytes(id.bytes));
            return Taken::Noted;
        }
        let known = self.parts.get(&group);
        if known.is_none_or(|part| part.id != id) {
            // What comes late of one that was given up does not take the place of a newer one.
            if known.is_some_and(|part| (piece.term, id.index) <= (part.term, part.id.index)) {
                return Taken::Noted;
            }
            self.parts.remove(&group);
            if !self.make_room(id.bytes, now) {
                return Taken::Noted;
            }
            self.parts.insert(group, Part::new(piece.term, id, now));
        }
        let Some(part) = self.parts.get_mut(&group) else {
            return Taken::Noted;
        };
        part.term = part.term.max(piece.term);
        part.heard_at = now;
        part.append(piece);
        if !part.is_whole() {
            let got = Got::Bytes(part.data.len() as u64);
            self.answer(sender, group, id, got);
            return Taken::Noted;
        }
        match self.parts.remove(&group) {
            Some(part) if part.is_undamaged() => Taken::Whole(Snapshot {
                index: id.index,
                term: id.term,
                configuration: piece.configuration.clone(),
                data: part.data.into(),
            }),
            _ => {
                self.answer(sender, group, id, Got::Refused);
                Taken::Damaged
            }
        }
    }

    /// Whether another part of so many bytes may begin; those that nobody goes on with make room.
    fn make_room(&mut self, bytes: u64, now: u64) -> bool {
        let bytes_of = |parts: &BTreeMap<GroupId, Part>| -> u64 {
            parts.values().map(|part| part.id.bytes).sum()
        };
        if bytes_of(&self.parts) + bytes > PARTS_BYTES_MAX {
            let limit = self.interval * GIVE_UP_INTERVALS;
            self.parts
                .retain(|_, part| now.saturating_sub(part.heard_at) < limit);
        }
        bytes_of(&self.parts) + bytes <= PARTS_BYTES_MAX
    }

    /// Tells the replica `to` what is here of a snapshot.
    pub(crate) fn answer(&mut self, to: u64, group: GroupId, snapshot: SnapshotId, got: Got) {
        let received = Received {
            group,
            snapshot,
            got,
        };
        self.answers.insert((to, group), received);
    }

    /// Drops parts that the group is beyond, and those that did not grow for long.
    pub(crate) fn tidy(&mut self, now: u64, committed: impl Fn(GroupId) -> u64) {
        let limit = self.interval * KEPT_INTERVALS;
        self.parts.retain(|group, part| {
            part.id.index > committed(*group) && now.saturating_sub(part.heard_at) < limit
        });
    }
}

/// Whether a piece can be one of a snapshot.
pub(crate) fn is_sound(piece: &Piece) -> bool {
    let SnapshotId {
        index, term, bytes, ..
    } = piece.snapshot;
    let end = piece.offset.checked_add(piece.data.len() as u64);
    index > 0
        && term > 0
        && piece.term >= term
        && (1..=LARGE_RECORD_BYTES_MAX as u64).contains(&bytes)
        && end.is_some_and(|end| end <= bytes)
}

#[cfg(test)]
mod tests;
