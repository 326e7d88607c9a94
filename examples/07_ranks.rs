//! Sharded training: every rank holds some rows, all of them save one checkpoint, and the job goes on with any
//! number of ranks.
//!
//! ```text
//! torchrun --no-python --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id run7 \
//!     target/debug/examples/07_ranks ROOT
//! mpirun -n 3 target/debug/examples/07_ranks ROOT
//! target/debug/examples/07_ranks ROOT          one process, without a launcher
//! ```

use ashore::ranks::{Member, SharedDirectory, launcher};
use ashore::{CheckpointExecutor, HostTensor, StateDict};
use std::{path::PathBuf, sync::Arc, time::Duration};

const ROWS: usize = 1000;
const COLUMNS: usize = 100;

/// The first row of a rank; the rows are split unevenly where they do not divide.
fn first_row(rank: u32, world: u32) -> usize {
    ROWS * rank as usize / world as usize
}

fn main() -> ashore::Result<()> {
    let root = std::env::args().nth(1).map_or_else(|| std::env::temp_dir().join("ashore-example-ranks"), PathBuf::from);
    let steps: u64 = std::env::args().nth(2).and_then(|steps| steps.parse().ok()).unwrap_or(10);
    let launched = launcher::detect()?;
    let member = launched.unwrap_or(Member { rank: 0, world: 1, local_rank: 0 });
    let builder = CheckpointExecutor::builder(&root).arena(4 << 20).chunk(1 << 20).keep_last(2);
    let builder = builder.save_timeout(Duration::from_secs(20));
    // The run token comes from the launcher; `.run(...)` gives another one.
    let executor = match launched {
        Some(member) => builder.ranks(Arc::new(SharedDirectory::new(&root, member)?)).build()?,
        None => builder.alone().build()?,
    };

    // Each rank reads the bytes of its own rows only, however many ranks saved them.
    let mine = first_row(member.rank, member.world)..first_row(member.rank + 1, member.world);
    let (mut step, mut weights) = match executor.latest()? {
        Some(newest) => (newest.step(), Arc::new(newest.read_slice_as::<f64>("weights", &[mine.clone(), 0..COLUMNS])?)),
        None => (0, Arc::new(vec![1.0_f64; mine.len() * COLUMNS])),
    };
    println!("rank {} of {} begins after step {step}", member.rank, member.world);

    while step < steps {
        executor.fence()?; // the last save does not read the weights any more
        step += 1;
        let weights_now = Arc::get_mut(&mut weights).expect("the only reference again");
        for (row, values) in mine.clone().zip(weights_now.chunks_mut(COLUMNS)) {
            values.iter_mut().for_each(|weight| *weight = *weight * 0.99 + (step * 31 + row as u64) as f64);
        }
        let mut state = StateDict::new();
        let rows = HostTensor::new(weights.clone(), [mine.len(), COLUMNS]);
        state.tensor_box("weights", [ROWS, COLUMNS], [mine.start, 0], rows)?;
        state.value("step", &step)?.rank_value("samples", &(step * mine.len() as u64))?;
        executor.save(step, state)?.wait(Duration::from_secs(60))?; // durable on all ranks, or an error on all
    }
    executor.shutdown(Duration::from_secs(60))?;

    if member.rank == 0 {
        let newest = ashore::Catalog::open(&root)?.latest()?.expect("steps were saved");
        let sum = newest.read_as::<f64>("weights")?.iter().fold(0_u64, |sum, w| sum.rotate_left(5) ^ w.to_bits());
        println!("step={} ranks={} sum={sum:016x}", newest.step(), newest.world());
        if std::env::args().len() == 1 {
            std::fs::remove_dir_all(root).ok();
        }
    }
    Ok(())
}
