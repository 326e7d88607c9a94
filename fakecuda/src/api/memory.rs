//! Device memory and pinned host memory.

use crate::abi::{INVALID_VALUE, put};
use crate::call::current;
use crate::device::holding;
use crate::exported::export;
use crate::host;
use crate::stream::enqueue;
use crate::work::Work;

export! {
    quiet fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        put(address, allocate(bytes)?)
    }

    quiet fn cuMemFree_v2(address: u64) {
        let device = holding(address).ok_or(INVALID_VALUE)?;
        device.state().heap.free(device.window()?, address)
    }

    context fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: u64) {
        // The address is available at once and is new, so its first use needs no order.
        enqueue(stream, Work::Nothing, false)?;
        put(address, allocate(bytes)?)
    }

    context fn cuMemFreeAsync(address: u64, stream: u64) {
        let device = holding(address).ok_or(INVALID_VALUE)?;
        let block = device.state().heap.leave(address)?;
        enqueue(stream, Work::Free(block), false)
    }

    context fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        let device = current()?;
        let state = device.state();
        let all = state.settings.mem_mb << 20;
        put(free, all.saturating_sub(state.heap.used) as usize)?;
        put(total, all as usize)
    }

    quiet fn cuMemHostAlloc(address: *mut u64, bytes: usize, flags: u32) {
        if flags & !7 != 0 {
            return Err(INVALID_VALUE);
        }
        put(address, host::allocate(bytes, current()?.ordinal)?)
    }

    quiet fn cuMemFreeHost(address: u64) {
        host::release(address, true).map(drop)
    }

    quiet fn cuMemHostRegister_v2(address: u64, bytes: usize, flags: u32) {
        if flags & !15 != 0 {
            return Err(INVALID_VALUE);
        }
        host::register(address, bytes as u64, current()?.ordinal)
    }

    quiet fn cuMemHostUnregister(address: u64) {
        host::release(address, false).map(drop)
    }

    context fn cuMemHostGetDevicePointer_v2(device: *mut u64, address: u64, _flags: u32) {
        host::find(address, 1).ok_or(INVALID_VALUE)?;
        put(device, address)
    }
}

fn allocate(bytes: usize) -> crate::abi::Status<u64> {
    let device = current()?;
    let mut state = device.state();
    let settings = state.settings.clone();
    state.heap.allocate(device.window()?, bytes as u64, settings.mem_mb << 20, settings.reuse, settings.poison)
}
