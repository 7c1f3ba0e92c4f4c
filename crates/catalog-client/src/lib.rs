//! The catalog's own protocol over a node's API listeners, and its client.
//!
//! [`protocol`] has the frames, which the node reads too; [`client`] is for programs that keep
//! small records of their own in the federation, under `kv/NAMESPACE/NAME`; [`pool`] asks several
//! nodes, each for what it leads, and goes on while one of them is there.

pub mod client;
pub mod pool;
pub mod protocol;

pub use client::{CatalogClient, CatalogError, Endpoint, Event, Page, StaleValue, Watch};
pub use pool::{CatalogPool, PoolWatch};
