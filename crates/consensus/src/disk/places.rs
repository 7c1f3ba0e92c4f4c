//! Which segments a group holds.

use std::ops::RangeInclusive;

use super::Change;

/// In which segments one group's entries are, newest copies only: ranges of indices in order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Places(Vec<Place>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    first: u64,
    last: u64,
    segment: u64,
}

impl Places {
    pub(super) fn take(&mut self, change: &Change, segment: u64) {
        if let Some(from) = change.truncate_from {
            self.forget(from, u64::MAX);
        }
        if let (Some(first), Some(last)) = (change.entries.first(), change.entries.last()) {
            self.forget(first.index, last.index);
            let place = Place {
                first: first.index,
                last: last.index,
                segment,
            };
            let at = self.0.partition_point(|old| old.last < place.first);
            match at.checked_sub(1).map(|before| &mut self.0[before]) {
                Some(before) if before.segment == segment && before.last + 1 == place.first => {
                    before.last = place.last;
                }
                _ => self.0.insert(at, place),
            }
        }
        self.forget(0, change.start.0);
    }

    fn forget(&mut self, first: u64, last: u64) {
        if self.0.last().is_none_or(|place| place.last < first)
            || self.0.first().is_none_or(|place| place.first > last)
        {
            return;
        }
        let mut kept = Vec::with_capacity(self.0.len() + 1);
        for place in &self.0 {
            if place.first < first {
                kept.push(Place {
                    last: place.last.min(first - 1),
                    ..*place
                });
            }
            if place.last > last {
                kept.push(Place {
                    first: place.first.max(last + 1),
                    ..*place
                });
            }
        }
        self.0 = kept;
    }

    pub(super) fn hold(&self, segment: u64) -> bool {
        self.0.iter().any(|place| place.segment == segment)
    }

    /// The runs of indices that are in this segment.
    pub(super) fn runs(&self, segment: u64) -> impl Iterator<Item = RangeInclusive<u64>> {
        let places = self.0.iter().filter(move |place| place.segment == segment);
        places.map(|place| place.first..=place.last)
    }
}
