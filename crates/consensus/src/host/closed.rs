//! Closed stamps: a moment of which a node knows everything that was written up to it.
//!
//! Each group's revisions rise, but those of different groups say nothing of each other: a leader
//! whose clock is behind may commit a write with a lower stamp than what another group has shown
//! already. Whoever reads several groups therefore has their leaders *close* the stamps up to the
//! one it has in mind (docs/algorithms/catalog.md). It is asked for by whoever needs it, so groups
//! in which nothing happens stay silent.

use std::collections::BTreeMap;
use std::time::Duration;

use krake_model::ids::GroupId;
use krake_model::revision::Revision;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::{Host, RETRY_PAUSE, RETRY_PAUSE_MAX};
use crate::command::ReadError;
use crate::engine::Input;
use crate::wire::{Call, CallReply};

/// A leader that does not answer may be gone: then we look for another.
const PATIENCE: Duration = Duration::from_secs(1);

impl Host {
    /// Waits until this node's replicas have everything of `groups` that is stamped up to `at`, and
    /// nothing with such a stamp will ever be written there. It is a barrier, too: what was
    /// committed before the call is here. `at` must be a stamp that was seen, not one that a client
    /// made up: no stamp is given below it any more.
    ///
    /// # Errors
    /// [`ReadError::Timeout`] names the first group that could not be closed.
    pub async fn close(
        &self,
        groups: &[GroupId],
        at: Revision,
        timeout: Duration,
    ) -> Result<(), ReadError> {
        let deadline = Instant::now() + timeout;
        let mut open = groups.to_vec();
        let mut pause = RETRY_PAUSE;
        while let Some(first) = open.first().copied() {
            if self.is_full() {
                return Err(ReadError::DiskFull);
            }
            if self.failure().is_some() {
                return Err(ReadError::Stopped);
            }
            let round = self.close_once(&open, at, deadline);
            let Ok(closed) = tokio::time::timeout_at(deadline, round).await else {
                return Err(ReadError::Timeout { group: first });
            };
            open.retain(|group| !closed.contains(group));
            if let Some(first) = open.first() {
                let again = Instant::now() + pause;
                if again >= deadline {
                    return Err(ReadError::Timeout { group: *first });
                }
                tokio::time::sleep_until(again).await;
                pause = (pause * 2).min(RETRY_PAUSE_MAX);
            }
        }
        Ok(())
    }

    /// Asks every leader once; returns the groups that are closed and here.
    async fn close_once(
        &self,
        groups: &[GroupId],
        at: Revision,
        deadline: Instant,
    ) -> Vec<GroupId> {
        let mut led: BTreeMap<u64, Vec<GroupId>> = BTreeMap::new();
        for group in groups {
            if let Some(leader) = self.leader(*group) {
                led.entry(leader).or_default().push(*group);
            }
        }
        let asked = led.into_iter().map(|(leader, groups)| async move {
            let closed = self.ask_close(leader, groups, at, deadline).await;
            // An index may be one that a new leader never reaches.
            let until = deadline.min(Instant::now() + PATIENCE);
            let here = closed.into_iter().map(|(group, index)| async move {
                let (reply, applied) = oneshot::channel();
                self.input(Input::Applied(group, index, reply)).await;
                let applied = tokio::time::timeout_at(until, applied).await;
                matches!(applied, Ok(Ok(()))).then_some(group)
            });
            futures::future::join_all(here).await
        });
        let answers = futures::future::join_all(asked).await;
        answers.into_iter().flatten().flatten().collect()
    }

    async fn ask_close(
        &self,
        leader: u64,
        groups: Vec<GroupId>,
        at: Revision,
        deadline: Instant,
    ) -> Vec<(GroupId, u64)> {
        let left = deadline.saturating_duration_since(Instant::now());
        let patience = left.min(PATIENCE);
        if leader == self.shared.replica {
            return self.close_led(groups, at, patience).await;
        }
        let call = Call::Close {
            groups,
            at,
            patience: patience.as_millis() as u32,
        };
        match self.ask(leader, &call, patience).await {
            Some(CallReply::Closed(closed)) => closed,
            _ => Vec::new(),
        }
    }

    /// Those of the groups that this node leads, closed up to `at`, with the indices of their logs
    /// up to which everything stamped until then is.
    pub(super) async fn close_led(
        &self,
        groups: Vec<GroupId>,
        at: Revision,
        patience: Duration,
    ) -> Vec<(GroupId, u64)> {
        let (mut asked, mut answers) = (Vec::new(), Vec::new());
        for group in groups {
            let (reply, answer) = oneshot::channel();
            asked.push((group, reply));
            answers.push(async move { Some((group, answer.await.ok()?)) });
        }
        self.input(Input::Close(at, asked)).await;
        let deadline = Instant::now() + patience;
        let answers = answers
            .into_iter()
            .map(|answer| tokio::time::timeout_at(deadline, answer));
        let answers = futures::future::join_all(answers).await;
        answers.into_iter().flatten().flatten().collect()
    }
}
