//! Senders and receivers whose pieces arrive, get lost or come twice.

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
