//! Simulates the catalog under faults: one seed, one run. See [`krake_consensus::simulation`].
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the program's output"
)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use krake_consensus::simulation::{Bug, Report, Scenario, run};

/// A fifth of a simulation's time is spent in the system's allocator.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Exit code when a run went wrong, as for a failed test.
const RED: u8 = 1;
const DAY_MS: u64 = 24 * 60 * 60 * 1000;

/// Simulates the catalog under faults, one seed a run, on all cores.
///
/// A run that goes wrong is printed with the command that repeats it bit for bit. Exit codes: 0 all
/// runs were fine, 1 one went wrong (or a planted mistake was not found), 2 wrong usage.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// How many seeds to run.
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// The first seed.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Run this seed only, twice, and see that both runs are the same.
    #[arg(long, conflicts_with_all = ["seeds", "from"])]
    seed: Option<u64>,
    /// Threads; 0: one for each core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Members in the end.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=9))]
    nodes: u64,
    /// Groups.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    groups: u16,
    /// Simulated seconds with faults; 20 more without them follow.
    #[arg(long, default_value_t = 45, value_parser = clap::value_parser!(u64).range(5..=31_536_000))]
    faulty_seconds: u64,
    /// Simulated days: faults, none, rest, and again, until they are over. Whoever is lost by the
    /// end of a round leaves, and others join.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=3660))]
    days: Option<u64>,
    /// Simulated seconds of rest between two rounds, on the average.
    #[arg(long, default_value_t = 3_280, requires = "days", value_parser = clap::value_parser!(u64).range(0..=31_536_000))]
    rest_seconds: u64,
    /// Make this mistake, and end when a run finds it; `all`: each in turn, with a table.
    #[arg(long, value_name = "NAME", value_parser = mistake)]
    bug: Option<Mistake>,
    /// Go on after a run went wrong.
    #[arg(long)]
    keep_going: bool,
}

#[derive(Debug, Clone, Copy)]
enum Mistake {
    All,
    One(Bug),
}

/// The mistake's name on the command line.
fn name(bug: Bug) -> String {
    let mut name = String::new();
    for letter in format!("{bug:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('-');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

fn mistake(text: &str) -> Result<Mistake, String> {
    if text == "all" {
        return Ok(Mistake::All);
    }
    let found = Bug::ALL.into_iter().find(|bug| name(*bug) == text);
    found.map(Mistake::One).ok_or_else(|| {
        let names: Vec<String> = Bug::ALL.into_iter().map(name).collect();
        format!("there are all, {}", names.join(", "))
    })
}

/// What many runs came to.
#[derive(Debug, Default)]
struct Total {
    runs: u64,
    answered: usize,
    unknown: usize,
    faults: usize,
    slept: u64,
    closed: usize,
    pieces: u64,
    rounds: u64,
    members: u64,
    gone: u64,
    simulated_ms: u64,
    red: Vec<Report>,
}

impl Total {
    fn add(&mut self, report: Report) {
        self.runs += 1;
        self.answered += report.answered;
        self.unknown += report.unknown;
        self.faults += report.faults;
        self.slept += report.slept;
        self.closed += report.closed;
        self.pieces += report.pieces;
        self.rounds += report.rounds;
        self.members += report.members;
        self.gone += report.gone;
        self.simulated_ms += report.simulated_ms;
        if report.violation.is_some() {
            self.red.push(report);
        }
    }
}

fn all(arguments: &Arguments, scenario: &Scenario, threads: usize, stop_at_first: bool) -> Total {
    let next = AtomicU64::new(arguments.from);
    let end = arguments.from.saturating_add(arguments.seeds);
    let stop = AtomicBool::new(false);
    let bar = ProgressBar::new(arguments.seeds);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} seeds, {eta} left {msg}")
    {
        bar.set_style(style);
    }
    let work = || {
        let mut reports = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= end {
                break;
            }
            let report = run(seed, scenario);
            if report.violation.is_some() && stop_at_first {
                stop.store(true, Ordering::Relaxed);
            }
            reports.push(report);
            bar.inc(1);
        }
        reports
    };
    let mut sum = Total::default();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            // A run catches its own panics.
            let Ok(reports) = worker.join() else { continue };
            for report in reports {
                sum.add(report);
            }
        }
    });
    bar.finish_and_clear();
    sum.red.sort_by_key(|report| report.seed);
    sum
}

fn replay(arguments: &Arguments, scenario: &Scenario, seed: u64) -> String {
    let bug = scenario
        .bug
        .map(|bug| format!(" --bug {}", name(bug)))
        .unwrap_or_default();
    let long = arguments
        .days
        .map(|days| format!(" --days {days} --rest-seconds {}", arguments.rest_seconds))
        .unwrap_or_default();
    format!(
        "cargo run --release -p krake-sim -- --seed {seed} --nodes {} --groups {} --faulty-seconds {}{long}{bug}",
        arguments.nodes, arguments.groups, arguments.faulty_seconds
    )
}

fn say(total: &Total, took: Duration) {
    let simulated = total.simulated_ms as f64 / 1000.0;
    println!(
        "{} runs of {} rounds and {} members, of which {} gave their votes away and left, {} operations answered, {} without an answer, {} faults, groups fell silent {} times, stamps were closed {} times, {} pieces of snapshots; {:.1} h simulated in {:.1} s: {:.0} times real time",
        total.runs,
        total.rounds,
        total.members,
        total.gone,
        total.answered,
        total.unknown,
        total.faults,
        total.slept,
        total.closed,
        total.pieces,
        simulated / 3600.0,
        took.as_secs_f64(),
        simulated / took.as_secs_f64()
    );
}

/// Each planted mistake, and the first seed that finds it; `false`: one was not found.
fn hunt(arguments: &Arguments, scenario: &Scenario, bugs: &[Bug], threads: usize) -> bool {
    let mut found_all = true;
    for bug in bugs {
        let scenario = Scenario {
            bug: Some(*bug),
            ..scenario.clone()
        };
        let total = all(arguments, &scenario, threads, true);
        match total.red.first() {
            Some(report) => println!(
                "{:28} found after {} runs, seed {}: {}",
                name(*bug),
                total.runs,
                report.seed,
                report.violation.as_deref().unwrap_or_default()
            ),
            None => {
                found_all = false;
                println!("{:28} NOT found in {} runs", name(*bug), total.runs);
            }
        }
    }
    found_all
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    // A panic is a finding and told as one.
    std::panic::set_hook(Box::new(|_| {}));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if arguments.threads == 0 {
        cores
    } else {
        arguments.threads
    };
    let mut scenario = Scenario {
        nodes: arguments.nodes,
        groups: arguments.groups,
        faulty_ms: arguments.faulty_seconds * 1000,
        rest_ms: arguments.rest_seconds * 1000,
        long_ms: arguments.days.unwrap_or(0) * DAY_MS,
        ..Scenario::smoke()
    };
    let start = Instant::now();
    if let Some(seed) = arguments.seed {
        if let Some(Mistake::One(bug)) = arguments.bug {
            scenario.bug = Some(bug);
        }
        let report = run(seed, &scenario);
        let again = run(seed, &scenario);
        println!("{report:#?}");
        if report != again {
            eprintln!("error: the second run was another one: {again:#?}");
            return ExitCode::from(RED);
        }
        return match report.violation {
            None => ExitCode::SUCCESS,
            Some(_) => ExitCode::from(RED),
        };
    }
    if let Some(mistake) = arguments.bug {
        let bugs = match mistake {
            Mistake::All => Bug::ALL.to_vec(),
            Mistake::One(bug) => vec![bug],
        };
        return if hunt(&arguments, &scenario, &bugs, threads) {
            ExitCode::SUCCESS
        } else {
            ExitCode::from(RED)
        };
    }
    let total = all(&arguments, &scenario, threads, !arguments.keep_going);
    say(&total, start.elapsed());
    for report in &total.red {
        eprintln!(
            "error: seed {}: {}\n  again: {}",
            report.seed,
            report.violation.as_deref().unwrap_or_default(),
            replay(&arguments, &scenario, report.seed)
        );
    }
    if total.red.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(RED)
    }
}
