//! A Hugging Face checkpoint: config.json, one or several safetensors files, tokenizer.json, the chat template.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use bitnet_contracts::{InferenceError, MemoryError, ModelError, Result};
use half::f16;
use safetensors::Dtype;
use serde::Deserialize;

use super::TensorSummary;
use super::description::{ModelDescription, WeightScale};
use super::gguf::TensorType;
use super::mapped_file::{FilePart, loading_failed, open_regular};
use super::safetensors_file::SafetensorsFile;
use super::weights::{FloatMatrix, FloatValues, TernarySource, TernaryTensor};
use crate::ternary::{HfPacked, usable_scale};

/// The most bytes read of a config.json or an index file.
const MAX_JSON_BYTES: u64 = 16 << 20;
/// The most bytes read of a tokenizer.json.
const MAX_TOKENIZER_BYTES: u64 = 256 << 20;

/// An open checkpoint: description, tokenizer.json, and tensors by name.
pub(super) struct HfCheckpoint {
    description: ModelDescription,
    tokenizer_json: Option<Vec<u8>>,
    chat_template: Option<String>,
    files: Vec<SafetensorsFile>,
    tensors: BTreeMap<String, Place>,
}

#[derive(Clone)]
struct Place {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    offsets: (usize, usize),
}

/// The key of tokenizer_config.json that is kept.
#[derive(Deserialize)]
struct TokenizerConfig {
    chat_template: Option<serde_json::Value>,
}

/// model.safetensors.index.json
#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl HfCheckpoint {
    /// The trained tiny model that is compiled in.
    pub(super) fn embedded() -> Result<Self> {
        let tiny = fixtures::tiny();
        let path = |name: &str| Path::new("tiny").join(name);
        let description = ModelDescription::from_json(tiny.config_json(), &path("config.json"))?;
        let weights = Cow::Owned(tiny.weights().to_vec());
        let file = SafetensorsFile::embedded(&path("model.safetensors"), weights)?;
        let tokenizer_json = tiny.tokenizer_json().map(<[u8]>::to_vec);
        Self::assemble(description, tokenizer_json, None, vec![file], None)
    }

    /// Opens a folder.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(if folder.exists() {
                ModelError::InvalidFormat {
                    format: format!("{} is not a folder", folder.display()),
                    expected: "a folder with config.json and model.safetensors".to_string(),
                }
            } else {
                ModelError::FileNotFound { path: folder.display().to_string() }
            }
            .into());
        }
        let config = folder.join("config.json");
        let description = ModelDescription::from_json(&read_bounded(&config, MAX_JSON_BYTES)?, &config)?;
        let tokenizer_path = folder.join("tokenizer.json");
        let tokenizer =
            if tokenizer_path.exists() { Some(read_bounded(&tokenizer_path, MAX_TOKENIZER_BYTES)?) } else { None };
        let chat_template = chat_template(folder)?;
        let single = folder.join("model.safetensors");
        let index = folder.join("model.safetensors.index.json");
        if !single.exists() && index.exists() {
            let (files, map) = open_shards(folder, &index)?;
            Self::assemble(description, tokenizer, chat_template, files, Some((index, map)))
        } else {
            Self::assemble(description, tokenizer, chat_template, vec![SafetensorsFile::open(&single)?], None)
        }
    }

    fn assemble(
        description: ModelDescription,
        tokenizer_json: Option<Vec<u8>>,
        chat_template: Option<String>,
        files: Vec<SafetensorsFile>,
        index: Option<(PathBuf, BTreeMap<String, usize>)>,
    ) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for (name, info) in file.metadata.tensors() {
                let place =
                    Place { file: number, dtype: info.dtype, shape: info.shape.clone(), offsets: info.data_offsets };
                if tensors.insert(name.clone(), place).is_some() {
                    return Err(ModelError::ValidationFailed {
                        reason: format!("{}: tensor {name} is in two shards", file.path().display()),
                    }
                    .into());
                }
            }
        }
        if let Some((path, map)) = index {
            for (name, file) in map {
                if tensors.get(&name).map(|place: &Place| place.file) != Some(file) {
                    return Err(ModelError::ValidationFailed {
                        reason: format!("{}: tensor {name} is not in the shard that the index names", path.display()),
                    }
                    .into());
                }
            }
        }
        Ok(Self { description, tokenizer_json, chat_template, files, tensors })
    }

    /// The model's description.
    pub(super) fn description(&self) -> &ModelDescription {
        &self.description
    }

    /// tokenizer.json, if there is one.
    pub(super) fn tokenizer_json(&self) -> Option<&[u8]> {
        self.tokenizer_json.as_deref()
    }

    /// The chat template, Jinja.
    pub(super) fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// All tensors by name.
    pub(super) fn summaries(&self) -> Vec<TensorSummary> {
        self.tensors
            .iter()
            .map(|(name, place)| TensorSummary {
                name: name.clone(),
                dtype: format!("{:?}", place.dtype),
                shape: place.shape.clone(),
                bytes: place.offsets.1 - place.offsets.0,
                elements: place.shape.iter().product::<usize>().saturating_mul(if place.dtype == Dtype::U8 {
                    4
                } else {
                    1
                }),
            })
            .collect()
    }

    /// Whether the layers are stored as packed trits (else they are master weights).
    pub(super) fn is_packed(&self) -> bool {
        self.tensors.get("model.layers.0.self_attn.q_proj.weight").is_some_and(|place| place.dtype == Dtype::U8)
    }

    fn scalar(&self, name: &str) -> Result<f32> {
        let mut value = [0f32];
        self.floats(name, &[1])?.row(0, &mut value);
        Ok(value[0])
    }

    /// The ternary matrix `name`.weight, `[rows, columns]`, packed or from master weights.
    ///
    /// # Errors
    /// As [`Self::vector`], and `QuantizationError::InvalidScale`.
    pub(super) fn ternary(&self, name: &str, rows: usize, columns: usize) -> Result<TernaryTensor<'_>> {
        let weight = format!("{name}.weight");
        let place = self.place(&weight)?;
        if place.dtype != Dtype::U8 {
            let values = self.floats(&weight, &[rows, columns])?;
            return Ok(TernaryTensor::from_master(weight, values));
        }
        expect_shape(&weight, place, &[rows / 4, columns])?;
        let packed = HfPacked::new(&weight, self.bytes(place)?, rows, columns)?;
        let scale_name = format!("{name}.weight_scale");
        let stored = usable_scale(&scale_name, self.scalar(&scale_name)?)?;
        let scale = match self.description.weight_scale {
            WeightScale::Multiply => stored,
            WeightScale::Divide => usable_scale(&scale_name, 1.0 / stored)?,
        };
        Ok(TernaryTensor { name: weight, rows, columns, scale, source: TernarySource::Packed(Box::new(packed)) })
    }

    /// Lets the system drop the pages of some bytes of a tensor.
    pub(super) fn release_part(&self, name: &str, bytes: Range<usize>) {
        if let Some(place) = self.tensors.get(name) {
            let (start, end) = place.offsets;
            let at = |n: usize| start.saturating_add(n).min(end);
            self.files[place.file].release((at(bytes.start), at(bytes.end)));
        }
    }

    fn place(&self, name: &str) -> Result<&Place> {
        self.tensors.get(name).ok_or_else(|| invalid(name, "missing"))
    }

    fn bytes(&self, place: &Place) -> Result<&[u8]> {
        self.files[place.file].data(place.offsets)
    }

    /// The type of a float tensor.
    pub(super) fn stored_type(&self, name: &str) -> Result<TensorType> {
        match self.place(name)?.dtype {
            Dtype::BF16 => Ok(TensorType::Bf16),
            Dtype::F16 => Ok(TensorType::F16),
            Dtype::F32 => Ok(TensorType::F32),
            other => Err(invalid(name, &format!("of type {other:?}, expected BF16, F16 or F32"))),
        }
    }

    /// The bytes of a tensor of this shape.
    pub(super) fn stored_bytes(&self, name: &str, shape: &[usize]) -> Result<&[u8]> {
        let place = self.place(name)?;
        expect_shape(name, place, shape)?;
        self.bytes(place)
    }

    /// The weight files.
    pub(super) fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// The bytes of a tensor, to be read later.
    pub(super) fn stored_part(&self, name: &str) -> Result<Option<FilePart>> {
        let place = self.place(name)?;
        Ok(self.files[place.file].part(place.offsets))
    }

    /// The values of a float tensor, all finite.
    pub(super) fn floats(&self, name: &str, shape: &[usize]) -> Result<FloatMatrix> {
        let place = self.place(name)?;
        expect_shape(name, place, shape)?;
        let bytes = self.bytes(place)?;
        let start = place.offsets.0;
        let read = |from: usize, to: usize| self.files[place.file].release((start + from, start + to));
        let values = match place.dtype {
            Dtype::BF16 => FloatValues::Bf16(collect(bytes, u16::from_le_bytes, &read)?),
            Dtype::F16 => FloatValues::F32(collect(bytes, |b| f16::from_le_bytes(b).to_f32(), &read)?),
            Dtype::F32 => FloatValues::F32(collect(bytes, f32::from_le_bytes, &read)?),
            other => return Err(invalid(name, &format!("of type {other:?}, expected BF16, F16 or F32"))),
        };
        let finite = match &values {
            FloatValues::Bf16(v) => v.iter().all(|b| b & 0x7f80 != 0x7f80),
            FloatValues::F32(v) => v.iter().all(|x| x.is_finite()),
        };
        if !finite {
            return Err(invalid(name, "not finite: it holds NaN or infinity"));
        }
        let columns = shape.last().copied().unwrap_or(1);
        Ok(FloatMatrix { rows: shape.iter().product::<usize>() / columns.max(1), columns, values })
    }
}

fn invalid(name: &str, what: &str) -> InferenceError {
    ModelError::ValidationFailed { reason: format!("tensor {name} is {what}") }.into()
}

fn expect_shape(name: &str, place: &Place, shape: &[usize]) -> Result<()> {
    if place.shape == shape {
        return Ok(());
    }
    Err(invalid(name, &format!("of shape {:?} ({:?}), expected {shape:?} by config.json", place.shape, place.dtype)))
}

/// Converts `N`-byte elements. The allocation is as large as the bytes that are really there. `read` is told of every large piece that
/// is done with, so that a big matrix is not in memory twice.
fn collect<const N: usize, T>(
    bytes: &[u8],
    convert: impl Fn([u8; N]) -> T,
    read: &dyn Fn(usize, usize),
) -> Result<Vec<T>> {
    const PIECE: usize = 8 << 20;
    let mut out = Vec::new();
    out.try_reserve_exact(bytes.len() / N)
        .map_err(|e| MemoryError::AllocationFailed { size_bytes: bytes.len(), reason: e.to_string() })?;
    for (i, piece) in bytes.chunks(PIECE).enumerate() {
        out.extend(piece.as_chunks::<N>().0.iter().map(|&b| convert(b)));
        if piece.len() == PIECE {
            read(i * PIECE, (i + 1) * PIECE);
        }
    }
    Ok(out)
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open_regular(path)?.take(limit + 1).read_to_end(&mut bytes).map_err(|e| loading_failed(path, &e))?;
    if bytes.len() as u64 > limit {
        return Err(loading_failed(path, &format!("larger than {limit} bytes")));
    }
    Ok(bytes)
}

/// The chat template: chat_template.jinja, else the key of tokenizer_config.json when it is one template.
fn chat_template(folder: &Path) -> Result<Option<String>> {
    let not_text = |path: &Path| loading_failed(path, &"not UTF-8");
    let (file, config) = (folder.join("chat_template.jinja"), folder.join("tokenizer_config.json"));
    if file.exists() {
        return String::from_utf8(read_bounded(&file, MAX_JSON_BYTES)?).map(Some).map_err(|_| not_text(&file));
    }
    if !config.exists() {
        return Ok(None);
    }
    // Nothing but the template depends on this file, so one that cannot be read is no reason to refuse the model.
    let parsed = serde_json::from_slice::<TokenizerConfig>(&read_bounded(&config, MAX_JSON_BYTES)?);
    Ok(parsed.ok().and_then(|config| config.chat_template?.as_str().map(str::to_string)))
}

/// Opens the shards that an index names, each once.
fn open_shards(folder: &Path, index: &Path) -> Result<(Vec<SafetensorsFile>, BTreeMap<String, usize>)> {
    let parsed: ShardIndex =
        serde_json::from_slice(&read_bounded(index, MAX_JSON_BYTES)?).map_err(|e| ModelError::InvalidFormat {
            format: format!("{}: {e}", index.display()),
            expected: "a safetensors index with a weight_map".to_string(),
        })?;
    let mut files = Vec::new();
    let mut numbers = BTreeMap::<String, usize>::new();
    let mut map = BTreeMap::new();
    for (tensor, shard) in parsed.weight_map {
        let number = match numbers.get(&shard) {
            Some(&number) => number,
            None => {
                // A shard lies beside its index: a name that leads elsewhere is no shard name.
                if Path::new(&shard).file_name() != Some(shard.as_ref()) {
                    return Err(ModelError::ValidationFailed {
                        reason: format!("{}: shard {shard:?} is not a plain file name", index.display()),
                    }
                    .into());
                }
                files.push(SafetensorsFile::open(&folder.join(&shard))?);
                numbers.insert(shard, files.len() - 1);
                files.len() - 1
            }
        };
        map.insert(tensor, number);
    }
    Ok((files, map))
}
