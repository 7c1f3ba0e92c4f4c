//! The programs of a Kubernetes control plane: found, or built through the Go module proxy.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::ports::cache_directory;
use crate::progress::Progress;

/// The Kubernetes that is built.
pub const VERSION: &str = "1.35.4";

/// A pinned Go module and the programs that it builds.
#[derive(Debug)]
pub struct Module {
    /// Its directory below `testnet/kube`.
    pub name: &'static str,
    go_mod: &'static str,
    go_sum: &'static str,
    linker_flags: &'static str,
    /// Program name and Go package.
    pub programs: &'static [(&'static str, &'static str)],
}

/// Everything a site needs, and kubectl. They are apart from each other because their
/// dependencies need different versions of the same modules.
pub const MODULES: &[Module] = &[
    Module {
        name: "etcd",
        go_mod: include_str!("../../kube/etcd/go.mod"),
        go_sum: include_str!("../../kube/etcd/go.sum"),
        linker_flags: "-s -w",
        programs: &[("etcd", "go.etcd.io/etcd/server/v3")],
    },
    Module {
        name: "kwok",
        go_mod: include_str!("../../kube/kwok/go.mod"),
        go_sum: include_str!("../../kube/kwok/go.sum"),
        linker_flags: "-s -w",
        programs: &[("kwok", "sigs.k8s.io/kwok/cmd/kwok")],
    },
    Module {
        name: "kubernetes",
        go_mod: include_str!("../../kube/kubernetes/go.mod"),
        go_sum: include_str!("../../kube/kubernetes/go.sum"),
        // Without a version, clients would see v0.0.0.
        linker_flags: "-s -w \
            -X k8s.io/component-base/version.gitVersion=v1.35.4 \
            -X k8s.io/component-base/version.gitMajor=1 \
            -X k8s.io/component-base/version.gitMinor=35",
        programs: &[
            ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            (
                "kube-controller-manager",
                "k8s.io/kubernetes/cmd/kube-controller-manager",
            ),
            ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
            ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
        ],
    },
];

/// Where the programs are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assets {
    /// etcd.
    pub etcd: PathBuf,
    /// The API server.
    pub kube_apiserver: PathBuf,
    /// The controller manager.
    pub kube_controller_manager: PathBuf,
    /// The scheduler.
    pub kube_scheduler: PathBuf,
    /// Simulated kubelets.
    pub kwok: PathBuf,
    /// A client of the same version.
    pub kubectl: PathBuf,
}

impl Assets {
    /// All with their names.
    pub fn all(&self) -> [(&'static str, &Path); 6] {
        [
            ("etcd", &self.etcd),
            ("kube-apiserver", &self.kube_apiserver),
            ("kube-controller-manager", &self.kube_controller_manager),
            ("kube-scheduler", &self.kube_scheduler),
            ("kwok", &self.kwok),
            ("kubectl", &self.kubectl),
        ]
    }
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata()
        .is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
}

/// The directory of programs built from the pinned modules: by version and hash of what is
/// pinned, so that clones share it and a change of a pin makes a new one.
fn built_directory(cache: &Path) -> PathBuf {
    let mut hash = blake3::Hasher::new();
    for module in MODULES {
        for text in [
            module.name,
            module.go_mod,
            module.go_sum,
            module.linker_flags,
        ] {
            hash.update(&(text.len() as u64).to_le_bytes());
            hash.update(text.as_bytes());
        }
    }
    let hash = hash.finalize().to_hex();
    cache
        .join("kube")
        .join(format!("{VERSION}-{}", &hash[..12]))
}

/// Where built programs are kept for this user.
///
/// # Errors
/// When there is no home directory.
pub fn directory() -> anyhow::Result<PathBuf> {
    Ok(built_directory(&cache_directory()?))
}

/// `KUBEBUILDER_ASSETS`, when it is set.
fn given_directory(value: Option<&str>) -> anyhow::Result<Option<PathBuf>> {
    match value {
        None | Some("") => Ok(None),
        Some(path) if Path::new(path).is_dir() => Ok(Some(PathBuf::from(path))),
        Some(path) => bail!(
            "KUBEBUILDER_ASSETS is {path}, which is no directory: unset it, or set it to a directory with etcd and kube-apiserver"
        ),
    }
}

/// Where each program is: in the first of the directories that has it.
fn locate(directories: &[&Path]) -> (Vec<(&'static str, PathBuf)>, Vec<&'static str>) {
    let mut found = Vec::new();
    let mut missing = Vec::new();
    for (name, _) in MODULES.iter().flat_map(|module| module.programs) {
        let place = directories
            .iter()
            .map(|directory| directory.join(name))
            .find(|path| is_program(path));
        match place {
            Some(path) => found.push((*name, path)),
            None => missing.push(*name),
        }
    }
    (found, missing)
}

/// Whether tests on real Kubernetes are to run; `false` only when `KRAKE_SKIP_REAL_KUBE=1`.
/// Who gets `false` says on its output that it leaves something out.
///
/// # Errors
/// When they are left out although `CI=true`.
pub fn wanted() -> anyhow::Result<bool> {
    let set = |name| std::env::var(name).unwrap_or_default();
    wanted_by(&set("KRAKE_SKIP_REAL_KUBE"), &set("CI"))
}

fn wanted_by(skip: &str, ci: &str) -> anyhow::Result<bool> {
    match (skip, ci) {
        ("" | "0", _) => Ok(true),
        ("1", "true") => bail!(
            "KRAKE_SKIP_REAL_KUBE=1 and CI=true: the tests on real Kubernetes cannot be left out in CI; unset one of both"
        ),
        ("1", _) => Ok(false),
        (other, _) => bail!(
            "KRAKE_SKIP_REAL_KUBE is `{other}`: write 1 to leave out the tests on real Kubernetes, or unset it"
        ),
    }
}

/// Finds the programs, and builds those that are missing: once a machine, about five minutes on
/// two cores. `KUBEBUILDER_ASSETS` wins for every program it has, as in envtest.
///
/// # Errors
/// When they must be built and cannot be; the text says what to do.
pub async fn assets(progress: &Progress) -> anyhow::Result<Assets> {
    let given = given_directory(std::env::var("KUBEBUILDER_ASSETS").ok().as_deref())?;
    let built = directory()?;
    let mut directories: Vec<&Path> = given.iter().map(PathBuf::as_path).collect();
    directories.push(&built);
    let (_, missing) = locate(&directories);
    if !missing.is_empty() {
        let (progress, place) = (progress.clone(), built.clone());
        tokio::task::spawn_blocking(move || build(&place, &missing, &progress)).await??;
    }
    let (found, missing) = locate(&directories);
    let path = |name: &str| -> anyhow::Result<PathBuf> {
        let program = found.iter().find(|(found, _)| *found == name);
        program.map(|(_, path)| path.clone()).with_context(|| {
            format!(
                "{} are still missing after they were built",
                missing.join(", ")
            )
        })
    };
    Ok(Assets {
        etcd: path("etcd")?,
        kube_apiserver: path("kube-apiserver")?,
        kube_controller_manager: path("kube-controller-manager")?,
        kube_scheduler: path("kube-scheduler")?,
        kwok: path("kwok")?,
        kubectl: path("kubectl")?,
    })
}

fn lock(directory: &Path, progress: &Progress) -> anyhow::Result<Flock<File>> {
    let path = directory.join("build.lock");
    let open = || {
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))
    };
    if let Ok(lock) = Flock::lock(open()?, FlockArg::LockExclusiveNonblock) {
        return Ok(lock);
    }
    progress.line("another process builds Kubernetes; waiting for it");
    Flock::lock(open()?, FlockArg::LockExclusive)
        .map_err(|(_, error)| anyhow::anyhow!("cannot lock {}: {error}", path.display()))
}

fn require_go(missing: &[&str]) -> anyhow::Result<()> {
    let version = std::process::Command::new("go")
        .arg("version")
        .stdin(Stdio::null())
        .output();
    match version {
        Ok(output) if output.status.success() => Ok(()),
        _ => bail!(
            "real Kubernetes is needed and not on this machine yet ({} missing). Building it takes Go 1.21 or newer and about five minutes, once: install Go (Debian: apt install golang-go; or https://go.dev/dl). Or set KUBEBUILDER_ASSETS to a directory that has the programs. To leave the tests on real Kubernetes out, set KRAKE_SKIP_REAL_KUBE=1; krake-testnet up works without it (--kube embedded)",
            missing.join(", ")
        ),
    }
}

fn build(directory: &Path, missing: &[&str], progress: &Progress) -> anyhow::Result<()> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let _lock = lock(directory, progress)?;
    let missing: Vec<&str> = missing
        .iter()
        .copied()
        .filter(|name| !is_program(&directory.join(name)))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    require_go(&missing)?;
    progress.line(&format!(
        "building Kubernetes {VERSION} for tests, once a machine: {} (about five minutes in all)",
        missing.join(", ")
    ));
    let work = tempfile::Builder::new()
        .prefix(".build-")
        .tempdir_in(directory)?;
    for module in MODULES {
        let source = work.path().join(module.name);
        std::fs::create_dir(&source)?;
        std::fs::write(source.join("go.mod"), module.go_mod)?;
        std::fs::write(source.join("go.sum"), module.go_sum)?;
        for (name, package) in module.programs {
            if missing.contains(name) {
                let started = std::time::Instant::now();
                progress.line(&format!("  building {name} …"));
                let output = work.path().join(format!("{name}.new"));
                go_build(module, &source, package, &output)?;
                std::fs::rename(&output, directory.join(name))?;
                progress.line(&format!(
                    "  built {name} in {} s",
                    started.elapsed().as_secs()
                ));
            }
        }
    }
    Ok(())
}

/// One after another: each uses all cores, and together they would need much memory.
fn go_build(module: &Module, source: &Path, package: &str, output: &Path) -> anyhow::Result<()> {
    let result = std::process::Command::new("go")
        .args(["build", "-mod=readonly", "-buildvcs=false", "-trimpath"])
        .args(["-ldflags", module.linker_flags, "-o"])
        .arg(output)
        .arg(package)
        .current_dir(source)
        .env("CGO_ENABLED", "0")
        .env("GOWORK", "off")
        .stdin(Stdio::null())
        .output()
        .context("cannot start go")?;
    if result.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&result.stderr);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(15)..];
    bail!(
        "go could not build {package} ({}). It said:\n{}\nThe modules come through the Go module proxy (GOPROXY): is it reachable? What was built so far is kept",
        result.status,
        last.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ci_cannot_leave_real_kubernetes_out() {
        assert!(wanted_by("", "true").unwrap());
        assert!(wanted_by("0", "").unwrap());
        assert!(!wanted_by("1", "").unwrap());
        let error = wanted_by("1", "true").unwrap_err().to_string();
        assert!(error.contains("cannot be left out"), "{error}");
        assert!(
            wanted_by("yes", "")
                .unwrap_err()
                .to_string()
                .contains("write 1")
        );
    }

    #[test]
    fn given_programs_win_and_the_others_are_built_ones() {
        use std::os::unix::fs::PermissionsExt;
        let (given, built) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let make = |path: PathBuf, mode| {
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        make(given.path().join("etcd"), 0o755);
        make(given.path().join("kwok"), 0o644); // not a program
        make(built.path().join("etcd"), 0o755);
        make(built.path().join("kwok"), 0o755);
        let (found, missing) = locate(&[given.path(), built.path()]);
        assert!(found.contains(&("etcd", given.path().join("etcd"))));
        assert!(found.contains(&("kwok", built.path().join("kwok"))));
        assert_eq!(missing.len(), 4);
        let error = given_directory(Some("/does/not/exist")).unwrap_err();
        assert!(error.to_string().contains("KUBEBUILDER_ASSETS"));
        assert_eq!(given_directory(Some("")).unwrap(), None);
    }

    #[test]
    fn the_directory_is_named_by_what_is_pinned() {
        let path = built_directory(Path::new("/cache"));
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("1.35.4-") && name.len() == "1.35.4-".len() + 12);
        for module in MODULES {
            for (_, package) in module.programs {
                let line = module
                    .go_mod
                    .lines()
                    .any(|line| line.trim().trim_start_matches("tool ").trim() == *package);
                assert!(line, "go.mod of {} has no tool {package}", module.name);
            }
            if module.name == "kubernetes" {
                assert!(
                    module
                        .go_mod
                        .contains(&format!("k8s.io/kubernetes v{VERSION}"))
                );
                assert!(module.linker_flags.contains(&format!("=v{VERSION} ")));
            }
        }
    }
}
