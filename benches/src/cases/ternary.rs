//! The ternary product.

use std::rc::Rc;

use bitnet_contracts::Result;
use bitnet_engine::kernels::{Isa, Kernels, QuantizedActivations, TernaryJob, Threads, ternary_matmul};
use bitnet_engine::ternary::interleaved::{InterleavedMatrix, Packing, TritSource};

use super::{Case, Outcome, Work, check};

/// Rows and columns of a matrix.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub columns: usize,
}

/// Packed weights, which several cases can share.
pub struct TernaryWeights(InterleavedMatrix);

impl TernaryWeights {
    /// Made-up trits in `packing`.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`.
    pub fn new(shape: Shape, packing: Packing, threads: &Threads) -> Result<Self> {
        let row = |row: usize, out: &mut [i8]| {
            out.iter_mut().enumerate().for_each(|(column, t)| *t = trit(row, column));
            Ok(())
        };
        let source = TritSource { rows: shape.rows, columns: shape.columns, scale: 1.0, row: &row };
        let kernels = Kernels::of(Isa::best())?.with_packing(packing);
        Ok(Self(InterleavedMatrix::pack(&source, kernels, threads)?))
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.0.memory_bytes()
    }
}

fn trit(row: usize, column: usize) -> i8 {
    ((row * 31 + column * 17 + row * column) % 3) as i8 - 1
}

/// Integers with absmax 127, so that the quantiser leaves them as they are.
fn activation(token: usize, column: usize) -> f32 {
    ((token * 37 + column * 101) % 255) as f32 - 127.0
}

/// A product of weights and the activations of some tokens.
pub struct TernaryCase {
    weights: Rc<TernaryWeights>,
    kernels: &'static Kernels,
    threads: Threads,
    activations: QuantizedActivations,
    tokens: usize,
    out: Vec<f32>,
}

impl TernaryCase {
    /// `tokens` tokens.
    ///
    /// # Errors
    /// What the quantiser reports.
    pub fn new(weights: Rc<TernaryWeights>, kernels: &Kernels, threads: &Threads, tokens: usize) -> Result<Self> {
        let (rows, columns) = (weights.0.rows(), weights.0.columns());
        let kernels = kernels.with_packing(weights.0.packing());
        let x: Vec<f32> = (0..tokens * columns).map(|i| activation(i / columns, i % columns)).collect();
        let mut activations = QuantizedActivations::default();
        activations.quantize(kernels, threads, &x, columns, &|| "made-up activations".to_string())?;
        Ok(Self { weights, kernels, threads: threads.clone(), activations, tokens, out: vec![0.0; tokens * rows] })
    }
}

impl Case for TernaryCase {
    fn run(&mut self) -> Result<()> {
        let job = TernaryJob { weights: &self.weights.0, out: &mut self.out, add: false };
        ternary_matmul(self.kernels, &self.threads, &self.activations, [job]);
        Ok(())
    }

    fn verify(&self) -> Outcome {
        let (rows, columns) = (self.weights.0.rows(), self.weights.0.columns());
        let k = (1.0f32 / 127.0) * 127.0;
        for (token, row) in [(0, 0), (self.tokens - 1, rows - 1), (self.tokens / 2, rows / 2)] {
            let sum: i32 = (0..columns).map(|c| i32::from(trit(row, c)) * activation(token, c) as i32).sum();
            let (is, should) = (self.out[token * rows + row], sum as f32 / k);
            check(is == should, || format!("row {row} of token {token}: {is}, not {should}"))?;
        }
        Ok(())
    }

    fn work(&self) -> Work {
        if self.tokens == 1 {
            Work::Memory(self.weights.bytes())
        } else {
            Work::Products(self.tokens * self.weights.0.rows() * self.weights.0.columns())
        }
    }
}
