//! Chooses the device of an executor or restore when the program leaves it to `auto`.

#[cfg(all(feature = "cuda", not(any(loom, miri))))]
use super::Cuda;
use super::{Device, DeviceChoice, DeviceReport, Host};
use crate::error::Result;
use std::sync::Arc;

/// Environment variables in which launchers pass a process its local rank on the machine. The launchers:
/// torchrun, Slurm, Open MPI, MVAPICH, Hydra and Intel MPI, Flux, PALS.
const LOCAL_RANKS: [&str; 7] = [
    "LOCAL_RANK",
    "SLURM_LOCALID",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",
    "FLUX_TASK_LOCAL_ID",
    "PALS_LOCAL_RANKID",
];

/// A likely device, and the evidence for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Hint {
    pub ordinal: u32,
    /// The evidence, for messages.
    pub why: String,
}

impl Hint {
    /// Reads the local rank of this process from `variable`, modulo the machine's number of `devices`.
    #[cfg_attr(not(all(feature = "cuda", not(any(loom, miri)))), allow(dead_code))]
    pub fn of_launcher(devices: u32, variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let rank = |name: &&'static str| Some((*name, variable(name)?.trim().parse::<u32>().ok()?));
        let (name, rank) = LOCAL_RANKS.iter().find_map(rank)?;
        Some(Self { ordinal: rank.checked_rem(devices)?, why: format!("{name}={rank}") })
    }
}

/// Resolves `choice` to a device of this machine. This call decides [`DeviceChoice::Auto`]: it takes the
/// device of the context that is current in this thread, else the local rank from the launcher, else the
/// first GPU.
///
/// # Errors
/// `Unavailable` or `Device`, naming what is missing, for a requested GPU that is not available.
pub fn choose(choice: DeviceChoice) -> Result<(Arc<dyn Device>, DeviceReport)> {
    match choice {
        DeviceChoice::Host => Ok(host("as requested".into())),
        DeviceChoice::Cuda(ordinal) => cuda(ordinal),
        DeviceChoice::Auto => Ok(auto(true, None).unwrap_or_else(no_gpu)),
    }
}

/// Resolves `choice` for an executor. [`DeviceChoice::Auto`] takes the device `given`, whose memory the
/// program handed in, else the device of the current context. Otherwise the choice stays open until the first
/// GPU tensor is seen.
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
    // The field is not `error`: a machine without a GPU has none.
    tracing::info!(reason = %why, "no GPU: the host copies tensors");
    host(why)
}

#[cfg(all(feature = "cuda", not(any(loom, miri))))]
fn cuda(ordinal: u32) -> Result<(Arc<dyn Device>, DeviceReport)> {
    let device = Cuda::new(ordinal)?;
    let report = DeviceReport::new(&device, device.describe().to_owned());
    tracing::info!(device = %report, "a GPU copies tensors");
    Ok((Arc::new(device), report))
}

#[cfg(all(feature = "cuda", not(any(loom, miri))))]
fn auto(now: bool, given: Option<u32>) -> Result<(Arc<dyn Device>, DeviceReport)> {
    let device = Cuda::auto(now, given)?;
    let report = DeviceReport::new(device.0.as_ref(), device.1);
    tracing::info!(device = %report, "a GPU copies tensors that are in GPU memory");
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
        // This launcher shows each process a single device.
        assert_eq!(hint(&[("SLURM_LOCALID", "5")], 1), Some((0, "SLURM_LOCALID=5".into())));
        assert_eq!(hint(&[("LOCAL_RANK", "five"), ("SLURM_LOCALID", " 2 ")], 4), Some((2, "SLURM_LOCALID=2".into())));
        assert_eq!(
            (hint(&[], 8), hint(&[("LOCAL_RANK", "-1")], 8), hint(&[("LOCAL_RANK", "1")], 0)),
            (None, None, None)
        );
    }
}
