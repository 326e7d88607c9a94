//! The `--device` flag: where the state of `demo` or `bench` is.

use crate::gpu::Gpu;
use crate::words;
use ashore::internal::device::{Device, choose};
use ashore::{Builder, DeviceChoice, Error, ErrorKind, Result};
use std::fmt;
use std::sync::Arc;

/// The device that the choice resolves to, and the reason.
pub enum Home {
    Host {
        why: String,
    },
    Gpu {
        /// The library's device.
        device: Arc<dyn Device>,
        /// This program's GPU.
        gpu: Arc<Gpu>,
        why: String,
    },
}

impl Home {
    /// Resolves the choice like the library: `auto` is the GPU of this process's rank, or the first GPU, if
    /// there is one.
    ///
    /// # Errors
    /// `Unavailable` or `Device` for a GPU that was requested, or that `ASHORE_REQUIRE_GPU` requires, and
    /// that is not available.
    pub fn of(choice: DeviceChoice) -> Result<Self> {
        let required = std::env::var_os("ASHORE_REQUIRE_GPU").is_some();
        let (device, report) = choose(choice).map_err(|e| asked(&e, choice))?;
        let chosen = device.name().strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        let ordinal = match (choice, chosen) {
            (_, Some(ordinal)) => ordinal,
            (DeviceChoice::Host, _) => return Ok(Self::Host { why: "host".into() }),
            _ if required => {
                let why = format!("ASHORE_REQUIRE_GPU requires a GPU: {} device={choice}", report.why);
                return Err(Error::new(ErrorKind::Unavailable, why));
            }
            _ => return Ok(Self::Host { why: format!("host (auto: {})", report.why) }),
        };
        let gpu = Gpu::open(ordinal).map_err(|e| asked(&e, choice))?;
        let simulated = if gpu.simulated() { ", the simulated driver" } else { "" };
        if required && gpu.simulated() {
            let why = format!("ASHORE_REQUIRE_GPU requires a GPU, but this is the simulated driver device={choice}");
            return Err(Error::new(ErrorKind::Unavailable, why));
        }
        Ok(Self::Gpu { device, gpu, why: format!("{report}{simulated}") })
    }

    /// Resolves the choice for state that is always in host memory.
    ///
    /// # Errors
    /// `Invalid` when a GPU was requested.
    pub fn only_host(choice: DeviceChoice, what: &str) -> Result<Self> {
        match choice {
            DeviceChoice::Auto => Ok(Self::Host { why: format!("host (auto: {what} keeps its state in host memory)") }),
            DeviceChoice::Host => Ok(Self::Host { why: "host".into() }),
            _ => {
                let why = format!("{what} keeps its state in host memory: use --device host device={choice}");
                Err(Error::new(ErrorKind::Invalid, why))
            }
        }
    }

    /// Returns the GPU, if there is one.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match self {
            Self::Host { .. } => None,
            Self::Gpu { gpu, .. } => Some(gpu),
        }
    }

    /// Says where the state is, in a few words.
    pub fn told(&self) -> String {
        let (Self::Host { why } | Self::Gpu { why, .. }) = self;
        match self {
            Self::Host { .. } if why.contains("no CUDA driver is installed") => {
                "host (no CUDA driver found)".to_owned()
            }
            _ => words::message(why),
        }
    }

    /// True for the simulated driver, on which times mean nothing.
    pub fn simulated(&self) -> bool {
        self.gpu().is_some_and(|gpu| gpu.simulated())
    }

    /// Makes an executor copy from this device.
    pub fn builder(&self, builder: Builder) -> Builder {
        // Neither the demo nor a benchmark is the job that owns the tier.
        let builder = builder.no_tier_from_env();
        match self {
            Self::Host { .. } => builder.device(DeviceChoice::Host),
            Self::Gpu { device, .. } => builder.made_device(device.clone()),
        }
    }
}

impl fmt::Display for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Host { why } | Self::Gpu { why, .. }) = self;
        f.write_str(why)
    }
}

/// Adds the requested device to an error that does not name it.
fn asked(error: &Error, choice: DeviceChoice) -> Error {
    let (asked, message) = (format!("device={choice}"), error.message());
    let message = if message.contains(&asked) { message.to_owned() } else { format!("{message} {asked}") };
    Error::new(error.kind(), message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_its_home_on_the_host_refuses_a_gpu_by_its_name() {
        let error = Home::only_host(DeviceChoice::Cuda(3), "a restore").err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("device=cuda:3"), "{error}");
        assert!(Home::only_host(DeviceChoice::Auto, "a restore").unwrap().to_string().starts_with("host (auto"));
    }
}
