//! The kernels that `build.rs` has embedded: PTX for every GPU, and machine code (cubins) for the architectures that the build named.

/// One module of kernels.
pub(super) struct Images {
    /// Machine code, each for one architecture. A GPU refuses those of others.
    pub cubins: &'static [&'static [u8]],
    /// Text that the driver compiles for its GPU; ends in a zero.
    pub ptx: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
