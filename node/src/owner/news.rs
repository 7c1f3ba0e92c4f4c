//! What sites' reports bring, and when apps are looked at because of it: a pure step.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use krake_model::report::SiteReport;
use krake_model::{NodeId, Resources};
use tokio::time::Instant;

/// News that come sooner than this after others are looked at together: a hundred sites have some all
/// the time.
const INTERVAL: Duration = Duration::from_secs(1);
/// The same for each app that is to be decided anew: a decision takes about a tenth of it.
const INTERVAL_OF_APP: Duration = Duration::from_millis(1);

/// A site's backend.
pub(super) type BackendKey = (NodeId, String);

/// What was reported and not looked at yet.
#[derive(Debug)]
pub(super) struct News {
    reports: BTreeMap<NodeId, Arc<SiteReport>>,
    /// Something that all decisions depend on.
    changed: bool,
    /// Backends that have more room than before.
    room: BTreeSet<BackendKey>,
    next_changed: Instant,
    next_room: Instant,
}

/// What is to be looked at now.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    /// All apps are to be decided anew.
    pub(super) all: bool,
    /// Those that wait for a site may fit here.
    pub(super) room: BTreeSet<BackendKey>,
}

impl News {
    /// Whatever is reported first is due from `now` on.
    pub(super) const fn new(now: Instant) -> Self {
        Self {
            reports: BTreeMap::new(),
            changed: false,
            room: BTreeSet::new(),
            next_changed: now,
            next_room: now,
        }
    }

    /// Takes the newest report of each site.
    pub(super) fn take<'a>(&mut self, newest: impl Iterator<Item = &'a Arc<SiteReport>>) {
        let mut before = std::mem::take(&mut self.reports);
        for new in newest {
            match before.remove(&new.node) {
                Some(old) if old.freshness() == new.freshness() => {}
                Some(old) => {
                    self.changed |= matters(&old, new);
                    let more = more_room(&old, new);
                    self.room.extend(more.map(|name| (new.node, name.clone())));
                }
                None => self.changed = true,
            }
            self.reports.insert(new.node, Arc::clone(new));
        }
        // Others are gone.
        self.changed |= !before.is_empty();
    }

    /// What is due at this node, which owns so many apps. Room is for few of them and does not put
    /// off what concerns all.
    pub(super) fn due(&mut self, now: Instant, apps: usize) -> Due {
        let mut due = Due::default();
        if !self.room.is_empty() && now >= self.next_room {
            due.room = std::mem::take(&mut self.room);
            self.next_room = now + INTERVAL;
        }
        if self.changed && now >= self.next_changed {
            due.all = std::mem::take(&mut self.changed);
            self.next_changed = now + INTERVAL.max(INTERVAL_OF_APP * apps as u32);
        }
        due
    }

    /// When what was taken and not told is due.
    pub(super) fn next(&self) -> Option<Instant> {
        let room = (!self.room.is_empty()).then_some(self.next_room);
        let changed = self.changed.then_some(self.next_changed);
        room.into_iter().chain(changed).min()
    }
}

/// Whether something is different that all decisions depend on: metrics and health. Load and latency
/// change all the time and wait for the app's timer.
fn matters(old: &SiteReport, new: &SiteReport) -> bool {
    let metrics = |report: &SiteReport| {
        let mut metrics = report.metrics.clone();
        metrics.retain(|name, _| !matches!(name.as_str(), "load" | "latency"));
        metrics
    };
    let health = |report: &SiteReport| {
        let backends = report.backends.iter();
        let health = backends.map(|(name, backend)| (name.clone(), backend.healthy));
        health.collect::<BTreeMap<_, _>>()
    };
    metrics(old) != metrics(new) || health(old) != health(new)
}

/// The backends that have more room than they had before.
fn more_room<'a>(old: &SiteReport, new: &'a SiteReport) -> impl Iterator<Item = &'a String> {
    let more = new.backends.iter().filter(|(name, backend)| {
        let before = old.backends.get(*name);
        let before = before.map_or(Resources::ZERO, |before| before.free);
        !backend.free.fits(&before)
    });
    more.map(|(name, _)| name)
}

/// Which members are not heard of.
#[derive(Debug, Default)]
pub(super) struct Silence(BTreeSet<NodeId>);

impl Silence {
    /// Takes who is silent now. `None`: those that were; otherwise who is heard again.
    pub(super) fn take(&mut self, silent: BTreeSet<NodeId>) -> Option<BTreeSet<NodeId>> {
        let before = std::mem::replace(&mut self.0, silent);
        (before != self.0).then(|| before.difference(&self.0).copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use krake_model::Timestamp;
    use krake_model::report::BackendReport;

    use super::*;

    fn report(
        number: u8,
        sequence: u64,
        carbon: f64,
        load: f64,
        cpu_millis: u64,
    ) -> Arc<SiteReport> {
        let free = Resources {
            cpu_millis,
            ..Resources::ZERO
        };
        let backend = BackendReport {
            healthy: true,
            free,
            ..BackendReport::default()
        };
        let metrics = [("carbon", carbon), ("load", load)];
        Arc::new(SiteReport {
            node: NodeId::from_bytes([number; 32]),
            boot: 1,
            sequence,
            observed_at: Timestamp::default(),
            metrics: metrics.map(|(name, value)| (name.to_owned(), value)).into(),
            backends: BTreeMap::from([("default".to_owned(), backend)]),
            rtts_micros: BTreeMap::new(),
            unreachable: BTreeMap::new(),
            version: String::new(),
        })
    }

    fn all() -> Due {
        Due {
            all: true,
            ..Due::default()
        }
    }

    fn room(number: u8) -> Due {
        let backend = (NodeId::from_bytes([number; 32]), "default".to_owned());
        Due {
            room: BTreeSet::from([backend]),
            ..Due::default()
        }
    }

    #[test]
    fn what_matters_is_told_once_and_load_is_not() {
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let mut news = News::new(start);
        assert_eq!(news.due(start, 0), Due::default());
        news.take([report(1, 1, 30.0, 0.1, 500)].iter());
        assert_eq!(news.due(start, 0), all(), "a new site");
        news.take([report(1, 2, 30.0, 0.9, 400)].iter());
        assert_eq!(news.next(), None, "more load, less room");
        news.take([report(1, 3, 31.0, 0.9, 400)].iter());
        assert_eq!(news.due(later(5), 0), all());
        news.take([report(1, 4, 31.0, 0.9, 401)].iter());
        assert_eq!(news.due(later(10), 0), room(1));
        news.take(std::iter::empty());
        assert_eq!(news.due(later(15), 0), all(), "it is gone");
        assert_eq!(news.next(), None);
    }

    #[test]
    fn news_that_come_fast_are_told_together() {
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut news = News::new(start);
        news.take([report(1, 1, 30.0, 0.0, 0)].iter());
        assert_eq!(news.due(start, 5000), all());
        for sequence in 2..100 {
            news.take([report(1, sequence, sequence as f64, 0.0, 0)].iter());
            assert_eq!(news.due(after(10 * sequence), 5000), Due::default());
        }
        assert_eq!(news.next(), Some(after(5000)), "a millisecond for each app");
        assert_eq!(news.due(after(4999), 5000), Due::default());
        assert_eq!(news.due(after(5000), 5000), all());
        // Room does not wait for that, nor does that wait for room.
        news.take([report(1, 100, 99.0, 0.0, 10)].iter());
        assert_eq!(news.due(after(5001), 5000), room(1));
        news.take([report(1, 101, 98.0, 0.0, 20)].iter());
        assert_eq!(news.next(), Some(after(6001)));
        assert_eq!(news.due(after(6001), 5000), room(1));
        assert_eq!(news.due(after(10_000), 5000), all());
    }

    #[test]
    fn silence_is_told_when_it_changes_with_those_that_are_back() {
        let node = |byte| NodeId::from_bytes([byte; 32]);
        let mut silence = Silence::default();
        assert_eq!(silence.take([].into()), None);
        assert_eq!(silence.take([node(1), node(2)].into()), Some([].into()));
        assert_eq!(silence.take([node(1), node(2)].into()), None);
        let back = silence.take([node(2), node(3)].into());
        assert_eq!(back, Some([node(1)].into()));
    }
}
