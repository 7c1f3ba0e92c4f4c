//! Frames on their way: late, lost, repeated, or cut off.

use std::collections::BTreeSet;
use std::ops::Range;

use bytes::Bytes;
use rand::RngExt as _;

use super::{Event, SECOND, World};
use crate::wire::Frame;

pub(super) struct Network {
    pub(super) loss: f64,
    pub(super) repeat: f64,
    pub(super) delay: u64,
    pub(super) cut: BTreeSet<(u64, u64)>,
    pub(super) number: u64,
}

impl World<'_> {
    pub(super) fn send(
        &mut self,
        from: u64,
        to: u64,
        frame: &Frame,
        held: u64,
    ) -> Result<(), String> {
        self.messages += frame.messages.len();
        if self.network.cut.contains(&(from, to)) || self.random.random_bool(self.network.loss) {
            return Ok(());
        }
        let bytes = Bytes::from(frame.encode().map_err(|error| error.to_string())?);
        let copies = if self.random.random_bool(self.network.repeat) {
            2
        } else {
            1
        };
        for _ in 0..copies {
            let after = held + self.random.random_range(100..=self.network.delay);
            let bytes = bytes.clone();
            self.schedule(after, Event::Frame { to, from, bytes });
        }
        Ok(())
    }

    pub(super) fn partition(&mut self, members: &[u64]) {
        let side: BTreeSet<u64> = members
            .iter()
            .copied()
            .filter(|_| self.random.random_bool(0.5))
            .collect();
        let one_way = self.random.random_bool(0.2);
        for a in members {
            for b in members {
                if side.contains(a) && !side.contains(b) {
                    self.network.cut.insert((*a, *b));
                    if !one_way {
                        self.network.cut.insert((*b, *a));
                    }
                }
            }
        }
        self.heal_later();
    }

    pub(super) fn heal_later(&mut self) {
        self.heal_within(SECOND / 2..8 * SECOND);
    }

    /// All cuts end after so many microseconds, unless there is another one before.
    pub(super) fn heal_within(&mut self, after: Range<u64>) {
        self.network.number += 1;
        let number = self.network.number;
        let after = self.random.random_range(after);
        self.schedule(after, Event::Heal { number });
    }
}
