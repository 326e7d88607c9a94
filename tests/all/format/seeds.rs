//! The seeds of the fuzz targets are valid input, from which fuzzing starts.

use ashore::internal::digest::Digest;
use ashore::internal::format::header::Header;
use ashore::internal::format::index::Index;
use ashore::internal::format::manifest::Sealed;
use ashore::internal::messages;
use ashore::internal::state::decode_value;
use std::path::{Path, PathBuf};

fn seeds(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let files = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

#[test]
fn seeds_are_accepted() {
    for (path, bytes) in seeds("manifest") {
        assert!(Sealed::parse(&bytes).is_ok(), "{}", path.display());
    }
    for (path, bytes) in seeds("table") {
        assert!(Index::of_table(bytes).and_then(|index| index.check()).is_ok(), "{}", path.display());
    }
    for (path, bytes) in seeds("header") {
        let accepted = [0, 24].map(|data| Header::parse(&bytes, bytes.len() as u64 + data).is_ok());
        assert!(accepted.contains(&true), "{}", path.display());
    }
    for (_, bytes) in seeds("message") {
        let digest = Digest::of(&bytes).to_bits().to_le_bytes();
        messages::read(&bytes);
        messages::read(&[&bytes[..], &digest].concat());
    }
    for (path, bytes) in seeds("value") {
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert!(decode_value::<serde_json::Value>(&json).is_ok() || bytes.contains(&b'$'), "{}", path.display());
    }
}
