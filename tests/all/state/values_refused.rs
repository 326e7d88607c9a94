//! A state dict refuses a value that could not be restored, and the error names it.

use super::saved_and_restored;
use ashore::internal::state::{decode_value, encode_value};
use ashore::{ErrorKind, StateDict, Value};
use serde::{Serialize, Serializer};
use std::collections::{BTreeMap, HashMap};

fn refused(value: &impl Serialize, why: &str) {
    let mut state = StateDict::new();
    let refused = state.value("the value", value).map(|_| ()).expect_err(why);
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
    let text = format!("{refused:#}");
    assert!(text.contains(r#"value="the value""#) && text.contains(why), "{text}");
}

#[test]
fn options_that_hold_nothing_are_refused() {
    let why = "an option that holds nothing";
    refused(&Some(None::<u8>), why);
    refused(&Some(Some(None::<u8>)), why);
    refused(&vec![Some(())], why);
    refused(&Some(serde_json::Value::Null), why);
    assert_eq!(saved_and_restored(&Some(Some(1))).unwrap(), Some(Some(1)));
    assert_eq!(saved_and_restored(&None::<Option<u8>>).unwrap(), None);
}

#[test]
fn integer_keys_beyond_64_bits_are_refused() {
    refused(&HashMap::from([(u128::from(u64::MAX) + 1, 0)]), "beyond 64 bits");
    refused(&HashMap::from([(i128::from(i64::MIN) - 1, 0)]), "beyond 64 bits");
}

#[test]
fn kinds_that_could_not_be_read_again_are_refused() {
    for digits in ["", "-", "0", "-0", "00ff", "FF", "+1", "0x1", "1 "] {
        refused(&Value::Big(digits.into()), "an integer in hex");
    }
    let scalar = |value| Value::Numpy("float32".into(), Box::new(value));
    for value in [Value::None, Value::List(vec![]), Value::Dict(vec![]), scalar(Value::Int(1))] {
        refused(&scalar(value), "a dtype and a value");
    }
    let twice = |key: &str| (Value::Text(key.into()), Value::None);
    refused(&Value::Dict(vec![twice("$a"), twice("$a")]), "duplicate key");
}

#[test]
fn integers_beyond_128_bits_are_read_as_such_or_not_at_all() {
    let longer = Value::Big(format!("-1{}", "0".repeat(5000)));
    assert_eq!(saved_and_restored(&longer).unwrap(), longer);
    let encoded = encode_value(&(&longer, 5)).unwrap();
    let refused = decode_value::<(i128, u8)>(&encoded).unwrap_err();
    assert!(format!("{refused:#}").contains("an integer is beyond 128 bits digits=5002"), "{refused:#}");
    assert_eq!(decode_value::<(serde::de::IgnoredAny, u8)>(&encoded).unwrap().1, 5);
}

#[test]
fn keys_that_are_not_text_integers_or_bools_are_refused() {
    let why = "a key is not text";
    refused(&BTreeMap::from([((1, 2), 0)]), why);
    refused(&BTreeMap::from([(Some(1), 0)]), why);
    refused(&BTreeMap::from([((), 0)]), why);
    refused(&BTreeMap::from([(vec![1], 0)]), why);
    struct FloatKey;
    impl Serialize for FloatKey {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_map([(0.5_f64, 0)])
        }
    }
    refused(&FloatKey, why);
}

#[test]
fn a_key_that_comes_twice_is_refused() {
    struct Twice;
    impl Serialize for Twice {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_map([("a", 0), ("a", 1)])
        }
    }
    refused(&Twice, "duplicate key");
}

#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Nested(Vec<Nested>);

#[test]
fn values_that_nest_too_deep_to_be_read_are_refused() {
    let nested = |depth: usize| (1..depth).fold(Nested(vec![]), |inner, _| Nested(vec![inner]));
    assert_eq!(saved_and_restored(&nested(125)).unwrap(), nested(125));
    for depth in [126, 5000] {
        refused(&nested(depth), "it nests too deeply");
    }
    // A tuple nests two levels: its tag, and its items.
    let tuples = |depth| (1..depth).fold(Value::Tuple(vec![]), |inner, _| Value::Tuple(vec![inner]));
    assert_eq!(saved_and_restored(&tuples(62)).unwrap(), tuples(62));
    refused(&tuples(63), "it nests too deeply");
    // A float that needs a tag nests one level more.
    struct Deep(usize, f64);
    impl Serialize for Deep {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            if self.0 == 0 { self.1.serialize(serializer) } else { [Deep(self.0 - 1, self.1)].serialize(serializer) }
        }
    }
    assert!(encode_value(&Deep(125, 0.5)).is_ok() && encode_value(&Deep(124, f64::NAN)).is_ok());
    refused(&Deep(125, f64::NAN), "it nests too deeply");
}

#[test]
fn another_type_is_refused() {
    let encoded = encode_value(&(1, 2, 3)).unwrap();
    assert!(decode_value::<(i32, i32, i32)>(&encoded).is_ok());
    for refused in [
        decode_value::<(i32, i32)>(&encoded).map(|_| ()),
        decode_value::<(i32, i32, i32, i32)>(&encoded).map(|_| ()),
        decode_value::<String>(&encoded).map(|_| ()),
        decode_value::<i32>(&encode_value(&1.5).unwrap()).map(|_| ()),
    ] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
    }
}
