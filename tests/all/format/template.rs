//! A filled table says what was meant.

use super::{manifest, sample, tables};
use crate::fixtures::checkpoint::table;
use ashore::internal::digest::Digest;
use ashore::internal::format::columns::FileRow;
use ashore::internal::format::entries::BLOCK;
use ashore::internal::format::template::TableTemplate;
use ashore::testing::AlignedBuffer;
use ashore::{Attempt, Dtype, ErrorKind};
use proptest::prelude::*;
use std::collections::BTreeMap;

#[test]
fn too_many_too_few_or_misplaced_digests_are_a_bug() {
    let manifest = sample();
    let template = TableTemplate::new(&manifest.files, &manifest.tensors, &BTreeMap::new()).unwrap();
    let digest = Digest::of(b"x");
    let (one, two): (&[_], &[_]) = (&[digest; 1], &[digest; 2]);
    let fill = |files: usize, slices: &[&[Digest]]| {
        let slices = slices.iter().map(|&blocks| (digest, blocks));
        let files = std::iter::repeat_n((digest, digest), files);
        template.fill((7, Attempt::default()), files, slices, &mut AlignedBuffer::new(0))
    };
    assert!(fill(1, &[&[], two]).is_ok());
    for wrong in [fill(0, &[&[], two]), fill(2, &[&[], two]), fill(1, &[&[]]), fill(1, &[&[], two, &[]])] {
        assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Internal);
    }
    for wrong in [fill(1, &[two, &[]]), fill(1, &[&[], one]), fill(1, &[one, one])] {
        assert_eq!(wrong.unwrap_err().kind(), ErrorKind::Internal);
    }
}

#[test]
fn a_structure_that_breaks_an_invariant_has_no_template() {
    let mut manifest = sample();
    manifest.tensors.swap(0, 1);
    let refused = TableTemplate::new(&manifest.files, &manifest.tensors, &BTreeMap::new()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Internal);
}

proptest! {
    #[test]
    fn a_filled_template_says_what_was_meant(
        names in prop::collection::btree_set("[^_].{0,8}", 0..20), sizes in prop::collection::vec(0..4 * BLOCK, 20),
        step in any::<u64>(),
    ) {
        let shapes: Vec<_> = sizes.iter().map(|&size| [size as usize]).collect();
        let tensors: Vec<_> =
            names.iter().zip(&shapes).map(|(name, shape)| (&name[..], Dtype::U8, &shape[..], shape[0] as u64)).collect();
        let meant = manifest(&tensors);
        let (bytes, entry) = table((step, meant.attempt), &meant.files, &meant.tensors);
        prop_assert_eq!(entry.length, bytes.len() as u64);
        let index = tables::single(bytes, entry).unwrap();
        index.check().unwrap();
        let tensors: Vec<_> = index.some(0..index.tensors()).unwrap().into_iter().cloned().collect();
        prop_assert_eq!(&tensors, &meant.tensors);
        let files: Vec<_> = index.all_files().unwrap().into_iter().cloned().collect();
        let origin = (step, meant.attempt);
        let meant_files: Vec<_> =
            meant.files.iter().map(|entry| FileRow { entry: entry.clone(), origin, rows: None }).collect();
        prop_assert_eq!(files, meant_files);
        for tensor in &meant.tensors {
            prop_assert_eq!(index.find(&tensor.name).unwrap(), Some(tensor));
            let absent = index.find(&format!("{} ", tensor.name)).unwrap();
            prop_assert!(absent.is_none_or(|t| t.name != tensor.name));
        }
    }
}
