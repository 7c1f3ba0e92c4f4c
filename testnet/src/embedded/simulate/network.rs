//! `Endpoints`: which pods a service leads to.

use serde_json::{Value, json};

use super::super::object::{
    is_dying, is_true, label, list, name, namespace, number, owned_by, resource, text,
};
use super::super::view::View;
use super::{Outcome, Write};

/// One step of a `Service`.
pub(crate) fn endpoints(view: &View, service: &Value) -> Outcome {
    let selector = service.pointer("/spec/selector").and_then(Value::as_object);
    let Some(selector) = selector.filter(|selector| !selector.is_empty()) else {
        return Outcome::default();
    };
    let endpoints = resource("", "endpoints");
    let key = (
        endpoints.clone(),
        namespace(service).to_owned(),
        name(service).to_owned(),
    );
    let found = view.get(&key);
    let subsets = subsets(view, service, selector);
    match found {
        Some(found) if found.get("subsets").unwrap_or(&json!([])) == &subsets => Outcome::default(),
        Some(found) => {
            let mut object = (**found).clone();
            object["subsets"] = subsets;
            Outcome::write(Write::update(&key, object))
        }
        None if !view.is_open(namespace(service)) => Outcome::default(),
        None => {
            // The real ones are removed with their service by name; an owner does the same.
            let mut owner = owned_by(service);
            if let Some(owner) = owner.get_mut(0).and_then(Value::as_object_mut) {
                owner.remove("blockOwnerDeletion");
            }
            Outcome::write(Write::Create {
                resource: endpoints,
                object: json!({
                    "apiVersion": "v1",
                    "kind": "Endpoints",
                    "metadata": {"name": name(service), "namespace": namespace(service), "ownerReferences": owner},
                    "subsets": subsets,
                }),
            })
        }
    }
}

fn subsets(view: &View, service: &Value, selector: &serde_json::Map<String, Value>) -> Value {
    let addresses: Vec<Value> = view
        .inside(namespace(service))
        .filter(|(key, pod)| {
            key.0.1 == "pods"
                && !is_dying(pod)
                && is_true(pod, "Ready")
                && selector
                    .iter()
                    .all(|(key, value)| label(pod, key) == value.as_str())
        })
        .map(|(_, pod)| {
            json!({"ip": text(pod, "/status/podIP"), "nodeName": text(pod, "/spec/nodeName"),
                "targetRef": {"kind": "Pod", "name": name(pod), "namespace": namespace(pod)}})
        })
        .collect();
    if addresses.is_empty() {
        return json!([]);
    }
    let ports: Vec<Value> = list(service, "/spec/ports")
        .iter()
        .map(|port| {
            let own = number(port, "/port").unwrap_or(0);
            let mut target = json!({
                "port": number(port, "/targetPort").unwrap_or(own),
                "protocol": text(port, "/protocol"),
            });
            if let Some(name) = port.get("name") {
                target["name"] = name.clone();
            }
            target
        })
        .collect();
    json!([{"addresses": addresses, "ports": ports}])
}

#[cfg(test)]
mod tests {
    use super::super::tests::{World, template, workload};
    use super::*;

    #[test]
    fn endpoints_follow_the_ready_pods() {
        let mut world = World::new("8", 20);
        let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
            "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080, "protocol": "TCP"}]}});
        world.create("", "services", service);
        let set = workload("ReplicaSet", 2, &template("web", json!({}), "1"));
        let set = world.create("apps", "replicasets", set);
        world.run_quietly();
        let key = (
            resource("", "endpoints"),
            "default".to_owned(),
            "web".to_owned(),
        );
        let subsets = &world.object(&key)["subsets"][0];
        assert_eq!(subsets["addresses"].as_array().unwrap().len(), 2);
        assert_eq!(subsets["ports"][0]["port"], 8080);
        world.edit(&set, |set| set["spec"]["replicas"] = 0.into());
        world.run_quietly();
        assert_eq!(world.object(&key)["subsets"], json!([]));
    }
}
