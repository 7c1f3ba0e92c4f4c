//! Who votes, follows and leads in a group: one step at a time towards what the members demand.

use std::collections::{BTreeMap, BTreeSet};

use raft::ProgressState;
use raft::eraftpb as pb;
use tracing::{debug, error, warn};

use super::Group;
use crate::core::Settings;
use crate::inspect::TransferError;
use crate::voters::{self, MemberInfo, Step};
use crate::wire::Configuration;

const CHANGE_VERSION: u8 = 1;
/// A voter that lacks more entries than this must catch up before it may lead: nothing can be
/// proposed meanwhile.
const UNDER_WAY_MAX: u64 = 256;
/// Bytes of one membership change at most.
const CHANGE_BYTES_MAX: usize = 16 * 1024;

/// A membership change travels in the entry's context in our own form.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
enum ConfigurationChange {
    AddVoter(u64),
    /// Several at once: they have no part in any majority.
    AddLearners(Vec<u64>),
    Remove(u64),
    /// The first votes instead of the second, by way of a joint configuration.
    Replace(u64, u64),
}

impl ConfigurationChange {
    fn steps(&self) -> Vec<(pb::ConfChangeType, u64)> {
        use pb::ConfChangeType as T;
        match self {
            Self::AddVoter(id) => vec![(T::AddNode, *id)],
            Self::AddLearners(ids) => ids.iter().map(|id| (T::AddLearnerNode, *id)).collect(),
            Self::Remove(id) => vec![(T::RemoveNode, *id)],
            Self::Replace(by, old) => vec![(T::AddNode, *by), (T::AddLearnerNode, *old)],
        }
    }

    /// What the library is told, one after another. It leaves a joint configuration by itself.
    fn to_raft(&self) -> Vec<pb::ConfChangeV2> {
        let single = |(kind, id)| {
            let mut single = pb::ConfChangeSingle::default();
            single.set_change_type(kind);
            single.node_id = id;
            single
        };
        let change = |singles: Vec<pb::ConfChangeSingle>| {
            let mut change = pb::ConfChangeV2::default();
            change.set_changes(singles.into());
            change
        };
        let singles = self.steps().into_iter().map(single);
        if matches!(self, Self::Replace(..)) {
            vec![change(singles.collect())]
        } else {
            singles.map(|single| change(vec![single])).collect()
        }
    }
}

impl Group {
    pub(crate) fn voters(&self) -> BTreeSet<u64> {
        self.raw.raft.prs().conf().voters().ids().iter().collect()
    }

    pub(crate) fn learners(&self) -> BTreeSet<u64> {
        self.raw
            .raft
            .prs()
            .conf()
            .learners()
            .iter()
            .copied()
            .collect()
    }

    /// Two sets of voters decide together until the change from one to the other is done.
    pub(super) fn is_joint(&self) -> bool {
        let state = self.raw.raft.prs().conf().to_conf_state();
        !state.voters_outgoing.is_empty()
    }

    pub(super) fn configuration(&self) -> Configuration {
        Configuration::from_raft(&self.raw.raft.prs().conf().to_conf_state())
    }

    pub(super) fn apply_configuration(&mut self, entry: &pb::Entry) {
        self.reconcile = true;
        self.settled = false;
        self.configuration_number += 1;
        if entry.context.is_empty() && entry.data.is_empty() {
            // The library's own: the joint configuration is left.
            if let Err(error) = self.raw.apply_conf_change(&pb::ConfChangeV2::default()) {
                error!(group = %self.id, index = entry.index, %error, "a joint configuration could not be left");
            }
            return;
        }
        let change: ConfigurationChange = match krake_model::codec::decode(
            CHANGE_VERSION,
            &entry.context,
            CHANGE_BYTES_MAX,
        ) {
            Ok(change) => change,
            Err(error) => {
                error!(group = %self.id, index = entry.index, %error, "a membership change is not readable and has no effect");
                return;
            }
        };
        for one in change.to_raft() {
            if let Err(error) = self.raw.apply_conf_change(&one) {
                warn!(group = %self.id, ?change, %error, "a membership change had no effect");
            }
        }
    }

    /// Moves the group's membership one step towards what it should be.
    pub(crate) fn reconcile(&mut self, members: &BTreeMap<u64, MemberInfo>, settings: &Settings) {
        let own = settings.replica;
        self.reconcile = false;
        self.settled = false;
        if !self.leads() || members.is_empty() || self.raw.raft.has_pending_conf() {
            return;
        }
        if self.is_joint() {
            // The library does this when it applies the change, but not for a leader that has
            // applied it before it was elected.
            if let Err(error) = self
                .raw
                .propose_conf_change(Vec::new(), pb::ConfChangeV2::default())
            {
                debug!(group = %self.id, %error, "a joint configuration is not left yet");
            }
            self.dirty = true;
            return;
        }
        let (voters, learners) = (self.voters(), self.learners());
        if !voters.contains(&own) {
            // It came to lead while a change that takes its vote away was under way. The library
            // lets it go on.
            if let Some(next) = self.successors().first() {
                self.transfer(*next);
            }
            return;
        }
        let desired = voters::desired_voters(self.id, members, &voters);
        self.settled = voters == desired
            && members.len() == voters.len() + learners.len()
            && learners.iter().all(|id| members.contains_key(id));
        if self.settled {
            return;
        }
        let last = self.raw.raft.raft_log.last_index();
        let caught_up: BTreeSet<u64> = learners
            .iter()
            .filter(|id| {
                self.raw.raft.prs().get(**id).is_some_and(|progress| {
                    progress.matched > 0 && progress.matched + settings.kept_entries >= last
                })
            })
            .copied()
            .collect();
        let answers = |id: &u64| {
            let progress = self.raw.raft.prs().get(*id);
            *id == own || progress.is_some_and(|progress| self.is_active(progress))
        };
        let there = voters.iter().copied().filter(answers).collect();
        let step = voters::next_step(
            members, &voters, &learners, &desired, &caught_up, &there, own,
        );
        let change = match step {
            None => return,
            Some(Step::AddLearners(ids)) => ConfigurationChange::AddLearners(ids),
            Some(Step::Promote(id)) => ConfigurationChange::AddVoter(id),
            Some(Step::Demote(id) | Step::Remove(id) | Step::Replace { old: id, .. })
                if id == own =>
            {
                let next = self.successors();
                if let Some(next) = next.into_iter().find(|id| desired.contains(id)) {
                    self.transfer(next);
                }
                return;
            }
            Some(Step::Replace { by, old }) => ConfigurationChange::Replace(by, old),
            Some(Step::Demote(id)) => ConfigurationChange::AddLearners(vec![id]),
            Some(Step::Remove(id)) => ConfigurationChange::Remove(id),
        };
        let Ok(context) = krake_model::codec::encode(CHANGE_VERSION, &change) else {
            return;
        };
        // What it changes is read from the context; the library wants to see one change.
        let Some(first) = change.to_raft().into_iter().next() else {
            return;
        };
        self.rouse();
        if let Err(error) = self.raw.propose_conf_change(context, first) {
            debug!(group = %self.id, ?change, %error, "a membership change waits");
        }
        self.dirty = true;
    }

    /// Hands leadership to the voter `to`, as an operator wishes: one that is a little behind gets
    /// what it lacks first (Ongaro 2014, §3.10). See [`crate::core::Core::transfer`].
    pub(crate) fn transfer_to(
        &mut self,
        to: u64,
        is_silent: bool,
        own: u64,
    ) -> Result<bool, Option<TransferError>> {
        if !self.is_leader() {
            return Err(None);
        }
        if to == own {
            return Ok(false);
        }
        let group = self.id;
        if !self.voters().contains(&to) {
            return Err(Some(TransferError::NotVoter { group, to }));
        }
        if is_silent {
            return Err(Some(TransferError::Silent { group, to }));
        }
        self.rouse();
        self.raw.transfer_leader(to);
        self.dirty = true;
        Ok(true)
    }

    /// As leader: the other voters that could lead within a moment. The last entries of a busy
    /// group are always under way to them; who is to lead gets them first (Ongaro 2014, §3.10).
    pub(crate) fn successors(&self) -> Vec<u64> {
        let raft = &self.raw.raft;
        let last = raft.raft_log.last_index();
        let keeps_up = |progress: &raft::Progress| {
            progress.matched >= last
                || progress.state == ProgressState::Replicate
                    && progress.matched + UNDER_WAY_MAX >= last
        };
        let ready = |id: &u64| {
            let progress = raft.prs().get(*id).filter(|_| *id != raft.id);
            progress.is_some_and(|progress| self.is_active(progress) && keeps_up(progress))
        };
        self.voters().into_iter().filter(ready).collect()
    }

    /// Hands leadership to one of [`Self::successors`].
    pub(crate) fn transfer(&mut self, to: u64) {
        self.rouse();
        self.raw.transfer_leader(to);
        self.dirty = true;
    }
}

#[cfg(test)]
mod tests;
