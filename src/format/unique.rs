//! Parses JSON and refuses objects with a duplicate key. JSON readers differ on which duplicate they take, so
//! two readers of one file could disagree.

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::collections::{BTreeMap, btree_map};
use std::fmt;

/// The key under which `serde_json` passes numbers if some crate of the program has enabled
/// `arbitrary_precision`. [`crate::state::encode_value`] never writes this key, so the key is unambiguous.
const NUMBER: &str = "$serde_json::private::Number";

/// Deserializes a map of values, for `#[serde(deserialize_with)]`.
pub(crate) fn values<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeMap<String, Value>, D::Error> {
    struct Values;
    impl<'de> Visitor<'de> for Values {
        type Value = BTreeMap<String, Value>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map of values")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut values = BTreeMap::new();
            while let Some(name) = map.next_key::<String>()? {
                match values.entry(name) {
                    btree_map::Entry::Vacant(free) => free.insert(map.next_value_seed(Unique)?),
                    btree_map::Entry::Occupied(taken) => return Err(twice(taken.key())),
                };
            }
            Ok(values)
        }
    }
    deserializer.deserialize_map(Values)
}

/// Parses an object of values.
pub(crate) fn from_slice(json: &[u8]) -> serde_json::Result<BTreeMap<String, Value>> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let values = values(&mut deserializer)?;
    deserializer.end()?;
    Ok(values)
}

fn twice<E: Error>(key: &str) -> E {
    E::custom(format!("duplicate key key={key:?}"))
}

/// Reads any value. `serde_json` bounds the nesting at 127.
struct Unique;

impl<'de> DeserializeSeed<'de> for Unique {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a json value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = seq.next_element_seed(Unique)? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == NUMBER && values.is_empty() {
                let text = map.next_value::<String>()?;
                return text.parse::<Number>().map(Value::Number).map_err(A::Error::custom);
            }
            if values.contains_key(&key) {
                return Err(twice(&key));
            }
            values.insert(key, map.next_value_seed(Unique)?);
        }
        Ok(Value::Object(values))
    }
}
