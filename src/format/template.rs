//! A manifest template, made once per structure and filled per save: serializing 100,000 tensors anew costs
//! 25 ms each time.

use super::entries::{FileEntry, TensorEntry};
use super::invariants;
use super::seal::{SEAL, VERSION, seal_in_place};
use super::shard::write_json;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::memory::AlignedBuffer;
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// The fields that differ from save to save besides the digests.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Head<'a> {
    /// The step.
    pub step: u64,
    /// The attempt.
    pub attempt: Attempt,
    /// How many ranks write it.
    pub world: u32,
    /// User metadata.
    pub metadata: &'a BTreeMap<String, Value>,
    /// Values.
    pub values: &'a BTreeMap<String, Value>,
}

/// The part of a manifest that is the same for all saves of one structure, with slots for the digests.
#[derive(Clone, Debug)]
pub struct ManifestTemplate {
    files: usize,
    /// The number of block digests of each slice, over all tensors.
    blocks: Vec<usize>,
    /// The JSON text from `files` on.
    text: Vec<u8>,
    /// Offsets of the digests in `text`.
    slots: Vec<usize>,
}

impl ManifestTemplate {
    /// Creates a template for these files and tensors, checked against [`invariants`]. Their digests are
    /// placeholders for those that [`ManifestTemplate::fill`] inserts.
    ///
    /// # Errors
    /// `Internal` when an invariant does not hold.
    pub fn new(files: &[FileEntry], tensors: &[TensorEntry]) -> Result<Self> {
        invariants::check_layout(files, tensors).map_err(|e| e.with_kind(ErrorKind::Internal))?;
        let slices = tensors.iter().flat_map(|t| &t.slices);
        let blocks = slices.map(|s| s.blocks.len()).collect();
        let mut this = Self { files: files.len(), blocks, text: Vec::new(), slots: Vec::new() };
        this.list(r#","files":["#, files, Self::file)?;
        this.list(r#"],"tensors":["#, tensors, Self::tensor)?;
        this.raw("]");
        Ok(this)
    }

    fn file(&mut self, file: &FileEntry) -> Result<()> {
        self.field(r#"{"name":"#, &file.name)?;
        self.field(r#","length":"#, &file.length)?;
        self.field(r#","data":"#, &file.data)?;
        self.slot(r#","header":"#);
        self.slot(r#","digest":"#);
        self.raw("}");
        Ok(())
    }

    fn tensor(&mut self, tensor: &TensorEntry) -> Result<()> {
        self.field(r#"{"name":"#, &tensor.name)?;
        self.field(r#","dtype":"#, &tensor.dtype)?;
        self.field(r#","shape":"#, &tensor.shape)?;
        self.list(r#","slices":["#, &tensor.slices, |this, slice| {
            this.field(r#"{"file":"#, &slice.file)?;
            this.field(r#","offset":"#, &slice.offset)?;
            this.field(r#","length":"#, &slice.length)?;
            this.field(r#","at":"#, &slice.at)?;
            this.field(r#","shape":"#, &slice.shape)?;
            this.slot(r#","digest":"#);
            this.list(r#","blocks":["#, &slice.blocks, |this, _| {
                this.slot("");
                Ok(())
            })?;
            this.raw("]}");
            Ok(())
        })?;
        self.raw("]}");
        Ok(())
    }

    fn raw(&mut self, text: &str) {
        self.text.extend_from_slice(text.as_bytes());
    }

    fn field(&mut self, key: &str, value: &(impl Serialize + ?Sized)) -> Result<()> {
        self.raw(key);
        write_json(&mut self.text, value)
    }

    fn slot(&mut self, key: &str) {
        self.raw(key);
        self.slots.push(self.text.len() + 1);
        self.raw("\"0000000000000000\"");
    }

    fn list<T>(&mut self, key: &str, items: &[T], mut item: impl FnMut(&mut Self, &T) -> Result<()>) -> Result<()> {
        self.raw(key);
        for (i, each) in items.iter().enumerate() {
            if i > 0 {
                self.raw(",");
            }
            item(self, each)?;
        }
        Ok(())
    }

    /// Writes the bytes of `manifest.json` to `out`, and reuses its memory if it is large enough. `files` has
    /// the digests of each file's header and of the whole file; `slices` those of each slice and of its
    /// blocks, tensor by tensor; both in the order given to [`ManifestTemplate::new`].
    ///
    /// # Errors
    /// `Internal` when there are more or fewer digests than the structure has slots.
    pub fn fill<'d>(
        &self,
        head: &Head<'_>,
        files: impl IntoIterator<Item = (Digest, Digest)>,
        slices: impl IntoIterator<Item = (Digest, &'d [Digest])>,
        out: &mut AlignedBuffer,
    ) -> Result<()> {
        let mut begin = format!(r#"{{"format":"ashore","version":{VERSION},"#).into_bytes();
        let brace = begin.len();
        write_json(&mut begin, head)?;
        // Removes the braces: the fields join those before and after.
        begin.remove(brace);
        begin.pop();
        out.reset(begin.len() + self.text.len() + SEAL);
        let (start, rest) = out.split_at_mut(begin.len());
        start.copy_from_slice(&begin);
        let text = &mut rest[..self.text.len()];
        text.copy_from_slice(&self.text);

        let mut slots = self.slots.iter();
        let mut put = |digest: Digest| {
            let room = slots.next().and_then(|&at| text.get_mut(at..at + 16));
            room.map(|room| room.copy_from_slice(&digest.to_hex())).ok_or_else(|| wrong("more"))
        };
        let mut left = self.files;
        for (header, whole) in files {
            left = left.checked_sub(1).ok_or_else(|| wrong("more"))?;
            put(header)?;
            put(whole)?;
        }
        let mut expected = self.blocks.iter();
        for (digest, blocks) in slices {
            if expected.next() != Some(&blocks.len()) {
                return Err(wrong("others"));
            }
            put(digest)?;
            blocks.iter().try_for_each(|&block| put(block))?;
        }
        if left > 0 || expected.next().is_some() {
            return Err(wrong("fewer"));
        }
        seal_in_place(out);
        Ok(())
    }
}

fn wrong(what: &str) -> Error {
    Error::internal(format!("there are {what} digests than the manifest has slots for"))
}
