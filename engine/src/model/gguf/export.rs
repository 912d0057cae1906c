//! A checkpoint of any format as a GGUF file.
//!
//! Tensor by tensor: one matrix of trits, or a piece of a float matrix, is in memory at a time.

use std::path::Path;

use bitnet_contracts::Result;

use super::names::to_gguf;
use super::write::{GgufValue, GgufWriter};
use super::{LAYOUT_KEY, TensorType, config, contradiction, floats, loader, tokenizer_keys};
use crate::model::checkpoint::Checkpoint;
use crate::model::description::Activation;
use crate::model::plan::Part;
use crate::ternary::tl_kernel::{TlKernels, to_ini};
use crate::ternary::{I2sLayout, TlKernel, i2_s, iq1_bn, iq2_bn, tl1, tl2, tq1_0, tq2_0, usable_scale};

/// What the matrices of the layers are written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GgufFormat {
    /// I2_S of bitnet.cpp.
    I2S(I2sLayout),
    /// TL1 of bitnet.cpp.
    Tl1,
    /// TL2 of bitnet.cpp.
    Tl2,
    /// TQ1_0 of llama.cpp; the scale is rounded to f16.
    Tq1_0,
    /// TQ2_0 of llama.cpp; the scale is rounded to f16.
    Tq2_0,
    /// IQ1_BN of ik_llama.cpp; the scale is rounded to f16.
    Iq1Bn,
    /// IQ2_BN of ik_llama.cpp.
    Iq2Bn,
    /// Floats of half precision, each -s, 0 or s; the scale is rounded to f16.
    F16,
}

impl GgufFormat {
    /// The type of the layers' matrices.
    pub fn tensor_type(self) -> TensorType {
        match self {
            Self::I2S(_) => TensorType::I2S,
            Self::Tl1 => TensorType::Tl1,
            Self::Tl2 => TensorType::Tl2,
            Self::Tq1_0 => TensorType::Tq1_0,
            Self::Tq2_0 => TensorType::Tq2_0,
            Self::Iq1Bn => TensorType::Iq1Bn,
            Self::Iq2Bn => TensorType::Iq2Bn,
            Self::F16 => TensorType::F16,
        }
    }

    /// `general.file_type` as the tools of the format have it.
    fn file_type(self) -> Option<u32> {
        match self {
            Self::F16 => Some(1),
            Self::Tq1_0 => Some(36),
            Self::Tq2_0 => Some(37),
            Self::Tl1 => Some(38),
            Self::Tl2 => Some(39),
            Self::I2S(_) => Some(40),
            Self::Iq1Bn | Self::Iq2Bn => None,
        }
    }
}

/// How a file is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOptions {
    /// Matrices of the layers.
    pub format: GgufFormat,
    /// Embedding and head: F32, F16, BF16, Q8_0 or Q6_K. None: as they are stored.
    pub head: Option<TensorType>,
    /// `general.architecture`. None: `bitnet-b1.58`, which llama.cpp does not know, for the formats of bitnet.cpp and ik_llama.cpp;
    /// `bitnet`, which it runs with SiLU whatever the model, for its own and for models that have SiLU.
    pub architecture: Option<String>,
}

impl ExportOptions {
    /// Options with everything but the format left open.
    pub fn new(format: GgufFormat) -> Self {
        Self { format, head: None, architecture: None }
    }
}

/// Writes `checkpoint` to `path`, which has that name once it is whole. `progress` is told the bytes written and all bytes.
///
/// # Errors
/// What [`Checkpoint`] reports for a tensor; `QuantizationError` when the format cannot hold a shape or a scale; `ModelError` when the
/// tokenizer cannot be said in GGUF keys or the file cannot be written.
pub fn export(
    checkpoint: &Checkpoint,
    path: &Path,
    options: &ExportOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let parts = checkpoint.description().parts();
    let head = |name: &str| head_type(checkpoint, path, name, options.head);
    let kernels = kernels(&parts, options.format)?;
    let mut writer = GgufWriter::default();
    metadata(&mut writer, checkpoint, path, options)?;
    if !kernels.is_empty() {
        writer.key(loader::KERNELS_KEY, GgufValue::Text(to_ini(&kernels)));
    }
    for part in &parts {
        declare(&mut writer, part, options.format, path, &head)?;
    }
    let total = writer.tensor_bytes();
    let mut stream = writer.begin(path)?;
    let mut done = 0;
    for part in &parts {
        done += match part {
            Part::Vector { name, len } => {
                let bytes: Vec<u8> = checkpoint.vector(name, *len)?.iter().flat_map(|x| x.to_le_bytes()).collect();
                stream.write(&bytes)?;
                bytes.len() as u64
            }
            Part::Floats { name, rows, columns } => {
                let mut written = 0;
                floats::copy(checkpoint, (name, *rows, *columns), head(name)?, &mut |bytes| {
                    written += bytes.len() as u64;
                    stream.write(bytes)
                })?;
                written
            }
            Part::Ternary { name, rows, columns } => {
                let kernel = kernels.get(&(*rows, *columns)).copied();
                let bytes = packed(checkpoint, (name, *rows, *columns), options.format, kernel)?;
                for bytes in &bytes {
                    stream.write(bytes)?;
                }
                checkpoint.release(&format!("{name}.weight"));
                bytes.iter().map(|b| b.len() as u64).sum()
            }
        };
        progress(done, total);
    }
    stream.finish()
}

/// The type that an embedding or head is written in.
fn head_type(checkpoint: &Checkpoint, path: &Path, name: &str, head: Option<TensorType>) -> Result<TensorType> {
    let stored = checkpoint.stored_type(name)?;
    let ty = head.unwrap_or(stored);
    let written = [TensorType::F32, TensorType::F16, TensorType::Bf16, TensorType::Q8_0, TensorType::Q6K];
    if stored != ty && !written.contains(&ty) {
        return Err(contradiction(path, format_args!("embeddings are not written as {}", ty.name())));
    }
    Ok(ty)
}

/// Kernel parameters for every shape, when the format is one that needs them.
fn kernels(parts: &[Part], format: GgufFormat) -> Result<TlKernels> {
    let mut kernels = TlKernels::new();
    for part in parts {
        let (Part::Ternary { name, rows, columns }, GgufFormat::Tl1 | GgufFormat::Tl2) = (part, format) else {
            continue;
        };
        let tl2 = format == GgufFormat::Tl2;
        let kernel = TlKernel::for_writing(tl2, *rows, *columns).ok_or_else(|| {
            bitnet_contracts::QuantizationError::LayoutMismatch {
                tensor: name.clone(),
                expected: if tl2 {
                    "TL2: rows in multiples of 32, 256 columns or more, of which those behind blocks of 96 or 192 are a multiple of 32"
                } else {
                    "TL1: rows in multiples of 32, columns of 64"
                }
                .to_string(),
                actual: format!("{rows} x {columns}"),
            }
        })?;
        kernels.insert((*rows, *columns), kernel);
    }
    Ok(kernels)
}

fn declare(
    writer: &mut GgufWriter,
    part: &Part,
    format: GgufFormat,
    path: &Path,
    head: &dyn Fn(&str) -> Result<TensorType>,
) -> Result<()> {
    let gguf = |name: &str| to_gguf(name).ok_or_else(|| contradiction(path, format_args!("no GGUF name for {name}")));
    let too_odd = |name: &str, rows: &usize, columns: &usize, ty: TensorType| {
        bitnet_contracts::QuantizationError::LayoutMismatch {
            tensor: name.to_string(),
            expected: format!("columns that are a multiple of {} ({})", ty.block(), ty.name()),
            actual: format!("{rows} x {columns}"),
        }
    };
    match part {
        Part::Vector { name, len } => {
            writer.tensor(&gguf(name)?, &[*len], TensorType::F32, len * 4);
        }
        Part::Floats { name, rows, columns } => {
            let ty = head(name)?;
            let bytes = ty.bytes(*rows, *columns).ok_or_else(|| too_odd(name, rows, columns, ty))?;
            writer.tensor(&gguf(name)?, &[*rows, *columns], ty, bytes);
        }
        Part::Ternary { name, rows, columns } => {
            let ty = format.tensor_type();
            let bytes = ty.bytes(*rows, *columns).ok_or_else(|| too_odd(name, rows, columns, ty))?;
            let gguf = gguf(&format!("{name}.weight"))?;
            writer.tensor(&gguf, &[*rows, *columns], ty, bytes);
            if matches!(ty, TensorType::Tl1 | TensorType::Tl2) {
                // Behind the codes, where bitnet.cpp's kernels look for it.
                writer.tensor(&format!("{gguf}_scale"), &[1], TensorType::F32, 4);
            }
        }
    }
    Ok(())
}

/// The bytes of a ternary matrix, and those of the scale where that is a tensor of its own.
fn packed(
    checkpoint: &Checkpoint,
    (name, rows, columns): (&str, usize, usize),
    format: GgufFormat,
    kernel: Option<TlKernel>,
) -> Result<Vec<Vec<u8>>> {
    let tensor = checkpoint.ternary(name, rows, columns)?;
    let trits = tensor.trits()?;
    let scale = usable_scale(name, tensor.scale())?;
    let kernel = kernel.unwrap_or(TlKernel { bm: 0, bk: 0, bmm: 0 });
    let one = |bytes: Vec<u8>| vec![bytes];
    let with_scale = |bytes: Vec<u8>| vec![bytes, scale.to_le_bytes().to_vec()];
    match format {
        GgufFormat::I2S(layout) => i2_s::pack(name, &trits, rows, columns, scale, layout).map(one),
        GgufFormat::Tq1_0 => tq1_0::pack(name, &trits, rows, columns, scale).map(one),
        GgufFormat::Tq2_0 => tq2_0::pack(name, &trits, rows, columns, scale).map(one),
        GgufFormat::Iq1Bn => iq1_bn::pack(name, &trits, rows, columns, scale).map(one),
        GgufFormat::Iq2Bn => iq2_bn::pack(name, &trits, rows, columns, scale).map(one),
        GgufFormat::Tl1 => tl1::pack(name, &trits, rows, columns, kernel).map(with_scale),
        GgufFormat::Tl2 => tl2::pack(name, &trits, rows, columns, kernel).map(with_scale),
        GgufFormat::F16 => {
            let half = crate::ternary::half_scale(name, scale)?;
            Ok(one(trits
                .iter()
                .flat_map(|&t| {
                    if t < 0 {
                        (-half).to_le_bytes()
                    } else if t > 0 {
                        half.to_le_bytes()
                    } else {
                        [0; 2]
                    }
                })
                .collect()))
        }
    }
}

fn metadata(writer: &mut GgufWriter, checkpoint: &Checkpoint, path: &Path, options: &ExportOptions) -> Result<()> {
    let d = checkpoint.description();
    let upstream = matches!(options.format, GgufFormat::Tq1_0 | GgufFormat::Tq2_0 | GgufFormat::F16);
    let architecture = match &options.architecture {
        Some(said) => said.as_str(),
        None if upstream || d.activation == Activation::Silu => "bitnet",
        None => "bitnet-b1.58",
    };
    let Some(&(_, own)) = config::ARCHITECTURES.iter().find(|(name, _)| *name == architecture) else {
        return Err(contradiction(path, format_args!("{architecture:?} is no architecture of BitNet models")));
    };
    let count = |n: usize| {
        u32::try_from(n).map(GgufValue::U32).map_err(|_| contradiction(path, format_args!("{n} does not fit a key")))
    };
    writer.key("general.architecture", architecture);
    if let Some(name) = &d.name {
        writer.key("general.name", name.as_str());
    }
    if let Some(n) = options.format.file_type() {
        writer.key("general.file_type", GgufValue::U32(n));
    }
    writer.key("general.quantization_version", GgufValue::U32(2));
    for (part, n) in [
        ("vocab_size", d.vocab_size),
        ("context_length", d.max_position_embeddings),
        ("embedding_length", d.hidden_size),
        ("block_count", d.num_layers),
        ("feed_forward_length", d.intermediate_size),
        ("attention.head_count", d.num_attention_heads),
        ("attention.head_count_kv", d.num_key_value_heads),
        ("rope.dimension_count", d.head_dim()),
    ] {
        writer.key(&format!("{architecture}.{part}"), count(n)?);
    }
    for (part, x) in [("attention.layer_norm_rms_epsilon", d.rms_norm_eps), ("rope.freq_base", d.rope_theta)] {
        writer.key(&format!("{architecture}.{part}"), GgufValue::F32(x as f32));
    }
    if own != Some(d.activation) {
        writer.key(config::ACTIVATION_KEY, d.activation.name());
    }
    if let GgufFormat::I2S(layout) = options.format {
        writer.key(LAYOUT_KEY, layout.name());
    }
    tokenizer_keys::write(writer, checkpoint, path)
}
