//! Files that steps share, on file systems that clone and on those that link, and what these refuse.

use super::image::{Mounted, run};
use super::leave;
use ashore::storage::local::Local;
use ashore::storage::{Adopted, FileReading, Storage, Writing};
use ashore::testing::conformance;
use ashore::{ALIGNMENT, Attempt};
use rustix::fs::statvfs;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

const LEN: usize = 24 << 20;
const NAME: &str = "model.safetensors";

fn source(storage: &dyn Storage, len: usize) -> Arc<dyn FileReading> {
    let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
    attempt.put(NAME, &vec![1; len]).unwrap();
    attempt.publish(false).unwrap();
    attempt.settle().unwrap();
    storage.open("step-1").unwrap().open(NAME).unwrap()
}

fn begin(storage: &dyn Storage, step: &str) -> Arc<dyn Writing> {
    storage.begin(step, Attempt::new(), false).unwrap()
}

fn adopt(attempt: &dyn Writing, source: &dyn FileReading) -> Adopted {
    attempt.adopt(NAME, source, &[2; ALIGNMENT]).unwrap()
}

fn refusal(adopted: Adopted) -> String {
    let Adopted::Refused(why) = adopted else { panic!("{adopted:?}") };
    println!("refused: {why}");
    why
}

/// The space that the step costs, whose file is made out of that of another one.
fn cost(mounted: &Mounted, expected: Adopted) -> u64 {
    let free = || {
        rustix::fs::sync();
        let stat = statvfs(mounted.path()).unwrap();
        stat.f_bfree * stat.f_frsize
    };
    let root = mounted.path().join("cost");
    let storage = Local::open(&root).unwrap();
    let source = source(&storage, LEN);
    let before = free();
    let attempt = begin(&storage, "step-2");
    assert_eq!(adopt(&*attempt, &*source), expected);
    attempt.publish(false).unwrap();
    attempt.settle().unwrap();
    let cost = before.saturating_sub(free());
    // Whatever becomes of one step, the other keeps its bytes.
    drop(source);
    storage.remove("step-1").unwrap();
    let bytes = fs::read(root.join("step-2").join(NAME)).unwrap();
    let head = if expected == Adopted::Cloned { 2 } else { 1 };
    assert!(bytes[..ALIGNMENT] == [head; ALIGNMENT] && bytes[ALIGNMENT..].iter().all(|&byte| byte == 1));
    fs::remove_dir_all(&root).unwrap();
    cost
}

fn conforms(mounted: &Mounted) {
    let mut roots = 0;
    conformance::run(|| {
        roots += 1;
        Arc::new(Local::open(mounted.path().join(format!("conformance-{roots}"))).unwrap())
    });
}

/// On a full disk a link takes no space, and a clone that cannot have its head becomes a link.
fn adopts_on_a_full_disk(mounted: &Mounted) {
    let storage = Local::open(mounted.path().join("full")).unwrap();
    let source = source(&storage, 1 << 20);
    let attempt = begin(&storage, "step-2");
    let ballast = mounted.path().join("ballast");
    leave(&ballast, 0);
    println!("{}: on a full disk {:?}", mounted.kind(), attempt.adopt(NAME, &*source, &[2; ALIGNMENT]));
    fs::remove_file(ballast).unwrap();
    attempt.abandon().unwrap();
    // What was half made is gone.
    let attempt = begin(&storage, "step-2");
    assert!(!matches!(adopt(&*attempt, &*source), Adopted::Refused(_)));
    attempt.publish(false).unwrap();
}

#[test]
fn xfs_and_btrfs_clone_files_of_older_steps_and_ext4_links_them() {
    for (mounted, expected) in [
        (Mounted::new("ext4", 128, &["-q", "-F", "-m", "0"]), Adopted::Linked),
        (Mounted::new("xfs", 300, &["-q"]), Adopted::Cloned),
        (Mounted::new("btrfs", 256, &["-q"]), Adopted::Cloned),
    ] {
        let cost = cost(&mounted, expected.clone());
        println!("{}: {expected:?}, {cost} bytes", mounted.kind());
        assert!(cost < 2 << 20, "{}: {cost} bytes for a file of {LEN}", mounted.kind());
        conforms(&mounted);
        adopts_on_a_full_disk(&mounted);
    }
}

/// Names that a file system has no room for are refused, and saves go on by writing.
#[test]
fn ext4_refuses_the_65_001st_name_of_a_file() {
    let mounted = Mounted::new("ext4", 128, &["-q", "-F", "-m", "0"]);
    let storage = Local::open(mounted.path().join("run")).unwrap();
    let source = source(&storage, 4096);
    let (file, names) = (mounted.path().join("run/step-1").join(NAME), mounted.path().join("names"));
    fs::create_dir(&names).unwrap();
    for name in 1..64_999 {
        fs::hard_link(&file, names.join(name.to_string())).unwrap();
    }
    let last = begin(&storage, "step-2");
    assert_eq!(adopt(&*last, &*source), Adopted::Linked);
    last.publish(false).unwrap();
    assert_eq!(fs::metadata(&file).unwrap().nlink(), 65_000);
    let attempt = begin(&storage, "step-3");
    assert!(refusal(adopt(&*attempt, &*source)).contains("Too many links"));
    attempt.put(NAME, &[3; 4096]).unwrap();
    attempt.publish(false).unwrap();
    assert_eq!(fs::read(mounted.path().join("run/step-3").join(NAME)).unwrap(), [3; 4096]);
}

#[test]
fn an_immutable_file_is_not_linked() {
    let mounted = Mounted::new("ext4", 64, &["-q", "-F"]);
    let storage = Local::open(mounted.path().join("run")).unwrap();
    let source = source(&storage, 4096);
    let file = mounted.path().join("run/step-1").join(NAME);
    run(Command::new("chattr").arg("+i").arg(&file));
    let refused = adopt(&*begin(&storage, "step-2"), &*source);
    run(Command::new("chattr").arg("-i").arg(&file));
    assert!(refusal(refused).contains("not permitted"));
}

/// With `fs.protected_hardlinks`, which is the default, a program links what it owns or may write.
#[test]
fn a_file_of_another_owner_is_linked_only_where_it_may_be_written() {
    let protected = fs::read_to_string("/proc/sys/fs/protected_hardlinks").unwrap_or_default();
    if protected.trim() != "1" {
        let _ = writeln!(std::io::stderr(), "left out: fs.protected_hardlinks is off here");
        return;
    }
    let mounted = Mounted::new("ext4", 64, &["-q", "-F"]);
    let root = mounted.path().join("run");
    let storage = Local::open(&root).unwrap();
    let source = source(&storage, 4096);
    for path in [mounted.path(), &root] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let attempt_as = |mode: u32, step: &str| {
        fs::set_permissions(root.join("step-1").join(NAME), fs::Permissions::from_mode(mode)).unwrap();
        std::thread::scope(|scope| {
            let other = || {
                become_user(12_345);
                adopt(&*begin(&storage, step), &*source)
            };
            scope.spawn(other).join().unwrap()
        })
    };
    assert!(refusal(attempt_as(0o644, "step-2")).contains("not permitted"));
    // It cannot take the permissions away from a file of another owner.
    assert_eq!(attempt_as(0o666, "step-3"), Adopted::Linked);
    assert_eq!(fs::metadata(root.join("step-1").join(NAME)).unwrap().permissions().mode() & 0o777, 0o666);
}

/// Gives this thread, and no other one, the permissions of a user in the file system.
#[expect(unsafe_code, reason = "a system call that only changes this thread's permissions")]
fn become_user(user: u32) {
    // SAFETY: the call has no pointers.
    unsafe { libc::syscall(libc::SYS_setfsuid, user) };
}

#[test]
fn a_bind_mount_of_the_same_file_system_links_nothing() {
    for (mounted, clones) in
        [(Mounted::new("ext4", 64, &["-q", "-F"]), false), (Mounted::new("xfs", 300, &["-q"]), true)]
    {
        let (root, other) = (mounted.path().join("run"), mounted.path().join("other"));
        fs::create_dir(&other).unwrap();
        let bound = mounted.path().join("bound");
        fs::create_dir(&bound).unwrap();
        let storage = Local::open(&root).unwrap();
        let source = source(&storage, 4096);
        run(Command::new("mount").arg("--bind").args([&other, &bound]));
        let adopted = adopt(&*begin(&*storage.elsewhere(&bound, false).unwrap(), "step-2"), &*source);
        run(Command::new("umount").arg("--lazy").arg(&bound));
        // Since Linux 5.18 a clone may go from mount to mount.
        if clones && adopted == Adopted::Cloned {
            continue;
        }
        assert!(refusal(adopted).to_lowercase().contains("cross-device"));
    }
}

/// A link would copy the file to the upper layer, whole.
#[test]
fn a_file_of_a_lower_layer_is_not_copied_up() {
    let mounted = Mounted::new("ext4", 128, &["-q", "-F"]);
    let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| mounted.path().join(name));
    [&lower, &upper, &work, &merged].iter().for_each(|dir| fs::create_dir(dir).unwrap());
    source(&Local::open(&lower).unwrap(), 1 << 20);
    let layers = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    run(Command::new("mount").args(["-t", "overlay", "overlay", "-o", &layers]).arg(&merged));
    let storage = Local::open(&merged).unwrap();
    let source = storage.open("step-1").unwrap().open(NAME).unwrap();
    let refused = adopt(&*begin(&storage, "step-2"), &*source);
    let copied = |root: &Path| root.join("step-1").join(NAME).exists();
    let is_copied = copied(&upper);
    drop((source, storage));
    run(Command::new("umount").arg("--lazy").arg(&merged));
    refusal(refused);
    assert!(copied(&lower) && !is_copied);
}
