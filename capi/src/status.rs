//! The numbers of the header: results of calls, element types, phases, times of capture.

use ashore_core::{Dtype, ErrorKind, Phase};

/// The result of a call. `ashore_last_error` has the text of a failure.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ashore_status {
    /// The call succeeded.
    ASHORE_OK = 0,
    /// The request is wrong: change the call, the setting or the input.
    ASHORE_INVALID = 1,
    /// The step, tensor, value or file does not exist.
    ASHORE_NOT_FOUND = 2,
    /// The step exists already, or it is too late to cancel.
    ASHORE_CONFLICT = 3,
    /// Too much is in flight: the same call can succeed later.
    ASHORE_BUSY = 4,
    /// The storage or the quota is full. Older steps are intact.
    ASHORE_NO_SPACE = 5,
    /// The storage, the device or another rank cannot be reached.
    ASHORE_UNAVAILABLE = 6,
    /// The stored bytes differ from the bytes that were written.
    ASHORE_CORRUPT = 7,
    /// The GPU failed. Saves that were staged still become durable.
    ASHORE_DEVICE = 8,
    /// The save was cancelled, or its executor was closed before it was durable.
    ASHORE_CANCELLED = 9,
    /// The deadline passed before the operation ended.
    ASHORE_DEADLINE = 10,
    /// The step may or may not survive a crash: its publish began, and the outcome is unknown.
    ASHORE_INDETERMINATE = 11,
    /// A bug in the library.
    ASHORE_INTERNAL = 12,
    /// Not a failure: the save was not begun, because another save was under way and the setting `overlap` is
    /// "skip" or "latest".
    ASHORE_SKIPPED = 100,
}

impl From<ErrorKind> for ashore_status {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Invalid => Self::ASHORE_INVALID,
            ErrorKind::NotFound => Self::ASHORE_NOT_FOUND,
            ErrorKind::Conflict => Self::ASHORE_CONFLICT,
            ErrorKind::Busy => Self::ASHORE_BUSY,
            ErrorKind::NoSpace => Self::ASHORE_NO_SPACE,
            ErrorKind::Unavailable => Self::ASHORE_UNAVAILABLE,
            ErrorKind::Corrupt => Self::ASHORE_CORRUPT,
            ErrorKind::Device => Self::ASHORE_DEVICE,
            ErrorKind::Cancelled => Self::ASHORE_CANCELLED,
            ErrorKind::Deadline => Self::ASHORE_DEADLINE,
            ErrorKind::Indeterminate => Self::ASHORE_INDETERMINATE,
            _ => Self::ASHORE_INTERNAL,
        }
    }
}

/// Element types, by the names of safetensors. Their numbers never change.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ashore_dtype {
    /// A boolean, in a byte.
    ASHORE_BOOL = 1,
    /// An unsigned byte.
    ASHORE_U8 = 2,
    /// A signed byte.
    ASHORE_I8 = 3,
    /// A signed integer of 16 bits.
    ASHORE_I16 = 4,
    /// An unsigned integer of 16 bits.
    ASHORE_U16 = 5,
    /// IEEE half precision.
    ASHORE_F16 = 6,
    /// A brain float.
    ASHORE_BF16 = 7,
    /// A signed integer of 32 bits.
    ASHORE_I32 = 8,
    /// An unsigned integer of 32 bits.
    ASHORE_U32 = 9,
    /// A float of 32 bits.
    ASHORE_F32 = 10,
    /// A float of 64 bits.
    ASHORE_F64 = 11,
    /// A signed integer of 64 bits.
    ASHORE_I64 = 12,
    /// An unsigned integer of 64 bits.
    ASHORE_U64 = 13,
    /// FP8, 4 bits of exponent.
    ASHORE_F8_E4M3 = 14,
    /// FP8, 5 bits of exponent.
    ASHORE_F8_E5M2 = 15,
    /// A scale of the MX formats.
    ASHORE_F8_E8M0 = 16,
    /// A complex number of two F32.
    ASHORE_C64 = 17,
    /// FP8 without infinities and a negative zero.
    ASHORE_F8_E4M3FNUZ = 18,
    /// FP8 without infinities and a negative zero.
    ASHORE_F8_E5M2FNUZ = 19,
    /// MXFP4: two elements to a byte, the last dimension even.
    ASHORE_F4 = 20,
    /// MXFP6, 2 bits of exponent.
    ASHORE_F6_E2M3 = 21,
    /// MXFP6, 3 bits of exponent.
    ASHORE_F6_E3M2 = 22,
}

/// Returns the dtype of a number of `ashore_dtype`.
pub fn dtype(number: i32) -> Option<Dtype> {
    use ashore_dtype::*;
    const ALL: &[(ashore_dtype, Dtype)] = &[
        (ASHORE_BOOL, Dtype::BOOL),
        (ASHORE_U8, Dtype::U8),
        (ASHORE_I8, Dtype::I8),
        (ASHORE_I16, Dtype::I16),
        (ASHORE_U16, Dtype::U16),
        (ASHORE_F16, Dtype::F16),
        (ASHORE_BF16, Dtype::BF16),
        (ASHORE_I32, Dtype::I32),
        (ASHORE_U32, Dtype::U32),
        (ASHORE_F32, Dtype::F32),
        (ASHORE_F64, Dtype::F64),
        (ASHORE_I64, Dtype::I64),
        (ASHORE_U64, Dtype::U64),
        (ASHORE_F8_E4M3, Dtype::F8_E4M3),
        (ASHORE_F8_E5M2, Dtype::F8_E5M2),
        (ASHORE_F8_E8M0, Dtype::F8_E8M0),
        (ASHORE_C64, Dtype::C64),
        (ASHORE_F8_E4M3FNUZ, Dtype::F8_E4M3FNUZ),
        (ASHORE_F8_E5M2FNUZ, Dtype::F8_E5M2FNUZ),
        (ASHORE_F4, Dtype::F4),
        (ASHORE_F6_E2M3, Dtype::F6_E2M3),
        (ASHORE_F6_E3M2, Dtype::F6_E3M2),
    ];
    ALL.iter().find(|(numbered, _)| *numbered as i32 == number).map(|(_, dtype)| *dtype)
}

/// When a save copies the bytes of a tensor.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ashore_capture {
    /// Small tensors within the call, other tensors at the fence at the latest.
    ASHORE_CAPTURE_DEFAULT = 0,
    /// Within the call: for step counters and statistics, which the program writes before the fence.
    ASHORE_CAPTURE_AT_SAVE = 1,
    /// At the fence at the latest.
    ASHORE_CAPTURE_AT_FENCE = 2,
}

/// The phase of a save.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ashore_phase {
    /// The save waits for earlier saves.
    ASHORE_PHASE_WAITING = 0,
    /// Tensors are read.
    ASHORE_PHASE_STAGING = 1,
    /// Every byte is copied, and bytes are being written.
    ASHORE_PHASE_WRITING = 2,
    /// For one of several ranks: its files are durable, and rank 0 decides.
    ASHORE_PHASE_PROMISED = 3,
    /// The step is being published.
    ASHORE_PHASE_PUBLISHING = 4,
    /// The save has ended, with or without an error.
    ASHORE_PHASE_ENDED = 5,
}

impl From<Phase> for ashore_phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Waiting => Self::ASHORE_PHASE_WAITING,
            Phase::Staging => Self::ASHORE_PHASE_STAGING,
            Phase::Writing => Self::ASHORE_PHASE_WRITING,
            Phase::Promised => Self::ASHORE_PHASE_PROMISED,
            Phase::Publishing => Self::ASHORE_PHASE_PUBLISHING,
            _ => Self::ASHORE_PHASE_ENDED,
        }
    }
}
