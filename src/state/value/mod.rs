//! Encodes values of any serde type as JSON, exactly, including the Python kinds that JSON does not have.
//!
//! A kind that JSON lacks is written with a tag that begins with `$`. A user's key that begins with `$` gets
//! one more `$`, so it is never mistaken for a tag:
//!
//! | in Rust | in JSON |
//! |---|---|
//! | a non-finite `f64` | `{"$f64":"7ff8000000000001"}`, its bits |
//! | a non-finite `f32` | `{"$f32":"7fc00001"}` |
//! | an integer beyond 64 bits | `{"$big":"-1ffffffffffffffff"}`, in hex |
//! | bytes | `{"$bytes":"00ff"}` |
//! | an integer or a bool as a key | `"$int:-5"`, `"$bool:true"` |
//! | a key, field or variant `$x` | `"$$x"` |
//! | the other kinds of [`Value`](crate::Value) | a tag each, see there |
//!
//! Everything else is plain serde JSON. Encoding refuses values that would not decode to the same value.

mod decode;
mod encode;
mod kinds;
mod tag;

pub use kinds::Value as Kinds;

use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// The tag of an `f64` that JSON has no number for.
const F64: &str = "$f64";

/// The tag of an `f32` that JSON has no number for.
const F32: &str = "$f32";

/// The tag of bytes.
const BYTES: &str = "$bytes";

/// The name by which [`Kinds`] asks the decoder for tags.
const VALUE: &str = "$ashore::Value";

macro_rules! tags {
    ($($(#[$doc:meta])* $name:ident = $tag:literal;)*) => {
        $($(#[$doc])* const $name: &str = $tag;)*

        /// The names of newtypes by which [`Kinds`] gives the encoder a kind.
        mod names {
            $(pub(super) const $name: &str = concat!("$ashore::Value", $tag);)*
        }
    };
}

tags! {
    /// An integer beyond 64 bits.
    BIG = "$big";
    TUPLE = "$tuple";
    SET = "$set";
    FROZENSET = "$frozenset";
    COMPLEX = "$complex";
    NUMPY = "$numpy";
    /// A dict with keys of any kind.
    MAP = "$map";
    /// A dict that keeps its order.
    ORDERED = "$ordered";
    COUNTER = "$counter";
}

/// The tag of a newtype that [`Kinds`] writes; None for any other type.
fn tag_of(name: &str) -> Option<&str> {
    name.strip_prefix(VALUE).filter(|tag| tag.starts_with('$'))
}

/// The tag of an integer key.
const INT: &str = "$int:";

/// The tag of a bool key.
const BOOL: &str = "$bool:";

/// Maximum nesting depth of a value. The manifest's parser goes down 127 levels, of which the manifest itself
/// takes two.
const MAX_DEPTH: usize = 125;

/// Encodes a value as JSON. `decode` returns the same value from it: floats bit for bit, keys with their own
/// type.
///
/// # Errors
/// `Invalid` for values that JSON cannot hold: keys that are not text, integers of 64 bits or bools, an
/// option that holds nothing (`Some(None)`, `Some(())`), a duplicate key, more than 125 levels of nesting,
/// unparsed JSON.
pub fn encode(value: &(impl Serialize + ?Sized)) -> Result<Value> {
    encode::value(value, 0).map_err(|e| Error::invalid("a value cannot be written as json").with_source(e))
}

/// Encodes a value that has a name.
///
/// # Errors
/// As [`encode`]. The error names the value, and `what` it is.
pub(crate) fn encode_named(what: &str, name: &str, value: &(impl Serialize + ?Sized)) -> Result<Value> {
    encode(value).map_err(|e| Error::invalid(format!("cannot be kept exactly {what}={name:?}")).with_source(e))
}

/// Decodes a value that `encode` wrote.
///
/// # Errors
/// `Invalid` when the value is not a `T`.
pub fn decode<T: DeserializeOwned>(value: &Value) -> Result<T> {
    let wrong = || Error::invalid(format!("a value is of another type wanted={}", std::any::type_name::<T>()));
    T::deserialize(decode::Decoder(value)).map_err(|e| wrong().with_source(e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;
    use serde::de::IgnoredAny;
    use serde_json::json;

    #[test]
    fn tags_are_as_documented() {
        let nan = f64::from_bits(0xfff8_0000_0000_0001);
        assert_eq!(encode(&nan).unwrap(), json!({"$f64": "fff8000000000001"}));
        assert_eq!(encode(&f32::INFINITY).unwrap(), json!({"$f32": "7f800000"}));
        let keys = (std::collections::BTreeMap::from([(-5, true)]), std::collections::BTreeMap::from([(true, 1)]));
        assert_eq!(encode(&keys).unwrap(), json!([{"$int:-5": true}, {"$bool:true": 1}]));
        assert_eq!(encode(&json!({"$f64": {"$$": "$"}})).unwrap(), json!({"$$f64": {"$$$": "$"}}));
    }

    #[test]
    fn what_is_not_an_encoding_is_refused() {
        for wrong in [
            json!({"$f64": "7ff8"}),
            json!({"$f64": "7FF8000000000000"}),
            json!({"$f64": 1}),
            json!({"$f32": "7ff8000000000000"}),
            json!({"$f64": "7ff8000000000000", "a": 1}),
            json!({"$f16": "7c00"}),
            json!({"$bytes": "abc"}),
            json!({"$bytes": "AB"}),
            json!({"$bytes": [1]}),
            json!({"$big": "0"}),
            json!({"$big": 5}),
            json!({"$tuple": {}}),
            json!({"$set": [1], "a": 1}),
            json!({"$set": [{"$f16": "7c00"}]}),
            json!({"$complex": [1.0]}),
            json!({"$complex": [1.0, "2.0"]}),
            json!({"$map": [[1, 2, 3]]}),
            json!({"$ordered": {"a": 1}}),
            json!({"$counter": [1]}),
            json!({"$numpy": ["f4", []]}),
            json!({"$numpy": ["f4", {"$numpy": ["f4", 1]}]}),
            json!({"$numpy": [4, 1]}),
            json!({"$int:x": 1}),
            json!({"$int:18446744073709551616": 1}),
            json!({"$bool:yes": 1}),
            json!({"$": 1}),
        ] {
            let refused = decode::<Value>(&wrong).expect_err("not an encoding");
            assert_eq!(refused.kind(), ErrorKind::Invalid, "{wrong}");
            decode::<Kinds>(&wrong).expect_err("not an encoding");
            decode::<IgnoredAny>(&wrong).expect_err("not an encoding");
        }
    }
}
