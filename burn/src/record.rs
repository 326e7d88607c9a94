//! Converts records of burn to named tensors and one value.

use crate::{dtype, invalid};
use ashore::{Checkpoint, HostTensor, Result, StateDict, Targets};
use burn::lr_scheduler::LrSchedulerRecord;
use burn::optim::OptimizerRecord;
use burn::store::{ModuleRecord, RecordError};
use burn::tensor::{Bytes, DType};
use burn_pack::{Reader, Scalar, Tensor, Writer};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A record of burn, of a module, an optimizer or a scheduler. This trait is sealed.
pub trait Record: Sized + sealed::Sealed {
    /// The name of such a record in the steps of [`Training`](crate::Training).
    #[doc(hidden)]
    const NAME: &'static str;

    /// Packs the record, in host memory.
    #[doc(hidden)]
    fn pack(self) -> std::result::Result<Bytes, RecordError>;

    /// Unpacks a record.
    #[doc(hidden)]
    fn unpack(bytes: Bytes) -> std::result::Result<Self, RecordError>;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! records {
    ($($record:ty, $name:literal;)*) => { $(
        impl sealed::Sealed for $record {}
        impl Record for $record {
            const NAME: &'static str = $name;

            fn pack(self) -> std::result::Result<Bytes, RecordError> {
                self.into_bytes()
            }
            fn unpack(bytes: Bytes) -> std::result::Result<Self, RecordError> {
                Self::from_bytes(bytes)
            }
        }
    )* };
}
records! {
    ModuleRecord, "model";
    OptimizerRecord, "optimizer";
    LrSchedulerRecord, "scheduler";
}

/// The part of a record beside the bytes of its tensors. It is the value under the record's name.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// By the tensor's name in the step, without the record's name.
    tensors: BTreeMap<String, KeptTensor>,
    scalars: BTreeMap<String, Scalar>,
    metadata: BTreeMap<String, String>,
}

#[derive(Serialize, Deserialize)]
struct KeptTensor {
    /// The tensor's name in the record, if that name differs.
    name: Option<String>,
    dtype: DType,
    param_id: Option<u64>,
}

/// The bytes of one tensor, within the bytes of the whole record.
struct View(Bytes);

impl AsRef<[u8]> for View {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Adds a record to `state` as `name`. Each of its tensors gets the name `name.` followed by the tensor's
/// name in the record, and a value `name` has its [`ParamId`](burn::module::ParamId)s and scalars. In the
/// tensor names of an optimizer, the name of the parameter replaces burn's id, which differs from run to run:
/// `optimizer.hidden.weight.momentum.moment_1`.
///
/// This call packs the record, so that its tensors are in host memory and later actions of the program do not
/// change them. No fence is needed.
///
/// ```
/// use ashore_burn::{ashore::StateDict, put};
/// use burn::module::Module;
/// use burn::nn::LinearConfig;
/// use burn::tensor::Device;
///
/// let average = LinearConfig::new(3, 2).init(&Device::default());
/// let mut state = StateDict::new();
/// put(&mut state, "average", average.into_record())?;
/// let names: Vec<_> = state.layouts().map(|(name, _)| name).collect();
/// assert_eq!(names, ["average.bias", "average.weight"]);
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// # Errors
/// `Invalid`, naming the tensor, for a quantized tensor, and for a name that is taken.
pub fn put<R: Record>(state: &mut StateDict<'static>, name: &str, record: R) -> Result<()> {
    put_packed(state, name, packed(name, record)?)
}

/// Reads the tensors of a record from the device, and packs the record.
pub(crate) fn packed<R: Record>(name: &str, record: R) -> Result<Bytes> {
    record.pack().map_err(|e| unpackable(name, e))
}

fn unpackable(name: &str, error: RecordError) -> ashore::Error {
    invalid(format!("cannot pack a record record={name:?}")).with_source(error)
}

/// Adds a packed record: the second half of [`put`].
pub(crate) fn put_packed(state: &mut StateDict<'static>, name: &str, packed: Bytes) -> Result<()> {
    let failed = |e| unpackable(name, RecordError::from(e));
    let reader = Reader::from_bytes(packed).map_err(failed)?;
    let (scalars, metadata) = (reader.scalars().clone(), reader.metadata().clone());
    let mut kept = Kept { tensors: BTreeMap::new(), scalars, metadata };
    for tensor in reader.into_tensors().map_err(failed)? {
        let (own_name, dtype, shape, param_id, bytes) = tensor.into_parts().map_err(failed)?;
        let (in_step, own_name) = match by_path(&own_name, param_id, &kept.metadata) {
            Some(path) => (path, Some(own_name)),
            None => (own_name, None),
        };
        let full = format!("{name}.{in_step}");
        let stored = dtype::stored(dtype).map_err(|e| invalid(format!("{} tensor={full:?}", e.message())))?;
        state.tensor(full, HostTensor::from_owner(View(bytes), stored, &shape))?;
        kept.tensors.insert(in_step, KeptTensor { name: own_name, dtype, param_id });
    }
    state.value(name, &kept)?;
    Ok(())
}

/// Returns the name of a tensor of an optimizer's record, with the path of its parameter instead of the id.
fn by_path(name: &str, param_id: Option<u64>, paths: &BTreeMap<String, String>) -> Option<String> {
    let (id, rest) = name.split_once('.')?;
    let path = paths.get(id).filter(|_| param_id.is_some_and(|param_id| param_id.to_string() == id))?;
    Some(format!("{path}.{rest}"))
}

/// Reads the record `name` of a checkpoint, as [`put`] added it. The result is for `Module::try_load_record`,
/// `ModuleOptimizer::load_record` or `ModuleLrScheduler::load_record`.
///
/// This call uses host memory for twice the record: its tensors, and the packed record.
///
/// # Errors
/// `NotFound` when the checkpoint has no such record; as [`Checkpoint::read_into`]; `Invalid` when the record
/// is of a different kind, or a tensor has a different dtype than when it was saved.
pub fn record<R: Record>(checkpoint: &Checkpoint, name: &str) -> Result<R> {
    let kept: Kept = checkpoint.value(name)?;
    let mut buffers = Vec::with_capacity(kept.tensors.len());
    for (in_step, KeptTensor { dtype, .. }) in &kept.tensors {
        let full = format!("{name}.{in_step}");
        let info = checkpoint.tensor(&full)?;
        if info.dtype != dtype::stored(*dtype)? {
            let wrong = format!("a tensor has another dtype tensor={full:?} stored={} saved={dtype:?}", info.dtype);
            return Err(located(checkpoint, invalid(wrong)));
        }
        let bytes = usize::try_from(info.bytes).map_err(|e| invalid("a tensor is too long").with_source(e))?;
        buffers.push((full, info.shape, vec![0; bytes]));
    }
    let targets = buffers.iter_mut().fold(Targets::new(), |targets, (full, _, to)| targets.bytes(full.as_str(), to));
    checkpoint.read_into(targets)?;

    let tensors = kept.tensors.into_iter().zip(buffers).map(|((in_step, tensor), (_, shape, bytes))| {
        let KeptTensor { name, dtype, param_id } = tensor;
        Tensor::new(name.unwrap_or(in_step), dtype, shape.to_vec(), param_id, Bytes::from_bytes_vec(bytes))
    });
    let mut writer = Writer::new(tensors.collect());
    for (key, scalar) in kept.scalars {
        writer = writer.with_scalar(&key, scalar);
    }
    for (key, value) in kept.metadata {
        writer = writer.with_metadata(&key, &value);
    }
    let unpacked = writer.into_bytes().map_err(RecordError::from).and_then(R::unpack);
    unpacked.map_err(|e| located(checkpoint, invalid(format!("cannot read a record record={name:?}")).with_source(e)))
}

pub(crate) fn located(checkpoint: &Checkpoint, error: ashore::Error) -> ashore::Error {
    error.with_step(checkpoint.step()).with_path(checkpoint.path())
}
