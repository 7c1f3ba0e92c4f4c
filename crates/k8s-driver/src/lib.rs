//! The Kubernetes driver: one cluster as a [`krake_driver::Backend`].
//!
//! Manifests are applied by server-side apply (KEP-555) as field manager `krake`; every object
//! carries the app's UID as a label, and a `ConfigMap` per app (the ledger) lists what was applied,
//! so that what a later version no longer has is removed, also after a crash. Labelled objects are
//! watched: readiness and drift come from the watch, not from polling.

mod backend;
mod cache;
mod capacity;
mod cluster;
mod ledger;
mod readiness;

pub use crate::backend::{Config, KubernetesBackend};
pub use crate::ledger::UID_LABEL;
