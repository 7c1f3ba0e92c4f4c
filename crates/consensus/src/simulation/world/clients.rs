//! Clients that each do one operation after another, and what nodes answer them.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use rand::RngExt as _;
use tokio::sync::oneshot;

use super::nodes::Process;
use super::{Event, SECOND, World};
use crate::command::{Command, Expect, Operation as Step, ProposeError, RequestId};
use crate::core::Origin;
use crate::disk::DiskError;
use crate::group::{Group, Outcome};
use crate::replica::Replica;
use crate::simulation::history::{Asked, Got, Operation, Value, linearizable};

/// How long a client waits for one node.
const ATTEMPT: u64 = SECOND;
/// How long a client tries.
const PATIENCE: u64 = 6 * SECOND;
/// After the last fault everything works again within this time.
const RECOVERY: u64 = 5 * SECOND;
/// Operations of one key after which its history is checked and forgotten.
const PART: usize = 300;
/// Of one key, operations without a result that are remembered: what was asked for minutes before
/// has taken effect or never will.
const UNKNOWN_MAX: usize = 12;
/// The first moment of wall clocks: 2026-01-01.
const EPOCH_MS: i64 = 1_767_225_600_000;

#[derive(Debug, Clone, Copy)]
pub(super) enum Answer {
    Written(Revision),
    Conflict,
    Read(Value, Revision),
    /// Ask this one, or anybody.
    Elsewhere(Option<u64>),
    Unknown,
}

enum Waiting {
    Write(oneshot::Receiver<Outcome>),
    Read(oneshot::Receiver<()>, GroupId, String),
}

/// Asked to close a group's stamps up to a moment.
pub(super) struct Closing {
    group: GroupId,
    at: Revision,
    answer: oneshot::Receiver<u64>,
}

pub(super) struct Pending {
    client: usize,
    attempt: u64,
    waiting: Waiting,
}

struct Current {
    key: (GroupId, String),
    asked: Asked,
    expect: Expect,
    request: RequestId,
    place: usize,
    attempt: u64,
    until: u64,
}

#[derive(Default)]
pub(super) struct Client {
    current: Option<Current>,
    /// What it knows of each key: the value last seen, and its revision.
    seen: BTreeMap<(GroupId, String), (Value, Revision)>,
}

impl Client {
    pub(super) const fn waits(&self) -> bool {
        self.current.is_some()
    }
}

impl World<'_> {
    pub(super) fn think(&mut self, client: usize) {
        let groups = self.groups();
        let group = groups[self.random.random_range(0..groups.len())];
        let key = (
            group,
            format!("key-{}", self.random.random_range(0..self.scenario.keys)),
        );
        let kind = self.random.random_range(0..10);
        let value = self.next_value;
        let seen = self.clients[client].seen.get(&key).copied();
        let (asked, expect) = match (kind, seen) {
            (0..4, _) => (Asked::Read, Expect::Any),
            (4..7, Some((from, revision))) => {
                let expect = if from == 0 {
                    Expect::Absent
                } else {
                    Expect::Revision(revision)
                };
                (Asked::CompareAndSet { from, to: value }, expect)
            }
            _ => (Asked::Write(value), Expect::Any),
        };
        if asked != Asked::Read {
            self.next_value += 1;
        }
        let request = RequestId::from_number(u128::from(self.next_attempt) << 64 | 1);
        let operations = self.history.entry(key.clone()).or_default();
        operations.push(Operation {
            asked,
            invoked: self.order,
            returned: None,
        });
        self.clients[client].current = Some(Current {
            key,
            asked,
            expect,
            request,
            place: operations.len() - 1,
            attempt: 0,
            until: self.now + PATIENCE,
        });
        self.order += 1;
        self.attempt(client, None, 0);
    }

    fn attempt(&mut self, client: usize, to: Option<u64>, pause: u64) {
        let members: Vec<u64> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.member && !node.lost)
            .map(|(id, _)| *id)
            .collect();
        let anybody = members[self.random.random_range(0..members.len())];
        let to = to.filter(|id| members.contains(id)).unwrap_or(anybody);
        let attempt = self.next_attempt;
        self.next_attempt += 1;
        if let Some(current) = &mut self.clients[client].current {
            current.attempt = attempt;
        }
        let after = pause + self.random.random_range(200..5_000);
        self.schedule(
            after,
            Event::Ask {
                client,
                attempt,
                to,
            },
        );
        self.schedule(pause + ATTEMPT, Event::Late { client, attempt });
    }

    /// What the clock of a node shows.
    pub(super) fn shown(&self, node: u64) -> Timestamp {
        let (clock, drift) = self.nodes.get(&node).map_or((0, 0), |n| (n.clock, n.drift));
        let shown = (self.now / 1000) as i64 * (1000 + drift) / 1000 + clock;
        Timestamp::from_millis(EPOCH_MS + shown)
    }

    pub(super) fn ask(&mut self, client: usize, attempt: u64, to: u64) -> Result<(), String> {
        if let Some(until) = self.paused(to) {
            self.schedule(
                until - self.now,
                Event::Ask {
                    client,
                    attempt,
                    to,
                },
            );
            return Ok(());
        }
        let Some(current) = &self.clients[client].current else {
            return Ok(());
        };
        if current.attempt != attempt {
            return Ok(());
        }
        let now = self.shown(to);
        let (group, key) = current.key.clone();
        let (request, expect, asked) = (current.request, current.expect, current.asked);
        // Clients with an even number are at one site.
        let submitted = client.is_multiple_of(2);
        let origin = Origin {
            replica: if submitted { 2 } else { to },
            submitted,
        };
        let mut waiting = None;
        let give = |replica: &mut Replica| {
            waiting = Some(match asked {
                Asked::Read => {
                    let (sender, receiver) = oneshot::channel();
                    replica.read(group, sender);
                    Waiting::Read(receiver, group, key)
                }
                Asked::Write(value) | Asked::CompareAndSet { to: value, .. } => {
                    let (sender, receiver) = oneshot::channel();
                    let operations = vec![Step::Put {
                        key,
                        value: Bytes::copy_from_slice(&value.to_le_bytes()),
                        expect,
                    }];
                    let command = Command {
                        request,
                        operations,
                    };
                    replica.propose(group, command, origin, sender, now);
                    Waiting::Write(receiver)
                }
            });
            Ok(())
        };
        // It must wait before the node works: it may be answered at once.
        let Some(node) = self.nodes.get_mut(&to) else {
            return Ok(());
        };
        let Some(process) = &mut node.process else {
            return Ok(());
        };
        let given: Result<(), DiskError> = give(&mut process.replica);
        given.map_err(|error| error.to_string())?;
        if let Some(waiting) = waiting {
            process.pending.push(Pending {
                client,
                attempt,
                waiting,
            });
        }
        self.step(to, |_| Ok(()))
    }

    pub(super) fn answer_pending(&mut self, process: &mut Process) {
        let mut answers = Vec::new();
        process.pending.retain_mut(|pending| {
            let answer = match &mut pending.waiting {
                Waiting::Write(reply) => match reply.try_recv() {
                    Err(oneshot::error::TryRecvError::Empty) => return true,
                    Err(oneshot::error::TryRecvError::Closed) => Answer::Elsewhere(None),
                    Ok(Outcome::NotLeader(leader)) => Answer::Elsewhere(leader),
                    Ok(Outcome::Done(Ok(committed))) => Answer::Written(committed.revision),
                    Ok(Outcome::Done(Err(ProposeError::Conflict { .. }))) => Answer::Conflict,
                    Ok(Outcome::Done(Err(_))) => Answer::Unknown,
                },
                Waiting::Read(reply, group, key) => match reply.try_recv() {
                    Err(oneshot::error::TryRecvError::Empty) => return true,
                    Err(oneshot::error::TryRecvError::Closed) => Answer::Elsewhere(None),
                    Ok(()) => {
                        let group = process.replica.core.groups.get(group);
                        let entry = group.and_then(|group| group.machine.read().get(key).cloned());
                        entry.map_or(Answer::Read(0, Revision::NONE), |entry| {
                            let mut value = [0; 8];
                            value.copy_from_slice(&entry.value);
                            Answer::Read(u64::from_le_bytes(value), entry.modified)
                        })
                    }
                },
            };
            answers.push((pending.client, pending.attempt, answer));
            false
        });
        for (client, attempt, answer) in answers {
            let after = self.random.random_range(200..5_000);
            self.schedule(
                after,
                Event::Answer {
                    client,
                    attempt,
                    answer,
                },
            );
        }
    }

    pub(super) fn answer(&mut self, client: usize, attempt: u64, answer: Answer) {
        let Some(current) = &self.clients[client].current else {
            return;
        };
        if current.attempt != attempt {
            return;
        }
        let got = match answer {
            Answer::Written(_) => Got::Done,
            Answer::Conflict => Got::Conflict,
            Answer::Read(value, _) => Got::Value(value),
            Answer::Elsewhere(_) | Answer::Unknown if self.now < current.until => {
                let to = match answer {
                    Answer::Elsewhere(to) => to,
                    _ => None,
                };
                let pause = self.random.random_range(10_000..60_000);
                self.attempt(client, to, pause);
                return;
            }
            Answer::Elsewhere(_) | Answer::Unknown => {
                self.finish(client, None);
                return;
            }
        };
        if let Answer::Written(revision) | Answer::Read(_, revision) = answer {
            self.newest = self.newest.max(revision);
        }
        let seen = match (answer, current.asked) {
            (Answer::Read(value, revision), _) => Some((value, revision)),
            (
                Answer::Written(revision),
                Asked::Write(value) | Asked::CompareAndSet { to: value, .. },
            ) => Some((value, revision)),
            _ => None,
        };
        let key = current.key.clone();
        if let Some(seen) = seen {
            self.clients[client].seen.insert(key, seen);
        } else {
            self.clients[client].seen.remove(&key);
        }
        self.finish(client, Some(got));
    }

    fn finish(&mut self, client: usize, got: Option<Got>) {
        let Some(current) = self.clients[client].current.take() else {
            return;
        };
        let begun = current.until - PATIENCE;
        let calm_for = self.calm.map_or(0, |since| begun.saturating_sub(since));
        if got.is_none() && calm_for > RECOVERY {
            let (group, key) = &current.key;
            self.stuck = Some(format!(
                "{key} in {group} was asked for {:.1} s after the last fault and there was no answer",
                calm_for as f64 / SECOND as f64
            ));
        }
        self.order += 1;
        let returned = got.map(|got| (self.order, got));
        if let Some(operations) = self.history.get_mut(&current.key) {
            operations[current.place].returned = returned;
        }
        if let Some(Got::Value(value)) = got {
            self.cut(&current.key, current.place, value);
        }
        // Nothing new is begun in the last part of the calm.
        let end = |since| since + self.scenario.calm_ms / 2 * 1000;
        if self.calm.is_none_or(|since| self.now < end(since)) {
            let lull = self.lull_until.saturating_sub(self.now);
            let after = lull + self.random.random_range(1_000..400_000);
            self.schedule(after, Event::Think { client });
        }
    }

    /// A long history is checked in parts. Where a read was alone, what it returned is all that the
    /// operations before have left, apart from those that nobody knows the result of and nobody has
    /// seen: they may still take effect.
    fn cut(&mut self, key: &(GroupId, String), place: usize, value: Value) {
        let asked_now = |client: &Client| client.current.as_ref().is_some_and(|c| c.key == *key);
        let Some(operations) = self.history.get_mut(key) else {
            return;
        };
        let read = operations[place];
        let alone = operations
            .iter()
            .filter_map(|operation| operation.returned)
            .filter(|(at, _)| *at > read.invoked)
            .count()
            == 1;
        if operations.len() < PART || !alone || self.clients.iter().any(asked_now) {
            return;
        }
        if !linearizable(operations) {
            let (group, key) = key;
            self.wrong = Some(format!(
                "the history of {key} in {group} is not linearizable"
            ));
            return;
        }
        let seen: BTreeSet<Value> = operations.iter().filter_map(Operation::saw).collect();
        let (answered, unknown): (Vec<Operation>, Vec<Operation>) = std::mem::take(operations)
            .into_iter()
            .partition(|operation| operation.returned.is_some());
        let open =
            |operation: &Operation| operation.puts().is_some_and(|value| !seen.contains(&value));
        let count = unknown.len();
        operations.extend(unknown.into_iter().filter(open));
        let old = operations.len().saturating_sub(UNKNOWN_MAX);
        operations.drain(..old);
        self.given_up += count - operations.len();
        self.answered += answered.len();
        if let (true, Some((returned, _))) = (value != 0, read.returned) {
            // It is not counted twice.
            self.answered -= 1;
            operations.push(Operation::found(value, read.invoked, returned));
        }
    }

    /// Somebody needs to know everything up to the newest revision that was seen.
    pub(super) fn close(&mut self) -> Result<(), String> {
        let next = self.random.random_range(20_000..400_000);
        let lull = self.lull_until.saturating_sub(self.now);
        self.schedule(lull + next, Event::Close);
        let groups = self.groups();
        let group = groups[self.random.random_range(0..groups.len())];
        let at = self.newest;
        let leading: Vec<u64> = self
            .nodes
            .iter()
            .filter(|(id, node)| {
                let groups = node.process.as_ref().map(|p| &p.replica.core.groups);
                let group = groups.and_then(|groups| groups.get(&group));
                group.is_some_and(Group::is_leader) && self.paused(**id).is_none()
            })
            .map(|(id, _)| *id)
            .collect();
        if leading.is_empty() {
            return Ok(());
        }
        let to = leading[self.random.random_range(0..leading.len())];
        let (sender, answer) = oneshot::channel();
        if let Some(process) = self
            .nodes
            .get_mut(&to)
            .and_then(|node| node.process.as_mut())
        {
            process.replica.close(group, at, sender);
            process.closing.push(Closing { group, at, answer });
        }
        self.step(to, |_| Ok(()))
    }

    pub(super) fn answer_closing(&mut self, process: &mut Process) -> Result<(), String> {
        for mut closing in std::mem::take(&mut process.closing) {
            match closing.answer.try_recv() {
                Ok(last) => {
                    self.closed += 1;
                    self.checks.closed(closing.group, closing.at, last)?;
                }
                Err(oneshot::error::TryRecvError::Empty) => process.closing.push(closing),
                Err(oneshot::error::TryRecvError::Closed) => {}
            }
        }
        Ok(())
    }
}
