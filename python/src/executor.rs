//! The executor: `ashore._ashore.Executor`.

use crate::chain::Publisher;
use crate::collect::Memory;
use crate::errors::{self, IntoPy, closed, entry};
use crate::handle::Handle;
use crate::leaf::Way;
use crate::reading::Reading;
use crate::sources::{self, Devices, Item, Place};
use crate::tree::{Leaves, SHAPE, Tensor};
use crate::waiting::{interruptible, seconds};
use crate::{checkpoint, values};
use ashore::ranks::{Member, SharedDirectory};
use ashore::tiers::{Tier, TierReport, TierState};
use ashore::{Builder, Capture, CheckpointExecutor, Save, SaveOptions, Settings, Snapshot, StateDict};
use pyo3::prelude::*;
use pyo3::sync::MutexExt;
use pyo3::types::{PyDict, PyString};
use std::cell::Cell;
use std::future::Future;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};

/// An executor of the engine, until it is shut down.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Executor {
    inner: Mutex<Option<Arc<CheckpointExecutor>>>,
    process: u32,
    seen: Mutex<Seen>,
}

/// The results of earlier saves that the next save is compared with.
#[derive(Default)]
struct Seen {
    memories: Vec<Memory>,
    /// The devices with tensors of earlier saves, and how to ask for their current streams.
    devices: Vec<(i32, Way)>,
    /// Saves whose tensors the engine reads.
    reading: Vec<(Save, Reading)>,
}

/// When the tensors of a save are captured.
struct Captures {
    snapshot: Snapshot,
    /// Names of tensors or of their containers. The last field is set when a tensor matched.
    rules: Vec<(String, Capture, bool)>,
}

impl Captures {
    fn parse(capture: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let mut captures = Self { snapshot: Snapshot::AtFence, rules: Vec::new() };
        let Some(capture) = capture.filter(|capture| !capture.is_none()) else { return Ok(captures) };
        let when = |text: &Bound<'_, PyAny>, name: &str| match text.extract::<String>().as_deref() {
            Ok("save") => Ok(Capture::AtSave),
            Ok("fence") => Ok(Capture::AtFence),
            _ => Err(errors::invalid(text.py(), "a capture is \"save\" or \"fence\"", Some(name))),
        };
        if capture.is_instance_of::<PyString>() {
            if when(capture, "")? == Capture::AtSave {
                captures.snapshot = Snapshot::AtSave;
            }
            return Ok(captures);
        }
        for pair in capture.call_method0("items")?.try_iter()? {
            let (name, text): (String, Bound<'_, PyAny>) = pair?.extract()?;
            let rule = when(&text, &name)?;
            captures.rules.push((name, rule, false));
        }
        Ok(captures)
    }

    /// Returns the capture of a tensor: the rule with the longest name that is the tensor's own or that of a
    /// container.
    fn of(&mut self, name: &str) -> Option<Capture> {
        let within = |rule: &str| {
            let rest = name.strip_prefix(rule)?;
            (rule.is_empty() || rest.is_empty() || rest.starts_with('.')).then_some(rule.len())
        };
        let best = self.rules.iter_mut().filter_map(|rule| Some((within(&rule.0)?, rule))).max_by_key(|(len, _)| *len);
        best.map(|(_, rule)| {
            rule.2 = true;
            rule.1
        })
    }

    fn all_used(&self, py: Python<'_>) -> PyResult<()> {
        match self.rules.iter().find(|(name, _, used)| !used && !name.is_empty()) {
            Some((name, ..)) => {
                Err(errors::invalid(py, "a capture is given for a name that the state does not have", Some(name)))
            }
            None => Ok(()),
        }
    }
}

/// A call of `save` that has not reached the engine. If it fails before that, the other ranks must learn of
/// it, because they count calls.
struct Call<'a, 'py> {
    py: Python<'py>,
    engine: &'a Arc<CheckpointExecutor>,
    step: u64,
    reached: Cell<bool>,
}

impl Drop for Call<'_, '_> {
    fn drop(&mut self) {
        if !self.reached.get() {
            let (engine, step) = (self.engine, self.step);
            self.py.detach(|| engine.decline(step, "its error is raised there"));
        }
    }
}

impl Executor {
    /// Returns the executor of the engine.
    fn engine(&self, py: Python<'_>) -> PyResult<Arc<CheckpointExecutor>> {
        if std::process::id() != self.process {
            return Err(closed(py, "an executor cannot be used in a forked child: make a new one there"));
        }
        let inner = self.inner.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).clone();
        inner.ok_or_else(|| closed(py, "the executor was shut down"))
    }
}

#[pymethods]
impl Executor {
    #[new]
    fn new(
        py: Python<'_>,
        root: PathBuf,
        settings: &str,
        alone: bool,
        ranks: Option<(u32, u32, u32)>,
        run: Option<String>,
    ) -> PyResult<Self> {
        entry(py, || {
            let (settings, tiers) = parsed(settings).map_err(|e| {
                errors::invalid(py, &format!("a setting of the executor is unknown or of a wrong type: {e}"), None)
            })?;
            let build = || {
                let mut builder = CheckpointExecutor::builder(&root).settings(settings);
                builder = tiers.into_iter().fold(builder, Builder::tier);
                if let Some((rank, world, local_rank)) = ranks {
                    let member = Member { rank, world, local_rank };
                    builder = builder.ranks(Arc::new(SharedDirectory::new(&root, member)?));
                }
                if let Some(run) = run {
                    builder = builder.run(run);
                }
                if alone { builder.alone() } else { builder }.build()
            };
            let inner = Mutex::new(Some(Arc::new(py.detach(build).or_raise(py)?)));
            Ok(Self { inner, process: std::process::id(), seen: Mutex::default() })
        })
    }

    /// Saves a tree of tensors and values.
    #[pyo3(signature = (step, state, named, capture, frozen, options))]
    #[expect(clippy::too_many_arguments, reason = "called by ashore/_executor.py alone")]
    fn save(
        &self,
        py: Python<'_>,
        step: u64,
        state: &Bound<'_, PyAny>,
        named: Named<'_>,
        capture: Option<&Bound<'_, PyAny>>,
        frozen: Vec<String>,
        options: Given,
    ) -> PyResult<Handle> {
        entry(py, || {
            let engine = self.engine(py)?;
            let call = Call { py, engine: &engine, step, reached: Cell::new(false) };
            let mut captures = Captures::parse(capture)?;
            let leaves = Leaves::of(state)?;
            let mut dict = StateDict::with_capacity(leaves.tensors.len());
            dict.metadata(SHAPE, &leaves.shape).or_raise(py)?;
            for (name, value) in &leaves.values {
                dict.value(name.as_str(), value).or_raise(py)?;
            }
            let item = |held| {
                let Tensor { name, object, way, place } = held;
                let capture = captures.of(&name);
                Item { name, object, way: Some(way), place, capture }
            };
            let items = leaves.tensors.into_iter().map(item).collect();
            captures.all_used(py)?;
            let options = options_of(py, captures.snapshot, options)?;
            let declare = |dict: &mut StateDict<'static>| frozen.iter().try_for_each(|name| freeze(py, dict, name));
            self.submit(&call, dict, items, named, options, (None, None, false), declare)
        })
    }

    /// Saves tensors that an adapter prepared: see `CheckpointExecutor._save_prepared`.
    #[pyo3(signature = (step, names, tensors, places, aliases, named, capture, options, keep, stream, immutable))]
    #[expect(clippy::too_many_arguments, reason = "called by ashore/_executor.py alone")]
    fn save_prepared(
        &self,
        py: Python<'_>,
        step: u64,
        names: &Bound<'_, PyAny>,
        tensors: &Bound<'_, PyAny>,
        places: Option<&Bound<'_, PyAny>>,
        aliases: &Bound<'_, PyDict>,
        named: Named<'_>,
        capture: Option<&Bound<'_, PyAny>>,
        options: Given,
        keep: Option<Py<PyAny>>,
        stream: Option<usize>,
        immutable: bool,
    ) -> PyResult<Handle> {
        entry(py, || {
            let engine = self.engine(py)?;
            let call = Call { py, engine: &engine, step, reached: Cell::new(false) };
            let mut captures = Captures::parse(capture)?;
            if names.len()? != tensors.len()? {
                return Err(errors::invalid(py, "there are not as many names as tensors", None));
            }
            let mut items = Vec::with_capacity(names.len()?);
            let mut places = places.map(|places| places.try_iter()).transpose()?;
            for (name, object) in names.try_iter()?.zip(tensors.try_iter()?) {
                let name: String = name?.extract()?;
                let place: Option<Place> = match &mut places {
                    Some(places) => places.next().transpose()?.map(|place| place.extract()).transpose()?.flatten(),
                    None => None,
                };
                let capture = captures.of(&name);
                items.push(Item { name, object: object?, way: None, place, capture });
            }
            let aliases = aliases.iter().map(|(name, holder)| Ok((name.extract()?, holder.extract()?)));
            let aliases = aliases.collect::<PyResult<Vec<(String, String)>>>()?;
            for (name, holder) in &aliases {
                if captures.of(name) == Some(Capture::AtSave)
                    && let Some(holder) = items.iter_mut().find(|item| item.name == *holder)
                {
                    holder.capture = Some(Capture::AtSave);
                }
            }
            captures.all_used(py)?;
            let options = options_of(py, captures.snapshot, options)?;
            let dict = StateDict::with_capacity(items.len());
            self.submit(&call, dict, items, named, options, (keep, stream, immutable), |dict| {
                for (name, holder) in &aliases {
                    dict.alias(name.as_str(), holder).or_raise(py)?;
                }
                Ok(())
            })
        })
    }

    /// Publishes a tree of tensors and values through this executor.
    fn publish_delta(
        &self,
        py: Python<'_>,
        publisher: &Publisher,
        state: &Bound<'_, PyAny>,
        beside: &Bound<'_, PyDict>,
    ) -> PyResult<Handle> {
        entry(py, || {
            let (engine, open) = (self.engine(py)?, publisher.open(py)?);
            let (dict, devices, reading) = publisher.collect(py, state, beside)?;
            let publish = py.detach(|| engine.publish_delta(&open, dict)).or_raise(py)?;
            self.remember(py, devices);
            self.reads(py, publish.save(), reading);
            Ok(Handle::of_publish(publish))
        })
    }

    /// Waits until the tensors may be written. With `streams`, or with tensors on GPUs, the GPUs wait.
    fn fence(&self, py: Python<'_>, streams: Option<Vec<(u32, usize)>>) -> PyResult<()> {
        entry(py, || {
            let engine = self.engine(py)?;
            let mut reading = engine.fenced();
            let settled = std::pin::Pin::new(&mut reading).poll(&mut Context::from_waker(Waker::noop()));
            if matches!(settled, Poll::Ready(Ok(()))) {
                // This call returns at once, and marks the saves as fenced.
                return py.detach(|| engine.fence()).or_raise(py);
            }
            let resized = self.resized(py);
            let streams = match streams {
                Some(streams) => streams.into_iter().map(|(ordinal, handle)| sources::given(ordinal, handle)).collect(),
                None => {
                    let seen = self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
                    let devices = seen.devices.clone();
                    drop(seen);
                    sources::current(&devices, py)?
                }
            };
            let wait = move || if streams.is_empty() { engine.fence() } else { engine.fence_on(&streams) };
            let fenced = interruptible(py, wait)?.or_raise(py);
            resized.map_or(fenced, Err)
        })
    }

    /// Counts a call of `save` that a program could not make: see `CheckpointExecutor._decline`.
    fn decline(&self, py: Python<'_>, step: u64, why: &str) -> PyResult<()> {
        let engine = self.engine(py)?;
        py.detach(|| engine.decline(step, why));
        Ok(())
    }

    /// Returns the newest durable step.
    fn latest(&self, py: Python<'_>) -> PyResult<Option<checkpoint::Checkpoint>> {
        entry(py, || {
            let engine = self.engine(py)?;
            let found = py.detach(|| engine.latest()).or_raise(py)?;
            Ok(found.map(checkpoint::Checkpoint::with_executor))
        })
    }

    /// Returns the checkpoint of a step.
    fn checkpoint(&self, py: Python<'_>, step: u64) -> PyResult<checkpoint::Checkpoint> {
        entry(py, || {
            let engine = self.engine(py)?;
            let found = py.detach(|| engine.checkpoint(step)).or_raise(py)?;
            Ok(checkpoint::Checkpoint::with_executor(found))
        })
    }

    /// Reports what each tier has and lacks: name, root, state, newest, lacks, forks, error.
    fn tiers(&self, py: Python<'_>) -> PyResult<Vec<Known>> {
        entry(py, || {
            let reports = self.engine(py)?.tiers();
            let known = |report: TierReport| {
                let state = match report.state {
                    TierState::Ours => "ours",
                    TierState::Lost => "lost",
                    _ => "away",
                };
                let error = report.error.map(|error| format!("{error:#}"));
                (report.tier, report.root, state, report.newest, report.lacks, report.forks, error)
            };
            Ok(reports.into_iter().map(known).collect())
        })
    }

    /// Reports how the executor works: device, engine, arena.
    fn report(&self, py: Python<'_>) -> PyResult<(String, String, u64)> {
        entry(py, || {
            let engine = self.engine(py)?;
            Ok((engine.device().to_string(), engine.engine().to_owned(), engine.settings().arena))
        })
    }

    /// Whether the executor takes saves.
    fn is_open(&self, py: Python<'_>) -> bool {
        self.engine(py).is_ok()
    }

    /// Waits for saves in flight, and ends the threads. Returns false if that was done before.
    fn shutdown(&self, py: Python<'_>, deadline: f64) -> PyResult<bool> {
        entry(py, || {
            if std::process::id() != self.process {
                return Err(closed(py, "an executor cannot be shut down in a forked child"));
            }
            let Ok(engine) = self.engine(py) else { return Ok(false) };
            let timeout = seconds(py, deadline)?;
            let shut_down = {
                let engine = engine.clone();
                interruptible(py, move || engine.shutdown(timeout))?
            };
            let inner = self.inner.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).take();
            let mut seen = self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
            let seen = std::mem::take(&mut *seen);
            py.detach(move || drop((engine, inner)));
            drop(seen);
            shut_down.or_raise(py)?;
            Ok(true)
        })
    }
}

/// The report of a tier.
type Known = (String, PathBuf, &'static str, Option<u64>, Vec<u64>, Vec<u64>, Option<String>);

/// Parses the settings, and the tiers that they contain.
fn parsed(settings: &str) -> serde_json::Result<(Settings, Vec<Tier>)> {
    let mut settings: serde_json::Value = serde_json::from_str(settings)?;
    let tiers = settings.as_object_mut().and_then(|settings| settings.remove("tiers"));
    let tiers = tiers.map_or_else(|| Ok(Vec::new()), serde_json::from_value)?;
    Ok((serde_json::from_value(settings)?, tiers))
}

/// Values, values of this rank, and metadata.
type Named<'py> = (Bound<'py, PyDict>, Bound<'py, PyDict>, Bound<'py, PyDict>);

/// Overwrite, the name of the directory, the path of a directory elsewhere, and the deadline in seconds.
type Given = (bool, Option<String>, Option<PathBuf>, Option<f64>);

impl Executor {
    #[expect(clippy::too_many_arguments, reason = "the parts of one call")]
    fn submit<'py>(
        &self,
        call: &Call<'_, 'py>,
        mut dict: StateDict<'static>,
        items: Vec<Item<'_>>,
        (values, rank_values, metadata): Named<'_>,
        options: SaveOptions,
        (keep, stream, immutable): (Option<Py<PyAny>>, Option<usize>, bool),
        finish: impl FnOnce(&mut StateDict<'static>) -> PyResult<()>,
    ) -> PyResult<Handle> {
        let &Call { py, engine, step, .. } = call;
        for (name, value) in values {
            let name: String = name.extract()?;
            dict.value(name.as_str(), &values::encode(&value, &name)?).or_raise(py)?;
        }
        for (name, value) in rank_values {
            let name: String = name.extract()?;
            dict.rank_value(name.as_str(), &values::encode(&value, &name)?).or_raise(py)?;
        }
        for (name, value) in metadata {
            let name: String = name.extract()?;
            dict.metadata(name.as_str(), &values::encode(&value, &name)?).or_raise(py)?;
        }
        // The memory is taken out of the lock, because collecting runs Python code.
        let mut memories =
            std::mem::take(&mut self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).memories);
        let (devices, reading) = sources::add(py, &mut dict, items, &mut memories, keep, stream, immutable)?;
        let mut seen = self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        seen.memories = memories;
        drop(seen);
        finish(&mut dict)?;
        call.reached.set(true);
        let save = py.detach(|| engine.save_with(step, dict, options)).or_raise(py)?;
        self.remember(py, devices);
        self.reads(py, &save, reading);
        Ok(Handle::new(save))
    }

    /// Notes the memory that the engine reads for a save, until the next fence.
    fn reads(&self, py: Python<'_>, save: &Save, reading: Reading) {
        let mut seen = self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        seen.reading.retain(|(_, reading)| !reading.is_over());
        seen.reading.push((save.clone(), reading));
    }

    /// Cancels saves of which a storage was resized while the engine reads it. Returns the first error.
    fn resized(&self, py: Python<'_>) -> Option<PyErr> {
        // The saves are taken out of the lock, because the check runs Python code. A fence ends all of them.
        let reading =
            std::mem::take(&mut self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner).reading);
        let mut first = None;
        for (save, reading) in reading {
            let error = reading.check(py, &save);
            first = first.or(error);
        }
        first
    }

    /// Remembers the devices of a save that the engine took. Before that, a fence would be refused, because
    /// the executor does not know the device.
    fn remember(&self, py: Python<'_>, devices: Devices) {
        let mut seen = self.seen.lock_py_attached(py).unwrap_or_else(PoisonError::into_inner);
        for ((id, says), (_, way)) in devices {
            if !seen.devices.iter().any(|(known, way)| (*known, way.says_stream()) == (id, says)) {
                seen.devices.push((id, way));
            }
        }
    }
}

/// Declares a tensor frozen, or all tensors in the container `name`.
fn freeze(py: Python<'_>, dict: &mut StateDict<'static>, name: &str) -> PyResult<()> {
    if dict.frozen(name).is_ok() {
        return Ok(());
    }
    let within = |tensor: &str| tensor.strip_prefix(name).is_some_and(|rest| name.is_empty() || rest.starts_with('.'));
    let names: Vec<String> = dict.layouts().map(|(tensor, _)| tensor).filter(|t| within(t)).map(Into::into).collect();
    if names.is_empty() {
        return Err(errors::invalid(py, "a name that the state does not have is declared frozen", Some(name)));
    }
    names.iter().try_for_each(|tensor| dict.frozen(tensor).map(drop)).or_raise(py)
}

fn options_of(
    py: Python<'_>,
    snapshot: Snapshot,
    (overwrite, name, directory, deadline): Given,
) -> PyResult<SaveOptions> {
    let mut options = SaveOptions::default().snapshot(snapshot);
    options.overwrite = overwrite;
    options.name = name;
    options.directory = directory;
    options.timeout = deadline.map(|deadline| seconds(py, deadline)).transpose()?;
    Ok(options)
}

impl Drop for Executor {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // The drop waits for saves in flight, so it must not hold the GIL. After the end of the interpreter
        // there is no GIL.
        let mut inner = Some(inner);
        if Python::try_attach(|py| py.detach(|| drop(inner.take()))).is_none() {
            drop(inner);
        }
    }
}
