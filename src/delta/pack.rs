//! Columns that are compressed by zstd.

use crate::error::{Error, Result};

/// What compressed columns have at the end of their names.
pub const SUFFIX: &str = ".zst";

/// The level: higher ones take longer and do not win on these columns.
#[cfg(feature = "zstd")]
const LEVEL: i32 = 1;

/// Compresses a column.
///
/// # Errors
/// `Invalid` without the feature `zstd`.
#[cfg(feature = "zstd")]
pub fn pack(column: &[u8]) -> Result<Vec<u8>> {
    zstd::bulk::compress(column, LEVEL).map_err(|e| Error::internal("cannot compress a column").with_source(e))
}

/// Decompresses a column of `length` bytes, and no more.
///
/// # Errors
/// `Corrupt` when it is not a column of that length; `Invalid` without the feature `zstd`.
#[cfg(feature = "zstd")]
pub fn unpack(packed: &[u8], length: usize) -> Result<Vec<u8>> {
    let wrong = || Error::corrupt(format!("a compressed column of a delta cannot be read bytes={length}"));
    let mut column = Vec::new();
    column.try_reserve_exact(length).map_err(|_| wrong())?;
    // The decoder writes into what the vector has reserved, never beyond.
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
