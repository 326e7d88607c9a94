//! A manifest with the right digest can still be wrong or hostile. The reader refuses each such manifest, and
//! says where.

use super::{DATA, manifest, sample};
use ashore::internal::digest::Digest;
use ashore::internal::format::entries::{FileEntry, SliceEntry, TensorEntry};
use ashore::internal::format::seal::seal;
use ashore::internal::format::v1::Manifest;
use ashore::{Dtype, Error, ErrorKind};

/// Changes the sample and returns why the reader refuses it.
fn refused(change: impl FnOnce(&mut Manifest)) -> Error {
    let mut manifest = sample();
    change(&mut manifest);
    Manifest::parse(&manifest.to_bytes().unwrap()).expect_err("it was changed")
}

fn slice(manifest: &mut Manifest, tensor: usize) -> &mut SliceEntry {
    &mut manifest.tensors[tensor].slices[0]
}

/// The sample's JSON text with `from` replaced by `to`, sealed again.
fn forged(from: &str, to: &str) -> Vec<u8> {
    let bytes = sample().to_bytes().unwrap();
    let text = std::str::from_utf8(&bytes).unwrap();
    let text = &text[..text.rfind(r#","digest":""#).unwrap()];
    assert!(text.contains(from), "{from}");
    seal(text.replacen(from, to, 1).into())
}

#[test]
fn a_file_name_is_never_a_path() {
    let long = "n".repeat(256);
    for name in [
        "",
        ".",
        "..",
        "../model.safetensors",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "a\0b",
        ".hidden",
        "-rf",
        "C:x",
        "a b",
        "\u{e9}",
        "a\n",
        "manifest.json",
        &long,
    ] {
        let refused = refused(|m| m.files[0].name = name.into());
        assert_eq!(refused.kind(), ErrorKind::Corrupt);
        assert!(refused.message().contains(&format!("file={name:?}")), "{refused}");
    }
    for twin in ["model.safetensors", "Model.SafeTensors"] {
        let file = FileEntry { name: twin.into(), length: 0, data: 0, header: Digest::EMPTY, digest: Digest::EMPTY };
        let refused = refused(|m| m.files.push(file));
        assert!(refused.message().starts_with("two files have the same name"), "{refused}");
    }
}

#[test]
fn a_tensor_name_is_only_data() {
    let manifest = manifest(&[("../../etc/x", Dtype::U8, &[1], 1), ("/\0", Dtype::U8, &[1], 1)]);
    assert_eq!(Manifest::parse(&manifest.to_bytes().unwrap()).unwrap(), manifest);
    for (name, tensor) in [("", 0), ("__metadata__", 0), ("weight", 0), ("a", 1)] {
        let refused = refused(|m| m.tensors[tensor].name = name.into());
        assert!(refused.message().contains(&format!("tensor={name:?}")), "{refused}");
    }
}

#[test]
fn ranges_outside_their_file_are_refused() {
    type Change = fn(&mut SliceEntry);
    let changes: [(&str, Change); 8] = [
        ("a slice is in a file that is not there", |s| s.file = 1),
        ("a slice is in a file that is not there", |s| s.file = usize::MAX),
        ("a slice is outside the data of its file", |s| s.offset = 0),
        ("a slice is outside the data of its file", |s| s.offset = DATA - 1),
        ("a slice is outside the data of its file", |s| s.offset += 1),
        ("a slice is outside the data of its file", |s| s.offset = u64::MAX),
        ("a slice is outside the data of its file", |s| s.length = u64::MAX),
        ("a slice is outside the data of its file", |s| (s.offset, s.length) = (1 << 63, 1 << 63)),
    ];
    for (why, change) in changes {
        let refused = refused(|m| change(slice(m, 1)));
        assert!(refused.message().starts_with(why) && refused.message().contains(r#"tensor="weight""#), "{refused}");
    }
    for (length, data) in [(1 << 63, DATA), (u64::MAX, DATA), (DATA, DATA + 1)] {
        let refused = refused(|m| (m.files[0].length, m.files[0].data) = (length, data));
        assert!(refused.message().starts_with("a file cannot have this length"), "{refused}");
    }
    let plain = refused(|m| m.files[0].data = 0);
    assert!(plain.message().starts_with("a slice is in a file that is not a shard"), "{plain}");
    for (length, data) in [((1 << 63) - 1, 10), (100_000_009, 100_000_009), ((1 << 32) + 1, 0)] {
        let digest = Digest::EMPTY;
        let file = FileEntry { name: "more".into(), length, data, header: digest, digest };
        let refused = refused(|m| m.files.push(file));
        assert!(refused.message().starts_with("a file cannot have this length"), "{refused}");
    }
}

#[test]
fn overlaps_and_holes_are_refused_with_their_place() {
    let overlap = refused(|m| slice(m, 1).offset -= 1);
    assert!(overlap.message().starts_with("slices overlap"), "{overlap}");
    for part in ["offset=4097", "expected=4098", r#"file="model.safetensors""#, r#"tensor="weight""#] {
        assert!(overlap.message().contains(part), "{overlap}");
    }
    let hole = refused(|m| {
        slice(m, 1).offset += 1;
        m.files[0].length += 1;
    });
    assert!(hole.message().starts_with("there is a hole before a slice"), "{hole}");
    let tail = refused(|m| m.files[0].length += 1);
    assert!(tail.message().starts_with("a file has bytes of no tensor"), "{tail}");
    let first = refused(|m| m.files[0].data -= 1);
    assert!(first.message().starts_with("there is a hole before a slice"), "{first}");
}

#[test]
fn sizes_that_do_not_fit_are_refused() {
    type Change = fn(&mut TensorEntry);
    let changes: [(&str, Change); 8] = [
        ("a slice has not the length", |t| t.dtype = Dtype::F16),
        ("a slice has not the length", |t| (t.shape, t.slices[0].shape) = (vec![0, 1], vec![0, 1])),
        ("a slice has not the length", |t| {
            (t.shape, t.slices[0].shape) = (vec![usize::MAX, 8], vec![usize::MAX, 8]);
        }),
        ("a slice is outside its tensor", |t| t.shape[1] = 0),
        ("a slice is outside its tensor", |t| t.shape = vec![3 << 20]),
        ("a slice is outside its tensor", |t| t.slices[0].at = vec![usize::MAX, 0]),
        ("a slice has the wrong number of digests", |t| t.slices[0].blocks.clear()),
        ("a slice has the wrong number of digests", |t| t.slices[0].blocks.push(Digest::EMPTY)),
    ];
    for (why, change) in changes {
        let refused = refused(|m| change(&mut m.tensors[1]));
        assert!(refused.message().starts_with(why) && refused.message().contains(r#"tensor="weight""#), "{refused}");
    }
}

/// A manifest of a 4 x 6 tensor of bytes, with a slice in each of as many files.
fn split(slices: &[([usize; 2], [usize; 2])]) -> Result<Manifest, Error> {
    let mut manifest = manifest(&[("w", Dtype::U8, &[4, 6], 24)]);
    manifest.files = (0..slices.len())
        .map(|i| FileEntry {
            name: format!("f{i}"),
            length: DATA + slices[i].1.iter().product::<usize>() as u64,
            ..manifest.files[0].clone()
        })
        .collect();
    manifest.tensors[0].slices = (0..slices.len())
        .map(|file| {
            let (at, shape) = (slices[file].0.to_vec(), slices[file].1.to_vec());
            let length = manifest.files[file].length - DATA;
            SliceEntry { file, offset: DATA, length, at, shape, digest: Digest::EMPTY, blocks: vec![] }
        })
        .collect();
    Manifest::parse(&manifest.to_bytes().unwrap())
}

#[test]
fn slices_cover_a_tensor_exactly_once() {
    for tiling in [
        &[([0, 0], [4, 6])][..],
        &[([2, 0], [2, 6]), ([0, 0], [2, 6])],
        &[([0, 0], [1, 5]), ([0, 5], [3, 1]), ([3, 1], [1, 5]), ([1, 0], [3, 1]), ([1, 1], [2, 4])],
        &[([0, 0], [4, 6]), ([1, 1], [0, 3])],
    ] {
        assert!(split(tiling).is_ok(), "{tiling:?}");
    }
    for wrong in [
        &[][..],
        &[([0, 0], [3, 6])],
        &[([0, 0], [2, 6]), ([0, 0], [2, 6])],
        &[([0, 0], [2, 6]), ([2, 0], [2, 5])],
        &[([0, 0], [2, 6]), ([1, 0], [3, 6])],
        &[([0, 0], [2, 3]), ([2, 3], [2, 3]), ([0, 0], [2, 3]), ([2, 3], [2, 3])],
        &[([0, 0], [4, 6]), ([0, 0], [4, 6])],
    ] {
        let refused = split(wrong).expect_err("not a tiling");
        assert!(refused.message().starts_with("slices do not cover a tensor exactly once"), "{wrong:?} {refused}");
    }
    // Two ranges of one file have one name in its header.
    let mut manifest = manifest(&[("w", Dtype::U8, &[4, 6], 24)]);
    let mut half = manifest.tensors[0].slices[0].clone();
    (half.shape, half.length) = (vec![2, 6], 12);
    let other = SliceEntry { at: vec![2, 0], offset: half.offset + 12, ..half.clone() };
    manifest.tensors[0].slices = vec![half, other];
    assert!(Manifest::parse(&manifest.to_bytes().unwrap()).is_err());
}

#[test]
fn keys_that_come_twice_and_unknown_ones_are_refused() {
    for (from, to) in [
        (r#""step":100"#, r#""step":100,"step":100"#),
        (r#""step":100"#, r#""step":100,"stop":100"#),
        (r#""step":100"#, r#""stop":100"#),
        (r#""epoch":3"#, r#""epoch":3,"epoch":3"#),
        (r#""lr":"#, r#""lr":0,"lr":"#),
        (r#""lr":"#, r#""lr":0,"\u006cr":"#),
        (r#""run":"#, r#""run":1,"run":"#),
        (r#""data":4096"#, r#""data":4096,"data":4096"#),
        (r#""data":4096"#, r#""data":4096,"more":0"#),
        (r#""dtype":"BF16""#, r#""dtype":"BF16","dtype":"BF16""#),
        (r#""dtype":"BF16""#, r#""dtype":"BF17""#),
        (r#""at":[]"#, r#""at":[],"at":[]"#),
        (r#""at":[]"#, r#""at":[],"more":[]"#),
    ] {
        assert_eq!(Manifest::parse(&forged(from, to)).unwrap_err().kind(), ErrorKind::Corrupt, "{from} -> {to}");
    }
}

#[test]
fn odd_numbers_depth_and_text_are_refused() {
    let deep = |n: usize| format!(r#""epoch":{}{}"#, "[".repeat(n), "]".repeat(n));
    assert!(Manifest::parse(&forged(r#""epoch":3"#, &deep(125))).is_ok());
    for (from, to) in [
        (r#""epoch":3"#, &deep(126)[..]),
        (r#""epoch":3"#, &format!(r#""epoch":{}"#, "[".repeat(1 << 20))),
        (r#""epoch":3"#, &format!(r#""epoch":{}"#, r#"{"a":"#.repeat(1 << 18))),
        (r#""epoch":3"#, r#""epoch":NaN"#),
        (r#""epoch":3"#, r#""epoch":1e999"#),
        (r#""step":100"#, r#""step":-1"#),
        (r#""step":100"#, r#""step":1e2"#),
        (r#""step":100"#, r#""step":18446744073709551616"#),
        (r#""world":1"#, r#""world":0"#),
        (r#""world":1"#, r#""world":4294967296"#),
        (r#""length":2,"#, r#""length":99999999999999999999999999,"#),
        (r#""67e55044-"#, r#""67E55044-"#),
        (r#""format":"ashore""#, r#""format":"seashore""#),
        (r#""version":1"#, r#""version":01"#),
        (r#""version":1"#, r#""version":1.0"#),
        (r#""version":1"#, r#""version": 1"#),
    ] {
        let refused = Manifest::parse(&forged(from, to)).expect_err(to.get(..20).unwrap_or(to));
        assert_eq!(refused.kind(), ErrorKind::Corrupt, "{from}");
    }
    let bytes = sample().to_bytes().unwrap();
    let text = &bytes[..bytes.len() - 30];
    let at = text.windows(8).position(|w| w == b"baseline").unwrap();
    for (byte, why) in [(0xff, "not utf-8"), (0, "a control character"), (b'"', "a quote")] {
        let mut text = text.to_vec();
        text[at] = byte;
        assert!(Manifest::parse(&seal(text)).is_err(), "{why}");
    }
}

#[test]
fn a_file_of_more_than_four_gibibytes_is_nothing_special() {
    let manifest = manifest(&[("a", Dtype::U8, &[3], 3), ("b", Dtype::F64, &[1 << 36], 1 << 39)]);
    assert_eq!(Manifest::parse(&manifest.to_bytes().unwrap()).unwrap(), manifest);
}
