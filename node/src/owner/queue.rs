//! Which app is looked at next, and what is remembered of each: a pure step.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use krake_model::decision::Target;
use krake_model::{AppKey, GroupId, Revision, Timestamp};
use parking_lot::Mutex;
use priority_queue::PriorityQueue;
use tokio::time::Instant;

use super::plan::Memory;

/// Whoever takes looks asks again after this time, whatever happens.
const IDLE_WAIT: Duration = Duration::from_secs(1);

/// What came of a look at an app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Looked {
    /// It is looked at again at this time.
    Again(Timestamp),
    /// There is no such app, or it cannot be understood.
    Gone,
    /// This node does not own it now.
    NotOurs,
}

/// An app to look at, and what is remembered of it.
type Look = (AppKey, Arc<Mutex<Memory>>);

/// The apps of the groups that this node leads.
#[derive(Default)]
pub(super) struct Queue {
    memories: BTreeMap<AppKey, Arc<Mutex<Memory>>>,
    dirty: BTreeSet<AppKey>,
    busy: BTreeSet<AppKey>,
    /// When an app is looked at without a reason.
    due: PriorityQueue<AppKey, Reverse<Instant>>,
    led: BTreeSet<GroupId>,
    /// The newest change of each app that has been looked at.
    known: BTreeMap<AppKey, Revision>,
}

impl Queue {
    /// How many apps are remembered.
    pub(super) fn len(&self) -> usize {
        self.memories.len()
    }

    /// The groups led, as told last.
    pub(super) const fn led(&self) -> &BTreeSet<GroupId> {
        &self.led
    }

    /// These groups are led now; what is known of apps in others is forgotten. Returns those that
    /// were not led before.
    pub(super) fn lead(
        &mut self,
        led: BTreeSet<GroupId>,
        group_of: impl Fn(&AppKey) -> GroupId,
    ) -> Vec<GroupId> {
        let is_led = |app: &AppKey| led.contains(&group_of(app));
        self.memories.retain(|app, _| is_led(app));
        self.due.retain(|app, _| is_led(app));
        self.known.retain(|app, _| is_led(app));
        let new = led.difference(&self.led).copied().collect();
        self.led = led;
        new
    }

    /// What is remembered of an app.
    pub(super) fn memory(&mut self, app: &AppKey) -> Arc<Mutex<Memory>> {
        Arc::clone(self.memories.entry(app.clone()).or_default())
    }

    /// What was written about the app up to this revision has been looked at.
    pub(super) fn has_seen(&mut self, app: &AppKey, revision: Revision) {
        let known = self.known.entry(app.clone()).or_default();
        *known = revision.max(*known);
    }

    /// Whether what was written about an app of this group calls for a look: what the owner itself
    /// wrote does not.
    pub(super) fn is_news(&self, group: GroupId, app: &AppKey, revision: Revision) -> bool {
        let known = self.known.get(app);
        self.led.contains(&group) && known.is_none_or(|known| *known < revision)
    }

    /// An app is to be looked at.
    pub(super) fn look_at(&mut self, app: AppKey) {
        self.due.remove(&app);
        self.dirty.insert(app);
    }

    /// All are; with `decide` also where nothing calls for a decision.
    pub(super) fn look_at_all(&mut self, decide: bool) {
        for (app, memory) in &self.memories {
            if decide {
                memory.lock().next_look = Timestamp::default();
            }
            self.dirty.insert(app.clone());
        }
    }

    /// Something speaks for asking these sites again: those apps are to be looked at that no site
    /// could take.
    pub(super) fn ask_again(&mut self, is_meant: impl Fn(&Target) -> bool) {
        for (app, memory) in &self.memories {
            if memory.lock().ask_again(&is_meant) {
                self.dirty.insert(app.clone());
            }
        }
    }

    /// The next app to look at, which nobody else gets before it is [`Self::done`]; or how long
    /// nothing is due.
    pub(super) fn next(&mut self, now: Instant) -> Result<Look, Duration> {
        while let Some((app, _)) = self.due.pop_if(|_, Reverse(at)| *at <= now) {
            self.dirty.insert(app);
        }
        let mut dirty = self.dirty.iter();
        if let Some(app) = dirty.find(|app| !self.busy.contains(*app)).cloned() {
            self.dirty.remove(&app);
            self.busy.insert(app.clone());
            let memory = self.memory(&app);
            return Ok((app, memory));
        }
        let wait = self.due.peek().map(|(_, Reverse(at))| *at - now);
        Err(wait.map_or(IDLE_WAIT, |wait| wait.min(IDLE_WAIT)))
    }

    /// A look at an app of this group has ended. `clock` is the time on the wall, `now` that of the
    /// timers, which do not follow it.
    pub(super) fn done(
        &mut self,
        app: AppKey,
        group: GroupId,
        looked: Looked,
        clock: Timestamp,
        now: Instant,
    ) {
        self.busy.remove(&app);
        let wait = match looked {
            Looked::Again(at) => Some(Duration::from_millis(at.millis_since(clock))),
            // It was led meanwhile by somebody else, and nothing noticed.
            Looked::NotOurs if self.led.contains(&group) => Some(IDLE_WAIT),
            Looked::NotOurs | Looked::Gone => None,
        };
        if let Some(wait) = wait {
            self.due.push(app, Reverse(now + wait));
        } else {
            self.memories.remove(&app);
            self.known.remove(&app);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUP: GroupId = GroupId::from_number(1);
    const OTHER: GroupId = GroupId::from_number(2);
    const CLOCK: Timestamp = Timestamp::from_millis(1_000_000);

    /// Apps whose names begin with an `o` are in [`OTHER`].
    fn group_of(app: &AppKey) -> GroupId {
        if app.name.starts_with('o') {
            OTHER
        } else {
            GROUP
        }
    }

    fn app(name: &str) -> AppKey {
        AppKey::new("default", name)
    }

    /// Leads [`GROUP`], and has these to look at.
    fn queue(names: &[&str]) -> Queue {
        let mut queue = Queue::default();
        assert_eq!(queue.lead([GROUP].into(), group_of), [GROUP]);
        names.iter().for_each(|name| queue.look_at(app(name)));
        queue
    }

    fn next(queue: &mut Queue, now: Instant) -> Option<String> {
        queue.next(now).ok().map(|(app, _)| app.name)
    }

    #[test]
    fn an_app_is_looked_at_by_one_and_again_when_something_came_meanwhile() {
        let (mut queue, now) = (queue(&["a", "b"]), Instant::now());
        assert_eq!(next(&mut queue, now).as_deref(), Some("a"));
        queue.look_at(app("a"));
        queue.look_at(app("a"));
        assert_eq!(next(&mut queue, now).as_deref(), Some("b"));
        assert_eq!(next(&mut queue, now), None);
        let later = Looked::Again(CLOCK.plus_millis(60_000));
        queue.done(app("a"), GROUP, later, CLOCK, now);
        assert_eq!(next(&mut queue, now).as_deref(), Some("a"));
        queue.done(app("a"), GROUP, later, CLOCK, now);
        assert_eq!(next(&mut queue, now), None);
    }

    #[test]
    fn it_is_looked_at_again_when_it_is_time_or_something_comes() {
        let (mut queue, now) = (queue(&["a"]), Instant::now());
        let look = |queue: &mut Queue, at: Instant, wait: i64| {
            assert_eq!(next(queue, at).as_deref(), Some("a"));
            let again = Looked::Again(CLOCK.plus_millis(wait));
            queue.done(app("a"), GROUP, again, CLOCK, at);
        };
        look(&mut queue, now, 300);
        let millis = Duration::from_millis;
        assert_eq!(queue.next(now).err(), Some(millis(300)));
        assert_eq!(queue.next(now + millis(299)).err(), Some(millis(1)));
        look(&mut queue, now + millis(300), 60_000);
        // However long it takes, it is asked again.
        assert_eq!(queue.next(now + millis(300)).err(), Some(IDLE_WAIT));
        queue.look_at(app("a"));
        // What is over is due at once.
        look(&mut queue, now + millis(300), -5);
        look(&mut queue, now + millis(300), 0);
    }

    #[test]
    fn what_is_gone_or_of_others_is_forgotten() {
        let (mut queue, now) = (queue(&["a", "b", "other"]), Instant::now());
        for (name, looked) in [
            ("a", Looked::Gone),
            ("b", Looked::NotOurs),
            ("other", Looked::NotOurs),
        ] {
            assert_eq!(next(&mut queue, now).as_deref(), Some(name));
            queue.has_seen(&app(name), Revision::from_number(1));
            queue.done(app(name), group_of(&app(name)), looked, CLOCK, now);
        }
        // Its group is led, so it is ours again or will be.
        assert_eq!(queue.len(), 1);
        assert_eq!(next(&mut queue, now + IDLE_WAIT).as_deref(), Some("b"));
        assert!(queue.is_news(GROUP, &app("a"), Revision::from_number(1)));
        assert!(!queue.is_news(GROUP, &app("b"), Revision::from_number(1)));
    }

    #[test]
    fn who_leads_no_more_forgets_and_who_leads_anew_is_told() {
        let (mut queue, now) = (queue(&["a"]), Instant::now());
        assert_eq!(next(&mut queue, now).as_deref(), Some("a"));
        let again = Looked::Again(CLOCK.plus_millis(10));
        queue.done(app("a"), GROUP, again, CLOCK, now);
        assert_eq!(queue.lead([GROUP, OTHER].into(), group_of), [OTHER]);
        assert_eq!(queue.len(), 1);
        assert!(queue.lead([OTHER].into(), group_of).is_empty());
        assert_eq!((queue.len(), next(&mut queue, now + IDLE_WAIT)), (0, None));
        assert_eq!(queue.led(), &[OTHER].into());
    }

    #[test]
    fn what_the_owner_wrote_is_no_news() {
        let mut queue = queue(&[]);
        let a = app("a");
        assert!(queue.is_news(GROUP, &a, Revision::from_number(2)));
        queue.has_seen(&a, Revision::from_number(2));
        queue.has_seen(&a, Revision::from_number(1));
        assert!(!queue.is_news(GROUP, &a, Revision::from_number(2)));
        assert!(queue.is_news(GROUP, &a, Revision::from_number(3)));
        assert!(!queue.is_news(OTHER, &a, Revision::from_number(3)));
    }

    #[test]
    fn all_are_looked_at_and_decided_anew_when_that_is_asked_for() {
        let (mut queue, now) = (queue(&["a", "b"]), Instant::now());
        let far = CLOCK.plus_millis(60_000);
        let look_at_both = |queue: &mut Queue| {
            for name in ["a", "b"] {
                let (next, memory) = queue.next(now).unwrap();
                assert_eq!(next.name, name);
                queue.done(next, GROUP, Looked::Again(far), CLOCK, now);
                memory.lock().next_look = far;
            }
        };
        look_at_both(&mut queue);
        for decide in [false, true] {
            assert_eq!(next(&mut queue, now), None);
            queue.look_at_all(decide);
            let next_look = queue.memory(&app("a")).lock().next_look;
            assert_eq!(next_look, if decide { Timestamp::default() } else { far });
            look_at_both(&mut queue);
        }
    }
}
