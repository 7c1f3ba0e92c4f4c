//! A node's way in: founding a federation, joining one, and coming back without the catalog.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use async_trait::async_trait;
use base64::Engine;
use krake_consensus::{Command, Expect, Host, Owner};
use krake_gossip::{Handler, Network, NetworkConfig};
use krake_model::member::{SignedInvitation, join_proof_bytes};
use krake_model::{Genesis, GroupId, Member, NodeId};
use serde_json::json;
use tracing::debug;

use super::departure::Standing;
use super::{
    NoTransport, catalog_path, failure_of, info_of, objects, owner_of, peers, put,
    remove_unfinished,
};
use crate::catalog::{Catalog, PATIENCE};
use crate::config::Config;
use crate::datadir::{DataDir, Identity, Membership};
use crate::federation::now;
use crate::records;
use crate::rpc::{self, JoinReply, JoinRequest, Knock, Reply, Request, accepted_until};

/// How long a newcomer waits for an answer.
const JOIN_TIME: Duration = Duration::from_secs(20);
/// How long a member that has lost its catalog looks for another one that admits it again.
const READMIT_TIME: Duration = Duration::from_secs(60);
/// Between two questions for it.
const READMIT_PAUSE: Duration = Duration::from_millis(500);

/// What `init` tells its user.
#[derive(Debug)]
pub struct Founded {
    /// The federation's id.
    pub federation: String,
    /// Where the admin token is.
    pub token_file: PathBuf,
}

/// Makes the catalog of a node that is no member yet.
fn new_catalog(data: &DataDir, owner: Owner) -> anyhow::Result<PathBuf> {
    let path = catalog_path(data);
    remove_unfinished(&path)?;
    krake_consensus::create(&path, owner)?;
    Ok(path)
}

fn member(config: &Config, identity: &Identity, replica: u64) -> Member {
    Member {
        node: identity.node(),
        replica,
        site: config.site_record(),
        addresses: config.advertised().to_vec(),
        joined_at: now(),
    }
}

/// Founds a federation in a fresh data directory.
///
/// # Errors
/// When the directory is in use or belongs to a federation, or cannot be written.
pub async fn init(config: &Config) -> anyhow::Result<Founded> {
    config.check_metrics(&krake_model::metric::default_definitions())?;
    let data = DataDir::open(&config.node.data_dir)?;
    data.require_fresh()?;
    data.forget_departure()?;
    let identity = data.identity(rand::random)?;
    let genesis = Genesis {
        name: config.federation.name.clone(),
        founder: identity.node(),
        shard_count: config.federation.shards,
        metrics: krake_model::metric::default_definitions(),
        weights: krake_model::metric::default_weights(),
        nonce: rand::random(),
    };
    let own = member(config, &identity, 1);
    let token = format!(
        "krake-admin-{}",
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>())
    );
    let boot = data.next_boot()?;
    let owner = owner_of(&genesis, identity.node())?;
    let path = new_catalog(&data, owner)?;
    let host = Host::start(
        &krake_consensus::Config::new(owner, 1, path, boot),
        Arc::new(NoTransport),
        now,
    )?;
    host.set_members(vec![info_of(&own, true)]).await;
    host.bootstrap(Catalog::all_groups(genesis.shard_count))
        .await
        .map_err(|error| failure_of(&host, error))?;
    let (site, node) = objects(&own);
    let encoded = genesis.encode()?;
    let hash = json!(blake3::hash(token.as_bytes()).to_hex().as_str());
    let operations = vec![
        put(
            records::GENESIS,
            records::write(&json!(hex::encode(&encoded))),
            Expect::Absent,
        ),
        put(
            records::NEXT_REPLICA,
            records::write(&2_u64),
            Expect::Absent,
        ),
        put(records::ADMIN_HASH, records::write(&hash), Expect::Absent),
        put(
            records::member_key(&own.node),
            records::write(&own),
            Expect::Absent,
        ),
        put(
            format!("sites/{}", own.site.name),
            records::write(&site),
            Expect::Absent,
        ),
        put(
            format!("nodes/{}", own.site.name),
            records::write(&node),
            Expect::Absent,
        ),
    ];
    host.propose(GroupId::META, Command::new(operations), PATIENCE)
        .await
        .map_err(|error| failure_of(&host, error))?;
    host.stop().await;
    let token_file = data.store_admin_token(&token)?;
    // Last: a directory without it is not a member of anything.
    data.store_membership(&Membership {
        genesis: encoded,
        replica: 1,
        members: vec![own],
    })?;
    Ok(Founded {
        federation: genesis.federation_id()?.to_string(),
        token_file,
    })
}

struct Deaf;

#[async_trait]
impl Handler for Deaf {
    fn frame(&self, _from: NodeId, _bytes: &[u8]) {}

    async fn call(&self, _from: NodeId, _bytes: &[u8]) -> Result<Vec<u8>, String> {
        Err("this node is joining".to_owned())
    }

    async fn join(&self, _from: NodeId, _bytes: &[u8]) -> Result<Vec<u8>, String> {
        Err("this node is joining itself".to_owned())
    }
}

/// Joins the federation that an invitation is for; returns its name.
///
/// # Errors
/// When the token is damaged, expired, used or revoked, nobody answers, or the data directory is
/// in use or belongs to a federation.
pub async fn join(config: &Config, token: &str) -> anyhow::Result<String> {
    let signed: SignedInvitation = token.parse()?;
    let invitation = signed.open()?;
    if accepted_until(invitation.expires_at) < now() {
        bail!(
            "the token expired at {}; ask for a new one (krakectl token create)",
            invitation.expires_at
        );
    }
    let data = DataDir::open(&config.node.data_dir)?;
    data.require_fresh()?;
    data.forget_departure()?;
    let identity = data.identity(rand::random)?;
    // Before the token is used up: a disk that cannot be written shows now.
    new_catalog(
        &data,
        Owner {
            federation: invitation.federation,
            node: identity.node(),
        },
    )?;
    let network = Network::start(
        NetworkConfig {
            secret_key: *identity.seed(),
            federation: invitation.federation,
            listen: Vec::new(),
            connections_max: 16,
        },
        Arc::new(Deaf),
    )
    .await?;
    let site = config.site_record();
    let addresses = config.advertised().to_vec();
    let proof = identity.sign(&join_proof_bytes(
        &invitation.federation,
        &invitation.id,
        &JoinRequest::site_bytes(&site, &addresses)?,
    ));
    let mut halves = [[0_u8; 32]; 2];
    halves[0].copy_from_slice(&proof[..32]);
    halves[1].copy_from_slice(&proof[32..]);
    let request = rpc::encode(&Knock::Join(Box::new(JoinRequest {
        invitation: signed,
        node: identity.node(),
        site,
        addresses,
        proof: halves,
    })))?;
    // In the invitation's order: its issuer, which is known to run, comes first.
    let mut contacts: Vec<(NodeId, Vec<String>)> = Vec::new();
    for (node, address) in &invitation.contacts {
        match contacts.iter_mut().find(|(known, _)| known == node) {
            Some((_, addresses)) => addresses.push(address.clone()),
            None => contacts.push((*node, vec![address.clone()])),
        }
    }
    let mut failures = Vec::new();
    for (node, addresses) in &contacts {
        match network.join(*node, addresses, &request, JOIN_TIME).await {
            Err(error) => failures.push(format!("{} ({error})", addresses.join(", "))),
            Ok(bytes) => match rpc::decode::<JoinReply>(&bytes)? {
                JoinReply::Refused { code, message } => bail!("{message} [{code}]"),
                JoinReply::Left(_) | JoinReply::NotLeft => {
                    failures.push(format!(
                        "{} (an answer to another question)",
                        addresses.join(", ")
                    ));
                }
                JoinReply::Admitted {
                    genesis,
                    replica,
                    mut members,
                } => {
                    let read = Genesis::decode(&genesis)?;
                    if read.federation_id()? != invitation.federation {
                        bail!(
                            "the node that answered belongs to another federation than the token"
                        );
                    }
                    // The node that answered may not have read back its own write yet.
                    if !members.iter().any(|member| member.node == identity.node()) {
                        members.push(member(config, &identity, replica));
                    }
                    data.store_membership(&Membership {
                        genesis,
                        replica,
                        members,
                    })?;
                    return Ok(read.name);
                }
            },
        }
    }
    bail!(
        "no node of the federation answered: {}. Check that they run and can be reached from here",
        failures.join("; ")
    )
}

/// As a member without a catalog: makes an empty one under a replica id that another member gives
/// it. The rest comes from the groups' leaders.
///
/// # Errors
/// When no member gives it one in time, or the new catalog cannot be written.
pub async fn readmit(
    network: &Network,
    data: &DataDir,
    owner: Owner,
    stored: Membership,
) -> anyhow::Result<Membership> {
    let others: Vec<&Member> = stored
        .members
        .iter()
        .filter(|member| member.node != owner.node)
        .collect();
    if others.is_empty() {
        bail!(
            "there is no other member that has it: restore a backup with krake-node restore FILE"
        );
    }
    network.set_members(peers(&stored.members)).await;
    let deadline = tokio::time::Instant::now() + READMIT_TIME;
    let mut last = "nobody could be reached".to_owned();
    let mut standing = Standing::default();
    for turn in 0.. {
        let asked = others[turn % others.len()].node;
        match crate::net::ask(network, asked, &Request::Readmit).await {
            Ok(Reply::Readmitted { replica, members }) => {
                new_catalog(data, owner)?;
                let membership = Membership {
                    genesis: stored.genesis,
                    replica,
                    members,
                };
                data.store_membership(&membership)?;
                return Ok(membership);
            }
            Ok(Reply::Error { message }) => last = message,
            Ok(other) => last = format!("an answer to another question: {other:?}"),
            Err(error) => debug!(%asked, error, "not readmitted here"),
        }
        let other = others[turn % others.len()];
        let left = standing.ask(network, other, others.len()).await;
        if let Some(departure) = left {
            data.put_membership_aside(departure.left_at)?;
            // Says so.
            data.require_membership()?;
        }
        if tokio::time::Instant::now() >= deadline {
            break;
        }
        tokio::time::sleep(READMIT_PAUSE).await;
    }
    bail!(
        "no other member gave this node another replica id within {} s ({last}). Check that a majority of them runs and can be reached from here; when a majority is lost for ever, restore a backup with krake-node restore FILE",
        READMIT_TIME.as_secs()
    )
}
