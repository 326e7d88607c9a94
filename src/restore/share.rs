//! The memory of a target, and how several boxes of a tensor share it.
//!
//! **Protocol.** Boxes whose bytes lie side by side in the target get a range of its memory each, before
//! anything is read. The bytes of other boxes interleave, down to single elements. Their threads copy through
//! *bands*: stretches of the target with a lock each. A thread holds one lock at a time, and only while it
//! copies.

use super::region::Region;
use super::strided::{Address, DeviceElements, Elements, HostElements, Strides};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The length of a band: short, so that threads of neighbouring boxes seldom meet, and long enough that the
/// cost of locking is negligible beside the copying.
const BAND: u64 = 256 << 10;

/// The memory of a target.
pub(super) enum Memory<'t> {
    Host(&'t mut [u8]),
    Device { ordinal: u32, address: u64, bytes: u64 },
    Strided { first: Address, strides: Strides },
}

/// Where a box lies in a target.
pub(super) struct BoxPlace {
    /// The places of its bytes, if the target is packed.
    pub bytes: Region,
    /// Its indices in each dimension of the target.
    pub indices: Vec<Range<usize>>,
}

fn strided<'t>((elements, bytes): (Elements, u64)) -> Share<'t> {
    match elements {
        Elements::Host(to) => Share::Strided { to, bytes },
        Elements::Device(to) => Share::DeviceStrided { to, bytes },
    }
}

impl<'t> Memory<'t> {
    pub fn is_on_device(&self) -> bool {
        matches!(self, Self::Device { .. } | Self::Strided { first: Address::Device { .. }, .. })
    }

    /// All of it, for one box.
    pub fn whole(self) -> Share<'t> {
        match self {
            Self::Host(to) => Share::Host(to),
            Self::Device { ordinal, address, bytes } => Share::Device { ordinal, address, into: None, bytes },
            Self::Strided { first, strides } => strided(first.elements(&strides, None)),
        }
    }

    /// Divides the memory among boxes, which fill each byte once. `boxes` is in ascending order of the first
    /// bytes.
    pub fn divide(self, boxes: Vec<BoxPlace>) -> Vec<Share<'t>> {
        let side_by_side = boxes.iter().all(|place| place.bytes.is_contiguous());
        match self {
            Self::Strided { first, strides } => {
                boxes.iter().map(|place| strided(first.elements(&strides, Some(&place.indices)))).collect()
            }
            packed if side_by_side => {
                let mut all = packed.whole();
                boxes.iter().map(|place| all.take(place.bytes.len())).collect()
            }
            Self::Host(to) => {
                let target = Arc::new(Bands(to.chunks_mut(BAND as usize).map(Mutex::new).collect()));
                shares(boxes, |bytes, into| Share::Bands { target: target.clone(), into, bytes })
            }
            Self::Device { ordinal, address, .. } => {
                shares(boxes, |bytes, into| Share::Device { ordinal, address, into: Some(into), bytes })
            }
        }
    }
}

fn shares<'t>(boxes: Vec<BoxPlace>, share: impl Fn(u64, Arc<Region>) -> Share<'t>) -> Vec<Share<'t>> {
    boxes.into_iter().map(|place| share(place.bytes.len(), Arc::new(place.bytes))).collect()
}

/// Memory of a target, or a part of it, for the bytes of one box.
pub(super) enum Share<'t> {
    /// Host memory for this part alone, filled from its start.
    Host(&'t mut [u8]),
    /// `bytes` bytes of host memory that the parts of other boxes fill as well, at the places `into`.
    Bands { target: Arc<Bands<'t>>, into: Arc<Region>, bytes: u64 },
    /// `bytes` bytes of elements in host memory.
    Strided { to: HostElements, bytes: u64 },
    /// `bytes` bytes of elements in device memory.
    DeviceStrided { to: DeviceElements, bytes: u64 },
    /// `bytes` bytes of device memory from `address` on, or the places `into` of the memory there.
    Device { ordinal: u32, address: u64, into: Option<Arc<Region>>, bytes: u64 },
}

impl<'t> Share<'t> {
    pub fn len(&self) -> u64 {
        match self {
            Self::Host(to) => to.len() as u64,
            Self::Bands { bytes, .. }
            | Self::Strided { bytes, .. }
            | Self::DeviceStrided { bytes, .. }
            | Self::Device { bytes, .. } => *bytes,
        }
    }

    /// Splits off the first `len` bytes.
    pub fn take(&mut self, len: u64) -> Self {
        match self {
            Self::Host(to) => {
                let (share, rest) = std::mem::take(to).split_at_mut(len as usize);
                *to = rest;
                Self::Host(share)
            }
            Self::Bands { target, into, bytes } => {
                *bytes -= len;
                Self::Bands { target: target.clone(), into: into.clone(), bytes: len }
            }
            Self::Strided { to, bytes } => {
                *bytes -= len;
                Self::Strided { to: to.clone(), bytes: len }
            }
            Self::DeviceStrided { to, bytes } => {
                *bytes -= len;
                Self::DeviceStrided { to: to.clone(), bytes: len }
            }
            Self::Device { ordinal, address, into, bytes } => {
                let share = Self::Device { ordinal: *ordinal, address: *address, into: into.clone(), bytes: len };
                *address += if into.is_none() { len } else { 0 };
                *bytes -= len;
                share
            }
        }
    }
}

/// The host memory of a target whose boxes interleave.
pub(super) struct Bands<'t>(Vec<Mutex<&'t mut [u8]>>);

/// The band that a thread copies into, and its number.
pub(super) type Held<'b, 't> = Option<(u64, MutexGuard<'b, &'t mut [u8]>)>;

impl<'t> Bands<'t> {
    /// Copies `from` to offset `at` of the target, up to the end of a band. Returns how many bytes it copied:
    /// 0 outside the target.
    pub fn copy<'b>(&'b self, held: &mut Held<'b, 't>, at: u64, from: &[u8]) -> usize {
        let (band, skip) = (at / BAND, (at % BAND) as usize);
        if held.as_ref().is_none_or(|(number, _)| *number != band) {
            // Unlock one band before locking the next.
            *held = None;
            let next = usize::try_from(band).ok().and_then(|band| self.0.get(band));
            *held = next.map(|next| (band, next.lock().unwrap_or_else(PoisonError::into_inner)));
        }
        let Some(to) = held.as_mut().and_then(|(_, memory)| memory.get_mut(skip..)) else { return 0 };
        let len = to.len().min(from.len());
        to[..len].copy_from_slice(&from[..len]);
        len
    }
}
