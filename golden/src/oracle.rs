//! The forward pass of BitNet b1.58, written to be read.
//!
//! One token at a time, in f64, with plain loops: this is the definition that faster code is compared with. It reads
//! `config.json` and safetensors by itself and shares no code with any engine. Two readings of one model:
//!
//! * [`Semantics::Fp32`]: weights are trits times a scale, activations are not quantised; f64 from end to end.
//! * [`Semantics::W158A8`]: every projection sees activations rounded to int8, one scale per token. Which way a value
//!   is rounded can hang on its last bits, so here each number that transformers stores in f32 is rounded to f32
//!   (`Run::store`), and the quantiser takes the same steps: the largest magnitude a, the factor k = (1/a) * 127 (two
//!   roundings, not one division), the product x * k, ties to even. Sums inside a step stay f64.
//!
//! Transcendental functions come from the `libm` crate, so the results are the same bits on every platform.

mod checkpoint;

use std::collections::BTreeMap;

pub use checkpoint::Linear;
use checkpoint::{Checkpoint, Config};

pub(crate) use checkpoint::read_folder;

/// Version of this evaluation. It changes whenever the same model could give other bits.
pub const ORACLE_VERSION: u32 = 1;

/// Which function a model's logits are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Semantics {
    /// Dequantised ternary weights, float activations.
    Fp32,
    /// Ternary weights, int8 activations before each of the seven projections.
    W158A8,
}

impl Semantics {
    /// Both.
    pub const ALL: [Semantics; 2] = [Semantics::Fp32, Semantics::W158A8];

    /// The name in golden files: `fp32` or `w1.58a8`.
    pub fn name(self) -> &'static str {
        match self {
            Semantics::Fp32 => "fp32",
            Semantics::W158A8 => "w1.58a8",
        }
    }
}

/// Why a checkpoint or a token cannot be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OracleError {
    /// `config.json` is not the configuration of a model that this evaluation covers.
    #[error("config.json: {0}")]
    Config(String),
    /// A weight file is damaged, or lacks a tensor of the right shape and type.
    #[error("weights: {0}")]
    Weights(String),
    /// A token id outside the vocabulary.
    #[error("token {token} is not in the vocabulary of {vocab}")]
    Token {
        /// The id.
        token: u32,
        /// Number of tokens.
        vocab: usize,
    },
}

type Result<T> = std::result::Result<T, OracleError>;

/// The weights of one layer. Norms are gains, `[hidden]` but for `ffn_sub_norm`, which is `[intermediate]`.
pub struct Layer {
    /// `input_layernorm`.
    pub input_norm: Vec<f64>,
    /// Queries, `[hidden, hidden]`.
    pub q: Linear,
    /// Keys, `[kv heads * head size, hidden]`.
    pub k: Linear,
    /// Values, as keys.
    pub v: Linear,
    /// The norm before `o`.
    pub attn_sub_norm: Vec<f64>,
    /// Attention's output, `[hidden, hidden]`.
    pub o: Linear,
    /// `post_attention_layernorm`.
    pub post_attention_norm: Vec<f64>,
    /// The gated branch, `[intermediate, hidden]`.
    pub gate: Linear,
    /// The linear branch, as the gated one.
    pub up: Linear,
    /// The norm before `down`.
    pub ffn_sub_norm: Vec<f64>,
    /// Back to the residual stream, `[hidden, intermediate]`.
    pub down: Linear,
}

/// A model, ready to be evaluated. Its parts may be read: a naive engine that goes another way starts from them.
pub struct Oracle {
    config: Config,
    /// One row a token, `[vocab, hidden]`.
    pub embedding: Vec<f64>,
    /// The layers in order.
    pub layers: Vec<Layer>,
    /// The gain of the norm before the head.
    pub final_norm: Vec<f64>,
    /// The head `[vocab, hidden]`, or `None` where it is the embedding.
    pub head: Option<Vec<f64>>,
}

impl Oracle {
    /// Reads a checkpoint from the contents of `config.json` and `model.safetensors`.
    pub fn from_bytes(config_json: &[u8], weights: &[u8]) -> Result<Self> {
        Self::from_shards(config_json, &[weights])
    }

    /// Reads a checkpoint folder: `config.json` and every `model*.safetensors`.
    pub fn load(dir: &std::path::Path) -> Result<Self> {
        let (config, files) = read_folder(dir)?;
        let shards: Vec<&[u8]> = files.iter().map(Vec::as_slice).collect();
        Self::from_shards(&config, &shards)
    }

    /// Reads a checkpoint whose tensors stand in one or more safetensors files.
    pub fn from_shards(config_json: &[u8], shards: &[&[u8]]) -> Result<Self> {
        let config = Config::parse(config_json)?;
        let file = Checkpoint::parse(shards, &config)?;
        let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
        let kv = config.num_key_value_heads * config.head_size();
        let layer = |i: usize| -> Result<Layer> {
            let name = |rest: &str| format!("model.layers.{i}.{rest}.weight");
            Ok(Layer {
                input_norm: file.floats(&name("input_layernorm"), &[hidden])?,
                q: file.linear(&name("self_attn.q_proj"), hidden, hidden)?,
                k: file.linear(&name("self_attn.k_proj"), kv, hidden)?,
                v: file.linear(&name("self_attn.v_proj"), kv, hidden)?,
                attn_sub_norm: file.floats(&name("self_attn.attn_sub_norm"), &[hidden])?,
                o: file.linear(&name("self_attn.o_proj"), hidden, hidden)?,
                post_attention_norm: file.floats(&name("post_attention_layernorm"), &[hidden])?,
                gate: file.linear(&name("mlp.gate_proj"), ffn, hidden)?,
                up: file.linear(&name("mlp.up_proj"), ffn, hidden)?,
                ffn_sub_norm: file.floats(&name("mlp.ffn_sub_norm"), &[ffn])?,
                down: file.linear(&name("mlp.down_proj"), hidden, ffn)?,
            })
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        let vocab = config.vocab_size;
        let head =
            (!config.tie_word_embeddings).then(|| file.floats("lm_head.weight", &[vocab, hidden])).transpose()?;
        let embedding = file.floats("model.embed_tokens.weight", &[vocab, hidden])?;
        let final_norm = file.floats("model.norm.weight", &[hidden])?;
        Ok(Oracle { config, embedding, layers, final_norm, head })
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Number of tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.config.vocab_size
    }

    /// `max_position_embeddings`. The evaluation itself knows no limit.
    pub fn context(&self) -> usize {
        self.config.max_position_embeddings
    }

    /// Logits of every position of one sequence, `[position][vocab]`.
    pub fn forward(&self, tokens: &[u32], semantics: Semantics) -> Result<Vec<Vec<f64>>> {
        let mut run = self.start(semantics);
        tokens.iter().map(|&token| run.step(token)).collect()
    }

    /// Starts a sequence.
    pub fn start(&self, semantics: Semantics) -> Run<'_> {
        let empty = || vec![Vec::new(); self.layers.len()];
        Run {
            model: self,
            semantics,
            keys: empty(),
            values: empty(),
            position: 0,
            codes: Vec::new(),
            nearest_tie: f64::INFINITY,
            trace: None,
            attention: None,
        }
    }
}

/// A sequence being evaluated: the keys and values of the positions so far.
pub struct Run<'a> {
    model: &'a Oracle,
    semantics: Semantics,
    keys: Vec<Vec<f64>>,
    values: Vec<Vec<f64>>,
    position: usize,
    /// [`code_hash`] of every quantised input so far, in order of position and layer: of q, k and v; of o; of gate and
    /// up; of down. Empty in the fp32 semantics.
    pub codes: Vec<u64>,
    /// How close any activation so far came to a rounding tie, in codes: an evaluation with less error than this has the
    /// same codes throughout. Infinite in the fp32 semantics.
    pub nearest_tie: f64,
    /// Filled while it is there: the inside of layer 0, each layer's output and the final norm, position after position.
    pub trace: Option<BTreeMap<String, Vec<f64>>>,
    /// Filled while it is there: each layer's attention probabilities, `[head][position seen]` of one position after
    /// another.
    pub attention: Option<Vec<Vec<f64>>>,
}

impl Run<'_> {
    /// Takes the next token and returns the logits that follow it.
    pub fn step(&mut self, token: u32) -> Result<Vec<f64>> {
        let model = self.model;
        let (hidden, vocab) = (model.config.hidden_size, model.config.vocab_size);
        if token as usize >= vocab {
            return Err(OracleError::Token { token, vocab });
        }
        let mut x = model.embedding[token as usize * hidden..][..hidden].to_vec();
        self.note("embed", &x);
        for (i, layer) in model.layers.iter().enumerate() {
            let n = self.norm(&x, &layer.input_norm);
            self.note_in(i, "input_norm", &n);
            let [mut q, mut k, v] = self.project(&n, [&layer.q, &layer.k, &layer.v]);
            self.note_in(i, "q", &q);
            self.note_in(i, "k", &k);
            self.note_in(i, "v", &v);
            self.rotate(&mut q);
            self.rotate(&mut k);
            self.keys[i].extend(k);
            self.values[i].extend(v);
            let attended = self.attend(i, &q);
            self.note_in(i, "attn_out", &attended);
            let n = self.norm(&attended, &layer.attn_sub_norm);
            self.note_in(i, "attn_sub_norm", &n);
            let [o] = self.project(&n, [&layer.o]);
            self.note_in(i, "o", &o);
            self.add(&mut x, &o);

            let n = self.norm(&x, &layer.post_attention_norm);
            self.note_in(i, "post_attn_norm", &n);
            let [gate, up] = self.project(&n, [&layer.gate, &layer.up]);
            self.note_in(i, "gate", &gate);
            self.note_in(i, "up", &up);
            let inner: Vec<f64> = gate.iter().zip(&up).map(|(&g, &u)| self.gated(g, u)).collect();
            self.note_in(i, "ffn_act", &inner);
            let n = self.norm(&inner, &layer.ffn_sub_norm);
            self.note_in(i, "ffn_sub_norm", &n);
            let [down] = self.project(&n, [&layer.down]);
            self.note_in(i, "down", &down);
            self.add(&mut x, &down);
            self.note(&format!("layer{i}.out"), &x);
        }
        let n = self.norm(&x, &model.final_norm);
        self.note("final_norm", &n);
        self.position += 1;
        // The head is never ternary and never sees quantised activations.
        let head = model.head.as_ref().unwrap_or(&model.embedding);
        Ok(head.chunks_exact(hidden).map(|row| dot(row, &n)).collect())
    }

    /// A number as it is stored between two steps: f32 in the int8 semantics.
    fn store(&self, x: f64) -> f64 {
        match self.semantics {
            Semantics::Fp32 => x,
            Semantics::W158A8 => f64::from(x as f32),
        }
    }

    fn add(&self, x: &mut [f64], y: &[f64]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x = self.store(*x + y));
    }

    /// x / rms(x) * gain, without subtracting a mean.
    fn norm(&self, x: &[f64], gain: &[f64]) -> Vec<f64> {
        let mean = dot(x, x) / x.len() as f64;
        let factor = self.store(1.0 / (mean + self.model.config.rms_norm_eps).sqrt());
        x.iter().zip(gain).map(|(x, g)| self.store(g * self.store(x * factor))).collect()
    }

    /// relu(gate)^2 * up: the square is the gate's alone.
    fn gated(&self, gate: f64, up: f64) -> f64 {
        let relu = gate.max(0.0);
        self.store(self.store(relu * relu) * up)
    }

    /// The products of one input with matrices that share it, and so share its quantisation.
    fn project<const N: usize>(&mut self, x: &[f64], matrices: [&Linear; N]) -> [Vec<f64>; N] {
        match self.semantics {
            Semantics::Fp32 => matrices.map(|m| m.rows().map(|row| m.scale * dot_trits(row, x)).collect()),
            Semantics::W158A8 => {
                let (codes, k) = quantise(x);
                self.codes.push(code_hash(&codes));
                self.nearest_tie = x.iter().map(|&x| tie_distance(x, k)).fold(self.nearest_tie, f64::min);
                let product = |m: &Linear, row| self.store(f64::from(dot_codes(row, &codes)) * m.scale / k);
                matrices.map(|m| m.rows().map(|row| product(m, row)).collect())
            }
        }
    }

    /// Rotary embedding of each head: pairs are half a head apart.
    fn rotate(&self, heads: &mut [f64]) {
        let size = self.model.config.head_size();
        for i in 0..size / 2 {
            let (sin, cos) = self.angle(2.0 * i as f64 / size as f64);
            for head in heads.chunks_exact_mut(size) {
                let (a, b) = (head[i], head[i + size / 2]);
                head[i] = self.store(a * cos - b * sin);
                head[i + size / 2] = self.store(b * cos + a * sin);
            }
        }
    }

    /// Sine and cosine of position * theta^-exponent; in the int8 semantics f32 at each step, as transformers has it.
    fn angle(&self, exponent: f64) -> (f64, f64) {
        match self.semantics {
            Semantics::Fp32 => {
                let angle = self.position as f64 / libm::pow(self.model.config.rope_theta(), exponent);
                (libm::sin(angle), libm::cos(angle))
            }
            Semantics::W158A8 => {
                let inverse = 1.0 / libm::pow(self.model.config.rope_theta(), f64::from(exponent as f32)) as f32;
                let angle = f64::from(self.position as f32 * inverse);
                (f64::from(libm::sin(angle) as f32), f64::from(libm::cos(angle) as f32))
            }
        }
    }

    /// Causal attention of this position's queries: query head h reads key/value head h / group.
    fn attend(&mut self, layer: usize, q: &[f64]) -> Vec<f64> {
        let config = &self.model.config;
        let size = config.head_size();
        let group = config.num_attention_heads / config.num_key_value_heads;
        let stride = config.num_key_value_heads * size;
        let mut out = vec![0.0; q.len()];
        for (h, (q, out)) in q.chunks_exact(size).zip(out.chunks_exact_mut(size)).enumerate() {
            let at = |j: usize| j * stride + h / group * size;
            let score = |j: usize| dot(q, &self.keys[layer][at(j)..][..size]) / (size as f64).sqrt();
            let scores: Vec<f64> = (0..=self.position).map(score).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|s| libm::exp(s - largest)).collect();
            let total: f64 = weights.iter().sum();
            if let Some(attention) = &mut self.attention {
                attention.resize(self.model.layers.len(), Vec::new());
                attention[layer].extend(weights.iter().map(|weight| weight / total));
            }
            for (i, out) in out.iter_mut().enumerate() {
                let value = |(j, weight): (usize, &f64)| weight / total * self.values[layer][at(j) + i];
                *out = self.store(weights.iter().enumerate().map(value).sum());
            }
        }
        out
    }

    fn note(&mut self, name: &str, values: &[f64]) {
        if let Some(trace) = &mut self.trace {
            trace.entry(name.to_owned()).or_default().extend_from_slice(values);
        }
    }

    fn note_in(&mut self, layer: usize, name: &str, values: &[f64]) {
        if layer == 0 {
            self.note(&format!("layer0.{name}"), values);
        }
    }
}

/// Int8 codes of one token's activations and the factor k that made them; x is about code / k.
fn quantise(x: &[f64]) -> (Vec<i32>, f64) {
    let largest = x.iter().fold(1e-5f32, |a, &x| a.max((x as f32).abs()));
    let k = (1.0 / largest) * 127.0;
    let codes = x.iter().map(|&x| (x as f32 * k).round_ties_even().clamp(-128.0, 127.0) as i32);
    (codes.collect(), f64::from(k))
}

/// How far x * k is from the nearest number that ends in .5.
fn tie_distance(x: f64, k: f64) -> f64 {
    let scaled = f64::from(x as f32 * k as f32);
    (scaled - scaled.floor() - 0.5).abs()
}

/// Sum over j of (code_j + 129) * 1099511628211^j, modulo 2^64. Two evaluations with equal hashes had equal codes.
pub fn code_hash(codes: &[i32]) -> u64 {
    let term = |hash: u64, &code: &i32| hash.wrapping_mul(0x100_0000_01b3).wrapping_add((code + 129) as u64);
    codes.iter().rev().fold(0, term)
}

/// A sum in eight interleaved parts: a fixed order that a compiler can vectorise.
fn sum8(n: usize, term: impl Fn(usize) -> f64) -> f64 {
    let mut parts = [0.0; 8];
    for i in 0..n / 8 {
        for (lane, part) in parts.iter_mut().enumerate() {
            *part += term(8 * i + lane);
        }
    }
    let [a, b, c, d, e, f, g, h] = parts;
    let rest: f64 = (n / 8 * 8..n).map(term).sum();
    ((a + b) + (c + d)) + ((e + f) + (g + h)) + rest
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let n = a.len().min(b.len());
    let (a, b) = (&a[..n], &b[..n]);
    sum8(n, |i| a[i] * b[i])
}

fn dot_trits(trits: &[i8], x: &[f64]) -> f64 {
    let n = trits.len().min(x.len());
    let (trits, x) = (&trits[..n], &x[..n]);
    sum8(n, |i| f64::from(trits[i]) * x[i])
}

fn dot_codes(trits: &[i8], codes: &[i32]) -> i32 {
    trits.iter().zip(codes).map(|(&t, &q)| i32::from(t) * q).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_trit_or_no_known_class_is_refused() {
        let fixture = fixtures::preset("gqa1-tied-bf16", 1).expect("a preset");
        let config = String::from_utf8(fixture.config_json().to_vec()).expect("JSON is text");
        assert!(Oracle::from_bytes(config.as_bytes(), fixture.weights()).is_ok());
        let other = config.replace("autobitlinear", "another");
        assert!(matches!(Oracle::from_bytes(other.as_bytes(), fixture.weights()), Err(OracleError::Config(_))));

        let file = safetensors::SafeTensors::deserialize(fixture.weights()).expect("a fixture");
        let packed = file.tensor("model.layers.1.mlp.up_proj.weight").expect("a projection").data();
        let at = packed.as_ptr() as usize - fixture.weights().as_ptr() as usize;
        let mut weights = fixture.weights().to_vec();
        weights[at] |= 0b1100;
        assert!(matches!(Oracle::from_bytes(config.as_bytes(), &weights), Err(OracleError::Weights(_))));
    }

    #[test]
    fn codes_round_half_to_even_and_clamp() {
        // a = 127, so k is 1 after two roundings or one off it; with a = 1 it is exactly 127.
        let (codes, k) = quantise(&[1.0, 0.5 / 127.0, 1.5 / 127.0, -2.5 / 127.0, 0.0]);
        assert_eq!(k, 127.0);
        assert_eq!(codes, [127, 0, 2, -2, 0]);
        // The floor of 1e-5 keeps the scale finite for a row of zeros.
        let (codes, k) = quantise(&[0.0, 0.0]);
        assert_eq!((codes, k as f32), (vec![0, 0], (1.0f32 / 1e-5) * 127.0));
    }

    #[test]
    fn a_run_knows_its_nearest_tie_and_its_attention() {
        assert_eq!(tie_distance(2.5 / 127.0, 127.0), 0.0);
        assert!((tie_distance(-2.25 / 127.0, 127.0) - 0.25).abs() < 1e-5);
        let fixture = fixtures::preset("context-32", 1).expect("a preset");
        let oracle = Oracle::from_bytes(fixture.config_json(), fixture.weights()).expect("a checkpoint");
        let mut run = oracle.start(Semantics::W158A8);
        run.attention = Some(Vec::new());
        let mut nearest = f64::INFINITY;
        for token in [3, 4, 5] {
            run.step(token).expect("a token");
            assert!(run.nearest_tie <= nearest && run.nearest_tie < 0.5, "{}", run.nearest_tie);
            nearest = run.nearest_tie;
        }
        for layer in run.attention.expect("it was asked for") {
            // Of three positions, each of four heads has weights on one, two and three, which sum to one.
            assert_eq!(layer.len(), 4 * (1 + 2 + 3));
            let last = &layer[4 * (1 + 2)..];
            assert!(last.chunks(3).all(|weights| (weights.iter().sum::<f64>() - 1.0).abs() < 1e-12));
        }
    }

    #[test]
    fn the_factor_takes_two_roundings() {
        // A magnitude for which 127/a and (1/a)*127 are different floats.
        let a =
            (1..1000).map(|i| i as f32 / 100.0).find(|a| 127.0 / a != (1.0 / a) * 127.0).expect("a quarter of them");
        assert_eq!(quantise(&[f64::from(a)]).1, f64::from((1.0 / a) * 127.0));
    }

    #[test]
    fn the_hash_is_the_polynomial_that_the_python_script_computes() {
        let p = 0x100_0000_01b3_u64;
        let by_hand = (1u64 + 129).wrapping_add(p.wrapping_mul(2)).wrapping_add(p.wrapping_mul(p).wrapping_mul(256));
        assert_eq!(code_hash(&[1, -127, 127]), by_hand);
        assert_ne!(code_hash(&[1, 2]), code_hash(&[2, 1]));
    }

    #[test]
    fn sums_of_any_length_are_whole() {
        for n in 0..40 {
            let a: Vec<f64> = (0..n).map(f64::from).collect();
            let squares: f64 = (0..n).map(|i| f64::from(i * i)).sum();
            assert_eq!(dot(&a, &a), squares, "length {n}");
        }
    }
}
