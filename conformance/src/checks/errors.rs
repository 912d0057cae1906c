//! Input validation and the error taxonomy: every trigger its own variant, and an engine that goes on as before.

use super::support::{SMALL_CONTEXT, generate, greedy, ids, logits_of, prompt, try_forward};
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use bitnet_contracts::{
    BitNetInference, ConfigurationError, DType, ErrorContext, ErrorSeverity, ForwardPassError, GenerationConfig,
    GenerationError, InferenceError, KVCache, MemoryError, ModelError, Tensor, TokenizationError,
};

const ERRORS: Category = Category::Errors;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "ERR-1",
        "errors/token_out_of_range",
        ERRORS,
        "an id outside the vocabulary is InvalidToken with its position",
        token_out_of_range,
    )
    .on(ModelSet::Every),
    Check::new(
        "ERR-2",
        "errors/empty_input",
        ERRORS,
        "an empty prompt is EmptySequence; no batch or sequence of none",
        empty_input,
    ),
    Check::new("ERR-3", "errors/id_type", ERRORS, "ids that are not u32 or i64 are InvalidInput", id_type),
    Check::new("ERR-4", "errors/rank", ERRORS, "ids that are not of rank 2 are ShapeMismatch", rank),
    Check::new("ERR-5", "errors/too_long", ERRORS, "more tokens than the context holds are refused", too_long)
        .on(ModelSet::Only(SMALL_CONTEXT)),
    Check::new(
        "ERR-6",
        "errors/generation_config",
        ERRORS,
        "every invalid field of GenerationConfig is the source's error, NaN included",
        generation_config,
    ),
    Check::new(
        "ERR-7",
        "errors/configuration_first",
        ERRORS,
        "the full configuration is validated before anything else",
        configuration_first,
    ),
    Check::new(
        "ERR-8",
        "errors/engine_goes_on",
        ERRORS,
        "after every error the engine works as if the call had not been",
        engine_goes_on,
    ),
    Check::new(
        "ERR-9",
        "errors/context",
        ERRORS,
        "real errors name component and operation and follow the source's tables",
        context,
    ),
];

fn invalid_input(error: &InferenceError) -> bool {
    matches!(error, InferenceError::ForwardPass(ForwardPassError::InvalidInput { .. }))
}

fn token_out_of_range(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let vocab = ctx.facts().vocab_size as u32;
    let good = prompt(ctx.facts(), 4, 500);
    for (position, bad) in [(0, vocab), (2, vocab + 1), (3, u32::MAX), (1, u32::MAX - 1), (3, i32::MAX as u32)] {
        let mut tokens = good.clone();
        tokens[position] = bad;
        let at = move |error: &InferenceError| {
            matches!(error, InferenceError::Tokenization(TokenizationError::InvalidToken {
                position: p, token_id, vocab_size,
            }) if *p == position && *token_id == bad && *vocab_size == vocab)
        };
        let name = format!("InvalidToken {{ position: {position}, token_id: {bad}, vocab_size: {vocab} }}");
        let result = try_forward(engine.as_mut(), std::slice::from_ref(&tokens), None)?;
        ctx.expect_error(format!("forward with token {bad} at {position}"), result, at, &name);
        let result = engine.generate(&tokens, 2, &greedy());
        ctx.expect_error(format!("generate with token {bad} at {position}"), result, at, &name);
        let result = engine.generate_deterministic(&tokens, 2, 1);
        ctx.expect_error(format!("generate_deterministic with token {bad} at {position}"), result, at, &name);
    }
    let device = engine.device().clone();
    for bad in [-1i64, i64::MIN, i64::from(vocab), i64::from(u32::MAX), 1 << 32, (1 << 32) + 5, i64::MAX] {
        let mut tokens: Vec<i64> = good.iter().map(|&t| i64::from(t)).collect();
        tokens[1] = bad;
        let input = Tensor::from_vec(tokens, (1, 4), &device)?;
        // What is no u32 has no id to name.
        let id = u32::try_from(bad).ok();
        let at = |error: &InferenceError| {
            matches!(error, InferenceError::Tokenization(TokenizationError::InvalidToken {
                position: 1, token_id, vocab_size,
            }) if id.is_none_or(|id| *token_id == id) && *vocab_size == vocab)
        };
        let result = engine.forward(&input, None);
        let id = id.map_or_else(|| "any".to_string(), |id| id.to_string());
        let name = format!("InvalidToken {{ position: 1, token_id: {id}, vocab_size: {vocab} }}");
        ctx.expect_error(format!("forward with i64 token {bad} at 1"), result, at, &name);
    }
    if ctx.capabilities().batch {
        let mut rows = [good.clone(), good];
        rows[1][2] = vocab;
        let result = try_forward(engine.as_mut(), &rows, None)?;
        let at = |error: &InferenceError| {
            matches!(error, InferenceError::Tokenization(TokenizationError::InvalidToken {
                position: 2, token_id, ..
            }) if *token_id == vocab)
        };
        let name = "InvalidToken with its position in the sequence, 2";
        ctx.expect_error("forward with a bad token in the second row", result, at, name);
    }
    Ok(())
}

fn empty_input(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let empty = |e: &InferenceError| matches!(e, InferenceError::Tokenization(TokenizationError::EmptySequence));
    let result = engine.generate(&[], 3, &greedy());
    ctx.expect_error("generate with an empty prompt", result, empty, "TokenizationError::EmptySequence");
    let result = engine.generate_deterministic(&[], 3, 7);
    ctx.expect_error("generate_deterministic with an empty prompt", result, empty, "TokenizationError::EmptySequence");
    let device = engine.device().clone();
    for (batch, seq) in [(1, 0), (0, 3), (0, 0)] {
        let input = Tensor::zeros((batch, seq), DType::U32, &device)?;
        let nothing = |e: &InferenceError| {
            empty(e)
                || matches!(
                    e,
                    InferenceError::ForwardPass(
                        ForwardPassError::InvalidInput { .. } | ForwardPassError::ShapeMismatch { .. }
                    )
                )
        };
        let mut cache = KVCache::new(4);
        let result = engine.forward(&input, Some(&mut cache));
        let name = "EmptySequence, InvalidInput or ShapeMismatch";
        ctx.expect_error(format!("forward with ids [{batch}, {seq}]"), result, nothing, name);
        ctx.check_eq("cache.len() afterwards", cache.len(), 0);
    }
    Ok(())
}

fn id_type(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let input = ids(&[prompt(ctx.facts(), 3, 510)], &engine.device().clone())?;
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16, DType::U8] {
        let result = engine.forward(&input.to_dtype(dtype)?, None);
        ctx.expect_error(format!("ids of {dtype:?}"), result, invalid_input, "ForwardPassError::InvalidInput");
    }
    Ok(())
}

fn rank(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let input = ids(&[prompt(ctx.facts(), 4, 520)], &engine.device().clone())?;
    let mismatch =
        |e: &InferenceError| matches!(e, InferenceError::ForwardPass(ForwardPassError::ShapeMismatch { .. }));
    for shape in [vec![4], vec![1, 1, 4], vec![1, 2, 2], vec![2, 2, 1, 1]] {
        let result = engine.forward(&input.reshape(shape.clone())?, None);
        ctx.expect_error(format!("ids of shape {shape:?}"), result, mismatch, "ForwardPassError::ShapeMismatch");
    }
    let scalar = input.flatten_all()?.get(0)?;
    let result = engine.forward(&scalar, None);
    ctx.expect_error("a scalar id", result, mismatch, "ForwardPassError::ShapeMismatch");
    Ok(())
}

fn too_long(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let positions = ctx.facts().max_positions;
    for extra in [1, 2, 100] {
        let tokens = prompt(ctx.facts(), positions + extra, 530);
        let what = format!("{} tokens in a context of {positions}", tokens.len());
        let result = try_forward(engine.as_mut(), std::slice::from_ref(&tokens), None)?;
        ctx.expect_error(format!("forward of {what}"), result, invalid_input, "ForwardPassError::InvalidInput");
        let kind = |e: &InferenceError| {
            invalid_input(e)
                || matches!(
                    e,
                    InferenceError::Generation(
                        GenerationError::PromptTooLong { .. } | GenerationError::ContextExhausted { .. }
                    )
                )
        };
        let result = engine.generate(&tokens, 2, &greedy());
        let name = "ForwardPassError::InvalidInput or GenerationError::PromptTooLong";
        ctx.expect_error(format!("generate from {what}"), result, kind, name);
    }
    Ok(())
}

/// Every invalid configuration, with the parameter that its error must name; `None` for `IncompatibleConfig`.
fn invalid_configurations(vocab: u32) -> Vec<(String, GenerationConfig, Option<&'static str>)> {
    let base = GenerationConfig::default;
    let mut cases = vec![
        (
            "max_new_tokens 0".to_string(),
            GenerationConfig { max_new_tokens: 0, min_new_tokens: 0, ..base() },
            Some("max_new_tokens"),
        ),
        (
            "min_new_tokens above max_new_tokens".to_string(),
            GenerationConfig { max_new_tokens: 3, min_new_tokens: 4, ..base() },
            None,
        ),
        ("top_k 0".to_string(), GenerationConfig { top_k: Some(0), ..base() }, Some("top_k")),
    ];
    let not_finite = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
    for value in not_finite.into_iter().chain([-0.5, -1e-30]) {
        let config = GenerationConfig { temperature: value, ..base() };
        cases.push((format!("temperature {value}"), config, Some("temperature")));
    }
    for value in not_finite.into_iter().chain([0.0, -0.1, 1.000_001, 2.0]) {
        cases.push((format!("top_p {value}"), GenerationConfig { top_p: Some(value), ..base() }, Some("top_p")));
    }
    for value in not_finite.into_iter().chain([0.0, -1.0]) {
        let config = GenerationConfig { repetition_penalty: value, ..base() };
        cases.push((format!("repetition_penalty {value}"), config, Some("repetition_penalty")));
    }
    for value in not_finite {
        let config = GenerationConfig { frequency_penalty: value, ..base() };
        cases.push((format!("frequency_penalty {value}"), config, Some("frequency_penalty")));
        let config = GenerationConfig { presence_penalty: value, ..base() };
        cases.push((format!("presence_penalty {value}"), config, Some("presence_penalty")));
    }
    for token in [vocab, u32::MAX] {
        let config = GenerationConfig { stop_tokens: vec![0, token], ..base() };
        cases.push((format!("stop token {token}"), config, Some("stop_tokens")));
    }
    cases
}

/// The range that the source's error names, for the parameters that the source checks.
fn valid_range(parameter: &str, vocab: usize) -> Option<String> {
    Some(match parameter {
        "max_new_tokens" | "top_k" => "1 to usize::MAX".to_string(),
        "temperature" => "0.0 to positive float".to_string(),
        "top_p" => "0.0 < top_p <= 1.0".to_string(),
        "repetition_penalty" => "positive float".to_string(),
        "stop_tokens" => format!("0 to {}", vocab - 1),
        _ => return None,
    })
}

#[track_caller]
fn expect_configuration<T>(
    ctx: &mut Context<'_>,
    what: &str,
    result: Result<T, InferenceError>,
    parameter: Option<&'static str>,
) {
    let Some(name) = parameter else {
        let right = |e: &InferenceError| {
            matches!(e, InferenceError::Configuration(ConfigurationError::IncompatibleConfig { .. }))
        };
        ctx.expect_error(what, result, right, "ConfigurationError::IncompatibleConfig");
        return;
    };
    let range = valid_range(name, ctx.facts().vocab_size);
    let right = |e: &InferenceError| {
        matches!(e, InferenceError::Configuration(ConfigurationError::InvalidParameter {
            parameter, valid_range, value,
        }) if parameter == name && !value.is_empty() && range.as_ref().is_none_or(|range| range == valid_range))
    };
    let kind = format!("ConfigurationError::InvalidParameter {{ parameter: {name:?}, valid_range: {range:?} }}");
    ctx.expect_error(what, result, right, &kind);
}

fn generation_config(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 3, 540);
    for (what, config, parameter) in invalid_configurations(ctx.facts().vocab_size as u32) {
        let result = engine.generate(&tokens, 1, &config);
        expect_configuration(ctx, &format!("generate with {what}"), result, parameter);
    }
    let result = engine.generate(&tokens, 0, &greedy());
    expect_configuration(ctx, "generate with max_tokens 0", result, Some("max_new_tokens"));
    let result = engine.generate_deterministic(&tokens, 0, 1);
    expect_configuration(ctx, "generate_deterministic with max_tokens 0", result, Some("max_new_tokens"));
    // The borders themselves are valid.
    let last = ctx.facts().vocab_size as u32 - 1;
    let base = GenerationConfig::default;
    let valid = [
        ("top_p 1", GenerationConfig { top_p: Some(1.0), ..base() }),
        ("temperature 0", GenerationConfig { temperature: 0.0, ..base() }),
        ("temperature -0", GenerationConfig { temperature: -0.0, ..base() }),
        ("top_k usize::MAX", GenerationConfig { top_k: Some(usize::MAX), ..base() }),
        ("the last token as stop token", GenerationConfig { stop_tokens: vec![last], ..base() }),
        ("min_new_tokens = max_new_tokens", GenerationConfig { max_new_tokens: 2, min_new_tokens: 2, ..base() }),
        ("max_new_tokens usize::MAX", GenerationConfig { max_new_tokens: usize::MAX, ..base() }),
        ("max_total_tokens usize::MAX", GenerationConfig { max_total_tokens: usize::MAX, ..base() }),
        ("negative penalties", GenerationConfig { frequency_penalty: -2.0, presence_penalty: -2.0, ..base() }),
    ];
    for (what, config) in valid {
        ctx.check_ok(format!("generate with {what}"), engine.generate(&tokens, 2, &config));
    }
    // What the source does not check may be refused or mean something, and is no panic.
    let odd = [
        ("eos_token_id beyond the vocabulary", GenerationConfig { eos_token_id: Some(last + 1), ..base() }),
        ("prefill_chunk_size 0", GenerationConfig { prefill_chunk_size: Some(0), ..base() }),
        ("prefill_chunk_size usize::MAX", GenerationConfig { prefill_chunk_size: Some(usize::MAX), ..base() }),
        ("max_total_tokens 0", GenerationConfig { max_total_tokens: 0, ..base() }),
        ("an empty stop sequence", GenerationConfig { stop_sequences: vec![String::new()], ..base() }),
        (
            "min_new_tokens usize::MAX",
            GenerationConfig { max_new_tokens: usize::MAX, min_new_tokens: usize::MAX, ..base() },
        ),
    ];
    for (what, config) in odd {
        let result = engine.generate(&tokens, 2, &config);
        let most = result.as_ref().map_or(0, |r| r.generated_tokens.len());
        ctx.check(most <= 2, format!("generate with {what}: an error, or at most two tokens"), most);
    }
    Ok(())
}

fn configuration_first(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let bad_prompt = [ctx.facts().vocab_size as u32];
    let good_prompt = prompt(ctx.facts(), 3, 550);
    for (what, config, parameter) in invalid_configurations(ctx.facts().vocab_size as u32) {
        let result = engine.generate(&bad_prompt, 1, &config);
        expect_configuration(ctx, &format!("generate with {what} and a bad prompt"), result, parameter);
        // Validated in full, although a greedy generation looks at none of the sampler's settings.
        let config = GenerationConfig { do_sample: false, ..config };
        let result = engine.generate(&good_prompt, 1, &config);
        expect_configuration(ctx, &format!("greedy generate with {what}"), result, parameter);
    }
    Ok(())
}

/// How many calls [`triggers`] makes.
const TRIGGERS: usize = 9;

/// Calls that must fail, one of each kind: those that did.
fn triggers(ctx: &Context<'_>, engine: &mut dyn BitNetInference) -> Result<Vec<(&'static str, InferenceError)>, Stop> {
    let device = engine.device().clone();
    let vocab = ctx.facts().vocab_size as u32;
    let good = prompt(ctx.facts(), 4, 560);
    let input = ids(std::slice::from_ref(&good), &device)?;
    let mut seen = Vec::new();
    let mut keep = |what, error: Option<InferenceError>| {
        if let Some(error) = error {
            seen.push((what, error));
        }
    };
    keep("a token out of range", try_forward(engine, &[vec![vocab]], None)?.err());
    keep("f32 ids", engine.forward(&input.to_dtype(DType::F32)?, None).err());
    keep("ids of rank 1", engine.forward(&input.flatten_all()?, None).err());
    keep("a full cache", try_forward(engine, std::slice::from_ref(&good), Some(&mut KVCache::new(2)))?.err());
    keep("an empty prompt", engine.generate(&[], 1, &greedy()).err());
    keep("a prompt out of range", engine.generate(&[vocab], 1, &greedy()).err());
    keep("max_tokens 0", engine.generate(&good, 0, &greedy()).err());
    let config = GenerationConfig { top_k: Some(0), ..greedy() };
    keep("top_k 0", engine.generate(&good, 1, &config).err());
    let missing = ctx.model().relocated(ctx.scratch().join("no such folder"));
    keep("a missing model", ctx.factory().create(&missing).err());
    Ok(seen)
}

fn engine_goes_on(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 6, 570);
    let logits = logits_of(engine.as_mut(), &tokens)?;
    let made = generate(engine.as_mut(), &tokens, 5, &super::support::plain(8))?.generated_tokens;
    // So often that a pool of slots, permits or sessions is empty if refused calls keep what they took.
    for time in 1..=20 {
        let errors = triggers(ctx, engine.as_mut())?;
        let refused: Vec<&str> = errors.iter().map(|(what, _)| *what).collect();
        let what = format!("calls that were refused, time {time}: {}", refused.join(", "));
        let all = ctx.check_eq(what, refused.len(), TRIGGERS);
        let after = logits_of(engine.as_mut(), &tokens)?;
        let what = format!("logits after {TRIGGERS} refused calls, time {time}");
        let same = ctx.check_bits(what, &after.data, &logits.data);
        let after = generate(engine.as_mut(), &tokens, 5, &super::support::plain(8))?.generated_tokens;
        let what = format!("tokens after {TRIGGERS} refused calls, time {time}");
        // Once is enough to say it.
        if !(ctx.check_slices(what, &after, &made) && all && same) {
            break;
        }
    }
    Ok(())
}

/// The source's table of severities.
fn severity(error: &InferenceError) -> ErrorSeverity {
    match error {
        InferenceError::Configuration(_) | InferenceError::Model(_) => ErrorSeverity::High,
        InferenceError::Memory(MemoryError::OutOfMemory { .. })
        | InferenceError::Device(_)
        | InferenceError::ForwardPass(ForwardPassError::NumericalInstability { .. }) => ErrorSeverity::Medium,
        _ => ErrorSeverity::Low,
    }
}

fn context(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    for (what, error) in triggers(ctx, engine.as_mut())? {
        let context = error.context();
        for (field, value) in [("component", &context.component), ("operation", &context.operation)] {
            let real = !value.is_empty() && !value.eq_ignore_ascii_case("unknown");
            ctx.check(real, format!("{what}: context().{field} names something"), format!("{value:?}"));
        }
        ctx.check_eq(format!("{what}: severity()"), error.severity(), severity(&error));
        let lost =
            matches!(error, InferenceError::Configuration(_) | InferenceError::Model(ModelError::FileNotFound { .. }));
        ctx.check_eq(format!("{what}: is_recoverable()"), error.is_recoverable(), !lost);
        ctx.check(!error.recovery_suggestions().is_empty(), format!("{what}: recovery suggestions"), "none");
        let text = error.to_string();
        ctx.check(
            !text.is_empty() && !text.contains('\n'),
            format!("{what}: a message of one line"),
            format!("{text:?}"),
        );
        if let InferenceError::Configuration(_) = error {
            ctx.check_eq(format!("{what}: component"), context.component.as_str(), "Configuration");
            ctx.check_eq(format!("{what}: operation"), context.operation.as_str(), "Validation");
        }
    }
    Ok(())
}
