//! Playing a schedule on a backend: every call is held to what the contracts say of it and to the oracle's logits.
//!
//! The schedule is run in a [`Context`], so that its assertions are counted, and a panic, an abort and a hang are
//! verdicts, as in any check. It stops at the first assertion that does not hold.

use super::schedule::{Call, Form, Forward, Generate, Schedule};
use super::truth::{Row, Truth};
use crate::case::{CheckResult, Context, Stop};
use bitnet_contracts::{
    BitNetInference, DType, Device, FinishReason, ForwardPassError, GenerationConfig, GenerationError,
    GenerationResult, InferenceError, KVCache, Tensor, ThreadSafeInference, TokenizationError,
};
use std::sync::Arc;

/// The measurement of the worst row of a schedule: its distance from the oracle in units of what is allowed.
pub(super) const DISTANCE: &str = "distance_in_limits";
/// Rows of logits that were held to the oracle.
pub(super) const ROWS: &str = "rows_compared";
/// Those of them that had to be met exactly, within rounding.
pub(super) const FIRM_ROWS: &str = "firm_rows";
/// Calls that had to be refused.
pub(super) const REFUSALS: &str = "refusals";

/// Plays a schedule. The engine, the caches and the oracle are its own.
pub(crate) fn play(ctx: &mut Context<'_>, schedule: &Schedule) -> CheckResult {
    let truth = Truth::of(ctx.model().dir(), ctx.capabilities())?;
    let engine = ctx.engine()?;
    let mut player = Player {
        vocab: ctx.facts().vocab_size,
        context: ctx.facts().max_positions,
        copies: None,
        caches: schedule.caches.iter().map(|&capacity| Session::new(capacity)).collect(),
        engine,
        truth,
        tally: Tally::default(),
    };
    let mut result = Ok(());
    for (number, call) in schedule.calls.iter().enumerate() {
        result = player.call(ctx, &format!("call {number}, {}", call.name()), call);
        if result.is_err() {
            break;
        }
    }
    let Tally { distance, rows, firm, refusals } = player.tally;
    // An infinite distance is a failed assertion already, and no measurement.
    ctx.measure(DISTANCE, distance.min(f64::MAX));
    ctx.measure(ROWS, rows as f64);
    ctx.measure(FIRM_ROWS, firm as f64);
    ctx.measure(REFUSALS, refusals as f64);
    result
}

/// A cache, and the tokens that it must hold: a list for each sequence, all of one length.
struct Session {
    cache: KVCache,
    held: Vec<Vec<u32>>,
}

impl Session {
    fn new(capacity: usize) -> Self {
        Self { cache: KVCache::new(capacity), held: Vec::new() }
    }

    fn len(&self) -> usize {
        self.held.first().map_or(0, Vec::len)
    }

    fn truncate(&mut self, to: usize) {
        self.held.iter_mut().for_each(|row| row.truncate(to));
        if self.len() == 0 {
            self.held.clear();
        }
    }
}

#[derive(Default)]
struct Tally {
    distance: f64,
    rows: u64,
    firm: u64,
    refusals: u64,
}

/// A thread-safe engine and a thread-local copy of it.
struct Copies {
    shared: Arc<dyn ThreadSafeInference>,
    local: Box<dyn BitNetInference>,
}

struct Player {
    engine: Box<dyn BitNetInference>,
    /// The thread-safe engine and its copy, once a call has asked for them.
    copies: Option<Copies>,
    caches: Vec<Session>,
    truth: Truth,
    vocab: usize,
    context: usize,
    tally: Tally,
}

/// Why a call must be refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Token,
    Empty,
    Type,
    Rank,
    Room,
    Context,
    Batch,
    Undeclared,
}

impl Fault {
    fn allows(self, error: &InferenceError) -> bool {
        use ForwardPassError as F;
        use InferenceError as E;
        match self {
            Self::Token => matches!(error, E::Tokenization(TokenizationError::InvalidToken { .. })),
            Self::Empty => matches!(
                error,
                E::Tokenization(TokenizationError::EmptySequence)
                    | E::ForwardPass(F::InvalidInput { .. } | F::ShapeMismatch { .. })
            ),
            Self::Type => matches!(error, E::ForwardPass(F::InvalidInput { .. })),
            Self::Rank => matches!(error, E::ForwardPass(F::ShapeMismatch { .. })),
            Self::Room => matches!(error, E::ForwardPass(F::KVCacheError { .. })),
            Self::Context => matches!(
                error,
                E::ForwardPass(F::KVCacheError { .. } | F::InvalidInput { .. })
                    | E::Generation(GenerationError::PromptTooLong { .. } | GenerationError::ContextExhausted { .. })
            ),
            Self::Batch => matches!(
                error,
                E::ForwardPass(F::KVCacheError { .. } | F::ShapeMismatch { .. } | F::InvalidInput { .. })
            ),
            Self::Undeclared => true,
        }
    }
}

impl Player {
    fn call(&mut self, ctx: &mut Context<'_>, what: &str, call: &Call) -> CheckResult {
        match call {
            Call::Forward(forward) => self.forward(ctx, what, forward)?,
            Call::Truncate { cache, to } => {
                if let Some(session) = self.caches.get_mut(*cache) {
                    session.cache.truncate(*to);
                    session.truncate(*to);
                }
            }
            Call::Clear { cache } => {
                if let Some(session) = self.caches.get_mut(*cache) {
                    session.cache.clear();
                    session.truncate(0);
                }
            }
            Call::Reset {} => {
                self.engine.reset().map_err(|e| Stop::Unexpected(format!("{what} failed: {e}")))?;
                for session in &mut self.caches {
                    *session = Session::new(session.cache.capacity());
                }
            }
            Call::Greedy(generate) => self.greedy(ctx, what, generate)?,
            Call::Sample { generate, seed, top } => self.sample(ctx, what, generate, *seed, *top)?,
        }
        for (index, session) in self.caches.iter().enumerate() {
            let (seen, expected) = (session.cache.len(), session.len());
            let length = |len: usize| format!("{what}: cache {index} holds {len} positions");
            ctx.require(seen == expected, length(expected), length(seen))?;
        }
        Ok(())
    }

    fn forward(&mut self, ctx: &mut Context<'_>, what: &str, call: &Forward) -> CheckResult {
        let faults = self.faults(ctx, call);
        let result = self.run(ctx, call)?;
        let output = match self.judge(ctx, what, &faults, result)? {
            Some(output) => output,
            None => return Ok(()),
        };
        let (batch, seq) = (call.ids.len(), call.ids.first().map_or(0, Vec::len));
        let (dims, due) = (output.logits.dims().to_vec(), vec![batch, seq, self.vocab]);
        ctx.require(dims == due, format!("{what}: logits of shape {due:?}"), format!("{dims:?}"))?;
        let logits: Vec<f32> = output.logits.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?;
        let mut held = call.cache.and_then(|c| self.caches.get(c)).map_or_else(Vec::new, |s| s.held.clone());
        held.resize(batch, Vec::new());
        let before = held.first().map_or(0, Vec::len);
        held.iter_mut().zip(&call.ids).for_each(|(held, new)| held.extend(new));
        for (sequence, tokens) in held.iter().enumerate() {
            let rows = self.truth.rows(tokens)?;
            for (i, row) in rows[before..].iter().enumerate() {
                let seen = &logits[(sequence * seq + i) * self.vocab..][..self.vocab];
                self.judge_row(ctx, &format!("{what}: logits at position {}", before + i), seen, row)?;
            }
        }
        if let Some(session) = call.cache.and_then(|c| self.caches.get_mut(c)) {
            session.held = held;
        }
        Ok(())
    }

    fn judge_row(&mut self, ctx: &mut Context<'_>, what: &str, seen: &[f32], row: &Row) -> CheckResult {
        let distance = self.truth.distance(seen, row);
        self.tally.distance = self.tally.distance.max(distance);
        self.tally.rows += 1;
        self.tally.firm += u64::from(row.firm);
        ctx.compared(seen.len());
        let worst = seen.iter().zip(&row.logits).map(|(s, e)| (f64::from(*s) - e).abs()).enumerate();
        let (i, _) = worst.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or((0, 0.0));
        ctx.require(
            distance <= 1.0,
            format!("{what} are the oracle's: [{i}] = {:.6}", row.logits[i]),
            format!("[{i}] = {:.6}, {distance:.3e} times as far off as is allowed", seen[i]),
        )
    }

    /// What must keep a call from succeeding.
    fn faults(&self, ctx: &Context<'_>, call: &Forward) -> Vec<Fault> {
        let (batch, seq) = (call.ids.len(), call.ids.first().map_or(0, Vec::len));
        let session = call.cache.and_then(|c| self.caches.get(c));
        let before = session.map_or(0, Session::len);
        let room = session.map_or(usize::MAX, |s| s.cache.capacity() - before.min(s.cache.capacity()));
        let bad_token = call.ids.iter().flatten().any(|&t| t as usize >= self.vocab);
        let found = [
            (Fault::Token, bad_token),
            (Fault::Empty, seq == 0),
            (Fault::Type, call.form == Form::F32),
            (Fault::Rank, matches!(call.form, Form::Flat | Form::Deep)),
            (Fault::Room, seq > room),
            (Fault::Context, before + seq > self.context),
            (Fault::Batch, before > 0 && session.is_some_and(|s| s.held.len() != batch)),
            (Fault::Undeclared, batch > 1 && !ctx.capabilities().batch),
        ];
        found.into_iter().filter(|(_, holds)| *holds).map(|(fault, _)| fault).collect()
    }

    fn run(
        &mut self,
        ctx: &Context<'_>,
        call: &Forward,
    ) -> Result<bitnet_contracts::Result<bitnet_contracts::InferenceOutput>, Stop> {
        let shape = (call.ids.len(), call.ids.first().map_or(0, Vec::len));
        let flat = call.ids.concat();
        let device = self.engine.device().clone();
        let u32s = |flat: Vec<u32>| Tensor::from_vec(flat, shape, &device);
        let input = match call.form {
            Form::U32 => u32s(flat)?,
            Form::I64 => Tensor::from_vec(flat.iter().map(|&t| i64::from(t)).collect::<Vec<_>>(), shape, &device)?,
            Form::F32 => u32s(flat)?.to_dtype(DType::F32)?,
            Form::Flat => u32s(flat)?.flatten_all()?,
            Form::Deep => u32s(flat)?.reshape((1, shape.0, shape.1))?,
        };
        if call.copy && ctx.capabilities().thread_safe {
            return Ok(self.copy(ctx)?.local.forward(&input, None));
        }
        let cache = call.cache.and_then(|c| self.caches.get_mut(c)).map(|session| &mut session.cache);
        Ok(self.engine.forward(&input, cache))
    }

    /// The thread-safe engine and its thread-local copy.
    fn copy(&mut self, ctx: &Context<'_>) -> Result<&mut Copies, Stop> {
        match &mut self.copies {
            Some(copies) => Ok(copies),
            none => {
                let shared = ctx.thread_safe()?;
                let local = shared.thread_local_copy();
                let local = local.map_err(|e| Stop::Unexpected(format!("thread_local_copy failed: {e}")))?;
                Ok(none.insert(Copies { shared, local }))
            }
        }
    }

    /// Asserts that a call succeeded, or was refused with an error that one of its faults allows. Gives what a good call
    /// returned.
    fn judge<T>(
        &mut self,
        ctx: &mut Context<'_>,
        what: &str,
        faults: &[Fault],
        result: bitnet_contracts::Result<T>,
    ) -> Result<Option<T>, Stop> {
        match result {
            Ok(value) => {
                ctx.require(faults.is_empty(), format!("{what}: refused ({faults:?})"), "it succeeded")?;
                Ok(Some(value))
            }
            Err(error) if faults.is_empty() => {
                ctx.require(false, format!("{what}: succeeds"), format!("{error:?}"))?;
                Ok(None)
            }
            Err(error) => {
                let allowed = faults.iter().any(|fault| fault.allows(&error));
                ctx.require(allowed, format!("{what}: an error that says {faults:?}"), format!("{error:?}"))?;
                self.tally.refusals += 1;
                Ok(None)
            }
        }
    }

    fn generate(
        &mut self,
        ctx: &mut Context<'_>,
        what: &str,
        call: &Generate,
        config: &GenerationConfig,
    ) -> Result<Option<GenerationResult>, Stop> {
        let found = [
            (Fault::Empty, call.prompt.is_empty()),
            (Fault::Token, call.prompt.iter().any(|&t| t as usize >= self.vocab)),
            (Fault::Context, call.prompt.len() > self.context),
            (Fault::Undeclared, call.tokens == 0),
        ];
        let faults: Vec<Fault> = found.into_iter().filter(|(_, holds)| *holds).map(|(fault, _)| fault).collect();
        let result = if call.copy && ctx.capabilities().thread_safe {
            self.copy(ctx)?.shared.generate_concurrent(&call.prompt, call.tokens, config)
        } else {
            self.engine.generate(&call.prompt, call.tokens, config)
        };
        // In a full context an engine may say so with a result or with an error.
        if faults.is_empty() && call.prompt.len() == self.context && result.is_err() {
            return Ok(None);
        }
        let Some(result) = self.judge(ctx, what, &faults, result)? else { return Ok(None) };
        let room = self.context - call.prompt.len();
        let (count, most) = (result.generated_tokens.len(), call.tokens.min(room));
        ctx.require(count <= most, format!("{what}: at most {most} tokens"), format!("{count} tokens"))?;
        let foreign = result.generated_tokens.iter().find(|&&t| t as usize >= self.vocab);
        ctx.require(foreign.is_none(), format!("{what}: tokens below {}", self.vocab), format!("{foreign:?}"))?;
        ctx.require(
            result.prompt_tokens == call.prompt,
            format!("{what}: the prompt as it was"),
            format!("{:?}", result.prompt_tokens),
        )?;
        let ended = ctx.facts().eos.iter().any(|_| result.finish_reason == FinishReason::EndOfSequence);
        let why = match result.finish_reason {
            FinishReason::MaxTokens => count == call.tokens,
            FinishReason::ContextFull => count == room,
            _ => ended,
        };
        let seen = format!("{:?} after {count} tokens", result.finish_reason);
        ctx.require(why, format!("{what}: the finish reason of {most} tokens at most"), seen)?;
        Ok(Some(result))
    }

    /// Greedy tokens are the oracle's for as long as its choice is clear.
    fn greedy(&mut self, ctx: &mut Context<'_>, what: &str, call: &Generate) -> CheckResult {
        let config =
            GenerationConfig { min_new_tokens: 0, max_new_tokens: call.tokens.max(1), ..GenerationConfig::greedy() };
        let Some(result) = self.generate(ctx, what, call, &config)? else { return Ok(()) };
        let mut tokens = call.prompt.clone();
        for step in 0..call.tokens.min(self.context - call.prompt.len()) {
            let rows = self.truth.rows(&tokens)?;
            let Some(expected) = rows.last().and_then(|row| self.truth.clear_top(row)) else { return Ok(()) };
            let seen = result.generated_tokens.get(step).copied();
            let at_end = seen.is_none() && ctx.facts().eos.contains(&expected);
            ctx.require(
                seen == Some(expected) || at_end,
                format!("{what}: token {step} is {expected}"),
                format!("{seen:?} of {:?}", result.generated_tokens),
            )?;
            if at_end {
                return Ok(());
            }
            tokens.push(expected);
        }
        Ok(())
    }

    /// One seed means one text, and every token is among the most likely ones.
    fn sample(&mut self, ctx: &mut Context<'_>, what: &str, call: &Generate, seed: u64, top: usize) -> CheckResult {
        let top = top.max(1);
        let config = GenerationConfig {
            temperature: 1.0,
            top_k: Some(top),
            top_p: None,
            repetition_penalty: 1.0,
            min_new_tokens: 0,
            max_new_tokens: call.tokens.max(1),
            seed: Some(seed),
            ..GenerationConfig::default()
        };
        let Some(first) = self.generate(ctx, what, call, &config)? else { return Ok(()) };
        let Some(again) = self.generate(ctx, what, call, &config)? else { return Ok(()) };
        ctx.require(
            again.generated_tokens == first.generated_tokens,
            format!("{what}: {:?} again", first.generated_tokens),
            format!("{:?}", again.generated_tokens),
        )?;
        let mut tokens = call.prompt.clone();
        for &token in &first.generated_tokens {
            let rows = self.truth.rows(&tokens)?;
            if let Some(row) = rows.last()
                && let Some(clear) = self.truth.clear_margin(row)
            {
                let above = row.logits.iter().filter(|&&x| x > row.logits[token as usize] + clear).count();
                ctx.require(
                    above < top,
                    format!("{what}: a token of the top {top} at position {}", tokens.len()),
                    format!("token {token}, with {above} above it"),
                )?;
            }
            tokens.push(token);
        }
        Ok(())
    }
}
