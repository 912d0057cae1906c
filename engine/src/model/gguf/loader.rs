//! A BitNet model in a GGUF file: its tensors under the names of a Hugging Face checkpoint.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use bitnet_contracts::{MemoryError, Result};

use super::file::{GgufFile, GgufTensor};
use super::names::{LAYER_PARTS, OUTER, layer_part, to_gguf};
use super::{
    GgufOptions, TensorType, config, contradiction, floats, i2s_layout, read_kernel_config, tl_scale, tokenizer,
};
use crate::model::TensorSummary;
use crate::model::description::ModelDescription;
use crate::model::in_file::{in_file, named};
use crate::model::mapped_file::FilePart;
use crate::model::weights::{FloatMatrix, FloatValues, TernarySource, TernaryTensor};
use crate::ternary::tl_kernel::TlKernels;
use crate::ternary::{I2S, I2sLayout, Iq1Bn, Iq2Bn, PackedRows, Tl1, Tl2, TlKernel, Tq1_0, Tq2_0, usable_scale};

/// The key under which this engine writes the kernel parameters of TL1 and TL2: a string as `kernel_config.ini` has it.
pub(super) const KERNELS_KEY: &str = "bitnet.kernel_config";

/// An open model.
pub struct GgufModel {
    file: GgufFile,
    description: ModelDescription,
    tokenizer_json: Option<Vec<u8>>,
    chat_template: Option<String>,
    layout: I2sLayout,
    kernels: TlKernels,
}

impl GgufModel {
    /// Maps and checks a file.
    ///
    /// # Errors
    /// As [`GgufFile::open`], and `ConfigurationError` naming the key for another architecture or values that make no model;
    /// `ModelError::ValidationFailed` for tensors that are missing, too many or of the wrong shape.
    pub fn open(path: &Path, options: &GgufOptions) -> Result<Self> {
        Self::new(GgufFile::open(path, options)?, options)
    }

    /// A model in a file that is open already.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn new(file: GgufFile, options: &GgufOptions) -> Result<Self> {
        let description = config::describe(&file, options)?;
        check_tensors(&file, &description)?;
        let has_i2s = file.tensors().values().any(|t| t.ty == TensorType::I2S);
        let layout = match options.i2s_layout {
            _ if has_i2s => i2s_layout::choose(&file, &description, options.i2s_layout)?,
            said => said.unwrap_or(I2sLayout::X86),
        };
        let kernels = kernels(&file, options)?;
        Ok(Self {
            tokenizer_json: tokenizer::read(&file, description.vocab_size)?,
            chat_template: file.text("tokenizer.chat_template")?,
            description,
            layout,
            kernels,
            file,
        })
    }

    /// The file.
    pub fn file(&self) -> &GgufFile {
        &self.file
    }

    /// The model's description.
    pub fn description(&self) -> &ModelDescription {
        &self.description
    }

    /// The tokenizer as a tokenizer.json.
    pub fn tokenizer_json(&self) -> Option<&[u8]> {
        self.tokenizer_json.as_deref()
    }

    /// The chat template, Jinja.
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }

    /// The layout that I2_S tensors are read in.
    pub fn i2s_layout(&self) -> I2sLayout {
        self.layout
    }

    /// All tensors by name.
    pub(in crate::model) fn summaries(&self) -> Vec<TensorSummary> {
        let summary = |(name, t): (&String, &GgufTensor)| TensorSummary {
            name: name.clone(),
            dtype: t.ty.name().to_string(),
            shape: t.shape.clone(),
            bytes: t.bytes,
            elements: t.shape.iter().product(),
        };
        self.file.tensors().iter().map(summary).collect()
    }

    /// Whether the layers are stored as trits.
    pub(in crate::model) fn is_packed(&self) -> bool {
        self.file.tensors().get("blk.0.attn_q.weight").is_some_and(|t| t.ty.is_ternary())
    }

    fn tensor(&self, name: &str) -> Result<(String, &GgufTensor)> {
        let gguf = to_gguf(name).unwrap_or_else(|| name.to_string());
        match self.file.tensors().get_key_value(&gguf) {
            Some((_, tensor)) => Ok((gguf, tensor)),
            None => Err(contradiction(self.file.path(), format_args!("tensor {gguf:?} is missing"))),
        }
    }

    fn expect_shape(&self, name: &str, tensor: &GgufTensor, shape: &[usize]) -> Result<()> {
        if tensor.shape == shape {
            return Ok(());
        }
        Err(contradiction(
            self.file.path(),
            format_args!(
                "tensor {name:?} is of shape {:?} ({}), expected {shape:?} by the metadata",
                tensor.shape,
                tensor.ty.name()
            ),
        ))
    }

    /// The type of a tensor under its Hugging Face name.
    pub(in crate::model) fn stored_type(&self, name: &str) -> Result<TensorType> {
        Ok(self.tensor(name)?.1.ty)
    }

    /// The bytes of a tensor of this shape under its Hugging Face name.
    pub(in crate::model) fn stored_bytes(&self, name: &str, shape: &[usize]) -> Result<&[u8]> {
        let (name, tensor) = self.tensor(name)?;
        self.expect_shape(&name, tensor, shape)?;
        self.file.data(tensor)
    }

    /// How the tensors' bytes are read, as far as the file's tables do not say it.
    pub(in crate::model) fn reading(&self) -> String {
        format!("{:?} {:?}", self.layout, self.kernels)
    }

    /// The bytes of a tensor under its Hugging Face name, to be read later.
    pub(in crate::model) fn stored_part(&self, name: &str) -> Result<Option<FilePart>> {
        Ok(self.file.part(self.tensor(name)?.1))
    }

    /// The values of a float tensor under its Hugging Face name, all finite.
    pub(in crate::model) fn floats(&self, name: &str, shape: &[usize]) -> Result<FloatMatrix> {
        let (name, tensor) = self.tensor(name)?;
        self.expect_shape(&name, tensor, shape)?;
        let Some((block, values)) = floats::block(tensor.ty) else {
            return Err(contradiction(
                self.file.path(),
                format_args!("tensor {name:?} is {}, expected floats", tensor.ty.name()),
            ));
        };
        let bytes = self.file.data(tensor)?;
        let columns = shape.last().copied().unwrap_or(1);
        // Whole blocks. Large, since every fault maps some pages around it again.
        const PIECE: usize = 2 << 20;
        let piece = PIECE / block * block;
        let reserve = |n: usize, size: usize| {
            move |e: std::collections::TryReserveError| MemoryError::AllocationFailed {
                size_bytes: n * size,
                reason: e.to_string(),
            }
        };
        // Embeddings that were bf16 once are bf16 again when that loses nothing: half the memory of f32, and half to read for the head.
        let values = if tensor.ty == TensorType::Bf16 || floats::is_bf16(tensor.ty, bytes) {
            let n = bytes.len() / block;
            let mut out: Vec<u16> = Vec::new();
            out.try_reserve_exact(n).map_err(reserve(n, 2))?;
            let mut pieces = Vec::new();
            for (i, bytes) in bytes.chunks(piece).enumerate() {
                pieces.clear();
                floats::dequantize(tensor.ty, bytes, &mut pieces);
                out.extend(pieces.iter().map(|x| (x.to_bits() >> 16) as u16));
                self.file.release(tensor.start + i * piece, bytes.len());
            }
            FloatValues::Bf16(out)
        } else {
            let n = bytes.len() / block * values;
            let mut out: Vec<f32> = Vec::new();
            out.try_reserve_exact(n).map_err(reserve(n, 4))?;
            for (i, bytes) in bytes.chunks(piece).enumerate() {
                floats::dequantize(tensor.ty, bytes, &mut out);
                self.file.release(tensor.start + i * piece, bytes.len());
            }
            FloatValues::F32(out)
        };
        let finite = match &values {
            FloatValues::Bf16(v) => v.iter().all(|b| b & 0x7f80 != 0x7f80),
            FloatValues::F32(v) => v.iter().all(|x| x.is_finite()),
        };
        if !finite {
            return Err(contradiction(self.file.path(), format_args!("tensor {name:?} holds NaN or infinity")));
        }
        Ok(FloatMatrix { rows: shape.iter().product::<usize>() / columns.max(1), columns, values })
    }

    /// The ternary matrix under its Hugging Face name, without `.weight`.
    pub(in crate::model) fn ternary(&self, name: &str, rows: usize, columns: usize) -> Result<TernaryTensor<'_>> {
        let path = self.file.path();
        let mut tensor = self.stored_ternary(name, rows, columns).map_err(|error| in_file(path, error))?;
        // Its rows are unpacked later, and name what they find wrong by this.
        tensor.name = named(path, &tensor.name);
        Ok(tensor)
    }

    fn stored_ternary(&self, name: &str, rows: usize, columns: usize) -> Result<TernaryTensor<'_>> {
        let (gguf, tensor) = self.tensor(&format!("{name}.weight"))?;
        self.expect_shape(&gguf, tensor, &[rows, columns])?;
        let bytes = self.file.data(tensor)?;
        let (source, scale): (Box<dyn PackedRows + '_>, f32) = match tensor.ty {
            TensorType::I2S => {
                let view = I2S::new(&gguf, bytes, rows, columns, self.layout)?;
                (Box::new(view), view.scale())
            }
            TensorType::Tq1_0 => {
                let view = Tq1_0::new(&gguf, bytes, rows, columns)?;
                (Box::new(view), view.scale(&gguf)?)
            }
            TensorType::Tq2_0 => {
                let view = Tq2_0::new(&gguf, bytes, rows, columns)?;
                (Box::new(view), view.scale(&gguf)?)
            }
            TensorType::Iq1Bn => {
                let view = Iq1Bn::new(&gguf, bytes, rows, columns)?;
                (Box::new(view), view.scale(&gguf)?)
            }
            TensorType::Iq2Bn => {
                let view = Iq2Bn::new(&gguf, bytes, rows, columns)?;
                (Box::new(view), view.scale(&gguf)?)
            }
            TensorType::Tl1 => {
                let view = Tl1::new(&gguf, bytes, rows, columns, self.kernel(&gguf, false, rows, columns)?)?;
                (Box::new(view), tl_scale::read(&self.file, &gguf, tensor)?)
            }
            TensorType::Tl2 => {
                let view = Tl2::new(&gguf, bytes, rows, columns, self.kernel(&gguf, true, rows, columns)?)?;
                (Box::new(view), tl_scale::read(&self.file, &gguf, tensor)?)
            }
            _ => return self.trits_of_floats(name, gguf, rows, columns),
        };
        let scale = scale * self.factor(&gguf)?;
        let scale = usable_scale(&gguf, scale)?;
        Ok(TernaryTensor { name: gguf, rows, columns, scale, source: TernarySource::Packed(source) })
    }

    /// Floats that are -s, 0, s already are the trits of scale s; any others are master weights.
    fn trits_of_floats(&self, name: &str, gguf: String, rows: usize, columns: usize) -> Result<TernaryTensor<'_>> {
        let values = self.floats(&format!("{name}.weight"), &[rows, columns])?;
        let factor = self.factor(&gguf)?;
        if let Some(scale) = values.ternary_scale() {
            let scale = usable_scale(&gguf, scale)?;
            let source = TernarySource::Master { values, inverse: 1.0 / scale };
            let scale = usable_scale(&gguf, scale * factor)?;
            return Ok(TernaryTensor { name: gguf, rows, columns, scale, source });
        }
        log::warn!("{}: tensor {gguf:?} is not ternary; it is ternarised by absmean", self.file.path().display());
        let mut tensor = TernaryTensor::from_master(gguf, values);
        tensor.scale *= factor;
        Ok(tensor)
    }

    /// The value of `blk.N.part.scale`, by which llama.cpp multiplies the product; 1 when it is not there.
    fn factor(&self, weight: &str) -> Result<f32> {
        let name = scale_name(weight);
        if !self.file.tensors().contains_key(&name) {
            return Ok(1.0);
        }
        let mut value = [0f32];
        self.floats(&name, &[1])?.row(0, &mut value);
        usable_scale(&name, value[0])
    }

    fn kernel(&self, name: &str, tl2: bool, rows: usize, columns: usize) -> Result<TlKernel> {
        if let Some(&kernel) = self.kernels.get(&(rows, columns)) {
            return Ok(kernel);
        }
        if let Some(kernel) = TlKernel::preset(tl2, rows, columns) {
            log::warn!(
                "{}: {name} is read with the kernel parameters of bitnet.cpp's preset for {rows} x {columns}; nothing in the file says them",
                self.file.path().display()
            );
            return Ok(kernel);
        }
        Err(contradiction(
            self.file.path(),
            format_args!(
                "tensor {name:?}: a TL{} matrix can only be read with the kernel parameters it was written for, which are not in the file, \
                 and there is no preset for {rows} x {columns}; give the kernel_config.ini of the converter (--kernel-config, or beside the file)",
                if tl2 { 2 } else { 1 }
            ),
        ))
    }

    /// Lets the system drop the pages of some bytes of a tensor.
    pub(in crate::model) fn release_part(&self, name: &str, bytes: Range<usize>) {
        if let Ok((_, tensor)) = self.tensor(name) {
            let (from, to) = (bytes.start.min(tensor.bytes), bytes.end.min(tensor.bytes));
            self.file.release(tensor.start + from, to.saturating_sub(from));
        }
    }
}

/// The caller's kernel parameters, then those of the file's own key, then those of a `kernel_config.ini` beside the file.
fn kernels(file: &GgufFile, options: &GgufOptions) -> Result<TlKernels> {
    let mut kernels = TlKernels::new();
    if file.tensors().values().any(|t| matches!(t.ty, TensorType::Tl1 | TensorType::Tl2)) {
        let beside = file.path().with_file_name("kernel_config.ini");
        if beside.is_file() {
            kernels.extend(read_kernel_config(&beside)?);
        }
        if let Some(text) = file.text(KERNELS_KEY)? {
            kernels.extend(TlKernel::parse_ini(&text, &format!("{}: {KERNELS_KEY}", file.path().display()))?);
        }
    }
    kernels.extend(&options.kernels);
    Ok(kernels)
}

/// `blk.N.part.weight` to `blk.N.part.scale`.
fn scale_name(weight: &str) -> String {
    format!("{}.scale", weight.strip_suffix(".weight").unwrap_or(weight))
}

/// Every tensor of the model is there, and no other.
fn check_tensors(file: &GgufFile, d: &ModelDescription) -> Result<()> {
    // The numbers of layers and of tensors are bounded by each other before anything is made of the first.
    if d.num_layers.saturating_mul(LAYER_PARTS.len()) > file.tensors().len() {
        return Err(contradiction(
            file.path(),
            format_args!(
                "{} layers of {} tensors each, and {} tensors",
                d.num_layers,
                LAYER_PARTS.len(),
                file.tensors().len()
            ),
        ));
    }
    let mut expected = BTreeMap::new();
    for (_, name) in OUTER {
        expected.insert(name.to_string(), name != "output.weight");
    }
    for layer in 0..d.num_layers {
        for (_, part, ternary) in LAYER_PARTS {
            expected.insert(format!("blk.{layer}.{part}.weight"), true);
            if ternary {
                expected.insert(format!("blk.{layer}.{part}.scale"), false);
                expected.insert(format!("blk.{layer}.{part}.weight_scale"), false);
            }
        }
    }
    for (name, _) in expected.iter().filter(|(_, required)| **required) {
        if !file.tensors().contains_key(name) {
            return Err(contradiction(file.path(), format_args!("tensor {name:?} is missing")));
        }
    }
    for (name, tensor) in file.tensors() {
        if !expected.contains_key(name) {
            let layers = match layer_part(name) {
                Some((layer, _)) if layer >= d.num_layers => format!(": the model has {} layers", d.num_layers),
                _ => String::new(),
            };
            return Err(contradiction(
                file.path(),
                format_args!("tensor {name:?} is none of this architecture{layers}"),
            ));
        }
        // `<name>_scale` means something beside TL weights only; elsewhere it would be left out silently.
        if let Some(weight) = name.strip_suffix("_scale")
            && !file.tensors().get(weight).is_some_and(|t| matches!(t.ty, TensorType::Tl1 | TensorType::Tl2))
        {
            return Err(contradiction(
                file.path(),
                format_args!("tensor {name:?} ({}) is a scale of a tensor that is not TL1 or TL2", tensor.ty.name()),
            ));
        }
    }
    Ok(())
}
