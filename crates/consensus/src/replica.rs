//! The groups of one node together with their files, without thread, socket or clock: what the
//! host's thread and the simulator drive.

use std::collections::{BTreeMap, VecDeque};

use krake_model::ids::{GroupId, NodeId};
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use tokio::sync::oneshot;

use crate::command::Command;
use crate::core::{Batch, Core, GroupStatus, Origin, Settings};
use crate::disk::{Disk, DiskError, Write};
use crate::group::{Group, Outcome};
use crate::inspect::{Counters, GroupDetail, TransferError};
use crate::log::GroupLog;
use crate::planted::{self, Bug};
use crate::voters::MemberInfo;
use crate::wire::Frame;

/// How far beyond the clock its bound is written, so that this is not done all the time. After a
/// restart stamps may begin that much later.
const CLOCK_AHEAD_MS: i64 = 1_000;

/// What a round does to the rest of the world.
pub(crate) trait Effects {
    /// Sends a frame, best effort. `false`: it is known not to have left.
    fn send(&mut self, to: NodeId, frame: &Frame) -> bool;
    /// A write to the disk begins,
    fn writing(&mut self) {}
    /// and is durable.
    fn written(&mut self) {}
    /// Whether another round begins right after this one: what is to be sent may wait for it.
    fn more(&self) -> bool {
        false
    }
    /// Entries were applied; everything before the first call was applied already.
    fn applied(&mut self, groups: &BTreeMap<GroupId, Group>, batches: VecDeque<Batch>);
}

/// One node's part of the catalog. After an error it must not be used any more: what is in memory
/// may not be on the disk.
pub(crate) struct Replica {
    pub(crate) core: Core,
    disk: Disk,
}

impl Replica {
    pub(crate) fn new(
        settings: Settings,
        disk: Disk,
        groups: Vec<(GroupId, GroupLog)>,
    ) -> Result<Self, DiskError> {
        let core = Core::new(settings, groups, disk.clock()).map_err(DiskError::Io)?;
        Ok(Self { core, disk })
    }

    pub(crate) fn tick(&mut self) {
        self.core.tick();
    }

    pub(crate) fn receive(&mut self, from: NodeId, frame: Frame) {
        self.core.receive(from, frame);
    }

    pub(crate) fn set_members(&mut self, members: Vec<MemberInfo>) {
        self.core.set_members(members);
    }

    pub(crate) fn set_reluctant(&mut self, reluctant: bool) {
        self.core.set_reluctant(reluctant);
    }

    pub(crate) fn hand_over(&mut self) -> usize {
        self.core.hand_over()
    }

    pub(crate) fn transfer(
        &mut self,
        group: GroupId,
        to: u64,
    ) -> Result<bool, Option<TransferError>> {
        self.core.transfer(group, to)
    }

    pub(crate) fn details(&self) -> Vec<GroupDetail> {
        self.core.details()
    }

    pub(crate) fn propose(
        &mut self,
        group: GroupId,
        command: Command,
        origin: Origin,
        reply: oneshot::Sender<Outcome>,
        now: Timestamp,
    ) {
        Counters::add(&self.core.settings.counters.proposals, 1);
        self.core.propose(group, command, origin, reply, now);
    }

    /// See [`Core::holds`].
    pub(crate) const fn holds(&self) -> bool {
        self.core.holds()
    }

    /// See [`Core::has_untold`].
    pub(crate) fn has_untold(&self) -> bool {
        self.core.has_untold()
    }

    /// See [`Core::tell`].
    pub(crate) fn tell(&mut self) {
        self.core.tell();
    }

    /// See [`Core::close`].
    pub(crate) fn close(&mut self, group: GroupId, at: Revision, reply: oneshot::Sender<u64>) {
        self.core.close(group, at, reply);
    }

    /// Answers when this replica of the group has applied its log up to `index`.
    pub(crate) fn await_applied(&mut self, group: GroupId, index: u64, reply: oneshot::Sender<()>) {
        if let Some(group) = self.core.group_mut(group) {
            group.await_applied(index, reply);
        }
    }

    pub(crate) fn read(&mut self, group: GroupId, reply: oneshot::Sender<()>) {
        Counters::add(&self.core.settings.counters.reads, 1);
        if let Some(group) = self.core.group_mut(group) {
            group.read(reply);
        }
    }

    /// Makes those groups that are not there yet, with this node as their only voter.
    pub(crate) fn bootstrap(&mut self, groups: Vec<GroupId>) -> Result<(), DiskError> {
        let mut writes = Vec::new();
        for group in groups {
            if !self.core.groups.contains_key(&group) {
                writes.push(self.core.bootstrap(group).map_err(DiskError::Io)?);
            }
        }
        self.disk.write(writes)
    }

    /// See [`Disk::release`].
    pub(crate) fn release_room(&self) {
        self.disk.release();
    }

    /// Works until there is nothing left to do without new input.
    pub(crate) fn rounds(&mut self, effects: &mut impl Effects) -> Result<(), DiskError> {
        loop {
            let mut batches = VecDeque::new();
            let round = self.core.collect(&mut batches);
            effects.applied(&self.core.groups, batches);
            self.keep_clock()?;
            self.send(round.first, effects);
            if !round.writes.is_empty() {
                effects.writing();
                self.disk.write(round.writes)?;
                effects.written();
            }
            let mut batches = VecDeque::new();
            self.core.complete(&mut batches);
            let busy = self.core.busy();
            if !busy && !effects.more() {
                self.flush(effects);
            }
            effects.applied(&self.core.groups, batches);
            self.core.answer_reads();
            if !busy {
                break;
            }
        }
        self.disk.go_on_storing()?;
        self.write_again(effects)
    }

    fn flush(&mut self, effects: &mut impl Effects) {
        let frames = self.core.flush();
        self.send(frames, effects);
    }

    /// What leaves this node says how far its clock is. It must not be behind that after a restart:
    /// whom it votes for then begins above everything that it has promised.
    fn keep_clock(&mut self) -> Result<(), DiskError> {
        let clock = self.core.clock();
        if clock <= self.disk.clock() || planted::has(Bug::ClockForgotten) {
            return Ok(());
        }
        let ahead = Timestamp::from_millis(clock.timestamp().as_millis() + CLOCK_AHEAD_MS);
        self.disk.keep_clock(Revision::next(clock, ahead, 0))
    }

    /// Brings the log nearer to where its oldest segment can go.
    fn write_again(&mut self, effects: &mut impl Effects) -> Result<(), DiskError> {
        let mut left = self.disk.rewrite_bytes();
        while left > 0 {
            let (bytes, writes) = self.portion();
            if bytes == 0 {
                break;
            }
            self.flush(effects);
            self.disk.write(writes)?;
            left = left.saturating_sub(bytes);
        }
        self.disk.rewritten();
        Ok(())
    }

    /// A part of what holds the oldest segment of the log, and its bytes.
    fn portion(&self) -> (usize, Vec<Write>) {
        let groups = &self.core.groups;
        let live = || {
            let sizes = groups.values().map(|group| group.raw.store().size());
            sizes.sum()
        };
        let portion = self.disk.portion_bytes();
        let (mut bytes, mut writes) = (0, Vec::new());
        for (id, run) in self.disk.to_rewrite(live) {
            if bytes >= portion {
                break;
            }
            let group = groups.get(&id);
            writes.extend(group.map(|group| group.written_again(run, portion, &mut bytes)));
        }
        (bytes, writes)
    }

    fn send(&mut self, frames: Vec<(NodeId, Frame)>, effects: &mut impl Effects) {
        for (node, frame) in frames {
            if !effects.send(node, &frame) {
                self.core.unreachable(node);
            }
        }
    }

    pub(crate) fn update_status(&mut self, known: &mut BTreeMap<GroupId, GroupStatus>) -> bool {
        self.core.update_status(known)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::sync::oneshot::Receiver;

    use super::*;
    use crate::command::{Expect, Operation};
    use crate::testing::{
        COMPACT_BYTES, COMPACT_ENTRIES, Did, GROUP, Net, create, members, node, start, start_anew,
    };
    use crate::wire::{ENTRY_BYTES, MessageKind};

    struct Alone;

    impl Effects for Alone {
        fn send(&mut self, _: NodeId, _: &Frame) -> bool {
            false
        }

        fn applied(&mut self, _: &BTreeMap<GroupId, Group>, _: VecDeque<Batch>) {}
    }

    fn alone() -> Replica {
        let mut replica = start(1);
        replica.bootstrap(vec![GroupId::META]).unwrap();
        replica.rounds(&mut Alone).unwrap();
        replica
    }

    /// Proposes it for the node of replica `asker`.
    fn put(replica: &mut Replica, group: GroupId, key: String, asker: u64) -> Receiver<Outcome> {
        put_bytes(replica, group, key, asker, 1000)
    }

    fn put_bytes(
        replica: &mut Replica,
        group: GroupId,
        key: String,
        asker: u64,
        bytes: usize,
    ) -> Receiver<Outcome> {
        let (reply, answer) = oneshot::channel();
        let put = Operation::Put {
            key,
            value: Bytes::from(vec![7; bytes]),
            expect: Expect::Any,
        };
        let origin = Origin {
            replica: asker,
            submitted: false,
        };
        let command = Command::new(vec![put]);
        replica.propose(group, command, origin, reply, Timestamp::from_millis(1));
        answer
    }

    /// Three voters, all of whom know all; replica 1 leads.
    fn three() -> Net {
        let mut net = Net::new(3);
        net.until("all three vote", |net| net.voters().len() == 3);
        net.until("all know all", |net| {
            let committed = |id| net.group(id).map(|group| group.raw.raft.raft_log.committed);
            let untold = net.replicas.values().any(Replica::has_untold);
            !untold && net.flying.is_empty() && (2..=3).all(|id| committed(id) == committed(1))
        });
        assert!(net.group(1).unwrap().is_leader());
        net
    }

    fn committed(net: &Net) -> [u64; 3] {
        [1, 2, 3].map(|id| net.group(id).unwrap().raw.raft.raft_log.committed)
    }

    #[test]
    fn what_is_committed_is_applied_and_answered_before_the_next_write() {
        let mut net = three();
        let mut answers = Vec::new();
        net.work(1, |replica| {
            answers.push(put(replica, GROUP, "a".to_owned(), 1))
        });
        assert!(net.deliver() && net.deliver());
        let (from, _, frame) = net.flying.pop_front().unwrap();
        let did = net.work(1, |replica| {
            replica.receive(node(from), frame);
            answers.push(put(replica, GROUP, "b".to_owned(), 1));
        });
        assert_eq!(did, [Did::Applied, Did::Sent, Did::Sent, Did::Written]);
        assert!(matches!(answers[0].try_recv(), Ok(Outcome::Done(Ok(_)))));
        assert!(answers[1].try_recv().is_err());
    }

    #[test]
    fn what_is_committed_is_told_with_the_next_frame_or_when_it_is_time() {
        let mut net = three();
        let [before, ..] = committed(&net);
        let write = |net: &mut Net, key: &str, asker| {
            net.work(1, |replica| {
                drop(put(replica, GROUP, key.to_owned(), asker))
            });
            for _ in 0..4 {
                assert!(net.deliver());
            }
        };
        write(&mut net, "a", 1);
        assert_eq!(committed(&net), [before + 1, before, before]);
        assert!(net.flying.is_empty() && net.replicas[&1].has_untold());
        net.work(1, Replica::tell);
        assert!(net.deliver() && net.deliver() && !net.replicas[&1].has_untold());
        assert_eq!(committed(&net), [before + 1; 3]);
        // The entries after it tell of it, too.
        write(&mut net, "b", 1);
        write(&mut net, "c", 1);
        assert_eq!(committed(&net), [before + 3, before + 2, before + 2]);
        // Where it was proposed somebody waits.
        write(&mut net, "d", 3);
        assert!(net.deliver() && net.flying.is_empty());
        assert_eq!(committed(&net), [before + 4, before + 3, before + 4]);
        // Who is no member any more is not waited for.
        net.work(1, |replica| replica.set_members(members(1, &[])));
        net.work(1, Replica::tell);
        assert!(!net.replicas[&1].has_untold());
    }

    /// More comes all the time.
    struct Busy(Vec<Frame>);

    impl Effects for Busy {
        fn send(&mut self, _: NodeId, frame: &Frame) -> bool {
            self.0.push(frame.clone());
            true
        }

        fn more(&self) -> bool {
            true
        }

        fn applied(&mut self, _: &BTreeMap<GroupId, Group>, _: VecDeque<Batch>) {}
    }

    #[test]
    fn what_a_round_lets_go_goes_with_the_next_one_when_it_follows_at_once() {
        let mut net = three();
        let mut appends = Vec::new();
        for key in ["a", "b"] {
            net.work(1, |replica| drop(put(replica, GROUP, key.to_owned(), 1)));
            appends.extend(net.flying.drain(..).filter(|(_, to, _)| *to == node(2)));
        }
        let (mut busy, replica) = (Busy(Vec::new()), net.replicas.get_mut(&2).unwrap());
        for (_, _, frame) in appends {
            assert!(busy.0.is_empty());
            replica.receive(node(1), frame);
            replica.rounds(&mut busy).unwrap();
        }
        net.work(2, |_| {});
        let rest = net.flying.drain(..).map(|(_, _, frame)| frame);
        let frames: Vec<Frame> = busy.0.into_iter().chain(rest).collect();
        let answers = |frame: &Frame| {
            let all = frame.messages.iter();
            all.filter(|(_, message)| message.kind == MessageKind::AppendResponse)
                .count()
        };
        assert_eq!(frames.iter().map(answers).collect::<Vec<_>>(), [1, 1]);
    }

    #[test]
    fn what_holds_an_old_segment_is_written_again_by_and_by() {
        const SEGMENT: u64 = 64 * 1024;
        let directory = create(1);
        let mut replica = start_anew(1, &directory);
        replica.disk.limit_segments(SEGMENT);
        let silent = GroupId::from_number(1);
        replica.bootstrap(vec![GroupId::META, silent]).unwrap();
        let write = |replica: &mut Replica, group, key: u64| {
            let mut answer = put(replica, group, key.to_string(), 1);
            let (oldest, before) = replica.disk.segments();
            replica.rounds(&mut Alone).unwrap();
            assert!(matches!(answer.try_recv(), Ok(Outcome::Done(Ok(_)))));
            let (still, after) = replica.disk.segments();
            (still == oldest).then(|| after - before)
        };
        for key in 0..40 {
            write(&mut replica, silent, key);
        }
        let first = replica.disk.segments().0;
        let alone = write(&mut replica, GROUP, 0).unwrap();
        let mut most = 0;
        for key in 1..1000 {
            most = most.max(write(&mut replica, GROUP, key % 10).unwrap_or(0));
        }
        assert!(replica.disk.segments().0 > first + 5);
        assert!(replica.disk.segments().1 < 8 * SEGMENT);
        // A portion, and the entry that it ends in the middle of.
        assert!(
            most > 2 * alone && most <= 2 * alone + SEGMENT / 16 + 1000,
            "{most}"
        );
        let logs = |replica: &Replica| {
            let entries = |group: &Group| {
                let entries = group.raw.store().entries();
                entries
                    .map(|entry| (entry.index, entry.data.clone()))
                    .collect::<Vec<_>>()
            };
            replica
                .core
                .groups
                .values()
                .map(entries)
                .collect::<Vec<_>>()
        };
        let before = logs(&replica);
        drop(replica);
        assert!(
            logs(&start_anew(1, &directory)) == before,
            "it is read back otherwise"
        );
    }

    /// Writes values of so many bytes so often, and returns how many snapshots were made.
    fn snapshots_while(
        replica: &mut Replica,
        bytes: usize,
        writes: u64,
        key: impl Fn(u64) -> String,
    ) -> u64 {
        let snapshot = |replica: &Replica| replica.details()[0].snapshot;
        let mut made = 0;
        for number in 0..writes {
            let before = snapshot(replica);
            let mut answer = put_bytes(replica, GROUP, key(number), 1, bytes);
            replica.rounds(&mut Alone).unwrap();
            assert!(matches!(answer.try_recv(), Ok(Outcome::Done(Ok(_)))));
            made += u64::from(snapshot(replica) != before);
        }
        made
    }

    #[test]
    fn entries_that_are_kept_before_a_snapshot_call_for_no_other_one() {
        let mut replica = alone();
        let settings = &mut replica.core.settings;
        (settings.compact_entries, settings.kept_entries) = ((1_000_000, 1_000_000), 200);
        let made = snapshots_while(&mut replica, 1000, 2000, |_| "key".to_owned());
        let log = replica.core.groups[&GroupId::META].raw.store();
        assert!(log.bytes() - log.bytes_since() > COMPACT_BYTES);
        let written = 2000 * (log.bytes() / log.entries().count() + ENTRY_BYTES);
        assert_eq!(made as usize, written / COMPACT_BYTES);
    }

    #[test]
    fn few_groups_have_longer_logs_than_many() {
        let mut replica = alone();
        let settings = &mut replica.core.settings;
        settings.compact_entries = (COMPACT_ENTRIES, 4 * COMPACT_ENTRIES);
        settings.compact_entries_together = 20 * COMPACT_ENTRIES;
        let after = |groups| settings.compact_after(groups) / COMPACT_ENTRIES;
        assert_eq!([0, 1, 5, 10, 20, 1000].map(after), [4, 4, 4, 2, 1, 1]);
        let made = snapshots_while(&mut replica, 1, 9 * COMPACT_ENTRIES, |_| "key".to_owned());
        assert_eq!(made, 2);
    }

    #[test]
    fn a_snapshot_waits_until_the_log_is_as_large() {
        let mut replica = alone();
        snapshots_while(&mut replica, 1000, COMPACT_ENTRIES - 10, |number| {
            number.to_string()
        });
        let map = replica.core.groups[&GroupId::META].machine.read().bytes() as usize;
        assert!(map > COMPACT_BYTES * 8 / 10 && map < COMPACT_BYTES);
        let made = snapshots_while(&mut replica, 1, 20 * COMPACT_ENTRIES, |_| "key".to_owned());
        assert!((1..=5).contains(&made), "{made} snapshots of {map} bytes");
    }

    #[test]
    fn snapshots_of_a_large_group_are_no_more_than_what_is_written() {
        let mut replica = alone();
        let small = snapshots_while(&mut replica, 1000, 1000, |_| "key".to_owned());
        assert!((10..=12).contains(&small), "{small} snapshots");
        snapshots_while(&mut replica, 1000, 1000, |number| number.to_string());
        let map = replica.core.groups[&GroupId::META].machine.read().bytes();
        assert!(map > 10 * COMPACT_BYTES as u64);
        let large = snapshots_while(&mut replica, 1000, 5000, |number| {
            (number % 1000).to_string()
        });
        assert!((4..=6).contains(&large), "{large} snapshots of {map} bytes");
        assert!(replica.details()[0].log_bytes < 2 * map as usize);
    }
}
