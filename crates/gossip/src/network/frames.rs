//! Consensus frames: to each member in order, over a connection of their own where there is one,
//! otherwise over a stream. They may overtake each other when their way changes.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures::io::BufReader;
use futures::{AsyncRead, StreamExt, ready};
use krake_model::ids::NodeId;
use libp2p::{PeerId, Stream};
use parking_lot::{Mutex, MutexGuard};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tracing::debug;

use super::direct::{self, Direct};
use super::shared::Shared;
use super::upgrade::Dialler;
use super::{Handler, node_id};
use crate::streams::{self, CALL_BYTES_MAX, Gathered};

/// Frames that wait for one peer at most; more are dropped, and Raft sends again.
const FRAME_QUEUE: usize = 256;
/// Whoever sends a frame of at most this size writes it, too, if nothing is before it.
const AT_ONCE_BYTES: usize = 64 * 1024;
/// So many frames within a second are worth a connection of their own: while nothing happens there
/// are three (ADR 0009).
const BUSY: u32 = 32;
const BUSY_WITHIN: Duration = Duration::from_secs(1);

/// Where frames for one member are put. Its tasks end with it.
pub(super) struct Outbox {
    queue: Arc<Queue>,
    tasks: [AbortHandle; 2],
}

impl Outbox {
    /// The caller may be a thread of its own, outside the runtime.
    pub(super) fn new(
        runtime: &Handle,
        to: (NodeId, PeerId),
        streams: libp2p_stream::Control,
        shared: Weak<Shared>,
        dialler: Arc<Dialler>,
    ) -> Self {
        let queue = Arc::<Queue>::default();
        let writer = runtime.spawn(write_frames(Arc::clone(&queue), streams, to.1));
        let keeper = runtime.spawn(direct::keep(Arc::clone(&queue), shared, dialler, to));
        Self {
            queue,
            tasks: [writer.abort_handle(), keeper.abort_handle()],
        }
    }

    /// Sends a frame behind those before it, without waiting; `false`: too many wait.
    pub(super) fn push(&self, frame: Vec<u8>) -> bool {
        self.queue.push(frame)
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// What waits for one member, and the direct connection to it.
#[derive(Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    /// For whoever writes to the stream.
    news: Notify,
}

struct State {
    waiting: VecDeque<Vec<u8>>,
    direct: Option<Direct>,
    /// Whoever keeps it, waiting for something of it.
    keeper: Option<Waker>,
    /// It is worth it.
    wanted: bool,
    /// Frames since then.
    pushed: u32,
    since: Instant,
}

impl Default for State {
    fn default() -> Self {
        Self {
            waiting: VecDeque::new(),
            direct: None,
            keeper: None,
            wanted: false,
            pushed: 0,
            since: Instant::now(),
        }
    }
}

impl State {
    /// There is a direct connection, and all that was pushed was written to it.
    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.direct.as_ref().is_some_and(Direct::is_idle)
    }

    /// Writes some of what waits to the direct connection; ready when the system has taken it or the
    /// connection is lost, with what it had.
    fn poll_direct(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(direct) = &mut self.direct else {
            return Poll::Ready(());
        };
        if direct.is_idle() {
            gather(&mut self.waiting, direct.gathered());
        }
        if let Err(error) = ready!(direct.poll_write(cx)) {
            debug!(%error, "a connection for frames broke");
            self.direct = None;
        }
        Poll::Ready(())
    }

    fn count(&mut self) {
        self.pushed += 1;
        if self.direct.is_none() && self.pushed >= BUSY && self.begin_count().1 < BUSY_WITHIN {
            self.wanted = true;
        }
    }

    /// How many frames were pushed since the count began, and how long that is ago.
    fn begin_count(&mut self) -> (u32, Duration) {
        let (now, pushed) = (Instant::now(), std::mem::take(&mut self.pushed));
        let since = std::mem::replace(&mut self.since, now);
        (pushed, now.duration_since(since))
    }
}

impl Queue {
    fn push(&self, frame: Vec<u8>) -> bool {
        let mut state = self.state.lock();
        if state.waiting.len() >= FRAME_QUEUE {
            return false;
        }
        let was_direct = state.direct.is_some();
        let at_once = state.is_idle() && frame.len() <= AT_ONCE_BYTES;
        state.waiting.push_back(frame);
        state.count();
        if at_once {
            // What the system does not take now is the keeper's, who can be woken.
            let _ = state.poll_direct(&mut Context::from_waker(Waker::noop()));
        }
        let for_keeper = if was_direct {
            !state.is_idle()
        } else {
            state.wanted
        };
        let keeper = if for_keeper {
            state.keeper.take()
        } else {
            None
        };
        let for_stream = state.direct.is_none();
        drop(state);
        if let Some(keeper) = keeper {
            keeper.wake();
        }
        if for_stream {
            self.news.notify_one();
        }
        true
    }

    /// Ready when there are so many frames that they are worth a direct connection.
    pub(super) fn poll_wanted(&self, cx: &Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        if std::mem::take(&mut state.wanted) {
            return Poll::Ready(());
        }
        state.keeper = Some(cx.waker().clone());
        Poll::Pending
    }

    /// From now on frames go over this connection.
    pub(super) fn set_direct(&self, direct: Direct) {
        let mut state = self.state.lock();
        state.direct = Some(direct);
        state.wanted = false;
        state.begin_count();
    }

    /// Writes to the connection that was set whatever was not written by who pushed it; ready when it
    /// is lost, the frames in it, too.
    pub(super) fn poll_keep(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state.lock();
        state.keeper = Some(cx.waker().clone());
        if let Some(direct) = &mut state.direct
            && direct.poll_closed(cx).is_ready()
        {
            state.direct = None;
        }
        while state.direct.is_some() && !state.is_idle() {
            ready!(state.poll_direct(cx));
            // Whoever pushes does not wait for all of it.
            MutexGuard::bump(&mut state);
        }
        if state.direct.is_some() {
            return Poll::Pending;
        }
        let left = !state.waiting.is_empty();
        drop(state);
        if left {
            self.news.notify_one();
        }
        Poll::Ready(())
    }

    /// Ends the connection that was set if there were few frames since this was asked last.
    pub(super) fn end_if_quiet(&self) -> bool {
        let mut state = self.state.lock();
        let (pushed, time) = state.begin_count();
        let quiet = BUSY_WITHIN * pushed < time * BUSY && state.is_idle();
        if quiet {
            state.direct = None;
        }
        quiet
    }
}

fn gather(waiting: &mut VecDeque<Vec<u8>>, gathered: &mut Gathered) {
    while !gathered.is_full()
        && let Some(frame) = waiting.pop_front()
    {
        gathered.push(&[&frame]);
    }
}

/// Writes frames to a stream while there is no direct connection.
async fn write_frames(queue: Arc<Queue>, mut control: libp2p_stream::Control, peer: PeerId) {
    let mut stream: Option<Stream> = None;
    let mut gathered = Gathered::default();
    let waits = || {
        let state = queue.state.lock();
        state.direct.is_none() && !state.waiting.is_empty()
    };
    loop {
        if !waits() {
            queue.news.notified().await;
            continue;
        }
        if stream.is_none() {
            match streams::open(&mut control, peer, streams::FRAMES).await {
                Ok(opened) => stream = Some(opened),
                Err(error) => debug!(%peer, error, "no stream for frames"),
            }
            // That may have taken time.
            if !waits() {
                continue;
            }
        }
        let Some(open) = stream.as_mut() else {
            // What waited meanwhile is out of date.
            queue.state.lock().waiting.clear();
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        gather(&mut queue.state.lock().waiting, &mut gathered);
        if let Err(error) = gathered.write(open).await {
            debug!(%peer, %error, "the stream for frames broke");
            stream = None;
        }
    }
}

pub(super) async fn take_frames(
    mut incoming: libp2p_stream::IncomingStreams,
    shared: Arc<Shared>,
    handler: Arc<dyn Handler>,
) {
    while let Some((peer, stream)) = incoming.next().await {
        let (shared, handler) = (Arc::downgrade(&shared), Arc::clone(&handler));
        tokio::spawn(read_frames(stream, peer, shared, handler, Shared::heard));
    }
}

/// Hands over what comes from a member, which is `heard` thereby, until that ends or it is a member
/// no more.
pub(super) async fn read_frames(
    stream: impl AsyncRead + Unpin,
    peer: PeerId,
    shared: Weak<Shared>,
    handler: Arc<dyn Handler>,
    heard: fn(&Shared, NodeId),
) {
    let Some(node) = node_id(&peer) else {
        return;
    };
    let mut stream = BufReader::with_capacity(streams::READ_BYTES, stream);
    loop {
        match streams::read(&mut stream, CALL_BYTES_MAX).await {
            Ok(Some(frame)) => {
                let Some(shared) = shared.upgrade() else {
                    return;
                };
                if !shared.is_member(&peer) {
                    return;
                }
                heard(&shared, node);
                shared.traffic.frames.fetch_add(1, Ordering::Relaxed);
                handler.frame(node, &frame);
            }
            Ok(None) => return,
            Err(error) => {
                debug!(%peer, %error, "frames end");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::sync::atomic::AtomicUsize;
    use std::task::Wake;

    use futures::AsyncWrite;

    use super::*;

    fn pushed(pushed: u32, ago: Duration) -> State {
        State {
            pushed,
            since: Instant::now() - ago,
            ..State::default()
        }
    }

    #[test]
    fn many_frames_at_once_are_worth_a_connection_and_few_are_not() {
        for (before, ago, wanted) in [
            (BUSY - 2, Duration::ZERO, false),
            (BUSY - 1, BUSY_WITHIN / 2, true),
            (BUSY - 1, BUSY_WITHIN * 2, false),
        ] {
            let mut state = pushed(before, ago);
            state.count();
            assert_eq!(state.wanted, wanted, "{before} since {ago:?}");
        }
    }

    #[test]
    fn a_quiet_connection_ends_and_a_busy_one_stays() {
        let minute = Duration::from_secs(60);
        for (frames, ends) in [(BUSY * 59, true), (BUSY * 61, false)] {
            let queue = Queue {
                state: Mutex::new(pushed(frames, minute)),
                ..Queue::default()
            };
            let stream = futures::io::Cursor::new(Vec::new());
            queue.state.lock().direct = Some(Direct::over(Box::new(stream)));
            assert_eq!(queue.end_if_quiet(), ends);
            assert_eq!(queue.state.lock().direct.is_none(), ends);
        }
    }

    /// Takes so many bytes, and more when told.
    struct Narrow(Arc<Mutex<(Vec<u8>, usize)>>);

    impl AsyncWrite for Narrow {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<std::io::Result<usize>> {
            let (taken, room) = &mut *self.0.lock();
            let count = bytes.len().min(*room);
            *room -= count;
            taken.extend_from_slice(&bytes[..count]);
            if count == 0 {
                return Poll::Pending;
            }
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncRead for Narrow {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut [u8],
        ) -> Poll<std::io::Result<usize>> {
            Poll::Pending
        }
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn who_pushes_writes_and_what_is_not_taken_is_the_keepers() {
        let taken = Arc::new(Mutex::new((Vec::new(), 12)));
        let queue = Queue::default();
        queue.set_direct(Direct::over(Box::new(Narrow(Arc::clone(&taken)))));
        let woken = Arc::<Woken>::default();
        let wakes = || woken.0.swap(0, Ordering::Relaxed);
        let waker = Waker::from(Arc::clone(&woken));
        let keep = || queue.poll_keep(&mut Context::from_waker(&waker));
        assert!(keep().is_pending());

        assert!(queue.push(vec![1; 4]));
        assert_eq!((taken.lock().0.len(), wakes()), (8, 0));
        assert!(queue.push(vec![2; 4]));
        assert_eq!((taken.lock().0.len(), wakes()), (12, 1));
        assert!(queue.push(vec![3; AT_ONCE_BYTES + 1]));
        taken.lock().1 = usize::MAX;
        assert!(queue.push(vec![4; 4]));
        assert_eq!(taken.lock().0.len(), 12, "nothing overtakes");
        assert!(keep().is_pending());
        let large = AT_ONCE_BYTES + 5;
        assert_eq!(taken.lock().0.len(), 24 + large);
        assert_eq!(taken.lock().0[16 + large..], [0, 0, 0, 4, 4, 4, 4, 4]);
        assert!(queue.push(vec![5; AT_ONCE_BYTES + 1]));
        assert_eq!((taken.lock().0.len(), wakes()), (24 + large, 1));
    }
}
