//! Faults of engines that claim little: 16-bit floats, or no agreement to the bit. What is allowed to them must not hide these.

use super::super::Fault;
use super::super::naive::{At, Deviation};
use super::architecture::{KvHead, RopeBase};
use super::cache::PositionsOffByOne;
use super::outputs::without_gain;
use super::{forward, stateful};
use crate::backend::{Capabilities, Noise};
use crate::invariance::Invariance;
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    forward(
        "rope-base-ignored-coarse",
        "16-bit floats: the RoPE base is 10000, whatever the file says",
        "llama.cpp PR #8676, #8650",
        "golden/logits",
        || Arc::new(RopeBase(10_000.0)),
    )
    .declaring(coarse),
    forward(
        "heads-tiled-coarse",
        "16-bit floats: query head h reads key/value head h modulo their number",
        "onnx PR #7274, axlearn PR #842, candle-vllm PR #52",
        "golden/logits",
        || Arc::new(KvHead(|head, _, kv_heads| head % kv_heads)),
    )
    .declaring(coarse),
    forward(
        "window-of-4-coarse",
        "16-bit floats: attention ends 4 positions back",
        "llama.cpp #8240 (sliding windows where there are none)",
        "golden/logits",
        || Arc::new(WindowOfFour),
    )
    .declaring(coarse),
    forward(
        "hidden-states-without-gain-coarse",
        "16-bit floats: hidden states are taken before the gain of the final norm",
        "SPEC.md SHP-5",
        "shape/hidden_states",
        || Arc::new(without_gain()),
    )
    .declaring(coarse),
    stateful(
        "cache-positions-off-by-one-fp32",
        "fp32 semantics, nothing claimed to the bit: positions behind a cache begin one after its end",
        "llama.cpp #28368, PR #7745",
        "kv_cache/chunked_is_whole",
        || Arc::new(PositionsOffByOne),
    )
    .fp32()
    .declaring(|c| c.with_invariance(Invariance::default())),
    stateful(
        "cache-positions-off-by-one-coarse",
        "16-bit floats: positions behind a cache begin one after its end",
        "llama.cpp #28368, PR #7745",
        "kv_cache/chunked_is_whole",
        || Arc::new(PositionsOffByOne),
    )
    .declaring(|c| coarse(c).with_invariance(Invariance::default())),
];

fn coarse(capabilities: Capabilities) -> Capabilities {
    capabilities.with_noise(Noise::Coarse)
}

/// What a position sees.
struct WindowOfFour;

impl Deviation for WindowOfFour {
    fn sees(&self, at: &At<'_>, other: usize) -> bool {
        other <= at.position && other + 4 > at.position
    }
}
