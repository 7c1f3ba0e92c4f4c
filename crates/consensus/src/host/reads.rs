//! What this node's replicas have, and when that is everything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use krake_model::codec::CodecError;
use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use parking_lot::RwLock;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, oneshot};

use super::{Host, RETRY_PAUSE_MAX, Staleness};
use crate::command::ReadError;
use crate::core::Batch;
use crate::engine::Input;
use crate::follow::{Compacted, Following, KeptChanges, Past};
use crate::machine::{Entry, Machine};

/// Which entries of a group are read.
#[derive(Debug, Clone, Copy)]
pub struct Part<'a> {
    /// What their keys start with.
    pub prefix: &'a str,
    /// Those after this key only, whether it is there or not.
    pub after: Option<&'a str>,
    /// So many of them; the others are counted.
    pub most: usize,
}

impl<'a> Part<'a> {
    /// All whose key starts with `prefix`.
    pub const fn all(prefix: &'a str) -> Self {
        Self {
            prefix,
            after: None,
            most: usize::MAX,
        }
    }

    fn take<'e>(&self, mut entries: impl Iterator<Item = (&'e String, &'e Entry)>) -> Listed {
        Listed {
            entries: entries.by_ref().take(self.most).map(owned).collect(),
            more: entries.count(),
        }
    }
}

/// What was read of a group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// In key order.
    pub entries: Vec<(String, Entry)>,
    /// How many there are after them that were not asked for.
    pub more: usize,
}

fn owned((key, entry): (&String, &Entry)) -> (String, Entry) {
    (key.clone(), entry.clone())
}

impl Host {
    fn machine(&self, group: GroupId) -> Option<Arc<RwLock<Machine>>> {
        self.shared.machines.read().get(&group).cloned()
    }

    /// Reads one key from this node's replica, as new as it has it.
    pub fn get(&self, group: GroupId, key: &str) -> Option<Entry> {
        self.machine(group)?.read().get(key).cloned()
    }

    /// Reads all entries whose key starts with `prefix` from this node's replica, in key order,
    /// and the group's newest stamp at that moment.
    pub fn list(&self, group: GroupId, prefix: &str) -> (Vec<(String, Entry)>, Revision) {
        let (listed, revision) = self.list_part(group, Part::all(prefix));
        (listed.entries, revision)
    }

    /// As [`Self::list`], a part of them.
    pub fn list_part(&self, group: GroupId, part: Part<'_>) -> (Listed, Revision) {
        let Some(machine) = self.machine(group) else {
            return (Listed::default(), Revision::NONE);
        };
        let machine = machine.read();
        let listed = part.take(machine.range(part.prefix, part.after));
        (listed, machine.last_stamp)
    }

    /// As [`Self::list_part`], as it was when the group's newest
    /// stamp was not above `at`. Whether all of that is here is for the caller to know, see
    /// [`Self::close`].
    ///
    /// # Errors
    /// [`Compacted`] when changes after `at` are not kept any more.
    pub async fn list_at(
        &self,
        group: GroupId,
        part: Part<'_>,
        at: Revision,
    ) -> Result<Listed, Compacted> {
        let mut applied = self.shared.feeds.group(group);
        let mut past = Past::at(at, part.prefix, part.after);
        loop {
            let Some(machine) = self.machine(group) else {
                return Ok(Listed::default());
            };
            // Most of it before the group is held up, the rest while it is.
            if machine.read().last_stamp > at {
                self.shared.history.look_back(group, &mut past)?;
            }
            {
                let machine = machine.read();
                let now = machine.range(part.prefix, part.after);
                if machine.last_stamp > past.known {
                    self.shared.history.look_back(group, &mut past)?;
                }
                if machine.last_stamp <= past.known {
                    return Ok(part.take(past.of(now)));
                }
            }
            // What was applied a moment ago is noted in the same breath.
            if let Err(RecvError::Closed) = applied.recv().await {
                return Ok(Listed::default());
            }
        }
    }

    /// A group for [`crate::BackupWriter::group`], as this node's replica has it; `None`: it has
    /// none.
    ///
    /// # Errors
    /// When it is too large for a record.
    pub fn group_backup(&self, group: GroupId) -> Option<Result<(u64, Bytes), CodecError>> {
        let machine = self.machine(group)?;
        let term = self.shared.status.borrow().get(&group)?.term;
        let encoded = machine.read().encode();
        Some(encoded.map(|bytes| (term, bytes.into())))
    }

    /// How far this node's replica of a group may be behind.
    pub fn staleness(&self, group: GroupId) -> Staleness {
        let machine = self.machine(group);
        let index = machine.map_or(0, |machine| machine.read().applied);
        let age = match self.leader(group) {
            Some(leader) if leader == self.shared.replica => Some(Duration::ZERO),
            leader => leader
                .and_then(|leader| self.node_of(leader))
                .and_then(|node| self.shared.heard.lock().get(&node).map(Instant::elapsed)),
        };
        Staleness { index, age }
    }

    /// The newest stamp this node's replica of a group has applied.
    pub fn revision(&self, group: GroupId) -> Revision {
        self.machine(group)
            .map_or(Revision::NONE, |machine| machine.read().last_stamp)
    }

    /// Entries and bytes this node's replica of a group holds.
    pub fn size(&self, group: GroupId) -> (usize, u64) {
        self.machine(group).map_or((0, 0), |machine| {
            let machine = machine.read();
            (machine.len(), machine.bytes())
        })
    }

    /// Waits until this node's replicas of `groups` have everything that was committed before the
    /// call, by `ReadIndex` (Ongaro 2014, §6.4): what is read after it is linearizable.
    ///
    /// # Errors
    /// [`ReadError::Timeout`] names the first group without an answer.
    pub async fn read_barrier(
        &self,
        groups: &[GroupId],
        timeout: Duration,
    ) -> Result<(), ReadError> {
        let deadline = tokio::time::Instant::now() + timeout;
        let reads = groups
            .iter()
            .map(|group| self.barrier_one(*group, deadline));
        futures::future::try_join_all(reads).await.map(|_| ())
    }

    async fn barrier_one(
        &self,
        group: GroupId,
        deadline: tokio::time::Instant,
    ) -> Result<(), ReadError> {
        loop {
            let (reply, answer) = oneshot::channel();
            if self.is_full() {
                return Err(ReadError::DiskFull);
            }
            let input = self.input(Input::Read(group, reply));
            match tokio::time::timeout_at(deadline, input).await {
                Err(_) => return Err(ReadError::Timeout { group }),
                Ok(taken) if !taken || self.failure().is_some() => return Err(ReadError::Stopped),
                Ok(_) => {}
            }
            match tokio::time::timeout_at(deadline, answer).await {
                Err(_) => return Err(ReadError::Timeout { group }),
                Ok(Ok(())) => return Ok(()),
                // Turned away, or the group is not here yet.
                Ok(Err(_)) => {
                    let wait = tokio::time::Instant::now() + RETRY_PAUSE_MAX;
                    if wait >= deadline {
                        return Err(ReadError::Timeout { group });
                    }
                    tokio::time::sleep_until(wait).await;
                }
            }
        }
    }

    /// From now on every command that may have changed something under one of these prefixes, in
    /// order within a group: what was applied together comes at once. A receiver that falls far
    /// behind gets `Lagged` and must read anew.
    pub fn watch(&self, prefixes: &[&str]) -> broadcast::Receiver<Arc<[Batch]>> {
        self.shared.feeds.prefixes(prefixes)
    }

    /// The changes that this node keeps of a group. After a restart those are what the log has beyond
    /// the group's snapshot. Whoever calls [`Self::watch`] first misses nothing in between; what is in
    /// both is not above [`KeptChanges::newest`].
    pub fn kept_changes(&self, group: GroupId) -> KeptChanges {
        self.shared.history.kept(group)
    }

    /// Every change of a group above a revision, in order, each once; at whichever node that
    /// revision was seen.
    ///
    /// # Errors
    /// [`Compacted`] when this node does not keep changes that old.
    pub fn follow(&self, group: GroupId, after: Revision) -> Result<Following, Compacted> {
        let (history, feeds) = (
            Arc::clone(&self.shared.history),
            Arc::clone(&self.shared.feeds),
        );
        Following::new(group, after, history, feeds)
    }
}
