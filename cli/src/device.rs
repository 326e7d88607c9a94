//! The `--device` flag.

use ashore::{Error, ErrorKind, Result};
use std::str::FromStr;

/// Where the state is to live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    Auto,
    Host,
    Cuda(u32),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "host" => Ok(Self::Host),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|ordinal| ordinal.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "a device is auto, host or cuda:N".to_owned()),
        }
    }
}

impl Choice {
    /// What the choice came to, and why.
    ///
    /// # Errors
    /// `Device` for a GPU, as long as this program stages from host memory only.
    pub fn resolve(self) -> Result<&'static str> {
        match self {
            Self::Auto => Ok("host (auto: this build stages from host memory only)"),
            Self::Host => Ok("host"),
            Self::Cuda(ordinal) => {
                let why = format!("this build stages from host memory only, use --device host device=cuda:{ordinal}");
                Err(Error::new(ErrorKind::Device, why))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_parse_and_nonsense_does_not() {
        assert_eq!("auto".parse(), Ok(Choice::Auto));
        assert_eq!("cuda:3".parse(), Ok(Choice::Cuda(3)));
        for text in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x"] {
            assert!(text.parse::<Choice>().is_err(), "{text}");
        }
        assert_eq!(Choice::Cuda(0).resolve().unwrap_err().kind(), ErrorKind::Device);
    }
}
