//! Manifests.
pub mod yaml;
