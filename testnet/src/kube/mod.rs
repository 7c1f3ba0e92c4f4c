//! Real Kubernetes without containers: etcd, API server, controller manager, scheduler, and kwok
//! as the kubelets. For `--kube real` and for tests.

mod assets;
mod cluster;

pub use assets::{Assets, MODULES, Module, VERSION, assets, directory, wanted};
pub use cluster::{Capacity, Ports, RealCluster};
