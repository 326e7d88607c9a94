use crate::fixtures::checkpoint::{MadeCheckpoint, noise, open};
use ashore::internal::digest::Digest;
use ashore::internal::format::manifest::Manifest;
use ashore::{Again, Checkpoint, Dtype};
use std::sync::atomic::{AtomicU64, Ordering};

const BLOCK: usize = 8 << 20;

#[test]
fn every_damaged_place_is_named_in_order() {
    let made = MadeCheckpoint::new(7)
        .tensor("a", Dtype::U8, &[100], noise(100, 1))
        .tensor("b", Dtype::U8, &[3 * BLOCK], noise(3 * BLOCK, 2))
        .tensor("c", Dtype::U8, &[100], noise(100, 3))
        .tensor("d", Dtype::U8, &[100], noise(100, 4))
        .shards(2);
    let mut files = made.files();
    // a and c are in the first shard, b and d in the second.
    let (first, second) = (files[0].1.len() - 200, files[1].1.len() - 3 * BLOCK - 100);
    files[0].1[first + 150] ^= 1;
    files[0].1[3000] ^= 1;
    files[1].1[second + 5] ^= 1;
    files[1].1[second + 3 * BLOCK - 1] ^= 0x80;
    files[2].1[3] ^= 1;
    let checkpoint = open(&files).unwrap().with_threads(3);
    let (progress, total) = (AtomicU64::new(0), AtomicU64::new(0));
    let report = checkpoint
        .verify_with(|done, all| {
            progress.fetch_max(done, Ordering::Relaxed);
            total.store(all, Ordering::Relaxed);
        })
        .unwrap();
    let found: Vec<_> = report.damage.iter().map(|d| (&d.file[..], d.tensor.as_deref(), d.range.clone())).collect();
    let (first, second, block) = (first as u64, second as u64, BLOCK as u64);
    let expected = [
        ("model-00001-of-00002.safetensors", None, 0..first),
        ("model-00001-of-00002.safetensors", Some("c"), first + 100..first + 200),
        ("model-00002-of-00002.safetensors", Some("b"), second..second + block),
        ("model-00002-of-00002.safetensors", Some("b"), second + 2 * block..second + 3 * block),
        ("model.safetensors.index.json", None, 0..files[2].1.len() as u64),
    ];
    assert_eq!(found, expected);
    assert_eq!((report.files, report.tensors), (3, 4));
    let bytes: usize = files[..3].iter().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!(report.bytes, bytes as u64);
    assert_eq!((progress.into_inner(), total.into_inner()), (report.bytes, report.bytes));
}

/// What is wrong on the way to a reader and not on the medium must not be repaired there.
#[test]
fn a_second_reading_that_differs_from_the_first_names_no_flip() {
    let dir = tempfile::tempdir().unwrap();
    let made = MadeCheckpoint::new(7).tensor("a", Dtype::U8, &[100_000], noise(100_000, 1));
    let path = dir.path().join("step-00000007");
    std::fs::create_dir(&path).unwrap();
    made.files().iter().for_each(|(name, bytes)| std::fs::write(path.join(name), bytes).unwrap());
    let shard = path.join("model.safetensors");
    let sound = std::fs::read(&shard).unwrap();
    let with = |flips: &[usize]| {
        let mut bytes = sound.clone();
        flips.iter().for_each(|at| bytes[sound.len() - at] ^= 1);
        std::fs::write(&shard, bytes).unwrap();
    };
    with(&[500]);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let report = checkpoint.verify().unwrap();
    for (flips, again) in [(&[][..], Again::AsWritten), (&[700][..], Again::Different), (&[500][..], Again::Same)] {
        with(flips);
        let located = checkpoint.locate(&report.damage[0]).unwrap();
        assert_eq!((located.again, located.flip.is_some()), (again, again == Again::Same));
    }
}

#[test]
fn a_header_that_describes_other_tensors_with_the_right_digest_is_damage() {
    let honest = MadeCheckpoint::new(7).version(1).tensor("a", Dtype::U8, &[8], noise(8, 1));
    let mut files = honest.files();
    let mut liar = honest.clone();
    liar.tensors.get_mut("a").unwrap().1 = vec![4, 2];
    files[0] = liar.files().swap_remove(0);
    let manifest = String::from_utf8(liar.files().swap_remove(1).1).unwrap();
    // The false manifest, with the shape of the true one.
    let lied = manifest.replace("\"shape\":[4,2]", "\"shape\":[8]").replace("\"at\":[0,0]", "\"at\":[0]");
    let text = lied.rsplit_once(",\"digest\":").unwrap().0;
    files[1].1 = ashore::internal::format::seal::seal(text.into());
    let report = open(&files).unwrap().verify().unwrap();
    assert_eq!(report.damage.len(), 1, "{report:?}");
    assert!(report.damage[0].what.contains("contradicts the manifest"), "{report:?}");
}

/// Stock loaders follow the index and the names of files, and would read other tensors than this library
/// does.
#[test]
fn a_step_that_stock_loaders_read_differently_is_not_sound() {
    let made = MadeCheckpoint::new(7)
        .version(1)
        .tensor("a", Dtype::U8, &[8], noise(8, 1))
        .tensor("b", Dtype::U8, &[8], noise(8, 2))
        .shards(2);
    let misleading = |files: &[(String, Vec<u8>)]| {
        let report = open(files).unwrap().verify().unwrap();
        assert!(report.is_intact(), "every byte is as it was written: {report:?}");
        assert_eq!(report.is_sound(), report.misleading.is_empty());
        report.misleading.into_iter().map(|found| (found.file, found.what)).collect::<Vec<_>>()
    };
    let file = |name: &str| (name.to_owned(), b"something".to_vec());
    let plain = made.files();
    assert_eq!(misleading(&[plain.clone(), vec![file("README.md"), file("config.json")]].concat()), []);
    for stray in ["model.safetensors", "other.safetensors", "other.safetensors.index.json"] {
        let found = misleading(&[plain.clone(), vec![file(stray)]].concat());
        assert_eq!(found.iter().map(|(file, _)| &file[..]).collect::<Vec<_>>(), [stray]);
    }

    // An index that sends readers of "a" to the file of "b", and a manifest that has its digest.
    let mut files = plain;
    let (before, index) = (Digest::of(&files[2].1), String::from_utf8(files[2].1.clone()).unwrap());
    files[2].1 = index.replacen("model-00001", "model-00002", 1).into_bytes();
    let manifest = String::from_utf8(files.pop().unwrap().1).unwrap();
    let text = manifest.replace(&before.to_string(), &Digest::of(&files[2].1).to_string());
    let text = text.rsplit_once(",\"digest\":").unwrap().0.as_bytes().to_vec();
    files.push(("manifest.json".into(), ashore::internal::format::seal::seal(text)));
    let found = misleading(&files);
    assert_eq!(found.len(), 1);
    assert!(found[0].0.ends_with("index.json") && found[0].1.contains("tensor=\"a\""), "{found:?}");
}

#[test]
fn a_manifest_with_another_length_than_its_files_have_is_damage() {
    let mut files = MadeCheckpoint::new(7).tensor("a", Dtype::U8, &[100], noise(100, 1)).files();
    let honest = open(&files).unwrap().manifest().clone();
    files.last_mut().unwrap().1 = Manifest { bytes: honest.bytes + 1, ..honest }.to_bytes().unwrap();
    let report = open(&files).unwrap().verify().unwrap();
    assert!(!report.is_intact());
    assert_eq!(report.damage[0].file, "manifest.json");
    assert!(report.damage[0].what.contains("another length"), "{}", report.damage[0].what);
}
