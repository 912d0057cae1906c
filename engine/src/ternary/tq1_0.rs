//! TQ1_0 of llama.cpp (GGUF type 34): five trits a byte and an f16 scale for every 256 (`ggml-quants.c`, `quantize_row_tq1_0_ref`).
//!
//! ```text
//! block of 256 columns: 54 bytes, five trits each as in `base3`, the most significant first
//!   bytes  0..32   byte j        holds columns j, 32 + j, 64 + j, 96 + j, 128 + j
//!   bytes 32..48   byte 32 + j   holds columns 160 + j, 176 + j, 192 + j, 208 + j, 224 + j
//!   bytes 48..52   byte 48 + j   holds columns 240 + j, 244 + j, 248 + j, 252 + j, and code 0
//!   bytes 52..54   f16 scale
//! ```

use bitnet_contracts::Result;

use super::PackedRows;
use super::base3::{NO_TRITS, TRITS, encode};
use super::blocks::Blocks;
use super::check::{expect_columns, expect_trits, invalid_code, to_f16};

/// Columns of a block.
pub const BLOCK: usize = super::blocks::BLOCK;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 54;
/// First byte, number of bytes, first column and trits a byte of each section. The bytes' own number is the step between the columns
/// of one byte.
const SECTIONS: [(usize, usize, usize, usize); 3] = [(0, 32, 0, 5), (32, 16, 160, 5), (48, 4, 240, 4)];

/// Bytes of a matrix, None when there are too many to count.
pub fn bytes(rows: usize, columns: usize) -> Option<usize> {
    super::blocks::bytes(rows, columns, BLOCK_BYTES)
}

/// A TQ1_0 matrix as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct Tq1_0<'a>(Blocks<'a, BLOCK_BYTES>);

impl<'a> Tq1_0<'a> {
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
        self.0.scale(name, |block| {
            let mut trits = [0; BLOCK];
            unpack_block(block, &mut trits);
            trits.iter().all(|&t| t == 0)
        })
    }
}

/// False when a byte stands for no trits; those columns come out as [`NO_TRITS`].
fn unpack_block(block: &[u8; BLOCK_BYTES], out: &mut [i8]) -> bool {
    let mut valid = true;
    for (first, count, column, trits) in SECTIONS {
        for j in 0..count {
            let mut digits = TRITS[block[first + j] as usize];
            if trits == 4 && digits[4] != -1 {
                digits = [NO_TRITS; 5];
            }
            valid &= digits[0] != NO_TRITS;
            for (k, &digit) in digits[..trits].iter().enumerate() {
                out[column + k * count + j] = digit;
            }
        }
    }
    valid
}

impl PackedRows for Tq1_0<'_> {
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()> {
        let columns = out.len();
        for (b, (block, out)) in self.0.row(row).iter().zip(out.chunks_exact_mut(BLOCK)).enumerate() {
            if !unpack_block(block, out) {
                let column = out.iter().position(|&t| t == NO_TRITS).unwrap_or(0);
                let byte = SECTIONS
                    .iter()
                    .rev()
                    .find(|section| column >= section.2)
                    .map_or(0, |&(first, count, start, _)| block[first + (column - start) % count]);
                return Err(invalid_code(name, row * columns + b * BLOCK + column, byte));
            }
        }
        Ok(())
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
        for (_, count, column, trits) in SECTIONS {
            for j in 0..count {
                let code = |k| if k < trits { (block[column + k * count + j] + 1) as u8 } else { 0 };
                out.push(encode(std::array::from_fn(code)));
            }
        }
        out.extend(scale);
    }
    Ok(out)
}
