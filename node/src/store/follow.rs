//! What is applied becomes events of watches, those of all shards in one order.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::OptionFuture;
use krake_consensus::{Batch, Change, Entry, ReadError};
use krake_kube_api::store::set_revision;
use krake_kube_api::{Event, EventKind, LazyObject};
use krake_model::{GroupId, Revision};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{CatalogStore, WATCHED, newest, object};
use crate::catalog::{Catalog, PATIENCE};

/// Stamps of all shards are closed no more often than this while somebody watches.
const CLOSE_INTERVAL: Duration = Duration::from_millis(20);
/// When they could not be closed.
const CLOSE_PAUSE: Duration = Duration::from_secs(1);

impl CatalogStore {
    /// Everything that was missed is void.
    fn lose(&self, groups: &[GroupId]) {
        for group in groups {
            let revision = self.catalog.host.revision(*group).number();
            if let Some(events) = self.group_events.get(group) {
                events.reset(revision);
            }
            if *group != GroupId::META {
                self.merge.lock().lose(revision);
            }
        }
    }

    fn lose_all(&self) {
        self.lose(&Catalog::all_groups(self.catalog.shards));
    }

    fn take_all(self: &Arc<Self>, batches: &mut Receiver<Arc<[Batch]>>) {
        loop {
            match batches.try_recv() {
                Ok(round) => self.take(&round),
                Err(TryRecvError::Lagged(_)) => self.lose_all(),
                Err(TryRecvError::Empty | TryRecvError::Closed) => return,
            }
        }
    }

    fn take(self: &Arc<Self>, round: &[Batch]) {
        for batch in round {
            if batch.reset {
                self.lose(&[batch.group]);
            } else if self.known.get(&batch.group) < Some(&batch.revision) {
                self.take_changes(batch.group, batch.revision, &batch.changes);
            }
        }
    }

    pub(super) fn take_changes(
        self: &Arc<Self>,
        group: GroupId,
        revision: Revision,
        changes: &[Change],
    ) {
        let events = self.events_of(revision.number(), changes);
        if events.is_empty() {
            return;
        }
        if let Some(log) = self.group_events.get(&group) {
            log.append(events.iter().cloned());
        }
        if group != GroupId::META {
            self.merge.lock().take(revision.number(), events);
        }
    }

    fn events_of(self: &Arc<Self>, revision: u64, changes: &[Change]) -> Vec<Event> {
        let mut events = Vec::new();
        for change in changes {
            let Some(plural) = WATCHED.iter().find(|kind| change.key.starts_with(**kind)) else {
                continue;
            };
            let plural = plural.trim_end_matches('/');
            let plural = plural.to_owned();
            let gone = change.entry.is_none();
            let later = |entry: Entry| {
                let (overlay, key) = (Arc::clone(&self.overlay), change.key.clone());
                let plural = plural.clone();
                LazyObject::later(move || {
                    let mut object = object(&key, &entry)?;
                    overlay.add(&plural, &mut object);
                    if gone {
                        set_revision(&mut object, revision);
                    }
                    Some(object)
                })
            };
            let previous = change.previous.clone().map(later);
            let (kind, object) = match (change.entry.clone().map(later), &previous) {
                (Some(object), None) => (EventKind::Added, object),
                (Some(object), Some(_)) => (EventKind::Modified, object),
                (None, Some(previous)) => (EventKind::Deleted, previous.clone()),
                (None, None) => continue,
            };
            let groups: &[&str] = if plural == "events" {
                &["krake.dev", ""]
            } else {
                &["krake.dev"]
            };
            for group in groups {
                events.push(Event {
                    kind,
                    resource: ((*group).to_owned(), plural.clone()),
                    object: object.clone(),
                    previous: previous.clone(),
                    revision,
                });
            }
        }
        events
    }

    /// A shard's stamps could not be closed for [`PATIENCE`]: the events of all others wait for it.
    fn stall(&self, stalled: &mut bool, error: &ReadError) {
        if !*stalled {
            warn!(%error, "watches over all shards end: their events would wait");
        }
        *stalled = true;
        let reason = match error {
            ReadError::Timeout { .. } => format!(
                "events of all shards come in one order, and wait for one of them: {error}; reads with resourceVersion=0 and watches of one object do not wait"
            ),
            _ => error.to_string(),
        };
        self.events.stall(Some(reason));
    }

    /// No shard is waited for any more.
    fn flow(&self, stalled: &mut bool) {
        if std::mem::take(stalled) {
            info!("watches over all shards are served again");
            self.events.stall(None);
        }
    }

    /// Everything of all shards up to `revision` was taken.
    fn publish(&self, revision: u64) {
        let turn = self.merge.lock().close(revision);
        if let Some(floor) = turn.reset {
            self.events.reset(floor);
        }
        if !turn.events.is_empty() {
            self.events.append(turn.events);
        }
    }
}

/// Brings what is applied to those who watch. The events of all shards are put in order by having
/// the leaders close their stamps, as long as somebody watches them.
pub(super) async fn follow(store: Weak<CatalogStore>, mut batches: Receiver<Arc<[Batch]>>) {
    let Some((host, shards, wanted, first)) = store.upgrade().map(|store| {
        let shards = store.catalog.shard_groups();
        let first = newest(&store.catalog, &shards);
        let host = store.catalog.host.clone();
        (host, shards, Arc::clone(&store.wanted), first)
    }) else {
        return;
    };
    let close = |at: u64| {
        let (host, shards) = (host.clone(), shards.clone());
        async move {
            let stamp = Revision::from_number(at);
            (at, host.close(&shards, stamp, PATIENCE).await)
        }
    };
    // What is read locally before anybody watches has a revision to go on from, too.
    let mut closing = Some(Box::pin(close(first)));
    let (mut next, mut stalled, mut failed) = (Instant::now(), false, None);
    loop {
        let idle = closing.is_none();
        let pause = idle && next > Instant::now();
        let mut received = None;
        tokio::select! {
            batch = batches.recv() => received = Some(batch),
            Some((at, closed)) = OptionFuture::from(closing.as_mut()), if !idle => {
                closing = None;
                let Some(store) = store.upgrade() else { return };
                match closed {
                    Ok(()) => {
                        // Closed is what was told already; it may still be in the channel.
                        store.take_all(&mut batches);
                        store.closed.fetch_max(at, Ordering::Relaxed);
                        store.publish(at);
                        store.flow(&mut stalled);
                        failed = None;
                    }
                    Err(error) => {
                        if stalled || store.events.is_watched() {
                            store.stall(&mut stalled, &error);
                        } else {
                            debug!(%error, "stamps could not be closed");
                        }
                        failed = failed.max(Some(at));
                        next = Instant::now() + CLOSE_PAUSE;
                    }
                }
            }
            () = wanted.notified() => {}
            () = tokio::time::sleep_until(next), if pause => {}
        }
        let Some(store) = store.upgrade() else { return };
        match received {
            Some(Ok(round)) => {
                store.take(&round);
                store.take_all(&mut batches);
            }
            Some(Err(RecvError::Lagged(_))) => store.lose_all(),
            Some(Err(RecvError::Closed)) => return,
            None => {}
        }
        // Whoever watched was sent away: it is tried on until others can come.
        let wanted = stalled || store.events.is_watched();
        if closing.is_none() && next <= Instant::now() && wanted {
            let target = store.merge.lock().wanted().max(failed);
            closing = target.map(|at| Box::pin(close(at)));
            next = Instant::now() + CLOSE_INTERVAL;
        }
    }
}
