//! krake-testnet: a whole federation on one machine, with embedded or real Kubernetes, and faults.

pub mod embedded;
pub mod kube;
pub mod ports;
pub mod process;
pub mod progress;
