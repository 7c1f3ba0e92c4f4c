//! krake-testnet: a whole federation on one machine, with embedded or real Kubernetes, and faults.
//!
//! [`Testnet`] is for tests and benchmarks; the program is a thin layer over it.

pub mod client;
pub mod embedded;
pub mod kube;
pub mod ports;
pub mod process;
pub mod profile;
pub mod programs;
pub mod progress;
mod site;
pub mod state;
mod testnet;

pub use testnet::{
    CONTEXT, DEMO, Death, SITES, Site, Stopped, Testnet, UpOptions, down, is_ready, logs, sites,
};
