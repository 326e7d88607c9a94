//! Attributes of pointers.

use crate::abi::{INVALID_VALUE, Kind, Status, handle, put, take};
use crate::device::holding;
use crate::exported::export;
use crate::host;

/// The allocation to which an address belongs.
struct Owner {
    on_device: bool,
    ordinal: usize,
    start: u64,
    bytes: u64,
    id: u64,
}

fn owner(address: u64) -> Status<Owner> {
    if let Some(device) = holding(address) {
        let block = device.state().heap.find(address, 1)?;
        let id = block.id << 8 | device.ordinal as u64;
        return Ok(Owner { on_device: true, ordinal: device.ordinal, start: block.start, bytes: block.bytes, id });
    }
    let range = host::find(address, 1).ok_or(INVALID_VALUE)?;
    let id = 1 << 63 | range.id;
    Ok(Owner { on_device: false, ordinal: range.ordinal, start: range.start, bytes: range.bytes, id })
}

/// Writes one attribute. For an unknown address, only the attributes that report this have a value.
fn attribute(data: *mut u8, attribute: u32, address: u64, owner: Option<&Owner>) -> Status {
    let or_zero = |value: fn(&Owner) -> u64| owner.map_or(0, value);
    match attribute {
        1 => put(data.cast(), or_zero(|o| handle(Kind::Context, o.ordinal, 1))),
        2 => put(data.cast(), or_zero(|o| 1 + u64::from(o.on_device)) as u32),
        3 => put(data.cast(), owner.map_or(0, |_| address)),
        4 => put(data.cast(), owner.filter(|o| !o.on_device).map_or(0, |_| address)),
        6 | 8 => put(data.cast(), 0_u32),
        7 => put(data.cast(), or_zero(|o| o.id)),
        9 => put(data.cast(), owner.map_or(-2, |o| o.ordinal as i32)),
        11 => put(data.cast(), or_zero(|o| o.start)),
        12 => put(data.cast(), or_zero(|o| o.bytes)),
        13 => put(data.cast(), u32::from(owner.is_some())),
        _ => Err(INVALID_VALUE),
    }
}

export! {
    init fn cuPointerGetAttribute(data: *mut u8, asked: u32, address: u64) {
        attribute(data, asked, address, Some(&owner(address)?))
    }

    init fn cuPointerGetAttributes(count: u32, asked: *const u32, data: *const *mut u8, address: u64) {
        let owner = owner(address).ok();
        let (asked, data) = (take(asked, count as usize)?, take(data, count as usize)?);
        asked.into_iter().zip(data).try_for_each(|(asked, data)| attribute(data, asked, address, owner.as_ref()))
    }

    context fn cuMemGetAddressRange_v2(base: *mut u64, bytes: *mut usize, address: u64) {
        let owner = owner(address)?;
        if !base.is_null() {
            put(base, owner.start)?;
        }
        if bytes.is_null() { Ok(()) } else { put(bytes, owner.bytes as usize) }
    }
}
