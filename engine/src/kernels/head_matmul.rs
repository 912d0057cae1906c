//! The output head: hidden states against every row of a float matrix.

use std::cell::RefCell;
use std::sync::Mutex;

use bitnet_contracts::Result;

use super::columns::Columns;
use super::{Kernels, Threads};
use crate::model::FloatTable;

/// Head rows in one piece of work: 64 bf16 rows of the 2B model are 320 KiB.
const PIECE: usize = 64;
/// Multiply-accumulates below which threads are not worth their start.
const WORTH_MACS: usize = 1 << 18;

thread_local! {
    /// Products of one piece, `[rows, tokens]`.
    static PRODUCTS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `out[t][v] = hidden[t] . head[v]` in f32; `hidden` is `[tokens, columns]`, `out` `[tokens, rows]`.
///
/// Each value is one dot product in one fixed order: neither threads nor the number of tokens show in it.
///
/// # Errors
/// `ModelError::LoadingFailed` when a head that stays in its file can no longer be read.
///
/// # Panics
/// When the shapes do not fit (a bug of the caller).
pub(crate) fn head_matmul(
    kernels: &Kernels,
    threads: &Threads,
    head: &FloatTable,
    hidden: &[f32],
    out: &mut [f32],
) -> Result<()> {
    let (rows, columns) = (head.rows(), head.columns());
    let tokens = hidden.len() / columns;
    assert!(hidden.len() == tokens * columns && out.len() == tokens * rows, "head shapes");
    if tokens == 0 {
        return Ok(());
    }
    let out = Columns::new(out, rows);
    let failure = Mutex::new(None);
    threads.for_each(rows.div_ceil(PIECE), tokens * rows * columns >= WORTH_MACS, |piece| {
        let first = piece * PIECE;
        let count = PIECE.min(rows - first);
        PRODUCTS.with_borrow_mut(|products| {
            products.resize(count * tokens, 0.0);
            let outcome = head.with_rows(first, count, |rows| kernels.head(rows, hidden, tokens, products));
            if let Err(error) = outcome {
                *failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
                return;
            }
            for t in 0..tokens {
                // SAFETY: the pieces are distinct ranges of columns, and the output is borrowed for this call.
                let out = unsafe { out.slice(t, first, count) };
                for (o, product) in out.iter_mut().zip(products.chunks_exact(tokens)) {
                    *o = product[t];
                }
            }
        });
    });
    failure.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
}
