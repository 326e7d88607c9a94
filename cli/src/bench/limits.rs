//! `ashore bench limits`: the limits of disk and memory, without this library.

use super::{Bench, Figures};
use crate::limit::{self, Direction, Memory};
use ashore::Result;
use serde_json::{Value, json};

pub fn run(bench: &Bench<'_>) -> Result<Figures> {
    let bytes = bench.state().bytes;
    let mut memory = Memory::ample();
    let write = limit::search(bench.dir, bytes, Direction::Write, &mut memory)?;
    let read = limit::search(bench.dir, bytes, Direction::Read, &mut memory)?;
    Ok(Figures(vec![
        ("workload", bench.args.workload.name().into()),
        ("bytes", bytes.into()),
        ("write_limit_bytes_per_second", write[0].bytes_per_second.into()),
        ("write_loop", limit::shown(&write[0].config).into()),
        ("read_limit_bytes_per_second", read[0].bytes_per_second.into()),
        ("read_loop", limit::shown(&read[0].config).into()),
        ("memory_copy_bytes_per_second", limit::copy(bytes).into()),
        ("write_loops", loops(&write)),
        ("read_loops", loops(&read)),
    ]))
}

fn loops(found: &[limit::Found]) -> Value {
    json!(found)
}
