//! What clients asked for and got, and whether one order explains it all.
//!
//! The checker is Wing and Gong's search (1993) with Lowe's memory of visited states (2017), for a
//! register with compare-and-set. Keys are checked apart: linearizability is local (Herlihy and
//! Wing 1990, theorem 1).

use std::collections::BTreeSet;

/// A value that was written; each is written by one operation only. 0: the key is absent.
pub type Value = u64;

/// What was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Put a value, whatever is there.
    Write(Value),
    /// Put a value if another one is there.
    CompareAndSet {
        /// What must be there.
        from: Value,
        /// What is put.
        to: Value,
    },
    /// Read.
    Read,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Got {
    /// It took effect.
    Done,
    /// Something else was there.
    Conflict,
    /// This was there.
    Value(Value),
}

/// One operation on one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// What was asked.
    pub asked: Asked,
    /// When, as a number that rises with every event.
    pub invoked: u64,
    /// What came of it and when; `None`: nobody knows, it may have taken effect at any later time
    /// or never.
    pub returned: Option<(u64, Got)>,
}

impl Operation {
    /// What a history begins with whose first part is forgotten: as if the value that is there had
    /// been written just now.
    pub(super) const fn found(value: Value, invoked: u64, returned: u64) -> Self {
        Self {
            asked: Asked::Write(value),
            invoked,
            returned: Some((returned, Got::Done)),
        }
    }

    /// The value that it put, if it took effect.
    pub(super) const fn puts(&self) -> Option<Value> {
        match self.asked {
            Asked::Write(value) | Asked::CompareAndSet { to: value, .. } => Some(value),
            Asked::Read => None,
        }
    }

    /// The value that it certainly found.
    pub(super) const fn saw(&self) -> Option<Value> {
        match (self.asked, self.returned) {
            (_, Some((_, Got::Value(value)))) => Some(value),
            (Asked::CompareAndSet { from, .. }, Some((_, Got::Done))) => Some(from),
            _ => None,
        }
    }
}

/// The state after an operation, if it can come now.
fn step(state: Value, operation: &Operation) -> Option<Value> {
    let got = operation.returned.map(|(_, got)| got);
    match (operation.asked, got) {
        (Asked::Write(value), None | Some(Got::Done)) => Some(value),
        (Asked::CompareAndSet { from, to }, Some(Got::Done)) => (state == from).then_some(to),
        (Asked::CompareAndSet { from, .. }, Some(Got::Conflict)) => {
            (state != from).then_some(state)
        }
        (Asked::CompareAndSet { from, to }, None) => Some(if state == from { to } else { state }),
        (Asked::Read, Some(Got::Value(value))) => (state == value).then_some(state),
        (Asked::Read, None) => Some(state),
        _ => None,
    }
}

/// Which operations were put in order already.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Taken(Vec<u64>);

impl Taken {
    fn set(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    fn clear(&mut self, index: usize) {
        self.0[index / 64] &= !(1 << (index % 64));
    }

    fn has(&self, index: usize) -> bool {
        self.0[index / 64] & (1 << (index % 64)) != 0
    }
}

/// Whether the operations on one key have an order that respects time and explains every result.
/// Operations that nobody knows the result of are put last when nothing else needs them.
pub fn linearizable(operations: &[Operation]) -> bool {
    let mut operations: Vec<&Operation> = operations
        .iter()
        .filter(|operation| operation.asked != Asked::Read || operation.returned.is_some())
        .collect();
    operations.sort_by_key(|operation| operation.invoked);
    let known = operations
        .iter()
        .filter(|operation| operation.returned.is_some())
        .count();
    let mut taken = Taken(vec![0; operations.len().div_ceil(64)]);
    let mut visited: BTreeSet<(Taken, Value)> = BTreeSet::new();
    let mut done = 0;
    let mut state: Value = 0;
    // What was chosen: (index, state before it), and where to go on when it was wrong.
    let mut path: Vec<(usize, Value)> = Vec::new();
    let mut next = 0;
    loop {
        if done == known {
            return true;
        }
        // Whatever returned earliest must come before anything invoked after that.
        let first_return = operations
            .iter()
            .enumerate()
            .filter(|(index, _)| !taken.has(*index))
            .filter_map(|(_, operation)| operation.returned)
            .map(|(at, _)| at)
            .min()
            .unwrap_or(u64::MAX);
        let chosen = operations
            .iter()
            .enumerate()
            .skip(next)
            .take_while(|(_, operation)| operation.invoked < first_return)
            .filter(|(index, _)| !taken.has(*index))
            .find_map(|(index, operation)| {
                let after = step(state, operation)?;
                let mut with = taken.clone();
                with.set(index);
                visited.insert((with, after)).then_some((index, after))
            });
        if let Some((index, after)) = chosen {
            path.push((index, state));
            taken.set(index);
            done += usize::from(operations[index].returned.is_some());
            state = after;
            next = 0;
        } else if let Some((index, before)) = path.pop() {
            taken.clear(index);
            done -= usize::from(operations[index].returned.is_some());
            state = before;
            next = index + 1;
        } else {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(asked: Asked, invoked: u64, returned: Option<(u64, Got)>) -> Operation {
        Operation {
            asked,
            invoked,
            returned,
        }
    }

    fn write(value: Value, from: u64, to: u64) -> Operation {
        operation(Asked::Write(value), from, Some((to, Got::Done)))
    }

    fn read(value: Value, from: u64, to: u64) -> Operation {
        operation(Asked::Read, from, Some((to, Got::Value(value))))
    }

    #[test]
    fn a_read_sees_the_last_write() {
        assert!(linearizable(&[write(1, 1, 2), read(1, 3, 4)]));
        assert!(!linearizable(&[write(1, 1, 2), read(0, 3, 4)]));
        assert!(linearizable(&[
            write(1, 1, 5),
            read(0, 2, 3),
            read(1, 4, 6)
        ]));
        assert!(!linearizable(&[
            write(1, 1, 7),
            read(1, 2, 3),
            read(0, 4, 6)
        ]));
    }

    #[test]
    fn an_unknown_write_may_come_late_or_never_but_once() {
        let unknown = operation(Asked::Write(1), 1, None);
        assert!(linearizable(&[unknown, read(0, 2, 3)]));
        assert!(linearizable(&[unknown, read(0, 2, 3), read(1, 4, 5)]));
        assert!(!linearizable(&[
            unknown,
            read(1, 2, 3),
            write(2, 4, 5),
            read(1, 6, 7)
        ]));
        assert!(!linearizable(&[
            read(1, 1, 2),
            operation(Asked::Write(1), 3, None)
        ]));
    }

    #[test]
    fn compare_and_set_takes_what_is_there() {
        let swap = |from, to, at, got| {
            operation(Asked::CompareAndSet { from, to }, at, Some((at + 1, got)))
        };
        let first = write(1, 1, 2);
        assert!(linearizable(&[
            first,
            swap(1, 2, 3, Got::Done),
            read(2, 5, 6)
        ]));
        assert!(!linearizable(&[first, swap(1, 2, 3, Got::Conflict)]));
        assert!(!linearizable(&[
            first,
            swap(1, 2, 3, Got::Done),
            swap(1, 3, 5, Got::Done)
        ]));
    }

    #[test]
    fn many_concurrent_operations_are_checked_soon() {
        let mut operations = Vec::new();
        for round in 0..200_u64 {
            for client in 0..5_u64 {
                let at = round * 20 + client;
                operations.push(write(round * 5 + client + 1, at, at + 15));
            }
            operations.push(read(round * 5 + 3, round * 20 + 16, round * 20 + 19));
        }
        assert!(linearizable(&operations));
        operations.push(read(1, 10_000, 10_001));
        assert!(!linearizable(&operations));
    }
}
