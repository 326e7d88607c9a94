//! NUMA nodes: finds the node of a device in sysfs, and moves threads to that node.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::fs;
use std::path::Path;

/// A NUMA node, and those of its CPUs on which this process may run.
#[derive(Clone, Debug)]
pub struct Node {
    /// The node's number.
    pub number: u32,
    cpus: CpuSet,
}

impl Node {
    /// Finds the node of the PCI device `id` (`0000:0f:00.0`) in the sysfs mounted at `sysfs`.
    ///
    /// # Errors
    /// The reason why the node makes no difference, or why it is not known.
    pub fn of(sysfs: &Path, id: &str) -> Result<Self, String> {
        let nodes = sysfs.join("devices/system/node");
        if list(&read(&nodes.join("online"))?)?.count() < 2 {
            return Err("there is one node".into());
        }
        let path = sysfs.join("bus/pci/devices").join(id.to_lowercase()).join("numa_node");
        let number = read(&path)?;
        let Ok(number) = number.parse::<u32>() else {
            return Err(format!("a device is on no node path={path:?} node={number}"));
        };
        let allowed = sched_getaffinity(None).map_err(|error| format!("no affinity: {error}"))?;
        let mut cpus = CpuSet::new();
        let here = list(&read(&nodes.join(format!("node{number}/cpulist")))?)?;
        here.filter(|&cpu| cpu < CpuSet::MAX_CPU && allowed.is_set(cpu)).for_each(|cpu| cpus.set(cpu));
        if cpus.count() == 0 {
            return Err(format!("this process may not run on the node of the device node={number}"));
        }
        Ok(Self { number, cpus })
    }

    /// The number of the node's CPUs on which this process may run.
    pub fn processors(&self) -> usize {
        self.cpus.count() as usize
    }

    /// Moves the calling thread to the node, permanently.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn enter(&self) -> std::io::Result<()> {
        Ok(sched_setaffinity(None, &self.cpus)?)
    }
}

fn read(path: &Path) -> Result<String, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{error} path={path:?}"))?;
    Ok(text.trim().to_owned())
}

/// The numbers in a list such as `0-3,8`.
fn list(text: &str) -> Result<impl Iterator<Item = usize> + use<>, String> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        (last < 1 << 16).then_some(first..=last)
    };
    let ranges: Option<Vec<_>> = text.split(',').filter(|part| !part.is_empty()).map(range).collect();
    Ok(ranges.ok_or_else(|| format!("not a list of numbers text={text:?}"))?.into_iter().flatten())
}

#[cfg(test)]
#[cfg(not(miri))]
mod tests {
    use super::*;

    /// A sysfs of two nodes; the device's node has the CPUs `cpus`.
    fn sysfs(online: &str, node: &str, cpus: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("devices/system/node/online", online);
        write("devices/system/node/node1/cpulist", cpus);
        write("bus/pci/devices/0000:0f:00.0/numa_node", node);
        root
    }

    fn allowed() -> Vec<usize> {
        let set = sched_getaffinity(None).unwrap();
        (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
    }

    #[test]
    fn the_node_of_a_device_is_found_and_threads_move_there() {
        let mine = allowed();
        let root = sysfs("0-1\n", "1\n", &format!("{},60000-60003\n", mine[0]));
        let node = Node::of(root.path(), "0000:0F:00.0").unwrap();
        assert_eq!((node.number, node.processors()), (1, 1));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                node.enter().unwrap();
                assert_eq!(allowed(), mine[..1]);
            });
        });
        assert_eq!(allowed(), mine);
    }

    #[test]
    fn a_node_that_makes_no_difference_or_is_not_known_is_reported() {
        for (online, node, cpus, why) in [
            ("0\n", "0\n", "0\n", "there is one node"),
            ("0-1\n", "-1\n", "0\n", "on no node"),
            ("0-1\n", "1\n", "60000\n", "may not run"),
            ("0-1\n", "1\n", "\n", "may not run"),
            ("0-1\n", "1\n", "0-99999999999\n", "not a list"),
            ("0,x\n", "1\n", "0\n", "not a list"),
            ("0-1\n", "7\n", "0\n", "node7"),
        ] {
            let error = Node::of(sysfs(online, node, cpus).path(), "0000:0f:00.0").unwrap_err();
            assert!(error.contains(why), "{why}: {error}");
        }
        let error = Node::of(sysfs("0-1", "1", "0").path(), "0000:01:00.0").unwrap_err();
        assert!(error.contains("0000:01:00.0"), "{error}");
    }
}
