//! I2_S of bitnet.cpp (GGUF type 36): 2 bits a trit, one scale (`ggml-bitnet-mad.cpp`, `quantize_i2_s`).
//!
//! ```text
//! blocks over the flat row-major matrix, B = 128 elements (x86) or 64 (ARM), B / 4 bytes each
//!   byte j of a block   bits 7 6     5 4            3 2            1 0
//!   holds element       j            B/4 + j        2B/4 + j       3B/4 + j      as trit + 1
//! then f32 scale, then 28 bytes of nothing
//! ```
//! The most significant bits come first, unlike in every other format here. Bytes: `n / 4 + 32`. **Both layouts have the same type and
//! the same size, and nothing in the file tells them apart.** Code 3 does not exist.
//!
//! Blocks run across rows when the columns are no multiple of B. Such a file can be read, and is read here; bitnet.cpp's own kernels
//! read whole blocks a row and give noise for it, so [`pack`] refuses to make one.

use bitnet_contracts::Result;

use super::PackedRows;
use super::check::{
    expect_bytes, expect_columns, expect_trits, mismatch, pack_two_bits, refuse_code_three, unpack_two_bits,
    usable_scale,
};

/// Bytes behind the codes.
pub const TAIL: usize = 32;

/// How a block of I2_S is interleaved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum I2sLayout {
    /// Blocks of 128, as bitnet.cpp writes them on x86.
    X86,
    /// Blocks of 64, as bitnet.cpp writes them on ARM.
    Arm,
}

impl I2sLayout {
    /// Elements of a block.
    pub fn block(self) -> usize {
        match self {
            Self::X86 => 128,
            Self::Arm => 64,
        }
    }

    /// `x86` or `arm`.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86 => "x86",
            Self::Arm => "arm",
        }
    }
}

impl std::str::FromStr for I2sLayout {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Self, String> {
        [Self::X86, Self::Arm]
            .into_iter()
            .find(|layout| layout.name() == name)
            .ok_or_else(|| format!("{name:?} is no I2_S layout; there are x86 and arm"))
    }
}

/// Bytes of a matrix in either layout, None when there are too many to count.
pub fn bytes(rows: usize, columns: usize) -> Option<usize> {
    (rows.checked_mul(columns)? / 4).checked_add(TAIL)
}

/// An I2_S matrix as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct I2S<'a> {
    codes: &'a [u8],
    columns: usize,
    layout: I2sLayout,
    scale: f32,
}

impl<'a> I2S<'a> {
    /// A view of `bytes`, codes and tail.
    ///
    /// # Errors
    /// `QuantizationError::LayoutMismatch` for a byte count or a number of elements that does not fit, `::InvalidScale`.
    pub fn new(name: &str, bytes: &'a [u8], rows: usize, columns: usize, layout: I2sLayout) -> Result<Self> {
        expect_bytes(name, bytes, self::bytes(rows, columns), rows, columns)?;
        if columns == 0 || !(rows * columns).is_multiple_of(layout.block()) {
            return Err(mismatch(
                name,
                format!("a number of weights that is a multiple of {} ({})", layout.block(), layout.name()),
                format!("{rows} x {columns}"),
            ));
        }
        let (codes, tail) = bytes.split_at(bytes.len() - TAIL);
        let scale = usable_scale(name, f32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]))?;
        Ok(Self { codes, columns, layout, scale })
    }

    /// The dense value of trit 1.
    pub fn scale(&self) -> f32 {
        self.scale
    }
}

impl PackedRows for I2S<'_> {
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()> {
        let quarter = self.layout.block() / 4;
        let mut invalid = 0;
        let mut done = 0;
        while done < out.len() {
            // A run of elements that lie in successive bytes at the same two bits.
            let element = row * self.columns + done;
            let (block, within) = (element / (4 * quarter), element % (4 * quarter));
            let (k, j) = (within / quarter, within % quarter);
            let run = (quarter - j).min(out.len() - done);
            let at = block * quarter + j;
            invalid |= unpack_two_bits(&self.codes[at..at + run], 6 - 2 * k, &mut out[done..done + run]);
            done += run;
        }
        refuse_code_three(name, row, out, invalid)
    }
}

/// The bytes of a matrix.
///
/// # Errors
/// `QuantizationError::LayoutMismatch` when the columns are no multiple of the block, `::InvalidCode` for a value that is no trit,
/// `::InvalidScale`.
pub fn pack(name: &str, trits: &[i8], rows: usize, columns: usize, scale: f32, layout: I2sLayout) -> Result<Vec<u8>> {
    expect_trits(name, trits, rows, columns)?;
    expect_columns(name, columns, layout.block())?;
    let scale = usable_scale(name, scale)?;
    let mut out = Vec::with_capacity(trits.len() / 4 + TAIL);
    for block in trits.chunks_exact(layout.block()) {
        pack_two_bits(block, |k| 6 - 2 * k, &mut out);
    }
    out.extend(scale.to_le_bytes());
    out.extend([0; TAIL - 4]);
    Ok(out)
}
