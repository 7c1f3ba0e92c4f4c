//! Backups of the catalog, beginning again from one, and taking everything from the others.

use std::collections::VecDeque;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use http::header;
use krake_consensus::{Backup, BackupWriter, Command, Expect, Host, Operation, Owner, ReadError};
use krake_model::{FederationId, Genesis, GroupId, Member, NodeId};
use serde_json::{Value, json};

use crate::catalog::{Catalog, PATIENCE};
use crate::config::Config;
use crate::datadir::{DataDir, DataDirError, Membership};
use crate::federation::{Federation, now};
use crate::membership::{self, NO_REPLICA, NoTransport, put};
use crate::records;

/// Where a node gives its backup.
pub const PATH: &str = "/v1/backup";
/// A node that sends nothing for this long has stopped in the middle.
const STALL: Duration = Duration::from_secs(60);
/// Operations in one command; well below what a command may have.
const OPERATIONS: usize = 100;

/// What a backup holds, for people.
#[derive(Debug)]
pub struct Summary {
    /// Where it is.
    pub path: PathBuf,
    /// The federation's name.
    pub federation: String,
    /// Groups.
    pub groups: usize,
    /// Records in them.
    pub records: usize,
    /// Bytes of the file.
    pub bytes: usize,
    /// When it was made.
    pub taken_at: krake_model::Timestamp,
}

/// Streams a backup of everything that was committed before the request; `local`: of what this
/// node has.
///
/// # Errors
/// When a group's leader does not confirm how new this node's replica is.
pub async fn respond(federation: &Federation, local: bool) -> Result<Response, ReadError> {
    let catalog = &federation.catalog;
    let groups = Catalog::all_groups(catalog.shards);
    if !local {
        catalog.host.read_barrier(&groups, PATIENCE).await?;
    }
    let id = federation.genesis.federation_id().map_err(other);
    let state = (
        BackupWriter::default(),
        VecDeque::from(groups),
        catalog.host.clone(),
    );
    let begin = stream::once(async move {
        let mut state = state;
        let begun = id.and_then(|id| state.0.begin(id, now()).map_err(other));
        (begun, state)
    });
    // Group by group: a slow reader holds one of them.
    let pieces = begin.flat_map(|(begun, state)| {
        let rest = stream::unfold(Some(state), |state| async move {
            let (mut writer, mut groups, host) = state?;
            let Some(group) = groups.pop_front() else {
                return Some((writer.end().map_err(other), None));
            };
            let piece = match host.group_backup(group) {
                Some(Ok(state)) => writer.group(group, state).map_err(other),
                Some(Err(error)) => Err(other(error)),
                None => Err(other(format!("this node has no replica of {group} yet"))),
            };
            Some((piece, Some((writer, groups, host))))
        });
        stream::once(async { begun }).chain(rest)
    });
    let mut response = Response::new(Body::from_stream(pieces));
    let binary = header::HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, binary);
    Ok(response)
}

fn other(error: impl std::fmt::Display) -> std::io::Error {
    std::io::Error::other(error.to_string())
}

/// Writes a backup of the node's catalog into a new file: from the node where it runs, else from
/// its files.
///
/// # Errors
/// When there is a file already, the node has no quorum, or its files are damaged.
pub async fn save(config: &Config, path: &Path) -> anyhow::Result<Summary> {
    if path.exists() {
        bail!("{} is there already; give another name", path.display());
    }
    let bytes = match DataDir::open_existing(&config.node.data_dir) {
        Err(DataDirError::Locked { .. }) => download(config).await?,
        Err(error) => return Err(error.into()),
        Ok(data) => {
            let (_, genesis) = data.require_membership()?;
            let owner = membership::owner_of(&genesis, data.identity(rand::random)?.node())?;
            let catalog = membership::catalog_path(&data);
            Backup::of_files(&catalog, owner, now())?.write()?.into()
        }
    };
    // Read back before anybody relies on it.
    let backup = Backup::read(&bytes)?;
    let summary = summary(&backup, path, bytes.len())?;
    let unfinished = path.with_extension("partial");
    let mut file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&unfinished)
        .with_context(|| format!("cannot create {}", unfinished.display()))?;
    let written = file.write_all(&bytes).and_then(|()| file.sync_all());
    if let Err(error) = written.and_then(|()| std::fs::rename(&unfinished, path)) {
        let _ = std::fs::remove_file(&unfinished);
        return Err(error).with_context(|| format!("cannot write {}", path.display()));
    }
    Ok(summary)
}

async fn download(config: &Config) -> anyhow::Result<Bytes> {
    let socket = config.socket_path();
    let http = reqwest::Client::builder()
        .unix_socket(socket.as_path())
        .read_timeout(STALL)
        .build()?;
    let response = http
        .get(format!("http://node{PATH}"))
        .send()
        .await
        .with_context(|| {
            format!(
                "the node does not answer at {}; wait until it is ready, or stop it: then its files are read",
                socket.display()
            )
        })?;
    let status = response.status();
    if !status.is_success() {
        let body: Value = response.json().await.unwrap_or_default();
        let detail = body["detail"].as_str().unwrap_or("no reason is given");
        bail!(
            "{detail} [{}]. To save what this node has, stop it and run this again",
            status.as_u16()
        );
    }
    response
        .bytes()
        .await
        .context("the node broke off the backup")
}

fn record<T: serde::de::DeserializeOwned>(backup: &Backup, key: &str) -> anyhow::Result<T> {
    let entry = backup
        .get(GroupId::META, key)
        .with_context(|| format!("the backup has no record `{key}`"))?;
    Ok(records::read(key, &entry.value)?)
}

fn genesis_of(backup: &Backup) -> anyhow::Result<Genesis> {
    let text: String = record(backup, records::GENESIS)?;
    let bytes = hex::decode(text).context("the backup's genesis record is damaged")?;
    let genesis = Genesis::decode(&bytes)?;
    if genesis.federation_id()? != backup.federation {
        bail!("the backup's genesis record is of another federation than the backup");
    }
    Ok(genesis)
}

fn summary(backup: &Backup, path: &Path, bytes: usize) -> anyhow::Result<Summary> {
    let genesis = genesis_of(backup)?;
    let missing = Catalog::all_groups(genesis.shard_count)
        .into_iter()
        .find(|group| !backup.groups().any(|known| known == *group));
    if let Some(group) = missing {
        bail!("the backup lacks {group}");
    }
    Ok(Summary {
        path: path.to_owned(),
        federation: genesis.name,
        groups: backup.groups().count(),
        records: backup.len(),
        bytes,
        taken_at: backup.taken_at,
    })
}

/// What `restore` tells its user.
#[derive(Debug)]
pub struct Restored {
    /// What was restored.
    pub summary: Summary,
    /// Of every group from now on.
    pub incarnation: u32,
    /// The sites that have to be taken in again.
    pub others: Vec<String>,
}

/// Begins the federation again from a backup, with this node as the only one that has the catalog.
/// Everything else is as it was: sites, apps, tokens. The other members come back with `rejoin`.
///
/// # Errors
/// When the backup is damaged or of another federation, or there is a catalog already.
pub async fn restore(config: &Config, path: &Path) -> anyhow::Result<Restored> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let backup = Backup::read(&bytes).with_context(|| format!("{}", path.display()))?;
    let summary = summary(&backup, path, bytes.len())?;
    let genesis = genesis_of(&backup)?;
    config.check_metrics(&genesis.metrics)?;
    let data = DataDir::open(&config.node.data_dir)?;
    check_target(&data, &genesis, backup.federation)?;
    data.forget_departure()?;
    let identity = data.identity(rand::random)?;
    if backup
        .get(GroupId::META, &records::departed_key(&identity.node()))
        .is_some()
    {
        bail!(
            "the node with the key in {} had left the federation when the backup was taken, and is refused by the others for ever; restore into another data directory (node.data_dir), or move node.key and membership away",
            data.path().display()
        );
    }
    let members: Vec<Member> = backup
        .list(GroupId::META, records::MEMBERS)
        .into_iter()
        .map(|(key, entry)| records::read(key, &entry.value))
        .collect::<Result<_, _>>()?;
    let replica: u64 = record(&backup, records::NEXT_REPLICA)?;
    let own = own_member(config, identity.node(), &members, replica)?;
    let others: Vec<Member> = members
        .iter()
        .filter(|member| member.node != own.node && member.site.name != own.site.name)
        .map(|member| Member {
            replica: NO_REPLICA,
            ..member.clone()
        })
        .collect();
    let operations = changes(&backup, &own, &others, &members);
    let owner = membership::owner_of(&genesis, own.node)?;
    let incarnation = backup.next_incarnation(now());
    let place = data.path().join("catalog.restoring");
    membership::remove_unfinished(&place)?;
    backup.restore(&place, owner, replica, incarnation)?;
    adjust(&place, owner, &own, data.next_boot()?, operations).await?;
    let mut all = vec![own];
    all.extend(others.iter().cloned());
    data.store_membership(&Membership {
        genesis: genesis.encode()?,
        replica,
        members: all,
    })?;
    let catalog = membership::catalog_path(&data);
    data.rename(&place, &catalog)?;
    Ok(Restored {
        summary,
        incarnation,
        others: others.into_iter().map(|member| member.site.name).collect(),
    })
}

fn check_target(data: &DataDir, genesis: &Genesis, federation: FederationId) -> anyhow::Result<()> {
    if let Some((_, own)) = data.membership()?
        && own.federation_id()? != federation
    {
        bail!(
            "the data directory {} belongs to federation `{}`, the backup is of `{}`",
            data.path().display(),
            own.name,
            genesis.name
        );
    }
    let catalog = membership::catalog_path(data);
    let there = catalog.exists() && std::fs::read_dir(&catalog)?.next().is_some();
    if there {
        bail!(
            "there is a catalog in {}: save it with krake-node backup if it is needed, and move it away",
            catalog.display()
        );
    }
    if catalog.exists() {
        std::fs::remove_dir(&catalog)?;
    }
    Ok(())
}

/// This node as a member of the restored federation: as it was, or in the place of the node that
/// its site had.
fn own_member(
    config: &Config,
    node: NodeId,
    members: &[Member],
    replica: u64,
) -> anyhow::Result<Member> {
    let name = &config.site.name;
    let known = members.iter().find(|member| member.node == node);
    if let Some(known) = known.filter(|known| known.site.name != *name) {
        bail!(
            "site.name is `{name}`, but this node joined as `{}` and a name cannot be changed",
            known.site.name
        );
    }
    let joined = members.iter().find(|member| member.site.name == *name);
    Ok(Member {
        node,
        replica,
        site: config.site_record(),
        addresses: config.advertised().to_vec(),
        joined_at: joined.map_or_else(now, |member| member.joined_at),
    })
}

/// What must change in the restored meta group: only this node has a replica id.
fn changes(backup: &Backup, own: &Member, others: &[Member], members: &[Member]) -> Vec<Operation> {
    let mut operations = vec![put(
        records::NEXT_REPLICA,
        records::write(&(own.replica + 1)),
        Expect::Any,
    )];
    for member in others.iter().chain([own]) {
        let value = records::write(member);
        operations.push(put(records::member_key(&member.node), value, Expect::Any));
    }
    let replaced = members
        .iter()
        .filter(|member| member.site.name == own.site.name && member.node != own.node);
    for member in replaced {
        operations.push(Operation::Delete {
            key: records::member_key(&member.node),
            expect: Expect::Any,
        });
    }
    let object_of = |key: &str| {
        let entry = backup.get(GroupId::META, key)?;
        records::read::<Value>(key, &entry.value).ok()
    };
    let (site, node) = membership::objects(own);
    for (plural, new) in [("sites", site), ("nodes", node)] {
        let key = format!("{plural}/{}", own.site.name);
        let object = match object_of(&key) {
            None => new,
            Some(mut object) => {
                for field in ["node", "replica", "addresses"] {
                    if !new["spec"][field].is_null() {
                        object["spec"][field] = new["spec"][field].clone();
                    }
                }
                object
            }
        };
        operations.push(put(key, records::write(&object), Expect::Any));
    }
    for member in others {
        let key = format!("nodes/{}", member.site.name);
        if let Some(mut object) = object_of(&key) {
            object["spec"]["replica"] = json!(NO_REPLICA);
            operations.push(put(key, records::write(&object), Expect::Any));
        }
    }
    operations
}

/// Writes the changes as the restored meta group's first commands.
async fn adjust(
    catalog: &Path,
    owner: Owner,
    own: &Member,
    boot: u64,
    operations: Vec<Operation>,
) -> anyhow::Result<()> {
    let settings = krake_consensus::Config::new(owner, own.replica, catalog.to_owned(), boot);
    let host = Host::start(&settings, Arc::new(NoTransport), now)?;
    host.set_members(vec![membership::info_of(own, true)]).await;
    let mut operations = operations;
    while !operations.is_empty() {
        let rest = operations.split_off(operations.len().min(OPERATIONS));
        let command = Command::new(operations);
        host.propose(GroupId::META, command, PATIENCE)
            .await
            .map_err(|error| membership::failure_of(&host, error))?;
        operations = rest;
    }
    host.stop().await;
    Ok(())
}

/// Puts the node's catalog aside; when it starts next it takes everything from the other members,
/// under another replica id. Returns where the old one is; `None`: there was none.
///
/// # Errors
/// When the node runs, is no member, or its files cannot be renamed.
pub fn rejoin(config: &Config) -> anyhow::Result<Option<PathBuf>> {
    let data = DataDir::open_existing(&config.node.data_dir)?;
    data.require_membership()?;
    let catalog = membership::catalog_path(&data);
    if !catalog.exists() {
        return Ok(None);
    }
    let time = now().to_seconds_string().replace(':', "");
    let aside = data.path().join(format!("catalog.{time}"));
    data.rename(&catalog, &aside)?;
    Ok(Some(aside))
}
