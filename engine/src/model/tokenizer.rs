//! The tokenizer of a checkpoint (`tokenizer.json`, which the keys of a GGUF file are turned into), by the `tokenizers` crate.

use std::path::Path;

use bitnet_contracts::{ModelError, Result, TokenizationError};

/// Text to token ids and back.
#[derive(Debug, Clone)]
pub struct Tokenizer(tokenizers::Tokenizer);

impl Tokenizer {
    /// Reads a tokenizer.json; `path` is for the error.
    ///
    /// # Errors
    /// `ModelError::LoadingFailed`.
    pub fn from_json(json: &[u8], path: &Path) -> Result<Self> {
        tokenizers::Tokenizer::from_bytes(json)
            .map(Self)
            .map_err(|e| ModelError::LoadingFailed { path: path.display().to_string(), reason: e.to_string() }.into())
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
