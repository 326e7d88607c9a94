//! A value with the kinds of Python, for bindings and for programs that read what a Python program wrote.

use super::{BIG, COMPLEX, COUNTER, FROZENSET, MAP, NUMPY, ORDERED, SET, TUPLE, VALUE, names};
use serde::de::{Deserialize, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, VariantAccess, Visitor};
use serde::ser::{Serialize, Serializer};
use std::fmt;

/// A value of a state dict with its kind. Python distinguishes these kinds; JSON and most Rust types do not.
///
/// It is a serde type like any other: [`StateDict::value`](crate::StateDict::value) takes it, and
/// [`Checkpoint::value`](crate::Checkpoint::value) returns it for a value of any type. A program that does
/// not care about kinds reads ordinary types: a tuple or set as a sequence, bytes as bytes or a sequence of
/// `u8`, a complex number as a pair, a NumPy scalar as its number, pairs as a map, an integer beyond 64 bits
/// as an `i128` or `u128`. Other serde formats than ours keep the values and lose the kinds.
///
/// # Example
/// ```
/// # let root = tempfile::tempdir()?;
/// use ashore::{CheckpointExecutor, StateDict, Value};
///
/// let executor = CheckpointExecutor::builder(root.path()).arena(2 << 20).chunk(1 << 20).build()?;
/// let mut state = StateDict::new();
/// let betas = Value::Tuple(vec![Value::Float(0.9), Value::Float(0.999)]);
/// state.value("betas", &betas)?.value("seed", &u128::MAX)?;
/// executor.save(1, state)?.wait(std::time::Duration::from_secs(60))?;
///
/// let checkpoint = executor.latest()?.ok_or("no step")?;
/// assert_eq!(checkpoint.value::<Value>("betas")?, betas);
/// assert_eq!(checkpoint.value::<(f64, f64)>("betas")?, (0.9, 0.999));
/// assert_eq!(checkpoint.value::<Value>("seed")?, Value::Big("f".repeat(32)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Value {
    /// `None`.
    None,
    /// A bool.
    Bool(bool),
    /// An integer of 64 bits.
    Int(i64),
    /// An integer of 64 bits that is too large for an `i64`.
    Uint(u64),
    /// An integer beyond 64 bits: lower-case hex digits without zeros in front, after a `-` if negative.
    Big(String),
    /// A float, kept bit for bit.
    Float(f64),
    /// A float of 32 bits that is infinite or not a number. A finite one is read as a `Float`.
    Single(f32),
    /// A complex number: real and imaginary part.
    Complex(f64, f64),
    /// Text.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A list.
    List(Vec<Value>),
    /// A tuple.
    Tuple(Vec<Value>),
    /// A set. The order of its items is kept, and duplicates are not detected.
    Set(Vec<Value>),
    /// A frozen set.
    FrozenSet(Vec<Value>),
    /// A dict. If all keys are text, integers of 64 bits or bools, their order is not kept.
    Dict(Vec<(Value, Value)>),
    /// An `OrderedDict`: its order is kept.
    Ordered(Vec<(Value, Value)>),
    /// A `Counter`.
    Counter(Vec<(Value, Value)>),
    /// A NumPy scalar: the name of its dtype (`float32`, `datetime64[ns]`), and its value, which is a bool, a
    /// number, a complex number, text or bytes.
    Numpy(String, Box<Value>),
}

impl Serialize for Value {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => serializer.serialize_unit(),
            Self::Bool(value) => serializer.serialize_bool(*value),
            Self::Int(value) => serializer.serialize_i64(*value),
            Self::Uint(value) => serializer.serialize_u64(*value),
            Self::Big(digits) => serializer.serialize_newtype_struct(names::BIG, digits),
            Self::Float(value) => serializer.serialize_f64(*value),
            Self::Single(value) => serializer.serialize_f32(*value),
            Self::Complex(re, im) => serializer.serialize_newtype_struct(names::COMPLEX, &(re, im)),
            Self::Text(text) => serializer.serialize_str(text),
            Self::Bytes(bytes) => serializer.serialize_bytes(bytes),
            Self::List(items) => items.serialize(serializer),
            Self::Tuple(items) => serializer.serialize_newtype_struct(names::TUPLE, items),
            Self::Set(items) => serializer.serialize_newtype_struct(names::SET, items),
            Self::FrozenSet(items) => serializer.serialize_newtype_struct(names::FROZENSET, items),
            Self::Dict(pairs) if pairs.iter().all(|(key, _)| key.is_plain_key()) => {
                serializer.collect_map(pairs.iter().map(|(key, value)| (key, value)))
            }
            Self::Dict(pairs) => serializer.serialize_newtype_struct(names::MAP, pairs),
            Self::Ordered(pairs) => serializer.serialize_newtype_struct(names::ORDERED, pairs),
            Self::Counter(pairs) => serializer.serialize_newtype_struct(names::COUNTER, pairs),
            Self::Numpy(dtype, value) => serializer.serialize_newtype_struct(names::NUMPY, &(dtype, value)),
        }
    }
}

impl Value {
    /// Whether an object of JSON keeps the kind of this key.
    fn is_plain_key(&self) -> bool {
        matches!(self, Self::Text(_) | Self::Int(_) | Self::Uint(_) | Self::Bool(_))
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_newtype_struct(VALUE, Kind)
    }
}

struct Kind;

macro_rules! visits {
    ($($method:ident($type:ty) $value:ident => $made:expr;)*) => { $(
        fn $method<E: Error>(self, $value: $type) -> Result<Value, E> {
            Ok($made)
        }
    )* };
}

impl<'de> Visitor<'de> for Kind {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    visits! {
        visit_bool(bool) value => Value::Bool(value);
        visit_i64(i64) value => Value::Int(value);
        visit_u64(u64) value => i64::try_from(value).map_or(Value::Uint(value), Value::Int);
        visit_f32(f32) value => Value::Single(value);
        visit_f64(f64) value => Value::Float(value);
        visit_str(&str) text => Value::Text(text.into());
        visit_string(String) text => Value::Text(text);
        visit_bytes(&[u8]) bytes => Value::Bytes(bytes.into());
        visit_byte_buf(Vec<u8>) bytes => Value::Bytes(bytes);
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::None)
    }

    /// Only serde formats other than ours call this.
    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut pairs = Vec::new();
        while let Some(pair) = entries.next_entry()? {
            pairs.push(pair);
        }
        Ok(Value::Dict(pairs))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<Value, A::Error> {
        let (tag, content) = tagged.variant::<String>()?;
        Ok(match tag.as_str() {
            BIG => Value::Big(content.newtype_variant()?),
            TUPLE => Value::Tuple(content.newtype_variant()?),
            SET => Value::Set(content.newtype_variant()?),
            FROZENSET => Value::FrozenSet(content.newtype_variant()?),
            MAP => Value::Dict(content.newtype_variant()?),
            ORDERED => Value::Ordered(content.newtype_variant()?),
            COUNTER => Value::Counter(content.newtype_variant()?),
            COMPLEX => {
                let (re, im) = content.newtype_variant()?;
                Value::Complex(re, im)
            }
            NUMPY => {
                let (dtype, value) = content.newtype_variant()?;
                Value::Numpy(dtype, Box::new(value))
            }
            _ => return Err(A::Error::custom(format!("an unknown kind tag={tag:?}"))),
        })
    }
}
