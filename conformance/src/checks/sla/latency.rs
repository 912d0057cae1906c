//! SLA-1, SLA-2, SLA-6: latencies that hold, on the caller's clock, of output that is verified in the same run.

use super::super::process;
use super::super::stats::top_two;
use super::super::support::{
    Logits, exact, forward, generate, greedy, ids, logits_of, own_margin, prompt, same_logits,
};
use super::clock::{self, Figures, Request};
use super::decide::{Claim, Decision, Ruling, Sample, percentile};
use super::noise::{Stopwatch, millis};
use super::report_samples;
use crate::case::{CheckResult, Context, Stop};
use crate::invariance::Axis;
use crate::measure;
use crate::tolerance;
use bitnet_contracts::{
    BitNetInference, FinishReason, ForwardPassMetrics, GenerationResult, KVCache, PerformanceContract,
    PerformanceMonitor,
};
use std::collections::VecDeque;
use std::time::Duration;

/// Decode steps of one session or generation.
const STEPS: usize = 24;
/// What may be spent on samples before a claim is left open.
const BUDGET: Duration = Duration::from_secs(120);
/// Sessions after which a position that was too slow in each of them is too slow.
const SESSIONS: usize = 4;

/// The share of latencies that must be within the contract: its claim is about the 95th percentile.
const SHARE: f64 = 0.95;

/// The contract's limit, in milliseconds a token.
fn limit() -> f64 {
    f64::from(PerformanceContract::default().max_token_latency_ms)
}

/// The claim of every latency: 95 of 100 are within the contract.
fn claim() -> Claim {
    Claim { share: SHARE, limit: limit() }
}

/// Asserts once what a decision says; where it says nothing the check is inconclusive.
fn settle(ctx: &mut Context<'_>, what: &str, decision: &Decision) -> CheckResult {
    let text = decision.text();
    let claim = format!("95 % of {what} within {} ms, at 99 % confidence", limit());
    match decision.ruling {
        Ruling::Open => Err(Stop::Inconclusive(format!("not decided: {claim}: {text}"))),
        ruling => {
            ctx.check(ruling == Ruling::Holds, claim, text);
            Ok(())
        }
    }
}

/// Asserts that everything that was timed was right: speed of wrong output is no speed.
fn not_void(ctx: &mut Context<'_>, wrong: Option<String>) -> CheckResult {
    let seen = wrong.as_deref().unwrap_or_default();
    ctx.require(wrong.is_none(), "every timed output is that of an untimed evaluation", format!("void: {seen}"))
}

/// Sessions of single-token decode steps, each timed, all verified.
struct Sessions<'a> {
    /// Where the comparisons are counted: how many there are depends on the clock, so it is not the case's business.
    aside: Context<'a>,
    engine: Box<dyn BitNetInference>,
    watch: Stopwatch,
    cache: KVCache,
    tokens: Vec<u32>,
    seen: Vec<f32>,
    start: usize,
    sessions: u64,
    /// The samples of each position, `start` first.
    positions: Vec<Vec<Sample>>,
    totals: Figures,
    peak: usize,
    wrong: Option<String>,
}

impl<'a> Sessions<'a> {
    fn new(ctx: &Context<'a>, length: usize, start: usize) -> Result<Self, Stop> {
        Ok(Self {
            aside: Context::new(ctx.factory(), ctx.model(), ctx.scratch()),
            engine: ctx.engine()?,
            watch: Stopwatch::new(limit()),
            cache: KVCache::new(length),
            tokens: Vec::new(),
            seen: Vec::new(),
            start,
            sessions: 0,
            positions: vec![Vec::new(); length - start],
            totals: Figures::default(),
            peak: 0,
            wrong: None,
        })
    }

    /// Evaluates what was timed in this session once more, in one call and without a cache.
    fn verify(&mut self) -> CheckResult {
        if self.seen.is_empty() {
            return Ok(());
        }
        let expected = logits_of(self.engine.as_mut(), &self.tokens[..self.cache.len()])?;
        let what = format!("logits of the timed steps of session {}", self.sessions);
        if !same_logits(
            &mut self.aside,
            Axis::Chunking,
            &what,
            &self.seen,
            &expected.data[self.start * expected.vocab..],
        ) {
            self.wrong.get_or_insert(what);
        }
        self.seen.clear();
        Ok(())
    }

    /// A new session on tokens that were in no other: an engine that remembers answers gains nothing.
    fn begin(&mut self) -> CheckResult {
        self.verify()?;
        self.tokens = prompt(self.aside.facts(), self.cache.capacity(), 1000 + self.sessions);
        self.sessions += 1;
        self.cache = KVCache::new(self.cache.capacity());
        forward(self.engine.as_mut(), &[self.tokens[..self.start].to_vec()], Some(&mut self.cache))?;
        Ok(())
    }

    /// The next step; `None` once output was wrong or a position is known to be too slow.
    fn step(&mut self) -> Result<Option<Sample>, Stop> {
        if self.sessions == 0 || self.cache.remaining() == 0 {
            self.begin()?;
            if self.wrong.is_some() || self.slow_position().is_some() {
                return Ok(None);
            }
        }
        let at = self.cache.len();
        let input = ids(&[vec![self.tokens[at]]], self.engine.device())?;
        let (engine, cache) = (&mut self.engine, &mut self.cache);
        let (output, sample) = self.watch.time(1, || engine.forward(&input, Some(cache)));
        let output = output?;
        self.totals.add(millis(output.metrics.total_time), sample.wall);
        self.peak = self.peak.max(output.metrics.peak_memory_usage).max(output.memory_usage.peak_usage);
        self.seen.extend(Logits::of(&output)?.data);
        self.positions[at - self.start].push(sample);
        Ok(Some(sample))
    }

    /// A position that was too slow in every one of at least [`SESSIONS`] sessions.
    fn slow_position(&self) -> Option<usize> {
        let slow = |samples: &&Vec<Sample>| samples.len() >= SESSIONS && samples.iter().all(|s| s.own > limit());
        self.positions.iter().position(|samples| slow(&samples)).map(|at| self.start + at)
    }

    /// How much longer a step takes in the last quarter of the positions than in the first.
    fn growth(&self) -> f64 {
        let quarter = (self.positions.len() / 4).max(1);
        let median = |part: &[Vec<Sample>]| {
            let walls: Vec<f64> = part.iter().flatten().map(|sample| sample.wall).collect();
            percentile(&walls, 0.5)
        };
        median(&self.positions[self.positions.len() - quarter..]) / median(&self.positions[..quarter])
    }
}

pub(super) fn gate(ctx: &mut Context<'_>) -> CheckResult {
    let length = ctx.facts().max_positions.min(8 + STEPS);
    let before = process::memory();
    let mut sessions = Sessions::new(ctx, length, 8.min(length / 2))?;
    let decision = claim().decide(BUDGET, || sessions.step())?;
    sessions.verify()?;
    sessions.watch.report(ctx);
    not_void(ctx, sessions.wrong.take())?;
    let slow = sessions.slow_position();
    ctx.check(slow.is_none(), format!("no position always above {} ms", limit()), format!("position {slow:?}"));
    if slow.is_none() {
        settle(ctx, "decode steps", &decision)?;
    }
    sessions.totals.fit(ctx, "total_time of the steps", "the caller's clock");
    sessions.totals.own_up(ctx, "total_time of the steps", "the caller's clock", &tolerance::TIME_OWNED);
    let latency = percentile(&decision.walls(), 0.5);
    report_samples(ctx, "step_ms", &decision.walls());
    ctx.samples(measure::TOKEN_LATENCY_MS, decision.walls());
    ctx.timing(measure::TOKEN_LATENCY_MS, latency);
    ctx.timing(measure::THROUGHPUT_TPS, 1e3 / latency);
    let growth = sessions.growth();
    if growth.is_finite() {
        // What the contracts leave open: an engine may compute everything again at every step, if it is fast enough.
        ctx.timing("latency_growth_over_context", growth);
    }
    // The engine's own word on memory, and what its process took, whichever is more.
    let grown = match (before, process::memory()) {
        (Some(before), Some(after)) => after.peak_resident - before.resident,
        _ => 0.0,
    };
    let told = sessions.peak.max(sessions.engine.memory_usage().peak_usage);
    ctx.timing(measure::PEAK_MEMORY_BYTES, told as f64);
    let steps = decision.samples.len();
    let metrics = ForwardPassMetrics {
        total_time: Duration::from_secs_f64(latency * steps as f64 / 1e3),
        peak_memory_usage: told.max(grown as usize),
        ..ForwardPassMetrics::new()
    };
    let mut monitor = PerformanceMonitor::new(PerformanceContract::default());
    let verdict = monitor.validate_performance(&metrics, steps);
    ctx.check_ok(format!("PerformanceContract::default() at {latency:.3} ms a token"), verdict);
    let on_cpu = sessions.engine.device().is_cpu();
    let target = if on_cpu { PerformanceContract::cpu_target() } else { PerformanceContract::gpu_target() };
    // The distance to the target is reported, not gated: the target is stated for the 2B model.
    ctx.timing("target_latency_ratio", latency / f64::from(target.max_token_latency_ms));
    Ok(())
}

/// What is wrong with a greedy generation, by one untimed evaluation of it all: every id must be the most likely one
/// after those before it, as far as the backend's noise lets anyone tell.
fn wrong_greedy(
    ctx: &Context<'_>,
    engine: &mut dyn BitNetInference,
    tokens: &[u32],
    count: usize,
    result: &GenerationResult,
) -> Result<Option<String>, Stop> {
    let made = &result.generated_tokens;
    if made.len() > count {
        return Ok(Some(format!("{} ids where {count} were asked for", made.len())));
    }
    let sequence = [tokens, made].concat();
    let ended = result.finish_reason == FinishReason::EndOfSequence;
    let logits = logits_of(engine, &sequence[..sequence.len() - usize::from(!ended)])?;
    for at in 0..made.len() + usize::from(ended) {
        let row = logits.row(0, tokens.len() - 1 + at);
        let (top, _) = top_two(row);
        let margin = if exact(ctx) { 0.0 } else { own_margin(ctx, row) };
        let behind = |id: u32| f64::from(row[top]) - row.get(id as usize).map_or(f64::NEG_INFINITY, |&x| f64::from(x));
        let right = match made.get(at) {
            Some(&id) => id as usize == top || behind(id) < margin,
            None => ctx.facts().eos.iter().any(|&id| id as usize == top || behind(id) < margin),
        };
        if !right {
            return Ok(Some(format!("id {at} after {tokens:?} is {:?}, not {top}", made.get(at))));
        }
    }
    Ok(None)
}

pub(super) fn time_to_first_token(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let room = ctx.facts().max_positions;
    let lengths = [4, 8, 24].map(|length: usize| length.min(room * 3 / 4).max(1));
    let (mut watch, mut figures, mut taken, mut wrong) = (Stopwatch::new(limit()), Figures::default(), 0, None);
    let decision = claim().decide(BUDGET, || {
        let length = lengths[taken % lengths.len()];
        let tokens = prompt(ctx.facts(), length, 1_010_000 + taken as u64);
        taken += 1;
        let (result, sample) = watch.time(length, || generate(engine.as_mut(), &tokens, 1, &greedy()));
        let result = result?;
        if !result.generated_tokens.is_empty() {
            figures.add(millis(result.timing.time_to_first_token), sample.wall * length as f64);
        }
        wrong = wrong_greedy(ctx, engine.as_mut(), &tokens, 1, &result)?;
        Ok(wrong.is_none().then_some(sample))
    })?;
    watch.report(ctx);
    not_void(ctx, wrong)?;
    settle(ctx, "times to the first token, for each token of the prompt,", &decision)?;
    let walls = decision.walls();
    report_samples(ctx, "first_token_ms_per_prompt_token", &walls);
    let longest = lengths[2] as f64;
    let of_longest: Vec<f64> = walls.iter().skip(2).step_by(lengths.len()).map(|each| each * longest).collect();
    let first = percentile(&of_longest, 0.5);
    ctx.timing(measure::TIME_TO_FIRST_TOKEN_MS, first);
    ctx.timing("prefill_tokens_per_s", longest * 1e3 / first);
    figures.fit(ctx, "time_to_first_token", "the caller's clock");
    figures.own_up(ctx, "time_to_first_token", "the caller's clock", &tolerance::TIME_OWNED);
    Ok(())
}

pub(super) fn generation(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let length = 4.min(ctx.facts().max_positions / 2).max(1);
    let count = STEPS.min(ctx.facts().max_positions - length);
    let (mut watch, mut left, mut requests) = (Stopwatch::new(limit()), VecDeque::new(), Vec::new());
    let (mut asked, mut wrong, mut told) = (0u64, None, Figures::default());
    let decision = claim().decide(BUDGET, || {
        while left.is_empty() && asked < super::decide::LOOKS[3] as u64 {
            let tokens = prompt(ctx.facts(), length, 1_050_000 + asked);
            asked += 1;
            let (result, sample) = watch.time(1, || generate(engine.as_mut(), &tokens, count, &greedy()));
            let result = result?;
            wrong = wrong_greedy(ctx, engine.as_mut(), &tokens, count, &result)?;
            if wrong.is_some() {
                return Ok(None);
            }
            if result.finish_reason == FinishReason::MaxTokens {
                told.add(clock::accounted(&result), sample.wall);
            }
            let (request, steps) = shared_out(&result, sample);
            requests.push(request);
            left.extend(steps);
        }
        Ok(left.pop_front())
    })?;
    watch.report(ctx);
    not_void(ctx, wrong)?;
    settle(ctx, "tokens after the first", &decision)?;
    told.fit(ctx, "time_to_first_token and the ids after it", "the caller's clock");
    told.own_up(ctx, "time_to_first_token and the ids after it", "the caller's clock", &tolerance::TIME_OWNED);
    report_samples(ctx, "output_token_ms", &decision.walls());
    let median = |values: Vec<f64>| percentile(&values, 0.5);
    let tpot = median(requests.iter().filter_map(Request::time_per_output_token).collect());
    if tpot.is_finite() {
        ctx.timing("time_per_output_token_ms", tpot);
    }
    let rate = median(requests.iter().map(Request::tokens_per_second).collect());
    ctx.timing("generated_tokens_per_s", rate);
    let least = f64::from(PerformanceContract::default().min_throughput_tps);
    ctx.check_at_least("returned ids a second, median of the generations", rate, least);
    Ok(())
}

/// A generation by the caller's clock: the engine says how the time of the call was shared out among the ids, the clock
/// says how much there was to share.
fn shared_out(result: &GenerationResult, sample: Sample) -> (Request, Vec<Sample>) {
    let ids = result.generated_tokens.len();
    // Figures that are not those of the ids are not believed at all.
    let told = if result.timing.per_token.len() == ids { clock::accounted(result) } else { 0.0 };
    let share = |time: f64| if told > 0.0 { time / told } else { 1.0 / ids.max(1) as f64 };
    let first = share(millis(result.timing.time_to_first_token)) * sample.wall;
    let part = |at: usize| share(result.timing.per_token.get(at).map_or(0.0, |&time| millis(time)));
    let steps = (1..ids).map(|at| Sample { wall: part(at) * sample.wall, own: part(at) * sample.own }).collect();
    (Request { whole: sample.wall, first, ids }, steps)
}
