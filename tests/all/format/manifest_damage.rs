//! The reader detects every damage to a manifest.

use super::sample;
use ashore::ErrorKind;
use ashore::internal::format::seal::seal;
use ashore::internal::format::v1::Manifest;

#[test]
fn a_manifest_is_read_as_it_was_written() {
    let manifest = sample();
    assert_eq!(Manifest::parse(&manifest.to_bytes().unwrap()).unwrap(), manifest);
}

#[test]
fn a_flipped_bit_anywhere_is_refused() {
    let bytes = sample().to_bytes().unwrap();
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let refused = Manifest::parse(&flipped).expect_err("a bit was flipped");
        assert_eq!(refused.kind(), ErrorKind::Corrupt, "bit={bit}: {refused}");
    }
}

#[test]
fn a_manifest_cut_short_or_continued_is_refused() {
    let bytes = sample().to_bytes().unwrap();
    for len in 0..bytes.len() {
        assert_eq!(Manifest::parse(&bytes[..len]).unwrap_err().kind(), ErrorKind::Corrupt, "length={len}");
    }
    for more in [&b"\n"[..], b" ", b"\0", &bytes] {
        assert!(Manifest::parse(&[&bytes, more].concat()).is_err(), "{more:?}");
        assert!(Manifest::parse(&[more, &bytes].concat()).is_err(), "{more:?}");
    }
}

#[test]
fn an_intact_manifest_of_another_version_is_told_from_damage() {
    let refused = Manifest::parse(&seal(br#"{"format":"ashore","version":3,"new":{}"#.to_vec())).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.message().ends_with("version=3 supported=1,2"), "{refused}");
}
