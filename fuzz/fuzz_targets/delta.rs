//! Any bytes as the manifest of a delta, as they are and with the right digest, and as the columns of a
//! patch: no panic, bounded memory, and what was checked can be applied and has the digest that the check
//! found.
#![no_main]

use ashore::Dtype;
use ashore::internal::delta::{How, Manifest, Numbers, Patch, apply, check};
use ashore::internal::digest::Digest;
use ashore::internal::format::seal::seal;
use ashore_fuzz::bounded;

const DTYPES: [Dtype; 6] = [Dtype::BF16, Dtype::F32, Dtype::F64, Dtype::U8, Dtype::F8_E4M3, Dtype::I16];
const HOWS: [How; 4] = [How::Sparse, How::Bitmap, How::Indices, How::Whole];

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = bounded(input.len(), || Manifest::parse(input));
    let text = [br#"{"format":"ashore-delta","version":1,"#, input].concat();
    let _ = bounded(text.len(), || Manifest::parse(&seal(text.clone())));

    let [dtype, how, changed, split, elements, columns @ ..] = input else { return };
    let numbers = Numbers::of(DTYPES[usize::from(*dtype) % DTYPES.len()]);
    let (first, second) = columns.split_at(usize::from(*split).min(columns.len()));
    let how = HOWS[usize::from(*how) % HOWS.len()];
    let columns = if how == How::Whole { vec![columns.to_vec()] } else { vec![first.to_vec(), second.to_vec()] };
    let patch = Patch { how, changed: u64::from(*changed), columns };
    let old = vec![0x5a; usize::from(*elements) * numbers.width];
    if let Ok(digest) = check(&old, Digest::of(&old), numbers, &patch) {
        let mut new = old.clone();
        apply(&mut new, numbers, &patch).unwrap();
        assert_eq!(Digest::of(&new), digest);
    }
});
