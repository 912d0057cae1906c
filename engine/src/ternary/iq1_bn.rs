//! IQ1_BN of ik_llama.cpp (GGUF type 134): five trits a byte, an f16 scale in front of every row (`iqk_quantize.cpp`).
//!
//! ```text
//! row: f16 scale, then 13 bytes for every 64 columns, five trits each as in `base3`, the LEAST significant first
//!   byte 3g + k (g = 0..3, k = 0..2)   holds columns 16g + 5k .. 16g + 5k + 4
//!   byte 12                            holds columns 15, 31, 47, 63, and code 0
//! ```

use bitnet_contracts::Result;

use super::PackedRows;
use super::base3::{NO_TRITS, TRITS, encode};
use super::check::{expect_bytes, expect_columns, expect_trits, from_f16, invalid_code, one_scale, to_f16};

/// Columns of a block.
pub const BLOCK: usize = 64;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 13;
/// Bytes of a row's scale.
const HEADER: usize = 2;

/// Bytes of a matrix, None when there are too many to count.
pub fn bytes(rows: usize, columns: usize) -> Option<usize> {
    rows.checked_mul((columns / BLOCK).checked_mul(BLOCK_BYTES)?.checked_add(HEADER)?)
}

/// The column of a block that trit `j` (from the least significant) of byte `byte` is for. None for the unused trit of the last byte.
fn column(byte: usize, j: usize) -> Option<usize> {
    match (byte, j) {
        (12, 4) => None,
        (12, j) => Some(16 * j + 15),
        (byte, j) => Some(16 * (byte / 3) + 5 * (byte % 3) + j),
    }
}

/// An IQ1_BN matrix as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct Iq1Bn<'a> {
    bytes: &'a [u8],
    columns: usize,
    stride: usize,
}

impl<'a> Iq1Bn<'a> {
    /// A view of `bytes`.
    ///
    /// # Errors
    /// `QuantizationError::LayoutMismatch` for a byte count that does not fit, or columns that are no multiple of 64.
    pub fn new(name: &str, bytes: &'a [u8], rows: usize, columns: usize) -> Result<Self> {
        expect_columns(name, columns, BLOCK)?;
        expect_bytes(name, bytes, self::bytes(rows, columns), rows, columns)?;
        Ok(Self { bytes, columns, stride: HEADER + columns / BLOCK * BLOCK_BYTES })
    }

    /// The scale that all rows share.
    ///
    /// # Errors
    /// `QuantizationError::InvalidScale`, `::LayoutMismatch` when rows have different scales, `::InvalidCode`.
    pub fn scale(&self, name: &str) -> Result<f32> {
        let mut trits = vec![0i8; self.columns];
        one_scale(
            name,
            self.bytes.chunks_exact(self.stride).enumerate().map(|(r, row)| match [row[0], row[1]] {
                [0, 0] => {
                    self.row(name, r, &mut trits)?;
                    Ok((0.0, trits.iter().all(|&t| t == 0)))
                }
                stored => Ok((from_f16(name, stored)?, false)),
            }),
        )
    }
}

impl PackedRows for Iq1Bn<'_> {
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()> {
        let bytes = &self.bytes[row * self.stride + HEADER..(row + 1) * self.stride];
        for (b, (block, out)) in bytes.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.chunks_exact_mut(BLOCK)).enumerate()
        {
            for (i, &byte) in block.iter().enumerate() {
                let digits = TRITS[byte as usize];
                if digits[0] == NO_TRITS || (i == 12 && digits[0] != -1) {
                    let position = row * self.columns + b * BLOCK + column(i, 0).unwrap_or(0);
                    return Err(invalid_code(name, position, byte));
                }
                for (j, &digit) in digits.iter().rev().enumerate() {
                    if let Some(column) = column(i, j) {
                        out[column] = digit;
                    }
                }
            }
        }
        Ok(())
    }
}

/// The bytes of a matrix, `scale` rounded to f16 in front of every row.
///
/// # Errors
/// `QuantizationError::LayoutMismatch` when the columns are no multiple of 64, `::InvalidCode` for a value that is no trit,
/// `::InvalidScale` when the scale is no normal f16.
pub fn pack(name: &str, trits: &[i8], rows: usize, columns: usize, scale: f32) -> Result<Vec<u8>> {
    expect_trits(name, trits, rows, columns)?;
    expect_columns(name, columns, BLOCK)?;
    let scale = to_f16(name, scale)?.to_le_bytes();
    let mut out = Vec::with_capacity(rows * (HEADER + columns / BLOCK * BLOCK_BYTES));
    for row in trits.chunks_exact(columns) {
        out.extend(scale);
        for block in row.chunks_exact(BLOCK) {
            let code = |byte: usize, j: usize| column(byte, j).map_or(0, |c| (block[c] + 1) as u8);
            out.extend((0..BLOCK_BYTES).map(|byte| encode(std::array::from_fn(|d| code(byte, 4 - d)))));
        }
    }
    Ok(out)
}
