//! The coders under study, each at one setting, behind one interface. A coder codes from a slice into a
//! slice, with no state that outlives a block.

use pco::standalone::{simple_compress_into, simple_decompress_into};
use pco::{ChunkConfig, DeltaSpec, ModeSpec};
use std::fmt;
use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, ParamSwitch};

/// A coder and its setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Lz4,
    Zstd(i32),
    /// zstd that looks for almost no matches and Huffman-codes every literal.
    Huffman,
    /// Bins with tANS, level 0 to 12. This coder takes elements, not planes.
    Pco(usize),
}

impl Code {
    /// The coders that take bytes.
    pub const OF_BYTES: [Self; 6] =
        [Self::Lz4, Self::Zstd(-5), Self::Zstd(-1), Self::Zstd(1), Self::Zstd(3), Self::Huffman];
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lz4 => write!(f, "lz4"),
            Self::Zstd(level) => write!(f, "zstd {level}"),
            Self::Huffman => write!(f, "zstd huffman"),
            Self::Pco(level) => write!(f, "pco {level}"),
        }
    }
}

/// A coder ready for use on one thread.
pub enum Coder {
    Lz4,
    Zstd(Box<(Compressor<'static>, Decompressor<'static>)>),
    Pco { config: ChunkConfig, width: usize },
}

impl Coder {
    pub fn new(code: Code, width: usize) -> Self {
        match code {
            Code::Lz4 => Self::Lz4,
            Code::Zstd(level) => Self::zstd(level, ParamSwitch::Auto),
            Code::Huffman => Self::zstd(-(1 << 17), ParamSwitch::Enable),
            Code::Pco(level) => {
                let config = ChunkConfig::default().with_compression_level(level);
                let config = config.with_mode_spec(ModeSpec::Classic).with_delta_spec(DeltaSpec::NoOp);
                Self::Pco { config, width }
            }
        }
    }

    fn zstd(level: i32, literals: ParamSwitch) -> Self {
        let mut compressor = Compressor::new(level).expect("a level that zstd knows");
        compressor.set_parameter(CParameter::LiteralCompressionMode(literals)).expect("a parameter that zstd knows");
        Self::Zstd(Box::new((compressor, Decompressor::new().expect("memory"))))
    }

    /// Codes into `out` and returns the coded length; `None` when the output does not fit.
    pub fn encode(&mut self, raw: &[u8], out: &mut [u8]) -> Option<usize> {
        match self {
            Self::Lz4 => lz4_flex::block::compress_into(raw, out).ok(),
            Self::Zstd(both) => both.0.compress_to_buffer(raw, out).ok(),
            Self::Pco { config, width } => {
                let room = out.len();
                let left = match width {
                    2 => simple_compress_into::<u16, _>(bytemuck::cast_slice(raw), config, out),
                    _ => simple_compress_into::<u32, _>(bytemuck::cast_slice(raw), config, out),
                };
                left.ok().map(|left| room - left.len())
            }
        }
    }

    /// Fills `raw`.
    pub fn decode(&mut self, coded: &[u8], raw: &mut [u8]) {
        let filled = match self {
            Self::Lz4 => lz4_flex::block::decompress_into(coded, raw).ok() == Some(raw.len()),
            Self::Zstd(both) => both.1.decompress_to_buffer(coded, raw).ok() == Some(raw.len()),
            Self::Pco { width: 2, .. } => simple_decompress_into::<u16>(coded, bytemuck::cast_slice_mut(raw)).is_ok(),
            Self::Pco { .. } => simple_decompress_into::<u32>(coded, bytemuck::cast_slice_mut(raw)).is_ok(),
        };
        assert!(filled, "a block that was coded here must decode");
    }
}
