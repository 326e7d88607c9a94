//! Decodes JSON to serde values.

use super::tag::Tag;
use super::{BOOL, INT, VALUE};
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

/// Pairs of a map whose keys are of any kind.
fn visit_pairs<'de, V: Visitor<'de>>(pairs: &'de [Value], visitor: V) -> Result<V::Value> {
    let pair = |pair: &'de Value| pair.as_array().map(|pair| (Decoder(&pair[0]), Decoder(&pair[1])));
    let mut entries = MapDeserializer::new(pairs.iter().filter_map(pair));
    let value = visitor.visit_map(&mut entries)?;
    entries.end()?;
    Ok(value)
}

/// An integer beyond 64 bits.
fn visit_big<'de, V: Visitor<'de>>(digits: &str, visitor: V) -> Result<V::Value> {
    match (u128::from_str_radix(digits, 16), i128::from_str_radix(digits, 16)) {
        (Ok(value), _) => visitor.visit_u128(value),
        (_, Ok(value)) => visitor.visit_i128(value),
        _ => Err(Error::custom(format!("an integer is beyond 128 bits digits={}", digits.len()))),
    }
}

impl<'de> Decoder<'de> {
    /// The tag, if this object is a tag.
    fn tag(self) -> Result<Option<Tag<'de>>> {
        self.0.as_object().and_then(Tag::of).transpose()
    }

    /// Returns the value inside a NumPy scalar, because the scalar decodes as its value.
    fn plain(self) -> Result<Self> {
        Ok(match self.tag()? {
            Some(Tag::Numpy(value)) => Self(value),
            _ => self,
        })
    }
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
            Value::Object(object) => match self.tag()? {
                Some(Tag::F32(value)) => visitor.visit_f32(value),
                Some(Tag::F64(value)) => visitor.visit_f64(value),
                Some(Tag::Big(digits)) => visit_big(digits, visitor),
                // Decoded as numbers, because types that accept anything, such as `serde_json::Value`, accept
                // no bytes.
                Some(Tag::Bytes(bytes)) => visitor.visit_seq(SeqDeserializer::new(bytes.into_iter())),
                Some(Tag::Complex(items) | Tag::List(items)) => visit_list(items, visitor),
                Some(Tag::Pairs(pairs)) => visit_pairs(pairs, visitor),
                Some(Tag::Numpy(value)) => Self(value).deserialize_any(visitor),
                None => visit_object(object, visitor),
            },
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, name: &'static str, visitor: V) -> Result<V::Value> {
        if name != VALUE {
            return visitor.visit_newtype_struct(self);
        }
        let tagged = |tag, content| Variant { name: Key::Text(tag), content: Some(content) };
        match (self.tag()?, self.0.as_object().and_then(|object| object.iter().next())) {
            (Some(Tag::Bytes(bytes)), _) => visitor.visit_byte_buf(bytes),
            (
                Some(Tag::Big(_) | Tag::Complex(_) | Tag::List(_) | Tag::Pairs(_) | Tag::Numpy(_)),
                Some((tag, content)),
            ) => visitor.visit_enum(tagged(tag, content)),
            _ => self.deserialize_any(visitor),
        }
    }

    /// Ignores an integer of any length, which `deserialize_any` would refuse.
    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        match self.tag()? {
            Some(Tag::Big(_)) => visitor.visit_unit(),
            _ => self.deserialize_any(visitor),
        }
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        self.deserialize_byte_buf(visitor)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value> {
        let plain = self.plain()?;
        if let Some(Tag::Bytes(bytes)) = plain.tag()? {
            return visitor.visit_byte_buf(bytes);
        }
        // Accepts bytes of older steps, and lists of integers.
        let byte = |item: &Value| item.as_u64().and_then(|n| u8::try_from(n).ok());
        match plain.0.as_array().and_then(|items| items.iter().map(byte).collect::<Option<Vec<u8>>>()) {
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
        let plain = self.plain()?;
        if let Value::String(variant) = plain.0 {
            return visitor.visit_enum(Variant { name: Key::Text(variant), content: None });
        }
        match plain.0.as_object().and_then(single) {
            Some((key, content)) => visitor.visit_enum(Variant { name: Key::parse(key)?, content: Some(content) }),
            None => Err(Error::custom("a variant is text or an object with one key")),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string unit unit_struct seq tuple tuple_struct
        map struct identifier
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
