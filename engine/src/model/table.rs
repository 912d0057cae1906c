//! Embedding and head as the engine keeps them: in memory when small, else in their file, of which a step reads a few rows.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use bitnet_contracts::Result;

use super::checkpoint::Checkpoint;
use super::gguf::TensorType;
use super::mapped_file::FilePart;
use super::weights::{FloatMatrix, FloatRows};
use crate::kernels::Threads;

/// Bytes from which on a bf16 matrix stays in its file.
const STAYS: usize = 64 << 20;

/// A `[rows, columns]` float matrix whose rows are read some at a time.
#[derive(Debug)]
pub(crate) struct FloatTable {
    rows: usize,
    columns: usize,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Memory(FloatMatrix),
    /// bfloat16, little endian.
    File(FilePart),
}

thread_local! {
    /// Rows on their way from a file.
    static BUFFER: RefCell<Vec<u16>> = RefCell::default();
}

impl Checkpoint {
    /// A `[rows, columns]` float matrix, all finite; `in_memory` copies it out of the file whatever its size. Of one that stays in its
    /// file, `known` spares looking at the values.
    ///
    /// # Errors
    /// As [`Self::matrix`].
    pub(crate) fn table(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
        in_memory: bool,
        known: bool,
        threads: &Threads,
    ) -> Result<FloatTable> {
        self.table_from(name, rows, columns, if in_memory { usize::MAX } else { STAYS }, known, threads)
    }

    /// As [`Self::table`]; a bf16 matrix of `stays` bytes or more stays in its file.
    fn table_from(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
        stays: usize,
        known: bool,
        threads: &Threads,
    ) -> Result<FloatTable> {
        let bytes = self.stored_bytes(name, &[rows, columns])?;
        let part = self.stored_part(name)?;
        let stays = bytes.len() >= stays && self.stored_type(name)? == TensorType::Bf16;
        if let Some(part) = part.filter(|_| stays && bytes.len() == rows * columns * 2) {
            if known {
                return Ok(FloatTable { rows, columns, place: Place::File(part) });
            }
            /// Bytes between two releases: large, since every fault maps some pages around it.
            const PIECE: usize = 8 << 20;
            let finite = AtomicBool::new(true);
            threads.for_each(bytes.len().div_ceil(PIECE), true, |i| {
                let piece = &bytes[i * PIECE..bytes.len().min((i + 1) * PIECE)];
                // Magnitudes compare as integers, with infinity and NaN above every number.
                let magnitude = |b: &[u8; 2]| u16::from_le_bytes(*b) & 0x7fff;
                if piece.as_chunks::<2>().0.iter().map(magnitude).fold(0, u16::max) >= 0x7f80 {
                    finite.store(false, Ordering::Relaxed);
                }
                self.release_part(name, i * PIECE..(i + 1) * PIECE);
            });
            if !finite.into_inner() {
                // Names the tensor in the words of every other.
                let matrix = self.matrix(name, rows, columns)?;
                return Ok(FloatTable { rows, columns, place: Place::Memory(matrix) });
            }
            return Ok(FloatTable { rows, columns, place: Place::File(part) });
        }
        let matrix = self.matrix(name, rows, columns)?;
        Ok(FloatTable { rows, columns, place: Place::Memory(matrix) })
    }
}

impl From<FloatMatrix> for FloatTable {
    fn from(matrix: FloatMatrix) -> Self {
        Self { rows: matrix.rows(), columns: matrix.columns(), place: Place::Memory(matrix) }
    }
}

impl FloatTable {
    /// Number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Bytes of all values, wherever they are.
    pub(crate) fn value_bytes(&self) -> usize {
        match &self.place {
            Place::Memory(matrix) => matrix.memory_bytes(),
            Place::File(_) => self.rows * self.columns * 2,
        }
    }

    /// Bytes held in memory.
    pub(crate) fn memory_bytes(&self) -> usize {
        match &self.place {
            Place::Memory(matrix) => matrix.memory_bytes(),
            Place::File(_) => 0,
        }
    }

    /// Gives rows `first .. first + count` to `f`.
    ///
    /// # Errors
    /// `ModelError::LoadingFailed` when the file can no longer be read.
    pub(crate) fn with_rows<R>(&self, first: usize, count: usize, f: impl FnOnce(FloatRows<'_>) -> R) -> Result<R> {
        match &self.place {
            Place::Memory(matrix) => Ok(f(matrix.view(first, count))),
            Place::File(part) => BUFFER.with_borrow_mut(|values| {
                values.resize(count * self.columns, 0);
                part.read(first * self.columns * 2, bytemuck::cast_slice_mut(values))?;
                values.iter_mut().for_each(|v| *v = u16::from_le(*v));
                Ok(f(FloatRows::Bf16 { values, columns: self.columns }))
            }),
        }
    }

    /// Copies row `row` into `out`, widened to f32 (exact).
    ///
    /// # Errors
    /// As [`Self::with_rows`].
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) -> Result<()> {
        self.with_rows(row, 1, |rows| rows.widen(out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelSource;
    use bitnet_contracts::{InferenceError, ModelError};

    #[test]
    fn rows_in_the_file_are_those_in_memory_and_a_shortened_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let preset = fixtures::find_preset("gqa1-tied-bf16").unwrap();
        let (rows, columns) = (preset.spec.vocab, preset.spec.hidden);
        fixtures::synthesize(preset, 3, folder.path(), &mut |_| ()).unwrap();
        let checkpoint = Checkpoint::open(&ModelSource::Folder(folder.path().to_path_buf())).unwrap();
        let name = "model.embed_tokens.weight";
        let threads = Threads::new(Some(2)).unwrap();
        let stays = checkpoint.table_from(name, rows, columns, 0, false, &threads).unwrap();
        let copied = checkpoint.table(name, rows, columns, true, false, &threads).unwrap();
        assert_eq!((stays.memory_bytes(), copied.memory_bytes()), (0, rows * columns * 2));
        assert_eq!(stays.value_bytes(), copied.value_bytes());
        let (mut a, mut b) = (vec![0f32; columns], vec![1f32; columns]);
        for row in 0..rows {
            stays.row(row, &mut a).unwrap();
            copied.row(row, &mut b).unwrap();
            assert_eq!(a, b, "row {row}");
        }
        assert!(stays.row(rows, &mut a).is_err(), "a row behind the last");
        drop(checkpoint);
        let file = std::fs::OpenOptions::new().write(true).open(folder.path().join("model.safetensors")).unwrap();
        file.set_len(100).unwrap();
        let error = stays.row(rows - 1, &mut a).unwrap_err();
        assert!(matches!(error, InferenceError::Model(ModelError::LoadingFailed { .. })), "{error}");
    }
}
