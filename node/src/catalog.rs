//! The catalog as the node uses it: which group holds what, and reading records.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use krake_consensus::{Entry, Host};
use krake_model::{AppKey, Epoch, Genesis, GroupId, Member, NodeId};
use serde::de::DeserializeOwned;
use tracing::error;

use crate::records::{self, Departure, Leaving};

/// How long a request waits for a group's leader.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The groups of the federation this node is a member of. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Catalog {
    /// The replicas.
    pub host: Host,
    /// How many shards there are.
    pub shards: u16,
}

impl Catalog {
    /// Wraps a host for the federation of `genesis`.
    pub const fn new(host: Host, genesis: &Genesis) -> Self {
        Self {
            host,
            shards: genesis.shard_count,
        }
    }

    /// All shards' groups.
    pub fn shard_groups(&self) -> Vec<GroupId> {
        (0..self.shards).map(GroupId::of_shard).collect()
    }

    /// All groups of a federation with `shards` shards.
    pub fn all_groups(shards: u16) -> Vec<GroupId> {
        std::iter::once(GroupId::META)
            .chain((0..shards).map(GroupId::of_shard))
            .collect()
    }

    /// The group that holds an app.
    pub fn group_of(&self, app: &AppKey) -> GroupId {
        records::group_of(app, self.shards)
    }

    /// Reads a record from this node's replica; one that cannot be read is logged and absent.
    pub fn read<T: DeserializeOwned>(&self, group: GroupId, key: &str) -> Option<(T, Entry)> {
        let entry = self.host.get(group, key)?;
        parse(key, &entry).map(|value| (value, entry))
    }

    /// Reads all records under `prefix`, with their keys.
    pub fn read_all<T: DeserializeOwned>(
        &self,
        group: GroupId,
        prefix: &str,
    ) -> Vec<(String, T, Entry)> {
        let (entries, _) = self.host.list(group, prefix);
        entries
            .into_iter()
            .filter_map(|(key, entry)| parse(&key, &entry).map(|value| (key, value, entry)))
            .collect()
    }

    /// The members, as this node's replica of the meta group has them.
    pub fn members(&self) -> Vec<Member> {
        self.read_all(GroupId::META, records::MEMBERS)
            .into_iter()
            .map(|(_, member, _)| member)
            .collect()
    }

    /// What was noted of those that are leaving, as this node's replica of the meta group has it; nothing
    /// of who has only just begun.
    pub fn leave_records(&self) -> BTreeMap<NodeId, Leaving> {
        self.by_node(records::LEAVING)
    }

    /// Of these, who is to give its votes away.
    pub fn giving_votes(&self) -> BTreeSet<NodeId> {
        let noted = self.leave_records().into_iter();
        let giving = noted.filter(|(_, record)| record.gives_votes);
        giving.map(|(node, _)| node).collect()
    }

    /// Who left, as this node's replica of the meta group has it.
    pub fn departures(&self) -> BTreeMap<NodeId, Departure> {
        self.by_node(records::DEPARTED)
    }

    fn by_node<T: DeserializeOwned>(&self, prefix: &str) -> BTreeMap<NodeId, T> {
        self.read_all::<T>(GroupId::META, prefix)
            .into_iter()
            .filter_map(|(key, record, _)| Some((key.strip_prefix(prefix)?.parse().ok()?, record)))
            .collect()
    }
}

/// Reads a record; one that cannot be read is logged and absent.
pub fn parse<T: DeserializeOwned>(key: &str, entry: &Entry) -> Option<T> {
    match records::read(key, &entry.value) {
        Ok(value) => Some(value),
        Err(error) => {
            error!(%error, "a record in the catalog is damaged");
            None
        }
    }
}

/// The epoch of an assignment: where its record was last written. Incarnations rise when a shard
/// is restored from a backup.
pub const fn epoch_of(entry: &Entry) -> Epoch {
    Epoch {
        incarnation: entry.incarnation,
        term: entry.term,
        index: entry.index,
    }
}
