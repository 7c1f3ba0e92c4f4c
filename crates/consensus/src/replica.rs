//! The groups of one node together with their files, without thread, socket or clock: what the
//! host's thread and the simulator drive.

use std::collections::{BTreeMap, VecDeque};

use krake_model::ids::{GroupId, NodeId};
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use tokio::sync::oneshot;

use crate::command::Command;
use crate::core::{Batch, Core, GroupStatus, Settings};
use crate::disk::{Disk, DiskError};
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
        origin: Option<u64>,
        reply: oneshot::Sender<Outcome>,
        now: Timestamp,
    ) {
        Counters::add(&self.core.settings.counters.proposals, 1);
        self.core.propose(group, command, origin, reply, now);
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

    /// Works until there is nothing left to do without new input.
    pub(crate) fn rounds(&mut self, effects: &mut impl Effects) -> Result<(), DiskError> {
        loop {
            let round = self.core.collect();
            self.keep_clock()?;
            self.send(round.first, effects);
            if !round.writes.is_empty() {
                effects.writing();
                self.disk.write(round.writes)?;
                effects.written();
            }
            let mut batches = VecDeque::new();
            let frames = self.core.complete(&mut batches);
            self.send(frames, effects);
            effects.applied(&self.core.groups, batches);
            self.core.answer_reads();
            if !self.core.busy() {
                break;
            }
        }
        self.disk.store_slice()?;
        self.write_again()
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

    /// Lets old segments of the log go.
    fn write_again(&mut self) -> Result<(), DiskError> {
        let groups = &self.core.groups;
        let live = || {
            groups
                .values()
                .map(|group| group.raw.store().bytes())
                .sum::<usize>()
        };
        let wanted = self.disk.to_rewrite(live);
        if wanted.is_empty() {
            return Ok(());
        }
        let writes = wanted
            .iter()
            .filter_map(|id| groups.get(id))
            .map(Group::written_again)
            .collect();
        self.disk.write(writes)
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
pub(crate) mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use bytes::Bytes;
    use krake_model::ids::FederationId;

    use super::*;
    use crate::command::{Expect, Operation};
    use crate::disk::create_in;
    use crate::medium::memory::MemoryDirectory;
    use crate::wal::Owner;

    struct Alone;

    impl Effects for Alone {
        fn send(&mut self, _: NodeId, _: &Frame) -> bool {
            false
        }

        fn applied(&mut self, _: &BTreeMap<GroupId, Group>, _: VecDeque<Batch>) {}
    }

    const COMPACT_ENTRIES: u64 = 100;
    const COMPACT_BYTES: usize = 100_000;

    pub(crate) fn node(replica: u64) -> NodeId {
        NodeId::from_bytes([replica as u8; 32])
    }

    /// Its files are in memory.
    pub(crate) fn start(replica: u64) -> Replica {
        let owner = Owner {
            federation: FederationId::from_bytes([1; 32]),
            node: node(replica),
        };
        let directory = Arc::<MemoryDirectory>::default();
        create_in(&*directory, owner).ok().unwrap();
        let settings = Settings {
            replica,
            election_ticks: 6,
            heartbeat_ticks: 3,
            boot_nonce: replica,
            seed: replica,
            compact_entries: COMPACT_ENTRIES,
            compact_bytes: COMPACT_BYTES,
            kept_entries: 10,
            piece_bytes: 1024,
            counters: Arc::default(),
        };
        let (disk, groups) =
            Disk::open_in(Box::new(directory), Path::new("memory"), owner).unwrap();
        Replica::new(settings, disk, groups).unwrap()
    }

    fn alone() -> Replica {
        let mut replica = start(1);
        replica.bootstrap(vec![GroupId::META]).unwrap();
        replica.rounds(&mut Alone).unwrap();
        replica
    }

    /// Writes so often, and returns how many snapshots were made.
    fn snapshots_while(replica: &mut Replica, writes: u64, key: impl Fn(u64) -> String) -> u64 {
        let snapshot = |replica: &Replica| replica.details()[0].snapshot;
        let mut made = 0;
        for number in 0..writes {
            let before = snapshot(replica);
            let (reply, mut answer) = oneshot::channel();
            let put = Operation::Put {
                key: key(number),
                value: Bytes::from(vec![7; 1000]),
                expect: Expect::Any,
            };
            let now = Timestamp::from_millis(1);
            let command = Command::new(vec![put]);
            replica.propose(GroupId::META, command, None, reply, now);
            replica.rounds(&mut Alone).unwrap();
            assert!(matches!(answer.try_recv(), Ok(Outcome::Done(Ok(_)))));
            made += u64::from(snapshot(replica) != before);
        }
        made
    }

    #[test]
    fn snapshots_of_a_large_group_are_no_more_than_what_is_written() {
        let mut replica = alone();
        let small = snapshots_while(&mut replica, 1000, |_| "key".to_owned());
        assert!((10..=12).contains(&small), "{small} snapshots");
        snapshots_while(&mut replica, 1000, |number| number.to_string());
        let map = replica.core.groups[&GroupId::META].machine.read().bytes();
        assert!(map > 10 * COMPACT_BYTES as u64);
        let large = snapshots_while(&mut replica, 5000, |number| (number % 1000).to_string());
        assert!((3..=5).contains(&large), "{large} snapshots of {map} bytes");
        assert!(replica.details()[0].log_bytes < 2 * map as usize);
    }
}
