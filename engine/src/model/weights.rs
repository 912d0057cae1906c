//! Weights in storage form: float matrices as the file has them, ternary matrices row by row.

use bitnet_contracts::{MemoryError, Result};
use half::bf16;

use crate::ternary::PackedRows;

/// A `[rows, columns]` matrix in the precision of the file (f16 is widened to f32).
#[derive(Debug)]
pub struct FloatMatrix {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) values: FloatValues,
}

#[derive(Debug)]
pub(super) enum FloatValues {
    Bf16(Vec<u16>),
    F32(Vec<f32>),
}

/// Some rows of a [`FloatMatrix`].
#[derive(Debug, Clone, Copy)]
pub enum FloatRows<'a> {
    /// bfloat16 bit patterns.
    Bf16 {
        /// Row-major values.
        values: &'a [u16],
        /// Columns of a row.
        columns: usize,
    },
    /// f32.
    F32 {
        /// Row-major values.
        values: &'a [f32],
        /// Columns of a row.
        columns: usize,
    },
}

impl FloatRows<'_> {
    /// One of the rows.
    pub(crate) fn row(&self, row: usize) -> FloatRows<'_> {
        match *self {
            FloatRows::Bf16 { values, columns } => {
                FloatRows::Bf16 { values: &values[row * columns..(row + 1) * columns], columns }
            }
            FloatRows::F32 { values, columns } => {
                FloatRows::F32 { values: &values[row * columns..(row + 1) * columns], columns }
            }
        }
    }

    /// Copies the values into `out`, widened to f32 (exact).
    pub(crate) fn widen(&self, out: &mut [f32]) {
        match self {
            FloatRows::Bf16 { values, .. } => {
                out.iter_mut().zip(*values).for_each(|(o, &v)| *o = bf16::from_bits(v).to_f32())
            }
            FloatRows::F32 { values, .. } => out.copy_from_slice(values),
        }
    }
}

impl FloatMatrix {
    /// A matrix of bfloat16 bit patterns, row-major.
    pub(crate) fn from_bf16(rows: usize, columns: usize, values: Vec<u16>) -> Self {
        assert_eq!(values.len(), rows * columns);
        Self { rows, columns, values: FloatValues::Bf16(values) }
    }

    #[cfg(test)]
    pub(crate) fn from_f32(rows: usize, columns: usize, values: Vec<f32>) -> Self {
        assert_eq!(values.len(), rows * columns);
        Self { rows, columns, values: FloatValues::F32(values) }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> usize {
        match &self.values {
            FloatValues::Bf16(v) => v.capacity() * 2,
            FloatValues::F32(v) => v.capacity() * 4,
        }
    }

    /// Rows `first .. first + count`.
    pub(crate) fn view(&self, first: usize, count: usize) -> FloatRows<'_> {
        let columns = self.columns;
        let range = first * columns..(first + count) * columns;
        match &self.values {
            FloatValues::Bf16(v) => FloatRows::Bf16 { values: &v[range], columns },
            FloatValues::F32(v) => FloatRows::F32 { values: &v[range], columns },
        }
    }

    /// Whether all values are -s, 0 or s of one s.
    pub fn is_ternary(&self) -> bool {
        self.ternary_scale().is_some()
    }

    /// The s of a matrix of nothing but -s, 0 and s; None for any other and for one of zeroes.
    pub(super) fn ternary_scale(&self) -> Option<f32> {
        let mut row = vec![0f32; self.columns];
        let mut scale = None;
        for r in 0..self.rows {
            self.row(r, &mut row);
            for magnitude in row.iter().map(|w| w.abs()).filter(|&m| m != 0.0) {
                if *scale.get_or_insert(magnitude) != magnitude {
                    return None;
                }
            }
        }
        scale
    }

    /// Copies row `row` into `out`, widened to f32 (exact).
    pub fn row(&self, row: usize, out: &mut [f32]) {
        self.view(row, 1).widen(out);
    }
}

/// A ternary matrix in a checkpoint: `[rows, columns]` trits and the number that a trit of 1 stands for.
#[derive(Debug)]
pub struct TernaryTensor<'a> {
    pub(super) name: String,
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) scale: f32,
    pub(super) source: TernarySource<'a>,
}

#[derive(Debug)]
pub(super) enum TernarySource<'a> {
    Packed(Box<dyn PackedRows + 'a>),
    /// Master weights, ternarised by absmean as `transformers` `WeightQuant` does: `clamp(round(w * inverse), -1, 1)`.
    Master {
        values: FloatMatrix,
        inverse: f32,
    },
}

impl TernaryTensor<'_> {
    /// Master weights, ternarised by absmean: the scale is the mean magnitude, at least 1e-5.
    pub(super) fn from_master(name: String, values: FloatMatrix) -> Self {
        let (rows, columns) = (values.rows, values.columns);
        let mut row = vec![0f32; columns];
        let mut sum = 0f64;
        for r in 0..rows {
            values.row(r, &mut row);
            sum += row.iter().map(|w| f64::from(w.abs())).sum::<f64>();
        }
        let inverse = 1.0 / ((sum / (rows as f64 * columns as f64)) as f32).max(1e-5);
        Self { name, rows, columns, scale: 1.0 / inverse, source: TernarySource::Master { values, inverse } }
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The dense value of trit 1, whatever the file's scale means.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// All trits, row by row.
    ///
    /// # Errors
    /// As [`Self::row`], and `MemoryError::AllocationFailed`.
    pub fn trits(&self) -> Result<Vec<i8>> {
        let mut out: Vec<i8> = Vec::new();
        // As large as the file accounts for: the shape was held against it.
        let bytes = self.rows * self.columns;
        out.try_reserve_exact(bytes)
            .map_err(|e| MemoryError::AllocationFailed { size_bytes: bytes, reason: e.to_string() })?;
        out.resize(bytes, 0);
        out.chunks_exact_mut(self.columns).enumerate().try_for_each(|(r, row)| self.row(r, row))?;
        Ok(out)
    }

    /// Writes the trits (-1, 0, 1) of row `row` into `out`, which has `columns` elements.
    ///
    /// # Errors
    /// `QuantizationError::InvalidCode` for a code that is no trit.
    pub fn row(&self, row: usize, out: &mut [i8]) -> Result<()> {
        match &self.source {
            TernarySource::Packed(packed) => packed.row(&self.name, row, out),
            TernarySource::Master { values, inverse } => {
                let mut floats = vec![0f32; self.columns];
                values.row(row, &mut floats);
                for (o, w) in out.iter_mut().zip(floats) {
                    *o = (w * inverse).round_ties_even().clamp(-1.0, 1.0) as i8;
                }
                Ok(())
            }
        }
    }
}
