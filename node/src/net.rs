//! The node's end of the network: what arrives, and how the catalog's bytes leave.

use std::collections::BTreeSet;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use krake_consensus::{Host, Transport};
use krake_gossip::{Handler, Network};
use krake_model::{Member, NodeId};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::records::{self, CopyReport};
use crate::rpc::{self, JoinReply, Knock, Reply, Request};
use crate::site::agent::Agent;

/// First byte of a question: for the consensus,
const FOR_CONSENSUS: u8 = 0;
/// or for the node.
const FOR_NODE: u8 = 1;
/// How long a question between nodes may take.
const ANSWER_TIME: Duration = Duration::from_secs(3);

/// Sends the consensus' bytes over the network, once it is there.
#[derive(Debug, Default)]
pub struct NetworkTransport {
    network: OnceLock<Network>,
}

impl NetworkTransport {
    /// From now on.
    pub fn connect(&self, network: Network) {
        let _ = self.network.set(network);
    }
}

#[async_trait]
impl Transport for NetworkTransport {
    fn send(&self, to: NodeId, frame: Vec<u8>) -> bool {
        self.network
            .get()
            .is_some_and(|network| network.send_frame(to, frame))
    }

    async fn call(&self, to: NodeId, bytes: Vec<u8>, timeout: Duration) -> Result<Vec<u8>, String> {
        let network = self.network.get().ok_or("the network has not started")?;
        let mut question = Vec::with_capacity(bytes.len() + 1);
        question.push(FOR_CONSENSUS);
        question.extend_from_slice(&bytes);
        network
            .call(to, &question, timeout)
            .await
            .map_err(|error| error.to_string())
    }
}

/// Asks another node.
///
/// # Errors
/// A text that says why there is no answer.
pub async fn ask(network: &Network, to: NodeId, request: &Request) -> Result<Reply, String> {
    let bytes = rpc::encode(request).map_err(|error| error.to_string())?;
    let mut question = Vec::with_capacity(bytes.len() + 1);
    question.push(FOR_NODE);
    question.extend_from_slice(&bytes);
    let answer = network
        .call(to, &question, ANSWER_TIME)
        .await
        .map_err(|error| error.to_string())?;
    rpc::decode(&answer).map_err(|error| error.to_string())
}

/// Who answers a newcomer.
#[async_trait]
pub trait Admit: Send + Sync + 'static {
    /// Admits the node that asks, or says why not.
    async fn admit(&self, from: NodeId, request: rpc::JoinRequest) -> JoinReply;
    /// Tells a node whether it left.
    fn standing(&self, from: NodeId) -> JoinReply;
    /// Gives a member that has lost its catalog another replica id, or says why not.
    async fn readmit(&self, from: NodeId) -> Reply;
}

/// What the handler needs; set when the node is complete.
pub struct Parts {
    /// The catalog.
    pub host: Host,
    /// The site.
    pub agent: Agent,
    /// Reports for the apps this node owns.
    pub owner: mpsc::Sender<CopyReport>,
    /// Whether this node owns an app.
    pub owns: Arc<dyn Fn(&krake_model::AppKey) -> bool + Send + Sync>,
    /// The members this node knows.
    pub members: Arc<dyn Fn() -> Vec<Member> + Send + Sync>,
    /// Members that this node's groups know to be giving their votes away.
    pub giving_votes: Arc<Mutex<BTreeSet<NodeId>>>,
    /// The door.
    pub door: Arc<dyn Admit>,
}

/// Takes what the network brings.
#[derive(Default)]
pub struct NodeHandler {
    parts: OnceLock<Parts>,
}

impl std::fmt::Debug for NodeHandler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeHandler").finish_non_exhaustive()
    }
}

impl NodeHandler {
    /// From now on everything can be answered.
    pub fn complete(&self, parts: Parts) {
        let _ = self.parts.set(parts);
    }

    async fn answer(&self, parts: &Parts, from: NodeId, bytes: &[u8]) -> Reply {
        match rpc::decode::<Request>(bytes) {
            Err(error) => Reply::Error {
                message: error.to_string(),
            },
            Ok(Request::Members) => Reply::Members((parts.members)()),
            Ok(Request::Readmit) => parts.door.readmit(from).await,
            Ok(Request::GivesVotes(node)) => {
                Reply::Noted(vec![parts.giving_votes.lock().contains(&node)])
            }
            Ok(Request::Reserve(request)) => parts.agent.reserve(request).await,
            Ok(Request::Copies(reports)) => {
                let mut noted = Vec::new();
                for bytes in reports {
                    let report = records::read::<CopyReport>("a copy's report", &bytes);
                    let taken = match report {
                        Ok(report) if (parts.owns)(&report.app) => {
                            parts.owner.send(report).await.is_ok()
                        }
                        _ => false,
                    };
                    noted.push(taken);
                }
                Reply::Noted(noted)
            }
        }
    }
}

#[async_trait]
impl Handler for NodeHandler {
    fn frame(&self, from: NodeId, bytes: &[u8]) {
        if let Some(parts) = self.parts.get() {
            parts.host.receive(from, bytes);
        }
    }

    async fn call(&self, from: NodeId, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let parts = self.parts.get().ok_or("the node is starting")?;
        match bytes.split_first() {
            Some((&FOR_CONSENSUS, rest)) => parts.host.handle_call(from, rest).await,
            Some((&FOR_NODE, rest)) => {
                let reply = self.answer(parts, from, rest).await;
                rpc::encode(&reply)
                    .map(|bytes| bytes.to_vec())
                    .map_err(|error| error.to_string())
            }
            _ => Err("not a question this node knows".to_owned()),
        }
    }

    async fn join(&self, from: NodeId, bytes: &[u8]) -> Result<Vec<u8>, String> {
        let parts = self.parts.get().ok_or("the node is starting")?;
        let reply = match rpc::decode(bytes).map_err(|error| error.to_string())? {
            Knock::Join(request) => parts.door.admit(from, *request).await,
            Knock::Standing => parts.door.standing(from),
        };
        rpc::encode(&reply)
            .map(|bytes| bytes.to_vec())
            .map_err(|error| error.to_string())
    }
}
