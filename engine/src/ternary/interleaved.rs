//! The layout that the kernels read: 2 bits a trit, sixteen rows interleaved.
//!
//! ```text
//! row group g (rows 16g .. 16g+15), column block b (columns 16b .. 16b+15): 64 bytes
//!   byte 4*row + j      bits 7 6    5 4    3 2    1 0
//!   holds column        16b+12+j    16b+8+j    16b+4+j    16b+j      as trit + 1
//! ```
//! Read as 32-bit lanes a block is one lane a row, and after a shift and a mask by 3 four consecutive columns of it: what an
//! unsigned-by-signed byte dot product wants, with the activations as one broadcast dword. Missing rows and columns at the edges
//! hold code 1 (trit 0). Bytes: `ceil(rows / 16) * ceil(columns / 16) * 64`.

use std::sync::Mutex;

use bitnet_contracts::{MemoryError, Result};

use crate::kernels::Threads;

const ROWS: usize = 16;
const BLOCK: usize = 16;
const BLOCK_BYTES: usize = ROWS * BLOCK / 4;
/// Four times code 1: trit 0 everywhere.
const ZEROES: u8 = 0b01_01_01_01;

/// A ternary matrix with one scale, packed for the kernels.
#[derive(Debug)]
pub struct InterleavedMatrix {
    data: Vec<u8>,
    rows: usize,
    columns: usize,
    scale: f32,
}

impl InterleavedMatrix {
    /// Packs a `[rows, columns]` matrix whose row `r` is written by `row(r, out)`; the dense value of a trit is `trit * scale`.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`, and what `row` returns.
    pub fn pack(
        rows: usize,
        columns: usize,
        scale: f32,
        threads: &Threads,
        row: &(dyn Fn(usize, &mut [i8]) -> Result<()> + Sync),
    ) -> Result<Self> {
        let groups = rows.div_ceil(ROWS);
        let blocks = columns.div_ceil(BLOCK);
        let bytes = groups.checked_mul(blocks).and_then(|n| n.checked_mul(BLOCK_BYTES)).unwrap_or(usize::MAX);
        let mut data = Vec::new();
        data.try_reserve_exact(bytes)
            .map_err(|e| MemoryError::AllocationFailed { size_bytes: bytes, reason: e.to_string() })?;
        data.resize(bytes, ZEROES);
        let failure = Mutex::new(None);
        threads.for_each_chunk(
            &mut data,
            (blocks * BLOCK_BYTES).max(1),
            true,
            || vec![0i8; columns],
            |g, group, trits| {
                for r in 0..ROWS.min(rows - g * ROWS) {
                    match row(g * ROWS + r, trits) {
                        Ok(()) => pack_row(trits, r, group),
                        Err(error) => *failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(error),
                    }
                }
            },
        );
        match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some(error) => Err(error),
            None => Ok(Self { data, rows, columns, scale }),
        }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Number of row groups.
    pub fn groups(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// The dense value of trit 1.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> usize {
        self.data.capacity()
    }

    /// The blocks of row group `group`.
    pub(crate) fn group(&self, group: usize) -> &[u8] {
        let bytes = self.columns.div_ceil(BLOCK) * BLOCK_BYTES;
        &self.data[group * bytes..(group + 1) * bytes]
    }

    /// Unpacks row `row` into `columns` trits.
    pub fn unpack_row(&self, row: usize, out: &mut [i8]) {
        let group = self.group(row / ROWS);
        for (column, o) in out.iter_mut().enumerate() {
            let (block, c) = (column / BLOCK, column % BLOCK);
            let byte = group[block * BLOCK_BYTES + 4 * (row % ROWS) + c % 4];
            *o = ((byte >> (2 * (c / 4))) & 3) as i8 - 1;
        }
    }
}

/// Writes the trits of row `r` of a group into its blocks.
fn pack_row(trits: &[i8], r: usize, group: &mut [u8]) {
    for (trits, block) in trits.chunks(BLOCK).zip(group.as_chunks_mut::<BLOCK_BYTES>().0) {
        let mut codes = [1u8; BLOCK];
        for (code, &t) in codes.iter_mut().zip(trits) {
            *code = (t + 1) as u8;
        }
        for j in 0..4 {
            block[4 * r + j] = codes[j] | codes[4 + j] << 2 | codes[8 + j] << 4 | codes[12 + j] << 6;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn unpacking_gives_back_what_was_packed(rows in 1usize..40, columns in 1usize..70, seed in any::<u64>()) {
            let trit = |r: usize, c: usize| ((seed ^ (r * 1009 + c) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as i64 % 3 - 1;
            let matrix = InterleavedMatrix::pack(rows, columns, 1.0, &Threads::new(Some(2)).unwrap(), &|r, out| {
                out.iter_mut().enumerate().for_each(|(c, o)| *o = trit(r, c) as i8);
                Ok(())
            }).unwrap();
            prop_assert_eq!(matrix.memory_bytes(), rows.div_ceil(16) * columns.div_ceil(16) * 64);
            for r in 0..rows {
                let mut out = vec![9i8; columns];
                matrix.unpack_row(r, &mut out);
                for (c, &o) in out.iter().enumerate() {
                    prop_assert_eq!(i64::from(o), trit(r, c));
                }
            }
        }
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(
            InterleavedMatrix::pack(usize::MAX, usize::MAX, 1.0, &Threads::new(Some(1)).unwrap(), &|_, _| Ok(()))
                .is_err()
        );
    }

    #[test]
    fn an_error_of_the_source_is_passed_on() {
        let fail = |_: usize, _: &mut [i8]| Err(MemoryError::PoolExhausted { pool_type: "test".into() }.into());
        assert!(InterleavedMatrix::pack(3, 3, 1.0, &Threads::new(Some(1)).unwrap(), &fail).is_err());
    }
}
