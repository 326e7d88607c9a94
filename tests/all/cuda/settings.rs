//! A device applies the settings of an executor.

use super::program::{Gpu, rig_on};
use crate::fixtures::log::LogLines;

#[test]
fn cuda_chunks_that_hold_up_what_the_program_reads_are_warned_of() {
    for (chunk, warned) in [(16 << 20, false), ((16 << 20) + 4096, true)] {
        let heard = LogLines::default();
        let gpu = Gpu::take();
        let fixture = tracing::subscriber::with_default(heard.clone(), || {
            let fixture = rig_on(gpu, |b| b.chunk(chunk).arena(2 * chunk));
            // On the host there is no stream to hold up.
            crate::fixtures::executor::fixture(|b| b.chunk(chunk).arena(2 * chunk).device(ashore::DeviceChoice::Host));
            fixture
        });
        let lines = heard.0.lock().unwrap();
        let found: Vec<_> = lines.iter().filter(|line| line.contains("chunks are large")).collect();
        assert_eq!(found.len(), usize::from(warned), "{lines:?}");
        let name = &fixture.executor.device().name;
        let named =
            |line: &&&String| line.starts_with("WARN") && line.contains("chunk=16781312") && line.contains(name);
        assert_eq!(found.iter().filter(named).count(), found.len(), "{found:?}");
    }
}

#[test]
fn cuda_arena_says_on_which_node_it_is() {
    let fixture = rig_on(Gpu::take(), |b| b);
    let node = fixture.executor.arena().report().node.clone();
    assert!(node.as_ref().map_or_else(|why| !why.is_empty(), |&number| number < 1024), "{node:?}");
    if let Some(fake) = fixture.gpu.fake() {
        assert_eq!(fake.calls("cuDeviceGetPCIBusId"), 1);
    }
    assert!(crate::fixtures::executor::fixture(|b| b).executor.arena().report().node.is_err());
}
