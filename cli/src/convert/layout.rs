//! The layout of a conversion: which box of which tensor goes to which file, from names, dtypes and shapes.

use ashore::internal::format::shard::{HeaderTemplate, index_json, shard_names};
use ashore::{Checkpoint, Dtype, Error, ErrorKind, Result};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};

/// The maximum length of a file's header, in bytes. A file ends before that, because readers first read the
/// whole header.
const HEADER: u64 = 48 << 20;

/// The form of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Whole tensors in files and an index, as Hugging Face's tools write them.
    Hf,
    /// Tensors split along their first dimension, for this many ranks.
    Ranks(u32),
}

/// The choices of the user that decide what is written.
#[derive(Clone, Debug)]
pub struct Choices {
    pub form: Form,
    /// The maximum bytes of tensors in a file with several tensors.
    pub shard_size: u64,
    /// Only tensors whose names begin with this prefix are written.
    pub prefix: String,
    /// The prefix is removed from the names.
    pub strip: bool,
    /// An alias is written with bytes of its own.
    pub copy_aliases: bool,
}

/// The files of a conversion.
#[derive(Debug)]
pub struct Layout {
    /// In ascending order of their names.
    pub tensors: Vec<Tensor>,
    /// For each tensor without bytes of its own, the number of the tensor that holds them.
    pub aliases: BTreeMap<usize, usize>,
    /// The files, those of rank 0 first.
    pub files: Vec<File>,
    /// The bytes of `model.safetensors.index.json`, if it is written.
    pub index: Option<Vec<u8>>,
}

/// A tensor as it is written.
#[derive(Debug)]
pub struct Tensor {
    pub name: String,
    /// Its name in the checkpoint that is read.
    pub source: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

/// A shard.
#[derive(Debug)]
pub struct File {
    pub name: String,
    pub rank: u32,
    pub header: HeaderTemplate,
    pub length: u64,
    /// In the order of their bytes.
    pub parts: Vec<Part>,
}

/// The box of a tensor in a file.
#[derive(Debug)]
pub struct Part {
    /// The number of the tensor.
    pub tensor: usize,
    pub at: Vec<usize>,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

impl Layout {
    /// Lays out the tensors of a checkpoint.
    ///
    /// # Errors
    /// `NotFound` when no name begins with the prefix; `Invalid` for a name that cannot be stripped, and when
    /// the header of a file would be longer than readers accept.
    pub fn new(checkpoint: &Checkpoint, choices: &Choices) -> Result<Self> {
        let (tensors, aliases) = chosen(checkpoint, choices)?;
        if tensors.is_empty() {
            let what = format!("the checkpoint has no tensor to convert prefix={:?}", choices.prefix);
            return Err(Error::new(ErrorKind::NotFound, what)
                .with_step(checkpoint.step())
                .with_path(checkpoint.path()));
        }
        let own = |number: &usize| !aliases.contains_key(number);
        let world = if let Form::Ranks(world) = choices.form { world } else { 1 };
        let mut files = Vec::new();
        for rank in 0..world {
            let parts = (0..tensors.len()).filter(own).filter_map(|number| part(&tensors[number], number, rank, world));
            let runs = cut(&tensors, parts, choices.shard_size);
            let sharded = matches!(choices.form, Form::Ranks(_));
            let names = shard_names(runs.len(), sharded.then_some(rank));
            for (parts, name) in runs.into_iter().zip(names) {
                files.push(File::new(name, rank, &tensors, parts, sharded)?);
            }
        }
        let mut index = None;
        if choices.form == Form::Hf && files.len() > 1 {
            let parts = || files.iter().flat_map(|file| file.parts.iter().map(move |part| (file, part)));
            let total = parts().map(|(_, part)| part.bytes).sum();
            let located = parts().map(|(file, part)| (tensors[part.tensor].name.as_str(), file.name.as_str()));
            index = Some(index_json(total, located)?);
        }
        Ok(Self { tensors, aliases, files, index })
    }

    /// The bytes of all shards.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.length).sum()
    }
}

/// Returns the tensors to write, and for each alias among them the tensor that holds its bytes.
fn chosen(checkpoint: &Checkpoint, choices: &Choices) -> Result<(Vec<Tensor>, BTreeMap<usize, usize>)> {
    let (mut tensors, mut sharing) = (Vec::new(), Vec::new());
    let entries = checkpoint.contents()?.tensors;
    for (index, entry) in entries.iter().enumerate().filter(|(_, entry)| entry.name.starts_with(&choices.prefix)) {
        let name = if choices.strip { &entry.name[choices.prefix.len()..] } else { &entry.name };
        if matches!(name, "" | "__metadata__") {
            let what = format!("without the prefix a tensor would have a name that it cannot have tensor={name:?}");
            return Err(Error::new(ErrorKind::Invalid, format!("{what} prefix={:?}", choices.prefix)));
        }
        let number = tensors.len();
        if let Some(first) = entry.slices.first().filter(|slice| slice.length > 0 && !choices.copy_aliases) {
            sharing.push((checkpoint.is_alias(index)?, number, (first.file, first.offset)));
        }
        let (source, dtype, shape) = (entry.name.clone(), entry.dtype, entry.shape.clone());
        tensors.push(Tensor { name: name.to_owned(), source, dtype, shape });
    }
    // The holders of the step come first: an alias holds the bytes itself only if its holder is not chosen.
    sharing.sort_unstable();
    // Boxes never share bytes, so tensors whose first boxes begin at the same place are one tensor with two
    // names.
    let (mut places, mut aliases) = (HashMap::new(), BTreeMap::new());
    for (_, number, place) in sharing {
        let holder = *places.entry(place).or_insert(number);
        if holder != number {
            aliases.insert(number, holder);
        }
    }
    Ok((tensors, aliases))
}

/// The bytes of a box.
fn bytes(dtype: Dtype, shape: &[usize]) -> u64 {
    ashore::Layout::new(dtype, shape).bytes().unwrap_or_default()
}

/// Returns the part of a tensor that a rank has: rows as torch's `Shard(0)` distributes them. Rank 0 has a
/// tensor that has no first dimension or no elements.
fn part(tensor: &Tensor, number: usize, rank: u32, world: u32) -> Option<Part> {
    let mut at = vec![0; tensor.shape.len()];
    let mut shape = tensor.shape.clone();
    if let Some((rows, inner)) = tensor.shape.split_first().filter(|_| !tensor.shape.contains(&0)) {
        // Elements smaller than a byte are split where bytes end.
        let bits = inner.iter().fold(tensor.dtype.bitsize() % 8, |bits, dim| bits * (dim % 8) % 8);
        let unit = if bits == 0 { 1 } else { 8 / (1 << bits.trailing_zeros()) };
        let each = rows.div_ceil(world as usize).next_multiple_of(unit);
        at[0] = each.saturating_mul(rank as usize).min(*rows);
        shape[0] = each.min(rows - at[0]);
        if shape[0] == 0 {
            return None;
        }
    } else if rank > 0 {
        return None;
    }
    let bytes = bytes(tensor.dtype, &shape);
    Some(Part { tensor: number, at, shape, bytes })
}

/// Splits boxes into files of at most `most` bytes; a longer box gets a file of its own.
fn cut(tensors: &[Tensor], parts: impl Iterator<Item = Part>, most: u64) -> Vec<Vec<Part>> {
    let mut runs: Vec<Vec<Part>> = Vec::new();
    let (mut sum, mut header) = (0_u64, 0_u64);
    for part in parts {
        let name = &tensors[part.tensor].name;
        // An upper bound of the length of its entries in the header, with every character escaped.
        let entry = 14 * name.len() as u64 + 40 * part.at.len() as u64 + 160;
        if runs.is_empty() || sum + part.bytes > most && sum > 0 || header + entry > HEADER && header > 0 {
            runs.push(Vec::new());
            (sum, header) = (0, 0);
        }
        sum += part.bytes;
        header += entry;
        runs.last_mut().expect("pushed above").push(part);
    }
    runs
}

impl File {
    fn new(name: String, rank: u32, tensors: &[Tensor], mut parts: Vec<Part>, sharded: bool) -> Result<Self> {
        // The tensors with the largest elements come first, so that every tensor is aligned to its element
        // size.
        parts.sort_by_key(|part| (Reverse(tensors[part.tensor].dtype.bitsize()), part.tensor));
        let mut end = 0;
        let described: Vec<_> = parts
            .iter()
            .map(|part| {
                let (tensor, begin) = (&tensors[part.tensor], end);
                end += part.bytes;
                (tensor.name.as_str(), tensor.dtype, &part.shape[..], begin..end, &part.at[..])
            })
            .collect();
        let header = if sharded {
            HeaderTemplate::sharded(described)?
        } else {
            HeaderTemplate::new(
                described.into_iter().map(|(name, dtype, shape, range, _)| (name, dtype, shape, range)),
            )?
        };
        let length = header.len() + end;
        Ok(Self { name, rank, header, length, parts })
    }
}
