//! Files that are made out of those of older steps: in which order, and what is refused. `just mounts` does
//! it on file systems that clone, and with refusals that need root.

use super::ordering::story;
use ashore::storage::local::{Linux, Local};
use ashore::storage::{Adopted, FileReading, Storage, Writing};
use ashore::testing::simfs::SimFs;
use ashore::testing::{AlignedBuffer, Call, Effect, Fault, Faulty};
use ashore::{ALIGNMENT, Attempt, ErrorKind};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

const LEN: usize = 9000;
const HEAD: [u8; ALIGNMENT] = [2; ALIGNMENT];

/// A storage with the step `step-1`, whose file `shard` is open.
struct World {
    sys: Arc<Faulty>,
    storage: Local,
    source: Arc<dyn FileReading>,
}

impl World {
    fn on(sys: Arc<Faulty>, root: &Path) -> Self {
        let storage = Local::with_sys(sys.clone(), root).unwrap();
        let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
        let shard = attempt.create("shard", LEN as u64).unwrap();
        shard.write_at(0, &AlignedBuffer::from(&[1; 12_288][..])).unwrap();
        shard.seal().unwrap();
        attempt.put("manifest.json", b"{}").unwrap();
        attempt.publish(false).unwrap();
        attempt.settle().unwrap();
        let source = storage.open("step-1").unwrap().open("shard").unwrap();
        Self { sys, storage, source }
    }

    /// On a simulated file system that clones.
    fn cloning() -> Self {
        Self::on(Faulty::new(Arc::new(SimFs::new().clones(true))), Path::new("/data/run"))
    }

    fn fail(&self, call: Call, effect: Effect) {
        self.sys.fail(Fault { call: Some(call), after: 0, sticky: true, effect });
    }

    fn begin(&self) -> Arc<dyn Writing> {
        self.storage.begin("step-2", Attempt::new(), false).unwrap()
    }

    fn adopt(&self) -> Adopted {
        self.begin().adopt("shard", &*self.source, &HEAD).unwrap()
    }
}

/// On the file system of this machine, which is taken for one that does not clone.
fn linking() -> (tempfile::TempDir, World) {
    let directory = tempfile::tempdir().unwrap();
    let world = World::on(Faulty::new(Arc::new(Linux)), directory.path());
    world.fail(Call::Clone, Effect::Refused(libc::EOPNOTSUPP));
    (directory, world)
}

fn whole(file: &dyn FileReading) -> Vec<u8> {
    let mut bytes = vec![0; file.len() as usize];
    file.read_at(0, &mut bytes).unwrap();
    bytes
}

fn cloned() -> Vec<u8> {
    [&HEAD[..], &[1; LEN - ALIGNMENT][..]].concat()
}

fn published(world: &World, root: &Path) -> Vec<String> {
    let before = world.sys.log().len();
    let name = Attempt::new();
    let attempt = world.storage.begin("step-2", name, false).unwrap();
    attempt.adopt("shard", &*world.source, &HEAD).unwrap();
    attempt.put("manifest.json", b"{}").unwrap();
    attempt.publish(false).unwrap();
    let story = story(&world.sys.log()[before..], root, name);
    // After the record of the owner and the directory.
    assert_eq!(story[4], "mkdir .step-2.a.tmp");
    story[5..].to_vec()
}

const REST: [&str; 5] = [
    "pwrite .step-2.a.tmp/manifest.json",
    "fsync .step-2.a.tmp/manifest.json",
    "fsync .step-2.a.tmp",
    "rename .step-2.a.tmp step-2",
    "fsync .",
];

#[test]
fn a_clone_gets_its_head_and_an_fsync_of_its_own() {
    let world = World::cloning();
    let made = ["clone step-1/shard .step-2.a.tmp/shard", "pwrite .step-2.a.tmp/shard", "fsync .step-2.a.tmp/shard"];
    assert_eq!(published(&world, Path::new("/data/run")), [&made[..], &REST].concat());
    assert!(whole(&*world.storage.open("step-2").unwrap().open("shard").unwrap()) == cloned());
    assert!(whole(&*world.source) == [1; LEN]);
}

#[test]
fn a_link_is_made_before_the_fsync_of_the_attempt_and_has_none_of_its_own() {
    let (directory, world) = linking();
    let made = [
        "clone step-1/shard .step-2.a.tmp/shard",
        "unlink .step-2.a.tmp/shard",
        "link step-1/shard .step-2.a.tmp/shard",
        "protect step-1/shard",
    ];
    assert_eq!(published(&world, directory.path()), [&made[..], &REST].concat());
    let inode = |step: &str| world.storage.open(step).unwrap().inode("shard").unwrap().unwrap();
    assert_eq!(inode("step-1"), inode("step-2"));
    assert_eq!((inode("step-2").names, inode("step-2").len), (2, LEN as u64));
    assert_eq!(world.storage.open("step-2").unwrap().inode("missing").unwrap(), None);
}

#[test]
fn a_linked_file_loses_the_permissions_to_write_and_keeps_the_others() {
    let (directory, world) = linking();
    let path = directory.path().join("step-1/shard");
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    assert_eq!(world.adopt(), Adopted::Linked);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o440);
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    world.fail(Call::Protect, Effect::Refused(libc::EPERM));
    assert_eq!(world.adopt(), Adopted::Linked, "it stays writable where it cannot be protected");
}

#[test]
fn what_a_file_system_refuses_is_written_and_leaves_nothing_behind() {
    let refusals = [
        (libc::EPERM, "not permitted"),
        (libc::EXDEV, "cross-device"),
        (libc::EMLINK, "Too many links"),
        (libc::EDQUOT, "quota"),
        (libc::ENOSPC, "No space"),
        (libc::ENOSYS, "not implemented"),
        (libc::EOPNOTSUPP, "not supported"),
        (libc::EACCES, "denied"),
    ];
    let (_directory, world) = linking();
    for (code, said) in refusals {
        world.sys.heal();
        world.fail(Call::Clone, Effect::Refused(code));
        world.fail(Call::Link, Effect::Refused(code));
        let attempt = world.begin();
        let Ok(Adopted::Refused(why)) = attempt.adopt("shard", &*world.source, &HEAD) else { panic!("{said}") };
        assert_eq!(why.to_lowercase().matches(&said.to_lowercase()).count(), 2, "{why}");
        let shard = attempt.create("shard", 4096).unwrap();
        shard.write_at(0, &AlignedBuffer::new(4096)).unwrap();
        shard.seal().unwrap();
        attempt.publish(false).unwrap();
        attempt.settle().unwrap();
        world.storage.remove("step-2").unwrap();
    }
    assert!(whole(&*world.source) == [1; LEN]);
}

#[test]
fn a_clone_that_cannot_get_its_head_becomes_a_link() {
    let world = World::cloning();
    for (call, effect) in [
        (Call::Pwrite, Effect::Refused(libc::ENOSPC)),
        (Call::Clone, Effect::DoneAndRefused(libc::EIO)),
        (Call::Clone, Effect::Refused(libc::EXDEV)),
    ] {
        let attempt = world.begin();
        world.fail(call, effect);
        assert_eq!(attempt.adopt("shard", &*world.source, &HEAD).unwrap(), Adopted::Linked, "{call:?}");
        world.sys.heal();
        attempt.abandon().unwrap();
    }
}

#[test]
fn a_clone_whose_fsync_fails_loses_its_attempt() {
    let world = World::cloning();
    let attempt = world.begin();
    world.fail(Call::Fsync, Effect::Refused(libc::EIO));
    let error = attempt.adopt("shard", &*world.source, &HEAD).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    world.sys.heal();
    attempt.put("manifest.json", b"{}").unwrap();
    assert_eq!(attempt.publish(false).unwrap_err().kind(), ErrorKind::Invalid);
    attempt.abandon().unwrap();
}

#[test]
fn a_link_that_was_made_although_its_answer_was_lost_counts() {
    let (_directory, world) = linking();
    for code in [libc::EIO, libc::EEXIST, libc::EINTR] {
        let effect = Effect::DoneAndRefused(code);
        world.sys.fail(Fault { call: Some(Call::Link), after: 0, sticky: false, effect });
        assert_eq!(world.adopt(), Adopted::Linked, "{code}");
    }
}

#[test]
fn the_last_name_of_a_source_may_go_meanwhile() {
    let (_directory, world) = linking();
    world.storage.remove("step-1").unwrap();
    let Adopted::Refused(why) = world.adopt() else { panic!("a link of a file without a name") };
    assert!(why.contains("No such file"), "{why}");
    let world = World::cloning();
    world.storage.remove("step-1").unwrap();
    let attempt = world.begin();
    assert_eq!(attempt.adopt("shard", &*world.source, &HEAD).unwrap(), Adopted::Cloned);
    attempt.publish(false).unwrap();
    assert!(whole(&*world.storage.open("step-2").unwrap().open("shard").unwrap()) == cloned());
}

/// `torch.save` over a file cuts it, and writes it anew.
#[test]
fn a_source_that_was_cut_in_place_is_refused() {
    let (directory, world) = linking();
    fs::OpenOptions::new().write(true).open(directory.path().join("step-1/shard")).unwrap().set_len(4096).unwrap();
    let Adopted::Refused(why) = world.adopt() else { panic!("a link of a file that was cut") };
    assert!(why.contains("found_bytes=4096 opened_bytes=9000"), "{why}");
}

#[test]
fn a_file_that_another_storage_has_open_is_refused() {
    let (directory, world) = linking();
    let other = Local::open(directory.path()).unwrap().open("step-1").unwrap().open("shard").unwrap();
    assert!(matches!(world.begin().adopt("shard", &*other, &HEAD), Ok(Adopted::Refused(_))));
}
