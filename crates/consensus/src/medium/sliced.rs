//! A file that is written as a whole, in one step or several.

use std::io;

use super::{Directory, Medium, Store, UNFINISHED};
use crate::planted::{self, Bug};

/// See [`Store`]: it works where it is.
pub(super) struct Sliced<D> {
    directory: D,
    file: Box<dyn Medium>,
    name: String,
    /// One behind the other they are the file.
    parts: [Vec<u8>; 3],
    /// Bytes that are on the disk.
    at: usize,
    /// Bytes that are written and synced at once.
    slice: usize,
    is_whole: bool,
}

impl<D: Directory> Sliced<D> {
    pub(super) fn begin(
        directory: D,
        name: &str,
        parts: [Vec<u8>; 3],
        slice: usize,
    ) -> io::Result<Self> {
        Ok(Self {
            file: directory.create(&format!("{name}{UNFINISHED}"))?,
            directory,
            name: name.to_owned(),
            parts,
            at: 0,
            slice,
            is_whole: false,
        })
    }

    /// Does all that is left.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        while !self.is_whole {
            self.is_whole = self.write(self.slice)?;
        }
        Ok(())
    }

    fn write(&mut self, bytes: usize) -> io::Result<bool> {
        let (mut begin, mut room) = (0, bytes);
        for part in &self.parts {
            let from = self.at.saturating_sub(begin).min(part.len());
            let slice = &part[from..from.saturating_add(room).min(part.len())];
            if !slice.is_empty() {
                self.file.write_at(self.at as u64, slice)?;
            }
            self.at += slice.len();
            room -= slice.len();
            begin += part.len();
        }
        if !planted::has(Bug::SnapshotNotSynced) {
            self.file.sync()?;
        }
        if self.at < begin {
            return Ok(false);
        }
        let unfinished = format!("{}{UNFINISHED}", self.name);
        self.directory.rename(&unfinished, &self.name)?;
        Ok(true)
    }
}

impl<D: Directory + 'static> Store for Sliced<D> {
    /// That all is done is told with the next step: whoever does it aside is not seen at once.
    fn go_on(&mut self) -> io::Result<bool> {
        if self.is_whole {
            return Ok(true);
        }
        self.is_whole = self.write(self.slice)?;
        Ok(false)
    }

    fn give_up(self: Box<Self>) {}
}
