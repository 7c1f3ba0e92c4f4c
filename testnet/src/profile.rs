//! What the sites of a testnet are like.
//!
//! The figures are rounded, of the right size for the place, and no measurements: carbon intensity
//! as in yearly averages of grid zones (Ember, Electricity Maps, 2023–2024), electricity prices as
//! for non-household users without refundable taxes (Eurostat, 2024), PUE and ERF (ISO/IEC 30134-2
//! and -6) as operators of such sites publish them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::kube::Capacity;

/// More sites than this do not fit on one machine.
pub const SITES_MAX: usize = 250;

/// One site.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Its name: a DNS label.
    pub name: String,
    /// City, for people.
    pub place: String,
    /// The organisation that runs it.
    pub operator: String,
    /// ISO 3166-1 alpha-2.
    pub country: String,
    /// Electricity grid zone.
    pub grid_zone: String,
    /// Degrees north.
    pub latitude: f64,
    /// Degrees east.
    pub longitude: f64,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Raw metric values by name: carbon, price, pue, erf.
    pub metrics: BTreeMap<String, f64>,
    /// What its cluster offers.
    pub capacity: Capacity,
}

/// A row of a table: name, place, operator, country, grid zone, degrees north and east,
/// carbon (g/kWh), price (EUR/kWh), PUE, ERF, cores.
type Row = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    f64,
    f64,
    f64,
    f64,
    f64,
    f64,
    u32,
);

/// The first five, with which a testnet tells its story: Stockholm has water power and sells its
/// heat, Warsaw burns coal, Dresden reuses the most heat on a mixed grid.
const FIRST: [Row; 5] = [
    (
        "dresden",
        "Dresden",
        "elbe-cloud",
        "DE",
        "DE",
        51.05,
        13.74,
        344.0,
        0.158,
        1.18,
        0.45,
        64,
    ),
    (
        "stockholm",
        "Stockholm",
        "malar-data",
        "SE",
        "SE-SE3",
        59.33,
        18.07,
        21.0,
        0.074,
        1.15,
        0.38,
        48,
    ),
    (
        "paris",
        "Paris",
        "seine-compute",
        "FR",
        "FR",
        48.86,
        2.35,
        42.0,
        0.118,
        1.27,
        0.12,
        96,
    ),
    (
        "lisbon",
        "Lisbon",
        "tejo-hosting",
        "PT",
        "PT",
        38.72,
        -9.14,
        112.0,
        0.102,
        1.30,
        0.00,
        32,
    ),
    (
        "warsaw",
        "Warsaw",
        "vistula-it",
        "PL",
        "PL",
        52.23,
        21.01,
        633.0,
        0.141,
        1.42,
        0.04,
        80,
    ),
];

/// Those after the first five.
const FURTHER: &[Row] = &[
    (
        "oslo",
        "Oslo",
        "fjord-data",
        "NO",
        "NO-NO1",
        59.91,
        10.75,
        28.0,
        0.066,
        1.13,
        0.30,
        48,
    ),
    (
        "zurich",
        "Zürich",
        "limmat-hosting",
        "CH",
        "CH",
        47.37,
        8.54,
        38.0,
        0.155,
        1.22,
        0.21,
        64,
    ),
    (
        "vienna",
        "Vienna",
        "danube-it",
        "AT",
        "AT",
        48.21,
        16.37,
        108.0,
        0.149,
        1.26,
        0.18,
        64,
    ),
    (
        "helsinki",
        "Helsinki",
        "suomi-cloud",
        "FI",
        "FI",
        60.17,
        24.94,
        58.0,
        0.071,
        1.17,
        0.52,
        64,
    ),
    (
        "dublin",
        "Dublin",
        "liffey-compute",
        "IE",
        "IE",
        53.35,
        -6.26,
        279.0,
        0.203,
        1.21,
        0.06,
        128,
    ),
    (
        "amsterdam",
        "Amsterdam",
        "amstel-colo",
        "NL",
        "NL",
        52.37,
        4.90,
        253.0,
        0.151,
        1.20,
        0.10,
        128,
    ),
    (
        "copenhagen",
        "Copenhagen",
        "sund-cloud",
        "DK",
        "DK-DK2",
        55.68,
        12.57,
        143.0,
        0.112,
        1.18,
        0.40,
        48,
    ),
    (
        "madrid",
        "Madrid",
        "manzanares-it",
        "ES",
        "ES",
        40.42,
        -3.70,
        134.0,
        0.098,
        1.34,
        0.00,
        64,
    ),
    (
        "milan",
        "Milan",
        "naviglio-data",
        "IT",
        "IT-NO",
        45.46,
        9.19,
        281.0,
        0.187,
        1.33,
        0.08,
        64,
    ),
    (
        "brussels",
        "Brussels",
        "senne-hosting",
        "BE",
        "BE",
        50.85,
        4.35,
        139.0,
        0.146,
        1.28,
        0.05,
        48,
    ),
    (
        "prague",
        "Prague",
        "vltava-compute",
        "CZ",
        "CZ",
        50.08,
        14.44,
        449.0,
        0.152,
        1.35,
        0.07,
        48,
    ),
    (
        "budapest",
        "Budapest",
        "duna-cloud",
        "HU",
        "HU",
        47.50,
        19.04,
        187.0,
        0.163,
        1.38,
        0.03,
        32,
    ),
    (
        "bucharest",
        "Bucharest",
        "dambovita-it",
        "RO",
        "RO",
        44.43,
        26.10,
        247.0,
        0.138,
        1.40,
        0.00,
        32,
    ),
    (
        "sofia",
        "Sofia",
        "vitosha-data",
        "BG",
        "BG",
        42.70,
        23.32,
        387.0,
        0.117,
        1.41,
        0.00,
        32,
    ),
    (
        "athens",
        "Athens",
        "attica-hosting",
        "GR",
        "GR",
        37.98,
        23.73,
        338.0,
        0.144,
        1.45,
        0.00,
        32,
    ),
    (
        "tallinn",
        "Tallinn",
        "balti-compute",
        "EE",
        "EE",
        59.44,
        24.75,
        418.0,
        0.121,
        1.22,
        0.15,
        24,
    ),
    (
        "riga",
        "Riga",
        "daugava-cloud",
        "LV",
        "LV",
        56.95,
        24.11,
        131.0,
        0.119,
        1.24,
        0.12,
        24,
    ),
    (
        "vilnius", "Vilnius", "neris-it", "LT", "LT", 54.69, 25.28, 156.0, 0.128, 1.25, 0.10, 24,
    ),
    (
        "ljubljana",
        "Ljubljana",
        "sava-data",
        "SI",
        "SI",
        46.06,
        14.51,
        203.0,
        0.139,
        1.31,
        0.09,
        24,
    ),
    (
        "zagreb",
        "Zagreb",
        "medvednica-it",
        "HR",
        "HR",
        45.81,
        15.98,
        192.0,
        0.136,
        1.34,
        0.04,
        24,
    ),
    (
        "bratislava",
        "Bratislava",
        "karpaty-cloud",
        "SK",
        "SK",
        48.15,
        17.11,
        97.0,
        0.161,
        1.33,
        0.06,
        24,
    ),
    (
        "luxembourg",
        "Luxembourg",
        "alzette-colo",
        "LU",
        "LU",
        49.61,
        6.13,
        134.0,
        0.127,
        1.25,
        0.11,
        32,
    ),
    (
        "reykjavik",
        "Reykjavik",
        "geysir-compute",
        "IS",
        "IS",
        64.15,
        -21.94,
        28.0,
        0.052,
        1.07,
        0.20,
        96,
    ),
    (
        "london",
        "London",
        "thames-cloud",
        "GB",
        "GB",
        51.51,
        -0.13,
        211.0,
        0.218,
        1.24,
        0.05,
        128,
    ),
    (
        "frankfurt",
        "Frankfurt",
        "main-colo",
        "DE",
        "DE",
        50.11,
        8.68,
        344.0,
        0.162,
        1.24,
        0.14,
        128,
    ),
    (
        "lulea",
        "Luleå",
        "norrbotten-data",
        "SE",
        "SE-SE1",
        65.58,
        22.15,
        14.0,
        0.041,
        1.08,
        0.16,
        96,
    ),
    (
        "marseille",
        "Marseille",
        "calanque-hosting",
        "FR",
        "FR",
        43.30,
        5.37,
        42.0,
        0.116,
        1.29,
        0.10,
        64,
    ),
    (
        "barcelona",
        "Barcelona",
        "besos-compute",
        "ES",
        "ES",
        41.39,
        2.17,
        134.0,
        0.099,
        1.31,
        0.08,
        48,
    ),
    (
        "hamburg",
        "Hamburg",
        "alster-it",
        "DE",
        "DE",
        53.55,
        9.99,
        344.0,
        0.157,
        1.21,
        0.33,
        64,
    ),
    (
        "gdansk",
        "Gdańsk",
        "motlawa-cloud",
        "PL",
        "PL",
        54.35,
        18.65,
        633.0,
        0.138,
        1.36,
        0.10,
        32,
    ),
    (
        "turin", "Turin", "po-data", "IT", "IT-NO", 45.07, 7.69, 281.0, 0.184, 1.31, 0.13, 32,
    ),
    (
        "porto",
        "Porto",
        "douro-hosting",
        "PT",
        "PT",
        41.16,
        -8.63,
        112.0,
        0.101,
        1.28,
        0.00,
        32,
    ),
    (
        "montreal",
        "Montréal",
        "laurentide-compute",
        "CA",
        "CA-QC",
        45.50,
        -73.57,
        31.0,
        0.049,
        1.16,
        0.14,
        96,
    ),
    (
        "ashburn",
        "Ashburn",
        "potomac-colo",
        "US",
        "US-MIDA-PJM",
        39.04,
        -77.49,
        385.0,
        0.078,
        1.25,
        0.00,
        256,
    ),
    (
        "portland",
        "Portland",
        "willamette-it",
        "US",
        "US-NW-BPAT",
        45.52,
        -122.68,
        122.0,
        0.073,
        1.17,
        0.02,
        96,
    ),
    (
        "dallas",
        "Dallas",
        "trinity-cloud",
        "US",
        "US-TEX-ERCO",
        32.78,
        -96.80,
        369.0,
        0.069,
        1.33,
        0.00,
        128,
    ),
    (
        "saopaulo",
        "São Paulo",
        "tiete-data",
        "BR",
        "BR-CS",
        -23.55,
        -46.63,
        97.0,
        0.112,
        1.48,
        0.00,
        64,
    ),
    (
        "singapore",
        "Singapore",
        "merlion-colo",
        "SG",
        "SG",
        1.35,
        103.82,
        471.0,
        0.184,
        1.46,
        0.00,
        96,
    ),
    (
        "tokyo",
        "Tokyo",
        "sumida-compute",
        "JP",
        "JP-TK",
        35.68,
        139.69,
        489.0,
        0.172,
        1.36,
        0.03,
        128,
    ),
    (
        "sydney",
        "Sydney",
        "harbour-hosting",
        "AU",
        "AU-NSW",
        -33.87,
        151.21,
        567.0,
        0.168,
        1.38,
        0.00,
        64,
    ),
];

fn profile(row: &Row) -> Profile {
    let (name, place, operator, country, zone, latitude, longitude, carbon, price, pue, erf, cores) =
        *row;
    Profile {
        name: name.to_owned(),
        place: place.to_owned(),
        operator: operator.to_owned(),
        country: country.to_owned(),
        grid_zone: zone.to_owned(),
        latitude,
        longitude,
        labels: BTreeMap::from([("location".to_owned(), country.to_owned())]),
        metrics: [
            ("carbon", carbon),
            ("price", price),
            ("pue", pue),
            ("erf", erf),
        ]
        .into_iter()
        .map(|(metric, value)| (metric.to_owned(), value))
        .collect(),
        capacity: Capacity {
            cpu: cores.to_string(),
            memory: format!("{}Gi", cores * 4),
            pods: u64::from(cores) * 10,
        },
    }
}

/// A value of a later site in the same city: another one, but always the same.
fn vary(value: f64, round: usize, step: f64, digits: i32) -> f64 {
    let scale = 10_f64.powi(digits);
    (value * (1.0 + step * round as f64) * scale).round() / scale
}

/// The first `count` sites, always the same ones. When the cities run out, they come again with a
/// number behind the name and other figures.
pub fn profiles(count: usize) -> Vec<Profile> {
    let rows: Vec<&Row> = FIRST.iter().chain(FURTHER).collect();
    (0..count)
        .map(|index| {
            let round = index / rows.len();
            let mut profile = profile(rows[index % rows.len()]);
            if round > 0 {
                let number = round + 1;
                profile.name = format!("{}-{number}", profile.name);
                profile.operator = format!("{}-{number}", profile.operator);
                for (metric, step, digits) in [("carbon", 0.03, 0), ("price", 0.05, 3)] {
                    if let Some(value) = profile.metrics.get_mut(metric) {
                        *value = vary(*value, round, step, digits);
                    }
                }
            }
            profile
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_five_are_the_story() {
        let profiles = profiles(5);
        let names: Vec<&str> = profiles.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["dresden", "stockholm", "paris", "lisbon", "warsaw"]);
        let lowest = profiles
            .iter()
            .min_by(|a, b| a.metrics["carbon"].total_cmp(&b.metrics["carbon"]))
            .unwrap();
        assert_eq!(lowest.name, "stockholm");
    }

    #[test]
    fn every_site_is_possible_and_has_a_name_of_its_own() {
        let all = profiles(SITES_MAX);
        let definitions = krake_model::metric::default_definitions();
        let mut names = std::collections::BTreeSet::new();
        for profile in &all {
            assert!(names.insert(&profile.name), "{} comes twice", profile.name);
            let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            assert!(profile.name.chars().all(label), "{}", profile.name);
            assert!(profile.latitude.abs() <= 90.0 && profile.longitude.abs() <= 180.0);
            assert_eq!(profile.country.len(), 2);
            assert!(profile.grid_zone.starts_with(&profile.country));
            for (name, value) in &profile.metrics {
                let definition = &definitions[name];
                assert!(
                    (definition.min..=definition.max).contains(value),
                    "{}: {name} = {value}",
                    profile.name
                );
            }
        }
        assert_eq!(all, profiles(SITES_MAX));
        assert_eq!(all[..5], profiles(5));
    }
}
