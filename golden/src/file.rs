//! The golden file format: one safetensors file per case and derivation.
//!
//! For every prompt P, with B sequences of T positions, N greedy tokens, vocabulary V and L layers, and for each of the
//! semantics S (`fp32`, `w1.58a8`):
//!
//! | tensor | type | shape |
//! |---|---|---|
//! | `P.input_ids` | i64 | \[B,T\] |
//! | `P.S.logits` | f32 | \[B,T,V\] |
//! | `P.S.greedy` | i64 | \[B,N\] |
//! | `P.S.greedy_margin` | f32 | \[B,N\]: best minus second-best logit of each step |
//! | `P.w1.58a8.codes` | i64 | \[B,T,L,4\]: [`crate::oracle::code_hash`] of each quantised input |
//! | `trace.S.*` | f32 | \[B,T,n\]: activations of the trace prompt |

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::GoldenError;
use crate::oracle::Semantics;

/// The two ways in which the golden data was derived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Derivation {
    /// This crate's [`crate::oracle`].
    Oracle,
    /// Hugging Face transformers, `transformers/make_golden.py`.
    Transformers,
}

impl Derivation {
    /// Both.
    pub const ALL: [Derivation; 2] = [Derivation::Oracle, Derivation::Transformers];

    /// The name, which is also the stem of the file: `oracle` or `transformers`.
    pub fn name(self) -> &'static str {
        match self {
            Derivation::Oracle => "oracle",
            Derivation::Transformers => "transformers",
        }
    }
}

/// A tensor of numbers that are exact in their type: f32, or i64 (ids and hashes).
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Data {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

/// A golden file in memory.
#[derive(Debug, Clone, Default)]
pub(crate) struct GoldenFile {
    /// What made the file: program and version.
    pub(crate) made_by: String,
    pub(crate) tensors: BTreeMap<String, (Vec<usize>, Data)>,
}

impl GoldenFile {
    pub(crate) fn add_f32(&mut self, name: impl Into<String>, shape: &[usize], values: Vec<f32>) {
        self.tensors.insert(name.into(), (shape.to_vec(), Data::F32(values)));
    }

    pub(crate) fn add_i64(&mut self, name: impl Into<String>, shape: &[usize], values: Vec<i64>) {
        self.tensors.insert(name.into(), (shape.to_vec(), Data::I64(values)));
    }

    /// Parses `bytes`; `file` is named in errors.
    pub(crate) fn parse(file: &str, bytes: &[u8]) -> Result<Self, GoldenError> {
        let fail = |e: safetensors::SafeTensorError| GoldenError::format(file, e);
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(fail)?;
        let made_by = metadata.metadata().as_ref().and_then(|m| m.get("made_by")).cloned().unwrap_or_default();
        let mut tensors = BTreeMap::new();
        for (name, view) in SafeTensors::deserialize(bytes).map_err(fail)?.iter() {
            let data = match view.dtype() {
                Dtype::F32 => Data::F32(view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
                Dtype::I64 => Data::I64(view.data().as_chunks().0.iter().map(|b| i64::from_le_bytes(*b)).collect()),
                other => {
                    return Err(GoldenError::format(file, format!("{name} is of type {other:?}")));
                }
            };
            tensors.insert(name.to_owned(), (view.shape().to_vec(), data));
        }
        Ok(GoldenFile { made_by, tensors })
    }

    /// The file's bytes: the same for the same content.
    pub(crate) fn to_bytes(&self, file: &str) -> Result<Vec<u8>, GoldenError> {
        let fail = |e: safetensors::SafeTensorError| GoldenError::format(file, e);
        let bytes: Vec<(&String, Vec<u8>)> =
            self.tensors.iter().map(|(name, (_, data))| (name, data.to_bytes())).collect();
        let views = self.tensors.values().zip(&bytes).map(|((shape, data), (name, bytes))| {
            Ok((name.as_str(), TensorView::new(data.dtype(), shape.clone(), bytes).map_err(fail)?))
        });
        let views = views.collect::<Result<Vec<_>, GoldenError>>()?;
        // One key only: a map of several would be written in a random order.
        let metadata = HashMap::from([("made_by".to_owned(), self.made_by.clone())]);
        safetensors::serialize(views, Some(metadata)).map_err(fail)
    }

    /// An f32 tensor of this shape.
    pub(crate) fn f32(&self, file: &str, name: &str, shape: &[usize]) -> Result<&[f32], GoldenError> {
        match self.tensors.get(name) {
            Some((seen, Data::F32(values))) if seen == shape => Ok(values),
            other => Err(missing(file, name, "f32", shape, other)),
        }
    }

    /// An i64 tensor of this shape.
    pub(crate) fn i64(&self, file: &str, name: &str, shape: &[usize]) -> Result<&[i64], GoldenError> {
        match self.tensors.get(name) {
            Some((seen, Data::I64(values))) if seen == shape => Ok(values),
            other => Err(missing(file, name, "i64", shape, other)),
        }
    }
}

fn missing(file: &str, name: &str, kind: &str, shape: &[usize], seen: Option<&(Vec<usize>, Data)>) -> GoldenError {
    let seen = match seen {
        None => "is missing".to_owned(),
        Some((shape, data)) => format!("is {:?} {shape:?}", data.dtype()),
    };
    GoldenError::format(file, format!("{name} should be {kind} {shape:?} but {seen}"))
}

impl Data {
    pub(crate) fn dtype(&self) -> Dtype {
        match self {
            Data::F32(_) => Dtype::F32,
            Data::I64(_) => Dtype::I64,
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Data::F32(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Data::I64(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

/// Name of a prompt's tensor in one of the semantics.
pub(crate) fn key(prompt: &str, semantics: Semantics, what: &str) -> String {
    format!("{prompt}.{}.{what}", semantics.name())
}
