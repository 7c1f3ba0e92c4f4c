//! The program when nodes come and go under it.

use super::federation::{Ended, Federation, Krakectl, Lines, app, busy, refusing};

#[test]
fn a_dead_node_is_left_for_the_next_and_said_so() {
    let federation = Federation::new();
    let node = federation.node("paris");
    let dead = refusing();
    let krakectl = Krakectl::new(&[&dead, &node.address]);
    let ended = krakectl.feed(&["apply", "-f", "-"], &app("shop")).ok();
    assert_eq!(ended.stdout, "application.krake.dev/shop created\n");
    assert!(
        ended.stderr.contains("connection refused; asking"),
        "{}",
        ended.stderr
    );
    let quiet = krakectl.run(&["-q", "get", "apps"]).ok();
    assert_eq!(quiet.stderr, "");
}

#[test]
fn without_a_majority_the_code_is_eleven() {
    let busy = busy();
    let krakectl = Krakectl::new(&[&busy.address]);
    let ended = krakectl.run(&["--request-timeout", "1s", "get", "apps"]);
    let ended = ended.failed(11, "service-unavailable");
    assert!(ended.stderr.contains("krakectl status"), "{}", ended.stderr);
}

#[test]
fn get_w_shows_each_change_once_across_a_failover() {
    let federation = Federation::new();
    let first = federation.node("dresden");
    let second = federation.node("paris");
    let krakectl = Krakectl::new(&[&first.address, &second.address]);
    krakectl.feed(&["apply", "-f", "-"], &app("a")).ok();
    let mut child = krakectl.start(&["get", "apps", "-w"]);
    let lines = Lines::of(child.stdout.take().unwrap());
    let next = || lines.next();
    assert!(
        next().starts_with("NAME   PHASE"),
        "the headings come first"
    );
    assert!(next().starts_with("a "));
    federation.set_status("a", "Progressing", "0/1");
    let line = next();
    assert!(
        line.contains("Progressing") && line.contains("0/1"),
        "{line}"
    );
    drop(first);
    let krakectl = Krakectl::new(&[&second.address]);
    krakectl.feed(&["apply", "-f", "-"], &app("b")).ok();
    assert!(
        next().starts_with("b "),
        "the new one comes, and nothing twice"
    );
    federation.set_status("a", "Running", "1/1");
    let line = next();
    assert!(line.starts_with("a ") && line.contains("Running"), "{line}");
    // A label is in no column: that change is not shown.
    let labelled = app("a").replace("team: web", "team: shop");
    krakectl.feed(&["apply", "-f", "-"], &labelled).ok();
    krakectl.run(&["delete", "app", "b"]).ok();
    federation.finish_deletion("b");
    let line = next();
    assert!(
        line.starts_with("b ") && line.ends_with("(deleted)"),
        "{line}"
    );
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn apply_wait_survives_its_node_and_ends_when_the_application_runs() {
    let federation = Federation::new();
    let first = federation.node("dresden");
    let second = federation.node("paris");
    let krakectl = Krakectl::new(&[&first.address, &second.address]);
    krakectl.write("f.yaml", &app("shop"));
    let mut child = krakectl.start(&["apply", "-f", "f.yaml", "--wait", "--timeout", "60s"]);
    let lines = Lines::of(child.stderr.take().unwrap());
    federation.until(|federation| federation.app("shop"));
    federation.set_status("shop", "Progressing", "0/2");
    // The program follows it, so the watch is there.
    let mut line = lines.next();
    if line == "shop  Pending" {
        line = lines.next();
    }
    assert_eq!(line, "shop  Progressing  0/2 at dresden  as the test says");
    drop(first);
    federation.set_status("shop", "Running", "2/2");
    let rest = lines.rest();
    assert!(
        rest.contains(&"shop  Running  2/2 at dresden".to_owned()),
        "{rest:?}"
    );
    let ended = Ended::of(child).ok();
    assert_eq!(ended.stdout, "application.krake.dev/shop created\n");
}

#[test]
fn a_closed_pipe_ends_it_quietly() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    let mut child = krakectl.start(&["get", "apps", "-w"]);
    drop(child.stdout.take());
    krakectl.feed(&["apply", "-f", "-"], &app("a")).ok();
    let ended = Ended::of(child);
    assert_eq!(ended.code, 141, "{ended:?}");
    assert!(!ended.stderr.contains("panicked"), "{}", ended.stderr);
}

#[test]
fn ctrl_c_ends_a_wait_with_130() {
    let federation = Federation::new();
    let node = federation.node("dresden");
    let krakectl = Krakectl::new(&[&node.address]);
    krakectl.write("f.yaml", &app("shop"));
    let mut child = krakectl.start(&["apply", "-f", "f.yaml", "--wait"]);
    let lines = Lines::of(child.stderr.take().unwrap());
    assert_eq!(lines.next(), "shop  Pending");
    let id = child.id().to_string();
    let killed = std::process::Command::new("kill")
        .args(["-INT", &id])
        .status();
    assert!(killed.unwrap().success());
    let ended = Ended::of(child);
    assert_eq!(ended.code, 130, "{ended:?}");
    let line = lines.next();
    assert!(line.starts_with("interrupted"), "{line}");
}
