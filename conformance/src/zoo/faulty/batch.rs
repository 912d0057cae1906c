//! Faults by which a sequence of a batch is not the sequence alone.

use super::super::Fault;
use super::super::naive::{At, Deviation, Naive};
use super::determinism::last_bit;
use bitnet_contracts::{InferenceOutput, KVCache, Result, Tensor};
use std::sync::Arc;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "last-row-of-five",
        "of five or seven rows taken two by two the odd one reads with the wrong stride",
        "microsoft/BitNet PR #521; aprender #2753",
        "batch/row_is_alone",
        || Arc::new(Row(|batch, row| [5, 7].contains(&batch) && row == batch - 1)),
    ),
    Fault::new(
        "rows-beyond-four",
        "a kernel for four rows leaves the others of a larger batch to a wrong one",
        "aprender #3804; BitBLAS #26",
        "batch/row_is_alone",
        || Arc::new(Row(|_, row| row >= 4)),
    ),
    Fault::new(
        "rows-swapped",
        "the second and the third row of a batch come out in each other's place",
        "microsoft/BitNet PR #521; candle PR #1832, #2073",
        "batch/row_is_alone",
        || Arc::new(RowsSwapped),
    ),
    Fault::new(
        "padding-not-masked",
        "batches are padded on the left to four tokens, and the padding is seen",
        "unsloth #3699; TransformerLens #1609; transformers #18388",
        "batch/row_is_alone",
        || Arc::new(PaddingNotMasked),
    ),
    Fault::new(
        "rounding-by-batch",
        "sums are split by the number of sequences, and round with it",
        "llama.cpp #7052, #19981; vllm #51187; batch_invariant_ops #6",
        "batch/row_is_alone",
        || Arc::new(RoundingByBatch),
    ),
    Fault::new(
        "scale-of-the-batch",
        "activations are quantised by a scale that the other sequences share",
        "vllm #7779; batch_invariant_ops #6",
        "batch/loud_neighbour",
        || Arc::new(ScaleOfTheBatch),
    ),
    Fault::new(
        "equal-rows-once",
        "equal rows are computed once, and the copy is given to the row before the second",
        "candle PR #2073; BAT-2",
        "batch/order_of_rows",
        || Arc::new(EqualRowsOnce),
    ),
    Fault::new(
        "token-0-is-padding",
        "a row of nothing but token 0 is taken for padding, and its neighbours move up",
        "transformers #18388; BAT-3",
        "batch/loud_neighbour",
        || Arc::new(TokenZero),
    ),
];

/// Logits of one row: their order.
struct Row(fn(usize, usize) -> bool);

impl Deviation for Row {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if (self.0)(at.call.batch, at.sequence) {
            logits.rotate_left(1);
        }
    }
}

/// An output with its rows in another order.
fn reordered(mut output: InferenceOutput, order: &[u32]) -> Result<InferenceOutput> {
    let order = Tensor::from_vec(order.to_vec(), order.len(), output.logits.device())?;
    output.logits = output.logits.index_select(&order, 0)?;
    Ok(output)
}

/// Output rows of three and more.
struct RowsSwapped;

impl Deviation for RowsSwapped {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let output = engine.honest_forward(ids, cache)?;
        let mut order: Vec<u32> = (0..output.logits.dims()[0] as u32).collect();
        if order.len() >= 3 {
            order.swap(1, 2);
        }
        reordered(output, &order)
    }
}

/// Inputs of a batch without a cache, to whole blocks of four tokens.
struct PaddingNotMasked;

impl Deviation for PaddingNotMasked {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let rows = engine.rows(ids)?;
        let (batch, seq) = (rows.len(), rows[0].len());
        let pad = seq.next_multiple_of(4) - seq;
        if cache.is_some() || batch < 2 || pad == 0 || seq + pad > engine.config.max_position_embeddings {
            return engine.honest_forward(ids, cache);
        }
        let padded: Vec<u32> = rows.into_iter().flat_map(|row| [vec![0; pad], row].concat()).collect();
        let mut output = engine.honest_forward(&Tensor::from_vec(padded, (batch, seq + pad), ids.device())?, None)?;
        output.logits = output.logits.narrow(1, pad, seq)?;
        Ok(output)
    }
}

/// Logits of every batch: their last bit.
struct RoundingByBatch;

impl Deviation for RoundingByBatch {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if at.call.batch > 1 {
            last_bit(logits);
        }
    }
}

/// The quantiser: the factor moves with the tokens of the other rows.
struct ScaleOfTheBatch;

impl Deviation for ScaleOfTheBatch {
    fn quantise(&self, at: &At<'_>, x: &[f32]) -> (Vec<i16>, f32) {
        let own = at.sequence * at.call.seq..(at.sequence + 1) * at.call.seq;
        let others = at.call.tokens.iter().enumerate().filter(|(i, _)| !own.contains(i)).map(|(_, t)| t % 16).max();
        let louder = 1.0 + others.unwrap_or(0) as f32 / 16.0;
        let largest = x.iter().fold(1e-5f32, |a, &v| a.max(v.abs())) * louder;
        let k = (1.0 / largest) * 127.0;
        (x.iter().map(|&v| (v * k).round_ties_even() as i16).collect(), k)
    }
}

/// Output rows where an input row stands twice.
struct EqualRowsOnce;

impl Deviation for EqualRowsOnce {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let rows = engine.rows(ids)?;
        let output = engine.honest_forward(ids, cache)?;
        let mut order: Vec<u32> = (0..rows.len() as u32).collect();
        for i in 1..rows.len() {
            if rows[..i].contains(&rows[i]) {
                order.swap(i - 1, i);
            }
        }
        reordered(output, &order)
    }
}

/// RoPE and mask beside a row of token 0.
struct TokenZero;

impl Deviation for TokenZero {
    fn sees(&self, at: &At<'_>, other: usize) -> bool {
        let padding = |row: &[u32]| row.iter().all(|t| *t == 0);
        let rows = || at.call.tokens.chunks(at.call.seq.max(1));
        let beside = at.call.batch > 1 && rows().any(padding) && !rows().nth(at.sequence).is_some_and(padding);
        other <= at.position && !(beside && other == 0 && at.position > 0)
    }
}
