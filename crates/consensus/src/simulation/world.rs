//! The simulated world: nodes, network, disks, clocks, clients, and what hurts them.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use krake_model::ids::{FederationId, GroupId, NodeId};
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::sync::oneshot;

use super::checks::Checks;
use super::history::{Asked, Got, Operation, Value, linearizable};
use super::{Report, Scenario};
use crate::command::{Command, Expect, Operation as Step, ProposeError, RequestId};
use crate::core::{Batch, Settings};
use crate::disk::{Disk, DiskError, create_in};
use crate::group::{Group, Outcome};
use crate::inspect::Counters;
use crate::medium::memory::MemoryDirectory;
use crate::replica::{Effects, Replica};
use crate::voters::MemberInfo;
use crate::wal::Owner;
use crate::wire::Frame;

/// One tick of Raft.
const TICK: u64 = 100_000;
const SECOND: u64 = 1_000_000;
/// How long a client waits for one node.
const ATTEMPT: u64 = SECOND;
/// How long a client tries.
const PATIENCE: u64 = 6 * SECOND;
/// A node that is away for longer is replaced as a voter.
const AWAY: u64 = 10 * SECOND;
/// After the last fault everything works again within this time.
const RECOVERY: u64 = 5 * SECOND;
/// A segment of the log is small, so that many come and go.
const SEGMENT: u64 = 24 * 1024;
/// So much of a snapshot is written at once, so that most take several rounds.
const SLICE: usize = 2000;
/// The first moment of wall clocks: 2026-01-01.
const EPOCH_MS: i64 = 1_767_225_600_000;

fn node_id(replica: u64) -> NodeId {
    NodeId::from_bytes([replica as u8; 32])
}

fn owner(replica: u64) -> Owner {
    Owner {
        federation: FederationId::from_bytes([9; 32]),
        node: node_id(replica),
    }
}

#[derive(Debug)]
enum Event {
    Tick {
        node: u64,
        boot: u64,
    },
    Frame {
        to: u64,
        from: u64,
        bytes: Bytes,
    },
    Restart {
        node: u64,
    },
    Members {
        node: u64,
        boot: u64,
    },
    Resume {
        node: u64,
    },
    Think {
        client: usize,
    },
    Ask {
        client: usize,
        attempt: u64,
        to: u64,
    },
    Answer {
        client: usize,
        attempt: u64,
        answer: Answer,
    },
    Late {
        client: usize,
        attempt: u64,
    },
    Fault,
    Close,
    Census,
    Room {
        node: u64,
    },
    Heal {
        number: u64,
    },
    Gone {
        node: u64,
    },
}

#[derive(Debug, Clone, Copy)]
enum Answer {
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
struct Closing {
    group: GroupId,
    at: Revision,
    answer: oneshot::Receiver<u64>,
}

struct Pending {
    client: usize,
    attempt: u64,
    waiting: Waiting,
}

struct Process {
    replica: Replica,
    pending: Vec<Pending>,
    closing: Vec<Closing>,
}

struct Node {
    directory: Arc<MemoryDirectory>,
    process: Option<Process>,
    boot: u64,
    member: bool,
    /// Ahead of the true time, in milliseconds.
    clock: i64,
    /// Thousandths that its clock gains.
    drift: i64,
    /// How long its tick takes.
    tick: u64,
    paused_until: u64,
    away_since: Option<u64>,
    /// A bit on its disk was flipped.
    flipped: bool,
    /// Its files are damaged: it does not come back.
    lost: bool,
    /// It was a member and is none any more; replica ids are never used twice.
    left: bool,
    /// Until when its disk is slow, and how long it then takes for each step.
    slow: (u64, u64),
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
struct Client {
    current: Option<Current>,
    /// What it knows of each key: the value last seen, and its revision.
    seen: BTreeMap<(GroupId, String), (Value, Revision)>,
}

struct Network {
    loss: f64,
    repeat: f64,
    delay: u64,
    cut: BTreeSet<(u64, u64)>,
    number: u64,
}

struct Scheduled {
    at: u64,
    order: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Scheduled {}
impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

/// What a step of a node sent.
#[derive(Default)]
struct Sent(Vec<(NodeId, Frame)>);

impl Effects for Sent {
    fn send(&mut self, to: NodeId, frame: &Frame) -> bool {
        self.0.push((to, frame.clone()));
        true
    }

    fn applied(&mut self, _: &BTreeMap<GroupId, Group>, _: VecDeque<Batch>) {}
}

struct World<'a> {
    scenario: &'a Scenario,
    random: StdRng,
    now: u64,
    order: u64,
    queue: BinaryHeap<Reverse<Scheduled>>,
    nodes: BTreeMap<u64, Node>,
    network: Network,
    clients: Vec<Client>,
    history: BTreeMap<(GroupId, String), Vec<Operation>>,
    next_value: Value,
    /// The highest revision that a client was told.
    newest: Revision,
    closed: usize,
    next_attempt: u64,
    checks: Checks,
    compact_entries: u64,
    kept_entries: u64,
    piece_bytes: usize,
    calm: bool,
    /// Clients do nothing until then.
    lull_until: u64,
    counters: Arc<Counters>,
    /// An operation begun long after the last fault was not answered.
    stuck: Option<String>,
    faults: usize,
    trace: blake3::Hasher,
}

pub(super) fn run(seed: u64, scenario: &Scenario) -> Report {
    let mut world = World::new(seed, scenario);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.go()));
    let violation = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(violation)) => Some(violation),
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Some(format!("panic: {}", text.unwrap_or_default()))
        }
    };
    let operations = || world.history.values().flatten();
    let mut trace = [0; 8];
    trace.copy_from_slice(&world.trace.finalize().as_bytes()[..8]);
    Report {
        seed,
        answered: operations().filter(|o| o.returned.is_some()).count(),
        unknown: operations().filter(|o| o.returned.is_none()).count(),
        faults: world.faults,
        slept: world.counters.slept.load(Ordering::Relaxed),
        closed: world.closed,
        pieces: world.counters.snapshot_pieces_sent.load(Ordering::Relaxed),
        simulated_ms: world.now / 1000,
        trace: u64::from_le_bytes(trace),
        violation,
    }
}

impl<'a> World<'a> {
    fn new(seed: u64, scenario: &'a Scenario) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let nodes = (1..=scenario.nodes)
            .map(|replica| {
                let node = Node {
                    directory: Arc::default(),
                    process: None,
                    boot: 0,
                    member: replica == 1,
                    clock: random.random_range(-500..500),
                    drift: random.random_range(-50..=50),
                    tick: TICK * random.random_range(990..1010) / 1000,
                    paused_until: 0,
                    away_since: None,
                    flipped: false,
                    lost: false,
                    left: false,
                    slow: (0, 0),
                };
                (replica, node)
            })
            .collect();
        Self {
            scenario,
            now: 0,
            order: 0,
            queue: BinaryHeap::new(),
            nodes,
            network: Network {
                loss: 0.0,
                repeat: 0.0,
                delay: 5_000,
                cut: BTreeSet::new(),
                number: 0,
            },
            clients: (0..scenario.clients).map(|_| Client::default()).collect(),
            history: BTreeMap::new(),
            next_value: 1,
            newest: Revision::NONE,
            closed: 0,
            next_attempt: 1,
            checks: Checks::default(),
            compact_entries: random.random_range(15..80),
            kept_entries: random.random_range(0..30),
            piece_bytes: random.random_range(64..=512),
            calm: false,
            lull_until: 0,
            counters: Arc::default(),
            stuck: None,
            faults: 0,
            trace: blake3::Hasher::new(),
            random,
        }
    }

    fn groups(&self) -> Vec<GroupId> {
        std::iter::once(GroupId::META)
            .chain((1..self.scenario.groups).map(|number| GroupId::of_shard(number - 1)))
            .collect()
    }

    fn schedule(&mut self, after: u64, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Scheduled {
            at: self.now + after,
            order: self.order,
            event,
        }));
    }

    fn go(&mut self) -> Result<(), String> {
        self.start(1)?;
        let groups = self.groups();
        self.step(1, |replica| replica.bootstrap(groups))?;
        for client in 0..self.scenario.clients {
            self.schedule(SECOND + client as u64 * 1000, Event::Think { client });
        }
        self.schedule(2 * SECOND, Event::Fault);
        self.schedule(3 * SECOND, Event::Census);
        self.schedule(SECOND, Event::Close);
        let faulty = self.scenario.faulty_ms * 1000;
        self.run_until(faulty)?;
        self.become_calm()?;
        self.run_until(faulty + self.scenario.calm_ms * 1000)?;
        self.verdict()
    }

    fn run_until(&mut self, end: u64) -> Result<(), String> {
        while let Some(Reverse(next)) = self.queue.peek() {
            if next.at > end {
                break;
            }
            let Some(Reverse(Scheduled { at, order, event })) = self.queue.pop() else {
                break;
            };
            self.now = at;
            self.trace.update(&at.to_le_bytes());
            self.trace.update(&order.to_le_bytes());
            self.on(event)?;
        }
        self.now = end;
        Ok(())
    }

    fn on(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Tick { node, boot } => self.on_tick(node, boot),
            Event::Frame { to, from, bytes } => {
                if let Some(until) = self.paused(to) {
                    self.schedule(until - self.now, Event::Frame { to, from, bytes });
                    return Ok(());
                }
                self.trace.update(&bytes);
                let frame = Frame::decode(&bytes).map_err(|error| error.to_string())?;
                self.step(to, |replica| {
                    replica.receive(node_id(from), frame);
                    Ok(())
                })
            }
            Event::Restart { node } => {
                let known = &self.nodes[&node];
                let away = known.process.is_none() && !known.lost && !known.left;
                if away { self.start(node) } else { Ok(()) }
            }
            Event::Members { node, boot } => {
                if self.nodes[&node].boot != boot {
                    return Ok(());
                }
                let members = self.members();
                self.step(node, |replica| {
                    replica.set_members(members);
                    Ok(())
                })
            }
            Event::Resume { node } => {
                self.trace.update(&node.to_le_bytes());
                Ok(())
            }
            Event::Think { client } => {
                self.think(client);
                Ok(())
            }
            Event::Ask {
                client,
                attempt,
                to,
            } => self.ask(client, attempt, to),
            Event::Answer {
                client,
                attempt,
                answer,
            } => {
                self.answer(client, attempt, answer);
                Ok(())
            }
            Event::Late { client, attempt } => {
                self.answer(client, attempt, Answer::Unknown);
                Ok(())
            }
            Event::Fault => self.fault(),
            Event::Close => self.close(),
            Event::Census => {
                self.tell_members();
                self.schedule(3 * SECOND, Event::Census);
                Ok(())
            }
            Event::Room { node } => {
                self.nodes[&node].directory.limit_room(None);
                Ok(())
            }
            Event::Gone { node } => {
                if let Some(node) = self.nodes.get_mut(&node) {
                    node.process = None;
                }
                Ok(())
            }
            Event::Heal { number } => {
                if self.network.number == number {
                    self.network.cut.clear();
                }
                Ok(())
            }
        }
    }

    // Nodes.

    fn members(&self) -> Vec<MemberInfo> {
        let away = |node: &Node| {
            node.away_since
                .is_some_and(|since| self.now.saturating_sub(since) > AWAY)
        };
        self.nodes
            .iter()
            .filter(|(_, node)| node.member)
            .map(|(replica, node)| MemberInfo {
                replica: *replica,
                node: node_id(*replica),
                operator: format!("operator-{}", replica % 4),
                grid_zone: format!("zone-{}", replica % 3),
                country: format!("country-{}", replica % 3),
                alive: !away(node),
                far: replica % 2 == 0,
            })
            .collect()
    }

    fn paused(&self, node: u64) -> Option<u64> {
        let until = self.nodes[&node].paused_until;
        (until > self.now).then_some(until)
    }

    fn start(&mut self, replica: u64) -> Result<(), String> {
        let (compact_entries, kept_entries) = (self.compact_entries, self.kept_entries);
        let piece_bytes = self.piece_bytes;
        let Some(node) = self.nodes.get_mut(&replica) else {
            return Ok(());
        };
        if node.boot == 0 {
            create_in(&*node.directory, owner(replica)).map_err(|_| "no catalog".to_owned())?;
        }
        node.boot += 1;
        let boot = node.boot;
        let settings = Settings {
            replica,
            election_ticks: 6,
            heartbeat_ticks: 3,
            boot_nonce: (replica << 32) | boot,
            seed: replica * 7919 + boot,
            compact_entries,
            compact_bytes: 64 * 1024,
            kept_entries,
            piece_bytes,
            counters: Arc::clone(&self.counters),
        };
        let directory = Box::new(Arc::clone(&node.directory));
        let opened = Disk::open_in(directory, Path::new("simulated"), owner(replica)).and_then(
            |(mut disk, groups)| {
                disk.limit_segments(SEGMENT);
                disk.limit_slices(SLICE);
                Replica::new(settings, disk, groups)
            },
        );
        match opened {
            Ok(started) => {
                node.process = Some(Process {
                    replica: started,
                    pending: Vec::new(),
                    closing: Vec::new(),
                });
                node.away_since = None;
                node.paused_until = 0;
                self.checks.restarted(replica);
                let tick = self.random.random_range(1..TICK);
                self.schedule(
                    tick,
                    Event::Tick {
                        node: replica,
                        boot,
                    },
                );
                let members = self.members();
                self.step(replica, |replica| {
                    replica.set_members(members);
                    Ok(())
                })?;
                self.tell_members();
                Ok(())
            }
            // The power went again while it started.
            Err(DiskError::Io(_)) => {
                self.stop(replica, true);
                Ok(())
            }
            Err(DiskError::Full(_)) => {
                self.stop(replica, false);
                Ok(())
            }
            // It says so, and serves nothing.
            Err(DiskError::Damaged { .. } | DiskError::Foreign { .. })
                if self.nodes[&replica].flipped =>
            {
                if let Some(node) = self.nodes.get_mut(&replica) {
                    node.lost = true;
                }
                Ok(())
            }
            Err(error) => Err(format!(
                "replica {replica} does not open its files: {error}"
            )),
        }
    }

    /// It is gone, and comes back after a while.
    fn stop(&mut self, replica: u64, power: bool) {
        let wait = self.random.random_range(100_000..8 * SECOND);
        let wait = if self.calm { wait / 8 } else { wait };
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&replica) else {
            return;
        };
        node.process = None;
        node.away_since.get_or_insert(now);
        node.paused_until = 0;
        if power {
            node.directory.power_cut();
        }
        self.schedule(wait, Event::Restart { node: replica });
    }

    fn tell_members(&mut self) {
        let nodes: Vec<(u64, u64)> = self
            .nodes
            .iter()
            .map(|(id, node)| (*id, node.boot))
            .collect();
        for (node, boot) in nodes {
            let after = self.random.random_range(1_000..SECOND);
            self.schedule(after, Event::Members { node, boot });
        }
    }

    fn on_tick(&mut self, node: u64, boot: u64) -> Result<(), String> {
        if self.nodes[&node].boot != boot || self.nodes[&node].process.is_none() {
            return Ok(());
        }
        if let Some(until) = self.paused(node) {
            self.schedule(until - self.now, Event::Tick { node, boot });
            return Ok(());
        }
        let tick = self.nodes[&node].tick;
        self.schedule(tick, Event::Tick { node, boot });
        self.step(node, |replica| {
            replica.tick();
            Ok(())
        })
    }

    /// Gives something to a node and lets it work.
    fn step(
        &mut self,
        own: u64,
        give: impl FnOnce(&mut Replica) -> Result<(), DiskError>,
    ) -> Result<(), String> {
        let Some(mut process) = self
            .nodes
            .get_mut(&own)
            .and_then(|node| node.process.take())
        else {
            return Ok(());
        };
        let mut sent = Sent::default();
        let worked = give(&mut process.replica).and_then(|()| process.replica.rounds(&mut sent));
        let took = self.work_time(own);
        for (to, frame) in sent.0 {
            self.checks.sent(&frame)?;
            self.send(own, u64::from(to.as_bytes()[0]), &frame, took)?;
        }
        match worked {
            Ok(()) => {
                self.checks.look(&process.replica)?;
                self.answer_pending(&mut process);
                self.answer_closing(&mut process)?;
                if let Some(node) = self.nodes.get_mut(&own) {
                    node.process = Some(process);
                }
                Ok(())
            }
            Err(DiskError::Io(_)) => {
                // What was answered before is answered.
                self.answer_pending(&mut process);
                // The process alone, or the whole machine.
                let power = self.random.random_bool(0.7);
                self.nodes[&own].directory.never_fail();
                self.stop(own, power);
                Ok(())
            }
            Err(DiskError::Full(_)) => {
                self.answer_pending(&mut process);
                self.stop(own, false);
                Ok(())
            }
            Err(error) => Err(format!("replica {own}: {error}")),
        }
    }

    /// How long a slow disk holds up what a step sends, and everything after it.
    fn work_time(&mut self, own: u64) -> u64 {
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&own).filter(|node| node.slow.0 > now) else {
            return 0;
        };
        let took = node.slow.1;
        node.paused_until = node.paused_until.max(now + took);
        took
    }

    fn answer_pending(&mut self, process: &mut Process) {
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

    fn answer_closing(&mut self, process: &mut Process) -> Result<(), String> {
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

    /// Somebody needs to know everything up to the newest revision that was seen.
    fn close(&mut self) -> Result<(), String> {
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

    // The network.

    fn send(&mut self, from: u64, to: u64, frame: &Frame, held: u64) -> Result<(), String> {
        if self.network.cut.contains(&(from, to)) || self.random.random_bool(self.network.loss) {
            return Ok(());
        }
        let bytes = Bytes::from(frame.encode().map_err(|error| error.to_string())?);
        let copies = if self.random.random_bool(self.network.repeat) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let after = held + self.random.random_range(100..=self.network.delay);
            let bytes = bytes.clone();
            self.schedule(after, Event::Frame { to, from, bytes });
        }
        Ok(())
    }

    // Clients.

    fn think(&mut self, client: usize) {
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

    fn ask(&mut self, client: usize, attempt: u64, to: u64) -> Result<(), String> {
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
        let node = &self.nodes[&to];
        let shown = (self.now / 1000) as i64 * (1000 + node.drift) / 1000 + node.clock;
        let now = Timestamp::from_millis(EPOCH_MS + shown);
        let (group, key) = current.key.clone();
        let (request, expect, asked) = (current.request, current.expect, current.asked);
        // Clients with an even number are at one site.
        let origin = (client % 2 == 0).then_some(2);
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

    fn answer(&mut self, client: usize, attempt: u64, answer: Answer) {
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
        if got.is_none() && begun > self.scenario.faulty_ms * 1000 + RECOVERY {
            let (group, key) = &current.key;
            self.stuck = Some(format!(
                "{key} in {group} was asked for {:.1} s after the last fault and there was no answer",
                (begun - self.scenario.faulty_ms * 1000) as f64 / SECOND as f64
            ));
        }
        self.order += 1;
        let returned = got.map(|got| (self.order, got));
        if let Some(operations) = self.history.get_mut(&current.key) {
            operations[current.place].returned = returned;
        }
        if !self.calm || self.now < self.end_of_work() {
            let lull = self.lull_until.saturating_sub(self.now);
            let after = lull + self.random.random_range(1_000..400_000);
            self.schedule(after, Event::Think { client });
        }
    }

    /// Clients begin nothing new in the last part of the calm.
    fn end_of_work(&self) -> u64 {
        (self.scenario.faulty_ms + self.scenario.calm_ms / 2) * 1000
    }

    // Faults.

    fn fault(&mut self) -> Result<(), String> {
        if self.calm {
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

    /// Whether one member may be lost for ever: none is yet, and enough of the others know that
    /// every group has this many voters. What nobody else has would be lost with it.
    fn can_spare(&self, voters: usize) -> bool {
        let spent = |node: &Node| node.flipped || node.left;
        let groups = usize::from(self.scenario.groups);
        let grown = |process: &&Process| {
            let replicas = &process.replica.core.groups;
            replicas.len() == groups
                && replicas
                    .values()
                    .all(|group| group.voters().len() >= voters)
        };
        let running = self.nodes.values().filter_map(|node| node.process.as_ref());
        !self.nodes.values().any(spent) && running.filter(grown).count() >= 3
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

    /// The process ends; what it wrote is in the file system's memory.
    fn kill(&mut self, victim: u64) {
        if self.nodes[&victim].process.is_some() {
            self.nodes[&victim].directory.never_fail();
            self.stop(victim, false);
        }
    }

    fn partition(&mut self, members: &[u64]) {
        let side: BTreeSet<u64> = members
            .iter()
            .copied()
            .filter(|_| self.random.random_bool(0.5))
            .collect();
        let one_way = self.random.random_bool(0.2);
        for a in members {
            for b in members {
                if side.contains(a) && !side.contains(b) {
                    self.network.cut.insert((*a, *b));
                    if !one_way {
                        self.network.cut.insert((*b, *a));
                    }
                }
            }
        }
        self.heal_later();
    }

    fn heal_later(&mut self) {
        self.network.number += 1;
        let number = self.network.number;
        let after = self.random.random_range(SECOND / 2..8 * SECOND);
        self.schedule(after, Event::Heal { number });
    }

    fn become_calm(&mut self) -> Result<(), String> {
        self.calm = true;
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

    // The end.

    /// Who votes and leads, for a report.
    fn groups_now(&self) -> String {
        let mut text = String::new();
        for (id, node) in self.nodes.iter().filter(|(_, node)| node.member) {
            let _ = write!(
                text,
                "replica {id}{}:",
                if node.lost { " (lost)" } else { "" }
            );
            for group in node
                .process
                .iter()
                .flat_map(|p| p.replica.core.groups.values())
            {
                let raft = &group.raw.raft;
                let _ = write!(
                    text,
                    " {} {:?} term {} leader {:?} voters {:?} log {} committed {};",
                    group.id,
                    raft.state,
                    raft.term,
                    group.leader(),
                    group.voters(),
                    raft.raft_log.last_index(),
                    raft.raft_log.committed,
                );
            }
            text.push('\n');
        }
        text
    }

    fn verdict(&self) -> Result<(), String> {
        if let Some(stuck) = &self.stuck {
            return Err(format!("{stuck}\n{}", self.groups_now()));
        }
        for (id, client) in self.clients.iter().enumerate() {
            if client.current.is_some() {
                return Err(format!(
                    "client {id} is still without an answer, long after the last fault"
                ));
            }
        }
        let mut replicas = Vec::new();
        let expected = |(_, node): &(&u64, &Node)| node.member && !node.lost;
        for (id, node) in self.nodes.iter().filter(expected) {
            match &node.process {
                Some(process) => replicas.push(&process.replica),
                None => return Err(format!("replica {id} has not come back")),
            }
        }
        let late = self
            .history
            .values()
            .flatten()
            .filter(|operation| operation.returned.is_some())
            .count();
        if late == 0 {
            return Err("nothing was ever answered".to_owned());
        }
        Checks::equal(&replicas)?;
        for ((group, key), operations) in &self.history {
            // What is there in the end was there for everybody to read.
            let mut operations = operations.clone();
            let machine = replicas[0].core.groups[group].machine.read();
            let value = machine.get(key).map_or(0, |entry| {
                let mut value = [0; 8];
                value.copy_from_slice(&entry.value);
                u64::from_le_bytes(value)
            });
            operations.push(Operation {
                asked: Asked::Read,
                invoked: u64::MAX - 1,
                returned: Some((u64::MAX, Got::Value(value))),
            });
            if !linearizable(&operations) {
                return Err(format!(
                    "the history of {key} in {group} is not linearizable"
                ));
            }
        }
        Ok(())
    }
}
