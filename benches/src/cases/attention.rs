//! Attention.

use std::ops::Range;

use bitnet_contracts::Result;
use bitnet_engine::alone::Attention;
use bitnet_engine::kernels::Kernels;

use super::{Case, Outcome, Work, check, number};

/// Far above the error of f32 sums of so many terms (4e-6 at most was seen) and far below the outputs (2e-2 in the mean).
const TOLERANCE: f64 = 1e-4;

/// Attention of one position or several in turn, each over itself and all before it.
pub struct AttentionCase {
    kernels: Kernels,
    attention: Attention,
    heads: usize,
    group: usize,
    head_dim: usize,
    rows: Range<usize>,
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    /// `[rows, KV heads, group, head_dim]`.
    out: Vec<f32>,
}

impl AttentionCase {
    /// `heads` KV heads with `group` query heads each, for the positions in `rows`.
    ///
    /// # Errors
    /// As [`Attention::new`].
    pub fn new(kernels: &Kernels, (heads, group, head_dim): (usize, usize, usize), rows: Range<usize>) -> Result<Self> {
        let floats = rows.end * heads * head_dim;
        let keys: Vec<f32> = (0..floats).map(|i| 2.0 * number(i)).collect();
        let values: Vec<f32> = (0..floats).map(|i| number(i + floats)).collect();
        let queries: Vec<f32> = (0..heads * group * head_dim).map(|i| number(i + 3 * floats)).collect();
        Ok(Self {
            kernels: kernels.clone(),
            attention: Attention::new(heads, head_dim, &keys, &values)?,
            heads,
            group,
            head_dim,
            out: vec![0.0; rows.len() * queries.len()],
            rows,
            keys,
            values,
            queries,
        })
    }

    /// The output of one query head at one position.
    fn plain(&self, position: usize, head: usize) -> Vec<f64> {
        let d = self.head_dim;
        let at =
            |of: &[f32], position: usize, i: usize| f64::from(of[(position * self.heads + head / self.group) * d + i]);
        let score = |p: usize| -> f64 {
            (0..d).map(|i| f64::from(self.queries[head * d + i]) * at(&self.keys, p, i)).sum::<f64>()
                / (d as f64).sqrt()
        };
        let weights: Vec<f64> = (0..=position).map(|p| score(p).exp()).collect();
        let sum: f64 = weights.iter().sum();
        (0..d).map(|i| weights.iter().enumerate().map(|(p, w)| w * at(&self.values, p, i)).sum::<f64>() / sum).collect()
    }
}

impl Case for AttentionCase {
    fn run(&mut self) -> Result<()> {
        for (row, out) in self.rows.clone().zip(self.out.chunks_exact_mut(self.queries.len())) {
            self.attention.attend(&self.kernels, row + 1, &self.queries, out)?;
        }
        Ok(())
    }

    fn verify(&self) -> Outcome {
        let (d, heads) = (self.head_dim, self.heads * self.group);
        for (row, head) in [(0, 0), (self.rows.len() - 1, heads - 1)] {
            let position = self.rows.start + row;
            let out = &self.out[(row * heads + head) * d..][..d];
            for (i, (&is, should)) in out.iter().zip(self.plain(position, head)).enumerate() {
                check((f64::from(is) - should).abs() <= TOLERANCE, || {
                    format!("element {i} of head {head} at position {position}: {is}, not {should}")
                })?;
            }
        }
        Ok(())
    }

    fn work(&self) -> Work {
        let bytes = self.rows.clone().map(|row| (row + 1) * self.attention.bytes_per_position()).sum();
        if self.rows.len() == 1 { Work::Memory(bytes) } else { Work::Cache(bytes) }
    }
}
