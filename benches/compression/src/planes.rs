//! Transforms that group predictable bits, and their inverses.

/// How the bytes of a block are arranged before they are coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transform {
    /// Unchanged.
    Plain,
    /// The highest bytes of all elements, then the next lower bytes, and so on.
    Planes,
    /// Planes as above, after a rotation by one bit, so that the highest byte is the exponent and the sign
    /// joins the mantissa.
    Exponent,
    /// `Exponent` of the difference (exclusive or) to the last checkpoint.
    Delta,
}

impl Transform {
    pub const ALL: [Self; 4] = [Self::Plain, Self::Planes, Self::Exponent, Self::Delta];

    /// The number of planes of a block with elements of `width` bytes.
    pub fn planes(self, width: usize) -> usize {
        if self == Self::Plain { 1 } else { width }
    }

    fn rotation(self) -> u32 {
        u32::from(matches!(self, Self::Exponent | Self::Delta))
    }

    /// Spreads `block` over planes of equal length, the highest bytes first.
    pub fn split(self, block: &[u8], width: usize, planes: &mut [&mut [u8]]) {
        let rotation = self.rotation();
        match (planes, width) {
            ([only], _) => only.copy_from_slice(block),
            ([high, low], 2) => {
                let (elements, _) = block.as_chunks();
                for ((&element, high), low) in elements.iter().zip(&mut **high).zip(&mut **low) {
                    let bits = u16::from_le_bytes(element).rotate_left(rotation);
                    (*high, *low) = ((bits >> 8) as u8, bits as u8);
                }
            }
            ([a, b, c, d], 4) => {
                let (elements, _) = block.as_chunks();
                let bytes = a.iter_mut().zip(&mut **b).zip(&mut **c).zip(&mut **d);
                for (&element, (((a, b), c), d)) in elements.iter().zip(bytes) {
                    let bits = u32::from_le_bytes(element).rotate_left(rotation);
                    (*a, *b, *c, *d) = ((bits >> 24) as u8, (bits >> 16) as u8, (bits >> 8) as u8, bits as u8);
                }
            }
            _ => unreachable!("as many planes as an element has bytes"),
        }
    }

    /// Undoes `split`.
    pub fn merge(self, planes: &[&[u8]], width: usize, block: &mut [u8]) {
        let rotation = self.rotation();
        match (planes, width) {
            ([only], _) => block.copy_from_slice(only),
            ([high, low], 2) => {
                let (elements, _) = block.as_chunks_mut();
                for ((element, &high), &low) in elements.iter_mut().zip(*high).zip(*low) {
                    *element = (u16::from(high) << 8 | u16::from(low)).rotate_right(rotation).to_le_bytes();
                }
            }
            ([a, b, c, d], 4) => {
                let (elements, _) = block.as_chunks_mut();
                let bytes = a.iter().zip(*b).zip(*c).zip(*d);
                for (element, (((&a, &b), &c), &d)) in elements.iter_mut().zip(bytes) {
                    let bits = u32::from(a) << 24 | u32::from(b) << 16 | u32::from(c) << 8 | u32::from(d);
                    *element = bits.rotate_right(rotation).to_le_bytes();
                }
            }
            _ => unreachable!("as many planes as an element has bytes"),
        }
    }
}
