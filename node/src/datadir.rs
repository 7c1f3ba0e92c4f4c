//! The data directory: lock, identity, membership, boot counter.
//!
//! Files: `LOCK` (held while a process uses it), `VERSION` (format), `node.key` (Ed25519 seed,
//! mode 0600), `membership` (genesis, own replica id, members last known), `boot` (counter),
//! `admin.token` (founder only, mode 0600), `left` (when the node left its federation). The catalog and
//! the site's ledger live beside them.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ed25519_dalek::{Signer, SigningKey};
use krake_model::codec::{self, CodecError};
use krake_model::{FederationId, Genesis, Member, NodeId, Timestamp};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use zeroize::Zeroizing;

const FORMAT: &str = "1";
/// What makes a node a member: of no use any more when it left.
const MEMBERS_FILES: [&str; 3] = ["membership", "node.key", "catalog"];
const MEMBERSHIP_VERSION: u8 = 1;
const MEMBERSHIP_BYTES_MAX: usize = 4 * 1024 * 1024;

/// The data directory cannot be used.
#[derive(Debug, Error)]
pub enum DataDirError {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Something else is at its path.
    #[error("{} is not a directory; give the node a directory of its own (node.data_dir)", path.display())]
    NotDirectory {
        /// The path.
        path: PathBuf,
    },
    /// The key and the membership are not of the same node.
    #[error("{} has the key of a node that the membership beside it does not name: files of two data directories were mixed; restore it whole from a backup", path.display())]
    Mixed {
        /// The directory.
        path: PathBuf,
    },
    /// The node joined under another name.
    #[error("site.name is `{configured}`, but the node of the data directory {} joined as `{joined}` and a name cannot be changed; set site.name to `{joined}`, or give another node.data_dir", path.display())]
    OtherSite {
        /// The directory.
        path: PathBuf,
        /// The name in the configuration.
        configured: String,
        /// The name in the membership.
        joined: String,
    },
    /// Another process holds the lock.
    #[error("the data directory {} is in use by another krake-node; stop it first or give this one another node.data_dir", path.display())]
    Locked {
        /// The directory.
        path: PathBuf,
    },
    /// Written by a newer program.
    #[error("the data directory {} has format {found}, this program knows {FORMAT}; use the krake-node that wrote it or a newer one", path.display())]
    Format {
        /// The directory.
        path: PathBuf,
        /// The format found.
        found: String,
    },
    /// It already belongs to a federation.
    #[error("the data directory {} already belongs to federation `{name}` ({id}); to join another one, give another node.data_dir", path.display())]
    AlreadyMember {
        /// The directory.
        path: PathBuf,
        /// The federation's name.
        name: String,
        /// Its id.
        id: FederationId,
    },
    /// It belongs to none yet.
    #[error("the data directory {} belongs to no federation yet; found one with `krake-node init`, or join one with `krake-node join TOKEN` (a token comes from `krakectl token create` on a member)", path.display())]
    NotMember {
        /// The directory.
        path: PathBuf,
    },
    /// The node left the federation it belonged to.
    #[error("the node of the data directory {} left its federation at {left_at}; join one with `krake-node join TOKEN` (a token comes from `krakectl token create` on a member)", path.display())]
    Left {
        /// The directory.
        path: PathBuf,
        /// When.
        left_at: Timestamp,
    },
    /// A file is damaged.
    #[error("{} is damaged; restore it from a backup or remove the data directory and join again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// How.
        source: Option<CodecError>,
    },
}

/// What the node remembers of its federation between runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Membership {
    /// The encoded genesis record.
    pub genesis: Vec<u8>,
    /// This node's Raft replica id.
    pub replica: u64,
    /// The members last known, this node included.
    pub members: Vec<Member>,
}

/// An open, locked data directory.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: Flock<File>,
}

fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> DataDirError {
    let path = path.to_owned();
    move |source| DataDirError::Io {
        action,
        path,
        source,
    }
}

impl DataDir {
    /// Creates it where it is missing (mode 0700), locks it and checks its format.
    ///
    /// # Errors
    /// When it is in use, of another format, or not accessible.
    pub fn open(path: &Path) -> Result<Self, DataDirError> {
        if path.exists() && !path.is_dir() {
            return Err(DataDirError::NotDirectory {
                path: path.to_owned(),
            });
        }
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(io("create", path))?;
        let lock_path = path.join("LOCK");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(io("open", &lock_path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
            if errno == nix::errno::Errno::EWOULDBLOCK {
                DataDirError::Locked {
                    path: path.to_owned(),
                }
            } else {
                DataDirError::Io {
                    action: "lock",
                    path: lock_path,
                    source: errno.into(),
                }
            }
        })?;
        let directory = Self {
            path: path.to_owned(),
            _lock: lock,
        };
        directory.check_format()?;
        if let Some(left_at) = Self::left_at(path)? {
            directory.move_aside(left_at)?;
        }
        Ok(directory)
    }

    /// When the node of this directory left its federation, if that was the last thing it did; also
    /// while another process has the directory.
    ///
    /// # Errors
    /// When the note of it is damaged or cannot be read.
    pub fn left_at(path: &Path) -> Result<Option<Timestamp>, DataDirError> {
        let path = path.join("left");
        let bytes = match std::fs::read(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            read => read.map_err(io("read", &path))?,
        };
        let text = String::from_utf8_lossy(&bytes);
        match text.trim().parse() {
            Ok(millis) => Ok(Some(Timestamp::from_millis(millis))),
            Err(_) => Err(DataDirError::Damaged { path, source: None }),
        }
    }

    /// Notes that the node left its federation, and puts its key, its membership and its catalog into
    /// a directory of their own, which is returned: it never starts as that member again. What it
    /// knows of its site's copies stays.
    ///
    /// # Errors
    /// When a file cannot be written or moved; the next [`DataDir::open`] goes on.
    pub fn put_membership_aside(&self, left_at: Timestamp) -> Result<PathBuf, DataDirError> {
        self.write("left", left_at.as_millis().to_string().as_bytes())?;
        self.move_aside(left_at)
    }

    fn move_aside(&self, left_at: Timestamp) -> Result<PathBuf, DataDirError> {
        let aside = self.path.join(format!("left-{}", left_at.as_millis()));
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&aside)
            .map_err(io("create", &aside))?;
        for name in MEMBERS_FILES {
            let from = self.path.join(name);
            if from.exists() {
                self.rename(&from, &aside.join(name))?;
            }
        }
        Ok(aside)
    }

    /// The directory is to serve for another membership.
    ///
    /// # Errors
    /// When the note of the last one cannot be removed.
    pub fn forget_departure(&self) -> Result<(), DataDirError> {
        let path = self.path.join("left");
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(io("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// As [`DataDir::open`], where it must exist: a mistyped path is not made.
    ///
    /// # Errors
    /// As `open`, and [`DataDirError::NotMember`] where there is none.
    pub fn open_existing(path: &Path) -> Result<Self, DataDirError> {
        if path.join("membership").exists() || path.join("LOCK").exists() {
            Self::open(path)
        } else {
            Err(DataDirError::NotMember {
                path: path.to_owned(),
            })
        }
    }

    fn check_format(&self) -> Result<(), DataDirError> {
        let path = self.path.join("VERSION");
        let Some(bytes) = self.read("VERSION")? else {
            return self.write("VERSION", FORMAT.as_bytes());
        };
        let found = String::from_utf8_lossy(&bytes);
        let found = found.trim();
        if found == FORMAT {
            Ok(())
        } else if found.parse::<u32>().is_ok() {
            Err(DataDirError::Format {
                path: self.path.clone(),
                found: found.to_owned(),
            })
        } else {
            Err(DataDirError::Damaged { path, source: None })
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file of mode 0600 whole or not at all, and makes it durable.
    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), DataDirError> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!("{name}.new"));
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&temporary)
            .map_err(io("create", &temporary))?;
        file.write_all(bytes).map_err(io("write", &temporary))?;
        file.sync_all().map_err(io("sync", &temporary))?;
        self.rename(&temporary, &path)
    }

    /// Renames something in it durably.
    ///
    /// # Errors
    /// When it cannot be renamed, or that is not certain to last.
    pub fn rename(&self, from: &Path, to: &Path) -> Result<(), DataDirError> {
        std::fs::rename(from, to).map_err(io("rename", from))?;
        File::open(&self.path)
            .and_then(|d| d.sync_all())
            .map_err(io("sync", &self.path))
    }

    fn read(&self, name: &str) -> Result<Option<Vec<u8>>, DataDirError> {
        let path = self.path.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(Some(bytes)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io("read", &path)(error)),
        }
    }

    /// The node's key; made from `entropy` when there is none yet.
    ///
    /// # Errors
    /// When the file is unreadable or damaged.
    pub fn identity(&self, entropy: impl FnOnce() -> [u8; 32]) -> Result<Identity, DataDirError> {
        let seed = match self.read("node.key")?.map(Zeroizing::new) {
            Some(bytes) => {
                Zeroizing::new(<[u8; 32]>::try_from(bytes.as_slice()).map_err(|_| {
                    DataDirError::Damaged {
                        path: self.path.join("node.key"),
                        source: None,
                    }
                })?)
            }
            None => {
                let seed = Zeroizing::new(entropy());
                self.write("node.key", seed.as_slice())?;
                seed
            }
        };
        Ok(Identity {
            key: SigningKey::from_bytes(&seed),
        })
    }

    /// The federation it belongs to; `None` before `init` or `join`.
    ///
    /// # Errors
    /// When the file is unreadable or damaged.
    pub fn membership(&self) -> Result<Option<(Membership, Genesis)>, DataDirError> {
        let Some(bytes) = self.read("membership")? else {
            return Ok(None);
        };
        let damaged = |source| DataDirError::Damaged {
            path: self.path.join("membership"),
            source: Some(source),
        };
        let membership: Membership =
            codec::decode(MEMBERSHIP_VERSION, &bytes, MEMBERSHIP_BYTES_MAX).map_err(damaged)?;
        let genesis = Genesis::decode(&membership.genesis).map_err(damaged)?;
        Ok(Some((membership, genesis)))
    }

    /// As [`DataDir::membership`], where one must exist.
    ///
    /// # Errors
    /// [`DataDirError::NotMember`] when there is none.
    pub fn require_membership(&self) -> Result<(Membership, Genesis), DataDirError> {
        if let Some(membership) = self.membership()? {
            return Ok(membership);
        }
        let path = self.path.clone();
        Err(match Self::left_at(&path)? {
            Some(left_at) => DataDirError::Left { path, left_at },
            None => DataDirError::NotMember { path },
        })
    }

    /// Checks that key, membership and configuration are of the same node.
    ///
    /// # Errors
    /// [`DataDirError::Mixed`] and [`DataDirError::OtherSite`].
    pub fn check_own(
        &self,
        membership: &Membership,
        own: NodeId,
        site: &str,
    ) -> Result<(), DataDirError> {
        let path = self.path.clone();
        match membership.members.iter().find(|member| member.node == own) {
            None => Err(DataDirError::Mixed { path }),
            Some(member) if member.site.name != site => Err(DataDirError::OtherSite {
                path,
                configured: site.to_owned(),
                joined: member.site.name.clone(),
            }),
            Some(_) => Ok(()),
        }
    }

    /// Fails when it already belongs to a federation.
    ///
    /// # Errors
    /// [`DataDirError::AlreadyMember`].
    pub fn require_fresh(&self) -> Result<(), DataDirError> {
        let Some((_, genesis)) = self.membership()? else {
            return Ok(());
        };
        let id = genesis
            .federation_id()
            .map_err(|source| DataDirError::Damaged {
                path: self.path.join("membership"),
                source: Some(source),
            })?;
        Err(DataDirError::AlreadyMember {
            path: self.path.clone(),
            name: genesis.name,
            id,
        })
    }

    /// Remembers the federation.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store_membership(&self, membership: &Membership) -> Result<(), DataDirError> {
        let bytes = codec::encode(MEMBERSHIP_VERSION, membership).map_err(|source| {
            DataDirError::Damaged {
                path: self.path.join("membership"),
                source: Some(source),
            }
        })?;
        self.write("membership", &bytes)
    }

    /// Raises and returns the boot counter (DESIGN 13.10).
    ///
    /// # Errors
    /// When it cannot be read or written.
    pub fn next_boot(&self) -> Result<u64, DataDirError> {
        let last = match self.read("boot")? {
            None => 0,
            Some(bytes) => String::from_utf8_lossy(&bytes)
                .trim()
                .parse()
                .map_err(|_| DataDirError::Damaged {
                    path: self.path.join("boot"),
                    source: None,
                })?,
        };
        let boot: u64 = last + 1;
        self.write("boot", boot.to_string().as_bytes())?;
        Ok(boot)
    }

    /// Stores the founder's admin token, mode 0600.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store_admin_token(&self, token: &str) -> Result<PathBuf, DataDirError> {
        self.write("admin.token", format!("{token}\n").as_bytes())?;
        Ok(self.path.join("admin.token"))
    }
}

/// The node's signing key.
pub struct Identity {
    key: SigningKey,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.node())
    }
}

impl Identity {
    /// The public side.
    pub fn node(&self) -> NodeId {
        NodeId::from_bytes(self.key.verifying_key().to_bytes())
    }

    /// Ed25519 (RFC 8032).
    pub fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.key.sign(message).to_bytes()
    }

    /// The secret seed, for libp2p's key pair.
    pub fn seed(&self) -> Zeroizing<[u8; 32]> {
        Zeroizing::new(self.key.to_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_serves_one_process_and_keeps_its_identity() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let first = DataDir::open(&path).unwrap();
        assert!(matches!(
            DataDir::open(&path),
            Err(DataDirError::Locked { .. })
        ));
        let id = first.identity(|| [7; 32]).unwrap().node();
        assert_eq!(
            (first.next_boot().unwrap(), first.next_boot().unwrap()),
            (1, 2)
        );
        drop(first);
        let again = DataDir::open(&path).unwrap();
        assert_eq!(again.identity(|| [8; 32]).unwrap().node(), id);
        assert_eq!(again.next_boot().unwrap(), 3);
    }

    #[test]
    fn who_left_is_no_member_any_more_even_if_it_stopped_while_it_put_its_files_aside() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let old = data.identity(|| [7; 32]).unwrap().node();
        std::fs::create_dir(dir.path().join("catalog")).unwrap();
        std::fs::write(dir.path().join("site.redb"), b"copies").unwrap();
        let aside = data
            .put_membership_aside(Timestamp::from_millis(1_700_000_000_000))
            .unwrap();
        // One that did not get its last file away.
        std::fs::rename(aside.join("node.key"), dir.path().join("node.key")).unwrap();
        drop(data);
        let data = DataDir::open_existing(dir.path()).unwrap();
        let error = data.require_membership().unwrap_err();
        assert!(matches!(error, DataDirError::Left { .. }), "{error}");
        assert!(error.to_string().contains("krake-node join"), "{error}");
        assert!(aside.join("node.key").exists() && aside.join("catalog").exists());
        assert!(dir.path().join("site.redb").exists());
        data.require_fresh().unwrap();
        data.forget_departure().unwrap();
        assert_ne!(data.identity(|| [8; 32]).unwrap().node(), old);
        drop(data);
        let data = DataDir::open(dir.path()).unwrap();
        assert_ne!(data.identity(|| [9; 32]).unwrap().node(), old);
        assert!(matches!(
            data.require_membership(),
            Err(DataDirError::NotMember { .. })
        ));
    }

    #[test]
    fn damage_and_other_formats_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        assert!(matches!(
            data.require_membership(),
            Err(DataDirError::NotMember { .. })
        ));
        std::fs::write(dir.path().join("membership"), b"garbage").unwrap();
        assert!(matches!(
            data.membership(),
            Err(DataDirError::Damaged { .. })
        ));
        drop(data);
        std::fs::write(dir.path().join("VERSION"), b"99").unwrap();
        assert!(matches!(
            DataDir::open(dir.path()),
            Err(DataDirError::Format { .. })
        ));
        for damaged in [&b""[..], b"\xff\xfe"] {
            std::fs::write(dir.path().join("VERSION"), damaged).unwrap();
            assert!(matches!(
                DataDir::open(dir.path()),
                Err(DataDirError::Damaged { .. })
            ));
        }
    }

    #[test]
    fn a_mistyped_path_is_not_made_and_a_file_is_no_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("typo");
        assert!(matches!(
            DataDir::open_existing(&path),
            Err(DataDirError::NotMember { .. })
        ));
        assert!(!path.exists());
        std::fs::write(&path, b"a file").unwrap();
        assert!(matches!(
            DataDir::open(&path),
            Err(DataDirError::NotDirectory { .. })
        ));
    }
}
