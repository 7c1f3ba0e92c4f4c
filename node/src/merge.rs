//! Events of several shards in one order, so that a watch over all of them can go on at any node.
//!
//! A shard's events come in the order of their revisions; one that another shard shows later may
//! have a lower one. They wait here until the stamps up to some moment are closed
//! (`krake_consensus::Host::close`): nothing with a lower one will come then.

use std::collections::BTreeMap;

use krake_kube_api::Event;

/// Events that wait for their turn.
#[derive(Debug)]
pub struct Merge {
    waiting: BTreeMap<u64, Vec<Event>>,
    count: usize,
    capacity: usize,
    /// Of the events that found no room: the highest revision.
    dropped: Option<u64>,
}

/// What is to be done with the log that watches follow.
#[derive(Debug)]
pub struct Turn {
    /// Everything up to this revision is missing: watches have to begin anew.
    pub reset: Option<u64>,
    /// The next events, in order.
    pub events: Vec<Event>,
}

impl Merge {
    /// For so many events; beyond, the oldest are given up.
    pub const fn new(capacity: usize) -> Self {
        Self {
            waiting: BTreeMap::new(),
            count: 0,
            capacity,
            dropped: None,
        }
    }

    /// Takes the events of one command.
    pub fn take(&mut self, revision: u64, events: Vec<Event>) {
        if events.is_empty() {
            return;
        }
        self.count += events.len();
        self.waiting.entry(revision).or_default().extend(events);
        while self.count > self.capacity
            && let Some((revision, events)) = self.waiting.pop_first()
        {
            self.count -= events.len();
            self.dropped = self.dropped.max(Some(revision));
        }
    }

    /// A shard was read anew: what happened up to its revision is not known.
    pub fn lose(&mut self, revision: u64) {
        self.dropped = self.dropped.max(Some(revision));
    }

    /// The revision up to which stamps are to be closed next; `None`: nothing waits.
    pub fn wanted(&self) -> Option<u64> {
        let newest = self.waiting.last_key_value().map(|(revision, _)| *revision);
        newest.max(self.dropped)
    }

    /// Nothing up to `revision` will come any more, and all of it was taken.
    pub fn close(&mut self, revision: u64) -> Turn {
        let later = self.waiting.split_off(&(revision + 1));
        let now = std::mem::replace(&mut self.waiting, later);
        let reset = self.dropped.take_if(|dropped| *dropped <= revision);
        // What is below the gap is of no use to anybody.
        let known = now
            .into_iter()
            .filter(|(at, _)| reset.is_none_or(|reset| *at > reset));
        let events: Vec<Event> = known.flat_map(|(_, events)| events).collect();
        self.count = self.waiting.values().map(Vec::len).sum();
        Turn { reset, events }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use krake_kube_api::EventKind;
    use proptest::prelude::*;
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

    fn revisions(turn: &Turn) -> Vec<u64> {
        turn.events.iter().map(|event| event.revision).collect()
    }

    #[test]
    fn events_that_found_no_room_make_watches_begin_anew() {
        let mut merge = Merge::new(2);
        for revision in [10, 30, 20] {
            merge.take(revision, vec![event(revision)]);
        }
        assert_eq!(merge.wanted(), Some(30));
        let turn = merge.close(25);
        assert_eq!((turn.reset, revisions(&turn)), (Some(10), vec![20]));
        let turn = merge.close(30);
        assert_eq!((turn.reset, revisions(&turn)), (None, vec![30]));
        merge.lose(40);
        assert_eq!(merge.wanted(), Some(40));
        assert_eq!(merge.close(40).reset, Some(40));
        assert_eq!(merge.wanted(), None);
    }

    proptest! {
        /// However the shards' events come in between each other, the order is that of revisions.
        #[test]
        fn what_is_closed_comes_in_order_and_once(
            shards in prop::collection::vec(prop::collection::btree_set(1_u64..1000, 0..30), 1..6),
            turns in prop::collection::vec((0_usize..6, any::<bool>()), 0..300),
        ) {
            let mut left: Vec<_> = shards
                .iter()
                .enumerate()
                .map(|(shard, set)| {
                    // Revisions of different shards never tie.
                    set.iter().map(|r| r * 8 + shard as u64).collect::<std::collections::VecDeque<_>>()
                })
                .collect();
            let mut all: Vec<u64> = left.iter().flatten().copied().collect();
            all.sort_unstable();
            let mut merge = Merge::new(1000);
            let mut seen = Vec::new();
            for (shard, close) in turns {
                if let Some(revision) = left.get_mut(shard).and_then(std::collections::VecDeque::pop_front) {
                    merge.take(revision, vec![event(revision)]);
                }
                if close && let Some(wanted) = merge.wanted() {
                    let lowest = left.iter().filter_map(|shard| shard.front()).min();
                    let turn = merge.close(lowest.map_or(wanted, |lowest| wanted.min(lowest - 1)));
                    prop_assert!(turn.reset.is_none());
                    seen.extend(revisions(&turn));
                }
            }
            for revision in left.into_iter().flatten() {
                merge.take(revision, vec![event(revision)]);
            }
            seen.extend(revisions(&merge.close(u64::MAX - 1)));
            prop_assert_eq!(seen, all);
        }
    }
}
