//! TL2 of bitnet.cpp (GGUF type 39): triples of trits as a nibble and a sign bit, in the order of a table look-up kernel for x86
//! (`utils/codegen_tl2.py`, `convert-hf-to-gguf-bitnet.py`).
//!
//! ```text
//! K3 = columns - columns % BK columns are triples, the other K2 are pairs as in TL1
//! triple: v = 9 * T[3j] + 3 * T[3j + 1] + T[3j + 2]; its nibble is |v|, 0 to 13, its sign bit says v < 0
//! sections, with all of blocks of 32 rows in tiles of BM rows and BK (pairs: 32) columns
//!   nibbles of triples   rows * K3 / 6 bytes:  six columns a byte, the first triple in bits 7..4
//!   sign bits            rows * K3 / 24 bytes: 16-bit words; word h of 24 columns has bit 15 - i for row 16 (i % 2) + h, triple i / 2
//!   nibbles of pairs     rows * K2 / 4 bytes:  four columns a byte
//!   zeroes up to         (columns - 256) * rows / 3 * 5 / 8 + 256 * rows / 2 * 4 / 8 bytes, each division rounded down
//! order of the bytes of nibbles, outermost first:
//!   tile of BM rows > tile of columns > block of 32 rows > six (four) columns > eight rows: 0.., 16.., 8.., 24.. > row
//! ```
//! Nibbles 14 and 15 do not exist, and zero has no sign: a sign bit with a zero is damage, or a BK with which the sections begin
//! elsewhere. The scale is a tensor of its own. BM and BK are not in the file: see
//! [`super::tl_kernel`].

use bitnet_contracts::{InferenceError, Result};

use super::check::{expect_bytes, expect_trits, invalid_code, mismatch};
use super::{PackedRows, TlKernel};

/// Rows of a block.
const ROWS: usize = 32;
/// Columns of a tile of the pairs.
const PAIR_TILE: usize = 32;
/// Columns that the size reserved for a tensor assumes to be pairs.
const ASSUMED_PAIRS: usize = 256;
/// In an index of [`TRIPLES`] and in the code of an error: the sign bit is set.
const SIGN: usize = 0x10;
/// Stands where there are no trits.
const NO_TRIT: i8 = 2;

/// Trits by magnitude and [`SIGN`].
static TRIPLES: [[i8; 3]; 32] = {
    let mut triples = [[NO_TRIT; 3]; 32];
    let mut code = 0;
    while code < 14 {
        // Digits of code + 13 in base 3 are those of the balanced form plus one.
        let n = code + 13;
        let [a, b, c] = [(n / 9) as i8 - 1, (n / 3 % 3) as i8 - 1, (n % 3) as i8 - 1];
        triples[code] = [a, b, c];
        if code > 0 {
            triples[code | SIGN] = [-a, -b, -c];
        }
        code += 1;
    }
    triples
};

/// Bytes of a matrix as bitnet.cpp reserves them, None for fewer than 256 columns or when there are too many to count.
pub fn bytes(rows: usize, columns: usize) -> Option<usize> {
    let triples = columns.checked_sub(ASSUMED_PAIRS)?.checked_mul(rows)? / 3;
    let pairs = rows.checked_mul(ASSUMED_PAIRS)? / 2;
    (triples.checked_mul(5)? / 8).checked_add(pairs.checked_mul(4)? / 8)
}

/// Columns of triples, and where the sections end.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sections {
    triples: usize,
    nibbles: usize,
    signs: usize,
    pairs: usize,
}

/// The sections of a shape that `kernel` can cut up.
pub(super) fn sections(name: &str, rows: usize, columns: usize, kernel: TlKernel) -> Result<Sections> {
    let TlKernel { bm, bk, bmm } = kernel;
    let refuse = || {
        mismatch(
            name,
            format!(
                "rows in multiples of BM = {bm}, BM of 32, BK = {bk} a multiple of 24, bmm = {bmm} being 32, at least {ASSUMED_PAIRS} \
                 columns, of which those behind the tiles of BK are a multiple of 32 and few enough for the size reserved (TL2)"
            ),
            format!("{rows} x {columns}"),
        )
    };
    let total = bytes(rows, columns).ok_or_else(refuse)?;
    if bmm != ROWS || bm == 0 || bk == 0 || !bm.is_multiple_of(ROWS) || !bk.is_multiple_of(24) {
        return Err(refuse());
    }
    let pairs = columns % bk;
    let triples = columns - pairs;
    if rows == 0 || !rows.is_multiple_of(bm) || !pairs.is_multiple_of(PAIR_TILE) {
        return Err(refuse());
    }
    // `bytes` has multiplied rows by more than this.
    let nibbles = rows * triples / 6;
    let signs = nibbles + rows * triples / 24;
    let pairs = signs + rows * pairs / 4;
    if pairs > total {
        return Err(refuse());
    }
    Ok(Sections { triples, nibbles, signs, pairs })
}

/// The byte of each two successive groups of `row` in a section of nibbles: `width` columns in tiles of `tile`, `by` columns a byte.
fn places(row: usize, width: usize, tile: usize, by: usize, bm: usize) -> impl Iterator<Item = usize> {
    let (tile_row, block, r) = (row / bm, row % bm / ROWS, row % 8);
    let eight = [0, 2, 1, 3][row % ROWS / 8];
    (0..width / tile).flat_map(move |tile_column| {
        let blocks = ((tile_row * (width / tile) + tile_column) * (bm / ROWS) + block) * (tile / by);
        (0..tile / by).map(move |j| ((blocks + j) * 4 + eight) * 8 + r)
    })
}

/// The sign word of each 24 successive columns of `row`, as an index of 16-bit words.
fn sign_places(row: usize, width: usize, kernel: TlKernel) -> impl Iterator<Item = usize> {
    let TlKernel { bm, bk, .. } = kernel;
    let (tile_row, block, h) = (row / bm, row % bm / ROWS, row % 16);
    (0..width / bk).flat_map(move |tile_column| {
        let blocks = ((tile_row * (width / bk) + tile_column) * (bm / ROWS) + block) * (bk / 24);
        (0..bk / 24).map(move |j| (blocks + j) * 16 + h)
    })
}

/// The bit of triple `t` (0 to 7) of `row` in its sign word.
fn sign_bit(row: usize, t: usize) -> usize {
    15 - (2 * t + row % ROWS / 16)
}

/// A TL2 matrix as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct Tl2<'a> {
    nibbles: &'a [u8],
    signs: &'a [u8],
    pairs: &'a [u8],
    columns: usize,
    triples: usize,
    kernel: TlKernel,
}

impl<'a> Tl2<'a> {
    /// A view of `bytes`, padding included.
    ///
    /// # Errors
    /// `QuantizationError::LayoutMismatch` for a byte count that does not fit, or a shape that `kernel` is not for.
    pub fn new(name: &str, bytes: &'a [u8], rows: usize, columns: usize, kernel: TlKernel) -> Result<Self> {
        let s = sections(name, rows, columns, kernel)?;
        expect_bytes(name, bytes, self::bytes(rows, columns), rows, columns)?;
        let (nibbles, signs, pairs) = (&bytes[..s.nibbles], &bytes[s.nibbles..s.signs], &bytes[s.signs..s.pairs]);
        Ok(Self { nibbles, signs, pairs, columns, triples: s.triples, kernel })
    }
}

impl Tl2<'_> {
    /// The error for a row with [`NO_TRIT`]s: the first of them, its nibble and sign bit.
    fn refuse(&self, name: &str, row: usize, triples: &[i8]) -> InferenceError {
        let column = triples.iter().position(|&t| t == NO_TRIT).unwrap_or(0);
        let (six, half) = (column / 6, column / 3 % 2);
        let place = places(row, self.triples, self.kernel.bk, 6, self.kernel.bm).nth(six).unwrap_or(0);
        let word = sign_places(row, self.triples, self.kernel).nth(column / 24).unwrap_or(0);
        let signs = u16::from_le_bytes([self.signs[2 * word], self.signs[2 * word + 1]]);
        let negative = signs >> sign_bit(row, column % 24 / 3) & 1 == 1;
        let code = self.nibbles[place] >> (4 * (1 - half)) & 15;
        invalid_code(name, row * self.columns + column, code | if negative { SIGN as u8 } else { 0 })
    }
}

impl PackedRows for Tl2<'_> {
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()> {
        let (triples, pairs) = out.split_at_mut(self.triples);
        let mut nibbles = places(row, self.triples, self.kernel.bk, 6, self.kernel.bm);
        let words = sign_places(row, self.triples, self.kernel);
        let mut valid = true;
        for (out, word) in triples.as_chunks_mut::<24>().0.iter_mut().zip(words) {
            let signs = u16::from_le_bytes([self.signs[2 * word], self.signs[2 * word + 1]]);
            for ((j, out), place) in out.as_chunks_mut::<6>().0.iter_mut().enumerate().zip(&mut nibbles) {
                let byte = usize::from(self.nibbles[place]);
                let sign = |half: usize| usize::from(signs >> sign_bit(row, 2 * j + half) & 1) * SIGN;
                let (first, second) = (TRIPLES[byte >> 4 | sign(0)], TRIPLES[byte & 15 | sign(1)]);
                valid &= first[0] != NO_TRIT && second[0] != NO_TRIT;
                out[..3].copy_from_slice(&first);
                out[3..].copy_from_slice(&second);
            }
        }
        if !valid {
            return Err(self.refuse(name, row, triples));
        }
        let places = places(row, pairs.len(), PAIR_TILE, 4, self.kernel.bm);
        for (i, (out, place)) in pairs.as_chunks_mut::<4>().0.iter_mut().zip(places).enumerate() {
            let byte = self.pairs[place];
            for (half, code) in [byte >> 4, byte & 15].into_iter().enumerate() {
                if code > 8 {
                    return Err(invalid_code(name, row * self.columns + self.triples + 4 * i + 2 * half, code));
                }
                out[2 * half] = (code / 3) as i8 - 1;
                out[2 * half + 1] = (code % 3) as i8 - 1;
            }
        }
        Ok(())
    }
}

/// The bytes of a matrix.
///
/// # Errors
/// `QuantizationError::LayoutMismatch` when the shape is not one for `kernel`, `::InvalidCode` for a value that is no trit.
pub fn pack(name: &str, trits: &[i8], rows: usize, columns: usize, kernel: TlKernel) -> Result<Vec<u8>> {
    expect_trits(name, trits, rows, columns)?;
    let s = sections(name, rows, columns, kernel)?;
    let mut out = vec![0u8; bytes(rows, columns).unwrap_or(0)];
    let (nibbles, rest) = out.split_at_mut(s.nibbles);
    let (signs, pairs) = rest.split_at_mut(s.signs - s.nibbles);
    for (r, row) in trits.chunks_exact(columns).enumerate() {
        let (triple_columns, pair_columns) = row.split_at(s.triples);
        let value = |t: &[i8]| 9 * t[0] + 3 * t[1] + t[2];
        let places_of_six = places(r, s.triples, kernel.bk, 6, kernel.bm);
        for (six, place) in triple_columns.as_chunks::<6>().0.iter().zip(places_of_six) {
            nibbles[place] = value(&six[..3]).unsigned_abs() << 4 | value(&six[3..]).unsigned_abs();
        }
        for (columns, word) in triple_columns.as_chunks::<24>().0.iter().zip(sign_places(r, s.triples, kernel)) {
            let negative = columns.as_chunks::<3>().0.iter().enumerate().filter(|(_, triple)| value(&triple[..]) < 0);
            let bits = negative.fold(0u16, |bits, (t, _)| bits | 1 << sign_bit(r, t));
            for (byte, more) in signs[2 * word..2 * word + 2].iter_mut().zip(bits.to_le_bytes()) {
                *byte |= more;
            }
        }
        let code = |a: i8, b: i8| (3 * a + b + 4) as u8;
        let places_of_four = places(r, pair_columns.len(), PAIR_TILE, 4, kernel.bm);
        for (four, place) in pair_columns.as_chunks::<4>().0.iter().zip(places_of_four) {
            pairs[place] = code(four[0], four[1]) << 4 | code(four[2], four[3]);
        }
    }
    Ok(out)
}
