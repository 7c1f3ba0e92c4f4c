//! Bad input, all of it once: each gives a clear error that names what to do, ends with its exit
//! code, and changes nothing. Unit tests of the crates go into the details of each.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use krake_model::member::SignedInvitation;
use krake_model::{FederationId, Invitation, NodeId, Timestamp};
use krake_tests::{Testnet, program, run_within};
use serde_json::{Value, json};

/// No refusal takes longer; a program that then still runs is stopped and the test fails.
const REFUSED_WITHIN: Duration = Duration::from_secs(15);
/// No refusal says more.
const SAID_MAX: usize = 16 * 1024;
/// How programs end when their input is not valid.
const INVALID: i32 = 9;
const APPLICATIONS: &str = "/apis/krake.dev/v1/namespaces/default/applications";

const GOOD: &str = "\
apiVersion: krake.dev/v1
kind: Application
metadata:
  name: bad
  namespace: default
spec:
  placement:
    require:
      - carbon <= 4000
  source:
    manifests:
      - apiVersion: v1
        kind: ConfigMap
        metadata: {name: settings}
        data: {key: value}
";

/// One bad manifest: what krakectl says of it, and what a node says that is sent it raw.
struct Case {
    item: &'static str,
    text: String,
    slug: &'static str,
    says: &'static [&'static str],
    status: u16,
    node_says: &'static str,
}

/// Ten times ten times ten…
fn bomb() -> String {
    let mut text = format!("{GOOD}a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..12 {
        let list = vec![format!("*a{}", level - 1); 10].join(", ");
        text.push_str(&format!("a{level}: &a{level} [{list}]\n"));
    }
    text
}

/// The list's part about manifests: what they say.
fn wrong_words() -> Vec<Case> {
    let with = |from: &str, to: &str| {
        assert!(GOOD.contains(from), "{from}");
        GOOD.replace(from, to)
    };
    vec![
        Case {
            item: "broken YAML",
            text: with("spec:", "spec: ["),
            slug: "yaml",
            says: &["bad.yaml:8:12", "nothing was sent"],
            status: 400,
            node_says: "not YAML: error: line 8",
        },
        Case {
            item: "an unknown field",
            text: with("require:", "requires:"),
            slug: "unknown-field",
            says: &["bad.yaml:8:5", "did you mean `require`?"],
            status: 400,
            node_says: "did you mean `require`?",
        },
        Case {
            item: "an unknown metric",
            text: with("carbon <=", "carbn <="),
            slug: "unknown-metric",
            says: &["bad.yaml:9:9", "Did you mean `carbon`?"],
            status: 422,
            node_says: "Did you mean `carbon`?",
        },
        Case {
            item: "a constraint that does not parse",
            text: with("carbon <= 4000", "country in (DE"),
            slug: "constraint",
            says: &[
                "- country in (DE\n    ·                       ▲\n",
                "expected `,` or `)`",
                "help: write `LABEL = X`",
            ],
            status: 422,
            node_says: "expected `,` or `)`\n  country in (DE\n                ^",
        },
        Case {
            item: "an application without kind",
            text: with("kind: Application\n", ""),
            slug: "no-kind",
            says: &["write `kind: Application`"],
            status: 400,
            node_says: "write `kind: Application`",
        },
        Case {
            item: "an application without name",
            text: with("  name: bad\n", ""),
            slug: "no-name",
            says: &["write `metadata: {name: shop}`"],
            status: 422,
            node_says: "metadata.name: Required value",
        },
        Case {
            item: "a manifest without kind",
            text: with("        kind: ConfigMap\n", ""),
            slug: "required",
            says: &["manifests[0].kind", "such as `kind: Deployment`"],
            status: 422,
            node_says: "manifests[0].kind: Required value",
        },
        Case {
            item: "a manifest without name",
            text: with("{name: settings}", "{}"),
            slug: "required",
            says: &[
                "manifests[0].metadata.name",
                "such as `metadata: {name: web}`",
            ],
            status: 422,
            node_says: "manifests[0].metadata.name: is required, such as",
        },
        Case {
            item: "a manifest with another namespace",
            text: with("{name: settings}", "{name: settings, namespace: other}"),
            slug: "other-namespace",
            says: &["bad.yaml:14:47", "leave it out"],
            status: 422,
            node_says: "leave it out",
        },
        Case {
            item: "a cluster-scoped object",
            text: with("kind: ConfigMap", "kind: Namespace"),
            slug: "cluster-scoped",
            says: &["belongs to a whole cluster", "Leave it out"],
            status: 422,
            node_says: "belongs to a whole cluster",
        },
    ]
}

/// The list's part about manifests: how much of it there is.
fn too_much() -> Vec<Case> {
    vec![
        Case {
            item: "2 MiB of nested brackets",
            text: "[".repeat(2 * 1024 * 1024),
            slug: "yaml-limit",
            says: &["64 levels", "nothing was sent"],
            status: 400,
            node_says: "recursion limit",
        },
        Case {
            item: "an alias bomb",
            text: bomb(),
            slug: "yaml-limit",
            says: &["250000 values", "nothing was sent"],
            status: 400,
            node_says: "aliases expanded",
        },
        Case {
            item: "a body over the limit",
            text: GOOD.replace(
                "key: value",
                &format!("key: {}", "x".repeat(4 * 1024 * 1024)),
            ),
            slug: "too-large",
            says: &["3 MiB"],
            status: 413,
            node_says: "3145728 bytes; split it",
        },
    ]
}

/// How a program ended and what it said.
#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    said: String,
}

impl Ended {
    /// It must have ended with `code` and have said all of `words`, briefly.
    #[track_caller]
    fn refused(&self, item: &str, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{item}: {}", self.said);
        for word in words {
            assert!(
                self.said.contains(word),
                "{item}: `{word}` is not in:\n{}",
                self.said
            );
        }
        assert!(
            self.said.len() < SAID_MAX,
            "{item}: {} bytes",
            self.said.len()
        );
        assert!(!self.said.contains("panicked"), "{item}: {}", self.said);
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            code: output.status.code(),
            said: text(&output.stdout) + &text(&output.stderr),
        }
    }
}

fn run(command: &mut Command) -> Ended {
    run_within(command, REFUSED_WITHIN).into()
}

/// The federation all of this is tried on, and a directory for what is tried.
struct Trial {
    net: Testnet,
    scratch: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    http: reqwest::Client,
}

impl Trial {
    fn new() -> Self {
        Self {
            net: Testnet::up(&["--sites", "2"]),
            scratch: tempfile::tempdir().unwrap(),
            runtime: tokio::runtime::Runtime::new().unwrap(),
            http: reqwest::Client::new(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    }

    fn krakectl(&self, arguments: &[&str]) -> Ended {
        self.net.krakectl(arguments).into()
    }

    /// krake-node on a site of its own, with free ports unless `arguments` say otherwise.
    fn node(&self, command: &[&str], data: &str, arguments: &[&str]) -> Ended {
        let mut flags = BTreeMap::from([
            ("--site.name", "oslo"),
            ("--peers.listen", "[\"127.0.0.1:0\"]"),
            ("--api.listen", "[\"127.0.0.1:0\"]"),
        ]);
        for pair in arguments.chunks(2) {
            flags.insert(pair[0], pair[1]);
        }
        let mut program = Command::new(program("krake-node"));
        program
            .args(command)
            .arg("--node.data_dir")
            .arg(self.path(data));
        for (flag, value) in flags {
            program.args([flag, value]);
        }
        run(&mut program)
    }

    /// Sends a request to the first site's node: its status, and the message in its answer.
    fn send(
        &self,
        method: reqwest::Method,
        path: &str,
        token: &str,
        body: Option<(&str, String)>,
    ) -> (u16, String) {
        let url = format!("{}{path}", self.net.sites()[0].api);
        let mut request = self.http.request(method, url).timeout(REFUSED_WITHIN);
        if !token.is_empty() {
            request = request.bearer_auth(token);
        }
        if let Some((kind, body)) = body {
            request = request.header("content-type", kind).body(body);
        }
        self.runtime.block_on(async {
            let answer = request.send().await.unwrap();
            let status = answer.status().as_u16();
            let text = answer.text().await.unwrap();
            assert!(text.len() < SAID_MAX, "{} bytes", text.len());
            let value: Value = serde_json::from_str(&text).unwrap_or_default();
            let message = value["message"].as_str().unwrap_or(&text).to_owned();
            (status, message)
        })
    }

    /// What must stay as it is: the applications, the members, and what runs at the sites.
    fn state(&self) -> Value {
        let list = |kind: &str| -> Value {
            let output = self.net.krakectl(&["get", kind, "-A", "-o", "json"]);
            assert!(output.status.success(), "{}", Ended::from(output).said);
            serde_json::from_slice(&output.stdout).unwrap()
        };
        let names: Vec<Value> = list("sites")["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|site| json!([site["metadata"]["name"], site["spec"]]))
            .collect();
        let clusters: Vec<Value> = self
            .net
            .sites()
            .iter()
            .map(|site| self.config_maps(&site.kubeconfig))
            .collect();
        json!({"applications": list("applications")["items"], "sites": names, "clusters": clusters})
    }

    /// Name and content of every `ConfigMap` of a site's cluster.
    fn config_maps(&self, kubeconfig: &Path) -> Value {
        let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig).unwrap();
        let list: Value = self.runtime.block_on(async {
            let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default())
                .await
                .unwrap();
            let client = kube::Client::try_from(config).unwrap();
            let request = http::Request::get("/api/v1/configmaps")
                .body(Vec::new())
                .unwrap();
            client.request(request).await.unwrap()
        });
        let items = list["items"].as_array().unwrap();
        items
            .iter()
            .map(|item| {
                json!([
                    item["metadata"]["namespace"],
                    item["metadata"]["name"],
                    item["data"]
                ])
            })
            .collect()
    }

    /// Tries something that must not change anything.
    fn unchanged(&self, item: &str, attempt: impl FnOnce()) {
        let before = self.state();
        attempt();
        assert_eq!(self.state(), before, "{item} changed something");
    }

    fn bad_manifests(&self) {
        let token = self.net.sites()[0].token();
        for case in wrong_words().into_iter().chain(too_much()) {
            let file = self.write("bad.yaml", &case.text);
            self.unchanged(case.item, || {
                for command in ["apply", "plan"] {
                    let ended = self.krakectl(&[command, "-f", &file]);
                    ended.refused(case.item, INVALID, case.says);
                    ended.refused(case.item, INVALID, &[&format!("[krake::{}]", case.slug)]);
                }
                let body = Some(("application/yaml", case.text.clone()));
                let (status, message) = self.send(http::Method::POST, APPLICATIONS, &token, body);
                assert_eq!(status, case.status, "{}: {message}", case.item);
                assert!(message.contains(case.node_says), "{}: {message}", case.item);
            });
        }
    }

    /// Plain kubectl, which sends on what it does not refuse itself.
    fn bad_manifests_with_kubectl(&self) {
        let node = &self.net.sites()[0];
        for case in wrong_words() {
            // kubectl itself refuses YAML it cannot read and objects without kind or name.
            let kubectls_own = ["yaml", "no-kind", "no-name"].contains(&case.slug);
            let file = self.write("bad.yaml", &case.text);
            self.unchanged(case.item, || {
                for way in ["--server-side=false", "--server-side=true"] {
                    let ended = Ended::from(node.kubectl(&["apply", way, "-f", &file]));
                    let says = if kubectls_own {
                        "error"
                    } else {
                        case.node_says
                    };
                    ended.refused(case.item, 1, &[says]);
                }
            });
        }
    }

    /// The first keeps it, the second is told whose it is.
    fn two_applications_that_want_the_same_object(&self) {
        let first = GOOD.replace("name: bad", "name: first");
        let file = self.write("first.yaml", &first);
        let ended = self.krakectl(&["apply", "-f", &file, "--wait", "--timeout", "30s"]);
        assert_eq!(ended.code, Some(0), "{}", ended.said);
        let clusters = self.state()["clusters"].clone();
        assert!(clusters.to_string().contains("settings"), "{clusters}");

        let second = first
            .replace("name: first", "name: second")
            .replace("key: value", "key: other");
        let file = self.write("second.yaml", &second);
        self.krakectl(&["apply", "-f", &file, "--wait", "--timeout", "30s"]).refused(
            "two applications that want the same object",
            1,
            &[
                "[krake::failed]",
                "ConfigMap `settings` belongs to application default/first; rename one of the two",
            ],
        );
        assert_eq!(
            self.state()["clusters"],
            clusters,
            "the first one's object was changed"
        );
        let ended = self.krakectl(&[
            "delete",
            "app",
            "first",
            "second",
            "--wait",
            "--timeout",
            "30s",
        ]);
        assert_eq!(ended.code, Some(0), "{}", ended.said);
    }

    fn bad_admin_tokens(&self) {
        let good = self.net.sites()[0].token();
        let join = self.token(&[]);
        let file = self.write("good.yaml", GOOD);
        let damaged = format!("{good}x");
        let other = "krake-admin-AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        for token in ["nonsense", &damaged, other, &join] {
            self.unchanged("a wrong admin token", || {
                let path = self.write("wrong.token", token);
                let mut krakectl = Command::new(program("krakectl"));
                krakectl.args(["--server", &self.net.sites()[0].api, "--token-file", &path]);
                let ended = run(krakectl.args(["apply", "-f", &file]));
                ended.refused(
                    "a wrong admin token",
                    5,
                    &["[krake::unauthorized]", "--token-file"],
                );
                assert!(
                    !ended.said.contains(token),
                    "the token was shown: {}",
                    ended.said
                );
                let body = Some(("application/yaml", GOOD.to_owned()));
                let (status, message) = self.send(http::Method::POST, APPLICATIONS, token, body);
                assert_eq!(status, 401, "{message}");
                assert!(
                    message.contains("not the federation's admin token"),
                    "{message}"
                );
            });
        }
        let (status, message) = self.send(http::Method::GET, APPLICATIONS, "", None);
        assert_eq!(status, 401, "{message}");
        assert!(message.contains("Authorization: Bearer TOKEN"), "{message}");
    }

    /// A token for one new site, and its id.
    fn invitation(&self, arguments: &[&str]) -> (String, String) {
        let arguments = [&["token", "create", "-o", "json"], arguments].concat();
        let output = self.net.krakectl(&arguments);
        assert!(output.status.success(), "{}", Ended::from(output).said);
        let value: Value = serde_json::from_slice(&output.stdout).unwrap();
        let text = |key: &str| value[key].as_str().unwrap().to_owned();
        (text("token"), text("id"))
    }

    fn token(&self, arguments: &[&str]) -> String {
        self.invitation(arguments).0
    }

    /// A token of the right form that expired long ago.
    fn expired_token() -> String {
        let key = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
        let issuer = NodeId::from_bytes(key.verifying_key().to_bytes());
        let invitation = Invitation {
            federation: FederationId::from_bytes([7; 32]),
            id: [7; 16],
            expires_at: Timestamp::from_millis(1),
            site: None,
            contacts: vec![(issuer, "127.0.0.1:1".to_owned())],
            issuer,
        };
        let signed = SignedInvitation::sign(&invitation, |bytes| {
            use ed25519_dalek::Signer;
            key.sign(bytes).to_bytes()
        });
        signed.unwrap().to_string()
    }

    /// Last, because a token is used by a site that joins.
    fn bad_join_tokens(&self) {
        let good = self.token(&[]);
        let damaged = format!("{}x", &good[..good.len() - 2]);
        let expired = Self::expired_token();
        let for_other = self.token(&["--site", "bergen"]);
        let (revoked, id) = self.invitation(&[]);
        let ended = self.krakectl(&["token", "revoke", &id]);
        assert_eq!(ended.code, Some(0), "{}", ended.said);
        for (item, token, says) in [
            ("a wrong token", "nonsense", "a token starts with `krake1-`"),
            ("a damaged token", &damaged, "copy it again, whole"),
            (
                "an expired token",
                &expired,
                "ask for a new one (krakectl token create)",
            ),
            (
                "a revoked token",
                &revoked,
                "ask for a new one (krakectl token create)",
            ),
            (
                "a token for another site",
                &for_other,
                "the token is for the site `bergen`",
            ),
        ] {
            self.unchanged(item, || {
                let ended = self.node(&["join", token], "join", &[]);
                ended.refused(item, 1, &[says]);
                assert!(
                    !ended.said.contains(token),
                    "the token was shown: {}",
                    ended.said
                );
            });
            assert!(!self.path("join/membership").exists(), "{item}");
        }
        self.unchanged("a name that is taken", || {
            let taken = &self.net.sites()[0].name;
            self.node(&["join", &good], "join", &["--site.name", taken])
                .refused("a name that is taken", 1, &["set another site.name"]);
        });
        let ended = self.node(&["join", &good], "used", &[]);
        assert_eq!(ended.code, Some(0), "{}", ended.said);
        self.unchanged("a used token", || {
            self.node(&["join", &good], "join", &["--site.name", "bergen"])
                .refused(
                    "a used token",
                    1,
                    &["used already", "krakectl token create"],
                );
        });
        assert!(!self.path("join/membership").exists());
    }

    fn bad_places(&self) {
        let ended = self.node(&["init"], "own", &[]);
        assert_eq!(ended.code, Some(0), "{}", ended.said);

        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap().to_string();
        for key in ["api.listen", "peers.listen"] {
            self.node(
                &["run"],
                "own",
                &[&format!("--{key}"), &format!("[\"{address}\"]")],
            )
            .refused(
                "a port in use",
                1,
                &[&address, key, "in use", "set another address"],
            );
        }

        for kubeconfig in ["/nowhere/kubeconfig", "/dev/null"] {
            let backends = format!("[{{name = \"default\", kubeconfig = \"{kubeconfig}\"}}]");
            self.node(&["run"], "own", &["--backends", &backends])
                .refused(
                    "a kubeconfig that points nowhere",
                    1,
                    &[kubeconfig, "`backends` in the configuration"],
                );
        }

        self.cluster_that_does_not_answer();

        let membership = std::fs::read(self.path("own/membership")).unwrap();
        let invitation = self.token(&[]);
        self.unchanged("a data directory of another federation", || {
            for command in [&["join", &invitation][..], &["init"]] {
                self.node(command, "own", &[]).refused(
                    "a data directory of another federation",
                    1,
                    &["already belongs to federation", "another node.data_dir"],
                );
            }
        });
        assert_eq!(
            std::fs::read(self.path("own/membership")).unwrap(),
            membership
        );
        // Its files in the data directory of a second one.
        let ended = self.node(&["init"], "mixed", &[]);
        assert_eq!(ended.code, Some(0), "{}", ended.said);
        std::fs::copy(self.path("own/membership"), self.path("mixed/membership")).unwrap();
        self.node(&["run"], "mixed", &[]).refused(
            "mixed data directories",
            1,
            &["were mixed", "restore it whole"],
        );
        self.catalogs_that_are_not_what_was_written();

        let running = self.net.sites()[1].data_dir.display().to_string();
        self.unchanged("a data directory in use", || {
            self.node(&["run"], &running, &[]).refused(
                "a data directory in use",
                1,
                &["in use by another krake-node", "node.data_dir"],
            );
        });
        self.node(&["run"], "typo", &[]).refused(
            "a data directory that is none",
            1,
            &["krake-node init", "krake-node join TOKEN"],
        );
        assert!(!self.path("typo").exists());
    }

    fn catalogs_that_are_not_what_was_written(&self) {
        for name in ["emptied", "damaged"] {
            let ended = self.node(&["init"], name, &[]);
            assert_eq!(ended.code, Some(0), "{}", ended.said);
        }
        let way_out = "krake-node restore FILE";
        let segment = self.path("damaged/catalog/segment-0000000000000001");
        let mut bytes = std::fs::read(&segment).unwrap();
        let foreign = bytes.clone();
        bytes[200] ^= 1;
        std::fs::write(&segment, &bytes).unwrap();
        let path = segment.display().to_string();
        self.node(&["run"], "damaged", &[]).refused(
            "a damaged catalog",
            1,
            &[&path, "is damaged at byte", way_out],
        );
        assert_eq!(std::fs::read(&segment).unwrap(), bytes);

        let catalog = self.path("emptied/catalog");
        std::fs::remove_dir_all(&catalog).unwrap();
        for empty in [false, true] {
            if empty {
                std::fs::create_dir(&catalog).unwrap();
            }
            self.node(&["run"], "emptied", &[]).refused(
                "a catalog that is gone",
                1,
                &["what this node promised to the others is lost", way_out],
            );
        }
        std::fs::write(catalog.join(segment.file_name().unwrap()), foreign).unwrap();
        self.node(&["run"], "emptied", &[]).refused(
            "another node's catalog",
            1,
            &["were mixed", way_out],
        );
    }

    /// It may be down for a while only: the node runs, and says what is wrong.
    fn cluster_that_does_not_answer(&self) {
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let kubeconfig = self.write(
            "dead.kubeconfig",
            &json!({
                "apiVersion": "v1", "kind": "Config", "current-context": "dead",
                "clusters": [{"name": "dead", "cluster": {"server": format!("https://{address}")}}],
                "users": [{"name": "dead", "user": {}}],
                "contexts": [{"name": "dead", "context": {"cluster": "dead", "user": "dead"}}],
            })
            .to_string(),
        );
        let log = self.path("dead.log");
        let mut node = Command::new(program("krake-node"))
            .arg("run")
            .arg("--node.data_dir")
            .arg(self.path("own"))
            .args(["--site.name", "oslo", "--peers.listen", "[\"127.0.0.1:0\"]"])
            .args(["--api.listen", "[\"127.0.0.1:0\"]", "--backends"])
            .arg(format!(
                "[{{name = \"default\", kubeconfig = \"{kubeconfig}\"}}]"
            ))
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        let said = loop {
            let said = std::fs::read_to_string(&log).unwrap();
            let ended = node.try_wait().unwrap();
            if ended.is_some()
                || begun.elapsed() > REFUSED_WITHIN
                || said.contains("backend does not answer")
            {
                break said;
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let ended = node.try_wait().unwrap();
        node.kill().unwrap();
        node.wait().unwrap();
        assert_eq!(ended, None, "the node ended: {said}");
        for word in [
            "backend=\"default\"",
            "cannot be reached",
            "nothing new is run there",
        ] {
            assert!(said.contains(word), "`{word}` is not in:\n{said}");
        }
    }

    fn bad_configuration(&self) {
        for (arguments, says) in [
            (&["--site.nmae", "a"][..], "did you mean `site.name`?"),
            (&["--metrics.carbn", "5"], "Did you mean `carbon`?"),
            (&["--metrics.carbon", "nan"], "not a finite number"),
            (
                &["--defaults.detect_after", "-5s"],
                "not a duration such as 15s",
            ),
            (
                &["--limits.report_interval", "0s"],
                "between 100ms and 7days",
            ),
        ] {
            self.node(&["init"], "never", arguments).refused(
                "a configuration that is not valid",
                INVALID,
                &[says],
            );
        }
        let file = self.write("node.toml", "[site]\nname = \"a\"\nnmae = 1\n");
        self.node(&["init", "--config", &file], "never", &[])
            .refused(
                "an unknown key in a file",
                INVALID,
                &["did you mean `site.name`?", "node.toml"],
            );
        assert!(!self.path("never").exists());
    }

    fn no_node_answers(&self) {
        let file = self.write("good.yaml", GOOD);
        // Nobody listens where a listener was and is no more.
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let server = format!("http://{address}");
        run(Command::new(program("krakectl")).args(["--server", &server, "apply", "-f", &file]))
            .refused(
                "no node answering",
                6,
                &[
                    "[krake::unreachable]",
                    &server,
                    "connection refused",
                    "--server",
                ],
            );
    }

    /// The nodes are there, and nothing in them broke.
    fn nodes_are_well(&self) {
        for site in self.net.sites() {
            let answer = self.runtime.block_on(async {
                let url = format!("{}/readyz", site.api);
                self.http
                    .get(url)
                    .timeout(REFUSED_WITHIN)
                    .send()
                    .await
                    .unwrap()
            });
            assert!(answer.status().is_success(), "{}: {answer:?}", site.name);
            let log = std::fs::read_to_string(&site.log).unwrap();
            assert!(!log.contains("panicked"), "{}:\n{log}", site.name);
            assert!(log.len() < 1 << 20, "{} bytes of log", log.len());
        }
    }
}

#[test]
fn every_bad_input_is_refused_clearly_and_changes_nothing() {
    let trial = Trial::new();
    trial.bad_manifests();
    // kubectl is there where the tests on real Kubernetes are.
    if krake_testnet::kube::wanted().unwrap() {
        trial.bad_manifests_with_kubectl();
    }
    trial.two_applications_that_want_the_same_object();
    trial.bad_admin_tokens();
    trial.bad_places();
    trial.bad_configuration();
    trial.no_node_answers();
    trial.nodes_are_well();
    trial.bad_join_tokens();
}
