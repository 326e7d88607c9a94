//! Metrics of saves, restores and retention, for the recorder that the program has installed (feature
//! `metrics`). `docs/observability.md` lists them.
//!
//! Handles are made when an executor is built, so the program must install its recorder before that. Ages are
//! given as times since 1970, so that they keep growing after the process has died. No step, path or tensor
//! is a label.

#[cfg(not(feature = "metrics"))]
pub(crate) use off::*;
#[cfg(feature = "metrics")]
pub(crate) use on::*;

#[cfg(not(feature = "metrics"))]
mod off {
    use crate::telemetry::{Sample, SaveLine};
    use std::time::Duration;

    /// Does nothing, because the feature is off.
    pub(crate) struct Meters;

    impl Meters {
        pub const WANTED: bool = false;

        pub fn new(_store: &'static str, _engine: &'static str) -> Self {
            Self
        }

        pub fn save(&self, _line: &SaveLine) {}

        pub fn sample(&self, _sample: &Sample) {}
    }

    pub(crate) fn restored(_bytes: u64, _took: Duration) {}
    pub(crate) fn damage_found() {}
    pub(crate) fn pruned(_steps: usize, _bytes: u64) {}
    pub(crate) fn retained(_steps: usize, _bytes: u64) {}
}

#[cfg(feature = "metrics")]
mod on {
    use crate::telemetry::{Ended, Sample, SaveLine, unix_micros};
    use metrics::{Counter, Gauge, Histogram, Unit, counter, gauge, histogram};
    use std::cell::RefCell;
    use std::time::{Duration, SystemTime};

    /// The names, units and descriptions of the counters.
    const COUNTERS: [(&str, Unit, &str); 9] = [
        ("ashore_saves_total", Unit::Count, "Saves that have ended, by outcome."),
        ("ashore_failures_total", Unit::Count, "Saves that failed, by the kind of the error."),
        ("ashore_retries_total", Unit::Count, "Operations that were tried again after a transient error."),
        ("ashore_staged_bytes_total", Unit::Bytes, "Bytes copied out of tensors."),
        ("ashore_written_bytes_total", Unit::Bytes, "Bytes written to the store."),
        ("ashore_restored_bytes_total", Unit::Bytes, "Bytes of tensors read from steps and checked."),
        ("ashore_pruned_steps_total", Unit::Count, "Steps that retention or a call deleted."),
        ("ashore_pruned_bytes_total", Unit::Bytes, "Bytes of the steps that were deleted."),
        ("ashore_verify_damage_total", Unit::Count, "Verifications of a step that found damage."),
    ];
    const HISTOGRAMS: [(&str, Unit, &str); 6] = [
        ("ashore_save_stall_seconds", Unit::Seconds, "How long training waited for a save, by what it waited for."),
        ("ashore_stage_duration_seconds", Unit::Seconds, "From the stager's begin until nothing read live tensors."),
        ("ashore_write_duration_seconds", Unit::Seconds, "From the first write of a save until its last byte."),
        ("ashore_commit_duration_seconds", Unit::Seconds, "From the last byte of a save until it was durable."),
        ("ashore_time_to_durable_seconds", Unit::Seconds, "From the call of save until the step was durable."),
        ("ashore_restore_duration_seconds", Unit::Seconds, "Reading tensors of a step, one call each."),
    ];
    const GAUGES: [(&str, Unit, &str); 9] = [
        ("ashore_arena_bytes", Unit::Bytes, "Size of the arena."),
        ("ashore_arena_used_bytes", Unit::Bytes, "The part of the arena that chunks hold."),
        ("ashore_queue_saves", Unit::Count, "Saves that have not ended."),
        ("ashore_last_durable_step", Unit::Count, "The step that became durable last."),
        ("ashore_last_durable_timestamp_seconds", Unit::Seconds, "When the last step became durable, since 1970."),
        (
            "ashore_oldest_undurable_timestamp_seconds",
            Unit::Seconds,
            "When the oldest save that has not ended was called, since 1970; 0 if there is none.",
        ),
        ("ashore_retained_steps", Unit::Count, "Steps in the root after the last round of tidying."),
        ("ashore_retained_bytes", Unit::Bytes, "Bytes of those steps."),
        ("ashore_build_info", Unit::Count, "Always 1; the labels say which version runs."),
    ];

    /// The handles of one executor.
    pub(crate) struct Meters {
        outcomes: [(Ended, Counter); 5],
        failures: RefCell<Vec<(String, Counter)>>,
        retries: Counter,
        staged_bytes: Counter,
        written_bytes: Counter,
        /// call, fence, arena, queue
        stalls: [Histogram; 4],
        stage: Histogram,
        write: Histogram,
        commit: Histogram,
        durable: Histogram,
        arena: Gauge,
        arena_used: Gauge,
        queue: Gauge,
        last_step: Gauge,
        last_time: Gauge,
        oldest: Gauge,
    }

    impl Meters {
        pub const WANTED: bool = true;

        /// Describes all metrics, and makes the handles of one executor.
        pub fn new(store: &'static str, engine: &'static str) -> Self {
            describe();
            gauge!("ashore_build_info", "version" => env!("CARGO_PKG_VERSION"), "engine" => engine).set(1.0);
            let outcome = |end: Ended, name: &'static str| (end, counter!("ashore_saves_total", "outcome" => name));
            let stall = |place: &'static str| histogram!("ashore_save_stall_seconds", "where" => place);
            Self {
                outcomes: [
                    outcome(Ended::Durable, "durable"),
                    outcome(Ended::Failed, "failed"),
                    outcome(Ended::Superseded, "superseded"),
                    outcome(Ended::Indeterminate, "indeterminate"),
                    outcome(Ended::Skipped, "skipped"),
                ],
                failures: RefCell::default(),
                retries: counter!("ashore_retries_total", "op" => "save"),
                staged_bytes: counter!("ashore_staged_bytes_total"),
                written_bytes: counter!("ashore_written_bytes_total", "store" => store),
                stalls: [stall("call"), stall("fence"), stall("arena"), stall("queue")],
                stage: histogram!("ashore_stage_duration_seconds"),
                write: histogram!("ashore_write_duration_seconds"),
                commit: histogram!("ashore_commit_duration_seconds"),
                durable: histogram!("ashore_time_to_durable_seconds"),
                arena: gauge!("ashore_arena_bytes"),
                arena_used: gauge!("ashore_arena_used_bytes"),
                queue: gauge!("ashore_queue_saves"),
                last_step: gauge!("ashore_last_durable_step"),
                last_time: gauge!("ashore_last_durable_timestamp_seconds"),
                oldest: gauge!("ashore_oldest_undurable_timestamp_seconds"),
            }
        }

        /// Counts a save that has ended.
        pub fn save(&self, line: &SaveLine) {
            self.outcomes.iter().filter(|(end, _)| *end == line.end).for_each(|(_, counter)| counter.increment(1));
            if !line.kind.is_empty() {
                self.failure(&line.kind);
            }
            self.retries.increment(line.tries);
            self.staged_bytes.increment(line.staged_bytes);
            self.written_bytes.increment(line.written_bytes);
            let [call, fence, arena, queue] = &self.stalls;
            call.record(seconds(line.call.saturating_sub(line.queue)));
            fence.record(seconds(line.fence - line.starved()));
            arena.record(seconds(line.starved()));
            queue.record(seconds(line.queue));
            if line.end != Ended::Durable {
                return;
            }
            self.stage.record(seconds(line.staged.saturating_sub(line.stage_at)));
            self.write.record(seconds(line.written.saturating_sub(line.write_at)));
            self.commit.record(seconds(line.ended.saturating_sub(line.written)));
            self.durable.record(seconds(line.ended));
            self.last_step.set(line.step as f64);
            self.last_time.set(seconds(line.at.saturating_add(line.ended)));
        }

        fn failure(&self, kind: &str) {
            let mut failures = self.failures.borrow_mut();
            if let Some((_, counter)) = failures.iter().find(|(known, _)| known == kind) {
                return counter.increment(1);
            }
            let counter = counter!("ashore_failures_total", "kind" => kind.to_owned());
            counter.increment(1);
            failures.push((kind.to_owned(), counter));
        }

        /// Sets the metrics of the present state.
        pub fn sample(&self, sample: &Sample) {
            self.arena.set(sample.arena as f64);
            self.arena_used.set(sample.arena_used as f64);
            self.queue.set(sample.unfinished as f64);
            let oldest = sample.oldest.map_or(0.0, |began| seconds(unix_micros(SystemTime::now() - began.elapsed())));
            self.oldest.set(oldest);
        }
    }

    fn describe() {
        COUNTERS.into_iter().for_each(|(name, unit, what)| metrics::describe_counter!(name, unit, what));
        HISTOGRAMS.into_iter().for_each(|(name, unit, what)| metrics::describe_histogram!(name, unit, what));
        GAUGES.into_iter().for_each(|(name, unit, what)| metrics::describe_gauge!(name, unit, what));
    }

    fn seconds(micros: u64) -> f64 {
        micros as f64 / 1e6
    }

    /// Counts a call that read tensors. Restores need no executor, so the handles are looked up in each call.
    pub(crate) fn restored(bytes: u64, took: Duration) {
        counter!("ashore_restored_bytes_total").increment(bytes);
        histogram!("ashore_restore_duration_seconds").record(took.as_secs_f64());
    }

    pub(crate) fn damage_found() {
        counter!("ashore_verify_damage_total").increment(1);
    }

    pub(crate) fn pruned(steps: usize, bytes: u64) {
        counter!("ashore_pruned_steps_total").increment(steps as u64);
        counter!("ashore_pruned_bytes_total").increment(bytes);
    }

    pub(crate) fn retained(steps: usize, bytes: u64) {
        gauge!("ashore_retained_steps").set(steps as f64);
        gauge!("ashore_retained_bytes").set(bytes as f64);
    }
}
