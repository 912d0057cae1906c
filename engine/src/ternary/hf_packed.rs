//! The packed layout of Hugging Face checkpoints (`transformers` `integrations/bitnet.py`, `pack_weights`).
//!
//! ```text
//! byte [r, c] of a uint8 [rows / 4, columns] tensor, R = rows / 4
//!   bits 7 6         5 4         3 2       1 0
//!   T[r + 3R, c]+1   T[r + 2R, c]+1   T[r + R, c]+1   T[r, c]+1
//! ```
//! The four values of a byte are rows R apart, not neighbours; the code is trit + 1, and code 3 does not exist.

use bitnet_contracts::{QuantizationError, Result};

use super::PackedRows;
use super::check::{expect_trits, mismatch};

/// A packed matrix as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct HfPacked<'a> {
    bytes: &'a [u8],
    columns: usize,
    quarter: usize,
}

impl<'a> HfPacked<'a> {
    /// A view of `bytes`, `[rows / 4, columns]`.
    ///
    /// # Errors
    /// `QuantizationError::LayoutMismatch` when the byte count is not that of `rows` x `columns` or rows are not a multiple of 4.
    pub fn new(name: &str, bytes: &'a [u8], rows: usize, columns: usize) -> Result<Self> {
        if !rows.is_multiple_of(4) || (rows / 4).checked_mul(columns) != Some(bytes.len()) {
            return Err(QuantizationError::LayoutMismatch {
                tensor: name.to_string(),
                expected: format!("{rows} x {columns} trits, four rows a byte, rows a multiple of 4"),
                actual: format!("{} bytes", bytes.len()),
            }
            .into());
        }
        Ok(Self { bytes, columns, quarter: rows / 4 })
    }
}

impl PackedRows for HfPacked<'_> {
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()> {
        let (quarter, r) = (row / self.quarter, row % self.quarter);
        let bytes = &self.bytes[r * self.columns..(r + 1) * self.columns];
        let mut invalid = 0;
        for (o, &byte) in out.iter_mut().zip(bytes) {
            let code = (byte >> (2 * quarter)) & 3;
            invalid |= code & (code >> 1);
            *o = code as i8 - 1;
        }
        if invalid != 0 {
            let column = out.iter().position(|&t| t == 2).unwrap_or(0);
            return Err(QuantizationError::InvalidCode {
                tensor: name.to_string(),
                position: row * self.columns + column,
                code: 3,
            }
            .into());
        }
        Ok(())
    }
}

/// The bytes of a matrix, `[rows / 4, columns]`. The scale is a tensor of its own.
///
/// # Errors
/// `QuantizationError::LayoutMismatch` when rows are no multiple of 4, `::InvalidCode` for a value that is no trit.
pub fn pack(name: &str, trits: &[i8], rows: usize, columns: usize) -> Result<Vec<u8>> {
    expect_trits(name, trits, rows, columns)?;
    if !rows.is_multiple_of(4) {
        return Err(mismatch(name, "rows that are a multiple of 4", format!("{rows} rows")));
    }
    let quarter = trits.len() / 4;
    let code = |i: usize| (trits[i] + 1) as u8;
    Ok((0..quarter).map(|i| (0..4).rev().fold(0, |byte, k| byte << 2 | code(k * quarter + i))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the format description: flat element e is `(e*e + e/3) % 3 - 1`, as 8 x 4.
    #[test]
    fn unpacks_the_published_example() {
        let bytes = [0x80, 0x01, 0x05, 0x15, 0x56, 0x5a, 0x6a, 0xa8];
        let packed = HfPacked::new("w", &bytes, 8, 4).unwrap();
        for row in 0..8 {
            let mut out = [0i8; 4];
            packed.row("w", row, &mut out).unwrap();
            let expected: Vec<i8> = (4 * row..4 * row + 4).map(|e| ((e * e + e / 3) % 3) as i8 - 1).collect();
            assert_eq!(out.as_slice(), expected, "row {row}");
        }
    }

    #[test]
    fn code_three_is_refused_with_its_place() {
        let bytes = [0b01_01_01_01, 0b01_11_01_01];
        let packed = HfPacked::new("w", &bytes, 4, 2).unwrap();
        assert!(packed.row("w", 1, &mut [0; 2]).is_ok());
        let error = packed.row("w", 2, &mut [0; 2]).unwrap_err();
        assert!(matches!(
            error,
            bitnet_contracts::InferenceError::Quantization(QuantizationError::InvalidCode { position: 5, .. })
        ));
    }

    #[test]
    fn wrong_sizes_are_refused() {
        for (rows, columns) in [(8, 3), (7, 4), (usize::MAX - 3, 4)] {
            assert!(HfPacked::new("w", &[0; 8], rows, columns).is_err());
        }
    }
}
