//! What a device makes of the settings of an executor.

use super::program::{Gpu, rig_on};
use std::sync::{Arc, Mutex};
use tracing::span;

/// What is logged in this thread.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Heard {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        let mut line = event.metadata().level().to_string();
        event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
            line += &format!(" {field}={value:?}");
        });
        self.0.lock().unwrap().push(line);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

#[test]
fn cuda_chunks_that_hold_up_what_the_program_reads_are_warned_of() {
    for (chunk, warned) in [(16 << 20, false), ((16 << 20) + 4096, true)] {
        let heard = Heard::default();
        let gpu = Gpu::take();
        let rig = tracing::subscriber::with_default(heard.clone(), || {
            let rig = rig_on(gpu, |b| b.chunk(chunk).arena(2 * chunk));
            // The host has nothing that it could hold up.
            crate::rig::rig(|b| b.chunk(chunk).arena(2 * chunk).device(ashore::DeviceChoice::Host));
            rig
        });
        let lines = heard.0.lock().unwrap();
        let found: Vec<_> = lines.iter().filter(|line| line.contains("chunks are large")).collect();
        assert_eq!(found.len(), usize::from(warned), "{lines:?}");
        let name = &rig.executor.device().name;
        let named =
            |line: &&&String| line.starts_with("WARN") && line.contains("chunk=16781312") && line.contains(name);
        assert_eq!(found.iter().filter(named).count(), found.len(), "{found:?}");
    }
}

#[test]
fn cuda_arena_says_on_which_node_it_is() {
    let rig = rig_on(Gpu::take(), |b| b);
    let node = rig.executor.arena().report().node.clone();
    assert!(node.as_ref().map_or_else(|why| !why.is_empty(), |&number| number < 1024), "{node:?}");
    if let Some(fake) = rig.gpu.fake() {
        assert_eq!(fake.calls("cuDeviceGetPCIBusId"), 1);
    }
    assert!(crate::rig::rig(|b| b).executor.arena().report().node.is_err());
}
