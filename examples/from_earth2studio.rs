//! Coming from earth2studio: a session with a forecast that stops after some steps and resumes from its last
//! flush with the same results.

use ashore::compat::earth2studio::{Checkpoint, Metadata, Mode, Tensor, checkpoint_state};
use std::path::Path;

#[derive(Clone, Debug, PartialEq)]
struct Forecast {
    lead_hours: u32,
    seed: u64,
    field: Tensor<f32>,
}
checkpoint_state!(Forecast { values: { lead_hours: u32, seed: u64 }, tensors: { field: f32 } });

impl Forecast {
    fn new() -> Self {
        Self { lead_hours: 0, seed: 42, field: Tensor::new(vec![1.0; 181 * 360], [181, 360]) }
    }

    fn advance(&mut self) {
        self.lead_hours += 6;
        self.seed = self.seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let drift = (self.seed >> 40) as f32 * 1e-8;
        self.field.make_mut().iter_mut().for_each(|cell| *cell = *cell * 0.99 + drift);
    }
}

/// Forecasts until `stop` hours. Flushes every second boundary while the next step computes.
fn forecast(path: &Path, stop: u32) -> ashore::Result<Forecast> {
    let checkpoint =
        Checkpoint::builder("demo").path(path).mode(Mode::Append).history_size(3).flush_interval(2).build()?;
    let session = checkpoint.enter()?;
    let forecast = session.bind(Forecast::new())?;
    let mut flushing = None;
    while forecast.update(|it| it.lead_hours) < stop {
        let lead = forecast.update(|it| {
            it.advance();
            it.lead_hours
        });
        if let Some(flush) = session.write_async(Metadata::new().set("lead_time", &lead)?)? {
            flushing = Some(flush);
        }
    }
    flushing.map_or(Ok(()), |flush| futures_executor::block_on(flush).map(drop))?;
    Ok(forecast.update(|it| it.clone()))
}

pub(crate) fn main() -> ashore::Result<()> {
    let (stopped, whole) = (tempfile::tempdir().expect("a place"), tempfile::tempdir().expect("a place"));
    forecast(stopped.path(), 42)?; // the last boundary was not flushed: the next run computes it again
    let rows = Checkpoint::builder("demo").path(stopped.path()).build()?;
    assert_eq!(rows.select(-1)?.lead_time::<u32>()?, Some(36));
    assert_eq!(forecast(stopped.path(), 96)?, forecast(whole.path(), 96)?);
    let oldest =
        Checkpoint::builder("demo").path(stopped.path()).mode(Mode::Append).history_size(3).build()?.select(0)?;
    assert_eq!(oldest.lead_time::<u32>()?, Some(72), "three rows are kept");
    Ok(())
}
