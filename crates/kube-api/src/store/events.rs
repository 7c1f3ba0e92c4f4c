//! The log of events that watches follow.

use std::collections::VecDeque;

use parking_lot::Mutex;
use tokio::sync::watch;

use super::LazyObject;
use crate::error::ApiError;

/// What happened to an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    /// It is new.
    Added,
    /// It changed.
    Modified,
    /// It is gone.
    Deleted,
}

/// One event.
#[derive(Debug, Clone)]
pub struct Event {
    /// What happened.
    pub kind: EventKind,
    /// Group and plural of the object's kind.
    pub resource: (String, String),
    /// The object after the event (before it, when deleted), with `resourceVersion` set.
    pub object: LazyObject,
    /// The object before the event.
    pub previous: Option<LazyObject>,
    /// The event's revision.
    pub revision: u64,
}

/// Events in the order of their revisions, the newest `capacity` of them. Watches read it by
/// position: none has a queue of its own.
#[derive(Debug)]
pub struct EventLog {
    inner: Mutex<Log>,
    newest: watch::Sender<u64>,
    capacity: usize,
}

#[derive(Debug, Default)]
struct Log {
    /// Position of the first event kept.
    first: u64,
    events: VecDeque<Event>,
    /// Resuming from a revision below this may miss something.
    floor: u64,
    /// Why no events come.
    stalled: Option<String>,
}

/// Reading on from a position.
#[derive(Debug)]
pub enum Read {
    /// Events and the next position.
    Events(Vec<Event>, u64),
    /// The position is no longer kept.
    Gone,
}

impl EventLog {
    /// An empty log; resuming from revisions below `floor` is refused.
    pub fn new(capacity: usize, floor: u64) -> Self {
        Self {
            inner: Mutex::new(Log {
                floor,
                ..Log::default()
            }),
            newest: watch::channel(0).0,
            capacity,
        }
    }

    /// Appends events, none of which may have a lower revision than one that is there.
    pub fn append(&self, events: impl IntoIterator<Item = Event>) {
        let end = {
            let mut log = self.inner.lock();
            for event in events {
                log.events.push_back(event);
                if log.events.len() > self.capacity
                    && let Some(dropped) = log.events.pop_front()
                {
                    log.first += 1;
                    log.floor = log.floor.max(dropped.revision);
                }
            }
            log.first + log.events.len() as u64
        };
        self.newest.send_replace(end);
    }

    /// Everything known is void (a snapshot replaced the state): all watches must start anew.
    pub fn reset(&self, floor: u64) {
        let end = {
            let mut log = self.inner.lock();
            log.first += log.events.len() as u64 + 1;
            log.events.clear();
            log.floor = log.floor.max(floor);
            log.first
        };
        self.newest.send_replace(end);
    }

    /// The position after the newest event.
    pub fn end(&self) -> u64 {
        let log = self.inner.lock();
        log.first + log.events.len() as u64
    }

    /// The position from which a watch goes on that has seen `revision`. Events up to `revision`
    /// that another server has shown already may still come, and are to be passed over.
    ///
    /// # Errors
    /// 410 when that is no longer kept.
    pub fn position_after(&self, revision: u64) -> Result<u64, ApiError> {
        let log = self.inner.lock();
        if revision < log.floor {
            return Err(ApiError::gone(format!(
                "resourceVersion {revision} is too old (the oldest kept is {}): list again",
                log.floor
            )));
        }
        let seen = log
            .events
            .partition_point(|event| event.revision <= revision);
        Ok(log.first + seen as u64)
    }

    /// Up to `limit` events from `position` on.
    pub fn read(&self, position: u64, limit: usize) -> Read {
        let log = self.inner.lock();
        let end = log.first + log.events.len() as u64;
        if position < log.first {
            return Read::Gone;
        }
        let from = (position - log.first) as usize;
        let events: Vec<Event> = log.events.iter().skip(from).take(limit).cloned().collect();
        let next = (position + events.len() as u64).min(end.max(position));
        Read::Events(events, next)
    }

    /// All events after a revision.
    ///
    /// # Errors
    /// 410 when they are not all kept.
    pub(super) fn after(&self, revision: u64) -> Result<Vec<Event>, ApiError> {
        match self.read(self.position_after(revision)?, usize::MAX) {
            Read::Events(events, _) => Ok(events),
            Read::Gone => Err(ApiError::gone("the log was begun anew: list again")),
        }
    }

    /// Says why no events come, so that nobody waits for them without knowing; `None`: they come.
    pub fn stall(&self, reason: Option<String>) {
        self.inner.lock().stalled = reason;
        // Who waits looks.
        self.newest.send_modify(|_| {});
    }

    /// What a watch is to be refused with as long as no events come.
    ///
    /// # Errors
    /// 503 with the reason.
    pub fn check_flow(&self) -> Result<(), ApiError> {
        match &self.inner.lock().stalled {
            None => Ok(()),
            Some(reason) => Err(ApiError {
                // It has lasted already, and kubectl would repeat the request ten times.
                retry_after: None,
                ..ApiError::unavailable(reason)
            }),
        }
    }

    /// Whether somebody waits for events.
    pub fn is_watched(&self) -> bool {
        self.newest.receiver_count() > 0
    }

    /// Wakes when events were appended.
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn event(revision: u64) -> Event {
        Event {
            kind: EventKind::Added,
            resource: (String::new(), "x".to_owned()),
            object: Arc::new(json!({})).into(),
            previous: None,
            revision,
        }
    }

    #[test]
    fn a_watch_resumes_exactly_where_it_was_or_is_told_that_it_cannot() {
        let log = EventLog::new(3, 10);
        log.append([event(11), event(12), event(14)]);
        for (seen, later) in [
            (11, vec![12, 14]),
            (13, vec![14]),
            (14, vec![]),
            (99, vec![]),
        ] {
            let Read::Events(events, _) = log.read(log.position_after(seen).unwrap(), 10) else {
                panic!("gone")
            };
            assert_eq!(events.iter().map(|e| e.revision).collect::<Vec<_>>(), later);
        }
        assert_eq!(log.position_after(9).unwrap_err().code, 410);
        let old = log.position_after(10).unwrap();
        log.append([event(20)]);
        assert!(matches!(log.read(old, 10), Read::Gone));
        let now = log.end();
        log.reset(30);
        assert!(matches!(log.read(now, 10), Read::Gone));
    }
}
