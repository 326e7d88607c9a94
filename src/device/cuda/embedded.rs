//! The kernels that `build.rs` embedded: PTX for every GPU, and machine code (cubins) for the architectures
//! named at build time.

/// The images of one module of kernels.
pub(super) struct Images {
    /// Machine code, each for one architecture; a GPU refuses those of others.
    pub cubins: &'static [&'static [u8]],
    /// Text that the driver compiles for its GPU; ends in a zero byte.
    pub ptx: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
