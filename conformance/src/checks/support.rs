//! What the checks share: prompts, calls, logits by row, and "the same logits" as far as a backend claims it.

use crate::backend::{Noise, Semantics};
use crate::case::{Context, Stop};
use crate::invariance::{Axis, Level};
use crate::model::ModelFacts;
use crate::tolerance;
use bitnet_contracts::{
    BitNetInference, DType, Device, FinishReason, GenerationConfig, GenerationResult, InferenceError, InferenceOutput,
    KVCache, Tensor,
};
use std::fmt::Display;

/// The model with a context small enough to fill: 32 positions, tied, bf16.
pub(super) const SMALL_CONTEXT: &str = "context-32";
/// A small tied bf16 model for the sampling tables: 97 tokens, 64 positions.
pub(super) const TABLE_MODEL: &str = "gqa1-tied-bf16";
/// A small untied f32 model, whose file the checks can edit value by value.
pub(super) const EDIT_MODEL: &str = "gqa2-untied-f32";

/// Logits on the host.
pub(super) struct Logits {
    /// Sequences.
    pub batch: usize,
    /// Positions of each.
    pub seq: usize,
    /// Logits of each position.
    pub vocab: usize,
    /// All of them, row-major.
    pub data: Vec<f32>,
}

impl Logits {
    /// Reads a tensor of rank 3 and any float type.
    pub(super) fn of(output: &InferenceOutput) -> Result<Self, Stop> {
        let dims = output.logits.dims();
        let &[batch, seq, vocab] = dims else {
            return Err(Stop::Unexpected(format!("logits have shape {dims:?}, not [batch, seq, vocab]")));
        };
        let data = output.logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(Self { batch, seq, vocab, data })
    }

    /// The logits of one position.
    pub(super) fn row(&self, sequence: usize, position: usize) -> &[f32] {
        let start = (sequence * self.seq + position) * self.vocab;
        &self.data[start..start + self.vocab]
    }

    /// The logits of the last position of a sequence.
    pub(super) fn last(&self, sequence: usize) -> &[f32] {
        self.row(sequence, self.seq - 1)
    }

    /// All logits of one sequence.
    pub(super) fn sequence(&self, sequence: usize) -> &[f32] {
        let size = self.seq * self.vocab;
        &self.data[sequence * size..(sequence + 1) * size]
    }

    /// The logits of the first `positions` positions of a sequence.
    pub(super) fn prefix(&self, sequence: usize, positions: usize) -> &[f32] {
        &self.sequence(sequence)[..positions * self.vocab]
    }
}

/// Ids as a `[batch, seq]` tensor of u32 on a device. All rows have one length.
pub(super) fn ids(rows: &[Vec<u32>], device: &Device) -> Result<Tensor, Stop> {
    let seq = rows.first().map_or(0, Vec::len);
    Ok(Tensor::from_vec(rows.concat(), (rows.len(), seq), device)?)
}

/// One forward call, with the backend's own error kept apart.
pub(super) fn try_forward(
    engine: &mut dyn BitNetInference,
    rows: &[Vec<u32>],
    cache: Option<&mut KVCache>,
) -> Result<bitnet_contracts::Result<InferenceOutput>, Stop> {
    let input = ids(rows, &engine.device().clone())?;
    Ok(engine.forward(&input, cache))
}

/// One forward call that must succeed and give logits for every position of every row.
pub(super) fn forward(
    engine: &mut dyn BitNetInference,
    rows: &[Vec<u32>],
    cache: Option<&mut KVCache>,
) -> Result<Logits, Stop> {
    let logits = Logits::of(&try_forward(engine, rows, cache)??)?;
    let seq = rows.first().map_or(0, Vec::len);
    let vocab = engine.config().vocab_size;
    if (logits.batch, logits.seq, logits.vocab) != (rows.len(), seq, vocab) {
        return Err(Stop::Unexpected(format!(
            "logits have shape {:?}, and [{}, {seq}, {vocab}] was due",
            [logits.batch, logits.seq, logits.vocab],
            rows.len(),
        )));
    }
    Ok(logits)
}

/// The logits of one sequence without a cache: `[seq × vocab]`.
pub(super) fn logits_of(engine: &mut dyn BitNetInference, tokens: &[u32]) -> Result<Logits, Stop> {
    forward(engine, &[tokens.to_vec()], None)
}

/// The logits of one sequence fed through a cache in pieces of the given sizes, put together again.
pub(super) fn chunked(
    engine: &mut dyn BitNetInference,
    tokens: &[u32],
    sizes: &[usize],
    cache: &mut KVCache,
) -> Result<Vec<f32>, Stop> {
    let (mut data, mut start) = (Vec::new(), 0);
    for &size in sizes {
        let piece = tokens[start..start + size].to_vec();
        data.extend(forward(engine, &[piece], Some(cache))?.data);
        start += size;
    }
    Ok(data)
}

/// One generation, with its error as the end of the check.
pub(super) fn generate(
    engine: &mut dyn BitNetInference,
    prompt: &[u32],
    max_tokens: usize,
    config: &GenerationConfig,
) -> Result<GenerationResult, Stop> {
    engine.generate(prompt, max_tokens, config).map_err(|e| Stop::Unexpected(format!("generate failed: {e}")))
}

/// The most likely token at every step, with no token held back for `min_new_tokens`.
pub(super) fn greedy() -> GenerationConfig {
    GenerationConfig { min_new_tokens: 0, ..GenerationConfig::greedy() }
}

/// The greedy continuation of a prompt by the backend's own forward pass, without a cache: the lowest id among equals.
/// Gives the tokens, and whether each leads by more than the backend's own noise.
pub(super) fn own_greedy(
    ctx: &Context<'_>,
    engine: &mut dyn BitNetInference,
    prompt: &[u32],
    steps: usize,
) -> Result<Vec<(u32, bool)>, Stop> {
    let mut tokens = prompt.to_vec();
    let mut out = Vec::with_capacity(steps);
    for _ in 0..steps {
        let logits = logits_of(engine, &tokens)?;
        let (token, margin) = super::stats::top_two(logits.last(0));
        let clear = exact(ctx) || margin > own_margin(ctx, logits.last(0));
        out.push((token as u32, clear));
        tokens.push(token as u32);
    }
    Ok(out)
}

/// A greedy continuation as far as an engine may give it: up to the model's own end-of-sequence token, where the engine
/// says that it stopped there (with no `eos_token_id` configured, both readings are allowed).
pub(super) fn until_eos(facts: &ModelFacts, result: &GenerationResult, tokens: &[u32]) -> Vec<u32> {
    if result.finish_reason != FinishReason::EndOfSequence {
        return tokens.to_vec();
    }
    tokens.iter().copied().take_while(|t| !facts.eos.contains(t)).collect()
}

/// Sampling with nothing switched on: temperature 1, no filter, no penalty, no token held back.
pub(super) fn plain(seed: u64) -> GenerationConfig {
    GenerationConfig {
        temperature: 1.0,
        top_k: None,
        top_p: None,
        repetition_penalty: 1.0,
        min_new_tokens: 0,
        do_sample: true,
        seed: Some(seed),
        ..GenerationConfig::default()
    }
}

/// A well-mixed 64-bit value from another (the finaliser of splitmix64).
pub(super) fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A prompt of `len` ordinary tokens that depends on `salt` alone. Tokens that the model calls beginning or end of a
/// text are left out.
pub(super) fn prompt(facts: &ModelFacts, len: usize, salt: u64) -> Vec<u32> {
    let special = |token: u32| facts.bos == Some(token) || facts.eos.contains(&token);
    let alphabet: Vec<u32> =
        (0..facts.vocab_size as u32).filter(|&t| !special(t)).take(facts.prompts.alphabet.unwrap_or(0)).collect();
    let mut tokens = Vec::with_capacity(len);
    let mut state = mix(salt.wrapping_add(facts.prompts.salt) ^ 0xb17e);
    while tokens.len() < len {
        state = mix(state);
        if !alphabet.is_empty() {
            tokens.push(alphabet[(state % alphabet.len() as u64) as usize]);
            continue;
        }
        let token = (state % facts.vocab_size.max(1) as u64) as u32;
        if !special(token) || facts.vocab_size < 8 {
            tokens.push(token);
        }
    }
    tokens
}

/// How long a prompt of `wanted` tokens is to be, in a check that can do with any number from 1 on.
pub(super) fn length(facts: &ModelFacts, wanted: usize) -> usize {
    facts.prompts.longest.map_or(wanted, |longest| wanted.min(longest.max(1)))
}

/// The same token as another one: one step on in the vocabulary, never special.
pub(super) fn other_token(facts: &ModelFacts, token: u32) -> u32 {
    let vocab = facts.vocab_size as u32;
    (1..vocab)
        .map(|step| (token + step * 7) % vocab)
        .find(|&t| t != token && facts.bos != Some(t) && !facts.eos.contains(&t))
        .unwrap_or((token + 1) % vocab)
}

/// Asserts that a backend evaluated the same positions to the same logits by two ways that differ along an axis, as
/// exactly as it claims: bit for bit, or within what its arithmetic can be held to, with or without the same top-1.
#[track_caller]
pub(super) fn same_logits(
    ctx: &mut Context<'_>,
    axis: Axis,
    what: impl Display,
    seen: &[f32],
    expected: &[f32],
) -> bool {
    let vocab = ctx.facts().vocab_size;
    same_logits_of(ctx, vocab, axis, what, seen, expected)
}

/// As [`same_logits`], of a model that is not the case's own and has `vocab` tokens.
#[track_caller]
pub(super) fn same_logits_of(
    ctx: &mut Context<'_>,
    vocab: usize,
    axis: Axis,
    what: impl Display,
    seen: &[f32],
    expected: &[f32],
) -> bool {
    match ctx.level(axis) {
        Level::Bitwise => ctx.check_bits(what, seen, expected),
        Level::ArgmaxStable => {
            let what = what.to_string();
            let near = near_logits(ctx, vocab, &what, seen, expected);
            same_top(ctx, vocab, &what, seen, expected) && near
        }
        Level::Statistical => near_logits(ctx, vocab, what, seen, expected),
    }
}

/// Asserts that two evaluations of the same positions agree within the noise that the backend declares.
#[track_caller]
fn near_logits(ctx: &mut Context<'_>, vocab: usize, what: impl Display, seen: &[f32], expected: &[f32]) -> bool {
    let capabilities = ctx.capabilities();
    if (capabilities.semantics, capabilities.noise) == (Semantics::Fp32, Noise::F32) {
        return ctx.check_close_within(what, seen, expected, reach(expected), &tolerance::FP32_SELF);
    }
    if seen.len() != expected.len() {
        return ctx.check_eq(format!("{what}: values"), seen.len(), expected.len());
    }
    let mut rows = super::stats::Rows::default();
    rows.add(seen, expected, vocab.max(1));
    // Rows of another width would be judged by nonsense.
    if rows.len() * vocab != expected.len() {
        return ctx.check_eq(format!("{what}: rows of {vocab}"), rows.len() * vocab, expected.len());
    }
    ctx.compared(expected.len());
    let (row, worst) = rows.worst_pearson();
    let what = format!("{what}: 1 - correlation of the worst row (row {row})");
    ctx.check_within(what, 1.0 - worst, &tolerance::COARSE_CORRELATION)
}

/// Asserts that every row has the same most likely token, where that leads by more than the backend's own noise.
#[track_caller]
fn same_top(ctx: &mut Context<'_>, vocab: usize, what: &str, seen: &[f32], expected: &[f32]) -> bool {
    let mut rows = super::stats::Rows::default();
    rows.add(seen, expected, vocab.max(1));
    check_lost(ctx, what, &rows, reach(expected))
}

/// Holds the largest lead that a row's first token has where another one was seen to the backend's own noise.
#[track_caller]
pub(super) fn check_lost(ctx: &mut Context<'_>, what: &str, rows: &super::stats::Rows, reach: f64) -> bool {
    let (row, lost) = rows.worst(|r| r.lost_margin, |a, b| a > b);
    let what = format!("{what}: lead of the first token where another was seen (row {row} of {})", rows.len());
    match (ctx.capabilities().semantics, ctx.capabilities().noise) {
        // Each of the two logits may be off by the tolerance.
        (Semantics::Fp32, Noise::F32) => ctx.check_within(what, lost / (2.0 * reach), &tolerance::FP32_LOGIT),
        _ => ctx.check_within(what, lost, &tolerance::A8_MARGIN),
    }
}

/// Asserts that two greedy continuations of a prompt agree as far as the backend claims along an axis: exactly, or up to
/// the first step at which its own logits leave the choice to rounding.
#[track_caller]
pub(super) fn same_greedy(
    ctx: &mut Context<'_>,
    axis: Axis,
    what: impl Display,
    engine: &mut dyn BitNetInference,
    prompt: &[u32],
    seen: &[u32],
    expected: &[u32],
) -> Result<bool, Stop> {
    let first = seen.iter().zip(expected).position(|(s, e)| s != e);
    if let (false, Some(step)) = (ctx.level(axis) == Level::Bitwise, first) {
        let mut tokens = prompt.to_vec();
        tokens.extend(&expected[..step]);
        let logits = logits_of(engine, &tokens)?;
        let (_, margin) = super::stats::top_two(logits.last(0));
        if margin < own_margin(ctx, logits.last(0)) {
            ctx.note(format!("{what}: compared up to step {step}, where the top-1 margin is {margin:.2e}"));
            return Ok(ctx.check_slices(what, &seen[..step], &expected[..step]));
        }
    }
    Ok(ctx.check_slices(what, seen, expected))
}

/// Whether a generation's logits are those of one whole call, bit for bit.
pub(super) fn exact(ctx: &Context<'_>) -> bool {
    ctx.level(Axis::Chunking) == Level::Bitwise
}

/// The largest magnitude of a list of logits: the unit of errors that grow with them.
pub(super) fn reach(logits: &[f32]) -> f64 {
    logits.iter().fold(0.0, |m, &x| m.max(f64::from(x).abs()))
}

/// How far apart the two largest logits of a row, or of the rows given, must be for the backend's own noise not to swap them.
pub(super) fn own_margin(ctx: &Context<'_>, row: &[f32]) -> f64 {
    match (ctx.capabilities().semantics, ctx.capabilities().noise) {
        // Each of the two may be off by its tolerance.
        (Semantics::Fp32, Noise::F32) => 2.0 * tolerance::FP32_LOGIT.limit() * reach(row),
        _ => tolerance::A8_MARGIN.limit(),
    }
}

/// Whether an error says that numbers went bad, in either of the two places where the contracts have a word for it.
pub(super) fn is_instability(error: &InferenceError) -> bool {
    use bitnet_contracts::{ForwardPassError, OutputValidationError};
    matches!(
        error,
        InferenceError::ForwardPass(ForwardPassError::NumericalInstability { .. })
            | InferenceError::OutputValidation(OutputValidationError::NumericalInstability { .. })
    )
}

/// Whether an error is a `KVCacheError`.
pub(super) fn is_cache_error(error: &InferenceError) -> bool {
    matches!(error, InferenceError::ForwardPass(bitnet_contracts::ForwardPassError::KVCacheError { .. }))
}

/// Whether an error is an `InvalidToken`.
pub(super) fn is_invalid_token(error: &InferenceError) -> bool {
    matches!(error, InferenceError::Tokenization(bitnet_contracts::TokenizationError::InvalidToken { .. }))
}
