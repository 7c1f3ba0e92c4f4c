//! Founding, joining, admitting, and following who is a member.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use async_trait::async_trait;
use base64::Engine;
use krake_consensus::{
    Command, Expect, Host, MemberInfo, Operation, Owner, ProposeError, Transport,
};
use krake_gossip::{Handler, Network, NetworkConfig, Peer};
use krake_model::member::{SignedInvitation, join_proof_bytes};
use krake_model::{Genesis, GroupId, Invitation, Member, NodeId, Timestamp};
use serde_json::{Value, json};
use tracing::{debug, info, warn};

use crate::catalog::{Catalog, PATIENCE};
use crate::config::Config;
use crate::config::check::is_dns_label;
use crate::datadir::{DataDir, Identity, Membership};
use crate::federation::{Federation, now};
use crate::net::Admit;
use crate::records::{self, TokenRecord, TokenState};
use crate::rpc::{self, JoinReply, JoinRequest, Reply, Request, accepted_until};
use crate::site::agent::Agent;

/// How long a newcomer waits for an answer.
const JOIN_TIME: Duration = Duration::from_secs(20);
/// A member that is silent for longer than this may be replaced as a voter.
const VOTER_SILENCE: Duration = Duration::from_secs(60);
/// Contacts named in an invitation.
const CONTACTS_MAX: usize = 5;
/// The replica id of a member that has none: the catalog was restored without it, and what it has
/// is of another incarnation. It asks for one when it comes back.
pub const NO_REPLICA: u64 = 0;
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

/// Of a catalog that is written before its node runs.
pub(crate) struct NoTransport;

#[async_trait]
impl Transport for NoTransport {
    fn send(&self, _to: NodeId, _frame: Vec<u8>) -> bool {
        false
    }

    async fn call(&self, _: NodeId, _: Vec<u8>, _: Duration) -> Result<Vec<u8>, String> {
        Err("there is no other node yet".to_owned())
    }
}

fn entropy<const N: usize>() -> [u8; N] {
    rand::random()
}

/// The catalog in a data directory.
pub fn catalog_path(data: &DataDir) -> PathBuf {
    data.path().join("catalog")
}

/// Whether a member has no catalog any more.
pub fn catalog_is_gone(data: &DataDir) -> bool {
    let entries = std::fs::read_dir(catalog_path(data));
    match entries {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Makes the catalog of a node that is no member yet.
fn new_catalog(data: &DataDir, owner: Owner) -> anyhow::Result<PathBuf> {
    let path = catalog_path(data);
    if path.exists() {
        // Left by an attempt that did not get to its end: nobody has seen it.
        std::fs::remove_dir_all(&path)
            .with_context(|| format!("cannot remove {}", path.display()))?;
    }
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

fn put(key: impl Into<String>, value: bytes::Bytes, expect: Expect) -> Operation {
    Operation::Put {
        key: key.into(),
        value,
        expect,
    }
}

/// The objects that show a member: its site and its node.
pub(crate) fn objects(member: &Member) -> (Value, Value) {
    let metadata = |labels: &BTreeMap<String, String>| {
        json!({
            "name": member.site.name,
            "uid": uuid::Uuid::new_v4(),
            "creationTimestamp": member.joined_at.to_seconds_string(),
            "generation": 1,
            "labels": labels,
        })
    };
    let site = json!({
        "apiVersion": "krake.dev/v1", "kind": "Site", "metadata": metadata(&member.site.labels),
        "spec": {
            "operator": member.site.operator,
            "node": member.node,
            "cordoned": false,
            "location": member.site.location,
            "labels": member.site.labels,
        },
    });
    let node = json!({
        "apiVersion": "krake.dev/v1", "kind": "Node", "metadata": metadata(&BTreeMap::new()),
        "spec": {
            "site": member.site.name,
            "node": member.node,
            "replica": member.replica,
            "addresses": member.addresses,
        },
    });
    (site, node)
}

/// What stopped the catalog, such as a full disk; else what was said of the attempt.
pub(crate) fn failure_of(host: &Host, error: impl Into<anyhow::Error>) -> anyhow::Error {
    match host.failure() {
        Some(failure) => anyhow::anyhow!("the catalog cannot be written: {failure}"),
        None if host.is_full() => anyhow::anyhow!("there is no room left on the disk"),
        None => error.into(),
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
    let identity = data.identity(entropy)?;
    let genesis = Genesis {
        name: config.federation.name.clone(),
        founder: identity.node(),
        shard_count: config.federation.shards,
        metrics: krake_model::metric::default_definitions(),
        weights: krake_model::metric::default_weights(),
        nonce: entropy(),
    };
    let own = member(config, &identity, 1);
    let token = format!(
        "krake-admin-{}",
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(entropy::<32>())
    );
    let boot = data.next_boot()?;
    let owner = Owner {
        federation: genesis.federation_id()?,
        node: identity.node(),
    };
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
    let identity = data.identity(entropy)?;
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
    let request = rpc::encode(&JoinRequest {
        invitation: signed,
        node: identity.node(),
        site,
        addresses,
        proof: halves,
    })?;
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

/// Admits newcomers with an invitation.
pub struct Door {
    federation: Federation,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door").finish_non_exhaustive()
    }
}

type Refusal = (&'static str, String);

impl Door {
    /// The door of a federation.
    pub const fn new(federation: Federation) -> Self {
        Self { federation }
    }

    async fn try_admit(&self, from: NodeId, request: &JoinRequest) -> Result<JoinReply, Refusal> {
        let catalog = &self.federation.catalog;
        let own = self
            .federation
            .genesis
            .federation_id()
            .map_err(|error| ("krake::internal", error.to_string()))?;
        let invitation = request
            .invitation
            .open()
            .map_err(|error| ("krake::token-invalid", error.to_string()))?;
        if invitation.federation != own {
            return Err((
                "krake::other-federation",
                "the token is for another federation; ask a member of this one for a token (krakectl token create)"
                    .to_owned(),
            ));
        }
        let signed = JoinRequest::site_bytes(&request.site, &request.addresses)
            .map(|site| join_proof_bytes(&own, &invitation.id, &site))
            .map_err(|error| ("krake::invalid", error.to_string()))?;
        let mut proof = [0_u8; 64];
        proof[..32].copy_from_slice(&request.proof[0]);
        proof[32..].copy_from_slice(&request.proof[1]);
        if request.node != from || !from.verify(&signed, &proof) {
            return Err((
                "krake::proof",
                "the request is not signed by the node that sent it".to_owned(),
            ));
        }
        check_site(request, invitation.site.as_deref())?;
        catalog
            .host
            .read_barrier(&[GroupId::META], PATIENCE)
            .await
            .map_err(|error| ("krake::unavailable", error.to_string()))?;
        for _ in 0..20 {
            if let Some(reply) = self.admit_once(request, &invitation).await? {
                return Ok(reply);
            }
        }
        Err((
            "krake::busy",
            "too many nodes join at once; try again".to_owned(),
        ))
    }

    /// `None`: somebody was faster; look again.
    async fn admit_once(
        &self,
        request: &JoinRequest,
        invitation: &Invitation,
    ) -> Result<Option<JoinReply>, Refusal> {
        let catalog = &self.federation.catalog;
        let meta = GroupId::META;
        let key = records::token_key(&invitation.id);
        let Some((token, token_entry)) = catalog.read::<TokenRecord>(meta, &key) else {
            return Err((
                "krake::token-unknown",
                "the token is not known here; ask for a new one (krakectl token create)".to_owned(),
            ));
        };
        let known = catalog.read::<Member>(meta, &records::member_key(&request.node));
        if let Some((member, _)) = &known
            && token.used_by.as_deref() == Some(request.node.to_string().as_str())
        {
            // The answer got lost; the same node asks again.
            return Ok(Some(self.admitted(member.replica)?));
        }
        check_token(&token)?;
        if known.is_some() {
            return Err((
                "krake::already-member",
                "this node is a member already; start it with krake-node run".to_owned(),
            ));
        }
        let site_key = format!("sites/{}", request.site.name);
        if catalog.host.get(meta, &site_key).is_some() {
            return Err((
                "krake::site-taken",
                format!(
                    "the federation has a site `{}` already; set another site.name",
                    request.site.name
                ),
            ));
        }
        let Some((replica, replica_entry)) = catalog.read::<u64>(meta, records::NEXT_REPLICA)
        else {
            return Err((
                "krake::internal",
                "the replica counter is missing".to_owned(),
            ));
        };
        let member = Member {
            node: request.node,
            replica,
            site: request.site.clone(),
            addresses: request.addresses.clone(),
            joined_at: now(),
        };
        let used = TokenRecord {
            state: TokenState::Used,
            used_by: Some(request.node.to_string()),
            ..token
        };
        let (site, node) = objects(&member);
        let operations = vec![
            put(
                key,
                records::write(&used),
                Expect::Revision(token_entry.modified),
            ),
            put(
                records::NEXT_REPLICA,
                records::write(&(replica + 1)),
                Expect::Revision(replica_entry.modified),
            ),
            put(
                records::member_key(&request.node),
                records::write(&member),
                Expect::Absent,
            ),
            put(site_key, records::write(&site), Expect::Absent),
            put(
                format!("nodes/{}", member.site.name),
                records::write(&node),
                Expect::Absent,
            ),
        ];
        match catalog
            .host
            .propose(meta, Command::new(operations), PATIENCE)
            .await
        {
            Ok(_) => {
                info!(site = member.site.name, node = %member.node, "a node was admitted");
                // This node's replica has it once it is read back.
                let _ = catalog.host.read_barrier(&[meta], PATIENCE).await;
                Ok(Some(self.admitted(replica)?))
            }
            Err(ProposeError::Conflict { .. }) => {
                let _ = catalog.host.read_barrier(&[meta], PATIENCE).await;
                Ok(None)
            }
            Err(error) => Err(("krake::unavailable", error.to_string())),
        }
    }

    /// Gives a member another replica id: nobody may take its old one for what it is, because what
    /// that one promised is lost.
    async fn try_readmit(&self, from: NodeId) -> Result<Reply, String> {
        let catalog = &self.federation.catalog;
        let meta = GroupId::META;
        let fresh = || async {
            let barrier = catalog.host.read_barrier(&[meta], PATIENCE).await;
            barrier.map_err(|error| error.to_string())
        };
        fresh().await?;
        for _ in 0..20 {
            let key = records::member_key(&from);
            let Some((member, entry)) = catalog.read::<Member>(meta, &key) else {
                return Err("this node is not a member; join with a token".to_owned());
            };
            let Some((replica, counter)) = catalog.read::<u64>(meta, records::NEXT_REPLICA) else {
                return Err("the replica counter is missing".to_owned());
            };
            let member = Member { replica, ..member };
            let mut operations = vec![
                put(
                    records::NEXT_REPLICA,
                    records::write(&(replica + 1)),
                    Expect::Revision(counter.modified),
                ),
                put(
                    key,
                    records::write(&member),
                    Expect::Revision(entry.modified),
                ),
            ];
            let node_key = format!("nodes/{}", member.site.name);
            if let Some((mut node, entry)) = catalog.read::<Value>(meta, &node_key) {
                node["spec"]["replica"] = json!(replica);
                operations.push(put(
                    node_key,
                    records::write(&node),
                    Expect::Revision(entry.modified),
                ));
            }
            let command = Command::new(operations);
            match catalog.host.propose(meta, command, PATIENCE).await {
                Ok(_) => {
                    info!(site = member.site.name, node = %from, replica, "a member that lost its catalog was admitted again");
                    fresh().await?;
                    let members = catalog.members();
                    return Ok(Reply::Readmitted { replica, members });
                }
                Err(ProposeError::Conflict { .. }) => fresh().await?,
                Err(error) => return Err(error.to_string()),
            }
        }
        Err("too many nodes join at once; try again".to_owned())
    }

    fn admitted(&self, replica: u64) -> Result<JoinReply, Refusal> {
        let genesis = self
            .federation
            .genesis
            .encode()
            .map_err(|error| ("krake::internal", error.to_string()))?;
        Ok(JoinReply::Admitted {
            genesis,
            replica,
            members: self.federation.catalog.members(),
        })
    }
}

fn check_token(token: &TokenRecord) -> Result<(), Refusal> {
    match token.state {
        TokenState::Used => Err((
            "krake::token-used",
            "the token was used already and each admits one node; ask for a new one (krakectl token create)".to_owned(),
        )),
        TokenState::Revoked => Err((
            "krake::token-revoked",
            "the token was revoked; ask for a new one (krakectl token create)".to_owned(),
        )),
        TokenState::Open if accepted_until(token.expires_at) < now() => Err((
            "krake::token-expired",
            format!(
                "the token expired at {}; ask for a new one (krakectl token create)",
                token.expires_at
            ),
        )),
        TokenState::Open => Ok(()),
    }
}

fn check_site(request: &JoinRequest, only: Option<&str>) -> Result<(), Refusal> {
    let name = &request.site.name;
    if !is_dns_label(name) {
        return Err(("krake::invalid", format!("`{name}` is not a site name")));
    }
    if let Some(only) = only
        && only != name
    {
        return Err((
            "krake::other-site",
            format!("the token is for the site `{only}`, this node's site.name is `{name}`"),
        ));
    }
    if request.addresses.is_empty() || request.addresses.len() > 16 {
        return Err(("krake::invalid", "a node has 1 to 16 addresses".to_owned()));
    }
    Ok(())
}

#[async_trait]
impl Admit for Door {
    async fn readmit(&self, from: NodeId) -> Reply {
        let readmitted = self.try_readmit(from).await;
        readmitted.unwrap_or_else(|message| Reply::Error { message })
    }

    async fn admit(&self, from: NodeId, request: JoinRequest) -> JoinReply {
        match self.try_admit(from, &request).await {
            Ok(reply) => reply,
            Err((code, message)) => {
                info!(%from, code, message, "a node was not admitted");
                JoinReply::Refused {
                    code: code.to_owned(),
                    message,
                }
            }
        }
    }
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
            Err(error) if last.is_empty() => last = error,
            Err(error) => debug!(%asked, error, "not readmitted here"),
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

fn peers(members: &[Member]) -> Vec<Peer> {
    let peer = |member: &Member| Peer {
        node: member.node,
        addresses: member.addresses.clone(),
    };
    members.iter().map(peer).collect()
}

/// A member as the voter choice sees it.
pub fn info_of(member: &Member, alive: bool) -> MemberInfo {
    MemberInfo {
        replica: member.replica,
        node: member.node,
        operator: member.site.operator.clone(),
        grid_zone: member.site.location.grid_zone.clone(),
        country: member.site.location.country.clone(),
        alive,
    }
}

/// Tells network and catalog who the members are.
pub async fn apply_members(federation: &Federation, members: &[Member]) {
    federation.network.set_members(peers(members)).await;
    apply_voters(federation, members).await;
}

async fn apply_voters(federation: &Federation, members: &[Member]) {
    let opinions = federation.network.opinions();
    let infos = members
        .iter()
        .filter(|member| member.replica != NO_REPLICA)
        .map(|member| {
            let silence = opinions.silence.get(&member.node);
            let alive = member.node == federation.own
                || silence.is_none_or(|silence| *silence < VOTER_SILENCE);
            info_of(member, alive)
        })
        .collect();
    federation.catalog.host.set_members(infos).await;
}

/// Follows the members until the program ends; they are kept in the data directory for the next
/// start.
pub async fn follow(federation: Federation, data: Arc<DataDir>, mut membership: Membership) {
    let mut batches = federation.catalog.host.watch();
    let mut care = tokio::time::interval(Duration::from_secs(5));
    let mut catch_up = tokio::time::interval(Duration::from_secs(1));
    catch_up.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut turn = 0;
    let mut cordoned = false;
    loop {
        follow_cordon(&federation, &mut cordoned).await;
        let members = tokio::select! {
            batch = batches.recv() => match batch {
                Ok(batch) if batch.group == GroupId::META
                    && (batch.reset || batch.changes.iter().any(|c| c.key.starts_with(records::MEMBERS))) =>
                {
                    federation.catalog.members()
                }
                Ok(_) => continue,
                Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => federation.catalog.members(),
                Err(tokio::sync::broadcast::error::RecvError::Closed) => return,
            },
            _ = care.tick() => {
                apply_voters(&federation, &membership.members).await;
                continue;
            }
            _ = catch_up.tick() => {
                if has_meta(&federation, &membership) {
                    continue;
                }
                turn += 1;
                ask_members(&federation, &membership.members, turn).await
            }
        };
        // A replica that just begins may know fewer members than we were told when we joined.
        if members.len() < membership.members.len() || members == membership.members {
            continue;
        }
        apply_members(&federation, &members).await;
        membership.members = members;
        if let Err(error) = data.store_membership(&membership) {
            warn!(%error, "the members could not be noted");
        }
    }
}

/// A cordoned site is about to be worked on: its node gives away what it leads.
async fn follow_cordon(federation: &Federation, cordoned: &mut bool) {
    let key = format!("sites/{}", federation.site);
    let Some((site, _)) = federation.catalog.read::<Value>(GroupId::META, &key) else {
        return;
    };
    let now = site["spec"]["cordoned"] == true;
    if now != *cordoned {
        *cordoned = now;
        info!(
            cordoned,
            "this site's cordon changed: a cordoned one leads nothing that another one can lead"
        );
        federation.catalog.host.set_reluctant(now).await;
    }
}

/// Whether the members come from the catalog: its replica here has a leader and knows all that we
/// were told of.
fn has_meta(federation: &Federation, membership: &Membership) -> bool {
    let status = federation.catalog.host.status();
    let led = status
        .borrow()
        .get(&GroupId::META)
        .is_some_and(|group| group.leader.is_some());
    led && federation.catalog.members().len() >= membership.members.len()
}

/// The members we know and those that another one knows. A node that was away, or joined just
/// before others did, may know nobody of those who keep the catalog now; then they do not reach it
/// either, for it lets members only speak.
async fn ask_members(federation: &Federation, known: &[Member], turn: usize) -> Vec<Member> {
    let mut members = known.to_vec();
    let connected: Vec<NodeId> = federation
        .network
        .connected()
        .borrow()
        .iter()
        .copied()
        .collect();
    let Some(asked) = connected.get(turn % connected.len().max(1)) else {
        return members;
    };
    match crate::net::ask(&federation.network, *asked, &rpc::Request::Members).await {
        Ok(rpc::Reply::Members(told)) => {
            let news = told
                .into_iter()
                .filter(|member| known.iter().all(|known| known.node != member.node));
            members.extend(news);
        }
        Ok(_) => {}
        Err(error) => debug!(%asked, error, "the members could not be asked for"),
    }
    members
}

/// Keeps what the catalog says of this node in line with its configuration and with the API kinds
/// that its backends serve, until the program ends.
pub async fn publish_own(federation: Federation, config: Config, agent: Agent) {
    let catalog = &federation.catalog;
    let mut changes = agent.changes();
    loop {
        changes.mark_unchanged();
        let served = agent.served();
        if catalog
            .host
            .read_barrier(&[GroupId::META], PATIENCE)
            .await
            .is_ok()
        {
            match try_publish(&federation, &config, &served).await {
                Ok(()) if changes.changed().await.is_ok() => continue,
                Ok(()) => return,
                Err(error) => {
                    warn!(%error, "the catalog does not have this site's configuration yet");
                }
            }
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn try_publish(
    federation: &Federation,
    config: &Config,
    served: &BTreeMap<String, Vec<String>>,
) -> anyhow::Result<()> {
    let meta = GroupId::META;
    let catalog = &federation.catalog;
    let key = records::member_key(&federation.own);
    let (mut own, entry) = catalog
        .read::<Member>(meta, &key)
        .context("this node is not in the list of members")?;
    let site = config.site_record();
    if own.site.name != site.name {
        bail!(
            "site.name is `{}` in the configuration, but this node joined as `{}`; names cannot be changed",
            site.name,
            own.site.name
        );
    }
    let addresses = config.advertised().to_vec();
    let mut operations = Vec::new();
    if own.site != site || own.addresses != addresses {
        own.site = site;
        own.addresses = addresses;
        let expect = Expect::Revision(entry.modified);
        operations.push(put(key, records::write(&own), expect));
    }
    let (new_site, new_node) = objects(&own);
    for (plural, new) in [("sites", new_site), ("nodes", new_node)] {
        let key = format!("{plural}/{}", own.site.name);
        let Some((mut object, entry)) = catalog.read::<Value>(meta, &key) else {
            continue;
        };
        let mut spec = new["spec"].clone();
        if plural == "sites" {
            if let Some(cordoned) = object.pointer("/spec/cordoned") {
                spec["cordoned"] = cordoned.clone();
            }
            let known = object.pointer("/spec/backends");
            let backends = backends(config, served, known);
            if known.is_some() || backends != json!({}) {
                spec["backends"] = backends;
            }
        }
        if object["spec"] == spec {
            continue;
        }
        object["spec"] = spec;
        let generation = object["metadata"]["generation"].as_u64().unwrap_or(0);
        object["metadata"]["generation"] = json!(generation + 1);
        let expect = Expect::Revision(entry.modified);
        operations.push(put(key, records::write(&object), expect));
    }
    if operations.is_empty() {
        return Ok(());
    }
    catalog
        .host
        .propose(meta, Command::new(operations), PATIENCE)
        .await?;
    info!("the federation knows this site's new configuration");
    Ok(())
}

/// What is committed of a site's backends: the API kinds they serve, of one that does not say now
/// those that it served before (I11).
fn backends(
    config: &Config,
    served: &BTreeMap<String, Vec<String>>,
    known: Option<&Value>,
) -> Value {
    let names = config.backends.iter().map(|backend| &backend.name);
    let record = |name: &String| {
        let kinds = match served.get(name) {
            Some(kinds) => json!(kinds),
            None => known?.get(name)?.get("kinds")?.clone(),
        };
        Some((name.clone(), json!({"kinds": kinds})))
    };
    Value::Object(names.filter_map(record).collect())
}

/// Makes an invitation: its text, its id and when it expires.
///
/// # Errors
/// When it cannot be written to the catalog.
pub async fn invite(
    federation: &Federation,
    identity: &Identity,
    lifetime: Duration,
    site: Option<String>,
) -> anyhow::Result<(String, String, Timestamp)> {
    let id: [u8; 16] = entropy();
    let expires_at = now().plus_millis(i64::try_from(lifetime.as_millis()).unwrap_or(i64::MAX));
    let mut members = federation.catalog.members();
    members.sort_by_key(|member| member.node != federation.own);
    let contacts = members
        .iter()
        .take(CONTACTS_MAX)
        .flat_map(|member| {
            member
                .addresses
                .iter()
                .map(|address| (member.node, address.clone()))
        })
        .collect();
    let invitation = Invitation {
        federation: federation.genesis.federation_id()?,
        id,
        expires_at,
        site: site.clone(),
        contacts,
        issuer: federation.own,
    };
    let signed = SignedInvitation::sign(&invitation, |bytes| identity.sign(bytes))?;
    let record = TokenRecord {
        expires_at,
        site,
        issuer: federation.site.to_string(),
        state: TokenState::Open,
        used_by: None,
    };
    let operations = vec![put(
        records::token_key(&id),
        records::write(&record),
        Expect::Absent,
    )];
    federation
        .catalog
        .host
        .propose(GroupId::META, Command::new(operations), PATIENCE)
        .await?;
    Ok((signed.to_string(), hex::encode(id), expires_at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_backend_served_stays_known_while_it_does_not_answer() {
        let config: Config = toml::from_str("[[backends]]\nname = 'default'").unwrap();
        let answers = BTreeMap::from([("default".to_owned(), vec!["v1/Secret".to_owned()])]);
        let known = backends(&config, &answers, None);
        assert_eq!(known, json!({"default": {"kinds": ["v1/Secret"]}}));
        assert_eq!(backends(&config, &BTreeMap::new(), Some(&known)), known);
        let old = json!({"default": {"kinds": []}, "gone": {"kinds": ["v1/Secret"]}});
        assert_eq!(backends(&config, &answers, Some(&old)), known);
    }

    #[test]
    fn a_token_that_cannot_be_used_says_why_and_what_to_do() {
        let record = |state, expires_at| TokenRecord {
            expires_at,
            site: None,
            issuer: "dresden".to_owned(),
            state,
            used_by: None,
        };
        let later = now().plus_millis(1000);
        // Clocks may differ by what `accepted_until` adds.
        assert_eq!(check_token(&record(TokenState::Open, later)), Ok(()));
        assert_eq!(check_token(&record(TokenState::Open, now())), Ok(()));
        for (state, expires_at, code) in [
            (TokenState::Used, later, "krake::token-used"),
            (TokenState::Revoked, later, "krake::token-revoked"),
            (
                TokenState::Open,
                Timestamp::from_millis(1),
                "krake::token-expired",
            ),
        ] {
            let (found, message) = check_token(&record(state, expires_at)).unwrap_err();
            assert_eq!(found, code);
            assert!(message.contains("krakectl token create"), "{message}");
        }
    }
}
