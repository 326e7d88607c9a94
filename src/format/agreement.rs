//! Checks that the shards and the index of a step agree with its manifest and tables.

use super::columns::FileRow;
use super::entries::{SliceEntry, TensorEntry};
use super::header::Header;
use crate::error::{Error, Result};
use std::collections::HashMap;

/// The files of a step, and its tensors sorted by name, without the aliases: tensors whose bytes another
/// tensor holds.
#[derive(Clone, Debug)]
pub struct Listing<'a> {
    /// The files.
    pub files: Vec<&'a FileRow>,
    /// The tensors.
    pub tensors: Vec<&'a TensorEntry>,
}

impl<'a> Listing<'a> {
    fn tensor(&self, name: &str) -> Option<&'a TensorEntry> {
        let at = self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()?;
        self.tensors.get(at).copied()
    }
}

/// Checks that the header of file number `file` belongs to the step and agrees with the listing on every
/// tensor.
///
/// # Errors
/// `Corrupt`, naming file and tensor.
pub fn check_header(listing: &Listing<'_>, file: usize, header: &Header) -> Result<()> {
    let Some(FileRow { entry, origin, .. }) = listing.files.get(file) else {
        return Err(Error::corrupt(format!("there is no such file file={file}")));
    };
    let refuse = |why: &str| Err(Error::corrupt(format!("{why} file={:?}", entry.name)));
    if (header.step, header.attempt) != *origin {
        return refuse("a shard belongs to another step or attempt");
    }
    let slices = |tensor: &&TensorEntry| tensor.slices.iter().filter(|s| s.file == file).count();
    if listing.tensors.iter().map(slices).sum::<usize>() != header.tensors.len() {
        return refuse("a shard has other tensors than the manifest says");
    }
    for tensor in &header.tensors {
        let agrees = listing.tensor(&tensor.name).is_some_and(|entry_tensor| {
            entry_tensor.dtype == tensor.dtype
                && entry_tensor.slices.iter().any(|s| {
                    let offset = entry.data.checked_add(tensor.offsets.start);
                    s.file == file
                        && Some(s.offset) == offset
                        && s.shape == tensor.shape
                        && tensor.at.as_ref().is_none_or(|at| *at == s.at)
                })
        });
        if !agrees {
            return refuse(&format!("a shard describes a tensor otherwise than the manifest tensor={:?}", tensor.name));
        }
    }
    Ok(())
}

/// Checks a step's index against its manifest: the index maps each tensor to the file that holds it, and
/// names no other tensor.
///
/// # Errors
/// `Corrupt`, naming the tensor.
pub fn check_index(listing: &Listing<'_>, bytes: &[u8]) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let index: Index = serde_json::from_slice(bytes)
        .map_err(|e| Error::corrupt(format!("the index cannot be read: {e}")).with_source(e))?;
    for tensor in &listing.tensors {
        let said = index.weight_map.get(&tensor.name).map(String::as_str);
        let holds = |slice: &SliceEntry| listing.files.get(slice.file).map(|file| file.entry.name.as_str()) == said;
        if said.is_none() || !tensor.slices.iter().any(holds) {
            let said = said.unwrap_or("none");
            let what = format!("the index contradicts the manifest tensor={:?} index={said:?}", tensor.name);
            return Err(Error::corrupt(what));
        }
    }
    if index.weight_map.len() != listing.tensors.len() {
        let (there, known) = (index.weight_map.len(), listing.tensors.len());
        return Err(Error::corrupt(format!("the index names other tensors index={there} manifest={known}")));
    }
    Ok(())
}
