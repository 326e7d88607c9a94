//! The memory of a target, and how several boxes of a tensor share it.
//!
//! **Protocol.** Boxes whose bytes lie side by side in the target get a range of its memory each, before
//! anything is read. The bytes of other boxes interleave, down to single elements. Their threads copy through
//! *bands*: stretches of the target with a lock each. A thread holds one lock at a time, and only while it
//! copies.

use super::region::Region;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The length of a band: so short that threads of neighbouring boxes seldom meet, and so long that locking
/// costs nothing beside the copying.
const BAND: u64 = 256 << 10;

/// Memory of a target, or a part of it.
pub(super) enum Share<'t> {
    /// Host memory for this part alone, filled from its start.
    Host(&'t mut [u8]),
    /// `bytes` bytes of host memory that the parts of other boxes fill as well, at the places `into`.
    Bands { target: Arc<Bands<'t>>, into: Arc<Region>, bytes: u64 },
    /// `bytes` bytes of device memory, from `address` on; or the places `into` of the memory there.
    Device { ordinal: u32, address: u64, into: Option<Arc<Region>>, bytes: u64 },
}

impl<'t> Share<'t> {
    pub fn len(&self) -> u64 {
        match self {
            Self::Host(to) => to.len() as u64,
            Self::Bands { bytes, .. } | Self::Device { bytes, .. } => *bytes,
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
            Self::Device { ordinal, address, into, bytes } => {
                let share = Self::Device { ordinal: *ordinal, address: *address, into: into.clone(), bytes: len };
                *address += if into.is_none() { len } else { 0 };
                *bytes -= len;
                share
            }
        }
    }

    /// Divides the memory of a whole target among boxes, which fill the places `boxes`, each byte once. They
    /// are in ascending order of their first bytes.
    pub fn divide(mut self, boxes: Vec<Region>) -> Vec<Self> {
        if boxes.iter().all(Region::is_contiguous) {
            return boxes.iter().map(|place| self.take(place.len())).collect();
        }
        let shares = boxes.into_iter().map(|place| (place.len(), Arc::new(place)));
        match self {
            Self::Host(to) => {
                let target = Arc::new(Bands(to.chunks_mut(BAND as usize).map(Mutex::new).collect()));
                shares.map(|(bytes, into)| Self::Bands { target: target.clone(), into, bytes }).collect()
            }
            Self::Device { ordinal, address, .. } => {
                shares.map(|(bytes, into)| Self::Device { ordinal, address, into: Some(into), bytes }).collect()
            }
            Self::Bands { target, .. } => {
                shares.map(|(bytes, into)| Self::Bands { target: target.clone(), into, bytes }).collect()
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
            // Unlock one before locking the next.
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
