//! A Kubernetes API in memory, for `--kube embedded`.

use std::net::SocketAddr;
use std::path::PathBuf;

/// What one embedded cluster needs to know.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Where it keeps its objects, its token and its kubeconfig (`kubeconfig`).
    #[arg(long)]
    pub dir: PathBuf,
    /// Where it listens (loopback).
    #[arg(long)]
    pub listen: SocketAddr,
    /// CPU of its nodes in all (a quantity).
    #[arg(long, default_value = "16")]
    pub cpu: String,
    /// Memory of its nodes in all (a quantity).
    #[arg(long, default_value = "64Gi")]
    pub memory: String,
    /// Pods its nodes can run in all.
    #[arg(long, default_value_t = 440)]
    pub pods: u64,
}

/// Serves until SIGTERM or SIGINT.
///
/// # Errors
/// When the directory cannot be used or the address is taken.
pub async fn run(options: Options) -> anyhow::Result<()> {
    anyhow::bail!("not built yet: {}", options.dir.display())
}
