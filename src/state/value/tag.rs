//! Tags: objects with a single tagged key, which encode kinds that JSON does not have.

use super::{BIG, BYTES, COMPLEX, COUNTER, F32, F64, FROZENSET, MAP, NUMPY, ORDERED, SET, TUPLE};
use serde::de::Error as _;
use serde_json::{Error, Map, Value};

/// A tag and its content, checked except for nested content.
pub(super) enum Tag<'de> {
    F32(f32),
    F64(f64),
    /// An integer as hex digits.
    Big(&'de str),
    Bytes(Vec<u8>),
    /// Two floats.
    Complex(&'de [Value]),
    /// A tuple, a set or a frozen set.
    List(&'de [Value]),
    /// A map with keys of any kind, an ordered map or a counter, as pairs.
    Pairs(&'de [Value]),
    /// The value of a NumPy scalar.
    Numpy(&'de Value),
}

impl<'de> Tag<'de> {
    /// None for an object that is not a tag.
    pub(super) fn of(object: &'de Map<String, Value>) -> Option<Result<Self, Error>> {
        let (key, content) = object.iter().next().filter(|(key, _)| key.starts_with('$'))?;
        let (tag, wanted) = match key.as_str() {
            F32 => (hex_digits(content, 8).map(|bits| Self::F32(f32::from_bits(bits as u32))), "8 hex digits"),
            F64 => (hex_digits(content, 16).map(|bits| Self::F64(f64::from_bits(bits))), "16 hex digits"),
            BIG => (content.as_str().filter(|text| is_big(text)).map(Self::Big), "an integer in hex"),
            BYTES => (content.as_str().and_then(bytes).map(Self::Bytes), "two hex digits a byte"),
            TUPLE | SET | FROZENSET => (content.as_array().map(|items| Self::List(items)), "an array"),
            COMPLEX => (complex(content).map(Self::Complex), "an array of two floats"),
            MAP | ORDERED | COUNTER => (pairs(content).map(Self::Pairs), "an array of pairs"),
            NUMPY => (numpy(content).map(Self::Numpy), "a dtype and a value"),
            _ => return None,
        };
        let tag = tag.filter(|_| object.len() == 1);
        Some(tag.ok_or_else(|| Error::custom(format!("a tag holds something else than {wanted} key={key:?}"))))
    }
}

fn is_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn hex_digits(content: &Value, digits: usize) -> Option<u64> {
    let text = content.as_str().filter(|text| text.len() == digits && is_hex(text))?;
    u64::from_str_radix(text, 16).ok()
}

/// Whether a text is an integer as the format writes it: lower-case hex digits, no zero in front.
fn is_big(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty() && !digits.starts_with('0') && is_hex(digits)
}

fn bytes(text: &str) -> Option<Vec<u8>> {
    let pairs = Some(text.as_bytes().chunks_exact(2)).filter(|pairs| pairs.remainder().is_empty() && is_hex(text))?;
    let digit = |b: u8| if b < b'a' { b - b'0' } else { b - b'a' + 10 };
    Some(pairs.map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect())
}

/// The digits of bytes, two each.
pub(super) fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|b| [b >> 4, b & 15]);
    digits.map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)])).collect()
}

fn complex(content: &Value) -> Option<&[Value]> {
    let float = |part: &Value| match part {
        Value::Number(_) => true,
        Value::Object(object) => matches!(Tag::of(object), Some(Ok(Tag::F32(_) | Tag::F64(_)))),
        _ => false,
    };
    content.as_array().filter(|parts| parts.len() == 2 && parts.iter().all(float)).map(Vec::as_slice)
}

fn pairs(content: &Value) -> Option<&[Value]> {
    let pair = |item: &Value| item.as_array().is_some_and(|pair| pair.len() == 2);
    content.as_array().filter(|items| items.iter().all(pair)).map(Vec::as_slice)
}

/// The value of a NumPy scalar: a number, a bool, a complex number, text or bytes, but not another NumPy
/// scalar.
fn numpy(content: &Value) -> Option<&Value> {
    match content.as_array()?.as_slice() {
        [Value::String(_), value] => Some(value).filter(|value| match value {
            Value::Bool(_) | Value::Number(_) | Value::String(_) => true,
            Value::Object(object) => {
                matches!(Tag::of(object), Some(Ok(Tag::F32(_) | Tag::F64(_) | Tag::Complex(_) | Tag::Bytes(_))))
            }
            Value::Null | Value::Array(_) => false,
        }),
        _ => None,
    }
}
