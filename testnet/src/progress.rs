//! What a long operation says while it runs.

use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// One thing that is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A line for people.
    Line(&'a str),
    /// How far a step is; with `done == total` it is over.
    Step {
        /// What is done.
        name: &'a str,
        /// How many of its parts are done.
        done: usize,
        /// How many there are.
        total: usize,
        /// Since the step began.
        elapsed: Duration,
    },
}

/// Receives events.
#[derive(Clone)]
pub struct Progress(Arc<dyn Fn(Event<'_>) + Send + Sync>);

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").finish_non_exhaustive()
    }
}

impl Default for Progress {
    /// Lines on standard error; also out of a test, whose own output is held back.
    fn default() -> Self {
        Self::new(|event| {
            // Progress that nobody can read is no reason to stop.
            let _ = match event {
                Event::Line(line) => writeln!(std::io::stderr(), "{line}"),
                Event::Step {
                    name,
                    done,
                    total,
                    elapsed,
                } if done == total => writeln!(
                    std::io::stderr(),
                    "  {name:<20} {done}/{total}  {:.1} s",
                    elapsed.as_secs_f32()
                ),
                Event::Step { .. } => Ok(()),
            };
        })
    }
}

impl Progress {
    /// Calls `show` with each event.
    pub fn new(show: impl Fn(Event<'_>) + Send + Sync + 'static) -> Self {
        Self(Arc::new(show))
    }

    /// Says nothing.
    pub fn quiet() -> Self {
        Self::new(|_| ())
    }

    /// Says one line.
    pub fn line(&self, line: &str) {
        (self.0)(Event::Line(line));
    }

    /// Begins a step of `total` parts.
    pub fn step(&self, name: &str, total: usize) -> Step {
        let step = Step {
            progress: self.clone(),
            name: name.to_owned(),
            total,
            done: Mutex::new(0),
            started: Instant::now(),
        };
        step.set(0);
        step
    }
}

/// A step that is under way.
#[derive(Debug)]
pub struct Step {
    progress: Progress,
    name: String,
    total: usize,
    done: Mutex<usize>,
    started: Instant,
}

impl Step {
    /// One more part is done.
    pub fn advance(&self) {
        let done = *self.done.lock() + 1;
        self.set(done);
    }

    /// So many parts are done; a step that is over stays over.
    pub fn set(&self, parts: usize) {
        let mut done = self.done.lock();
        if *done == self.total && self.total > 0 {
            return;
        }
        *done = parts.min(self.total);
        (self.progress.0)(Event::Step {
            name: &self.name,
            done: *done,
            total: self.total,
            elapsed: self.started.elapsed(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_ends_once() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let progress = {
            let seen = Arc::clone(&seen);
            Progress::new(move |event| {
                if let Event::Step { done, .. } = event {
                    seen.lock().push(done);
                }
            })
        };
        let step = progress.step("nodes", 2);
        step.advance();
        step.advance();
        step.advance();
        step.set(1);
        assert_eq!(*seen.lock(), [0, 1, 2]);
    }
}
