//! Where a group's writes come from: a leader that is far from there makes all of them wait for a
//! way that they need not go.

use std::collections::BTreeMap;

/// Submissions that make a judgement possible.
const SUBMISSIONS_MIN: u32 = 12;

/// How much was submitted lately at each node.
#[derive(Debug, Default)]
pub(crate) struct Submissions(BTreeMap<u64, u32>);

impl Submissions {
    /// Something was submitted at the node of this replica.
    pub(crate) fn note(&mut self, origin: u64) {
        let count = self.0.entry(origin).or_default();
        *count = count.saturating_add(1);
    }

    /// What was before counts half from now on.
    pub(crate) fn fade(&mut self) {
        self.0.retain(|_, count| {
            *count /= 2;
            *count > 0
        });
    }

    /// The node where two thirds of it were submitted, if it was enough to tell.
    pub(crate) fn home(&self) -> Option<u64> {
        let total = self
            .0
            .values()
            .fold(0_u32, |sum, count| sum.saturating_add(*count));
        let (id, most) = self.0.iter().max_by_key(|(_, count)| **count)?;
        let most = u64::from(*most);
        (total >= SUBMISSIONS_MIN && most * 3 >= u64::from(total) * 2).then_some(*id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn home_is_where_two_thirds_come_from_lately() {
        let mut submissions = Submissions::default();
        let note = |submissions: &mut Submissions, origin, times| {
            for _ in 0..times {
                submissions.note(origin);
            }
        };
        note(&mut submissions, 1, 11);
        assert_eq!(submissions.home(), None, "too few to tell");
        note(&mut submissions, 1, 9);
        assert_eq!(submissions.home(), Some(1));
        note(&mut submissions, 2, 20);
        assert_eq!(submissions.home(), None, "half of them");
        for _ in 0..3 {
            submissions.fade();
            note(&mut submissions, 2, 20);
        }
        assert_eq!(submissions.home(), Some(2));
        for _ in 0..6 {
            submissions.fade();
        }
        assert_eq!(submissions.home(), None, "long ago");
        assert!(submissions.0.is_empty());
    }
}
