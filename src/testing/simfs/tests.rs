//! One test for each rule of the model, and programs that are wrong on purpose and that the model must
//! reject.

use super::*;
use crate::storage::local::sys::{Kind, Open, RawFd, Rename, Sys};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const CREATE: Open = Open::Create { direct: false };
const READ: Open = Open::Read { direct: false };

impl SimFs {
    fn at(&self, path: &str, how: Open) -> RawFd {
        self.open(None, Path::new(path), how, false).unwrap()
    }

    fn sync(&self, path: &str) {
        let how = if path.contains('.') { READ } else { Open::Dir };
        let fd = self.at(path, how);
        self.fsync(fd).unwrap();
        self.close(fd);
    }

    fn file(&self, path: &str, bytes: &[u8]) -> RawFd {
        let fd = self.at(path, CREATE);
        assert_eq!(self.pwrite(fd, bytes, 0).unwrap(), bytes.len());
        fd
    }

    fn make_dir(&self, path: &str) {
        self.mkdir(None, Path::new(path)).unwrap();
    }

    fn move_to(&self, from: &str, to: &str, how: Rename) {
        let root = self.at("/", Open::Dir);
        self.rename(root, Path::new(from), Path::new(to), how).unwrap();
        self.close(root);
    }

    fn remove(&self, name: &str, kind: Kind) {
        let root = self.at("/", Open::Dir);
        self.unlink(root, Path::new(name), kind).unwrap();
        self.close(root);
    }

    /// Returns the trees that a crash can leave now.
    fn outcomes(&self) -> BTreeSet<BTreeMap<String, Option<Vec<u8>>>> {
        let history = self.history();
        let now = history.len();
        let tree = |crash: Crash| crash.image.paths().into_iter().map(|(p, b)| (p, b.map(|b| b.to_vec()))).collect();
        history.crashes(now..now + 1, 7, 2000).map(tree).collect()
    }

    /// Returns the possible contents of `path` after a crash now.
    fn fates(&self, path: &str) -> BTreeSet<Option<Vec<u8>>> {
        self.outcomes().into_iter().map(|tree| tree.get(path).cloned().flatten()).collect()
    }

    /// Returns how many combinations of whole sectors of `a.bin` a crash can leave.
    fn torn_patterns(&self) -> usize {
        let found = self.fates("a.bin");
        for sector in found.iter().flatten().flat_map(|bytes| bytes.chunks(512)) {
            assert!(sector.iter().all(|b| *b == sector[0]), "a sector is whole");
        }
        let pattern = |bytes: &Vec<u8>| bytes.iter().step_by(512).copied().collect::<Vec<_>>();
        found.iter().flatten().map(pattern).collect::<BTreeSet<_>>().len()
    }

    fn names(&self) -> BTreeSet<String> {
        self.outcomes().iter().map(|tree| tree.keys().cloned().collect::<Vec<_>>().join(" ")).collect()
    }
}

fn fates<const N: usize>(fates: [Option<&[u8]>; N]) -> BTreeSet<Option<Vec<u8>>> {
    fates.into_iter().map(|fate| fate.map(<[u8]>::to_vec)).collect()
}

fn set<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

#[test]
fn an_fsync_of_a_file_does_not_persist_its_name() {
    let fs = SimFs::new();
    let fd = fs.file("a.bin", b"shore");
    assert_eq!(fs.fates("a.bin"), fates([None, Some(b""), Some(b"\0\0\0\0\0"), Some(b"shore")]));
    fs.fsync(fd).unwrap();
    assert_eq!(fs.fates("a.bin"), fates([None, Some(b"shore")]));
    fs.sync("/");
    assert_eq!(fs.fates("a.bin"), fates([Some(b"shore")]));
}

#[test]
fn an_fsync_of_a_directory_covers_its_own_entries_and_neither_content_nor_its_parent_nor_its_children() {
    let fs = SimFs::new();
    fs.make_dir("d");
    fs.make_dir("d/e");
    fs.file("d/a.bin", b"x");
    fs.sync("d");
    assert_eq!(fs.names(), set(["", "d d/a.bin d/e"]));
    assert_eq!(fs.fates("d/a.bin"), fates([None, Some(b""), Some(b"\0"), Some(b"x")]));
    fs.file("d/e/b.bin", b"");
    fs.sync("/");
    assert_eq!(fs.names(), set(["d d/a.bin d/e", "d d/a.bin d/e d/e/b.bin"]));
}

#[test]
fn unsynced_writes_survive_in_any_subset_and_torn_at_sectors() {
    let fs = SimFs::new();
    let fd = fs.file("a.bin", &[0; 2048]);
    fs.fsync(fd).unwrap();
    fs.sync("/");
    fs.pwrite(fd, &[1; 2048], 0).unwrap();
    assert_eq!(fs.torn_patterns(), 16, "every combination of four sectors of one write, not only prefixes");
    fs.fsync(fd).unwrap();
    fs.pwrite(fd, &[2; 1024], 0).unwrap();
    fs.pwrite(fd, &[3; 1024], 1024).unwrap();
    assert_eq!(fs.torn_patterns(), 16, "and of two");
}

#[test]
fn a_sector_holds_one_of_the_versions_that_it_had() {
    let fs = SimFs::new();
    let fd = fs.file("a.bin", b"....");
    fs.fsync(fd).unwrap();
    fs.sync("/");
    fs.pwrite(fd, b"a", 0).unwrap();
    fs.pwrite(fd, b"b", 3).unwrap();
    assert_eq!(fs.fates("a.bin"), fates([Some(b"...."), Some(b"a..."), Some(b"a..b")]));
}

#[test]
fn lengths_are_apart_from_data_and_keep_their_order() {
    let fs = SimFs::new();
    let fd = fs.at("a.bin", CREATE);
    fs.fallocate(fd, 6).unwrap();
    fs.fsync(fd).unwrap();
    fs.sync("/");
    assert_eq!(fs.fates("a.bin"), fates([Some(b"\0\0\0\0\0\0")]), "allocated space reads as zeros");
    fs.pwrite(fd, b"abcdef", 0).unwrap();
    fs.ftruncate(fd, 3).unwrap();
    let expected: [Option<&[u8]>; 4] = [Some(b"\0\0\0\0\0\0"), Some(b"abcdef"), Some(b"\0\0\0"), Some(b"abc")];
    assert_eq!(fs.fates("a.bin"), fates(expected));
    fs.fsync(fd).unwrap();
    assert_eq!(fs.fates("a.bin"), fates([Some(b"abc")]));
    fs.ftruncate(fd, 1).unwrap();
    fs.fallocate(fd, 4).unwrap();
    assert_eq!(
        fs.fates("a.bin"),
        fates([Some(b"abc"), Some(b"a"), Some(b"a\0\0\0")]),
        "what was cut does not come back"
    );
}

#[test]
fn a_failed_fsync_forgets_the_data_and_is_reported_once_per_descriptor() {
    let fs = SimFs::new();
    let fd = fs.file("a.bin", b"old");
    let other = fs.at("a.bin", READ);
    fs.fsync(fd).unwrap();
    fs.sync("/");
    fs.pwrite(fd, b"new", 0).unwrap();
    fs.fail(Fault { call: Some(Call::Fsync), after: 0, errno: libc::EIO, sticky: false, done: false });
    assert_eq!(fs.fsync(fd).unwrap_err().raw_os_error(), Some(libc::EIO));
    fs.fsync(fd).expect("reported once");
    fs.fsync(other).expect_err("once to the other descriptor as well");
    fs.fsync(other).unwrap();
    fs.sync("a.bin");
    let mut seen = [0; 3];
    fs.pread(fd, &mut seen, 0).unwrap();
    assert_eq!(&seen, b"new", "the running system still reads what the disk never got");
    assert_eq!(fs.fates("a.bin"), fates([Some(b"old")]));
    fs.pwrite(fd, b"X", 0).unwrap();
    fs.fsync(fd).unwrap();
    assert_eq!(fs.fates("a.bin"), fates([Some(b"Xew")]), "a later write carries its sector as the system saw it");
}

#[test]
fn a_failed_fsync_of_a_directory_leaves_its_entries_pending() {
    let fs = SimFs::new();
    fs.make_dir("d");
    fs.fail(Fault { call: Some(Call::Fsync), after: 0, errno: libc::EIO, sticky: false, done: false });
    let root = fs.at("/", Open::Dir);
    fs.fsync(root).unwrap_err();
    assert_eq!(fs.names(), set(["", "d"]));
    fs.fsync(root).unwrap();
    assert_eq!(fs.names(), set(["d"]));
}

#[test]
fn a_rename_is_atomic_and_revocable_until_the_directory_is_synced() {
    for how in [Rename::Plain, Rename::NoReplace] {
        let fs = SimFs::new();
        fs.make_dir("a");
        fs.sync("/");
        fs.move_to("a", "b", how);
        assert_eq!(fs.names(), set(["a", "b"]));
        fs.sync("b");
        assert_eq!(fs.names(), set(["a", "b"]), "an fsync of the directory itself is not one of its parent");
        fs.sync("/");
        assert_eq!(fs.names(), set(["b"]));
    }
}

#[test]
fn an_exchange_is_atomic_and_revocable() {
    let fs = SimFs::new();
    for (name, bytes) in [("a.bin", b"a"), ("b.bin", b"b")] {
        fs.file(name, bytes);
        fs.sync(name);
    }
    fs.sync("/");
    fs.move_to("a.bin", "b.bin", Rename::Exchange);
    let contents = |tree: BTreeMap<String, Option<Vec<u8>>>| tree.into_values().flatten().collect::<Vec<_>>().concat();
    let found: BTreeSet<_> = fs.outcomes().into_iter().map(contents).collect();
    assert_eq!(found, BTreeSet::from([b"ab".to_vec(), b"ba".to_vec()]));
    fs.sync("/");
    assert_eq!(fs.fates("a.bin"), fates([Some(b"b")]));
}

#[test]
fn operations_on_one_name_keep_their_order_and_others_do_not() {
    let fs = SimFs::new();
    fs.make_dir("a");
    fs.move_to("a", "b", Rename::NoReplace);
    fs.make_dir("c");
    fs.make_dir("a");
    assert_eq!(fs.names(), set(["", "a", "b", "a b", "c", "a c", "b c", "a b c"]));
    let fs = SimFs::new();
    fs.make_dir("a");
    fs.sync("/");
    fs.remove("a", Kind::Dir);
    fs.make_dir("a");
    fs.make_dir("a/x");
    assert_eq!(fs.names(), set(["a", "", "a a/x"]));
}

#[test]
fn an_unlinked_file_comes_back_with_its_durable_content_or_is_gone() {
    let fs = SimFs::new();
    let fd = fs.file("a.bin", b"kept");
    fs.fsync(fd).unwrap();
    fs.sync("/");
    fs.remove("a.bin", Kind::File);
    assert_eq!(fs.fates("a.bin"), fates([None, Some(b"kept")]));
    fs.sync("/");
    assert_eq!(fs.fates("a.bin"), fates([None]));
    assert_eq!(fs.stat(fd).unwrap().links, 0);
}

#[test]
fn locks_belong_to_descriptors_and_end_with_them_and_with_the_system() {
    let fs = SimFs::new();
    fs.file("d", b"");
    fs.sync("/");
    let (one, two) = (fs.at("d", Open::Update), fs.at("d", Open::Update));
    let reader = fs.at("d", READ);
    assert_eq!(fs.try_lock(reader).unwrap_err().raw_os_error(), Some(libc::EBADF), "as on NFS");
    assert!(fs.try_lock(one).unwrap() && fs.try_lock(one).unwrap());
    assert!(!fs.try_lock(two).unwrap());
    fs.close(one);
    assert!(fs.try_lock(two).unwrap());
    let booted = SimFs::boot(&fs.history().everything());
    let fd = booted.at("d", Open::Update);
    assert!(booted.try_lock(fd).unwrap());
    assert_eq!(booted.open_descriptors(), 1);
}

#[test]
fn calls_fail_as_the_real_ones_do() {
    let fs = SimFs::new();
    fs.make_dir("d");
    let fd = fs.file("d/f", b"x");
    let root = fs.at("/", Open::Dir);
    let code = |result: std::io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    let open = |path: &str, how| fs.open(None, Path::new(path), how, false).map(drop);
    assert_eq!(code(open("d/f", CREATE)), libc::EEXIST);
    assert_eq!(code(open("d/f", Open::Dir)), libc::ENOTDIR);
    assert_eq!(code(open("d/g", READ)), libc::ENOENT);
    assert_eq!(code(open("d/f/g", READ)), libc::ENOTDIR);
    assert_eq!(code(fs.mkdir(None, Path::new("d"))), libc::EEXIST);
    fs.make_dir("e");
    let rename = |from: &str, to: &str, how| fs.rename(root, Path::new(from), Path::new(to), how);
    assert_eq!(code(rename("e", "d", Rename::Plain)), libc::ENOTEMPTY);
    assert_eq!(code(rename("e", "d", Rename::NoReplace)), libc::EEXIST);
    assert_eq!(code(rename("e", "x", Rename::Exchange)), libc::ENOENT);
    rename("d", "e", Rename::Plain).expect("onto an empty directory it silently succeeds");
    assert_eq!(code(fs.unlink(root, Path::new("e"), Kind::Dir)), libc::ENOTEMPTY);
    assert_eq!(code(fs.unlink(root, Path::new("e"), Kind::File)), libc::EISDIR);
    assert_eq!(code(fs.pwrite(fs.at("e/f", READ), b"x", 0).map(drop)), libc::EBADF);
    fs.close(fd);
    assert_eq!(code(fs.fsync(fd)), libc::EBADF);
    let direct = fs.at("direct", Open::Create { direct: true });
    assert_eq!(code(fs.pwrite(direct, b"odd", 0).map(drop)), libc::EINVAL);
}

#[test]
fn a_fault_hits_its_call_once_or_from_then_on_and_may_come_after_the_work() {
    let fs = SimFs::new();
    fs.fail(Fault { call: Some(Call::Mkdir), after: 1, errno: libc::ENOSPC, sticky: false, done: true });
    fs.make_dir("a");
    fs.mkdir(None, Path::new("b")).unwrap_err();
    assert_eq!(fs.names().last().unwrap(), "b", "the call did its work");
    fs.make_dir("c");
    fs.fail(Fault { call: None, after: 0, errno: libc::EIO, sticky: true, done: false });
    for _ in 0..3 {
        fs.open(None, Path::new("/"), Open::Dir, true).unwrap_err();
    }
}

#[test]
fn a_killed_process_leaves_what_it_wrote_visible_and_not_durable_and_its_locks_behind() {
    let fs = SimFs::new();
    let file = fs.file("f", b"");
    fs.sync("/");
    let root = fs.at("/", Open::Dir);
    assert!(fs.try_lock(file).unwrap());
    fs.kill_after(1);
    fs.make_dir("a");
    assert!(fs.killed());
    fs.mkdir(None, Path::new("b")).unwrap_err();
    fs.fsync(root).unwrap_err();
    fs.restart();
    assert!(!fs.killed());
    assert_eq!(fs.open_descriptors(), 0);
    let (root, file) = (fs.at("/", Open::Dir), fs.at("f", Open::Update));
    assert!(fs.try_lock(file).unwrap());
    assert_eq!(fs.list(root).unwrap(), ["f", "a"]);
    assert_eq!(fs.names(), set(["f", "a f"]));
}

#[test]
fn the_same_seed_gives_the_same_crashes_and_the_running_view_is_one_of_them() {
    let fs = SimFs::new();
    for i in 0..4 {
        fs.make_dir(&format!("d{i}"));
        fs.file(&format!("d{i}/f.bin"), &[i; 3000]);
    }
    let hashes = |seed| {
        let history = fs.history();
        history
            .crashes(0..history.len() + 1, seed, 50)
            .map(|crash| (crash.position, crash.image.hash(None)))
            .collect::<Vec<_>>()
    };
    assert_eq!(hashes(1), hashes(1));
    assert_ne!(hashes(1), hashes(2));
    let everything = fs.history().everything();
    assert!(hashes(1).contains(&(fs.position(), everything.hash(None))));
    for (path, bytes) in everything.paths() {
        let Some(bytes) = bytes else { continue };
        let mut seen = vec![0; 4096];
        let len = fs.pread(fs.at(&path, READ), &mut seen, 0).unwrap();
        assert_eq!(seen[..len], bytes[..], "{path}");
    }
}

/// Writes a file under a temporary name and moves it to `final.bin`. Omits the action that `skip` names.
/// Returns the position at which a program would say "saved".
fn save(fs: &SimFs, skip: &str) -> usize {
    let fd = fs.file("tmp.bin", &[9; 1500]);
    if skip != "file" {
        fs.fsync(fd).unwrap();
    }
    fs.move_to("tmp.bin", "final.bin", Rename::NoReplace);
    if skip != "directory" {
        fs.sync("/");
    }
    fs.position()
}

/// Returns how often the name existed without all the bytes, and how often the name was missing after
/// "saved".
fn damage(fs: &SimFs, saved: usize) -> (usize, usize) {
    let history = fs.history();
    let (mut torn, mut lost) = (0, 0);
    for crash in history.crashes(0..history.len() + 1, 3, 500) {
        match crash.image.paths().get("final.bin") {
            Some(bytes) => torn += usize::from(bytes.as_deref() != Some(&vec![9; 1500])),
            None => lost += usize::from(crash.position >= saved),
        }
    }
    (torn, lost)
}

#[test]
fn a_program_without_an_fsync_of_the_file_is_seen_torn_and_one_without_the_directory_is_seen_lost() {
    let run = |skip| {
        let fs = SimFs::new();
        let saved = save(&fs, skip);
        damage(&fs, saved)
    };
    assert_eq!(run("nothing"), (0, 0));
    let (torn, lost) = run("file");
    assert!(torn > 0 && lost == 0, "torn={torn} lost={lost}");
    let (torn, lost) = run("directory");
    assert!(torn == 0 && lost > 0, "torn={torn} lost={lost}");
}

#[test]
fn each_name_of_a_file_is_durable_by_its_own_directory_and_the_bytes_by_an_fsync_of_any_name() {
    let fs = SimFs::new();
    for name in ["a", "b"] {
        fs.make_dir(name);
    }
    let fd = fs.file("a/x.bin", b"x");
    let b = fs.at("b", Open::Dir);
    fs.link(fd, b, Path::new("y.bin")).unwrap();
    assert_eq!(fs.stat(fd).unwrap().links, 2);
    fs.sync("/");
    assert_eq!(fs.names(), set(["a b", "a a/x.bin b", "a b b/y.bin", "a a/x.bin b b/y.bin"]));
    fs.sync("b");
    assert_eq!(fs.names(), set(["a b b/y.bin", "a a/x.bin b b/y.bin"]));
    let written = fates([Some(b""), Some(b"\0"), Some(b"x")]);
    assert_eq!(fs.fates("b/y.bin"), written, "a durable name of a file that is not durable");
    fs.sync("b/y.bin");
    assert_eq!(fs.fates("b/y.bin"), fates([Some(b"x")]));
    assert_eq!(fs.fates("a/x.bin"), fates([None, Some(b"x")]));
}

#[test]
fn a_file_lives_as_long_as_it_has_a_name_and_has_as_many_after_a_crash() {
    let fs = SimFs::new();
    let fd = fs.file("a.bin", b"x");
    fs.fsync(fd).unwrap();
    let root = fs.at("/", Open::Dir);
    fs.link(fd, root, Path::new("b.bin")).unwrap();
    fs.sync("/");
    let booted = SimFs::boot(&fs.history().everything());
    assert_eq!(booted.stat(booted.at("b.bin", READ)).unwrap().links, 2);
    fs.remove("a.bin", Kind::File);
    assert_eq!(fs.names(), set(["a.bin b.bin", "b.bin"]));
    assert_eq!((fs.stat(fd).unwrap().links, fs.fates("b.bin")), (1, fates([Some(b"x")])));
    fs.remove("b.bin", Kind::File);
    let code = |result: std::io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    assert_eq!(code(fs.link(fd, root, Path::new("c.bin"))), libc::ENOENT, "no name is left to take");
    fs.file("c.bin", b"");
    assert_eq!(code(fs.link(fd, root, Path::new("c.bin"))), libc::ENOENT);
    let other = fs.file("d.bin", b"");
    assert_eq!(code(fs.link(other, root, Path::new("c.bin"))), libc::EEXIST);
    fs.protect(other).unwrap();
    let opened = fs.open(None, Path::new("d.bin"), Open::Update, false).map(drop);
    assert_eq!(code(opened), libc::EACCES);
}

#[test]
fn a_clone_without_an_fsync_is_empty_or_old_or_new() {
    let fs = SimFs::new().clones(true);
    let source = fs.file("a.bin", &[1; 1024]);
    fs.fsync(source).unwrap();
    let clone = fs.at("b.bin", CREATE);
    fs.clone_file(source, clone).unwrap();
    fs.pwrite(clone, &[2; 512], 0).unwrap();
    fs.sync("/");
    let found = fs.fates("b.bin");
    let old_head = vec![1; 1024];
    let right = [vec![2; 512], vec![1; 512]].concat();
    for fate in [vec![], old_head, right.clone()] {
        assert!(found.contains(&Some(fate.clone())), "{fate:?}");
    }
    fs.fsync(clone).unwrap();
    assert_eq!(fs.fates("b.bin"), fates([Some(&right)]));
    assert_eq!(fs.fates("a.bin"), fates([Some(&[1; 1024])]), "the source keeps its bytes");
    let other = SimFs::new();
    let (from, to) = (other.file("a.bin", b"x"), other.at("b.bin", CREATE));
    assert_eq!(other.clone_file(from, to).unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
}
