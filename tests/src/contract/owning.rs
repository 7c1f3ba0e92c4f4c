//! What an app may not have: what belongs to others, what is older, what the site or Kubernetes does not admit.

use anyhow::{Context as _, Result, ensure};
use krake_driver::{Backend, Code, Workload};
use krake_k8s_driver::{Config, KubernetesBackend};
use serde_json::json;

use super::support::{Site, apply, config_map, delete, deployment, epoch, ready, refused};

pub(super) async fn two_apps_that_want_the_same_object_conflict(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let first = site.app("first", vec![config_map("settings", "1")]);
    apply(&backend, &first).await?;
    let second = site.app("second", vec![config_map("settings", "2")]);
    let name = first.app.to_string();
    refused(
        backend.apply(&second).await,
        Code::Conflict,
        &["settings", &name],
    )?;
    let object = api
        .need(&format!("/api/v1/namespaces/{place}/configmaps/settings"))
        .await?;
    ensure!(object["data"]["key"] == "1", "{object}");
    delete(&backend, &second).await?;
    delete(&backend, &first).await
}

pub(super) async fn what_krake_did_not_make_is_left_alone(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let first = site.app("first", vec![config_map("own", "1")]);
    apply(&backend, &first).await?;
    let path = format!("/api/v1/namespaces/{place}/configmaps");
    api.create(&path, &config_map("foreign", "theirs")).await?;
    let second = site.app("second", vec![config_map("foreign", "ours")]);
    refused(
        backend.apply(&second).await,
        Code::Conflict,
        &["foreign", "not made by Krake"],
    )?;
    delete(&backend, &second).await?;
    let object = api.need(&format!("{path}/foreign")).await?;
    ensure!(object["data"]["key"] == "theirs", "{object}");
    delete(&backend, &first).await
}

pub(super) async fn an_existing_namespace_is_never_adopted(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": place}});
    api.create("/api/v1/namespaces", &namespace).await?;
    let workload = site.app("shop", vec![config_map("settings", "1")]);
    refused(
        backend.apply(&workload).await,
        Code::Conflict,
        &[&place, "not made by Krake"],
    )?;
    let path = format!("/api/v1/namespaces/{place}");
    let labels = &api.need(&path).await?["metadata"]["labels"];
    ensure!(labels["krake.dev/namespace"].is_null(), "{labels}");
    let settings = format!("{path}/configmaps/settings");
    ensure!(api.get(&settings).await?.is_none());
    Ok(())
}

pub(super) async fn an_older_epoch_is_refused_also_after_a_restart(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let mut workload = site.app("shop", vec![config_map("settings", "2")]);
    workload.epoch = epoch(5);
    apply(&backend, &workload).await?;
    let old = Workload {
        epoch: epoch(4),
        components: vec![config_map("settings", "1")],
        ..workload.clone()
    };
    for backend in [backend, site.backend().await?] {
        refused(backend.apply(&old).await, Code::Outdated, &[])?;
        refused(
            backend.delete(old.uid, old.epoch).await,
            Code::Outdated,
            &[],
        )?;
        let seen = ready(&backend, workload.uid).await?;
        ensure!(seen.epoch == epoch(5), "{seen:?}");
    }
    let api = site.api().await?;
    let object = api
        .need(&format!(
            "/api/v1/namespaces/{}/configmaps/settings",
            site.place()
        ))
        .await?;
    ensure!(object["data"]["key"] == "2", "{object}");
    delete(&site.backend().await?, &workload).await
}

pub(super) async fn cluster_scoped_kinds_are_refused(site: Site) -> Result<()> {
    let (backend, api) = (site.backend().await?, site.api().await?);
    let role = json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": {"name": "contract-all"}, "rules": []});
    let workload = site.app("shop", vec![config_map("settings", "1"), role]);
    refused(
        backend.admit(&workload).await,
        Code::Forbidden,
        &["contract-all", "whole cluster"],
    )?;
    refused(
        backend.apply(&workload).await,
        Code::Forbidden,
        &["contract-all", "whole cluster"],
    )?;
    // Nothing at all was made.
    ensure!(
        api.get(&format!("/api/v1/namespaces/{}", site.place()))
            .await?
            .is_none()
    );
    let path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/contract-all";
    ensure!(api.get(path).await?.is_none());
    Ok(())
}

pub(super) async fn denied_kinds_are_refused(site: Site) -> Result<()> {
    let backend = KubernetesBackend::new(Config {
        denied_kinds: vec!["Secret".to_owned(), "apps/StatefulSet".to_owned()],
        ..site.config()
    })
    .await?;
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}});
    let workload = site.app("shop", vec![config_map("settings", "1"), secret]);
    refused(backend.admit(&workload).await, Code::Forbidden, &["Secret"])?;
    refused(backend.apply(&workload).await, Code::Forbidden, &["Secret"])?;
    let api = site.api().await?;
    ensure!(
        api.get(&format!("/api/v1/namespaces/{}", site.place()))
            .await?
            .is_none()
    );
    Ok(())
}

pub(super) async fn an_unknown_kind_is_unsupported(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let object =
        json!({"apiVersion": "nowhere.example.org/v1", "kind": "Thing", "metadata": {"name": "t"}});
    let workload = site.app("shop", vec![object]);
    refused(
        backend.apply(&workload).await,
        Code::Unsupported,
        &["Thing"],
    )
}

pub(super) async fn a_wrong_manifest_is_invalid(site: Site) -> Result<()> {
    let backend = site.backend().await?;
    let mut no_template = deployment("web", 1, "x:1", "10m");
    no_template["spec"]["template"] = json!({});
    let mut bad_name = config_map("settings", "1");
    bad_name["metadata"]["name"] = "No_Good".into();
    let mut wrong_type = config_map("settings", "1");
    wrong_type["data"] = "text".into();
    let mut unmatched = deployment("web", 1, "x:1", "10m");
    unmatched["spec"]["selector"]["matchLabels"] = json!({"app": "other"});
    let nameless = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {}});
    let mut unknown = deployment("web", 1, "x:1", "10m");
    unknown["spec"]["replica"] = 3.into();
    for (what, component) in [
        ("no template", no_template),
        ("bad name", bad_name),
        ("wrong type", wrong_type),
        ("selector", unmatched),
        ("no name", nameless),
        ("unknown field", unknown),
    ] {
        let workload = site.app("shop", vec![component]);
        refused(backend.apply(&workload).await, Code::Invalid, &[]).context(what)?;
        delete(&backend, &workload).await?;
    }
    Ok(())
}
