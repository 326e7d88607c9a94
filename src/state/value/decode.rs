//! Decodes JSON to serde values.

use super::{BOOL, F32, F64, INT};
use serde::de::value::{BorrowedStrDeserializer, MapDeserializer, SeqDeserializer};
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, IntoDeserializer, Unexpected, VariantAccess, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::{Error, Map, Value};

type Result<T> = std::result::Result<T, Error>;

/// Reads an encoded value.
#[derive(Clone, Copy)]
pub(super) struct Decoder<'de>(pub &'de Value);

impl<'de> IntoDeserializer<'de, Error> for Decoder<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// A float that a tagged object encodes.
enum Float {
    F32(f32),
    F64(f64),
}

impl Float {
    /// None for an object that is not a tag.
    fn from_object(object: &Map<String, Value>) -> Option<Result<Self>> {
        let (key, bits) = object.iter().next().filter(|(key, _)| *key == F32 || *key == F64)?;
        let text = bits.as_str().filter(|_| object.len() == 1);
        let float = if key == F32 {
            text.and_then(|t| Some(f32::from_bits(bits_of(t, 8)?.try_into().ok()?))).map(Self::F32)
        } else {
            text.and_then(|t| Some(f64::from_bits(bits_of(t, 16)?))).map(Self::F64)
        };
        Some(float.ok_or_else(|| Error::custom(format!("a float is not its bits in lower-case hex {key}={bits}"))))
    }

    fn visit<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self {
            Self::F32(value) => visitor.visit_f32(value),
            Self::F64(value) => visitor.visit_f64(value),
        }
    }
}

fn bits_of(text: &str, digits: usize) -> Option<u64> {
    let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    if text.len() == digits && text.bytes().all(hex) { u64::from_str_radix(text, 16).ok() } else { None }
}

fn visit_list<'de, V: Visitor<'de>>(items: &'de [Value], visitor: V) -> Result<V::Value> {
    let mut items = SeqDeserializer::new(items.iter().map(Decoder));
    let value = visitor.visit_seq(&mut items)?;
    items.end()?;
    Ok(value)
}

fn visit_object<'de, V: Visitor<'de>>(object: &'de Map<String, Value>, visitor: V) -> Result<V::Value> {
    // Keys are checked first, so that the iterator below has only valid ones.
    let keys = object.keys().map(|key| Key::parse(key)).collect::<Result<Vec<_>>>()?;
    let mut entries = MapDeserializer::new(keys.into_iter().zip(object.values().map(Decoder)));
    let value = visitor.visit_map(&mut entries)?;
    entries.end()?;
    Ok(value)
}

impl<'de> Deserializer<'de> for Decoder<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(value), _, _) => visitor.visit_u64(value),
                (_, Some(value), _) => visitor.visit_i64(value),
                (_, _, Some(value)) => visitor.visit_f64(value),
                _ => Err(Error::custom(format!("a number is beyond 64 bits value={number}"))),
            },
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::Array(items) => visit_list(items, visitor),
            Value::Object(object) => match Float::from_object(object) {
                Some(float) => float?.visit(visitor),
                None => visit_object(object, visitor),
            },
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.deserialize_byte_buf(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        let byte = |item: &Value| item.as_u64().and_then(|n| u8::try_from(n).ok());
        match self.0.as_array().and_then(|items| items.iter().map(byte).collect::<Option<Vec<u8>>>()) {
            Some(bytes) => visitor.visit_byte_buf(bytes),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        let single = |object: &'de Map<String, Value>| object.iter().next().filter(|_| object.len() == 1);
        if let Value::String(variant) = self.0 {
            return visitor.visit_enum(Variant { name: Key::Text(variant), content: None });
        }
        match self.0.as_object().and_then(single) {
            Some((key, content)) => visitor.visit_enum(Variant { name: Key::parse(key)?, content: Some(content) }),
            None => Err(Error::custom("a variant is text or an object with one key")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string unit unit_struct seq tuple tuple_struct
        map struct identifier ignored_any
    }
}

/// A variant of an enum.
struct Variant<'de> {
    name: Key<'de>,
    content: Option<&'de Value>,
}

impl<'de> EnumAccess<'de> for Variant<'de> {
    type Error = Error;
    type Variant = Content<'de>;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Content<'de>)> {
        Ok((seed.deserialize(self.name)?, Content(self.content)))
    }
}

/// The content of a variant; None for a unit variant.
struct Content<'de>(Option<&'de Value>);

impl<'de> VariantAccess<'de> for Content<'de> {
    type Error = Error;

    fn unit_variant(self) -> Result<()> {
        match self.0 {
            None => Ok(()),
            Some(_) => Err(Error::invalid_type(Unexpected::Map, &"a unit variant")),
        }
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value> {
        match self.0 {
            Some(value) => seed.deserialize(Decoder(value)),
            None => Err(Error::invalid_type(Unexpected::UnitVariant, &"a newtype variant")),
        }
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value> {
        match self.0 {
            Some(Value::Array(items)) => visit_list(items, visitor),
            _ => Err(Error::custom("a tuple variant holds an array")),
        }
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], visitor: V) -> Result<V::Value> {
        match self.0 {
            Some(Value::Object(object)) => visit_object(object, visitor),
            _ => Err(Error::custom("a struct variant holds an object")),
        }
    }
}

/// The key of an object, with its tag decoded.
#[derive(Clone, Copy)]
enum Key<'de> {
    Text(&'de str),
    Bool(bool),
    /// An integer and its digits.
    Unsigned(u64, &'de str),
    Signed(i64, &'de str),
}

impl<'de> Key<'de> {
    fn parse(key: &'de str) -> Result<Self> {
        let parsed = if let Some(digits) = key.strip_prefix(INT) {
            let unsigned = digits.parse().map(|n| Self::Unsigned(n, digits));
            unsigned.or_else(|_| digits.parse().map(|n| Self::Signed(n, digits))).ok()
        } else if let Some(text) = key.strip_prefix(BOOL) {
            text.parse().map(Self::Bool).ok()
        } else {
            match key.strip_prefix('$') {
                Some(text) => text.starts_with('$').then_some(Self::Text(text)),
                None => Some(Self::Text(key)),
            }
        };
        parsed.ok_or_else(|| Error::custom(format!("a key has an unknown tag key={key:?}")))
    }
}

impl<'de> IntoDeserializer<'de, Error> for Key<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Key<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self {
            Self::Text(text) => visitor.visit_borrowed_str(text),
            Self::Bool(value) => visitor.visit_bool(value),
            Self::Unsigned(value, _) => visitor.visit_u64(value),
            Self::Signed(value, _) => visitor.visit_i64(value),
        }
    }

    /// Any key decodes as text, because `serde_json::Value` asks for text.
    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self {
            Self::Text(text) | Self::Unsigned(_, text) | Self::Signed(_, text) => visitor.visit_borrowed_str(text),
            Self::Bool(value) => visitor.visit_str(if value { "true" } else { "false" }),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.deserialize_str(visitor)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value> {
        match self {
            Self::Text(text) => visitor.visit_enum(BorrowedStrDeserializer::new(text)),
            _ => Err(Error::custom("a variant is text")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf option unit unit_struct seq tuple
        tuple_struct map struct identifier ignored_any
    }
}
