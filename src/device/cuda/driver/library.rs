//! The driver's library: finding it, opening it, and calls that need no context.
//!
//! # Safety argument
//! See the module above. The library is never unloaded.
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

use super::batch::Batch;
use super::codes;
use super::functions::Table;
use super::handles::ContextHandle;
use crate::error::{Error, ErrorKind, Result};
use std::ffi::{CStr, c_int};
use std::path::Path;
use std::sync::Arc;

/// The opened driver library.
pub struct Driver {
    pub(super) table: Table,
    pub(super) batch: Option<Batch>,
    version: i32,
}

impl Driver {
    /// Opens the driver that the system's loader finds.
    ///
    /// # Errors
    /// `Unavailable`, naming what is missing.
    pub fn find() -> Result<Arc<Self>> {
        let mut missing = None;
        // The first name is the driver's own; toolkits install stubs under the second.
        for name in ["libcuda.so.1", "libcuda.so"] {
            match Self::open(Path::new(name)) {
                Err(error) if error.kind() == ErrorKind::NotFound => missing = missing.or(Some(error)),
                found => return found,
            }
        }
        let missing = missing.unwrap_or_else(|| Error::internal("no library was looked for"));
        Err(missing.with_kind(ErrorKind::Unavailable))
    }

    /// Opens the driver in the library `path`.
    ///
    /// # Errors
    /// `NotFound` when it cannot be loaded; `Unavailable`, naming what is missing, when it is not a working
    /// driver.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let named = || format!("library={path:?}");
        // SAFETY: any program may run a driver's initialisers; the caller named a driver.
        let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
            Error::new(ErrorKind::NotFound, format!("no CUDA driver is installed {}", named())).with_source(error)
        })?;
        // Never unloaded, because drivers have threads.
        let library = std::mem::ManuallyDrop::new(library);
        // SAFETY: the library was named as that of a driver.
        let table = unsafe { Table::find(&library) };
        let unavailable = |why: String| Error::new(ErrorKind::Unavailable, why);
        let table = table
            .map_err(|symbol| unavailable(format!("the CUDA driver is too old or none symbol={symbol} {}", named())))?;
        // SAFETY: as above.
        let batch = unsafe { Batch::find(&library) };
        let mut driver = Self { table, batch, version: 0 };
        // SAFETY: takes no arguments but a reserved zero.
        driver.start("cuInit", unsafe { (driver.table.init)(0) })?;
        let mut version = 0;
        // SAFETY: writes one number.
        driver.start("cuDriverGetVersion", unsafe { (driver.table.version)(&mut version) })?;
        driver.version = version;
        if driver.devices()? == 0 {
            return Err(unavailable("the CUDA driver has no device".into()));
        }
        Ok(Arc::new(driver))
    }

    /// The number of devices.
    pub fn devices(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes one number.
        self.start("cuDeviceGetCount", unsafe { (self.table.device_count)(&mut count) })?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// The device whose context is current in this thread, if any. The call touches no device.
    pub fn current(&self) -> Option<u32> {
        let (mut context, mut device) = (ContextHandle::default(), 0);
        // SAFETY: writes one handle.
        let asked = unsafe { (self.table.get_current)(&mut context) };
        if asked != codes::SUCCESS || context == ContextHandle::default() {
            return None;
        }
        // SAFETY: writes one number.
        let code = unsafe { (self.table.current_device)(&mut device) };
        (code == codes::SUCCESS).then(|| u32::try_from(device).ok()).flatten()
    }

    /// The PCI bus id of device `ordinal`: `0000:0F:00.0`. The call needs no context.
    pub fn pci_id(&self, ordinal: u32) -> Result<String> {
        let (mut device, mut name) = (0, [0; 64]);
        // SAFETY: writes one number.
        self.start("cuDeviceGet", unsafe { (self.table.device_get)(&mut device, ordinal as c_int) })?;
        let len = name.len() as c_int - 1;
        // The last byte stays zero.
        // SAFETY: writes at most `len` bytes.
        self.start("cuDeviceGetPCIBusId", unsafe { (self.table.device_pci_id)(name.as_mut_ptr(), len, device) })?;
        // SAFETY: the array ends in a zero.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// The CUDA version of the driver: 12040 is 12.4.
    pub fn version(&self) -> i32 {
        self.version
    }

    /// Fails when the driver cannot batch copies.
    pub fn batches(&self) -> Result<()> {
        self.batch.map(drop).ok_or_else(|| codes::absent("cuMemcpyBatchAsync"))
    }

    fn start(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == codes::SUCCESS { Ok(()) } else { Err(codes::refused(call, code).with_kind(ErrorKind::Unavailable)) }
    }
}
