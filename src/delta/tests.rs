//! Tests of every encoder on every dtype, and of patches that no encoder made.

use super::*;
use crate::digest::Digest;
use crate::id::Attempt;
use crate::state::{DTYPES, Dtype};
use proptest::prelude::*;

/// Returns bytes generated from a seed.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..len.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(len).collect()
}

/// Returns `old` with about `share` of 1000 elements changed: by one unit, in their sign, or to any value.
fn changed(old: &[u8], width: usize, share: usize, seed: u64) -> Vec<u8> {
    let (mut new, dice) = (old.to_vec(), noise(old.len() / width * 16, seed));
    for (element, dice) in new.chunks_exact_mut(width).zip(dice.chunks_exact(16)) {
        let number = |at: usize| u16::from_le_bytes([dice[at], dice[at + 1]]) as usize;
        if number(0) % 1000 < share {
            match number(2) % 4 {
                0 => element[width - 1] ^= 0x80,
                1 => element.copy_from_slice(&dice[8..8 + width]),
                _ => element[0] = element[0].wrapping_add(1),
            }
        }
    }
    new
}

fn forms() -> impl Strategy<Value = Form> {
    let forms = [Form::Packed, Form::Indices].into_iter().chain(cfg!(feature = "zstd").then_some(Form::Zstd));
    prop::sample::select(forms.collect::<Vec<_>>())
}

/// Returns a patch as a reader gets it.
fn through_file(patch: &Patch, form: Form) -> Patch {
    if form != Form::Zstd {
        return patch.clone();
    }
    let columns = patch.columns.iter().map(|column| unpack(&pack(column).unwrap(), column.len()).unwrap());
    Patch { columns: columns.collect(), ..patch.clone() }
}

proptest! {
    #[test]
    fn every_dtype_comes_back_bit_for_bit_and_its_digest_is_known_before(
        dtype in prop::sample::select(DTYPES), form in forms(), elements in 0_usize..3000,
        share in prop::sample::select(vec![0_usize, 1, 10, 60, 150, 300, 600, 1000]), seed in any::<u64>(),
    ) {
        let numbers = Numbers::of(dtype);
        let old = noise(elements * numbers.width, seed);
        let new = changed(&old, numbers.width, share, seed ^ 77);
        let patch = encode(&old, &new, numbers, form).unwrap();
        prop_assert_eq!(patch.is_none(), old == new);
        if let Some(patch) = patch {
            let patch = through_file(&patch, form);
            let mut made = old.clone();
            prop_assert_eq!(check(&made, Digest::of(&old), numbers, &patch).unwrap(), Digest::of(&new));
            prop_assert_eq!(&made, &old, "a check writes nothing");
            apply(&mut made, numbers, &patch).unwrap();
            prop_assert_eq!(made, new);
            for (number, column) in patch.columns.iter().enumerate() {
                let most = longest(patch.how, number, elements as u64, numbers.width as u64, patch.changed);
                prop_assert!(column.len() as u64 <= most, "{:?} {number}: {} > {most}", patch.how, column.len());
            }
        }
    }

    #[test]
    fn hostile_columns_are_errors_and_never_panics(
        dtype in prop::sample::select(DTYPES), how in 0..4_usize, elements in 0_usize..600, claimed in 0_u64..700,
        columns in prop::collection::vec(prop::collection::vec(prop_oneof![Just(255_u8), Just(0), any::<u8>()], 0..80), 0..4),
    ) {
        let numbers = Numbers::of(dtype);
        let how = [How::Sparse, How::Bitmap, How::Indices, How::Whole][how];
        let old = noise(elements * numbers.width, 5);
        let patch = Patch { how, changed: claimed, columns };
        if let Ok(digest) = check(&old, Digest::of(&old), numbers, &patch) {
            let mut made = old.clone();
            apply(&mut made, numbers, &patch).expect("what was checked can be applied");
            prop_assert_eq!(Digest::of(&made), digest);
        }
    }

    #[test]
    fn a_flipped_bit_in_a_column_never_gives_the_promised_digest(
        share in 1_usize..400, seed in any::<u64>(), at in any::<prop::sample::Index>(), bit in 0..8,
    ) {
        let numbers = Numbers::of(Dtype::BF16);
        let old = noise(2000, seed);
        let new = changed(&old, 2, share, seed ^ 1);
        if let Some(mut patch) = encode(&old, &new, numbers, Form::Packed).unwrap() {
            let flat = patch.columns.concat().len();
            let (mut at, mut column) = (at.index(flat), 0);
            while at >= patch.columns[column].len() {
                at -= patch.columns[column].len();
                column += 1;
            }
            patch.columns[column][at] ^= 1_u8 << bit;
            let found = check(&old, Digest::of(&old), numbers, &patch);
            prop_assert!(found.is_err() || found.unwrap() != Digest::of(&new));
        }
    }

    #[test]
    fn any_bytes_with_the_right_digest_are_a_manifest_or_an_error(text in "[ -~]{0,200}") {
        let whole = format!("{{\"format\":\"ashore-delta\",\"version\":1,{text}");
        let _ = Manifest::parse(&crate::format::seal::seal(whole.into_bytes()));
    }
}

#[test]
fn the_way_follows_the_share_of_changed_elements() {
    let numbers = Numbers::of(Dtype::BF16);
    let old = noise(200_000, 9);
    let one_in = |n: usize| {
        let mut new = old.clone();
        new.chunks_exact_mut(2).step_by(n).for_each(|element| element[0] ^= 1);
        let patch = encode(&old, &new, numbers, Form::Packed).unwrap().unwrap();
        (patch.how, patch.bytes())
    };
    assert_eq!(one_in(100), (How::Sparse, 2_000));
    assert_eq!(one_in(4), (How::Bitmap, 12_500 + 25_000));
    assert_eq!(one_in(1).0, How::Whole);
    let indexed = |n: usize| {
        let mut new = old.clone();
        new.chunks_exact_mut(2).step_by(n).for_each(|element| element[0] ^= 1);
        encode(&old, &new, numbers, Form::Indices).unwrap().unwrap()
    };
    assert_eq!((indexed(100).how, indexed(100).bytes()), (How::Indices, 6_000));
    assert_eq!(indexed(5).how, How::Whole);
}

#[test]
fn special_values_keep_every_bit() {
    // NaNs with payloads, infinities, both zeros, the smallest and the largest numbers.
    let special: [u16; 10] = [0x7f81, 0xff81, 0x7fff, 0x7f80, 0xff80, 0x8000, 0, 1, 0x8001, 0x7f7f];
    let pairs = special.iter().flat_map(|a| special.iter().map(move |b| (*a, *b)));
    let (old, new): (Vec<u16>, Vec<u16>) = pairs.chain(std::iter::repeat_n((5, 5), 4000)).unzip();
    let bytes = |v: &[u16]| v.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
    let (old, new) = (bytes(&old), bytes(&new));
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::I16, Dtype::U16] {
        for form in [Form::Packed, Form::Indices] {
            let numbers = Numbers::of(dtype);
            let patch = encode(&old, &new, numbers, form).unwrap().unwrap();
            let mut made = old.clone();
            apply(&mut made, numbers, &patch).unwrap();
            assert_eq!(made, new, "{dtype} {form:?}");
        }
    }
}

fn manifest() -> Manifest {
    let base = Base { version: 6, attempt: Attempt::new(), state: Digest::EMPTY };
    let mut manifest = Manifest::new(7, Attempt::new(), base, Digest::EMPTY, Form::Packed);
    let column = |length| Column { name: String::new(), begin: 0, length, plain: length, digest: Digest::EMPTY };
    let entry = |name: &str, how, changed, lengths: &[u64]| Entry {
        name: name.into(),
        dtype: Dtype::BF16,
        shape: vec![10, 10],
        how,
        changed,
        base: Digest::EMPTY,
        result: Digest::EMPTY,
        columns: lengths.iter().map(|length| column(*length)).collect(),
    };
    manifest.tensors = vec![
        entry("w", How::Sparse, 5, &[5, 5]),
        entry("w.gaps", How::Whole, 100, &[200]),
        entry("w.gaps~", How::Sparse, 3, &[3, 3]),
    ];
    manifest
}

#[test]
fn columns_get_names_of_their_own_and_stock_tools_read_them() {
    let mut manifest = manifest();
    let header = manifest.lay_out().unwrap();
    let names: Vec<_> = manifest.tensors.iter().flat_map(|e| &e.columns).map(|c| c.name.clone()).collect();
    assert_eq!(names, ["w.gaps~", "w.ulps", "w.gaps", "w.gaps~.gaps", "w.gaps~.ulps"]);
    let mut file = vec![0; manifest.bytes as usize];
    let stamp = crate::format::shard::Stamp::new(7, manifest.attempt);
    assert!(header.copy(&stamp, 0, &mut file[..header.len() as usize]));
    let stock = safetensors::SafeTensors::deserialize(&file).unwrap();
    assert_eq!(stock.tensor("w.gaps").unwrap().dtype(), safetensors::Dtype::BF16);
    assert_eq!(stock.tensor("w.ulps").unwrap().shape(), [5]);
    assert_eq!(Manifest::parse(&manifest.to_bytes().unwrap()).unwrap(), manifest);
}

#[test]
fn a_manifest_that_contradicts_itself_is_refused() {
    type Change = fn(&mut Manifest);
    let changes: [Change; 9] = [
        |m| m.number = 6,
        |m| m.tensors[0].changed = 101,
        |m| m.tensors[0].changed = 0,
        |m| m.tensors[0].columns[0].length = u64::MAX,
        |m| m.tensors[0].columns[1].begin = u64::MAX,
        |m| m.tensors[0].columns[0].plain = 1 << 40,
        |m| m.tensors[1].shape = vec![usize::MAX, usize::MAX],
        |m| m.tensors.swap(0, 1),
        |m| drop(m.tensors[0].columns.pop()),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut manifest = manifest();
        manifest.lay_out().unwrap();
        change(&mut manifest);
        let kind = Manifest::parse(&manifest.to_bytes().unwrap()).map_err(|e| e.kind());
        assert_eq!(kind, Err(crate::ErrorKind::Corrupt), "change {number}");
    }
}
