//! The tokenizer of a checkpoint (`tokenizer.json`, which the keys of a GGUF file are turned into), by the `tokenizers` crate.

use std::path::Path;

use bitnet_contracts::{ModelError, Result, TokenizationError};
use serde::Deserialize;

/// The one part of a tokenizer.json that is read here first.
#[derive(Deserialize)]
struct Decoder {
    #[serde(rename = "decoder")]
    _value: Option<serde_json::Value>,
}

/// Text to token ids and back.
#[derive(Debug, Clone)]
pub struct Tokenizer(tokenizers::Tokenizer);

impl Tokenizer {
    /// Reads a tokenizer.json; `path` is for the error.
    ///
    /// # Errors
    /// `ModelError::LoadingFailed`.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self> {
        let refuse = |reason: String| ModelError::LoadingFailed { path: path.display().to_string(), reason };
        // The crate panics on a decoder that is no JSON value (broken, too deep, a number out of range), so it sees none.
        serde_json::from_slice::<Decoder>(json).map_err(|e| refuse(e.to_string()))?;
        tokenizers::Tokenizer::from_bytes(json).map(Self).map_err(|e| refuse(e.to_string()).into())
    }

    /// The ids of `text`, with the special tokens that the tokenizer's post-processor adds (such as a begin-of-text).
    ///
    /// # Errors
    /// `TokenizationError::EncodingFailed`.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding =
            self.0.encode_fast(text, true).map_err(|e| TokenizationError::EncodingFailed { reason: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// `TokenizationError::DecodingFailed`.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.0.decode(ids, true).map_err(|e| TokenizationError::DecodingFailed { reason: e.to_string() }.into())
    }

    /// The token of an id, if there is one.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.id_to_token(id)
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
        move |id| stream.step(id).map_err(|e| TokenizationError::DecodingFailed { reason: e.to_string() }.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_contracts::InferenceError;

    /// Found by the fuzz target `tokenizer`: a broken decoder made the crate panic.
    #[test]
    fn what_is_no_json_is_an_error_wherever_it_breaks() {
        let whole = r#"{"version": "1.0", "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true}, "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}"#;
        Tokenizer::from_json(whole.as_bytes(), Path::new("t.json")).expect("nothing is wrong with it");
        let deep = "[".repeat(200) + &"]".repeat(200);
        let broken =
            [r#""type"* "ByteLevel""#, r#""type": 1e999"#, r#""type": "\ud800""#, &format!(r#""type": {deep}"#)]
                .map(|wrong| whole.replacen(r#""type": "ByteLevel""#, wrong, 1));
        for json in (0..whole.len()).map(|end| &whole[..end]).chain(broken.iter().map(String::as_str)) {
            let error = Tokenizer::from_json(json.as_bytes(), Path::new("t.json")).map(|_| ()).unwrap_err();
            assert!(
                matches!(&error, InferenceError::Model(ModelError::LoadingFailed { path, .. }) if path == "t.json"),
                "{error}"
            );
        }
    }
}
