//! What a thread does aside, because no write of the catalog should wait for it (ADR 0007):
//!
//! - files of zeros in reserve, and files that are not needed any more: to make a file larger takes a
//!   file system more than 1.2 ms for each MiB, to remove one of 16 MiB 15 ms. The one is made from
//!   the other.
//! - files that are written as a whole: their data, and then their names, are synced.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tracing::warn;

use super::{Directory as _, RealDirectory, Store, UNFINISHED, sync_directory};

/// Files in reserve at most: one that was taken leaves another one until a third was made.
const SPARES_MAX: usize = 2;
/// Written and synced at once, so that the syncs of others do not wait for more.
static PIECE: [u8; 256 * 1024] = [0; 256 * 1024];
const PREFIX: &str = "spare-";

type Parts = Arc<Mutex<Option<[Vec<u8>; 3]>>>;

enum Job {
    /// Make one of this size, where there is none.
    Prepare(u64),
    /// Make one from this file, or remove it.
    Retire(String),
    /// Write a file of these parts, if they are still there, and say so.
    Store(String, Parts, Sender<io::Result<()>>),
    /// Remove all spares, and say so.
    Release(Sender<()>),
}

/// The thread; it does one thing after the other, and ends with this.
#[derive(Debug)]
pub(super) struct Aside {
    jobs: Option<Sender<Job>>,
    ready: Arc<Mutex<Vec<PathBuf>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Aside {
    pub(super) fn start(directory: &Path) -> io::Result<Self> {
        let (jobs, queue) = channel();
        let ready = Arc::<Mutex<Vec<PathBuf>>>::default();
        let stop = Arc::<AtomicBool>::default();
        let mut worker = Worker {
            directory: directory.to_owned(),
            ready: Arc::clone(&ready),
            stop: Arc::clone(&stop),
            made: 0,
            old: VecDeque::new(),
        };
        let thread = std::thread::Builder::new()
            .name("krake-files".to_owned())
            .spawn(move || worker.work(&queue))?;
        Ok(Self {
            jobs: Some(jobs),
            ready,
            stop,
            thread: Some(thread),
        })
    }

    fn ask(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(job);
        }
    }

    /// A file of zeros that are durable, and how many there are, under another name; the next one of
    /// `bytes` is made. `None`: there is none yet.
    pub(super) fn take(&self, name: &Path, bytes: u64) -> io::Result<Option<(File, u64)>> {
        let spare = self.ready.lock().pop();
        self.ask(Job::Prepare(bytes));
        let Some(spare) = spare else {
            return Ok(None);
        };
        match std::fs::rename(spare, name) {
            // Somebody tidied up.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            renamed => renamed?,
        }
        let file = OpenOptions::new().write(true).open(name)?;
        let room = file.metadata()?.len();
        Ok(Some((file, room)))
    }

    /// Removes a file after those that were given before: of a row of files the oldest are missing,
    /// never one in between. One that cannot be removed is tried again with the next.
    pub(super) fn retire(&self, name: &str) {
        self.ask(Job::Retire(name.to_owned()));
    }

    /// Begins to write a file of these parts, replacing what has its name when it is durable.
    pub(super) fn store(&self, name: &str, parts: [Vec<u8>; 3]) -> StoredAside {
        let (done, stored) = channel();
        let parts = Arc::new(Mutex::new(Some(parts)));
        self.ask(Job::Store(name.to_owned(), Arc::clone(&parts), done));
        StoredAside { parts, stored }
    }

    /// Does what was asked for, and gives the room of the files in reserve back.
    pub(super) fn release(&self) {
        let (done, wait) = channel();
        self.ask(Job::Release(done));
        let _ = wait.recv();
    }
}

impl Drop for Aside {
    /// What was not begun is not done.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        remove(&self.ready);
    }
}

/// Their room may be needed.
fn remove(spares: &Mutex<Vec<PathBuf>>) {
    for spare in std::mem::take(&mut *spares.lock()) {
        let _ = std::fs::remove_file(spare);
    }
}

/// A file that the thread writes; not any more, if it has not begun when this is dropped.
pub(super) struct StoredAside {
    parts: Parts,
    stored: Receiver<io::Result<()>>,
}

impl Store for StoredAside {
    fn go_on(&mut self) -> io::Result<bool> {
        match self.stored.try_recv() {
            Ok(stored) => stored.map(|()| true),
            Err(TryRecvError::Empty) => Ok(false),
            Err(TryRecvError::Disconnected) => {
                Err(io::Error::other("the thread that writes files has ended"))
            }
        }
    }

    fn give_up(self: Box<Self>) {
        let begun = self.parts.lock().take().is_none();
        if begun {
            let _ = self.stored.recv();
        }
    }
}

impl Drop for StoredAside {
    fn drop(&mut self) {
        self.parts.lock().take();
    }
}

struct Worker {
    directory: PathBuf,
    ready: Arc<Mutex<Vec<PathBuf>>>,
    stop: Arc<AtomicBool>,
    /// Counts files in reserve: no two have one name.
    made: u64,
    /// Files that are to be removed, in this order.
    old: VecDeque<String>,
}

impl Worker {
    fn work(&mut self, queue: &Receiver<Job>) {
        for job in queue {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            match job {
                Job::Prepare(bytes) if self.ready.lock().is_empty() => {
                    let name = self.next_name();
                    let filled = File::create(&name).and_then(|file| self.fill(&file, bytes));
                    self.keep(&name, filled);
                }
                Job::Prepare(_) => {}
                Job::Retire(name) => {
                    self.old.push_back(name);
                    self.retire_old();
                }
                Job::Store(name, parts, done) => {
                    let parts = parts.lock().take();
                    if let Some(parts) = parts {
                        let _ = done.send(RealDirectory::new(&self.directory).store(&name, parts));
                    }
                }
                Job::Release(done) => {
                    remove(&self.ready);
                    let _ = done.send(());
                }
            }
        }
    }

    fn retire_old(&mut self) {
        while let Some(name) = self.old.pop_front() {
            if let Err(error) = self.retire(&name) {
                warn!(name, %error, "an old file could not be removed: it is tried again with the next");
                self.old.push_front(name);
                return;
            }
        }
    }

    fn next_name(&mut self) -> PathBuf {
        self.made += 1;
        self.directory
            .join(format!("{PREFIX}{}{UNFINISHED}", self.made))
    }

    fn keep(&self, name: &Path, filled: io::Result<()>) {
        match filled {
            Ok(()) => self.ready.lock().push(name.to_owned()),
            Err(error) => {
                // Without room there is none, and whoever writes next says so.
                let full = error.kind() == io::ErrorKind::StorageFull;
                if !full && !self.stop.load(Ordering::Relaxed) {
                    warn!(%error, "no file could be made in reserve");
                }
                let _ = std::fs::remove_file(name);
            }
        }
    }

    /// Writes zeros durably, unless it is to stop.
    fn fill(&self, file: &File, bytes: u64) -> io::Result<()> {
        let mut at = 0;
        while at < bytes {
            if self.stop.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let piece = &PIECE[..(bytes - at).min(PIECE.len() as u64) as usize];
            file.write_all_at(piece, at)?;
            file.sync_data()?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn retire(&mut self, name: &str) -> io::Result<()> {
        let old = self.directory.join(name);
        let spare = self.next_name();
        let many = self.ready.lock().len() >= SPARES_MAX;
        let gone = if many {
            std::fs::remove_file(old)
        } else {
            std::fs::rename(old, &spare)
        };
        let missing = match gone {
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            gone => {
                gone?;
                false
            }
        };
        // Nothing of it is overwritten as long as it could come back under its old name.
        sync_directory(&self.directory)?;
        if many || missing {
            return Ok(());
        }
        let file = OpenOptions::new().write(true).open(&spare);
        let filled = file.and_then(|file| {
            let bytes = file.metadata()?.len();
            self.fill(&file, bytes)
        });
        self.keep(&spare, filled);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 700_000;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        let name = |entry: io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<String> = entries
            .map(|entry| name(entry).into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_old_file_becomes_zeros_under_another_name() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path();
        let aside = Aside::start(path).unwrap();
        assert!(aside.take(&path.join("first"), BYTES).unwrap().is_none());
        let old = path.join("old");
        std::fs::write(&old, vec![7; BYTES as usize]).unwrap();
        aside.retire("old");
        settle(&aside);
        assert_eq!(aside.ready.lock().len(), 2);
        assert!(!old.exists());
        for name in ["second", "third"] {
            let name = path.join(name);
            let (_, room) = aside.take(&name, BYTES).unwrap().unwrap();
            assert_eq!(room, BYTES);
            assert_eq!(std::fs::read(name).unwrap(), vec![0; BYTES as usize]);
        }
    }

    /// When this returns, what was asked for is done.
    fn settle(aside: &Aside) {
        let store = aside.store("settled", [Vec::new(), Vec::new(), Vec::new()]);
        let _ = store.stored.recv();
    }

    #[test]
    fn no_more_are_kept_than_wanted_and_none_when_room_is_needed() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path();
        let aside = Aside::start(path).unwrap();
        let retire = |number| {
            let name = format!("old-{number}");
            std::fs::write(path.join(&name), [7; 10]).unwrap();
            aside.retire(&name);
        };
        (0..4).for_each(retire);
        settle(&aside);
        let both = ["settled", "spare-1.tmp", "spare-2.tmp"];
        assert_eq!(names(path), both);
        aside.release();
        assert_eq!(names(path), ["settled"]);
        retire(4);
        settle(&aside);
        assert_eq!(names(path).len(), 2);
        drop(aside);
        assert_eq!(names(path), ["settled"]);
    }

    #[test]
    fn a_file_is_written_as_a_whole_or_not_at_all() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path();
        let aside = Aside::start(path).unwrap();
        let parts = |byte: u8| [vec![byte], vec![byte; 10], Vec::new()];
        let stored = |mut store: StoredAside| {
            while !store.go_on()? {
                std::thread::yield_now();
            }
            Ok::<_, io::Error>(())
        };
        let (first, second) = (aside.store("a", parts(1)), aside.store("a", parts(2)));
        stored(second).unwrap();
        stored(first).unwrap();
        assert_eq!(std::fs::read(path.join("a")).unwrap(), [2; 11]);
        assert_eq!(names(path), ["a"]);
        // Its place is taken.
        std::fs::create_dir_all(path.join("b").join("c")).unwrap();
        assert!(stored(aside.store("b", parts(3))).is_err());
        assert_eq!(names(path), ["a", "b"]);
        // Whoever gives up has it as it was, or as it was to be; never later.
        for byte in 4..50 {
            Box::new(aside.store("a", parts(byte))).give_up();
            let found = std::fs::read(path.join("a")).unwrap();
            aside.release();
            assert_eq!(std::fs::read(path.join("a")).unwrap(), found);
        }
    }

    #[test]
    fn what_cannot_be_removed_is_tried_again_before_what_came_after_it() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path();
        let aside = Aside::start(path).unwrap();
        for name in ["a", "b", "d", "e"] {
            std::fs::write(path.join(name), [7; 10]).unwrap();
        }
        // Those become spares; a directory is no file that can be removed.
        std::fs::create_dir(path.join("c")).unwrap();
        for name in ["a", "b", "c", "d"] {
            aside.retire(name);
        }
        settle(&aside);
        assert_eq!(names(path)[..3], ["c", "d", "e"]);
        std::fs::remove_dir(path.join("c")).unwrap();
        aside.retire("e");
        aside.release();
        assert_eq!(names(path), ["settled"]);
    }
}
