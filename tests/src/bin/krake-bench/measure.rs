//! Figures of many measurements, and what processes spend.

use std::path::Path;

/// Clock ticks of a second in `/proc`, on every Linux.
const TICKS: f64 = 100.0;

/// The value below which this share of `sorted` is.
pub fn at(sorted: &[f64], share: f64) -> f64 {
    sorted[((sorted.len() - 1) as f64 * share).round() as usize]
}

/// The value in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    at(&values, 0.5)
}

/// `p50 / p95 / p99 / max`.
pub fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let [middle, high, higher, most] = [0.5, 0.95, 0.99, 1.0].map(|share| at(&values, share));
    format!("{middle:.1} / {high:.1} / {higher:.1} / {most:.1}")
}

/// The program of a process, by its directory in `/proc`, and the processor seconds it spent so
/// far (`proc(5)`); `None` when it has ended.
pub fn process(directory: &Path) -> Option<(String, f64)> {
    let stat = std::fs::read_to_string(directory.join("stat")).ok()?;
    // A name may hold anything, parentheses too.
    let (start, rest) = stat.rsplit_once(')')?;
    let (_, name) = start.split_once('(')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some((name.to_owned(), (ticks(11)? + ticks(12)?) / TICKS))
}

/// Processor seconds of these processes so far.
pub fn processor(pids: &[u32]) -> f64 {
    let spent = |pid: &u32| {
        let found = process(Path::new(&format!("/proc/{pid}")));
        found.unwrap_or_else(|| panic!("process {pid} has ended")).1
    };
    pids.iter().map(spent).sum()
}

/// MiB of memory that a process has.
pub fn resident(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().split_whitespace().next().unwrap();
    kib.parse::<f64>().unwrap() / 1024.0
}

/// The value of a metric without labels in the text that Prometheus reads.
pub fn metric(text: &str, name: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().trim().parse().unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_of_all_values_in_any_order() {
        let values: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(median(values.clone()), 50.0);
        assert_eq!(spread(values), "50.0 / 95.0 / 99.0 / 100.0");
        assert_eq!(metric("a 1\nsyncs_total 7\n", "syncs_total"), 7.0);
    }

    #[test]
    fn a_process_is_known_by_its_program_and_what_it_spends() {
        let (name, before) = process(Path::new("/proc/self")).unwrap();
        assert!(name.starts_with("krake"), "{name}");
        while processor(&[std::process::id()]) <= before {
            std::hint::black_box(0);
        }
        assert!(process(Path::new("/proc/none")).is_none());
    }
}
