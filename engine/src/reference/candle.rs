//! The fp32 semantics on candle's tensor operations, in f64.

use bitnet_contracts::{DType, Device, DeviceError, Result, Tensor};
use candle_core::D;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::engine::{Clock, DenseEngine, DenseModel, Input, Pass, unstable};
use super::weights::Weights;
use crate::model::{Activation, Checkpoint, ModelDescription};

/// Most queries of a sequence that attend together: bounds the scores held at once.
const QUERIES: usize = 128;

/// The backend `candle-fp32`: dense weights, candle's matrix products and element-wise operations on the CPU.
///
/// f64 from the embedding to the logits, which are rounded to f32 at the very end: in f32, two sound orders of summation differ by as
/// much as 4e-5 on checkpoints with outliers, too near to what a small fault does for a reference. Matrix products run on as many
/// threads as [`EngineOptions::threads`](crate::EngineOptions) says, in a pool of this engine; without that option on the
/// process-wide pool of rayon. The bits do not depend on it.
pub type CandleFp32 = DenseEngine<CandleModel>;

/// The arithmetic of [`CandleFp32`].
pub struct CandleModel {
    description: ModelDescription,
    weights: Weights<Tensor, Tensor>,
    pool: Option<ThreadPool>,
}

/// Keys, rotated, and values of a layer, each `[batch, KV heads, positions, head dimension]`.
#[derive(Clone)]
pub struct KeysValues {
    keys: Tensor,
    values: Tensor,
}

impl DenseModel for CandleModel {
    const NAME: &'static str = "candle-fp32";
    const NUMBER_BYTES: usize = size_of::<f64>();
    type Layer = KeysValues;

    fn load(checkpoint: &Checkpoint, threads: Option<usize>) -> Result<Self> {
        let pool = |n| {
            let built = ThreadPoolBuilder::new().num_threads(n).thread_name(|i| format!("candle-{i}")).build();
            built.map_err(|e| DeviceError::DeviceNotAvailable { device: format!("{n} CPU threads: {e}") })
        };
        Ok(Self {
            pool: threads.map(pool).transpose()?,
            description: checkpoint.description().clone(),
            weights: Weights::load(
                checkpoint,
                |values, rows, columns| {
                    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?.to_dtype(DType::F64)?)
                },
                |values| {
                    let len = values.len();
                    Ok(Tensor::from_vec(values, len, &Device::Cpu)?.to_dtype(DType::F64)?)
                },
            )?,
        })
    }

    fn weight_elements(&self) -> usize {
        self.weights.elements(Tensor::elem_count, Tensor::elem_count)
    }

    fn layer_elements(layer: &KeysValues) -> usize {
        layer.keys.elem_count() + layer.values.elem_count()
    }

    fn forward(&self, input: &Input<'_>, past: &[KeysValues], clock: &mut Clock) -> Result<Pass<KeysValues>> {
        match &self.pool {
            Some(pool) => pool.install(|| self.run(input, past, clock)),
            None => self.run(input, past, clock),
        }
    }
}

impl CandleModel {
    fn run(&self, input: &Input<'_>, past: &[KeysValues], clock: &mut Clock) -> Result<Pass<KeysValues>> {
        let d = &self.description;
        let (batch, seq, hidden) = (input.batch, input.seq, d.hidden_size);
        let ids = Tensor::from_slice(input.tokens, input.tokens.len(), &Device::Cpu)?;
        let mut x = self.weights.embedding.index_select(&ids, 0)?;
        let angles = self.angles(input.start, seq)?;
        clock.lap(|c| &mut c.embedding);

        let mut layers = Vec::new();
        let mut attention = input.attention.then(Vec::new);
        for (n, w) in self.weights.layers.iter().enumerate() {
            let normed = self.norm(&x, &w.input_norm, "the input of the input norm", Some(n))?;
            clock.lap(|c| &mut c.normalization);
            let q = rotate(&heads(&linear(&normed, &w.q)?, input, d.num_attention_heads)?, &angles)?;
            let k = rotate(&heads(&linear(&normed, &w.k)?, input, d.num_key_value_heads)?, &angles)?;
            let v = heads(&linear(&normed, &w.v)?, input, d.num_key_value_heads)?;
            let kv = append(past.get(n), input.start, k, v)?;
            let attended = self.attend(n, &q, &kv, input.start, attention.as_mut())?;
            layers.push(kv);
            clock.lap(|c| &mut c.attention);
            let normed = self.norm(&attended, &w.attention_sub_norm, "the input of the attention sub-norm", Some(n))?;
            clock.lap(|c| &mut c.normalization);
            x = (x + linear(&normed, &w.o)?)?;
            clock.lap(|c| &mut c.attention);

            let normed = self.norm(&x, &w.post_attention_norm, "the input of the post-attention norm", Some(n))?;
            clock.lap(|c| &mut c.normalization);
            let gate = linear(&normed, &w.gate)?;
            // Relu makes a zero of minus infinity, and of NaN.
            check_finite(&gate, "the gate", Some(n))?;
            let activated = match d.activation {
                Activation::Relu2 => gate.relu()?.sqr()?,
                Activation::Silu => gate.silu()?,
            };
            let gated = (activated * linear(&normed, &w.up)?)?;
            clock.lap(|c| &mut c.feed_forward);
            let normed = self.norm(&gated, &w.ffn_sub_norm, "the input of the FFN sub-norm", Some(n))?;
            clock.lap(|c| &mut c.normalization);
            x = (x + linear(&normed, &w.down)?)?;
            clock.lap(|c| &mut c.feed_forward);
        }

        if !input.every_position {
            x = x.reshape((batch, seq, hidden))?.narrow(1, seq - 1, 1)?.reshape((batch, hidden))?;
        }
        let normed = self.norm(&x, &self.weights.norm, "the input of the final norm", None)?;
        clock.lap(|c| &mut c.normalization);
        let logits = linear(&normed, self.weights.head())?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        if !logits.iter().all(|l| l.is_finite()) {
            return Err(unstable("the logits", None));
        }
        clock.lap(|c| &mut c.logits);
        Ok(Pass {
            logits,
            attention,
            hidden: if input.hidden { Some(normed.reshape((batch, (), hidden))?.to_dtype(DType::F32)?) } else { None },
            layers,
            scores: batch * d.num_attention_heads * seq.min(QUERIES) * (input.start + seq),
        })
    }

    /// RMSNorm of the rows of `x`, `[rows, n]`. Refuses infinities, which would come out as finite zeroes and NaN.
    fn norm(&self, x: &Tensor, gain: &Tensor, place: &str, layer: Option<usize>) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        if !mean.flatten_all()?.to_vec1::<f64>()?.iter().all(|m| m.is_finite()) {
            return Err(unstable(place, layer));
        }
        let factor = (mean + self.description.rms_norm_eps)?.sqrt()?.recip()?;
        Ok(x.broadcast_mul(&factor)?.broadcast_mul(gain)?)
    }

    /// Cosines and sines of the new positions, each `[seq, d/2]`.
    fn angles(&self, start: usize, seq: usize) -> Result<(Tensor, Tensor)> {
        let (theta, d) = (self.description.rope_theta, self.description.head_dim());
        let frequencies: Vec<f64> = (0..d / 2).map(|i| libm::pow(theta, -2.0 * i as f64 / d as f64)).collect();
        let table = |f: fn(f64) -> f64| {
            let angles = (start..start + seq).flat_map(|position| frequencies.iter().map(move |w| position as f64 * w));
            Tensor::from_vec(angles.map(f).collect(), (seq, d / 2), &Device::Cpu)
        };
        Ok((table(libm::cos)?, table(libm::sin)?))
    }

    /// Causal attention of `q`, `[batch, heads, seq, d]`; gives `[batch * seq, heads * d]`. `probabilities` takes those of the
    /// layer.
    fn attend(
        &self,
        layer: usize,
        q: &Tensor,
        kv: &KeysValues,
        start: usize,
        probabilities: Option<&mut Vec<Tensor>>,
    ) -> Result<Tensor> {
        let (batch, heads, seq, d) = q.dims4()?;
        let (kv_heads, group) = (self.description.num_key_value_heads, self.description.group_size());
        let q = q.affine(1.0 / (d as f64).sqrt(), 0.0)?.reshape((batch, kv_heads, group, seq, d))?;
        let (mut attended, mut recorded) = (Vec::new(), Vec::new());
        for first in (0..seq).step_by(QUERIES) {
            let n = QUERIES.min(seq - first);
            let seen = start + first + n;
            // The queries of a group share their keys and values: stacked, they are one matrix.
            let queries = q.narrow(3, first, n)?.reshape((batch, kv_heads, group * n, d))?;
            let scores = queries.matmul(&kv.keys.narrow(2, 0, seen)?.transpose(2, 3)?)?;
            // A score of minus infinity would come out as a probability of zero.
            check_finite(&scores, "the attention scores", Some(layer))?;
            let scores = scores.reshape((batch, heads, n, seen))?.broadcast_add(&causal_mask(n, seen)?)?;
            let weights = softmax(&scores)?;
            let values = kv.values.narrow(2, 0, seen)?;
            let out = weights.reshape((batch, kv_heads, group * n, seen))?.matmul(&values)?;
            attended.push(out.reshape((batch, heads, n, d))?.transpose(1, 2)?.reshape((batch, n, heads * d))?);
            if probabilities.is_some() {
                recorded.push(weights.pad_with_zeros(3, 0, start + seq - seen)?.to_dtype(DType::F32)?);
            }
        }
        if let Some(probabilities) = probabilities {
            probabilities.push(Tensor::cat(&recorded, 2)?);
        }
        Ok(Tensor::cat(&attended, 1)?.reshape((batch * seq, heads * d))?)
    }
}

/// `x W^T` for `[rows, in]` and `[out, in]`.
fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    Ok(x.matmul(&weight.t()?)?)
}

/// `[batch * seq, heads * d]` as `[batch, heads, seq, d]`.
fn heads(x: &Tensor, input: &Input<'_>, heads: usize) -> Result<Tensor> {
    Ok(x.reshape((input.batch, input.seq, heads, ()))?.transpose(1, 2)?.contiguous()?)
}

/// RoPE, half split: the pair `(i, i + d/2)` turns by angle `i` of its position.
fn rotate(x: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let turned_a = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let turned_b = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    Ok(Tensor::cat(&[turned_a, turned_b], D::Minus1)?)
}

/// The first `start` positions of the past with new ones behind them.
fn append(past: Option<&KeysValues>, start: usize, keys: Tensor, values: Tensor) -> Result<KeysValues> {
    let join = |past: &Tensor, new: &Tensor| Tensor::cat(&[&past.narrow(2, 0, start)?, new], 2);
    match past.filter(|_| start > 0) {
        Some(past) => Ok(KeysValues { keys: join(&past.keys, &keys)?, values: join(&past.values, &values)? }),
        None => Ok(KeysValues { keys, values }),
    }
}

/// `[n, seen]`: 0 where the query may look, minus infinity after it. The last query is at the last position seen.
fn causal_mask(n: usize, seen: usize) -> Result<Tensor> {
    let entry = |i: usize, j: usize| if j <= seen - n + i { 0.0 } else { f64::NEG_INFINITY };
    let entries = (0..n).flat_map(|i| (0..seen).map(move |j| entry(i, j))).collect();
    Ok(Tensor::from_vec(entries, (n, seen), &Device::Cpu)?)
}

/// Over the last dimension.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?)?.exp()?;
    Ok(e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?)
}

/// Zero times a finite number is 0, zero times any other is NaN.
fn check_finite(x: &Tensor, place: &str, layer: Option<usize>) -> Result<()> {
    let zeroes = x.affine(0.0, 0.0)?.sum_all()?.to_scalar::<f64>()?;
    if zeroes == 0.0 { Ok(()) } else { Err(unstable(place, layer)) }
}
