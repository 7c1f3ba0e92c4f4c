//! What a site says of itself, signed (DESIGN §2 *report*).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::codec::{self, CodecError};
use crate::ids::{FederationId, NodeId};
use crate::resources::Resources;
use crate::time::Timestamp;

/// Version byte of a report on the wire and on disk.
const REPORT_VERSION: u8 = 2;
/// A signed report is at most this large.
pub const REPORT_BYTES_MAX: usize = 64 * 1024;
/// Round-trip times in one report at most: a report fits into one packet or two.
pub const RTTS_MAX: usize = 8;
/// Separates signatures of reports from any other signature by the same key.
const SIGNATURE_DOMAIN: &[u8] = b"krake-report-v1";

/// A site's report: the newest one of each site is the *view*.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SiteReport {
    /// Who reports.
    pub node: NodeId,
    /// Counts the node's starts, persisted: a restarted node's reports are newer (DESIGN 13.10).
    pub boot: u64,
    /// Counts the reports since the start.
    pub sequence: u64,
    /// The reporter's clock when the values were observed.
    pub observed_at: Timestamp,
    /// Raw values in the units of the metric definitions, by metric name.
    pub metrics: BTreeMap<String, f64>,
    /// Backends by name (`default` always exists), with capacity.
    pub backends: BTreeMap<String, BackendReport>,
    /// Smoothed round-trip times to other nodes in microseconds; to [`RTTS_MAX`] of them at most,
    /// in turns.
    pub rtts_micros: BTreeMap<NodeId, u64>,
    /// Members this node has not heard of lately, with the silence in milliseconds: one opinion,
    /// not a verdict.
    pub unreachable: BTreeMap<NodeId, u64>,
    /// The program's version.
    pub version: String,
}

/// One backend in a report.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendReport {
    /// Whether its API answers.
    pub healthy: bool,
    /// A sentence when it does not.
    pub message: String,
    /// What it has in all.
    pub total: Resources,
    /// What is not used and not reserved.
    pub free: Resources,
    /// What is held by reservations and assignments that do not run yet.
    pub reserved: Resources,
}

impl SiteReport {
    /// (boot, sequence): newest wins.
    pub const fn freshness(&self) -> (u64, u64) {
        (self.boot, self.sequence)
    }
}

/// A report as it travels: the encoded bytes and the reporter's signature over them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedReport {
    /// `version byte + bincode` of [`SiteReport`].
    pub payload: Vec<u8>,
    /// Ed25519 over domain tag, federation id and payload, in two halves (serde has no 64-array).
    pub signature: [[u8; 32]; 2],
}

/// A report is not acceptable.
#[derive(Debug, Error)]
pub enum ReportError {
    /// It cannot be decoded.
    #[error("the report cannot be decoded")]
    Codec(#[from] CodecError),
    /// The signature is not that of the node it names.
    #[error("the report of {node} is not signed by it")]
    Signature {
        /// The node named.
        node: NodeId,
    },
    /// A value is no number, or a collection is too long.
    #[error("the report of {node} is out of bounds: {what}")]
    Bounds {
        /// The node named.
        node: NodeId,
        /// What is wrong.
        what: String,
    },
}

/// The bytes a report's signature covers.
fn signed_bytes(federation: &FederationId, payload: &[u8]) -> Vec<u8> {
    [SIGNATURE_DOMAIN, federation.as_bytes(), payload].concat()
}

impl SignedReport {
    /// Encodes and signs; `sign` is Ed25519 with the reporter's key.
    ///
    /// # Errors
    /// When the report cannot be encoded.
    pub fn sign(
        report: &SiteReport,
        federation: &FederationId,
        sign: impl FnOnce(&[u8]) -> [u8; 64],
    ) -> Result<Self, CodecError> {
        let payload = codec::encode(REPORT_VERSION, report)?;
        let signature = sign(&signed_bytes(federation, &payload));
        Ok(Self {
            payload,
            signature: crate::member::halves(&signature),
        })
    }

    /// Decodes and verifies.
    ///
    /// # Errors
    /// When it is damaged, out of bounds, or not signed by the node it names.
    pub fn open(&self, federation: &FederationId) -> Result<SiteReport, ReportError> {
        let report: SiteReport = codec::decode(REPORT_VERSION, &self.payload, REPORT_BYTES_MAX)?;
        let signature = crate::member::joined(&self.signature);
        if !report
            .node
            .verify(&signed_bytes(federation, &self.payload), &signature)
        {
            return Err(ReportError::Signature { node: report.node });
        }
        report.check_bounds()?;
        Ok(report)
    }
}

impl SiteReport {
    fn check_bounds(&self) -> Result<(), ReportError> {
        let error = |what: String| {
            Err(ReportError::Bounds {
                node: self.node,
                what,
            })
        };
        if self.metrics.len() > 64 || self.backends.len() > 16 {
            return error("more than 64 metrics or 16 backends".to_owned());
        }
        if let Some((name, _)) = self.metrics.iter().find(|(_, value)| !value.is_finite()) {
            return error(format!("metric `{name}` is not a finite number"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::{Signer, SigningKey};

    use super::*;

    fn report(key: &SigningKey) -> SiteReport {
        SiteReport {
            node: NodeId::from_bytes(key.verifying_key().to_bytes()),
            boot: 1,
            sequence: 2,
            observed_at: Timestamp::from_millis(3),
            metrics: BTreeMap::from([("carbon".to_owned(), 21.0)]),
            backends: BTreeMap::new(),
            rtts_micros: BTreeMap::new(),
            unreachable: BTreeMap::new(),
            version: "0.1.0".to_owned(),
        }
    }

    #[test]
    fn a_report_is_bound_to_its_author_and_federation() {
        let key = SigningKey::from_bytes(&[1; 32]);
        let federation = FederationId::from_bytes([2; 32]);
        let signed =
            SignedReport::sign(&report(&key), &federation, |m| key.sign(m).to_bytes()).unwrap();
        assert_eq!(signed.open(&federation).unwrap(), report(&key));
        let elsewhere = FederationId::from_bytes([3; 32]);
        assert!(matches!(
            signed.open(&elsewhere),
            Err(ReportError::Signature { .. })
        ));
        let mut forged = signed.clone();
        *forged.payload.last_mut().unwrap() ^= 1;
        assert!(forged.open(&federation).is_err());
    }

    #[test]
    fn a_value_that_is_no_number_is_refused() {
        let key = SigningKey::from_bytes(&[1; 32]);
        let federation = FederationId::from_bytes([2; 32]);
        let mut bad = report(&key);
        bad.metrics.insert("price".to_owned(), f64::NAN);
        let signed = SignedReport::sign(&bad, &federation, |m| key.sign(m).to_bytes()).unwrap();
        assert!(matches!(
            signed.open(&federation),
            Err(ReportError::Bounds { .. })
        ));
    }
}
