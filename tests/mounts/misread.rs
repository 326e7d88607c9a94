//! Bytes that go wrong on their way from a sound medium: a second reading tells them from damage there.

use super::fuse::Faulty;
use super::{LONG, bytes, executor, save};
use ashore::storage::Storage;
use ashore::storage::local::Local;
use ashore::{Again, Checkpoint};
use std::sync::Arc;

/// A byte of the shard, and of no other file: the others are shorter.
const PLACE: u64 = 1 << 20;

/// Verifies a step while one byte is misread once, and locates the damage.
fn misread(disk: &Faulty, storage: Arc<dyn Storage>) -> Again {
    let checkpoint = Checkpoint::from_storage(storage, "step-00000001").unwrap();
    disk.misread_once(PLACE);
    let damage = checkpoint.verify().unwrap().damage;
    assert_eq!(damage.len(), 1, "{damage:?}");
    assert!(damage[0].range.contains(&PLACE) && damage[0].tensor.as_deref() == Some("t"), "{damage:?}");
    let located = checkpoint.locate(&damage[0]).unwrap();
    assert_eq!(located.flip, None, "what the medium has needs no repair");
    assert!(checkpoint.verify().unwrap().is_sound());
    assert!(checkpoint.read("t").unwrap() == bytes(1));
    located.again
}

#[test]
fn a_second_reading_tells_what_the_page_cache_has_from_what_the_medium_has() {
    let disk = Faulty::mount();
    let root = disk.path().join("run");
    let executor = executor(&root).unwrap();
    save(&executor, 1).unwrap();
    executor.shutdown(LONG).unwrap();
    for direct in [true, false] {
        let storage = Arc::new(Local::open(&root).unwrap().direct(direct));
        assert_eq!(misread(&disk, storage), Again::AsWritten, "direct={direct}");
    }
    // The premise: what was misread stays in the page cache, and whatever reads through it is wrong.
    let storage = Local::open(&root).unwrap().direct(false);
    let byte = || {
        let (file, mut byte) = (storage.open("step-00000001").unwrap().open("model.safetensors").unwrap(), [0]);
        file.read_at(PLACE, &mut byte).unwrap();
        (byte[0], file)
    };
    let (sound, file) = byte();
    file.drop_cached();
    disk.misread_once(PLACE);
    assert_eq!((byte().0, byte().0), (sound ^ 1, sound ^ 1));
    file.drop_cached();
    assert_eq!(byte().0, sound);
}
