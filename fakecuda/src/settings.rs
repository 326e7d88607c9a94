//! Settings and faults of a device, and their initial values from the environment.

use crate::abi::{INVALID_VALUE, Status};

/// The settings of a device. Every field can be changed while the device runs.
#[derive(Clone)]
pub struct Settings {
    /// Delay of each copy, fill and kernel, in microseconds.
    pub lag_us: u64,
    /// Maximum additional random delay of any work in a stream, in microseconds.
    pub jitter_us: u64,
    /// Bandwidth of a copy in megabytes per second; 0 is unlimited.
    pub mbps: u64,
    /// Whether memory that is not yet written is filled with `POISON`.
    pub poison: bool,
    /// Whether a freed address is reused at once; otherwise it is reused as late as possible.
    pub reuse: bool,
    /// Size of the device's memory, in MiB.
    pub mem_mb: u64,
    /// Kinds of work that are held back: the sum of `TO_HOST` and the other constants.
    pub hold: u64,
    /// Number of pieces of held work that may still begin.
    pub allow: u64,
    /// State of the random numbers.
    pub seed: u64,
}

/// The fill byte of destinations that are not yet written.
pub const POISON: u8 = 0xCD;

impl Settings {
    /// The default settings, changed by `FAKECUDA_<NAME>`.
    pub fn from_env(ordinal: usize) -> Self {
        let mut settings = Self {
            lag_us: 0,
            jitter_us: 0,
            mbps: 0,
            poison: true,
            reuse: false,
            mem_mb: 4096,
            hold: 0,
            allow: 0,
            seed: 1 + ordinal as u64,
        };
        for name in ["lag_us", "jitter_us", "mbps", "poison", "reuse", "mem_mb", "seed"] {
            if let Some(value) = number(name) {
                let _ = settings.set(name, value);
            }
        }
        settings
    }

    pub fn set(&mut self, name: &str, value: u64) -> Status {
        match name {
            "lag_us" => self.lag_us = value,
            "jitter_us" => self.jitter_us = value,
            "mbps" => self.mbps = value,
            "poison" => self.poison = value != 0,
            "reuse" => self.reuse = value != 0,
            "mem_mb" => self.mem_mb = value,
            "hold" => self.hold = value,
            "allow" => self.allow = value,
            "seed" => self.seed = value.max(1),
            _ => return Err(INVALID_VALUE),
        }
        Ok(())
    }

    /// The next random number below `bound`.
    pub fn random(&mut self, bound: u64) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed % bound.max(1)
    }
}

/// `FAKECUDA_<NAME>` as a number.
pub fn number(name: &str) -> Option<u64> {
    std::env::var(format!("FAKECUDA_{}", name.to_uppercase())).ok()?.parse().ok()
}

/// A call that fails: `name:nth:code[:async]`.
#[derive(Clone)]
pub struct Fault {
    /// The function, or `*` for any.
    name: String,
    /// Which call from now on fails: 1 is the next call, 0 is every call.
    nth: u64,
    code: i32,
    /// If true, the call succeeds and the work that it enqueued fails.
    late: bool,
}

impl Fault {
    pub fn parse(text: &str) -> Status<Self> {
        let mut parts = text.split(':');
        let mut part = || parts.next().ok_or(INVALID_VALUE);
        let name = part()?.to_owned();
        let nth = part()?.parse().map_err(|_| INVALID_VALUE)?;
        let code = part()?.parse().map_err(|_| INVALID_VALUE)?;
        match parts.next() {
            None => Ok(Self { name, nth, code, late: false }),
            Some("async") => Ok(Self { name, nth, code, late: true }),
            Some(_) => Err(INVALID_VALUE),
        }
    }

    /// Counts this call. Returns the code with which it fails, and whether it fails only later.
    fn strikes(&mut self, name: &str) -> Option<(i32, bool)> {
        if self.name != "*" && self.name != name {
            return None;
        }
        match self.nth {
            0 => Some((self.code, self.late)),
            1 => {
                self.name.clear();
                Some((self.code, self.late))
            }
            _ => {
                self.nth -= 1;
                None
            }
        }
    }
}

/// The faults in `FAKECUDA_FAULT`, separated by commas, which apply to every device.
pub fn faults_from_env() -> Vec<Fault> {
    let text = std::env::var("FAKECUDA_FAULT").unwrap_or_default();
    text.split(',').filter(|f| !f.is_empty()).filter_map(|f| Fault::parse(f).ok()).collect()
}

/// Counts a call against all faults. The first fault that matches applies.
pub fn strike(faults: &mut Vec<Fault>, name: &str) -> Option<(i32, bool)> {
    let felt = faults.iter_mut().filter_map(|f| f.strikes(name)).collect::<Vec<_>>().first().copied();
    faults.retain(|f| !f.name.is_empty());
    felt
}
