//! The one codec: every stored record and every wire message is `version byte + bincode`.
//!
//! bincode 2 in serde mode with `config::legacy()` (fixed-width integers, little endian) and a size
//! limit: the encoding is canonical, claims of huge lengths are refused before allocation, and
//! trailing bytes are an error. bincode cannot decode a `serde_json::Value`: resources travel as
//! JSON bytes inside these records (DESIGN 13.2). Types coded here must not be recursive, must not
//! use `skip_serializing_if`, `flatten` or untagged enums, and enums grow only at the end.

use std::cell::Cell;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// No frame or record is larger than this (16 MiB), apart from those of [`encode_large`].
pub const RECORD_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The state of a whole group in one record (80 MiB): on the disk and in backups, never in one
/// message.
pub const LARGE_RECORD_BYTES_MAX: usize = 80 * 1024 * 1024;
/// Of the buffer that records are encoded in, so much is kept for the next one by each thread.
const SCRATCH_BYTES_MAX: usize = 64 * 1024;

/// A record could not be encoded or decoded.
#[derive(Debug, Error)]
pub enum CodecError {
    /// There is not even a version byte.
    #[error("the record is empty")]
    Empty,
    /// The version is not one that this program reads.
    #[error("record version {found} is not supported (this program reads {supported})")]
    Version {
        /// The version found.
        found: u8,
        /// The version read.
        supported: u8,
    },
    /// The record is larger than allowed.
    #[error("the record has {found} bytes, the limit is {limit}")]
    TooLarge {
        /// Bytes found.
        found: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// Bytes remain after the record.
    #[error("{count} bytes follow the record")]
    Trailing {
        /// How many bytes remain.
        count: usize,
    },
    /// The payload is not what the version promises.
    #[error("the record is damaged")]
    Decode(#[source] bincode::error::DecodeError),
    /// The value cannot be encoded.
    #[error("the record cannot be encoded")]
    Encode(#[source] bincode::error::EncodeError),
}

const fn config<const LIMIT: usize>() -> impl bincode::config::Config {
    bincode::config::legacy().with_limit::<LIMIT>()
}

/// Encodes `value` behind the version byte.
///
/// # Errors
/// When the value cannot be encoded or exceeds [`RECORD_BYTES_MAX`].
pub fn encode<T: Serialize>(version: u8, value: &T) -> Result<Vec<u8>, CodecError> {
    encode_within::<RECORD_BYTES_MAX, T>(version, value)
}

/// As [`encode`], for a value of up to [`LARGE_RECORD_BYTES_MAX`]; to be read with
/// [`decode_large`]. The bytes are the same.
///
/// # Errors
/// When the value cannot be encoded or exceeds [`LARGE_RECORD_BYTES_MAX`].
pub fn encode_large<T: Serialize>(version: u8, value: &T) -> Result<Vec<u8>, CodecError> {
    let mut bytes = encode_within::<LARGE_RECORD_BYTES_MAX, T>(version, value)?;
    // It is kept for long, and may have grown to twice its size.
    bytes.shrink_to_fit();
    Ok(bytes)
}

fn encode_within<const LIMIT: usize, T: Serialize>(
    version: u8,
    value: &T,
) -> Result<Vec<u8>, CodecError> {
    thread_local! {
        static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    }
    // Grown once, where a buffer for each record would be grown, and copied, several times.
    let mut bytes = SCRATCH.take();
    bytes.clear();
    bytes.push(version);
    bincode::serde::encode_into_std_write(value, &mut bytes, config::<LIMIT>())
        .map_err(CodecError::Encode)?;
    if bytes.len() > LIMIT {
        return Err(CodecError::TooLarge {
            found: bytes.len() - 1,
            limit: LIMIT,
        });
    }
    if bytes.capacity() > SCRATCH_BYTES_MAX {
        // The next one may be as large, and grows from there.
        SCRATCH.set(Vec::with_capacity(SCRATCH_BYTES_MAX));
        return Ok(bytes);
    }
    let exact = bytes.as_slice().to_vec();
    SCRATCH.set(bytes);
    Ok(exact)
}

/// Decodes what [`encode`] made, requiring `version`, at most `limit` bytes and no remainder.
///
/// # Errors
/// See [`CodecError`]; no input makes it panic or allocate beyond the limit.
pub fn decode<T: DeserializeOwned>(
    version: u8,
    bytes: &[u8],
    limit: usize,
) -> Result<T, CodecError> {
    if bytes.len() > limit.min(RECORD_BYTES_MAX) {
        return Err(CodecError::TooLarge {
            found: bytes.len(),
            limit: limit.min(RECORD_BYTES_MAX),
        });
    }
    decode_within::<RECORD_BYTES_MAX, T>(version, bytes)
}

/// As [`decode`], for a type that borrows text and bytes from the record.
///
/// # Errors
/// As [`decode`].
pub fn decode_borrowed<'a, T: Deserialize<'a>>(
    version: u8,
    bytes: &'a [u8],
) -> Result<T, CodecError> {
    let payload = payload::<RECORD_BYTES_MAX>(version, bytes)?;
    let decoded = bincode::serde::borrow_decode_from_slice(payload, config::<RECORD_BYTES_MAX>());
    whole(payload, decoded)
}

/// As [`decode`], for what [`encode_large`] made: at most [`LARGE_RECORD_BYTES_MAX`].
///
/// # Errors
/// As [`decode`].
pub fn decode_large<T: DeserializeOwned>(version: u8, bytes: &[u8]) -> Result<T, CodecError> {
    decode_within::<LARGE_RECORD_BYTES_MAX, T>(version, bytes)
}

fn decode_within<const LIMIT: usize, T: DeserializeOwned>(
    version: u8,
    bytes: &[u8],
) -> Result<T, CodecError> {
    let payload = payload::<LIMIT>(version, bytes)?;
    let decoded = bincode::serde::decode_from_slice(payload, config::<LIMIT>());
    whole(payload, decoded)
}

/// What stands behind the version.
const fn payload<const LIMIT: usize>(version: u8, bytes: &[u8]) -> Result<&[u8], CodecError> {
    if bytes.len() > LIMIT {
        return Err(CodecError::TooLarge {
            found: bytes.len(),
            limit: LIMIT,
        });
    }
    match bytes {
        [] => Err(CodecError::Empty),
        [found, payload @ ..] if *found == version => Ok(payload),
        [found, ..] => Err(CodecError::Version {
            found: *found,
            supported: version,
        }),
    }
}

fn whole<T>(
    payload: &[u8],
    decoded: Result<(T, usize), bincode::error::DecodeError>,
) -> Result<T, CodecError> {
    let (value, consumed) = decoded.map_err(CodecError::Decode)?;
    if consumed != payload.len() {
        return Err(CodecError::Trailing {
            count: payload.len() - consumed,
        });
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_encoding_is_fixed_for_ever() {
        let bytes = encode(1, &(7_u32, "ab".to_owned(), Some(true))).unwrap();
        assert_eq!(
            hex::encode(&bytes),
            "010700000002000000000000006162 0101".replace(' ', "")
        );
    }

    #[test]
    fn other_versions_trailing_bytes_and_huge_claims_are_refused() {
        let bytes = encode(2, &vec![1_u8, 2, 3]).unwrap();
        assert!(matches!(
            decode::<Vec<u8>>(1, &bytes, 100),
            Err(CodecError::Version {
                found: 2,
                supported: 1
            })
        ));
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(matches!(
            decode::<Vec<u8>>(2, &longer, 100),
            Err(CodecError::Trailing { count: 1 })
        ));
        let mut huge = vec![2];
        huge.extend_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(
            decode::<Vec<u8>>(2, &huge, 100),
            Err(CodecError::Decode(_))
        ));
        assert!(matches!(
            decode::<Vec<u8>>(2, &bytes, 4),
            Err(CodecError::TooLarge { .. })
        ));
    }

    #[test]
    fn a_large_record_has_the_same_bytes_and_its_own_limit() {
        let small = ("a".to_owned(), 7_u64);
        assert_eq!(encode_large(1, &small).unwrap(), encode(1, &small).unwrap());
        let large = "x".repeat(RECORD_BYTES_MAX + 1);
        assert!(encode(1, &large).is_err());
        let bytes = encode_large(1, &large).unwrap();
        assert!(matches!(
            decode::<String>(1, &bytes, usize::MAX),
            Err(CodecError::TooLarge { .. })
        ));
        assert_eq!(decode_large::<String>(1, &bytes).unwrap(), large);
        drop((large, bytes));
        assert!(encode_large(1, &"x".repeat(LARGE_RECORD_BYTES_MAX)).is_err());
        let beyond = vec![1; LARGE_RECORD_BYTES_MAX + 1];
        assert!(matches!(
            decode_large::<String>(1, &beyond),
            Err(CodecError::TooLarge { .. })
        ));
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _unused = decode::<(Vec<String>, Option<u64>, bool)>(1, &bytes, 300);
        }
    }
}
