//! The text of generations: the tokenizer's text of the returned tokens, and where stop texts end it.

use super::support::{EDIT_MODEL, generate, greedy, plain, prompt};
use crate::backend::Capability;
use crate::case::{Category, Check, CheckResult, Context, ModelSet, Stop};
use crate::model::ModelFixture;
use bitnet_contracts::{BitNetInference, FinishReason, GenerationConfig};
use serde_json::{Value, json};
use std::collections::BTreeSet;
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
    .on(ModelSet::Only(EDIT_MODEL))
    .needs(Capability::Tokenizer),
    Check::new(
        "GEN-6",
        "generation/stop_texts_of_any_length",
        GENERATION,
        "stop texts of one byte to many tokens, repetitive ones and the last of many included, end generation where they first appear",
        stop_texts_of_any_length,
    )
    .long()
    .on(ModelSet::Only(EDIT_MODEL))
    .needs(Capability::Tokenizer),
    Check::new("GEN-11", "generation/text", GENERATION, "generated_text is the tokenizer's text of the tokens", text)
        .long()
        .on(ModelSet::Where(|f| f.has_tokenizer))
        .needs(Capability::Tokenizer),
    Check::new("GEN-11", "generation/no_text", GENERATION, "without a tokenizer the text is empty", no_text)
        .on(ModelSet::Where(|f| !f.has_tokenizer)),
];

fn limited(max_new_tokens: usize) -> GenerationConfig {
    GenerationConfig { max_new_tokens, ..greedy() }
}

/// A model's tokenizer, read by the suite.
fn tokenizer(model: &ModelFixture) -> Result<Tokenizer, Stop> {
    let path = model.dir().join("tokenizer.json");
    Tokenizer::from_file(path).map_err(|e| Stop::Inconclusive(format!("tokenizer.json: {e}")))
}

/// The text of tokens, special ones left out.
fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> Result<String, Stop> {
    tokenizer.decode(tokens, true).map_err(|e| Stop::Inconclusive(format!("decode {tokens:?}: {e}")))
}

/// Token ids of the small tokenizer: white space, and bytes that are a character together only.
const SPACE: u32 = 3;
const NEWLINE: u32 = 4;
const FIRST_OF_TWO: u32 = 5;
const SECOND_OF_TWO: [u32; 3] = [6, 7, 8];
const LETTER: u32 = 9;

/// `tokenizer.json` for a vocabulary of `size` tokens: bytes, letters and syllables, and the model's special tokens.
fn small_tokenizer(bos: u32, eos: u32, size: usize) -> Value {
    // In the alphabet of byte-level tokenizers: space, newline, C3, and A9, 9F, B1, which make é, ß, ñ of it.
    let bytes = ["Ġ", "Ċ", "Ã", "©", "Ł", "±"].map(str::to_string);
    let letters = ('a'..='z').map(String::from);
    let syllables = |start: &'static str| {
        "bdfgklmnprst".chars().flat_map(move |c| "aeiou".chars().map(move |v| format!("{start}{c}{v}")))
    };
    let mut words = bytes.into_iter().chain(letters).chain(syllables("Ġ")).chain(syllables(""));
    let vocabulary: serde_json::Map<String, Value> = (0..size as u32)
        .map(|id| {
            let word = match id {
                0 => "<unk>".to_string(),
                _ if id == bos => "<s>".to_string(),
                _ if id == eos => "</s>".to_string(),
                _ => words.next().unwrap_or_else(|| format!("w{id}")),
            };
            (word, json!(id))
        })
        .collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(bos, "<s>"), special(eos, "</s>")],
        "pre_tokenizer": byte_level, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocabulary, "merges": []},
    })
}

/// A small model with text: its folder with a tokenizer of the suite's own.
fn small_text_model(ctx: &Context<'_>) -> Result<ModelFixture, Stop> {
    let mut model = ctx.other_model(EDIT_MODEL)?;
    let (Some(bos), Some(&eos)) = (model.config.bos, model.config.eos.first()) else {
        return Err(Stop::Inconclusive("the small model names no special tokens".to_string()));
    };
    let tokenizer = small_tokenizer(bos, eos, model.config.vocab_size);
    std::fs::write(model.dir().join("tokenizer.json"), tokenizer.to_string())?;
    model.config.has_tokenizer = true;
    Ok(model)
}

/// A configuration that draws fairly from the distinct tokens of the prompt, of which there are `count`, and from no
/// others.
fn from_the_prompt(count: usize, seed: u64) -> GenerationConfig {
    let max_new_tokens = 16;
    GenerationConfig { max_new_tokens, presence_penalty: -1000.0, top_k: Some(count), temperature: 1e6, ..plain(seed) }
}

/// Asserts that the text of a generation is the tokenizer's text of its tokens, and gives it without special tokens. The
/// contracts do not say whether these are text, so both readings are right.
fn hold(
    ctx: &mut Context<'_>,
    what: &str,
    tokenizer: &Tokenizer,
    engine: &mut dyn BitNetInference,
    tokens: &[u32],
    config: &GenerationConfig,
) -> Result<String, Stop> {
    let result = generate(engine, tokens, config.max_new_tokens, config)?;
    let expected = decode(tokenizer, &result.generated_tokens)?;
    let with_special = tokenizer.decode(&result.generated_tokens, false).unwrap_or_default();
    let due = if result.generated_text == with_special { &with_special } else { &expected };
    ctx.check_eq(format!("{what}: text"), &result.generated_text, due);
    Ok(expected)
}

fn text(ctx: &mut Context<'_>) -> CheckResult {
    let own = tokenizer(ctx.model())?;
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 4, 290);
    for count in [1, 6] {
        hold(ctx, "the most likely tokens", &own, engine.as_mut(), &tokens, &limited(count))?;
    }
    let config = GenerationConfig { temperature: 1e6, max_new_tokens: 6, ..plain(3) };
    hold(ctx, "tokens drawn from all", &own, engine.as_mut(), &tokens, &config)?;

    let model = small_text_model(ctx)?;
    let small = tokenizer(&model)?;
    let mut engine = ctx.factory().create(&model)?;
    let mut hold = |ctx: &mut Context<'_>, what: &str, tokens: &[u32], seed| {
        hold(ctx, what, &small, engine.as_mut(), tokens, &from_the_prompt(tokens.len(), seed))
    };
    // Characters of two tokens: the text is that of all tokens together, not of each.
    for (second, character) in SECOND_OF_TWO.into_iter().zip(["é", "ß", "ñ"]) {
        let made = hold(ctx, character, &[FIRST_OF_TWO, second], 5)?;
        ctx.note(format!("{character:?} came {} times from two tokens", made.matches(character).count()));
    }
    hold(ctx, "white space", &[SPACE, NEWLINE], 6)?;
    hold(ctx, "a letter and white space", &[LETTER, SPACE, NEWLINE], 7)?;
    // Special tokens are left out or written out, and nothing else is lost with them.
    for special in model.config.bos.iter().chain(&model.config.eos) {
        hold(ctx, "special tokens", &[*special, LETTER], 8)?;
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
        let whole = !text[from..to].contains('\u{fffd}');
        let first = text.find(&text[from..to]) == Some(from);
        if whole && first && from > 0 && !found.iter().any(|(known, _)| *known == kind) {
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
    let model = small_text_model(ctx)?;
    let tokenizer = tokenizer(&model)?;
    let mut engine = ctx.factory().create(&model)?;
    let steps = 12;
    // No token comes twice, so that there is much to find.
    let base = GenerationConfig { presence_penalty: 1000.0, ..limited(steps) };
    let never = "\u{1}never\u{1}".to_string();
    let mut found = BTreeSet::new();
    for salt in 0..6 {
        let tokens = prompt(&model.config, 6, 240 + salt);
        let full = generate(engine.as_mut(), &tokens, steps, &base)?.generated_tokens;
        let texts: Vec<String> = (0..=full.len()).map(|n| decode(&tokenizer, &full[..n])).collect::<Result<_, _>>()?;
        // A token that ends inside a character changes what is before it, and there is no border to speak of.
        if texts.windows(2).any(|pair| !pair[1].starts_with(pair[0].as_str())) {
            continue;
        }
        let ends: Vec<usize> = texts.iter().map(String::len).collect();
        for (i, (kind, stop)) in stops(&texts[full.len()], &ends).into_iter().enumerate() {
            found.insert(kind);
            let stop_sequences = match (i + salt as usize) % 3 {
                0 => vec![never.clone(), stop.clone()],
                1 => vec![stop.clone(), never.clone()],
                _ => vec![stop.clone()],
            };
            let config = GenerationConfig { stop_sequences, ..base.clone() };
            let result = generate(engine.as_mut(), &tokens, steps, &config)?;
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
            let config = GenerationConfig { stop_sequences: vec![stop], ..base.clone() };
            let result = generate(engine.as_mut(), &tokens, steps, &config)?;
            ctx.check_slices(format!("{what} as stop sequence: tokens"), &result.generated_tokens, &full);
            ctx.check_eq(format!("{what} as stop sequence: text"), &result.generated_text, &texts[full.len()]);
        }
    }
    if found.len() < 3 {
        return Err(Stop::Inconclusive(format!("stop texts were found of these kinds only: {found:?}")));
    }
    Ok(())
}

/// Texts drawn from two letters, in which whatever stops them has begun in vain before, and stop texts that they hold.
fn stop_texts_of_any_length(ctx: &mut Context<'_>) -> CheckResult {
    let model = small_text_model(ctx)?;
    let tokenizer = tokenizer(&model)?;
    let mut engine = ctx.factory().create(&model)?;
    for seed in 0..3 {
        let tokens = [LETTER, LETTER + 1];
        let config = from_the_prompt(tokens.len(), 60 + seed);
        let full = generate(engine.as_mut(), &tokens, config.max_new_tokens, &config)?.generated_tokens;
        let text = decode(&tokenizer, &full)?;
        if text.len() != full.len() || !text.is_ascii() {
            return Err(Stop::Inconclusive(format!("{text:?} is not a letter a token")));
        }
        for length in [1, 2, 3, 5, 8, 12] {
            // The last of those that appear here first: the likeliest to have begun before.
            let starts = (1..=full.len().saturating_sub(length)).rev();
            let Some(at) = starts.into_iter().find(|at| text.find(&text[*at..at + length]) == Some(*at)) else {
                continue;
            };
            let stop = text[at..at + length].to_string();
            let mut stop_sequences: Vec<String> = (0..length * length).map(|i| format!("never {i}")).collect();
            stop_sequences.push(stop.clone());
            let config = GenerationConfig { stop_sequences, ..config.clone() };
            let result = generate(engine.as_mut(), &tokens, config.max_new_tokens, &config)?;
            let what = format!("stop text {stop:?} in {text:?}");
            ctx.check_eq(format!("{what}: finish reason"), result.finish_reason, FinishReason::StopSequence);
            let seen = &result.generated_tokens;
            let (least, most) = (at, at + length);
            ctx.check(
                (least..=most).contains(&seen.len()),
                format!("{what}: {least} to {most} tokens"),
                format!("{} tokens", seen.len()),
            );
            let shared = seen.len().min(full.len());
            ctx.check_slices(format!("{what}: tokens"), &seen[..shared], &full[..shared]);
            ctx.check_eq(format!("{what}: text"), result.generated_text.as_str(), &text[..shared]);
        }
    }
    // A character that only its second token completes.
    for (second, character) in SECOND_OF_TWO.into_iter().zip(["é", "ß", "ñ"]) {
        let tokens = [FIRST_OF_TWO, second];
        let config = from_the_prompt(tokens.len(), 70 + u64::from(second));
        let full = generate(engine.as_mut(), &tokens, config.max_new_tokens, &config)?.generated_tokens;
        let complete = (1..=full.len()).find(|n| full[..*n].ends_with(&tokens));
        let Some(complete) = complete else { continue };
        let config = GenerationConfig { stop_sequences: vec![character.to_string()], ..config };
        let result = generate(engine.as_mut(), &tokens, config.max_new_tokens, &config)?;
        let what = format!("stop text {character:?}, complete with token {complete}");
        ctx.check_eq(format!("{what}: finish reason"), result.finish_reason, FinishReason::StopSequence);
        let seen = result.generated_tokens.len();
        ctx.check((complete - 2..=complete).contains(&seen), format!("{what}: that many tokens, or two less"), seen);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_small_tokenizer_puts_characters_together() {
        let json = small_tokenizer(1, 2, 163).to_string();
        let tokenizer = Tokenizer::from_bytes(json.as_bytes()).expect("a tokenizer");
        assert_eq!(tokenizer.get_vocab_size(true), 163);
        let text = |tokens: &[u32]| tokenizer.decode(tokens, true).expect("text");
        let [acute, sharp, tilde] = SECOND_OF_TWO;
        assert_eq!(text(&[FIRST_OF_TWO, acute, FIRST_OF_TWO, sharp, FIRST_OF_TWO, tilde]), "éßñ");
        assert_eq!(text(&[LETTER, SPACE, NEWLINE, 1, 2]), "a \n");
    }

    #[test]
    fn stop_texts_of_every_kind_are_found_at_their_first_place() {
        let kinds = stops("one two three four", &[0, 3, 7, 13, 18]);
        let expected = [("across a border", "o "), ("within a token", "tw"), ("over three borders", "e two three ")];
        assert_eq!(kinds, expected.map(|(kind, text)| (kind, text.to_string())));
    }
}
