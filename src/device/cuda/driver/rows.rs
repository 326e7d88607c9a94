//! The arguments of a copy of rows.

use super::codes::flag;
use super::handles::Address;
use crate::device::RowLayout;
use std::ffi::{c_uint, c_void};

/// `CUDA_MEMCPY2D`.
#[repr(C)]
pub struct RowCopy {
    pub from: Side,
    pub to: Side,
    pub width: usize,
    pub height: usize,
}

/// One side of a copy: memory of the host or of the device, never an array.
#[repr(C)]
pub struct Side {
    pub x: usize,
    pub y: usize,
    pub kind: c_uint,
    pub host: *const c_void,
    pub device: Address,
    pub array: usize,
    pub pitch: usize,
}

impl RowCopy {
    /// A copy of `rows` from the host to the device.
    pub fn to_device(from: *const u8, to: Address, rows: RowLayout) -> Self {
        let RowLayout { width, height, from_pitch, to_pitch } = rows;
        let side = |kind, host, device, pitch| Side { x: 0, y: 0, kind, host, device, array: 0, pitch };
        let from = side(flag::MEMORY_HOST, from.cast(), 0, from_pitch);
        let to = side(flag::MEMORY_DEVICE, std::ptr::null(), to, to_pitch as usize);
        Self { from, to, width, height }
    }
}
