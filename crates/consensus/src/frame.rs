//! Frames of the catalog's files: how a record lies on the disk, and how a record that was being
//! written when the power went is told from one that was damaged later.
//!
//! | bytes | what |
//! |---|---|
//! | 4 | length of the payload, little endian, not 0 |
//! | 4 | CRC-32 of length and sequence |
//! | 8 | sequence, counting frames over all segments |
//! | 4 | CRC-32 of the payload |
//! | 4 | `KRKF` |
//! | n | payload, padded with zeros to a multiple of 8 |
//! | 8 | `KRKFRAME` |
//!
//! A frame begins at a multiple of 8. The room after the last frame is zeros, written beforehand.
//! Every bit of a frame is checked, its padding too: a flipped one tells of a bad disk.

/// Bytes before the payload.
const HEADER: usize = 24;
const HEADER_MARK: [u8; 4] = *b"KRKF";
const TRAILER: [u8; 8] = *b"KRKFRAME";
const ALIGNMENT: usize = 8;
/// The unit that a disk writes whole or not at all.
const SECTOR: usize = 512;

/// Bytes of a frame around `payload` bytes.
const fn frame_bytes(payload: usize) -> usize {
    HEADER + payload.next_multiple_of(ALIGNMENT) + TRAILER.len()
}

/// Writes a frame.
pub(crate) fn write(sequence: u64, payload: &[u8]) -> Vec<u8> {
    let (head, tail) = around(sequence, payload);
    [&head, payload, &tail].concat()
}

/// What stands before and after a payload in its frame: a large one is not copied for it.
pub(crate) fn around(sequence: u64, payload: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let mut head = Vec::with_capacity(HEADER);
    head.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    head.extend_from_slice(&head_check(payload.len() as u32, sequence).to_le_bytes());
    head.extend_from_slice(&sequence.to_le_bytes());
    head.extend_from_slice(&crc32fast::hash(payload).to_le_bytes());
    head.extend_from_slice(&HEADER_MARK);
    let padding = payload.len().next_multiple_of(ALIGNMENT) - payload.len();
    let mut tail = vec![0; padding];
    tail.extend_from_slice(&TRAILER);
    (head, tail)
}

fn head_check(length: u32, sequence: u64) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length.to_le_bytes());
    hasher.update(&sequence.to_le_bytes());
    hasher.finalize()
}

/// What is at a place of a file.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found<'a> {
    Frame {
        sequence: u64,
        payload: &'a [u8],
        /// Where the next one begins.
        next: usize,
    },
    /// Nothing was written here or after.
    End,
    /// A frame was being written here and nothing after it: never acknowledged.
    Torn,
    /// Anything else.
    Damaged,
}

struct Head {
    sequence: u64,
    length: usize,
    check: u32,
}

fn head(bytes: &[u8]) -> Option<Head> {
    let head = bytes.get(..HEADER)?;
    let number =
        |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let mut sequence = [0_u8; 8];
    sequence.copy_from_slice(&head[8..16]);
    let sequence = u64::from_le_bytes(sequence);
    let length = number(0);
    let good =
        length > 0 && number(4) == head_check(length, sequence) && head[20..24] == HEADER_MARK;
    good.then_some(Head {
        sequence,
        length: length as usize,
        check: number(16),
    })
}

fn whole(bytes: &[u8]) -> Option<(u64, &[u8], usize)> {
    let head = head(bytes)?;
    let size = frame_bytes(head.length);
    let (payload, tail) = bytes.get(HEADER..size)?.split_at(head.length);
    let (padding, trailer) = tail.split_at(tail.len() - TRAILER.len());
    let good = trailer == TRAILER
        && padding.iter().all(|byte| *byte == 0)
        && crc32fast::hash(payload) == head.check;
    good.then_some((head.sequence, payload, size))
}

/// The sequence of the frame that `bytes` begin with.
pub(crate) fn sequence(bytes: &[u8]) -> Option<u64> {
    whole(bytes).map(|(sequence, ..)| sequence)
}

/// Reads the frame at `offset` of a file's `bytes`; `expected` is the sequence it must have.
pub(crate) fn read(bytes: &[u8], offset: usize, expected: u64) -> Found<'_> {
    let rest = bytes.get(offset..).unwrap_or_default();
    if let Some((sequence, payload, size)) = whole(rest) {
        return if sequence == expected {
            Found::Frame {
                sequence,
                payload,
                next: offset + size,
            }
        } else {
            Found::Damaged
        };
    }
    let Some(last) = last_written(rest) else {
        return Found::End;
    };
    // A good frame further on: this one was acknowledged, for it was durable before that one.
    let later = (ALIGNMENT..=last)
        .step_by(ALIGNMENT)
        .any(|at| whole(&rest[at..]).is_some_and(|(sequence, ..)| sequence > expected));
    if !later && is_torn(rest, offset, last + 1) {
        Found::Torn
    } else {
        Found::Damaged
    }
}

/// Where the last byte is that is not zero; mostly there is a lot of room after it.
fn last_written(bytes: &[u8]) -> Option<usize> {
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut end = bytes.len();
    while end > 0 {
        let from = end.saturating_sub(ZEROS.len());
        if bytes[from..end] != ZEROS[..end - from] {
            let inside = bytes[from..end].iter().rposition(|byte| *byte != 0);
            return inside.map(|at| from + at);
        }
        end = from;
    }
    None
}

/// Whether the bad frame at the beginning of `rest` never got to the disk whole: then a sector of
/// it, its head's end or its end is still zeros. Damage leaves no such hole. (etcd's `wal` judges
/// the same way.)
fn is_torn(rest: &[u8], offset: usize, written: usize) -> bool {
    let zero = |from: usize, to: usize| {
        rest.get(from.min(rest.len())..to.min(rest.len()))
            .is_none_or(|bytes| bytes.iter().all(|byte| *byte == 0))
    };
    let Some(head) = head(rest) else {
        return zero(HEADER - 1, HEADER) || has_hole(rest, offset, written, &zero);
    };
    let size = frame_bytes(head.length);
    written <= size && (zero(size - 1, size) || has_hole(rest, offset, size, &zero))
}

fn has_hole(rest: &[u8], offset: usize, size: usize, zero: &impl Fn(usize, usize) -> bool) -> bool {
    let mut from = 0;
    while from < size.min(rest.len()) {
        let to = ((offset + from) / SECTOR + 1) * SECTOR - offset;
        if zero(from, to.min(size)) {
            return true;
        }
        from = to;
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(payloads: &[&[u8]], room: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (sequence, payload) in payloads.iter().enumerate() {
            bytes.extend_from_slice(&write(sequence as u64 + 1, payload));
        }
        bytes.resize(bytes.len() + room, 0);
        bytes
    }

    fn second(bytes: &[u8]) -> Found<'_> {
        let Found::Frame { next, .. } = read(bytes, 0, 1) else {
            panic!("the first frame is whole");
        };
        read(bytes, next, 2)
    }

    #[test]
    fn a_frame_is_these_bytes() {
        assert_eq!(
            hex::encode(write(7, b"krake")),
            "0500000066b8b3e90700000000000000fa5f321b4b524b466b72616b650000004b524b4652414d45"
        );
    }

    #[test]
    fn a_write_that_stopped_at_any_byte_is_torn() {
        let payload: Vec<u8> = (0..1500_u32).map(|i| (i % 251 + 1) as u8).collect();
        let whole = file(&[b"first", &payload], 4096);
        let start = frame_bytes(5);
        let size = frame_bytes(payload.len());
        assert_eq!(second(&file(&[b"first"], 4096)), Found::End);
        for cut in start + 1..start + size {
            let mut bytes = whole.clone();
            bytes[cut..].fill(0);
            assert_eq!(second(&bytes), Found::Torn, "stopped at {cut}");
            // The same without room written beforehand.
            bytes.truncate(cut);
            assert_eq!(second(&bytes), Found::Torn, "shortened to {cut}");
        }
    }

    #[test]
    fn a_sector_that_was_not_written_is_torn() {
        let payload = vec![7; 3000];
        let start = frame_bytes(5);
        let size = frame_bytes(payload.len());
        for sector in start / SECTOR..=(start + size - 1) / SECTOR {
            let mut bytes = file(&[b"first", &payload], 4096);
            let from = (sector * SECTOR).max(start);
            let to = ((sector + 1) * SECTOR).min(start + size);
            bytes[from..to].fill(0);
            assert_eq!(second(&bytes), Found::Torn, "sector {sector} is missing");
        }
    }

    #[test]
    fn a_bad_frame_before_a_good_one_is_damage() {
        let payload = vec![7; 3000];
        let start = frame_bytes(5);
        let mut bytes = file(&[b"first", &payload, b"third"], 4096);
        bytes[start + 512..start + 2048].fill(0);
        assert_eq!(second(&bytes), Found::Damaged);
    }

    #[test]
    fn a_frame_of_another_place_is_damage() {
        let bytes = file(&[b"first", b"second"], 64);
        assert_eq!(read(&bytes, 0, 2), Found::Damaged);
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_never_read_and_never_cut(
            payload in prop::collection::vec(1_u8.., 1..2000), at in 0_usize..10_000, bit in 0_u8..8
        ) {
            let mut bytes = file(&[b"first", &payload], 4096);
            let start = frame_bytes(5);
            let at = start + at % frame_bytes(payload.len());
            bytes[at] ^= 1 << bit;
            prop_assert_eq!(second(&bytes), Found::Damaged);
        }

        #[test]
        fn no_bytes_make_reading_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _unused = read(&bytes, 0, 1);
        }
    }
}
