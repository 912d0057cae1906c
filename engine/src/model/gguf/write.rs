//! Writing a GGUF file: the header first, then every tensor's bytes as they come, aside, and renamed when whole.

use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use bitnet_contracts::Result;
use tempfile::NamedTempFile;

use super::contradiction;
use super::limits::DEFAULT_ALIGNMENT;
use super::tensor_type::TensorType;
use super::value::ValueType;
use crate::model::aside;
use crate::model::mapped_file::loading_failed;

/// A metadata value to be written.
#[derive(Debug, Clone, PartialEq)]
pub enum GgufValue {
    /// u32
    U32(u32),
    /// f32
    F32(f32),
    /// bool
    Bool(bool),
    /// string
    Text(String),
    /// array of strings
    Texts(Vec<String>),
    /// array of i32
    I32s(Vec<i32>),
    /// array of u32
    U32s(Vec<u32>),
}

impl From<&str> for GgufValue {
    fn from(text: &str) -> Self {
        Self::Text(text.to_string())
    }
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Declared {
    name: String,
    shape: Vec<usize>,
    ty: TensorType,
    bytes: usize,
}

/// What a file will hold. Nothing is on disk before [`GgufWriter::begin`].
#[derive(Debug, Clone, Default)]
pub struct GgufWriter {
    keys: Vec<(String, GgufValue)>,
    tensors: Vec<Declared>,
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_array<T>(out: &mut Vec<u8>, ty: ValueType, elements: &[T], put: impl Fn(&mut Vec<u8>, &T)) {
    out.extend(ValueType::Array.id().to_le_bytes());
    out.extend(ty.id().to_le_bytes());
    out.extend((elements.len() as u64).to_le_bytes());
    elements.iter().for_each(|element| put(out, element));
}

fn put_value(out: &mut Vec<u8>, value: &GgufValue) {
    let mut scalar = |ty: ValueType, bytes: &[u8]| {
        out.extend(ty.id().to_le_bytes());
        out.extend(bytes);
    };
    match value {
        GgufValue::U32(n) => scalar(ValueType::U32, &n.to_le_bytes()),
        GgufValue::F32(x) => scalar(ValueType::F32, &x.to_le_bytes()),
        GgufValue::Bool(b) => scalar(ValueType::Bool, &[u8::from(*b)]),
        GgufValue::Text(text) => {
            scalar(ValueType::String, &[]);
            put_text(out, text);
        }
        GgufValue::Texts(texts) => put_array(out, ValueType::String, texts, |out, text| put_text(out, text)),
        GgufValue::I32s(numbers) => put_array(out, ValueType::I32, numbers, |out, n| out.extend(n.to_le_bytes())),
        GgufValue::U32s(numbers) => put_array(out, ValueType::U32, numbers, |out, n| out.extend(n.to_le_bytes())),
    }
}

impl GgufWriter {
    /// Adds a key. The same key twice is a file that no reader takes.
    pub fn key(&mut self, key: &str, value: impl Into<GgufValue>) -> &mut Self {
        self.keys.push((key.to_string(), value.into()));
        self
    }

    /// Adds a tensor of `bytes` bytes; `shape` has the outermost dimension first.
    pub fn tensor(&mut self, name: &str, shape: &[usize], ty: TensorType, bytes: usize) -> &mut Self {
        self.tensors.push(Declared { name: name.to_string(), shape: shape.to_vec(), ty, bytes });
        self
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.bytes as u64).sum()
    }

    /// The header, up to where the first tensor begins.
    pub fn header(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(b"GGUF");
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            put_text(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&n| out.extend((n as u64).to_le_bytes()));
            out.extend(tensor.ty.id().to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + tensor.bytes as u64).next_multiple_of(DEFAULT_ALIGNMENT);
        }
        out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT as usize), 0);
        out
    }

    /// Writes the header to a file beside `path`, which takes that name in [`GgufStream::finish`] only. A stream that is dropped before
    /// leaves nothing behind.
    ///
    /// # Errors
    /// `ModelError::LoadingFailed` naming the path.
    pub fn begin(&self, path: &Path) -> Result<GgufStream> {
        let file = aside::create(path)?;
        let mut stream = GgufStream {
            path: path.to_path_buf(),
            out: BufWriter::with_capacity(1 << 20, file),
            left: self.tensors.clone().into_iter().collect(),
            written: 0,
        };
        stream.put(&self.header())?;
        Ok(stream)
    }
}

/// A file whose tensors are being written, in the order in which they were declared.
#[derive(Debug)]
pub struct GgufStream {
    path: PathBuf,
    out: BufWriter<NamedTempFile>,
    left: std::collections::VecDeque<Declared>,
    /// Bytes of the tensor at hand.
    written: usize,
}

impl GgufStream {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(|e| loading_failed(&self.path, &e))
    }

    /// Appends bytes of the tensor at hand; the last ones of it end it.
    ///
    /// # Errors
    /// `ModelError::ValidationFailed` for more bytes than were declared, `::LoadingFailed` when they cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(tensor) = self.left.front() else {
            return Err(contradiction(&self.path, "bytes beyond the last tensor"));
        };
        if self.written + bytes.len() > tensor.bytes {
            return Err(contradiction(
                &self.path,
                format_args!("more than {} bytes for tensor {:?}", tensor.bytes, tensor.name),
            ));
        }
        let total = tensor.bytes;
        self.put(bytes)?;
        self.written += bytes.len();
        if self.written == total {
            self.left.pop_front();
            self.written = 0;
            let padding = total.next_multiple_of(DEFAULT_ALIGNMENT as usize) - total;
            self.put(&[0; DEFAULT_ALIGNMENT as usize][..padding])?;
        }
        Ok(())
    }

    /// Gives the file its name. A file of that name is replaced.
    ///
    /// # Errors
    /// `ModelError::ValidationFailed` when a tensor is not whole, `::LoadingFailed` when the file cannot be written or renamed.
    pub fn finish(self) -> Result<()> {
        let Self { path, out, left, .. } = self;
        if let Some(tensor) = left.front() {
            return Err(contradiction(&path, format_args!("tensor {:?} was not written to its end", tensor.name)));
        }
        let file = out.into_inner().map_err(|e| loading_failed(&path, e.error()))?;
        aside::publish(file, &path)
    }
}
