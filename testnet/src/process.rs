//! Processes that outlive whoever started them, told apart from later ones with the same pid.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Time between two looks at a state that is waited for.
pub const LOOK: Duration = Duration::from_millis(20);

/// How often something is looked at that so many sites are looked at for: all looks together are
/// not to slow down what is waited for.
pub fn look_among(sites: u32) -> Duration {
    LOOK * (sites / 5).max(1)
}

/// A process: its pid and when it started, in clock ticks since boot. Both together are never
/// used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its pid.
    pub pid: u32,
    /// Field `starttime` of `/proc/PID/stat`.
    pub start_ticks: u64,
}

/// What is needed of `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    state: char,
    thread_count: u64,
    start_ticks: u64,
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The second field is the program's name in parentheses and may hold anything.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    // Numbers of fields as in proc(5): `state` is 3, `num_threads` 20, `starttime` 22.
    let state = fields.next()?.chars().next()?;
    let thread_count = fields.nth(16)?.parse().ok()?;
    let start_ticks = fields.nth(1)?.parse().ok()?;
    Some(Stat {
        state,
        thread_count,
        start_ticks,
    })
}

fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

impl Stat {
    /// A zombie is not alive, once its last thread has ended: only then its files and ports are
    /// closed.
    const fn is_alive(self) -> bool {
        !matches!(self.state, 'Z' | 'X') || self.thread_count > 1
    }
}

impl ProcessId {
    /// The process that has this pid now.
    pub fn of(pid: u32) -> Option<Self> {
        let start_ticks = stat(pid)?.start_ticks;
        Some(Self { pid, start_ticks })
    }

    fn stat(self) -> Option<Stat> {
        stat(self.pid).filter(|stat| stat.start_ticks == self.start_ticks)
    }

    /// Whether it still runs or still holds files and ports.
    pub fn is_alive(self) -> bool {
        self.stat().is_some_and(Stat::is_alive)
    }

    /// Whether it is stopped by a signal.
    pub fn is_paused(self) -> bool {
        self.stat()
            .is_some_and(|stat| matches!(stat.state, 'T' | 't'))
    }

    /// Sends a signal; whether the process was there to get it.
    pub fn signal(self, signal: Signal) -> bool {
        let Ok(pid) = i32::try_from(self.pid) else {
            return false;
        };
        self.is_alive() && kill(Pid::from_raw(pid), signal).is_ok()
    }

    /// Waits until it is gone; whether it is.
    pub async fn gone_within(self, limit: Duration) -> bool {
        let end = tokio::time::Instant::now() + limit;
        while self.is_alive() {
            if tokio::time::Instant::now() >= end {
                return false;
            }
            tokio::time::sleep(LOOK).await;
        }
        true
    }
}

/// Ends all: SIGTERM, and SIGKILL for those that are still there after `patience`.
/// Returns how many had to be killed.
pub async fn terminate(processes: &[ProcessId], patience: Duration) -> usize {
    for process in processes {
        process.signal(Signal::SIGTERM);
        // A stopped process gets the signal once it goes on.
        process.signal(Signal::SIGCONT);
    }
    let end = tokio::time::Instant::now() + patience;
    while processes.iter().any(|process| process.is_alive()) && tokio::time::Instant::now() < end {
        tokio::time::sleep(LOOK).await;
    }
    let left = processes.iter().filter(|p| p.is_alive()).count();
    kill_now(processes).await;
    left
}

/// Kills all and waits until they are gone.
pub async fn kill_now(processes: &[ProcessId]) {
    for process in processes {
        process.signal(Signal::SIGKILL);
    }
    for process in processes {
        // Nothing survives SIGKILL; a process in a disk operation ends after it.
        process.gone_within(Duration::from_secs(10)).await;
    }
}

/// As [`kill_now`], where nothing can be awaited.
pub fn kill_blocking(processes: &[ProcessId]) {
    for process in processes {
        process.signal(Signal::SIGKILL);
    }
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while processes.iter().any(|process| process.is_alive()) && std::time::Instant::now() < end {
        std::thread::sleep(LOOK);
    }
}

/// Starts a program in a process group of its own, so that Ctrl-C in a terminal does not reach
/// it, with its output appended to `log`.
///
/// # Errors
/// When the log cannot be opened or the program cannot be started.
pub fn spawn_detached(
    program: &Path,
    arguments: &[String],
    environment: &[(&str, &str)],
    log: &Path,
) -> anyhow::Result<ProcessId> {
    let output = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open the log {}", log.display()))?;
    let errors = output.try_clone()?;
    let mut command = tokio::process::Command::new(program);
    command
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .process_group(0);
    // What configures a node or a krakectl of the user is not for these.
    for (name, _) in std::env::vars() {
        if name.starts_with("KRAKE_") || name == "KUBECONFIG" {
            command.env_remove(name);
        }
    }
    let child = command
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    let pid = child
        .id()
        .with_context(|| format!("{} ended at once", program.display()))?;
    // Dropping the handle leaves the process alone; tokio reaps it when it ends.
    ProcessId::of(pid).with_context(|| {
        format!(
            "{} ended at once; its log is {}",
            program.display(),
            log.display()
        )
    })
}

/// The last lines of a log, for an error message.
pub fn tail(log: &Path, lines_max: usize) -> String {
    const BYTES_MAX: usize = 64 * 1024;
    let bytes = std::fs::read(log).unwrap_or_default();
    let from = bytes.len().saturating_sub(BYTES_MAX);
    let text = String::from_utf8_lossy(&bytes[from..]);
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.len().saturating_sub(lines_max);
    lines[first..]
        .iter()
        .map(|line| format!("    {}", line.chars().take(240).collect::<String>()))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Writes a file of mode 0600 whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write_private(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let temporary = PathBuf::from(format!("{}.new", path.display()));
    let failed = || format!("cannot write {}", path.display());
    let mut file = OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&temporary)
        .with_context(failed)?;
    file.write_all(bytes).with_context(failed)?;
    std::fs::rename(&temporary, path).with_context(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_parentheses_and_blanks_does_not_confuse() {
        let numbers: Vec<String> = (4..=24).map(|field| field.to_string()).collect();
        let text = format!("17 (a) b (c) S {}", numbers.join(" "));
        let expected = Stat {
            state: 'S',
            thread_count: 20,
            start_ticks: 22,
        };
        assert_eq!(parse_stat(&text), Some(expected));
        assert_eq!(parse_stat("17 (a"), None);
    }

    #[test]
    fn a_zombie_with_threads_still_holds_its_ports() {
        let stat = |state, thread_count| Stat {
            state,
            thread_count,
            start_ticks: 1,
        };
        assert!(stat('Z', 2).is_alive());
        assert!(!stat('Z', 1).is_alive());
        assert!(stat('T', 1).is_alive());
    }

    async fn until(what: &str, state: impl Fn() -> bool) {
        let end = tokio::time::Instant::now() + Duration::from_secs(20);
        while !state() {
            assert!(tokio::time::Instant::now() < end, "not in time: {what}");
            tokio::time::sleep(LOOK).await;
        }
    }

    #[tokio::test]
    async fn a_recycled_pid_is_never_hit() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let arguments = ["60".to_owned()];
        let sleep = spawn_detached(Path::new("sleep"), &arguments, &[], &log).unwrap();
        let other = ProcessId {
            start_ticks: sleep.start_ticks + 1,
            ..sleep
        };
        assert!(!other.is_alive());
        assert!(!other.signal(Signal::SIGKILL));
        assert!(sleep.is_alive());
        assert!(sleep.signal(Signal::SIGSTOP));
        until("it is paused", || sleep.is_paused()).await;
        // SIGTERM must work on a stopped process, too.
        assert_eq!(terminate(&[sleep], Duration::from_secs(20)).await, 0);
        assert!(!sleep.is_alive());
    }

    #[tokio::test]
    async fn who_ignores_sigterm_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let script = "trap '' TERM; echo ready; while :; do sleep 1; done".to_owned();
        let shell = spawn_detached(Path::new("sh"), &["-c".to_owned(), script], &[], &log).unwrap();
        until("it says so", || tail(&log, 1).contains("ready")).await;
        assert_eq!(terminate(&[shell], Duration::from_millis(200)).await, 1);
        assert!(!shell.is_alive());
    }

    #[test]
    fn the_tail_is_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        std::fs::write(&log, "a\nb\nc\n").unwrap();
        assert_eq!(tail(&log, 2), "    b\n    c");
        assert_eq!(tail(&dir.path().join("none"), 2), "");
    }
}
