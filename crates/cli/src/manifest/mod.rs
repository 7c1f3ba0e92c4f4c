//! Manifests: reading them with their places, and checking them before they are sent.

pub mod check;
pub mod load;
pub mod yaml;

pub use load::{Document, Wrap};
