//! `krake-testnet logs`.

use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

use anyhow::Context;
use krake_testnet::state::{Directory, unknown};

use super::arguments::LogsArguments;
use super::output::pass_on;

/// How often a followed log is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Where the last `lines` lines begin.
fn start_of_last(text: &[u8], lines: usize) -> usize {
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    if lines == 0 {
        return text.len();
    }
    let breaks = body
        .iter()
        .enumerate()
        .rev()
        .filter(|(_, byte)| **byte == b'\n');
    breaks
        .map(|(index, _)| index + 1)
        .nth(lines - 1)
        .unwrap_or(0)
}

/// Shows a log, and what is added to it until Ctrl-C.
pub async fn logs(directory: &Directory, options: &LogsArguments) -> anyhow::Result<()> {
    let state = directory.require()?;
    let site = state.site(&options.site)?;
    let known = krake_testnet::logs(directory, site);
    let Some(path) = known.get(&options.component) else {
        let names: Vec<&str> = known.keys().map(String::as_str).collect();
        return Err(unknown("log", &options.component, &names));
    };
    let failed = || format!("cannot read the log {}", path.display());
    let mut file = std::fs::File::open(path).with_context(failed)?;
    let mut text = Vec::new();
    file.read_to_end(&mut text).with_context(failed)?;
    if !pass_on(&text[start_of_last(&text, options.lines)..]) || !options.follow {
        return Ok(());
    }
    let mut position = text.len() as u64;
    loop {
        tokio::select! {
            interrupted = tokio::signal::ctrl_c() => return Ok(interrupted?),
            () = tokio::time::sleep(LOOK) => {}
        }
        if file.metadata()?.len() < position {
            position = 0;
        }
        file.seek(SeekFrom::Start(position))?;
        text.clear();
        file.read_to_end(&mut text).with_context(failed)?;
        position += text.len() as u64;
        if !text.is_empty() && !pass_on(&text) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_found() {
        let text = b"a\nbb\nc\n";
        assert_eq!(&text[start_of_last(text, 2)..], b"bb\nc\n");
        assert_eq!(start_of_last(text, 9), 0);
        assert_eq!(start_of_last(text, 0), text.len());
        assert_eq!(start_of_last(b"a\nb", 1), 2);
    }
}
