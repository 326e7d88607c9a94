//! Elements of tensors, as numbers and as text.

use ashore::Dtype;
use half::{bf16, f16};

/// Returns an element as a number; None for a dtype whose elements are not plain numbers. Of a complex number
/// it returns the real part.
pub fn number(dtype: Dtype, bytes: &[u8]) -> Option<f64> {
    macro_rules! of {
        ($t:ty) => {
            <$t>::from_le_bytes(bytes.first_chunk().copied()?)
        };
    }
    Some(match dtype {
        Dtype::F32 | Dtype::C64 => f64::from(of!(f32)),
        Dtype::F64 => of!(f64),
        Dtype::F16 => f64::from(of!(f16)),
        Dtype::BF16 => f64::from(of!(bf16)),
        Dtype::I8 => f64::from(of!(i8)),
        Dtype::U8 | Dtype::BOOL => f64::from(of!(u8)),
        Dtype::I16 => f64::from(of!(i16)),
        Dtype::U16 => f64::from(of!(u16)),
        Dtype::I32 => f64::from(of!(i32)),
        Dtype::U32 => f64::from(of!(u32)),
        Dtype::I64 => of!(i64) as f64,
        Dtype::U64 => of!(u64) as f64,
        _ => return None,
    })
}

/// Returns the size of an element in bytes, if its dtype is one that [`number`] knows.
pub fn size(dtype: Dtype) -> Option<usize> {
    number(dtype, &[0; 8]).map(|_| dtype.bitsize() / 8)
}

/// Shows an element. An element that is not a plain number is shown as hex digits, lowest byte first.
pub fn shown(dtype: Dtype, bytes: &[u8]) -> String {
    match dtype {
        Dtype::BOOL => match bytes {
            [0] => "false".to_owned(),
            [1] => "true".to_owned(),
            _ => hex(bytes),
        },
        Dtype::I64 => bytes.first_chunk().map_or_else(String::new, |b| i64::from_le_bytes(*b).to_string()),
        Dtype::U64 => bytes.first_chunk().map_or_else(String::new, |b| u64::from_le_bytes(*b).to_string()),
        Dtype::C64 => match (number(Dtype::F32, bytes), bytes.get(4..).and_then(|rest| number(Dtype::F32, rest))) {
            (Some(real), Some(imaginary)) => format!("({}, {})", float(real), float(imaginary)),
            _ => hex(bytes),
        },
        Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64 => number(dtype, bytes).map_or_else(|| hex(bytes), float),
        _ => number(dtype, bytes).map_or_else(|| hex(bytes), |number| number.to_string()),
    }
}

/// Shows a float with three significant digits: `0.0312`, `2.1e+36`.
pub fn float(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 {
        return if value.is_sign_negative() { "-0".to_owned() } else { "0".to_owned() };
    }
    if !size.is_finite() {
        return if value.is_nan() {
            "NaN".to_owned()
        } else if value > 0.0 {
            "inf".to_owned()
        } else {
            "-inf".to_owned()
        };
    }
    if (1e-4..1e6).contains(&size) {
        let before = size.log10().floor() as i32;
        let text = format!("{value:.*}", (2 - before).max(0) as usize);
        return if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text };
    }
    let text = format!("{value:.2e}");
    match text.split_once('e') {
        Some((digits, power)) if !power.starts_with('-') => format!("{digits}e+{power}"),
        _ => text,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold("0x".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_are_read_as_people_write_them() {
        assert_eq!(shown(Dtype::F32, &0.0313_f32.to_le_bytes()), "0.0313");
        assert_eq!(shown(Dtype::BF16, &bf16::from_f32(1.5).to_le_bytes()), "1.5");
        assert_eq!(shown(Dtype::I64, &(-7_i64).to_le_bytes()), "-7");
        assert_eq!(shown(Dtype::U64, &u64::MAX.to_le_bytes()), "18446744073709551615");
        assert_eq!(shown(Dtype::BOOL, &[1]), "true");
        assert_eq!(shown(Dtype::F8_E4M3, &[0x3c]), "0x3c");
        assert_eq!(shown(Dtype::C64, &[0, 0, 0x80, 0x3f, 0, 0, 0, 0x40]), "(1, 2)");
        assert_eq!([1234.4, -0.0, f64::NAN, 1e-9, 2.1e36].map(float), ["1234", "-0", "NaN", "1.00e-9", "2.10e+36"]);
        assert_eq!((size(Dtype::BF16), size(Dtype::F4)), (Some(2), None));
    }
}
