//! Krake's words (DESIGN §2) as types: identities, epochs, revisions, records and their codecs.
//!
//! This is the leaf crate of the workspace. It owns every type that crosses a crate, a wire or a
//! disk, and the one codec module ([`codec`]). It does no IO, reads no clock and draws no
//! randomness: whoever needs those passes them in.

pub mod application;
pub mod codec;
pub mod decision;
pub mod epoch;
pub mod ids;
pub mod member;
pub mod metric;
pub mod report;
pub mod resources;
pub mod revision;
pub mod time;

pub use application::{AppKey, ApplicationSpec};
pub use decision::DecisionRecord;
pub use epoch::Epoch;
pub use ids::{AppUid, FederationId, GroupId, NodeId};
pub use member::{Genesis, Invitation, Member, SiteRecord};
pub use metric::MetricDefinition;
pub use report::{SignedReport, SiteReport};
pub use resources::Resources;
pub use revision::Revision;
pub use time::Timestamp;
