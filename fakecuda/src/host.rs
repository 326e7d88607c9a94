//! Pinned host memory, allocated or registered by the driver. Copies may touch it while the program
//! continues. There is one table for all devices, because each device uses the same addresses for this
//! memory.

use crate::abi::{ALREADY_REGISTERED, ILLEGAL_ADDRESS, INVALID_VALUE, NOT_REGISTERED, OUT_OF_MEMORY, Status};
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A pinned range.
#[derive(Clone, Copy)]
pub struct Range {
    pub start: u64,
    pub bytes: u64,
    /// Never reused.
    pub id: u64,
    /// The device whose context pinned the range.
    pub ordinal: usize,
    /// True if the driver allocated the memory; false if it is only registered.
    pub owned: bool,
    /// Number of copies and kernels that use it now.
    users: u32,
}

#[derive(Default)]
struct Table {
    ranges: BTreeMap<u64, Range>,
    ids: u64,
}

static TABLE: Mutex<Table> = Mutex::new(Table { ranges: BTreeMap::new(), ids: 0 });
static UNUSED: Condvar = Condvar::new();

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Table {
    fn insert(&mut self, start: u64, bytes: u64, ordinal: usize, owned: bool) {
        self.ids += 1;
        // An owned range is a fresh mapping. So an older range at this place was unmapped by a program that
        // could not unpin it.
        let gone = |r: &Range| owned && r.start < start + bytes && start < r.start + r.bytes;
        self.ranges.retain(|_, r| !gone(r));
        self.ranges.insert(start, Range { start, bytes, id: self.ids, ordinal, owned, users: 0 });
    }
}

/// Allocates page-aligned, pinned memory.
pub fn allocate(bytes: usize, ordinal: usize) -> Status<u64> {
    if bytes == 0 {
        return Err(INVALID_VALUE);
    }
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh anonymous mapping touches no existing memory.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if at == libc::MAP_FAILED {
        return Err(OUT_OF_MEMORY);
    }
    table().insert(at as u64, bytes as u64, ordinal, true);
    Ok(at as u64)
}

/// Pins memory of the program.
pub fn register(start: u64, bytes: u64, ordinal: usize) -> Status {
    if start == 0 || bytes == 0 {
        return Err(INVALID_VALUE);
    }
    let mut table = table();
    let before = table.ranges.range(..start + bytes).next_back();
    if before.is_some_and(|(_, r)| r.start + r.bytes > start) {
        return Err(ALREADY_REGISTERED);
    }
    table.insert(start, bytes, ordinal, false);
    Ok(())
}

/// Removes a range once no running work uses it. Work that is only enqueued will fail.
pub fn release(start: u64, owned: bool) -> Status<Range> {
    let wrong = if owned { INVALID_VALUE } else { NOT_REGISTERED };
    let mut table = table();
    loop {
        let range = *table.ranges.get(&start).filter(|r| r.owned == owned).ok_or(wrong)?;
        if range.users == 0 {
            table.ranges.remove(&start);
            if owned {
                // SAFETY: mapped by `allocate`, no longer in the table, and not used by any running work.
                unsafe { libc::munmap(start as *mut _, range.bytes as usize) };
            }
            return Ok(range);
        }
        table = UNUSED.wait(table).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Finds the pinned range that contains all of `bytes` at `address`.
pub fn find(address: u64, bytes: u64) -> Option<Range> {
    let table = table();
    let range = table.ranges.range(..=address).next_back().map(|(_, r)| *r)?;
    (bytes <= range.bytes && address - range.start <= range.bytes - bytes).then_some(range)
}

/// A guard against the release of a range in use. It has the range's start and id, because after a reset
/// another range may start at the same address.
pub struct InUse(u64, u64);

impl InUse {
    /// Fails when the range is gone, or another range has its start.
    pub fn new(range: Range) -> Status<Self> {
        let mut table = table();
        let found = table.ranges.get_mut(&range.start).filter(|r| r.id == range.id).ok_or(ILLEGAL_ADDRESS)?;
        found.users += 1;
        Ok(Self(range.start, range.id))
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(range) = table().ranges.get_mut(&self.0).filter(|range| range.id == self.1) {
            range.users -= 1;
        }
        UNUSED.notify_all();
    }
}

pub fn ranges() -> Vec<Range> {
    table().ranges.values().copied().collect()
}
