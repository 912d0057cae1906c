//! Parts of a pass by themselves, as `forward/` calls them but without a model around them: for benches and for counting instructions.
//! Not an interface to build on.

use bitnet_contracts::{ConfigurationError, ForwardPassError, Result};

use crate::forward::CpuCache;
use crate::kernels::{
    AttendArgs, HeadAndState, HeadScreen, Kernels, KvFormat, QuantizedActivations, RowFailure, ScreenScratch, Threads,
    head_matmul,
};
use crate::model::{Activation, FloatMatrix, FloatTable, ModelDescription, WeightScale};

/// An error unless `right`.
fn expect(right: bool, parameter: &str, value: usize, valid_range: &str) -> Result<()> {
    if right {
        return Ok(());
    }
    let (parameter, valid_range) = (parameter.to_string(), valid_range.to_string());
    Err(ConfigurationError::InvalidParameter { parameter, value: value.to_string(), valid_range }.into())
}

/// RMSNorm of every row of `x`, `[tokens, gain.len()]`, then int8: into `out`.
///
/// # Errors
/// `ConfigurationError::InvalidParameter` when `x` is not whole rows; `ForwardPassError::NumericalInstability` for NaN, infinity, and
/// rows whose mean square overflows.
pub fn norm_and_quantize(
    kernels: &Kernels,
    threads: &Threads,
    x: &[f32],
    gain: &[f32],
    eps: f32,
    out: &mut QuantizedActivations,
) -> Result<()> {
    let width = gain.len();
    expect(width > 0 && x.len().is_multiple_of(width), "floats", x.len(), "whole rows of the gain's width")?;
    let row =
        |r: usize, out: &mut [f32], _: &mut [f32]| kernels.rms_norm(&x[r * width..(r + 1) * width], gain, eps, out);
    out.fill(kernels, threads, x.len() / width, width, row).map_err(|failure: RowFailure| {
        ForwardPassError::NumericalInstability { details: format!("NaN or infinity: {failure:?}") }.into()
    })
}

/// An output head in bf16, with its screen.
pub struct Head {
    table: FloatTable,
    screen: HeadScreen,
    scratch: ScreenScratch,
}

impl Head {
    /// A head of rows of `columns` bf16 bit patterns.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` unless `values` is whole rows, one at least; `MemoryError::AllocationFailed`.
    pub fn from_bf16(kernels: &Kernels, threads: &Threads, columns: usize, values: Vec<u16>) -> Result<Head> {
        let whole = columns > 0 && !values.is_empty() && values.len().is_multiple_of(columns);
        expect(whole, "values of the head", values.len(), "whole rows, one at least")?;
        let table = FloatTable::from(FloatMatrix::from_bf16(values.len() / columns, columns, values));
        let screen = HeadScreen::new(&table, kernels, threads)?;
        Ok(Head { table, screen, scratch: ScreenScratch::default() })
    }

    /// Bytes of the head.
    pub fn bytes(&self) -> usize {
        self.table.value_bytes()
    }

    /// Bytes of the screen.
    pub fn screen_bytes(&self) -> usize {
        self.screen.memory_bytes()
    }

    /// Every logit of one state, `[columns]`, into `out`, `[rows]`.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` for another shape.
    pub fn logits(&self, kernels: &Kernels, threads: &Threads, hidden: &[f32], out: &mut [f32]) -> Result<()> {
        expect(hidden.len() == self.table.columns(), "state", hidden.len(), "as many as the head's columns")?;
        expect(out.len() == self.table.rows(), "logits", out.len(), "as many as the head's rows")?;
        head_matmul(kernels, threads, &self.table, hidden, out)
    }

    /// Row and logit of the largest, and of every row that was looked at on the way, by row, found with the screen. None when the whole
    /// head is the better way.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` for a state of another width.
    pub fn largest(&mut self, kernels: &Kernels, threads: &Threads, hidden: &[f32]) -> Result<Option<&[(u32, f32)]>> {
        expect(hidden.len() == self.table.columns(), "state", hidden.len(), "as many as the head's columns")?;
        let Head { table, screen, scratch } = self;
        let state = HeadAndState { head: table, hidden };
        let found = screen.largest(&state, kernels, threads, 1, &[], scratch);
        Ok(found.then(|| self.scratch.logits()))
    }
}

/// The description of a model of one layer, of which only the shape of the cache counts. No model is loaded for it: that would leave
/// memory in another state every time.
fn one_layer(kv_heads: usize, head_dim: usize) -> ModelDescription {
    ModelDescription {
        hidden_size: kv_heads * head_dim,
        intermediate_size: 0,
        num_layers: 1,
        num_attention_heads: kv_heads,
        num_key_value_heads: kv_heads,
        vocab_size: 0,
        max_position_embeddings: 0,
        rope_theta: 1e4,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        activation: Activation::Relu2,
        weight_scale: WeightScale::Multiply,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
        model_type: String::new(),
        name: None,
        version: String::new(),
    }
}

/// Attention over keys and values in the engine's cache: one layer, one sequence.
pub struct Attention {
    cache: CpuCache,
    kv_heads: usize,
    head_dim: usize,
    positions: usize,
    scores: Vec<f32>,
}

impl Attention {
    /// Keys and values of all `positions`, `[positions, KV heads, head_dim]`.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` when the shapes do not fit; `MemoryError::AllocationFailed`.
    pub fn new(kv_heads: usize, head_dim: usize, keys: &[f32], values: &[f32]) -> Result<Attention> {
        let width = kv_heads.saturating_mul(head_dim);
        let whole = width > 0 && !keys.is_empty() && keys.len().is_multiple_of(width);
        expect(whole, "keys", keys.len(), "whole positions, one at least")?;
        expect(values.len() == keys.len(), "values", values.len(), "as many as keys")?;
        let mut cache = CpuCache::new(&one_layer(kv_heads, head_dim), KvFormat::F32);
        let positions = keys.len() / width;
        cache.reserve(1, positions)?;
        for (position, (key, value)) in keys.chunks_exact(width).zip(values.chunks_exact(width)).enumerate() {
            expect(
                cache.write(0, 0, position, key, value),
                "position",
                position,
                "keys and values that the cache can keep",
            )?;
        }
        Ok(Attention { cache, kv_heads, head_dim, positions, scores: Vec::new() })
    }

    /// Bytes of the keys and values at one position.
    pub fn bytes_per_position(&self) -> usize {
        self.cache.bytes_per_position()
    }

    /// Attention of `queries`, `[KV heads, group, head_dim]`, over positions `0 .. total`, into `out` of the same shape; on the caller's
    /// thread.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` when the shapes do not fit.
    pub fn attend(&mut self, kernels: &Kernels, total: usize, queries: &[f32], out: &mut [f32]) -> Result<()> {
        let (d, width) = (self.head_dim, queries.len() / self.kv_heads);
        let whole = width > 0 && queries.len() == width * self.kv_heads && width.is_multiple_of(d);
        expect(whole, "queries", queries.len(), "whole groups of whole heads")?;
        expect(out.len() == queries.len(), "outputs", out.len(), "as many as queries")?;
        expect((1..=self.positions).contains(&total), "total", total, "from 1 to the positions held")?;
        let Attention { cache, scores, .. } = self;
        for (head, (queries, out)) in queries.chunks_exact(width).zip(out.chunks_exact_mut(width)).enumerate() {
            let args = AttendArgs {
                queries,
                keys: &|page| cache.keys(0, 0, head, page),
                values: &|page| cache.values(0, 0, head, page),
                total,
                head_dim: d,
            };
            scores.resize(args.score_floats(), 0.0);
            kernels.attend(&args, scores, out);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        let (kernels, threads) = (Kernels::of(Isa::Portable).unwrap(), Threads::new(Some(1)).unwrap());
        let mut q = QuantizedActivations::default();
        assert!(norm_and_quantize(kernels, &threads, &[1.0; 7], &[1.0; 4], 1e-5, &mut q).is_err());
        assert!(norm_and_quantize(kernels, &threads, &[1.0; 7], &[], 1e-5, &mut q).is_err());
        assert!(norm_and_quantize(kernels, &threads, &[f32::NAN; 4], &[1.0; 4], 1e-5, &mut q).is_err());
        assert!(Head::from_bf16(kernels, &threads, 0, vec![0; 4]).is_err());
        assert!(Head::from_bf16(kernels, &threads, 3, vec![0; 4]).is_err());
        let mut head = Head::from_bf16(kernels, &threads, 2, vec![0; 64]).unwrap();
        assert!(head.logits(kernels, &threads, &[1.0; 2], &mut [0.0; 31]).is_err());
        assert!(head.logits(kernels, &threads, &[1.0; 3], &mut [0.0; 32]).is_err());
        assert!(head.largest(kernels, &threads, &[1.0; 3]).is_err());
        assert!(Attention::new(0, 4, &[], &[]).is_err());
        assert!(Attention::new(2, 4, &[0.0; 12], &[0.0; 12]).is_err());
        let mut attention = Attention::new(2, 4, &[0.0; 16], &[0.0; 16]).unwrap();
        for (total, queries, outputs) in [(0, 8, 8), (3, 8, 8), (2, 7, 7), (2, 8, 7), (2, 0, 0)] {
            let outcome = attention.attend(kernels, total, &vec![0.0; queries], &mut vec![0.0; outputs]);
            assert!(outcome.is_err(), "{total}, {queries} queries, {outputs} outputs");
        }
        assert!(attention.attend(kernels, 2, &[0.0; 16], &mut [0.0; 16]).is_ok());
    }
}
