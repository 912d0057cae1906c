//! TQ2_0 of llama.cpp (GGUF type 35): 2 bits a trit and an f16 scale for every 256 (`ggml-quants.c`, `quantize_row_tq2_0_ref`).
//!
//! ```text
//! block of 256 columns: 66 bytes
//!   bytes 0..32, columns 0..128 of the block; bytes 32..64, columns 128..256
//!     byte j of a half   bits 7 6     5 4       3 2       1 0
//!     holds column       96 + j       64 + j    32 + j    j         as trit + 1
//!   bytes 64..66: f16 scale
//! ```
//! Code 3 does not exist.

use bitnet_contracts::Result;

use super::PackedRows;
use super::check::{
    expect_bytes, expect_columns, expect_trits, from_f16, one_scale, refuse_code_three, to_f16, unpack_two_bits,
};

/// Columns of a block.
pub const BLOCK: usize = 256;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 66;
const CODES: usize = BLOCK / 4;
/// Four times code 1: trit 0 everywhere.
const ZEROES: u8 = 0b01_01_01_01;

/// Bytes of a matrix, None when there are too many to count.
pub fn bytes(rows: usize, columns: usize) -> Option<usize> {
    (rows.checked_mul(columns)? / BLOCK).checked_mul(BLOCK_BYTES)
}

/// A TQ2_0 matrix as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct Tq2_0<'a> {
    bytes: &'a [u8],
    columns: usize,
}

impl<'a> Tq2_0<'a> {
    /// A view of `bytes`.
    ///
    /// # Errors
    /// `QuantizationError::LayoutMismatch` for a byte count that does not fit, or columns that are no multiple of 256.
    pub fn new(name: &str, bytes: &'a [u8], rows: usize, columns: usize) -> Result<Self> {
        expect_columns(name, columns, BLOCK)?;
        expect_bytes(name, bytes, self::bytes(rows, columns), rows, columns)?;
        Ok(Self { bytes, columns })
    }

    /// The scale that all blocks share.
    ///
    /// # Errors
    /// `QuantizationError::InvalidScale`, and `::LayoutMismatch` when blocks have different scales.
    pub fn scale(&self, name: &str) -> Result<f32> {
        one_scale(
            name,
            self.bytes.as_chunks::<BLOCK_BYTES>().0.iter().map(|block| match [block[CODES], block[CODES + 1]] {
                [0, 0] => Ok((0.0, block[..CODES].iter().all(|&b| b == ZEROES))),
                stored => Ok((from_f16(name, stored)?, false)),
            }),
        )
    }
}

impl PackedRows for Tq2_0<'_> {
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()> {
        let blocks = self.columns / BLOCK;
        let bytes = &self.bytes[row * blocks * BLOCK_BYTES..(row + 1) * blocks * BLOCK_BYTES];
        let mut invalid = 0;
        for (block, out) in bytes.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.chunks_exact_mut(BLOCK)) {
            for (half, out) in block[..CODES].chunks_exact(32).zip(out.chunks_exact_mut(128)) {
                for (k, out) in out.chunks_exact_mut(32).enumerate() {
                    invalid |= unpack_two_bits(half, 2 * k, out);
                }
            }
        }
        refuse_code_three(name, row, out, invalid)
    }
}

/// The bytes of a matrix, `scale` rounded to f16 in every block.
///
/// # Errors
/// `QuantizationError::LayoutMismatch` when the columns are no multiple of 256, `::InvalidCode` for a value that is no trit,
/// `::InvalidScale` when the scale is no normal f16.
pub fn pack(name: &str, trits: &[i8], rows: usize, columns: usize, scale: f32) -> Result<Vec<u8>> {
    expect_trits(name, trits, rows, columns)?;
    expect_columns(name, columns, BLOCK)?;
    let scale = to_f16(name, scale)?.to_le_bytes();
    let mut out = Vec::with_capacity(trits.len() / BLOCK * BLOCK_BYTES);
    for block in trits.chunks_exact(BLOCK) {
        for half in block.chunks_exact(128) {
            out.extend((0..32).map(|j| (0..4).rev().fold(0u8, |byte, k| byte << 2 | (half[32 * k + j] + 1) as u8)));
        }
        out.extend(scale);
    }
    Ok(out)
}
