//! Contexts: which federation `krakectl` talks to when no flag says so.
//!
//! One TOML file, by default `$XDG_CONFIG_HOME/krake/krakectl.toml`:
//!
//! ```toml
//! current_context = "testnet"
//!
//! [contexts.testnet]
//! servers = ["http://127.0.0.1:7443", "unix:///run/krake/api.sock"]
//! token_file = "admin.token"      # relative to this file
//! namespace = "default"
//! ```
//!
//! It never holds a secret itself, only the path of a file that does.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A context file has at most this many bytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ContextFile {
    /// The context that is used when none is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current_context: Option<String>,
    /// All contexts by name.
    pub contexts: BTreeMap<String, Context>,
}

/// How to reach one federation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// Nodes to try, in order: `http://HOST:PORT` or `unix:///PATH`.
    pub servers: Vec<String>,
    /// A file with the token; relative to the context file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// The namespace when none is named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
}

/// A context file cannot be used.
#[derive(Debug, Error)]
pub enum ContextError {
    /// It cannot be read.
    #[error("cannot read the context file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is unreasonably large.
    #[error("the context file {} has more than {FILE_BYTES_MAX} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// It is not what it should be.
    #[error("the context file {} is not valid", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// It cannot be written.
    #[error("cannot write the context file {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is no such context.
    #[error("there is no context `{name}` in {}", path.display())]
    Unknown {
        /// What was asked for.
        name: String,
        /// The file.
        path: PathBuf,
        /// What there is instead.
        known: Vec<String>,
    },
    /// There is no place for the file.
    #[error("no home directory is known, so there is no default context file")]
    NoHome,
}

impl ContextFile {
    /// Where the file is when nobody says otherwise.
    ///
    /// # Errors
    /// When there is neither `XDG_CONFIG_HOME` nor a home directory.
    pub fn default_path() -> Result<PathBuf, ContextError> {
        use etcetera::BaseStrategy;
        let base = etcetera::base_strategy::Xdg::new().map_err(|_| ContextError::NoHome)?;
        Ok(base.config_dir().join("krake").join("krakectl.toml"))
    }

    /// Reads the file; one that is not there is an empty one.
    ///
    /// # Errors
    /// When it is there and cannot be used.
    pub fn load(path: &Path) -> Result<Self, ContextError> {
        let read = |source| ContextError::Read {
            path: path.to_owned(),
            source,
        };
        let size = match std::fs::metadata(path) {
            Ok(metadata) => metadata.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(error) => return Err(read(error)),
        };
        if size > FILE_BYTES_MAX {
            return Err(ContextError::TooLarge {
                path: path.to_owned(),
            });
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        toml::from_str(&text).map_err(|source| ContextError::Parse {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }

    /// Writes the file with mode 0600; whoever reads it sees the old one or the new one, whole.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), ContextError> {
        let write = |source| ContextError::Write {
            path: path.to_owned(),
            source,
        };
        let text = toml::to_string(self).map_err(|error| write(std::io::Error::other(error)))?;
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(directory).map_err(write)?;
        // A temporary file has mode 0600 from the start, so nobody can look in between.
        let mut file = tempfile::NamedTempFile::new_in(directory).map_err(write)?;
        file.write_all(text.as_bytes()).map_err(write)?;
        file.as_file().sync_all().map_err(write)?;
        file.persist(path).map_err(|error| write(error.error))?;
        Ok(())
    }

    /// The context `name`, or the current one; `None` when neither is set.
    ///
    /// # Errors
    /// When there is no such context in the file (which is at `path`).
    pub fn select(
        &self,
        name: Option<&str>,
        path: &Path,
    ) -> Result<Option<(&str, &Context)>, ContextError> {
        let Some(name) = name.or(self.current_context.as_deref()) else {
            return Ok(None);
        };
        match self.contexts.get_key_value(name) {
            Some((name, context)) => Ok(Some((name, context))),
            None => Err(ContextError::Unknown {
                name: name.to_owned(),
                path: path.to_owned(),
                known: self.contexts.keys().cloned().collect(),
            }),
        }
    }
}

impl Context {
    /// The token file as a path that can be opened; `file` is where the context was read from.
    pub fn token_path(&self, file: &Path) -> Option<PathBuf> {
        let token = self.token_file.as_ref()?;
        Some(
            file.parent()
                .map_or_else(|| token.clone(), |parent| parent.join(token)),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn example() -> ContextFile {
        ContextFile {
            current_context: Some("testnet".to_owned()),
            contexts: BTreeMap::from([(
                "testnet".to_owned(),
                Context {
                    servers: vec!["http://127.0.0.1:7443".to_owned()],
                    token_file: Some("admin.token".into()),
                    namespace: None,
                },
            )]),
        }
    }

    #[test]
    fn what_is_saved_is_loaded_and_private() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep").join("krakectl.toml");
        example().save(&path).unwrap();
        assert_eq!(ContextFile::load(&path).unwrap(), example());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_missing_file_is_empty_and_a_broken_one_names_the_place() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("krakectl.toml");
        assert_eq!(ContextFile::load(&path).unwrap(), ContextFile::default());
        std::fs::write(&path, "curent_context = 'a'\n").unwrap();
        let error = ContextFile::load(&path).unwrap_err();
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("curent_context"), "{source}");
    }

    #[test]
    fn a_token_file_is_relative_to_the_context_file() {
        let file = example();
        let context = &file.contexts["testnet"];
        let path = context.token_path(Path::new("/somewhere/krakectl.toml"));
        assert_eq!(path, Some("/somewhere/admin.token".into()));
    }

    #[test]
    fn an_unknown_context_lists_the_known_ones() {
        let error = example()
            .select(Some("prod"), Path::new("f.toml"))
            .unwrap_err();
        assert!(
            matches!(&error, ContextError::Unknown { known, .. } if known == &["testnet"]),
            "{error:?}"
        );
        let file = example();
        let (name, _) = file.select(None, Path::new("f.toml")).unwrap().unwrap();
        assert_eq!(name, "testnet");
    }
}
