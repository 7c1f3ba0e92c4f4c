//! The queue of what the thread is told. It knows whether something waits in it, which a channel of
//! the standard library does not say; those of `crossbeam-channel` do, but keep what waits when the
//! receiver is gone, and with it whoever waits for an answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, SyncSender, TryRecvError, TrySendError, sync_channel,
};
use std::time::Duration;

/// Gives something to the thread.
#[derive(Debug)]
pub(crate) struct Giver<T> {
    sender: SyncSender<T>,
    waiting: Arc<AtomicUsize>,
}

/// The thread's end.
#[derive(Debug)]
pub(crate) struct Inputs<T> {
    receiver: Receiver<T>,
    waiting: Arc<AtomicUsize>,
}

/// A queue for so many inputs.
pub(crate) fn queue<T>(limit: usize) -> (Giver<T>, Inputs<T>) {
    let (sender, receiver) = sync_channel(limit);
    let waiting = Arc::<AtomicUsize>::default();
    let giver = Giver {
        sender,
        waiting: Arc::clone(&waiting),
    };
    (giver, Inputs { receiver, waiting })
}

impl<T> Giver<T> {
    pub(crate) fn try_send(&self, input: T) -> Result<(), TrySendError<T>> {
        // Before it can be taken.
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let sent = self.sender.try_send(input);
        if sent.is_err() {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
        sent
    }
}

impl<T> Inputs<T> {
    /// Whether nothing waits; what is being given right now may count.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) == 0
    }

    pub(crate) fn recv_timeout(&self, wait: Duration) -> Result<T, RecvTimeoutError> {
        let input = self.receiver.recv_timeout(wait)?;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        Ok(input)
    }

    pub(crate) fn try_recv(&self) -> Result<T, TryRecvError> {
        let input = self.receiver.try_recv()?;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        Ok(input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_knows_whether_something_waits_and_lets_go_of_it_at_the_end() {
        let (giver, inputs) = queue(2);
        assert!(inputs.is_empty());
        let input = Arc::new(());
        for _ in 0..2 {
            giver.try_send(Arc::clone(&input)).unwrap();
        }
        assert!(giver.try_send(Arc::clone(&input)).is_err());
        drop(inputs.try_recv().unwrap());
        assert!(!inputs.is_empty());
        drop(inputs.recv_timeout(Duration::ZERO).unwrap());
        assert!(inputs.is_empty() && inputs.try_recv().is_err());
        giver.try_send(Arc::clone(&input)).unwrap();
        drop(inputs);
        assert_eq!(Arc::strong_count(&input), 1);
        assert!(giver.try_send(input).is_err());
    }
}
