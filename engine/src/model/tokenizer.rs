//! The tokenizer of a checkpoint (`tokenizer.json`, which the keys of a GGUF file are turned into), by the `tokenizers` crate.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bitnet_contracts::{ModelError, Result, TokenizationError};

/// Text to token ids and back.
#[derive(Debug, Clone)]
pub struct Tokenizer(tokenizers::Tokenizer);

/// Calls the crate, which panics on some malformed tokenizers, when it reads them or only when it uses them. What it keeps between calls
/// is behind locks, and nothing of a call that panicked is used.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => outcome.map_err(|e| e.to_string()),
        Err(_) => Err("malformed: the tokenizers crate panicked".to_string()),
    }
}

impl Tokenizer {
    /// Reads a tokenizer.json; `path` is for the error.
    ///
    /// # Errors
    /// `ModelError::LoadingFailed`.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self> {
        guarded(|| tokenizers::Tokenizer::from_bytes(json))
            .map(Self)
            .map_err(|reason| ModelError::LoadingFailed { path: path.display().to_string(), reason }.into())
    }

    /// The ids of `text`, with the special tokens that the tokenizer's post-processor adds (such as a begin-of-text).
    ///
    /// # Errors
    /// `TokenizationError::EncodingFailed`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.0.encode_fast(text, true))
            .map_err(|reason| TokenizationError::EncodingFailed { reason })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// `TokenizationError::DecodingFailed`.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(|| self.0.decode(ids, true)).map_err(|reason| TokenizationError::DecodingFailed { reason }.into())
    }

    /// The token of an id, if there is one.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
    }

    /// Every id, be it of an added token or of one that is put around a text, must have a row in the embedding. A tokenizer with fewer
    /// tokens than rows is fine: embeddings are padded. `path` is for the error.
    ///
    /// # Errors
    /// `ModelError::ValidationFailed` naming the token and the ids.
    pub(super) fn expect_below(&self, vocab_size: usize, path: &Path) -> Result<()> {
        let beyond = |id: u32| id as usize >= vocab_size;
        let mut tokens: Vec<_> = self.0.get_vocab(true).into_iter().filter(|&(_, id)| beyond(id)).collect();
        // What a post-processor puts around a text has ids of its own. One that fails on no text is an error where it is used.
        for id in self.encode("").unwrap_or_default().into_iter().filter(|&id| beyond(id)) {
            tokens.push(("(of the post-processor)".to_string(), id));
        }
        let Some((token, id)) = tokens.iter().min_by_key(|(token, id)| (*id, token.as_str())) else { return Ok(()) };
        Err(ModelError::ValidationFailed {
            reason: format!(
                "{}: token {token:?} has id {id}, and the model's vocab_size is {vocab_size}: ids beyond it: {}",
                path.display(),
                tokens.len()
            ),
        }
        .into())
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.0.get_vocab_size(true)
    }
}

impl Tokenizer {
    /// A decoder that takes one id at a time and gives text as soon as it is whole characters.
    pub fn stream(&self) -> impl FnMut(u32) -> Result<Option<String>> + '_ {
        let mut stream = self.0.decode_stream(true);
        move |id| guarded(|| stream.step(id)).map_err(|reason| TokenizationError::DecodingFailed { reason }.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_contracts::InferenceError;

    /// Found by the fuzz target `tokenizer` (a broken decoder) and in the crate's source (a broken normalizer): it panics.
    #[test]
    fn what_is_malformed_is_an_error_wherever_it_breaks() {
        let whole = r#"{"version": "1.0", "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
        Tokenizer::from_json(whole.as_bytes(), Path::new("t.json")).expect("nothing is wrong with it");
        let deep = "[".repeat(200) + &"]".repeat(200);
        let broken =
            [r#""type"* "ByteLevel""#, r#""type": 1e999"#, r#""type": "\ud800""#, &format!(r#""type": {deep}"#)]
                .map(|wrong| whole.replacen(r#""type": "ByteLevel""#, wrong, 1));
        let normalizer = whole.replacen(
            r#""decoder""#,
            r#""normalizer": {"type": "Precompiled", "precompiled_charsmap": 7}, "decoder""#,
            1,
        );
        let broken = broken.iter().chain([&normalizer]).map(String::as_str);
        for json in (0..whole.len()).map(|end| &whole[..end]).chain(broken) {
            let error = Tokenizer::from_json(json.as_bytes(), Path::new("t.json")).map(|_| ()).unwrap_err();
            assert!(
                matches!(&error, InferenceError::Model(ModelError::LoadingFailed { path, .. }) if path == "t.json"),
                "{error}"
            );
        }
    }

    #[rstest::rstest]
    #[case(r#""added_tokens": []"#, None)]
    #[case(
        r#""added_tokens": [{"id": 5, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false}]"#,
        Some("\"<s>\" has id 5")
    )]
    #[case(
        r#""post_processor": {"type": "TemplateProcessing", "single":
        [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [9], "tokens": ["<s>"]}}}"#,
        Some("has id 9")
    )]
    fn ids_have_rows(#[case] more: &str, #[case] beyond: Option<&str>) {
        let json = r#"{"version": "1.0", MORE, "model": {"type": "BPE", "vocab": {"a": 0, "b": 4, "c": 1, "d": 2, "e": 3},
            "merges": []}}"#;
        let tokenizer = Tokenizer::from_json(json.replace("MORE", more).as_bytes(), Path::new("t.json")).unwrap();
        let error = |vocab_size| tokenizer.expect_below(vocab_size, Path::new("f/t.json")).map_err(|e| e.to_string());
        assert!(error(4).unwrap_err().contains("f/t.json: token \"b\" has id 4, and the model's vocab_size is 4"));
        match beyond {
            None => error(5).unwrap(),
            Some(words) => assert!(error(5).unwrap_err().contains(words), "{:?}", error(5)),
        }
        error(10).unwrap();
    }

    /// Found by the same target: a template that names a special token which it does not define.
    #[test]
    fn what_shows_only_in_use_is_an_error_there() {
        let json = r#"{"version": "1.0", "post_processor": {"type": "TemplateProcessing", "single":
            [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<t>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
        let tokenizer = Tokenizer::from_json(json.as_bytes(), Path::new("t.json")).expect("the crate takes it");
        let error = tokenizer.encode("a").unwrap_err();
        assert!(matches!(error, InferenceError::Tokenization(TokenizationError::EncodingFailed { .. })), "{error}");
    }
}
