//! What must be true in the end.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use krake_model::ids::GroupId;

use super::nodes::Node;
use super::{SECOND, World};
use crate::replica::Replica;
use crate::simulation::checks::Checks;
use crate::simulation::history::{Asked, Got, Operation, Value, linearizable};

/// A leader that has just begun tells within this time that its first entry is committed.
const TOLD_WITHIN: u64 = SECOND;

impl World<'_> {
    /// Leadership may be handed over at the very end.
    pub(super) fn settle(&mut self) -> Result<(), String> {
        let end = self.now + TOLD_WITHIN;
        while self.now < end && self.replicas().is_ok_and(|all| Checks::apart(&all)) {
            self.run_until(self.now + SECOND / 20)?;
        }
        Ok(())
    }

    /// All members that must be there.
    fn replicas(&self) -> Result<Vec<&Replica>, String> {
        let expected = |(_, node): &(&u64, &Node)| node.member && !node.lost;
        let nodes = self.nodes.iter().filter(expected);
        nodes
            .map(|(id, node)| match &node.process {
                Some(process) => Ok(&process.replica),
                None => Err(format!("replica {id} has not come back")),
            })
            .collect()
    }

    pub(super) fn verdict(&self) -> Result<(), String> {
        if let Some(stuck) = &self.stuck {
            return Err(format!("{stuck}\n{}", self.groups_now()));
        }
        for (id, client) in self.clients.iter().enumerate() {
            if client.waits() {
                return Err(format!(
                    "client {id} is still without an answer, long after the last fault"
                ));
            }
        }
        let stays = |(_, node): &(&u64, &Node)| node.member && node.leaving && !node.lost;
        if let Some((id, _)) = self.nodes.iter().find(stays) {
            return Err(format!(
                "replica {id} wants to leave and still votes, long after the last fault\n{}",
                self.groups_now()
            ));
        }
        let replicas = self.replicas()?;
        let late = self
            .history
            .values()
            .flatten()
            .filter(|operation| operation.returned.is_some())
            .count();
        if late == 0 {
            return Err("nothing was ever answered".to_owned());
        }
        Checks::equal(&replicas)?;
        let values = self.values();
        for (place, operations) in &self.history {
            let (group, key) = place;
            // What is there in the end was there for everybody to read.
            let mut operations = operations.clone();
            let value = values.get(place).copied().unwrap_or(0);
            operations.push(Operation {
                asked: Asked::Read,
                invoked: u64::MAX - 1,
                returned: Some((u64::MAX, Got::Value(value))),
            });
            if !linearizable(&operations) {
                return Err(format!(
                    "the history of {key} in {group} is not linearizable"
                ));
            }
        }
        Ok(())
    }

    /// What is there, where anything was asked for, while all replicas are equal.
    pub(super) fn values(&self) -> BTreeMap<(GroupId, String), Value> {
        let mut members = self.nodes.values().filter(|node| node.member);
        let Some(process) = members.find_map(|node| node.process.as_ref()) else {
            return BTreeMap::new();
        };
        let groups = &process.replica.core.groups;
        let value = |(group, key): &(GroupId, String)| {
            let machine = groups.get(group)?.machine.read();
            let mut value = [0; 8];
            value.copy_from_slice(&machine.get(key)?.value);
            Some(u64::from_le_bytes(value))
        };
        self.history
            .keys()
            .filter_map(|place| Some((place.clone(), value(place)?)))
            .collect()
    }

    /// Who votes and leads, for a report.
    pub(super) fn groups_now(&self) -> String {
        let mut text = String::new();
        for (id, node) in self.nodes.iter().filter(|(_, node)| node.member) {
            let _ = write!(
                text,
                "replica {id}{}:",
                if node.lost { " (lost)" } else { "" }
            );
            for group in node
                .process
                .iter()
                .flat_map(|p| p.replica.core.groups.values())
            {
                let raft = &group.raw.raft;
                let _ = write!(
                    text,
                    " {} {:?} term {} leader {:?} voters {:?} log {} committed {};",
                    group.id,
                    raft.state,
                    raft.term,
                    group.leader(),
                    group.voters(),
                    raft.raft_log.last_index(),
                    raft.raft_log.committed,
                );
            }
            text.push('\n');
        }
        text
    }
}
