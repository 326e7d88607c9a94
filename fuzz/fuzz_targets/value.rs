//! Any JSON: decoding never panics; a user's value that is encoded is decoded to the same value.
#![no_main]

use ashore::internal::state::{decode_value, encode_value};
use ashore_fuzz::bounded;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

#[derive(Deserialize)]
#[serde(untagged)]
#[expect(dead_code, reason = "only decoded")]
enum Any {
    Float(f32),
    Ints(BTreeMap<i64, f64>),
    Enum(Enum),
    Named {
        a: Option<Box<Any>>,
        #[serde(flatten)]
        rest: BTreeMap<String, Value>,
    },
    List(Vec<Any>),
}

#[derive(Deserialize)]
#[expect(dead_code, reason = "only decoded")]
enum Enum {
    Unit,
    New(Box<Enum>),
    Tuple(u8, char),
    Named { a: bool, b: (f64, ()) },
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let Ok(json) = serde_json::from_slice::<Value>(input) else { return };
    bounded(input.len(), || {
        let _ = decode_value::<Value>(&json);
        let _ = decode_value::<Any>(&json);
        let _ = decode_value::<Enum>(&json);
        let _ = decode_value::<BTreeMap<bool, Vec<f32>>>(&json);
        let _ = decode_value::<ashore::Value>(&json);
        let _ = decode_value::<(u128, i128, Vec<u8>)>(&json);
    });
    // What is read with its kinds is written, unless a key comes twice, and read again.
    if let Some(encoded) = decode_value::<ashore::Value>(&json).ok().and_then(|value| encode_value(&value).ok()) {
        let value = decode_value::<ashore::Value>(&encoded).unwrap();
        assert_eq!(encode_value(&value).unwrap(), encoded);
    }
    if let Ok(encoded) = encode_value(&json) {
        let text = serde_json::to_vec(&encoded).unwrap();
        let encoded: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(decode_value::<Value>(&encoded).unwrap(), json);
    }
});
