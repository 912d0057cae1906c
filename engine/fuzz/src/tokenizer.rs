//! Any bytes as a tokenizer.json and, behind a zero byte, a text and ids: ids and text, or a typed error.

use std::path::Path;
use std::sync::Once;

use bitnet_engine::model::Tokenizer;

use super::bounded;

/// libFuzzer's hook ends the process at any panic; the reader catches those of its crate. What escapes still ends the process.
static CAUGHT: Once = Once::new();

/// One input.
pub fn run(data: &[u8]) {
    CAUGHT.call_once(|| std::panic::set_hook(Box::new(|_| ())));
    // JSON has no zero byte.
    let end = data.iter().position(|&b| b == 0).unwrap_or(data.len());
    let (json, text) = data.split_at(end);
    bounded(data, || {
        let Ok(tokenizer) = Tokenizer::from_json(json, Path::new("tokenizer.json")) else { return };
        for text in [&*String::from_utf8_lossy(text), "", "It's 12345 \u{1f642}\n\n  caf\u{e9} <s>"] {
            let Ok(ids) = tokenizer.encode(text) else { continue };
            let _ = tokenizer.decode(&ids);
            let mut stream = tokenizer.stream();
            for id in ids {
                let _ = stream(id);
            }
        }
        let any: Vec<u32> = text.iter().map(|&b| u32::from(b)).chain([u32::MAX]).collect();
        let _ = tokenizer.decode(&any);
        tokenizer.vocab_size();
    });
}
