//! The catalog's own protocol against real nodes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

use std::time::Duration;

use bytes::Bytes;
use krake_catalog_client::protocol::{
    self, Ask, Freshness, PATH, REQUEST_BYTES_MAX, Refusal, Reply, Request, Response, UNASKED,
};
use krake_catalog_client::{CatalogClient, CatalogError, Endpoint};
use krake_consensus::{Command, Expect, Operation, ProposeError};
use krake_model::GroupId;
use krake_tests::{Site, Testnet};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// Everything here is done by then, also on a busy machine.
const SOON: Duration = Duration::from_secs(30);
const LARGE: usize = 64 * 1024;

fn put(key: &str, value: impl Into<Bytes>, expect: Expect) -> Operation {
    Operation::Put {
        key: key.to_owned(),
        value: value.into(),
        expect,
    }
}

fn by_socket(site: &Site) -> Endpoint {
    Endpoint::Unix(site.data_dir.join("api.sock"))
}

async fn connect(endpoint: Endpoint) -> CatalogClient {
    CatalogClient::connect(&endpoint).await.unwrap()
}

async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    let done = tokio::time::timeout(SOON, work).await;
    done.unwrap_or_else(|_| panic!("waited too long for: {what}"))
}

/// `count` keys that one shard holds.
fn keys_of(group: GroupId, shards: u16, count: usize) -> Vec<String> {
    let keys = (0..).map(|number| format!("kv/test/page-{number:04}"));
    keys.filter(|key| protocol::group_of(key, shards) == Some(group))
        .take(count)
        .collect()
}

async fn reads_writes_and_watches(net: &Testnet) {
    let [first, second, third] = net.sites() else {
        panic!("three sites")
    };
    let (first, second) = (
        connect(first.catalog_endpoint()).await,
        connect(by_socket(second)).await,
    );
    let third = connect(third.catalog_endpoint()).await;
    let key = "kv/test/one";
    let group = first.group_of(key).unwrap();
    let mut watch = third.watch(group, key, None).await.unwrap();

    let made = Command::new(vec![put(key, "1", Expect::Absent)]);
    let committed = first.write(group, made.clone()).await.unwrap();
    let (entry, revision) = second
        .get(group, key, Freshness::Linearizable)
        .await
        .unwrap();
    let entry = entry.unwrap();
    assert_eq!(
        (&*entry.value, entry.modified),
        (&b"1"[..], committed.revision)
    );
    assert!(revision >= committed.revision);
    assert_eq!(
        second.write(group, made).await.unwrap(),
        committed,
        "repeated, applied once"
    );

    let again = Command::new(vec![put(key, "2", Expect::Absent)]);
    let refused = second.write(group, again).await.unwrap_err();
    let conflict = ProposeError::Conflict {
        key: key.to_owned(),
        actual: Some(committed.revision),
    };
    assert!(
        matches!(&refused, CatalogError::Refused(Refusal::Write(error)) if *error == conflict),
        "{refused}"
    );
    let newer = Command::new(vec![put(key, "2", Expect::Revision(committed.revision))]);
    let newer = second.write(group, newer).await.unwrap();
    for (committed, value) in [(committed, "1"), (newer, "2")] {
        let event = within("an event", watch.next()).await.unwrap();
        assert_eq!(event.revision, committed.revision);
        assert_eq!(event.changes[0].key, key);
        let entry = event.changes[0].entry.as_ref().unwrap();
        assert_eq!(entry.value, value);
    }
    // What was told is there.
    let stale = third.get_stale(group, key).await.unwrap();
    assert_eq!(stale.entry.unwrap().modified, newer.revision);
    assert!(stale.revision >= newer.revision && stale.index >= newer.index);
    assert!(stale.age.unwrap() < SOON, "{:?}", stale.age);
    // A watch goes on at another node from what one node told.
    let after = Some(committed.revision);
    let mut elsewhere = first.watch(group, key, after).await.unwrap();
    let event = within("an event", elsewhere.next()).await.unwrap();
    assert_eq!(event.revision, newer.revision);
    // One's own write is seen at any node.
    let own = Freshness::AtLeast(newer.revision);
    for client in [&first, &second, &third] {
        let (entry, _) = client.get(group, key, own).await.unwrap();
        assert_eq!(entry.unwrap().value, "2");
    }
    let (none, _) = third
        .get(group, "kv/test/none", Freshness::Linearizable)
        .await
        .unwrap();
    assert_eq!(none, None);
    let genesis = third.get(GroupId::META, "genesis", Freshness::Linearizable);
    assert!(genesis.await.unwrap().0.is_some(), "any key may be read");
}

/// What a watch is told of changes that it did not ask for, and when it asks too late.
async fn bookmarks_and_the_end_of_memory(net: &Testnet) {
    /// With what was there before, more than a node keeps of a group that holds as little.
    const COMMANDS: usize = 300;
    let value = Bytes::from(vec![7; 4 * 1024]);
    let client = connect(net.sites()[0].catalog_endpoint()).await;
    let key = "kv/test/much";
    let group = client.group_of(key).unwrap();
    let mut watch = client.watch(group, "kv/nothing/", None).await.unwrap();
    let command = || Command::new(vec![put(key, value.clone(), Expect::Any)]);
    let first = client.write(group, command()).await.unwrap();
    let bookmark = within("a bookmark", watch.next()).await.unwrap();
    assert!(bookmark.changes.is_empty() && bookmark.revision >= first.revision);
    let writes = (0..COMMANDS).map(|_| client.write(group, command()));
    futures::future::try_join_all(writes).await.unwrap();
    let late = client.watch(group, key, Some(first.revision)).await;
    let gone = late.unwrap_err();
    let compacted = matches!(&gone, CatalogError::Refused(Refusal::Compacted { oldest }) if *oldest > first.revision);
    assert!(compacted, "{gone}");
}

async fn lists_in_pages(net: &Testnet) {
    let client = connect(by_socket(&net.sites()[1])).await;
    let group = GroupId::of_shard(5);
    let keys = keys_of(group, client.shards(), 25);
    let puts = keys.iter().map(|key| put(key, "x", Expect::Any)).collect();
    let committed = client.write(group, Command::new(puts)).await.unwrap();
    let page = client
        .list(group, "kv/test/page-", 10, Freshness::Linearizable)
        .await
        .unwrap();
    assert_eq!(page.revision, committed.revision);
    let (mut read, mut more) = (page.entries, page.more);
    // A list does not see what is written after it began.
    let delete = Operation::Delete {
        key: keys[20].clone(),
        expect: Expect::Present,
    };
    client
        .write(group, Command::new(vec![delete]))
        .await
        .unwrap();
    let first = more.unwrap();
    while let Some(list) = more {
        let page = client.next_page(list, 10).await.unwrap();
        assert_eq!(page.revision, committed.revision);
        assert!(page.entries.len() == 10 || page.more.is_none());
        read.extend(page.entries);
        more = page.more;
    }
    let read: Vec<String> = read.into_iter().map(|(key, _)| key).collect();
    assert_eq!(read, keys);
    let gone = client.next_page(first, 10).await.unwrap_err();
    assert!(
        matches!(gone, CatalogError::Refused(Refusal::ListGone)),
        "{gone}"
    );
}

async fn refusals(net: &Testnet) {
    let site = &net.sites()[0];
    for token in ["", "wrong"] {
        let endpoint = Endpoint::Tcp {
            address: site.api_address().to_owned(),
            token: token.to_owned(),
        };
        let error = CatalogClient::connect(&endpoint).await.unwrap_err();
        let denied = matches!(&error, CatalogError::Denied { status, .. } if *status == 401);
        assert!(denied, "{error}");
    }
    let plain = reqwest::Client::new().get(format!("{}{PATH}", site.api));
    let plain = plain.bearer_auth(site.token()).send().await.unwrap();
    assert_eq!(plain.status().as_u16(), 426);
    assert_eq!(plain.headers()["upgrade"], protocol::UPGRADE);

    let client = connect(site.catalog_endpoint()).await;
    for key in ["applications/default/shop", "assign/default/shop", "kv/one"] {
        assert!(client.group_of(key).is_err());
        let command = Command::new(vec![put(key, "x", Expect::Any)]);
        let error = client
            .write(GroupId::of_shard(1), command)
            .await
            .unwrap_err();
        let refused = matches!(&error, CatalogError::Refused(Refusal::NotWritable { .. }));
        assert!(refused, "{error}");
    }
    let unknown = client.get(GroupId::of_shard(99), "kv/a/b", Freshness::Stale);
    let error = unknown.await.unwrap_err();
    let refused = matches!(&error, CatalogError::Refused(Refusal::UnknownGroup { .. }));
    assert!(refused, "{error}");

    // What the node would end the connection for is not even sent.
    let large = vec![7; REQUEST_BYTES_MAX];
    let command = Command::new(vec![put("kv/a/b", large, Expect::Any)]);
    let group = client.group_of("kv/a/b").unwrap();
    let error = client.write(group, command).await.unwrap_err();
    assert!(matches!(&error, CatalogError::Encode(_)), "{error}");
    assert!(client.get(group, "kv/a/b", Freshness::Stale).await.is_ok());
}

/// Asks for the upgrade by hand and reads the welcome.
async fn begin(
    stream: &mut (impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin),
    token: &str,
) {
    let request = format!(
        "GET {PATH} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nConnection: Upgrade\r\nUpgrade: krake-catalog/1\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    assert!(
        head.starts_with(b"HTTP/1.1 101 "),
        "{}",
        String::from_utf8_lossy(&head)
    );
    let welcome = next(stream).await.unwrap();
    assert!(matches!(welcome.reply, Reply::Welcome { shards: 16, .. }));
}

async fn next(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Option<Response> {
    let length = protocol::read_length(stream, protocol::REPLY_BYTES_MAX)
        .await
        .unwrap()?;
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).await.unwrap();
    Some(protocol::decode(&bytes).unwrap())
}

async fn garbage(net: &Testnet) {
    let site = &net.sites()[0];
    let mut huge = u32::MAX.to_le_bytes().to_vec();
    huge.extend([7; 1000]);
    let mut other_version = 5_u32.to_le_bytes().to_vec();
    other_version.extend([9; 5]);
    let mut damaged = 12_u32.to_le_bytes().to_vec();
    damaged.extend([1; 12]);
    let mut zero = Vec::new();
    let request = Request {
        number: UNASKED,
        ask: Ask::Unwatch { watch: 1 },
    };
    protocol::write_frame(&mut zero, &request).unwrap();
    for (bytes, says) in [
        (huge, "a frame has 1 to"),
        (other_version, "record version 9 is not supported"),
        (damaged, "damaged"),
        (zero, "numbered from 1"),
    ] {
        let mut stream = TcpStream::connect(site.api_address()).await.unwrap();
        begin(&mut stream, &site.token()).await;
        stream.write_all(&bytes).await.unwrap();
        let answer = within("the reason", next(&mut stream)).await.unwrap();
        assert_eq!(answer.number, UNASKED);
        let Reply::Refused(refusal) = answer.reply else {
            panic!("{answer:?}")
        };
        assert!(refusal.to_string().contains(says), "{refusal}");
        assert!(within("the end", next(&mut stream)).await.is_none());
    }
    // The node goes on.
    let client = connect(site.catalog_endpoint()).await;
    let group = client.group_of("kv/test/after").unwrap();
    let command = Command::new(vec![put("kv/test/after", "x", Expect::Any)]);
    client.write(group, command).await.unwrap();
}

/// Who asks much and reads nothing is told that the node is busy, and gets every answer later.
async fn too_much_at_once(net: &Testnet) {
    const REQUESTS: u64 = 700;
    const WATCHES: u64 = 64;
    const EVENTS: u64 = 40;
    let site = &net.sites()[2];
    let key = "kv/test/large";
    let client = connect(by_socket(site)).await;
    let group = client.group_of(key).unwrap();
    let command = Command::new(vec![put(key, vec![7; LARGE], Expect::Any)]);
    client.write(group, command).await.unwrap();

    let mut stream = UnixStream::connect(site.data_dir.join("api.sock"))
        .await
        .unwrap();
    begin(&mut stream, "").await;
    // What it does not read is in the way of all answers.
    let mut bytes = Vec::new();
    let watched = "kv/test/event";
    let group_watched = client.group_of(watched).unwrap();
    for number in REQUESTS + 1..=REQUESTS + WATCHES {
        let ask = Ask::Watch {
            group: group_watched,
            prefix: watched.to_owned(),
            after: None,
        };
        protocol::write_frame(&mut bytes, &Request { number, ask }).unwrap();
    }
    stream.write_all(&bytes).await.unwrap();
    let mut events = 0;
    for _ in 0..WATCHES {
        let answer = within("a watch", next(&mut stream)).await.unwrap();
        assert!(matches!(answer.reply, Reply::Watching { .. }));
    }
    for _ in 0..EVENTS {
        let command = Command::new(vec![put(watched, "x", Expect::Any)]);
        client.write(group_watched, command).await.unwrap();
    }
    let mut bytes = Vec::new();
    for number in 1..=REQUESTS {
        let (key, freshness) = (key.to_owned(), Freshness::Linearizable);
        let ask = Ask::Get {
            group,
            key,
            freshness,
        };
        protocol::write_frame(&mut bytes, &Request { number, ask }).unwrap();
    }
    stream.write_all(&bytes).await.unwrap();
    let (mut values, mut busy) = (0, 0);
    let mut numbers = std::collections::BTreeSet::new();
    while values + busy < REQUESTS || events < WATCHES * EVENTS {
        let answer = within("an answer", next(&mut stream)).await.unwrap();
        if let Reply::Changes { changes, .. } = &answer.reply {
            events += changes.len() as u64;
            continue;
        }
        assert!(numbers.insert(answer.number));
        match answer.reply {
            Reply::Value { entry, .. } => {
                assert_eq!(entry.unwrap().value.len(), LARGE);
                values += 1;
            }
            Reply::Refused(Refusal::Busy { retry_after_ms }) => {
                assert!(retry_after_ms > 0);
                busy += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(values >= 256 && busy > 0, "{values} values, {busy} busy");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_keep_records_in_the_catalog() {
    let net = Testnet::up(&["--sites", "3"]);
    reads_writes_and_watches(&net).await;
    bookmarks_and_the_end_of_memory(&net).await;
    lists_in_pages(&net).await;
    refusals(&net).await;
    garbage(&net).await;
    too_much_at_once(&net).await;
}
