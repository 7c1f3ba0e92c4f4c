//! Every command, as somebody types it.

use krake_cli::context::{Context, ContextFile};
use serde_json::{Value, json};

use super::federation::{Federation, Krakectl, TOKEN, app};

/// What changes from run to run.
fn stable(text: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    for line in text.lines() {
        let age = |word: &str| {
            word.ends_with('s') && word.len() < 4 && word.starts_with(|c: char| c.is_ascii_digit())
        };
        let line: Vec<&str> = line
            .split(' ')
            .map(|word| if age(word) { "0s" } else { word })
            .collect();
        words.push(line.join(" "));
    }
    words.join("\n")
}

fn site(name: &str) -> Value {
    json!({"apiVersion": "krake.dev/v1", "kind": "Site", "metadata": {"name": name, "uid": name, "creationTimestamp": "2026-01-01T00:00:00Z", "labels": {"country": "DE"}},
        "spec": {"operator": "acme", "cordoned": false, "location": {"country": "DE", "place": name}},
        "status": {"state": "Alive", "metrics": {"carbon": 120.0, "price": 0.3}}})
}

#[test]
fn apply_get_describe_and_delete() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    krakectl.write("shop.yaml", &app("shop"));
    let apply = |arguments: &[&str]| {
        let all: Vec<&str> = ["apply", "-f", "shop.yaml"]
            .iter()
            .chain(arguments)
            .copied()
            .collect();
        krakectl.run(&all).ok().stdout
    };
    assert_eq!(
        apply(&["--dry-run=client"]),
        "application.krake.dev/shop checked (client dry run)\n"
    );
    assert_eq!(
        apply(&["--dry-run"]),
        "application.krake.dev/shop created (server dry run)\n"
    );
    assert_eq!(federation.app("shop"), None);
    assert_eq!(
        apply(&["--server-side"]),
        "application.krake.dev/shop created\n"
    );
    assert_eq!(apply(&[]), "application.krake.dev/shop unchanged\n");
    krakectl.write("shop.yaml", &app("shop").replace("400", "300"));
    assert_eq!(apply(&["-o", "name"]), "application.krake.dev/shop\n");
    federation.set_status("shop", "Running", "2/2");

    let table = krakectl.run(&["get", "apps"]).ok();
    insta::assert_snapshot!("get-apps", stable(&table.stdout));
    let wide = krakectl.run(&["get", "app", "shop", "-o", "wide"]).ok();
    insta::assert_snapshot!("get-wide", stable(&wide.stdout));
    let all = krakectl.run(&["get", "apps", "-A", "--no-headers"]).ok();
    assert!(
        all.stdout.starts_with("default   shop   Running   2/2"),
        "{}",
        all.stdout
    );
    assert_eq!(
        krakectl
            .run(&["get", "apps", "-l", "team=web", "-o", "name"])
            .ok()
            .stdout,
        "application.krake.dev/shop\n"
    );
    assert_eq!(
        krakectl
            .run(&["get", "apps", "-l", "team=x", "-o", "name"])
            .ok()
            .stdout,
        ""
    );
    let none = krakectl.run(&["get", "apps", "-n", "other"]).ok();
    assert_eq!(
        none.stderr,
        "no applications in namespace other (-A: in all)\n"
    );
    let phase = krakectl
        .run(&["get", "app/shop", "-o", "jsonpath={.status.phase}"])
        .ok();
    assert_eq!(phase.stdout, "Running\n");
    let json: Value =
        serde_json::from_str(&krakectl.run(&["get", "app/shop", "-o", "json"]).ok().stdout)
            .unwrap();
    assert_eq!(
        json["spec"]["placement"]["require"],
        json!(["carbon <= 300"])
    );
    let list: Value =
        serde_json::from_str(&krakectl.run(&["get", "apps", "-o", "json"]).ok().stdout).unwrap();
    assert_eq!(list["items"][0]["kind"], "Application");

    // What get prints can be applied as it is.
    let yaml = krakectl
        .run(&["get", "app", "shop", "-o", "yaml"])
        .ok()
        .stdout;
    let again = krakectl.feed(&["apply", "-f", "-"], &yaml).ok();
    assert_eq!(again.stdout, "application.krake.dev/shop unchanged\n");

    let described = krakectl.run(&["describe", "app", "shop"]).ok().stdout;
    for text in [
        "Name:            shop",
        "ConfigMap/shop",
        "dresden",
        "carbon <= 300",
    ] {
        assert!(described.contains(text), "{described}");
    }
    deletes_what_is_there(&federation, &krakectl);
}

fn deletes_what_is_there(federation: &Federation, krakectl: &Krakectl) {
    krakectl.run(&["get", "app", "none"]).failed(3, "not-found");
    krakectl
        .run(&["delete", "app", "none"])
        .failed(3, "not-found");
    krakectl
        .run(&["delete", "app", "none", "--ignore-not-found"])
        .ok();
    krakectl.run(&["get", "zebras"]).failed(3, "unknown-kind");
    krakectl
        .run(&["delete", "app", "shop", "--dry-run=server"])
        .ok();
    assert_eq!(
        federation.app("shop").unwrap()["metadata"].get("deletionTimestamp"),
        None
    );

    let child = krakectl.start(&["delete", "-f", "shop.yaml", "--wait", "--timeout", "60s"]);
    federation.until(|federation| {
        let app = federation.app("shop")?;
        app["metadata"].get("deletionTimestamp").cloned()
    });
    federation.finish_deletion("shop");
    let ended = super::federation::Ended::of(child).ok();
    assert_eq!(ended.stdout, "application.krake.dev/shop deleted\n");
    assert_eq!(federation.app("shop"), None);
}

#[test]
fn plain_manifests_become_one_application() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    let plain = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\napiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Service\n  metadata: {name: b}\n";
    let arguments = [
        "apply",
        "-f",
        "-",
        "--name",
        "web",
        "-L",
        "country = DE",
        "--weight",
        "carbon=1",
    ];
    let ended = krakectl.feed(&arguments, plain).ok();
    assert_eq!(ended.stdout, "application.krake.dev/web created\n");
    let stored = federation.app("web").unwrap();
    assert_eq!(stored["spec"]["source"]["manifests"][1]["kind"], "Service");
    assert_eq!(
        stored["spec"]["placement"],
        json!({"require": ["country = DE"], "weights": {"carbon": 1}})
    );
    // An error in one of them is shown where it was written.
    let ended = krakectl.feed(
        &["apply", "-f", "-", "--name", "web"],
        &plain.replace("kind: Service", "kind: Namespace"),
    );
    let ended = ended.failed(9, "cluster-scoped");
    assert!(ended.stderr.contains("<stdin>:8:3"), "{}", ended.stderr);
}

#[test]
fn somebody_elses_fields_are_a_conflict_until_forced() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    krakectl.feed(&["apply", "-f", "-"], &app("shop")).ok();
    let client = krake_cli::Client::new([&node.address], Some(TOKEN.to_owned())).unwrap();
    let body = json!({"apiVersion": "krake.dev/v1", "kind": "Application", "metadata": {"name": "shop", "namespace": "default"},
        "spec": {"placement": {"stickiness": 0.5}}});
    let path = "/apis/krake.dev/v1/namespaces/default/applications/shop?fieldManager=bob";
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime
        .block_on(client.request(
            http::Method::PATCH,
            path,
            krake_cli::client::APPLY_PATCH,
            body.to_string(),
        ))
        .unwrap();
    let mine = app("shop").replace("  placement:\n", "  placement:\n    stickiness: 0.2\n");
    let ended = krakectl
        .feed(&["apply", "-f", "-"], &mine)
        .failed(4, "conflict");
    assert!(
        ended.stderr.contains("bob") && ended.stderr.contains("--force-conflicts"),
        "{}",
        ended.stderr
    );
    krakectl
        .feed(&["apply", "-f", "-", "--force-conflicts"], &mine)
        .ok();
    assert_eq!(
        federation.app("shop").unwrap()["spec"]["placement"]["stickiness"],
        0.2
    );
}

#[test]
fn wait_ends_when_the_state_is_reached_or_time_is_over() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    krakectl.feed(&["apply", "-f", "-"], &app("shop")).ok();
    let ended = krakectl
        .run(&["wait", "app", "shop", "--timeout", "1s"])
        .failed(7, "timeout");
    assert!(
        ended.stderr.contains("not ready after 1s"),
        "{}",
        ended.stderr
    );
    federation.set_status("shop", "Unplaceable", "0/2");
    let ended = krakectl.feed(&["apply", "-f", "-", "--wait"], &app("shop"));
    let ended = ended.failed(8, "no-suitable-site");
    assert!(
        ended.stderr.contains("krakectl why default/shop"),
        "{}",
        ended.stderr
    );
    federation.set_status("shop", "Failed", "0/2");
    let ended = krakectl.feed(&["apply", "-f", "-", "--wait"], &app("shop"));
    let ended = ended.failed(1, "failed");
    assert!(
        ended.stderr.contains("as the test says"),
        "{}",
        ended.stderr
    );
    let child = krakectl.start(&["wait", "app/shop", "--for=ready", "--timeout", "60s"]);
    federation.set_status("shop", "Running", "2/2");
    let ended = super::federation::Ended::of(child).ok();
    assert_eq!(ended.stdout, "application.krake.dev/shop condition met\n");
    krakectl.run(&["wait", "app/shop", "--for=placed"]).ok();
    krakectl
        .run(&["wait", "app/shop", "--for=condition=Ready"])
        .ok();
    krakectl
        .run(&["wait", "app/shop", "--for=phase=running"])
        .ok();
    krakectl.run(&["wait", "app/none", "--for=deleted"]).ok();
    krakectl
        .run(&["wait", "app/none", "--for=ready"])
        .failed(3, "not-found");
    krakectl
        .run(&["wait", "app/shop", "--for=redy"])
        .failed(2, "usage");
}

#[test]
fn plan_and_why_explain() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    let plan = krakectl.feed(&["plan", "-f", "-"], &app("shop")).ok();
    insta::assert_snapshot!("plan", plan.stdout);
    let ended = krakectl.feed(&["plan", "-f", "-"], &app("huge"));
    assert_eq!(ended.code, 8, "{ended:?}");
    insta::assert_snapshot!("plan-unplaceable", ended.stdout);
    let json = krakectl
        .feed(&["plan", "-f", "-", "-o", "json"], &app("shop"))
        .ok();
    let json: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(
        json["decisions"][0]["candidates"][1]["rejections"][0]["filter"],
        "Metric"
    );
    assert_eq!(federation.app("shop"), None, "a plan changes nothing");

    let why = krakectl.run(&["why", "team/shop"]).ok();
    insta::assert_snapshot!("why", why.stdout);
    let json: Value =
        serde_json::from_str(&krakectl.run(&["why", "shop", "-o", "json"]).ok().stdout).unwrap();
    assert_eq!(json["decision"]["app"]["namespace"], "default");
    krakectl.run(&["why", "missing"]).failed(3, "not-found");
}

#[test]
fn status_ends_with_one_when_a_site_is_lost() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    krakectl.run(&["status"]).ok();
    krakectl.run(&["status", "--wait"]).ok();
    let lonely = federation.node("lonely");
    let krakectl = Krakectl::new(&[&lonely.address]);
    let ended = krakectl.run(&["status"]);
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(ended.stdout.contains("! paris is lost"), "{}", ended.stdout);
    krakectl
        .run(&["status", "--wait", "--timeout", "1s"])
        .failed(7, "timeout");
    let ended = krakectl.run(&["status", "-o", "json"]);
    assert_eq!(ended.code, 1);
    let json: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(json["servedBy"], "lonely");
}

#[test]
fn sites_are_cordoned_and_tokens_made() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    federation.put("sites", site("dresden"));
    federation.put("sites", site("paris"));
    let table = krakectl.run(&["get", "sites", "-o", "wide"]).ok();
    assert!(table.stdout.contains("acme"), "{}", table.stdout);
    let ended = krakectl.run(&["site", "cordon", "dresden", "paris"]).ok();
    assert_eq!(
        ended.stdout,
        "site.krake.dev/dresden cordoned\nsite.krake.dev/paris cordoned\n"
    );
    let again = krakectl.run(&["site", "cordon", "dresden"]).ok();
    assert_eq!(again.stdout, "site.krake.dev/dresden already cordoned\n");
    let cordoned = krakectl
        .run(&["get", "site", "paris", "-o", "jsonpath={.spec.cordoned}"])
        .ok();
    assert_eq!(cordoned.stdout, "true\n");
    krakectl.run(&["site", "uncordon", "paris"]).ok();
    krakectl
        .run(&["site", "cordon", "atlantis"])
        .failed(3, "not-found");
    let leaving = krakectl.run(&["delete", "site", "paris"]).ok();
    assert_eq!(leaving.stdout, "site.krake.dev/paris is leaving\n");
    let forced = "jsonpath={.metadata.annotations.krake\\.dev/forced}";
    let site = ["get", "site", "paris", "-o", forced];
    assert_eq!(krakectl.run(&site).ok().stdout.trim(), "");
    krakectl.run(&["delete", "site", "paris", "--force"]).ok();
    assert_eq!(krakectl.run(&site).ok().stdout.trim(), "true");

    let token = krakectl.run(&["token", "create", "--ttl", "2h"]).ok();
    assert_eq!(token.stdout, "krake-join-xyz\n");
    assert!(token.stderr.contains("krake-node join"), "{}", token.stderr);
    let json = krakectl
        .run(&["token", "create", "--ttl", "2h", "-o", "json"])
        .ok();
    assert_eq!(
        serde_json::from_str::<Value>(&json.stdout).unwrap()["token"],
        "krake-join-xyz"
    );
    let list = krakectl.run(&["token", "list"]).ok();
    assert!(list.stdout.contains("ab12   open"), "{}", list.stdout);
    krakectl.run(&["token", "revoke", "ab12"]).ok();
    krakectl
        .run(&["token", "revoke", "none"])
        .failed(3, "not-found");
    let version = krakectl.run(&["version"]).ok();
    assert!(
        version.stdout.contains("krake-test (of dresden"),
        "{}",
        version.stdout
    );
}

#[test]
fn contexts_say_where_the_nodes_are() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[]);
    krakectl.write("admin.token", TOKEN);
    let path = krakectl.directory.path().join("krakectl.toml");
    let mut file = ContextFile::default();
    let context = Context {
        servers: vec![node.address.clone()],
        token_file: Some("admin.token".into()),
        namespace: Some("team".to_owned()),
    };
    file.contexts.insert("testnet".to_owned(), context);
    file.save(&path).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = krakectl.command(arguments);
        command.env_remove("KRAKE_TOKEN").env("KRAKE_CONFIG", &path);
        super::federation::Ended::from(command.output().unwrap())
    };
    run(&["config", "current-context"]).failed(3, "no-context");
    run(&["config", "use-context", "testnt"]).failed(3, "unknown-context");
    run(&["config", "use-context", "testnet"]).ok();
    let none = run(&["get", "apps"]).ok();
    assert!(none.stderr.contains("namespace team"), "{}", none.stderr);
    run(&["config", "set-context", "new"]).failed(2, "usage");
    run(&[
        "config",
        "set-context",
        "new",
        "--server",
        "http://127.0.0.1:1,unix:///a",
        "-n",
        "x",
    ])
    .ok();
    let contexts = run(&["config", "get-contexts"]).ok().stdout;
    assert!(
        contexts.contains("*         testnet   http://"),
        "{contexts}"
    );
    assert!(
        contexts.contains("          new       http://127.0.0.1:1,unix:///a   x"),
        "{contexts}"
    );
    assert!(
        run(&["config", "view"])
            .ok()
            .stdout
            .contains("[contexts.new]")
    );
    run(&["config", "delete-context", "new"]).ok();
    assert_eq!(
        run(&["config", "get-contexts", "-o", "name"]).ok().stdout,
        "testnet\n"
    );
    krakectl.write("krakectl.toml", "current_contxt = 'a'\n");
    run(&["get", "apps"]).failed(9, "context");
}

#[test]
fn what_needs_no_node_needs_none() {
    let krakectl = Krakectl::new(&[]);
    let ended = krakectl.run(&["init"]).ok();
    assert!(
        ended.stdout.contains("app.yaml written"),
        "{}",
        ended.stdout
    );
    krakectl.run(&["init"]).failed(4, "exists");
    krakectl.run(&["init", "--force"]).ok();
    krakectl
        .run(&["apply", "-f", "app.yaml", "--dry-run=client"])
        .ok();
    let bash = krakectl.run(&["completion", "bash"]).ok();
    assert!(bash.stdout.contains("_krakectl"), "{}", bash.stdout.len());
    assert_eq!(
        krakectl.run(&["--print-completion", "bash"]).ok().stdout,
        bash.stdout
    );
    krakectl.run(&["man", "man"]).ok();
    assert!(
        krakectl
            .directory
            .path()
            .join("man/krakectl-apply.1")
            .exists()
    );
    krakectl.run(&["version", "--client"]).ok();
    let codes = krakectl.run(&["help", "exit-codes"]).ok();
    insta::assert_snapshot!("exit-codes", codes.stdout);
    for topic in ["constraints", "output", "config", "apply"] {
        assert!(
            krakectl.run(&["help", topic]).ok().stdout.len() > 200,
            "{topic}"
        );
    }
    let token = krakectl.run(&["help", "token", "create"]).ok();
    assert!(token.stdout.contains("--ttl"), "{}", token.stdout);
    insta::assert_snapshot!("help-apply", krakectl.run(&["apply", "--help"]).ok().stdout);
}

#[test]
fn krakes_names_still_work() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    krakectl.write(
        "cm.yaml",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n",
    );
    let ended = krakectl
        .run(&[
            "kube",
            "app",
            "create",
            "echo",
            "-f",
            "cm.yaml",
            "-L",
            "location is DE",
            "-M",
            "load < 5",
        ])
        .ok();
    assert_eq!(ended.stdout, "application.krake.dev/echo created\n");
    let require = federation.app("echo").unwrap()["spec"]["placement"]["require"].clone();
    assert_eq!(require, json!(["location is DE", "load < 5"]));
    krakectl
        .run(&["kube", "app", "create", "echo", "-f", "cm.yaml"])
        .failed(4, "already-exists");
    krakectl
        .run(&[
            "kubernetes",
            "application",
            "update",
            "echo",
            "-f",
            "cm.yaml",
        ])
        .ok();
    assert!(
        krakectl
            .run(&["kube", "app", "list", "-a"])
            .ok()
            .stdout
            .contains("echo")
    );
    assert!(
        krakectl
            .run(&["kube", "app", "get", "echo"])
            .ok()
            .stdout
            .contains("echo")
    );
    krakectl.run(&["kube", "app", "delete", "echo"]).ok();
    krakectl
        .run(&["kube", "cluster", "register", "-k", "x"])
        .failed(9, "not-here");
    krakectl.run(&["core", "gm", "list"]).failed(9, "not-here");
}
