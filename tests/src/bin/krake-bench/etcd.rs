//! Three members of etcd on loopback, and as much of its client as the comparison needs.
//!
//! The messages are those of etcd's `api/etcdserverpb/rpc.proto`, with the fields that are used:
//! protobuf skips the others. The `etcd-client` crate would want a protobuf compiler on the
//! machine.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use krake_testnet::{kube, ports, progress::Progress};
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

use super::measure::metric;

const MEMBERS: usize = 3;
const READY_WITHIN: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, prost::Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: bytes::Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: bytes::Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PutResponse {}

#[derive(Clone, PartialEq, prost::Message)]
struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: bytes::Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct RangeResponse {
    #[prost(int64, tag = "4")]
    count: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusRequest {}

#[derive(Clone, PartialEq, prost::Message)]
struct ResponseHeader {
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    header: Option<ResponseHeader>,
    #[prost(string, tag = "2")]
    version: String,
    #[prost(uint64, tag = "4")]
    leader: u64,
}

/// How the members speak with each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peers {
    /// As etcd does by default.
    Plain,
    /// TLS, with certificates that etcd makes itself. Krake's nodes always encrypt.
    Tls,
}

/// The cluster; dropping it kills its members.
pub struct Etcd {
    members: Vec<(Child, String)>,
    _data: tempfile::TempDir,
}

impl Etcd {
    /// Starts three members with etcd's defaults and waits for their leader.
    pub async fn start(peers: Peers) -> Self {
        let assets = kube::assets(&Progress::default()).await.unwrap();
        let data = tempfile::tempdir().unwrap();
        let taken = ports::allocate(data.path(), 2 * MEMBERS).unwrap();
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let peer_url = |port| match peers {
            Peers::Plain => url(port),
            Peers::Tls => url(port).replace("http:", "https:"),
        };
        let cluster: Vec<String> = (0..MEMBERS)
            .map(|member| format!("m{member}={}", peer_url(taken[2 * member + 1])))
            .collect();
        let members = (0..MEMBERS).map(|member| {
            let client = url(taken[2 * member]);
            let peer = peer_url(taken[2 * member + 1]);
            let log = std::fs::File::create(data.path().join(format!("m{member}.log"))).unwrap();
            let child = Command::new(&assets.etcd)
                .arg(format!("--name=m{member}"))
                .arg(format!(
                    "--data-dir={}",
                    data.path().join(format!("m{member}")).display()
                ))
                .arg(format!("--listen-client-urls={client}"))
                .arg(format!("--advertise-client-urls={client}"))
                .arg(format!("--listen-peer-urls={peer}"))
                .arg(format!("--initial-advertise-peer-urls={peer}"))
                .arg(format!("--initial-cluster={}", cluster.join(",")))
                .args(["--log-level=warn", "--initial-cluster-state=new"])
                .args((peers == Peers::Tls).then_some("--peer-auto-tls"))
                .stdin(Stdio::null())
                .stdout(log.try_clone().unwrap())
                .stderr(log)
                .spawn()
                .unwrap();
            (child, client)
        });
        let etcd = Self {
            members: members.collect(),
            _data: data,
        };
        etcd.leader().await;
        etcd
    }

    /// Their process ids.
    pub fn pids(&self) -> Vec<u32> {
        self.members.iter().map(|(child, _)| child.id()).collect()
    }

    async fn status(&self, member: usize) -> Option<StatusResponse> {
        let mut client = self.try_client(member).await?;
        let path = PathAndQuery::from_static("/etcdserverpb.Maintenance/Status");
        client.call(StatusRequest {}, path).await
    }

    /// What they say they are.
    pub async fn version(&self) -> String {
        self.status(0).await.unwrap().version
    }

    /// Which member leads; waits for one.
    pub async fn leader(&self) -> usize {
        let start = Instant::now();
        loop {
            for member in 0..MEMBERS {
                if let Some(status) = self.status(member).await
                    && status.leader != 0
                    && status.header.map(|header| header.member_id) == Some(status.leader)
                {
                    return member;
                }
            }
            assert!(start.elapsed() < READY_WITHIN, "etcd has no leader");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn try_client(&self, member: usize) -> Option<EtcdClient> {
        let endpoint = Endpoint::from_shared(self.members[member].1.clone()).unwrap();
        let channel = endpoint.tcp_nodelay(true).connect().await.ok()?;
        Some(EtcdClient(Grpc::new(channel)))
    }

    /// A connection to a member.
    pub async fn client(&self, member: usize) -> EtcdClient {
        self.try_client(member).await.unwrap()
    }

    /// `fdatasync` calls of all members on their logs so far.
    pub async fn syncs(&self) -> f64 {
        let mut sum = 0.0;
        for (_, url) in &self.members {
            let text = reqwest::get(format!("{url}/metrics")).await.unwrap();
            sum += metric(
                &text.text().await.unwrap(),
                "etcd_disk_wal_fsync_duration_seconds_count",
            );
        }
        sum
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        for (child, _) in &mut self.members {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A connection; clones share it.
#[derive(Clone)]
pub struct EtcdClient(Grpc<Channel>);

impl EtcdClient {
    async fn call<Q, A>(&mut self, request: Q, path: PathAndQuery) -> Option<A>
    where
        Q: prost::Message + Send + 'static,
        A: prost::Message + Default + Send + 'static,
    {
        self.0.ready().await.ok()?;
        let codec = ProstCodec::<Q, A>::default();
        let answer = self.0.unary(tonic::Request::new(request), path, codec);
        answer.await.ok().map(tonic::Response::into_inner)
    }

    /// A put.
    pub async fn put(&mut self, key: &str, value: bytes::Bytes) {
        let key = bytes::Bytes::copy_from_slice(key.as_bytes());
        let path = PathAndQuery::from_static("/etcdserverpb.KV/Put");
        let done: Option<PutResponse> = self.call(PutRequest { key, value }, path).await;
        done.unwrap();
    }

    /// A linearizable read, etcd's default.
    pub async fn get(&mut self, key: &str) {
        let key = bytes::Bytes::copy_from_slice(key.as_bytes());
        let path = PathAndQuery::from_static("/etcdserverpb.KV/Range");
        let found: Option<RangeResponse> = self.call(RangeRequest { key }, path).await;
        assert_eq!(found.unwrap().count, 1);
    }
}
