//! The tokenizer in the metadata of a GGUF file: byte-level BPE, as llama.cpp names it `gpt2`.
//!
//! The file has the tokens by id, their types, the merges in order, and a name for the way text is cut up before merging
//! (`tokenizer.ggml.pre`). What the name stands for is not in the file; the regular expressions here are those of the tokenizer.json files
//! that llama.cpp's names were given to.

use std::collections::BTreeMap;

use bitnet_contracts::Result;
use serde_json::{Value, json};

use super::contradiction;
use super::file::GgufFile;

/// Llama 3 and what descends from it.
pub(super) const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-2.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// What a name of a pre-tokenizer stands for.
pub(super) struct PreTokenizer {
    /// The first is the one that is written.
    pub(super) names: &'static [&'static str],
    pub(super) regex: &'static str,
    /// A piece that is a token as it stands is taken whole, whatever its merges.
    pub(super) ignore_merges: bool,
    /// Whether a begin-of-sequence token is added where the file does not say.
    add_bos: bool,
}

pub(super) const PRE_TOKENIZERS: [PreTokenizer; 2] = [
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3"],
        regex: LLAMA3,
        ignore_merges: true,
        add_bos: true,
    },
    PreTokenizer { names: &["gpt-2", "gpt2"], regex: GPT2, ignore_merges: false, add_bos: false },
];

/// Token types of llama.cpp.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

/// The metadata as a tokenizer.json, so that there is one way from there on; None when the file has none, or one that is no byte-level BPE (with a warning).
///
/// # Errors
/// `ModelError` for lists of unequal lengths, tokens that are there twice, merges of what is no token, and a pre-tokenizer whose name is
/// not known: one that merely looks right gives other ids now and then.
pub(super) fn read(file: &GgufFile, vocab_size: usize) -> Result<Option<Vec<u8>>> {
    let Some(model) = file.text("tokenizer.ggml.model")? else { return Ok(None) };
    // How llama.cpp says that there is none.
    if matches!(model.as_str(), "none" | "no_vocab") {
        return Ok(None);
    }
    if model != "gpt2" {
        log::warn!(
            "{}: tokenizer.ggml.model is {model:?}; only byte-level BPE (\"gpt2\") is read, so there is no tokenizer",
            file.path().display()
        );
        return Ok(None);
    }
    let need = |what: &str| contradiction(file.path(), format_args!("{what} is missing"));
    let tokens = file.texts("tokenizer.ggml.tokens")?.ok_or_else(|| need("tokenizer.ggml.tokens"))?;
    if tokens.len() != vocab_size {
        return Err(contradiction(
            file.path(),
            format_args!("tokenizer.ggml.tokens has {} tokens, the embedding {vocab_size} rows", tokens.len()),
        ));
    }
    let merges = file.texts("tokenizer.ggml.merges")?.ok_or_else(|| need("tokenizer.ggml.merges"))?;
    let types = match file.integers("tokenizer.ggml.token_type")? {
        Some(types) if types.len() != tokens.len() => {
            return Err(contradiction(
                file.path(),
                format_args!("tokenizer.ggml.token_type has {} entries for {} tokens", types.len(), tokens.len()),
            ));
        }
        Some(types) => types,
        None => vec![1; tokens.len()],
    };
    let pre = pre_tokenizer(file, &tokens)?;
    let special = special(file, tokens.len(), pre.add_bos)?;
    let json = to_json(&tokens, &types, &merges, pre, &special);
    json.map(Some).map_err(|reason| contradiction(file.path(), format_args!("tokenizer: {reason}")))
}

fn pre_tokenizer(file: &GgufFile, tokens: &[String]) -> Result<&'static PreTokenizer> {
    let find = |name: &str| PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name));
    match file.text("tokenizer.ggml.pre")? {
        Some(name) if name != "default" => find(&name).ok_or_else(|| {
            contradiction(
                file.path(),
                format_args!(
                    "tokenizer.ggml.pre is {name:?}, which is not known; known are {}",
                    PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ")
                ),
            )
        }),
        // Files of the 2B4T model were published without a name. Its vocabulary is Llama 3's, which these tokens give away.
        _ if tokens.iter().any(|token| token == "<|begin_of_text|>") => {
            log::warn!(
                "{}: tokenizer.ggml.pre names no pre-tokenizer; the vocabulary is one of Llama 3, so its is taken",
                file.path().display()
            );
            find("llama-bpe").ok_or_else(|| contradiction(file.path(), "no pre-tokenizer"))
        }
        _ => Err(contradiction(
            file.path(),
            "tokenizer.ggml.pre is missing: text cannot be cut up as the model was trained",
        )),
    }
}

/// Tokens put before and behind a text.
struct Special {
    bos: Option<u32>,
    eos: Option<u32>,
}

fn special(file: &GgufFile, tokens: usize, default_bos: bool) -> Result<Special> {
    let id = |key: &str| -> Result<Option<u32>> {
        match file.id(key)? {
            Some(id) if id as usize >= tokens => {
                Err(contradiction(file.path(), format_args!("{key} is {id}, of {tokens} tokens")))
            }
            id => Ok(id),
        }
    };
    let (bos, eos) = (id("tokenizer.ggml.bos_token_id")?, id("tokenizer.ggml.eos_token_id")?);
    let add_bos = file.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(default_bos);
    let add_eos = file.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    Ok(Special { bos: bos.filter(|_| add_bos), eos: eos.filter(|_| add_eos) })
}

fn to_json(
    tokens: &[String],
    types: &[i64],
    merges: &[String],
    pre: &PreTokenizer,
    special: &Special,
) -> std::result::Result<Vec<u8>, String> {
    let vocabulary: BTreeMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
    if vocabulary.len() != tokens.len() {
        return Err("a token is there twice".to_string());
    }
    let pairs = merges.iter().map(|merge| match merge.split_once(' ') {
        // A byte-level token has no space, so the first one parts the two.
        Some((left, right)) if !right.is_empty() && !right.contains(' ') => {
            let known = [left, right, &[left, right].concat()].into_iter().all(|t| vocabulary.contains_key(t));
            if known { Ok([left, right]) } else { Err(format!("merge {merge:?} is of what is no token")) }
        }
        _ => Err(format!("merge {merge:?} is not two tokens")),
    });
    let pairs = pairs.collect::<std::result::Result<Vec<_>, _>>()?;
    let added = tokens.iter().zip(types).enumerate().filter(|(_, (_, ty))| [CONTROL, USER_DEFINED].contains(ty));
    let added: Vec<Value> = added
        .map(|(id, (token, &ty))| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                "special": ty == CONTROL})
        })
        .collect();
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pre.regex}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]},
        "post_processor": post_processor(tokens, special),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre.ignore_merges,
            "vocab": vocabulary, "merges": pairs},
    });
    serde_json::to_vec(&json).map_err(|e| e.to_string())
}

/// The begin and end tokens around one text and around each of two.
fn post_processor(tokens: &[String], special: &Special) -> Value {
    if special.bos.is_none() && special.eos.is_none() {
        return Value::Null;
    }
    let name = |id: Option<u32>| id.map(|id| (id, tokens[id as usize].as_str()));
    let (bos, eos) = (name(special.bos), name(special.eos));
    let part = |text: &str, kind: u32| {
        let token = |t: Option<(u32, &str)>| t.map(|(_, name)| json!({"SpecialToken": {"id": name, "type_id": kind}}));
        [token(bos), Some(json!({"Sequence": {"id": text, "type_id": kind}})), token(eos)].into_iter().flatten()
    };
    let named: serde_json::Map<String, Value> = [bos, eos]
        .into_iter()
        .flatten()
        .map(|(id, name)| (name.to_string(), json!({"id": name, "ids": [id], "tokens": [name]})))
        .collect();
    json!({
        "type": "TemplateProcessing",
        "single": part("A", 0).collect::<Vec<_>>(),
        "pair": part("A", 0).chain(part("B", 1)).collect::<Vec<_>>(),
        "special_tokens": named,
    })
}
