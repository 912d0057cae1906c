//! How trits are stored: one file a format, each with pack, unpack and its layout drawn.
//!
//! A matrix is `[rows, columns]`, outputs by inputs. `pack` takes its trits row by row (-1, 0, 1) and gives the bytes of the file; a
//! view of such bytes implements [`PackedRows`]. Formats that keep scales among the codes give them out with their own `scale`.
//!
//! | format | rows | columns | bytes | scale |
//! |---|---|---|---|---|
//! | [`hf_packed`] | multiple of 4 | any | n / 4 | a tensor of its own |
//! | [`i2_s`] | any | any, n a multiple of 128 (x86) or 64 (ARM) | n / 4 + 32 | one f32 behind the codes |
//! | [`tq1_0`] | any | multiple of 256 | n / 256 * 54 | f16 a block |
//! | [`tq2_0`] | any | multiple of 256 | n / 256 * 66 | f16 a block |
//! | [`iq2_bn`] | any | multiple of 64 | rows * (4 + columns / 4) | f32 a row |
//! | [`iq1_bn`] | any | multiple of 64 | rows * (2 + columns / 64 * 13) | f16 a row |
//! | [`tl1`] | multiple of BM | multiple of BK | n / 4 | a tensor of its own |
//! | [`tl2`] | multiple of BM | 256 or more, the rest after blocks of BK a multiple of 32 | see there | a tensor of its own |

use bitnet_contracts::Result;

mod base3;
mod blocks;
mod check;
pub mod hf_packed;
pub mod i2_s;
pub mod interleaved;
pub mod iq1_bn;
pub mod iq2_bn;
pub(crate) mod lookup_layout;
mod quantization;
pub mod tl1;
pub mod tl2;
pub mod tl_kernel;
pub mod tq1_0;
pub mod tq2_0;

pub(crate) use check::to_f16 as half_scale;
pub use check::usable_scale;
pub use hf_packed::HfPacked;
pub use i2_s::{I2S, I2sLayout};
pub use interleaved::InterleavedMatrix;
pub use iq1_bn::Iq1Bn;
pub use iq2_bn::Iq2Bn;
pub use quantization::Quantization;
pub use tl_kernel::TlKernel;
pub use tl1::Tl1;
pub use tl2::Tl2;
pub use tq1_0::Tq1_0;
pub use tq2_0::Tq2_0;

/// A packed matrix whose rows can be unpacked one at a time, by several threads at once.
pub trait PackedRows: std::fmt::Debug + Send + Sync {
    /// Writes the trits (-1, 0, 1) of row `row` into `out`, which has as many elements as the matrix has columns. `name` is for the
    /// error.
    ///
    /// # Errors
    /// `QuantizationError::InvalidCode` with the position of a code that is no trit.
    fn row(&self, name: &str, row: usize, out: &mut [i8]) -> Result<()>;
}

#[cfg(test)]
mod tests;
