//! Metric definitions: unit, range, direction, staleness (DESIGN §7.2, 13.13).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Which end of a metric's range is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Direction {
    /// Less is better: carbon, price, latency.
    LowerIsBetter,
    /// More is better: energy reuse.
    HigherIsBetter,
}

/// What a metric means and how its raw value becomes 0..1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MetricDefinition {
    /// The unit, for people.
    pub unit: String,
    /// The raw value that normalises to 0 of the range; values below are clamped.
    pub min: f64,
    /// The raw value at the other end; values above are clamped. Always above `min`.
    pub max: f64,
    /// Which end is good.
    pub direction: Direction,
}

impl MetricDefinition {
    /// The raw value as 0 (worst) ..= 1 (best), clamped to the range.
    pub fn normalize(&self, raw: f64) -> f64 {
        let share = ((raw - self.min) / (self.max - self.min)).clamp(0.0, 1.0);
        match self.direction {
            Direction::LowerIsBetter => 1.0 - share,
            Direction::HigherIsBetter => share,
        }
    }
}

/// The definitions every genesis starts with (DESIGN 13.13), by name.
pub fn default_definitions() -> BTreeMap<String, MetricDefinition> {
    use Direction::{HigherIsBetter, LowerIsBetter};
    [
        ("carbon", "g/kWh", 0.0, 1000.0, LowerIsBetter),
        ("price", "EUR/kWh", 0.0, 0.5, LowerIsBetter),
        ("pue", "ratio", 1.0, 2.5, LowerIsBetter),
        ("erf", "ratio", 0.0, 1.0, HigherIsBetter),
        ("load", "ratio", 0.0, 1.0, LowerIsBetter),
        ("latency", "ms", 0.0, 300.0, LowerIsBetter),
    ]
    .into_iter()
    .map(|(name, unit, min, max, direction)| {
        (
            name.to_owned(),
            MetricDefinition {
                unit: unit.to_owned(),
                min,
                max,
                direction,
            },
        )
    })
    .collect()
}

/// The weights an application gets when it sets none (DESIGN 13.13).
pub fn default_weights() -> BTreeMap<String, f64> {
    [("carbon", 0.5), ("price", 0.3), ("latency", 0.2)]
        .into_iter()
        .map(|(name, weight)| (name.to_owned(), weight))
        .collect()
}

/// The bonus of the site an application runs at, when it sets none (DESIGN 13.13).
pub const DEFAULT_STICKINESS: f64 = 0.1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_good_end_is_one() {
        let definitions = default_definitions();
        assert_eq!(definitions["carbon"].normalize(0.0), 1.0);
        assert_eq!(definitions["carbon"].normalize(5000.0), 0.0);
        assert_eq!(definitions["erf"].normalize(1.0), 1.0);
        assert_eq!(definitions["price"].normalize(0.25), 0.5);
    }
}
