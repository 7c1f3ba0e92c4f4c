//! The client as a library.

use std::time::Duration;

use krake_cli::Client;
use krake_cli::client::{APPLY_PATCH, ApplyOutcome, ClientError, Deletion, Watch, WatchEventKind};
use serde_json::{Value, json};

use super::federation::{self, Federation, TOKEN};

fn object(name: &str) -> Value {
    json!({"apiVersion": "krake.dev/v1", "kind": "Application", "metadata": {"name": name, "namespace": "default"},
        "spec": {"source": {"manifests": [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}]}}})
}

const APPS: &str = "/apis/krake.dev/v1/namespaces/default/applications";

fn client(servers: &[&str]) -> Client {
    Client::new(servers, Some(TOKEN.to_owned()))
        .unwrap()
        .with_timeout(Duration::from_secs(15))
}

fn run<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(work)
}

#[test]
fn apply_says_what_it_did() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let client = client(&[&node.address]);
    run(async {
        let done = client.apply(&object("shop")).await.unwrap();
        assert_eq!(done.outcome, ApplyOutcome::Created);
        let done = client.apply(&object("shop")).await.unwrap();
        assert_eq!(done.outcome, ApplyOutcome::Unchanged);
        let mut changed = object("shop");
        changed["spec"]["placement"] = json!({"stickiness": 0.3});
        let done = client.apply(&changed).await.unwrap();
        assert_eq!(done.outcome, ApplyOutcome::Configured);
        assert_eq!(done.object["spec"]["placement"]["stickiness"], 0.3);
    });
}

#[test]
fn an_apply_whose_answer_was_lost_is_repeated_at_the_next_node() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let losing = federation::loses_one_answer(&node.address, "PATCH");
    let client = client(&[&losing, &node.address]);
    let done = run(client.apply(&object("shop"))).unwrap();
    assert_eq!(done.outcome, ApplyOutcome::Created);
    assert_eq!(client.current_address(), node.address);
    let stored = federation.app("shop").unwrap();
    assert_eq!(
        stored["metadata"]["generation"], 1,
        "applied once: {stored}"
    );
}

#[test]
fn a_write_that_must_not_be_doubled_is_not_repeated() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let losing = federation::loses_one_answer(&node.address, "POST");
    let client = client(&[&losing, &node.address]);
    let error = run(client.create_token(Duration::from_secs(7200), None)).unwrap_err();
    assert!(matches!(error, ClientError::Unknown { .. }), "{error:?}");
    let error = run(client.request(http::Method::POST, "/nothing", "application/json", "{}"));
    assert_eq!(error.unwrap_err().refusal().unwrap().code, 404);
}

#[test]
fn reads_go_on_at_the_next_node() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let (silent, _listener) = federation::silent();
    let busy = federation::busy();
    let refusing = federation::refusing();
    for bad in [&refusing, &busy.address, &silent] {
        let client = client(&[bad, &node.address]);
        let list = run(client.get(APPS)).unwrap();
        assert_eq!(list["kind"], "ApplicationList", "{bad}");
        assert_eq!(client.current_address(), node.address);
    }
    // A write that is repeatable does so too.
    let client = client(&[&busy.address, &node.address]);
    let path = format!("{APPS}/shop?fieldManager=test");
    let body = object("shop").to_string();
    run(client.request(http::Method::PATCH, &path, APPLY_PATCH, body)).unwrap();
}

#[test]
fn nobody_there_names_each_address_with_its_reason() {
    let (silent, _listener) = federation::silent();
    let refusing = federation::refusing();
    let client = client(&[&refusing, &silent, "unix:///nowhere/api.sock"]);
    let ClientError::Unreachable { tried } = run(client.get(APPS)).unwrap_err() else {
        panic!("it must be unreachable");
    };
    let reasons: Vec<&str> = tried
        .iter()
        .map(|attempt| attempt.reason.as_str())
        .collect();
    assert_eq!(
        reasons,
        [
            "connection refused",
            "accepts connections but does not answer",
            "no such file or directory"
        ]
    );
}

#[test]
fn a_node_that_waits_in_vain_is_left_and_alone_it_is_a_timeout() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let waits = federation::lives_but_waits();
    let both = client(&[&waits.address, &node.address]);
    run(both.get(APPS)).unwrap();
    assert_eq!(both.current_address(), node.address);
    let alone = client(&[&waits.address]).with_timeout(Duration::from_millis(2500));
    let error = run(alone.get(APPS)).unwrap_err();
    assert!(matches!(error, ClientError::Timeout { .. }), "{error:?}");
    // What it said before it fell silent is what is reported.
    let refuses = federation::refuses_then_waits();
    let alone = client(&[&refuses.address]).with_timeout(Duration::from_millis(2500));
    let error = run(alone.get(APPS)).unwrap_err();
    assert_eq!(error.refusal().unwrap().message, "no majority");
}

#[test]
fn busy_nodes_are_asked_until_time_is_over() {
    let busy = federation::busy();
    let client = client(&[&busy.address]).with_timeout(Duration::from_millis(2500));
    let begun = std::time::Instant::now();
    let error = run(client.get(APPS)).unwrap_err();
    let refusal = error.refusal().unwrap();
    assert_eq!(
        (refusal.code, refusal.message.as_str()),
        (503, "shard-3 has no leader")
    );
    assert!(begun.elapsed() >= Duration::from_secs(1), "it tried again");
}

#[test]
fn a_socket_needs_no_token() {
    let federation = Federation::new();
    let directory = tempfile::tempdir().unwrap();
    let node = federation.socket(&directory.path().join("api.sock"));
    let client = Client::new([&node.address], None).unwrap();
    let done = run(client.apply(&object("shop"))).unwrap();
    assert_eq!(done.outcome, ApplyOutcome::Created);
}

#[test]
fn a_delete_is_of_the_object_that_was_there() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let losing = federation::loses_one_answer(&node.address, "DELETE");
    let client = client(&[&losing, &node.address]);
    let apps = krake_cli::client::Resource::applications();
    run(async {
        client.apply(&object("shop")).await.unwrap();
        let uid = client
            .delete_object(&apps, "default", "shop", Deletion::default())
            .await
            .unwrap();
        let stored = client.get(&format!("{APPS}/shop")).await.unwrap();
        assert_eq!(stored["metadata"]["uid"], uid.as_str());
        assert!(stored["metadata"]["deletionTimestamp"].is_string());
        let error = client
            .delete_object(&apps, "default", "other", Deletion::default())
            .await;
        assert!(error.unwrap_err().is_not_found());
    });
}

#[test]
fn a_watch_goes_on_at_the_next_node_without_gap_or_repeat() {
    let federation = Federation::new();
    let first = federation.node("dresden");
    let second = federation.node("paris");
    let client = client(&[&first.address, &second.address]);
    run(async {
        client.apply(&object("a")).await.unwrap();
        client.apply(&object("b")).await.unwrap();
        let (listing, mut watch) = client.watch(APPS, true).await.unwrap();
        assert_eq!(listing.items.len(), 2);
        let name = |item: &Value| {
            item["object"]["metadata"]["name"]
                .as_str()
                .unwrap()
                .to_owned()
        };

        client.apply(&object("c")).await.unwrap();
        let event = watch.next().await.unwrap();
        assert_eq!(
            (event.kind, name(&event.item)),
            (WatchEventKind::Added, "c".to_owned())
        );

        // The node dies; meanwhile one is changed, one is new.
        drop(first);
        let mut changed = object("a");
        changed["metadata"]["labels"] = json!({"x": "y"});
        client.apply(&changed).await.unwrap();
        client.apply(&object("d")).await.unwrap();
        let mut seen = Vec::new();
        for _ in 0..2 {
            let event = watch.next().await.unwrap();
            seen.push((event.kind, name(&event.item)));
        }
        assert_eq!(
            seen,
            [
                (WatchEventKind::Modified, "a".to_owned()),
                (WatchEventKind::Added, "d".to_owned())
            ]
        );
        // Nothing came twice: what is next is what happens next.
        client.apply(&object("e")).await.unwrap();
        assert_eq!(name(&watch.next().await.unwrap().item), "e");
    });
}

/// A watch that has told something has begun at its node.
async fn begin(client: &Client, watch: &mut Watch) {
    client.apply(&object("begun")).await.unwrap();
    let event = watch.next().await.unwrap();
    assert_eq!(event.item["metadata"]["name"], "begun");
}

#[test]
fn a_watch_whose_revision_is_gone_lists_again_and_repeats_nothing() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let client = client(&[&node.address]);
    run(async {
        client.apply(&object("a")).await.unwrap();
        client.apply(&object("b")).await.unwrap();
        let (_, mut watch) = client.watch(APPS, false).await.unwrap();
        begin(&client, &mut watch).await;
        // Everything that is known is void: the server answers with 410.
        federation.store.log().reset(u64::MAX / 2);
        client.apply(&object("c")).await.unwrap();
        let event = watch.next().await.unwrap();
        assert_eq!(event.kind, WatchEventKind::Added);
        assert_eq!(event.item["metadata"]["name"], "c");
        // Nothing came twice: what is next is what happens next.
        client.apply(&object("d")).await.unwrap();
        let event = watch.next().await.unwrap();
        assert_eq!(event.item["metadata"]["name"], "d");
    });
}

#[test]
fn a_watch_at_a_node_that_is_stopped_goes_on_elsewhere() {
    let federation = Federation::new();
    let first = federation.node("dresden");
    let second = federation.node("paris");
    // In front of the first node, so that it can fall silent with its connections open.
    let gate = Gate::new(&first.address);
    let client = client(&[&gate.address, &second.address]);
    run(async {
        let (_, mut watch) = client.watch(APPS, false).await.unwrap();
        begin(&client, &mut watch).await;
        gate.close();
        let other = Client::new([&second.address], Some(TOKEN.to_owned())).unwrap();
        other.apply(&object("a")).await.unwrap();
        let event = tokio::time::timeout(Duration::from_secs(15), watch.next()).await;
        assert_eq!(event.unwrap().unwrap().item["metadata"]["name"], "a");
    });
}

/// Forwards connections until it is closed; then it keeps them open and forwards nothing.
struct Gate {
    address: String,
    closed: std::sync::Arc<std::sync::atomic::AtomicBool>,
}

impl Gate {
    fn new(to: &str) -> Self {
        use std::io::{Read, Write};
        use std::sync::atomic::{AtomicBool, Ordering};
        let to = to.trim_start_matches("http://").to_owned();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let closed = std::sync::Arc::new(AtomicBool::new(false));
        let flag = std::sync::Arc::clone(&closed);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                let server = std::net::TcpStream::connect(&to).unwrap();
                for (mut from, mut into) in [
                    (client.try_clone().unwrap(), server.try_clone().unwrap()),
                    (server, client),
                ] {
                    let flag = std::sync::Arc::clone(&flag);
                    std::thread::spawn(move || {
                        let mut buffer = [0; 65536];
                        while let Ok(read) = from.read(&mut buffer) {
                            if flag.load(Ordering::SeqCst) {
                                // Keeps the connection open until the test ends.
                                std::thread::park();
                            }
                            if read == 0 || into.write_all(&buffer[..read]).is_err() {
                                return;
                            }
                        }
                    });
                }
            }
        });
        Self { address, closed }
    }

    fn close(&self) {
        self.closed.store(true, std::sync::atomic::Ordering::SeqCst);
    }
}
