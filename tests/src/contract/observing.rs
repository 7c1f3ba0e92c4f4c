//! What the driver tells of what runs.

use anyhow::{Context as _, Result, ensure};
use krake_driver::{Backend, Phase};

use super::support::{Site, WITHIN, apply, delete, deployment, epoch, eventually, ready};

pub(super) async fn a_restarted_driver_sees_what_runs(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let mut workload = site.app("shop", vec![deployment("web", 1, "x:1", "10m")]);
    workload.epoch = epoch(9);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    drop(backend);
    let backend = site.backend().await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!(
        seen.epoch == epoch(9) && seen.app == workload.app,
        "{seen:?}"
    );
    let all = backend.observe().await?;
    ensure!(all.iter().any(|seen| seen.uid == workload.uid), "{all:?}");
    delete(&backend, &workload).await
}

pub(super) async fn changes_are_told(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let mut changes = backend.changes();
    let workload = site.app("shop", vec![deployment("web", 1, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    // Only looks when told to: a change that is not told is never seen.
    let wait = async {
        loop {
            match backend.observe_one(workload.uid).await? {
                Some(seen) if seen.phase == Phase::Ready => return anyhow::Ok(()),
                _ => {}
            }
            while changes.recv().await? != workload.uid {}
        }
    };
    tokio::time::timeout(WITHIN, wait)
        .await
        .context("no change was told")??;
    delete(&backend, &workload).await
}

pub(super) async fn the_inventory_counts_what_pods_request(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let inventory = backend.inventory().await?;
    ensure!(
        inventory.total.cpu_millis > 0 && inventory.total.memory_bytes > 0,
        "{inventory:?}"
    );
    ensure!(inventory.kinds.contains(&"apps/v1/Deployment".to_owned()));
    ensure!(inventory.kinds.contains(&"v1/ConfigMap".to_owned()));
    // Other cases run pods too, but none that requests so much.
    let workload = site.app("shop", vec![deployment("web", 2, "x:1", "1500m")]);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    eventually("the room is taken", || async {
        let used = backend.inventory().await?;
        let taken = used.total.cpu_millis - used.free.cpu_millis;
        ensure!(taken < 6000, "{used:?}");
        Ok((taken >= 3000).then_some(()))
    })
    .await?;
    delete(&backend, &workload).await?;
    eventually("the room is free again", || async {
        let now = backend.inventory().await?;
        Ok((now.total.cpu_millis - now.free.cpu_millis < 3000).then_some(()))
    })
    .await
}
