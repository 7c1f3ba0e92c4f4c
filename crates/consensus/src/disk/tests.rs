//! Random rounds against a model, power cuts, damage, and bytes that stay.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;
use crate::medium::memory::MemoryDirectory;
use crate::wire::{Configuration, EntryKind};

const PATH: &str = "catalog";

fn owner() -> Owner {
    Owner {
        federation: krake_model::ids::FederationId::from_bytes([1; 32]),
        node: krake_model::ids::NodeId::from_bytes([2; 32]),
    }
}

/// What a group must have after a restart.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    hard_state: HardState,
    start: (u64, u64),
    entries: Vec<(u64, u64, Bytes)>,
    snapshot: Option<(u64, u64)>,
}

impl Model {
    fn of(log: &GroupLog) -> Self {
        Self {
            hard_state: log.hard_state,
            start: log.start(),
            entries: log
                .entries()
                .map(|entry| (entry.index, entry.term, entry.data.clone()))
                .collect(),
            snapshot: log
                .snapshot
                .as_ref()
                .map(|snapshot| (snapshot.index, snapshot.term)),
        }
    }

    fn last(&self) -> u64 {
        self.start.0 + self.entries.len() as u64
    }
}

type Models = BTreeMap<GroupId, Model>;

fn open(directory: &Arc<MemoryDirectory>) -> Result<(Disk, Models), DiskError> {
    let (disk, logs) = Disk::open_in(Box::new(Arc::clone(directory)), Path::new(PATH), owner())?;
    let models = logs
        .iter()
        .map(|(group, log)| (*group, Model::of(log)))
        .collect();
    Ok((disk, models))
}

fn fresh() -> Arc<MemoryDirectory> {
    let directory = Arc::new(MemoryDirectory::default());
    create_in(&directory, owner()).unwrap();
    directory
}

/// Changes one group as Raft does: appends, replaces a tail that is not committed, commits,
/// compacts behind a snapshot, or takes a leader's snapshot.
fn step(random: &mut StdRng, group: GroupId, model: &mut Model, size: usize) -> Write {
    let mut write = Write {
        change: Change {
            group,
            truncate_from: None,
            entries: Vec::new(),
            hard_state: model.hard_state,
            start: model.start,
        },
        snapshot: None,
    };
    let kind = random.random_range(0..10);
    if kind == 0 {
        // From a leader, often far ahead, else in place of entries that were not committed.
        let index = random.random_range(model.hard_state.commit + 1..model.last() + 50);
        let term = model.hard_state.term + 1;
        *model = Model {
            hard_state: HardState {
                term,
                vote: 0,
                commit: index,
            },
            start: (index, term),
            entries: Vec::new(),
            snapshot: Some((index, term)),
        };
        write.change.truncate_from = Some(0);
        write.snapshot = Some(snapshot(index, term));
    } else if kind == 1 && model.hard_state.commit > model.start.0 {
        let index = model.hard_state.commit;
        let position = (index - model.start.0 - 1) as usize;
        let term = model.entries[position].1;
        model.snapshot = Some((index, term));
        let kept = random.random_range(0..3_u64);
        let cut = index.saturating_sub(kept).max(model.start.0);
        while model.start.0 < cut {
            let (index, term, _) = model.entries.remove(0);
            model.start = (index, term);
        }
        write.snapshot = Some(snapshot(index, term));
    } else {
        if kind == 2 {
            model.hard_state.term += 1;
            model.hard_state.vote = random.random_range(0..4);
        }
        let first = random.random_range(model.hard_state.commit + 1..=model.last() + 1);
        if first <= model.last() {
            write.change.truncate_from = Some(first);
            model.entries.truncate((first - model.start.0 - 1) as usize);
            model.hard_state.term += 1;
            model.hard_state.vote = 0;
        }
        for index in first..first + random.random_range(0..4) {
            let data = vec![random.random(); random.random_range(0..size)];
            let data = Bytes::from(data);
            model
                .entries
                .push((index, model.hard_state.term, data.clone()));
            write
                .change
                .entries
                .push(entry(index, model.hard_state.term, data));
        }
        model.hard_state.commit = random.random_range(model.hard_state.commit..=model.last());
    }
    write.change.hard_state = model.hard_state;
    write.change.start = model.start;
    write
}

const fn entry(index: u64, term: u64, data: Bytes) -> Entry {
    Entry {
        kind: EntryKind::Normal,
        term,
        index,
        data,
        context: Bytes::new(),
    }
}

fn snapshot(index: u64, term: u64) -> Snapshot {
    Snapshot {
        index,
        term,
        configuration: Configuration::default(),
        data: Bytes::from_static(b"map"),
    }
}

fn round(random: &mut StdRng, models: &mut Models, size: usize) -> Vec<Write> {
    let mut writes = Vec::new();
    for number in 0..random.random_range(1..4_u32) {
        let group = GroupId::from_number(number * random.random_range(1..4));
        if writes
            .iter()
            .all(|write: &Write| write.change.group != group)
        {
            let model = models.entry(group).or_default();
            writes.push(step(random, group, model, size));
        }
    }
    writes
}

/// Writes a round, and goes on until its snapshots are in force.
fn write_and_store(disk: &mut Disk, writes: Vec<Write>) -> Result<(), DiskError> {
    disk.write(writes)?;
    while disk.is_storing() {
        disk.go_on_storing()?;
    }
    Ok(())
}

/// A part of what should be written again; returns how many entries.
fn write_some_again(
    random: &mut StdRng,
    disk: &mut Disk,
    models: &Models,
) -> Result<usize, DiskError> {
    let entries = models.values().flat_map(|model| &model.entries);
    let live = entries.map(|(_, _, data)| data.len()).sum();
    let Some((group, run)) = disk.to_rewrite(|| live).pop() else {
        return Ok(0);
    };
    let model = &models[&group];
    let wanted = model.entries.iter().filter(|one| run.contains(&one.0));
    let entries: Vec<Entry> = wanted
        .take(random.random_range(1..4))
        .map(|(index, term, data)| entry(*index, *term, data.clone()))
        .collect();
    let count = entries.len();
    let change = Change {
        group,
        truncate_from: None,
        entries,
        hard_state: model.hard_state,
        start: model.start,
    };
    disk.write(vec![Write {
        change,
        snapshot: None,
    }])?;
    Ok(count)
}

/// A group after a power cut in the middle of a round: as before, or as after, or with the
/// snapshot of the round and the log of before.
fn plausible(found: Option<&Model>, before: Option<&Model>, after: Option<&Model>) -> bool {
    if found == before || found == after {
        return true;
    }
    let (Some(found), Some(after)) = (found, after) else {
        return false;
    };
    let before = before.cloned().unwrap_or_default();
    let adopted = found.snapshot == after.snapshot && found.snapshot != before.snapshot;
    adopted
        && found.hard_state.commit >= before.hard_state.commit
        && found.hard_state.term >= before.hard_state.term
        && (found.entries == before.entries
            || (found.entries.is_empty() && Some(found.start) == found.snapshot))
}

#[test]
fn the_clock_is_kept_in_these_bytes_and_damage_to_it_is_an_error() {
    let directory = Arc::<MemoryDirectory>::default();
    create_in(&*directory, owner()).ok().unwrap();
    let open = || Disk::open_in(Box::new(Arc::clone(&directory)), Path::new(PATH), owner());
    let (mut disk, _) = open().unwrap();
    assert_eq!(disk.clock(), Revision::NONE);
    disk.keep_clock(Revision::from_number(0x1234)).unwrap();
    assert_eq!(open().unwrap().0.clock(), Revision::from_number(0x1234));
    let mut bytes = directory.read(CLOCK).unwrap();
    assert_eq!(
        hex::encode(&bytes),
        concat!(
            "0900000060fcd62a01000000000000008dd0b4004b524b46",
            "013412000000000000000000000000004b524b4652414d45"
        )
    );
    bytes[25] ^= 1;
    directory
        .create(CLOCK)
        .unwrap()
        .write_at(0, &bytes)
        .unwrap();
    let error = open().unwrap_err();
    assert!(
        error.to_string().starts_with("catalog/clock is damaged"),
        "{error}"
    );
}

#[test]
fn what_was_acknowledged_is_there_after_a_power_cut_at_any_moment() {
    let mut again = 0;
    for seed in 0..200 {
        let mut random = StdRng::seed_from_u64(seed);
        let directory = fresh();
        let (mut disk, mut models) = open(&directory).unwrap();
        for _ in 0..random.random_range(1..12) {
            disk.limit_segments(4096);
            // Every so often the power goes within the next few operations on files.
            directory.fail_after(random.random_range(0..80), seed);
            let mut cut = false;
            for _ in 0..random.random_range(1..40) {
                let mut before = models.clone();
                let writes = round(&mut random, &mut models, 3000);
                let written = write_and_store(&mut disk, writes).and_then(|()| {
                    before.clone_from(&models);
                    write_some_again(&mut random, &mut disk, &models)
                });
                if let Ok(entries) = written {
                    again += entries;
                    continue;
                }
                drop(disk);
                directory.power_cut();
                let found;
                (disk, found) =
                    open(&directory).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
                let groups: BTreeSet<_> = models.keys().chain(found.keys()).collect();
                for group in groups {
                    assert!(
                        plausible(found.get(group), before.get(group), models.get(group)),
                        "seed {seed}, group {group}: {:#?} is neither {:#?} nor {:#?}",
                        found.get(group),
                        before.get(group),
                        models.get(group)
                    );
                }
                models = found;
                cut = true;
                break;
            }
            if !cut {
                // A clean stop: nothing is missing, and nothing else is there.
                directory.never_fail();
                drop(disk);
                let found;
                (disk, found) = open(&directory).unwrap();
                assert_eq!(found, models, "seed {seed}");
            }
        }
    }
    assert!(again > 100, "only {again} entries were written again");
}

#[test]
fn what_a_snapshot_replaced_does_not_come_back_after_a_power_cut() {
    let group = GroupId::from_number(1);
    let entry = |index, term| entry(index, term, Bytes::from_static(b"data"));
    let write = |truncate_from, entries, commit, start| Write {
        change: Change {
            group,
            truncate_from,
            entries,
            hard_state: HardState {
                term: 6,
                vote: 0,
                commit,
            },
            start,
        },
        snapshot: None,
    };
    let mut adopted = 0;
    for operations in 0..40 {
        let directory = fresh();
        let (mut disk, _) = open(&directory).unwrap();
        let tail = (1..=25).map(|index| entry(index, 2)).collect();
        disk.write(vec![write(None, tail, 0, (0, 0))]).unwrap();
        directory.fail_after(operations, operations as u64);
        let mut replacing = write(Some(0), Vec::new(), 20, (20, 5));
        replacing.snapshot = Some(snapshot(20, 5));
        let written = disk.write(vec![replacing]);
        drop(disk);
        if written.is_ok() {
            break;
        }
        directory.power_cut();
        let (mut disk, found) = open(&directory).unwrap();
        if found[&group].start != (20, 5) {
            continue;
        }
        adopted += 1;
        disk.write(vec![write(None, vec![entry(21, 6)], 20, (20, 5))])
            .unwrap();
        drop(disk);
        let (_, found) = open(&directory).unwrap();
        let entries = &found[&group].entries;
        assert_eq!(
            entries.iter().map(|e| (e.0, e.1)).collect::<Vec<_>>(),
            [(21, 6)]
        );
    }
    assert!(
        adopted > 0,
        "no power cut was between the snapshot and the log"
    );
}

#[test]
fn a_log_whose_terms_fall_is_damaged() {
    let directory = fresh();
    let (mut disk, _) = open(&directory).unwrap();
    let entry = |index, term| entry(index, term, Bytes::from_static(b"d"));
    let change = |entries| Write {
        change: Change {
            group: GroupId::META,
            truncate_from: None,
            entries,
            hard_state: HardState {
                term: 3,
                vote: 0,
                commit: 0,
            },
            start: (0, 0),
        },
        snapshot: None,
    };
    disk.write(vec![change(vec![entry(1, 2), entry(2, 2), entry(3, 2)])])
        .unwrap();
    disk.write(vec![change(vec![entry(2, 3)])]).unwrap();
    let error = open(&directory).unwrap_err().to_string();
    assert!(
        error.contains("entry 3 is of term 2, the one before it of term 3"),
        "{error}"
    );
}

#[test]
fn old_segments_go_and_a_silent_group_does_not_hold_them() {
    let directory = fresh();
    let (mut disk, _) = open(&directory).unwrap();
    // The busy group's next snapshot is made before its last one is on the disk.
    directory.limit_slices(20);
    let silent = GroupId::from_number(9);
    let entry = |index, bytes| entry(index, 1, vec![3; bytes].into());
    let change = |group, entries, start: u64, commit| Write {
        change: Change {
            group,
            truncate_from: None,
            entries,
            hard_state: HardState {
                term: 1,
                vote: 1,
                commit,
            },
            start: (start, 1),
        },
        snapshot: (start > 0).then(|| snapshot(start, 1)),
    };
    let small = change(silent, vec![entry(1, 10)], 0, 1);
    disk.write(vec![small.clone()]).unwrap();
    let busy = GroupId::from_number(1);
    let (mut most, mut while_storing) = (0, false);
    for index in 1..200 {
        let write = change(busy, vec![entry(index, 1_000_000)], index - 1, index - 1);
        disk.write(vec![write]).unwrap();
        disk.go_on_storing().unwrap();
        for wanted in disk.to_rewrite(|| 1_000_010) {
            assert_eq!(wanted, (silent, 1..=1));
            disk.write(vec![small.clone()]).unwrap();
            while_storing |= disk.is_storing();
        }
        most = most.max(disk.wal.oldest().1);
    }
    assert!(most > SEGMENTS_MIN && most <= SEGMENTS_MIN + 2, "{most}");
    assert!(while_storing);
    let (_, found) = open(&directory).unwrap();
    assert_eq!(found[&silent].entries.len(), 1);
    assert_eq!(found[&busy].last(), 199);
}

#[test]
fn a_round_larger_than_a_record_is_written_in_pieces() {
    let directory = fresh();
    let (mut disk, mut models) = open(&directory).unwrap();
    let mut random = StdRng::seed_from_u64(5);
    let mut writes = Vec::new();
    for number in 0..3 {
        let group = GroupId::from_number(number);
        let model = models.entry(group).or_default();
        *model = Model {
            hard_state: HardState {
                term: 1,
                vote: 1,
                commit: 5,
            },
            start: (0, 0),
            entries: (1..=7)
                .map(|index| {
                    let size = random.random_range(500_000..6_000_000);
                    (index, 1, Bytes::from(vec![index as u8; size]))
                })
                .collect(),
            snapshot: None,
        };
        writes.push(Write {
            change: Change {
                group,
                truncate_from: None,
                entries: model
                    .entries
                    .iter()
                    .map(|(index, term, data)| entry(*index, *term, data.clone()))
                    .collect(),
                hard_state: model.hard_state,
                start: model.start,
            },
            snapshot: None,
        });
    }
    disk.write(writes).unwrap();
    assert_eq!(open(&directory).unwrap().1, models);
}

#[test]
fn a_flipped_bit_anywhere_is_an_error_that_names_the_file() {
    let directory = fresh();
    let (mut disk, mut models) = open(&directory).unwrap();
    let mut random = StdRng::seed_from_u64(2);
    for _ in 0..20 {
        let writes = round(&mut random, &mut models, 200);
        disk.write(writes).unwrap();
    }
    drop(disk);
    for name in directory.list().unwrap() {
        let original = directory.read(&name).unwrap();
        let written = original.iter().rposition(|byte| *byte != 0).unwrap();
        for at in (0..=written).step_by(7) {
            let mut bytes = original.clone();
            bytes[at] ^= 1 << random.random_range(0..8);
            directory.put(&name, bytes);
            match open(&directory) {
                Err(DiskError::Damaged { path, .. }) => {
                    assert!(path.ends_with(&name), "{} for {name}", path.display());
                }
                Ok(_) => panic!("{name} at {at}: it is not seen"),
                Err(error) => panic!("{name} at {at}: {error}"),
            }
        }
        directory.put(&name, original);
    }
}

fn name_of_last(names: &[String]) -> String {
    names
        .iter()
        .filter(|name| name.starts_with("segment"))
        .max()
        .unwrap()
        .clone()
}

#[test]
fn files_that_are_gone_or_of_others_are_errors() {
    let directory = fresh();
    let (mut disk, mut models) = open(&directory).unwrap();
    let mut random = StdRng::seed_from_u64(3);
    while disk.wal.oldest().1 < 4 {
        let writes = round(&mut random, &mut models, 3_000_000);
        disk.write(writes).unwrap();
    }
    drop(disk);
    let other = Owner {
        node: krake_model::ids::NodeId::from_bytes([3; 32]),
        ..owner()
    };
    let foreign = Disk::open_in(Box::new(Arc::clone(&directory)), Path::new(PATH), other);
    assert!(matches!(foreign, Err(DiskError::Foreign { .. })));
    let names = directory.list().unwrap();
    assert!(
        names
            .iter()
            .filter(|name| name.starts_with("segment"))
            .count()
            > 2
    );
    // That the last segment is gone cannot be seen.
    let last = name_of_last(&names);
    for name in names.into_iter().filter(|name| *name != last) {
        let bytes = directory.read(&name).unwrap();
        directory.remove(&name).unwrap();
        match open(&directory) {
            Err(DiskError::Damaged { .. }) => {}
            // A snapshot is not wanted when the log begins at the first entry.
            Ok((_, found)) => assert!(
                name.starts_with(SNAPSHOT_PREFIX)
                    && found
                        .values()
                        .all(|model| model.snapshot.is_some() || model.start.0 == 0),
                "{name} is gone and nobody noticed"
            ),
            Err(error) => panic!("{name}: {error}"),
        }
        directory.put(&name, bytes);
    }
    for name in directory.list().unwrap() {
        directory.remove(&name).unwrap();
    }
    assert!(matches!(open(&directory), Err(DiskError::Missing(_))));
}

#[test]
fn a_record_is_these_bytes_for_ever() {
    let change = Change {
        group: GroupId::from_number(3),
        truncate_from: Some(7),
        entries: vec![Entry {
            kind: EntryKind::ConfChange,
            term: 2,
            index: 7,
            data: Bytes::from_static(b"d"),
            context: Bytes::from_static(b"c"),
        }],
        hard_state: HardState {
            term: 2,
            vote: 1,
            commit: 6,
        },
        start: (5, 1),
    };
    assert_eq!(
        hex::encode(encode(&[change]).unwrap()),
        "010100000000000000030000000107000000000000000100000000000000010000000200000000000000\
         070000000000000001000000000000006401000000000000006302000000000000000100000000000000\
         060000000000000005000000000000000100000000000000"
    );
    let stored = codec::encode(
        SNAPSHOT_VERSION,
        &(GroupId::from_number(3), &snapshot(9, 2)),
    );
    assert_eq!(
        hex::encode(stored.unwrap()),
        "0103000000090000000000000002000000000000000000000000000000000000000000000003000000000000006d6170"
    );
}
