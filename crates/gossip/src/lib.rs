//! The federation's network: libp2p over QUIC and TCP, for members only.
//!
//! Carries consensus frames (one ordered stream per peer), calls (one stream per asker), signed
//! site reports (gossipsub, plus an exchange that makes up for what was missed), measures
//! round-trip times and silence, and lets a newcomer ask to join.

mod behaviour;
mod calls;
mod network;
mod pace;
mod streams;
mod verdict;
mod view;

pub use crate::network::{Handler, Network, NetworkConfig, NetworkError, Peer, Traffic};
pub use crate::pace::{report_interval, report_spacing, suspect_after};
pub use crate::streams::{CALL_BYTES_MAX, CallError};
pub use crate::verdict::{Opinions, Verdict, verdict};
pub use crate::view::{Seen, View};
