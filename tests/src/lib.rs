//! What the end-to-end tests and the benchmark share: a testnet of real processes, driven through
//! its own command line as a user would, and kubectl.
#![allow(
    clippy::missing_panics_doc,
    reason = "a test that cannot go on stops with the reason"
)]

pub mod contract;
pub mod differential;
pub mod testnet;

pub use testnet::{Site, Testnet, kubectls, program, refused, run_within, succeeded, wait_for};
