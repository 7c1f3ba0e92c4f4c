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
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::wire::Configuration;

    const PIECE: usize = 10;
    /// Ticks of a heartbeat interval.
    const INTERVAL: usize = 3;
    const LEADER: u64 = 1;
    const RECEIVER: u64 = 2;
    const OWN: Own = Own {
        term: 5,
        committed: 0,
    };

    fn group(number: u32) -> GroupId {
        GroupId::from_number(number)
    }

    fn snapshot(index: u64, bytes: usize) -> Snapshot {
        let data: Vec<u8> = (0..bytes)
            .map(|at| (at as u64 * index % 251) as u8)
            .collect();
        Snapshot {
            index,
            term: 4,
            configuration: Configuration {
                voters: vec![LEADER],
                learners: vec![RECEIVER],
            },
            data: data.into(),
        }
    }

    fn node() -> Snapshots {
        Snapshots::new(PIECE, INTERVAL)
    }

    fn pieces(from: &mut Snapshots, now: u64) -> Vec<Piece> {
        let (mut parcels, ended) = from.due(now, |_, _, _, _| true);
        assert!(ended.is_empty(), "{ended:?}");
        parcels.remove(&RECEIVER).unwrap_or_default().pieces
    }

    fn answers(from: &mut Snapshots, now: u64) -> Vec<Received> {
        let (mut parcels, _) = from.due(now, |_, _, _, _| true);
        parcels.remove(&LEADER).unwrap_or_default().received
    }

    /// Gives pieces to the receiver and its answers to the sender.
    fn exchange(
        sender: &mut Snapshots,
        receiver: &mut Snapshots,
        pieces: &[Piece],
        now: u64,
    ) -> (Vec<Snapshot>, Vec<Ended>) {
        let (mut whole, mut ended) = (Vec::new(), Vec::new());
        for piece in pieces {
            assert!(is_sound(piece));
            if let Taken::Whole(snapshot) = receiver.take(LEADER, piece, OWN, now) {
                let got = Got::Bytes(piece.snapshot.bytes);
                receiver.answer(LEADER, piece.group, piece.snapshot, got);
                whole.push(snapshot);
            }
        }
        for received in answers(receiver, now) {
            ended.extend(sender.confirm(RECEIVER, received, now));
        }
        (whole, ended)
    }

    #[test]
    fn a_snapshot_arrives_whole_and_few_pieces_are_on_their_way() {
        let (mut sender, mut receiver) = (node(), node());
        let sent = snapshot(7, 95);
        assert!(sender.is_large(&sent) && !sender.is_large(&snapshot(7, PIECE)));
        sender.begin(RECEIVER, group(1), 5, sent.clone(), 0);
        let asked = pieces(&mut sender, 0);
        assert!(asked.len() == 1 && asked[0].data.is_empty());
        exchange(&mut sender, &mut receiver, &asked, 0);
        let mut offsets = Vec::new();
        let (whole, ended) = loop {
            let next = pieces(&mut sender, 0);
            assert!((1..=PIECES_OF_ONE as usize).contains(&next.len()));
            assert!(pieces(&mut sender, 0).is_empty(), "more without an answer");
            offsets.extend(next.iter().map(|piece| piece.offset));
            let came = exchange(&mut sender, &mut receiver, &next, 0);
            if !came.1.is_empty() {
                break came;
            }
        };
        let expected: Vec<u64> = (0..10).map(|number| number * PIECE as u64).collect();
        assert_eq!(offsets, expected, "each once");
        assert_eq!(whole[0].data, sent.data);
        assert_eq!(whole[0].configuration, sent.configuration);
        assert_eq!(ended[0].status, SnapshotStatus::Finish);
        assert!(sender.sending.is_empty() && receiver.parts.is_empty());
    }

    #[test]
    fn snapshots_to_one_node_share_a_bound_and_those_that_wait_are_not_given_up() {
        let (mut sender, mut receiver) = (node(), node());
        for number in 1..=4 {
            sender.begin(RECEIVER, group(number), 5, snapshot(7, 95), 0);
        }
        let asked = pieces(&mut sender, 0);
        assert_eq!(asked.len(), 4, "what has come is asked of each");
        exchange(&mut sender, &mut receiver, &asked, 0);
        let mut whole = 0;
        for now in 1.. {
            let next = pieces(&mut sender, now * 20);
            let data = next.iter().filter(|piece| !piece.data.is_empty());
            assert!(data.count() as u64 <= PIECES_TO_NODE);
            whole += exchange(&mut sender, &mut receiver, &next, now * 20)
                .0
                .len();
            if whole == 4 {
                assert!(now < 40, "too slow");
                break;
            }
        }
    }

    #[test]
    fn another_leader_goes_on_where_the_first_one_stopped() {
        let (mut first, mut receiver) = (node(), node());
        first.begin(RECEIVER, group(1), 5, snapshot(7, 95), 0);
        for _ in 0..3 {
            let next = pieces(&mut first, 0);
            exchange(&mut first, &mut receiver, &next, 0);
        }
        let there = receiver.parts[&group(1)].data.len() as u64;
        assert_eq!(there, 60);
        let mut second = node();
        second.begin(RECEIVER, group(1), 6, snapshot(7, 95), 20);
        let mut sent = 0;
        let whole = loop {
            let next = pieces(&mut second, 20);
            for piece in next.iter().filter(|piece| !piece.data.is_empty()) {
                assert!(piece.offset >= there, "{} was there already", piece.offset);
                sent += piece.data.len();
            }
            let (whole, _) = exchange(&mut second, &mut receiver, &next, 20);
            if let Some(whole) = whole.first() {
                break whole.clone();
            }
        };
        assert_eq!((sent, whole.data), (35, snapshot(7, 95).data));
        // What is left of the first one changes nothing.
        let late = pieces(&mut first, 30);
        assert!(!late.is_empty());
        let own = Own {
            term: 6,
            committed: 7,
        };
        for piece in &late {
            assert!(matches!(
                receiver.take(LEADER, piece, own, 30),
                Taken::Noted
            ));
        }
        assert!(receiver.parts.is_empty());
    }

    #[test]
    fn a_receiver_that_lost_its_part_gets_it_again() {
        let (mut sender, mut receiver) = (node(), node());
        sender.begin(RECEIVER, group(1), 5, snapshot(7, 95), 0);
        for _ in 0..3 {
            let next = pieces(&mut sender, 0);
            exchange(&mut sender, &mut receiver, &next, 0);
        }
        receiver = node();
        let mut now = 0;
        while sender.sending.contains_key(&(RECEIVER, group(1))) {
            let next = pieces(&mut sender, now);
            exchange(&mut sender, &mut receiver, &next, now);
            now += 1;
        }
        assert!(now < 20, "it took {now} ticks");
    }

    #[test]
    fn a_wrong_checksum_is_refused_and_after_some_tries_given_up() {
        let (mut sender, mut receiver) = (node(), node());
        sender.begin(RECEIVER, group(1), 5, snapshot(7, 25), 0);
        let (mut damaged, mut ended) = (0, None);
        while ended.is_none() {
            for mut piece in pieces(&mut sender, 0) {
                if piece.offset == 10 {
                    piece.data = Bytes::from(vec![0xff; piece.data.len()]);
                }
                let taken = receiver.take(LEADER, &piece, OWN, 0);
                damaged += u32::from(matches!(taken, Taken::Damaged));
            }
            for received in answers(&mut receiver, 0) {
                ended = sender.confirm(RECEIVER, received, 0);
            }
            assert!(receiver.parts.values().all(|part| !part.is_whole()));
        }
        assert_eq!(damaged, REFUSALS_MAX);
        assert_eq!(ended.unwrap().status, SnapshotStatus::Failure);
    }

    #[test]
    fn without_an_answer_it_asks_again_and_gives_up_in_the_end() {
        let mut sender = node();
        sender.begin(RECEIVER, group(1), 5, snapshot(7, 95), 0);
        let limit = INTERVAL as u64 * GIVE_UP_INTERVALS;
        let asked = (0..limit).filter(|now| !pieces(&mut sender, *now).is_empty());
        assert_eq!(
            asked.count() as u64,
            GIVE_UP_INTERVALS.div_ceil(ASK_INTERVALS)
        );
        let (_, ended) = sender.due(limit, |_, _, _, _| true);
        assert_eq!(ended[0].status, SnapshotStatus::Failure);
        sender.begin(RECEIVER, group(1), 5, snapshot(7, 95), limit);
        let (parcels, ended) = sender.due(limit, |_, _, _, _| false);
        assert!(
            parcels.is_empty() && ended.len() == 1,
            "nobody waits for it"
        );
    }

    fn first_of(term: u64, of: Snapshot) -> Piece {
        let mut sender = node();
        sender.begin(RECEIVER, group(1), term, of, 0);
        let mut asked = pieces(&mut sender, 0);
        asked.remove(0)
    }

    #[test]
    fn a_newer_snapshot_takes_the_place_of_an_older_one_and_not_the_other_way() {
        let mut receiver = node();
        let index = |receiver: &Snapshots| receiver.parts[&group(1)].id.index;
        receiver.take(LEADER, &first_of(5, snapshot(7, 95)), OWN, 0);
        receiver.take(LEADER, &first_of(5, snapshot(8, 95)), OWN, 0);
        assert_eq!(index(&receiver), 8);
        receiver.take(LEADER, &first_of(5, snapshot(7, 95)), OWN, 0);
        assert_eq!(index(&receiver), 8);
        // Another leader may have an older one only.
        receiver.take(LEADER, &first_of(6, snapshot(6, 95)), OWN, 0);
        assert_eq!(index(&receiver), 6);
        receiver.tidy(1, |_| 5);
        assert_eq!(index(&receiver), 6);
        receiver.tidy(1, |_| 6);
        assert!(receiver.parts.is_empty(), "the group is beyond it");
    }

    #[test]
    fn parts_are_bounded() {
        let mut receiver = node();
        let mut piece = first_of(5, snapshot(7, 95));
        piece.snapshot.bytes = LARGE_RECORD_BYTES_MAX as u64;
        for number in 1..=3 {
            piece.group = group(number);
            receiver.take(LEADER, &piece, OWN, 0);
        }
        assert_eq!(receiver.parts.len(), 2);
        // They have not grown for long.
        receiver.take(LEADER, &piece, OWN, 100);
        assert!(receiver.parts.contains_key(&group(3)));
        receiver.tidy(100 + INTERVAL as u64 * KEPT_INTERVALS, |_| 0);
        assert!(receiver.parts.is_empty());
        piece.snapshot.bytes += 1;
        assert!(!is_sound(&piece));
        piece.snapshot.bytes = 5;
        piece.offset = 6;
        assert!(!is_sound(&piece));
    }

    proptest! {
        /// Whatever is lost, repeated or reordered, what is whole is what was sent; when nothing is
        /// lost any more, it arrives.
        #[test]
        fn disorder_changes_nothing(fates in prop::collection::vec(0_u8..8, 0..200)) {
            let (mut sender, mut receiver) = (node(), node());
            let sent = snapshot(7, 137);
            sender.begin(RECEIVER, group(1), 5, sent.clone(), 0);
            let mut fates = fates.into_iter();
            let (mut flying, mut back) = (Vec::new(), Vec::new());
            let mut whole = Vec::new();
            for now in 0..1000 {
                let (mut parcels, ended) = sender.due(now, |_, _, _, _| true);
                prop_assert!(now >= 200 || ended.len() <= 1);
                if !sender.sending.contains_key(&(RECEIVER, group(1))) && whole.is_empty() {
                    sender.begin(RECEIVER, group(1), 5, sent.clone(), now);
                }
                flying.extend(parcels.remove(&RECEIVER).unwrap_or_default().pieces);
                let mut next = Vec::new();
                for piece in std::mem::take(&mut flying) {
                    match fates.next() {
                        Some(0 | 1) => {}
                        Some(2) => flying.push(piece),
                        Some(3) => next.insert(0, piece),
                        Some(4) => next.extend([piece.clone(), piece]),
                        _ => next.push(piece),
                    }
                }
                for piece in next {
                    if let Taken::Whole(snapshot) = receiver.take(LEADER, &piece, OWN, now) {
                        receiver.answer(LEADER, piece.group, piece.snapshot, Got::Bytes(137));
                        whole.push(snapshot);
                    }
                }
                back.extend(answers(&mut receiver, now));
                for received in std::mem::take(&mut back) {
                    match fates.next() {
                        Some(0) => {}
                        Some(1) => back.push(received),
                        _ => {
                            sender.confirm(RECEIVER, received, now);
                        }
                    }
                }
            }
            prop_assert!(!whole.is_empty());
            for snapshot in whole {
                prop_assert_eq!(snapshot.data, sent.data.clone());
            }
        }
    }
}
