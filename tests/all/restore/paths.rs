use crate::fixtures::checkpoint::{MadeCheckpoint, noise};
use ashore::{Catalog, Checkpoint, Dtype, ErrorKind};
use std::fs;
use std::path::Path;

fn made() -> MadeCheckpoint {
    MadeCheckpoint::new(7)
        .tensor("big", Dtype::U8, &[20_000_003], noise(20_000_003, 1))
        .tensor("small", Dtype::F32, &[5], noise(20, 2))
        .shards(2)
}

fn write(dir: &Path, made: &MadeCheckpoint) {
    fs::create_dir(dir).unwrap();
    for (name, bytes) in made.files() {
        fs::write(dir.join(name), bytes).unwrap();
    }
}

#[test]
fn a_step_is_read_without_an_executor_and_without_a_write() {
    let root = tempfile::tempdir().unwrap();
    let (made, dir) = (made(), root.path().join("step-00000007"));
    write(&dir, &made);
    let checkpoint = Checkpoint::open(&dir).unwrap();
    assert_eq!((checkpoint.step(), checkpoint.attempt(), checkpoint.name()), (7, made.attempt, "step-00000007"));
    assert_eq!(checkpoint.path(), dir.canonicalize().unwrap());
    for (name, (_, _, bytes)) in &made.tensors {
        assert!(checkpoint.read(name).unwrap() == *bytes, "{name}");
    }
    let part = checkpoint.read_slice("big", std::slice::from_ref(&(8_388_600..8_388_620))).unwrap();
    assert_eq!(part, made.tensors["big"].2[8_388_600..8_388_620]);
    assert!(checkpoint.verify().unwrap().is_sound());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), made.files().len());
}

#[test]
fn a_step_is_opened_under_any_name_and_through_a_link() {
    let root = tempfile::tempdir().unwrap();
    let (made, dir) = (made(), root.path().join("best model"));
    write(&dir, &made);
    std::os::unix::fs::symlink("best model", root.path().join("current")).unwrap();
    for path in [dir.clone(), dir.join("."), root.path().join("best model/../current/")] {
        assert_eq!(Checkpoint::open(&path).unwrap().attempt(), made.attempt, "{}", path.display());
    }
    assert!(Catalog::open(root.path()).unwrap().list().unwrap().is_empty(), "a catalog lists names of steps only");
}

#[test]
fn an_error_names_the_path_that_has_no_step() {
    let root = tempfile::tempdir().unwrap();
    let (absent, empty, file) = (root.path().join("absent"), root.path().join("empty"), root.path().join("file"));
    fs::create_dir(&empty).unwrap();
    fs::write(&file, b"x").unwrap();
    for (path, kind) in [(absent, ErrorKind::NotFound), (empty, ErrorKind::NotFound), (file, ErrorKind::Invalid)] {
        let refused = Checkpoint::open(&path).unwrap_err();
        assert_eq!(refused.kind(), kind, "{refused}");
        assert!(refused.path().is_some_and(|named| named.starts_with(root.path())), "{refused}");
    }
    assert_eq!(Catalog::open(root.path().join("absent")).unwrap_err().kind(), ErrorKind::NotFound);
    assert!(!root.path().join("absent").exists());
}

#[test]
fn a_shard_that_is_a_link_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("step-00000007");
    write(&dir, &made());
    let (shard, elsewhere) = (dir.join("model-00001-of-00002.safetensors"), root.path().join("elsewhere"));
    fs::rename(&shard, &elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, &shard).unwrap();
    let refused = Checkpoint::open(&dir).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
    assert!(refused.path().is_some_and(|path| path.ends_with("model-00001-of-00002.safetensors")), "{refused}");
}

#[test]
fn a_shard_cut_off_after_the_open_is_damage_and_no_panic() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("step-00000007");
    write(&dir, &made());
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let shard = dir.join("model-00001-of-00002.safetensors");
    fs::OpenOptions::new().write(true).open(&shard).unwrap().set_len(10_000_000).unwrap();
    let refused = checkpoint.read("big").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt, "{refused}");
    assert!(refused.to_string().contains("big"), "{refused}");
    let report = checkpoint.verify().unwrap();
    assert!(!report.is_sound() && report.damage.iter().all(|d| d.tensor.as_deref() == Some("big")), "{report:?}");
}
