//! Tensor names of GGUF files and of Hugging Face checkpoints.

/// Parts of a layer: the name in a Hugging Face checkpoint and in a GGUF file, both without `.weight`, and whether it is a ternary matrix.
pub(in crate::model) const LAYER_PARTS: [(&str, &str, bool); 11] = [
    ("input_layernorm", "attn_norm", false),
    ("self_attn.q_proj", "attn_q", true),
    ("self_attn.k_proj", "attn_k", true),
    ("self_attn.v_proj", "attn_v", true),
    ("self_attn.attn_sub_norm", "attn_sub_norm", false),
    ("self_attn.o_proj", "attn_output", true),
    ("post_attention_layernorm", "ffn_norm", false),
    ("mlp.gate_proj", "ffn_gate", true),
    ("mlp.up_proj", "ffn_up", true),
    ("mlp.ffn_sub_norm", "ffn_sub_norm", false),
    ("mlp.down_proj", "ffn_down", true),
];

/// What is outside the layers: Hugging Face, GGUF.
pub(super) const OUTER: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

/// The GGUF name of a Hugging Face tensor, with or without `.weight`; None when there is none.
pub(super) fn to_gguf(name: &str) -> Option<String> {
    if let Some((_, gguf)) = OUTER.iter().find(|(hf, _)| *hf == name) {
        return Some(gguf.to_string());
    }
    let (layer, part) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, suffix) = match part.strip_suffix(".weight") {
        Some(part) => (part, ".weight"),
        None => (part, ""),
    };
    let (_, gguf, _) = LAYER_PARTS.iter().find(|(hf, ..)| *hf == part)?;
    Some(format!("blk.{layer}.{gguf}{suffix}"))
}

/// The layer's number and part of `blk.N.part`.
pub(super) fn layer_part(name: &str) -> Option<(usize, &str)> {
    let (number, part) = name.strip_prefix("blk.")?.split_once('.')?;
    // "+1" and "01" parse as numbers and are no layer's names.
    let layer: usize = number.parse().ok().filter(|n: &usize| n.to_string() == number)?;
    Some((layer, part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_over() {
        assert_eq!(to_gguf("model.layers.12.self_attn.q_proj.weight").unwrap(), "blk.12.attn_q.weight");
        assert_eq!(to_gguf("model.layers.0.mlp.down_proj").unwrap(), "blk.0.ffn_down");
        assert_eq!(to_gguf("lm_head.weight").unwrap(), "output.weight");
        assert_eq!(to_gguf("model.layers.0.mlp.other.weight"), None);
        assert_eq!(layer_part("blk.7.attn_q.weight"), Some((7, "attn_q.weight")));
        assert_eq!(layer_part("blk.07.attn_q.weight"), None);
    }
}
