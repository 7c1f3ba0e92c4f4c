//! What a long operation says while it runs.

use std::fmt;
use std::io::Write;
use std::sync::Arc;

/// Receives one line at a time.
#[derive(Clone)]
pub struct Progress(Arc<dyn Fn(&str) + Send + Sync>);

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Progress").finish_non_exhaustive()
    }
}

impl Default for Progress {
    /// Lines on standard error; also out of a test, whose own output is held back.
    fn default() -> Self {
        Self::new(|line| {
            // Progress that nobody can read is no reason to stop.
            let _ = writeln!(std::io::stderr(), "{line}");
        })
    }
}

impl Progress {
    /// Calls `show` with each line.
    pub fn new(show: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(show))
    }

    /// Says nothing.
    pub fn quiet() -> Self {
        Self::new(|_| ())
    }

    /// Says one line.
    pub fn line(&self, line: &str) {
        (self.0)(line);
    }
}
