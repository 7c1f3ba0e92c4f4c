//! The site's own book: the assignments it runs, and the highest epoch it has seen of each app.
//!
//! On disk (redb, one durable transaction per change), so that a site that is cut off or restarted
//! goes on without the federation (I6) and never obeys an older owner (I3).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use krake_model::application::Assignment;
use krake_model::{AppKey, AppUid, Epoch};
use parking_lot::Mutex;
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition};
use thiserror::Error;

/// UID → JSON of [`Assignment`]. An entry with `delete` stays: it is the fence.
const ASSIGNMENTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("assignments.v1");
/// The ledger is small; the rest of the node's memory has better uses.
const CACHE_BYTES: usize = 1024 * 1024;
/// Settled deletions kept as fences; the oldest epochs go first beyond this.
const SETTLED_MAX: usize = 10_000;

/// The ledger cannot be used.
#[derive(Debug, Error)]
pub enum LedgerError {
    /// The database says no.
    #[error(
        "the site's ledger {path} cannot be used; restore it from a backup or remove it (the node then fetches its assignments again)"
    )]
    Store {
        /// The file.
        path: String,
        /// Why.
        source: Box<redb::Error>,
    },
    /// Its pages make no sense.
    #[error(
        "the site's ledger {path} is damaged; restore it from a backup or remove it (the node then fetches its assignments again)"
    )]
    Damage {
        /// The file.
        path: String,
    },
    /// A record is damaged.
    #[error("the site's ledger has a damaged record for {uid}")]
    Damaged {
        /// Whose.
        uid: String,
        /// How.
        source: serde_json::Error,
    },
}

/// What came of offering an assignment to the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    /// Newer than everything seen: it is durable now.
    Accepted,
    /// Exactly what is known already.
    Known,
    /// Older than what has been seen: refused, with the epoch that counts.
    Stale(Epoch),
}

/// The entries, found by what is asked for.
#[derive(Debug, Default)]
struct Book {
    entries: BTreeMap<AppUid, Assignment>,
    names: BTreeMap<AppKey, BTreeSet<AppUid>>,
    /// Deletions, the oldest epoch first.
    settled: BTreeSet<(Epoch, AppUid)>,
}

impl Book {
    fn insert(&mut self, assignment: Assignment) {
        self.remove(assignment.uid);
        let uid = assignment.uid;
        let names = self.names.entry(assignment.app.clone()).or_default();
        names.insert(uid);
        if assignment.delete {
            self.settled.insert((assignment.epoch, uid));
        }
        self.entries.insert(uid, assignment);
    }

    fn remove(&mut self, uid: AppUid) {
        let Some(old) = self.entries.remove(&uid) else {
            return;
        };
        self.settled.remove(&(old.epoch, uid));
        if let Some(names) = self.names.get_mut(&old.app) {
            names.remove(&uid);
            if names.is_empty() {
                self.names.remove(&old.app);
            }
        }
    }

    /// What is assigned here of the apps that go or went by this name.
    fn of(&self, app: &AppKey) -> impl Iterator<Item = &Assignment> {
        let uids = self.names.get(app).into_iter().flatten();
        let entries = uids.filter_map(|uid| self.entries.get(uid));
        entries.filter(|assignment| !assignment.delete)
    }
}

/// The open ledger.
#[derive(Debug)]
pub struct Ledger {
    database: Database,
    path: String,
    book: Mutex<Book>,
}

impl Ledger {
    /// Opens or creates the file and reads it whole.
    ///
    /// # Errors
    /// When it is damaged or cannot be opened.
    pub fn open(path: &Path) -> Result<Self, LedgerError> {
        // The library panics on pages that make no sense.
        std::panic::catch_unwind(|| Self::try_open(path)).unwrap_or_else(|_| {
            Err(LedgerError::Damage {
                path: path.display().to_string(),
            })
        })
    }

    fn try_open(path: &Path) -> Result<Self, LedgerError> {
        let store = |source: redb::Error| LedgerError::Store {
            path: path.display().to_string(),
            source: Box::new(source),
        };
        let database = Database::builder()
            .set_cache_size(CACHE_BYTES)
            .create(path)
            .map_err(|e| store(e.into()))?;
        let book = Self::load(&database).map_err(|e| match e {
            LoadError::Store(e) => store(*e),
            LoadError::Damaged { uid, source } => LedgerError::Damaged { uid, source },
        })?;
        Ok(Self {
            database,
            path: path.display().to_string(),
            book: Mutex::new(book),
        })
    }

    fn load(database: &Database) -> Result<Book, LoadError> {
        let transaction = database.begin_write().map_err(boxed)?;
        transaction.open_table(ASSIGNMENTS).map_err(boxed)?;
        transaction.commit().map_err(boxed)?;
        let table = database
            .begin_read()
            .map_err(boxed)?
            .open_table(ASSIGNMENTS)
            .map_err(boxed)?;
        let mut book = Book::default();
        for row in table.iter().map_err(boxed)? {
            let (key, value) = row.map_err(boxed)?;
            let assignment: Assignment =
                serde_json::from_slice(value.value()).map_err(|source| LoadError::Damaged {
                    uid: key.value().to_owned(),
                    source,
                })?;
            book.insert(assignment);
        }
        Ok(book)
    }

    /// Takes an assignment if it is newer than what has been seen of its app; durable on return.
    ///
    /// # Errors
    /// When it cannot be written: nothing has changed then.
    pub fn offer(&self, assignment: &Assignment) -> Result<Offer, LedgerError> {
        let mut book = self.book.lock();
        if let Some(known) = book.entries.get(&assignment.uid) {
            if known.epoch > assignment.epoch {
                return Ok(Offer::Stale(known.epoch));
            }
            if known.epoch == assignment.epoch && known.delete == assignment.delete {
                return Ok(Offer::Known);
            }
        }
        self.store(assignment)?;
        book.insert(assignment.clone());
        if book.settled.len() > SETTLED_MAX
            && let Some((_, oldest)) = book.settled.first().copied()
        {
            self.remove(&oldest)?;
            book.remove(oldest);
        }
        Ok(Offer::Accepted)
    }

    fn store(&self, assignment: &Assignment) -> Result<(), LedgerError> {
        let bytes = crate::records::write(assignment);
        self.write(|table| {
            table
                .insert(assignment.uid.to_string().as_str(), bytes.as_ref())
                .map(|_| ())
        })
    }

    fn remove(&self, uid: &AppUid) -> Result<(), LedgerError> {
        self.write(|table| table.remove(uid.to_string().as_str()).map(|_| ()))
    }

    fn write(
        &self,
        change: impl FnOnce(&mut redb::Table<'_, &str, &[u8]>) -> Result<(), redb::StorageError>,
    ) -> Result<(), LedgerError> {
        let run = || -> Result<(), LoadError> {
            let mut transaction = self.database.begin_write().map_err(boxed)?;
            transaction
                .set_durability(Durability::Immediate)
                .map_err(boxed)?;
            change(&mut transaction.open_table(ASSIGNMENTS).map_err(boxed)?).map_err(boxed)?;
            transaction.commit().map_err(boxed)
        };
        run().map_err(|error| match error {
            LoadError::Store(source) => LedgerError::Store {
                path: self.path.clone(),
                source,
            },
            LoadError::Damaged { uid, source } => LedgerError::Damaged { uid, source },
        })
    }

    /// What the site knows of an app.
    pub fn get(&self, uid: &AppUid) -> Option<Assignment> {
        self.book.lock().entries.get(uid).cloned()
    }

    /// What is assigned here of the apps that go or went by this name.
    pub fn of(&self, app: &AppKey) -> Vec<Assignment> {
        self.book.lock().of(app).cloned().collect()
    }

    /// Their identities.
    pub fn uids_of(&self, app: &AppKey) -> BTreeSet<AppUid> {
        let book = self.book.lock();
        book.of(app).map(|assignment| assignment.uid).collect()
    }

    /// The names of all apps that are assigned here.
    pub fn apps(&self) -> Vec<AppKey> {
        let book = self.book.lock();
        let assigned = book.entries.values().filter(|a| !a.delete);
        assigned.map(|assignment| assignment.app.clone()).collect()
    }
}

enum LoadError {
    Store(Box<redb::Error>),
    Damaged {
        uid: String,
        source: serde_json::Error,
    },
}

fn boxed<E: Into<redb::Error>>(error: E) -> LoadError {
    LoadError::Store(Box::new(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assignment(index: u64, delete: bool) -> Assignment {
        assignment_of(1, "shop", index, delete)
    }

    fn assignment_of(uid: u128, name: &str, index: u64, delete: bool) -> Assignment {
        Assignment {
            uid: AppUid::new(uuid::Uuid::from_u128(uid)),
            app: AppKey::new("default", name),
            backend: "default".to_owned(),
            epoch: Epoch {
                incarnation: 0,
                term: 1,
                index,
            },
            delete,
            generation: 1,
            manifests: vec![serde_json::json!({"kind": "ConfigMap"})],
        }
    }

    #[test]
    fn an_older_epoch_is_refused_before_and_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("site.redb");
        let ledger = Ledger::open(&path).unwrap();
        assert_eq!(
            ledger.offer(&assignment(5, false)).unwrap(),
            Offer::Accepted
        );
        assert_eq!(ledger.offer(&assignment(5, false)).unwrap(), Offer::Known);
        assert_eq!(ledger.offer(&assignment(9, true)).unwrap(), Offer::Accepted);
        drop(ledger);
        let ledger = Ledger::open(&path).unwrap();
        let newest = Epoch {
            incarnation: 0,
            term: 1,
            index: 9,
        };
        assert_eq!(
            ledger.offer(&assignment(7, false)).unwrap(),
            Offer::Stale(newest)
        );
        assert!(ledger.get(&assignment(0, true).uid).unwrap().delete);
    }

    #[test]
    fn what_goes_by_a_name_is_found_whatever_came_and_went() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("site.redb");
        let ledger = Ledger::open(&path).unwrap();
        for (uid, name, index, delete) in [
            (1, "shop", 1, false),
            (2, "shop", 2, false),
            (3, "blog", 3, false),
            (1, "shop", 4, true),
            (3, "blog", 5, false),
        ] {
            let offered = ledger.offer(&assignment_of(uid, name, index, delete));
            assert_eq!(offered.unwrap(), Offer::Accepted);
        }
        let check = |ledger: &Ledger| {
            let shop = AppKey::new("default", "shop");
            assert_eq!(ledger.of(&shop), [assignment_of(2, "shop", 2, false)]);
            let uids: Vec<AppUid> = ledger.uids_of(&shop).into_iter().collect();
            assert_eq!(uids, [assignment_of(2, "", 0, false).uid]);
            assert_eq!(ledger.apps(), [shop, AppKey::new("default", "blog")]);
            let settled = assignment_of(1, "shop", 4, true);
            let book = ledger.book.lock();
            assert!(book.settled.iter().eq([&(settled.epoch, settled.uid)]));
        };
        check(&ledger);
        drop(ledger);
        check(&Ledger::open(&path).unwrap());
    }
}
