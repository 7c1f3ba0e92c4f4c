//! What hurts the nodes, and that it ends.

use rand::RngExt as _;

use super::nodes::{Node, Process};
use super::{Event, SECOND, World};

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
        let kind = self.random.random_range(0..18);
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
            13 => self.step(victim, |replica| {
                replica.hand_over();
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
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
        !self.nodes.values().any(Node::is_spent) && running.filter(grown).count() >= 3
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
