//! The `--device` flag: where the state lives that this program trains or measures.

use crate::gpu::Gpu;
use ashore::internal::device::{Device, choose};
use ashore::{Builder, DeviceChoice, Error, ErrorKind, Result};
use std::fmt;
use std::sync::Arc;

/// What the choice came to, and why.
pub enum Home {
    Host {
        why: String,
    },
    Gpu {
        /// For the library.
        device: Arc<dyn Device>,
        /// For this program.
        gpu: Arc<Gpu>,
        why: String,
    },
}

impl Home {
    /// The choice as the library means it: `auto` is the GPU of this process's rank, or the first, where there is one.
    ///
    /// # Errors
    /// `Unavailable` or `Device` for a GPU that was asked for and is not to be had, or that `ASHORE_REQUIRE_GPU` asks for.
    pub fn of(choice: DeviceChoice) -> Result<Self> {
        let required = std::env::var_os("ASHORE_REQUIRE_GPU").is_some();
        let (device, report) = choose(choice).map_err(|e| asked(&e, choice))?;
        let chosen = device.name().strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok());
        let ordinal = match (choice, chosen) {
            (_, Some(ordinal)) => ordinal,
            (DeviceChoice::Host, _) => return Ok(Self::Host { why: "host".into() }),
            _ if required => {
                let why = format!("a GPU is required by ASHORE_REQUIRE_GPU: {} device={choice}", report.why);
                return Err(Error::new(ErrorKind::Unavailable, why));
            }
            _ => return Ok(Self::Host { why: format!("host (auto: {})", report.why) }),
        };
        let gpu = Gpu::open(ordinal).map_err(|e| asked(&e, choice))?;
        let simulated = if gpu.simulated() { ", the simulated driver" } else { "" };
        if required && gpu.simulated() {
            let why = format!("a GPU is required by ASHORE_REQUIRE_GPU, this is the simulated driver device={choice}");
            return Err(Error::new(ErrorKind::Unavailable, why));
        }
        Ok(Self::Gpu { device, gpu, why: format!("{report}{simulated}") })
    }

    /// The host, for what has no other home.
    ///
    /// # Errors
    /// `Invalid` when a GPU was asked for.
    pub fn only_host(choice: DeviceChoice, what: &str) -> Result<Self> {
        match choice {
            DeviceChoice::Auto => Ok(Self::Host { why: format!("host (auto: {what} keeps its state in host memory)") }),
            DeviceChoice::Host => Ok(Self::Host { why: "host".into() }),
            _ => {
                let why = format!("{what} keeps its state in host memory, use --device host device={choice}");
                Err(Error::new(ErrorKind::Invalid, why))
            }
        }
    }

    /// The device, where there is one.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        match self {
            Self::Host { .. } => None,
            Self::Gpu { gpu, .. } => Some(gpu),
        }
    }

    /// True where no time means anything.
    pub fn simulated(&self) -> bool {
        self.gpu().is_some_and(|gpu| gpu.simulated())
    }

    /// An executor that copies from there.
    pub fn builder(&self, builder: Builder) -> Builder {
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

/// An error, with what was asked for when it does not say.
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
