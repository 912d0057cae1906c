//! Faults of the forward pass: another function than the model's.

use super::super::Fault;
use super::super::naive::{At, Deviation};
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "silu-for-relu2",
        "the gate is SiLU, not squared ReLU",
        "llama.cpp PR #25885, #26751",
        "golden/correlation",
        || Arc::new(SiluForRelu2),
    ),
    Fault::new(
        "rope-interleaved",
        "RoPE pairs neighbours, not halves",
        "candle #3410, PR #518",
        "golden/correlation",
        || Arc::new(RopeInterleaved),
    ),
];

struct SiluForRelu2;

impl Deviation for SiluForRelu2 {
    fn gated(&self, gate: f32, up: f32) -> f32 {
        gate / (1.0 + (-gate).exp()) * up
    }
}

struct RopeInterleaved;

impl Deviation for RopeInterleaved {
    fn rope(&self, _: &At<'_>, head: &mut [f32], position: usize, theta: f64) {
        let size = head.len();
        for (i, pair) in head.chunks_exact_mut(2).enumerate() {
            let angle = position as f64 * theta.powf(-2.0 * i as f64 / size as f64);
            let (sin, cos) = (angle.sin() as f32, angle.cos() as f32);
            let (a, b) = (pair[0], pair[1]);
            pair[0] = a * cos - b * sin;
            pair[1] = b * cos + a * sin;
        }
    }
}
