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
use super::in_file::{in_file, named};
use super::mapped_file::{FilePart, loading_failed, open_regular};
use super::safetensors_file::SafetensorsFile;
use super::shard_index::{ShardIndex, refused};
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
    /// What says which tensors there are: the index of several files, else the one file.
    table: PathBuf,
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
            if is_there(&tokenizer_path) { Some(read_bounded(&tokenizer_path, MAX_TOKENIZER_BYTES)?) } else { None };
        let chat_template = chat_template(folder)?;
        let single = folder.join("model.safetensors");
        let index_path = folder.join("model.safetensors.index.json");
        if is_there(&single) || !is_there(&index_path) {
            return Self::assemble(description, tokenizer, chat_template, vec![SafetensorsFile::open(&single)?], None);
        }
        let index = ShardIndex::from_json(&read_bounded(&index_path, MAX_JSON_BYTES)?, &index_path)?;
        let files = index.shards.iter().map(|shard| SafetensorsFile::open(&folder.join(shard)));
        let files = files.collect::<Result<_>>()?;
        Self::assemble(description, tokenizer, chat_template, files, Some((index_path, index)))
    }

    fn assemble(
        description: ModelDescription,
        tokenizer_json: Option<Vec<u8>>,
        chat_template: Option<String>,
        files: Vec<SafetensorsFile>,
        index: Option<(PathBuf, ShardIndex)>,
    ) -> Result<Self> {
        let mut tensors = BTreeMap::new();
        for (number, file) in files.iter().enumerate() {
            for entry in file.tensors() {
                let place =
                    Place { file: number, dtype: entry.dtype, shape: entry.shape.clone(), offsets: entry.offsets };
                if tensors.insert(entry.name.clone(), place).is_some() {
                    return Err(refused(file.path(), &format!("tensor {} is in two shards", entry.name)));
                }
            }
        }
        let table = match index {
            Some((path, index)) => {
                agree(&path, &index, &files, &tensors)?;
                path
            }
            None => files.first().map(|file| file.path().to_path_buf()).unwrap_or_default(),
        };
        Ok(Self { description, tokenizer_json, chat_template, files, table, tensors })
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
        self.expect_shape(&weight, place, &[rows / 4, columns])?;
        // Its rows are unpacked later, and name what they find wrong by this.
        let weight = named(self.path(place), &weight);
        let packed = HfPacked::new(&weight, self.bytes(place)?, rows, columns)?;
        let scale = self.weight_scale(&format!("{name}.weight_scale"))?;
        Ok(TernaryTensor { name: weight, rows, columns, scale, source: TernarySource::Packed(Box::new(packed)) })
    }

    /// The dense value of trit 1, of the scale tensor `name`.
    fn weight_scale(&self, name: &str) -> Result<f32> {
        let stored = self.scalar(name)?;
        let usable = usable_scale(name, stored).and_then(|scale| match self.description.weight_scale {
            WeightScale::Multiply => Ok(scale),
            WeightScale::Divide => usable_scale(name, 1.0 / scale),
        });
        let path = self.path(self.place(name)?);
        usable.map_err(|error| in_file(path, error))
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
        self.tensors.get(name).ok_or_else(|| invalid(&self.table, name, "missing"))
    }

    fn path(&self, place: &Place) -> &Path {
        self.files[place.file].path()
    }

    fn expect_shape(&self, name: &str, place: &Place, shape: &[usize]) -> Result<()> {
        if place.shape == shape {
            return Ok(());
        }
        let what = format!("of shape {:?} ({:?}), expected {shape:?} by config.json", place.shape, place.dtype);
        Err(invalid(self.path(place), name, &what))
    }

    fn no_floats(&self, name: &str, place: &Place) -> InferenceError {
        invalid(self.path(place), name, &format!("of type {:?}, expected BF16, F16 or F32", place.dtype))
    }

    fn bytes(&self, place: &Place) -> Result<&[u8]> {
        self.files[place.file].data(place.offsets)
    }

    /// The type of a float tensor.
    pub(super) fn stored_type(&self, name: &str) -> Result<TensorType> {
        let place = self.place(name)?;
        match place.dtype {
            Dtype::BF16 => Ok(TensorType::Bf16),
            Dtype::F16 => Ok(TensorType::F16),
            Dtype::F32 => Ok(TensorType::F32),
            _ => Err(self.no_floats(name, place)),
        }
    }

    /// The bytes of a tensor of this shape.
    pub(super) fn stored_bytes(&self, name: &str, shape: &[usize]) -> Result<&[u8]> {
        let place = self.place(name)?;
        self.expect_shape(name, place, shape)?;
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
        self.expect_shape(name, place, shape)?;
        let bytes = self.bytes(place)?;
        let start = place.offsets.0;
        let read = |from: usize, to: usize| self.files[place.file].release((start + from, start + to));
        let values = match place.dtype {
            Dtype::BF16 => FloatValues::Bf16(collect(bytes, u16::from_le_bytes, &read)?),
            Dtype::F16 => FloatValues::F32(collect(bytes, |b| f16::from_le_bytes(b).to_f32(), &read)?),
            Dtype::F32 => FloatValues::F32(collect(bytes, f32::from_le_bytes, &read)?),
            _ => return Err(self.no_floats(name, place)),
        };
        let finite = match &values {
            FloatValues::Bf16(v) => v.iter().all(|b| b & 0x7f80 != 0x7f80),
            FloatValues::F32(v) => v.iter().all(|x| x.is_finite()),
        };
        if !finite {
            return Err(invalid(self.path(place), name, "not finite: it holds NaN or infinity"));
        }
        let columns = shape.last().copied().unwrap_or(1);
        Ok(FloatMatrix { rows: shape.iter().product::<usize>() / columns.max(1), columns, values })
    }
}

fn invalid(path: &Path, name: &str, what: &str) -> InferenceError {
    ModelError::ValidationFailed { reason: format!("{}: tensor {name} is {what}", path.display()) }.into()
}

/// Index and shards name the same tensors, each in the same shard.
fn agree(path: &Path, index: &ShardIndex, files: &[SafetensorsFile], tensors: &BTreeMap<String, Place>) -> Result<()> {
    for (name, &file) in &index.tensors {
        if tensors.get(name).map(|place| place.file) != Some(file) {
            let shard = files[file].path().display();
            return Err(refused(path, &format!("tensor {name} is not in the shard that the index names, {shard}")));
        }
    }
    for (name, place) in tensors {
        if !index.tensors.contains_key(name) {
            let shard = files[place.file].path().display();
            return Err(refused(path, &format!("tensor {name}, which {shard} holds, is not in the index")));
        }
    }
    Ok(())
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

/// Whether there is anything at `path`, be it a link that leads nowhere: that is an error, and no file that is not there.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let too_large = || loading_failed(path, &format!("larger than {limit} bytes"));
    if file.metadata().is_ok_and(|metadata| metadata.len() > limit) {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    // The length may not be true, or not any more.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| loading_failed(path, &e))?;
    if bytes.len() as u64 > limit {
        return Err(too_large());
    }
    Ok(bytes)
}

/// The chat template: chat_template.jinja, else the key of tokenizer_config.json when it is one template.
fn chat_template(folder: &Path) -> Result<Option<String>> {
    let not_text = |path: &Path| loading_failed(path, &"not UTF-8");
    let (file, config) = (folder.join("chat_template.jinja"), folder.join("tokenizer_config.json"));
    if is_there(&file) {
        return String::from_utf8(read_bounded(&file, MAX_JSON_BYTES)?).map(Some).map_err(|_| not_text(&file));
    }
    if !is_there(&config) {
        return Ok(None);
    }
    // Nothing but the template depends on this file, so one that cannot be read is no reason to refuse the model.
    let parsed = serde_json::from_slice::<TokenizerConfig>(&read_bounded(&config, MAX_JSON_BYTES)?);
    Ok(parsed.ok().and_then(|config| config.chat_template?.as_str().map(str::to_string)))
}
