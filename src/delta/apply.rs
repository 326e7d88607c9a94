//! Checks a patch against the bytes that it changes, and applies the patch.

use super::linear::Differences;
use super::number::{Number, Numbers, by_width};
use super::positions::Positions;
use super::values::Values;
use super::{How, Patch};
use crate::digest::Digest;
use crate::error::{Error, Result};

/// Returns the digest that `old` will have after `patch` is applied, if its digest is `base`. Writes nothing,
/// and reads only the elements that change.
///
/// # Errors
/// `Corrupt` when the patch contradicts itself or does not fit `old`.
pub fn check(old: &[u8], base: Digest, numbers: Numbers, patch: &Patch) -> Result<Digest> {
    if patch.how == How::Whole {
        let new = whole(old.len(), numbers, patch)?;
        return Ok(Digest::of(new));
    }
    by_width!(numbers.width, checked(old, base, numbers, patch))
}

/// Applies `patch`, which [`check`] has accepted for these bytes, in place.
///
/// # Errors
/// Errors of [`check`]. `bytes` are partly changed then.
pub fn apply(bytes: &mut [u8], numbers: Numbers, patch: &Patch) -> Result<()> {
    if patch.how == How::Whole {
        bytes.copy_from_slice(whole(bytes.len(), numbers, patch)?);
        return Ok(());
    }
    by_width!(numbers.width, applied(bytes, numbers, patch))
}

/// Calls `f` with the index and the new value of each element that changes, in ascending order. The new value
/// is computed from the old one, and is in little-endian bytes.
///
/// # Errors
/// Errors of [`check`] and of `f`.
pub fn visit(old: &[u8], numbers: Numbers, patch: &Patch, f: &mut dyn FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
    by_width!(numbers.width, visited(old, numbers, patch, f))
}

fn whole(length: usize, numbers: Numbers, patch: &Patch) -> Result<&[u8]> {
    match &patch.columns[..] {
        [new] if new.len() == length && patch.changed == (length / numbers.width) as u64 => Ok(new),
        _ => Err(Error::corrupt(format!("a whole tensor in a delta has another length expected_bytes={length}"))),
    }
}

fn checked<N: Number>(old: &[u8], base: Digest, numbers: Numbers, patch: &Patch) -> Result<Digest> {
    let mut differences = Differences::new();
    each::<N>(old.len(), numbers, patch, |index, values| {
        let before = N::get(old, index);
        let after = values.next(before)?;
        let offset = differences.seek(index * N::WIDTH);
        before.xor(after).set(differences.window(), offset / N::WIDTH);
        Ok(())
    })?;
    Ok(differences.result(base, old.len() as u64))
}

fn applied<N: Number>(bytes: &mut [u8], numbers: Numbers, patch: &Patch) -> Result<()> {
    each::<N>(bytes.len(), numbers, patch, |index, values| {
        let after = values.next(N::get(bytes, index))?;
        after.set(bytes, index);
        Ok(())
    })
}

fn visited<N: Number>(
    old: &[u8],
    numbers: Numbers,
    patch: &Patch,
    f: &mut dyn FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut value = Vec::with_capacity(N::WIDTH);
    each::<N>(old.len(), numbers, patch, |index, values| {
        value.clear();
        values.next(N::get(old, index))?.push(&mut value);
        f(index, &value)
    })
}

/// Calls `f` with each index and the column of values. Checks that both columns end together after as many
/// elements as the patch says.
#[inline(always)]
fn each<N: Number>(
    length: usize,
    numbers: Numbers,
    patch: &Patch,
    mut f: impl FnMut(usize, &mut Values<'_>) -> Result<()>,
) -> Result<()> {
    let elements = length / N::WIDTH;
    let [places, values] = &patch.columns[..] else {
        return Err(Error::corrupt(format!("a delta has other columns than it says columns={}", patch.columns.len())));
    };
    let positions = match patch.how {
        How::Sparse => Positions::gaps(places, elements),
        How::Bitmap => Positions::bitmap(places, elements)?,
        _ => Positions::indices(places, elements)?,
    };
    let values = match patch.how {
        How::Indices => Values::Plain(values),
        _ => Values::Ulps { ulps: values, float: numbers.float },
    };
    let (changed, rest) = walk(positions, values, &mut f)?;
    if changed != patch.changed || !rest.is_empty() {
        let what = "a delta changes another number of elements than it says";
        return Err(Error::corrupt(format!("{what} said={} found={changed}", patch.changed)));
    }
    Ok(())
}

#[inline(always)]
fn walk<'a>(
    mut positions: Positions<'a>,
    mut values: Values<'a>,
    f: &mut impl FnMut(usize, &mut Values<'_>) -> Result<()>,
) -> Result<(u64, Values<'a>)> {
    let mut changed = 0;
    while let Some(index) = positions.next()? {
        f(index, &mut values)?;
        changed += 1;
    }
    Ok((changed, values))
}
