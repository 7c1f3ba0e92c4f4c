//! Each bad input gives a clear error with its code and name, and changes nothing.

use super::federation::{Federation, Krakectl, app, refusing};

struct Case {
    name: &'static str,
    text: String,
    code: i32,
    slug: &'static str,
    /// What the error must say.
    says: &'static [&'static str],
}

fn case(
    name: &'static str,
    text: impl Into<String>,
    slug: &'static str,
    says: &'static [&'static str],
) -> Case {
    Case {
        name,
        text: text.into(),
        code: 9,
        slug,
        says,
    }
}

/// Ten times ten times ten…
fn bomb() -> String {
    let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        let list = vec![format!("*a{}", level - 1); 10].join(", ");
        text.push_str(&format!("a{level}: &a{level} [{list}]\n"));
    }
    text
}

fn cases() -> Vec<Case> {
    let mut cases = grammar_cases();
    cases.extend(type_cases());
    cases.extend(limit_cases());
    cases
}

/// Too much of it.
fn limit_cases() -> Vec<Case> {
    let good = app("shop");
    vec![
        case(
            "brackets",
            "[".repeat(2 * 1024 * 1024),
            "yaml-limit",
            &["64 levels"],
        ),
        case("bomb", bomb(), "yaml-limit", &["250000 values"]),
        case(
            "large",
            format!("{good}        # {}\n", "x".repeat(4 * 1024 * 1024)),
            "too-large",
            &["3 MiB"],
        ),
        case(
            "long-name",
            good.replace(
                "  name: shop\n",
                &format!("  name: {}\n", "x".repeat(70_000)),
            ),
            "invalid",
            &["70000 characters", "the limit is 253"],
        ),
        case(
            "errors",
            format!(
                "{good}{}",
                (0..20_000)
                    .map(|n| format!("  x{n}: 1\n"))
                    .collect::<String>()
            ),
            "unknown-field",
            &["19980 more"],
        ),
        case(
            "manifests",
            good.replace(
                "manifests:\n",
                &format!("manifests:\n{}", "      - {}\n".repeat(20_000)),
            ),
            "invalid",
            &["1 to 200 manifests", "mend these first"],
        ),
        case(
            "documents",
            "---\na: 1\n".repeat(2000),
            "yaml-limit",
            &["1024 documents"],
        ),
        case(
            "large-app",
            good.replace("key: value", &format!("key: {}", "x".repeat(600 * 1024))),
            "too-large",
            &["512 KiB"],
        ),
    ]
}

/// Not what it should be.
fn grammar_cases() -> Vec<Case> {
    let good = app("shop");
    vec![
        case(
            "broken",
            good.replace("spec:", "spec: ["),
            "yaml",
            &["f.yaml:", "nothing was sent"],
        ),
        case(
            "unknown-field",
            good.replace("require:", "requires:"),
            "unknown-field",
            &["f.yaml:14:5", "did you mean `require`?"],
        ),
        case(
            "metric",
            good.replace("carbon <=", "carbn <="),
            "unknown-metric",
            &["f.yaml:15:9", "carbon", "did you mean"],
        ),
        case(
            "constraint",
            good.replace("carbon <= 400", "country in (DE"),
            "constraint",
            &["f.yaml:15:", "expected"],
        ),
        case(
            "no-kind",
            good.replace("kind: Application\n", ""),
            "no-kind",
            &["kind: Application"],
        ),
        case(
            "wrong-kind",
            good.replace("kind: Application\n", "kind: Aplication\n"),
            "unknown-kind",
            &["did you mean `application`?"],
        ),
        case(
            "no-name",
            good.replace("  name: shop\n  labels", "  labels"),
            "no-name",
            &["metadata.name"],
        ),
        case(
            "manifest-no-kind",
            good.replace("        kind: ConfigMap\n", ""),
            "required",
            &["manifests[0].kind"],
        ),
        case(
            "manifest-no-name",
            good.replace("metadata: {name: shop}", "metadata: {}"),
            "required",
            &["manifests[0].metadata.name"],
        ),
        case(
            "other-namespace",
            good.replace(
                "metadata: {name: shop}",
                "metadata: {name: a, namespace: other}",
            ),
            "other-namespace",
            &["leave it out"],
        ),
        case(
            "cluster-scoped",
            good.replace("kind: ConfigMap", "kind: Namespace"),
            "cluster-scoped",
            &["whole cluster"],
        ),
        case(
            "plain",
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n",
            "not-an-application",
            &["--name NAME"],
        ),
        case(
            "version",
            good.replace("krake.dev/v1", "krake.dev/v2"),
            "unknown-version",
            &["write krake.dev/v1"],
        ),
        case("empty", "# nothing\n", "no-manifests", &["krakectl init"]),
        case(
            "twice",
            format!("{good}---\n{good}"),
            "duplicate",
            &["twice"],
        ),
        case("binary", "a\u{0}b: [\n", "yaml", &["f.yaml"]),
    ]
}

/// Not what it should be, in ways that YAML itself would allow.
fn type_cases() -> Vec<Case> {
    let good = app("shop");
    vec![
        case(
            "unknown-metadata",
            good.replace("  name: shop\n", "  name: shop\n  lables: {}\n"),
            "unknown-field",
            &["metadata.lables", "did you mean `labels`?"],
        ),
        case(
            "number-as-name",
            good.replace("  name: shop\n", "  name: 5\n"),
            "wrong-type",
            &["f.yaml:4:9", "put it in quotes"],
        ),
        case(
            "duplicate-key",
            good.replace("  name: shop\n", "  name: shop\n  name: shop\n"),
            "yaml",
            &["duplicate key `name`"],
        ),
        case(
            "not-finite",
            good.replace(
                "carbon <= 400",
                "carbon <= 400\n    weights: {carbon: .nan}",
            ),
            "yaml",
            &["not a finite number"],
        ),
    ]
}

#[test]
fn each_bad_manifest_is_refused_with_its_place_and_changes_nothing() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    for case in cases() {
        krakectl.write("f.yaml", &case.text);
        let begun = std::time::Instant::now();
        let ended = krakectl.run(&["apply", "-f", "f.yaml"]);
        let name = case.name;
        assert_eq!(ended.code, case.code, "{name}: {ended:?}");
        let ended = ended.failed(case.code, case.slug);
        for text in case.says {
            let found = ended.stderr.to_lowercase().contains(&text.to_lowercase());
            assert!(found, "{name}: `{text}` is not in\n{}", ended.stderr);
        }
        assert!(ended.stdout.is_empty(), "{name}: {}", ended.stdout);
        assert!(
            ended.stderr.len() < 16_000,
            "{name}: {}",
            ended.stderr.len()
        );
        assert!(
            begun.elapsed().as_secs() < 20,
            "{name}: {:?}",
            begun.elapsed()
        );
        assert_eq!(federation.store.log().end(), 0, "{name} changed something");
    }
}

#[test]
fn the_unknown_metric_is_drawn_as_other_errors_are() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    krakectl.write("f.yaml", &app("shop").replace("carbon <=", "carbn <="));
    let ended = krakectl.run(&["apply", "-f", "f.yaml"]);
    insta::assert_snapshot!(ended.stderr);
}

/// Names come from other people: what a terminal would obey is written out.
#[test]
fn an_error_shows_what_a_terminal_would_obey() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    let bad = app("shop").replace("  name: shop\n", "  name: \"a\\u001b[31m\\u202eb\"\n");
    krakectl.write("f.yaml", &bad);
    let ended = krakectl
        .run(&["apply", "-f", "f.yaml"])
        .failed(9, "invalid");
    assert!(
        ended.stderr.contains("a\\u{1b}[31m\\u{202e}b"),
        "{}",
        ended.stderr
    );
    assert!(
        !ended.stderr.contains(['\u{1b}', '\u{202e}']),
        "{}",
        ended.stderr
    );
}

#[test]
fn with_one_bad_document_none_is_applied() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    // Only the node finds out: the metric is unknown there.
    let bad = app("bad").replace("carbon <=", "carbn <=");
    let input = format!("{}---\n{bad}---\n{}", app("a"), app("b"));
    let ended = krakectl.feed(&["apply", "-f", "-"], &input);
    let ended = ended.failed(9, "unknown-metric");
    assert!(
        ended.stderr.contains("nothing was applied"),
        "{}",
        ended.stderr
    );
    assert!(ended.stderr.contains("<stdin>:31:9"), "{}", ended.stderr);
    assert_eq!(federation.store.log().end(), 0);
}

#[test]
fn wrong_tokens_files_and_addresses_say_what_to_do() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    krakectl.write("f.yaml", &app("shop"));
    let with_token = |token: &str, arguments: &[&str]| {
        let mut command = krakectl.command(arguments);
        command.env("KRAKE_TOKEN", token);
        super::federation::Ended::from(command.output().unwrap())
    };
    let ended = with_token("wrong", &["apply", "-f", "f.yaml"]).failed(5, "unauthorized");
    assert!(ended.stderr.contains("--token-file"), "{}", ended.stderr);
    with_token("", &["get", "apps"]).failed(5, "unauthorized");
    krakectl
        .run(&["--token-file", "none", "get", "apps"])
        .failed(5, "token-file");
    krakectl.write("empty", "\n");
    krakectl
        .run(&["--token-file", "empty", "get", "apps"])
        .failed(5, "token-file");
    krakectl
        .run(&["apply", "-f", "none.yaml"])
        .failed(3, "file");
    krakectl
        .run(&["--server", "https://a:1", "get", "apps"])
        .failed(9, "address");
    krakectl
        .run(&["--context", "none", "get", "apps"])
        .failed(3, "unknown-context");

    let refusing = refusing();
    let ended = krakectl
        .run(&["--server", &refusing, "apply", "-f", "f.yaml"])
        .failed(6, "unreachable");
    for text in [refusing.as_str(), "connection refused", "krake-testnet up"] {
        assert!(ended.stderr.contains(text), "{}", ended.stderr);
    }
    assert_eq!(federation.store.log().end(), 0);
}

#[test]
fn wrong_usage_ends_with_two() {
    let krakectl = Krakectl::new(&[]);
    for arguments in [
        &["nothing"][..],
        &["apply"],
        &["get"],
        &["get", "apps", "-o", "xml"],
        &["wait", "app/shop", "--timeout", "soon"],
        &["help", "nothing"],
    ] {
        let ended = krakectl.run(arguments);
        assert_eq!(ended.code, 2, "{arguments:?}: {ended:?}");
        assert!(!ended.stderr.is_empty());
    }
}
