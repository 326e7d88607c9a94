//! Which device it is when that was left to the machine.

#[cfg(all(feature = "cuda", not(any(loom, miri))))]
use super::Cuda;
use super::{Device, DeviceChoice, DeviceReport, Host};
use crate::error::Result;
use std::sync::Arc;

/// How launchers tell a process its number among those of its machine: torchrun, Slurm, Open MPI, MVAPICH, Hydra and Intel MPI, Flux, PALS.
const LOCAL_RANKS: [&str; 7] = [
    "LOCAL_RANK",
    "SLURM_LOCALID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "FLUX_TASK_LOCAL_ID",
    "PALS_LOCAL_RANKID",
];

/// A device that something speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hint {
    pub ordinal: u32,
    /// What does.
    pub why: String,
}

impl Hint {
    /// The rank of this process, as `variable` has it: ranks of a machine take its `devices` in turn.
    #[cfg_attr(not(all(feature = "cuda", not(any(loom, miri)))), allow(dead_code))]
    pub fn of_launcher(devices: u32, variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let rank = |name: &&'static str| Some((*name, variable(name)?.trim().parse::<u32>().ok()?));
        let (name, rank) = LOCAL_RANKS.iter().find_map(rank)?;
        Some(Self { ordinal: rank.checked_rem(devices)?, why: format!("{name}={rank}") })
    }
}

/// The device that `choice` comes to on this machine. [`DeviceChoice::Auto`] is decided here and now: by the context that is current in
/// this thread, by the number that the launcher gave this process, or the first.
///
/// # Errors
/// `Unavailable` or `Device`, naming what is missing, for a GPU that was asked for and is not to be had.
pub fn choose(choice: DeviceChoice) -> Result<(Arc<dyn Device>, DeviceReport)> {
    match choice {
        DeviceChoice::Host => Ok(host("as asked for".into())),
        DeviceChoice::Cuda(ordinal) => cuda(ordinal),
        DeviceChoice::Auto => Ok(auto(true, None).unwrap_or_else(no_gpu)),
    }
}

/// As [`choose`] for an executor: what is left to the machine is decided by memory of the device `given` that was handed in, or by the
/// context that is current; otherwise it is left open until a tensor of a GPU is seen.
pub(crate) fn choose_later(choice: DeviceChoice, given: Option<u32>) -> Result<(Arc<dyn Device>, DeviceReport)> {
    match choice {
        DeviceChoice::Auto => Ok(auto(false, given).unwrap_or_else(no_gpu)),
        _ => choose(choice),
    }
}

fn host(why: String) -> (Arc<dyn Device>, DeviceReport) {
    (Arc::new(Host), DeviceReport::new(&Host, why))
}

fn no_gpu(error: crate::Error) -> (Arc<dyn Device>, DeviceReport) {
    let why = format!("{error:#}");
    // Not a field `error`: a machine without a GPU has none.
    tracing::info!(reason = %why, "no GPU: tensors are copied by the host");
    host(why)
}

#[cfg(all(feature = "cuda", not(any(loom, miri))))]
fn cuda(ordinal: u32) -> Result<(Arc<dyn Device>, DeviceReport)> {
    let device = Cuda::new(ordinal)?;
    let report = DeviceReport::new(&device, device.describe().to_owned());
    tracing::info!(device = %report, "tensors are copied by a GPU");
    Ok((Arc::new(device), report))
}

#[cfg(all(feature = "cuda", not(any(loom, miri))))]
fn auto(now: bool, given: Option<u32>) -> Result<(Arc<dyn Device>, DeviceReport)> {
    let device = Cuda::auto(now, given)?;
    let report = DeviceReport::new(device.0.as_ref(), device.1);
    tracing::info!(device = %report, "tensors are copied by a GPU, where they are in its memory");
    Ok((device.0, report))
}

#[cfg(not(all(feature = "cuda", not(any(loom, miri)))))]
fn cuda(ordinal: u32) -> Result<(Arc<dyn Device>, DeviceReport)> {
    let why = format!("built without the feature cuda device=cuda:{ordinal}");
    Err(crate::Error::new(crate::ErrorKind::Unavailable, why))
}

#[cfg(not(all(feature = "cuda", not(any(loom, miri)))))]
fn auto(_now: bool, _given: Option<u32>) -> Result<(Arc<dyn Device>, DeviceReport)> {
    cuda(0)
}

#[cfg(all(test, not(any(loom, miri))))]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_machine_take_its_devices_in_turn() {
        let hint = |set: &[(&str, &str)], devices| {
            let value = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned());
            Hint::of_launcher(devices, value).map(|hint| (hint.ordinal, hint.why))
        };
        assert_eq!(hint(&[("LOCAL_RANK", "3")], 8), Some((3, "LOCAL_RANK=3".into())));
        assert_eq!(hint(&[("LOCAL_RANK", "9")], 8), Some((1, "LOCAL_RANK=9".into())));
        // A launcher that shows each process one device.
        assert_eq!(hint(&[("SLURM_LOCALID", "5")], 1), Some((0, "SLURM_LOCALID=5".into())));
        assert_eq!(hint(&[("LOCAL_RANK", "five"), ("SLURM_LOCALID", " 2 ")], 4), Some((2, "SLURM_LOCALID=2".into())));
        assert_eq!(
            (hint(&[], 8), hint(&[("LOCAL_RANK", "-1")], 8), hint(&[("LOCAL_RANK", "1")], 0)),
            (None, None, None)
        );
    }
}
