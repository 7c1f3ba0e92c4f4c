//! The thread that owns the core, its files and its clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use krake_model::ids::{GroupId, NodeId};
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use parking_lot::RwLock;
use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};

use crate::command::Command;
use crate::core::{Batch, GroupStatus, Origin, Settings};
use crate::disk::{DiskError, Home};
use crate::feeds::Feeds;
use crate::follow::History;
use crate::group::{Group, Outcome};
use crate::host::Transport;
use crate::inputs::Inputs;
use crate::inspect::{Counters, GroupDetail, TransferError};
use crate::machine::Machine;
use crate::replica::{Effects, Replica};
use crate::voters::MemberInfo;
use crate::wire::Frame;

/// Inputs taken into one round at most.
const ROUND_INPUTS: usize = 512;
/// How often the thread lets others go first, as long as they bring something, before a round.
const GATHERINGS_MAX: usize = 4;
/// Whoever brought so many entries to the last round will bring more: there is a crowd,
const CROWD: usize = 4;
/// and a round that has fewer than this waits for it once,
const CROWDED: usize = 32;
/// this long and what the system's timer adds (50 microseconds on Linux). Measured with 64 clients
/// (docs/benchmarks.md, 2026-11-28, at night): a thread that sleeps is let on when it wakes, one
/// that yields again and again waits for the others' time slices.
const CROWD_PAUSE: Duration = Duration::from_micros(150);
/// How long followers wait at most to be told what is committed. What goes to them in this time
/// anyway tells them, too: of the messages that a lonely write takes, a third are spared.
pub(crate) const TELL_WITHIN: Duration = Duration::from_millis(1);
/// How often a full disk is asked for room.
const ROOM_INTERVAL: Duration = Duration::from_secs(1);
/// A disk is slow when its writes take longer than this, on the average of the last ones (weight
/// 1/8 for each new one): a leader's commits wait for it, a follower's do not.
const SLOW_WRITE: Duration = Duration::from_millis(250);
/// It is well again below this.
const QUICK_WRITE: Duration = Duration::from_millis(50);
/// Stamps that are further ahead of a node's own clock are worth a warning (DESIGN 13.3).
const STAMPS_AHEAD: Duration = Duration::from_secs(60);

/// What the thread is told.
pub(crate) enum Input {
    Frame(NodeId, Frame),
    Propose(GroupId, Command, Origin, oneshot::Sender<Outcome>),
    Read(GroupId, oneshot::Sender<()>),
    /// Close the stamps up to this one, where led here: see `Core::close`.
    Close(Revision, Vec<(GroupId, oneshot::Sender<u64>)>),
    /// Answer when a group is applied up to this index.
    Applied(GroupId, u64, oneshot::Sender<()>),
    Members(Vec<MemberInfo>),
    Bootstrap(Vec<GroupId>, oneshot::Sender<Result<(), DiskError>>),
    HandOver(oneshot::Sender<usize>),
    Reluctant(bool),
    Transfer(GroupId, u64, oneshot::Sender<TransferStart>),
    Look(oneshot::Sender<Vec<GroupDetail>>),
    Stop,
}

/// Begun, done already, refused; or (`Err(None)`) this node does not lead the group.
pub(crate) type TransferStart = Result<bool, Option<TransferError>>;

/// What a round takes, in entries: those are written, once however many they are. Reads, answers
/// and heartbeats are none; who reads would only wait longer.
#[derive(Debug, Default)]
pub(crate) struct Load {
    now: usize,
    last: usize,
}

/// What the thread does before it looks for more to take into a round.
#[derive(Debug, PartialEq, Eq)]
enum Courtesy {
    Yield,
    Pause,
    Nothing,
}

impl Load {
    fn take(&mut self, input: &Input) {
        self.now += match input {
            Input::Propose(..) => 1,
            Input::Frame(_, frame) => frame.entries(),
            _ => 0,
        };
    }

    fn begin_round(&mut self) {
        self.last = std::mem::take(&mut self.now);
    }

    const fn courtesy(&self) -> Courtesy {
        if self.last < CROWD {
            Courtesy::Yield
        } else if self.now < CROWDED {
            Courtesy::Pause
        } else {
            Courtesy::Nothing
        }
    }
}

pub(crate) type Machines = Arc<RwLock<BTreeMap<GroupId, Arc<RwLock<Machine>>>>>;

/// The thread's state.
pub(crate) struct Engine {
    pub(crate) replica: Replica,
    pub(crate) settings: Settings,
    pub(crate) home: Box<dyn Home>,
    /// As told last.
    pub(crate) members: Vec<MemberInfo>,
    /// How often the catalog was opened again.
    pub(crate) lives: u64,
    /// As told.
    pub(crate) reluctant: bool,
    /// The disk is slow.
    pub(crate) slow: bool,
    pub(crate) full: watch::Sender<bool>,
    pub(crate) output: Output,
    pub(crate) status: watch::Sender<BTreeMap<GroupId, GroupStatus>>,
    pub(crate) load: Load,
    pub(crate) clock: Box<dyn Fn() -> Timestamp + Send>,
    pub(crate) tick: Duration,
}

/// Where the replicas' effects go.
pub(crate) struct Output {
    pub(crate) inputs: Inputs<Input>,
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) machines: Machines,
    pub(crate) feeds: Arc<Feeds>,
    pub(crate) history: Arc<History>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) writing_since: Instant,
    /// Average of the last writes.
    pub(crate) write_time: Duration,
}

impl Output {
    /// The groups were read anew: whoever watches must read anew, too.
    fn begin_anew(&self, groups: &BTreeMap<GroupId, Group>) {
        *self.machines.write() = groups
            .iter()
            .map(|(id, group)| (*id, Arc::clone(&group.machine)))
            .collect();
        for (id, group) in groups {
            let batch = Batch {
                group: *id,
                revision: group.machine.read().last_stamp,
                reset: true,
                changes: Arc::new([]),
            };
            self.history.note(&batch, group.machine.read().bytes());
            self.feeds.tell(&VecDeque::from([batch]));
        }
    }
}

impl Effects for Output {
    fn more(&self) -> bool {
        !self.inputs.is_empty()
    }

    fn writing(&mut self) {
        self.writing_since = Instant::now();
    }

    fn written(&mut self) {
        let took = self.writing_since.elapsed();
        self.write_time = (self.write_time * 7 + took) / 8;
        Counters::add(&self.counters.writes, 1);
        Counters::add(&self.counters.write_micros, took.as_micros() as u64);
    }

    fn send(&mut self, to: NodeId, frame: &Frame) -> bool {
        match frame.encode() {
            Ok(bytes) => self.transport.send(to, bytes),
            Err(error) => {
                error!(node = %to, %error, "a frame could not be written");
                true
            }
        }
    }

    fn applied(&mut self, groups: &BTreeMap<GroupId, Group>, batches: VecDeque<Batch>) {
        if groups.len() != self.machines.read().len() {
            *self.machines.write() = groups
                .iter()
                .map(|(id, group)| (*id, Arc::clone(&group.machine)))
                .collect();
        }
        for batch in &batches {
            let held = groups
                .get(&batch.group)
                .map(|group| group.machine.read().bytes());
            self.history.note(batch, held.unwrap_or(0));
        }
        if !batches.is_empty() {
            self.feeds.tell(&batches);
        }
    }
}

/// Nobody hears of it.
struct Unheard;

impl Effects for Unheard {
    fn send(&mut self, _: NodeId, _: &Frame) -> bool {
        true
    }

    fn applied(&mut self, _: &BTreeMap<GroupId, Group>, _: VecDeque<Batch>) {}
}

impl Engine {
    /// Works until it is told to stop or its files fail.
    pub(crate) fn run(&mut self) -> Result<(), DiskError> {
        loop {
            match self.serve() {
                Err(full @ DiskError::Full(_)) => {
                    error!(%full, "the catalog is read-only here");
                    if !self.wait_for_room()? {
                        return Ok(());
                    }
                    info!("there is room for the catalog again");
                }
                ended => return ended,
            }
        }
    }

    /// Without room nothing can be promised: the node counts as away for the others, which lead
    /// and vote without it. Writes that are sent to it go on to them. Then the catalog is opened
    /// again, for what is in memory may be ahead of what is on the disk. `false`: stop.
    fn wait_for_room(&mut self) -> Result<bool, DiskError> {
        self.full.send_replace(true);
        let own = self.settings.replica;
        self.status.send_modify(|known| {
            for group in known.values_mut() {
                group.leads = false;
                group.leader = group.leader.filter(|leader| *leader != own);
            }
        });
        loop {
            let again = Instant::now() + ROOM_INTERVAL;
            loop {
                let wait = again.saturating_duration_since(Instant::now());
                match self.output.inputs.recv_timeout(wait) {
                    Ok(Input::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(false),
                    Ok(Input::Members(members)) => self.members = members,
                    Ok(Input::Reluctant(reluctant)) => self.reluctant = reluctant,
                    Ok(Input::Propose(_, _, _, reply)) => {
                        let _ = reply.send(Outcome::NotLeader(None));
                    }
                    Ok(Input::HandOver(reply)) => {
                        let _ = reply.send(0);
                    }
                    Ok(Input::Transfer(_, _, reply)) => {
                        let _ = reply.send(Err(None));
                    }
                    // Whoever waits learns that it is in vain.
                    Ok(
                        Input::Frame(..)
                        | Input::Read(..)
                        | Input::Close(..)
                        | Input::Applied(..)
                        | Input::Look(..)
                        | Input::Bootstrap(..),
                    ) => {}
                    Err(RecvTimeoutError::Timeout) => break,
                }
            }
            // Who waits for them learns that it is in vain.
            self.replica.core.groups.clear();
            self.replica.release_room();
            if self.home.has_room()? {
                match self.open_again() {
                    Err(DiskError::Full(_)) => {}
                    Err(error) => return Err(error),
                    Ok(()) => {
                        self.full.send_replace(false);
                        return Ok(true);
                    }
                }
            }
        }
    }

    fn open_again(&mut self) -> Result<(), DiskError> {
        self.lives += 1;
        let (disk, groups) = self.home.open()?;
        let mut settings = self.settings.clone();
        // Read contexts are never used twice.
        settings.boot_nonce ^= self.lives << 48;
        let mut replica = Replica::new(settings, disk, groups)?;
        replica.set_members(self.members.clone());
        replica.rounds(&mut Unheard)?;
        replica.set_reluctant(self.reluctant || self.slow);
        self.replica = replica;
        self.output.begin_anew(&self.replica.core.groups);
        self.rounds()
    }

    fn watch_disk(&mut self) {
        let average = self.output.write_time;
        let slow = average > if self.slow { QUICK_WRITE } else { SLOW_WRITE };
        if slow == self.slow {
            return;
        }
        self.slow = slow;
        self.replica.set_reluctant(self.reluctant || slow);
        let millis = average.as_millis() as u64;
        if slow {
            warn!(
                millis,
                "the disk is slow: others lead while it is, where they can"
            );
        } else {
            info!(millis, "the disk is quick again");
        }
    }

    /// Whether this node's time is that of the stamps. They are in order also when it is not.
    fn watch_clock(&mut self) {
        let stamped = self.replica.core.clock().timestamp().as_millis();
        let millis = u64::try_from(stamped - (self.clock)().as_millis()).unwrap_or(0);
        let counters = &self.output.counters;
        let before = counters.stamps_ahead_ms.swap(millis, Ordering::Relaxed);
        let limit = STAMPS_AHEAD.as_millis() as u64;
        if millis > limit && before <= limit {
            warn!(
                millis,
                "the catalog's stamps are ahead of this node's clock: it is behind, or another node's was ahead"
            );
        }
    }

    fn serve(&mut self) -> Result<(), DiskError> {
        let mut next_tick = Instant::now() + self.tick;
        let mut tell_at: Option<Instant> = None;
        loop {
            let next = tell_at.map_or(next_tick, |tell_at| tell_at.min(next_tick));
            // What is being given may be counted before it can be taken: nothing waits for it.
            let wait = if self.replica.holds() {
                Duration::ZERO
            } else {
                next.saturating_duration_since(Instant::now())
            };
            match self.output.inputs.recv_timeout(wait) {
                Ok(input) => {
                    if !self.take(input)? || !self.gather()? {
                        return Ok(());
                    }
                    self.load.begin_round();
                }
                // Only what the last round let go is sent: its crowd is still there.
                Err(RecvTimeoutError::Timeout) if wait.is_zero() => {}
                Err(RecvTimeoutError::Timeout) => self.load.begin_round(),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            let now = Instant::now();
            if now >= next_tick {
                self.replica.tick();
                self.watch_clock();
                // After a pause time goes on from here: lost ticks would only start elections.
                next_tick = (next_tick + self.tick).max(now + self.tick / 2);
            }
            if tell_at.is_some_and(|tell_at| now >= tell_at) {
                self.replica.tell();
                tell_at = None;
            }
            self.rounds()?;
            if !self.replica.has_untold() {
                tell_at = None;
            } else if tell_at.is_none() {
                tell_at = Some(Instant::now() + TELL_WITHIN);
            }
        }
    }

    /// Takes what else there is into the round; `false`: stop. Whoever waits for this core goes
    /// first, and a crowd is waited for: most likely it brings more, and a round costs a sync and a
    /// message to each peer, however much is in it.
    fn gather(&mut self) -> Result<bool, DiskError> {
        // Others wait for what the last round let go.
        let patient = !self.replica.holds();
        let (mut taken, mut paused) = (1, false);
        for _ in 0..GATHERINGS_MAX {
            match self.load.courtesy() {
                Courtesy::Yield if patient => std::thread::yield_now(),
                Courtesy::Pause if patient && !paused => {
                    std::thread::sleep(CROWD_PAUSE);
                    paused = true;
                }
                _ => {}
            }
            let before = taken;
            while taken < ROUND_INPUTS
                && let Ok(input) = self.output.inputs.try_recv()
            {
                if !self.take(input)? {
                    return Ok(false);
                }
                taken += 1;
            }
            if taken == before {
                break;
            }
        }
        Ok(true)
    }

    /// `false`: stop.
    fn take(&mut self, input: Input) -> Result<bool, DiskError> {
        self.load.take(&input);
        match input {
            Input::Frame(from, frame) => self.replica.receive(from, frame),
            Input::Propose(group, command, origin, reply) => {
                let now = (self.clock)();
                self.replica.propose(group, command, origin, reply, now);
            }
            Input::Read(group, reply) => self.replica.read(group, reply),
            Input::Close(at, groups) => {
                for (group, reply) in groups {
                    self.replica.close(group, at, reply);
                }
            }
            Input::Applied(group, index, reply) => self.replica.await_applied(group, index, reply),
            Input::Members(members) => {
                self.members.clone_from(&members);
                self.replica.set_members(members);
            }
            Input::Bootstrap(groups, reply) => {
                let made = self.replica.bootstrap(groups).and_then(|()| self.rounds());
                let told = match &made {
                    Ok(()) => Ok(()),
                    Err(DiskError::Full(path)) => Err(DiskError::Full(path.clone())),
                    Err(error) => Err(DiskError::Io(error.to_string())),
                };
                let _ = reply.send(told);
                made?;
            }
            Input::HandOver(reply) => {
                let _ = reply.send(self.replica.hand_over());
            }
            Input::Reluctant(reluctant) => {
                self.reluctant = reluctant;
                self.replica.set_reluctant(reluctant || self.slow);
            }
            Input::Transfer(group, to, reply) => {
                let _ = reply.send(self.replica.transfer(group, to));
            }
            Input::Look(reply) => {
                let _ = reply.send(self.replica.details());
            }
            Input::Stop => return Ok(false),
        }
        Ok(true)
    }

    /// Works until there is nothing left to do without new input.
    pub(crate) fn rounds(&mut self) -> Result<(), DiskError> {
        self.replica.rounds(&mut self.output)?;
        self.watch_disk();
        self.status
            .send_if_modified(|known| self.replica.update_status(known));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crowd_is_waited_for_once_and_somebody_alone_is_not() {
        let mut load = Load::default();
        let own = Origin {
            replica: 1,
            submitted: true,
        };
        let writes = |load: &mut Load, count: usize| {
            for _ in 0..count {
                let command = Command::new(Vec::new());
                let reply = oneshot::channel().0;
                load.take(&Input::Propose(GroupId::META, command, own, reply));
            }
        };
        for _ in 0..CROWDED {
            load.take(&Input::Read(GroupId::META, oneshot::channel().0));
        }
        writes(&mut load, CROWD - 1);
        load.begin_round();
        writes(&mut load, CROWD);
        assert_eq!(load.courtesy(), Courtesy::Yield);
        load.begin_round();
        writes(&mut load, 1);
        assert_eq!(load.courtesy(), Courtesy::Pause);
        writes(&mut load, CROWDED - 1);
        assert_eq!(load.courtesy(), Courtesy::Nothing);
        load.begin_round();
        load.begin_round();
        assert_eq!(load.courtesy(), Courtesy::Yield);
    }
}
