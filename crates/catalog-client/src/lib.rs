//! The catalog's own protocol over a node's API listeners, and its client.
//!
//! [`protocol`] has the frames, which the node reads too; [`client`] is for programs that keep
//! small records of their own in the federation, under `kv/NAMESPACE/NAME`.

pub mod client;
pub mod protocol;

pub use client::{CatalogClient, CatalogError, Endpoint, Watch};
