//! Ports for servers that must come back at the same address after a restart.
//!
//! A port is free when it can be bound; that alone is not enough. Between choosing and binding,
//! another testnet on the machine (another test) could choose it too, and while a killed site is
//! away, its ports look free. So choices are noted in one file for the user, each with the
//! directory it was made for, and hold as long as that directory exists. They lie below the
//! range from which the system takes ports of outgoing connections.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::fcntl::{Flock, FlockArg};

/// The lowest port that is given.
const LOWEST: u16 = 20_000;
/// The first port that is not given, where the system does not say where its own range begins.
const END: u16 = 32_000;
/// Below this many candidates the range is too small to be useful.
const RANGE_MIN: u16 = 1000;

type Noted = BTreeMap<u16, PathBuf>;

/// The cache directory of this user's krake programs.
///
/// # Errors
/// When there is no home directory.
pub fn cache_directory() -> anyhow::Result<PathBuf> {
    use etcetera::BaseStrategy;
    let strategy = etcetera::choose_base_strategy()
        .context("there is no home directory to keep files in: set HOME or XDG_CACHE_HOME")?;
    Ok(strategy.cache_dir().join("krake"))
}

fn range() -> (u16, u16) {
    let text =
        std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let outgoing = text
        .split_ascii_whitespace()
        .next()
        .and_then(|first| first.parse().ok())
        .unwrap_or(END);
    if outgoing >= LOWEST + RANGE_MIN {
        (LOWEST, outgoing)
    } else {
        (LOWEST, END)
    }
}

/// Whether a server could listen at this loopback port now, with TCP and UDP.
pub fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
        && UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

fn lock(directory: &Path) -> anyhow::Result<Flock<File>> {
    std::fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let path = directory.join("testnet-ports.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| anyhow::anyhow!("cannot lock {}: {error}", path.display()))
}

/// Picks `count` free ports from `start` on, in a circle.
fn pick(
    noted: &Noted,
    (low, end): (u16, u16),
    start: u16,
    count: usize,
    free: impl Fn(u16) -> bool,
) -> Option<Vec<u16>> {
    (start..end)
        .chain(low..start)
        .filter(|port| !noted.contains_key(port) && free(*port))
        .take(count)
        .map(Some)
        .chain(std::iter::repeat(None))
        .take(count)
        .collect()
}

/// Free ports for the servers whose data is in `owner`; they stay reserved while it exists.
///
/// # Errors
/// When there are not enough, or the note of them cannot be kept.
pub fn allocate(owner: &Path, count: usize) -> anyhow::Result<Vec<u16>> {
    allocate_in(&cache_directory()?, owner, count)
}

fn allocate_in(directory: &Path, owner: &Path, count: usize) -> anyhow::Result<Vec<u16>> {
    let owner = std::path::absolute(owner)?;
    let _lock = lock(directory)?;
    let path = directory.join("testnet-ports.json");
    let mut noted: Noted = std::fs::read(&path)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default();
    noted.retain(|_, owner| owner.exists());
    let (low, end) = range();
    let start = low + rand::random::<u16>() % (end - low);
    let Some(ports) = pick(&noted, (low, end), start, count, is_free) else {
        bail!(
            "there are not {count} free ports between {low} and {end}: stop other programs, or remove data directories of old testnets ({} ports are theirs)",
            noted.len()
        );
    };
    noted.extend(ports.iter().map(|port| (*port, owner.clone())));
    let temporary = directory.join("testnet-ports.json.new");
    std::fs::write(&temporary, serde_json::to_vec(&noted)?)
        .and_then(|()| std::fs::rename(&temporary, &path))
        .with_context(|| format!("cannot write {}", path.display()))?;
    Ok(ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noted_and_busy_ports_are_passed_over() {
        let noted = Noted::from([(12, PathBuf::new())]);
        let free = |port| port != 13;
        assert_eq!(
            pick(&noted, (10, 16), 11, 4, free),
            Some(vec![11, 14, 15, 10])
        );
        assert_eq!(pick(&noted, (10, 16), 11, 5, free), None);
    }

    #[test]
    fn two_owners_never_get_the_same_port_until_one_is_gone() {
        let cache = tempfile::tempdir().unwrap();
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut all = allocate_in(cache.path(), one.path(), 40).unwrap();
        all.extend(allocate_in(cache.path(), two.path(), 40).unwrap());
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 80);
        drop(one);
        allocate_in(cache.path(), two.path(), 1).unwrap();
        let text = std::fs::read(cache.path().join("testnet-ports.json")).unwrap();
        let noted: Noted = serde_json::from_slice(&text).unwrap();
        assert_eq!(noted.len(), 41);
    }

    #[test]
    fn a_port_in_use_is_not_free() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        assert!(!is_free(listener.local_addr().unwrap().port()));
    }
}
