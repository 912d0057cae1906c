//! Float and quantised float types of GGUF, to f32 and back: what embeddings and heads are stored as (`ggml-quants.c`).
//!
//! ```text
//! Q8_0, 32 values:   f16 d, 32 x i8 q                       value = d * q
//! Q4_0, 32 values:   f16 d, 16 bytes                        value = d * (q - 8); byte j has value j in bits 3..0, 16 + j in bits 7..4
//! Q6_K, 256 values:  128 bytes low, 64 bytes high, 16 x i8 scale, f16 d
//!   per half of 128 values (64 low bytes, 32 high bytes, 8 scales), l = 0..32, value = d * scale[l / 16 + 2 k] * (q - 32):
//!     k = 0  value l        low[l] bits 3..0       high[l] bits 1..0
//!     k = 1  value 32 + l   low[32 + l] bits 3..0  high[l] bits 3..2
//!     k = 2  value 64 + l   low[l] bits 7..4       high[l] bits 5..4
//!     k = 3  value 96 + l   low[32 + l] bits 7..4  high[l] bits 7..6
//! ```

use bitnet_contracts::{ModelError, Result};
use half::{bf16, f16};

use super::TensorType;
use crate::model::checkpoint::Checkpoint;

/// Bytes and values of a block of `ty`; None for the ternary types.
pub fn block(ty: TensorType) -> Option<(usize, usize)> {
    match ty {
        TensorType::F32 => Some((4, 1)),
        TensorType::F16 | TensorType::Bf16 => Some((2, 1)),
        TensorType::Q8_0 => Some((34, 32)),
        TensorType::Q4_0 => Some((18, 32)),
        TensorType::Q6K => Some((210, 256)),
        _ => None,
    }
}

/// Appends the values of whole blocks to `out`. Nothing for the ternary types.
pub fn dequantize(ty: TensorType, bytes: &[u8], out: &mut Vec<f32>) {
    match ty {
        TensorType::F32 => out.extend(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b))),
        TensorType::F16 => out.extend(bytes.as_chunks::<2>().0.iter().map(|&b| f16::from_le_bytes(b).to_f32())),
        TensorType::Bf16 => out.extend(bytes.as_chunks::<2>().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32())),
        TensorType::Q8_0 => {
            for block in bytes.as_chunks::<34>().0 {
                let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
                out.extend(block[2..].iter().map(|&q| f32::from(q as i8) * d));
            }
        }
        TensorType::Q4_0 => {
            for block in bytes.as_chunks::<18>().0 {
                let d = f16::from_le_bytes([block[0], block[1]]).to_f32();
                let value = |q: u8| f32::from(q as i8 - 8) * d;
                out.extend(block[2..].iter().map(|&b| value(b & 15)));
                out.extend(block[2..].iter().map(|&b| value(b >> 4)));
            }
        }
        TensorType::Q6K => {
            for block in bytes.as_chunks::<210>().0 {
                let d = f16::from_le_bytes([block[208], block[209]]).to_f32();
                for half in 0..2 {
                    let (low, high) = (&block[64 * half..64 * half + 64], &block[128 + 32 * half..160 + 32 * half]);
                    let scales = &block[192 + 8 * half..200 + 8 * half];
                    for k in 0..4 {
                        for l in 0..32 {
                            let four = low[32 * (k % 2) + l] >> (4 * (k / 2)) & 15;
                            let q = (four | (high[l] >> (2 * k) & 3) << 4) as i8 - 32;
                            let scale = scales[l / 16 + 2 * k] as i8;
                            // The order of the products is ggml's: another would round differently.
                            out.push(d * f32::from(scale) * f32::from(q));
                        }
                    }
                }
            }
        }
        _ => (),
    }
}

/// Whether all values of an F16 or F32 matrix are values of bf16, too.
pub(super) fn is_bf16(ty: TensorType, bytes: &[u8]) -> bool {
    let exact = |x: f32| x.to_bits() & 0xffff == 0;
    match ty {
        TensorType::F16 => bytes.as_chunks::<2>().0.iter().all(|&b| exact(f16::from_le_bytes(b).to_f32())),
        TensorType::F32 => bytes.as_chunks::<4>().0.iter().all(|&b| exact(f32::from_le_bytes(b))),
        _ => false,
    }
}

/// Appends `values`, whole blocks of them, in `ty`. False, and nothing appended, for types that are not written and for values that the
/// type cannot hold.
#[must_use]
pub fn quantize(ty: TensorType, values: &[f32], out: &mut Vec<u8>) -> bool {
    let before = out.len();
    let done = match ty {
        TensorType::F32 => {
            values.iter().for_each(|x| out.extend(x.to_le_bytes()));
            true
        }
        TensorType::F16 => values.iter().all(|&x| {
            let half = f16::from_f32(x);
            out.extend(half.to_le_bytes());
            half.is_finite()
        }),
        TensorType::Bf16 => values.iter().all(|&x| {
            let half = bf16::from_f32(x);
            out.extend(half.to_le_bytes());
            half.is_finite()
        }),
        TensorType::Q8_0 => values.chunks(32).all(|block| quantize_q8_0(block, out)),
        TensorType::Q6K => values.chunks(256).all(|block| quantize_q6_k(block, out)),
        _ => false,
    };
    if !done {
        out.truncate(before);
    }
    done
}

/// ggml's `quantize_row_q8_0_ref`: `d = absmax / 127`, ties away from zero.
fn quantize_q8_0(block: &[f32], out: &mut Vec<u8>) -> bool {
    let absmax = block.iter().fold(0f32, |m, x| m.max(x.abs()));
    let d = absmax / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.extend(f16::from_f32(d).to_le_bytes());
    out.extend(block.iter().map(|x| (x * inverse).round() as i8 as u8));
    f16::from_f32(d).is_finite() && inverse.is_finite() && block.len() == 32
}

/// Sixteen scales from the value of largest magnitude of each sixteen, as ggml's `quantize_row_q6_K_ref` does before it searches for
/// scales with a smaller error.
fn quantize_q6_k(block: &[f32], out: &mut Vec<u8>) -> bool {
    if block.len() != 256 {
        return false;
    }
    let largest = |values: &[f32]| values.iter().fold(0f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let scales: Vec<f32> = block.chunks_exact(16).map(|sixteen| -largest(sixteen) / 32.0).collect();
    let d = f16::from_f32(-largest(&scales) / 128.0);
    let inverse = if d == f16::ZERO { 0.0 } else { 1.0 / d.to_f32() };
    let eights: Vec<i8> = scales.iter().map(|s| (s * inverse).round_ties_even().clamp(-128.0, 127.0) as i8).collect();
    let codes: Vec<u8> = block
        .iter()
        .enumerate()
        .map(|(i, x)| {
            let step = d.to_f32() * f32::from(eights[i / 16]);
            let q = if step == 0.0 { 0.0 } else { (x / step).round_ties_even().clamp(-32.0, 31.0) };
            (q as i8 + 32) as u8
        })
        .collect();
    for half in codes.chunks_exact(128) {
        out.extend((0..64).map(|i| half[i] & 15 | (half[64 + i] & 15) << 4));
    }
    for half in codes.chunks_exact(128) {
        out.extend((0..32).map(|l| (0..4).rev().fold(0, |byte, k| byte << 2 | half[32 * k + l] >> 4)));
    }
    out.extend(eights.iter().map(|&s| s as u8));
    out.extend(d.to_le_bytes());
    d.is_finite() && inverse.is_finite()
}

/// Hands a float matrix of a checkpoint to `put` in pieces of type `ty`; as it is when the type stays.
pub(in crate::model) fn copy(
    checkpoint: &Checkpoint,
    (name, rows, columns): (&str, usize, usize),
    ty: TensorType,
    put: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let refuse = |what: &str| ModelError::ValidationFailed { reason: format!("tensor {name} {what}") };
    let stored = checkpoint.stored_type(name)?;
    let bytes = checkpoint.stored_bytes(name, &[rows, columns])?;
    let (block, values) = block(stored).ok_or_else(|| refuse(&format!("is {}, expected floats", stored.name())))?;
    // Whole blocks of either type: 256 values are.
    let piece = block * (256 / values) * 1024;
    let (mut floats, mut out) = (Vec::new(), Vec::new());
    for (i, bytes) in bytes.chunks(piece).enumerate() {
        floats.clear();
        dequantize(stored, bytes, &mut floats);
        checkpoint.release_part(name, i.saturating_sub(1) * piece..i * piece);
        if !floats.iter().all(|x| x.is_finite()) {
            return Err(refuse("holds NaN or infinity").into());
        }
        if stored == ty {
            put(bytes)?;
            continue;
        }
        out.clear();
        if !quantize(ty, &floats, &mut out) {
            return Err(refuse(&format!("holds values that {} cannot", ty.name())).into());
        }
        put(&out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 2003) as f32 / 1001.5 - 1.0) * 0.37).collect()
    }

    /// Bytes and values of `tests/data/gguf/generate.py`: another implementation.
    #[test]
    fn values_are_those_of_the_reference() {
        const BLOCKS: usize = 6;
        for (ty, file) in [
            (TensorType::Q4_0, include_bytes!("../../../tests/data/gguf/q4_0.bin").as_slice()),
            (TensorType::Q8_0, include_bytes!("../../../tests/data/gguf/q8_0.bin")),
            (TensorType::Q6K, include_bytes!("../../../tests/data/gguf/q6_k.bin")),
        ] {
            let (bytes, _) = block(ty).unwrap();
            let (blocks, expected) = file.split_at(BLOCKS * bytes);
            let mut values = Vec::new();
            dequantize(ty, blocks, &mut values);
            let expected = expected.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b).to_bits());
            assert!(values.iter().map(|x| x.to_bits()).eq(expected), "{ty:?}");
        }
    }

    #[test]
    fn quantised_values_come_back_near() {
        for (ty, tolerance) in [
            (TensorType::F32, 0.0),
            (TensorType::F16, 2e-4),
            (TensorType::Bf16, 2e-3),
            (TensorType::Q8_0, 2e-3),
            (TensorType::Q6K, 2e-2),
        ] {
            let input = values(1024);
            let (mut bytes, mut output) = (Vec::new(), Vec::new());
            assert!(quantize(ty, &input, &mut bytes));
            dequantize(ty, &bytes, &mut output);
            assert_eq!(output.len(), input.len());
            let worst = input.iter().zip(&output).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst <= tolerance, "{ty:?}: {worst}");
            // What came back is stored without a further loss.
            if !matches!(ty, TensorType::Q6K) {
                let (mut again, mut twice) = (Vec::new(), Vec::new());
                assert!(quantize(ty, &output, &mut again));
                dequantize(ty, &again, &mut twice);
                assert_eq!(twice, output, "{ty:?}");
            }
        }
    }

    #[test]
    fn zeroes_stay_zeroes_and_what_does_not_fit_is_refused() {
        for ty in [TensorType::Q8_0, TensorType::Q6K] {
            let (mut bytes, mut output) = (Vec::new(), Vec::new());
            assert!(quantize(ty, &[0.0; 256], &mut bytes));
            dequantize(ty, &bytes, &mut output);
            assert_eq!(output, [0.0; 256]);
            assert!(!quantize(ty, &[f32::MAX; 256], &mut bytes));
        }
        assert!(!quantize(TensorType::F16, &[1e6], &mut Vec::new()));
        assert!(!quantize(TensorType::I2S, &[1.0], &mut Vec::new()));
    }
}
