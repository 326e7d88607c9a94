//! The kernels that `build.rs` embedded: PTX for every GPU, and machine code (cubins) for the architectures
//! named at build time.

/// The images of one module of kernels.
pub(super) struct Images {
    /// Machine code, each image for one architecture. A GPU refuses the images for other architectures.
    pub cubins: &'static [&'static [u8]],
    /// Text that the driver compiles for its GPU. It ends in a zero byte.
    pub ptx: &'static str,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
