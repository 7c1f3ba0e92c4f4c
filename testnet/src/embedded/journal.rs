//! The journal: every change of every object, so that a cluster has them again after a kill.
//!
//! `journal` in the cluster's directory: a header, then records, each with its length, a checksum
//! of the length, a checksum of the content, and the content (the codec of `krake_model`, with the
//! object as JSON bytes inside). A record that the end of the file cuts off was never
//! acknowledged and goes; any other damage stops the start. When most of the file is outdated, what
//! is current is written to a new one, which takes the old one's place. Changes reach the operating
//! system before they are acknowledged, not the disk: that survives the death of the process.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use krake_kube_api::store::Journal;
use krake_model::codec;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::object::{Key, Resource, key};

const MAGIC: &[u8; 8] = b"KRKCLST\x01";
const VERSION: u8 = 1;
/// Length, its checksum, the content's checksum.
const HEAD_BYTES: usize = 12;
/// No record is larger: a request's body has at most 3 MiB.
const RECORD_BYTES_MAX: usize = 12 * 1024 * 1024;
/// A file below this is not worth being written anew.
const COMPACT_BYTES_MIN: u64 = 8 * 1024 * 1024;

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    revision: u64,
    group: String,
    plural: String,
    gone: bool,
    /// The object as JSON; only its names when it is gone.
    object: Vec<u8>,
}

/// What a journal held.
#[derive(Debug, Default)]
pub(crate) struct Held {
    pub(crate) revision: u64,
    pub(crate) objects: Vec<(Resource, Value)>,
}

/// An open journal.
#[derive(Debug)]
pub(crate) struct FileJournal {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    end: u64,
    revision: u64,
    /// Where the newest record of each object is.
    live: BTreeMap<Key, (u64, u32)>,
    live_bytes: u64,
    compact_above: u64,
}

impl FileJournal {
    /// Opens or makes the journal in `dir` and reads what it holds.
    ///
    /// # Errors
    /// When the file cannot be used or is damaged.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<(Self, Held)> {
        let path = dir.join("journal");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("{} cannot be opened", path.display()))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .with_context(|| format!("{} cannot be read", path.display()))?;
        let mut inner = Inner {
            path: path.clone(),
            file,
            end: MAGIC.len() as u64,
            revision: 0,
            live: BTreeMap::new(),
            live_bytes: 0,
            compact_above: COMPACT_BYTES_MIN,
        };
        let held = inner.read(&bytes).with_context(|| {
            format!(
                "{} is damaged; remove it to start with an empty cluster",
                path.display()
            )
        })?;
        if bytes.len() < MAGIC.len() {
            inner.file.write_all_at(MAGIC, 0)?;
        }
        inner.file.set_len(inner.end)?;
        inner.file.seek(SeekFrom::Start(inner.end))?;
        if inner.end > COMPACT_BYTES_MIN / 8 && inner.live_bytes < inner.end / 2 {
            inner.compact()?;
        }
        let inner = Mutex::new(inner);
        Ok((Self { inner }, held))
    }
}

impl Inner {
    fn read(&mut self, bytes: &[u8]) -> anyhow::Result<Held> {
        let mut objects: BTreeMap<Key, Value> = BTreeMap::new();
        if bytes.len() < MAGIC.len() {
            anyhow::ensure!(MAGIC.starts_with(bytes), "it is no journal of a cluster");
            return Ok(Held::default());
        }
        anyhow::ensure!(bytes.starts_with(MAGIC), "it is no journal of a cluster");
        let mut position = MAGIC.len();
        while let Some((record, bytes_used)) = next(&bytes[position..])
            .with_context(|| format!("the record at byte {position} is not what was written"))?
        {
            let object: Value = serde_json::from_slice(&record.object)?;
            let key = key(&(record.group, record.plural), &object);
            self.revision = self.revision.max(record.revision);
            self.place(&key, record.gone, position as u64, bytes_used);
            if record.gone {
                objects.remove(&key);
            } else {
                objects.insert(key, object);
            }
            position += bytes_used;
        }
        self.end = position as u64;
        let objects = objects
            .into_iter()
            .map(|((resource, _, _), object)| (resource, object))
            .collect();
        Ok(Held {
            revision: self.revision,
            objects,
        })
    }

    fn place(&mut self, key: &Key, gone: bool, position: u64, bytes: usize) {
        let before = if gone {
            self.live.remove(key)
        } else {
            self.live_bytes += bytes as u64;
            self.live.insert(key.clone(), (position, bytes as u32))
        };
        if let Some((_, bytes)) = before {
            self.live_bytes -= u64::from(bytes);
        }
    }

    /// Writes what is current to a new file, which takes this one's place.
    fn compact(&mut self) -> anyhow::Result<()> {
        let fresh_path = self.path.with_extension("new");
        let mut fresh = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&fresh_path)?;
        let mut out = std::io::BufWriter::new(&mut fresh);
        out.write_all(MAGIC)?;
        let mut end = MAGIC.len() as u64;
        let mut live = BTreeMap::new();
        let mut buffer = Vec::new();
        for (key, (position, bytes)) in &self.live {
            buffer.resize(*bytes as usize, 0);
            self.file.read_exact_at(&mut buffer, *position)?;
            out.write_all(&buffer)?;
            live.insert(key.clone(), (end, *bytes));
            end += u64::from(*bytes);
        }
        // The newest change may have been a removal: its revision must not be given out again.
        let mark = encode(&Record {
            revision: self.revision,
            group: String::new(),
            plural: String::new(),
            gone: true,
            object: b"{}".to_vec(),
        })?;
        out.write_all(&mark)?;
        end += mark.len() as u64;
        out.flush()?;
        drop(out);
        fresh.sync_all()?;
        std::fs::rename(&fresh_path, &self.path)?;
        self.file = fresh;
        self.live = live;
        self.end = end;
        self.compact_above = COMPACT_BYTES_MIN.max(end.saturating_mul(4));
        Ok(())
    }

    fn append(&mut self, record: &Record, key: &Key) -> anyhow::Result<()> {
        let bytes = encode(record)?;
        if let Err(error) = self.file.write_all_at(&bytes, self.end) {
            // Half a record must not stay in the middle of the file.
            self.file.set_len(self.end)?;
            return Err(error.into());
        }
        self.place(key, record.gone, self.end, bytes.len());
        self.end += bytes.len() as u64;
        self.revision = record.revision;
        if self.end > self.compact_above {
            self.compact()?;
        }
        Ok(())
    }
}

impl Journal for FileJournal {
    fn note(
        &self,
        revision: u64,
        resource: &Resource,
        object: &Value,
        gone: bool,
    ) -> Result<(), String> {
        let key = key(resource, object);
        let content = if gone {
            serde_json::json!({"metadata": {"name": key.2, "namespace": key.1}}).to_string()
        } else {
            object.to_string()
        };
        let record = Record {
            revision,
            group: resource.0.clone(),
            plural: resource.1.clone(),
            gone,
            object: content.into_bytes(),
        };
        let mut inner = self.inner.lock();
        inner.append(&record, &key).map_err(|error| {
            format!(
                "the change cannot be written to {}: {error:#}",
                inner.path.display()
            )
        })
    }
}

fn encode(record: &Record) -> anyhow::Result<Vec<u8>> {
    let content = codec::encode(VERSION, record)?;
    let length = u32::try_from(content.len())?.to_le_bytes();
    let mut bytes = Vec::with_capacity(HEAD_BYTES + content.len());
    bytes.extend_from_slice(&length);
    bytes.extend_from_slice(&crc32fast::hash(&length).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&content).to_le_bytes());
    bytes.extend_from_slice(&content);
    Ok(bytes)
}

/// The next record and its bytes; `None` at the end, or when the end cuts it off.
fn next(bytes: &[u8]) -> anyhow::Result<Option<(Record, usize)>> {
    let Some((head, rest)) = bytes.split_at_checked(HEAD_BYTES) else {
        return Ok(None);
    };
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    anyhow::ensure!(
        crc32fast::hash(&head[..4]) == word(4),
        "the checksum of its length is wrong"
    );
    let length = word(0) as usize;
    let Some((content, rest)) = rest.split_at_checked(length) else {
        return Ok(None);
    };
    if crc32fast::hash(content) != word(8) {
        anyhow::ensure!(rest.is_empty(), "its checksum is wrong");
        return Ok(None);
    }
    let record = codec::decode(VERSION, content, RECORD_BYTES_MAX)?;
    Ok(Some((record, HEAD_BYTES + length)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pods() -> Resource {
        (String::new(), "pods".to_owned())
    }

    fn pod(name: &str, text: &str) -> Value {
        json!({"metadata": {"name": name, "namespace": "default"}, "text": text})
    }

    fn filled(dir: &Path) -> u64 {
        let (journal, held) = FileJournal::open(dir).unwrap();
        assert!(held.objects.is_empty());
        journal.note(1, &pods(), &pod("a", "1"), false).unwrap();
        journal.note(2, &pods(), &pod("b", "1"), false).unwrap();
        journal.note(3, &pods(), &pod("a", "2"), false).unwrap();
        journal.note(4, &pods(), &pod("b", "1"), true).unwrap();
        std::fs::metadata(dir.join("journal")).unwrap().len()
    }

    #[test]
    fn what_was_noted_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path());
        let (_, held) = FileJournal::open(dir.path()).unwrap();
        assert_eq!(held.revision, 4);
        assert_eq!(held.objects, [(pods(), pod("a", "2"))]);
    }

    #[test]
    fn a_torn_tail_is_cut_wherever_it_is_torn() {
        let whole = tempfile::tempdir().unwrap();
        let length = filled(whole.path());
        let bytes = std::fs::read(whole.path().join("journal")).unwrap();
        for cut in 0..length as usize {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("journal"), &bytes[..cut]).unwrap();
            let (journal, held) = FileJournal::open(dir.path()).unwrap();
            assert!(held.revision < 4, "cut at {cut}");
            journal.note(9, &pods(), &pod("c", "1"), false).unwrap();
            drop(journal);
            let (_, held) = FileJournal::open(dir.path()).unwrap();
            assert_eq!(held.revision, 9, "cut at {cut}");
        }
    }

    #[test]
    fn damage_in_the_middle_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        filled(dir.path());
        let path = dir.path().join("journal");
        let bytes = std::fs::read(&path).unwrap();
        for at in [0, 9, 14, 40] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, &damaged).unwrap();
            let error = format!("{:#}", FileJournal::open(dir.path()).unwrap_err());
            assert!(error.contains("journal is damaged"), "byte {at}: {error}");
        }
    }

    #[test]
    fn a_compacted_journal_holds_the_same_and_no_revision_comes_twice() {
        let dir = tempfile::tempdir().unwrap();
        let length = filled(dir.path());
        {
            let (journal, _) = FileJournal::open(dir.path()).unwrap();
            journal.inner.lock().compact().unwrap();
            assert!(std::fs::metadata(dir.path().join("journal")).unwrap().len() < length);
            journal.note(5, &pods(), &pod("d", "1"), false).unwrap();
        }
        let (_, held) = FileJournal::open(dir.path()).unwrap();
        assert_eq!(held.revision, 5);
        assert_eq!(held.objects.len(), 2);
    }

    #[test]
    fn a_full_file_compacts_itself() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = FileJournal::open(dir.path()).unwrap();
        journal.inner.lock().compact_above = 20_000;
        for revision in 1..60 {
            let object = pod("a", &"x".repeat(500));
            journal.note(revision, &pods(), &object, false).unwrap();
        }
        // Without it: 59 records of more than 500 bytes.
        assert!(journal.inner.lock().end < 25_000);
        drop(journal);
        let (_, held) = FileJournal::open(dir.path()).unwrap();
        assert_eq!((held.revision, held.objects.len()), (59, 1));
    }
}
