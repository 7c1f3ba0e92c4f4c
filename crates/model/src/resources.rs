//! Amounts of compute, in integers, and Kubernetes quantities.

use std::fmt;

use serde::{Deserialize, Serialize};
use thiserror::Error;

/// CPU in thousandths of a core, memory in bytes, pods as a count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// Thousandths of a core.
    pub cpu_millis: u64,
    /// Bytes.
    pub memory_bytes: u64,
    /// Number of pods.
    pub pods: u64,
}

impl Resources {
    /// Nothing.
    pub const ZERO: Self = Self {
        cpu_millis: 0,
        memory_bytes: 0,
        pods: 0,
    };

    /// Whether `self` fits into `free` in every dimension.
    pub const fn fits(&self, free: &Self) -> bool {
        self.cpu_millis <= free.cpu_millis
            && self.memory_bytes <= free.memory_bytes
            && self.pods <= free.pods
    }

    /// The sum, at most `u64::MAX` in each dimension.
    #[must_use]
    pub const fn saturating_add(&self, other: &Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.saturating_add(other.cpu_millis),
            memory_bytes: self.memory_bytes.saturating_add(other.memory_bytes),
            pods: self.pods.saturating_add(other.pods),
        }
    }

    /// What is left of `self` after `other`, at least zero in each dimension.
    #[must_use]
    pub const fn saturating_sub(&self, other: &Self) -> Self {
        Self {
            cpu_millis: self.cpu_millis.saturating_sub(other.cpu_millis),
            memory_bytes: self.memory_bytes.saturating_sub(other.memory_bytes),
            pods: self.pods.saturating_sub(other.pods),
        }
    }

    /// `self`, `count` times.
    #[must_use]
    pub const fn times(&self, count: u64) -> Self {
        Self {
            cpu_millis: self.cpu_millis.saturating_mul(count),
            memory_bytes: self.memory_bytes.saturating_mul(count),
            pods: self.pods.saturating_mul(count),
        }
    }
}

impl fmt::Display for Resources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} cpu, {} MiB, {} pods",
            self.cpu_millis as f64 / 1000.0,
            self.memory_bytes / (1024 * 1024),
            self.pods
        )
    }
}

/// A Kubernetes quantity could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "`{text}` is not a quantity: expected a number with an optional suffix, such as 500m, 2, 1.5Gi"
)]
pub struct ParseQuantityError {
    text: String,
}

/// Reads a Kubernetes quantity (`500m`, `2`, `1.5Gi`, `1e3`, `128974848`) in thousandths, rounded
/// up. Source: k8s.io/apimachinery `resource.Quantity` grammar.
///
/// # Errors
/// When the text is no quantity, is negative, or exceeds 2^63 thousandths.
pub fn parse_quantity_millis(text: &str) -> Result<u64, ParseQuantityError> {
    let error = || ParseQuantityError {
        text: text.chars().take(80).collect(),
    };
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.' && c != '+' && c != '-')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let number = number.strip_prefix('+').unwrap_or(number);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let all_digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !all_digits(whole) || !all_digits(fraction) {
        return Err(error());
    }
    if whole.len() > 20 || fraction.len() > 12 {
        return Err(error());
    }
    let (multiplier, divisor) = suffix_factor(suffix).ok_or_else(error)?;
    let scale = 10_u128.pow(fraction.len() as u32);
    let whole: u128 = if whole.is_empty() {
        0
    } else {
        whole.parse().map_err(|_| error())?
    };
    let fraction: u128 = if fraction.is_empty() {
        0
    } else {
        fraction.parse().map_err(|_| error())?
    };
    let numerator = whole
        .checked_mul(scale)
        .and_then(|n| n.checked_add(fraction))
        .and_then(|n| n.checked_mul(multiplier))
        .and_then(|n| n.checked_mul(1000))
        .ok_or_else(error)?;
    let millis = numerator.div_ceil(scale * divisor);
    u64::try_from(millis)
        .ok()
        .filter(|&m| m <= i64::MAX as u64)
        .ok_or_else(error)
}

/// Reads a Kubernetes quantity in whole units (bytes, pods), rounded up.
///
/// # Errors
/// As [`parse_quantity_millis`].
pub fn parse_quantity(text: &str) -> Result<u64, ParseQuantityError> {
    // Bytes beyond 2^53 thousandths still fit: the limit is 2^63 / 1000 units (8 PiB).
    parse_quantity_millis(text).map(|millis| millis.div_ceil(1000))
}

fn suffix_factor(suffix: &str) -> Option<(u128, u128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let exponent: i32 = exponent.parse().ok()?;
            let power = 10_u128.checked_pow(exponent.unsigned_abs().min(18))?;
            if exponent.unsigned_abs() > 18 {
                return None;
            }
            if exponent < 0 { (1, power) } else { (power, 1) }
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_does() {
        for (text, millis) in [
            ("500m", 500),
            ("2", 2000),
            ("0.1", 100),
            (".5", 500),
            ("1.5Gi", 1_610_612_736_000),
            ("1e3", 1_000_000),
            ("100u", 1),
            ("2k", 2_000_000),
        ] {
            assert_eq!(parse_quantity_millis(text), Ok(millis), "{text}");
        }
        for text in [
            "",
            "abc",
            "1.2.3",
            "-1",
            "1Qi",
            "1e99",
            "99999999999999999999E",
            "1 Gi",
        ] {
            assert!(parse_quantity_millis(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_parsing_panic(text in ".{0,40}") {
            let _unused = parse_quantity_millis(&text);
        }
    }
}
