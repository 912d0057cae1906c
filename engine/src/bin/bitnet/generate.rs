//! `bitnet generate`: continue a prompt.

use std::io::{Write, stdout};

use bitnet_contracts::{BitNetInference, GenerationConfig};
use bitnet_engine::CpuEngine;
use clap::Args;
use serde_json::json;

use crate::{ModelArgs, Outcome};

/// Arguments of `bitnet generate`.
#[derive(Args)]
pub(crate) struct GenerateArgs {
    /// The text to continue.
    prompt: String,
    #[command(flatten)]
    model: ModelArgs,
    /// Most tokens to generate.
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_tokens: usize,
    /// Seed of the sampling; the same seed gives the same text on every machine (default: a fresh one).
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Temperature; 0 takes the most likely token always.
    #[arg(long, default_value_t = 0.6, value_name = "T")]
    temp: f32,
    /// Sample from the K most likely tokens.
    #[arg(long, default_value_t = 50, value_name = "K")]
    top_k: usize,
    /// Sample from the smallest set of tokens with this share of the probability.
    #[arg(long, default_value_t = 0.9, value_name = "P")]
    top_p: f32,
    /// Penalty on tokens that were there before; 1 is none.
    #[arg(long, default_value_t = 1.1, value_name = "R")]
    repetition_penalty: f32,
    /// Stop before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Print one JSON object instead of the text.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &GenerateArgs) -> Outcome {
    let mut engine = CpuEngine::open(&args.model.source()?, &args.model.options())?;
    let tokenizer = engine.tokenizer().cloned().ok_or_else(|| format!("{} has no tokenizer", args.model.name()))?;
    let prompt = tokenizer.encode(&args.prompt)?;
    let config = GenerationConfig {
        max_new_tokens: args.max_tokens,
        max_total_tokens: engine.config().max_position_embeddings,
        temperature: args.temp,
        top_k: Some(args.top_k),
        top_p: Some(args.top_p),
        repetition_penalty: args.repetition_penalty,
        stop_sequences: args.stop.clone(),
        seed: args.seed,
        ..GenerationConfig::default()
    };
    // Text that may turn out to belong to a stop text is not shown early: with stop texts, nothing is until the end.
    let stream = !args.json && args.stop.is_empty();
    let mut decode = tokenizer.stream();
    let mut failure = None;
    // The prompt is shown with the first token, when it is sure that there is no error to show instead.
    let mut unseen = Some(args.prompt.as_str());
    let result = engine.generate_streaming(&prompt, args.max_tokens, &config, &mut |token| {
        if stream && failure.is_none() {
            failure = show(unseen.take(), decode(token)).err();
        }
    })?;
    if let Some(failure) = failure {
        return Err(failure);
    }
    if args.json {
        let report = json!({
            "prompt": args.prompt,
            "text": result.generated_text,
            "prompt_tokens": result.prompt_tokens,
            "generated_tokens": result.generated_tokens,
            "finish_reason": result.finish_reason,
            "prefill_s": result.timing.prefill.as_secs_f64(),
            "decode_s": result.timing.decode.as_secs_f64(),
            "time_to_first_token_s": result.timing.time_to_first_token.as_secs_f64(),
            "tokens_per_s": result.tokens_per_second(),
        });
        writeln!(stdout(), "{report:#}")?;
    } else if stream {
        writeln!(stdout(), "{}", unseen.unwrap_or_default())?;
    } else {
        writeln!(stdout(), "{}{}", args.prompt, result.generated_text)?;
    }
    Ok(())
}

fn show(prompt: Option<&str>, piece: bitnet_contracts::Result<Option<String>>) -> Outcome {
    let mut out = stdout().lock();
    write!(out, "{}{}", prompt.unwrap_or_default(), piece?.unwrap_or_default())?;
    out.flush()?;
    Ok(())
}
