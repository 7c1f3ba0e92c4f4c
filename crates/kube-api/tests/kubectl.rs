//! Stock kubectl against the machinery over the memory store.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::process::{Command, Stdio};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use krake_kube_api::{AdmitAll, Column, FieldValidation, Kind, MemoryStore, Registry, Service};
use serde_json::{Value, json};

fn kind() -> Kind {
    Kind {
        group: "example.org".to_owned(),
        version: "v1".to_owned(),
        kind: "Widget".to_owned(),
        plural: "widgets".to_owned(),
        singular: "widget".to_owned(),
        short_names: vec!["wi".to_owned()],
        categories: vec![],
        namespaced: true,
        status: true,
        read_only: false,
        schema: Some(
            json!({"type": "object", "description": "A widget.", "properties": {
                "spec": {"type": "object", "required": ["size"], "description": "What is wanted.", "properties": {
                    "size": {"type": "integer", "minimum": 1, "description": "How large."},
                    "tags": {"type": "array", "items": {"type": "string"}}
                }},
                "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}
            }}),
        ),
        columns: vec![
            Column::new("Size", ".spec.size", "How large."),
            Column::new("Tags", ".spec.tags", "Tags.").wide(),
            Column::new("Age", ".metadata.creationTimestamp", "Age.").date(),
        ],
    }
}

/// kubectl takes `v1` Lists only where the core group is.
fn core_kind() -> Kind {
    Kind {
        group: String::new(),
        kind: "Note".to_owned(),
        plural: "notes".to_owned(),
        singular: "note".to_owned(),
        short_names: vec![],
        ..kind()
    }
}

struct Api {
    dir: tempfile::TempDir,
    store: Arc<MemoryStore>,
    service: Arc<Service>,
    url: String,
}

impl Api {
    async fn start() -> Self {
        Self::start_over(MemoryStore::default()).await
    }

    async fn start_over(store: MemoryStore) -> Self {
        let store = Arc::new(store);
        let service = Arc::new(Service {
            registry: Arc::new(Registry::new(vec![kind(), core_kind()])),
            store: Arc::clone(&store) as _,
            admission: Arc::new(AdmitAll),
            version: json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0"}),
            field_validation: FieldValidation::Strict,
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let served = Arc::clone(&service);
        let app = axum::Router::new().fallback(move |request: Request| {
            let service = Arc::clone(&served);
            async move { service.handle(request).await }
        });
        tokio::spawn(async move { axum::serve(listener, app).await });
        Self {
            dir: tempfile::tempdir().unwrap(),
            store,
            service,
            url,
        }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command
            .arg(format!("--server={}", self.url))
            .arg(format!("--cache-dir={}", self.dir.path().display()))
            .args(args)
            .env("KUBECONFIG", self.dir.path().join("none"))
            .stdin(Stdio::null());
        command
    }

    async fn run(&self, args: &[&str]) -> (bool, String, String) {
        let mut command = self.command(args);
        let output = tokio::task::spawn_blocking(move || command.output().unwrap())
            .await
            .unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stdout).unwrap(),
            String::from_utf8(output.stderr).unwrap(),
        )
    }

    async fn ok(&self, args: &[&str]) -> String {
        let (success, out, error) = self.run(args).await;
        assert!(success, "kubectl {args:?}: {out}{error}");
        out
    }

    async fn refused(&self, args: &[&str]) -> String {
        let (success, out, error) = self.run(args).await;
        assert!(!success, "kubectl {args:?}: {out}{error}");
        error
    }

    /// Makes or replaces these widgets.
    async fn apply(&self, widgets: &[Value]) {
        let items = json!({"apiVersion": "v1", "kind": "List", "items": widgets});
        let file = self.file("widgets.json", &items);
        self.ok(&["apply", "-f", &file]).await;
    }

    /// The whole refusal, of which kubectl shows the message.
    async fn refusal(&self, path: &str) -> Value {
        let request = http::Request::get(path).body(Body::empty()).unwrap();
        let answer = self.service.handle(request).await;
        let bytes = axum::body::to_bytes(answer.into_body(), usize::MAX).await;
        serde_json::from_slice(&bytes.unwrap()).unwrap()
    }

    /// A list of widgets with this query.
    async fn page(&self, query: &str) -> Value {
        let path = format!("/apis/example.org/v1/namespaces/default/widgets?{query}");
        serde_json::from_str(&self.ok(&["get", "--raw", &path]).await).unwrap()
    }

    fn file(&self, name: &str, object: &Value) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, object.to_string()).unwrap();
        path.display().to_string()
    }
}

fn widget(name: &str, size: i64) -> Value {
    json!({"apiVersion": "example.org/v1", "kind": "Widget",
        "metadata": {"name": name, "labels": {"app": name}}, "spec": {"size": size, "tags": ["a", "b"]}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_does_its_everyday_work() {
    let api = Api::start().await;
    let one = api.file("one.json", &widget("one", 1));
    assert!(api.ok(&["apply", "-f", &one]).await.contains("created"));
    assert!(api.ok(&["apply", "-f", &one]).await.contains("unchanged"));
    let bigger = api.file("bigger.json", &widget("one", 2));
    assert!(
        !api.run(&["diff", "-f", &bigger]).await.0,
        "diff shows a difference"
    );
    assert!(
        api.ok(&["apply", "-f", &bigger])
            .await
            .contains("configured")
    );
    let two = api.file("two.json", &widget("two", 7));
    api.ok(&["apply", "--server-side", "-f", &two]).await;
    api.ok(&["apply", "--server-side", "--dry-run=server", "-f", &bigger])
        .await;

    let table = api.ok(&["get", "widgets"]).await;
    assert!(table.starts_with("NAME   SIZE   AGE"), "{table}");
    assert!(api.ok(&["get", "wi", "-o", "wide"]).await.contains("a,b"));
    assert_eq!(
        api.ok(&["get", "wi", "-l", "app=two", "-o", "name"]).await,
        "widget.example.org/two\n"
    );
    assert_eq!(
        api.ok(&["get", "wi", "one", "-o", "jsonpath={.spec.size}"])
            .await,
        "2"
    );
    assert!(
        api.ok(&["get", "wi", "one", "-o", "yaml"])
            .await
            .contains("generation: 2")
    );

    api.ok(&["label", "wi", "one", "tier=gold"]).await;
    api.ok(&["annotate", "wi", "one", "note=x"]).await;
    api.ok(&[
        "patch",
        "wi",
        "one",
        "--type=merge",
        "-p",
        r#"{"spec":{"size":3}}"#,
    ])
    .await;
    api.ok(&[
        "patch",
        "wi",
        "one",
        "--type=json",
        "-p",
        r#"[{"op":"replace","path":"/spec/size","value":4}]"#,
    ])
    .await;
    assert_eq!(
        api.ok(&[
            "get",
            "wi",
            "-l",
            "tier=gold",
            "-o",
            "jsonpath={.items[0].spec.size}"
        ])
        .await,
        "4"
    );
    api.ok(&[
        "patch",
        "wi",
        "one",
        "--subresource=status",
        "--type=merge",
        "-p",
        r#"{"status":{"conditions":[{"type":"Ready","status":"True"}]}}"#,
    ])
    .await;
    api.ok(&["wait", "wi/one", "--for=condition=Ready", "--timeout=10s"])
        .await;
    assert!(api.ok(&["api-resources"]).await.contains("widgets"));
    assert!(
        api.ok(&["explain", "widgets.spec.size"])
            .await
            .contains("How large.")
    );
    assert!(
        api.ok(&["delete", "wi", "one", "two"])
            .await
            .contains("deleted")
    );
    assert!(
        api.refused(&["get", "wi", "one"])
            .await
            .contains("NotFound")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input_is_refused_clearly_and_changes_nothing() {
    let api = Api::start().await;
    let mut unknown = widget("one", 1);
    unknown["spec"]["sise"] = json!(3);
    let error = api
        .refused(&["apply", "-f", &api.file("unknown.json", &unknown)])
        .await;
    assert!(
        error.contains("unknown field \"spec.sise\"; did you mean `size`?"),
        "{error}"
    );
    let error = api
        .refused(&["apply", "-f", &api.file("small.json", &widget("one", 0))])
        .await;
    assert!(error.contains("spec.size: must be at least 1"), "{error}");
    assert!(api.ok(&["get", "wi", "-o", "name"]).await.is_empty());

    api.ok(&[
        "apply",
        "--server-side",
        "--field-manager=a",
        "-f",
        &api.file("a.json", &widget("one", 1)),
    ])
    .await;
    let error = api
        .refused(&[
            "apply",
            "--server-side",
            "--field-manager=b",
            "-f",
            &api.file("b.json", &widget("one", 2)),
        ])
        .await;
    assert!(error.contains("conflict with \"a\": .spec.size"), "{error}");
    api.ok(&[
        "apply",
        "--server-side",
        "--force-conflicts",
        "--field-manager=b",
        "-f",
        &api.file("b.json", &widget("one", 2)),
    ])
    .await;
    let error = api
        .refused(&["patch", "wi", "one", "--type=strategic", "-p", "{}"])
        .await;
    assert!(error.contains("strategic"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_shows_each_change_and_finalizers_hold_an_object() {
    let api = Api::start().await;
    let mut held = widget("held", 1);
    held["metadata"]["finalizers"] = json!(["example.org/hold"]);
    api.ok(&["create", "-f", &api.file("held.json", &held)])
        .await;
    let mut watch = api
        .command(&[
            "get",
            "wi",
            "-w",
            "-o",
            "jsonpath={.metadata.name}:{.spec.size}{\"\\n\"}",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = watch.stdout.take().unwrap();
    let (sender, mut seen) = tokio::sync::mpsc::channel(100);
    std::thread::spawn(move || {
        use std::io::BufRead;
        for line in std::io::BufReader::new(lines).lines().map_while(Result::ok) {
            let _ = sender.blocking_send(line);
        }
    });
    assert_eq!(seen.recv().await.unwrap(), "held:1");
    api.ok(&[
        "patch",
        "wi",
        "held",
        "--type=merge",
        "-p",
        r#"{"spec":{"size":2}}"#,
    ])
    .await;
    assert_eq!(seen.recv().await.unwrap(), "held:2");
    api.ok(&["delete", "wi", "held", "--wait=false"]).await;
    assert!(
        !api.ok(&[
            "get",
            "wi",
            "held",
            "-o",
            "jsonpath={.metadata.deletionTimestamp}"
        ])
        .await
        .is_empty()
    );
    api.ok(&[
        "patch",
        "wi",
        "held",
        "--type=merge",
        "-p",
        r#"{"metadata":{"finalizers":null}}"#,
    ])
    .await;
    api.refused(&["get", "wi", "held"]).await;
    watch.kill().unwrap();
    watch.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_in_a_file_is_as_good_as_its_objects() {
    let api = Api::start().await;
    let list = |widgets: &[Value]| json!({"apiVersion": "v1", "kind": "List", "items": widgets});
    let both = api.file("both.json", &list(&[widget("one", 1), widget("two", 2)]));
    assert!(
        api.ok(&["create", "-f", &both])
            .await
            .contains("two created")
    );
    assert!(api.ok(&["diff", "-f", &both]).await.is_empty());
    let bigger = api.file("bigger.json", &list(&[widget("one", 1), widget("two", 7)]));
    let (same, shown, _) = api.run(&["diff", "-f", &bigger]).await;
    assert!(!same && shown.contains("+  size: 7"), "{shown}");
    let changed = api.ok(&["apply", "-f", &bigger]).await;
    assert!(
        changed.contains("one configured") && changed.contains("two configured"),
        "{changed}"
    );
    let unchanged = api.ok(&["apply", "-f", &bigger]).await;
    assert!(unchanged.contains("two unchanged"), "{unchanged}");
    api.ok(&["apply", "--server-side", "--force-conflicts", "-f", &bigger])
        .await;
    // Each object is checked as if it stood alone.
    let mut wrong = widget("three", 3);
    wrong["spec"]["sise"] = json!(3);
    let wrong = api.file("wrong.json", &list(&[widget("one", 1), wrong]));
    for verb in ["apply", "create"] {
        let error = api.refused(&[verb, "-f", &wrong]).await;
        assert!(error.contains("did you mean `size`?"), "{error}");
    }
    assert!(api.ok(&["delete", "-f", &both]).await.contains("deleted"));
}

/// Name and size of each item.
fn sizes(list: &Value) -> Vec<(&str, i64)> {
    let items = list["items"].as_array().unwrap().iter();
    let size = |item: &Value| item["spec"]["size"].as_i64().unwrap();
    items
        .map(|item| (item["metadata"]["name"].as_str().unwrap(), size(item)))
        .collect()
}

fn rest_of(list: &Value) -> &str {
    list["metadata"]["continue"].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_pages_of_a_list_are_of_one_moment() {
    let api = Api::start().await;
    let names = ["a", "b", "c", "d", "e", "f", "g"];
    api.apply(&names.map(|name| widget(name, 1))).await;
    let first = api.page("limit=3").await;
    assert_eq!(sizes(&first), [("a", 1), ("b", 1), ("c", 1)]);
    assert_eq!(first["metadata"]["remainingItemCount"], 4);

    api.ok(&["delete", "widget", "d", "a"]).await;
    api.apply(&[widget("c2", 1), widget("e", 2)]).await;
    let next = format!("limit=3&continue={}", rest_of(&first));
    let second = api.page(&next).await;
    assert_eq!(sizes(&second), [("d", 1), ("e", 1), ("f", 1)]);
    let revision = &first["metadata"]["resourceVersion"];
    assert_eq!(&second["metadata"]["resourceVersion"], revision);
    let last = api
        .page(&format!("limit=3&continue={}", rest_of(&second)))
        .await;
    assert_eq!(sizes(&last), [("g", 1)]);
    assert_eq!(rest_of(&last), "");
    assert!(last["metadata"].get("remainingItemCount").is_none());

    let now = ["b", "c", "c2", "e", "f", "g"];
    let revision = revision.as_str().unwrap();
    let exact = format!("resourceVersion={revision}&resourceVersionMatch=Exact");
    let then = api.page(&exact).await;
    assert_eq!(sizes(&then), names.map(|name| (name, 1)));
    let in_pages = ["get", "widgets", "--chunk-size=2", "--output=name"];
    let shown = api.ok(&in_pages).await;
    let shown: Vec<&str> = shown
        .lines()
        .map(|line| line.rsplit('/').next().unwrap())
        .collect();
    assert_eq!(shown, now);
    // A page has as many as asked for when the selector leaves out others, and nobody counts the rest.
    let chosen = api.page("limit=1&labelSelector=app%20in%20(c2,g)").await;
    assert_eq!(sizes(&chosen), [("c2", 1)]);
    assert!(chosen["metadata"].get("remainingItemCount").is_none());
    let next = format!(
        "labelSelector=app%20in%20(c2,g)&continue={}",
        rest_of(&chosen)
    );
    assert_eq!(sizes(&api.page(&next).await), [("g", 1)]);
    let one = api.page("limit=1&fieldSelector=metadata.name=c").await;
    assert_eq!((sizes(&one), rest_of(&one)), (vec![("c", 1)], ""));
    let table = api.ok(&["get", "widgets", "--chunk-size=4"]).await;
    assert_eq!(table.lines().count(), 1 + now.len(), "{table}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_a_moment_that_is_not_known_any_more_is_refused_and_can_go_on() {
    let api = Api::start_over(MemoryStore::default().with_events(3)).await;
    api.apply(&["a", "b", "c"].map(|name| widget(name, 1)))
        .await;
    let first = api.page("limit=1").await;
    api.apply(&["b", "c", "d", "e"].map(|name| widget(name, 2)))
        .await;
    let path = "/apis/example.org/v1/namespaces/default/widgets";
    let next = format!("{path}?continue={}", rest_of(&first));
    let refusal = api.refusal(&next).await;
    assert_eq!(
        (&refusal["code"], &refusal["reason"]),
        (&json!(410), &json!("Expired"))
    );
    let rest = api.page(&format!("continue={}", rest_of(&refusal))).await;
    assert_eq!(sizes(&rest), [("b", 2), ("c", 2), ("d", 2), ("e", 2)]);
    for (query, says) in [
        ("continue=x", "begin the list anew"),
        ("limit=many", "limit is not a number"),
        ("limit=1&resourceVersion=99999", "not reached yet"),
        ("resourceVersionMatch=Exact", "no resourceVersion to match"),
        (
            "resourceVersion=7&resourceVersionMatch=Newest",
            "Unsupported value",
        ),
        ("sendInitialEvents=false", "a list has no events"),
        ("watch=true&sendInitialEvents=true", "NotOlderThan only"),
        (
            "watch=true&resourceVersionMatch=NotOlderThan",
            "with sendInitialEvents only",
        ),
        (
            "watch=true&sendInitialEvents=true&resourceVersionMatch=Exact",
            "Unsupported value",
        ),
    ] {
        let raw = format!("{path}?{query}");
        let error = api.refused(&["get", "--raw", &raw]).await;
        assert!(error.contains(says), "{query}: {error}");
    }
    let both = format!("{path}?resourceVersion=7&continue={}", rest_of(&first));
    let error = api.refused(&["get", "--raw", &both]).await;
    assert!(error.contains("leave out resourceVersion"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_may_do_without_what_is_there_already() {
    let api = Api::start().await;
    api.apply(&[widget("a", 1)]).await;
    let path = "/apis/example.org/v1/widgets?watch=true&sendInitialEvents=false&resourceVersionMatch=NotOlderThan";
    let mut command = api.command(&["get", "--request-timeout=60s", "--raw", path]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let shown = std::io::BufReader::new(child.stdout.take().unwrap());
    let first = tokio::task::spawn_blocking(move || {
        let mut events = serde_json::Deserializer::from_reader(shown).into_iter::<Value>();
        events.next().unwrap().unwrap()
    });
    // The watch begins at some time: what is written after that is shown.
    for size in 1.. {
        api.apply(&[widget("b", size)]).await;
        if first.is_finished() {
            break;
        }
    }
    let first = first.await.unwrap();
    assert_eq!(first["object"]["metadata"]["name"], "b", "{first}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_events_that_do_not_come_without_knowing_why() {
    let api = Api::start().await;
    api.apply(&[widget("a", 1)]).await;
    let path = "/apis/example.org/v1/widgets?watch=true";
    let watch = ["get", "--request-timeout=60s", "--raw", path];
    let mut command = api.command(&watch);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let shown = std::io::BufReader::new(child.stdout.take().unwrap());
    let mut events = serde_json::Deserializer::from_reader(shown).into_iter::<Value>();
    let mut next = || events.next().unwrap().unwrap();
    assert_eq!(next()["type"], "ADDED");
    let reason = "events wait for shard-3, which has no leader";
    api.store.log().stall(Some(reason.to_owned()));
    let last = next();
    assert_eq!(
        (&last["type"], &last["object"]["message"]),
        (&json!("ERROR"), &json!(reason))
    );
    child.wait().unwrap();
    let error = api.refused(&watch).await;
    assert!(error.contains(reason), "{error}");
    assert_eq!(sizes(&api.page("").await), [("a", 1)]);
    api.store.log().stall(None);
    let watch = "/apis/example.org/v1/widgets?watch=true&timeoutSeconds=1";
    assert!(api.ok(&["get", "--raw", watch]).await.contains("ADDED"));
}
