//! Sequences of requests from a seed.
//!
//! Few names, values and managers, so that requests meet each other's objects and fields. Most
//! requests are right, some are wrong in one way.

use http::Method;
use krake_kube_api::Kind;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Map, Value, json};

use super::request::{Body, Edit, Request};

const NAMES: [&str; 3] = ["a", "b", "c"];
const MANAGERS: [&str; 3] = ["one", "two", "three"];
const JSON: &str = "application/json";
const MERGE: &str = "application/merge-patch+json";
const JSON_PATCH: &str = "application/json-patch+json";
const APPLY: &str = "application/apply-patch+yaml";
const TABLE: &str = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json";

/// Seeded choices.
#[derive(Debug)]
pub struct Dice(StdRng);

impl Dice {
    /// The same choices for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(StdRng::seed_from_u64(seed))
    }

    fn below(&mut self, end: usize) -> usize {
        self.0.random_range(0..end)
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }
}

/// `count` requests to objects of `kind`, in `namespace` if it has one.
pub fn generate(kind: &Kind, namespace: &str, seed: u64, count: usize) -> Vec<Request> {
    let version = format!("/apis/{}/{}", kind.group, kind.version);
    let base = if kind.namespaced {
        format!("{version}/namespaces/{namespace}/{}", kind.plural)
    } else {
        format!("{version}/{}", kind.plural)
    };
    let mut generator = Generator {
        kind,
        namespace,
        base,
        dice: Dice::new(seed),
        has_generated: false,
    };
    (0..count).map(|_| generator.request()).collect()
}

struct Generator<'a> {
    kind: &'a Kind,
    namespace: &'a str,
    base: String,
    dice: Dice,
    /// Two generated names would stand in another order at each server.
    has_generated: bool,
}

impl Generator<'_> {
    fn request(&mut self) -> Request {
        match self.dice.below(100) {
            0..14 => self.create(),
            14..18 => self.get(),
            18..24 => self.list(),
            24..36 => self.replace(),
            36..46 => self.merge_patch(),
            46..54 => self.json_patch(),
            54..74 => self.apply(),
            74..83 => self.status(),
            83..92 => self.delete(),
            92..94 => self.delete_collection(),
            94..97 => self.let_go(),
            _ => self.nonsense(),
        }
    }

    /// A request about one of the objects.
    fn about(&mut self, method: Method, content_type: &'static str) -> Request {
        let object = format!("{}/{}", self.base, self.dice.pick(&NAMES));
        Request {
            content_type,
            object: object.clone(),
            ..Request::new(method, object)
        }
    }

    /// What the object at `path` is called.
    fn name(path: &str) -> &str {
        path.rsplit('/').next().unwrap_or_default()
    }

    fn options(&mut self, request: &mut Request) {
        if self.dice.chance(10) {
            let value = self.dice.pick(&["All", "All", "All", "Some"]);
            request.query.push(("dryRun", value.to_owned()));
        }
        if self.dice.chance(40) {
            let value = self.dice.pick(&["Strict", "Warn", "Ignore"]);
            let value = if self.dice.chance(3) {
                "Perhaps"
            } else {
                value
            };
            request.query.push(("fieldValidation", value.to_owned()));
        }
        if self.dice.chance(40) {
            let manager = self.dice.pick(&MANAGERS);
            request.query.push(("fieldManager", manager.to_owned()));
        }
    }

    /// An object named `name`, right most of the time.
    fn object(&mut self, name: &str) -> Value {
        let mut object = json!({
            "apiVersion": self.kind.api_version(),
            "kind": self.kind.kind,
            "metadata": self.metadata(name),
        });
        let schema = self.kind.schema.clone().unwrap_or_default();
        let properties = schema["properties"]
            .as_object()
            .cloned()
            .unwrap_or_default();
        for (field, schema) in properties {
            let wanted = field == "spec" || self.dice.chance(20);
            if wanted && !self.dice.chance(2) {
                object[&field] = self.value(&schema, 0);
            }
        }
        if self.dice.chance(15) {
            self.spoil(&mut object);
        }
        object
    }

    fn metadata(&mut self, name: &str) -> Value {
        let mut metadata = json!({"name": name});
        if self.kind.namespaced && self.dice.chance(50) {
            metadata["namespace"] = self.namespace.into();
        }
        for field in ["labels", "annotations"] {
            if self.dice.chance(35) {
                metadata[field] = self.texts();
            }
        }
        if self.dice.chance(12) {
            metadata["finalizers"] = self.dice.pick(&[
                json!(["example.org/hold"]),
                json!(["example.org/hold", "example.org/keep"]),
                json!([]),
            ]);
        }
        if self.dice.chance(8) {
            metadata["creationTimestamp"] = Value::Null;
        }
        if self.dice.chance(6) {
            metadata["ownerReferences"] = json!([{"apiVersion": "v1", "kind": "ConfigMap",
                "name": "owner", "uid": "5d0b1b5e-5b8a-4a55-9f0e-2f3c1b0f6f10"}]);
        }
        metadata
    }

    fn texts(&mut self) -> Value {
        let mut map = Map::new();
        for _ in 0..self.dice.below(3) {
            let key = self.dice.pick(&["app", "tier", "example.org/x"]);
            let value = self.dice.pick(&["web", "db", ""]);
            map.insert(key.to_owned(), value.into());
        }
        Value::Object(map)
    }

    /// A value that the schema allows, most of the time.
    fn value(&mut self, schema: &Value, depth: usize) -> Value {
        if self.dice.chance(1) {
            return self
                .dice
                .pick(&[json!(null), json!("text"), json!(7), json!([]), json!({})]);
        }
        if let Some(allowed) = schema["enum"].as_array() {
            let allowed = allowed.clone();
            return if self.dice.chance(5) {
                json!("other")
            } else {
                self.dice.pick(&allowed)
            };
        }
        if schema["x-kubernetes-int-or-string"] == true {
            return self.dice.pick(&[json!(1), json!("25%"), json!("1")]);
        }
        match schema["type"].as_str().unwrap_or_default() {
            "string" => self.dice.pick(&["x", "y", "", "longer"]).into(),
            "boolean" => self.dice.chance(50).into(),
            "integer" => self
                .dice
                .pick(&[json!(1), json!(2), json!(3), json!(0), json!(9)]),
            "number" => self
                .dice
                .pick(&[json!(0), json!(0.5), json!(1), json!(1.0), json!(2.5)]),
            "array" => self.list_value(schema, depth),
            "object" => self.map_value(schema, depth),
            _ => json!({"any": 1}),
        }
    }

    fn list_value(&mut self, schema: &Value, depth: usize) -> Value {
        let items: Vec<Value> = (0..self.dice.below(4))
            .map(|_| self.value(&schema["items"], depth + 1))
            .collect();
        if schema["x-kubernetes-list-type"].is_null() || self.dice.chance(5) {
            return items.into();
        }
        // Sets and keyed lists are seldom wrong: each item only once.
        let keys: Vec<String> = texts(&schema["x-kubernetes-list-map-keys"]);
        let mut kept: Vec<Value> = Vec::new();
        for item in items {
            let same = |other: &Value| {
                if keys.is_empty() {
                    *other == item
                } else {
                    keys.iter().all(|key| other[key] == item[key])
                }
            };
            let atomic = schema["x-kubernetes-list-type"] == "atomic";
            if atomic || !kept.iter().any(same) {
                kept.push(item);
            }
        }
        kept.into()
    }

    fn map_value(&mut self, schema: &Value, depth: usize) -> Value {
        if schema["x-kubernetes-embedded-resource"] == true {
            return self.manifest();
        }
        if let Some(properties) = schema["properties"].as_object().cloned() {
            let required = texts(&schema["required"]);
            let mut map = Map::new();
            for (key, inner) in properties {
                let percent = match (required.contains(&key), depth) {
                    (true, _) => 96,
                    (false, 0) => 55,
                    (false, _) => 45,
                };
                if self.dice.chance(percent) {
                    map.insert(key, self.value(&inner, depth + 1));
                }
            }
            return Value::Object(map);
        }
        if schema["additionalProperties"].is_object() {
            let mut map = Map::new();
            for _ in 0..self.dice.below(3) {
                let key = self.dice.pick(&["k", "l", "m"]);
                map.insert(
                    key.to_owned(),
                    self.value(&schema["additionalProperties"], depth + 1),
                );
            }
            return Value::Object(map);
        }
        self.dice.pick(&[
            json!({}),
            json!({"p": 1}),
            json!({"p": 2, "q": {"r": "x"}}),
            json!({"q": {"s": [1, 2]}}),
            json!({"q": null}),
            json!({"conditions": [{"type": "Ready", "status": "True", "message": "m"}]}),
        ])
    }

    /// An object inside an object.
    fn manifest(&mut self) -> Value {
        if self.dice.chance(8) {
            return self.dice.pick(&[
                json!({"kind": "ConfigMap", "metadata": {"name": "inner"}}),
                json!({"apiVersion": "v1", "metadata": {"name": "inner"}}),
                json!({"apiVersion": "v1", "kind": "", "metadata": {"name": "inner"}}),
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "in/ner"}}),
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "inner", "labels": {"a": 1}}}),
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "inner", "labels": {"a b": "c"}}}),
                json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "inner", "surplus": 1}}),
                json!({"apiVersion": "a/b/c", "kind": "ConfigMap"}),
                json!({"apiVersion": "v1", "kind": "Config Map"}),
                json!({}),
            ]);
        }
        self.dice.pick(&[
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "inner"}, "data": {"k": "v"}}),
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "inner", "labels": {"app": "x"}}}),
            json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "inner", "creationTimestamp": null},
                "spec": {"replicas": 1, "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}, "status": {}}),
            json!({"apiVersion": "v1", "kind": "Service"}),
        ])
    }

    /// Makes an object wrong in one way.
    fn spoil(&mut self, object: &mut Value) {
        let edits = [
            ("/spec/surplus", json!(1)),
            ("/surplus", json!({"deep": 1})),
            ("/metadata/surplus", json!("x")),
            ("/spec", json!("text")),
            ("/spec", Value::Null),
            ("/metadata/labels", json!({"a b": "c"})),
            ("/metadata/labels", json!({"app": "no spaces"})),
            ("/metadata/labels", json!({"app": 1})),
            ("/metadata/labels", json!("text")),
            ("/metadata/annotations", json!({"no spaces": "x"})),
            ("/metadata/annotations", json!({"Upper/case": "x"})),
            ("/metadata/finalizers", json!(["no spaces"])),
            ("/metadata/finalizers", json!("text")),
            (
                "/metadata/ownerReferences",
                json!([{"kind": "ConfigMap", "name": "x"}]),
            ),
            ("/metadata/generation", json!(77)),
            ("/metadata/deletionTimestamp", json!("2026-01-01T00:00:00Z")),
            ("/metadata/deletionGracePeriodSeconds", json!(5)),
            ("/metadata/creationTimestamp", json!("2026-01-01T00:00:00Z")),
            ("/metadata/managedFields", json!([])),
            (
                "/metadata/uid",
                json!("11111111-1111-4111-8111-111111111111"),
            ),
            ("/metadata/resourceVersion", json!("${rv}")),
            ("/metadata/resourceVersion", json!("${rv-old}")),
            ("/metadata/namespace", json!("elsewhere")),
            ("/metadata/name", json!("Not_A_Name")),
            ("/metadata/name", json!("other")),
            ("/metadata/name", json!("")),
            ("/metadata/name", json!(5)),
            ("/metadata", Value::Null),
            ("/metadata", json!("text")),
            ("/apiVersion", json!("example.org/v9")),
            ("/kind", json!("Other")),
            ("/kind", Value::Null),
            ("/apiVersion", json!("")),
        ];
        let (pointer, value) = self.dice.pick(&edits);
        let (parent, key) = pointer.rsplit_once('/').unwrap_or_default();
        if let Some(Value::Object(map)) = object.pointer_mut(parent) {
            map.insert(key.to_owned(), value);
        }
    }

    fn create(&mut self) -> Request {
        let mut request = self.about(Method::POST, JSON);
        let name = Self::name(&request.object).to_owned();
        request.path.clone_from(&self.base);
        let mut object = self.object(&name);
        match self.dice.below(20) {
            0 => {
                let prefix = self.dice.pick(&["zz-", "zz-", "Not_A_Prefix"]);
                let prefix = if self.has_generated {
                    "Not_A_Prefix"
                } else {
                    prefix
                };
                self.has_generated |= prefix == "zz-";
                object["metadata"] = json!({"generateName": prefix});
            }
            1 => {
                let name = self.dice.pick(&["A", "a_b", "-a", "a.b", "a/b", "."]);
                object["metadata"] = json!({"name": name});
            }
            2 => {
                if let Some(map) = object.as_object_mut() {
                    map.remove(self.dice.pick(&["kind", "apiVersion", "metadata"]));
                }
            }
            _ => {}
        }
        request.body = Body::Json(object);
        self.options(&mut request);
        if self.dice.chance(10) {
            request.accept = TABLE;
        }
        request
    }

    fn get(&mut self) -> Request {
        let mut request = self.about(Method::GET, "");
        if self.dice.chance(30) {
            request.accept = TABLE;
        }
        if self.dice.chance(15) {
            let value = self.dice.pick(&["0", "x", "1"]);
            request.query.push(("resourceVersion", value.to_owned()));
        }
        if self.dice.chance(10) {
            request.path = format!("{}/${{generated}}", self.base);
        }
        request
    }

    fn list(&mut self) -> Request {
        let mut request = Request::new(Method::GET, self.base.clone());
        if self.dice.chance(40) {
            let selector = self.dice.pick(&[
                "app=web",
                "app!=web",
                "app in (web,db)",
                "app notin (web)",
                "tier",
                "!tier",
                "app=web,tier",
                "app==db",
                "app in",
                "a b=c",
                "app=no spaces",
                "=x",
                "app>1",
                "app in (",
                ",",
                "example.org/x=",
            ]);
            request.query.push(("labelSelector", selector.to_owned()));
        }
        if self.dice.chance(30) {
            let selector = self.dice.pick(&[
                "metadata.name=a",
                "metadata.name!=a",
                "metadata.name==b",
                "metadata.name=a,metadata.name=b",
                "spec.x=1",
                "metadata.name",
                "metadata.labels.app=web",
            ]);
            request.query.push(("fieldSelector", selector.to_owned()));
        }
        if self.dice.chance(40) {
            let limit = self
                .dice
                .pick(&["1", "1", "1", "2", "2", "100", "0", "-1", "x"]);
            request.query.push(("limit", limit.to_owned()));
        }
        if self.dice.chance(25) {
            let token = self
                .dice
                .pick(&["${continue}", "${continue}", "${continue}", "x"]);
            request.query.push(("continue", token.to_owned()));
        }
        if self.dice.chance(10) {
            let revision = self.dice.pick(&["0", "x", "1"]);
            request.query.push(("resourceVersion", revision.to_owned()));
        }
        if self.dice.chance(8) {
            let rule = self.dice.pick(&["Exact", "NotOlderThan", "Some"]);
            request
                .query
                .push(("resourceVersionMatch", rule.to_owned()));
        }
        if self.dice.chance(6) {
            // Only what is refused: the answer to a watch has no end.
            let options = self.dice.pick(&[
                "watch=true&sendInitialEvents=true",
                "watch=true&resourceVersionMatch=NotOlderThan",
                "watch=true&resourceVersionMatch=Exact",
                "sendInitialEvents=true",
                "sendInitialEvents=false",
            ]);
            let options = options.split('&').filter_map(|one| one.split_once('='));
            request.query = options
                .map(|(name, value)| (name, value.to_owned()))
                .collect();
        }
        if self.dice.chance(25) {
            request.accept = TABLE;
            if self.dice.chance(50) {
                let include = self.dice.pick(&["None", "Object", "Metadata", "Some"]);
                request.query.push(("includeObject", include.to_owned()));
            }
        }
        request
    }

    fn replace(&mut self) -> Request {
        let mut request = self.about(Method::PUT, JSON);
        let name = Self::name(&request.object).to_owned();
        if self.dice.chance(25) {
            let mut object = self.object(&name);
            if self.dice.chance(50)
                && let Some(metadata) = object["metadata"].as_object_mut()
            {
                metadata.insert("resourceVersion".to_owned(), "${rv}".into());
            }
            request.body = Body::Json(object);
        } else {
            request.body = Body::Edited(self.edits(&name));
        }
        self.options(&mut request);
        request
    }

    /// What a client changes in an object it has read.
    fn edits(&mut self, name: &str) -> Vec<Edit> {
        let other = self.object(name);
        let mut edits = Vec::new();
        let set = |pointer: &str, value: Value| Edit::Set(pointer.to_owned(), value);
        match self.dice.below(12) {
            0..6 => edits.push(set("/spec", other["spec"].clone())),
            6 => {}
            7 => edits.push(set("/metadata/labels", self.texts())),
            8 => edits.push(set("/status", json!({"p": 5}))),
            9 => edits.push(Edit::Remove("/spec".to_owned())),
            10 => edits.push(Edit::Remove("/metadata/managedFields".to_owned())),
            _ => edits.push(set(
                "/metadata/finalizers",
                json!(["example.org/hold", "example.org/late"]),
            )),
        }
        match self.dice.below(16) {
            0 => edits.push(Edit::Remove("/metadata/resourceVersion".to_owned())),
            1 => edits.push(set("/metadata/resourceVersion", json!("${rv-old}"))),
            2 => edits.push(set("/metadata/resourceVersion", json!("x"))),
            3 => edits.push(set(
                "/metadata/uid",
                json!("11111111-1111-4111-8111-111111111111"),
            )),
            4 => edits.push(Edit::Remove("/metadata/uid".to_owned())),
            5 => edits.push(Edit::Remove("/metadata/creationTimestamp".to_owned())),
            6 => edits.push(set("/metadata/managedFields", json!([]))),
            7 => edits.push(set(
                "/metadata/generation",
                self.dice.pick(&[json!(0), json!(99)]),
            )),
            8 => edits.push(Edit::Remove("/metadata/name".to_owned())),
            9 => edits.push(Edit::Remove("/metadata/deletionTimestamp".to_owned())),
            _ => {}
        }
        edits
    }

    fn merge_patch(&mut self) -> Request {
        let mut request = self.about(Method::PATCH, MERGE);
        let name = Self::name(&request.object).to_owned();
        let mut object = self.object(&name);
        let map = object.as_object_mut();
        let map = map.expect("an object is made as one");
        for field in ["apiVersion", "kind", "metadata", "spec"] {
            if self.dice.chance(50) {
                map.remove(field);
            }
        }
        if self.dice.chance(15)
            && let Some(Value::Object(spec)) = map.get_mut("spec")
        {
            let fields: Vec<String> = spec.keys().cloned().collect();
            for field in fields {
                if self.dice.chance(30) {
                    spec.insert(field, Value::Null);
                }
            }
        }
        request.body = Body::Json(match self.dice.below(40) {
            0 | 1 => json!("text"),
            2 => json!({"metadata": {"resourceVersion": "${rv}"}, "spec": object["spec"]}),
            3 => json!({"metadata": {"resourceVersion": "${rv-old}"}, "spec": object["spec"]}),
            4 => json!({"metadata": {"resourceVersion": null, "uid": null, "name": null}}),
            5 => json!({"metadata": {"managedFields": [{}]}}),
            6 => json!({"metadata": null}),
            7 => json!({"metadata": {"managedFields": null}}),
            _ => object,
        });
        self.options(&mut request);
        request
    }

    fn json_patch(&mut self) -> Request {
        let mut request = self.about(Method::PATCH, JSON_PATCH);
        let name = Self::name(&request.object).to_owned();
        let object = self.object(&name);
        let mut operations = Vec::new();
        for _ in 0..=self.dice.below(2) {
            operations.push(match self.dice.below(12) {
                0..4 => json!({"op": "replace", "path": "/spec", "value": object["spec"]}),
                4 => json!({"op": "test", "path": "/kind", "value": self.kind.kind}),
                5 => json!({"op": "test", "path": "/kind", "value": "Other"}),
                6 => json!({"op": "remove", "path": "/spec/nothing"}),
                7 => json!({"op": "add", "path": "/metadata/labels", "value": self.texts()}),
                8 => json!({"op": "add", "path": "/spec/surplus", "value": 1}),
                9 => {
                    json!({"op": "copy", "from": "/metadata/name", "path": "/metadata/labels/app"})
                }
                10 => json!({"op": "burn", "path": "/spec"}),
                _ => json!({"op": "remove", "path": "/metadata/labels"}),
            });
        }
        request.body = Body::Json(match self.dice.below(20) {
            0 => json!({"op": "add"}),
            1 => json!([{"op": "replace", "path": "/metadata/name", "value": "other"}]),
            2 => {
                json!([{"op": "replace", "path": "/metadata/resourceVersion", "value": "${rv-old}"}])
            }
            3 => json!([{"op": "remove", "path": "/metadata/finalizers"}]),
            4 => json!([{"op": "add", "path": "spec", "value": {}}]),
            _ => operations.into(),
        });
        self.options(&mut request);
        request
    }

    fn apply(&mut self) -> Request {
        let mut request = self.about(Method::PATCH, APPLY);
        let name = Self::name(&request.object).to_owned();
        let mut object = self.object(&name);
        if let Some(metadata) = object["metadata"].as_object_mut() {
            if self.dice.chance(3) {
                metadata.remove("name");
            }
            // The real one keeps what is empty until the next write, which then is one.
            metadata.retain(|_, value| *value != json!({}) && *value != json!([]));
        }
        drop_nulls(&mut object);
        request.body = Body::Json(object);
        if self.dice.chance(5) {
            request.body = Body::Text(self.dice.pick(&["{", "a: [", "[]", "text", ""]).to_owned());
        }
        self.options(&mut request);
        request.query.retain(|(key, _)| *key != "fieldManager");
        if !self.dice.chance(3) {
            let manager = self.dice.pick(&MANAGERS);
            request.query.push(("fieldManager", manager.to_owned()));
        }
        if self.dice.chance(35) {
            let force = self.dice.pick(&["true", "true", "true", "false"]);
            request.query.push(("force", force.to_owned()));
        }
        request
    }

    fn status(&mut self) -> Request {
        let method = self.dice.pick(&[
            Method::GET,
            Method::PUT,
            Method::PATCH,
            Method::PATCH,
            Method::PATCH,
        ]);
        let mut request = self.about(method.clone(), "");
        let name = Self::name(&request.object).to_owned();
        request.path.push_str("/status");
        let schema = self.kind.schema.clone().unwrap_or_default();
        let status = self.value(&schema["properties"]["status"], 0);
        let mut object = self.object(&name);
        object["status"] = status.clone();
        match method {
            Method::GET => {}
            Method::PUT => {
                request.content_type = JSON;
                let mut edits = vec![Edit::Set("/status".to_owned(), status)];
                if self.dice.chance(40) {
                    edits.extend(self.edits(&name));
                }
                request.body = Body::Edited(edits);
                self.options(&mut request);
            }
            _ => {
                request.content_type = self.dice.pick(&[MERGE, MERGE, APPLY]);
                request.body = Body::Json(match self.dice.below(4) {
                    0 => object,
                    _ if request.content_type == APPLY => {
                        json!({"apiVersion": self.kind.api_version(),
                        "kind": self.kind.kind, "metadata": {"name": name}, "status": status})
                    }
                    1 => json!({"status": null}),
                    _ => json!({"status": status}),
                });
                self.options(&mut request);
                if request.content_type == APPLY {
                    request.query.retain(|(key, _)| *key != "fieldManager");
                    let manager = self.dice.pick(&MANAGERS);
                    request.query.push(("fieldManager", manager.to_owned()));
                    if self.dice.chance(40) {
                        request.query.push(("force", "true".to_owned()));
                    }
                }
            }
        }
        request
    }

    fn delete(&mut self) -> Request {
        let mut request = self.about(Method::DELETE, "");
        if self.dice.chance(50) {
            request.content_type = JSON;
            request.body = Body::Json(self.dice.pick(&[
                json!({"kind": "DeleteOptions", "apiVersion": "v1"}),
                json!({"preconditions": {"uid": "${uid}"}}),
                json!({"preconditions": {"uid": "11111111-1111-4111-8111-111111111111"}}),
                json!({"preconditions": {"resourceVersion": "${rv}"}}),
                json!({"preconditions": {"resourceVersion": "${rv-old}"}}),
                json!({"dryRun": ["All"]}),
                json!({"dryRun": ["Some"]}),
                json!({"propagationPolicy": "Background"}),
                json!({"propagationPolicy": "Orphan"}),
                json!({"propagationPolicy": "Foreground"}),
                json!({"propagationPolicy": "Sometimes"}),
                json!({"gracePeriodSeconds": 0}),
                json!({"gracePeriodSeconds": 30}),
                json!([]),
            ]));
        } else if self.dice.chance(20) {
            let value = self.dice.pick(&["All", "Some"]);
            request.query.push(("dryRun", value.to_owned()));
        }
        request
    }

    fn delete_collection(&mut self) -> Request {
        let mut request = Request::new(Method::DELETE, self.base.clone());
        if self.dice.chance(70) {
            let selector = self.dice.pick(&["app=web", "!app", "a b"]);
            request.query.push(("labelSelector", selector.to_owned()));
        }
        if self.dice.chance(20) {
            let limit = self.dice.pick(&["1", "2", "x"]);
            request.query.push(("limit", limit.to_owned()));
        }
        request
    }

    /// Removes all finalizers, so that what is to be deleted goes.
    fn let_go(&mut self) -> Request {
        let mut request = self.about(Method::PATCH, MERGE);
        request.body = Body::Json(json!({"metadata": {"finalizers": null}}));
        request
    }

    /// What no client should send.
    fn nonsense(&mut self) -> Request {
        let mut request = self.about(Method::GET, "");
        let object = self.object(Self::name(&request.object));
        match self.dice.below(12) {
            0 => {
                request.path = self
                    .dice
                    .pick(&[
                        "/apis/krake.dev/v1/nothing",
                        "/apis/krake.dev/v9/applications",
                        "/apis/nothing.org/v1/things",
                        "/nothing",
                        "/apis/krake.dev/v1/nothing/a",
                    ])
                    .to_owned();
            }
            1 => request.path = format!("{}/nothing", request.object),
            2 => {
                request.method = Method::PUT;
                request.content_type = JSON;
                request.path.clone_from(&self.base);
                request.body = Body::Json(object);
            }
            3 => {
                request.method = Method::PATCH;
                request.content_type = MERGE;
                request.path.clone_from(&self.base);
                request.body = Body::Json(object);
            }
            4 => {
                request.method = self.dice.pick(&[Method::POST, Method::PUT]);
                request.content_type = JSON;
                if request.method == Method::POST {
                    request.path.clone_from(&self.base);
                }
                let text = self.dice.pick(&[
                    "{",
                    "",
                    "[]",
                    "null",
                    "{\"a\":1}",
                    "text",
                    "{\"kind\":\"X\"}{}",
                ]);
                request.body = Body::Text(text.to_owned());
            }
            5 => {
                request.method = Method::PATCH;
                request.content_type = self.dice.pick(&[MERGE, JSON_PATCH]);
                request.body = Body::Text(self.dice.pick(&["{", "", "null", "text"]).to_owned());
            }
            6 => {
                request.method = Method::PATCH;
                request.content_type = self.dice.pick(&[
                    "application/strategic-merge-patch+json",
                    "application/json",
                    "text/plain",
                ]);
                request.body = Body::Json(json!({"spec": object["spec"]}));
            }
            7 => {
                request.method = Method::POST;
                request.content_type = self.dice.pick(&["application/xml", "text/plain"]);
                request.path.clone_from(&self.base);
                request.body = Body::Json(object);
            }
            8 => {
                request.accept =
                    self.dice
                        .pick(&["text/html", "application/xml", "*/*", "application/*"])
            }
            9 => {
                // Without its namespace.
                request.path = format!(
                    "/apis/{}/{}/{}",
                    self.kind.group, self.kind.version, self.kind.plural
                );
                let own = format!("metadata.namespace={}", self.namespace);
                request.query.push(("fieldSelector", own));
                if self.dice.chance(50) {
                    request.query.clear();
                    request.method = Method::POST;
                    request.content_type = JSON;
                    request.body = Body::Json(object);
                }
            }
            10 => request.path = format!("{}/scale", request.object),
            _ => {
                request.method = Method::POST;
                request.content_type = JSON;
                request.body = Body::Json(object);
            }
        }
        request
    }
}

/// The real one keeps a time that is null until the next write, too.
fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, value| key != "creationTimestamp" || !value.is_null());
            map.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

fn texts(list: &Value) -> Vec<String> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(Value::as_str)
        .map(ToOwned::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_requests_again() {
        let kind = krake_node::kinds::all().remove(0);
        let all = |seed| -> Vec<String> {
            let requests = generate(&kind, "n", seed, 50);
            requests.iter().map(ToString::to_string).collect()
        };
        assert_eq!(all(7), all(7));
        assert_ne!(all(7), all(8));
    }
}
