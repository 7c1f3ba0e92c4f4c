//! The members' side of joining: invitations, and who is let in with them.

use std::time::Duration;

use async_trait::async_trait;
use krake_consensus::{Command, Expect, ProposeError};
use krake_model::member::{SignedInvitation, join_proof_bytes};
use krake_model::{GroupId, Invitation, Member, NodeId, Timestamp};
use serde_json::{Value, json};
use tracing::info;

use super::{objects, put};
use crate::catalog::PATIENCE;
use crate::config::check::is_dns_label;
use crate::datadir::Identity;
use crate::federation::{Federation, now};
use crate::net::Admit;
use crate::records::{self, Departure, TokenRecord, TokenState};
use crate::rpc::{JoinReply, JoinRequest, Reply, accepted_until};

/// How often it is tried to admit a node; each time another one was faster.
const ATTEMPTS_MAX: usize = 20;
/// Contacts named in an invitation.
const CONTACTS_MAX: usize = 5;

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
        for _ in 0..ATTEMPTS_MAX {
            if let Some(reply) = self.admit_once(request, &invitation).await? {
                return Ok(reply);
            }
        }
        Err((
            "krake::busy",
            "too many nodes join at once; try again".to_owned(),
        ))
    }

    /// Neither its key nor its site's name may be taken.
    fn check_new(&self, request: &JoinRequest, site_key: &str) -> Result<(), Refusal> {
        let is_there = |key: &str| {
            self.federation
                .catalog
                .host
                .get(GroupId::META, key)
                .is_some()
        };
        if is_there(&records::departed_key(&request.node)) {
            return Err((
                "krake::left",
                "the node with this key left the federation for ever; join with a data directory of its own, and so with another key"
                    .to_owned(),
            ));
        }
        if is_there(site_key) {
            return Err((
                "krake::site-taken",
                format!(
                    "the federation has a site `{}` already; set another site.name",
                    request.site.name
                ),
            ));
        }
        Ok(())
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
        let site_key = records::object_key("sites", "", &request.site.name);
        self.check_new(request, &site_key)?;
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
        for _ in 0..ATTEMPTS_MAX {
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

    fn standing(&self, from: NodeId) -> JoinReply {
        let key = records::departed_key(&from);
        let catalog = &self.federation.catalog;
        let departure = catalog.read::<Departure>(GroupId::META, &key);
        departure.map_or(JoinReply::NotLeft, |(departure, _)| {
            JoinReply::Left(departure)
        })
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
    let id: [u8; 16] = rand::random();
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
