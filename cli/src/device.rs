//! The `--device` flag. What this program saves lives in host memory, whatever the library could do.

use ashore::{DeviceChoice, Error, ErrorKind, Result};

/// What the choice came to, and why.
///
/// # Errors
/// `Device` for a GPU.
pub fn resolve(choice: DeviceChoice) -> Result<&'static str> {
    match choice {
        DeviceChoice::Auto => Ok("host (auto: this program keeps its state in host memory)"),
        DeviceChoice::Host => Ok("host"),
        _ => {
            let why = format!("this program keeps its state in host memory, use --device host device={choice}");
            Err(Error::new(ErrorKind::Device, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_refused_by_its_name() {
        let error = resolve(DeviceChoice::Cuda(3)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device);
        assert!(error.to_string().contains("device=cuda:3"), "{error}");
        assert!(resolve(DeviceChoice::Auto).unwrap().starts_with("host"));
    }
}
