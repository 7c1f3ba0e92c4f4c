//! The simulated world: nodes, network, disks, clocks, clients, and what hurts them.

mod clients;
mod faults;
mod network;
mod nodes;
mod verdict;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use self::clients::{Answer, Client};
use self::network::Network;
use self::nodes::{Node, node_id};
use super::checks::Checks;
use super::history::{Operation, Value};
use super::{Report, Scenario};
use crate::inspect::Counters;
use crate::wire::Frame;

const SECOND: u64 = 1_000_000;
/// Without anything to do every group is silent within this time.
const SILENT_WITHIN: u64 = 120 * SECOND;

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
    More {
        node: u64,
        boot: u64,
    },
    Tell {
        node: u64,
        boot: u64,
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
    Flood {
        group: GroupId,
        alone: u64,
    },
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
    /// Since when there are no faults.
    calm: Option<u64>,
    /// Messages of groups that were sent.
    messages: usize,
    rounds: u64,
    /// The highest replica id that was given.
    newest_replica: u64,
    /// Clients do nothing until then.
    lull_until: u64,
    counters: Arc<Counters>,
    /// What clients saw cannot have been.
    wrong: Option<String>,
    /// Operations that are forgotten, with and without an answer.
    answered: usize,
    given_up: usize,
    /// An operation begun long after the last fault was not answered.
    stuck: Option<String>,
    faults: usize,
    gone: u64,
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
        answered: world.answered + operations().filter(|o| o.returned.is_some()).count(),
        unknown: world.given_up + operations().filter(|o| o.returned.is_none()).count(),
        faults: world.faults,
        slept: world.counters.slept.load(Ordering::Relaxed),
        closed: world.closed,
        pieces: world.counters.snapshot_pieces_sent.load(Ordering::Relaxed),
        rounds: world.rounds,
        members: world.newest_replica,
        gone: world.gone,
        simulated_ms: world.now / 1000,
        trace: u64::from_le_bytes(trace),
        violation,
    }
}

impl<'a> World<'a> {
    fn new(seed: u64, scenario: &'a Scenario) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let nodes = (1..=scenario.nodes)
            .map(|replica| (replica, Node::new(&mut random, replica == 1)))
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
            calm: None,
            messages: 0,
            rounds: 0,
            newest_replica: scenario.nodes,
            lull_until: 0,
            counters: Arc::default(),
            wrong: None,
            answered: 0,
            given_up: 0,
            stuck: None,
            faults: 0,
            gone: 0,
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
        loop {
            self.run_until(self.now + self.scenario.faulty_ms * 1000)?;
            self.become_calm()?;
            self.run_until(self.now + self.scenario.calm_ms * 1000)?;
            self.settle()?;
            self.verdict()?;
            self.rounds += 1;
            if self.now >= self.scenario.long_ms * 1000 {
                return Ok(());
            }
            self.rest()?;
            self.begin_again();
        }
    }

    /// Nobody asks for anything, and nothing fails.
    fn rest(&mut self) -> Result<(), String> {
        let most = (2000 * self.scenario.rest_ms).max(1);
        let end = self.now + self.random.random_range(0..most);
        self.lull_until = end;
        self.run_until(end.min(self.now + SILENT_WITHIN))?;
        let before = self.messages;
        self.run_until(end)?;
        let messages = self.messages - before;
        if messages > 0 {
            return Err(format!(
                "{messages} messages of groups were sent although there was nothing to do for {} s\n{}",
                SILENT_WITHIN / SECOND,
                self.groups_now()
            ));
        }
        Ok(())
    }

    /// After a round that was fine: its history is forgotten, and who is lost leaves for ever.
    fn begin_again(&mut self) {
        let values = self.values();
        for (key, operations) in &mut self.history {
            self.answered += operations.iter().filter(|o| o.returned.is_some()).count();
            self.given_up += operations.iter().filter(|o| o.returned.is_none()).count();
            operations.clear();
            if let Some(value) = values.get(key).filter(|value| **value != 0) {
                // It is not counted twice.
                self.answered -= 1;
                operations.push(Operation::found(*value, self.order, self.order + 1));
                self.order += 2;
            }
        }
        let spent: Vec<u64> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.is_spent())
            .map(|(id, _)| *id)
            .collect();
        for id in spent {
            self.nodes.remove(&id);
            self.checks.restarted(id);
        }
        while (self.nodes.len() as u64) < self.scenario.nodes {
            self.newest_replica += 1;
            let node = Node::new(&mut self.random, false);
            self.nodes.insert(self.newest_replica, node);
        }
        self.calm = None;
        for client in 0..self.scenario.clients {
            self.schedule(SECOND + client as u64 * 1000, Event::Think { client });
        }
        self.schedule(2 * SECOND, Event::Fault);
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
            if let Some(wrong) = self.wrong.take() {
                return Err(wrong);
            }
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
                self.cut_while_replacing(to, &frame);
                self.step(to, |replica| {
                    replica.receive(node_id(from), frame);
                    Ok(())
                })
            }
            Event::More { node, boot } => self.on_more(node, boot),
            Event::Tell { node, boot } => self.on_tell(node, boot),
            Event::Restart { node } => {
                let away = self
                    .nodes
                    .get(&node)
                    .is_some_and(|node| node.process.is_none() && !node.lost && !node.left);
                if away { self.start(node) } else { Ok(()) }
            }
            Event::Members { node, boot } => {
                if self.nodes.get(&node).is_none_or(|node| node.boot != boot) {
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
            Event::Flood { group, alone } => self.flood_others(group, alone),
            Event::Close => self.close(),
            Event::Census => {
                self.let_go();
                self.tell_members();
                self.checks.forget(self.now);
                self.schedule(3 * SECOND, Event::Census);
                Ok(())
            }
            Event::Room { node } => {
                if let Some(node) = self.nodes.get(&node) {
                    node.directory.limit_room(None);
                }
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
}
