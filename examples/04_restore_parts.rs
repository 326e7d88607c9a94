//! Reads parts of a checkpoint without an executor: metadata, a slice, and some tensors into existing memory.

use ashore::{Catalog, CheckpointExecutor, HostTensor, StateDict, Targets};
use std::{sync::Arc, time::Duration};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let root = std::env::temp_dir().join(format!("ashore-example-{}", std::process::id()));
    let executor = CheckpointExecutor::builder(&root).arena(16 << 20).chunk(1 << 20).build()?;
    let table: Arc<Vec<i32>> = Arc::new((0..1_000_000).collect());
    let mut state = StateDict::new();
    state.tensor("model.table", HostTensor::new(table.clone(), [1000, 1000]))?;
    state.tensor("model.bias", Arc::new(vec![1.5_f32; 1000]))?;
    state.value("epoch", &3)?;
    executor.save(100, state)?.wait(Duration::from_secs(60))?;
    executor.shutdown(Duration::from_secs(60))?;

    let catalog = Catalog::open(&root)?;
    let checkpoint = catalog.latest()?.expect("saved above");
    println!("step {} of epoch {}", checkpoint.step(), checkpoint.value::<u64>("epoch")?);
    for tensor in checkpoint.tensors()? {
        println!("{} {} {:?}", tensor.name, tensor.dtype, tensor.shape);
    }
    let rows = checkpoint.read_slice("model.table", &[10..12, 0..3])?;
    assert_eq!(rows.len(), 2 * 3 * 4);

    let (mut table_again, mut bias) = (vec![0_i32; 1_000_000], vec![0.0_f32; 1000]);
    checkpoint.read_into(Targets::new().elements("model.table", &mut table_again).elements("model.bias", &mut bias))?;
    assert_eq!((&table_again, bias[0]), (&*table, 1.5));
    assert!(checkpoint.verify()?.damage.is_empty());
    println!("all bytes are what they were");
    std::fs::remove_dir_all(root)?;
    Ok(())
}
