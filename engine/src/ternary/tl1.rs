//! TL1 of bitnet.cpp (GGUF type 38): pairs of trits as nibbles, in the order of a table look-up kernel for ARM
//! (`utils/codegen_tl1.py`, `convert-hf-to-gguf-bitnet.py`).
//!
//! ```text
//! the pair of columns 2j, 2j + 1 is 3 * T[2j] + T[2j + 1] + 4, 0 to 8; a byte holds two pairs of one row, the first in bits 7..4
//! order of the bytes, outermost first, with by = 256 / bmm:
//!   tile of BM rows > tile of BK columns > block of bmm rows > by columns > sixteen rows > four columns > row
//! ```
//! Nibbles 9 to 15 do not exist. Bytes: `n / 4`; the scale is a tensor of its own. BM, BK and bmm are not in the file: see
//! [`super::tl_kernel`].

use bitnet_contracts::Result;

use super::check::{expect_bytes, expect_trits, invalid_code, mismatch};
use super::{PackedRows, TlKernel};

/// Trits of the nibbles 0 to 8.
const PAIRS: [[i8; 2]; 9] = {
    let mut pairs = [[0; 2]; 9];
    let mut code = 0;
    while code < 9 {
        pairs[code] = [(code / 3) as i8 - 1, (code % 3) as i8 - 1];
        code += 1;
    }
    pairs
};

/// Bytes of a matrix, None when there are too many to count.
pub fn bytes(rows: usize, columns: usize) -> Option<usize> {
    Some(rows.checked_mul(columns)? / 4)
}

/// Whether `kernel` can cut up the shape.
pub(super) fn sections(name: &str, rows: usize, columns: usize, kernel: TlKernel) -> Result<()> {
    let TlKernel { bm, bk, bmm } = kernel;
    let fits = matches!(bmm, 32 | 64)
        && bm > 0
        && bk > 0
        && bm.is_multiple_of(bmm)
        && bk.is_multiple_of(256 / bmm)
        && rows > 0
        && columns > 0
        && rows.is_multiple_of(bm)
        && columns.is_multiple_of(bk);
    if fits {
        return Ok(());
    }
    Err(mismatch(
        name,
        format!("rows in multiples of BM = {bm}, columns of BK = {bk}, BM of bmm = {bmm}, which is 32 or 64 (TL1)"),
        format!("{rows} x {columns}"),
    ))
}

/// The byte of each four successive columns of `row`.
fn places(row: usize, columns: usize, kernel: TlKernel) -> impl Iterator<Item = usize> {
    let TlKernel { bm, bk, bmm } = kernel;
    let by = 256 / bmm;
    let (tile, block, sixteen, r) = (row / bm, row % bm / bmm, row % bmm / 16, row % 16);
    (0..columns / bk).flat_map(move |tile_column| {
        let blocks = ((tile * (columns / bk) + tile_column) * (bm / bmm) + block) * (bk / by);
        (0..bk / by).flat_map(move |j| {
            let groups = ((blocks + j) * (bmm / 16) + sixteen) * (by / 4);
            (0..by / 4).map(move |four| (groups + four) * 16 + r)
        })
    })
}

/// A TL1 matrix as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct Tl1<'a> {
    bytes: &'a [u8],
    columns: usize,
    kernel: TlKernel,
}

impl<'a> Tl1<'a> {
    /// A view of `bytes`.
    ///
    /// # Errors
    /// `QuantizationError::LayoutMismatch` for a byte count that does not fit, or a shape that `kernel` is not for.
    pub fn new(name: &str, bytes: &'a [u8], rows: usize, columns: usize, kernel: TlKernel) -> Result<Self> {
        sections(name, rows, columns, kernel)?;
        expect_bytes(name, bytes, self::bytes(rows, columns), rows, columns)?;
        Ok(Self { bytes, columns, kernel })
    }
}

impl PackedRows for Tl1<'_> {
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()> {
        let places = places(row, self.columns, self.kernel);
        for (i, (out, place)) in out.as_chunks_mut::<4>().0.iter_mut().zip(places).enumerate() {
            let byte = self.bytes[place];
            for (half, code) in [byte >> 4, byte & 15].into_iter().enumerate() {
                let Some(pair) = PAIRS.get(usize::from(code)) else {
                    return Err(invalid_code(name, row * self.columns + 4 * i + 2 * half, code));
                };
                out[2 * half..2 * half + 2].copy_from_slice(pair);
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
    sections(name, rows, columns, kernel)?;
    let mut out = vec![0u8; trits.len() / 4];
    let code = |a: i8, b: i8| (3 * a + b + 4) as u8;
    for (r, row) in trits.chunks_exact(columns).enumerate() {
        for (four, place) in row.as_chunks::<4>().0.iter().zip(places(r, columns, kernel)) {
            out[place] = code(four[0], four[1]) << 4 | code(four[2], four[3]);
        }
    }
    Ok(out)
}
