//! The text of generations: the tokenizer's text of the returned tokens, and where stop texts end it.

use super::support::{generate, greedy, plain, prompt};
use crate::backend::Capability;
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use bitnet_contracts::{FinishReason, GenerationConfig};
use tokenizers::Tokenizer;

const GENERATION: Category = Category::Generation;

pub(super) const CHECKS: &[Check] = &[
    Check::new(
        "GEN-6",
        "generation/stop_sequence",
        GENERATION,
        "a stop sequence ends generation, within a token and across token borders",
        stop_sequence,
    )
    .on(ModelSet::Where(|f| f.has_tokenizer))
    .needs(Capability::Tokenizer),
    Check::new("GEN-11", "generation/text", GENERATION, "generated_text is the tokenizer's text of the tokens", text)
        .on(ModelSet::Where(|f| f.has_tokenizer))
        .needs(Capability::Tokenizer),
    Check::new("GEN-11", "generation/no_text", GENERATION, "without a tokenizer the text is empty", no_text)
        .on(ModelSet::Where(|f| !f.has_tokenizer)),
];

fn limited(max_new_tokens: usize) -> GenerationConfig {
    GenerationConfig { max_new_tokens, ..greedy() }
}

/// The model's own tokenizer, read by the suite.
fn tokenizer(ctx: &Context<'_>) -> Result<Tokenizer, Stop> {
    let path = ctx.model().dir().join("tokenizer.json");
    Tokenizer::from_file(path).map_err(|e| Stop::Inconclusive(format!("tokenizer.json: {e}")))
}

/// The text of tokens, special ones left out.
fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> Result<String, Stop> {
    tokenizer.decode(tokens, true).map_err(|e| Stop::Inconclusive(format!("decode {tokens:?}: {e}")))
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Stop> {
    let encoding = tokenizer.encode(text, false).map_err(|e| Stop::Inconclusive(format!("encode {text:?}: {e}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// A configuration that draws fairly from the distinct tokens of the prompt, of which there are `count`, and from no
/// others.
fn from_the_prompt(count: usize, seed: u64) -> GenerationConfig {
    GenerationConfig { presence_penalty: -1000.0, top_k: Some(count), temperature: 1e6, ..plain(seed) }
}

fn text(ctx: &mut Context<'_>) -> CheckResult {
    let tokenizer = tokenizer(ctx)?;
    let mut engine = ctx.engine()?;
    let mut hold = |ctx: &mut Context<'_>, what: &str, tokens: &[u32], count: usize, config: &GenerationConfig| {
        let result = generate(engine.as_mut(), tokens, count, config)?;
        let expected = decode(&tokenizer, &result.generated_tokens)?;
        ctx.check_eq(format!("{what}: text"), result.generated_text.as_str(), expected.as_str());
        Ok::<_, Stop>(expected)
    };
    let tokens = prompt(ctx.facts(), 4, 290);
    for count in [1, 8] {
        hold(ctx, "the most likely tokens", &tokens, count, &limited(count))?;
    }
    let config = GenerationConfig { temperature: 1e6, ..plain(3) };
    hold(ctx, "tokens drawn from all", &tokens, 20, &config)?;
    // Characters of more than one token: the text is that of all tokens together, not of each.
    let mut whole = 0;
    for character in ["é", "ß", "ñ", "ø"] {
        let parts = encode(&tokenizer, character)?;
        let &[first, second] = parts.as_slice() else { continue };
        let made = hold(ctx, character, &[first, second], 16, &from_the_prompt(2, 5))?;
        whole += usize::from(made.contains(character));
    }
    ctx.note(format!("{whole} characters were put together from two tokens each"));
    // White space at either end stays.
    let space: Vec<u32> = [encode(&tokenizer, "\n")?, encode(&tokenizer, " ")?].concat();
    let distinct = space.iter().collect::<std::collections::BTreeSet<_>>().len();
    hold(ctx, "white space", &space, 4, &from_the_prompt(distinct, 6))?;
    // Special tokens are no text.
    if let Some(bos) = ctx.facts().bos {
        let letter = encode(&tokenizer, "a")?;
        let tokens = [&[bos], letter.as_slice()].concat();
        hold(ctx, "special tokens", &tokens, 8, &from_the_prompt(tokens.len(), 7))?;
    }
    Ok(())
}

fn no_text(ctx: &mut Context<'_>) -> CheckResult {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 4, 290);
    for config in [limited(8), GenerationConfig { max_new_tokens: 8, ..plain(1) }] {
        let result = generate(engine.as_mut(), &tokens, 8, &config)?;
        ctx.check_eq("text without a tokenizer", result.generated_text.as_str(), "");
    }
    Ok(())
}

/// Stop texts that a text holds, each at its first place: two characters across a border, parts of one token, and one
/// over several tokens. `ends[n]` is where the text of the first `n` tokens ends.
fn stops(text: &str, ends: &[usize]) -> Vec<(&'static str, String)> {
    let before = |at: usize| text[..at].char_indices().next_back().map(|(i, _)| i);
    let after = |at: usize| text[at..].chars().next().map(|c| at + c.len_utf8());
    let mut found: Vec<(&'static str, String)> = Vec::new();
    let mut add = |kind, from: usize, to: usize| {
        let first = text.find(&text[from..to]) == Some(from);
        if first && from > 0 && !found.iter().any(|(known, _)| *known == kind) {
            found.push((kind, text[from..to].to_string()));
        }
    };
    for n in 2..ends.len().saturating_sub(2) {
        let (start, end) = (ends[n - 1], ends[n]);
        if let (Some(from), Some(to)) = (before(end), after(end)) {
            add("across a border", from, to);
        }
        if let (Some(from), Some(to)) = (after(start), before(end))
            && from < to
        {
            add("within a token", from, to);
        }
        if let (Some(from), Some(to)) = (before(start), after(ends[n + 1])) {
            add("over three borders", from, to);
        }
    }
    found
}

fn stop_sequence(ctx: &mut Context<'_>) -> CheckResult {
    let tokenizer = tokenizer(ctx)?;
    let mut engine = ctx.engine()?;
    let steps = 10;
    let never = "\u{1}never\u{1}".to_string();
    let mut found = 0;
    for salt in 0..2 {
        let tokens = prompt(ctx.facts(), 6, 240 + salt);
        let full = generate(engine.as_mut(), &tokens, steps, &limited(steps))?.generated_tokens;
        let texts: Vec<String> = (0..=full.len()).map(|n| decode(&tokenizer, &full[..n])).collect::<Result<_, _>>()?;
        // A token that ends inside a character changes what is before it, and there is no border to speak of.
        if texts.windows(2).any(|pair| !pair[1].starts_with(pair[0].as_str())) {
            continue;
        }
        let ends: Vec<usize> = texts.iter().map(String::len).collect();
        for (i, (kind, stop)) in stops(&texts[full.len()], &ends).into_iter().enumerate() {
            found += 1;
            let stop_sequences = match i % 3 {
                0 => vec![never.clone(), stop.clone()],
                1 => vec![stop.clone(), never.clone()],
                _ => vec![stop.clone()],
            };
            let result =
                generate(engine.as_mut(), &tokens, steps, &GenerationConfig { stop_sequences, ..limited(steps) })?;
            let what = format!("stop sequence {stop:?} {kind}");
            ctx.check_eq(format!("{what}: finish reason"), result.finish_reason, FinishReason::StopSequence);
            // Whether the tokens of the stop text itself are kept is left open; nothing before it may go, nothing after
            // the token that completes it may come.
            let most = texts.iter().position(|text| text.contains(&stop)).unwrap_or(full.len());
            let at = texts[most].find(&stop).unwrap_or(0);
            let least = ends.iter().rposition(|end| *end <= at).unwrap_or(0);
            let seen = &result.generated_tokens;
            ctx.check(
                (least..=most).contains(&seen.len()),
                format!("{what}: {least} to {most} tokens"),
                format!("{} tokens", seen.len()),
            );
            let shared = seen.len().min(full.len());
            ctx.check_slices(format!("{what}: tokens"), &seen[..shared], &full[..shared]);
            let expected = decode(&tokenizer, seen)?;
            ctx.check_eq(format!("{what}: text"), result.generated_text.as_str(), expected.as_str());
        }
        // What stands in the prompt, or begins there, does not come in the generated text.
        let before = decode(&tokenizer, &tokens)?;
        let border: String = before.chars().next_back().into_iter().chain(texts[full.len()].chars().next()).collect();
        for (what, stop) in [("the text of the prompt", before), ("the border of the prompt", border)] {
            if stop.is_empty() || texts[full.len()].contains(&stop) {
                continue;
            }
            let config = GenerationConfig { stop_sequences: vec![stop], ..limited(steps) };
            let result = generate(engine.as_mut(), &tokens, steps, &config)?;
            ctx.check_slices(format!("{what} as stop sequence: tokens"), &result.generated_tokens, &full);
        }
    }
    if found == 0 {
        return Err(Stop::Inconclusive("no continuation has text across a token border".to_string()));
    }
    Ok(())
}
