//! A checkpoint's weights made dense, in whatever matrix and vector types a backend has.

use bitnet_contracts::{MemoryError, Result};

use crate::model::Checkpoint;

/// The weights of a model. `M` is a `[out, in]` matrix, `V` a vector. H hidden, F intermediate, K keys and values, V vocabulary.
pub struct Weights<M, V> {
    /// `[V, H]`
    pub embedding: M,
    /// Layers, first to last.
    pub layers: Vec<LayerWeights<M, V>>,
    /// `[H]`
    pub norm: V,
    /// `[V, H]`; None when the head is the embedding.
    pub head: Option<M>,
}

/// The weights of a layer.
pub struct LayerWeights<M, V> {
    /// `[H]`
    pub input_norm: V,
    /// `[H, H]`
    pub q: M,
    /// `[K, H]`
    pub k: M,
    /// `[K, H]`
    pub v: M,
    /// `[H]`, over all heads at once
    pub attention_sub_norm: V,
    /// `[H, H]`
    pub o: M,
    /// `[H]`
    pub post_attention_norm: V,
    /// `[F, H]`
    pub gate: M,
    /// `[F, H]`
    pub up: M,
    /// `[F]`
    pub ffn_sub_norm: V,
    /// `[H, F]`
    pub down: M,
}

impl<M, V> Weights<M, V> {
    /// Reads every tensor and hands its values (row-major, with rows and columns; a vector has one row) to `matrix` or `vector`.
    ///
    /// # Errors
    /// What [`Checkpoint`] reports for a tensor, `MemoryError::AllocationFailed`, and the errors of `matrix` and `vector`.
    pub fn load(
        checkpoint: &Checkpoint,
        matrix: impl Fn(Vec<f32>, usize, usize) -> Result<M>,
        vector: impl Fn(Vec<f32>) -> Result<V>,
    ) -> Result<Self> {
        let d = checkpoint.description();
        let (h, f, kv) = (d.hidden_size, d.intermediate_size, d.kv_size());
        let layer = |n: usize| {
            let name = |part: &str| format!("model.layers.{n}.{part}");
            let linear =
                |part: &str, rows, columns| matrix(dense(checkpoint, &name(part), rows, columns)?, rows, columns);
            let norm = |part: &str, len| vector(checkpoint.vector(&name(part), len)?);
            Ok(LayerWeights {
                input_norm: norm("input_layernorm.weight", h)?,
                q: linear("self_attn.q_proj", h, h)?,
                k: linear("self_attn.k_proj", kv, h)?,
                v: linear("self_attn.v_proj", kv, h)?,
                attention_sub_norm: norm("self_attn.attn_sub_norm.weight", h)?,
                o: linear("self_attn.o_proj", h, h)?,
                post_attention_norm: norm("post_attention_layernorm.weight", h)?,
                gate: linear("mlp.gate_proj", f, h)?,
                up: linear("mlp.up_proj", f, h)?,
                ffn_sub_norm: norm("mlp.ffn_sub_norm.weight", f)?,
                down: linear("mlp.down_proj", h, f)?,
            })
        };
        let floats = |name: &str| matrix(plain(checkpoint, name, d.vocab_size, h)?, d.vocab_size, h);
        Ok(Self {
            embedding: floats("model.embed_tokens.weight")?,
            layers: (0..d.num_layers).map(layer).collect::<Result<_>>()?,
            norm: vector(checkpoint.vector("model.norm.weight", h)?)?,
            head: if d.tie_word_embeddings { None } else { Some(floats("lm_head.weight")?) },
        })
    }

    /// The matrix of the output head.
    pub fn head(&self) -> &M {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Numbers held, given how many a matrix and a vector hold.
    pub fn elements(&self, matrix: impl Fn(&M) -> usize, vector: impl Fn(&V) -> usize) -> usize {
        let layer = |l: &LayerWeights<M, V>| -> usize {
            let matrices: usize = [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down].into_iter().map(&matrix).sum();
            let norms = [&l.input_norm, &l.attention_sub_norm, &l.post_attention_norm, &l.ffn_sub_norm];
            matrices + norms.into_iter().map(&vector).sum::<usize>()
        };
        let head = self.head.as_ref().map_or(0, &matrix);
        matrix(&self.embedding) + head + vector(&self.norm) + self.layers.iter().map(layer).sum::<usize>()
    }
}

/// Numbers in the tensors of a checkpoint once they are dense.
pub fn dense_elements(checkpoint: &Checkpoint) -> usize {
    checkpoint.tensors().into_iter().map(|tensor| tensor.elements).fold(0, usize::saturating_add)
}

/// A ternary matrix as floats. A trit times the scale is exact.
fn dense(checkpoint: &Checkpoint, name: &str, rows: usize, columns: usize) -> Result<Vec<f32>> {
    // The shape is checked against the file here, so what follows allocates no more than the file accounts for.
    let tensor = checkpoint.ternary(name, rows, columns)?;
    let mut out = reserve(rows * columns)?;
    let mut trits = vec![0i8; columns];
    for row in 0..rows {
        tensor.row(row, &mut trits)?;
        out.extend(trits.iter().map(|&t| f32::from(t) * tensor.scale()));
    }
    checkpoint.release(&format!("{name}.weight"));
    Ok(out)
}

/// A float matrix, widened to f32.
fn plain(checkpoint: &Checkpoint, name: &str, rows: usize, columns: usize) -> Result<Vec<f32>> {
    let stored = checkpoint.matrix(name, rows, columns)?;
    let mut out = reserve(rows * columns)?;
    let mut row = vec![0f32; columns];
    for r in 0..rows {
        stored.row(r, &mut row);
        out.extend_from_slice(&row);
    }
    Ok(out)
}

fn reserve(floats: usize) -> Result<Vec<f32>> {
    let mut out = Vec::new();
    out.try_reserve_exact(floats)
        .map_err(|e| MemoryError::AllocationFailed { size_bytes: floats.saturating_mul(4), reason: e.to_string() })?;
    Ok(out)
}
