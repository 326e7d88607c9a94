//! A manifest returns values unchanged, floats bit for bit.

use super::saved_and_restored;
use proptest::prelude::*;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::collections::{BTreeMap, HashMap};

/// Floats that are equal when their bits are.
#[derive(Clone, Copy, Debug)]
struct Single(f32);

#[derive(Clone, Copy, Debug)]
struct Double(f64);

impl PartialEq for Single {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl PartialEq for Double {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl Serialize for Single {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f32(self.0)
    }
}

impl<'de> Deserialize<'de> for Single {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f32::deserialize(deserializer).map(Self)
    }
}

impl Serialize for Double {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0)
    }
}

impl<'de> Deserialize<'de> for Double {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        f64::deserialize(deserializer).map(Self)
    }
}

/// Raw bytes, by serde's own calls for them.
#[derive(Clone, Debug, PartialEq)]
struct Bytes(Vec<u8>);

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                Ok(Bytes(bytes.to_vec()))
            }
        }
        deserializer.deserialize_byte_buf(Visitor)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Data {
    Unit,
    Bool(bool),
    Int(i64),
    Uint(u64),
    #[serde(rename = "$f32")]
    Single(Single),
    Double(Double),
    Text(String),
    Char(char),
    Bytes(Bytes),
    Option(Option<Box<Data>>),
    List(Vec<Data>),
    Pair(Box<Data>, Box<Data>),
    #[serde(rename = "$")]
    Named {
        #[serde(rename = "$f64")]
        a: Box<Data>,
        b: (),
    },
    Texts(BTreeMap<String, Data>),
    Ints(BTreeMap<i64, Data>),
    Bools(BTreeMap<bool, Data>),
    Chars(BTreeMap<char, Data>),
    Untagged(Untagged),
    Internal(Internal),
    Adjacent(Adjacent),
    Flat(Flat),
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Untagged {
    Int(i64),
    Double(Double),
    Keys(HashMap<u64, Double>),
    Named { name: String, rate: Double },
    Pair(String, Single),
    Nothing,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "$f32")]
enum Internal {
    Rate {
        rate: Single,
    },
    #[serde(rename = "$")]
    Keys(BTreeMap<String, Double>),
    Nothing,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "t", content = "$c")]
enum Adjacent {
    Rate(Single),
    Nothing,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Flat {
    first: Double,
    #[serde(flatten)]
    inner: Inner,
    #[serde(flatten)]
    rest: BTreeMap<u8, Single>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Inner {
    #[serde(rename = "$int:5")]
    second: Option<Double>,
}

fn single() -> impl Strategy<Value = Single> {
    any::<u32>().prop_map(|bits| Single(f32::from_bits(bits)))
}

fn double() -> impl Strategy<Value = Double> {
    let bits = prop_oneof![any::<u64>(), (0_u64..1 << 52).prop_map(|low| 0x7ff << 52 | low)];
    bits.prop_map(|bits| Double(f64::from_bits(bits)))
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof![".{0,6}", r"\$.{0,3}", r"\$(f64|f32|int:5|bool:true|\$)", r"[0-9]{1,3}"]
}

fn leaf() -> impl Strategy<Value = Data> {
    prop_oneof![
        Just(Data::Unit),
        any::<bool>().prop_map(Data::Bool),
        any::<i64>().prop_map(Data::Int),
        any::<u64>().prop_map(Data::Uint),
        single().prop_map(Data::Single),
        double().prop_map(Data::Double),
        key().prop_map(Data::Text),
        any::<char>().prop_map(Data::Char),
        prop::collection::vec(any::<u8>(), 0..9).prop_map(|b| Data::Bytes(Bytes(b))),
        prop_oneof![
            any::<i64>().prop_map(Untagged::Int),
            double().prop_map(Untagged::Double),
            prop::collection::hash_map(any::<u64>(), double(), 0..3).prop_map(Untagged::Keys),
            (key(), double()).prop_map(|(name, rate)| Untagged::Named { name, rate }),
            (key(), single()).prop_map(|(a, b)| Untagged::Pair(a, b)),
            Just(Untagged::Nothing),
        ]
        .prop_map(Data::Untagged),
        prop_oneof![
            single().prop_map(|rate| Internal::Rate { rate }),
            prop::collection::btree_map("[a-z$]{0,3}", double(), 0..3).prop_map(Internal::Keys),
            Just(Internal::Nothing),
        ]
        .prop_map(Data::Internal),
        prop_oneof![single().prop_map(Adjacent::Rate), Just(Adjacent::Nothing)].prop_map(Data::Adjacent),
        (double(), prop::option::of(double()), prop::collection::btree_map(any::<u8>(), single(), 0..3))
            .prop_map(|(first, second, rest)| Data::Flat(Flat { first, inner: Inner { second }, rest })),
    ]
}

fn data() -> impl Strategy<Value = Data> {
    leaf().prop_recursive(6, 60, 5, |inner| {
        let boxed = inner.clone().prop_map(Box::new).boxed();
        let map = |n| 0..n;
        prop_oneof![
            prop::option::of(boxed.clone()).prop_map(Data::Option),
            prop::collection::vec(inner.clone(), 0..5).prop_map(Data::List),
            (boxed.clone(), boxed.clone()).prop_map(|(a, b)| Data::Pair(a, b)),
            boxed.prop_map(|a| Data::Named { a, b: () }),
            prop::collection::btree_map(key(), inner.clone(), map(4)).prop_map(Data::Texts),
            prop::collection::btree_map(any::<i64>(), inner.clone(), map(4)).prop_map(Data::Ints),
            prop::collection::btree_map(any::<bool>(), inner.clone(), map(2)).prop_map(Data::Bools),
            prop::collection::btree_map(any::<char>(), inner, map(4)).prop_map(Data::Chars),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_nested_data_comes_back(data in data()) {
        prop_assert_eq!(saved_and_restored(&data).unwrap(), data);
    }

    #[test]
    fn any_json_comes_back(text in r#"\{"\$?[a-z$]{0,3}":(\[(null|true|1|-2|0\.5|"\$x"),\{"\$f64":"7ff8000000000000"\}\]|\{\})\}"#) {
        let json: serde_json::Value = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(saved_and_restored(&json).unwrap(), json);
    }
}

#[test]
fn floats_of_all_kinds_come_back_bit_for_bit() {
    // Every exponent and sign, with mantissas at the edges: zeros, subnormals, integers, infinities, quiet
    // and signalling NaN with payloads.
    let mut singles = Vec::new();
    for high in 0..512_u32 {
        for mantissa in [0, 1, 2, 0x2a_aaaa, 0x3f_ffff, 0x40_0000, 0x40_0001, 0x7f_ffff] {
            singles.push(Single(f32::from_bits(high << 23 | mantissa)));
        }
    }
    let mut doubles = Vec::new();
    for high in 0..4096_u64 {
        for mantissa in [0, 1, 0xa_aaaa_aaaa_aaaa, 0x7_ffff_ffff_ffff, 0x8_0000_0000_0000, 0xf_ffff_ffff_ffff] {
            doubles.push(Double(f64::from_bits(high << 52 | mantissa)));
        }
    }
    let all = (singles, doubles);
    assert!(saved_and_restored(&all).unwrap() == all);
}

#[test]
fn whole_floats_stay_floats_and_integers_stay_integers() {
    let json = serde_json::json!([1.0, -0.0, 1e300, 1, -1, u64::MAX, i64::MIN]);
    let back = saved_and_restored(&json).unwrap();
    assert_eq!(back, json);
    let floats: Vec<_> = back.as_array().unwrap().iter().map(serde_json::Value::is_f64).collect();
    assert_eq!(floats, [true, true, true, false, false, false, false]);
    assert!(back[1].as_f64().unwrap().is_sign_negative());
}

#[test]
fn wide_integers_come_back() {
    let wide = (i128::from(i64::MIN), i128::from(u64::MAX), u128::from(u64::MAX), BTreeMap::from([(5_i128, 1_u128)]));
    assert_eq!(saved_and_restored(&wide).unwrap(), wide);
    let wider = (i128::MIN, i128::from(i64::MIN) - 1, i128::MAX, u128::from(u64::MAX) + 1, u128::MAX);
    assert_eq!(saved_and_restored(&wider).unwrap(), wider);
}
