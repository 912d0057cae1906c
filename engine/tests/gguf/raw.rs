//! The GGUF model that these tests spoil, and how it is read.

use std::path::Path;

use bitnet_contracts::Result;
use bitnet_engine::model::Checkpoint;
use bitnet_engine::model::gguf::{GgufFile, GgufModel, GgufOptions};
use bitnet_engine::ternary::iq2_bn;

pub use fixtures::{RawGguf as Raw, RawKey as Key, RawTensor, gguf_array as array, gguf_text as text};

pub const HIDDEN: usize = 64;
pub const VOCABULARY: usize = 8;

/// What these tests do with such a file.
pub trait RawModel: Sized {
    /// A model of one layer, 64 wide, in IQ2_BN, with a vocabulary of 8 and a tokenizer.
    fn model() -> Self;

    /// A tensor that is there.
    fn tensor(&mut self, name: &str) -> &mut RawTensor;

    /// Opens the file and reads every tensor of it.
    fn read(&self) -> Result<Checkpoint>;
}

impl RawModel for Raw {
    fn model() -> Self {
        let key = |name: &str, ty: u32, value: Vec<u8>| Key { name: name.into(), ty, value };
        let number = |name: &str, n: u32| key(&format!("bitnet-b1.58.{name}"), 4, n.to_le_bytes().to_vec());
        let tokens: Vec<_> = ["a", "b", "c", "ab", "abc", "Ġ", "<s>", "</s>"].map(text).into();
        let types: Vec<_> = [1, 1, 1, 1, 1, 1, 3, 3].map(|n: i32| n.to_le_bytes().to_vec()).into();
        let keys = vec![
            key("general.architecture", 8, text("bitnet-b1.58")),
            number("context_length", 32),
            number("embedding_length", HIDDEN as u32),
            number("block_count", 1),
            number("feed_forward_length", HIDDEN as u32),
            number("attention.head_count", 4),
            number("attention.head_count_kv", 4),
            key("bitnet-b1.58.attention.layer_norm_rms_epsilon", 6, 1e-5f32.to_le_bytes().to_vec()),
            key("bitnet-b1.58.rope.freq_base", 6, 1e4f32.to_le_bytes().to_vec()),
            key("tokenizer.ggml.model", 8, text("gpt2")),
            key("tokenizer.ggml.pre", 8, text("llama-bpe")),
            key("tokenizer.ggml.tokens", 9, array(8, &tokens)),
            key("tokenizer.ggml.token_type", 9, array(5, &types)),
            key("tokenizer.ggml.merges", 9, array(8, &[text("a b"), text("ab c")])),
            key("tokenizer.ggml.bos_token_id", 4, 6u32.to_le_bytes().to_vec()),
            key("tokenizer.ggml.eos_token_id", 4, 7u32.to_le_bytes().to_vec()),
        ];
        let tensor = |name: &str, shape: &[usize], ty: u32, data: Vec<u8>| RawTensor {
            name: name.into(),
            dimensions: shape.iter().rev().map(|&n| n as u64).collect(),
            ty,
            offset: None,
            data,
        };
        let floats = |n: usize| (0..n).flat_map(|i| (0.5 + (i % 7) as f32 / 8.0).to_le_bytes()).collect::<Vec<u8>>();
        let norm = |name: &str| tensor(&format!("{name}.weight"), &[HIDDEN], 0, floats(HIDDEN));
        let trits: Vec<i8> = (0..HIDDEN * HIDDEN).map(|i| (i * i % 3) as i8 - 1).collect();
        let linear = |name: &str| {
            let bytes = iq2_bn::pack(name, &trits, HIDDEN, HIDDEN, 0.5).unwrap();
            tensor(&format!("blk.0.{name}.weight"), &[HIDDEN, HIDDEN], 135, bytes)
        };
        let mut tensors = vec![
            tensor("token_embd.weight", &[VOCABULARY, HIDDEN], 0, floats(VOCABULARY * HIDDEN)),
            norm("output_norm"),
        ];
        tensors.extend(["attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"].map(|n| norm(&format!("blk.0.{n}"))));
        tensors.extend(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"].map(linear));
        Self::new(keys, tensors)
    }

    fn tensor(&mut self, name: &str) -> &mut RawTensor {
        self.find(name).unwrap()
    }

    fn read(&self) -> Result<Checkpoint> {
        read(self.bytes().0, &GgufOptions::default())
    }
}

/// Opens a file in memory and reads every tensor of it.
pub fn read(bytes: Vec<u8>, options: &GgufOptions) -> Result<Checkpoint> {
    let file = GgufFile::from_bytes(Path::new("m.gguf"), bytes, options)?;
    let checkpoint = Checkpoint::gguf(GgufModel::new(file, options)?)?;
    read_all(&checkpoint)?;
    Ok(checkpoint)
}

/// Reads every tensor.
pub fn read_all(checkpoint: &Checkpoint) -> Result<()> {
    let d = checkpoint.description().clone();
    let (h, f, kv) = (d.hidden_size, d.intermediate_size, d.kv_size());
    checkpoint.matrix("model.embed_tokens.weight", d.vocab_size, h)?;
    if !d.tie_word_embeddings {
        checkpoint.matrix("lm_head.weight", d.vocab_size, h)?;
    }
    checkpoint.vector("model.norm.weight", h)?;
    for layer in 0..d.num_layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        for (part, len) in [
            ("input_layernorm", h),
            ("post_attention_layernorm", h),
            ("self_attn.attn_sub_norm", h),
            ("mlp.ffn_sub_norm", f),
        ] {
            checkpoint.vector(&format!("{}.weight", name(part)), len)?;
        }
        for (part, rows, columns) in [
            ("self_attn.q_proj", h, h),
            ("self_attn.k_proj", kv, h),
            ("self_attn.v_proj", kv, h),
            ("self_attn.o_proj", h, h),
            ("mlp.gate_proj", f, h),
            ("mlp.up_proj", f, h),
            ("mlp.down_proj", h, f),
        ] {
            checkpoint.ternary(&name(part), rows, columns)?.trits()?;
        }
    }
    Ok(())
}
