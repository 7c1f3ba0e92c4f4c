//! The node: one process per site, with the catalog's replicas, the owner of the shards it leads,
//! the site's agent and the API.

pub mod admission;
pub mod api;
pub mod backup;
pub mod catalog;
pub mod catalog_api;
pub mod config;
pub mod consensus;
pub mod datadir;
pub mod federation;
pub mod kinds;
pub mod leave;
pub mod limits;
pub mod membership;
mod merge;
pub mod metrics;
pub mod net;
pub mod owner;
pub mod records;
pub mod rpc;
pub mod run;
pub mod site;
pub mod store;
