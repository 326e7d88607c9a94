//! New values of changed elements: distances from the older values, or the values themselves.

use super::number::Number;
use crate::error::{Error, Result};

/// A distance of this byte means that the whole distance follows, in as many bytes as an element has.
pub(super) const LONG: u8 = 255;

/// Appends a distance.
#[inline(always)]
pub(super) fn push_distance<N: Number>(ulps: &mut Vec<u8>, distance: N) {
    if distance.is_long() {
        ulps.push(LONG);
        distance.push(ulps);
    } else {
        ulps.push(distance.byte());
    }
}

/// The column of the new values of changed elements.
#[derive(Clone, Debug)]
pub(super) enum Values<'a> {
    Ulps { ulps: &'a [u8], float: bool },
    Plain(&'a [u8]),
}

impl Values<'_> {
    /// Returns the new value of the next changed element, whose older value was `old`.
    ///
    /// # Errors
    /// `Corrupt` when the column ends, or when the new value equals the old one.
    #[inline(always)]
    pub fn next<N: Number>(&mut self, old: N) -> Result<N> {
        match self {
            Self::Ulps { ulps, float } => {
                let (&byte, mut rest) = ulps.split_first().ok_or_else(short)?;
                let mut distance = N::from_byte(byte);
                if N::LONG && byte == LONG {
                    distance = N::first(rest).ok_or_else(short)?;
                    rest = rest.get(N::WIDTH..).ok_or_else(short)?;
                    if !distance.is_long() {
                        return Err(Error::corrupt("a short distance is written as a long one"));
                    }
                }
                *ulps = rest;
                if distance.is_zero() {
                    return Err(Error::corrupt("a delta says that an element changed, and that it did not"));
                }
                Ok(old.moved(distance, *float))
            }
            Self::Plain(values) => {
                let value = N::first(values).ok_or_else(short)?;
                *values = values.get(N::WIDTH..).ok_or_else(short)?;
                Ok(value)
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        match self {
            Self::Ulps { ulps, .. } => ulps.is_empty(),
            Self::Plain(values) => values.is_empty(),
        }
    }
}

#[cold]
fn short() -> Error {
    Error::corrupt("a column of a delta has fewer values than elements that changed")
}
