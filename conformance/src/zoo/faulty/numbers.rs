//! Faults of arithmetic: rounding, precision that was not declared, NaN, numbers from elsewhere.

use super::super::Fault;
use super::super::naive::{At, Deviation, Naive};
use super::{forward, stateful};
use bitnet_contracts::{InferenceOutput, KVCache, Result, Tensor};
use half::{bf16, f16};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

pub(super) const FAULTS: &[Fault] = &[
    forward(
        "codes-truncated",
        "activations are truncated to codes, not rounded",
        "SPEC.md GLD-2",
        "golden/reproduced_rows",
        || Arc::new(Rounding(f32::trunc)),
    ),
    forward("codes-rounded-down", "activations are rounded down to codes", "SPEC.md GLD-2", "golden/logits", || {
        Arc::new(Rounding(f32::floor))
    }),
    Fault::new(
        "ties-away-from-zero",
        "activations half way between two codes go to the larger",
        "SPEC.md NUM-7",
        "numerics/rounding_ties",
        || Arc::new(Rounding(f32::round)),
    ),
    forward(
        "ties-up",
        "activations half way between two codes go to the upper",
        "SPEC.md NUM-7",
        "numerics/rounding_ties",
        || Arc::new(Rounding(|x| (x + 0.5).floor())),
    ),
    Fault::new(
        "no-floor-of-the-quantiser",
        "the largest magnitude has no floor but that against division by zero",
        "microsoft/BitNet PR #521, PR #387",
        "numerics/small_inputs",
        || Arc::new(Quantise(|x| codes(x, 127.0 / largest(x, f32::MIN_POSITIVE)))),
    ),
    forward(
        "zero-divided-by-zero",
        "a row of zeros is divided by its largest magnitude, and what comes of it becomes the code -128",
        "microsoft/BitNet PR #521, PR #387",
        "numerics/small_inputs",
        || {
            Arc::new(Quantise(|x| match largest(x, 0.0) {
                0.0 => (vec![-128; x.len()], 127.0),
                _ => codes(x, (1.0 / largest(x, 1e-5)) * 127.0),
            }))
        },
    ),
    forward("activations-of-4-bits", "activations have codes from -7 to 7", "SPEC.md GLD-2", "golden/logits", || {
        Arc::new(Quantise(|x| codes(x, 7.0 / largest(x, 1e-5))))
    }),
    forward(
        "factor-of-a-block",
        "each 32 activations have a factor of their own, and the product the first one's",
        "SPEC.md GLD-2",
        "golden/logits",
        || {
            Arc::new(Quantise(|x| {
                let k = 127.0 / largest(&x[..x.len().min(32)], 1e-5);
                (x.chunks(32).flat_map(|block| codes(block, 127.0 / largest(block, 1e-5)).0).collect(), k)
            }))
        },
    ),
    stateful(
        "factor-of-the-call",
        "a token's activations are scaled by the largest of its call so far",
        "llama.cpp #7052, #19981",
        "kv_cache/chunked_is_whole",
        || Arc::new(FactorOfTheCall::default()),
    ),
    forward(
        "undeclared-bf16-residual",
        "the residual stream is kept in bf16, and float32 is declared",
        "SPEC.md GLD-6",
        "golden/reproduced_rows",
        || Arc::new(Residual(|x| bf16::from_f32(x).to_f32())),
    ),
    forward(
        "undeclared-f16-cache",
        "keys and values are kept in half precision, and float32 is declared",
        "SPEC.md GLD-6",
        "golden/reproduced_rows",
        || Arc::new(Kept(|x| f16::from_f32(x).to_f32())),
    ),
    forward(
        "undeclared-f16-cache-fp32",
        "fp32 semantics: keys and values are kept in half precision, and float32 is declared",
        "llama.cpp: --cache-type-k and -v are f16 by default",
        "golden/logits",
        || Arc::new(Kept(|x| f16::from_f32(x).to_f32())),
    )
    .fp32(),
    forward(
        "undeclared-bf16-residual-fp32",
        "fp32 semantics: the residual stream is kept in bf16, and float32 is declared",
        "transformers #29285 (a model in bf16 compared with one in float32)",
        "golden/logits",
        || Arc::new(Residual(|x| bf16::from_f32(x).to_f32())),
    )
    .fp32(),
    forward(
        "undeclared-f16-logits-fp32",
        "fp32 semantics: logits are rounded to half precision, and float32 is declared",
        "SPEC.md GLD-2",
        "golden/logits",
        || Arc::new(Logits(|_, logits| logits.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()))),
    )
    .fp32(),
    forward(
        "undeclared-int8-cache",
        "keys and values are kept in steps of 1/16, and float32 is declared",
        "SPEC.md GLD-6",
        "golden/reproduced_rows",
        || Arc::new(Kept(|x| (x * 16.0).round_ties_even() / 16.0)),
    ),
    forward(
        "undeclared-f16-logits",
        "logits are rounded to half precision, and float32 is declared",
        "SPEC.md GLD-6",
        "golden/reproduced_rows",
        || Arc::new(Logits(|_, logits| logits.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32()))),
    ),
    forward(
        "logits-shifted",
        "a constant is added to all logits of a row",
        "SPEC.md GLD-6",
        "golden/reproduced_rows",
        || Arc::new(Logits(|_, logits| logits.iter_mut().for_each(|x| *x += 0.02))),
    ),
    forward(
        "logits-three-percent-too-large",
        "all logits are multiplied by 1.03",
        "microsoft/BitNet #468",
        "golden/logits",
        || Arc::new(Logits(|_, logits| logits.iter_mut().for_each(|x| *x *= 1.03))),
    ),
    forward("logits-capped", "logits pass through 4 tanh(x / 4)", "SPEC.md GLD-2", "golden/logits", || {
        Arc::new(Logits(|_, logits| logits.iter_mut().for_each(|x| *x = 4.0 * (*x / 4.0).tanh())))
    }),
    forward(
        "last-logits-not-written",
        "logits beyond the last multiple of 16 are zero",
        "ik_llama.cpp PR #213, mlx #4250",
        "golden/logits",
        || {
            Arc::new(Logits(|_, logits| {
                let whole = logits.len() / 16 * 16;
                logits[whole..].fill(0.0);
            }))
        },
    ),
    forward(
        "last-logit-not-written",
        "the logit of the last token is that of the one before it",
        "ik_llama.cpp PR #213",
        "golden/reproduced_rows",
        || {
            Arc::new(Logits(|_, logits| {
                let last = logits.len() - 1;
                logits[last] = logits[last - 1];
            }))
        },
    ),
    forward(
        "nan-far-out",
        "logits of positions from 60 on are NaN, and nobody looks",
        "transformers #39972, #37226, vLLM #48231",
        "numerics/to_the_last_position",
        || Arc::new(NanFarOut),
    ),
    Fault::new(
        "overflow-not-noticed",
        "what overflows becomes logits like any other",
        "onnxruntime-genai PR #2444, vllm-rbln PR #615",
        "hostile/overflow",
        || Arc::new(NotNoticed),
    ),
    stateful(
        "first-call-unwarmed",
        "the first call of an engine reads a buffer before it is written",
        "microsoft/BitNet #547",
        "determinism/repeated_forward",
        || Arc::new(FirstCall),
    ),
    stateful(
        "leftovers-of-the-last-call",
        "the first token of a call gets some of what the last call left",
        "microsoft/BitNet #547",
        "determinism/repeated_forward",
        || Arc::new(Leftovers::default()),
    ),
    forward(
        "angles-in-bf16",
        "the angles of RoPE are computed in bf16",
        "SPEC.md GLD-2",
        "golden/reproduced_rows",
        || Arc::new(AnglesInBf16),
    ),
    forward(
        "logits-of-the-token-before",
        "in a call of several tokens a row of logits is that of the token before",
        "llama-cpp-python PR #1179",
        "golden/logits",
        || Arc::new(RowOffByOne),
    ),
];

fn largest(x: &[f32], floor: f32) -> f32 {
    x.iter().fold(floor, |a, &v| a.max(v.abs()))
}

fn codes(x: &[f32], k: f32) -> (Vec<i16>, f32) {
    (x.iter().map(|&v| (v * k).round_ties_even().clamp(-128.0, 127.0) as i16).collect(), k)
}

/// Another way from an activation to its code.
struct Rounding(fn(f32) -> f32);

impl Deviation for Rounding {
    fn quantise(&self, _: &At<'_>, x: &[f32]) -> (Vec<i16>, f32) {
        let k = (1.0 / largest(x, 1e-5)) * 127.0;
        (x.iter().map(|&v| (self.0)(v * k).clamp(-128.0, 127.0) as i16).collect(), k)
    }
}

/// Another quantiser.
struct Quantise(fn(&[f32]) -> (Vec<i16>, f32));

impl Deviation for Quantise {
    fn quantise(&self, _: &At<'_>, x: &[f32]) -> (Vec<i16>, f32) {
        (self.0)(x)
    }
}

/// One factor for all tokens of a call, as far as they are known: it depends on how a prompt is cut.
#[derive(Default)]
struct FactorOfTheCall(Mutex<HashMap<(u64, usize, u8), f32>>);

impl Deviation for FactorOfTheCall {
    fn quantise(&self, at: &At<'_>, x: &[f32]) -> (Vec<i16>, f32) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let largest_yet = known.entry((at.call.serial, at.layer, at.site as u8)).or_insert(1e-5);
        *largest_yet = largest(x, *largest_yet);
        codes(x, (1.0 / *largest_yet) * 127.0)
    }
}

/// The residual stream rounded at every addition.
struct Residual(fn(f32) -> f32);

impl Deviation for Residual {
    fn residual(&self, _: &At<'_>, x: &mut [f32], y: &[f32]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x = (self.0)(*x + y));
    }
}

/// Keys and values rounded on their way into the cache.
struct Kept(fn(f32) -> f32);

impl Deviation for Kept {
    fn remember(&self, _: &At<'_>, values: &mut [f32]) {
        values.iter_mut().for_each(|x| *x = (self.0)(*x));
    }
}

/// Logits changed at the last moment.
struct Logits(fn(&At<'_>, &mut [f32]));

impl Deviation for Logits {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        (self.0)(at, logits);
    }
}

struct NanFarOut;

impl Deviation for NanFarOut {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if at.position >= 60 {
            logits.fill(f32::NAN);
        }
    }

    fn checks_output(&self) -> bool {
        false
    }
}

/// Weights are checked when they are read, and nothing afterwards.
struct NotNoticed;

impl Deviation for NotNoticed {
    fn checks_output(&self) -> bool {
        false
    }
}

/// An engine is right from its second call on.
struct FirstCall;

impl Deviation for FirstCall {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if at.call.serial == 0 {
            logits[0] += 1e-3;
        }
    }
}

/// The accumulator of the first token is not cleared.
#[derive(Default)]
struct Leftovers(Mutex<f32>);

impl Deviation for Leftovers {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if at.position == at.call.start {
            logits[0] += *left;
        }
        *left = logits[1] * 1e-3;
    }
}

/// Position times frequency with eight bits of mantissa: right for the first positions, and ever less.
struct AnglesInBf16;

impl Deviation for AnglesInBf16 {
    fn rope(&self, _: &At<'_>, head: &mut [f32], position: usize, theta: f64) {
        let (size, half) = (head.len(), head.len() / 2);
        for i in 0..half {
            let frequency = bf16::from_f64(theta.powf(-2.0 * i as f64 / size as f64)).to_f32();
            let angle = bf16::from_f32(position as f32 * frequency).to_f32();
            let (sin, cos) = angle.sin_cos();
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * cos - b * sin;
            head[i + half] = b * cos + a * sin;
        }
    }
}

/// The rows of logits are written one place further on.
struct RowOffByOne;

impl Deviation for RowOffByOne {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let mut output = engine.honest_forward(ids, cache)?;
        let seq = output.logits.dim(1)?;
        if seq > 1 {
            let (first, rest) = (output.logits.narrow(1, 0, 1)?, output.logits.narrow(1, 0, seq - 1)?);
            output.logits = Tensor::cat(&[first, rest], 1)?;
        }
        Ok(output)
    }
}
