//! What is applied is there, and stays as it was applied.

use anyhow::{Result, ensure};
use krake_driver::{Backend, Code, Phase};
use krake_k8s_driver::{Config, KubernetesBackend};
use serde_json::{Value, json};

use super::support::{
    Site, UID_LABEL, apply, config_map, custom, definition, delete, deployment, epoch, eventually,
    observed, ready,
};

pub(super) async fn six_kinds_become_ready(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let mut set = deployment("db", 1, "x:1", "10m");
    set["kind"] = "StatefulSet".into();
    set["spec"]["serviceName"] = "db".into();
    let backend_service = json!({"service": {"name": "web", "port": {"number": 80}}});
    let workload = site.app("shop", vec![
        deployment("web", 2, "x:1", "10m"),
        set,
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}),
        config_map("settings", "1"),
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "key"}, "stringData": {"key": "s"}}),
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {"name": "web"},
            "spec": {"rules": [{"host": "shop.example.org", "http": {"paths": [
                {"path": "/", "pathType": "Prefix", "backend": backend_service}]}}]}}),
    ]);
    apply(&backend, &workload).await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!((seen.ready, seen.wanted) == (3, 3), "{seen:?}");
    ensure!(seen.namespace == place, "{seen:?}");
    ensure!(!seen.drifted && seen.message.is_none(), "{seen:?}");
    for path in [
        "apis/apps/v1/namespaces/{}/deployments/web",
        "apis/apps/v1/namespaces/{}/statefulsets/db",
        "api/v1/namespaces/{}/services/web",
        "api/v1/namespaces/{}/configmaps/settings",
        "api/v1/namespaces/{}/secrets/key",
        "apis/networking.k8s.io/v1/namespaces/{}/ingresses/web",
    ] {
        let object = api
            .need(&format!("/{}", path.replace("{}", &place)))
            .await?;
        let metadata = &object["metadata"];
        ensure!(
            metadata["labels"][UID_LABEL] == workload.uid.to_string(),
            "{object}"
        );
        ensure!(
            metadata["annotations"]["krake.dev/app"] == workload.app.to_string(),
            "{object}"
        );
    }
    let service = api
        .need(&format!("/api/v1/namespaces/{place}/services/web"))
        .await?;
    ensure!(service["spec"]["clusterIP"].is_string(), "{service}");
    delete(&backend, &workload).await
}

pub(super) async fn applying_again_changes_nothing(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app(
        "shop",
        vec![
            deployment("web", 1, "x:1", "10m"),
            config_map("settings", "1"),
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]}}),
        ],
    );
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let look = || async {
        let mut seen = Vec::new();
        for path in ["services/web", "configmaps/settings"] {
            let object = api
                .need(&format!("/api/v1/namespaces/{place}/{path}"))
                .await?;
            seen.push(object["metadata"]["resourceVersion"].clone());
        }
        let web = format!("/apis/apps/v1/namespaces/{place}/deployments/web");
        seen.push(api.need(&web).await?["metadata"]["generation"].clone());
        anyhow::Ok(seen)
    };
    let before = look().await?;
    for _ in 0..3 {
        backend.apply(&workload).await?;
    }
    let after = look().await?;
    ensure!(before == after, "{before:?} became {after:?}");
    let seen = ready(&backend, workload.uid).await?;
    ensure!(!seen.drifted, "{seen:?}");
    delete(&backend, &workload).await
}

pub(super) async fn custom_objects_are_applied(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
    api.create(definitions, &definition("gears", "Gear"))
        .await?;
    let workload = site.app(
        "machine",
        vec![custom("Gear", "a"), config_map("settings", "1")],
    );
    eventually("the kind is served", || async {
        match backend.apply(&workload).await {
            Ok(()) => Ok(Some(())),
            Err(error) if error.code == Code::Unsupported || error.code.is_temporary() => Ok(None),
            Err(error) => Err(error.into()),
        }
    })
    .await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!((seen.ready, seen.wanted) == (2, 2), "{seen:?}");
    let gear = format!("/apis/contract.example.org/v1/namespaces/{place}/gears/a");
    ensure!(api.need(&gear).await?["spec"]["size"] == 3);
    let kinds = backend.inventory().await?.kinds;
    ensure!(kinds.contains(&"contract.example.org/v1/Gear".to_owned()));
    // Without its definition nothing of it is left, which the driver must be able to tell.
    api.delete(&format!("{definitions}/gears.contract.example.org"))
        .await?;
    delete(&backend, &workload).await
}

pub(super) async fn a_definition_and_its_objects_come_together(site: Site) -> Result<()> {
    let (api, place) = (site.api().await?, site.place());
    let backend = KubernetesBackend::new(Config {
        cluster_scoped_kinds: vec!["apiextensions.k8s.io/CustomResourceDefinition".to_owned()],
        ..site.config()
    })
    .await?;
    let workload = site.app(
        "machine",
        vec![custom("Wheel", "a"), definition("wheels", "Wheel")],
    );
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let wheel = format!("/apis/contract.example.org/v1/namespaces/{place}/wheels/a");
    ensure!(api.need(&wheel).await?["spec"]["size"] == 3);
    delete(&backend, &workload).await?;
    let definition =
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/wheels.contract.example.org";
    ensure!(api.get(definition).await?.is_none());
    Ok(())
}

pub(super) async fn what_a_new_version_lacks_is_removed(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let mut workload = site.app("shop", vec![config_map("a", "1"), config_map("b", "1")]);
    apply(&backend, &workload).await?;
    workload.epoch = epoch(2);
    workload.components = vec![config_map("b", "2"), config_map("c", "1")];
    apply(&backend, &workload).await?;
    let path = |name: &str| format!("/api/v1/namespaces/{place}/configmaps/{name}");
    ensure!(api.get(&path("a")).await?.is_none(), "a is still there");
    ensure!(api.need(&path("b")).await?["data"]["key"] == "2");
    ensure!(api.need(&path("c")).await?["data"]["key"] == "1");
    let seen = ready(&backend, workload.uid).await?;
    ensure!(seen.epoch == epoch(2) && seen.wanted == 2, "{seen:?}");
    delete(&backend, &workload).await
}

pub(super) async fn drift_is_noticed_and_repaired(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.shop();
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    let web = format!("/apis/apps/v1/namespaces/{place}/deployments/web");
    let settings = format!("/api/v1/namespaces/{place}/configmaps/settings");
    let drifted = || {
        observed(&backend, workload.uid, "drift is noticed", |seen| {
            seen.drifted
        })
    };

    api.merge(&settings, &json!({"data": {"key": "other"}}))
        .await?;
    drifted().await?;
    apply(&backend, &workload).await?;
    ensure!(api.need(&settings).await?["data"]["key"] == "1");

    let image = json!([{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "evil:1"}]);
    api.send("PATCH", &web, "application/json-patch+json", &image)
        .await?;
    drifted().await?;
    apply(&backend, &workload).await?;
    let object = api.need(&web).await?;
    ensure!(
        object["spec"]["template"]["spec"]["containers"][0]["image"] == "x:1",
        "{object}"
    );

    api.delete(&settings).await?;
    drifted().await?;
    apply(&backend, &workload).await?;
    api.need(&settings).await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!(!seen.drifted, "{seen:?}");
    delete(&backend, &workload).await
}

pub(super) async fn fields_of_others_stay(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app("shop", vec![deployment("web", 1, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    let web = format!("/apis/apps/v1/namespaces/{place}/deployments/web");
    let side = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web", "annotations": {"note": "mine"}},
        "spec": {"template": {"spec": {"containers": [{"name": "side", "image": "s:1"}]}}}});
    let path = format!("{web}?fieldManager=mesh");
    api.send("PATCH", &path, "application/apply-patch+yaml", &side)
        .await?;
    apply(&backend, &workload).await?;
    let object = api.need(&web).await?;
    ensure!(
        object["metadata"]["annotations"]["note"] == "mine",
        "{object}"
    );
    let containers = &object["spec"]["template"]["spec"]["containers"];
    let names: Vec<&str> = containers
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|container| container["name"].as_str())
        .collect();
    ensure!(
        names.contains(&"main") && names.contains(&"side"),
        "{containers}"
    );
    ready(&backend, workload.uid).await?;
    delete(&backend, &workload).await
}

pub(super) async fn a_new_image_is_rolled_out(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let mut workload = site.app("shop", vec![deployment("web", 2, "x:1", "10m")]);
    apply(&backend, &workload).await?;
    ready(&backend, workload.uid).await?;
    workload.components = vec![deployment("web", 2, "x:2", "10m")];
    workload.epoch = epoch(2);
    apply(&backend, &workload).await?;
    let pods = format!("/api/v1/namespaces/{place}/pods?labelSelector=app%3Dweb");
    eventually("only new pods are left", || async {
        let list = api.need(&pods).await?;
        let images: Vec<Value> = list["items"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|pod| pod["spec"]["containers"][0]["image"].clone())
            .collect();
        Ok((images == ["x:2", "x:2"]).then_some(()))
    })
    .await?;
    let seen = ready(&backend, workload.uid).await?;
    ensure!(
        (seen.ready, seen.wanted, seen.epoch) == (2, 2, epoch(2)),
        "{seen:?}"
    );
    delete(&backend, &workload).await
}

pub(super) async fn what_cannot_run_is_not_ready_and_says_why(site: Site) -> Result<()> {
    let (backend, api, place) = (site.backend().await?, site.api().await?, site.place());
    let workload = site.app("shop", vec![deployment("web", 1, "x:1", "100000")]);
    apply(&backend, &workload).await?;
    let pods = format!("/api/v1/namespaces/{place}/pods");
    eventually("the pod has no place", || async {
        let list = api.need(&pods).await?;
        let conditions = list["items"][0]["status"]["conditions"].as_array();
        let unplaced = conditions.is_some_and(|list| {
            list.iter().any(|condition| {
                condition["type"] == "PodScheduled" && condition["reason"] == "Unschedulable"
            })
        });
        Ok(unplaced.then_some(()))
    })
    .await?;
    let seen = observed(&backend, workload.uid, "it says why", |seen| {
        seen.message
            .as_deref()
            .is_some_and(|message| message.contains("0 of 1 pods are ready"))
    })
    .await?;
    ensure!(seen.phase == Phase::Progressing, "{seen:?}");
    delete(&backend, &workload).await
}
