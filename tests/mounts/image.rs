//! Mounts a new file system in an image file.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system, until it is dropped. The image has no name, and the loop device ends with the
/// mount.
pub struct Mounted {
    kind: &'static str,
    point: PathBuf,
    _directory: tempfile::TempDir,
}

impl Mounted {
    /// A new file system of this kind and size, made with these options.
    pub fn new(kind: &'static str, mib: u64, options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (image, point) = (directory.path().join("image"), directory.path().join("mounted"));
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        fs::create_dir(&point).unwrap();
        run(Command::new(format!("mkfs.{kind}")).args(options).arg(&image));
        let device = run(Command::new("losetup").args(["--direct-io=on", "--find", "--show"]).arg(&image));
        fs::remove_file(&image).unwrap();
        let mounted = Command::new("mount").args(["-t", kind, device.trim()]).arg(&point).status();
        // Takes effect when it is unmounted.
        run(Command::new("losetup").args(["--detach", device.trim()]));
        assert!(mounted.unwrap().success(), "cannot mount {kind}");
        let mounted = Self { kind, point, _directory: directory };
        run(Command::new("mountpoint").arg("-q").arg(&mounted.point));
        mounted
    }

    pub fn kind(&self) -> &'static str {
        self.kind
    }

    pub fn path(&self) -> &Path {
        &self.point
    }

    /// Remounts it, `ro` or `rw`.
    pub fn remount(&self, how: &str) {
        run(Command::new("mount").args(["-o", &format!("remount,{how}")]).arg(&self.point));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily, because after a failed test something may still be open.
        let unmounted = Command::new("umount").arg("--lazy").arg(&self.point).status();
        if !std::thread::panicking() {
            assert!(unmounted.unwrap().success(), "cannot unmount {}", self.point.display());
        }
    }
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
