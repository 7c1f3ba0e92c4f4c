//! What is removed is gone, also after something was removed meanwhile or never written.

use anyhow::{Result, bail, ensure};
use krake_driver::{Backend, Deletion, Phase, Workload};
use krake_model::AppKey;
use serde_json::json;

use super::support::{
    Site, UID_LABEL, apply, config_map, delete, deployment, eventually, observed, ready,
};

pub(super) async fn a_deletion_waits_for_finalizers_and_leaves_nothing(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let mut held = config_map("held", "1");
    held["metadata"]["finalizers"] = json!(["example.org/wait"]);
    let workload = site.app("shop", vec![held, deployment("web", 2, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let left = eventually("only the held object is left", || async {
        match backend.delete(workload.uid, workload.epoch).await? {
            Deletion::InProgress(left) if left.len() == 1 => Ok(Some(left)),
            Deletion::InProgress(_) => Ok(None),
            Deletion::Gone => bail!("it is gone in spite of a finalizer"),
        }
    })
    .await?;
    ensure!(left[0].contains("held"), "{left:?}");
    let path = format!("/api/v1/namespaces/{place}/configmaps/held");
    api.merge(&path, &json!({"metadata": {"finalizers": null}}))
        .await?;
    delete(&backend, &workload).await?;
    ensure!(backend.observe_one(workload.uid).await?.is_none());
    for kind in ["api/v1|configmaps", "apis/apps/v1|deployments"] {
        let (group, plural) = kind.split_once('|').unwrap_or_default();
        let path = format!("/{group}/namespaces/{place}/{plural}?labelSelector={UID_LABEL}");
        let list = api.need(&path).await?;
        ensure!(
            list["items"].as_array().is_some_and(Vec::is_empty),
            "{list}"
        );
    }
    eventually("no pod is left", || async {
        let list = api
            .need(&format!("/api/v1/namespaces/{place}/pods"))
            .await?;
        Ok(list["items"]
            .as_array()
            .is_some_and(Vec::is_empty)
            .then_some(()))
    })
    .await?;
    // Deleting again is no error.
    ensure!(backend.delete(workload.uid, workload.epoch).await? == Deletion::Gone);
    eventually("the namespace goes", || async {
        // Another case's driver may have removed it first.
        match backend.tidy().await {
            Ok(()) => {}
            Err(error) if error.code.is_temporary() => {}
            Err(error) => return Err(error.into()),
        }
        let found = api.get(&format!("/api/v1/namespaces/{place}")).await?;
        Ok(found.is_none().then_some(()))
    })
    .await
}

pub(super) async fn a_deletion_ends_when_the_namespace_is_gone(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.shop();
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let path = format!("/api/v1/namespaces/{place}");
    api.delete(&path).await?;
    eventually("the namespace is gone", || async {
        Ok(api.get(&path).await?.is_none().then_some(()))
    })
    .await?;
    delete(&backend, &workload).await
}

pub(super) async fn an_app_comes_back_after_its_namespace_was_removed(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app("shop", vec![deployment("web", 1, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    api.delete(&format!("/api/v1/namespaces/{place}")).await?;
    observed(&backend, workload.uid, "drift is noticed", |seen| {
        seen.drifted
    })
    .await?;
    // As a node does: apply whenever something is not as it was applied.
    eventually("the app is ready again", || async {
        let seen = backend.observe_one(workload.uid).await?;
        if seen.as_ref().is_none_or(|seen| seen.drifted) {
            return match backend.apply(&workload).await {
                Err(error) if !error.code.is_temporary() => Err(error.into()),
                _ => Ok(None),
            };
        }
        Ok(seen.filter(|seen| seen.phase == Phase::Ready))
    })
    .await?;
    // Its ledger is there again too.
    let restarted = site.backend().await?;
    ready(&restarted, workload.uid).await?;
    delete(&backend, &workload).await
}

pub(super) async fn a_first_apply_that_was_cut_short_is_removed(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app("shop", vec![config_map("settings", "1")]);
    apply(&backend, &workload).await?;
    drop(backend);
    // As if the node had ended before the ledger was there.
    let uid = workload.uid;
    let ledgers = format!("/api/v1/namespaces/{place}/configmaps");
    api.delete(&format!("{ledgers}/krake-app-{uid}")).await?;
    let backend = site.backend().await?;
    let seen = backend.observe_one(uid).await?;
    ensure!(seen.is_none(), "without a ledger {seen:?} was seen");
    backend.adopt(&workload).await?;
    delete(&backend, &workload).await?;
    ensure!(
        api.get(&format!("{ledgers}/settings")).await?.is_none()
            && api
                .get(&format!("{ledgers}/krake-app-{uid}"))
                .await?
                .is_none(),
        "something was left"
    );
    // Of what never got to the cluster there is nothing to remove.
    let never = Workload {
        app: AppKey::new("nowhere", "shop"),
        ..site.app("shop", vec![config_map("settings", "1")])
    };
    backend.adopt(&never).await?;
    delete(&backend, &never).await
}
