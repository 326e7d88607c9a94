//! Compares trees that were found on disks with what the simulated file system predicts for a recorded run.

use crate::wrong;
use ashore::Result;
use ashore::storage::local::{Linux, Local};
use ashore::testing::simfs::{Replay, Tree};
use ashore::testing::{Record, Recorded};
use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;

/// What does not go through the recorded calls, and of which nothing is promised: the messages of ranks, the
/// run log, and a directory of ext4's own.
const WITHOUT: [&str; 3] = ["messages", ".runs", "lost+found"];

/// The storage of a job whose system calls are recorded, if the environment names the files of the record and
/// of the log of the disk.
pub fn recorded(root: &str) -> Result<Option<Arc<Local>>> {
    let Some((record, disk)) = std::env::var_os("ASHORE_RECORD").zip(std::env::var_os("ASHORE_RECORD_DISK")) else {
        return Ok(None);
    };
    let calls = Recorded::new(Arc::new(Linux), Path::new(&record), Path::new(&disk));
    let calls = calls.map_err(|e| wrong(&format!("cannot record the system calls: {e}")))?;
    Ok(Some(Arc::new(Local::with_sys(Arc::new(calls), root)?)))
}

/// Reads the position of a flush from each line, and answers whether the tree at `mount` is among the disks
/// that a power loss before it can leave. With `early`, an fsync counts before it has returned: some trees
/// must then be refused.
pub fn admits(record: &str, mount: &str, early: bool) -> Result<()> {
    let failed = |what: &'static str| move |e: std::io::Error| wrong(&format!("{what}: {e}"));
    let records = Record::read(Path::new(record)).map_err(failed("cannot read the record"))?;
    let replay = Replay::of(&records, Path::new(mount)).map_err(failed("the simulation refuses a recorded call"))?;
    println!("replayed calls={} operations={}", records.len(), replay.len());
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(failed("cannot read a position"))?;
        let flush = line.parse().map_err(|_| wrong("a position is a number"))?;
        let found = Tree::read(Path::new(mount), &WITHOUT).map_err(failed("cannot read the tree"))?;
        match replay.refuses(flush, &found, early) {
            None => println!("admitted"),
            Some(why) => println!("refused {}", why.replace('\n', " ")),
        }
    }
    Ok(())
}
