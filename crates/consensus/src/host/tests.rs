//! A host that is alone, and its disk.

use std::path::Path;

use bytes::Bytes;
use krake_model::ids::FederationId;

use super::*;
use crate::command::{Command, Expect, Operation, ProposeError, ReadError};
use crate::disk::{Disk, create_in, has_room};
use crate::log::GroupLog;
use crate::medium::memory::MemoryDirectory;

const LIMIT: Duration = Duration::from_secs(20);

struct Alone;

#[async_trait]
impl Transport for Alone {
    fn send(&self, _: NodeId, _: Vec<u8>) -> bool {
        false
    }

    async fn call(&self, _: NodeId, _: Vec<u8>, _: Duration) -> Result<Vec<u8>, String> {
        Err("there is nobody else".to_owned())
    }
}

struct InMemory(Arc<MemoryDirectory>, Owner);

impl Home for InMemory {
    fn open(&self) -> Result<(Disk, Vec<(GroupId, GroupLog)>), DiskError> {
        Disk::open_in(Box::new(Arc::clone(&self.0)), Path::new("memory"), self.1)
    }

    fn has_room(&self) -> Result<bool, DiskError> {
        has_room(&*self.0, Path::new("memory"))
    }
}

fn write(key: &str) -> Command {
    Command::new(vec![Operation::Put {
        key: key.to_owned(),
        value: Bytes::from(vec![7; 100_000]),
        expect: Expect::Any,
    }])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_makes_the_node_read_only_until_there_is_room() {
    let owner = Owner {
        federation: FederationId::from_bytes([1; 32]),
        node: NodeId::from_bytes([2; 32]),
    };
    let directory = Arc::<MemoryDirectory>::default();
    create_in(&*directory, owner).ok().unwrap();
    let config = Config::new(owner, 1, PathBuf::new(), 1);
    let home = Box::new(InMemory(Arc::clone(&directory), owner));
    let clock = || Timestamp::from_millis(1);
    let host = Host::start_at(home, &config, Arc::new(Alone), clock).unwrap();
    let meta = GroupId::META;
    host.set_members(vec![MemberInfo {
        replica: 1,
        node: owner.node,
        operator: String::new(),
        grid_zone: String::new(),
        country: String::new(),
        alive: true,
        heard: true,
        steady: true,
        leaving: false,
        far: false,
    }])
    .await;
    host.bootstrap(vec![meta]).await.unwrap();
    host.propose(meta, write("before"), LIMIT).await.unwrap();

    directory.limit_room(Some(1_500_000));
    let mut number = 0;
    let error = loop {
        number += 1;
        let short = Duration::from_secs(2);
        match host.propose(meta, write(&number.to_string()), short).await {
            Ok(_) => assert!(number < 100, "there was no room for long"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ProposeError::DiskFull), "{error}");
    assert!(host.is_full() && host.failure().is_none());
    assert!(!host.leads(meta));
    assert!(host.get(meta, "before").is_some(), "stale reads go on");
    let read = host.read_barrier(&[meta], LIMIT).await;
    assert!(matches!(read, Err(ReadError::DiskFull)), "{read:?}");

    directory.limit_room(None);
    host.propose(meta, write("after"), LIMIT).await.unwrap();
    assert!(!host.is_full());
    host.read_barrier(&[meta], LIMIT).await.unwrap();
    for key in ["before", "1", "after"] {
        assert!(host.get(meta, key).is_some(), "{key} is lost");
    }
    host.stop().await;
}
