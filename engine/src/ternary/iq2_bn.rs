//! IQ2_BN of ik_llama.cpp (GGUF type 135): 2 bits a trit, an f32 scale in front of every row (`iqk_quantize.cpp`).
//!
//! ```text
//! row: f32 scale, then 16 bytes for every 64 columns
//!   byte j of a block   bits 7 6     5 4       3 2       1 0
//!   holds column        48 + j       32 + j    16 + j    j         as trit + 1
//! ```
//! Code 3 does not exist. The reader there takes the scale apart from the codes, so that the two need not be aligned.

use bitnet_contracts::Result;

use super::PackedRows;
use super::check::{
    expect_bytes, expect_columns, expect_trits, one_scale, pack_two_bits, refuse_code_three, unpack_two_bits,
    usable_scale,
};

/// Columns of a block.
pub const BLOCK: usize = 64;
/// Bytes of a row's scale.
const HEADER: usize = 4;
/// Four times code 1: trit 0 everywhere.
const ZEROES: u8 = 0b01_01_01_01;

/// Bytes of a matrix, None when there are too many to count.
pub fn bytes(rows: usize, columns: usize) -> Option<usize> {
    rows.checked_mul((columns / 4).checked_add(HEADER)?)
}

/// An IQ2_BN matrix as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct Iq2Bn<'a> {
    bytes: &'a [u8],
    stride: usize,
}

impl<'a> Iq2Bn<'a> {
    /// A view of `bytes`.
    ///
    /// # Errors
    /// `QuantizationError::LayoutMismatch` for a byte count that does not fit, or columns that are no multiple of 64.
    pub fn new(name: &str, bytes: &'a [u8], rows: usize, columns: usize) -> Result<Self> {
        expect_columns(name, columns, BLOCK)?;
        expect_bytes(name, bytes, self::bytes(rows, columns), rows, columns)?;
        Ok(Self { bytes, stride: HEADER + columns / 4 })
    }

    /// The scale that all rows share.
    ///
    /// # Errors
    /// `QuantizationError::InvalidScale`, and `::LayoutMismatch` when rows have different scales.
    pub fn scale(&self, name: &str) -> Result<f32> {
        one_scale(
            name,
            self.bytes.chunks_exact(self.stride).map(|row| {
                Ok((f32::from_le_bytes([row[0], row[1], row[2], row[3]]), row[HEADER..].iter().all(|&b| b == ZEROES)))
            }),
        )
    }
}

impl PackedRows for Iq2Bn<'_> {
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()> {
        let bytes = &self.bytes[row * self.stride + HEADER..(row + 1) * self.stride];
        let mut invalid = 0;
        for (block, out) in bytes.chunks_exact(BLOCK / 4).zip(out.chunks_exact_mut(BLOCK)) {
            for (k, out) in out.chunks_exact_mut(BLOCK / 4).enumerate() {
                invalid |= unpack_two_bits(block, 2 * k, out);
            }
        }
        refuse_code_three(name, row, out, invalid)
    }
}

/// The bytes of a matrix, `scale` in front of every row.
///
/// # Errors
/// `QuantizationError::LayoutMismatch` when the columns are no multiple of 64, `::InvalidCode` for a value that is no trit,
/// `::InvalidScale`.
pub fn pack(name: &str, trits: &[i8], rows: usize, columns: usize, scale: f32) -> Result<Vec<u8>> {
    expect_trits(name, trits, rows, columns)?;
    expect_columns(name, columns, BLOCK)?;
    let scale = usable_scale(name, scale)?.to_le_bytes();
    let mut out = Vec::with_capacity(rows * (HEADER + columns / 4));
    for row in trits.chunks_exact(columns) {
        out.extend(scale);
        for block in row.chunks_exact(BLOCK) {
            pack_two_bits(block, |k| 2 * k, &mut out);
        }
    }
    Ok(out)
}
