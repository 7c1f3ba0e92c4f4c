//! Length-prefixed messages on libp2p streams, and questions that have a stream each.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ready};
use libp2p::{PeerId, Stream, StreamProtocol};
use thiserror::Error;

/// Frames of the consensus.
pub(crate) const FRAMES: StreamProtocol = StreamProtocol::new("/krake/frames/1");
/// Questions between members.
pub(crate) const CALLS: StreamProtocol = StreamProtocol::new("/krake/calls/2");
/// Exchange of reports between members.
pub(crate) const REPORTS: StreamProtocol = StreamProtocol::new("/krake/reports/1");
/// A newcomer's request.
pub(crate) const JOIN: StreamProtocol = StreamProtocol::new("/krake/join/1");

/// One frame, question or answer has this many bytes at most.
pub const CALL_BYTES_MAX: usize = 16 * 1024 * 1024;
/// A newcomer's request has this many bytes at most.
pub(crate) const JOIN_BYTES_MAX: usize = 64 * 1024;
/// A peer that does not take or give bytes for this long has lost its stream.
pub(crate) const STALL: Duration = Duration::from_secs(5);
/// A stream is open after this time, or somebody should try again: where a connection is replaced at
/// that moment, it may be asked for on none of them (see `Network::connect`).
const OPEN_TIME: Duration = Duration::from_secs(3);
/// Messages are gathered up to this size into one write.
const GATHERED_BYTES: usize = 64 * 1024;
/// Whoever writes lets others go first after so many bytes.
const WRITTEN_AT_ONCE: usize = 256 * 1024;
/// What is read from a stream at once, at most.
pub(crate) const READ_BYTES: usize = 16 * 1024;

/// A question got no answer.
#[derive(Debug, Error)]
pub enum CallError {
    /// No connection, or the peer does not speak the protocol.
    #[error("node {peer} cannot be reached: {reason}")]
    Unreachable {
        /// Whom we asked.
        peer: String,
        /// Why.
        reason: String,
    },
    /// The time is over.
    #[error("node {peer} gave no answer within {} ms", timeout.as_millis())]
    Timeout {
        /// Whom we asked.
        peer: String,
        /// How long we waited.
        timeout: Duration,
    },
    /// It answered with an error.
    #[error("node {peer} answered: {reason}")]
    Refused {
        /// Whom we asked.
        peer: String,
        /// What it said.
        reason: String,
    },
}

/// Writes one message.
pub(crate) async fn write<S: AsyncWrite + Unpin>(
    stream: &mut S,
    bytes: &[u8],
) -> std::io::Result<()> {
    let mut gathered = Gathered::default();
    gathered.push(&[bytes]);
    gathered.write(stream).await
}

/// Messages that are written at once: each write of a stream costs the connection a frame, a
/// cipher's block and, where it is idle, a system call.
#[derive(Debug, Default)]
pub(crate) struct Gathered {
    bytes: Vec<u8>,
    /// So many of them are written.
    written: usize,
}

impl Gathered {
    /// Adds a message, given in parts.
    pub(crate) fn push(&mut self, parts: &[&[u8]]) {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        self.bytes.reserve(length + 4);
        self.bytes.extend_from_slice(&(length as u32).to_be_bytes());
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
    }

    /// Nothing is left to write.
    pub(crate) const fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// No more should be added before what is there is written.
    pub(crate) const fn is_full(&self) -> bool {
        self.bytes.len() >= GATHERED_BYTES
    }

    /// Writes what was added, as far as the stream takes it now; ready when that was all.
    pub(crate) fn poll_write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.bytes.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let limit = self.written + WRITTEN_AT_ONCE;
        while self.written < self.bytes.len() {
            if self.written >= limit {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let left = &self.bytes[self.written..];
            match ready!(Pin::new(&mut *stream).poll_write(cx, left))? {
                0 => return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into())),
                taken => self.written += taken,
            }
        }
        ready!(Pin::new(stream).poll_flush(cx))?;
        self.clear();
        Poll::Ready(Ok(()))
    }

    /// Writes what was added.
    pub(crate) async fn write<S: AsyncWrite + Unpin>(
        &mut self,
        stream: &mut S,
    ) -> std::io::Result<()> {
        let limit = STALL.max(size_allowance(self.bytes.len()));
        let work = poll_fn(|cx| self.poll_write(stream, cx));
        let written = tokio::time::timeout(limit, work).await;
        self.clear();
        written.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.bytes.shrink_to(2 * GATHERED_BYTES);
        self.written = 0;
    }
}

/// Time that a message of this size may take on a slow line (1 MB/s).
const fn size_allowance(bytes: usize) -> Duration {
    Duration::from_millis(1000 + bytes as u64 / 1000)
}

/// Reads one message of at most `limit` bytes; `None` at a clean end.
pub(crate) async fn read<S: AsyncRead + Unpin>(
    stream: &mut S,
    limit: usize,
) -> std::io::Result<Option<Vec<u8>>> {
    let mut length = [0_u8; 4];
    match stream.read_exact(&mut length).await {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let length = u32::from_be_bytes(length) as usize;
    if length > limit {
        return Err(std::io::Error::new(
            std::io::ErrorKind::InvalidData,
            format!("a message of {length} bytes, the limit is {limit}"),
        ));
    }
    // Grows as bytes arrive: a peer cannot make us reserve what it does not send.
    let mut bytes = Vec::new();
    let work = async {
        while bytes.len() < length {
            let known = bytes.len();
            bytes.resize(length.min(known + GATHERED_BYTES), 0);
            stream.read_exact(&mut bytes[known..]).await?;
        }
        Ok::<_, std::io::Error>(())
    };
    tokio::time::timeout(STALL.max(size_allowance(length)), work)
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?;
    Ok(Some(bytes))
}

/// Writes an answer: a status byte, then the bytes or the text of the error.
pub(crate) async fn answer(
    stream: &mut Stream,
    result: Result<Vec<u8>, String>,
) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    match result {
        Ok(answer) => {
            bytes.push(0);
            bytes.extend_from_slice(&answer);
        }
        Err(reason) => {
            bytes.push(1);
            bytes.extend_from_slice(reason.as_bytes());
        }
    }
    write(stream, &bytes).await?;
    stream.close().await
}

/// Opens a stream, or says why not, within [`OPEN_TIME`].
pub(crate) async fn open(
    control: &mut libp2p_stream::Control,
    peer: PeerId,
    protocol: StreamProtocol,
) -> Result<Stream, String> {
    let opening = control.open_stream(peer, protocol);
    match tokio::time::timeout(OPEN_TIME, opening).await {
        Ok(opened) => opened.map_err(|error| error.to_string()),
        Err(_) => Err("no stream was opened in time".to_owned()),
    }
}

/// Opens a stream, asks and waits for the answer, all within `timeout`.
pub(crate) async fn ask(
    control: &mut libp2p_stream::Control,
    peer: PeerId,
    protocol: StreamProtocol,
    question: &[u8],
    timeout: Duration,
) -> Result<Vec<u8>, CallError> {
    let unreachable = |reason: String| CallError::Unreachable {
        peer: peer.to_string(),
        reason,
    };
    let work = async {
        let mut stream = open(control, peer, protocol).await.map_err(unreachable)?;
        write(&mut stream, question)
            .await
            .map_err(|error| unreachable(error.to_string()))?;
        let bytes = read(&mut stream, CALL_BYTES_MAX)
            .await
            .map_err(|error| unreachable(error.to_string()))?;
        match bytes.as_deref().and_then(<[u8]>::split_first) {
            Some((0, answer)) => Ok(answer.to_vec()),
            Some((_, reason)) => Err(CallError::Refused {
                peer: peer.to_string(),
                reason: String::from_utf8_lossy(reason).into_owned(),
            }),
            None => Err(unreachable("the stream ended without an answer".to_owned())),
        }
    };
    tokio::time::timeout(timeout, work)
        .await
        .unwrap_or_else(|_| {
            Err(CallError::Timeout {
                peer: peer.to_string(),
                timeout,
            })
        })
}
