//! Values keep the kinds that Python tells apart, and programs read them as ordinary types.

use super::saved_and_restored;
use ashore::Value;
use ashore::internal::state::{decode_value, encode_value};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};

fn text(text: &str) -> Value {
    Value::Text(text.into())
}

fn scalar(dtype: &str, value: Value) -> Value {
    Value::Numpy(dtype.into(), Box::new(value))
}

/// Every kind, and its encoding.
fn every_kind() -> Vec<(Value, serde_json::Value)> {
    use Value as V;
    let pairs = |a: Value, b: Value| vec![(a, V::Int(1)), (b, V::Int(2))];
    vec![
        (V::None, json!(null)),
        (V::Bool(true), json!(true)),
        (V::Int(-5), json!(-5)),
        (V::Uint(u64::MAX), json!(u64::MAX)),
        (V::Big("-8000000000000001".into()), json!({"$big": "-8000000000000001"})),
        (V::Float(-0.0), json!(-0.0)),
        (V::Float(f64::NEG_INFINITY), json!({"$f64": "fff0000000000000"})),
        (V::Single(f32::INFINITY), json!({"$f32": "7f800000"})),
        (V::Complex(1.5, f64::INFINITY), json!({"$complex": [1.5, {"$f64": "7ff0000000000000"}]})),
        (text("$tuple"), json!("$tuple")),
        (V::Bytes(vec![0, 0xab, 255]), json!({"$bytes": "00abff"})),
        (V::Bytes(vec![]), json!({"$bytes": ""})),
        (V::List(vec![V::Int(1), V::Bytes(vec![1])]), json!([1, {"$bytes": "01"}])),
        (V::Tuple(vec![V::Tuple(vec![]), V::None]), json!({"$tuple": [{"$tuple": []}, null]})),
        (V::Set(vec![V::Int(2), V::Int(1)]), json!({"$set": [2, 1]})),
        (V::FrozenSet(vec![text("a")]), json!({"$frozenset": ["a"]})),
        (V::Dict(vec![]), json!({})),
        (V::Dict(pairs(text("$tuple"), text("a"))), json!({"$$tuple": 1, "a": 2})),
        (V::Dict(pairs(V::Bool(true), V::Int(7))), json!({"$bool:true": 1, "$int:7": 2})),
        (V::Dict(pairs(V::Tuple(vec![V::Int(0)]), V::None)), json!({"$map": [[{"$tuple": [0]}, 1], [null, 2]]})),
        (V::Ordered(pairs(text("b"), text("a"))), json!({"$ordered": [["b", 1], ["a", 2]]})),
        (V::Counter(pairs(V::Int(9), text("a"))), json!({"$counter": [[9, 1], ["a", 2]]})),
        (scalar("float32", V::Float(0.5)), json!({"$numpy": ["float32", 0.5]})),
        (scalar("complex64", V::Complex(0.5, 1.0)), json!({"$numpy": ["complex64", {"$complex": [0.5, 1.0]}]})),
        (scalar("datetime64[ns]", V::Int(-1)), json!({"$numpy": ["datetime64[ns]", -1]})),
    ]
}

#[test]
fn every_kind_is_encoded_as_documented_and_comes_back() {
    for (value, encoded) in every_kind() {
        assert_eq!(encode_value(&value).unwrap(), encoded);
        assert_eq!(saved_and_restored(&value).unwrap(), value);
    }
}

#[test]
fn programs_read_kinds_as_ordinary_types() {
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Group {
        betas: (f64, f64),
        skipped: BTreeSet<u8>,
        salt: Vec<u8>,
        rate: f32,
        phase: (f64, f64),
        counts: BTreeMap<i64, u64>,
        pairs: BTreeMap<(u8, u8), bool>,
        state: u128,
        step: Option<u64>,
    }
    let int = Value::Int;
    let group = Value::Ordered(vec![
        (text("betas"), Value::Tuple(vec![Value::Float(0.9), scalar("float64", Value::Float(0.5))])),
        (text("skipped"), Value::FrozenSet(vec![int(3), int(1)])),
        (text("salt"), Value::Bytes(vec![7, 255])),
        (text("rate"), scalar("float32", Value::Float(0.25))),
        (text("phase"), Value::Complex(1.0, -2.0)),
        (text("counts"), Value::Counter(vec![(int(-4), int(2))])),
        (text("pairs"), Value::Dict(vec![(Value::Tuple(vec![int(1), int(2)]), Value::Bool(true))])),
        (text("state"), Value::Big("1ffffffffffffffffffffffffffffff".into())),
        (text("step"), scalar("uint8", int(3))),
        (text("unknown to the program"), Value::Tuple(vec![Value::Big("f".repeat(40)), Value::Bytes(vec![1])])),
    ]);
    let read: Group = decode_value(&encode_value(&group).unwrap()).unwrap();
    let expected = Group {
        betas: (0.9, 0.5),
        skipped: [1, 3].into(),
        salt: vec![7, 255],
        rate: 0.25,
        phase: (1.0, -2.0),
        counts: [(-4, 2)].into(),
        pairs: [((1, 2), true)].into(),
        state: (1 << 121) - 1,
        step: Some(3),
    };
    assert_eq!(read, expected);
}

#[test]
fn json_of_any_shape_reads_kinds() {
    let value = Value::Tuple(vec![Value::Bytes(vec![7, 255]), Value::Complex(0.5, 1.0), scalar("int8", Value::Int(3))]);
    assert_eq!(
        decode_value::<serde_json::Value>(&encode_value(&value).unwrap()).unwrap(),
        json!([[7, 255], [0.5, 1.0], 3])
    );
}

#[test]
fn bytes_of_older_steps_are_read() {
    #[derive(Debug, PartialEq)]
    struct Bytes(Vec<u8>);
    impl<'de> Deserialize<'de> for Bytes {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl serde::de::Visitor<'_> for Visitor {
                type Value = Bytes;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("bytes")
                }
                fn visit_byte_buf<E>(self, bytes: Vec<u8>) -> Result<Bytes, E> {
                    Ok(Bytes(bytes))
                }
            }
            deserializer.deserialize_bytes(Visitor)
        }
    }
    for encoded in [json!([7, 255]), json!({"$bytes": "07ff"}), json!({"$numpy": ["bytes", {"$bytes": "07ff"}]})] {
        assert_eq!(decode_value::<Bytes>(&encoded).unwrap(), Bytes(vec![7, 255]));
    }
}

#[test]
fn other_formats_keep_the_values() {
    let value = Value::Tuple(vec![Value::Int(1), Value::Ordered(vec![(text("a"), Value::Float(0.5))])]);
    let json = serde_json::to_value(&value).unwrap();
    assert_eq!(json, json!([1, [["a", 0.5]]]));
    let read: Value = serde_json::from_value(json).unwrap();
    let pair = Value::List(vec![text("a"), Value::Float(0.5)]);
    assert_eq!(read, Value::List(vec![Value::Int(1), Value::List(vec![pair])]));
}

fn value() -> impl Strategy<Value = Value> {
    let float = || any::<u64>().prop_map(f64::from_bits);
    let leaf = prop_oneof![
        Just(Value::None),
        any::<bool>().prop_map(Value::Bool),
        any::<i64>().prop_map(Value::Int),
        (1 << 63..=u64::MAX).prop_map(Value::Uint),
        "-?[1-9a-f][0-9a-f]{16,70}".prop_map(Value::Big),
        float().prop_map(Value::Float),
        (0_u32..1 << 23).prop_map(|low| Value::Single(f32::from_bits(0x7f80_0000 | low))),
        (float(), float()).prop_map(|(re, im)| Value::Complex(re, im)),
        r"\$?[a-z:]{0,5}".prop_map(Value::Text),
        prop::collection::vec(any::<u8>(), 0..9).prop_map(Value::Bytes),
        ("[a-z0-9]{1,9}", float()).prop_map(|(dtype, value)| scalar(&dtype, Value::Float(value))),
    ];
    leaf.prop_recursive(5, 40, 4, |inner| {
        let items = prop::collection::vec(inner.clone(), 0..4);
        let pairs = prop::collection::vec((inner.clone(), inner), 0..4);
        prop_oneof![
            items.clone().prop_map(Value::List),
            items.clone().prop_map(Value::Tuple),
            items.clone().prop_map(Value::Set),
            items.prop_map(Value::FrozenSet),
            // With a key that no object of JSON has, so that the order and duplicates are kept.
            pairs.clone().prop_map(|mut pairs| {
                pairs.push((Value::None, Value::None));
                Value::Dict(pairs)
            }),
            pairs.clone().prop_map(Value::Ordered),
            pairs.prop_map(Value::Counter),
            prop::collection::btree_map(r"\$?[a-z:]{0,5}", any::<i64>(), 0..4).prop_map(|map| {
                Value::Dict(map.into_iter().map(|(key, value)| (Value::Text(key), Value::Int(value))).collect())
            }),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// Compared by `Debug`, because a float that is not a number equals none, and by encoding, for its bits.
    #[test]
    fn any_value_comes_back(value in value()) {
        let back = saved_and_restored(&value).unwrap();
        prop_assert_eq!(encode_value(&back).unwrap(), encode_value(&value).unwrap());
        prop_assert_eq!(format!("{back:?}"), format!("{value:?}"));
    }
}
