//! From a checkpoint to a [`Transformer`]: packed from the weight files, or read as an earlier start has packed them.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use bitnet_contracts::{MemoryError, Result};

use super::layer::{Layer, LayerParts};
use super::rope::Rope;
use super::transformer::Transformer;
use crate::kernels::{HeadScreen, Kernels, Threads};
use crate::model::{Checkpoint, FloatTable, Found, ModelDescription, PackedFile, PackedKey, PackedWeights, Part};
use crate::ternary::interleaved::{Packer, TritSource};

/// How a model is loaded.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LoadOptions {
    /// Copy a large embedding or head into memory; else it stays in its file.
    pub(crate) in_memory: bool,
    pub(crate) packed: PackedWeights,
}

impl Transformer {
    /// Loads the checkpoint's weights. The parts of a mapped file are let go as soon as they are packed.
    pub(crate) fn load(
        checkpoint: &Checkpoint,
        kernels: &Kernels,
        threads: &Threads,
        options: LoadOptions,
    ) -> Result<Self> {
        let place = match options.packed {
            PackedWeights::Never => None,
            PackedWeights::Use | PackedWeights::Keep => checkpoint.packed_place(kernels.packing()),
        };
        let mut keep = options.packed == PackedWeights::Keep;
        if let Some((path, key)) = &place {
            let stale = match PackedFile::find(path, key) {
                Found::Nothing => None,
                Found::Stale(reason) => Some(reason),
                Found::Fresh(file) => match restore(checkpoint, &file, kernels, threads, options.in_memory)? {
                    Ok(model) => return Ok(model),
                    Err(reason) => Some(reason),
                },
            };
            if let Some(reason) = stale {
                log::warn!("{}: {reason}; it is written anew", path.display());
                keep = true;
            }
        }
        let model = pack(checkpoint, kernels, threads, options.in_memory)?;
        if keep {
            match place {
                Some((path, key)) => model.keep(checkpoint, (&path, key), kernels, threads),
                None => log::warn!("packed weights are not kept: the model is no file, or one of this very moment"),
            }
        }
        Ok(model)
    }

    fn new(
        checkpoint: &Checkpoint,
        layers: Vec<Layer>,
        norm: Vec<f32>,
        (embedding, head): (FloatTable, Option<FloatTable>),
        screen: HeadScreen,
    ) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let description = checkpoint.description().clone();
        Self {
            embedding,
            layers,
            norm,
            head,
            screen,
            rope: Rope::new(description.rope_theta, description.head_dim()),
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            description,
        }
    }

    /// Writes the packed weights to a file. A failure is no reason not to run: it is logged.
    fn keep(&self, checkpoint: &Checkpoint, (path, key): (&Path, PackedKey), kernels: &Kernels, threads: &Threads) {
        // Files that changed while they were read are not what was packed.
        if checkpoint.packed_place(kernels.packing()).is_none_or(|(_, now)| now != key) {
            log::warn!("{}: not written, the model changed while it was read", path.display());
            return;
        }
        let mut floats = Vec::new();
        for layer in &self.layers {
            floats.extend(layer.linears().map(|linear| linear.scale()));
            layer.norms().iter().for_each(|norm| floats.extend_from_slice(norm));
        }
        floats.extend_from_slice(&self.norm);
        floats.extend_from_slice(self.screen.steps());
        floats.iter_mut().for_each(|f| *f = f32::from_bits(f.to_bits().to_le()));
        let mut sections: Vec<&[u8]> = vec![bytemuck::cast_slice(&floats)];
        sections.extend(self.layers.iter().map(|layer| layer.linears()[0].shared()));
        sections.push(self.screen.codes());
        match PackedFile::write(path, key, &sections, threads) {
            Ok(()) => log::info!("packed weights kept in {}", path.display()),
            Err(error) => log::warn!("packed weights are not kept: {error}"),
        }
    }
}

/// The embedding, and the head where it is another matrix.
fn tables(
    checkpoint: &Checkpoint,
    threads: &Threads,
    in_memory: bool,
    known: bool,
) -> Result<(FloatTable, Option<FloatTable>)> {
    let d = checkpoint.description();
    let table = |name| checkpoint.table(name, d.vocab_size, d.hidden_size, in_memory, known, threads);
    let head = if d.tie_word_embeddings { None } else { Some(table("lm_head.weight")?) };
    Ok((table("model.embed_tokens.weight")?, head))
}

/// The linear layers of layer `n`, `(name, rows, columns)`, in the order in which they are read.
fn linears(d: &ModelDescription, n: usize) -> Vec<(String, usize, usize)> {
    let linear =
        |part| if let Part::Ternary { name, rows, columns } = part { Some((name, rows, columns)) } else { None };
    d.layer_parts(n).into_iter().filter_map(linear).collect()
}

/// The norms of layer `n`, `(name, length)`, in the order in which they are read.
fn norms(d: &ModelDescription, n: usize) -> Vec<(String, usize)> {
    let norm = |part| if let Part::Vector { name, len } = part { Some((name, len)) } else { None };
    d.layer_parts(n).into_iter().filter_map(norm).collect()
}

/// Packs the checkpoint's weights.
fn pack(checkpoint: &Checkpoint, kernels: &Kernels, threads: &Threads, in_memory: bool) -> Result<Transformer> {
    let d = checkpoint.description();
    let layers = (0..d.num_layers).map(|n| pack_layer(checkpoint, kernels, threads, n)).collect::<Result<_>>()?;
    let tables = tables(checkpoint, threads, in_memory, false)?;
    let screen = HeadScreen::new(tables.1.as_ref().unwrap_or(&tables.0), kernels, threads)?;
    let norm = checkpoint.vector("model.norm.weight", d.hidden_size)?;
    Ok(Transformer::new(checkpoint, layers, norm, tables, screen))
}

fn pack_layer(checkpoint: &Checkpoint, kernels: &Kernels, threads: &Threads, n: usize) -> Result<Layer> {
    let linears = linears(checkpoint.description(), n);
    // Every tensor is held against the file before room is made for any.
    let tensors = linears.iter().map(|(name, rows, columns)| checkpoint.ternary(name, *rows, *columns));
    let tensors = tensors.collect::<Result<Vec<_>>>()?;
    let mut packer = Packer::new(kernels, linears.iter().map(|&(_, rows, columns)| (rows, columns)))?;
    for (tensor, (name, rows, columns)) in tensors.into_iter().zip(&linears) {
        let row = |r: usize, out: &mut [i8]| tensor.row(r, out);
        let source = TritSource { rows: *rows, columns: *columns, scale: tensor.scale(), row: &row };
        packer.add(&source, threads)?;
        checkpoint.release(&format!("{name}.weight"));
    }
    let norms = norms(checkpoint.description(), n).into_iter().map(|(name, len)| checkpoint.vector(&name, len));
    layer(packer.finish(), norms.collect::<Result<_>>()?)
}

/// Puts the parts, in the order of [`linears`] and [`norms`], in their places.
fn layer(linears: Vec<super::layer::TernaryLinear>, norms: Vec<Vec<f32>>) -> Result<Layer> {
    let missing = |what: &str| MemoryError::PoolExhausted { pool_type: what.to_string() };
    Ok(Layer::new(LayerParts {
        linears: linears.try_into().map_err(|_| missing("packed matrices"))?,
        norms: norms.try_into().map_err(|_| missing("norms"))?,
    }))
}

/// Takes the packed weights from a file. The inner error says why the file is of no use.
fn restore(
    checkpoint: &Checkpoint,
    file: &PackedFile,
    kernels: &Kernels,
    threads: &Threads,
    in_memory: bool,
) -> Result<std::result::Result<Transformer, String>> {
    let d = checkpoint.description();
    let (vocab, h) = (d.vocab_size, d.hidden_size);
    let mut floats = Vec::new();
    let a_layer: usize = linears(d, 0).len() + norms(d, 0).iter().map(|(_, len)| len).sum::<usize>();
    let count = d.num_layers * a_layer + h + HeadScreen::step_count(vocab);
    if let Err(reason) = file.floats(0, count, &mut floats, threads) {
        return Ok(Err(reason));
    }
    let mut rest = &floats[..];
    let mut take = |n: usize| rest.split_off(..n).unwrap_or_default();
    let mut layers = Vec::new();
    for n in 0..d.num_layers {
        let scales = take(linears(d, n).len());
        let matrices: Vec<_> = linears(d, n).iter().zip(scales).map(|((_, r, c), s)| (*r, *c, *s)).collect();
        let mut damage = Ok(());
        let packed = Packer::restore(kernels, &matrices, |pages| {
            damage = file.read(1 + n, pages, threads);
        })?;
        if let Err(reason) = damage {
            return Ok(Err(reason));
        }
        layers.push(layer(packed, norms(d, n).iter().map(|(_, len)| take(*len).to_vec()).collect())?);
    }
    let norm = take(h).to_vec();
    let mut damage = Ok(());
    let steps = take(HeadScreen::step_count(vocab)).to_vec();
    let screen = HeadScreen::restore((vocab, h), steps, |codes| {
        damage = file.read(1 + d.num_layers, codes, threads);
    })?;
    if let Err(reason) = damage {
        return Ok(Err(reason));
    }
    // The values were looked at when the weights were packed, and the files are the same.
    Ok(Ok(Transformer::new(checkpoint, layers, norm, tables(checkpoint, threads, in_memory, true)?, screen)))
}
