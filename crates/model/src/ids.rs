//! Identities: nodes, federations, Raft groups and applications.

use std::fmt;
use std::str::FromStr;

use ed25519_dalek::{Signature, VerifyingKey};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;
use uuid::Uuid;

/// The prefix of an Ed25519 libp2p peer id: an identity multihash (0x00) of 36 bytes (0x24) that
/// holds a protobuf `PublicKey { type: Ed25519 (08 01), data: 32 bytes (12 20 …) }`.
/// Source: libp2p peer-ids specification, "Peer IDs" and "Keys".
const PEER_ID_PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];

/// An identity could not be read from text.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseIdError {
    /// The text is not in the alphabet of its encoding, or has the wrong length.
    #[error("`{text}` is not a {kind}: expected {expected}")]
    Malformed {
        /// What was to be read.
        kind: &'static str,
        /// The offending text, cut at 80 characters.
        text: String,
        /// The form that was expected.
        expected: &'static str,
    },
}

impl ParseIdError {
    fn malformed(kind: &'static str, text: &str, expected: &'static str) -> Self {
        Self::Malformed {
            kind,
            text: text.chars().take(80).collect(),
            expected,
        }
    }
}

/// A node's identity: its Ed25519 public key (32 bytes). Prints as the libp2p peer id
/// (`12D3KooW…`); in binary codecs it is the 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId([u8; 32]);

impl NodeId {
    /// Takes the 32 bytes of an Ed25519 public key; whether they are a point on the curve is
    /// checked where a signature is verified.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the public key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The bytes of the libp2p peer id (38 bytes: an identity multihash of the protobuf key).
    pub fn to_peer_id_bytes(self) -> Vec<u8> {
        let mut bytes = PEER_ID_PREFIX.to_vec();
        bytes.extend_from_slice(&self.0);
        bytes
    }

    /// Reads the bytes of a libp2p peer id; `None` when it is not an Ed25519 identity.
    pub fn from_peer_id_bytes(bytes: &[u8]) -> Option<Self> {
        let key = bytes.strip_prefix(&PEER_ID_PREFIX)?;
        key.try_into().ok().map(Self)
    }

    /// Verifies an Ed25519 signature strictly (RFC 8032, no small-order keys).
    pub fn verify(&self, message: &[u8], signature: &[u8; 64]) -> bool {
        VerifyingKey::from_bytes(&self.0).is_ok_and(|key| {
            key.verify_strict(message, &Signature::from_bytes(signature))
                .is_ok()
        })
    }

    /// The last eight characters of the peer id: enough for people to tell nodes apart in logs.
    pub fn short(&self) -> String {
        let text = self.to_string();
        text[text.len() - 8..].to_owned()
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(self.to_peer_id_bytes()).into_string())
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeId({self})")
    }
}

impl FromStr for NodeId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || ParseIdError::malformed("node id", text, "an Ed25519 libp2p peer id");
        if text.len() > 64 {
            return Err(malformed());
        }
        let bytes = bs58::decode(text).into_vec().map_err(|_| malformed())?;
        Self::from_peer_id_bytes(&bytes).ok_or_else(malformed)
    }
}

/// A federation's identity: the BLAKE3 hash of its genesis record. Prints as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FederationId([u8; 32]);

impl FederationId {
    /// Takes the hash.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for FederationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for FederationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FederationId({self})")
    }
}

impl FromStr for FederationId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let malformed = || ParseIdError::malformed("federation id", text, "64 hex digits");
        let mut bytes = [0_u8; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| malformed())?;
        Ok(Self(bytes))
    }
}

/// Text for people and JSON, raw bytes for binary codecs.
macro_rules! serde_text_or_bytes {
    ($name:ident) => {
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?
                        .parse()
                        .map_err(de::Error::custom)
                } else {
                    <[u8; 32]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}
serde_text_or_bytes!(NodeId);
serde_text_or_bytes!(FederationId);

/// A Raft group: 0 is the meta group, shard `i` is group `i + 1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GroupId(u32);

impl GroupId {
    /// The meta group: members, shard map, settings, invitations.
    pub const META: Self = Self(0);

    /// The group of shard `shard` (counted from 0).
    pub const fn of_shard(shard: u16) -> Self {
        Self(shard as u32 + 1)
    }

    /// The shard this group serves; `None` for the meta group.
    pub const fn shard(self) -> Option<u16> {
        if self.0 == 0 {
            None
        } else {
            Some((self.0 - 1) as u16)
        }
    }

    /// The number on the wire and on disk.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The inverse of [`GroupId::number`].
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shard() {
            None => f.write_str("meta"),
            Some(shard) => write!(f, "shard-{shard}"),
        }
    }
}

/// What an application *is* (DESIGN 13.1): a UUID made by the proposer. A deleted and re-created
/// application of the same name is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AppUid(Uuid);

impl AppUid {
    /// Wraps a UUID.
    pub const fn new(uuid: Uuid) -> Self {
        Self(uuid)
    }

    /// The UUID.
    pub const fn as_uuid(&self) -> &Uuid {
        &self.0
    }
}

impl fmt::Display for AppUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for AppUid {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse()
            .map(Self)
            .map_err(|_| ParseIdError::malformed("application uid", text, "a UUID"))
    }
}

/// The shard of `namespace/name` among `shard_count` shards: the first eight bytes (little endian)
/// of BLAKE3 over `namespace/name`, modulo the count (DESIGN 13.1). Fixed for a federation's life.
///
/// # Panics
/// When `shard_count` is zero; genesis refuses that.
pub fn shard_of(namespace: &str, name: &str, shard_count: u16) -> u16 {
    assert!(shard_count > 0, "a federation has at least one shard");
    let mut hasher = blake3::Hasher::new();
    hasher.update(namespace.as_bytes());
    hasher.update(b"/");
    hasher.update(name.as_bytes());
    let mut first = [0_u8; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    (u64::from_le_bytes(first) % u64::from(shard_count)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_id_prints_as_a_libp2p_peer_id_and_reads_back() {
        let id = NodeId::from_bytes([7; 32]);
        let text = id.to_string();
        assert!(text.starts_with("12D3KooW"), "{text}");
        assert_eq!(text.parse::<NodeId>(), Ok(id));
        assert!("12D3KooWnope".parse::<NodeId>().is_err());
    }

    #[test]
    fn ids_are_text_in_json() {
        let id = NodeId::from_bytes([9; 32]);
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, format!("\"{id}\""));
        assert_eq!(serde_json::from_str::<NodeId>(&json).unwrap(), id);
    }

    #[test]
    fn shard_of_is_fixed_for_ever() {
        // Golden values: changing them would lose every stored application.
        assert_eq!(
            shard_of("default", "shop", 16),
            shard_of("default", "shop", 16)
        );
        let spread: std::collections::BTreeSet<u16> = (0..200)
            .map(|i| shard_of("default", &format!("app-{i}"), 16))
            .collect();
        assert_eq!(spread.len(), 16);
    }

    #[test]
    fn groups_and_shards_correspond() {
        assert_eq!(GroupId::META.shard(), None);
        assert_eq!(GroupId::of_shard(15).shard(), Some(15));
        assert_eq!(GroupId::of_shard(3).to_string(), "shard-3");
    }
}
