//! Faults of what goes in and comes out: shapes, id types, optional outputs, and what an engine says of itself.

use super::super::Fault;
use super::super::naive::{At, Deviation, Honest, Naive, Weights};
use super::forward;
use crate::backend::{Capabilities, CreateOptions};
use bitnet_contracts::{
    DType, Device, GenerationConfig, GenerationResult, InferenceOutput, KVCache, ModelConfig, QuantizationType, Result,
    Tensor,
};
use candle_core::{CpuStorage, Storage};
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "singles-taken-for-a-sequence",
        "a batch of single tokens gives logits of one sequence of that length",
        "SPEC.md SHP-1",
        "shape/logits",
        || {
            Arc::new(Forward(|engine, ids, cache| {
                let single = cache.is_none() && ids.dims().get(1) == Some(&1);
                let mut output = engine.honest_forward(ids, cache)?;
                if single {
                    output.logits = output.logits.transpose(0, 1)?;
                }
                Ok(output)
            }))
        },
    ),
    Fault::new(
        "rows-of-two-cut",
        "of rows of two ids the second is dropped: logits of one position come back",
        "SPEC.md SHP-1",
        "shape/logits",
        || {
            Arc::new(Forward(|engine, ids, cache| {
                let pairs = cache.is_none() && ids.dims().len() == 2 && ids.dim(0)? > 1 && ids.dim(1)? == 2;
                let ids = if pairs { &ids.narrow(1, 0, 1)? } else { ids };
                engine.honest_forward(ids, cache)
            }))
        },
    ),
    forward(
        "vocabulary-padded",
        "logits have the width of a vocabulary padded to a multiple of 64",
        "SPEC.md SHP-1",
        "shape/logits",
        || Arc::new(PaddedVocabulary),
    ),
    forward(
        "last-position-only",
        "a prompt gives the logits of its last position only",
        "SPEC.md SHP-1",
        "shape/logits",
        || {
            Arc::new(Forward(|engine, ids, cache| {
                let mut output = engine.honest_forward(ids, cache)?;
                output.logits = output.logits.narrow(1, output.logits.dim(1)? - 1, 1)?;
                Ok(output)
            }))
        },
    ),
    forward(
        "wide-ids-read-as-narrow",
        "the bytes of i64 ids are read as those of u32",
        "SPEC.md SHP-3",
        "shape/id_types",
        || {
            Arc::new(Forward(|engine, ids, cache| match ids.dtype() {
                DType::I64 => {
                    let wide: Vec<i64> = ids.flatten_all()?.to_vec1()?;
                    let words: Vec<i64> = wide.iter().flat_map(|id| [id & 0xffff_ffff, id >> 32]).collect();
                    let narrow = Tensor::from_vec(words[..wide.len()].to_vec(), ids.dims(), &Device::Cpu)?;
                    engine.honest_forward(&narrow, cache)
                }
                _ => engine.honest_forward(ids, cache),
            }))
        },
    ),
    Fault::new(
        "strides-of-ids-ignored",
        "ids are read one after another from where the tensor begins",
        "candle #3534, #3812, PR #3813",
        "shape/id_types",
        || {
            Arc::new(Forward(|engine, ids, cache| {
                let straight = in_storage_order(ids)?;
                engine.honest_forward(straight.as_ref().unwrap_or(ids), cache)
            }))
        },
    ),
    forward(
        "offset-of-ids-ignored",
        "ids are read from where the memory behind the tensor begins",
        "candle #3534, #3812, PR #3813",
        "shape/id_types",
        || {
            Arc::new(Forward(|engine, ids, cache| {
                let (storage, _) = ids.storage_and_layout();
                let from_the_start = match &*storage {
                    Storage::Cpu(CpuStorage::U32(all)) if ids.is_contiguous() => {
                        Some(Tensor::from_vec(all[..ids.elem_count()].to_vec(), ids.dims(), &Device::Cpu)?)
                    }
                    _ => None,
                };
                engine.honest_forward(from_the_start.as_ref().unwrap_or(ids), cache)
            }))
        },
    ),
    forward(
        "attention-averaged-over-heads",
        "every head's attention weights are the mean of all heads",
        "SPEC.md SHP-4",
        "shape/attention_weights",
        || {
            Arc::new(Attention(|weights, _| {
                let mean = weights.mean_keepdim(1)?;
                Ok(mean.broadcast_as(weights.shape())?.contiguous()?)
            }))
        },
    ),
    forward(
        "attention-of-the-heads-reversed",
        "the heads of the attention weights stand in reverse order",
        "SPEC.md SHP-4",
        "shape/attention_weights",
        || Arc::new(Attention(|weights, _| Ok(weights.flip(&[1])?))),
    ),
    forward(
        "attention-before-the-softmax",
        "attention weights are logarithms of what they should be",
        "SPEC.md SHP-4",
        "shape/attention_weights",
        || Arc::new(Attention(|weights, _| Ok((weights + 1e-6)?.log()?))),
    ),
    Fault::new(
        "attention-of-the-last-layer",
        "every layer's attention weights are those of the last",
        "SPEC.md SHP-4",
        "shape/attention_weights",
        || Arc::new(Attention(|_, last| Ok(last.clone()))),
    ),
    forward(
        "attention-without-the-cache",
        "attention weights cover the new positions only",
        "SPEC.md SHP-4",
        "shape/attention_weights",
        || {
            Arc::new(Attention(|weights, _| {
                let (seq, total) = (weights.dim(2)?, weights.dim(3)?);
                Ok(weights.narrow(3, total - seq, seq)?)
            }))
        },
    ),
    forward(
        "attention-only-with-a-cache",
        "attention weights are missing where the call has no cache",
        "SPEC.md SHP-4",
        "shape/attention_weights",
        || {
            Arc::new(Forward(|engine, ids, cache| {
                let cached = cache.is_some();
                let mut output = engine.honest_forward(ids, cache)?;
                output.attention_weights = output.attention_weights.filter(|_| cached);
                Ok(output)
            }))
        },
    ),
    Fault::new(
        "hidden-states-without-gain",
        "hidden states are taken before the gain of the final norm",
        "SPEC.md SHP-5",
        "shape/hidden_states",
        || Arc::new(without_gain()),
    ),
    forward(
        "hidden-states-of-the-first-row",
        "hidden states of every sequence are those of the first",
        "SPEC.md SHP-5",
        "shape/hidden_states",
        || {
            Arc::new(Forward(|engine, ids, cache| {
                let mut output = engine.honest_forward(ids, cache)?;
                let first = |h: Tensor| h.narrow(0, 0, 1)?.broadcast_as(h.shape());
                output.hidden_states = output.hidden_states.map(first).transpose()?;
                Ok(output)
            }))
        },
    ),
    Fault::new(
        "hidden-states-always",
        "hidden states come without being asked for",
        "SPEC.md SHP-6",
        "shape/optional_outputs_off",
        || Arc::new(AlwaysHidden),
    ),
    Fault::new(
        "config-without-groups",
        "config() says that there are as many key/value heads as heads",
        "SPEC.md SHP-7",
        "shape/config",
        || Arc::new(Config(|config| config.num_key_value_heads = config.num_attention_heads)),
    ),
    forward(
        "config-with-default-base",
        "config() states a RoPE base of 10000",
        "llama.cpp PR #8676, #8650",
        "shape/config",
        || Arc::new(Config(|config| config.rope_theta = 10_000.0)),
    ),
    forward("config-of-a-llama", "config() calls the model a llama", "SPEC.md SHP-7", "shape/config", || {
        Arc::new(Config(|config| config.model_type = "llama".to_string()))
    }),
    Fault::new(
        "supports-every-quantisation",
        "supports_quantization says yes to types that it has no kernel for",
        "llama-bench #25547",
        "shape/quantization",
        || Arc::new(Supports(|_| true)),
    ),
    forward(
        "supports-no-quantisation",
        "supports_quantization says no to the type in use",
        "SPEC.md SHP-9",
        "shape/quantization",
        || Arc::new(Supports(|_| false)),
    ),
    Fault::new(
        "leading-bos-taken-off",
        "generation takes a leading beginning of text off the prompt and forgets to put its own there",
        "llama.cpp PR #7107, #7332, llama-cpp-python #1501",
        "golden/greedy_tokens",
        || Arc::new(LeadingBos),
    )
    .on("tiny"),
];

type ForwardFn = fn(&mut Naive, &Tensor, Option<&mut KVCache>) -> Result<InferenceOutput>;

/// Hidden states before the gain of the final norm.
pub(super) fn without_gain() -> Forward {
    Forward(|engine, ids, cache| {
        let gain = engine.shared.weights.final_norm.clone();
        let gain = Tensor::new(gain, &Device::Cpu)?;
        let mut output = engine.honest_forward(ids, cache)?;
        output.hidden_states = output.hidden_states.map(|h| h.broadcast_div(&gain)).transpose()?;
        Ok(output)
    })
}

/// Something before or after a whole forward call.
pub(super) struct Forward(ForwardFn);

impl Deviation for Forward {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        (self.0)(engine, ids, cache)
    }
}

/// The ids of a tensor that is not contiguous as they lie in memory.
fn in_storage_order(ids: &Tensor) -> Result<Option<Tensor>> {
    if ids.is_contiguous() || ids.dtype() != DType::U32 {
        return Ok(None);
    }
    let (storage, layout) = ids.storage_and_layout();
    let Storage::Cpu(CpuStorage::U32(all)) = &*storage else { return Ok(None) };
    let values = all[layout.start_offset()..][..ids.elem_count()].to_vec();
    Ok(Some(Tensor::from_vec(values, ids.dims(), &Device::Cpu)?))
}

/// The head's matrix is padded with rows of zeros, and nobody takes them off.
struct PaddedVocabulary;

impl Deviation for PaddedVocabulary {
    fn head(&self, _: &At<'_>, weights: &Weights, hidden: &[f32]) -> Vec<f32> {
        let product = |row: &[f32]| row.iter().zip(hidden).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let mut logits: Vec<f32> = weights.head().chunks_exact(hidden.len()).map(|row| product(row) as f32).collect();
        logits.resize(logits.len().next_multiple_of(64), 0.0);
        logits
    }
}

/// Other attention weights of each layer, from its own and the last layer's.
struct Attention(fn(&Tensor, &Tensor) -> Result<Tensor>);

impl Deviation for Attention {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let mut output = engine.honest_forward(ids, cache)?;
        if let Some([.., last]) = output.attention_weights.as_deref() {
            let last = last.clone();
            let layers = output.attention_weights.iter().flatten();
            output.attention_weights = Some(layers.map(|w| (self.0)(w, &last)).collect::<Result<_>>()?);
        }
        Ok(output)
    }
}

/// The option is on, whatever was asked for.
struct AlwaysHidden;

impl Deviation for AlwaysHidden {
    fn options(&self, options: &CreateOptions, declared: &Capabilities) -> Result<CreateOptions> {
        Ok(Honest.options(options, declared)?.with_hidden_states())
    }
}

/// `config()` lies.
struct Config(fn(&mut ModelConfig));

impl Deviation for Config {
    fn config(&self, config: &mut ModelConfig) {
        (self.0)(config);
    }
}

/// `supports_quantization()` lies.
struct Supports(fn(QuantizationType) -> bool);

impl Deviation for Supports {
    fn supports_quantization(&self, kind: QuantizationType) -> bool {
        (self.0)(kind)
    }
}

/// Against two beginnings of text, one too many is taken off.
struct LeadingBos;

impl Deviation for LeadingBos {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let bos = engine.shared.weights.facts.bos;
        let rest = match prompt {
            [first, rest @ ..] if Some(*first) == bos && !rest.is_empty() => rest,
            _ => prompt,
        };
        let mut result = engine.honest_generate(rest, max_tokens, config)?;
        result.prompt_tokens = prompt.to_vec();
        Ok(result)
    }
}
