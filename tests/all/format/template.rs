//! A filled template is the intended manifest.

use super::{manifest, sample};
use ashore::internal::digest::Digest;
use ashore::internal::format::entries::BLOCK;
use ashore::internal::format::manifest::Manifest;
use ashore::internal::format::template::{Head, ManifestTemplate};
use ashore::testing::AlignedBuffer;
use ashore::{Dtype, ErrorKind};
use proptest::prelude::*;

fn head(manifest: &Manifest) -> Head<'_> {
    let Manifest { step, attempt, world, metadata, values, .. } = manifest;
    Head { step: *step, attempt: *attempt, world: *world, metadata, values }
}

/// A template of the structure with other digests, filled with those of the manifest.
fn filled(manifest: &Manifest) -> Vec<u8> {
    let mut blank = manifest.clone();
    for file in &mut blank.files {
        (file.header, file.digest) = (Digest::EMPTY, Digest::EMPTY);
    }
    for slice in blank.tensors.iter_mut().flat_map(|t| &mut t.slices) {
        slice.digest = Digest::EMPTY;
        slice.blocks.fill(Digest::EMPTY);
    }
    let template = ManifestTemplate::new(&blank.files, &blank.tensors).unwrap();
    let files = manifest.files.iter().map(|f| (f.header, f.digest));
    let slices = manifest.tensors.iter().flat_map(|t| &t.slices).map(|s| (s.digest, &s.blocks[..]));
    let mut bytes = AlignedBuffer::new(3);
    template.fill(&head(manifest), files, slices, &mut bytes).unwrap();
    bytes.to_vec()
}

#[test]
fn too_many_too_few_or_misplaced_digests_are_a_bug() {
    let manifest = sample();
    let template = ManifestTemplate::new(&manifest.files, &manifest.tensors).unwrap();
    let digest = Digest::of(b"x");
    let (one, two): (&[_], &[_]) = (&[digest; 1], &[digest; 2]);
    let fill = |files: usize, slices: &[&[Digest]]| {
        let slices = slices.iter().map(|&blocks| (digest, blocks));
        let files = std::iter::repeat_n((digest, digest), files);
        template.fill(&head(&manifest), files, slices, &mut AlignedBuffer::new(0))
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
    let refused = ManifestTemplate::new(&manifest.files, &manifest.tensors).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Internal);
}

proptest! {
    #[test]
    fn a_filled_template_is_the_manifest_that_was_meant(
        names in prop::collection::btree_set("[^_].{0,8}", 0..20), sizes in prop::collection::vec(0..4 * BLOCK, 20),
        step in any::<u64>(), world in 1_u32..,
    ) {
        let shapes: Vec<_> = sizes.iter().map(|&size| [size as usize]).collect();
        let tensors: Vec<_> =
            names.iter().zip(&shapes).map(|(name, shape)| (&name[..], Dtype::U8, &shape[..], shape[0] as u64)).collect();
        let mut meant = manifest(&tensors);
        (meant.step, meant.world) = (step, world);
        let bytes = filled(&meant);
        prop_assert_eq!(&bytes, &meant.to_bytes().unwrap());
        prop_assert_eq!(Manifest::parse(&bytes).unwrap(), meant);
    }
}
