//! Exit codes: stable, one meaning each.

use std::process::ExitCode;

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Exit {
    /// Done, also when there was nothing to change.
    Done = 0,
    /// It failed for a reason that has no code of its own; `status` found a problem.
    Failed = 1,
    /// Wrong usage.
    Usage = 2,
    /// Not found.
    NotFound = 3,
    /// Somebody else changed or owns it, or it exists already.
    Conflict = 4,
    /// Not authenticated or not allowed.
    Denied = 5,
    /// No node answered.
    Unreachable = 6,
    /// Timed out while waiting.
    TimedOut = 7,
    /// Valid, but no site fits.
    Unplaceable = 8,
    /// Manifest or configuration invalid.
    Invalid = 9,
    /// A node answered, but it cannot read or write consistently now.
    Stale = 11,
    /// Interrupted (128 + SIGINT).
    Interrupted = 130,
    /// The reader of the output went away (128 + SIGPIPE).
    BrokenPipe = 141,
}

/// What `krakectl help exit-codes` prints.
pub const TEXT: &str = "\
CODE  MEANING
0     done; also: nothing to change
1     failed for another reason; `status` found a problem
2     wrong usage
3     not found
4     conflict: somebody else changed it, owns the field, or it exists already
5     not authenticated or not allowed
6     no node answered
7     timed out while waiting
8     valid, but no site fits
9     manifest, policy or configuration invalid
11    a node answered, but has no majority to read or write with now
130   interrupted
141   the reader of the output went away
";

impl Exit {
    /// The code for an HTTP status.
    pub const fn of_status(code: u16) -> Self {
        match code {
            400 | 413 | 415 | 422 => Self::Invalid,
            401 | 403 => Self::Denied,
            404 => Self::NotFound,
            409 | 412 => Self::Conflict,
            408 | 504 => Self::TimedOut,
            503 => Self::Stale,
            _ => Self::Failed,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_text_lists_every_code() {
        for exit in [
            Exit::Done,
            Exit::Failed,
            Exit::Usage,
            Exit::NotFound,
            Exit::Conflict,
            Exit::Denied,
            Exit::Unreachable,
            Exit::TimedOut,
            Exit::Unplaceable,
            Exit::Invalid,
            Exit::Stale,
            Exit::Interrupted,
            Exit::BrokenPipe,
        ] {
            let code = format!("{} ", exit as u8);
            assert!(TEXT.lines().any(|line| line.starts_with(&code)), "{code}");
        }
    }
}
