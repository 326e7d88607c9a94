//! Locates damage and describes it in words, for `verify` and `repair`.

use crate::words::{counted, grouped};
use crate::{element, out, size, words};
use ashore::internal::format::entries::MANIFEST;
use ashore::internal::format::seal;
use ashore::{Again, Checkpoint, Damage, Dtype, Flip, Located};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::Path;

/// The maximum number of damaged ranges of a step that are located: more ranges are not flipped bits.
const LOCATED: usize = 32;

/// A damaged range, and the result of reading it a second time.
pub struct Found {
    pub damage: Damage,
    pub located: Option<Located>,
    pub dtype: Option<Dtype>,
    /// Another range of the same tensor, or of the same file outside tensors, is damaged, too.
    pub has_company: bool,
}

/// A flip as JSON.
#[derive(Serialize)]
pub struct FlipRow {
    /// The offset in the file of the first changed byte.
    offset: u64,
    /// The flipped bits of the changed bytes.
    masks: Vec<u8>,
    /// The number of the bit in its byte, if one bit is flipped.
    bit: Option<u32>,
    elements: Vec<ElementRow>,
}

/// A changed element as JSON.
#[derive(Serialize)]
struct ElementRow {
    index: Vec<usize>,
    written: String,
    read: String,
}

/// Reads damage a second time, past the page cache, and locates it.
pub fn located(checkpoint: &Checkpoint, damage: Vec<Damage>) -> Vec<Found> {
    let mut of_place = BTreeMap::<(String, Option<String>), usize>::new();
    for one in &damage {
        *of_place.entry((one.file.clone(), one.tensor.clone())).or_default() += 1;
    }
    let mut found = Vec::with_capacity(damage.len());
    for (i, damage) in damage.into_iter().enumerate() {
        let has_company = of_place.get(&(damage.file.clone(), damage.tensor.clone())).is_some_and(|count| *count > 1);
        let located = (i < LOCATED && !damage.unreadable).then(|| checkpoint.locate(&damage).ok());
        let tensor = damage.tensor.as_deref().and_then(|name| checkpoint.tensor(name).ok());
        let dtype = tensor.map(|tensor| tensor.dtype);
        found.push(Found { damage, located: located.flatten(), dtype, has_company });
    }
    found
}

/// Finds the flip that explains a damaged manifest, by its path; only within one byte.
pub fn of_manifest(path: &Path) -> Option<Flip> {
    if path.file_name() != Some(MANIFEST.as_ref()) {
        return None;
    }
    seal::flip(&std::fs::read(path).ok()?)
}

/// Says where a flip is and that it explains the damage.
pub fn of_flip(file: &str, flip: Flip) -> String {
    let (place, what) = match flip.single_bit() {
        Some(bit) => (format!(" bit {bit}"), "One flipped bit explains it."),
        None => (String::new(), "Flipped bits of one byte explain it."),
    };
    format!("{} byte {}{place}: {what}", out::printable(file), grouped(flip.offset))
}

impl FlipRow {
    /// Makes a flip that is in no tensor.
    pub fn plain(flip: Flip) -> Self {
        let masks = (flip.offset..).take(flip.bytes()).map(|at| flip.mask_at(at)).collect();
        Self { offset: flip.offset, masks, bit: flip.single_bit(), elements: Vec::new() }
    }
}

impl Found {
    /// True when one flipped bit or byte explains the damage, a second reading from the medium shows the same
    /// damage, and the tensor has no other damage.
    pub fn is_certain(&self) -> bool {
        let flip = self.located.as_ref().filter(|located| located.again == Again::Same).and_then(|l| l.flip);
        flip.is_some_and(|flip| flip.is_one_byte()) && !self.has_company
    }

    /// Says where the damage is: `model.safetensors byte 5,000,000 bit 2 (layers.3.mlp.up[17, 904])`.
    pub fn place(&self) -> String {
        let Damage { file, tensor, range, .. } = &self.damage;
        let mut text = out::printable(file);
        let flip = self.located.as_ref().and_then(|located| located.flip);
        match flip {
            Some(flip) => {
                text += &format!(" byte {}", grouped(flip.offset));
                text += &match flip.single_bit() {
                    Some(bit) => format!(" bit {bit}"),
                    None if flip.is_one_byte() => String::new(),
                    None => format!(" and the {} after it", counted(flip.bytes() - 1, "byte")),
                };
            }
            None if range.is_empty() => {}
            None => text += &format!(" bytes {} to {}", grouped(range.start), grouped(range.end - 1)),
        }
        if let Some(tensor) = tensor {
            let index = self.located.as_ref().and_then(|located| located.elements.first());
            let index = index.filter(|element| !element.index.is_empty());
            let index = index.map_or_else(String::new, |element| format!("{:?}", element.index));
            text += &format!(" (tensor {}{index})", out::printable(tensor));
        }
        text
    }

    /// Says what is wrong at that place.
    pub fn reason(&self) -> String {
        let Some(located) = &self.located else { return words::message(&self.damage.what) };
        let zeros = || {
            let (pages, zeros) = (located.pages, located.zero_pages);
            match zeros {
                0 => String::new(),
                _ if zeros == pages => " All of it is zeros: a lost write looks like that.".to_owned(),
                _ => format!(
                    " {zeros} of its {pages} pages of 4096 bytes {} zeros.",
                    if zeros == 1 { "is" } else { "are" }
                ),
            }
        };
        match (located.again, located.flip) {
            (Again::AsWritten, _) => "wrong when it was read first, and as written when it was read again: memory, \
                 controller or cable, not the file."
                .to_owned(),
            (Again::Different, _) => {
                "two readings differ: memory, controller or cable, and perhaps the file as well.".to_owned()
            }
            (Again::Same, Some(flip)) => {
                let what = match flip.single_bit() {
                    Some(_) => "One flipped bit explains it.",
                    None if flip.is_one_byte() => "Flipped bits of one byte explain it.",
                    None => "Flipped bits side by side explain it.",
                };
                let changes = self.changes();
                if changes.is_empty() { what.to_owned() } else { format!("{changes}. {what}") }
            }
            (Again::Same, None) => {
                let length = self.damage.range.end - self.damage.range.start;
                format!("{} are not what was written; no single flip explains it.{}", size::shown(length), zeros())
            }
            _ => words::message(&self.damage.what),
        }
    }

    /// Says how elements were changed: `0.0312 was read as 0.0469`.
    pub fn changes(&self) -> String {
        let Some((located, dtype)) = self.located.as_ref().zip(self.dtype) else { return String::new() };
        let change = |element: &ashore::ChangedElement| {
            let [written, read] = [&element.written, &element.read].map(|bytes| element::shown(dtype, bytes));
            // Floats are rounded for the screen.
            if written == read {
                format!("{written} was read as another value near it")
            } else {
                format!("{written} was read as {read}")
            }
        };
        located.elements.iter().map(change).collect::<Vec<_>>().join(", ")
    }

    /// Returns the flip for JSON.
    pub fn flip(&self) -> Option<FlipRow> {
        let located = self.located.as_ref()?;
        let flip = located.flip?;
        let shown = |bytes: &[u8]| self.dtype.map_or_else(String::new, |dtype| element::shown(dtype, bytes));
        let row = |element: &ashore::ChangedElement| ElementRow {
            index: element.index.clone(),
            written: shown(&element.written),
            read: shown(&element.read),
        };
        Some(FlipRow { elements: located.elements.iter().map(row).collect(), ..FlipRow::plain(flip) })
    }
}
