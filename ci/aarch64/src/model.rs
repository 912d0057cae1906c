//! The float matrices, which are the engine's own, and a table of one that is in memory.

#[path = "../../../engine/src/model/weights.rs"]
mod weights;

pub use weights::{FloatMatrix, FloatRows, TernaryTensor};

use crate::Result;

/// Stands in for the engine's table, which may also stay in its file.
#[derive(Debug)]
pub(crate) struct FloatTable(FloatMatrix);

impl From<FloatMatrix> for FloatTable {
    fn from(matrix: FloatMatrix) -> Self {
        Self(matrix)
    }
}

impl FloatTable {
    pub(crate) fn rows(&self) -> usize {
        self.0.rows()
    }

    pub(crate) fn columns(&self) -> usize {
        self.0.columns()
    }

    pub(crate) fn with_rows<R>(&self, first: usize, count: usize, f: impl FnOnce(FloatRows<'_>) -> R) -> Result<R> {
        Ok(f(self.0.view(first, count)))
    }

    pub(crate) fn row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        self.0.row(row, out);
        Ok(())
    }
}
