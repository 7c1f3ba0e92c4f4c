//! Nodes for tests: the node's own kinds and checks over a store in memory, several servers on
//! one store as the nodes of one federation, and servers that misbehave.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use krake_kube_api::service::FieldValidation;
use krake_kube_api::{Freshness, MemoryStore, Registry, Service};
use krake_model::metric::default_definitions;
use krake_node::admission::KrakeAdmission;
use krake_placement::spec::Defaults;
use serde_json::{Value, json};

/// The token that the nodes accept.
pub const TOKEN: &str = "test-token";

/// One store that any number of nodes serve.
pub struct Federation {
    pub service: Arc<Service>,
    pub store: Arc<MemoryStore>,
    runtime: tokio::runtime::Runtime,
}

/// One server; its connections break when it is dropped.
pub struct Node {
    pub address: String,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

#[derive(Clone)]
struct Shared {
    service: Arc<Service>,
    name: &'static str,
}

impl Federation {
    pub fn new() -> Self {
        let minute = Duration::from_secs(60);
        let store = Arc::<MemoryStore>::default();
        let service = Service {
            registry: Arc::new(Registry::new(krake_node::kinds::all())),
            store: Arc::<MemoryStore>::clone(&store),
            admission: Arc::new(KrakeAdmission {
                definitions: default_definitions(),
                defaults: Defaults {
                    detect_after: minute,
                    ready_timeout: minute,
                    reschedule_interval: minute,
                    hold_for: minute,
                    max_metric_age: minute,
                },
                may_leave: Arc::new(|_| true),
            }),
            version: json!({"major": "1", "minor": "33", "gitVersion": "v1.33.0+krake-test"}),
            field_validation: FieldValidation::Strict,
        };
        Self {
            service: Arc::new(service),
            store,
            runtime: runtime(),
        }
    }

    pub fn node(&self, name: &'static str) -> Node {
        let runtime = runtime();
        let shared = Shared {
            service: Arc::clone(&self.service),
            name,
        };
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        runtime.spawn(async move { axum::serve(listener, router(shared, true)).await });
        Node {
            address,
            runtime: Some(runtime),
        }
    }

    pub fn socket(&self, path: &Path) -> Node {
        let runtime = runtime();
        let shared = Shared {
            service: Arc::clone(&self.service),
            name: "socket",
        };
        let listener = {
            let _guard = runtime.enter();
            tokio::net::UnixListener::bind(path).unwrap()
        };
        runtime.spawn(async move { axum::serve(listener, router(shared, false)).await });
        Node {
            address: format!("unix://{}", path.display()),
            runtime: Some(runtime),
        }
    }

    /// Does what the federation does itself.
    pub fn put(&self, plural: &str, object: Value) {
        let kind = self.service.registry.find("krake.dev", "v1", plural);
        let store = Arc::clone(&self.service.store);
        self.runtime
            .block_on(store.create(&kind.unwrap(), object))
            .unwrap();
    }

    pub fn app(&self, name: &str) -> Option<Value> {
        let kind = self
            .service
            .registry
            .find("krake.dev", "v1", "applications");
        let kind = kind.unwrap();
        let work = self
            .service
            .store
            .get(&kind, Some("default"), name, Freshness::Latest);
        self.runtime
            .block_on(work)
            .ok()
            .map(|object| (*object).clone())
    }

    /// Writes an application's status, as its owner does.
    pub fn set_status(&self, name: &str, phase: &str, ready: &str) {
        let mut object = self.app(name).unwrap();
        let generation = object["metadata"]["generation"].clone();
        let is_ready = if phase == "Running" { "True" } else { "False" };
        object["status"] = json!({
            "observedGeneration": generation, "phase": phase,
            "conditions": [
                {"type": "Ready", "status": is_ready, "reason": phase, "message": "as the test says", "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": "Placed", "status": if phase == "Unplaceable" { "False" } else { "True" }, "reason": phase, "message": "0 of 2 sites fit", "lastTransitionTime": "2026-01-01T00:00:00Z"},
            ],
            "copies": [{"site": "dresden", "backend": "default", "role": "active", "state": "Ready", "ready": ready,
                "since": "2026-01-01T00:00:00Z", "epoch": {"incarnation": 0, "term": 1, "index": 1}}],
        });
        self.replace(object);
    }

    /// What the federation does when no site holds a copy any more.
    pub fn finish_deletion(&self, name: &str) {
        let object = self.app(name).unwrap();
        let kind = self
            .service
            .registry
            .find("krake.dev", "v1", "applications");
        let revision = krake_kube_api::store::revision_of(&object);
        let store = Arc::clone(&self.service.store);
        self.runtime
            .block_on(store.remove(&kind.unwrap(), Some("default"), name, revision))
            .unwrap();
    }

    fn replace(&self, object: Value) {
        let kind = self
            .service
            .registry
            .find("krake.dev", "v1", "applications");
        let revision = krake_kube_api::store::revision_of(&object);
        let store = Arc::clone(&self.service.store);
        self.runtime
            .block_on(store.update(&kind.unwrap(), object, revision))
            .unwrap();
    }

    /// Waits until `check` finds what it looks for.
    pub fn until<T>(&self, mut check: impl FnMut(&Self) -> Option<T>) -> T {
        let begun = std::time::Instant::now();
        let mut newest = self.store.log().newest();
        loop {
            if let Some(found) = check(self) {
                return found;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "it never came to be"
            );
            self.runtime.block_on(async {
                let _ = tokio::time::timeout(Duration::from_millis(100), newest.changed()).await;
            });
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

fn router(shared: Shared, with_token: bool) -> Router {
    let api = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/plan", post(plan))
        .route("/v1/why/{namespace}/{app}", get(why))
        .route("/v1/tokens", get(tokens).post(create_token))
        .route("/v1/tokens/{id}", delete(revoke))
        .fallback(
            |State(shared): State<Shared>, request: Request| async move {
                shared.service.handle(request).await
            },
        );
    let api = if with_token {
        api.layer(axum::middleware::from_fn(authorize))
    } else {
        api
    };
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .merge(api)
        .layer(axum::middleware::from_fn_with_state(shared.clone(), stamp))
        .with_state(shared)
}

async fn stamp(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let name = shared.name.parse().unwrap();
    response.headers_mut().insert("krake-served-by", name);
    response
}

async fn authorize(request: Request, next: Next) -> Response<Body> {
    let token = request.headers().get("authorization");
    if token.is_some_and(|token| *token == format!("Bearer {TOKEN}")) {
        return next.run(request).await;
    }
    let error = krake_kube_api::ApiError::new(
        401,
        "Unauthorized",
        "the token is not the federation's admin token",
    );
    krake_kube_api::service::respond(401, &error.to_status())
}

async fn status(State(shared): State<Shared>) -> Json<Value> {
    let lost = shared.name == "lonely";
    Json(json!({
        "federation": {"name": "test", "id": "f-1", "shards": 1}, "servedBy": shared.name, "isolated": false,
        "sites": [{"name": "dresden", "node": "a", "state": "Alive", "addresses": []},
            {"name": "paris", "node": "b", "state": if lost { "Lost" } else { "Alive" }, "addresses": []}],
        "groups": [{"group": "meta", "leader": "dresden", "term": 1, "voters": ["dresden"], "learners": ["paris"]},
            {"group": "shard-0", "leader": "dresden", "term": 1, "voters": ["dresden"], "learners": []}],
    }))
}

fn record(name: &str, namespace: &str, trigger: &str, fits: bool) -> Value {
    let node = krake_model::NodeId::from_bytes([7; 32]);
    let target = |site: &str| json!({"node": node, "site": site, "backend": "default"});
    let none = json!({"cpuMillis": 0, "memoryBytes": 0, "pods": 0});
    json!({
        "id": "d-12345678", "app": {"namespace": namespace, "name": name}, "generation": 1,
        "decidedAt": "2026-01-01T09:41:02.000Z", "decidedBy": "dresden", "trigger": trigger,
        "outcome": if fits { "Placed" } else { "Unplaceable" },
        "chosen": if fits { target("dresden") } else { Value::Null }, "previous": null,
        "reason": if fits { "dresden has the best score" } else { "0 of 2 sites fit" },
        "weights": {"carbon": 0.5, "price": 0.0, "latency": 0.5}, "stickiness": 0.1,
        "needs": {"cpuMillis": 500, "memoryBytes": 67_108_864, "pods": 2}, "requiredKinds": ["apps/v1/Deployment"],
        "candidates": [
            {"target": target("dresden"), "verdict": if fits { "Chosen" } else { "Filtered" },
             "score": if fits { json!(0.875) } else { Value::Null }, "stickiness": 0.0,
             "terms": [{"metric": "carbon", "raw": 120.0, "normalized": 0.88, "weight": 0.5},
                {"metric": "latency", "raw": null, "normalized": 0.0, "weight": 0.5}],
             "rejections": if fits { json!([]) } else { json!([{"filter": "Capacity", "message": "needs 2 cpu, 1 is free"}]) },
             "reportAgeMs": 900, "free": none},
            {"target": target("paris"), "verdict": "Filtered", "score": null, "stickiness": 0.0, "terms": [],
             "rejections": [{"filter": "Metric", "message": "`carbon <= 400`: carbon is 612"}, {"filter": "Cordoned", "message": "its operator takes no new apps"}],
             "reportAgeMs": 250_000, "free": none},
        ],
    })
}

async fn plan(Json(body): Json<Value>) -> Json<Value> {
    let decisions: Vec<Value> = body["applications"]
        .as_array()
        .unwrap()
        .iter()
        .map(|app| {
            let name = app["metadata"]["name"].as_str().unwrap();
            let namespace = app["metadata"]["namespace"].as_str().unwrap();
            record(name, namespace, "Plan", name != "huge")
        })
        .collect();
    Json(json!({"decisions": decisions}))
}

async fn why(
    axum::extract::Path((namespace, app)): axum::extract::Path<(String, String)>,
) -> Response {
    if app == "missing" {
        let problem =
            json!({"status": 404, "code": "krake::not-found", "detail": "there is no application"});
        return krake_kube_api::service::respond(404, &problem);
    }
    let history = json!([{"id": "d-0", "decidedAt": "2026-01-01T08:00:00.000Z", "outcome": "Placed", "chosen": "paris", "previous": null, "reason": "it was better"}]);
    let copies = json!([{"site": "dresden", "backend": "default", "namespace": "krake-default", "role": "active", "state": "Ready", "ready": "2/2",
        "since": "2026-01-01T09:41:03.000Z", "epoch": {"incarnation": 0, "term": 1, "index": 4}}]);
    krake_kube_api::service::respond(
        200,
        &json!({"decision": record(&app, &namespace, "SpecChanged", true), "history": history, "copies": copies}),
    )
}

async fn tokens() -> Json<Value> {
    Json(
        json!({"tokens": [{"id": "ab12", "state": "open", "expiresAt": "2026-01-01T10:00:00.000Z", "issuer": "dresden"}]}),
    )
}

async fn create_token(Json(body): Json<Value>) -> Json<Value> {
    assert_eq!(body["ttlSeconds"], 7200);
    Json(json!({"token": "krake-join-xyz", "id": "ab12", "expiresAt": "2026-01-01T10:00:00.000Z"}))
}

async fn revoke(axum::extract::Path(id): axum::extract::Path<String>) -> Response {
    let code = if id == "ab12" { 200 } else { 404 };
    krake_kube_api::service::respond(
        code,
        &json!({"detail": "there is no token", "code": "krake::not-found"}),
    )
}

/// An address that refuses connections; the port stays taken, so that no other test gets it.
pub fn refusing() -> String {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = format!("http://{}", socket.local_addr().unwrap());
    std::mem::forget(socket);
    address
}

/// A server that accepts connections and says nothing, as a stopped process does.
pub fn silent() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    (
        format!("http://{}", listener.local_addr().unwrap()),
        listener,
    )
}

/// Forwards each request to `to`; once, the answer to a request that begins with `method` is
/// kept back and the connection closed: the request was carried out and nobody knows.
pub fn loses_one_answer(to: &str, method: &'static str) -> String {
    let to: SocketAddr = to.trim_start_matches("http://").parse().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        let mut lost = false;
        for client in listener.incoming() {
            let Ok(mut client) = client else { return };
            let mut request = Vec::new();
            let mut buffer = [0; 65536];
            // One request per connection; its body comes with it or just after.
            while !complete(&request) {
                match client.read(&mut buffer) {
                    Ok(0) | Err(_) => break,
                    Ok(read) => request.extend_from_slice(&buffer[..read]),
                }
            }
            let mut server = TcpStream::connect(to).unwrap();
            let text = String::from_utf8_lossy(&request).into_owned();
            let closing = text.replacen("\r\n", "\r\nconnection: close\r\n", 1);
            server.write_all(closing.as_bytes()).unwrap();
            let mut answer = Vec::new();
            let _ = server.read_to_end(&mut answer);
            if text.starts_with(method) && !lost {
                lost = true;
                continue;
            }
            let _ = client.write_all(&answer);
        }
    });
    address
}

fn complete(request: &[u8]) -> bool {
    let text = String::from_utf8_lossy(request);
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length")
            .then(|| value.trim().parse().ok())?
    });
    body.len() >= length.unwrap_or(0)
}

/// A server that lives and never answers anything else, as a node that is cut off and waits for a
/// majority.
pub fn lives_but_waits() -> Node {
    let runtime = runtime();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .fallback(|| async { std::future::pending::<()>().await });
    runtime.spawn(async move { axum::serve(listener, router).await });
    Node {
        address,
        runtime: Some(runtime),
    }
}

/// A server that says 503 once and then nothing, as a node that waits for a majority again.
pub fn refuses_then_waits() -> Node {
    let runtime = runtime();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let refused = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let answer = move || {
        let first = !refused.swap(true, std::sync::atomic::Ordering::SeqCst);
        async move {
            if !first {
                std::future::pending::<()>().await;
            }
            let error = krake_kube_api::ApiError::unavailable("no majority");
            krake_kube_api::service::respond(503, &error.to_status())
        }
    };
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .fallback(answer);
    runtime.spawn(async move { axum::serve(listener, router).await });
    Node {
        address,
        runtime: Some(runtime),
    }
}

/// A server that says 503 to everything.
pub fn busy() -> Node {
    let runtime = runtime();
    let listener = runtime
        .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
        .unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answer = || async {
        let error = krake_kube_api::ApiError::unavailable("shard-3 has no leader");
        krake_kube_api::service::respond(503, &error.to_status())
    };
    runtime.spawn(async move { axum::serve(listener, Router::new().fallback(answer)).await });
    Node {
        address,
        runtime: Some(runtime),
    }
}

/// `krakectl` with nothing of the surroundings.
pub struct Krakectl {
    pub directory: tempfile::TempDir,
    pub servers: String,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Krakectl {
    pub fn new(servers: &[&str]) -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            servers: servers.join(","),
        }
    }

    pub fn write(&self, name: &str, text: &str) {
        std::fs::write(self.directory.path().join(name), text).unwrap();
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_krakectl"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.directory.path())
            .env("LANG", "C.UTF-8")
            .env("KRAKE_TOKEN", TOKEN)
            .current_dir(self.directory.path())
            .stdin(Stdio::null());
        if !self.servers.is_empty() {
            command.env("KRAKE_SERVER", &self.servers);
        }
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Ended {
        self.command(arguments).output().unwrap().into()
    }

    /// Runs with `input` on stdin.
    pub fn feed(&self, arguments: &[&str], input: &str) -> Ended {
        let mut child = self
            .command(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        // A program that refuses the input early closes it.
        let _ = stdin.write_all(input.as_bytes());
        drop(stdin);
        child.wait_with_output().unwrap().into()
    }

    /// Starts and does not wait.
    pub fn start(&self, arguments: &[&str]) -> Child {
        self.command(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }
}

/// Longest that a test waits for a line or an end: a lost event must fail it, not hang it.
const PATIENCE: Duration = Duration::from_secs(90);

/// Lines of a running program, each within a bounded time.
pub struct Lines(std::sync::mpsc::Receiver<String>);

impl Lines {
    pub fn of(output: impl Read + Send + 'static) -> Self {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1000);
        std::thread::spawn(move || {
            let lines = std::io::BufRead::lines(std::io::BufReader::new(output));
            for line in lines.map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self(receiver)
    }

    /// The next line.
    #[track_caller]
    pub fn next(&self) -> String {
        self.0.recv_timeout(PATIENCE).expect("another line")
    }

    /// All that come until the end.
    pub fn rest(self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            match self.0.recv_timeout(PATIENCE) {
                Ok(line) => lines.push(line),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return lines,
                Err(error) => panic!("it does not end ({error}) after {lines:?}"),
            }
        }
    }
}

impl Ended {
    /// Waits for the end of a program, within a bounded time.
    pub fn of(child: Child) -> Self {
        let id = child.id().to_string();
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || sender.send(child.wait_with_output()));
        match receiver.recv_timeout(PATIENCE) {
            Ok(output) => output.unwrap().into(),
            Err(error) => {
                let _ = Command::new("kill").args(["-9", &id]).status();
                panic!("krakectl does not end: {error}");
            }
        }
    }

    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, 0, "{self:?}");
        self
    }

    /// It failed with `code` and named `slug`.
    #[track_caller]
    pub fn failed(self, code: i32, slug: &str) -> Self {
        assert_eq!(self.code, code, "{}\n{}", self.stdout, self.stderr);
        let slug = format!("[krake::{slug}]");
        assert!(
            self.stderr.contains(&slug),
            "{slug} is not in:\n{}",
            self.stderr
        );
        self
    }
}

/// An application as YAML.
pub fn app(name: &str) -> String {
    format!(
        "apiVersion: krake.dev/v1
kind: Application
metadata:
  name: {name}
  labels: {{team: web}}
spec:
  source:
    manifests:
      - apiVersion: v1
        kind: ConfigMap
        metadata: {{name: {name}}}
        data: {{key: value}}
  placement:
    require:
      - carbon <= 400
"
    )
}
