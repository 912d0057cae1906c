//! Checks that the formats share, and the inner loops of those with two bits a trit.

use bitnet_contracts::{InferenceError, QuantizationError, Result};
use half::f16;

/// The absmean quantiser's smallest scale; stands in where a matrix without a non-zero weight came without a scale.
pub(super) const SMALLEST_SCALE: f32 = 1e-5;

pub(super) fn mismatch(name: &str, expected: impl Into<String>, actual: impl Into<String>) -> InferenceError {
    QuantizationError::LayoutMismatch { tensor: name.to_string(), expected: expected.into(), actual: actual.into() }
        .into()
}

pub(super) fn invalid_code(name: &str, position: usize, code: u8) -> InferenceError {
    QuantizationError::InvalidCode { tensor: name.to_string(), position, code }.into()
}

/// `bytes` must be as long as `expected`; None is a size that no memory holds.
pub(super) fn expect_bytes(
    name: &str,
    bytes: &[u8],
    expected: Option<usize>,
    rows: usize,
    columns: usize,
) -> Result<()> {
    match expected {
        Some(n) if n == bytes.len() => Ok(()),
        Some(n) => {
            Err(mismatch(name, format!("{n} bytes for {rows} x {columns} trits"), format!("{} bytes", bytes.len())))
        }
        None => Err(mismatch(name, "a matrix that fits into memory", format!("{rows} x {columns}"))),
    }
}

/// `columns` must be a multiple of `block`.
pub(super) fn expect_columns(name: &str, columns: usize, block: usize) -> Result<()> {
    if columns > 0 && columns.is_multiple_of(block) {
        return Ok(());
    }
    Err(mismatch(name, format!("columns that are a multiple of {block}"), format!("{columns} columns")))
}

/// `trits` must be `rows * columns` values of -1, 0, 1.
pub(super) fn expect_trits(name: &str, trits: &[i8], rows: usize, columns: usize) -> Result<()> {
    if rows == 0 || columns == 0 || rows.checked_mul(columns) != Some(trits.len()) {
        return Err(mismatch(
            name,
            format!("{rows} x {columns} trits, at least one"),
            format!("{} trits", trits.len()),
        ));
    }
    match trits.iter().position(|t| !(-1..=1).contains(t)) {
        Some(position) => Err(invalid_code(name, position, trits[position].wrapping_add(1) as u8)),
        None => Ok(()),
    }
}

/// A scale that can stand for a trit of 1: finite, above zero, and no denormal, which has lost digits already.
///
/// # Errors
/// `QuantizationError::InvalidScale` naming `name`.
pub fn usable_scale(name: &str, scale: f32) -> Result<f32> {
    if scale.is_normal() && scale > 0.0 {
        return Ok(scale);
    }
    Err(QuantizationError::InvalidScale { tensor: name.to_string(), value: scale }.into())
}

/// The scale as f16, rounded to nearest; refused when it is outside f16's normal range.
pub(crate) fn to_f16(name: &str, scale: f32) -> Result<f16> {
    let half = f16::from_f32(usable_scale(name, scale)?);
    if half.is_normal() {
        return Ok(half);
    }
    Err(QuantizationError::InvalidScale { tensor: name.to_string(), value: scale }.into())
}

/// A stored f16 scale.
pub(super) fn from_f16(name: &str, bytes: [u8; 2]) -> Result<f32> {
    let half = f16::from_le_bytes(bytes);
    if half.is_normal() && half.is_sign_positive() {
        return Ok(half.to_f32());
    }
    Err(QuantizationError::InvalidScale { tensor: name.to_string(), value: half.to_f32() }.into())
}

/// The one scale of a matrix whose file has many: `scales` gives each piece's scale (zero for +0) and whether its trits are all zero.
///
/// A quantiser that takes the largest magnitude of a piece stores zero for a piece of zeroes, so a zero is no fault there.
pub(super) fn one_scale(name: &str, scales: impl Iterator<Item = Result<(f32, bool)>>) -> Result<f32> {
    let mut found = None;
    for piece in scales {
        let (scale, empty) = piece?;
        if scale == 0.0 && empty {
            continue;
        }
        let scale = usable_scale(name, scale)?;
        if *found.get_or_insert(scale) != scale {
            return Err(mismatch(
                name,
                "one scale for the whole matrix, as BitNet b1.58 has it",
                format!("scales {} and {scale}", found.unwrap_or_default()),
            ));
        }
    }
    Ok(found.unwrap_or(SMALLEST_SCALE))
}

/// Two bits of every byte as trits; not 0 when there was a code 3, which comes out as 2.
#[inline(always)]
pub(super) fn unpack_two_bits(bytes: &[u8], shift: usize, out: &mut [i8]) -> u8 {
    let mut invalid = 0;
    for (o, &byte) in out.iter_mut().zip(bytes) {
        let code = (byte >> shift) & 3;
        invalid |= code & (code >> 1);
        *o = code as i8 - 1;
    }
    invalid
}

/// A block of trits, two bits each: byte `j` holds those at `j` in each quarter of the block, that of quarter `k` at bit `shift(k)`.
pub(super) fn pack_two_bits(block: &[i8], shift: impl Fn(usize) -> usize, out: &mut Vec<u8>) {
    let quarter = block.len() / 4;
    let code = |j: usize, k: usize| ((block[k * quarter + j] + 1) as u8) << shift(k);
    out.extend((0..quarter).map(|j| (0..4).fold(0u8, |byte, k| byte | code(j, k))));
}

/// The error for a row that [`unpack_two_bits`] found a code 3 in.
pub(super) fn refuse_code_three(name: &str, row: usize, out: &[i8], invalid: u8) -> Result<()> {
    if invalid == 0 {
        return Ok(());
    }
    let column = out.iter().position(|&t| t == 2).unwrap_or(0);
    Err(invalid_code(name, row * out.len() + column, 3))
}
