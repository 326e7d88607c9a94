//! A state dict refuses a value that could not be restored, and the error names it.

use super::saved_and_restored;
use ashore::internal::state::{decode_value, encode_value};
use ashore::{ErrorKind, StateDict};
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
fn integers_beyond_64_bits_are_refused() {
    refused(&u128::MAX, "beyond 64 bits");
    refused(&(i128::from(i64::MIN) - 1), "beyond 64 bits");
    refused(&HashMap::from([(u128::from(u64::MAX) + 1, 0)]), "beyond 64 bits");
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
