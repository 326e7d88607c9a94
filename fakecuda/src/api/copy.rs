//! Copies, fills, and single values written by a stream.

use crate::abi::{CAPTURE_UNSUPPORTED, INVALID_VALUE, Status, take};
use crate::call::current;
use crate::exported::export;
use crate::settings::POISON;
use crate::stream::{enqueue, find};
use crate::work::{Spot, Work};

/// Minimum size of a destination that is poisoned. Shorter destinations may be flags that a thread polls.
const POISONED_MIN: u64 = 64;

/// `CUmemcpyAttributes`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Attributes {
    /// When the driver reads the sources: 1 in stream order, 2 during the call, 3 at any time.
    order: u32,
    hints: [u32; 4],
    flags: u32,
}

/// `CUDA_MEMCPY2D`.
#[derive(Clone, Copy)]
#[repr(C)]
struct RowCopy {
    from: Side,
    to: Side,
    width: usize,
    height: usize,
}

/// One side of a copy of rows.
#[derive(Clone, Copy)]
#[repr(C)]
struct Side {
    x: usize,
    y: usize,
    kind: u32,
    host: u64,
    device: u64,
    array: u64,
    pitch: usize,
}

impl Side {
    /// The longest distance between rows that the device supports.
    const PITCH_MAX: usize = i32::MAX as usize;

    /// The address of the first row, and whether that address is on a device.
    fn begin(self, width: usize) -> Status<(u64, bool)> {
        let (base, on_device) = match self.kind {
            1 => (self.host, false),
            2 => (self.device, true),
            _ => return Err(INVALID_VALUE),
        };
        if self.pitch > Self::PITCH_MAX || self.x + width > self.pitch {
            return Err(INVALID_VALUE);
        }
        Ok((base + (self.y * self.pitch + self.x) as u64, on_device))
    }
}

/// Enqueues the rows one by one, if all of them are within memory.
fn rows(copy: RowCopy, stream: u64) -> Status {
    let RowCopy { from, to, width, height } = copy;
    let ((from_base, from_kind), (to_base, to_kind)) = (from.begin(width)?, to.begin(width)?);
    let row = |base: u64, pitch: usize, row: usize| base + (row * pitch) as u64;
    if let (Some(last), true) = (height.checked_sub(1), width > 0) {
        Spot::of(row(from_base, from.pitch, last), width as u64)?;
        Spot::of(row(to_base, to.pitch, last), width as u64)?;
    }
    let each = |i| ((row(to_base, to.pitch, i), to_kind), (row(from_base, from.pitch, i), from_kind));
    (0..height).map(each).try_for_each(|(to, from)| between(to, from, width, stream, false))
}

/// Enqueues a copy. If either end is pageable memory, the host waits for the copy.
fn copy(to: u64, from: u64, bytes: usize, stream: u64, block: bool) -> Status {
    if bytes == 0 {
        return find(stream).map(drop);
    }
    let bytes = bytes as u64;
    let (to, from) = (Spot::of(to, bytes)?, Spot::of(from, bytes)?);
    let pageable = matches!(to, Spot::Pageable(_)) || matches!(from, Spot::Pageable(_));
    if let (Spot::Pinned(address, range), false) = (to, block) {
        let (device, id) = find(stream)?;
        let poisoned = {
            let state = device.state();
            state.settings.poison && state.sticky.is_none() && state.capture_status(id) == 0
        };
        if poisoned && bytes >= POISONED_MIN {
            let _in_use = crate::host::InUse::new(range)?;
            // SAFETY: the caller gave the destination to the driver, and the memory stays pinned while it is
            // in use.
            unsafe { std::ptr::write_bytes(address as *mut u8, POISON, bytes as usize) };
        }
    }
    enqueue(stream, Work::Copy { to, from, bytes }, block || pageable)
}

/// A copy between the kinds of memory in the function's name.
fn between(to: (u64, bool), from: (u64, bool), bytes: usize, stream: u64, block: bool) -> Status {
    let right = |(address, on_device): (u64, bool)| crate::device::holding(address).is_some() == on_device;
    // The device address of pinned memory is its host address.
    let mapped = |(address, on_device)| on_device && crate::host::find(address, bytes as u64).is_some();
    if bytes > 0 && ![to, from].into_iter().all(|end| right(end) || mapped(end)) {
        return Err(INVALID_VALUE);
    }
    copy(to.0, from.0, bytes, stream, block)
}

fn fill(to: u64, value: u8, bytes: usize, stream: u64) -> Status {
    if bytes == 0 {
        return find(stream).map(drop);
    }
    let to = Spot::of(to, bytes as u64)?;
    if matches!(to, Spot::Pageable(_)) {
        return Err(INVALID_VALUE);
    }
    enqueue(stream, Work::Fill { to, value, bytes: bytes as u64 }, false)
}

fn write(stream: u64, address: u64, value: u64, bytes: u64, flags: u32) -> Status {
    let to = aligned(address, bytes)?;
    if flags > 1 {
        return Err(INVALID_VALUE);
    }
    enqueue(stream, Work::Write { to, value, bytes }, false)
}

/// Checks that a stream may read or write a single value at `address`.
fn aligned(address: u64, bytes: u64) -> Status<Spot> {
    let spot = Spot::of(address, bytes)?;
    let wrong = !address.is_multiple_of(bytes) || matches!(spot, Spot::Pageable(_));
    if wrong { Err(INVALID_VALUE) } else { Ok(spot) }
}

/// The arguments of a batch of copies.
struct Batch {
    to: *const u64,
    from: *const u64,
    bytes: *const usize,
    count: usize,
    attributes: *const Attributes,
    /// Index of the first copy to which each of the attributes applies.
    starts: *const usize,
    kinds: usize,
}

/// Enqueues a batch. Its copies have no order; this driver runs the last copy first.
fn batch(batch: Batch, stream: u64) -> Status {
    let Batch { to, from, bytes, count, attributes, starts, kinds } = batch;
    if stream < 2 || count == 0 || kinds == 0 || kinds > count {
        return Err(INVALID_VALUE);
    }
    let (device, id) = find(stream)?;
    if device.state().capture_status(id) != 0 {
        return Err(CAPTURE_UNSUPPORTED);
    }
    let (attributes, starts) = (take(attributes, kinds)?, take(starts, kinds)?);
    let known = attributes.iter().all(|a| (1..=3).contains(&a.order) && a.flags <= 1);
    if !known || starts[0] != 0 || !starts.is_sorted_by(|a, b| a < b) {
        return Err(INVALID_VALUE);
    }
    let (to, from, bytes) = (take(to, count)?, take(from, count)?, take(bytes, count)?);
    // All copies are checked before any is enqueued.
    for i in 0..count {
        Spot::of(to[i], bytes[i] as u64)?;
        Spot::of(from[i], bytes[i] as u64)?;
    }
    let orders = |i: usize| attributes[starts.partition_point(|&s| s <= i) - 1].order;
    (0..count).rev().try_for_each(|i| copy(to[i], from[i], bytes[i], stream, orders(i) == 2))
}

export! {
    context fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) {
        between((to, false), (from, true), bytes, stream, false)
    }

    context fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) {
        between((to, true), (from, false), bytes, stream, false)
    }

    context fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) {
        between((to, true), (from, true), bytes, stream, false)
    }

    context fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: u64) {
        copy(to, from, bytes, stream, false)
    }

    context fn cuMemcpy2DAsync_v2(copy: *const RowCopy, stream: u64) {
        take(copy, 1)?.into_iter().try_for_each(|copy| rows(copy, stream))
    }

    quiet fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) {
        between((to, false), (from, true), bytes, 0, true)
    }

    quiet fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) {
        between((to, true), (from, false), bytes, 0, true)
    }

    quiet fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) {
        between((to, true), (from, true), bytes, 0, false)
    }

    quiet fn cuMemcpy(to: u64, from: u64, bytes: usize) {
        copy(to, from, bytes, 0, true)
    }

    context fn cuMemcpyBatchAsync(
        to: *const u64, from: *const u64, bytes: *const usize, count: usize, attributes: *const Attributes,
        starts: *const usize, kinds: usize, _failed: *mut usize, stream: u64,
    ) {
        batch(Batch { to, from, bytes, count, attributes, starts, kinds }, stream)
    }

    context fn cuMemcpyBatchAsync_v2(
        to: *const u64, from: *const u64, bytes: *const usize, count: usize, attributes: *const Attributes,
        starts: *const usize, kinds: usize, stream: u64,
    ) {
        batch(Batch { to, from, bytes, count, attributes, starts, kinds }, stream)
    }

    context fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: u64) {
        fill(to, value, count, stream)
    }

    quiet fn cuMemsetD8_v2(to: u64, value: u8, count: usize) {
        fill(to, value, count, 0)?;
        current()?.state().healthy()
    }

    context fn cuStreamWriteValue32_v2(stream: u64, address: u64, value: u32, flags: u32) {
        write(stream, address, u64::from(value), 4, flags)
    }

    context fn cuStreamWriteValue64_v2(stream: u64, address: u64, value: u64, flags: u32) {
        write(stream, address, value, 8, flags)
    }

    context fn cuStreamWaitValue32_v2(stream: u64, address: u64, value: u32, flags: u32) {
        let at = aligned(address, 4)?;
        // Bit 30 asks to flush remote writes.
        let test = flags & !(1 << 30);
        if test > 3 {
            return Err(INVALID_VALUE);
        }
        let (device, id) = find(stream)?;
        if device.state().capture_status(id) != 0 {
            return Err(CAPTURE_UNSUPPORTED);
        }
        enqueue(stream, Work::Await { at, value, test }, false)
    }
}
