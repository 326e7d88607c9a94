//! Initialisation, devices and contexts.

use crate::abi::{INVALID_DEVICE, INVALID_VALUE, Kind, NOT_FOUND, Status, describe, handle, ordinal_of, put, text};
use crate::call::{CONTEXTS, INITIALIZED, count, current};
use crate::device::{Device, all, get};
use crate::exported::export;
use crate::settings::number;
use crate::stream::wait_for;
use std::ffi::{CString, c_char, c_void};
use std::sync::atomic::Ordering;

export! {
    nothing fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        match number("init") {
            Some(code) if code != 0 => return Err(code as i32),
            _ if all().is_empty() => return Err(100),
            _ => {}
        }
        INITIALIZED.store(true, Ordering::Release);
        Ok(())
    }

    nothing fn cuDriverGetVersion(version: *mut i32) {
        put(version, number("version").unwrap_or(13_000) as i32)
    }

    nothing fn cuGetErrorName(code: i32, name: *mut *const c_char) {
        put(name, describe(code).map_or(std::ptr::null(), |d| d.0.as_ptr()))?;
        describe(code).map(drop).ok_or(INVALID_VALUE)
    }

    nothing fn cuGetErrorString(code: i32, name: *mut *const c_char) {
        put(name, describe(code).map_or(std::ptr::null(), |d| d.1.as_ptr()))?;
        describe(code).map(drop).ok_or(INVALID_VALUE)
    }

    nothing fn cuGetProcAddress_v2(
        symbol: *const c_char, address: *mut *mut c_void, version: i32, _flags: u64, status: *mut i32,
    ) {
        let name = text(symbol)?;
        // The driver chooses the version suffix: the newest that exists in the requested version.
        let newer = if name == "cuMemcpyBatchAsync" && version < 13_000 { name.clone() } else { format!("{name}_v2") };
        let found = [newer, name].iter().map(|name| symbol_named(name)).find(|found| !found.is_null());
        put(address, found.unwrap_or(std::ptr::null_mut()))?;
        if !status.is_null() {
            put(status, i32::from(found.is_none()))?;
        }
        found.map(drop).ok_or(NOT_FOUND)
    }

    init fn cuDeviceGetCount(count: *mut i32) {
        put(count, all().len() as i32)
    }

    init fn cuDeviceGet(device: *mut i32, ordinal: i32) {
        named(ordinal, "cuDeviceGet")?;
        put(device, ordinal)
    }

    init fn cuDeviceGetName(name: *mut c_char, bytes: i32, device: i32) {
        named(device, "cuDeviceGetName")?;
        let full = b"Simulated device\0";
        let kept = full.len().min(usize::try_from(bytes).map_err(|_| INVALID_VALUE)?);
        (0..kept).try_for_each(|i| put(name.wrapping_add(i), full[i] as c_char))
    }

    init fn cuDeviceGetUuid_v2(uuid: *mut u8, device: i32) {
        named(device, "cuDeviceGetUuid_v2")?;
        let bytes = *b"simulated device";
        let last = bytes.len() - 1;
        (0..last).try_for_each(|i| put(uuid.wrapping_add(i), bytes[i]))?;
        put(uuid.wrapping_add(last), device as u8)
    }

    init fn cuDeviceGetAttribute(value: *mut i32, attribute: i32, device: i32) {
        named(device, "cuDeviceGetAttribute")?;
        put(value, attribute_of(attribute, device))
    }

    init fn cuDeviceTotalMem_v2(bytes: *mut usize, device: i32) {
        let megabytes = named(device, "cuDeviceTotalMem_v2")?.state().settings.mem_mb;
        put(bytes, (megabytes as usize) << 20)
    }

    init fn cuDeviceGetPCIBusId(name: *mut c_char, bytes: i32, device: i32) {
        named(device, "cuDeviceGetPCIBusId")?;
        let full = format!("0000:{:02X}:00.0\0", device + 1);
        if (bytes as usize) < full.len() {
            return Err(INVALID_VALUE);
        }
        full.bytes().enumerate().try_for_each(|(i, b)| put(name.wrapping_add(i), b as c_char))
    }

    init fn cuDevicePrimaryCtxRetain(context: *mut u64, device: i32) {
        put(context, named(device, "cuDevicePrimaryCtxRetain")?.retain()?)
    }

    init fn cuDevicePrimaryCtxRelease_v2(device: i32) {
        named(device, "cuDevicePrimaryCtxRelease_v2")?.release()
    }

    init fn cuDevicePrimaryCtxGetState(device: i32, flags: *mut u32, active: *mut i32) {
        let alive = named(device, "cuDevicePrimaryCtxGetState")?.state().retained > 0;
        put(flags, 0)?;
        put(active, i32::from(alive))
    }

    init fn cuCtxSetCurrent(context: u64) {
        let ordinal = if context == 0 { None } else { Some(ordinal_of(Kind::Context, context)?) };
        ordinal.map(|o| named(o as i32, "cuCtxSetCurrent")).transpose()?;
        CONTEXTS.with_borrow_mut(|c| {
            c.pop();
            c.extend(ordinal);
        });
        Ok(())
    }

    init fn cuCtxPushCurrent_v2(context: u64) {
        let ordinal = ordinal_of(Kind::Context, context)?;
        CONTEXTS.with_borrow_mut(|c| c.push(ordinal));
        Ok(())
    }

    init fn cuCtxPopCurrent_v2(context: *mut u64) {
        let popped = CONTEXTS.with_borrow_mut(Vec::pop).ok_or(crate::abi::INVALID_CONTEXT)?;
        put(context, handle(Kind::Context, popped, 1))
    }

    init fn cuCtxGetCurrent(context: *mut u64) {
        let ordinal = CONTEXTS.with_borrow(|c| c.last().copied());
        put(context, ordinal.map_or(0, |o| handle(Kind::Context, o, 1)))
    }

    context fn cuCtxGetDevice(device: *mut i32) {
        put(device, current()?.ordinal as i32)
    }

    context fn cuCtxGetStreamPriorityRange(least: *mut i32, greatest: *mut i32) {
        put(least, 0)?;
        put(greatest, -5)
    }

    quiet fn cuCtxSynchronize() {
        let device = current()?;
        let ends: Vec<_> = device.state().streams.iter().map(|(&id, s)| (id, s.enqueued)).collect();
        ends.into_iter().try_for_each(|(id, seq)| wait_for(device, device.state(), id, seq))
    }
}

/// Returns the device that a call names. If no context is current, counts the call for that device.
fn named(ordinal: i32, name: &'static str) -> Status<&'static Device> {
    let device = get(usize::try_from(ordinal).map_err(|_| INVALID_DEVICE)?)?;
    if CONTEXTS.with_borrow(|c| c.is_empty()) {
        count(device, name)?;
    }
    Ok(device)
}

/// The values of an H200 for the attributes that ashore may query; 0 for all other attributes.
fn attribute_of(attribute: i32, device: i32) -> i32 {
    match attribute {
        1..=3 => 1024,                          // threads of a block, in all and by x and y
        4 => 64,                                // by z
        5 => i32::MAX,                          // blocks of a grid by x
        6 | 7 => 65_535,                        // by y and z
        10 => 32,                               // threads of a warp
        16 => 4,                                // multiprocessors: what fills the device is small here
        39 => 2048,                             // threads of one
        40 => 3,                                // copy engines
        33 => device + 1,                       // PCI bus
        75 => 9,                                // compute capability 9.0
        19 | 31 | 41 | 78 | 83 | 89 | 115 => 1, // mapped host memory, concurrency, one address space, priorities, pools
        // Device pointers of registered memory equal host pointers. Stream memory operations of the second
        // kind are on; those of the first kind are off.
        91 | 122 | 123 => 1,
        _ => 0,
    }
}

/// Finds a symbol in this library itself.
fn symbol_named(name: &str) -> *mut c_void {
    let Ok(name) = CString::new(name) else { return std::ptr::null_mut() };
    let inside: extern "C" fn(u32) -> i32 = cuInit;
    let mut found = libc::Dl_info {
        dli_fname: std::ptr::null(),
        dli_fbase: std::ptr::null_mut(),
        dli_sname: std::ptr::null(),
        dli_saddr: std::ptr::null_mut(),
    };
    // SAFETY: `dladdr` accepts any address. `dli_fname` is then the path under which this library was opened,
    // and `dlopen` finds that path again without loading anything.
    unsafe {
        if libc::dladdr(inside as *const c_void, &mut found) == 0 {
            return std::ptr::null_mut();
        }
        let library = libc::dlopen(found.dli_fname, libc::RTLD_NOLOAD | libc::RTLD_NOW);
        if library.is_null() { std::ptr::null_mut() } else { libc::dlsym(library, name.as_ptr()) }
    }
}
