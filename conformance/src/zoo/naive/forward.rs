//! The forward pass, one token after another: embedding, layers, final norm, head.

use super::cache::Sequence;
use super::deviation::{At, Call, Deviation, Site};
use super::weights::{Ternary, Weights};
use crate::backend::Semantics;
use bitnet_contracts::{ForwardPassError, InferenceError, Result};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// A pass over the tokens of one sequence.
pub struct Pass<'a> {
    /// The model.
    pub weights: &'a Weights,
    /// Who answers at the points where engines differ.
    pub deviation: &'a dyn Deviation,
    /// Which of the two functions is computed.
    pub semantics: Semantics,
    /// The call that this pass belongs to.
    pub call: &'a Call,
    /// Where its time went.
    pub clock: &'a Clock,
}

/// Time by component.
#[derive(Debug, Default)]
pub struct Clock {
    /// Attention with its norms and projections.
    pub attention: Cell<Duration>,
    /// Feed-forward with its norms and projections.
    pub feed_forward: Cell<Duration>,
    /// The head.
    pub logits: Cell<Duration>,
}

fn add(counter: &Cell<Duration>, since: Instant) {
    counter.set(counter.get() + since.elapsed());
}

/// What a pass over some tokens gives.
#[derive(Debug, Default)]
pub struct Rows {
    /// `[tokens × vocab]`.
    pub logits: Vec<f32>,
    /// `[tokens × hidden]`, after the final norm.
    pub hidden: Vec<f32>,
    /// Of each layer, `[heads × tokens × total]`, where they were asked for.
    pub attention: Vec<Vec<f32>>,
}

/// NaN or infinity met at a place.
pub fn unstable(place: &str) -> InferenceError {
    ForwardPassError::NumericalInstability { details: format!("NaN or infinity in {place}") }.into()
}

impl Pass<'_> {
    /// Appends tokens to a sequence. On an error the sequence holds what it held, and no more is to be read from it than
    /// its `len` says.
    ///
    /// # Errors
    /// `NumericalInstability` naming the place.
    pub fn run(&self, sequence: &mut Sequence, index: usize, tokens: &[u32], attention: bool) -> Result<Rows> {
        let (layers, before) = (self.weights.layers.len(), sequence.len);
        let mut weights = vec![vec![Vec::new(); tokens.len()]; if attention { layers } else { 0 }];
        let mut rows = Rows::default();
        for (i, &token) in tokens.iter().enumerate() {
            let mut note = |layer: usize, scores: &[f32]| {
                if let Some(of_layer) = weights.get_mut(layer) {
                    of_layer[i].extend_from_slice(scores);
                }
            };
            let hidden = match self.step(sequence, index, token, &mut note) {
                Ok(hidden) => hidden,
                Err(error) => {
                    sequence.truncate(before);
                    return Err(error);
                }
            };
            let at =
                At { call: self.call, layer: layers, site: Site::Head, sequence: index, position: sequence.len - 1 };
            let begin = Instant::now();
            let mut logits = self.deviation.head(&at, self.weights, &hidden);
            add(&self.clock.logits, begin);
            self.deviation.logits(&at, token, &mut logits);
            if self.deviation.checks_output() && logits.iter().any(|x| !x.is_finite()) {
                sequence.truncate(before);
                return Err(unstable("the logits"));
            }
            rows.logits.extend(logits);
            rows.hidden.extend(hidden);
        }
        let (heads, total) = (self.weights.facts.heads, before + tokens.len());
        rows.attention = weights.into_iter().map(|of_layer| padded(&of_layer, heads, total)).collect();
        Ok(rows)
    }

    /// One token: the final, normed hidden state.
    fn step(
        &self,
        sequence: &mut Sequence,
        index: usize,
        token: u32,
        note: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<Vec<f32>> {
        let (w, d, facts) = (self.weights, self.deviation, &self.weights.facts);
        let position = sequence.len;
        let at = |layer, site| At { call: self.call, layer, site, sequence: index, position };
        let mut x = d.embed(&at(0, Site::Embedding), w, token);
        for (i, layer) in w.layers.iter().enumerate() {
            let begin = Instant::now();
            let n = d.norm(&at(i, Site::InputNorm), &x, &layer.input_norm, facts.rms_eps);
            let [mut q, mut k, mut v] =
                self.project(&at, i, &n, [(Site::Q, &layer.q), (Site::K, &layer.k), (Site::V, &layer.v)])?;
            let place = d.rope_position(&at(i, Site::Q), position);
            for head in q.chunks_exact_mut(facts.head_dim) {
                d.rope(&at(i, Site::Q), head, place, facts.rope_theta);
            }
            let place = d.rope_position(&at(i, Site::K), position);
            for head in k.chunks_exact_mut(facts.head_dim) {
                d.rope(&at(i, Site::K), head, place, facts.rope_theta);
            }
            d.remember(&at(i, Site::K), &mut k);
            d.remember(&at(i, Site::V), &mut v);
            sequence.keys[i].extend(k);
            sequence.values[i].extend(v);
            let attended = self.attend(sequence, &at(i, Site::Attention), &q, note);
            let n = d.norm(&at(i, Site::AttentionSubNorm), &attended, &layer.attn_sub_norm, facts.rms_eps);
            let [o] = self.project(&at, i, &n, [(Site::O, &layer.o)])?;
            d.residual(&at(i, Site::O), &mut x, &o);
            add(&self.clock.attention, begin);
            let begin = Instant::now();
            let n = d.norm(&at(i, Site::PostAttentionNorm), &x, &layer.post_attention_norm, facts.rms_eps);
            let [gate, up] = self.project(&at, i, &n, [(Site::Gate, &layer.gate), (Site::Up, &layer.up)])?;
            let inner: Vec<f32> = gate.iter().zip(&up).map(|(&g, &u)| d.gated(g, u)).collect();
            let n = d.norm(&at(i, Site::FfnSubNorm), &inner, &layer.ffn_sub_norm, facts.rms_eps);
            let [down] = self.project(&at, i, &n, [(Site::Down, &layer.down)])?;
            d.residual(&at(i, Site::Down), &mut x, &down);
            add(&self.clock.feed_forward, begin);
        }
        sequence.len = position + 1;
        Ok(d.norm(&at(w.layers.len(), Site::FinalNorm), &x, &w.final_norm, facts.rms_eps))
    }

    /// The products of one input with matrices that share it, and so share its quantisation.
    fn project<'m, const N: usize>(
        &self,
        at: &dyn Fn(usize, Site) -> At<'m>,
        layer: usize,
        x: &[f32],
        matrices: [(Site, &Ternary); N],
    ) -> Result<[Vec<f32>; N]> {
        if self.deviation.checks_output() && x.iter().any(|v| !v.is_finite()) {
            return Err(unstable(&format!("the input of a projection of layer {layer}")));
        }
        let d = self.deviation;
        let mut out: [Vec<f32>; N] = match self.semantics {
            Semantics::Fp32 => matrices
                .map(|(site, m)| d.dots_float(&at(layer, site), m, x).into_iter().map(|sum| sum * m.scale).collect()),
            Semantics::W158A8 => {
                let (codes, k) = d.quantise(&at(layer, matrices[0].0), x);
                matrices.map(|(site, m)| {
                    let at = at(layer, site);
                    d.dots(&at, m, &codes).into_iter().map(|sum| d.rescale(&at, sum, m.scale, k)).collect()
                })
            }
        };
        for ((site, _), values) in matrices.iter().zip(&mut out) {
            d.projected(&at(layer, *site), values);
        }
        Ok(out)
    }

    /// Attention of one position's queries over the positions it sees.
    fn attend(&self, sequence: &Sequence, at: &At<'_>, q: &[f32], note: &mut dyn FnMut(usize, &[f32])) -> Vec<f32> {
        let (facts, d) = (&self.weights.facts, self.deviation);
        let (size, stride) = (facts.head_dim, facts.kv_heads * facts.head_dim);
        let (keys, values) = (&sequence.keys[at.layer], &sequence.values[at.layer]);
        let mut out = vec![0.0f32; q.len()];
        for (h, (q, out)) in q.chunks_exact(size).zip(out.chunks_exact_mut(size)).enumerate() {
            let offset = d.kv_head(h, facts.heads, facts.kv_heads) * size;
            let row = |j: usize| j * stride + offset..j * stride + offset + size;
            let scores = d.scores(at, q, keys, stride, offset);
            let probabilities = d.softmax(at, &scores);
            for (j, p) in probabilities.iter().enumerate().filter(|(_, p)| **p != 0.0) {
                for (o, v) in out.iter_mut().zip(&values[row(j)]) {
                    *o += (*p * f64::from(*v)) as f32;
                }
            }
            note(at.layer, &probabilities.iter().map(|&p| p as f32).collect::<Vec<_>>());
        }
        out
    }
}

/// `[heads × tokens × total]` from each token's `[heads × seen]`.
fn padded(tokens: &[Vec<f32>], heads: usize, total: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(heads * tokens.len() * total);
    for head in 0..heads {
        for token in tokens {
            let seen = token.len() / heads.max(1);
            out.extend_from_slice(&token[head * seen..(head + 1) * seen]);
            out.extend(std::iter::repeat_n(0.0, total - seen));
        }
    }
    out
}
