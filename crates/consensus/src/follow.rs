//! Following a group from a revision on, at any node: every change above it, in order, once.
//!
//! Each node keeps the newest changes of each group. A group's revisions are the same everywhere
//! (they are decided when an entry is applied), so what one node has told another can go on from.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use itertools::{EitherOrBoth, Itertools as _};
use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use parking_lot::RwLock;
use thiserror::Error;
use tokio::sync::broadcast::{Receiver, error::RecvError};

use crate::core::Batch;
use crate::feeds::Feeds;
use crate::machine::{Change, Entry};

/// Bytes of changes that are kept of each group, however little is in it.
const KEPT_BYTES_MIN: usize = 1024 * 1024;
/// Commands whose changes are kept of each group at most.
const KEPT_COMMANDS_MAX: usize = 16 * 1024;
/// A reader takes so many commands at once from what is kept.
const TAKEN_MAX: usize = 256;
/// For each byte of a group's data so many of its changes: everything may be written anew once, with
/// what was there before, while a watch is away or a list is read in pages.
const KEPT_FACTOR: usize = 2;
/// What a change takes besides its key and its values.
const CHANGE_OVERHEAD: usize = 256;

/// The changes that a watch should go on from are not kept any more: list, and watch from there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the changes after revision {} are not kept any more, only those after {}: list again", after.number(), oldest.number())]
pub struct Compacted {
    /// What was asked for.
    pub after: Revision,
    /// What can be asked for.
    pub oldest: Revision,
}

/// What one command changed. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// The group's revision after it.
    pub revision: Revision,
    /// All of it took effect at once.
    pub changes: Arc<[Change]>,
}

impl Changes {
    fn of(batch: &Batch) -> Self {
        Self {
            revision: batch.revision,
            changes: Arc::clone(&batch.changes),
        }
    }

    fn bytes(&self) -> usize {
        let size = |entry: &Option<Entry>| entry.as_ref().map_or(0, |entry| entry.value.len());
        let sizes = self.changes.iter().map(|change| {
            CHANGE_OVERHEAD + change.key.len() + size(&change.entry) + size(&change.previous)
        });
        sizes.sum()
    }
}

/// The newest changes of a group: all of them above one revision and up to another one.
#[derive(Debug, Clone, Default)]
pub struct KeptChanges {
    /// They begin above it,
    pub floor: Revision,
    /// and end with it.
    pub newest: Revision,
    /// In order.
    pub changes: Vec<Changes>,
}

#[derive(Debug, Default)]
struct Kept {
    /// Everything above is there,
    floor: Revision,
    /// up to this one.
    newest: Revision,
    changes: VecDeque<Changes>,
    bytes: usize,
}

impl Kept {
    fn after(&self, after: Revision) -> Result<impl Iterator<Item = &Changes>, Compacted> {
        if after < self.floor {
            let oldest = self.floor;
            return Err(Compacted { after, oldest });
        }
        let first = self.changes.partition_point(|old| old.revision <= after);
        Ok(self.changes.range(first..))
    }
}

/// The newest changes of all groups.
#[derive(Debug, Default)]
pub(crate) struct History(RwLock<BTreeMap<GroupId, Kept>>);

impl History {
    /// What happened before is not known.
    pub(crate) fn begin(&self, group: GroupId, floor: Revision) {
        let kept = Kept {
            floor,
            newest: floor,
            ..Kept::default()
        };
        self.0.write().insert(group, kept);
    }

    /// Of a group that holds so many bytes.
    pub(crate) fn note(&self, batch: &Batch, held: u64) {
        if batch.reset {
            return self.begin(batch.group, batch.revision);
        }
        let mut groups = self.0.write();
        let kept = groups.entry(batch.group).or_default();
        kept.newest = batch.revision;
        if batch.changes.is_empty() {
            return;
        }
        let changes = Changes::of(batch);
        kept.bytes += changes.bytes();
        kept.changes.push_back(changes);
        let room = (held as usize).saturating_mul(KEPT_FACTOR);
        while kept.bytes > room.max(KEPT_BYTES_MIN) || kept.changes.len() > KEPT_COMMANDS_MAX {
            let Some(oldest) = kept.changes.pop_front() else {
                break;
            };
            kept.bytes -= oldest.bytes();
            kept.floor = oldest.revision;
        }
    }

    /// Adds to `past` all that is noted and not in it yet.
    pub(crate) fn look_back(&self, group: GroupId, past: &mut Past<'_>) -> Result<(), Compacted> {
        let (later, newest) = {
            let groups = self.0.read();
            let Some(kept) = groups.get(&group) else {
                return Ok(());
            };
            let later: Vec<Changes> = kept.after(past.known)?.cloned().collect();
            (later, kept.newest)
        };
        for change in later.iter().flat_map(|changes| changes.changes.iter()) {
            if past.concerns(&change.key) && !past.before.contains_key(&change.key) {
                let previous = change.previous.clone();
                past.before.insert(change.key.clone(), previous);
            }
        }
        past.known = past.known.max(newest);
        Ok(())
    }

    /// All that is kept of a group.
    pub(crate) fn kept(&self, group: GroupId) -> KeptChanges {
        let groups = self.0.read();
        let Some(kept) = groups.get(&group) else {
            return KeptChanges::default();
        };
        KeptChanges {
            floor: kept.floor,
            newest: kept.newest,
            changes: kept.changes.iter().cloned().collect(),
        }
    }

    /// Up to so many commands' changes.
    fn after(
        &self,
        group: GroupId,
        after: Revision,
        count: usize,
    ) -> Result<VecDeque<Changes>, Compacted> {
        let groups = self.0.read();
        let Some(kept) = groups.get(&group) else {
            return Ok(VecDeque::new());
        };
        Ok(kept.after(after)?.take(count).cloned().collect())
    }
}

/// What a group held at a revision of the keys under `prefix` after `after`, where that is not what
/// it holds now.
#[derive(Debug)]
pub(crate) struct Past<'a> {
    prefix: &'a str,
    after: Option<&'a str>,
    /// Everything that changed up to here is in it.
    pub(crate) known: Revision,
    /// Entries as they were, of those keys that changed since; `None`: there was none.
    before: BTreeMap<String, Option<Entry>>,
}

impl<'a> Past<'a> {
    pub(crate) const fn at(revision: Revision, prefix: &'a str, after: Option<&'a str>) -> Self {
        Self {
            prefix,
            after,
            known: revision,
            before: BTreeMap::new(),
        }
    }

    fn concerns(&self, key: &str) -> bool {
        key.starts_with(self.prefix) && self.after.is_none_or(|after| key > after)
    }

    /// The entries as they were, in key order, given those of `known`.
    pub(crate) fn of<'e>(
        &'e self,
        now: impl Iterator<Item = (&'e String, &'e Entry)>,
    ) -> impl Iterator<Item = (&'e String, &'e Entry)> {
        let before = self.before.iter();
        let before = before.map(|(key, entry)| (key, entry.as_ref()));
        let now = now.map(|(key, entry)| (key, Some(entry)));
        // Where both have a key, the first one's is taken.
        before
            .merge_join_by(now, |(before, _), (now, _)| before.cmp(now))
            .map(EitherOrBoth::into_left)
            .filter_map(|(key, entry)| Some((key, entry?)))
    }
}

/// A group that is followed.
#[derive(Debug)]
pub struct Following {
    group: GroupId,
    history: Arc<History>,
    feeds: Arc<Feeds>,
    live: Receiver<Arc<[Batch]>>,
    waiting: VecDeque<Changes>,
    /// There may be more in what is kept, before what is live.
    behind: bool,
    last: Revision,
}

impl Following {
    pub(crate) fn new(
        group: GroupId,
        after: Revision,
        history: Arc<History>,
        feeds: Arc<Feeds>,
    ) -> Result<Self, Compacted> {
        // In this order: what happens in between is in both.
        let live = feeds.group(group);
        let waiting = history.after(group, after, TAKEN_MAX)?;
        let behind = waiting.len() == TAKEN_MAX;
        Ok(Self {
            group,
            history,
            feeds,
            live,
            waiting,
            behind,
            last: after,
        })
    }

    /// The last revision that was told.
    pub const fn last(&self) -> Revision {
        self.last
    }

    fn begin_anew(&mut self) -> Result<(), Compacted> {
        self.live = self.feeds.group(self.group);
        self.take_kept()
    }

    fn take_kept(&mut self) -> Result<(), Compacted> {
        self.waiting = self.history.after(self.group, self.last, TAKEN_MAX)?;
        self.behind = self.waiting.len() == TAKEN_MAX;
        Ok(())
    }

    /// The next command's changes; `None`: the host has stopped. It may be dropped and asked again.
    ///
    /// # Errors
    /// [`Compacted`] when this reader fell too far behind, or a snapshot took the place of changes.
    pub async fn next(&mut self) -> Result<Option<Changes>, Compacted> {
        loop {
            while let Some(changes) = self.waiting.pop_front() {
                if changes.revision > self.last {
                    self.last = changes.revision;
                    return Ok(Some(changes));
                }
            }
            if self.behind {
                self.take_kept()?;
                continue;
            }
            match self.live.recv().await {
                Ok(round) => {
                    if round.iter().any(|batch| batch.reset) {
                        self.begin_anew()?;
                    } else {
                        let changing = round.iter().filter(|batch| !batch.changes.is_empty());
                        self.waiting.extend(changing.map(Changes::of));
                    }
                }
                Err(RecvError::Lagged(_)) => self.begin_anew()?,
                Err(RecvError::Closed) => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use krake_model::time::Timestamp;
    use proptest::prelude::*;

    use super::*;
    use crate::machine::Change;

    const GROUP: GroupId = GroupId::META;

    fn revision(number: i64) -> Revision {
        Revision::next(
            Revision::NONE,
            Timestamp::from_millis(1_764_000_000_000 + number),
            0,
        )
    }

    fn batch(number: i64, bytes: usize) -> Batch {
        let entry = Entry {
            value: Bytes::from(vec![7; bytes]),
            created: revision(number),
            modified: revision(number),
            incarnation: 0,
            term: 1,
            index: number as u64,
        };
        Batch {
            group: GROUP,
            revision: revision(number),
            reset: false,
            changes: Arc::new([Change {
                key: number.to_string(),
                entry: Some(entry),
                previous: None,
            }]),
        }
    }

    /// Bytes that the group of these tests holds.
    const HELD: usize = 4 * KEPT_BYTES_MIN;

    struct World {
        history: Arc<History>,
        feeds: Arc<Feeds>,
    }

    impl World {
        fn new(backlog: usize) -> Self {
            let history = Arc::<History>::default();
            history.begin(GROUP, revision(0));
            let feeds = Arc::new(Feeds::with_group_backlog(backlog));
            Self { history, feeds }
        }

        fn apply(&self, batch: Batch) {
            self.history.note(&batch, HELD as u64);
            self.feeds.tell(&VecDeque::from([batch]));
        }

        fn follow(&self, after: i64) -> Result<Following, Compacted> {
            let (history, feeds) = (Arc::clone(&self.history), Arc::clone(&self.feeds));
            Following::new(GROUP, revision(after), history, feeds)
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn what_was_is_known_as_long_as_the_changes_are(
            writes in prop::collection::vec((0..12_usize, prop::option::of(0..3_usize)), 1..60),
            at in 0..60_usize,
            seen in 0..60_usize,
            after in prop::option::of(0..12_usize),
        ) {
            let key = |number: usize| format!("{}/{:02}", ["a", "b"][number % 2], number / 2);
            let world = World::new(64);
            let after = after.map(key);
            let after = after.as_deref();
            let mut pasts = ["", "a/", "b/0", "c"]
                .map(|prefix| Past::at(revision(at as i64), prefix, after));
            let mut now = BTreeMap::new();
            let mut then = now.clone();
            for (number, (written, bytes)) in (1..).zip(writes) {
                let mut batch = batch(number, 0);
                let written = key(written);
                let entry = bytes.map(|bytes| Entry {
                    value: Bytes::from(vec![number as u8; bytes]),
                    ..batch.changes[0].entry.clone().unwrap()
                });
                let previous = match &entry {
                    Some(entry) => now.insert(written.clone(), entry.clone()),
                    None => now.remove(&written),
                };
                batch.changes = Arc::new([Change { key: written, entry, previous }]);
                world.apply(batch);
                if number <= at as i64 {
                    then = now.clone();
                }
                // Some of it before the rest has happened.
                if number == seen as i64 && seen >= at {
                    for past in &mut pasts {
                        world.history.look_back(GROUP, past).unwrap();
                    }
                }
            }
            for past in &mut pasts {
                world.history.look_back(GROUP, past).unwrap();
                let under = |(key, _): &(&String, &Entry)| {
                    key.starts_with(past.prefix) && after.is_none_or(|after| key.as_str() > after)
                };
                let wanted: Vec<_> = then.iter().filter(under).collect();
                let found: Vec<_> = past.of(now.iter().filter(under)).collect();
                prop_assert_eq!(found, wanted);
            }
        }
    }

    async fn told(following: &mut Following, count: usize) -> Vec<Revision> {
        let mut told = Vec::new();
        for _ in 0..count {
            told.push(following.next().await.unwrap().unwrap().revision);
        }
        told
    }

    fn revisions(numbers: impl Iterator<Item = i64>) -> Vec<Revision> {
        numbers.map(revision).collect()
    }

    #[tokio::test]
    async fn a_watch_goes_on_anywhere_without_gap_or_repetition() {
        let world = World::new(4);
        for number in 1..=10 {
            world.apply(batch(number, 10));
        }
        let mut following = world.follow(6).unwrap();
        assert_eq!(told(&mut following, 2).await, revisions(7..=8));
        // More than the queue holds: it is made good from what is kept.
        for number in 11..=30 {
            world.apply(batch(number, 10));
        }
        assert_eq!(told(&mut following, 22).await, revisions(9..=30));
        // From a revision that this node has not reached yet.
        let mut ahead = world.follow(32).unwrap();
        for number in 31..=34 {
            world.apply(batch(number, 10));
        }
        assert_eq!(told(&mut ahead, 2).await, revisions(33..=34));
        assert_eq!(told(&mut following, 4).await, revisions(31..=34));
    }

    #[tokio::test]
    async fn a_reader_far_behind_is_brought_up_in_steps() {
        let count = 3 * TAKEN_MAX as i64 + 7;
        let world = World::new(4);
        for number in 1..=count {
            world.apply(batch(number, 10));
        }
        let mut following = world.follow(0).unwrap();
        assert_eq!(told(&mut following, 10).await, revisions(1..=10));
        assert!(following.waiting.len() < TAKEN_MAX);
        for number in count + 1..=count + 10 {
            world.apply(batch(number, 10));
        }
        let rest = told(&mut following, count as usize).await;
        assert_eq!(rest, revisions(11..=count + 10));
    }

    #[tokio::test]
    async fn a_command_that_changes_nothing_is_not_told_but_nobody_waits_for_it() {
        let world = World::new(4);
        world.apply(batch(1, 10));
        world.apply(Batch {
            changes: Arc::new([]),
            ..batch(2, 0)
        });
        let mut past = Past::at(revision(0), "", None);
        world.history.look_back(GROUP, &mut past).unwrap();
        assert_eq!(past.known, revision(2));
        let mut following = world.follow(0).unwrap();
        world.apply(batch(3, 10));
        assert_eq!(told(&mut following, 2).await, [revision(1), revision(3)]);
    }

    #[tokio::test]
    async fn what_is_not_kept_is_said() {
        let world = World::new(4);
        // Four times what the group holds is written, twice as much is kept.
        for number in 1..=40 {
            world.apply(batch(number, HELD / 10));
        }
        let error = world.follow(20).unwrap_err();
        assert_eq!((error.after, error.oldest), (revision(20), revision(21)));
        assert!(world.follow(21).is_ok());
        // A group that holds little keeps some all the same.
        let small = batch(41, KEPT_BYTES_MIN / 3);
        world.history.note(&small, 0);
        assert!(world.follow(40).is_ok());
        let mut following = world.follow(41).unwrap();
        world.apply(Batch {
            reset: true,
            changes: Arc::new([]),
            ..batch(3_000, 0)
        });
        let error = following.next().await.unwrap_err();
        assert_eq!(error.oldest, revision(3_000));
    }
}
