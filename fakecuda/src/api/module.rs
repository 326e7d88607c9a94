//! Modules and launches.

use crate::abi::{INVALID_HANDLE, INVALID_PTX, INVALID_VALUE, Kind, NOT_FOUND, Status, ordinal_of, put, take, text};
use crate::call::current;
use crate::device::get;
use crate::exported::export;
use crate::kernel::{self, Launch};
use crate::module::parse;
use crate::stream::enqueue;
use crate::work::Work;
use std::ffi::{c_char, c_void};
use std::sync::Arc;

export! {
    context fn cuModuleLoadData(module: *mut u64, image: *const c_char) {
        load(module, image)
    }

    context fn cuModuleLoadDataEx(
        module: *mut u64, image: *const c_char, _options: u32, _names: *const i32, _values: *const *mut c_void,
    ) {
        load(module, image)
    }

    context fn cuModuleGetFunction(function: *mut u64, module: u64, name: *const c_char) {
        let device = get(ordinal_of(Kind::Module, module)?)?;
        let mut state = device.state();
        let name = text(name)?;
        let bytes = *state.modules.get(&module).ok_or(INVALID_HANDLE)?.get(&name).ok_or(NOT_FOUND)?;
        let kernel = kernel::find(&name).ok_or(NOT_FOUND)?;
        // The PTX was built from a different source than the kernel compiled here.
        if kernel.bytes() != bytes {
            return Err(INVALID_PTX);
        }
        let id = state.serial(Kind::Function, device.ordinal);
        state.functions.insert(id, kernel);
        put(function, id)
    }

    context fn cuModuleUnload(module: u64) {
        let device = get(ordinal_of(Kind::Module, module)?)?;
        device.state().modules.remove(&module).map(drop).ok_or(INVALID_HANDLE)
    }

    context fn cuLaunchKernel(
        function: u64, grid_x: u32, grid_y: u32, grid_z: u32, block_x: u32, block_y: u32, block_z: u32, _shared: u32,
        stream: u64, parameters: *const *const u8, extra: *const *const c_void,
    ) {
        let device = get(ordinal_of(Kind::Function, function)?)?;
        let kernel = *device.state().functions.get(&function).ok_or(INVALID_HANDLE)?;
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let threads = block.iter().try_fold(1_u32, |n, &b| n.checked_mul(b)).unwrap_or(0);
        let too_tall = grid[1] > 65_535 || grid[2] > 65_535 || block[2] > 64;
        if grid.contains(&0) || threads == 0 || threads > 1024 || too_tall || !extra.is_null() {
            return Err(INVALID_VALUE);
        }
        let argument = if kernel.bytes() == 0 { Vec::new() } else { take(take(parameters, 1)?[0], kernel.bytes())? };
        enqueue(stream, Work::Launch(Arc::new(Launch { kernel, grid, block, argument })), false)
    }
}

fn load(module: *mut u64, image: *const c_char) -> Status {
    let parsed = parse(&text(image)?)?;
    let device = current()?;
    let mut state = device.state();
    let id = state.serial(Kind::Module, device.ordinal);
    state.modules.insert(id, parsed);
    put(module, id)
}
