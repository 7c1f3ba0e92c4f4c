//! Capacity promised to owners and not yet used: a pure table (DESIGN §2 *reservation*).
//!
//! A site says yes while the sum of promises fits what is free, so that many owners deciding at
//! once cannot overcommit it (R7). A promise ends with its deadline, or when the assignment's pods
//! count as used by themselves.

use std::collections::BTreeMap;

use krake_model::{AppUid, Resources, Timestamp};

#[derive(Clone, Debug, PartialEq, Eq)]
struct Promise {
    needs: Resources,
    term: u64,
    deadline: Option<Timestamp>,
}

/// All promises of one backend.
#[derive(Clone, Debug, Default)]
pub struct Reservations {
    promises: BTreeMap<AppUid, Promise>,
}

/// Why a reservation is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not enough is free.
    NoCapacity {
        /// What is free after all promises.
        free: Resources,
    },
    /// An owner of a newer term has reserved already.
    Stale {
        /// That term.
        term: u64,
    },
}

impl Reservations {
    /// Holds `needs` for an app until `deadline`; `free` is what no pod uses. Asking again replaces
    /// the app's earlier promise.
    ///
    /// # Errors
    /// When it does not fit, or the asking owner is of an older term.
    pub fn reserve(
        &mut self,
        uid: AppUid,
        term: u64,
        needs: Resources,
        free: &Resources,
        deadline: Timestamp,
    ) -> Result<(), Refusal> {
        if let Some(held) = self.promises.get(&uid)
            && held.term > term
        {
            return Err(Refusal::Stale { term: held.term });
        }
        let left = free.saturating_sub(&self.held_for_others(Some(uid)));
        if !needs.fits(&left) {
            return Err(Refusal::NoCapacity { free: left });
        }
        self.promises.insert(
            uid,
            Promise {
                needs,
                term,
                deadline: Some(deadline),
            },
        );
        Ok(())
    }

    /// The assignment has come: the promise holds until [`Reservations::release`].
    pub fn assigned(&mut self, uid: AppUid, needs: Resources) {
        let term = self.promises.get(&uid).map_or(0, |p| p.term);
        self.promises.insert(
            uid,
            Promise {
                needs,
                term,
                deadline: None,
            },
        );
    }

    /// The app's pods count as used by themselves, or it is gone.
    pub fn release(&mut self, uid: &AppUid) {
        self.promises.remove(uid);
    }

    /// Drops what has expired.
    pub fn expire(&mut self, now: Timestamp) {
        self.promises
            .retain(|_, promise| promise.deadline.is_none_or(|deadline| deadline > now));
    }

    /// The sum of all promises.
    pub fn held(&self) -> Resources {
        self.held_for_others(None)
    }

    fn held_for_others(&self, except: Option<AppUid>) -> Resources {
        self.promises
            .iter()
            .filter(|(uid, _)| Some(**uid) != except)
            .fold(Resources::ZERO, |sum, (_, promise)| {
                sum.saturating_add(&promise.needs)
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uid(n: u128) -> AppUid {
        AppUid::new(uuid::Uuid::from_u128(n))
    }

    fn cpu(millis: u64) -> Resources {
        Resources {
            cpu_millis: millis,
            memory_bytes: 0,
            pods: 0,
        }
    }

    #[test]
    fn a_herd_cannot_overcommit_a_site() {
        let mut table = Reservations::default();
        let soon = Timestamp::from_millis(100);
        let granted = (0..10)
            .filter(|&n| table.reserve(uid(n), 1, cpu(300), &cpu(1000), soon).is_ok())
            .count();
        assert_eq!(granted, 3);
        assert_eq!(table.held(), cpu(900));
        table.expire(Timestamp::from_millis(101));
        assert_eq!(table.held(), cpu(0));
    }

    #[test]
    fn an_assignment_holds_until_its_pods_count() {
        let mut table = Reservations::default();
        table
            .reserve(uid(1), 1, cpu(600), &cpu(1000), Timestamp::from_millis(1))
            .unwrap();
        table.assigned(uid(1), cpu(600));
        table.expire(Timestamp::from_millis(1000));
        assert_eq!(
            table.reserve(
                uid(2),
                1,
                cpu(600),
                &cpu(1000),
                Timestamp::from_millis(2000)
            ),
            Err(Refusal::NoCapacity { free: cpu(400) })
        );
        table.release(&uid(1));
        assert!(
            table
                .reserve(
                    uid(2),
                    1,
                    cpu(600),
                    &cpu(1000),
                    Timestamp::from_millis(2000)
                )
                .is_ok()
        );
    }

    #[test]
    fn an_owner_of_an_older_term_is_refused() {
        let mut table = Reservations::default();
        let soon = Timestamp::from_millis(100);
        table.reserve(uid(1), 5, cpu(1), &cpu(10), soon).unwrap();
        assert_eq!(
            table.reserve(uid(1), 4, cpu(1), &cpu(10), soon),
            Err(Refusal::Stale { term: 5 })
        );
    }
}
