//! Coming from Datarax: its handler saves a pipeline with a PRNG key and a name, and restores it by step.

use ashore::compat::datarax::{Checkpointable, OrbaxCheckpointHandler, PrngKey, SaveArgs, State};

#[derive(Clone, Debug, PartialEq)]
struct Pipeline {
    name: String,
    position: u64,
    weights: Vec<f32>,
    rng: PrngKey,
}

impl Pipeline {
    fn new() -> Self {
        Self { name: "images".into(), position: 0, weights: vec![0.0; 1000], rng: PrngKey::threefry2x32(42) }
    }

    fn batch(&mut self) {
        self.position += 32;
        self.weights.iter_mut().for_each(|w| *w += 0.5);
        self.rng.data[1] = self.rng.data[1].wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    }
}

impl Checkpointable for Pipeline {
    fn get_state(&self) -> ashore::Result<State> {
        let mut state = State::new();
        state.array("weights", self.weights.clone(), [10, 100])?.key("rng", self.rng.clone())?;
        state.value("name", &self.name)?.value("position", &self.position)?;
        Ok(state)
    }

    fn set_state(&mut self, state: State) -> ashore::Result<()> {
        let (weights, rng) = (state.get_elements("weights")?, state.get_key("rng")?.clone());
        *self = Self { name: state.get_value("name")?, position: state.get_value("position")?, weights, rng };
        Ok(())
    }
}

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?;
    let handler = OrbaxCheckpointHandler::new().asynchronous();
    let (mut pipeline, mut replayed, mut restored) = (Pipeline::new(), Pipeline::new(), Pipeline::new());
    for step in 1..=300 {
        pipeline.batch();
        if step % 100 == 0 {
            let args = SaveArgs::step(step).keep(2).metadata("epoch", &(step / 100))?;
            handler.save(directory.path(), &pipeline, args)?;
        }
    }
    assert_eq!(handler.get_checkpoint_steps(directory.path())?, [200, 300]);
    assert_eq!(handler.restore_metadata(directory.path(), None)?.get::<u64>("epoch")?, 3);
    handler.restore_into(directory.path(), Some(200), &mut restored)?;
    (0..200).for_each(|_| replayed.batch());
    assert_eq!(restored, replayed);
    (200..300).for_each(|_| restored.batch());
    assert_eq!(restored, pipeline, "it goes on as if it had not been stopped");
    assert!(handler.restore(directory.path(), Some(100)).is_err(), "a step that is gone is an error, not another step");
    Ok(handler.close()?)
}
