//! What a Raft message must be before it reaches the library, which panics on some that break its
//! assumptions. A member may be faulty; that must not stop another.

use krake_model::codec::CodecError;
use thiserror::Error;

use crate::log::GroupLog;
use crate::machine::Machine;
use crate::wire::{EntryKind, Message, MessageKind};

/// A term this far ahead of ours is not one that elections reach; taking it over would leave no
/// room to count on.
const TERM_JUMP_MAX: u64 = 1 << 32;
const CONTEXT_BYTES_MAX: usize = 64;

/// Why a message was refused.
#[derive(Debug, Error)]
pub(crate) enum Refused {
    #[error("it says it is from replica {said}, but its sender is replica {is}")]
    Sender { said: u64, is: u64 },
    #[error("it is for replica {to}, this is replica {own}")]
    Receiver { to: u64, own: u64 },
    #[error("its term {term} is too far from ours, {own}")]
    Term { term: u64, own: u64 },
    #[error("it commits up to {commit}, our log ends at {last}")]
    Commit { commit: u64, last: u64 },
    #[error("its entries do not follow one another")]
    Entries,
    #[error(
        "its entry {index} has term {said}, but we know one of term {known} there that is committed"
    )]
    Committed { index: u64, said: u64, known: u64 },
    #[error("it carries what its kind does not have, or lacks what it needs")]
    Shape,
    #[error("its snapshot cannot be read: {0}")]
    Snapshot(#[from] CodecError),
}

/// Checks a message that replica `sender` sent us, replica `own`, about the group with `log`. The map
/// of a snapshot had to be read for it.
pub(crate) fn admit(
    message: &Message,
    sender: u64,
    own: u64,
    term: u64,
    log: &GroupLog,
    last_index: u64,
) -> Result<Option<Machine>, Refused> {
    // A follower passes a read on to the leader it knows, in the reader's name.
    if message.from != sender && message.kind != MessageKind::ReadIndex {
        return Err(Refused::Sender {
            said: message.from,
            is: sender,
        });
    }
    if message.to != own {
        return Err(Refused::Receiver {
            to: message.to,
            own,
        });
    }
    if message.term > term.saturating_add(TERM_JUMP_MAX) {
        return Err(Refused::Term {
            term: message.term,
            own: term,
        });
    }
    if message.context.len() > CONTEXT_BYTES_MAX || message.index > u64::MAX / 2 {
        return Err(Refused::Shape);
    }
    let with_entries = matches!(
        message.kind,
        MessageKind::Append | MessageKind::ReadIndex | MessageKind::ReadIndexResponse
    );
    if !message.entries.is_empty() && !with_entries {
        return Err(Refused::Shape);
    }
    let mut map = None;
    match message.kind {
        MessageKind::Append => append(message, term, log)?,
        MessageKind::Heartbeat if message.commit > last_index => {
            return Err(Refused::Commit {
                commit: message.commit,
                last: last_index,
            });
        }
        MessageKind::Snapshot => map = Some(snapshot(message)?),
        MessageKind::ReadIndex | MessageKind::ReadIndexResponse
            if message.entries.len() != 1 || message.entries[0].data.len() > CONTEXT_BYTES_MAX =>
        {
            return Err(Refused::Shape);
        }
        _ => {}
    }
    // Terms are 0 only in forwarded reads.
    if message.term == 0
        && !matches!(
            message.kind,
            MessageKind::ReadIndex | MessageKind::ReadIndexResponse
        )
    {
        return Err(Refused::Shape);
    }
    Ok(map)
}

fn append(message: &Message, own_term: u64, log: &GroupLog) -> Result<(), Refused> {
    let mut term = message.log_term;
    for (offset, entry) in message.entries.iter().enumerate() {
        let follows = entry.index == message.index + 1 + offset as u64
            && entry.term >= term
            && entry.term <= message.term;
        if !follows {
            return Err(Refused::Entries);
        }
        // With neither it is the library's own, which leaves a joint configuration.
        let is_change = entry.kind == EntryKind::ConfChange;
        if is_change && entry.context.is_empty() && !entry.data.is_empty() {
            return Err(Refused::Shape);
        }
        term = entry.term;
    }
    // Of a leader that was replaced: the library does not read its entries.
    if message.term < own_term {
        return Ok(());
    }
    // An entry that we know committed is never replaced by another.
    let commit = log.hard_state.commit;
    for entry in &message.entries {
        if entry.index > commit {
            break;
        }
        if let Ok(known) = raft::Storage::term(log, entry.index)
            && known != entry.term
        {
            return Err(Refused::Committed {
                index: entry.index,
                said: entry.term,
                known,
            });
        }
    }
    Ok(())
}

fn snapshot(message: &Message) -> Result<Machine, Refused> {
    let Some(snapshot) = &message.snapshot else {
        return Err(Refused::Shape);
    };
    let in_log = (1..=message.term).contains(&snapshot.term);
    if snapshot.index == 0 || !in_log || snapshot.configuration.voters.is_empty() {
        return Err(Refused::Shape);
    }
    Ok(Machine::decode(&snapshot.data)?)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::log::HardState;
    use crate::wire::{Configuration, Entry, Snapshot};

    fn log() -> GroupLog {
        GroupLog::new(
            HardState {
                term: 2,
                vote: 0,
                commit: 1,
            },
            None,
            (1, 1),
            vec![],
        )
    }

    fn message(kind: MessageKind) -> Message {
        Message {
            kind,
            to: 1,
            from: 2,
            term: 2,
            log_term: 1,
            index: 1,
            entries: vec![],
            commit: 0,
            commit_term: 0,
            snapshot: None,
            request_snapshot: 0,
            reject: false,
            reject_hint: 0,
            context: Bytes::new(),
            priority: 0,
        }
    }

    fn entry(term: u64, index: u64) -> Entry {
        Entry {
            kind: EntryKind::Normal,
            term,
            index,
            data: Bytes::new(),
            context: Bytes::new(),
        }
    }

    fn refused(message: &Message) -> bool {
        admit(message, 2, 1, 2, &log(), 1).is_err()
    }

    #[test]
    fn an_ordinary_message_passes() {
        let mut append = message(MessageKind::Append);
        append.entries = vec![entry(2, 2), entry(2, 3)];
        assert!(!refused(&append));
        assert!(!refused(&message(MessageKind::Heartbeat)));
    }

    #[test]
    fn a_message_in_anothers_name_or_for_another_is_refused() {
        let mut wrong = message(MessageKind::Heartbeat);
        wrong.from = 3;
        assert!(refused(&wrong));
        let mut wrong = message(MessageKind::Heartbeat);
        wrong.to = 9;
        assert!(refused(&wrong));
    }

    #[test]
    fn what_would_panic_the_library_is_refused() {
        let mut beyond = message(MessageKind::Heartbeat);
        beyond.commit = 50;
        assert!(refused(&beyond));
        let mut gap = message(MessageKind::Append);
        gap.entries = vec![entry(2, 2), entry(2, 4)];
        assert!(refused(&gap));
        let mut back = message(MessageKind::Append);
        back.entries = vec![entry(2, 2), entry(1, 3)];
        assert!(refused(&back));
        let mut jump = message(MessageKind::Vote);
        jump.term = u64::MAX;
        assert!(refused(&jump));
        assert!(refused(&message(MessageKind::Snapshot)));
        let snapshot = |term, data| {
            let mut message = message(MessageKind::Snapshot);
            message.snapshot = Some(Snapshot {
                index: 5,
                term,
                configuration: Configuration {
                    voters: vec![1],
                    learners: vec![],
                },
                data,
            });
            message
        };
        let map = Bytes::from(Machine::default().encode().unwrap());
        assert!(!refused(&snapshot(2, map.clone())));
        // No leader has entries of a later term than its own.
        assert!(refused(&snapshot(3, map)));
        assert!(refused(&snapshot(2, Bytes::from_static(b"garbage"))));
        assert!(refused(&message(MessageKind::ReadIndex)));
    }
}
