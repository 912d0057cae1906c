//! `bitnet bench`: prefill and decode speed of the CPU engine.

mod report;

use std::io::{Write, stdout};
use std::time::Instant;

use bitnet_contracts::BitNetInference;
use bitnet_engine::{CpuEngine, Times};
use clap::Args;
use serde_json::json;

use report::{Parts, Report};

use crate::{ModelArgs, Outcome};

/// Arguments of `bitnet bench`.
#[derive(Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompt tokens of a run.
    #[arg(long, default_value_t = 128, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pp: u32,
    /// Generated tokens of a run.
    #[arg(long, default_value_t = 32, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    tg: u32,
    /// Positions that a run finds in the cache: prompt and generated tokens come behind them.
    #[arg(long, default_value_t = 0, value_name = "N")]
    depth: u32,
    /// Runs; the medians are reported.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

struct Sample {
    prefill_s: f64,
    decode_s: f64,
    prefill_times: Times,
    decode_times: Times,
}

pub(crate) fn run(args: &BenchArgs) -> Outcome {
    let (pp, tg, depth) = (args.pp as usize, args.tg as usize, args.depth as usize);
    let start = Instant::now();
    let mut engine = CpuEngine::open(&args.model.source()?, &args.model.options())?;
    let load_s = start.elapsed().as_secs_f64();
    let (vocabulary, context) = (engine.config().vocab_size, engine.config().max_position_embeddings);
    let positions = depth + pp + tg;
    if positions > context {
        let asked = format!("--depth {depth}, --pp {pp} and --tg {tg}");
        return Err(format!("{asked} need {positions} positions, the model has {context}").into());
    }
    let tokens: Vec<u32> = (0..depth + pp).map(|i| ((i * 7919 + 17) % vocabulary) as u32).collect();
    let (before, prompt) = tokens.split_at(depth);
    if depth > 0 {
        engine.feed_greedy(before)?;
    }
    let mut samples = Vec::new();
    for _ in 0..args.runs {
        samples.push(measure(&mut engine, depth, prompt, tg)?);
    }
    // Before the check, which reads the whole head.
    let (memory, peak) = (engine.memory_usage(), peak_rss());
    verify(&mut engine, depth, prompt)?;
    let median = |f: &dyn Fn(&Sample) -> f64| {
        let mut values: Vec<f64> = samples.iter().map(f).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let prefill_s = median(&|s| s.prefill_s);
    let decode_s = median(&|s| s.decode_s);
    let prefill = pp as f64 / prefill_s;
    let decode = tg as f64 / decode_s;
    let bytes_per_token = engine.bytes_per_step();
    let (mut prefill_parts, mut decode_parts) = (Parts::default(), Parts::default());
    for sample in &samples {
        prefill_parts.add(sample.prefill_times, sample.prefill_s);
        decode_parts.add(sample.decode_times, sample.decode_s);
    }
    let limits = Report::measure(&engine, (depth + pp, tg), (prefill, decode), (prefill_parts, decode_parts))?;
    let mut report = json!({
        "model": args.model.name(),
        "isa": engine.isa().name(),
        "threads": engine.threads(),
        "pp": pp,
        "tg": tg,
        "depth": depth,
        "kv": args.model.kv.name(),
        "runs": args.runs,
        "packed": args.model.packed.to_string(),
        "load_s": load_s,
        "prefill_tokens_per_s": prefill,
        "decode_tokens_per_s": decode,
        "time_to_first_token_s": prefill_s,
        "prefill_s": samples.iter().map(|s| s.prefill_s).collect::<Vec<_>>(),
        "decode_s": samples.iter().map(|s| s.decode_s).collect::<Vec<_>>(),
        "weight_bytes_per_token": bytes_per_token,
        "decode_gb_per_s": bytes_per_token as f64 * decode / 1e9,
        "peak_rss_bytes": peak,
        "engine_bytes": memory.peak_usage,
        "verified": true,
    });
    if let Some(report) = report.as_object_mut() {
        report.extend(limits.json());
    }
    let mut out = stdout().lock();
    if args.json {
        writeln!(out, "{report:#}")?;
        return Ok(());
    }
    writeln!(out, "{}, {} threads, {}", args.model.name(), engine.threads(), engine.isa())?;
    writeln!(out, "prefill   {prefill:10.1} tokens/s   ({pp} tokens, first token after {:.1} ms)", prefill_s * 1e3)?;
    writeln!(out, "decode    {decode:10.1} tokens/s   ({tg} tokens, {:.2} ms each)", 1e3 / decode)?;
    writeln!(
        out,
        "weights   {:10.1} MB a token, {:.1} GB/s while decoding",
        bytes_per_token as f64 / 1e6,
        bytes_per_token as f64 * decode / 1e9
    )?;
    let mb = |bytes: usize| bytes as f64 / 1e6;
    writeln!(
        out,
        "memory    {:10.1} MB held by the engine, process peak {}",
        mb(memory.peak_usage),
        match peak {
            Some(bytes) => format!("{:.1} MB", bytes as f64 / 1e6),
            None => "unknown".to_string(),
        }
    )?;
    limits.print(&mut out)?;
    Ok(())
}

/// Speed counts only if the output is right: the prompt whole and the prompt with its last token fed alone must agree to the bit, and
/// the token that was chosen without the whole head must be the one with the largest logit.
fn verify(engine: &mut CpuEngine, depth: usize, prompt: &[u32]) -> Outcome {
    engine.rewind(depth);
    let whole = engine.feed(prompt)?.to_vec();
    engine.rewind(depth);
    let (head, last) = prompt.split_at(prompt.len() - 1);
    if !head.is_empty() {
        engine.feed(head)?;
    }
    let stepped = engine.feed(last)?;
    if stepped.iter().zip(&whole).any(|(a, b)| a.to_bits() != b.to_bits()) {
        return Err("prefill and decode disagree: the figures would mean nothing".into());
    }
    engine.rewind(depth);
    if engine.feed_greedy(prompt)? != argmax(&whole) {
        return Err("the screened head chose another token: the figures would mean nothing".into());
    }
    Ok(())
}

fn measure(
    engine: &mut CpuEngine,
    depth: usize,
    prompt: &[u32],
    tg: usize,
) -> Result<Sample, Box<dyn std::error::Error>> {
    engine.rewind(depth);
    engine.take_times();
    let start = Instant::now();
    let mut next = engine.feed_greedy(prompt)?;
    let prefill_s = start.elapsed().as_secs_f64();
    let prefill_times = engine.take_times();
    let start = Instant::now();
    for _ in 0..tg {
        next = engine.feed_greedy(&[next])?;
    }
    let decode_s = start.elapsed().as_secs_f64();
    Ok(Sample { prefill_s, decode_s, prefill_times, decode_times: engine.take_times() })
}

fn argmax(logits: &[f32]) -> u32 {
    let best =
        logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &l)| if l > best.1 { (i, l) } else { best });
    best.0 as u32
}

/// The process's largest resident size, where the system tells (Linux).
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}
