//! What TQ1_0 and TQ2_0 share: blocks of 256 columns, each with an f16 scale behind its codes.

use bitnet_contracts::Result;

use super::check::{expect_bytes, expect_columns, from_f16, one_scale};

/// Columns of a block.
pub(super) const BLOCK: usize = 256;

/// Bytes of a matrix in blocks of `block_bytes`, None when there are too many to count.
pub(super) fn bytes(rows: usize, columns: usize, block_bytes: usize) -> Option<usize> {
    (rows.checked_mul(columns)? / BLOCK).checked_mul(block_bytes)
}

/// A matrix in blocks of `BYTES` bytes as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks<'a, const BYTES: usize> {
    blocks: &'a [[u8; BYTES]],
    a_row: usize,
}

impl<'a, const BYTES: usize> Blocks<'a, BYTES> {
    /// A view of `bytes`.
    ///
    /// # Errors
    /// `QuantizationError::LayoutMismatch` for a byte count that does not fit, or columns that are no multiple of 256.
    pub(super) fn new(name: &str, bytes: &'a [u8], rows: usize, columns: usize) -> Result<Self> {
        expect_columns(name, columns, BLOCK)?;
        expect_bytes(name, bytes, self::bytes(rows, columns, BYTES), rows, columns)?;
        Ok(Self { blocks: bytes.as_chunks().0, a_row: columns / BLOCK })
    }

    /// The blocks of row `row`.
    pub(super) fn row(&self, row: usize) -> &'a [[u8; BYTES]] {
        &self.blocks[row * self.a_row..(row + 1) * self.a_row]
    }

    /// The scale that all blocks share; `empty` says whether a block's trits are all zero.
    ///
    /// # Errors
    /// `QuantizationError::InvalidScale`, and `::LayoutMismatch` when blocks have different scales.
    pub(super) fn scale(&self, name: &str, empty: impl Fn(&[u8; BYTES]) -> bool) -> Result<f32> {
        let scale = |block: &[u8; BYTES]| match [block[BYTES - 2], block[BYTES - 1]] {
            [0, 0] => Ok((0.0, empty(block))),
            stored => Ok((from_f16(name, stored)?, false)),
        };
        one_scale(name, self.blocks.iter().map(scale))
    }
}
