//! Leadership is handed to another node: of one group, as an operator wishes, or of all.

use std::time::Duration;

use krake_model::ids::GroupId;
use tokio::sync::oneshot;

use super::{Host, RETRY_PAUSE_MAX};
use crate::engine::{Input, TransferStart};
use crate::inspect::TransferError;
use crate::wire::{Call, CallReply};

impl Host {
    /// Hands leadership of `group` to the voter `to`, wherever it is led, and waits until this
    /// node sees it there. `false`: it leads already. Dropping the future takes nothing back.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn transfer(
        &self,
        group: GroupId,
        to: u64,
        timeout: Duration,
    ) -> Result<bool, TransferError> {
        let deadline = tokio::time::Instant::now() + timeout;
        let mut status = self.status();
        let mut begun = false;
        loop {
            let leader = {
                let known = status.borrow_and_update();
                let Some(known) = known.get(&group) else {
                    return Err(TransferError::UnknownGroup { group });
                };
                known.leader
            };
            if leader == Some(to) {
                return Ok(begun);
            }
            if let Some(leader) = leader.filter(|_| !begun) {
                match self.ask_transfer(group, to, leader, deadline).await {
                    Ok(true) => begun = true,
                    Ok(false) => return Ok(false),
                    Err(Some(error)) => return Err(error),
                    // Leadership moved meanwhile: ask whoever has it next.
                    Err(None) => {}
                }
            }
            let again = deadline.min(tokio::time::Instant::now() + RETRY_PAUSE_MAX);
            if let Ok(Err(_)) = tokio::time::timeout_at(again, status.changed()).await {
                return Err(TransferError::Stopped);
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(if begun {
                    TransferError::Timeout { group, to }
                } else {
                    TransferError::NoLeader { group }
                });
            }
        }
    }

    async fn ask_transfer(
        &self,
        group: GroupId,
        to: u64,
        leader: u64,
        deadline: tokio::time::Instant,
    ) -> TransferStart {
        if leader == self.shared.replica {
            return self.begin_transfer(group, to).await;
        }
        let left = deadline.saturating_duration_since(tokio::time::Instant::now());
        match self.ask(leader, &Call::Transfer { group, to }, left).await {
            Some(CallReply::Transferred(result)) => result.map_err(Some),
            _ => Err(None),
        }
    }

    pub(super) async fn begin_transfer(&self, group: GroupId, to: u64) -> TransferStart {
        let (reply, answer) = oneshot::channel();
        if !self.input(Input::Transfer(group, to, reply)).await {
            return Err(Some(TransferError::Stopped));
        }
        answer.await.unwrap_or(Err(None))
    }

    /// Hands all leadership to others, waiting at most `timeout`; `true` when none is left here.
    pub async fn hand_over(&self, timeout: Duration) -> bool {
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let (reply, answer) = oneshot::channel();
            if !self.input(Input::HandOver(reply)).await {
                return false;
            }
            match tokio::time::timeout_at(deadline, answer).await {
                Ok(Ok(0)) => return true,
                Ok(Ok(_)) => {}
                Ok(Err(_)) | Err(_) => return false,
            }
            let next = tokio::time::Instant::now() + Duration::from_millis(30);
            if next >= deadline {
                return false;
            }
            tokio::time::sleep_until(next).await;
        }
    }

    /// Tells that this node should lead no group that another live voter can lead (`true`), as before
    /// it is taken away; a node with a slow disk finds out for itself. It goes on voting.
    pub async fn set_reluctant(&self, reluctant: bool) {
        self.input(Input::Reluctant(reluctant)).await;
    }
}
