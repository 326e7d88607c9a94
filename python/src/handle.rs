//! The handle of a save: `ashore._ashore.Handle`.

use crate::errors::{IntoPy, closed, entry};
use crate::notify;
use crate::waiting::{SLICE, seconds};
use ashore::chain::{Kind, Publish, Published};
use ashore::{Committed, ErrorKind, IoMode, Outcome, Phase, Promoted, Save};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// A save or a publish in progress.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Handle {
    save: Save,
    publish: Option<Publish>,
    process: u32,
}

impl Handle {
    pub fn new(save: Save) -> Self {
        Self { save, publish: None, process: std::process::id() }
    }

    pub fn of_publish(publish: Publish) -> Self {
        let save = publish.save().clone();
        Self { publish: Some(publish), ..Self::new(save) }
    }

    fn ours(&self, py: Python<'_>) -> PyResult<()> {
        ours(py, self.process)
    }

    /// Returns how the save ended. None if it has not ended.
    fn ended<'py>(&self, py: Python<'py>) -> Option<PyResult<Option<Bound<'py, PyDict>>>> {
        let result = self.save.try_get()?;
        if let Some(publish) = &self.publish {
            // The save has ended, so this does not wait.
            let published = result.and_then(|_| publish.wait(Duration::ZERO));
            return Some(published.or_raise(py).and_then(|published| of_published(py, &published)).map(Some));
        }
        Some(result.or_raise(py).and_then(|outcome| match outcome {
            Outcome::Durable(committed) => Ok(Some(of_committed(py, &committed)?)),
            _ => Ok(None),
        }))
    }

    /// Returns whether staging succeeded. None if the save is neither staged nor failed.
    fn staged_now(&self, py: Python<'_>) -> Option<PyResult<()>> {
        let mut staged = self.save.staged();
        match Pin::new(&mut staged).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => Some(result.or_raise(py)),
            Poll::Pending => None,
        }
    }

    /// Waits in slices: see [`sliced`].
    fn sliced<T>(
        &self,
        py: Python<'_>,
        deadline: Option<f64>,
        wait: impl Fn(&Save, Duration) -> ashore::Result<()> + Sync,
        check: impl Fn() -> Option<PyResult<T>>,
    ) -> PyResult<Option<T>> {
        self.ours(py)?;
        let save = self.save.clone();
        sliced(py, deadline, move |slice| wait(&save, slice), check)
    }
}

/// Waits in slices until `check` has a result. None if `deadline` seconds have passed first.
fn sliced<T>(
    py: Python<'_>,
    deadline: Option<f64>,
    wait: impl Fn(Duration) -> ashore::Result<()> + Sync,
    check: impl Fn() -> Option<PyResult<T>>,
) -> PyResult<Option<T>> {
    let until =
        deadline.map(|deadline| seconds(py, deadline)).transpose()?.map(|wait| Instant::now().checked_add(wait));
    loop {
        if let Some(result) = check() {
            return result.map(Some);
        }
        let left = match until.flatten() {
            Some(until) => until.saturating_duration_since(Instant::now()),
            None => SLICE,
        };
        if left.is_zero() {
            return Ok(None);
        }
        let wait = &wait;
        let waited = py.detach(move || wait(left.min(SLICE)));
        if let Some(result) = check() {
            return result.map(Some);
        }
        // The wait was refused, as in a thread of the engine. A failure of the save would have been seen
        // above.
        if waited.as_ref().is_err_and(|e| e.kind() != ErrorKind::Deadline) {
            waited.or_raise(py)?;
        }
        py.check_signals()?;
    }
}

#[pymethods]
impl Handle {
    #[getter]
    fn step(&self) -> u64 {
        self.save.step()
    }

    /// Waits for the end: (True, outcome), or (False, None) at the deadline.
    fn wait<'py>(&self, py: Python<'py>, deadline: Option<f64>) -> PyResult<(bool, Option<Bound<'py, PyDict>>)> {
        entry(py, || {
            let ended = self.sliced(py, deadline, |save, slice| save.wait(slice).map(drop), || self.ended(py))?;
            Ok(ended.map_or((false, None), |ended| (true, ended)))
        })
    }

    /// Waits until the state is staged. False at the deadline.
    fn wait_staged(&self, py: Python<'_>, deadline: Option<f64>) -> PyResult<bool> {
        entry(py, || {
            let staged = self.sliced(py, deadline, |save, slice| save.staged().wait(slice), || self.staged_now(py))?;
            Ok(staged.is_some())
        })
    }

    /// Whether a wait for the end, or until it is staged, would return at once. A failure of the save still
    /// counts as not seen.
    fn is_done(&self, py: Python<'_>, staged: bool) -> bool {
        // A wait in a forked child raises at once.
        self.ours(py).is_err()
            || if staged { self.save.is_staged() } else { self.save.progress().phase == Phase::Ended }
    }

    /// Makes the notifier report `token` when the save has ended, or is staged.
    fn watch(&self, py: Python<'_>, token: u64, staged: bool) -> PyResult<()> {
        entry(py, || {
            self.ours(py)?;
            if staged {
                notify::when_ready(self.save.staged(), token)
            } else {
                notify::when_done(&self.save, token)
            }
            Ok(())
        })
    }

    /// Returns phase, bytes of tensors, bytes staged, bytes written.
    fn progress(&self) -> (&'static str, u64, u64, u64) {
        let progress = self.save.progress();
        let phase = match progress.phase {
            Phase::Waiting => "waiting",
            Phase::Staging => "staging",
            Phase::Writing => "writing",
            Phase::Promised => "promised",
            Phase::Publishing => "publishing",
            _ => "ended",
        };
        (phase, progress.bytes, progress.staged, progress.written)
    }

    /// Returns the second durability of the save, in the tier of this name.
    fn durable_in(&self, tier: String) -> Promotion {
        Promotion { save: self.save.clone(), tier, process: self.process }
    }

    fn cancel(&self, py: Python<'_>) -> PyResult<bool> {
        entry(py, || {
            self.ours(py)?;
            let save = self.save.clone();
            Ok(py.detach(move || save.cancel()))
        })
    }
}

/// The durability in a tier, with the interface of a handle.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Promotion {
    save: Save,
    tier: String,
    process: u32,
}

impl Promotion {
    /// Returns how the promotion ended. None if it has not ended.
    fn ended<'py>(&self, py: Python<'py>) -> Option<PyResult<Option<Bound<'py, PyDict>>>> {
        let mut promoted = self.save.durable_in(&self.tier);
        match Pin::new(&mut promoted).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => Some(result.or_raise(py).and_then(|promoted| of_promoted(py, &promoted)).map(Some)),
            Poll::Pending => None,
        }
    }
}

#[pymethods]
impl Promotion {
    #[getter]
    fn step(&self) -> u64 {
        self.save.step()
    }

    /// Waits for the end: (True, outcome), or (False, None) at the deadline.
    fn wait<'py>(&self, py: Python<'py>, deadline: Option<f64>) -> PyResult<(bool, Option<Bound<'py, PyDict>>)> {
        entry(py, || {
            ours(py, self.process)?;
            let promoted = self.save.durable_in(&self.tier);
            let ended = sliced(py, deadline, |slice| promoted.wait(slice).map(drop), || self.ended(py))?;
            Ok(ended.map_or((false, None), |ended| (true, ended)))
        })
    }

    /// Whether a wait would return at once.
    fn is_done(&self, py: Python<'_>) -> bool {
        ours(py, self.process).is_err() || self.save.durable_in(&self.tier).is_done()
    }

    /// Makes the notifier report `token` when the promotion has ended.
    fn watch(&self, py: Python<'_>, token: u64) -> PyResult<()> {
        entry(py, || {
            ours(py, self.process)?;
            notify::when_ready(self.save.durable_in(&self.tier), token);
            Ok(())
        })
    }
}

fn ours(py: Python<'_>, process: u32) -> PyResult<()> {
    if std::process::id() == process {
        return Ok(());
    }
    Err(closed(py, "a save cannot be used in a forked child: it belongs to the parent"))
}

fn of_promoted<'py>(py: Python<'py>, promoted: &Promoted) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("tier", &promoted.tier)?;
    dict.set_item("root", &promoted.root)?;
    dict.set_item("step", promoted.step)?;
    dict.set_item("attempt", promoted.attempt.to_string())?;
    dict.set_item("path", &promoted.path)?;
    dict.set_item("bytes", promoted.bytes)?;
    Ok(dict)
}

fn of_committed<'py>(py: Python<'py>, committed: &Committed) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("step", committed.step)?;
    dict.set_item("attempt", committed.attempt.to_string())?;
    dict.set_item("path", &committed.path)?;
    dict.set_item("bytes", committed.bytes)?;
    dict.set_item("written_bytes", committed.written_bytes)?;
    dict.set_item("cloned_bytes", committed.cloned_bytes)?;
    dict.set_item("linked_bytes", committed.linked_bytes)?;
    dict.set_item("blocked", committed.blocked.as_secs_f64())?;
    dict.set_item("staged", committed.staged.as_secs_f64())?;
    dict.set_item("durable", committed.durable.as_secs_f64())?;
    dict.set_item("tail", committed.tail.as_secs_f64())?;
    dict.set_item("direct", committed.mode == IoMode::Direct)?;
    dict.set_item("over_budget", committed.over_budget)?;
    Ok(dict)
}

fn of_published<'py>(py: Python<'py>, published: &Published) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let (kind, base, changed) = match published.kind {
        Kind::Delta { base, changed } => ("delta", Some(base), Some(changed)),
        _ => ("full", None, None),
    };
    dict.set_item("version", published.version)?;
    dict.set_item("attempt", published.attempt.to_string())?;
    dict.set_item("kind", kind)?;
    dict.set_item("base", base)?;
    dict.set_item("changed", changed)?;
    dict.set_item("bytes", published.bytes)?;
    dict.set_item("full_bytes", published.full_bytes)?;
    dict.set_item("state", published.state)?;
    dict.set_item("path", &published.path)?;
    dict.set_item("encoding", published.encoding.as_secs_f64())?;
    Ok(dict)
}
