//! Int8 activations of some tokens, one absmax scale each, laid out as the ternary product reads them.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU8, Ordering};

use bitnet_contracts::{ForwardPassError, Result};

use super::chunks::{as_chunks, as_chunks_mut};
use super::columns::Columns;
use super::lookup::table_lines;
use super::ternary_tile::{BLOCK_BYTES, Line, PLANE};
use super::{Kernels, Threads};
use crate::ternary::interleaved::Packing;

/// Tokens from which on a panel of unpacked weights pays.
const PANEL_TOKENS: usize = 8;

/// Int8 activations, `[tokens, columns]`.
#[derive(Debug, Default)]
pub struct QuantizedActivations {
    /// For many tokens four activations a dword, `[tiles, columns / 4, tile]`. For few tokens a row each: four activations a dword, or
    /// for weights in base three a pair of 16-bit differences, see [`Packing::BaseThree`].
    dwords: Vec<i32>,
    /// For few tokens and weights that are looked up, the tables of each: see [`super::lookup`].
    tables: Vec<Line>,
    /// The quantiser's factor and the sum of the int8 values, a token.
    inverse: Vec<(f32, i32)>,
    columns: usize,
    packing: Option<Packing>,
    /// Tokens of a tile; 0 when the layout is one row a token.
    tile: usize,
}

/// Why a row could not be quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum RowFailure {
    /// The row itself holds NaN or infinity.
    NotFinite = 1,
    /// The row could not be made.
    Source = 2,
}

/// The working memory of a thread.
struct Scratch {
    out: Vec<f32>,
    spare: Vec<f32>,
    bytes: Vec<i8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> =
        const { RefCell::new(Scratch { out: Vec::new(), spare: Vec::new(), bytes: Vec::new() }) };
}

impl QuantizedActivations {
    /// Quantises `x`, `[tokens, columns]`. `what` names the input in the error.
    ///
    /// # Errors
    /// `ForwardPassError::NumericalInstability` when a row holds NaN or infinity.
    ///
    /// # Panics
    /// When `columns` is 0 (a bug of the caller).
    pub fn quantize(
        &mut self,
        kernels: &Kernels,
        threads: &Threads,
        x: &[f32],
        columns: usize,
        what: &dyn Fn() -> String,
    ) -> Result<()> {
        let row = |r: usize, out: &mut [f32], _: &mut [f32]| {
            out.copy_from_slice(&x[r * columns..(r + 1) * columns]);
            true
        };
        self.fill(kernels, threads, x.len() / columns, columns, row).map_err(|_| {
            ForwardPassError::NumericalInstability { details: format!("NaN or infinity in {}", what()) }.into()
        })
    }

    /// Quantises the rows that `row(r, out, spare)` makes, in parallel; `row` is false for a row that it cannot make.
    pub(crate) fn fill(
        &mut self,
        kernels: &Kernels,
        threads: &Threads,
        tokens: usize,
        columns: usize,
        row: impl Fn(usize, &mut [f32], &mut [f32]) -> bool + Sync + Send,
    ) -> std::result::Result<(), RowFailure> {
        self.columns = columns;
        self.packing = Some(kernels.packing());
        self.tile = if tokens >= PANEL_TOKENS { kernels.tile_tokens() } else { 0 };
        let steps = self.steps();
        let padded = self.padded();
        let differences = self.has_differences();
        let piece = self.tile.max(1);
        let pieces = tokens.div_ceil(piece);
        self.dwords.resize(pieces * piece * steps, 0);
        self.inverse.resize(tokens, (0.0, 0));
        let (lines, has_tables) = (self.table_lines(), self.has_tables());
        self.tables.resize(tokens * lines, Line([0; BLOCK_BYTES]));
        let tables = Columns::new(&mut self.tables, lines);
        let inverse = Columns::new(&mut self.inverse, piece.max(tokens));
        let failure = AtomicU8::new(0);
        threads.for_each_chunk(&mut self.dwords, (steps * piece).max(1), tokens > 1, |i, place| {
            SCRATCH.with_borrow_mut(|Scratch { out, spare, bytes }| {
                out.resize(columns, 0.0);
                spare.resize(columns, 0.0);
                bytes.resize(padded, 0);
                for t in 0..piece {
                    let r = i * piece + t;
                    if r >= tokens {
                        // A tile's places without a token are multiplied too, and nobody looks at their sums.
                        break;
                    }
                    if !row(r, out, spare) {
                        failure.fetch_max(RowFailure::Source as u8, Ordering::Relaxed);
                        continue;
                    }
                    let Some(scale) = kernels.quantize(out, bytes) else {
                        failure.fetch_max(RowFailure::NotFinite as u8, Ordering::Relaxed);
                        continue;
                    };
                    if has_tables {
                        // SAFETY: row `r` belongs to this piece alone, and the vector stays borrowed for this call.
                        kernels.tables(bytes, unsafe { tables.slice(r, 0, lines) });
                    } else if differences {
                        write_differences(bytes, place);
                    } else {
                        let (dwords, _) = as_chunks::<PLANE, _>(bytes);
                        for (place, dword) in place.iter_mut().skip(t).step_by(piece).zip(dwords) {
                            *place = i32::from_ne_bytes(dword.map(|b| b as u8));
                        }
                    }
                    // SAFETY: element `r` belongs to this piece alone, and the vector stays borrowed for this call.
                    let place = unsafe { inverse.slice(0, r, 1) };
                    place[0] = (scale.k, scale.sum);
                }
            });
        });
        match failure.into_inner() {
            0 => Ok(()),
            1 => Err(RowFailure::NotFinite),
            _ => Err(RowFailure::Source),
        }
    }

    /// Number of tokens held.
    pub fn tokens(&self) -> usize {
        self.inverse.len()
    }

    /// Number of columns of a token.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes allocated.
    pub fn memory_bytes(&self) -> usize {
        self.dwords.capacity() * 4
            + self.tables.capacity() * BLOCK_BYTES
            + self.inverse.capacity() * size_of::<(f32, i32)>()
    }

    /// How the weights are packed that these activations are for.
    pub(super) fn packing(&self) -> Option<Packing> {
        self.packing
    }

    /// Columns up to the end of the last block of weights.
    fn padded(&self) -> usize {
        self.columns.next_multiple_of(self.packing.map_or(1, Packing::block))
    }

    /// Whether rows hold differences.
    fn has_differences(&self) -> bool {
        !self.is_tiled() && self.packing == Some(Packing::BaseThree)
    }

    /// Whether few tokens have tables.
    fn has_tables(&self) -> bool {
        !self.is_tiled() && self.packing.is_some_and(Packing::has_tables)
    }

    /// Lines of one token's tables.
    fn table_lines(&self) -> usize {
        self.packing.filter(|_| self.has_tables()).map_or(0, |packing| table_lines(packing, self.padded()))
    }

    /// The tables of one token.
    pub(super) fn tables(&self, token: usize) -> &[Line] {
        let lines = self.table_lines();
        &self.tables[token * lines..(token + 1) * lines]
    }

    /// Dwords of one token.
    pub(super) fn steps(&self) -> usize {
        self.padded() / if self.has_differences() { 2 } else { PLANE }
    }

    /// Whether the layout is by tiles.
    pub(super) fn is_tiled(&self) -> bool {
        self.tile > 0
    }

    /// The dwords of one token in the layout by rows.
    pub(super) fn row(&self, token: usize) -> &[i32] {
        debug_assert!(!self.is_tiled());
        let steps = self.steps();
        &self.dwords[token * steps..(token + 1) * steps]
    }

    /// The tiles of `T` tokens, each `[steps]` of the tile's dwords.
    pub(super) fn tiles<const T: usize>(&self) -> impl Iterator<Item = &[[i32; T]]> {
        debug_assert_eq!(self.tile, T);
        as_chunks::<T, _>(&self.dwords).0.chunks_exact(self.steps().max(1))
    }

    /// The quantiser's factor and the sum of the int8 values of a token.
    pub(super) fn inverse(&self, token: usize) -> (f32, i32) {
        self.inverse[token]
    }
}

/// The factors of the prefixes of base-three words: `a_j - 3 a_(j+1)` for the five codes of each half of a word, those of a lane's two
/// words side by side.
fn write_differences(activations: &[i8], out: &mut [i32]) {
    for (a, out) in as_chunks::<20, _>(activations).0.iter().zip(as_chunks_mut::<10, _>(out).0) {
        let word = |first: usize| -> [i16; 10] {
            let a: [i16; 10] = std::array::from_fn(|k| i16::from(a[first + 4 * (k / 2) + k % 2]));
            std::array::from_fn(|k| if k % 5 == 4 { a[k] } else { a[k] - 3 * a[k + 1] })
        };
        let (low, high) = (word(0), word(2));
        for k in 0..10 {
            // The word at the lower address is the lower half of a little-endian dword.
            out[k] = i32::from(low[k]) & 0xffff | i32::from(high[k]) << 16;
        }
    }
}
