//! The memory limit of this process, set by the machine or by a control group.
//!
//! Without this check, the kernel kills the process without a message while the process faults in an arena
//! that is too large.

use crate::error::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// A limit, and the file that sets it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Limit {
    bytes: u64,
    set_in: PathBuf,
}

/// Refuses an arena above the memory limit.
///
/// # Errors
/// `Invalid`, with the limit and the file that sets it.
pub(super) fn check(arena: u64) -> Result<()> {
    let machine = rustix::system::sysinfo();
    #[allow(clippy::useless_conversion, reason = "the type is that of the architecture")]
    let total = u64::try_from(machine.totalram).unwrap_or(u64::MAX).saturating_mul(u64::from(machine.mem_unit));
    let machine = Limit { bytes: total, set_in: "/proc/meminfo".into() };
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    fits(arena, of_groups(&groups, Path::new("/sys/fs/cgroup")).into_iter().chain([machine]))
}

fn fits(arena: u64, limits: impl IntoIterator<Item = Limit>) -> Result<()> {
    let Some(Limit { bytes, set_in }) = limits.into_iter().min_by_key(|limit| limit.bytes) else { return Ok(()) };
    if arena <= bytes {
        return Ok(());
    }
    let why = "the arena is larger than the memory that this process may have: set a smaller one";
    Err(Error::invalid(format!("{why} arena={arena} limit={bytes}")).with_path(set_in))
}

/// The limits of the control groups in `groups` (lines of `/proc/self/cgroup`) and of their ancestors. In a
/// container the path is often that of the host, while the mount begins further down: then the topmost
/// mounted group counts.
fn of_groups(groups: &str, mounted: &Path) -> Vec<Limit> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (top, file) = if controllers.is_empty() {
            (mounted.to_owned(), "memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            (mounted.join("memory"), "memory.limit_in_bytes")
        } else {
            continue;
        };
        let group = Path::new(path.trim_start_matches('/'));
        found.extend(group.ancestors().filter_map(|group| {
            let set_in = top.join(group).join(file);
            // `max`, or no such file: this group has no limit.
            let bytes = fs::read_to_string(&set_in).ok()?.trim().parse().ok()?;
            Some(Limit { bytes, set_in })
        }));
    }
    found
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::ErrorKind;

    /// Regression: the kernel killed a process that faulted in an arena above the limit of its control group.
    #[test]
    fn an_arena_beyond_what_a_group_or_the_machine_allows_is_refused_before_it_is_mapped() {
        let error = check(1 << 60).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("arena=1152921504606846976 limit="), "{error}");
        check(1 << 20).unwrap();
    }

    #[test]
    fn the_smallest_limit_of_a_group_and_those_above_it_counts() {
        let mounted = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = mounted.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("memory.max", "900\n");
        write("a/memory.max", "700\n");
        write("a/b/memory.max", "max\n");
        write("memory/x/memory.limit_in_bytes", "500\n");
        let limits = |groups: &str| {
            let mut bytes: Vec<_> = of_groups(groups, mounted.path()).iter().map(|limit| limit.bytes).collect();
            bytes.sort_unstable();
            bytes
        };
        assert_eq!(limits("0::/a/b\n"), [700, 900]);
        assert_eq!(limits("5:cpu:/a\n4:memory:/x/y\n0::/\n"), [500, 900], "both versions at once");
        assert_eq!(limits("0::/of/the/host\n"), [900], "a container that sees the path of its host");
        assert!(limits("nonsense\n\n1:name=systemd:/a\n").is_empty());
        let error = fits(800, of_groups("0::/a/b\n", mounted.path())).unwrap_err();
        assert_eq!(error.path(), Some(&*mounted.path().join("a/memory.max")));
        fits(700, of_groups("0::/a/b\n", mounted.path())).unwrap();
    }
}
