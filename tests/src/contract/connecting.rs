//! Clusters that cannot be reached.

use std::path::Path;

use anyhow::Result;
use krake_driver::{Backend, Code};
use krake_k8s_driver::{Config, KubernetesBackend};

use super::support::{Site, config_map, refused};

pub(super) async fn a_kubeconfig_that_points_nowhere_is_named(site: Site) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let missing = scratch.path().join("missing");
    let broken = scratch.path().join("broken");
    std::fs::write(&broken, "clusters: [")?;
    for path in [missing, broken] {
        let config = Config {
            kubeconfig: Some(path.clone()),
            ..site.config()
        };
        let name = path.display().to_string();
        refused(
            KubernetesBackend::new(config).await,
            Code::Unreachable,
            &[&name],
        )?;
    }
    Ok(())
}

/// The kubeconfig with another server or token.
async fn altered(
    site: &Site,
    path: &Path,
    alter: impl FnOnce(&mut kube::config::Kubeconfig),
) -> Result<KubernetesBackend> {
    let mut kubeconfig = kube::config::Kubeconfig::read_from(&site.kubeconfig)?;
    alter(&mut kubeconfig);
    std::fs::write(path, serde_json::to_string(&kubeconfig)?)?;
    let config = Config {
        kubeconfig: Some(path.to_owned()),
        ..site.config()
    };
    Ok(KubernetesBackend::new(config).await?)
}

pub(super) async fn an_api_that_does_not_answer_is_unreachable(site: Site) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    // Bound and never accepted from; the second is closed at once.
    let silent = std::net::TcpListener::bind("127.0.0.1:0")?;
    let closed = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    for address in [closed, silent.local_addr()?] {
        let path = scratch.path().join("kubeconfig");
        let backend = altered(&site, &path, |kubeconfig| {
            for cluster in &mut kubeconfig.clusters {
                if let Some(cluster) = &mut cluster.cluster {
                    cluster.server = Some(format!("https://{address}"));
                }
            }
        })
        .await?;
        let workload = site.app("shop", vec![config_map("settings", "1")]);
        let (inventory, observed, applied) = tokio::join!(
            backend.inventory(),
            backend.observe(),
            backend.apply(&workload)
        );
        refused(inventory, Code::Unreachable, &[])?;
        refused(observed, Code::Unreachable, &[])?;
        refused(applied, Code::Unreachable, &[])?;
    }
    Ok(())
}

pub(super) async fn a_wrong_token_is_unreachable(site: Site) -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let path = scratch.path().join("kubeconfig");
    let backend = altered(&site, &path, |kubeconfig| {
        for user in &mut kubeconfig.auth_infos {
            if let Some(user) = &mut user.auth_info {
                user.token = Some("wrong".to_owned().into());
                user.client_certificate = None;
                user.client_certificate_data = None;
                user.client_key = None;
                user.client_key_data = None;
            }
        }
    })
    .await?;
    refused(backend.observe().await, Code::Unreachable, &[])
}
