//! Faults that show at size only: types that are too narrow, pages, slots and windows that end.

use super::super::Fault;
use super::super::naive::{At, Deviation, Honest, Naive, Weights};
use super::Generates;
use super::determinism::last_bit;
use crate::case::Category;
use bitnet_contracts::{
    BitNetInference, FinishReason, GenerationConfig, GenerationResult, InferenceError, InferenceOutput, KVCache,
    MemoryError, Result, Tensor, TokenizationError,
};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(super) const FAULTS: &[Fault] = &[
    Fault::new(
        "positions-in-bf16",
        "positions are rounded to bf16 before they are multiplied by frequencies: exact up to 256",
        "transformers #29285 (RoPE positions and frequencies in bf16)",
        "golden/far_positions",
        || Arc::new(Positions(8)),
    ),
    Fault::new(
        "positions-in-f16",
        "the same in f16: exact up to 2048",
        "transformers #29285",
        "golden/far_positions",
        || Arc::new(Positions(11)),
    ),
    Fault::new(
        "piece-past-its-page",
        "a piece that begins inside a page of 64 positions leaves what goes beyond it unwritten",
        "KV-11: an offset of the first page that is kept for the next",
        "kv_cache/far_pieces",
        || Arc::new(PiecePastItsPage),
    ),
    Fault::new(
        "piece-validated-in-pieces",
        "a call goes through in pieces of 128, each validated when its turn comes: those before a bad id stay in the cache",
        "KV-6: validation inside the loop over micro-batches",
        "kv_cache/far_pieces",
        || Arc::new(ValidatedInPieces),
    )
    .only(&[Category::KvCache, Category::Errors, Category::Batch]),
    Fault::new(
        "values-not-moved",
        "when the cache grows past 64 positions, rows after the first lose what they held",
        "KV-11: a reallocation that moves one stride only",
        "kv_cache/far_pieces",
        || Arc::new(ValuesNotMoved),
    )
    .only(&[Category::KvCache, Category::Errors, Category::Batch]),
    Fault::new(
        "attention-split-by-threads",
        "behind 256 positions attention is split between the threads, and rounds with their number",
        "flash decoding (split-k); llama.cpp #7052",
        "determinism/threads",
        || Arc::new(SplitByThreads),
    )
    .only(&[Category::Determinism]),
    Fault::new(
        "eight-slots",
        "a ninth sequence of a batch is given the place of the first",
        "BAT-4: slots of a fixed number",
        "batch/many_rows",
        || Arc::new(EightSlots),
    ),
    Fault::new(
        "last-position-shifted",
        "at the last position of the context every token has the logit of the next one",
        "llama.cpp #28368 (the end of the context)",
        "numerics/to_the_last_position",
        || Arc::new(EndOfTheContext),
    ),
    Fault::new(
        "prompt-window",
        "generation sees the last 256 tokens of its prompt",
        "llama.cpp #3969 (context shift unasked for)",
        "generation/long_prompt",
        || {
            Arc::new(Generates(|engine, prompt, max_tokens, config| {
                let seen = &prompt[prompt.len().saturating_sub(256)..];
                let mut result = engine.honest_generate(seen, max_tokens, config)?;
                result.prompt_tokens = prompt.to_vec();
                Ok(result)
            }))
        },
    ),
    Fault::new(
        "ids-in-16-bits",
        "ids are kept in 16 bits on their way to the embedding",
        "NUM-8; a vocabulary of 128,256",
        "numerics/large_vocabulary",
        || Arc::new(NarrowIds { read: true }),
    ),
    Fault::new(
        "drawn-ids-in-16-bits",
        "the id that is chosen is kept in 16 bits",
        "NUM-8; a vocabulary of 128,256",
        "numerics/large_vocabulary",
        || Arc::new(NarrowIds { read: false }),
    ),
    Fault::new(
        "calls-counted-in-bytes",
        "every 256th call is taken for the first, and its last logit is not computed",
        "DET-11: a counter that wraps",
        "determinism/many_calls",
        || Arc::new(CallsInBytes),
    ),
    Fault::new(
        "decoding-window",
        "after 200 generated tokens the prompt is dropped from the context",
        "llama.cpp #3969 (context shift unasked for)",
        "generation/long_generation",
        || Arc::new(DecodingWindow),
    ),
    Fault::new(
        "eight-stop-tokens",
        "stop tokens after the eighth are passed over",
        "OpenAI's API takes four, and so do servers that copy it",
        "generation/stop_token",
        || Arc::new(EightStopTokens),
    ),
    Fault::new(
        "ten-callers",
        "an eleventh caller at a time is given the session of another",
        "CON-5: a pool of a fixed number of sessions",
        "concurrency/many_callers",
        || Arc::new(TenCallers::default()),
    )
    .only(&[Category::Concurrency]),
    Fault::new(
        "permit-kept-by-errors",
        "of sixteen permits a refused call gives none back, and without one nothing is generated",
        "CON-5: a guard that only the good path drops",
        "concurrency/many_callers",
        || Arc::new(PermitKept::default()),
    )
    .only(&[Category::Concurrency]),
    Fault::new(
        "top-k-of-64",
        "a top_k above 64 is taken for 64",
        "GPU samplers with one warp's worth of candidates (FlashInfer, TensorRT-LLM)",
        "sampling/top_k",
        || Arc::new(TopKOf64),
    ),
];

/// Positions with so many significant bits, ties to even.
struct Positions(u32);

impl Deviation for Positions {
    fn rope_position(&self, _: &At<'_>, position: usize) -> usize {
        let bits = usize::BITS - position.leading_zeros();
        let step = 1usize << bits.saturating_sub(self.0);
        let (quotient, rest) = (position / step, position % step);
        let up = 2 * rest > step || 2 * rest == step && quotient % 2 == 1;
        (quotient + usize::from(up)) * step
    }
}

struct PiecePastItsPage;

impl Deviation for PiecePastItsPage {
    fn remember(&self, at: &At<'_>, values: &mut [f32]) {
        let start = at.call.start;
        if !start.is_multiple_of(64) && at.position / 64 > start / 64 {
            values.fill(0.0);
        }
    }
}

/// Forward calls with a cache.
struct ValidatedInPieces;

impl Deviation for ValidatedInPieces {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, mut cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        const PIECE: usize = 128;
        let seq = ids.dims().get(1).copied().unwrap_or(0);
        if seq <= PIECE || cache.is_none() {
            return engine.honest_forward(ids, cache);
        }
        let mut outputs = Vec::new();
        for start in (0..seq).step_by(PIECE) {
            let piece = ids.narrow(1, start, PIECE.min(seq - start))?.contiguous()?;
            outputs.push(engine.honest_forward(&piece, cache.as_deref_mut()).map_err(|error| later(error, start))?);
        }
        let logits: Vec<&Tensor> = outputs.iter().map(|output| &output.logits).collect();
        let logits = Tensor::cat(&logits, 1)?;
        let mut output = outputs.swap_remove(0);
        output.logits = logits;
        Ok(output)
    }
}

/// An error of a piece with the position that its token has in the call.
fn later(error: InferenceError, by: usize) -> InferenceError {
    match error {
        InferenceError::Tokenization(TokenizationError::InvalidToken { position, token_id, vocab_size }) => {
            TokenizationError::InvalidToken { position: position + by, token_id, vocab_size }.into()
        }
        other => other,
    }
}

struct ValuesNotMoved;

impl Deviation for ValuesNotMoved {
    fn sees(&self, at: &At<'_>, other: usize) -> bool {
        let start = at.call.start;
        let grew = (1..64).contains(&start) && start + at.call.seq > 64;
        other <= at.position && !(grew && at.sequence > 0 && other < start)
    }
}

struct SplitByThreads;

impl Deviation for SplitByThreads {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if at.position > 256 && at.call.options.threads.is_some_and(|threads| threads > 1) {
            last_bit(logits);
        }
    }
}

struct EightSlots;

impl Deviation for EightSlots {
    fn forward(&self, engine: &mut Naive, ids: &Tensor, cache: Option<&mut KVCache>) -> Result<InferenceOutput> {
        let batch = ids.dims().first().copied().unwrap_or(0);
        if batch <= 8 {
            return engine.honest_forward(ids, cache);
        }
        let slots: Vec<u32> = (0..batch as u32).map(|row| row % 8).collect();
        let slots = Tensor::from_vec(slots, batch, ids.device())?;
        engine.honest_forward(&ids.contiguous()?.index_select(&slots, 0)?, cache)
    }
}

struct EndOfTheContext;

impl Deviation for EndOfTheContext {
    fn head(&self, at: &At<'_>, weights: &Weights, hidden: &[f32]) -> Vec<f32> {
        let mut logits = Honest.head(at, weights, hidden);
        if at.position + 1 == weights.facts.max_positions {
            logits.rotate_left(1);
        }
        logits
    }
}

/// Ids as they are read, or as they are chosen.
struct NarrowIds {
    read: bool,
}

impl NarrowIds {
    fn narrow(&self, id: u32, reading: bool) -> u32 {
        if self.read == reading { id & 0xffff } else { id }
    }
}

impl Deviation for NarrowIds {
    fn embed(&self, _: &At<'_>, weights: &Weights, token: u32) -> Vec<f32> {
        let hidden = weights.facts.hidden_size;
        weights.embedding[self.narrow(token, true) as usize * hidden..][..hidden].to_vec()
    }

    fn argmax(&self, scores: &[f64], _: usize, _: &[u32]) -> u32 {
        let best = scores.iter().enumerate().fold(0, |best, (i, s)| if *s > scores[best] { i } else { best });
        self.narrow(best as u32, false)
    }
}

struct CallsInBytes;

impl Deviation for CallsInBytes {
    fn logits(&self, at: &At<'_>, _: u32, logits: &mut [f32]) {
        if at.call.serial % 256 == 255 {
            logits[0] = 0.0;
        }
    }
}

struct DecodingWindow;

impl Deviation for DecodingWindow {
    fn sees(&self, at: &At<'_>, other: usize) -> bool {
        let dropped = at.call.generating && at.call.seq == 1 && at.position > 200 && other + 200 < at.position;
        other <= at.position && !dropped
    }
}

struct EightStopTokens;

impl Deviation for EightStopTokens {
    fn ends(&self, token: u32, made: usize, config: &GenerationConfig, eos: &[u32]) -> Option<FinishReason> {
        let mut few = config.clone();
        few.stop_tokens.truncate(8);
        Honest.ends(token, made, &few, eos)
    }
}

/// How many generations go on at this moment.
#[derive(Default)]
struct TenCallers {
    present: AtomicU64,
}

impl Deviation for TenCallers {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let before = self.present.fetch_add(1, Ordering::SeqCst);
        // A session takes its time, so that all who come together are there together.
        std::thread::sleep(Duration::from_millis(2));
        let mut changed = config.clone();
        changed.seed = config.seed.map(|seed| if before >= 10 { seed + 1 } else { seed });
        let result = engine.honest_generate(prompt, max_tokens, &changed);
        self.present.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

#[derive(Default)]
struct PermitKept {
    kept: AtomicU64,
}

impl Deviation for PermitKept {
    fn generate_concurrent(
        &self,
        engine: &Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        if self.kept.load(Ordering::SeqCst) >= 16 {
            return Err(MemoryError::PoolExhausted { pool_type: "callers".to_string() }.into());
        }
        let result = engine.copy().generate(prompt, max_tokens, config);
        self.kept.fetch_add(u64::from(result.is_err()), Ordering::SeqCst);
        result
    }
}

struct TopKOf64;

impl Deviation for TopKOf64 {
    fn candidates(&self, scores: &[f64], config: &GenerationConfig) -> Vec<(u32, f64)> {
        let config = GenerationConfig { top_k: config.top_k.map(|k| k.min(64)), ..config.clone() };
        Honest.candidates(scores, &config)
    }
}
