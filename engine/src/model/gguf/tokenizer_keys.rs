//! A tokenizer.json as keys of a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;

use bitnet_contracts::Result;
use serde::Deserialize;
use serde_json::Value;

use super::config::EOS_LIST_KEY;
use super::contradiction;
use super::tokenizer::{LLAMA3, PRE_TOKENIZERS, PreTokenizer};
use super::write::{GgufValue, GgufWriter};
use crate::model::checkpoint::Checkpoint;

/// Token types of llama.cpp.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

#[derive(Deserialize)]
struct TokenizerJson {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    added_tokens: Option<Vec<AddedToken>>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    special: bool,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: BTreeMap<String, u32>,
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
}

/// Both spellings.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

/// Writes the tokenizer's keys; without a tokenizer the one that says so.
///
/// # Errors
/// `ModelError::ValidationFailed` for a tokenizer that GGUF has no keys for: it would give other ids than this one.
pub(super) fn write(writer: &mut GgufWriter, checkpoint: &Checkpoint, path: &Path) -> Result<()> {
    let d = checkpoint.description();
    let (Some(json), Some(tokenizer)) = (checkpoint.tokenizer_json(), checkpoint.tokenizer()) else {
        writer.key("tokenizer.ggml.model", "none");
        ids(writer, d.bos_token_id, &d.eos_token_ids);
        return Ok(());
    };
    let refuse =
        |what: String| contradiction(path, format_args!("the tokenizer cannot be written as GGUF keys: {what}"));
    let parsed: TokenizerJson = serde_json::from_slice(json).map_err(|e| refuse(e.to_string()))?;
    let pre = pre_tokenizer(&parsed).map_err(&refuse)?;
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; d.vocab_size];
    let added = parsed.added_tokens.unwrap_or_default();
    let typed = added.iter().map(|t| (t.content.clone(), t.id, if t.special { CONTROL } else { USER_DEFINED }));
    for (token, id, ty) in parsed.model.vocab.into_iter().map(|(token, id)| (token, id, NORMAL)).chain(typed) {
        let slot = tokens.get_mut(id as usize).ok_or_else(|| refuse(format!("token {id} is beyond vocab_size")))?;
        if slot.as_ref().is_some_and(|(other, _)| *other != token) {
            return Err(refuse(format!("id {id} is of two tokens")));
        }
        *slot = Some((token, ty));
    }
    if let Some(odd) = added.iter().find(|t| t.single_word || t.lstrip || t.rstrip) {
        return Err(refuse(format!("added token {:?} takes the space beside it, or is a word only", odd.content)));
    }
    let unused = |id: usize| (format!("[PAD{id}]"), UNUSED);
    let (names, types): (Vec<String>, Vec<i32>) =
        tokens.into_iter().enumerate().map(|(id, token)| token.unwrap_or_else(|| unused(id))).unzip();
    let merges = parsed.model.merges.into_iter().map(|merge| match merge {
        Merge::Pair(left, right) if left.contains(' ') || right.contains(' ') => {
            Err(refuse(format!("the merge of {left:?} and {right:?} holds a space")))
        }
        Merge::Pair(left, right) => Ok(format!("{left} {right}")),
        Merge::Joined(merge) => Ok(merge),
    });
    let merges = merges.collect::<Result<Vec<_>>>()?;
    // What the post-processor adds shows on a text of nothing.
    let around = tokenizer.encode("")?;
    let (add_bos, add_eos) = match (around.as_slice(), d.bos_token_id, d.eos_token_ids.first()) {
        ([], ..) => (false, false),
        (&[id], Some(bos), _) if id == bos => (true, false),
        (&[id], _, Some(&eos)) if id == eos => (false, true),
        (&[first, last], Some(bos), Some(&eos)) if first == bos && last == eos => (true, true),
        (other, ..) => return Err(refuse(format!("it adds the tokens {other:?} to a text"))),
    };
    writer
        .key("tokenizer.ggml.model", "gpt2")
        .key("tokenizer.ggml.pre", pre.names[0])
        .key("tokenizer.ggml.tokens", GgufValue::Texts(names))
        .key("tokenizer.ggml.token_type", GgufValue::I32s(types))
        .key("tokenizer.ggml.merges", GgufValue::Texts(merges))
        .key("tokenizer.ggml.add_bos_token", GgufValue::Bool(add_bos))
        .key("tokenizer.ggml.add_eos_token", GgufValue::Bool(add_eos));
    ids(writer, d.bos_token_id, &d.eos_token_ids);
    if let Some(template) = checkpoint.chat_template() {
        writer.key("tokenizer.chat_template", template);
    }
    Ok(())
}

fn ids(writer: &mut GgufWriter, bos: Option<u32>, eos: &[u32]) {
    let keys = ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
    let [first, second] = [eos.first(), eos.get(1)].map(|id| id.copied());
    for (key, id) in keys.into_iter().zip([bos, first, second]) {
        if let Some(id) = id {
            writer.key(key, GgufValue::U32(id));
        }
    }
    if eos.len() > 2 {
        writer.key(EOS_LIST_KEY, GgufValue::U32s(eos.to_vec()));
    }
}

/// The pre-tokenizer with the same regular expression and the same rule for whole tokens.
fn pre_tokenizer(json: &TokenizerJson) -> std::result::Result<&'static PreTokenizer, String> {
    if json.model.kind.as_deref().is_some_and(|kind| kind != "BPE") || json.model.byte_fallback {
        return Err("it is no byte-level BPE".to_string());
    }
    if json.normalizer.as_ref().is_some_and(|n| !n.is_null()) {
        return Err("it has a normalizer".to_string());
    }
    let pre = json.pre_tokenizer.clone().unwrap_or_default();
    let steps: Vec<&Value> = match pre["pretokenizers"].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![&pre],
    };
    let regex = match steps.as_slice() {
        [split, bytes]
            if split["type"] == "Split"
                && split["behavior"] == "Isolated"
                && split["invert"] != true
                && bytes["type"] == "ByteLevel"
                && bytes["use_regex"] == false
                && bytes["add_prefix_space"] != true =>
        {
            split["pattern"]["Regex"].as_str().unwrap_or_default()
        }
        // GPT-2's own regular expression is built in.
        [bytes] if bytes["type"] == "ByteLevel" && bytes["use_regex"] != false && bytes["add_prefix_space"] != true => {
            PRE_TOKENIZERS.iter().find(|pre| pre.names[0] == "gpt-2").map_or(LLAMA3, |pre| pre.regex)
        }
        _ => return Err("its pre-tokenizer is not a split followed by bytes".to_string()),
    };
    PRE_TOKENIZERS.iter().find(|pre| pre.regex == regex && pre.ignore_merges == json.model.ignore_merges).ok_or_else(
        || format!("no name is known for its pre-tokenizer ({regex:?}, ignore_merges {})", json.model.ignore_merges),
    )
}
