//! Who hears of what is applied. Every node applies every write: one that nobody at a node wants
//! to know of wakes nobody there.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use krake_model::ids::GroupId;
use parking_lot::RwLock;
use tokio::sync::broadcast::{self, Receiver, Sender};

use crate::core::Batch;

/// What one round applied, as far as it is wanted.
type Round = Arc<[Batch]>;

/// Rounds that who follows groups by their prefixes may be behind,
const PREFIX_BACKLOG: usize = 4096;
/// and who follows one group: what is missed is made good from the history.
const GROUP_BACKLOG: usize = 256;

/// The channels; a subscriber that is behind gets `Lagged`.
#[derive(Debug)]
pub(crate) struct Feeds {
    groups: RwLock<BTreeMap<GroupId, Sender<Round>>>,
    prefixes: RwLock<Vec<(Vec<String>, Sender<Round>)>>,
    group_backlog: usize,
}

impl Default for Feeds {
    fn default() -> Self {
        Self::with_group_backlog(GROUP_BACKLOG)
    }
}

impl Feeds {
    pub(crate) fn with_group_backlog(group_backlog: usize) -> Self {
        Self {
            groups: RwLock::default(),
            prefixes: RwLock::default(),
            group_backlog,
        }
    }

    /// Everything of one group.
    pub(crate) fn group(&self, group: GroupId) -> Receiver<Round> {
        let mut feeds = self.groups.write();
        if !feeds.contains_key(&group) {
            feeds.retain(|_, feed| feed.receiver_count() > 0);
        }
        let feed = feeds
            .entry(group)
            .or_insert_with(|| broadcast::channel(self.group_backlog).0);
        feed.subscribe()
    }

    /// Commands of all groups that may have changed something under one of these prefixes.
    pub(crate) fn prefixes(&self, prefixes: &[&str]) -> Receiver<Round> {
        let mut feeds = self.prefixes.write();
        if let Some((_, feed)) = feeds.iter().find(|(wanted, _)| wanted == prefixes) {
            return feed.subscribe();
        }
        feeds.retain(|(_, feed)| feed.receiver_count() > 0);
        let (feed, receiver) = broadcast::channel(PREFIX_BACKLOG);
        let wanted = prefixes.iter().map(|prefix| (*prefix).to_owned());
        feeds.push((wanted.collect(), feed));
        receiver
    }

    /// Tells what was applied together.
    pub(crate) fn tell(&self, batches: &VecDeque<Batch>) {
        // Whoever listened may be gone: nobody hears of it then.
        for (prefixes, feed) in self.prefixes.read().iter() {
            let wanted = |batch: &&Batch| prefixes.iter().any(|prefix| batch.touches(prefix));
            let round: Round = batches.iter().filter(wanted).cloned().collect();
            if !round.is_empty() {
                let _ = feed.send(round);
            }
        }
        let feeds = self.groups.read();
        let mut rounds: BTreeMap<GroupId, Vec<Batch>> = BTreeMap::new();
        for batch in batches {
            if feeds.contains_key(&batch.group) {
                rounds.entry(batch.group).or_default().push(batch.clone());
            }
        }
        for (group, round) in rounds {
            let _ = feeds[&group].send(round.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use krake_model::revision::Revision;
    use tokio::sync::broadcast::error::TryRecvError;

    use super::*;
    use crate::machine::Change;

    fn batch(shard: u16, key: &str) -> Batch {
        let change = Change {
            key: key.to_owned(),
            entry: None,
            previous: None,
        };
        Batch {
            group: GroupId::of_shard(shard),
            revision: Revision::NONE,
            reset: false,
            changes: Arc::new([change]),
        }
    }

    fn told(feed: &mut Receiver<Round>) -> Vec<Vec<String>> {
        let mut rounds = Vec::new();
        loop {
            match feed.try_recv() {
                Ok(round) => {
                    let keys = round.iter().flat_map(|batch| batch.changes.iter());
                    rounds.push(keys.map(|change| change.key.clone()).collect());
                }
                Err(TryRecvError::Empty) => return rounds,
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn each_hears_of_what_it_wants_and_of_nothing_else() {
        let feeds = Feeds::default();
        let mut apps = feeds.prefixes(&["applications/", "sites/"]);
        let mut same = feeds.prefixes(&["applications/", "sites/"]);
        let mut all = feeds.prefixes(&[""]);
        let mut third = feeds.group(GroupId::of_shard(3));
        assert_eq!(feeds.prefixes.read().len(), 2);
        feeds.tell(&VecDeque::from([batch(1, "kv/a"), batch(3, "kv/b")]));
        feeds.tell(&VecDeque::from([batch(1, "sites/a"), batch(1, "kv/c")]));
        let reset = Batch {
            reset: true,
            changes: Arc::new([]),
            ..batch(3, "")
        };
        feeds.tell(&VecDeque::from([batch(1, "kv/d"), reset]));
        let nothing: Vec<String> = Vec::new();
        for feed in [&mut apps, &mut same] {
            assert_eq!(told(feed), [vec!["sites/a".to_owned()], nothing.clone()]);
        }
        assert_eq!(told(&mut all).concat().len(), 5);
        assert_eq!(told(&mut third), [vec!["kv/b".to_owned()], nothing]);
    }

    #[test]
    fn channels_that_nobody_listens_to_go() {
        let feeds = Feeds::default();
        drop((feeds.prefixes(&["a/"]), feeds.group(GroupId::of_shard(1))));
        let _others = (feeds.prefixes(&["b/"]), feeds.group(GroupId::of_shard(2)));
        assert_eq!(feeds.prefixes.read().len(), 1);
        assert_eq!(feeds.groups.read().len(), 1);
    }
}
