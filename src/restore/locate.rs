//! Locates damage: which bits or pages of a block are not what was written.
//!
//! The bytes are read a second time from the medium, through a newly opened file: past the page cache, or
//! after the cached pages of the file were dropped. If the second reading is as written, or differs from the
//! first, the fault is in memory, in a controller or in a cable, not on the medium. If both readings are the
//! same, the digests show whether one flip explains them ([`Flip`]).

use super::piece::{Window, stream, zeroed};
use super::verify::Damage;
use crate::checkpoint::Checkpoint;
use crate::digest::{Digest, Flip, LONGEST, explain};
use crate::error::Result;
use crate::format::entries::TensorEntry;
use serde::Serialize;

/// The unit in which bytes that are all zero are counted.
const PAGE: usize = 4096;

/// The result of a second reading of damaged bytes; see [`Checkpoint::locate`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Located {
    /// How the second reading compares with the first.
    pub again: Again,
    /// The only bit, byte or run of up to 16 bits that explains both digests, by its offset in the file; None
    /// if the readings differ or there is none.
    pub flip: Option<Flip>,
    /// The elements of the tensor that the flip changes.
    pub elements: Vec<ChangedElement>,
    /// How many pages of 4096 bytes the damaged range has. The last page may be shorter.
    pub pages: u64,
    /// How many of these pages were read as zeros only. Lost writes leave such pages, and so do zeros in a
    /// tensor.
    pub zero_pages: u64,
}

/// How a second reading of damaged bytes compares with the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Again {
    /// The same wrong bytes, by their digest. These bytes are on the medium.
    Same,
    /// The bytes that were written. The first reading was damaged between the medium and memory.
    AsWritten,
    /// Other wrong bytes: memory, controller or cable change what is read.
    Different,
    /// Nothing was read a second time, because the damage has no digest of its own, or is too long.
    NotRead,
}

/// An element of a tensor, as it was written and as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ChangedElement {
    /// Its index in the tensor, outermost dimension first.
    pub index: Vec<usize>,
    /// Its bytes as written, little-endian.
    pub written: Vec<u8>,
    /// Its bytes as read, little-endian.
    pub read: Vec<u8>,
}

impl Checkpoint {
    /// Reads damaged bytes again, and finds the flip that explains the damage, if exactly one does. Needs
    /// memory for the range of the damage, at most 128 MiB.
    ///
    /// ```
    /// use ashore::{Again, CheckpointExecutor, StateDict};
    /// # use std::time::Duration;
    /// # let root = tempfile::tempdir().unwrap();
    /// let executor = CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20).build()?;
    /// let mut state = StateDict::new();
    /// state.tensor("weights", vec![1.0_f32; 6])?;
    /// executor.save(7, state)?.wait(Duration::from_secs(60))?;
    /// # executor.shutdown(Duration::from_secs(60))?;
    /// let shard = root.path().join("step-00000007/model.safetensors");
    /// let mut bytes = std::fs::read(&shard).unwrap();
    /// let place = bytes.len() - 2;
    /// bytes[place] ^= 0x40;
    /// std::fs::write(&shard, bytes).unwrap();
    ///
    /// let checkpoint = ashore::Checkpoint::open(root.path().join("step-00000007"))?;
    /// let located = checkpoint.locate(&checkpoint.verify()?.damage[0])?;
    /// let flip = located.flip.unwrap();
    /// assert_eq!((located.again, flip.offset, flip.single_bit()), (Again::Same, place as u64, Some(6)));
    /// let element = &located.elements[0];
    /// assert_eq!((&element.index[..], &element.written[..]), (&[5][..], &1.0_f32.to_le_bytes()[..]));
    /// # Ok::<(), ashore::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the file cannot be read again; `Busy` when there is not enough memory.
    pub fn locate(&self, damage: &Damage) -> Result<Located> {
        let mut located = Located { again: Again::NotRead, flip: None, elements: Vec::new(), pages: 0, zero_pages: 0 };
        let range = &damage.range;
        let length = range.end.saturating_sub(range.start);
        let (Some((written, first)), 1..=LONGEST) = (damage.digests, length) else { return Ok(located) };
        let locate = |error| self.located(error);
        let file = self.opened.reading.open(&damage.file).map_err(locate)?;
        file.drop_cached();
        let mut bytes = zeroed::<u8>(length as usize).map_err(locate)?;
        stream(&mut Window::new(self.manner().window), file.as_ref(), range, |at, run| {
            if let Some(to) = bytes.get_mut((at - range.start) as usize..).and_then(|to| to.get_mut(..run.len())) {
                to.copy_from_slice(run);
            }
            Ok(())
        })
        .map_err(locate)?;
        let found = Digest::of(&bytes);
        located.again = match found {
            _ if found == written => Again::AsWritten,
            _ if found == first => Again::Same,
            _ => Again::Different,
        };
        located.pages = length.div_ceil(PAGE as u64);
        located.zero_pages = bytes.chunks(PAGE).filter(|page| page.iter().all(|byte| *byte == 0)).count() as u64;
        if located.again == Again::Same
            && let Some(flip) = explain(written, found, length)
        {
            if let Some(tensor) = &damage.tensor {
                located.elements = self.changed(self.entry(tensor)?, damage, flip, &bytes)?;
            }
            located.flip = Some(Flip { offset: range.start + flip.offset, ..flip });
        }
        Ok(located)
    }

    /// Returns the elements of `tensor` that a flip in `bytes`, the bytes of the damage, changes. Returns
    /// none if the elements of the dtype are not whole bytes.
    fn changed(&self, tensor: &TensorEntry, damage: &Damage, flip: Flip, bytes: &[u8]) -> Result<Vec<ChangedElement>> {
        let bits = tensor.dtype.bitsize();
        let files = self.opened.index.all_files().map_err(|e| self.unlisted(e))?;
        let holds = |file: usize| files.get(file).is_some_and(|file| file.entry.name == damage.file);
        let at = damage.range.start + flip.offset;
        let slice = tensor
            .slices
            .iter()
            .find(|slice| holds(slice.file) && (slice.offset..slice.offset + slice.length).contains(&at));
        let (Some(slice), true) = (slice, bits.is_multiple_of(8)) else { return Ok(Vec::new()) };
        let size = (bits / 8) as u64;
        // Blocks begin at the start of the slice or at multiples of 8 MiB, so none cuts an element.
        let block = damage.range.start - slice.offset;
        let (first, last) = (flip.offset / size, (flip.offset + flip.bytes() as u64 - 1) / size);
        let elements = (first..=last).filter_map(|element| {
            let start = element * size;
            let read = bytes.get(start as usize..(start + size) as usize)?.to_vec();
            let written = (start..).zip(&read).map(|(at, byte)| byte ^ flip.mask_at(at)).collect();
            let mut number = ((block + start) / size) as usize;
            let mut index = vec![0; slice.shape.len()];
            for ((place, extent), begin) in index.iter_mut().zip(&slice.shape).zip(&slice.at).rev() {
                (*place, number) = (begin + number % extent, number / extent);
            }
            Some(ChangedElement { index, written, read })
        });
        Ok(elements.collect())
    }
}
