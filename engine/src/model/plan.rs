//! All tensors of a model, in the order in which files are written.

use bitnet_contracts::Result;

use super::checkpoint::Checkpoint;
use super::description::ModelDescription;
use super::gguf::names::LAYER_PARTS;

/// A tensor by its Hugging Face name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A gain.
    Vector {
        /// Name with `.weight`.
        name: String,
        /// Elements.
        len: usize,
    },
    /// An embedding or head.
    Floats {
        /// Name with `.weight`.
        name: String,
        /// Tokens.
        rows: usize,
        /// Hidden size.
        columns: usize,
    },
    /// A matrix of trits.
    Ternary {
        /// Name without `.weight`.
        name: String,
        /// Outputs.
        rows: usize,
        /// Inputs.
        columns: usize,
    },
}

impl Part {
    /// The tensor's name; of a matrix of trits without `.weight`.
    pub fn name(&self) -> &str {
        match self {
            Self::Vector { name, .. } | Self::Floats { name, .. } | Self::Ternary { name, .. } => name,
        }
    }
}

impl ModelDescription {
    /// All tensors of a model of this description.
    pub fn parts(&self) -> Vec<Part> {
        let (v, h) = (self.vocab_size, self.hidden_size);
        let floats = |name: &str| Part::Floats { name: name.to_string(), rows: v, columns: h };
        let mut parts = vec![floats("model.embed_tokens.weight")];
        if !self.tie_word_embeddings {
            parts.push(floats("lm_head.weight"));
        }
        parts.push(Part::Vector { name: "model.norm.weight".to_string(), len: h });
        (0..self.num_layers).for_each(|layer| parts.extend(self.layer_parts(layer)));
        parts
    }

    /// The tensors of one layer, in the order in which a pass meets them.
    pub fn layer_parts(&self, layer: usize) -> [Part; 11] {
        let (h, f, kv) = (self.hidden_size, self.intermediate_size, self.kv_size());
        LAYER_PARTS.map(|(part, _, ternary)| {
            let name = format!("model.layers.{layer}.{part}");
            let (rows, columns) = match part {
                "self_attn.k_proj" | "self_attn.v_proj" => (kv, h),
                "mlp.gate_proj" | "mlp.up_proj" => (f, h),
                "mlp.down_proj" => (h, f),
                _ => (h, h),
            };
            match (ternary, part) {
                (true, _) => Part::Ternary { name, rows, columns },
                (false, "mlp.ffn_sub_norm") => Part::Vector { name: format!("{name}.weight"), len: f },
                (false, _) => Part::Vector { name: format!("{name}.weight"), len: h },
            }
        })
    }
}

impl Checkpoint {
    /// Whether the layers are floats that are no trits yet: a master checkpoint. Looks at the first matrix.
    ///
    /// # Errors
    /// As [`Checkpoint::ternary`].
    pub fn is_master(&self) -> Result<bool> {
        if self.is_packed() {
            return Ok(false);
        }
        let d = self.description();
        let name = "model.layers.0.self_attn.q_proj";
        Ok(!self.matrix(&format!("{name}.weight"), d.hidden_size, d.hidden_size)?.is_ternary())
    }
}
