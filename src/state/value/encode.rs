//! Encodes serde values as JSON.

use super::tag::{Tag, hex};
use super::{BIG, BOOL, BYTES, F32, F64, INT, MAX_DEPTH, tag_of};
use serde::ser::{self, Error as _, Impossible, Serialize, Serializer};
use serde_json::{Error, Map, Value};

type Result<T> = std::result::Result<T, Error>;

/// The encoding of `value`, inside of `depth` arrays and objects.
pub(super) fn value(value: &(impl Serialize + ?Sized), depth: usize) -> Result<Value> {
    value.serialize(Encoder { depth })
}

/// Escapes a user's key, field or variant name as a JSON key.
fn escaped(key: &str) -> String {
    if key.starts_with('$') { format!("${key}") } else { key.into() }
}

/// An object with one entry.
fn single(key: &str, value: impl Into<Value>) -> Value {
    Value::Object(Map::from_iter([(key.into(), value.into())]))
}

#[derive(Clone, Copy)]
struct Encoder {
    depth: usize,
}

impl Encoder {
    /// The depth of the next level.
    fn enter(self) -> Result<usize> {
        if self.depth < MAX_DEPTH {
            Ok(self.depth + 1)
        } else {
            Err(Error::custom(format!("it nests too deeply limit={MAX_DEPTH}")))
        }
    }

    /// A tag with text as its content.
    fn tagged(self, tag: &str, text: String) -> Result<Value> {
        self.enter()?;
        Ok(single(tag, text))
    }

    fn list(self, len: Option<usize>, variant: Option<&str>) -> Result<List> {
        let depth = if variant.is_some() { Self { depth: self.enter()? } } else { self }.enter()?;
        // The length is only a hint.
        let items = Vec::with_capacity(len.unwrap_or(0).min(1 << 16));
        Ok(List { items, depth, variant: variant.map(escaped) })
    }

    fn object(self, variant: Option<&str>) -> Result<Object> {
        let depth = if variant.is_some() { Self { depth: self.enter()? } } else { self }.enter()?;
        Ok(Object { entries: Map::new(), key: None, depth, variant: variant.map(escaped) })
    }
}

macro_rules! plain {
    ($($method:ident: $type:ty),*) => { $(
        fn $method(self, value: $type) -> Result<Value> {
            Ok(value.into())
        }
    )* };
}

impl Serializer for Encoder {
    type Ok = Value;
    type Error = Error;
    type SerializeSeq = List;
    type SerializeTuple = List;
    type SerializeTupleStruct = List;
    type SerializeTupleVariant = List;
    type SerializeMap = Object;
    type SerializeStruct = Object;
    type SerializeStructVariant = Object;

    plain! {
        serialize_bool: bool, serialize_str: &str,
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64
    }

    fn serialize_i128(self, value: i128) -> Result<Value> {
        match (u128::try_from(value), i64::try_from(value)) {
            (Ok(value), _) => self.serialize_u128(value),
            (_, Ok(value)) => Ok(value.into()),
            _ => self.tagged(BIG, format!("-{:x}", value.unsigned_abs())),
        }
    }

    fn serialize_u128(self, value: u128) -> Result<Value> {
        u64::try_from(value).map(Value::from).or_else(|_| self.tagged(BIG, format!("{value:x}")))
    }

    fn serialize_f32(self, value: f32) -> Result<Value> {
        if value.is_finite() {
            return Ok(f64::from(value).into());
        }
        self.tagged(F32, format!("{:08x}", value.to_bits()))
    }

    fn serialize_f64(self, value: f64) -> Result<Value> {
        if value.is_finite() {
            return Ok(value.into());
        }
        self.tagged(F64, format!("{:016x}", value.to_bits()))
    }

    fn serialize_char(self, value: char) -> Result<Value> {
        Ok(String::from(value).into())
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<Value> {
        self.tagged(BYTES, hex(value))
    }

    fn serialize_none(self) -> Result<Value> {
        Ok(Value::Null)
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<Value> {
        match value.serialize(self)? {
            Value::Null => Err(Error::custom("json cannot tell an option that holds nothing from none")),
            some => Ok(some),
        }
    }

    fn serialize_unit(self) -> Result<Value> {
        Ok(Value::Null)
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<Value> {
        Ok(Value::Null)
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<Value> {
        Ok(variant.into())
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, name: &'static str, value: &T) -> Result<Value> {
        let Some(tag) = tag_of(name) else { return value.serialize(self) };
        let object = Map::from_iter([(tag.into(), self::value(value, self.enter()?)?)]);
        match Tag::of(&object) {
            Some(Err(wrong)) => Err(wrong),
            _ => Ok(object.into()),
        }
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<Value> {
        Ok(single(&escaped(variant), self::value(value, self.enter()?)?))
    }

    fn serialize_seq(self, len: Option<usize>) -> Result<List> {
        self.list(len, None)
    }

    fn serialize_tuple(self, len: usize) -> Result<List> {
        self.list(Some(len), None)
    }

    fn serialize_tuple_struct(self, _: &'static str, len: usize) -> Result<List> {
        self.list(Some(len), None)
    }

    fn serialize_tuple_variant(self, _: &'static str, _: u32, variant: &'static str, len: usize) -> Result<List> {
        self.list(Some(len), Some(variant))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Object> {
        self.object(None)
    }

    fn serialize_struct(self, name: &'static str, _: usize) -> Result<Object> {
        if name == "$serde_json::private::RawValue" {
            return Err(Error::custom("json text that was not parsed cannot be checked"));
        }
        self.object(None)
    }

    fn serialize_struct_variant(self, _: &'static str, _: u32, variant: &'static str, _: usize) -> Result<Object> {
        self.object(Some(variant))
    }
}

/// An array under construction, plain or in a variant.
struct List {
    items: Vec<Value>,
    depth: usize,
    variant: Option<String>,
}

impl List {
    fn push(&mut self, item: &(impl Serialize + ?Sized)) -> Result<()> {
        self.items.push(value(item, self.depth)?);
        Ok(())
    }

    fn finish(self) -> Result<Value> {
        Ok(match self.variant {
            Some(variant) => single(&variant, self.items),
            None => self.items.into(),
        })
    }
}

/// An object under construction, plain or in a variant.
struct Object {
    entries: Map<String, Value>,
    key: Option<String>,
    depth: usize,
    variant: Option<String>,
}

impl Object {
    fn put(&mut self, key: String, item: &(impl Serialize + ?Sized)) -> Result<()> {
        if self.entries.contains_key(&key) {
            return Err(Error::custom(format!("duplicate key key={key:?}")));
        }
        self.entries.insert(key, value(item, self.depth)?);
        Ok(())
    }

    fn finish(self) -> Result<Value> {
        Ok(match self.variant {
            Some(variant) => single(&variant, self.entries),
            None => self.entries.into(),
        })
    }
}

macro_rules! lists {
    ($($trait:ident: $method:ident),*) => { $(
        impl ser::$trait for List {
            type Ok = Value;
            type Error = Error;

            fn $method<T: Serialize + ?Sized>(&mut self, item: &T) -> Result<()> {
                self.push(item)
            }

            fn end(self) -> Result<Value> {
                self.finish()
            }
        }
    )* };
}
lists! {
    SerializeSeq: serialize_element, SerializeTuple: serialize_element,
    SerializeTupleStruct: serialize_field, SerializeTupleVariant: serialize_field
}

macro_rules! structs {
    ($($trait:ident),*) => { $(
        impl ser::$trait for Object {
            type Ok = Value;
            type Error = Error;

            fn serialize_field<T: Serialize + ?Sized>(&mut self, key: &'static str, item: &T) -> Result<()> {
                self.put(escaped(key), item)
            }

            fn end(self) -> Result<Value> {
                self.finish()
            }
        }
    )* };
}
structs! { SerializeStruct, SerializeStructVariant }

impl ser::SerializeMap for Object {
    type Ok = Value;
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<()> {
        self.key = Some(key.serialize(Key)?);
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, item: &T) -> Result<()> {
        match self.key.take() {
            Some(key) => self.put(key, item),
            None => Err(Error::custom("a map gives a value without a key")),
        }
    }

    fn end(self) -> Result<Value> {
        self.finish()
    }
}

/// Encodes keys of JSON objects.
struct Key;

impl Key {
    fn refuse<T>(what: &str) -> Result<T> {
        Err(Error::custom(format!("a key is not text, an integer or a bool kind={what}")))
    }
}

macro_rules! integers {
    ($($method:ident: $type:ty),*) => { $(
        fn $method(self, value: $type) -> Result<String> {
            if i64::try_from(value).is_err() && u64::try_from(value).is_err() {
                return Err(Error::custom(format!("an integer key is beyond 64 bits value={value}")));
            }
            Ok(format!("{INT}{value}"))
        }
    )* };
}

macro_rules! refused {
    ($($what:literal $method:ident($($type:ty),*) -> $ok:ty),* $(,)?) => { $(
        fn $method(self, $(_: $type),*) -> Result<$ok> {
            Key::refuse($what)
        }
    )* };
}

impl Serializer for Key {
    type Ok = String;
    type Error = Error;
    type SerializeSeq = Impossible<String, Error>;
    type SerializeTuple = Impossible<String, Error>;
    type SerializeTupleStruct = Impossible<String, Error>;
    type SerializeTupleVariant = Impossible<String, Error>;
    type SerializeMap = Impossible<String, Error>;
    type SerializeStruct = Impossible<String, Error>;
    type SerializeStructVariant = Impossible<String, Error>;

    integers! {
        serialize_i8: i8, serialize_i16: i16, serialize_i32: i32, serialize_i64: i64, serialize_i128: i128,
        serialize_u8: u8, serialize_u16: u16, serialize_u32: u32, serialize_u64: u64, serialize_u128: u128
    }

    fn serialize_bool(self, value: bool) -> Result<String> {
        Ok(format!("{BOOL}{value}"))
    }

    fn serialize_char(self, value: char) -> Result<String> {
        Ok(escaped(value.encode_utf8(&mut [0; 4])))
    }

    fn serialize_str(self, value: &str) -> Result<String> {
        Ok(escaped(value))
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<String> {
        Ok(escaped(variant))
    }

    fn serialize_newtype_struct<T: Serialize + ?Sized>(self, _: &'static str, value: &T) -> Result<String> {
        value.serialize(self)
    }

    refused! {
        "float" serialize_f32(f32) -> String,
        "float" serialize_f64(f64) -> String,
        "bytes" serialize_bytes(&[u8]) -> String,
        "option" serialize_none() -> String,
        "unit" serialize_unit() -> String,
        "unit" serialize_unit_struct(&'static str) -> String,
        "sequence" serialize_seq(Option<usize>) -> Self::SerializeSeq,
        "tuple" serialize_tuple(usize) -> Self::SerializeSeq,
        "tuple" serialize_tuple_struct(&'static str, usize) -> Self::SerializeSeq,
        "variant" serialize_tuple_variant(&'static str, u32, &'static str, usize) -> Self::SerializeSeq,
        "map" serialize_map(Option<usize>) -> Self::SerializeSeq,
        "struct" serialize_struct(&'static str, usize) -> Self::SerializeSeq,
        "variant" serialize_struct_variant(&'static str, u32, &'static str, usize) -> Self::SerializeSeq,
    }

    fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<String> {
        Key::refuse("option")
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        _: &'static str,
        _: &T,
    ) -> Result<String> {
        Key::refuse("variant")
    }
}
