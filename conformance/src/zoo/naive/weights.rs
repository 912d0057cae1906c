//! A model as the naive engine holds it: a byte a trit, f32 for all else, read by the golden oracle's reader.

use crate::model::{ModelFacts, ModelFixture};
use bitnet_contracts::{ModelError, Result};
use golden::oracle::{Linear, Oracle, OracleError};
use std::path::Path;

/// A ternary matrix `[rows, columns]` and what its products are multiplied by.
#[derive(Debug, Clone)]
pub struct Ternary {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Row-major, each -1, 0 or 1.
    pub trits: Vec<i8>,
    /// The scale.
    pub scale: f32,
}

impl Ternary {
    fn of(linear: &Linear) -> Self {
        Self {
            rows: linear.trits.len() / linear.inputs.max(1),
            columns: linear.inputs,
            trits: linear.trits.clone(),
            scale: linear.scale as f32,
        }
    }

    /// All rows.
    pub fn each_row(&self) -> impl Iterator<Item = &[i8]> {
        (0..self.rows).map(|row| self.row(row))
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[i8] {
        &self.trits[row * self.columns..(row + 1) * self.columns]
    }
}

/// The weights of one layer, in the order of use.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // The names are those of the checkpoint.
pub struct LayerWeights {
    pub input_norm: Vec<f32>,
    pub q: Ternary,
    pub k: Ternary,
    pub v: Ternary,
    pub attn_sub_norm: Vec<f32>,
    pub o: Ternary,
    pub post_attention_norm: Vec<f32>,
    pub gate: Ternary,
    pub up: Ternary,
    pub ffn_sub_norm: Vec<f32>,
    pub down: Ternary,
}

impl LayerWeights {
    /// The seven projections.
    pub fn projections(&mut self) -> [&mut Ternary; 7] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o, &mut self.gate, &mut self.up, &mut self.down]
    }
}

/// A whole model.
#[derive(Debug, Clone)]
pub struct Weights {
    /// What the folder's `config.json` says.
    pub facts: ModelFacts,
    /// One row a token.
    pub embedding: Vec<f32>,
    /// The layers.
    pub layers: Vec<LayerWeights>,
    /// The gain of the last norm.
    pub final_norm: Vec<f32>,
    /// The head, where it is not the embedding.
    pub head: Option<Vec<f32>>,
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

impl Weights {
    /// Reads a folder as it is now, whatever was said of it before.
    ///
    /// # Errors
    /// `ModelError` for what is missing, broken, impossible or not finite.
    pub fn load(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.display().to_string();
        if !dir.join("config.json").is_file() {
            return Err(ModelError::FileNotFound { path: format!("{path}/config.json") }.into());
        }
        let failed = |reason: String| ModelError::LoadingFailed { path: path.clone(), reason };
        let facts = ModelFixture::open(name, dir).map_err(|e| failed(e.to_string()))?.config;
        let refused = |e: OracleError| failed(e.to_string());
        let oracle = Oracle::load(dir).map_err(refused)?;
        let weights = Self {
            facts,
            embedding: narrow(&oracle.embedding),
            layers: oracle
                .layers
                .iter()
                .map(|l| LayerWeights {
                    input_norm: narrow(&l.input_norm),
                    q: Ternary::of(&l.q),
                    k: Ternary::of(&l.k),
                    v: Ternary::of(&l.v),
                    attn_sub_norm: narrow(&l.attn_sub_norm),
                    o: Ternary::of(&l.o),
                    post_attention_norm: narrow(&l.post_attention_norm),
                    gate: Ternary::of(&l.gate),
                    up: Ternary::of(&l.up),
                    ffn_sub_norm: narrow(&l.ffn_sub_norm),
                    down: Ternary::of(&l.down),
                })
                .collect(),
            final_norm: narrow(&oracle.final_norm),
            head: oracle.head.as_deref().map(narrow),
        };
        Ok(weights)
    }

    /// Where a number is not finite, in words.
    pub fn not_finite(&self) -> Option<String> {
        let bad = |values: &[f32]| values.iter().any(|x| !x.is_finite());
        for (i, layer) in self.layers.iter().enumerate() {
            let norms = [&layer.input_norm, &layer.attn_sub_norm, &layer.post_attention_norm, &layer.ffn_sub_norm]
                .map(|n| bad(n));
            let scales = [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down];
            if norms.contains(&true) || scales.iter().any(|t| !t.scale.is_finite()) {
                return Some(format!("a norm or a scale of layer {i}"));
            }
        }
        if bad(&self.embedding) {
            return Some("the embedding".to_string());
        }
        if bad(&self.final_norm) || self.head.as_deref().is_some_and(bad) {
            return Some("the head or its norm".to_string());
        }
        None
    }

    /// The head's matrix.
    pub fn head(&self) -> &[f32] {
        self.head.as_deref().unwrap_or(&self.embedding)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let layer = |l: &LayerWeights| {
            let trits: usize = [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down].iter().map(|t| t.trits.len()).sum();
            let norms = [&l.input_norm, &l.attn_sub_norm, &l.post_attention_norm, &l.ffn_sub_norm];
            trits + 4 * norms.iter().map(|n| n.len()).sum::<usize>()
        };
        let floats = self.embedding.len() + self.final_norm.len() + self.head.as_ref().map_or(0, Vec::len);
        4 * floats + self.layers.iter().map(layer).sum::<usize>()
    }
}
