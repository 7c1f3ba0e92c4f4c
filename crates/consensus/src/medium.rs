//! Where the catalog's files are: a directory on a disk, or one in memory that can fail as disks do.
//!
//! The catalog touches files only through these traits, so that a test decides what a power
//! cut leaves behind.

mod aside;
mod sliced;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use self::aside::Aside;
use self::sliced::Sliced;

/// Behind the name of a file that is not whole. Opening the catalog removes what a crash left.
pub(crate) const UNFINISHED: &str = ".tmp";

/// So much of a file that is stored is synced at once: the syncs of others may wait for it.
const SLICE_BYTES: usize = 1024 * 1024;

/// One directory of files.
pub(crate) trait Directory: Send {
    /// Names of all files, in order.
    fn list(&self) -> io::Result<Vec<String>>;
    /// The whole content.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
    /// Makes an empty file, or empties one, for writing.
    fn create(&self, name: &str) -> io::Result<Box<dyn Medium>>;
    /// Opens a file that is there for writing.
    fn open(&self, name: &str) -> io::Result<Box<dyn Medium>>;
    /// Gives a file another name, durably, replacing what had it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file, durably.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes a file for writing that is empty or has zeros, which are durable; also how many. If
    /// some can be prepared for the next time, there should be `bytes` of them.
    fn create_roomy(&self, name: &str, bytes: u64) -> io::Result<(Box<dyn Medium>, u64)>;
    /// Writes a file, durably, replacing what has its name when all of it is there.
    fn store(&self, name: &str, parts: [Vec<u8>; 3]) -> io::Result<()>;
    /// Begins to do the same. What is begun later is done later.
    fn store_aside(&self, name: &str, parts: [Vec<u8>; 3]) -> io::Result<Box<dyn Store>>;
    /// Removes a file now or a little later; those that are given first go first.
    fn retire(&self, name: &str) -> io::Result<()>;
    /// Room is needed: what is not in use is given back. Returns when nothing is removed any more.
    fn release(&self) {}
}

/// A file that is being written, see [`Directory::store_aside`]. Dropped, it may be written or not.
pub(crate) trait Store: Send {
    /// Does a part of the work, if nobody else does it, without waiting for long; `true`: all is done.
    fn go_on(&mut self) -> io::Result<bool>;
    /// When this returns, nothing is done any more.
    fn give_up(self: Box<Self>);
}

/// One file that is written.
pub(crate) trait Medium: Send {
    /// Writes all of `bytes` at `offset`, extending the file when needed.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Returns when everything written is durable.
    fn sync(&self) -> io::Result<()>;
}

/// A directory of the file system.
#[derive(Debug)]
pub(crate) struct RealDirectory {
    path: PathBuf,
    /// Begun when it is needed.
    aside: OnceLock<Aside>,
}

impl RealDirectory {
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            aside: OnceLock::new(),
        }
    }

    fn sync(&self) -> io::Result<()> {
        sync_directory(&self.path)
    }

    fn aside(&self) -> io::Result<&Aside> {
        if let Some(aside) = self.aside.get() {
            return Ok(aside);
        }
        let aside = Aside::start(&self.path)?;
        Ok(self.aside.get_or_init(|| aside))
    }
}

/// A name is durable when its directory is.
fn sync_directory(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

impl Directory for RealDirectory {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        std::fs::read(self.path.join(name))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn Medium>> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(self.path.join(name))?;
        Ok(Box::new(RealMedium { file }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn Medium>> {
        let file = OpenOptions::new().write(true).open(self.path.join(name))?;
        Ok(Box::new(RealMedium { file }))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        std::fs::rename(self.path.join(from), self.path.join(to))?;
        self.sync()
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        std::fs::remove_file(self.path.join(name))?;
        self.sync()
    }

    fn create_roomy(&self, name: &str, bytes: u64) -> io::Result<(Box<dyn Medium>, u64)> {
        match self.aside()?.take(&self.path.join(name), bytes)? {
            Some((file, room)) => Ok((Box::new(RealMedium { file }), room)),
            None => Ok((self.create(name)?, 0)),
        }
    }

    fn store(&self, name: &str, parts: [Vec<u8>; 3]) -> io::Result<()> {
        let stored = Sliced::begin(Self::new(&self.path), name, parts, SLICE_BYTES)
            .and_then(|mut file| file.finish());
        if stored.is_err() {
            // The disk may be full.
            let _ = self.remove(&format!("{name}{UNFINISHED}"));
        }
        stored
    }

    fn store_aside(&self, name: &str, parts: [Vec<u8>; 3]) -> io::Result<Box<dyn Store>> {
        Ok(Box::new(self.aside()?.store(name, parts)))
    }

    fn retire(&self, name: &str) -> io::Result<()> {
        self.aside()?.retire(name);
        Ok(())
    }

    fn release(&self) {
        if let Some(aside) = self.aside.get() {
            aside.release();
        }
    }
}

struct RealMedium {
    file: File,
}

impl Medium for RealMedium {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// A directory in memory that loses what was not synced.
#[cfg(any(test, feature = "simulation"))]
pub(crate) mod memory {
    use std::collections::{BTreeMap, VecDeque};
    use std::sync::Arc;

    use parking_lot::Mutex;
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    const SECTOR: usize = 512;
    /// Files that are retired and still there.
    const RETIRED: usize = 2;

    #[derive(Debug, Default, Clone)]
    struct Content {
        durable: Vec<u8>,
        /// Written and not synced, in order.
        pending: Vec<(u64, Vec<u8>)>,
    }

    impl Content {
        fn now(&self) -> Vec<u8> {
            let mut bytes = self.durable.clone();
            for (offset, piece) in &self.pending {
                put(&mut bytes, *offset as usize, piece);
            }
            bytes
        }
    }

    fn put(bytes: &mut Vec<u8>, at: usize, piece: &[u8]) {
        let end = at + piece.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        bytes[at..end].copy_from_slice(piece);
    }

    #[derive(Debug, Default)]
    struct Inner {
        files: BTreeMap<String, Arc<Mutex<Content>>>,
        /// Operations until all fail.
        left: Option<u32>,
        /// Bytes that can still be written.
        room: Option<usize>,
        random: Option<StdRng>,
        /// How many files were made that may have room.
        roomy: u64,
        slice_bytes: Option<usize>,
        /// How many files were stored aside.
        stored: u64,
        /// What is to be removed and is still there.
        retired: VecDeque<String>,
    }

    /// See [`Directory`].
    #[derive(Debug, Default)]
    pub(crate) struct MemoryDirectory {
        inner: Arc<Mutex<Inner>>,
    }

    fn operation(inner: &Mutex<Inner>) -> io::Result<()> {
        let mut inner = inner.lock();
        match &mut inner.left {
            None => Ok(()),
            Some(0) => Err(io::Error::other("the power is gone")),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    impl MemoryDirectory {
        /// After `count` operations all fail, until [`Self::power_cut`].
        pub(crate) fn fail_after(&self, count: u32, seed: u64) {
            let mut inner = self.inner.lock();
            inner.left = Some(count);
            inner
                .random
                .get_or_insert_with(|| StdRng::seed_from_u64(seed));
        }

        pub(crate) fn never_fail(&self) {
            let mut inner = self.inner.lock();
            (inner.left, inner.room) = (None, None);
        }

        /// After so many bytes there is no room, until told otherwise.
        pub(crate) fn limit_room(&self, bytes: Option<usize>) {
            self.inner.lock().room = bytes;
        }

        /// Of a stored file so much is written at once: most take several steps.
        pub(crate) fn limit_slices(&self, bytes: usize) {
            self.inner.lock().slice_bytes = Some(bytes);
        }

        /// Of what was not synced, any sectors may have got to the disk.
        pub(crate) fn power_cut(&self) {
            let mut inner = self.inner.lock();
            inner.left = None;
            let mut random = inner
                .random
                .take()
                .unwrap_or_else(|| StdRng::seed_from_u64(0));
            for file in inner.files.values() {
                let mut file = file.lock();
                let odds = [0.0, 0.5, 0.9, 1.0][random.random_range(0..4)];
                for (offset, piece) in std::mem::take(&mut file.pending) {
                    let mut at = 0;
                    while at < piece.len() {
                        let sector = (offset as usize + at) / SECTOR;
                        let end = ((sector + 1) * SECTOR - offset as usize).min(piece.len());
                        if random.random_bool(odds) {
                            put(&mut file.durable, offset as usize + at, &piece[at..end]);
                        }
                        at = end;
                    }
                }
            }
            inner.random = Some(random);
        }

        /// Flips a bit of what is on the disk, somewhere.
        pub(crate) fn flip(&self, seed: u64) {
            let inner = self.inner.lock();
            let mut random = StdRng::seed_from_u64(seed);
            let files: Vec<_> = inner.files.values().collect();
            if files.is_empty() {
                return;
            }
            let mut file = files[random.random_range(0..files.len())].lock();
            // What is in memory only is written over it.
            let end = file.durable.len();
            if end > 0 {
                let at = random.random_range(0..end);
                file.durable[at] ^= 1 << random.random_range(0..8);
            }
        }

        #[cfg(test)]
        pub(crate) fn put(&self, name: &str, bytes: Vec<u8>) {
            let content = Content {
                durable: bytes,
                pending: Vec::new(),
            };
            self.inner
                .lock()
                .files
                .insert(name.to_owned(), Arc::new(Mutex::new(content)));
        }

        fn file(&self, name: &str) -> io::Result<Arc<Mutex<Content>>> {
            let inner = self.inner.lock();
            inner
                .files
                .get(name)
                .cloned()
                .ok_or_else(|| io::ErrorKind::NotFound.into())
        }

        fn medium(&self, content: Arc<Mutex<Content>>) -> Box<dyn Medium> {
            Box::new(MemoryMedium {
                inner: Arc::clone(&self.inner),
                content,
            })
        }
    }

    impl Directory for MemoryDirectory {
        fn list(&self) -> io::Result<Vec<String>> {
            operation(&self.inner)?;
            let mut inner = self.inner.lock();
            // Whoever was to remove them is gone, and has come to any of them.
            let mut retired = std::mem::take(&mut inner.retired);
            retired.truncate(inner.roomy as usize % (RETIRED + 1));
            for name in retired {
                inner.files.remove(&name);
            }
            Ok(inner.files.keys().cloned().collect())
        }

        fn read(&self, name: &str) -> io::Result<Vec<u8>> {
            operation(&self.inner)?;
            Ok(self.file(name)?.lock().now())
        }

        fn create(&self, name: &str) -> io::Result<Box<dyn Medium>> {
            operation(&self.inner)?;
            let content = Arc::<Mutex<Content>>::default();
            let mut inner = self.inner.lock();
            inner.files.insert(name.to_owned(), Arc::clone(&content));
            drop(inner);
            Ok(self.medium(content))
        }

        fn open(&self, name: &str) -> io::Result<Box<dyn Medium>> {
            operation(&self.inner)?;
            Ok(self.medium(self.file(name)?))
        }

        fn rename(&self, from: &str, to: &str) -> io::Result<()> {
            operation(&self.inner)?;
            let content = self.file(from)?;
            let mut inner = self.inner.lock();
            inner.files.remove(from);
            inner.files.insert(to.to_owned(), content);
            Ok(())
        }

        fn remove(&self, name: &str) -> io::Result<()> {
            operation(&self.inner)?;
            self.inner.lock().files.remove(name);
            Ok(())
        }

        /// Every other one has room.
        fn create_roomy(&self, name: &str, bytes: u64) -> io::Result<(Box<dyn Medium>, u64)> {
            operation(&self.inner)?;
            let mut inner = self.inner.lock();
            inner.roomy += 1;
            let room = if inner.roomy.is_multiple_of(2) {
                bytes
            } else {
                0
            };
            let content = Arc::new(Mutex::new(Content {
                durable: vec![0; room as usize],
                pending: Vec::new(),
            }));
            inner.files.insert(name.to_owned(), Arc::clone(&content));
            drop(inner);
            Ok((self.medium(content), room))
        }

        fn store(&self, name: &str, parts: [Vec<u8>; 3]) -> io::Result<()> {
            let directory = Self {
                inner: Arc::clone(&self.inner),
            };
            Sliced::begin(directory, name, parts, usize::MAX)?.finish()
        }

        fn store_aside(&self, name: &str, parts: [Vec<u8>; 3]) -> io::Result<Box<dyn Store>> {
            let slice = self.inner.lock().slice_bytes.unwrap_or(usize::MAX);
            let directory = Self {
                inner: Arc::clone(&self.inner),
            };
            let mut file = Sliced::begin(directory, name, parts, slice)?;
            let stored = {
                let mut inner = self.inner.lock();
                inner.stored += 1;
                inner.stored
            };
            // It may be there before anything else happens.
            if stored.is_multiple_of(3) {
                file.finish()?;
            }
            Ok(Box::new(file))
        }

        fn retire(&self, name: &str) -> io::Result<()> {
            operation(&self.inner)?;
            let mut inner = self.inner.lock();
            inner.retired.push_back(name.to_owned());
            if inner.retired.len() > RETIRED
                && let Some(oldest) = inner.retired.pop_front()
            {
                inner.files.remove(&oldest);
            }
            Ok(())
        }
    }

    impl Directory for Arc<MemoryDirectory> {
        fn list(&self) -> io::Result<Vec<String>> {
            (**self).list()
        }

        fn read(&self, name: &str) -> io::Result<Vec<u8>> {
            (**self).read(name)
        }

        fn create(&self, name: &str) -> io::Result<Box<dyn Medium>> {
            (**self).create(name)
        }

        fn open(&self, name: &str) -> io::Result<Box<dyn Medium>> {
            (**self).open(name)
        }

        fn rename(&self, from: &str, to: &str) -> io::Result<()> {
            (**self).rename(from, to)
        }

        fn remove(&self, name: &str) -> io::Result<()> {
            (**self).remove(name)
        }

        fn create_roomy(&self, name: &str, bytes: u64) -> io::Result<(Box<dyn Medium>, u64)> {
            (**self).create_roomy(name, bytes)
        }

        fn store(&self, name: &str, parts: [Vec<u8>; 3]) -> io::Result<()> {
            (**self).store(name, parts)
        }

        fn store_aside(&self, name: &str, parts: [Vec<u8>; 3]) -> io::Result<Box<dyn Store>> {
            (**self).store_aside(name, parts)
        }

        fn retire(&self, name: &str) -> io::Result<()> {
            (**self).retire(name)
        }
    }

    struct MemoryMedium {
        inner: Arc<Mutex<Inner>>,
        content: Arc<Mutex<Content>>,
    }

    impl Medium for MemoryMedium {
        fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            let outcome = operation(&self.inner);
            if let Some(room) = &mut self.inner.lock().room {
                if *room < bytes.len() {
                    // What fits is written.
                    let fits = std::mem::take(room);
                    let piece = bytes[..fits].to_vec();
                    self.content.lock().pending.push((offset, piece));
                    return Err(io::ErrorKind::StorageFull.into());
                }
                *room -= bytes.len();
            }
            // A write that fails may have got through in part.
            self.content.lock().pending.push((offset, bytes.to_vec()));
            outcome
        }

        fn sync(&self) -> io::Result<()> {
            operation(&self.inner)?;
            let mut content = self.content.lock();
            for (offset, piece) in std::mem::take(&mut content.pending) {
                put(&mut content.durable, offset as usize, &piece);
            }
            Ok(())
        }
    }
}
