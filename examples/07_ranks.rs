//! Sharded training. Every rank holds some rows, all ranks save one checkpoint, and the job can resume with
//! any number of ranks. Start it without a launcher, with `mpirun -n 4 PROGRAM ROOT`, or with
//! `torchrun --no-python --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint localhost:0 PROGRAM ROOT`.

use ashore::ranks::{Member, SharedDirectory, launcher};
use ashore::{Catalog, CheckpointExecutor, HostTensor, StateDict};
use std::{sync::Arc, time::Duration};

const ROWS: usize = 1000;
const COLUMNS: usize = 100;
const MINUTE: Duration = Duration::from_secs(60);

fn main() -> ashore::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let root = arguments.get(1).map_or("ashore-example-ranks", String::as_str);
    let steps: u64 = arguments.get(2).and_then(|steps| steps.parse().ok()).unwrap_or(10);
    let launched = launcher::detect()?;
    let Member { rank, world, .. } = launched.unwrap_or(Member { rank: 0, world: 1, local_rank: 0 });
    let builder = CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20).keep_last(2).save_timeout(MINUTE / 3);
    // The run token comes from the launcher. `.run(...)` would set another token.
    let executor = match launched {
        Some(member) => builder.ranks(Arc::new(SharedDirectory::new(root, member)?)).build()?,
        None => builder.alone().build()?,
    };

    // Each rank reads only the bytes of its own rows, however many ranks saved them.
    let mine = ROWS * rank as usize / world as usize..ROWS * (rank as usize + 1) / world as usize;
    let newest = executor.latest()?;
    let mut step = newest.as_ref().map_or(0, |newest| newest.step());
    let mut weights = Arc::new(match &newest {
        Some(newest) => newest.read_slice_as::<f64>("weights", &[mine.clone(), 0..COLUMNS])?,
        None => vec![1.0; mine.len() * COLUMNS],
    });
    while step < steps {
        executor.fence()?; // the last save does not read the weights any more
        step += 1;
        let now = Arc::get_mut(&mut weights).expect("the only reference again");
        for (row, values) in mine.clone().zip(now.chunks_mut(COLUMNS)) {
            values.iter_mut().for_each(|weight| *weight = *weight * 0.99 + (step * 31 + row as u64) as f64);
        }
        let rows = HostTensor::new(weights.clone(), [mine.len(), COLUMNS]);
        let mut state = StateDict::new();
        state.tensor_box("weights", [ROWS, COLUMNS], [mine.start, 0], rows)?;
        state.value("step", &step)?.rank_value("samples", &(step * mine.len() as u64))?;
        executor.save(step, state)?.wait(MINUTE)?; // durable on all ranks, or an error on all
    }
    executor.shutdown(MINUTE)?;
    if rank == 0 {
        let newest = Catalog::open(root)?.latest()?.expect("steps were saved");
        let sum = newest.read_as::<f64>("weights")?.iter().fold(0_u64, |sum, w| sum.rotate_left(5) ^ w.to_bits());
        println!("step={} ranks={} sum={sum:016x}", newest.step(), newest.world());
    }
    Ok(())
}
