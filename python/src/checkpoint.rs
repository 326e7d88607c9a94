//! Reading: `ashore._ashore.Checkpoint` and `ashore._ashore.Catalog`.

use crate::errors::{IntoPy, entry, invalid};
use crate::targets::{self, Wanted};
use crate::tree::{self, Parts, SHAPE};
use crate::waiting::interruptible;
use crate::{dtypes, values};
use ashore::{Catalog as Engine, DeviceChoice, PruneOptions, Report, Retention, Value};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::path::PathBuf;
use std::sync::Arc;

/// An open step.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Checkpoint {
    inner: ashore::Checkpoint,
    /// Whether it has the device of the executor that opened it.
    has_device: bool,
}

impl Checkpoint {
    fn new(inner: ashore::Checkpoint) -> Self {
        Self { inner, has_device: false }
    }

    /// Wraps a checkpoint that an executor opened.
    pub fn with_executor(inner: ashore::Checkpoint) -> Self {
        Self { inner, has_device: true }
    }
}

/// The name, the dtype (in safetensors and in NumPy), the shape and the bytes of a tensor.
type Info = (String, String, Option<&'static str>, Vec<usize>, u64);

fn info(tensor: ashore::TensorInfo<'_>) -> Info {
    let numpy = dtypes::numpy_name(tensor.dtype);
    (tensor.name.to_owned(), tensor.dtype.to_string(), numpy, tensor.shape.to_vec(), tensor.bytes)
}

#[pymethods]
impl Checkpoint {
    /// Opens the checkpoint in a directory.
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        entry(py, || py.detach(|| ashore::Checkpoint::open(path)).or_raise(py).map(Self::new))
    }

    #[getter]
    fn step(&self) -> u64 {
        self.inner.step()
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.inner.path().to_owned()
    }

    #[getter]
    fn bytes(&self) -> u64 {
        self.inner.bytes()
    }

    #[getter]
    fn tier(&self) -> Option<&str> {
        self.inner.tier()
    }

    #[getter]
    fn ranks(&self) -> u32 {
        self.inner.world()
    }

    /// Returns the names of tensors that begin with `prefix`.
    fn names(&self, py: Python<'_>, prefix: &str) -> PyResult<Vec<String>> {
        entry(py, || {
            let names = || Ok(self.inner.with_prefix(prefix)?.map(|tensor| tensor.name.to_owned()).collect());
            py.detach(names).or_raise(py)
        })
    }

    fn info(&self, py: Python<'_>, name: &str) -> PyResult<Info> {
        entry(py, || self.inner.tensor(name).map(info).or_raise(py))
    }

    /// Returns the boxes in which a tensor is stored: pairs of begin and end for each dimension.
    fn boxes(&self, py: Python<'_>, name: &str) -> PyResult<Vec<Vec<(usize, usize)>>> {
        entry(py, || {
            let boxes = self.inner.boxes(name).or_raise(py)?;
            Ok(boxes.iter().map(|ranges| ranges.iter().map(|range| (range.start, range.end)).collect()).collect())
        })
    }

    fn value_names(&self) -> Vec<String> {
        self.inner.value_names().map(str::to_owned).collect()
    }

    fn value<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
        entry(py, || values::decode(py, &self.inner.value::<Value>(name).or_raise(py)?))
    }

    /// Returns the value that one rank stored for itself.
    fn rank_value<'py>(&self, py: Python<'py>, rank: u32, name: &str) -> PyResult<Bound<'py, PyAny>> {
        entry(py, || values::decode(py, &self.inner.rank_value::<Value>(rank, name).or_raise(py)?))
    }

    fn metadata_keys(&self) -> Vec<String> {
        self.inner.metadata_keys().filter(|key| *key != SHAPE).map(str::to_owned).collect()
    }

    fn metadata<'py>(&self, py: Python<'py>, key: &str) -> PyResult<Bound<'py, PyAny>> {
        entry(py, || values::decode(py, &self.inner.metadata::<Value>(key).or_raise(py)?))
    }

    /// Whether the step was saved from a tree.
    fn has_tree(&self) -> bool {
        self.inner.metadata_keys().any(|key| key == SHAPE)
    }

    /// Builds the tree from `arrays` and the values.
    fn tree<'py>(&self, py: Python<'py>, arrays: &Bound<'py, PyDict>) -> PyResult<Bound<'py, PyAny>> {
        entry(py, || {
            let shape: String = self.inner.metadata(SHAPE).or_raise(py)?;
            tree::rebuild(py, &shape, &Leaves { checkpoint: self, arrays })
        })
    }

    /// Reads tensors into memory: a list of name, target, and box (pairs of begin and end) or None.
    fn read_into(
        &self,
        py: Python<'_>,
        wanted: Vec<(String, Bound<'_, PyAny>, Option<targets::Region>)>,
        strict: bool,
        stream: Option<usize>,
    ) -> PyResult<()> {
        entry(py, || {
            let wanted = wanted.into_iter().map(|(name, object, region)| Wanted { name, object, region }).collect();
            targets::read(py, &self.inner, wanted, strict, stream, !self.has_device)
        })
    }

    /// Returns the checkpoint with a device for targets in the device's memory.
    fn with_device(&self, py: Python<'_>, device: &str) -> PyResult<Self> {
        entry(py, || {
            let choice: DeviceChoice = device.parse::<DeviceChoice>().or_raise(py)?;
            let inner = self.inner.clone();
            py.detach(|| inner.with_device(choice)).or_raise(py).map(Self::with_executor)
        })
    }

    /// Reads every byte. Returns the numbers of files, tensors and bytes, and the damage as pairs of a file
    /// and its fault.
    fn verify(&self, py: Python<'_>) -> PyResult<(usize, usize, u64, Vec<String>, bool)> {
        entry(py, || {
            let inner = self.inner.clone();
            let report: Report = interruptible(py, move || inner.verify())?.or_raise(py)?;
            let damage = report.damage.iter().chain(&report.misleading).map(|damage| format!("{damage:?}")).collect();
            Ok((report.files, report.tensors, report.bytes, damage, report.is_sound()))
        })
    }
}

struct Leaves<'a, 'py> {
    checkpoint: &'a Checkpoint,
    arrays: &'a Bound<'py, PyDict>,
}

impl<'py> Parts<'py> for Leaves<'_, 'py> {
    fn tensor(&self, name: &str) -> PyResult<Bound<'py, PyAny>> {
        let missing = || invalid(self.arrays.py(), "the tree has a tensor that the step does not have", Some(name));
        self.arrays.get_item(name)?.ok_or_else(missing)
    }

    fn value(&self, name: &str) -> PyResult<Bound<'py, PyAny>> {
        self.checkpoint.value(self.arrays.py(), name)
    }
}

/// The steps under a root.
#[pyclass(module = "ashore._ashore", frozen)]
pub struct Catalog {
    inner: Arc<Engine>,
}

#[pymethods]
impl Catalog {
    #[staticmethod]
    fn open(py: Python<'_>, root: PathBuf) -> PyResult<Self> {
        entry(py, || Ok(Self { inner: Arc::new(py.detach(|| Engine::open(root)).or_raise(py)?) }))
    }

    /// Returns step, name, path, bytes and time of every step.
    fn entries(&self, py: Python<'_>) -> PyResult<Vec<(u64, String, PathBuf, u64)>> {
        entry(py, || {
            let entries = py.detach(|| self.inner.list()).or_raise(py)?;
            Ok(entries.into_iter().map(|entry| (entry.step, entry.name, entry.path, entry.bytes)).collect())
        })
    }

    fn latest(&self, py: Python<'_>) -> PyResult<Option<Checkpoint>> {
        entry(py, || Ok(py.detach(|| self.inner.latest()).or_raise(py)?.map(Checkpoint::new)))
    }

    /// Returns the newest step whose bytes are all as written, and the numbers of the steps that were
    /// skipped.
    fn latest_valid(&self, py: Python<'_>) -> PyResult<Option<(Checkpoint, Vec<u64>)>> {
        entry(py, || {
            let inner = self.inner.clone();
            let found = interruptible(py, move || inner.latest_valid())?.or_raise(py)?;
            Ok(found.map(|found| {
                (Checkpoint::new(found.checkpoint), found.skipped.iter().map(|problem| problem.step).collect())
            }))
        })
    }

    fn checkpoint(&self, py: Python<'_>, step: u64) -> PyResult<Checkpoint> {
        entry(py, || py.detach(|| self.inner.checkpoint(step)).or_raise(py).map(Checkpoint::new))
    }

    /// Deletes steps beyond the newest `keep_last`. Returns their numbers.
    fn prune(&self, py: Python<'_>, keep_last: usize, keep_every: Option<u64>, dry_run: bool) -> PyResult<Vec<u64>> {
        entry(py, || {
            let retention = Retention::last(keep_last);
            let retention = keep_every.map_or(retention, |every| retention.every(every));
            let options = PruneOptions::new().dry_run(dry_run);
            let prune = || self.inner.prune(&retention, options).and_then(ashore::catalog::Pruned::complete);
            let pruned = py.detach(prune).or_raise(py)?;
            Ok(pruned.removed.iter().map(|entry| entry.step).collect())
        })
    }

    fn delete(&self, py: Python<'_>, step: u64) -> PyResult<()> {
        entry(py, || {
            let delete = || self.inner.delete(step, PruneOptions::new()).and_then(ashore::catalog::Pruned::complete);
            py.detach(delete).or_raise(py).map(drop)
        })
    }
}
