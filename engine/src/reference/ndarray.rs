//! The fp32 semantics on ndarray, in f64.

use bitnet_contracts::{Device, ForwardPassError, InferenceError, Result, Tensor};
use ndarray::{ArcArray, Array1, Array2, Array4, ArrayView1, Axis, Ix4, ShapeError, concatenate, s};

use super::engine::{Clock, DenseEngine, DenseModel, Input, Pass, unstable};
use super::weights::Weights;
use crate::model::{Activation, Checkpoint, ModelDescription};

/// The backend `ndarray-fp32`: the fp32 semantics in f64 from the embedding to the logits, which are rounded to f32 at the very end.
///
/// It computes on the caller's thread, however many [`EngineOptions::threads`](crate::EngineOptions) asks for. Exponentials and
/// angles come from `libm`.
pub type NdarrayFp32 = DenseEngine<NdarrayModel>;

/// The arithmetic of [`NdarrayFp32`].
pub struct NdarrayModel {
    description: ModelDescription,
    weights: Weights<Array2<f64>, Array1<f64>>,
}

/// Keys, rotated, and values of a layer, each `[batch, KV heads, positions, head dimension]`.
#[derive(Clone)]
pub struct KeysValues {
    keys: ArcArray<f64, Ix4>,
    values: ArcArray<f64, Ix4>,
}

impl DenseModel for NdarrayModel {
    const NAME: &'static str = "ndarray-fp32";
    const NUMBER_BYTES: usize = size_of::<f64>();
    type Layer = KeysValues;

    fn load(checkpoint: &Checkpoint, _threads: Option<usize>) -> Result<Self> {
        let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<f64>>();
        Ok(Self {
            description: checkpoint.description().clone(),
            weights: Weights::load(
                checkpoint,
                |values, rows, columns| Array2::from_shape_vec((rows, columns), wide(values)).map_err(shape_error),
                |values| Ok(Array1::from_vec(wide(values))),
            )?,
        })
    }

    fn weight_elements(&self) -> usize {
        self.weights.elements(Array2::len, Array1::len)
    }

    fn layer_elements(layer: &KeysValues) -> usize {
        layer.keys.len() + layer.values.len()
    }

    fn forward(&self, input: &Input<'_>, past: &[KeysValues], clock: &mut Clock) -> Result<Pass<KeysValues>> {
        let d = &self.description;
        let (batch, seq) = (input.batch, input.seq);
        let mut x = self.embed(input.tokens);
        let turns = self.turns(input.start, seq);
        clock.lap(|c| &mut c.embedding);

        let mut layers = Vec::new();
        let mut attention = input.attention.then(Vec::new);
        for (n, w) in self.weights.layers.iter().enumerate() {
            let normed = self.norm(&x, &w.input_norm, "the input of the input norm", Some(n))?;
            clock.lap(|c| &mut c.normalization);
            let (mut q, mut k, v) = (linear(&normed, &w.q), linear(&normed, &w.k), linear(&normed, &w.v));
            self.rotate(&mut q, &turns, seq);
            self.rotate(&mut k, &turns, seq);
            let kv = self.append(past.get(n), input, k, v)?;
            let attended = self.attend(n, &q, &kv, input, attention.as_mut())?;
            layers.push(kv);
            clock.lap(|c| &mut c.attention);
            let normed = self.norm(&attended, &w.attention_sub_norm, "the input of the attention sub-norm", Some(n))?;
            clock.lap(|c| &mut c.normalization);
            x += &linear(&normed, &w.o);
            clock.lap(|c| &mut c.attention);

            let normed = self.norm(&x, &w.post_attention_norm, "the input of the post-attention norm", Some(n))?;
            clock.lap(|c| &mut c.normalization);
            let (gate, mut gated) = (linear(&normed, &w.gate), linear(&normed, &w.up));
            // Squared relu makes a zero of minus infinity, and of NaN.
            check_finite(&gate, "the gate", Some(n))?;
            match d.activation {
                Activation::Relu2 => gated.zip_mut_with(&gate, |up, &gate| *up *= gate.max(0.0) * gate.max(0.0)),
                Activation::Silu => gated.zip_mut_with(&gate, |up, &gate| *up *= gate / (1.0 + libm::exp(-gate))),
            }
            clock.lap(|c| &mut c.feed_forward);
            let normed = self.norm(&gated, &w.ffn_sub_norm, "the input of the FFN sub-norm", Some(n))?;
            clock.lap(|c| &mut c.normalization);
            x += &linear(&normed, &w.down);
            clock.lap(|c| &mut c.feed_forward);
        }

        if !input.every_position {
            let last: Vec<usize> = (1..=batch).map(|b| b * seq - 1).collect();
            x = x.select(Axis(0), &last);
        }
        let normed = self.norm(&x, &self.weights.norm, "the input of the final norm", None)?;
        clock.lap(|c| &mut c.normalization);
        let logits: Vec<f32> = linear(&normed, self.weights.head()).iter().map(|&l| l as f32).collect();
        if !logits.iter().all(|l| l.is_finite()) {
            return Err(unstable("the logits", None));
        }
        clock.lap(|c| &mut c.logits);
        let hidden =
            || Tensor::from_vec(normed.iter().map(|&x| x as f32).collect(), (batch, (), d.hidden_size), &Device::Cpu);
        Ok(Pass {
            logits,
            attention,
            hidden: if input.hidden { Some(hidden()?) } else { None },
            layers,
            scores: seq * (input.start + seq),
        })
    }
}

impl NdarrayModel {
    /// Embedding rows, `[tokens, H]`.
    fn embed(&self, tokens: &[u32]) -> Array2<f64> {
        let rows: Vec<usize> = tokens.iter().map(|&t| t as usize).collect();
        self.weights.embedding.select(Axis(0), &rows)
    }

    /// RMSNorm of the rows of `x`. Refuses rows whose mean square is not finite: they would come out as finite zeroes.
    fn norm(&self, x: &Array2<f64>, gain: &Array1<f64>, place: &str, layer: Option<usize>) -> Result<Array2<f64>> {
        let mut out = x.clone();
        for mut row in out.rows_mut() {
            let mean = row.dot(&row) / row.len() as f64;
            if !mean.is_finite() {
                return Err(unstable(place, layer));
            }
            let factor = 1.0 / (mean + self.description.rms_norm_eps).sqrt();
            row.zip_mut_with(gain, |x, g| *x = *x * factor * g);
        }
        Ok(out)
    }

    /// Cosine and sine of every angle of the new positions, `[seq][d/2]`.
    fn turns(&self, start: usize, seq: usize) -> Vec<Vec<(f64, f64)>> {
        let (theta, d) = (self.description.rope_theta, self.description.head_dim());
        let frequencies: Vec<f64> = (0..d / 2).map(|i| 1.0 / libm::pow(theta, (2 * i) as f64 / d as f64)).collect();
        let turn = |position: usize, w: &f64| (libm::cos(position as f64 * w), libm::sin(position as f64 * w));
        (start..start + seq).map(|position| frequencies.iter().map(|w| turn(position, w)).collect()).collect()
    }

    /// RoPE on every head of `x`, `[batch * seq, heads * d]`, half split: the pair `(i, i + d/2)` turns by angle `i`.
    fn rotate(&self, x: &mut Array2<f64>, turns: &[Vec<(f64, f64)>], seq: usize) {
        let d = self.description.head_dim();
        for (r, mut row) in x.rows_mut().into_iter().enumerate() {
            for mut head in row.exact_chunks_mut(d) {
                for (i, (cos, sin)) in turns[r % seq].iter().enumerate() {
                    let (a, b) = (head[i], head[i + d / 2]);
                    head[i] = a * cos - b * sin;
                    head[i + d / 2] = a * sin + b * cos;
                }
            }
        }
    }

    /// The first positions of the past with the new ones, `[batch * seq, KV heads * d]`, behind them.
    fn append(
        &self,
        past: Option<&KeysValues>,
        input: &Input<'_>,
        keys: Array2<f64>,
        values: Array2<f64>,
    ) -> Result<KeysValues> {
        let d = &self.description;
        let shape = (input.batch, input.seq, d.num_key_value_heads, d.head_dim());
        let join = |past: Option<&ArcArray<f64, Ix4>>, new: Array2<f64>| -> Result<ArcArray<f64, Ix4>> {
            let new = new.into_shape_with_order(shape).map_err(shape_error)?.permuted_axes([0, 2, 1, 3]);
            let joined: Array4<f64> = match past.filter(|_| input.start > 0) {
                Some(past) => {
                    let past = past.slice(s![.., .., ..input.start, ..]);
                    concatenate(Axis(2), &[past, new.view()]).map_err(shape_error)?
                }
                None => new.as_standard_layout().into_owned(),
            };
            Ok(joined.into_shared())
        };
        Ok(KeysValues { keys: join(past.map(|p| &p.keys), keys)?, values: join(past.map(|p| &p.values), values)? })
    }

    /// Causal attention of `q`, `[batch * seq, heads * d]`; gives the same shape. `probabilities` takes those of the layer.
    fn attend(
        &self,
        layer: usize,
        q: &Array2<f64>,
        kv: &KeysValues,
        input: &Input<'_>,
        probabilities: Option<&mut Vec<Tensor>>,
    ) -> Result<Array2<f64>> {
        let (batch, seq, total) = (input.batch, input.seq, input.start + input.seq);
        let (heads, group, d) =
            (self.description.num_attention_heads, self.description.group_size(), self.description.head_dim());
        let mut out = Array2::zeros(q.raw_dim());
        let mut recorded = Vec::new();
        for b in 0..batch {
            for h in 0..heads {
                let place = s![b * seq..(b + 1) * seq, h * d..(h + 1) * d];
                let keys = kv.keys.slice(s![b, h / group, .., ..]);
                let mut scores = q.slice(place).dot(&keys.t()) / (d as f64).sqrt();
                // A score of minus infinity would come out as a probability of zero.
                check_finite(&scores, "the attention scores", Some(layer))?;
                for (t, row) in scores.rows_mut().into_iter().enumerate() {
                    let (mut seen, mut future) = row.split_at(Axis(0), input.start + t + 1);
                    let largest = seen.fold(f64::NEG_INFINITY, |m, &s| m.max(s));
                    seen.mapv_inplace(|s| libm::exp(s - largest));
                    let sum = seen.sum();
                    seen.mapv_inplace(|e| e / sum);
                    future.fill(0.0);
                }
                out.slice_mut(place).assign(&scores.dot(&kv.values.slice(s![b, h / group, .., ..])));
                if probabilities.is_some() {
                    recorded.extend(scores.iter().map(|&p| p as f32));
                }
            }
        }
        if let Some(probabilities) = probabilities {
            probabilities.push(Tensor::from_vec(recorded, (batch, heads, seq, total), &Device::Cpu)?);
        }
        Ok(out)
    }
}

/// `x W^T` for `[rows, in]` and `[out, in]`.
fn linear(x: &Array2<f64>, weight: &Array2<f64>) -> Array2<f64> {
    if x.nrows() == 1 {
        // A matrix product would first copy all weights into its own order, for a single use of each.
        let x: ArrayView1<'_, f64> = x.row(0);
        return weight.dot(&x).insert_axis(Axis(0));
    }
    x.dot(&weight.t())
}

fn check_finite(x: &Array2<f64>, place: &str, layer: Option<usize>) -> Result<()> {
    if x.iter().all(|v| v.is_finite()) { Ok(()) } else { Err(unstable(place, layer)) }
}

fn shape_error(error: ShapeError) -> InferenceError {
    ForwardPassError::ComputationFailed { component: "ndarray".to_string(), reason: error.to_string() }.into()
}
