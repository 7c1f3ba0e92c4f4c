//! The programs a testnet is made of: found beside the running one, and built when they are
//! missing or stale, since `cargo run --bin krake-testnet` builds only itself.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::SystemTime;

use anyhow::{Context, bail};

use crate::progress::Progress;

const NODE: &str = "krake-node";
const CONTROL: &str = "krakectl";
const TESTNET: &str = "krake-testnet";
/// Its time is when cargo was last asked to build them.
const STAMP: &str = ".krake-testnet-asked";

/// Where the programs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    /// `krake-node`.
    pub node: PathBuf,
    /// `krakectl`.
    pub krakectl: PathBuf,
    /// `krake-testnet`, which also is the embedded Kubernetes.
    pub testnet: PathBuf,
}

impl Programs {
    fn in_directory(directory: &Path) -> Self {
        Self {
            node: directory.join(NODE),
            krakectl: directory.join(CONTROL),
            testnet: directory.join(TESTNET),
        }
    }

    fn missing(&self) -> Vec<&'static str> {
        [
            (NODE, &self.node),
            (CONTROL, &self.krakectl),
            (TESTNET, &self.testnet),
        ]
        .into_iter()
        .filter(|(_, path)| !path.is_file())
        .map(|(name, _)| name)
        .collect()
    }
}

/// Where cargo put the running program.
#[derive(Debug, PartialEq, Eq)]
struct Built {
    target: PathBuf,
    directory: PathBuf,
    profile: String,
}

/// `target/PROFILE/krake-testnet`, or `target/PROFILE/deps/TEST-hash` for a test.
fn built_by_cargo(executable: &Path) -> Option<Built> {
    let mut directory = executable.parent()?.to_owned();
    if directory.ends_with("deps") || directory.ends_with("examples") {
        directory.pop();
    }
    let target = directory.parent()?.to_owned();
    // cargo marks what it makes.
    if !directory.join(".cargo-lock").exists() && !target.join("CACHEDIR.TAG").exists() {
        return None;
    }
    let name = directory.file_name()?.to_str()?;
    let profile = if name == "debug" { "dev" } else { name }.to_owned();
    Some(Built {
        target,
        directory,
        profile,
    })
}

/// The workspace this program was built from, if it is still there.
fn workspace() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).ok()?;
    manifest.contains("[workspace]").then(|| root.to_owned())
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().ok()?.modified().ok()
}

/// Whether a program is newer than every file it was made from, which cargo lists beside it, or
/// cargo was asked after they changed and found nothing to do.
fn is_fresh(program: &Path, root: &Path, asked: Option<SystemTime>) -> bool {
    let Some(built) = modified(program).max(asked) else {
        return false;
    };
    let Ok(list) = std::fs::read_to_string(program.with_extension("d")) else {
        return false;
    };
    let Some((_, sources)) = list.split_once(": ") else {
        return false;
    };
    let manifests = [root.join("Cargo.toml"), root.join("Cargo.lock")];
    sources
        .replace("\\ ", "\u{0}")
        .split_ascii_whitespace()
        .map(|path| PathBuf::from(path.replace('\u{0}', " ")))
        .chain(manifests)
        .all(|path| modified(&path).is_some_and(|changed| changed <= built))
}

/// The programs that belong to the running one; built first where that is needed.
///
/// # Errors
/// When they are not there and cannot be built.
pub async fn ensure_programs(progress: &Progress) -> anyhow::Result<Programs> {
    let executable = std::env::current_exe().context("cannot tell where this program is")?;
    let own = executable.file_name().is_some_and(|name| name == TESTNET);
    let directory = executable.parent().context("this program is nowhere")?;
    let (Some(built), Some(root)) = (built_by_cargo(&executable), workspace()) else {
        let mut programs = Programs::in_directory(directory);
        if own {
            programs.testnet.clone_from(&executable);
        }
        let missing = programs.missing();
        if missing.is_empty() {
            return Ok(programs);
        }
        bail!(
            "{} must be beside {}: {} not there; install all three programs into one directory",
            "krake-node and krakectl",
            executable.display(),
            missing.join(", ")
        );
    };
    let programs = Programs::in_directory(&built.directory);
    let stamp = built.directory.join(STAMP);
    let mut wanted = vec![(NODE, &programs.node), (CONTROL, &programs.krakectl)];
    if !own {
        wanted.push((TESTNET, &programs.testnet));
    }
    let stale: Vec<&str> = wanted
        .iter()
        .filter(|(_, path)| !path.is_file() || !is_fresh(path, &root, modified(&stamp)))
        .map(|(name, _)| *name)
        .collect();
    if !stale.is_empty() {
        progress.line(&format!("building {} …", stale.join(", ")));
        let names: Vec<&str> = wanted.iter().map(|(name, _)| *name).collect();
        // What changes while cargo works is newer than this.
        let asked = SystemTime::now();
        build(&root, &built, &names).await?;
        let file = std::fs::File::create(&stamp)
            .with_context(|| format!("cannot write {}", stamp.display()))?;
        file.set_modified(asked)?;
    }
    let missing = programs.missing();
    if !missing.is_empty() {
        bail!("cargo did not make {}", missing.join(", "));
    }
    Ok(programs)
}

/// In the workspace's root and with the profile of the running program, so that cargo finds its
/// dependencies built already.
async fn build(root: &Path, built: &Built, names: &[&str]) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = tokio::process::Command::new(cargo);
    command
        .current_dir(root)
        .args(["build", "--profile", &built.profile, "--target-dir"])
        .arg(&built.target)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true);
    for name in names {
        command.args(["--bin", name]);
    }
    // cargo tells its child where the crate is that runs; a nested one must not be misled.
    for (name, _) in std::env::vars() {
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    let status = command
        .status()
        .await
        .context("cannot start cargo, which is needed to build krake-node and krakectl")?;
    if !status.success() {
        bail!(
            "cargo could not build {} ({status}); what it said is above",
            names.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_is_that_of_the_running_program() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target");
        std::fs::create_dir_all(target.join("release/deps")).unwrap();
        let program = target.join("release/krake-testnet");
        assert_eq!(built_by_cargo(&program), None);
        std::fs::write(target.join("CACHEDIR.TAG"), "").unwrap();
        let expected = Built {
            target: target.clone(),
            directory: target.join("release"),
            profile: "release".to_owned(),
        };
        assert_eq!(built_by_cargo(&program), Some(expected));
        let test = built_by_cargo(&target.join("debug/deps/up-0123")).unwrap();
        assert_eq!(
            (test.profile.as_str(), test.directory),
            ("dev", target.join("debug"))
        );
    }

    #[test]
    fn a_program_older_than_its_sources_is_stale() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let old = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000);
        let touch = |name: &str, time: SystemTime| {
            let file = std::fs::File::create(at(name)).unwrap();
            file.set_modified(time).unwrap();
        };
        for name in ["Cargo.toml", "Cargo.lock", "with blank.rs"] {
            touch(name, old);
        }
        touch("krake-node", old + std::time::Duration::from_secs(1));
        let list = format!(
            "{}: {}/with\\ blank.rs\n",
            at("krake-node").display(),
            dir.path().display()
        );
        std::fs::write(at("krake-node.d"), list).unwrap();
        let fresh = |asked| is_fresh(&at("krake-node"), dir.path(), asked);
        assert!(fresh(None));
        touch("with blank.rs", old + std::time::Duration::from_secs(2));
        assert!(!fresh(None));
        assert!(fresh(Some(old + std::time::Duration::from_secs(3))));
        assert!(!is_fresh(&at("krakectl"), dir.path(), None));
    }

    #[test]
    fn this_test_knows_its_workspace() {
        assert!(workspace().is_some());
    }
}
