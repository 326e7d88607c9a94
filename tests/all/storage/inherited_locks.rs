//! A program forks (a data loader, say) while it writes an attempt, and dies; the child lives on. Its copies
//! of the descriptors must not make the attempt look alive for ever.
//!
//! # Safety argument
//! Between fork and its end the child calls write, alarm, pause and _exit, which are async-signal-safe, and
//! nothing else.
#![expect(unsafe_code, reason = "fork")]

use ashore::Attempt;
use ashore::storage::local::Local;
use ashore::storage::{Storage, Sweep};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

const ROOT: &str = "ASHORE_TEST_ROOT";

#[test]
fn of_a_process_that_dies() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "storage::inherited_locks::the_parent", "--ignored", "--nocapture"])
        .env(ROOT, directory.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines().map(Result::unwrap);
    let line = lines.find(|line| line.contains("child=")).expect("the child's process id");
    let child = line.split_once("child=").unwrap().1.parse().unwrap();

    let while_it_lives = storage.sweep(Sweep::default()).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    let after_its_death = storage.sweep(Sweep::default()).unwrap();
    let child = rustix::process::Pid::from_raw(child).unwrap();
    rustix::process::kill_process(child, rustix::process::Signal::KILL).expect("the child outlives its parent");
    assert_eq!((while_it_lives.removed.len(), while_it_lives.left.len()), (0, 1), "{while_it_lives:?}");
    assert_eq!((after_its_death.removed.len(), after_its_death.left.len()), (1, 0), "{after_its_death:?}");
}

#[test]
#[ignore = "the other process of the test above"]
fn the_parent() {
    let Some(root) = std::env::var_os(ROOT) else { return };
    let attempt = Local::open(root).unwrap().begin("step-1", Attempt::new(), false).unwrap();
    let (mut born, birth) = std::io::pipe().unwrap();
    // SAFETY: see the safety argument.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above. The child ends whether or not the test passes.
        unsafe {
            libc::write(birth.as_raw_fd(), b"x".as_ptr().cast(), 1);
            libc::alarm(60);
            libc::pause();
            libc::_exit(0);
        }
    }
    // Only a child that has run can have released what it inherited.
    born.read_exact(&mut [0]).unwrap();
    println!("\nchild={child}");
    std::io::stdout().flush().unwrap();
    std::thread::sleep(std::time::Duration::from_secs(60));
    drop(attempt);
}
