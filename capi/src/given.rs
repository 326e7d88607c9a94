//! Reads the program's arguments: texts, arrays, structs that contain their size, seconds, JSON.
//!
//! # Safety argument
//! The safety argument of the crate applies.
#![expect(unsafe_code, reason = "reads the program's pointers; argument above")]

use crate::failure::{Failed, Result};
use serde_json::Value;
use std::ffi::{CStr, c_char};
use std::time::Duration;

/// Reads a text of the program.
///
/// # Safety
/// `at` is null, or points to a text that ends with a zero byte and stays valid for `'a`.
pub unsafe fn text<'a>(what: &str, at: *const c_char) -> Result<&'a str> {
    if at.is_null() {
        return Err(Failed::invalid(format!("a text is null text={what}")));
    }
    // SAFETY: the caller guarantees this.
    let bytes = unsafe { CStr::from_ptr(at) };
    bytes.to_str().map_err(|_| Failed::invalid(format!("a text is not utf-8 text={what} found={bytes:?}")))
}

/// Reads an array of the program.
///
/// # Safety
/// `at` is null, or points to `count` elements that stay valid for `'a`.
pub unsafe fn array<'a, T>(what: &str, at: *const T, count: usize) -> Result<&'a [T]> {
    match (count, at.is_null()) {
        (0, _) => Ok(&[]),
        (_, true) => Err(Failed::invalid(format!("an array is null array={what} count={count}"))),
        // SAFETY: the caller guarantees this.
        _ => Ok(unsafe { std::slice::from_raw_parts(at, count) }),
    }
}

/// Returns the place for a result.
///
/// # Safety
/// `at` is null, or points to space for a `T` that stays valid for `'a`.
pub unsafe fn result<'a, T>(what: &str, at: *mut T) -> Result<&'a mut T> {
    // SAFETY: the caller guarantees this. The program's memory may never have been written: callers pass only
    // types for which every bit pattern is a value, and write them before they read them.
    unsafe { at.as_mut() }.ok_or_else(|| Failed::invalid(format!("the place for a result is null result={what}")))
}

/// A struct that begins with its size as the program knows it. Members that an older program does not know
/// are zero.
///
/// # Safety
/// Implement this only for `repr(C)` structs whose first member is a `usize`, and whose every member may be
/// zero.
pub unsafe trait Sized: Default {
    /// The name of the struct in messages.
    const WHAT: &'static str;
}

/// Reads a struct that contains its size.
///
/// # Safety
/// Null, or as many bytes as its first member says.
pub unsafe fn sized<T: Sized>(at: *const T) -> Result<T> {
    let mut read = T::default();
    if at.is_null() {
        return Ok(read);
    }
    // SAFETY: as the trait says, the first member.
    let size = checked::<T>(unsafe { at.cast::<usize>().read() })?;
    // SAFETY: `size` bytes are there, at most the size of a `T`, and every pattern is a value.
    unsafe { std::ptr::copy_nonoverlapping(at.cast::<u8>(), (&raw mut read).cast(), size) };
    Ok(read)
}

/// Writes a struct that contains its size, except its first member.
///
/// # Safety
/// Null, or as many bytes as its first member says.
pub unsafe fn write_sized<T: Sized>(at: *mut T, value: &T) -> Result<()> {
    if at.is_null() {
        return Ok(());
    }
    // SAFETY: as the trait says, the first member.
    let size = checked::<T>(unsafe { at.cast::<usize>().read() })?;
    let (from, to, skip) = ((&raw const *value).cast::<u8>(), at.cast::<u8>(), size_of::<usize>());
    // SAFETY: `size` bytes are there, at most the size of a `T`.
    unsafe { std::ptr::copy_nonoverlapping(from.add(skip), to.add(skip), size - skip) };
    Ok(())
}

/// Returns how many bytes of a struct both sides know.
fn checked<T: Sized>(size: usize) -> Result<usize> {
    if size < size_of::<usize>() {
        let (what, known) = (T::WHAT, size_of::<T>());
        return Err(Failed::invalid(format!("set `size` to sizeof({what}) first size={size} known={known}")));
    }
    Ok(size.min(size_of::<T>()))
}

/// Converts a time to wait. Infinity becomes a hundred years.
pub fn seconds(seconds: f64) -> Result<Duration> {
    const LONGEST: f64 = 100.0 * 365.0 * 24.0 * 3600.0;
    if seconds.is_nan() || seconds < 0.0 {
        return Err(Failed::invalid(format!("a time is a number of seconds from 0 seconds={seconds}")));
    }
    Ok(Duration::from_secs_f64(seconds.min(LONGEST)))
}

/// Parses a JSON text. Errors name the text.
pub fn json(what: &str, name: &str, text: &str) -> Result<Value> {
    let parsed = serde_json::from_str(text).map_err(|e| {
        let wrong = format!("not a json text {what}={name:?}");
        ashore_core::Error::new(ashore_core::ErrorKind::Invalid, wrong).with_source(e)
    })?;
    if let Some(number) = inexact(text) {
        let why = "an integer of more than 64 bits would be rounded: give it as a text";
        return Err(Failed::invalid(format!("{why} integer={number} {what}={name:?}")));
    }
    Ok(parsed)
}

/// Returns the first integer of a JSON text that the parser would read as a float.
fn inexact(text: &str) -> Option<&str> {
    let (mut quoted, mut escaped, mut begin) = (false, false, None);
    for (at, letter) in text.bytes().chain([b' ']).enumerate() {
        let of_number = !quoted && matches!(letter, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
        if let (Some(from), false) = (begin, of_number) {
            let number = &text[from..at];
            // The letters of `true` and `false` that can occur in a number do not make an integer either.
            let integer = number.ends_with(|digit: char| digit.is_ascii_digit()) && !number.contains(['.', 'e', 'E']);
            if integer && number.parse::<i64>().is_err() && number.parse::<u64>().is_err() {
                return Some(number);
            }
        }
        begin = if of_number { begin.or(Some(at)) } else { None };
        quoted ^= letter == b'"' && !escaped;
        escaped = quoted && letter == b'\\' && !escaped;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_that_would_be_rounded_are_refused() {
        for exact in
            ["18446744073709551615", "-9223372036854775808", "[1e30, true, 0.5, -0]", r#""\"99999999999999999999""#]
        {
            assert_eq!(inexact(exact), None, "{exact}");
        }
        assert_eq!(inexact("18446744073709551616"), Some("18446744073709551616"));
        assert_eq!(inexact(r#"{"a\\": [1, -9223372036854775809]}"#), Some("-9223372036854775809"));
        let error = json("value", "rng", "99999999999999999999").unwrap_err();
        assert!(format!("{error:?}").contains("integer=99999999999999999999"), "{error:?}");
    }
}
