//! The layouts that the kernels read: sixteen rows interleaved, so that one 32-bit lane of a 64-byte block is one row.
//!
//! Two bits a trit, 16 columns a block:
//! ```text
//! row group g (rows 16g .. 16g+15), column block b (columns 16b .. 16b+15): 64 bytes
//!   byte 4*row + j      bits 7 6    5 4    3 2    1 0
//!   holds column        16b+12+j    16b+8+j    16b+4+j    16b+j      as trit + 1
//! ```
//! After a shift and a mask by 3 a lane is four consecutive columns of its row: what an unsigned-by-signed byte dot product wants, with
//! the activations as one broadcast dword.
//!
//! Base three, 20 columns a block (1.6 bits a trit): a lane is two 16-bit words of ten codes each,
//! ```text
//!   word 2*row          columns 20b + 0  1  4  5  8   9  12 13 16 17     c0 .. c9, codes trit + 1
//!   word 2*row + 1      columns 20b + 2  3  6  7 10  11  14 15 18 19
//!   as ceil(N * 65536 / 59049), N = c0 3^9 + c1 3^8 + .. + c9
//! ```
//! a fraction of one in 16 bits: the upper half of its product with `3^j` is the number that its first `j` codes spell in base three.
//! A product of weights and activations needs no more than those prefixes `p_j`, since `c_j = p_j - 3 p_(j-1)` and so
//! `sum c_j a_j = sum p_j (a_j - 3 a_(j+1))`: one multiplication and one multiply-add a code, exact in integers.
//!
//! Missing rows and columns at the edges hold code 1 (trit 0). Bytes: `ceil(rows / 16) * blocks * 64`.

#![allow(clippy::needless_range_loop)] // Rows are counted, several arrays at once.

use std::sync::{Arc, Mutex};

use bitnet_contracts::{MemoryError, Result};

use super::lookup_layout::{COUNTS, TRIPLES, pack_pairs, pack_triples, unpack_pairs, unpack_triples};
use crate::kernels::chunks::{as_chunks, as_chunks_mut};
use crate::kernels::{Kernels, Pages, Threads};

const ROWS: usize = 16;
const BLOCK_BYTES: usize = 64;

/// How trits are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Two bits a trit: the fewest instructions.
    TwoBits,
    /// Ten trits in sixteen bits: the fewest bytes.
    BaseThree,
    /// TL1, two trits an index of four bits: see [`super::lookup_layout`].
    Pairs,
    /// TL2, three trits an index of four bits and a sign: see there.
    Triples,
}

impl Packing {
    /// All, in their order.
    pub const ALL: [Packing; 4] = [Packing::TwoBits, Packing::BaseThree, Packing::Pairs, Packing::Triples];

    /// As files are called.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Packing::TwoBits => "two-bits",
            Packing::BaseThree => "base-three",
            Packing::Pairs => "tl1",
            Packing::Triples => "tl2",
        }
    }

    /// Columns of one block.
    pub(crate) const fn block(self) -> usize {
        match self {
            Packing::TwoBits | Packing::Pairs => 16,
            Packing::BaseThree => 20,
            Packing::Triples => 96,
        }
    }

    /// Whether few tokens meet these weights by tables.
    pub(crate) const fn has_tables(self) -> bool {
        matches!(self, Packing::Pairs | Packing::Triples)
    }

    /// Bytes of a row group.
    fn group_bytes(self, columns: usize) -> Option<usize> {
        let blocks = columns.div_ceil(self.block());
        match self {
            Packing::Triples => blocks.checked_mul(TRIPLES)?.checked_add(COUNTS),
            _ => blocks.checked_mul(BLOCK_BYTES),
        }
    }

    /// Bytes of a packed matrix, if there are so many.
    pub(crate) fn bytes(self, rows: usize, columns: usize) -> Option<usize> {
        rows.div_ceil(ROWS).checked_mul(self.group_bytes(columns)?)
    }
}

/// Codes of one word of a base-three lane.
const WORD: usize = 10;

/// The column, within its block, of code `k` of word `word` of a base-three lane.
const fn base3_column(word: usize, k: usize) -> usize {
    4 * (k / 2) + 2 * word + k % 2
}

/// A ternary matrix with one scale, packed for the kernels.
#[derive(Debug)]
pub struct InterleavedMatrix {
    /// Several matrices lie in one block of memory, one behind the other as they are read.
    pages: Arc<Pages>,
    start: usize,
    packing: Packing,
    rows: usize,
    columns: usize,
    scale: f32,
}

/// A matrix to pack.
pub struct TritSource<'a> {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
    /// The dense value of trit 1.
    pub scale: f32,
    /// Writes the trits (-1, 0, 1) of a row.
    pub row: &'a (dyn Fn(usize, &mut [i8]) -> Result<()> + Sync),
}

impl InterleavedMatrix {
    /// Packs one `[rows, columns]` matrix for `kernels`.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`, and what the source returns.
    pub fn pack(source: &TritSource<'_>, kernels: &Kernels, threads: &Threads) -> Result<Self> {
        let mut packer = Packer::new(kernels, [(source.rows, source.columns)])?;
        packer.add(source, threads)?;
        packer.finish().pop().ok_or_else(|| MemoryError::PoolExhausted { pool_type: "matrices".to_string() }.into())
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

    /// How the trits are packed.
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// The dense value of trit 1.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> usize {
        self.packing.bytes(self.rows, self.columns).unwrap_or(0)
    }

    /// The memory that this matrix shares with those that were packed with it.
    pub(crate) fn shared(&self) -> &[u8] {
        &self.pages
    }

    /// The blocks of row group `group`.
    pub(crate) fn group(&self, group: usize) -> &[u8] {
        let bytes = self.packing.group_bytes(self.columns).unwrap_or(0);
        let start = self.start + group * bytes;
        &self.pages[start..start + bytes]
    }

    /// Unpacks row `row` into `columns` trits.
    pub fn unpack_row(&self, row: usize, out: &mut [i8]) {
        let group = self.group(row / ROWS);
        let write = |out: &mut [i8], planes: &[[u32; ROWS]]| {
            for (out, plane) in out.chunks_mut(4).zip(planes) {
                out.iter_mut().zip(plane[row % ROWS].to_le_bytes()).for_each(|(o, code)| *o = code as i8 - 1);
            }
        };
        if self.packing == Packing::Triples {
            let (units, _) = as_chunks::<TRIPLES, _>(&group[COUNTS..]);
            out.chunks_mut(96).zip(units).for_each(|(out, unit)| write(out, &unpack_triples(unit)));
            return;
        }
        let blocks = as_chunks::<BLOCK_BYTES, _>(group).0;
        for (out, block) in out.chunks_mut(self.packing.block()).zip(blocks) {
            let lane = &block[4 * (row % ROWS)..][..4];
            match self.packing {
                Packing::TwoBits => {
                    for (c, o) in out.iter_mut().enumerate() {
                        *o = ((lane[c % 4] >> (2 * (c / 4))) & 3) as i8 - 1;
                    }
                }
                Packing::Pairs | Packing::Triples => write(out, &unpack_pairs(block)),
                Packing::BaseThree => {
                    for (word, bytes) in as_chunks::<2, _>(lane).0.iter().enumerate() {
                        let mut fraction = u16::from_le_bytes(*bytes);
                        for k in 0..WORD {
                            let product = u32::from(fraction) * 3;
                            fraction = product as u16;
                            if let Some(o) = out.get_mut(base3_column(word, k)) {
                                *o = (product >> 16) as i8 - 1;
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Several matrices being packed into one block of memory.
pub struct Packer {
    kernels: Kernels,
    pages: Pages,
    used: usize,
    /// Start, rows, columns and scale of each matrix.
    done: Vec<(usize, usize, usize, f32)>,
}

impl Packer {
    /// Room for matrices of these shapes, `(rows, columns)`, packed for `kernels`.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`.
    pub fn new(kernels: &Kernels, shapes: impl IntoIterator<Item = (usize, usize)>) -> Result<Self> {
        let packing = kernels.packing();
        let total = shapes
            .into_iter()
            .try_fold(0usize, |sum, (rows, columns)| sum.checked_add(packing.bytes(rows, columns)?))
            .unwrap_or(usize::MAX);
        Ok(Self { kernels: kernels.clone(), pages: Pages::zeroed(total)?, used: 0, done: Vec::new() })
    }

    /// Takes matrices of these shapes and scales that were packed before: `fill` writes what [`InterleavedMatrix::shared`] was.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn restore(
        kernels: &Kernels,
        matrices: &[(usize, usize, f32)],
        fill: impl FnOnce(&mut [u8]),
    ) -> Result<Vec<InterleavedMatrix>> {
        let mut packer = Self::new(kernels, matrices.iter().map(|&(rows, columns, _)| (rows, columns)))?;
        fill(&mut packer.pages);
        for &(rows, columns, scale) in matrices {
            packer.done.push((packer.used, rows, columns, scale));
            packer.used += kernels.packing().bytes(rows, columns).unwrap_or(0);
        }
        Ok(packer.finish())
    }

    /// Packs the next matrix.
    ///
    /// # Errors
    /// What the source returns; `MemoryError::PoolExhausted` for a matrix that no room was asked for.
    pub fn add(&mut self, source: &TritSource<'_>, threads: &Threads) -> Result<()> {
        let &TritSource { rows, columns, scale, row } = source;
        let start = self.used;
        let (kernels, packing) = (&self.kernels, self.kernels.packing());
        let place = packing
            .bytes(rows, columns)
            .and_then(|bytes| self.pages.get_mut(start..start.checked_add(bytes)?))
            .ok_or_else(|| MemoryError::PoolExhausted { pool_type: "packed matrices".to_string() })?;
        let end = start + place.len();
        let failure = Mutex::new(None);
        threads.for_each_chunk(place, packing.group_bytes(columns).unwrap_or(0).max(1), true, |g, group| {
            // What is missing at the edges stays zero.
            let width = columns.next_multiple_of(packing.block());
            let mut trits = vec![0i8; ROWS * width];
            for (r, trits) in trits.chunks_exact_mut(width.max(1)).enumerate().take(rows - g * ROWS) {
                if let Err(error) = row(g * ROWS + r, &mut trits[..columns]) {
                    *failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
                    return;
                }
            }
            let mut dwords = Vec::new();
            lanes(&trits, &mut dwords);
            kernels.pack(&dwords, group);
        });
        if let Some(error) = failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            return Err(error);
        }
        self.used = end;
        self.done.push((start, rows, columns, scale));
        Ok(())
    }

    /// The matrices in the order in which they were added.
    pub fn finish(self) -> Vec<InterleavedMatrix> {
        let pages = Arc::new(self.pages);
        let packing = self.kernels.packing();
        let matrix = |(start, rows, columns, scale)| InterleavedMatrix {
            pages: pages.clone(),
            start,
            packing,
            rows,
            columns,
            scale,
        };
        self.done.into_iter().map(matrix).collect()
    }
}

/// Turns `[16, columns]` trits, columns a multiple of four, into lanes: four columns of a row a dword, `[columns / 4, 16]`. Not compiled for
/// the larger instruction sets on purpose: with gathers, which the compiler takes there, it is several times slower.
fn lanes(trits: &[i8], out: &mut Vec<u32>) {
    let width = trits.len() / ROWS;
    let rows: [&[[i8; 4]]; ROWS] = std::array::from_fn(|r| as_chunks::<4, _>(&trits[r * width..(r + 1) * width]).0);
    out.resize(width / 4 * ROWS, 0);
    for (d, lanes) in as_chunks_mut::<ROWS, _>(out).0.iter_mut().enumerate() {
        for r in 0..ROWS {
            lanes[r] = u32::from_le_bytes(bytemuck::cast(rows[r][d]));
        }
    }
}

/// Packs [`lanes`] of whole blocks of columns: see `Kernels::pack`.
#[inline(always)]
pub(crate) fn pack_lanes(packing: Packing, lanes: &[u32], out: &mut [u8]) {
    let (lanes, _) = as_chunks::<ROWS, _>(lanes);
    match packing {
        Packing::Pairs => return pack_pairs(lanes, codes, out),
        Packing::Triples => return pack_triples(lanes, codes, out),
        Packing::TwoBits | Packing::BaseThree => {}
    }
    for (lanes, block) in lanes.chunks_exact(packing.block() / 4).zip(as_chunks_mut::<BLOCK_BYTES, _>(out).0) {
        let mut words = [0u32; ROWS];
        match packing {
            Packing::TwoBits => {
                for m in 0..lanes.len() {
                    for r in 0..ROWS {
                        words[r] |= codes(lanes[m][r]) << (2 * m);
                    }
                }
            }
            _ => {
                // The number of each word, two of its digits at a time.
                let (mut even, mut odd) = ([0u32; ROWS], [0u32; ROWS]);
                for m in 0..lanes.len() {
                    for r in 0..ROWS {
                        let code = codes(lanes[m][r]);
                        even[r] = 9 * even[r] + 3 * (code & 3) + (code >> 8 & 3);
                        odd[r] = 9 * odd[r] + 3 * (code >> 16 & 3) + (code >> 24);
                    }
                }
                for r in 0..ROWS {
                    words[r] = fraction(even[r]) | fraction(odd[r]) << 16;
                }
            }
        }
        for r in 0..ROWS {
            block[4 * r..4 * r + 4].copy_from_slice(&words[r].to_le_bytes());
        }
    }
}

/// Four trits plus one, a byte each. -1 is all ones: no byte carries into the next.
#[inline(always)]
fn codes(trits: u32) -> u32 {
    ((trits & 0x0303_0303) + 0x0101_0101) & 0x0303_0303
}

/// The smallest 16-bit fraction that is not below `number / 3^10`: `ceil(number * 65536 / 59049)`.
#[inline(always)]
fn fraction(number: u32) -> u32 {
    // 65536 = 59049 + 6487, and 7199 / 65536 is so near below 6487 / 59049 that the quotient is short by one at most.
    let quotient = (number * 7199) >> 16;
    let rest = number * 6487 - quotient * 59_049;
    number + quotient + u32::from(rest > 0) + u32::from(rest > 59_049)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;
    use proptest::prelude::*;

    fn kernels() -> &'static Kernels {
        Kernels::of(Isa::best()).unwrap()
    }

    proptest! {
        #[test]
        fn unpacking_gives_back_what_was_packed(rows in 1usize..40, columns in 1usize..230, seed in any::<u64>()) {
            let trit = |r: usize, c: usize| ((seed ^ (r * 1009 + c) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as i64 % 3 - 1;
            let row = |r: usize, out: &mut [i8]| {
                out.iter_mut().enumerate().for_each(|(c, o)| *o = trit(r, c) as i8);
                Ok(())
            };
            let source = TritSource { rows, columns, scale: 1.0, row: &row };
            let threads = Threads::new(Some(2)).unwrap();
            for (packing, isa) in Packing::ALL.into_iter().flat_map(|p| Isa::available().into_iter().map(move |isa| (p, isa))) {
                let kernels = Kernels::of(isa).unwrap().with_packing(packing);
                let mut packer = Packer::new(kernels, [(rows, columns), (rows, columns)]).unwrap();
                packer.add(&source, &threads).unwrap();
                packer.add(&source, &threads).unwrap();
                prop_assert!(packer.add(&source, &threads).is_err(), "no room for a third");
                let matrix = packer.finish().pop().unwrap();
                let group = match packing {
                    Packing::Triples => 64 + columns.div_ceil(96) * 320,
                    _ => columns.div_ceil(packing.block()) * 64,
                };
                prop_assert_eq!(matrix.memory_bytes(), rows.div_ceil(16) * group);
                for r in 0..rows {
                    let mut out = vec![9i8; columns];
                    matrix.unpack_row(r, &mut out);
                    for (c, &o) in out.iter().enumerate() {
                        prop_assert_eq!(i64::from(o), trit(r, c));
                    }
                }
            }
        }
    }

    /// Every word of ten codes: the prefixes come out of one multiplication each.
    #[test]
    fn prefixes_of_every_base_three_word_are_right() {
        for number in 0..59_049u32 {
            let digit = |k: u32| number / 3u32.pow(9 - k) % 3;
            let mut trits = [0i8; 20 * ROWS];
            (0..WORD).for_each(|k| trits[base3_column(0, k)] = digit(k as u32) as i8 - 1);
            let (mut dwords, mut group) = (Vec::new(), [0u8; BLOCK_BYTES]);
            lanes(&trits, &mut dwords);
            pack_lanes(Packing::BaseThree, &dwords, &mut group);
            let mut word = u16::from_le_bytes([group[0], group[1]]);
            for half in 0..2 {
                let mut prefix = 0;
                for j in 0..5 {
                    prefix = 3 * prefix + digit(5 * half + j);
                    assert_eq!((u32::from(word) * 3u32.pow(j + 1)) >> 16, prefix, "number {number}");
                }
                word = word.wrapping_mul(243);
            }
        }
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        let source = TritSource { rows: usize::MAX, columns: usize::MAX, scale: 1.0, row: &|_, _| Ok(()) };
        assert!(InterleavedMatrix::pack(&source, kernels(), &Threads::new(Some(1)).unwrap()).is_err());
        assert!(Packer::new(kernels(), [(usize::MAX / 8, 16), (usize::MAX / 8, 16)]).is_err());
    }

    #[test]
    fn an_error_of_the_source_is_passed_on() {
        let fail = |_: usize, _: &mut [i8]| Err(MemoryError::PoolExhausted { pool_type: "test".into() }.into());
        let source = TritSource { rows: 3, columns: 3, scale: 1.0, row: &fail };
        assert!(InterleavedMatrix::pack(&source, kernels(), &Threads::new(Some(1)).unwrap()).is_err());
    }
}
