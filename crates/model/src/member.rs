//! Genesis, invitations, members and site records: who is in the federation.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::codec::{self, CodecError};
use crate::ids::{FederationId, NodeId};
use crate::metric::MetricDefinition;
use crate::time::Timestamp;

const GENESIS_VERSION: u8 = 1;
const INVITATION_VERSION: u8 = 1;
const INVITATION_DOMAIN: &[u8] = b"krake-invitation-v1";
const JOIN_DOMAIN: &[u8] = b"krake-join-v1";
/// An invitation is at most this large, encoded.
const INVITATION_BYTES_MAX: usize = 4096;
/// What every token starts with, so that people and secret scanners recognise one.
pub const TOKEN_PREFIX: &str = "krake1-";

/// Splits a signature: serde derives arrays only up to 32 elements.
pub(crate) fn halves(signature: &[u8; 64]) -> [[u8; 32]; 2] {
    let mut halves = [[0; 32]; 2];
    halves[0].copy_from_slice(&signature[..32]);
    halves[1].copy_from_slice(&signature[32..]);
    halves
}

pub(crate) fn joined(halves: &[[u8; 32]; 2]) -> [u8; 64] {
    let mut signature = [0; 64];
    signature[..32].copy_from_slice(&halves[0]);
    signature[32..].copy_from_slice(&halves[1]);
    signature
}

/// The record all members share; its hash is the federation's identity. Never changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Genesis {
    /// The federation's name.
    pub name: String,
    /// The founder's node.
    pub founder: NodeId,
    /// How many shards the catalog has, for ever (DESIGN 13.1).
    pub shard_count: u16,
    /// Metric definitions by name.
    pub metrics: BTreeMap<String, MetricDefinition>,
    /// Default weights by metric.
    pub weights: BTreeMap<String, f64>,
    /// Random, so that two federations of one name and founder differ.
    pub nonce: [u8; 16],
}

impl Genesis {
    /// `version byte + bincode`.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        codec::encode(GENESIS_VERSION, self)
    }

    /// Reads what [`Genesis::encode`] made.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        codec::decode(GENESIS_VERSION, bytes, 64 * 1024)
    }

    /// The federation's identity: BLAKE3 over the encoded record.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn federation_id(&self) -> Result<FederationId, CodecError> {
        Ok(FederationId::from_bytes(
            *blake3::hash(&self.encode()?).as_bytes(),
        ))
    }
}

/// Where a site is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Location {
    /// City, for people.
    pub place: String,
    /// ISO 3166-1 alpha-2.
    pub country: String,
    /// The electricity grid's zone, such as `SE-SE3`.
    pub grid_zone: String,
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
}

/// A site as its operator describes it; the slow part of what is known of it (DESIGN 13.5).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SiteRecord {
    /// Unique in the federation; a DNS-1123 label.
    pub name: String,
    /// The organisation; a failure domain of its own.
    pub operator: String,
    /// Where it is.
    pub location: Location,
    /// Labels that constraints see, besides the built-in `site`, `operator`, `location`,
    /// `country` and `gridZone`.
    pub labels: BTreeMap<String, String>,
}

/// A node admitted to the federation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    /// Its identity.
    pub node: NodeId,
    /// Its Raft replica id in every group: handed out by the meta group at admission, counted from
    /// 1, never reused, never derived from the key (DESIGN 13.1).
    pub replica: u64,
    /// Its site.
    pub site: SiteRecord,
    /// libp2p multiaddresses at which it listens.
    pub addresses: Vec<String>,
    /// When it was admitted (the meta leader's clock).
    pub joined_at: Timestamp,
}

/// What a token says: anybody with it may join once, before it expires.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Invitation {
    /// Which federation.
    pub federation: FederationId,
    /// Identifies it in the list of tokens; 16 random bytes.
    pub id: [u8; 16],
    /// Not valid after this, by the meta leader's clock ± 2 min (DESIGN 13.10).
    pub expires_at: Timestamp,
    /// If set, the site must have this name.
    pub site: Option<String>,
    /// Members to dial: node and multiaddress.
    pub contacts: Vec<(NodeId, String)>,
    /// The member that made it.
    pub issuer: NodeId,
}

/// An invitation with its issuer's signature: what is printed as a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedInvitation {
    /// `version byte + bincode` of [`Invitation`].
    pub payload: Vec<u8>,
    /// Ed25519 by the issuer, in two halves.
    pub signature: [[u8; 32]; 2],
}

/// A token is not one.
#[derive(Debug, Error)]
pub enum TokenError {
    /// Not a token's text.
    #[error(
        "this is not a token: a token starts with `krake1-` and comes from `krakectl token create`"
    )]
    Text,
    /// The text is a token's, but damaged (cut off or mistyped).
    #[error("the token is damaged; copy it again, whole")]
    Damaged(#[source] Option<CodecError>),
    /// The signature is not its issuer's.
    #[error("the token's signature is not that of its issuer {issuer}; copy it again, whole")]
    Signature {
        /// The issuer named.
        issuer: NodeId,
    },
}

impl SignedInvitation {
    /// Encodes and signs; `sign` is Ed25519 with the issuer's key.
    ///
    /// # Errors
    /// When it cannot be encoded.
    pub fn sign(
        invitation: &Invitation,
        sign: impl FnOnce(&[u8]) -> [u8; 64],
    ) -> Result<Self, CodecError> {
        let payload = codec::encode(INVITATION_VERSION, invitation)?;
        let signature = sign(&[INVITATION_DOMAIN, &payload].concat());
        Ok(Self {
            payload,
            signature: halves(&signature),
        })
    }

    /// Verifies the issuer's signature and decodes.
    ///
    /// # Errors
    /// When it is damaged or not signed by its issuer.
    pub fn open(&self) -> Result<Invitation, TokenError> {
        let invitation: Invitation =
            codec::decode(INVITATION_VERSION, &self.payload, INVITATION_BYTES_MAX)
                .map_err(|e| TokenError::Damaged(Some(e)))?;
        let message = [INVITATION_DOMAIN, &self.payload].concat();
        if !invitation.issuer.verify(&message, &joined(&self.signature)) {
            return Err(TokenError::Signature {
                issuer: invitation.issuer,
            });
        }
        Ok(invitation)
    }
}

impl fmt::Display for SignedInvitation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = joined(&self.signature).to_vec();
        bytes.extend_from_slice(&self.payload);
        write!(
            f,
            "{TOKEN_PREFIX}{}",
            bs58::encode(bytes).with_check().into_string()
        )
    }
}

impl FromStr for SignedInvitation {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let encoded = text
            .trim()
            .strip_prefix(TOKEN_PREFIX)
            .ok_or(TokenError::Text)?;
        if encoded.len() > 2 * INVITATION_BYTES_MAX {
            return Err(TokenError::Damaged(None));
        }
        let bytes = bs58::decode(encoded)
            .with_check(None)
            .into_vec()
            .map_err(|_| TokenError::Damaged(None))?;
        let (signature, payload) = bytes
            .split_first_chunk::<64>()
            .ok_or(TokenError::Damaged(None))?;
        Ok(Self {
            payload: payload.to_vec(),
            signature: halves(signature),
        })
    }
}

/// The bytes a joining node signs to prove that it holds its key: bound to the federation and to
/// the invitation, so that a proof serves once and nowhere else.
pub fn join_proof_bytes(federation: &FederationId, invitation: &[u8; 16], site: &[u8]) -> Vec<u8> {
    [JOIN_DOMAIN, federation.as_bytes(), invitation, site].concat()
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::{Signer, SigningKey};

    use super::*;

    fn invitation(key: &SigningKey) -> Invitation {
        Invitation {
            federation: FederationId::from_bytes([4; 32]),
            id: [5; 16],
            expires_at: Timestamp::from_millis(1000),
            site: Some("dresden".to_owned()),
            contacts: vec![],
            issuer: NodeId::from_bytes(key.verifying_key().to_bytes()),
        }
    }

    #[test]
    fn a_token_survives_its_text() {
        let key = SigningKey::from_bytes(&[1; 32]);
        let signed = SignedInvitation::sign(&invitation(&key), |m| key.sign(m).to_bytes()).unwrap();
        let text = signed.to_string();
        let read: SignedInvitation = text.parse().unwrap();
        assert_eq!(read.open().unwrap(), invitation(&key));
    }

    #[test]
    fn wrong_and_damaged_tokens_say_what_to_do() {
        let key = SigningKey::from_bytes(&[1; 32]);
        let signed = SignedInvitation::sign(&invitation(&key), |m| key.sign(m).to_bytes()).unwrap();
        let text = signed.to_string();
        assert!(matches!(
            "hello".parse::<SignedInvitation>(),
            Err(TokenError::Text)
        ));
        let cut = &text[..text.len() - 3];
        assert!(matches!(
            cut.parse::<SignedInvitation>(),
            Err(TokenError::Damaged(_))
        ));
        let mut forged = signed;
        forged.signature[0][0] ^= 1;
        assert!(matches!(forged.open(), Err(TokenError::Signature { .. })));
    }

    #[test]
    fn the_federation_id_is_the_hash_of_the_genesis() {
        let genesis = Genesis {
            name: "test".to_owned(),
            founder: NodeId::from_bytes([1; 32]),
            shard_count: 16,
            metrics: crate::metric::default_definitions(),
            weights: crate::metric::default_weights(),
            nonce: [0; 16],
        };
        let bytes = genesis.encode().unwrap();
        assert_eq!(Genesis::decode(&bytes).unwrap(), genesis);
        let other = Genesis {
            nonce: [1; 16],
            ..genesis.clone()
        };
        assert_ne!(
            genesis.federation_id().unwrap(),
            other.federation_id().unwrap()
        );
    }
}
