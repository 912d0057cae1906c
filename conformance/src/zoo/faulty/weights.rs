//! Faults of ternary weights: how they are unpacked, scaled, multiplied and summed.

use super::super::Fault;
use super::super::naive::{At, Deviation, Site, Ternary, Weights};
use super::{BATCHES, forward, stateful};
use crate::model::ModelFixture;
use bitnet_contracts::Result;
use half::f16;
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    forward(
        "interleave-of-the-other-kernel",
        "columns interleaved for blocks of 32 are read as blocks of 16",
        "microsoft/BitNet #598",
        "golden/logits",
        || Arc::new(Edited(|w| each(w, |t| interleave(t, 32)))),
    ),
    forward(
        "rows-read-in-sequence",
        "the four trits of a byte are taken for neighbouring rows",
        "microsoft/BitNet #598",
        "golden/logits",
        || Arc::new(Edited(|w| each(w, in_sequence))),
    ),
    forward(
        "codes-rotated",
        "the codes 0, 1, 2 are read as 0, 1, -1",
        "tomsanbear/bitnet-rs #1",
        "golden/logits",
        || Arc::new(Edited(|w| each(w, |t| map(t, |trit| [0, 1, -1][(trit + 1) as usize])))),
    ),
    forward(
        "signs-flipped",
        "the codes 0, 1, 2 are read as 1, 0, -1",
        "tomsanbear/bitnet-rs #1",
        "golden/logits",
        || Arc::new(Edited(|w| each(w, |t| map(t, |trit| -trit)))),
    ),
    forward("scales-dropped", "no weight scale is applied", "microsoft/BitNet #468", "golden/logits", || {
        Arc::new(Edited(|w| each(w, |t| t.scale = 1.0)))
    }),
    forward(
        "scales-inverted",
        "products are divided by the weight scale",
        "microsoft/BitNet PR #616",
        "golden/logits",
        || Arc::new(Edited(|w| each(w, |t| t.scale = 1.0 / t.scale))),
    ),
    forward(
        "scale-of-v-dropped",
        "the scale of v is taken for cancelled by the norm behind it",
        "microsoft/BitNet #468",
        "golden/facts_are_read",
        || Arc::new(Edited(|w| w.layers.iter_mut().for_each(|l| l.v.scale = 1.0))),
    ),
    forward(
        "scales-of-gate-and-up-exchanged",
        "gate is multiplied with the scale of up, and up with that of gate",
        "SPEC.md GLD-8",
        "golden/facts_are_read",
        || Arc::new(Edited(|w| w.layers.iter_mut().for_each(|l| std::mem::swap(&mut l.gate.scale, &mut l.up.scale)))),
    ),
    forward(
        "scale-of-q-for-fused-qkv",
        "q, k and v are fused and share the scale of q",
        "SPEC.md GLD-8",
        "golden/facts_are_read",
        || {
            Arc::new(Edited(|w| {
                w.layers.iter_mut().for_each(|l| (l.k.scale, l.v.scale) = (l.q.scale, l.q.scale));
            }))
        },
    ),
    forward(
        "scales-of-the-first-layer",
        "every layer has the scales of the first",
        "SPEC.md GLD-8",
        "golden/facts_are_read",
        || Arc::new(Edited(scales_of_the_first_layer)),
    ),
    forward("scales-in-bf16", "f32 scales are kept in bf16", "SPEC.md GLD-6", "golden/reproduced_rows", || {
        Arc::new(Edited(|w| each(w, |t| t.scale = half::bf16::from_f32(t.scale).to_f32())))
    }),
    forward(
        "scale-after-ternarisation",
        "the scale of master weights is the mean of what they were rounded to",
        "kyegomez/BitNet #35, #52, PR #59",
        "golden/logits",
        || Arc::new(ScaleAfterTernarisation),
    )
    .on("master-bf16"),
    Fault::new(
        "linear-class-by-habit",
        "a linear_class that is left out is taken for autobitlinear",
        "SPEC.md GLD-7",
        "golden/spellings",
        || Arc::new(LinearClassByHabit),
    ),
    Fault::new(
        "tail-columns-of-8",
        "columns beyond the last multiple of 8 are not multiplied",
        "ik_llama.cpp PR #213, mlx #4250",
        "golden/reproduced_rows",
        || Arc::new(TailColumns(8)),
    ),
    forward(
        "tail-columns-of-16",
        "columns beyond the last multiple of 16 are not multiplied",
        "ik_llama.cpp PR #213, mlx #4250",
        "golden/logits",
        || Arc::new(TailColumns(16)),
    ),
    forward(
        "tail-columns-of-512",
        "the kernel for 512 columns and more does not multiply those beyond the last multiple of 512",
        "ik_llama.cpp PR #213, mlx #4250",
        "golden/logits",
        || Arc::new(TailColumns(512)),
    )
    .on("gqa4-tied-f16"),
    forward(
        "tail-rows-of-8",
        "outputs beyond the last multiple of 8 stay zero",
        "ik_llama.cpp PR #213, mlx #4250",
        "golden/reproduced_rows",
        || Arc::new(TailRows(8)),
    ),
    forward(
        "tail-rows-of-16",
        "outputs beyond the last multiple of 16 stay zero",
        "ik_llama.cpp PR #213, mlx #4250",
        "golden/logits",
        || Arc::new(TailRows(16)),
    ),
    forward(
        "no-kernel-no-output",
        "where no kernel fits the number of columns nothing is written",
        "microsoft/BitNet #547, PR #580",
        "golden/logits",
        || {
            Arc::new(Edited(|w| {
                each(w, |t| {
                    if !t.columns.is_multiple_of(32) {
                        t.trits.fill(0)
                    }
                })
            }))
        },
    ),
    forward(
        "int16-wraps",
        "sixteen lanes of 16 bits sum codes times 0, 1, 2 and wrap",
        "microsoft/BitNet #629, #411",
        "numerics/saturated_sums",
        || Arc::new(Dot(|t, c| in_lanes(t, c, i16::wrapping_add))),
    ),
    Fault::new(
        "int16-saturates",
        "sixteen lanes of 16 bits sum codes times 0, 1, 2 and saturate",
        "ik_llama.cpp PR #427, #540",
        "numerics/saturated_sums",
        || Arc::new(Dot(|t, c| in_lanes(t, c, i16::saturating_add))),
    ),
    forward("sums-in-f16", "products are summed in half precision", "SPEC.md NUM-5", "numerics/saturated_sums", || {
        Arc::new(Dot(in_f16))
    }),
    forward(
        "float-sums-in-f16",
        "fp32 semantics: products are summed in half precision",
        "SPEC.md NUM-5",
        "numerics/saturated_sums",
        || Arc::new(FloatDotInF16),
    )
    .fp32(),
    forward(
        "sign-of-minus-128",
        "codes reach from -128 to 127, and -128 times -1 is -128",
        "ggml #1393",
        "golden/reproduced_rows",
        || Arc::new(SignOfMinus128),
    ),
    stateful(
        "prefill-kernel-transposes",
        "rows and columns of q are exchanged where a call has more than one token",
        "microsoft/BitNet #598",
        "kv_cache/chunked_is_whole",
        || Arc::new(PrefillKernel),
    ),
    stateful(
        "decode-kernel-differs",
        "the kernel for one token truncates products to multiples of 4",
        "microsoft/BitNet #468, #585",
        "kv_cache/chunked_is_whole",
        || Arc::new(DecodeKernel),
    ),
    stateful(
        "stride-of-the-batch",
        "outputs of the second and later rows of a batch are off by one",
        "microsoft/BitNet PR #521, candle PR #1832, #2073",
        "batch/row_is_alone",
        || Arc::new(StrideOfTheBatch),
    ),
    Fault::new(
        "tile-of-64-rows",
        "of the rows of a batch without a cache the 65th and later take their first output for all",
        "aprender #2753, candle PR #2073",
        "golden/logits",
        || Arc::new(TileOf64Rows),
    )
    .on("c02-h256-gqa2-untied")
    .only(BATCHES),
    forward("heads-exchanged", "the first two query heads are exchanged", "SPEC.md GLD-2", "golden/logits", || {
        Arc::new(Edited(exchange_heads))
    }),
    forward("layers-exchanged", "the first two layers are exchanged", "SPEC.md GLD-2", "golden/logits", || {
        Arc::new(Edited(|w| w.layers.swap(0, 1)))
    }),
    forward("up-of-the-next-layer", "up_proj is that of the next layer", "SPEC.md GLD-2", "golden/logits", || {
        Arc::new(Edited(|w| (1..w.layers.len()).for_each(|i| w.layers[i - 1].up = w.layers[i].up.clone())))
    }),
    forward("last-layer-skipped", "the last layer is not evaluated", "SPEC.md GLD-2", "golden/logits", || {
        Arc::new(Edited(|w| {
            if let Some(last) = w.layers.last_mut() {
                last.o.scale = 0.0;
                last.down.scale = 0.0;
            }
        }))
    }),
    Fault::new(
        "last-token-not-embedded",
        "the last id of a vocabulary that is no multiple of 4 has the embedding of the one before it",
        "SPEC.md NUM-2",
        "numerics/every_token",
        || {
            Arc::new(Edited(|w| {
                if w.facts.vocab_size.is_multiple_of(4) {
                    return;
                }
                let (size, end) = (w.facts.hidden_size, w.embedding.len());
                w.head = Some(w.head().to_vec());
                w.embedding.copy_within(end - 2 * size..end - size, end - size);
            }))
        },
    ),
];

/// Changes what was read.
pub(super) struct Edited(pub(super) fn(&mut Weights));

impl Deviation for Edited {
    fn weights(&self, weights: &mut Weights) {
        (self.0)(weights);
    }
}

/// Changes every projection.
fn each(weights: &mut Weights, change: fn(&mut Ternary)) {
    weights.layers.iter_mut().flat_map(|layer| layer.projections()).for_each(change);
}

fn map(ternary: &mut Ternary, trit: fn(i8) -> i8) {
    ternary.trits.iter_mut().for_each(|t| *t = trit(*t));
}

/// Of a block, byte b holds the trits of columns b, b + block/4, …; a kernel for half the block takes them for others.
fn interleave(ternary: &mut Ternary, block: usize) {
    let (quarter, eighth) = (block / 4, block / 8);
    for row in ternary.trits.chunks_exact_mut(ternary.columns.max(1)) {
        for piece in row.chunks_exact_mut(block) {
            let right = piece.to_vec();
            for (i, b) in (0..4).flat_map(|i| (0..quarter).map(move |b| (i, b))) {
                piece[b / eighth * block / 2 + eighth * i + b % eighth] = right[quarter * i + b];
            }
        }
    }
}

/// A byte holds rows a quarter of all rows apart; here they are read as neighbours.
fn in_sequence(ternary: &mut Ternary) {
    let (right, quarter) = (ternary.clone(), ternary.rows / 4);
    let order = (0..ternary.rows).map(|row| row % 4 * quarter + row / 4);
    ternary.trits = order.flat_map(|row| right.row(row).to_vec()).collect();
}

fn scales_of_the_first_layer(weights: &mut Weights) {
    let Some(mut first) = weights.layers.first().cloned() else { return };
    let scales = first.projections().map(|t| t.scale);
    for layer in &mut weights.layers {
        layer.projections().into_iter().zip(scales).for_each(|(t, scale)| t.scale = scale);
    }
}

fn exchange_heads(weights: &mut Weights) {
    let size = weights.facts.head_dim * weights.facts.hidden_size;
    for layer in &mut weights.layers {
        let (first, rest) = layer.q.trits.split_at_mut(size);
        // Of two different key/value heads, or the exchange would be one of equals.
        let group = weights.facts.heads / weights.facts.kv_heads;
        if let Some(other) = rest.get_mut((group - 1) * size..group * size) {
            first.swap_with_slice(other);
        }
    }
}

/// Master weights are ternarised first and averaged then, so that the scale is the share of trits that are not zero.
struct ScaleAfterTernarisation;

impl Deviation for ScaleAfterTernarisation {
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        let mut weights = Weights::load(model.dir(), model.name())?;
        if config_says(model, "online") {
            each(&mut weights, |t| {
                t.scale = t.trits.iter().filter(|t| **t != 0).count() as f32 / t.trits.len() as f32;
            });
        }
        Ok(weights)
    }
}

/// Whether `config.json` contains a word.
fn config_says(model: &ModelFixture, word: &str) -> bool {
    std::fs::read_to_string(model.dir().join("config.json")).is_ok_and(|text| text.contains(word))
}

/// `linear_class` left out means bitlinear, whose scale divides; here it multiplies.
struct LinearClassByHabit;

impl Deviation for LinearClassByHabit {
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        let mut weights = Weights::load(model.dir(), model.name())?;
        if !config_says(model, "linear_class") && !config_says(model, "online") {
            each(&mut weights, |t| t.scale = 1.0 / t.scale);
        }
        Ok(weights)
    }
}

/// The loop over whole vectors of columns has no loop for the rest behind it. From 512 on it is a kernel of its own, which
/// smaller matrices do not meet.
struct TailColumns(usize);

impl Deviation for TailColumns {
    fn weights(&self, weights: &mut Weights) {
        for ternary in weights.layers.iter_mut().flat_map(|layer| layer.projections()) {
            let whole = match ternary.columns / self.0 * self.0 {
                0 if self.0 == 512 => ternary.columns,
                whole => whole,
            };
            ternary.trits.chunks_exact_mut(ternary.columns).for_each(|row| row[whole..].fill(0));
        }
    }
}

/// The loop over whole groups of rows has no loop for the rest behind it.
struct TailRows(usize);

impl Deviation for TailRows {
    fn projected(&self, _: &At<'_>, values: &mut [f32]) {
        let whole = values.len() / self.0 * self.0;
        values[whole..].fill(0.0);
    }
}

/// Another sum of products.
struct Dot(fn(&[i8], &[i16]) -> i32);

impl Deviation for Dot {
    fn dots(&self, _: &At<'_>, matrix: &Ternary, codes: &[i16]) -> Vec<i32> {
        matrix.each_row().map(|trits| (self.0)(trits, codes)).collect()
    }
}

/// As the kernels do it: trits plus one times codes, summed by lanes, and the sum of the codes taken off at the end.
fn in_lanes(trits: &[i8], codes: &[i16], add: fn(i16, i16) -> i16) -> i32 {
    let mut lanes = [0i16; 16];
    for (i, (&t, &c)) in trits.iter().zip(codes).enumerate() {
        lanes[i % 16] = add(lanes[i % 16], (i16::from(t) + 1) * c);
    }
    lanes.iter().map(|&lane| i32::from(lane)).sum::<i32>() - codes.iter().map(|&c| i32::from(c)).sum::<i32>()
}

struct FloatDotInF16;

impl Deviation for FloatDotInF16 {
    fn dots_float(&self, _: &At<'_>, matrix: &Ternary, x: &[f32]) -> Vec<f32> {
        let half = |x: f32| f16::from_f32(x).to_f32();
        let dot = |trits: &[i8]| trits.iter().zip(x).fold(0.0, |sum, (&t, &x)| half(sum + f32::from(t) * x));
        matrix.each_row().map(dot).collect()
    }
}

fn in_f16(trits: &[i8], codes: &[i16]) -> i32 {
    let sum = |sum: f16, (&t, &c): (&i8, &i16)| f16::from_f32(sum.to_f32() + (i32::from(t) * i32::from(c)) as f32);
    trits.iter().zip(codes).fold(f16::ZERO, sum).to_f32() as i32
}

/// The factor is 128 over the largest magnitude, and the sign of a trit is applied in eight bits.
struct SignOfMinus128;

impl Deviation for SignOfMinus128 {
    fn quantise(&self, _: &At<'_>, x: &[f32]) -> (Vec<i16>, f32) {
        let k = (1.0 / x.iter().fold(1e-5f32, |a, &v| a.max(v.abs()))) * 128.0;
        (x.iter().map(|&v| (v * k).round_ties_even().clamp(-128.0, 127.0) as i16).collect(), k)
    }

    fn dots(&self, _: &At<'_>, matrix: &Ternary, codes: &[i16]) -> Vec<i32> {
        let signed = |(&t, &c): (&i8, &i16)| match t {
            -1 => i32::from((c as i8).wrapping_neg()),
            t => i32::from(t) * i32::from(c),
        };
        matrix.each_row().map(|trits| trits.iter().zip(codes).map(signed).sum()).collect()
    }
}

/// Only the kernel for many tokens is wrong.
struct PrefillKernel;

impl Deviation for PrefillKernel {
    fn projected(&self, at: &At<'_>, values: &mut [f32]) {
        if at.site == Site::Q && at.call.seq > 1 {
            values.reverse();
        }
    }
}

/// Only the kernel for one token is wrong.
struct DecodeKernel;

impl Deviation for DecodeKernel {
    fn rescale(&self, at: &At<'_>, product: i32, scale: f32, k: f32) -> f32 {
        let product = if at.call.seq == 1 { product / 4 * 4 } else { product };
        (f64::from(product) * f64::from(scale) / f64::from(k)) as f32
    }
}

/// The stride between rows of a batch is one short.
struct StrideOfTheBatch;

impl Deviation for StrideOfTheBatch {
    fn projected(&self, at: &At<'_>, values: &mut [f32]) {
        if at.sequence > 0 && at.site == Site::Down {
            values.rotate_left(1);
        }
    }
}

/// The kernel takes 64 rows of a batch at a time, and what is left over is written with a stride of zero.
struct TileOf64Rows;

impl Deviation for TileOf64Rows {
    fn projected(&self, at: &At<'_>, values: &mut [f32]) {
        let row = at.sequence * at.call.seq + at.position - at.call.start;
        if at.call.batch > 1 && !at.call.cached && row >= 64 {
            values.fill(values[0]);
        }
    }
}
