//! Commands find their group's leader, wherever it is, and are tried again while leaders change.

use std::time::Duration;

use krake_model::ids::GroupId;
use tokio::sync::oneshot;

use super::{Host, RETRY_PAUSE, RETRY_PAUSE_MAX, patience_of};
use crate::command::{Command, Committed, ProposeError};
use crate::core::Origin;
use crate::engine::Input;
use crate::group::Outcome;
use crate::wire::{Call, CallReply};

impl Host {
    /// Proposes a command to `group`'s leader, wherever it is, and waits until it took effect.
    /// Repeats under the same request id while leaders change. Dropping the future does not
    /// withdraw what was proposed.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose(
        &self,
        group: GroupId,
        command: Command,
        timeout: Duration,
    ) -> Result<Committed, ProposeError> {
        self.propose_as(group, command, false, timeout).await
    }

    /// As [`Self::propose`], for somebody outside. Where most of a group's writes are submitted its
    /// leader goes, if that is far from where it is.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn submit(
        &self,
        group: GroupId,
        command: Command,
        timeout: Duration,
    ) -> Result<Committed, ProposeError> {
        self.propose_as(group, command, true, timeout).await
    }

    async fn propose_as(
        &self,
        group: GroupId,
        command: Command,
        submitted: bool,
        timeout: Duration,
    ) -> Result<Committed, ProposeError> {
        command.validate()?;
        let deadline = tokio::time::Instant::now() + timeout;
        let mut pause = RETRY_PAUSE;
        let mut hint = None;
        loop {
            let left = deadline.saturating_duration_since(tokio::time::Instant::now());
            if left.is_zero() {
                return Err(self.late(group));
            }
            if self.failure().is_some() {
                return Err(ProposeError::Stopped);
            }
            let known = self.leader(group);
            let leader = hint.take().or(known);
            let attempt = self.try_once(group, &command, submitted, leader, left);
            let answer = tokio::select! {
                answer = tokio::time::timeout(left, attempt) => answer,
                // Whoever was asked may be gone and leave the question open.
                () = self.superseded(group, known, leader) => continue,
            };
            match answer {
                Err(_) => return Err(self.late(group)),
                Ok(Outcome::Done(Err(ProposeError::Timeout { .. }))) => {}
                Ok(Outcome::Done(result)) => return result,
                Ok(Outcome::NotLeader(leader)) => {
                    hint = leader.filter(|id| *id != self.shared.replica);
                    if hint.is_some() && pause == RETRY_PAUSE {
                        pause *= 2;
                        continue;
                    }
                }
            }
            tokio::time::sleep(pause.min(left)).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    async fn try_once(
        &self,
        group: GroupId,
        command: &Command,
        submitted: bool,
        leader: Option<u64>,
        left: Duration,
    ) -> Outcome {
        let Some(leader) = leader.filter(|id| *id != self.shared.replica) else {
            let origin = Origin {
                replica: self.shared.replica,
                submitted,
            };
            return self.attempt(group, command.clone(), origin).await;
        };
        // A leader that does not answer may be gone: after a second we look for another.
        let patience = left.min(Duration::from_secs(1));
        let (command, patience_ms) = (command.clone(), patience.as_millis() as u32);
        let call = if submitted {
            Call::Submit {
                group,
                command,
                patience: patience_ms,
            }
        } else {
            Call::Propose {
                group,
                command,
                patience: patience_ms,
            }
        };
        match self.ask(leader, &call, patience).await {
            Some(CallReply::Proposed(result)) => Outcome::Done(result),
            Some(CallReply::NotLeader(leader)) => Outcome::NotLeader(leader),
            // It may have been committed: it is asked for again under the same id.
            _ => Outcome::NotLeader(None),
        }
    }

    /// Ends when another one leads the group than was known when `asked` was asked.
    async fn superseded(&self, group: GroupId, known: Option<u64>, asked: Option<u64>) {
        let asked = asked.filter(|id| *id != self.shared.replica);
        if asked.is_none() {
            return std::future::pending().await;
        }
        let mut status = self.status();
        loop {
            let now = status
                .borrow_and_update()
                .get(&group)
                .and_then(|g| g.leader);
            if now.is_some() && now != known && now != asked {
                return;
            }
            if status.changed().await.is_err() {
                break;
            }
        }
        std::future::pending().await
    }

    fn late(&self, group: GroupId) -> ProposeError {
        if self.is_full() {
            ProposeError::DiskFull
        } else {
            ProposeError::Timeout { group }
        }
    }

    pub(super) async fn handle_propose(
        &self,
        group: GroupId,
        command: Command,
        origin: Origin,
        patience: u32,
    ) -> CallReply {
        let patience = patience_of(patience);
        if let Err(error) = command.validate() {
            return CallReply::Proposed(Err(error));
        }
        match tokio::time::timeout(patience, self.attempt(group, command, origin)).await {
            Err(_) => CallReply::Proposed(Err(ProposeError::Timeout { group })),
            Ok(Outcome::Done(result)) => CallReply::Proposed(result),
            Ok(Outcome::NotLeader(leader)) => CallReply::NotLeader(leader),
        }
    }

    async fn attempt(&self, group: GroupId, command: Command, origin: Origin) -> Outcome {
        let (reply, answer) = oneshot::channel();
        let input = Input::Propose(group, command, origin, reply);
        if !self.input(input).await {
            return Outcome::Done(Err(ProposeError::Stopped));
        }
        answer.await.unwrap_or(Outcome::NotLeader(None))
    }
}
