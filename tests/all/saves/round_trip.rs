//! A saved state dict is restored bit for bit.

use ashore::storage::Memory;
use ashore::storage::Storage;
use ashore::{Checkpoint, CheckpointExecutor, HostTensor, StateDict, id::step_name};
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

#[test]
fn what_is_saved_comes_back_bit_for_bit() {
    let storage: Arc<dyn Storage> = Arc::new(Memory::new());
    let executor =
        CheckpointExecutor::builder("unused").storage(storage.clone()).arena(4 * 4096).chunk(4096).build().unwrap();
    let big: Arc<Vec<u32>> = Arc::new((0..100_000_u32).map(|i| i.wrapping_mul(2_654_435_761)).collect());
    let odd = Arc::new(vec![1_u8, 2, 3, 4, 5, 6, 7]);
    let mut state = StateDict::new();
    state.tensor("big", HostTensor::new(big.clone(), [100, 1000])).unwrap();
    state.tensor("odd", odd.clone()).unwrap();
    state.tensor("none", Arc::new(Vec::<f32>::new())).unwrap();
    state.value("step", &7).unwrap();
    let save = executor.save(7, state).unwrap();
    executor.fence().unwrap();
    assert_eq!((Arc::strong_count(&big), Arc::strong_count(&odd)), (1, 1));
    let committed = save.wait(LONG).unwrap().committed().unwrap();
    assert_eq!((committed.step, committed.bytes), (7, 400_007));
    let checkpoint = Checkpoint::from_storage(storage, &step_name(7)).unwrap();
    assert_eq!(checkpoint.read_as::<u32>("big").unwrap(), *big);
    assert_eq!(checkpoint.read("odd").unwrap(), *odd);
    assert_eq!(checkpoint.read("none").unwrap(), b"");
    assert_eq!(checkpoint.value::<u64>("step").unwrap(), 7);
    executor.shutdown(LONG).unwrap();
}
