//! What hurts the nodes, and that it ends.

use std::ops::{Range, RangeInclusive};

use bytes::Bytes;
use krake_model::ids::GroupId;
use rand::RngExt as _;
use tokio::sync::oneshot;

use super::nodes::{Node, Process};
use super::{Event, SECOND, World};
use crate::command::{Command, Expect, Operation, RequestId};
use crate::core::Origin;
use crate::wire::{Frame, MessageKind};

/// How often a node stops while a snapshot that replaces the log is put in its place,
const CUT: f64 = 0.3;
/// and after how many operations on files: some before the snapshot has its name, some after.
const CUT_AFTER: Range<u32> = 2..10;

/// A write of a key that no client looks at.
fn unseen(number: u64) -> Command {
    let put = Operation::Put {
        key: "unseen".to_owned(),
        value: Bytes::copy_from_slice(&number.to_le_bytes()),
        expect: Expect::Any,
    };
    Command {
        request: RequestId::from_number(u128::from(number) << 64 | 2),
        operations: vec![put],
    }
}

const fn of(replica: u64) -> Origin {
    Origin {
        replica,
        submitted: false,
    }
}

/// Whether a snapshot that comes in pieces is whole with this frame, or comes whole in it.
fn ends_snapshot(frame: &Frame) -> bool {
    let mut messages = frame.messages.iter();
    let mut pieces = frame.pieces.iter();
    messages.any(|(_, message)| message.kind == MessageKind::Snapshot)
        || pieces.any(|piece| {
            !piece.data.is_empty() && piece.offset + piece.data.len() as u64 == piece.snapshot.bytes
        })
}

impl World<'_> {
    pub(super) fn fault(&mut self) -> Result<(), String> {
        if self.calm.is_some() {
            return Ok(());
        }
        let next = self.random.random_range(SECOND / 4..3 * SECOND);
        self.schedule(next, Event::Fault);
        self.faults += 1;
        let members: Vec<u64> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.member)
            .map(|(id, _)| *id)
            .collect();
        let victim = members[self.random.random_range(0..members.len())];
        let seed = self.random.random_range(0..u64::MAX);
        let kind = self.random.random_range(0..20);
        self.trace.update(&[kind]);
        match kind {
            0 => self.kill(victim),
            1..=3 => {
                let operations = self.random.random_range(0..120);
                self.nodes[&victim].directory.fail_after(operations, seed);
            }
            4 if self.random.random_bool(0.3) => {
                for id in members {
                    self.nodes[&id].directory.fail_after(0, seed ^ id);
                }
            }
            5 => {
                let until = self.now + self.random.random_range(SECOND / 10..5 * SECOND);
                if let Some(node) = self.nodes.get_mut(&victim) {
                    node.paused_until = until;
                }
                self.schedule(until - self.now, Event::Resume { node: victim });
            }
            6 | 7 => self.partition(&members),
            8 => {
                let other = members[self.random.random_range(0..members.len())];
                self.network.cut.insert((victim, other));
                self.heal_later();
            }
            9 => {
                self.network.loss = [0.0, 0.02, 0.1, 0.3][self.random.random_range(0..4)];
                self.network.repeat = [0.0, 0.02, 0.2][self.random.random_range(0..3)];
                self.network.delay =
                    [1_000, 5_000, 50_000, 300_000][self.random.random_range(0..4)];
            }
            10 => {
                let jump = [-3_600_000, -60_000, 60_000, 3_600_000][self.random.random_range(0..4)];
                if let Some(node) = self.nodes.get_mut(&victim) {
                    node.clock = jump;
                }
            }
            11 | 12 => self.join_or_leave(victim, kind)?,
            17 => {
                self.lull_until = self.now + self.random.random_range(SECOND..8 * SECOND);
            }
            16 => {
                let slow = [20_000, 100_000, 400_000][self.random.random_range(0..3)];
                let until = self.now + self.random.random_range(SECOND..10 * SECOND);
                if let Some(node) = self.nodes.get_mut(&victim) {
                    node.slow = (until, slow);
                }
            }
            15 => {
                let survives = self.can_spare(3);
                let mut away = self
                    .nodes
                    .iter_mut()
                    .filter(|(_, node)| node.member && node.boot > 0 && node.process.is_none());
                if survives && let Some((_, node)) = away.next() {
                    node.flipped = true;
                    node.directory.flip(seed);
                }
            }
            14 => {
                let room = self.random.random_range(0..20_000);
                self.nodes[&victim].directory.limit_room(Some(room));
                let after = self.random.random_range(SECOND..8 * SECOND);
                self.schedule(after, Event::Room { node: victim });
            }
            18 | 19 => self.isolate_leader(victim, &members)?,
            13 => self.step(victim, |replica| {
                replica.hand_over();
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    }

    /// A leader is alone, and takes many writes before it notices: its log gets a long end that
    /// others never have.
    fn isolate_leader(&mut self, victim: u64, members: &[u64]) -> Result<(), String> {
        let process = self.nodes[&victim].process.as_ref();
        let groups = process.iter().flat_map(|p| p.replica.core.groups.values());
        let led: Vec<GroupId> = groups.filter(|g| g.is_leader()).map(|g| g.id).collect();
        if led.is_empty() || members.len() < 3 {
            return Ok(());
        }
        for other in members.iter().filter(|id| **id != victim) {
            self.network.cut.insert((victim, *other));
            self.network.cut.insert((*other, victim));
        }
        self.heal_within(4 * SECOND..9 * SECOND);
        let group = led[self.random.random_range(0..led.len())];
        self.flood(victim, group, 1..=2 * self.compact_entries)?;
        let after = self.random.random_range(SECOND..3 * SECOND);
        let alone = victim;
        self.schedule(after, Event::Flood { group, alone });
        Ok(())
    }

    /// Others lead the group meanwhile, and write as much as calls for a snapshot: their log may not
    /// reach back to where the lonely one's goes on alone.
    pub(super) fn flood_others(&mut self, group: GroupId, alone: u64) -> Result<(), String> {
        let leads = |node: &Node| {
            let process = node.process.as_ref();
            let group = process.and_then(|process| process.replica.core.groups.get(&group));
            group.is_some_and(|group| group.is_leader())
        };
        let mut others = self.nodes.iter().filter(|(id, _)| **id != alone);
        let leader = others.find(|(_, node)| leads(node)).map(|(id, _)| *id);
        let is_alone = self.network.cut.iter().any(|(from, _)| *from == alone);
        match leader {
            _ if !is_alone => Ok(()),
            Some(leader) => {
                let least = self.compact_entries + 1;
                self.flood(leader, group, least..=least + self.kept_entries)
            }
            None => {
                self.schedule(SECOND / 2, Event::Flood { group, alone });
                Ok(())
            }
        }
    }

    /// So many writes at once, of which no client knows.
    fn flood(
        &mut self,
        leader: u64,
        group: GroupId,
        count: RangeInclusive<u64>,
    ) -> Result<(), String> {
        if self.paused(leader).is_some() {
            return Ok(());
        }
        let now = self.shown(leader);
        let first = self.next_attempt;
        self.next_attempt += self.random.random_range(count);
        let writes = first..self.next_attempt;
        self.step(leader, |replica| {
            for number in writes {
                replica.propose(group, unseen(number), of(leader), oneshot::channel().0, now);
            }
            Ok(())
        })
    }

    /// Somebody new joins; where nobody is left, a member leaves now and then.
    fn join_or_leave(&mut self, victim: u64, kind: u8) -> Result<(), String> {
        let newcomer = self
            .nodes
            .iter()
            .find(|(_, node)| !node.member && !node.left);
        if let Some(id) = newcomer.map(|(id, _)| *id) {
            if let Some(node) = self.nodes.get_mut(&id) {
                node.member = true;
            }
            self.start(id)?;
        } else if kind == 12 && self.can_spare(5) {
            self.leave(victim);
        } else if self.can_spare(3)
            && let Some(node) = self.nodes.get_mut(&victim)
        {
            node.leaving = true;
        }
        self.tell_members();
        Ok(())
    }

    /// Whether one member may be lost for ever: none is in this round, and enough of the others
    /// know that every group has this many voters that are there, and a majority without one of
    /// them. What nobody else has would be lost with it.
    fn can_spare(&self, voters: usize) -> bool {
        let is_there = |id: &u64| self.nodes.get(id).is_some_and(|node| node.member);
        let groups = usize::from(self.scenario.groups);
        let grown = |process: &&Process| {
            let replicas = &process.replica.core.groups;
            replicas.len() == groups
                && replicas.values().all(|group| {
                    let all = group.voters();
                    let there = all.iter().filter(|id| is_there(id)).count();
                    there >= voters && (there - 1) * 2 > all.len()
                })
        };
        let running = self.nodes.values().filter_map(|node| node.process.as_ref());
        let goes = |node: &Node| node.is_spent() || node.leaving;
        !self.nodes.values().any(goes) && running.filter(grown).count() >= 3
    }

    /// Who is leaving is let go when no group has it as a voter, as far as everybody knows that runs.
    pub(super) fn let_go(&mut self) {
        let leaving = self
            .nodes
            .iter()
            .filter(|(_, node)| node.member && node.leaving);
        let ready = |id: &u64| {
            let members = self.nodes.values().filter(|node| node.member).count();
            let groups = usize::from(self.scenario.groups);
            let running = self.nodes.values().filter_map(|node| node.process.as_ref());
            let mut replicas = running.map(|process| &process.replica.core.groups);
            let without = replicas
                .clone()
                .filter(|groups| groups.values().all(|group| !group.voters().contains(id)));
            without.count() * 2 > members + 1
                && replicas.all(|all| {
                    all.len() == groups && all.values().all(|group| !group.voters().contains(id))
                })
        };
        let ready: Vec<u64> = leaving.map(|(id, _)| *id).filter(|id| ready(id)).collect();
        for id in ready {
            self.leave(id);
            self.gone += 1;
        }
    }

    /// It is a member no more, and goes on for a while before it hears of it.
    fn leave(&mut self, victim: u64) {
        if let Some(node) = self.nodes.get_mut(&victim) {
            node.member = false;
            node.left = true;
        }
        let after = self.random.random_range(0..5 * SECOND);
        self.schedule(after, Event::Gone { node: victim });
    }

    /// The process ends between two steps, or the power goes: all that it knows is durable.
    fn kill(&mut self, victim: u64) {
        let node = &self.nodes[&victim];
        if let Some(process) = &node.process {
            node.directory.never_fail();
            self.checks.stopped(&process.replica);
            let power = self.random.random_bool(0.5);
            self.stop(victim, power);
        }
    }

    /// Now and then a node stops, mostly without power, while it takes a snapshot in place of its log.
    pub(super) fn cut_while_replacing(&mut self, node: u64, frame: &Frame) {
        if self.calm.is_none() && ends_snapshot(frame) && self.random.random_bool(CUT) {
            let operations = self.random.random_range(CUT_AFTER);
            let seed = self.random.random_range(0..u64::MAX);
            if let Some(node) = self.nodes.get(&node) {
                self.faults += 1;
                node.directory.fail_after(operations, seed);
            }
        }
    }

    pub(super) fn become_calm(&mut self) -> Result<(), String> {
        self.calm = Some(self.now);
        self.network.cut.clear();
        self.network.number += 1;
        (self.network.loss, self.network.repeat, self.network.delay) = (0.0, 0.0, 5_000);
        let now = self.now;
        for node in self.nodes.values_mut() {
            node.directory.never_fail();
            node.paused_until = node.paused_until.min(now);
            node.slow = (0, 0);
        }
        let away: Vec<u64> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.member && node.process.is_none() && !node.lost)
            .map(|(id, _)| *id)
            .collect();
        for node in away {
            self.schedule(SECOND / 10, Event::Restart { node });
        }
        self.tell_members();
        Ok(())
    }
}
