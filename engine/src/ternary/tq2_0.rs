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
use super::blocks::Blocks;
use super::check::{expect_columns, expect_trits, pack_two_bits, refuse_code_three, to_f16, unpack_two_bits};

/// Columns of a block.
pub const BLOCK: usize = super::blocks::BLOCK;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 66;
const CODES: usize = BLOCK / 4;
/// Four times code 1: trit 0 everywhere.
const ZEROES: u8 = 0b01_01_01_01;

/// Bytes of a matrix, None when there are too many to count.
pub fn bytes(rows: usize, columns: usize) -> Option<usize> {
    super::blocks::bytes(rows, columns, BLOCK_BYTES)
}

/// A TQ2_0 matrix as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct Tq2_0<'a>(Blocks<'a, BLOCK_BYTES>);

impl<'a> Tq2_0<'a> {
    /// A view of `bytes`.
    ///
    /// # Errors
    /// `QuantizationError::LayoutMismatch` for a byte count that does not fit, or columns that are no multiple of 256.
    pub fn new(name: &str, bytes: &'a [u8], rows: usize, columns: usize) -> Result<Self> {
        Blocks::new(name, bytes, rows, columns).map(Self)
    }

    /// The scale that all blocks share.
    ///
    /// # Errors
    /// `QuantizationError::InvalidScale`, and `::LayoutMismatch` when blocks have different scales.
    pub fn scale(&self, name: &str) -> Result<f32> {
        self.0.scale(name, |block| block[..CODES].iter().all(|&b| b == ZEROES))
    }
}

impl PackedRows for Tq2_0<'_> {
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()> {
        let mut invalid = 0;
        for (block, out) in self.0.row(row).iter().zip(out.chunks_exact_mut(BLOCK)) {
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
            pack_two_bits(half, |k| 2 * k, &mut out);
        }
        out.extend(scale);
    }
    Ok(out)
}
