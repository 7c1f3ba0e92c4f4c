//! What runs at each node: it starts, ticks, works and stops.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

use krake_model::ids::{FederationId, GroupId, NodeId};
use rand::RngExt as _;
use rand::rngs::StdRng;

use super::clients::{Closing, Pending};
use super::{Event, SECOND, World};
use crate::core::{Batch, Settings};
use crate::disk::{Disk, DiskError, create_in};
use crate::engine;
use crate::group::Group;
use crate::medium::memory::MemoryDirectory;
use crate::replica::{Effects, Replica};
use crate::voters::MemberInfo;
use crate::wal::Owner;
use crate::wire::Frame;

/// One tick of Raft.
const TICK: u64 = 100_000;
/// In microseconds.
const TELL_WITHIN: u64 = engine::TELL_WITHIN.as_micros() as u64;
/// How often something else waits when a node has done a step,
const MORE: f64 = 0.2;
/// and within how many microseconds it is taken.
const HELD_FOR: u64 = 500;
/// A node that is away for longer is replaced as a voter.
const AWAY: u64 = 10 * SECOND;
/// One that has been there for longer may take another one's vote.
const STEADY: u64 = 3 * SECOND;
/// A segment of the log is small, so that many come and go.
const SEGMENT: u64 = 3 * 1024;
/// So much of a snapshot is written at once, so that most take several rounds.
const SLICE: usize = 2000;

pub(super) struct Node {
    pub(super) directory: Arc<MemoryDirectory>,
    pub(super) process: Option<Process>,
    pub(super) boot: u64,
    pub(super) member: bool,
    /// Ahead of the true time, in milliseconds.
    pub(super) clock: i64,
    /// Thousandths that its clock gains.
    pub(super) drift: i64,
    /// How long its tick takes.
    tick: u64,
    pub(super) paused_until: u64,
    away_since: Option<u64>,
    started_at: u64,
    /// It is to give its votes away, and then to leave.
    pub(super) leaving: bool,
    /// A bit on its disk was flipped.
    pub(super) flipped: bool,
    /// Its files are damaged: it does not come back.
    pub(super) lost: bool,
    /// It was a member and is none any more; replica ids are never used twice.
    pub(super) left: bool,
    /// Until when its disk is slow, and how long it then takes for each step.
    pub(super) slow: (u64, u64),
}

impl Node {
    /// It may be gone for ever.
    pub(super) const fn is_spent(&self) -> bool {
        self.flipped || self.left
    }

    pub(super) fn new(random: &mut StdRng, member: bool) -> Self {
        Self {
            directory: Arc::default(),
            process: None,
            boot: 0,
            member,
            clock: random.random_range(-500..500),
            drift: random.random_range(-50..=50),
            tick: TICK * random.random_range(990..1010) / 1000,
            paused_until: 0,
            away_since: None,
            started_at: 0,
            leaving: false,
            flipped: false,
            lost: false,
            left: false,
            slow: (0, 0),
        }
    }
}

pub(super) struct Process {
    pub(super) replica: Replica,
    pub(super) pending: Vec<Pending>,
    pub(super) closing: Vec<Closing>,
    /// It is to be told that it is time to tell what is committed.
    telling: bool,
}

/// What a step of a node sent.
struct Sent {
    frames: Vec<(NodeId, Frame)>,
    /// Something else waits to be taken.
    more: bool,
}

impl Effects for Sent {
    fn send(&mut self, to: NodeId, frame: &Frame) -> bool {
        self.frames.push((to, frame.clone()));
        true
    }

    fn more(&self) -> bool {
        self.more
    }

    fn applied(&mut self, _: &BTreeMap<GroupId, Group>, _: VecDeque<Batch>) {}
}

pub(super) fn node_id(replica: u64) -> NodeId {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&replica.to_be_bytes());
    NodeId::from_bytes(bytes)
}

fn replica_of(node: NodeId) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&node.as_bytes()[..8]);
    u64::from_be_bytes(bytes)
}

fn owner(replica: u64) -> Owner {
    Owner {
        federation: FederationId::from_bytes([9; 32]),
        node: node_id(replica),
    }
}

impl World<'_> {
    pub(super) fn members(&self) -> Vec<MemberInfo> {
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
                heard: node.process.is_some(),
                steady: node.process.is_some() && node.started_at + STEADY < self.now,
                leaving: node.leaving,
                far: replica.is_multiple_of(2),
            })
            .collect()
    }

    pub(super) fn paused(&self, node: u64) -> Option<u64> {
        let until = self.nodes.get(&node)?.paused_until;
        (until > self.now).then_some(until)
    }

    pub(super) fn start(&mut self, replica: u64) -> Result<(), String> {
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
            compact_entries: (compact_entries, compact_entries),
            compact_entries_together: 0,
            compact_bytes: 64 * 1024,
            kept_entries,
            piece_bytes,
            counters: Arc::clone(&self.counters),
        };
        node.directory.limit_slices(SLICE);
        let directory = Box::new(Arc::clone(&node.directory));
        let opened = Disk::open_in(directory, Path::new("simulated"), owner(replica));
        if let Ok((_, logs)) = &opened {
            self.checks.read_back(replica, logs)?;
        }
        let opened = opened.and_then(|(mut disk, groups)| {
            disk.limit_segments(SEGMENT);
            Replica::new(settings, disk, groups)
        });
        match opened {
            Ok(started) => {
                node.process = Some(Process {
                    replica: started,
                    pending: Vec::new(),
                    closing: Vec::new(),
                    telling: false,
                });
                node.away_since = None;
                node.started_at = self.now;
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
    pub(super) fn stop(&mut self, replica: u64, power: bool) {
        let wait = self.random.random_range(100_000..8 * SECOND);
        let wait = if self.calm.is_some() { wait / 8 } else { wait };
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

    pub(super) fn tell_members(&mut self) {
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

    pub(super) fn on_tick(&mut self, node: u64, boot: u64) -> Result<(), String> {
        let running = |node: &&Node| node.boot == boot && node.process.is_some();
        let Some(tick) = self.nodes.get(&node).filter(running).map(|node| node.tick) else {
            return Ok(());
        };
        if let Some(until) = self.paused(node) {
            self.schedule(until - self.now, Event::Tick { node, boot });
            return Ok(());
        }
        self.schedule(tick, Event::Tick { node, boot });
        self.step(node, |replica| {
            replica.tick();
            Ok(())
        })
    }

    /// What waited is taken: here it is nothing, or has come before.
    pub(super) fn on_more(&mut self, node: u64, boot: u64) -> Result<(), String> {
        if let Some(until) = self.paused(node) {
            self.schedule(until - self.now, Event::More { node, boot });
            return Ok(());
        }
        if self.nodes.get(&node).is_none_or(|node| node.boot != boot) {
            return Ok(());
        }
        self.step(node, |_| Ok(()))
    }

    /// Whoever does not know what is committed has waited long enough.
    pub(super) fn on_tell(&mut self, node: u64, boot: u64) -> Result<(), String> {
        if let Some(until) = self.paused(node) {
            self.schedule(until - self.now, Event::Tell { node, boot });
            return Ok(());
        }
        let running = self.nodes.get_mut(&node).filter(|node| node.boot == boot);
        let Some(process) = running.and_then(|node| node.process.as_mut()) else {
            return Ok(());
        };
        process.telling = false;
        self.step(node, |replica| {
            replica.tell();
            Ok(())
        })
    }

    /// Gives something to a node and lets it work.
    pub(super) fn step(
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
        let mut sent = Sent {
            frames: Vec::new(),
            more: self.random.random_bool(MORE),
        };
        let worked = give(&mut process.replica).and_then(|()| process.replica.rounds(&mut sent));
        let took = self.work_time(own);
        for (to, frame) in sent.frames {
            self.checks.sent(&frame)?;
            self.send(own, replica_of(to), &frame, took)?;
        }
        match worked {
            Ok(()) => {
                self.checks.look(&process.replica)?;
                self.answer_pending(&mut process);
                self.answer_closing(&mut process)?;
                let tell = process.replica.has_untold() && !process.telling;
                process.telling |= tell;
                let Some(node) = self.nodes.get_mut(&own) else {
                    return Ok(());
                };
                let boot = node.boot;
                let holds = process.replica.holds();
                node.process = Some(process);
                if holds {
                    let soon = self.random.random_range(0..HELD_FOR);
                    self.schedule(soon, Event::More { node: own, boot });
                }
                if tell {
                    self.schedule(TELL_WITHIN, Event::Tell { node: own, boot });
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
}
