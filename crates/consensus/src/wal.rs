//! A write-ahead log in segment files, for all groups of a node: one append and one sync a round.
//!
//! It never drops what was acknowledged without saying so: only a frame that was being written
//! when the power went, at the end of the last segment, is cut; anything else that cannot be read
//! is an error.

use std::collections::VecDeque;
use std::io;

use krake_model::codec::{self, CodecError, RECORD_BYTES_MAX};
use krake_model::ids::{FederationId, NodeId};
use serde::{Deserialize, Serialize};

use crate::frame::{self, Found};
use crate::medium::{Directory, Medium, UNFINISHED};
use crate::planted::{self, Bug};

const HEADER_VERSION: u8 = 1;
/// A segment that has grown beyond this is followed by a new one.
pub(crate) const SEGMENT_BYTES: u64 = 16 * 1024 * 1024;
/// Room is written as zeros this far ahead: then a sync need not wait for the file's size too.
const ROOM_BYTES: u64 = 1024 * 1024;
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];
const PREFIX: &str = "segment-";

/// Whose catalog it is; files of two data directories are not mixed unnoticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The federation.
    pub federation: FederationId,
    /// The node in it.
    pub node: NodeId,
}

/// First frame of each segment.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    owner: Owner,
    /// Counts segments.
    number: u64,
}

/// Why a log cannot be read or written.
#[derive(Debug)]
pub(crate) enum WalError {
    Io(io::Error),
    /// There is no log.
    Missing,
    /// It is another node's.
    Foreign(Owner),
    /// A file is not what was written.
    Damaged {
        file: String,
        offset: u64,
        reason: String,
    },
}

impl From<io::Error> for WalError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

pub(crate) fn name_of(number: u64) -> String {
    format!("{PREFIX}{number:016}")
}

fn number_of(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// A log, open for appending.
pub(crate) struct Wal {
    owner: Owner,
    file: Box<dyn Medium>,
    /// Oldest first; the last is the one written to.
    segments: VecDeque<Segment>,
    /// Zeros are written up to here.
    room: u64,
    /// Of the next frame.
    sequence: u64,
    /// A segment of so many bytes is full.
    pub(crate) segment_bytes: u64,
}

#[derive(Debug)]
struct Segment {
    number: u64,
    bytes: u64,
}

impl Wal {
    /// Makes a log whose first record is `checkpoint`.
    pub(crate) fn create(
        directory: &dyn Directory,
        owner: Owner,
        checkpoint: &[u8],
    ) -> Result<Self, WalError> {
        let first = encode_first(owner, 1, 1, checkpoint)?;
        let file = directory.create(&unfinished_name(1))?;
        let segment = begin(directory, &*file, 1, &first)?;
        Ok(Self {
            owner,
            file,
            room: segment.bytes,
            segments: VecDeque::from([segment]),
            sequence: 3,
            segment_bytes: SEGMENT_BYTES,
        })
    }

    /// Reads every record in order, with the number of its segment, and goes on after the last.
    pub(crate) fn open<E: From<WalError>>(
        directory: &dyn Directory,
        owner: Owner,
        mut record: impl FnMut(u64, &[u8]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let names = directory.list().map_err(WalError::from)?;
        let mut numbers: Vec<u64> = names.iter().filter_map(|name| number_of(name)).collect();
        numbers.sort_unstable();
        let Some(last) = numbers.last().copied() else {
            return Err(WalError::Missing.into());
        };
        let mut segments = VecDeque::new();
        let mut sequence = None;
        for (position, number) in numbers.iter().copied().enumerate() {
            if number != numbers[0] + position as u64 {
                return Err(damaged(number - 1, 0, "the segment is missing").into());
            }
            let bytes = directory.read(&name_of(number)).map_err(WalError::from)?;
            let (mut offset, mut expected) = check_header(&bytes, owner, number, sequence)?;
            loop {
                match frame::read(&bytes, offset, expected) {
                    Found::Frame { payload, next, .. } => {
                        record(number, payload)?;
                        expected += 1;
                        offset = next;
                    }
                    Found::End => break,
                    Found::Torn if number == last => {
                        cut(directory, number, offset as u64, bytes.len() as u64)?;
                        break;
                    }
                    Found::Torn | Found::Damaged => {
                        return Err(damaged(number, offset as u64, "a record is damaged").into());
                    }
                }
            }
            sequence = Some(expected);
            segments.push_back(Segment {
                number,
                bytes: offset as u64,
            });
        }
        let file = directory.open(&name_of(last)).map_err(WalError::from)?;
        // A process that was killed may have written what was not made durable: we have read it,
        // and will act upon it.
        if !planted::has(Bug::ReadBackNotSynced) {
            file.sync().map_err(WalError::from)?;
        }
        Ok(Self {
            owner,
            file,
            // What is on the disk beyond is not relied on.
            room: segments.back().map_or(0, |segment| segment.bytes),
            segments,
            sequence: sequence.unwrap_or(1),
            segment_bytes: SEGMENT_BYTES,
        })
    }

    /// Number of the segment that is written to.
    pub(crate) fn current(&self) -> u64 {
        self.segments.back().map_or(0, |segment| segment.number)
    }

    /// Bytes of all segments.
    pub(crate) fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// Whether the current segment has grown enough.
    pub(crate) fn is_full(&self) -> bool {
        self.segments
            .back()
            .is_some_and(|segment| segment.bytes >= self.segment_bytes)
    }

    /// Begins a new segment. `checkpoint`, its first record, must say all that the others say of
    /// what is not in records that are still wanted.
    pub(crate) fn rotate(
        &mut self,
        directory: &dyn Directory,
        checkpoint: &[u8],
    ) -> Result<(), WalError> {
        let number = self.current() + 1;
        let first = encode_first(self.owner, number, self.sequence, checkpoint)?;
        let (file, room) = directory.create_roomy(&unfinished_name(number), self.segment_bytes)?;
        let segment = begin(directory, &*file, number, &first)?;
        self.file = file;
        self.room = room.max(segment.bytes);
        self.segments.push_back(segment);
        self.sequence += 2;
        Ok(())
    }

    /// Appends a record; when this returns, it is durable. After an error nothing may be written
    /// any more: what is on the disk is not known.
    pub(crate) fn append(&mut self, payload: &[u8]) -> Result<(), WalError> {
        let Some(segment) = self.segments.back_mut() else {
            return Err(WalError::Missing);
        };
        let frame = frame::write(self.sequence, payload);
        self.file.write_at(segment.bytes, &frame)?;
        segment.bytes += frame.len() as u64;
        if segment.bytes > self.room {
            let room = segment.bytes.next_multiple_of(ROOM_BYTES);
            let mut at = segment.bytes;
            while at < room {
                let count = (room - at).min(ZEROS.len() as u64);
                self.file.write_at(at, &ZEROS[..count as usize])?;
                at += count;
            }
            self.room = room;
        }
        if !planted::has(Bug::AcknowledgedBeforeSync) {
            self.file.sync()?;
        }
        self.sequence += 1;
        Ok(())
    }

    /// Removes the oldest segment, never the current one. It may be there again after a crash: what
    /// is in it is no longer wanted, and does no harm.
    pub(crate) fn drop_oldest(&mut self, directory: &dyn Directory) -> Result<(), WalError> {
        if self.segments.len() < 2 {
            return Ok(());
        }
        if let Some(segment) = self.segments.pop_front() {
            directory.retire(&name_of(segment.number))?;
        }
        Ok(())
    }

    /// The oldest segment's number and how many there are.
    pub(crate) fn oldest(&self) -> (u64, usize) {
        let number = self.segments.front().map_or(0, |segment| segment.number);
        (number, self.segments.len())
    }
}

fn damaged(number: u64, offset: u64, reason: &str) -> WalError {
    WalError::Damaged {
        file: name_of(number),
        offset,
        reason: reason.to_owned(),
    }
}

fn unfinished_name(number: u64) -> String {
    format!("{}{UNFINISHED}", name_of(number))
}

/// The first two frames of a segment.
fn encode_first(
    owner: Owner,
    number: u64,
    sequence: u64,
    checkpoint: &[u8],
) -> Result<Vec<u8>, WalError> {
    let header = codec::encode(HEADER_VERSION, &Header { owner, number })
        .map_err(|error| io::Error::other(error.to_string()))?;
    let mut bytes = frame::write(sequence, &header);
    bytes.extend_from_slice(&frame::write(sequence + 1, checkpoint));
    Ok(bytes)
}

/// Makes an unfinished file a segment, durably.
fn begin(
    directory: &dyn Directory,
    file: &dyn Medium,
    number: u64,
    first: &[u8],
) -> Result<Segment, WalError> {
    file.write_at(0, first)?;
    file.sync()?;
    directory.rename(&unfinished_name(number), &name_of(number))?;
    Ok(Segment {
        number,
        bytes: first.len() as u64,
    })
}

fn check_header(
    bytes: &[u8],
    owner: Owner,
    number: u64,
    expected: Option<u64>,
) -> Result<(usize, u64), WalError> {
    let bad = |reason: &str| damaged(number, 0, reason);
    // The first segment's sequence is whatever it is: older ones were dropped.
    let sequence = match expected {
        Some(expected) => expected,
        None => frame::sequence(bytes).ok_or_else(|| bad("its first record is damaged"))?,
    };
    let Found::Frame { payload, next, .. } = frame::read(bytes, 0, sequence) else {
        return Err(bad(
            "its first record is damaged, or a record before it is missing",
        ));
    };
    let header: Header = codec::decode(HEADER_VERSION, payload, RECORD_BYTES_MAX)
        .map_err(|error| bad(&explain(&error)))?;
    if header.owner != owner {
        return Err(WalError::Foreign(header.owner));
    }
    if header.number != number {
        return Err(bad("it is another segment under this name"));
    }
    Ok((next, sequence + 1))
}

fn explain(error: &CodecError) -> String {
    match error {
        CodecError::Version { .. } => format!("it was written by another version: {error}"),
        _ => error.to_string(),
    }
}

/// Clears what a torn write left, so that it is never taken for anything.
fn cut(directory: &dyn Directory, number: u64, from: u64, to: u64) -> Result<(), WalError> {
    let file = directory.open(&name_of(number))?;
    let mut at = from;
    while at < to {
        let count = (to - at).min(ZEROS.len() as u64);
        file.write_at(at, &ZEROS[..count as usize])?;
        at += count;
    }
    file.sync()?;
    tracing::info!(
        segment = number,
        offset = from,
        "a record that was being written when the node stopped was cut"
    );
    Ok(())
}
