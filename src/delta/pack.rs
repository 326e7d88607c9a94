//! Compression of columns by zstd.

use crate::error::{Error, Result};
#[cfg(feature = "zstd")]
use zstd::zstd_safe::{CParameter, Strategy};

/// The suffix of the names of compressed columns.
pub const SUFFIX: &str = ".zst";

/// Columns are noise of few symbols, with runs where no row of an embedding changed. In such columns, matches
/// of fewer than 7 bytes cost more than the bytes themselves, and small tables find the matches that are
/// worth it. At level 1 a column of differences is a tenth longer. Higher levels take longer and do not
/// compress better.
#[cfg(feature = "zstd")]
const PARAMETERS: [CParameter; 4] = [
    CParameter::Strategy(Strategy::ZSTD_dfast),
    CParameter::MinMatch(7),
    CParameter::HashLog(6),
    CParameter::ChainLog(6),
];

/// Compresses a column.
///
/// # Errors
/// `Invalid` without the feature `zstd`.
#[cfg(feature = "zstd")]
pub fn pack(column: &[u8]) -> Result<Vec<u8>> {
    let packed = zstd::bulk::Compressor::new(1).and_then(|mut compressor| {
        PARAMETERS.into_iter().try_for_each(|parameter| compressor.set_parameter(parameter))?;
        compressor.compress(column)
    });
    packed.map_err(|e| Error::internal("cannot compress a column").with_source(e))
}

/// Decompresses a column of `length` bytes, and no more.
///
/// # Errors
/// `Corrupt` when the bytes are not a column of that length; `Invalid` without the feature `zstd`.
#[cfg(feature = "zstd")]
pub fn unpack(packed: &[u8], length: usize) -> Result<Vec<u8>> {
    let wrong = || Error::corrupt(format!("a compressed column of a delta cannot be read bytes={length}"));
    let mut column = Vec::new();
    column.try_reserve_exact(length).map_err(|_| wrong())?;
    // The decoder writes into the reserved capacity of the vector, never beyond it.
    let mut decoder = zstd::bulk::Decompressor::new().map_err(|e| wrong().with_source(e))?;
    decoder.decompress_to_buffer(packed, &mut column).map_err(|e| wrong().with_source(e))?;
    if column.len() == length { Ok(column) } else { Err(wrong()) }
}

/// Compresses a column.
///
/// # Errors
/// `Invalid`: the feature `zstd` is off.
#[cfg(not(feature = "zstd"))]
pub fn pack(_: &[u8]) -> Result<Vec<u8>> {
    Err(without())
}

/// Decompresses a column.
///
/// # Errors
/// `Invalid`: the feature `zstd` is off.
#[cfg(not(feature = "zstd"))]
pub fn unpack(_: &[u8], _: usize) -> Result<Vec<u8>> {
    Err(without())
}

#[cfg(not(feature = "zstd"))]
fn without() -> Error {
    Error::invalid("compressed deltas need the feature `zstd`, without which this program was built")
}
