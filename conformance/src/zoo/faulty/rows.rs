//! Faults that hide in what an engine claims: it says that pieces, steps or batches agree statistically, and that is all
//! they do.

use super::super::Fault;
use super::super::naive::{At, Deviation};
use crate::backend::Capabilities;
use crate::case::Category;
use crate::invariance::{Invariance, Level};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

const ROWS: &[Category] = &[Category::Golden, Category::KvCache, Category::Causality, Category::Batch];

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "old-page-in-int8",
        "through a cache, keys and values behind position 512 are kept in int8, and f32 is declared",
        "llama.cpp #10697 (accuracy of a quantised KV cache); vllm #4218 (fp8 KV cache without scales)",
        "golden/cached_rows",
        || Arc::new(InInt8(|at| at.call.cached && at.position >= 512)),
    )
    .only(ROWS)
    .declaring(statistical),
    Fault::new(
        "first-page-in-int8",
        "through a cache, a first page of 64 that is full is kept in int8",
        "attention sinks kept in another type than the rest (StreamingLLM, KIVI)",
        "golden/cached_rows",
        || Arc::new(InInt8(|at| at.call.cached && at.position < 64 && at.call.seq >= 64)),
    )
    .only(ROWS)
    .declaring(statistical),
    Fault::new(
        "one-scale-for-a-step",
        "the rows of a decoding step share one activation scale, the largest so far",
        "microsoft/BitNet PR #521 (per-tensor scale on a batch); vllm #7779",
        "golden/batched_rows",
        || Arc::new(OneScaleForAStep::default()),
    )
    .only(ROWS)
    .declaring(statistical),
];

/// Nothing between pieces or rows is claimed but that they agree on the whole.
fn statistical(capabilities: Capabilities) -> Capabilities {
    let (chunking, batch) = (Some(Level::Statistical), Some(Level::Statistical));
    let invariance = Invariance { chunking, batch, ..capabilities.invariance.clone() };
    capabilities.with_invariance(invariance)
}

/// Keys and values of some positions in eight bits and a scale.
struct InInt8(fn(&At<'_>) -> bool);

impl Deviation for InInt8 {
    fn remember(&self, at: &At<'_>, values: &mut [f32]) {
        if (self.0)(at) {
            let step = values.iter().fold(0.0f32, |a, v| a.max(v.abs())) / 127.0;
            values.iter_mut().filter(|_| step > 0.0).for_each(|v| *v = (*v / step).round() * step);
        }
    }
}

/// The largest magnitude of the rows so far, by layer and place.
#[derive(Default)]
struct OneScaleForAStep(Mutex<HashMap<(usize, u8), f32>>);

impl Deviation for OneScaleForAStep {
    fn quantise(&self, at: &At<'_>, x: &[f32]) -> (Vec<i16>, f32) {
        let mut largest = x.iter().fold(1e-5f32, |a, &v| a.max(v.abs()));
        if at.call.batch > 1 && at.call.seq == 1 {
            let mut of_step = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let so_far = of_step.entry((at.layer, at.site as u8)).or_default();
            if at.sequence == 0 {
                *so_far = 0.0;
            }
            *so_far = so_far.max(largest);
            largest = *so_far;
        }
        let k = (1.0 / largest) * 127.0;
        (x.iter().map(|&v| (v * k).round_ties_even() as i16).collect(), k)
    }
}
