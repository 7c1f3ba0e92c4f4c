//! What several hosts promise together.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on stops")]

mod support;

use std::pin::pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, stream};
use krake_consensus::{
    Backup, BackupWriter, Command, Expect, Host, MemberInfo, Operation, Part, ProposeError,
    RequestId, TransferError,
};
use krake_model::ids::{FederationId, GroupId};
use krake_model::revision::Revision;
use krake_model::time::Timestamp;
use support::{Cluster, LIMIT, formed, groups, members, node, until};

/// A leader is old enough to be moved, and was looked at.
const JUDGED: Duration = Duration::from_secs(3);

fn put(key: &str, value: &str, expect: Expect) -> Command {
    Command::new(vec![Operation::Put {
        key: key.to_owned(),
        value: Bytes::copy_from_slice(value.as_bytes()),
        expect,
    }])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_members_vote_and_a_write_through_any_is_read_through_any() {
    let mut cluster = Cluster::new();
    let hosts = formed(&mut cluster, 5).await;
    for (position, host) in hosts.iter().enumerate() {
        for group in groups() {
            let key = format!("key-{position}");
            host.propose(group, put(&key, "value", Expect::Absent), LIMIT)
                .await
                .unwrap();
            for reader in &hosts {
                reader.read_barrier(&[group], LIMIT).await.unwrap();
                assert_eq!(reader.get(group, &key).unwrap().value, "value");
            }
        }
    }
    let again = hosts[3]
        .propose(GroupId::META, put("key-0", "other", Expect::Absent), LIMIT)
        .await;
    assert!(
        matches!(again, Err(ProposeError::Conflict { .. })),
        "{again:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killing_the_leader_loses_nothing_and_writes_go_on() {
    let mut cluster = Cluster::new();
    let hosts = formed(&mut cluster, 5).await;
    let group = GroupId::of_shard(1);
    for index in 0..120 {
        hosts[1]
            .propose(group, put(&format!("k{index}"), "v", Expect::Absent), LIMIT)
            .await
            .unwrap();
    }
    let leader = hosts[1].status().borrow()[&group].leader.unwrap();
    cluster.kill(leader).await;
    let survivor = &hosts[if leader == 1 { 1 } else { 0 }];
    let request = RequestId::random();
    let mut command = put("after", "v", Expect::Absent);
    command.request = request;
    let first = survivor
        .propose(group, command.clone(), LIMIT)
        .await
        .unwrap();
    let repeated = survivor.propose(group, command, LIMIT).await.unwrap();
    assert_eq!(first, repeated);

    // The dead one returns with its file, catches up and has every write.
    let back = cluster.start(leader);
    back.set_members(members(&[1, 2, 3, 4, 5])).await;
    back.read_barrier(&[group], LIMIT).await.unwrap();
    assert_eq!(back.list(group, "k").0.len(), 120);
    assert!(back.get(group, "after").is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_cut_off_can_neither_write_nor_read_linearizably() {
    let mut cluster = Cluster::new();
    let hosts = formed(&mut cluster, 5).await;
    let group = GroupId::of_shard(0);
    let leader = hosts[0].status().borrow()[&group].leader.unwrap();
    cluster.net.cut.write().insert(node(leader));
    let cut = &hosts[leader as usize - 1];
    let short = Duration::from_millis(600);
    let write = cut
        .propose(group, put("x", "cut", Expect::Any), short)
        .await;
    assert!(
        matches!(write, Err(ProposeError::Timeout { .. })),
        "{write:?}"
    );
    assert!(cut.read_barrier(&[group], short).await.is_err());

    let other = &hosts[(leader % 5) as usize];
    other
        .propose(group, put("x", "majority", Expect::Any), LIMIT)
        .await
        .unwrap();
    cluster.net.cut.write().clear();
    cut.read_barrier(&[group], LIMIT).await.unwrap();
    assert_eq!(cut.get(group, "x").unwrap().value, "majority");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_all_keeps_what_was_acknowledged_and_revisions_rise() {
    let mut cluster = Cluster::new();
    let hosts = formed(&mut cluster, 5).await;
    let group = GroupId::META;
    let mut last = None;
    for index in 0..130 {
        last = Some(
            hosts[2]
                .propose(
                    group,
                    put("counter", &index.to_string(), Expect::Any),
                    LIMIT,
                )
                .await
                .unwrap(),
        );
    }
    for replica in 1..=5 {
        cluster.kill(replica).await;
    }
    drop(hosts);
    let all: Vec<u64> = (1..=5).collect();
    let hosts: Vec<Host> = all.iter().map(|id| cluster.start(*id)).collect();
    for host in &hosts {
        host.set_members(members(&all)).await;
    }
    hosts[4].read_barrier(&[group], LIMIT).await.unwrap();
    assert_eq!(hosts[4].get(group, "counter").unwrap().value, "129");
    let next = hosts[4]
        .propose(group, put("counter", "130", Expect::Any), LIMIT)
        .await
        .unwrap();
    assert!(next.revision > last.unwrap().revision);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clean_stop_hands_leadership_over() {
    let mut cluster = Cluster::new();
    let hosts = formed(&mut cluster, 5).await;
    let leader = hosts[0].status().borrow()[&GroupId::META].leader.unwrap();
    let host = &hosts[leader as usize - 1];
    assert!(host.hand_over(LIMIT).await);
    let led = host.status().borrow().values().filter(|s| s.leads).count();
    assert_eq!(led, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reluctant_member_leads_nothing_until_it_may_again() {
    let mut cluster = Cluster::new();
    let hosts = formed(&mut cluster, 3).await;
    let led = |host: &Host| host.status().borrow().values().filter(|s| s.leads).count();
    let all = groups().len();
    let leader = hosts[0].status().borrow()[&GroupId::META].leader.unwrap();
    let host = &hosts[leader as usize - 1];
    host.set_reluctant(true).await;
    support::until("it leads nothing", || led(host) == 0).await;
    support::until("the others lead all", || {
        hosts.iter().map(led).sum::<usize>() == all
    })
    .await;
    let write = put("key", "value", Expect::Any);
    host.propose(GroupId::META, write, LIMIT).await.unwrap();
    assert_eq!(led(host), 0, "the others balance among themselves");
    host.set_reluctant(false).await;
    support::until("it gets its share", || led(host) > 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_sees_every_group_and_hands_leadership_over_through_any_node() {
    let mut cluster = Cluster::new();
    let hosts = formed(&mut cluster, 5).await;
    let group = GroupId::of_shard(2);
    hosts[0]
        .propose(group, put("key", "value", Expect::Any), LIMIT)
        .await
        .unwrap();
    let status = hosts[0].status();
    let leader = status.borrow()[&group].leader.unwrap();
    let to = leader % 5 + 1;
    let asked = &hosts[(to % 5) as usize];
    assert!(asked.transfer(group, to, LIMIT).await.unwrap());
    assert_eq!(asked.status().borrow()[&group].leader, Some(to));

    let there = &hosts[to as usize - 1];
    let details = there.details(LIMIT).await.unwrap();
    assert_eq!(details.len(), groups().len());
    let detail = details.iter().find(|d| d.status.group == group).unwrap();
    assert!(detail.applied > 0 && detail.commit <= detail.last);
    assert_eq!(detail.peers.len(), 4, "the leader knows the others");
    assert!(there.counters().writes.load(Ordering::Relaxed) > 0);

    let wrong = asked.transfer(group, 77, LIMIT).await;
    assert!(
        matches!(wrong, Err(TransferError::NotVoter { to: 77, .. })),
        "{wrong:?}"
    );
    let unknown = asked.transfer(GroupId::of_shard(9), to, LIMIT).await;
    assert!(
        matches!(unknown, Err(TransferError::UnknownGroup { .. })),
        "{unknown:?}"
    );
    let gone = to % 5 + 1;
    cluster.kill(gone).await;
    let silent = loop {
        let tried = there.transfer(group, gone, Duration::from_secs(1)).await;
        match tried {
            // Until the leader has missed it for an election timeout.
            Err(TransferError::Timeout { .. }) => {}
            other => break other,
        }
    };
    assert!(
        matches!(silent, Err(TransferError::Silent { .. })),
        "{silent:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_larger_than_a_frame_reaches_a_new_member_in_pieces_each_sent_once() {
    const PIECE: u64 = 256 * 1024;
    let mut cluster = Cluster::new();
    cluster.tick = Duration::from_millis(100);
    let mut hosts = formed(&mut cluster, 3).await;
    let group = GroupId::of_shard(1);
    let value = |number: u8| Bytes::from(vec![number; 1_000_000]);
    for number in 0..20 {
        let command = Command::new(vec![Operation::Put {
            key: format!("key-{number:02}"),
            value: value(number),
            expect: Expect::Absent,
        }]);
        hosts[0].propose(group, command, LIMIT).await.unwrap();
    }
    // It is lost in the middle, and found again.
    *cluster.net.cut_after.write() = Some((node(4), 10));
    hosts.push(cluster.start(4));
    for host in &hosts {
        host.set_members(members(&[1, 2, 3, 4])).await;
    }
    let net = cluster.net.clone();
    support::until("it is cut off", || net.cut.read().contains(&node(4))).await;
    assert!(hosts[3].get(group, "key-00").is_none());
    net.cut.write().clear();
    support::until("it has all", || hosts[3].list(group, "key-").0.len() == 20).await;
    let sent: u64 = hosts
        .iter()
        .map(|host| host.counters().snapshot_pieces_sent.load(Ordering::Relaxed))
        .sum();
    let whole = 20_000_000_u64.div_ceil(PIECE);
    let lost_at_most = 4;
    assert!(
        (whole..=whole + lost_at_most).contains(&sent),
        "{sent} pieces, {whole} would do"
    );

    // Its files hold a group of this size, too.
    cluster.kill(4).await;
    hosts[3] = cluster.start(4);
    hosts[3].set_members(members(&[1, 2, 3, 4])).await;
    hosts[3].read_barrier(&[group], LIMIT).await.unwrap();
    for (number, (_, entry)) in hosts[3].list(group, "key-").0.into_iter().enumerate() {
        assert_eq!(entry.value, value(number as u8));
    }
    let mut writer = BackupWriter::default();
    let begun = writer.begin(FederationId::from_bytes([7; 32]), Timestamp::from_millis(1));
    let mut bytes = begun.unwrap().to_vec();
    let state = hosts[3].group_backup(group).unwrap().unwrap();
    bytes.extend_from_slice(&writer.group(group, state).unwrap());
    bytes.extend_from_slice(&writer.end().unwrap());
    assert_eq!(Backup::read(&bytes).unwrap().list(group, "key-").len(), 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_goes_to_where_writes_are_submitted_when_that_is_far() {
    let mut cluster = Cluster::new();
    let hosts = formed(&mut cluster, 3).await;
    // From here on evenness moves nothing.
    until("leaders are spread", || {
        let count = |host: &Host| groups().iter().filter(|id| host.leads(**id)).count();
        let counts: Vec<usize> = hosts.iter().map(count).collect();
        counts.iter().sum::<usize>() == groups().len() && counts.iter().all(|count| *count > 0)
    })
    .await;
    let group = GroupId::of_shard(0);
    let leader = hosts[0].leader(group).unwrap();
    let home = hosts.iter().find(|host| host.replica() != leader).unwrap();
    let submit = async || {
        let command = put("key", "value", Expect::Any);
        home.submit(group, command, LIMIT).await.unwrap();
    };
    for host in &hosts {
        let far = members(&[1, 2, 3]).into_iter().map(|member| MemberInfo {
            far: member.replica != host.replica(),
            ..member
        });
        host.set_members(far.collect()).await;
    }
    // Writes of nodes on their own account do not count, for longer than it takes those that do.
    let judged = tokio::time::Instant::now() + JUDGED;
    while tokio::time::Instant::now() < judged {
        let command = put("own", "value", Expect::Any);
        home.propose(group, command, LIMIT).await.unwrap();
        assert_eq!(home.leader(group), Some(leader));
    }
    // The last entries of a busy group are under way to the others at any moment.
    let mut load = pin!(stream::repeat_with(submit).buffer_unordered(16));
    let deadline = tokio::time::Instant::now() + LIMIT;
    while home.leader(group) != Some(home.replica()) {
        assert!(
            tokio::time::Instant::now() < deadline,
            "it stays where it is"
        );
        load.next().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_closed_at_one_member_is_a_moment_of_all_groups() {
    let mut cluster = Cluster::new();
    let hosts = formed(&mut cluster, 3).await;
    let shards: Vec<GroupId> = groups()
        .into_iter()
        .filter(|g| *g != GroupId::META)
        .collect();
    let mut last = Revision::NONE;
    for turn in 0..20 {
        let group = shards[turn % shards.len()];
        let command = put("key", &turn.to_string(), Expect::Any);
        let written = hosts[turn % 3]
            .propose(group, command, LIMIT)
            .await
            .unwrap();
        let reader = &hosts[(turn + 1) % 3];
        reader
            .close(&shards, written.revision, LIMIT)
            .await
            .unwrap();
        // Later writes are above, whichever group they are in and whoever leads it.
        assert!(written.revision > last, "{turn}");
        last = written.revision;
        let before = reader.list_at(group, Part::all("key"), last).await.unwrap();
        assert_eq!(before.entries[0].1.value, turn.to_string());
        let command = put("key", "later", Expect::Any);
        let later = hosts[turn % 3]
            .propose(group, command, LIMIT)
            .await
            .unwrap();
        assert!(later.revision > last);
        // One that changes nothing has a stamp, too.
        let check = Command::new(vec![Operation::Check {
            key: "none".to_owned(),
            expect: Expect::Absent,
        }]);
        let checked = hosts[turn % 3].propose(group, check, LIMIT).await.unwrap();
        assert!(checked.revision > later.revision);
        last = checked.revision;
        reader.close(&[group], last, LIMIT).await.unwrap();
        let then = reader.list_at(group, Part::all("key"), written.revision);
        let then = tokio::time::timeout(LIMIT, then).await.unwrap().unwrap();
        assert_eq!(then, before, "as it was, with a later write there");
    }
}
