//! What nodes ask one another, apart from consensus: one request, one reply, in bincode.
//!
//! Payloads that hold JSON values travel as JSON bytes inside (bincode cannot decode them).

use krake_model::codec::{self, CodecError};
use krake_model::member::SignedInvitation;
use krake_model::{AppUid, Member, NodeId, Resources, SiteRecord, Timestamp};
use serde::{Deserialize, Serialize};

use crate::records::Departure;

const VERSION: u8 = 1;
/// Largest request or reply (DESIGN 13.2 bounds an application at 512 KiB).
const BYTES_MAX: usize = 2 * 1024 * 1024;

/// A request between members.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Request {
    /// To a site: hold capacity for an app.
    Reserve(Reserve),
    /// To an owner: JSON of [`crate::records::CopyReport`]s.
    Copies(Vec<Vec<u8>>),
    /// To any member: who the members are.
    Members,
    /// To any member, from a member that has lost its catalog: it needs another replica id.
    Readmit,
    /// To any member: whether its groups know that this one gives its votes away. The answer is
    /// [`Reply::Noted`].
    GivesVotes(NodeId),
}

/// A reply between members.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// The capacity is held until the site's deadline.
    Reserved,
    /// The site says no, and why.
    Refused {
        /// For people, with the numbers.
        reason: String,
    },
    /// Taken note of; `owned` says for each report whether this node owns the app.
    Noted(Vec<bool>),
    /// The members this node knows.
    Members(Vec<Member>),
    /// The request could not be understood or handled.
    Error {
        /// Why.
        message: String,
    },
    /// The member's new replica id, and who the members are now.
    Readmitted {
        /// Counted by the meta group; nobody ever had it.
        replica: u64,
        /// All members, the asker included.
        members: Vec<Member>,
    },
}

/// Asks a site for capacity.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reserve {
    /// The app's identity.
    pub uid: AppUid,
    /// `namespace/name`, for messages.
    pub app: (String, String),
    /// Which backend.
    pub backend: String,
    /// What it needs.
    pub needs: Resources,
    /// The Raft term of the owner: fences reservations (DESIGN 13.7).
    pub term: u64,
    /// The app's generation.
    pub generation: i64,
    /// The manifests as JSON: the site's policy admits or refuses them.
    pub manifests: Vec<u8>,
}

/// What a node asks that need not be a member.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Knock {
    /// To become one.
    Join(Box<JoinRequest>),
    /// Whether it left: a member that was away may not have heard of it.
    Standing,
}

/// What a joining node sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JoinRequest {
    /// The invitation.
    pub invitation: SignedInvitation,
    /// Who joins.
    pub node: NodeId,
    /// Its site.
    pub site: SiteRecord,
    /// Its addresses.
    pub addresses: Vec<String>,
    /// Signature by `node` over [`krake_model::member::join_proof_bytes`], in halves.
    pub proof: [[u8; 32]; 2],
}

/// What it gets.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum JoinReply {
    /// It is a member now.
    Admitted {
        /// The encoded genesis record.
        genesis: Vec<u8>,
        /// Its Raft replica id.
        replica: u64,
        /// All members, itself included.
        members: Vec<Member>,
    },
    /// It is not, and why.
    Refused {
        /// A stable code, such as `krake::token-used`.
        code: String,
        /// For people.
        message: String,
    },
    /// It left the federation.
    Left(Departure),
    /// It did not, as far as is known here.
    NotLeft,
}

impl JoinRequest {
    /// The bytes of the site that the proof covers.
    ///
    /// # Errors
    /// When the site cannot be encoded.
    pub fn site_bytes(site: &SiteRecord, addresses: &[String]) -> Result<Vec<u8>, CodecError> {
        codec::encode(VERSION, &(site, addresses))
    }
}

/// Encodes a message.
///
/// # Errors
/// When it is too large.
pub fn encode<T: Serialize>(message: &T) -> Result<bytes::Bytes, CodecError> {
    codec::encode(VERSION, message).map(bytes::Bytes::from)
}

/// Decodes a message.
///
/// # Errors
/// When it is damaged, of another version, or too large.
pub fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    codec::decode(VERSION, bytes, BYTES_MAX)
}

/// The moment until which a token is accepted: its expiry plus the tolerated difference of clocks
/// (DESIGN 13.10).
pub const fn accepted_until(expires_at: Timestamp) -> Timestamp {
    expires_at.plus_millis(2 * 60 * 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire_and_garbage_does_not() {
        let request = Request::Reserve(Reserve {
            uid: AppUid::new(uuid::Uuid::from_u128(7)),
            app: ("default".into(), "shop".into()),
            backend: "default".into(),
            needs: Resources {
                cpu_millis: 1,
                memory_bytes: 2,
                pods: 3,
            },
            term: 4,
            generation: 5,
            manifests: b"[]".to_vec(),
        });
        let bytes = encode(&request).unwrap();
        assert_eq!(decode::<Request>(&bytes).unwrap(), request);
        assert!(decode::<Request>(&bytes[..bytes.len() - 1]).is_err());
        assert!(decode::<Reply>(b"\x01\xff\xff\xff\xff").is_err());
    }
}
