//! One GGUF file: its header, checked, and its tensors where they lie.
//!
//! ```text
//! "GGUF", u32 version, u64 tensors, u64 keys
//! keys     times: string key, u32 type, value              string: u64 length, bytes; array: u32 type, u64 length, values
//! tensors  times: string name, u32 dimensions, u64 each (the innermost first), u32 type, u64 offset
//! zeroes up to a multiple of general.alignment, from where the offsets count, each a multiple of it
//! ```
//! Little endian. Values are read where they lie whenever they are asked for, with the same checks as at first: a file that changes
//! after it was opened gives an error or another value, nothing worse.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use bitnet_contracts::{ModelError, Result};

use super::cursor::{Cursor, broken};
use super::limits::*;
use super::tensor_type::TensorType;
use super::value::{Number, ValueType, array_header, number, skip, value_type};
use super::{GgufOptions, overlap};
use crate::model::mapped_file::{FilePart, MappedFile, Stamp};

/// Where a value lies.
#[derive(Debug, Clone, Copy)]
struct Entry {
    ty: ValueType,
    at: usize,
}

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// What its type number means in this file.
    pub ty: TensorType,
    /// Dimensions, the outermost first: `[rows, columns]` of a matrix.
    pub shape: Vec<usize>,
    /// First byte in the file.
    pub start: usize,
    /// Bytes: of TL1 and TL2 the codes only, without the scale behind them.
    pub bytes: usize,
}

impl GgufTensor {
    /// Product of all dimensions but the last, and the last.
    pub fn matrix(&self) -> (usize, usize) {
        let columns = self.shape.last().copied().unwrap_or(1);
        (self.shape.iter().rev().skip(1).product(), columns)
    }
}

/// An open file with a checked header.
pub struct GgufFile {
    file: MappedFile,
    version: u32,
    alignment: usize,
    metadata: BTreeMap<String, Entry>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl GgufFile {
    /// Maps and checks `path`.
    ///
    /// # Errors
    /// `ModelError::FileNotFound`, `::LoadingFailed`, `::IncompatibleVersion`; `::InvalidFormat` and `::ValidationFailed` naming the
    /// file, the key or tensor and what is wrong with it.
    pub fn open(path: &Path, options: &GgufOptions) -> Result<Self> {
        Self::parse(MappedFile::open(path)?, options)
    }

    /// A file in memory; `path` is for errors.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn from_bytes(path: &Path, bytes: impl Into<Cow<'static, [u8]>>, options: &GgufOptions) -> Result<Self> {
        Self::parse(MappedFile::embedded(path, bytes.into()), options)
    }

    fn parse(file: MappedFile, options: &GgufOptions) -> Result<Self> {
        let mut header = Self {
            version: 0,
            alignment: DEFAULT_ALIGNMENT as usize,
            metadata: BTreeMap::new(),
            tensors: BTreeMap::new(),
            file,
        };
        let (at, tensors) = header.read_metadata()?;
        header.alignment = header.read_alignment()?;
        header.read_tensors(at, tensors, options)?;
        overlap::check(&header)?;
        Ok(header)
    }

    /// Magic, version and keys; gives the place behind them and the number of tensors.
    fn read_metadata(&mut self) -> Result<(usize, u64)> {
        let path = self.file.path();
        let mut cursor = Cursor::new(path, self.file.bytes(), 0);
        if cursor.take(4, &"the magic number")? != b"GGUF" {
            return Err(broken(path, "does not begin with GGUF"));
        }
        let version = cursor.u32(&"the version")?;
        if matches!(version.swap_bytes(), 1..=3) {
            return Err(broken(path, "big endian, which no published model is"));
        }
        if !matches!(version, 2 | 3) {
            return Err(ModelError::IncompatibleVersion {
                version: format!("{}: GGUF version {version}", path.display()),
                supported_versions: vec!["2".to_string(), "3".to_string()],
            }
            .into());
        }
        // A tensor takes 8 + 4 + 8 + 4 + 8 bytes at least, a pair 8 + 4 + 1.
        let tensors = cursor.count(MAX_TENSORS, 32, &"the number of tensors")?;
        let keys = cursor.count(MAX_KEYS, 13, &"the number of keys")?;
        let mut metadata = BTreeMap::new();
        for i in 0..keys {
            let key = cursor.text(MAX_KEY_BYTES, &format_args!("key {i}"))?;
            let what = format!("the value of {key:?}");
            let ty = value_type(&mut cursor, path, &what)?;
            let at = cursor.at();
            skip(&mut cursor, path, ty, &what, 0)?;
            if metadata.insert(key, Entry { ty, at }).is_some() {
                return Err(broken(path, format!("{what} is there twice")));
            }
        }
        let at = cursor.at();
        (self.version, self.metadata) = (version, metadata);
        Ok((at, tensors))
    }

    fn read_alignment(&self) -> Result<usize> {
        let key = "general.alignment";
        let alignment = self.integer(key)?.unwrap_or(i128::from(DEFAULT_ALIGNMENT));
        let usable = (8..=i128::from(MAX_ALIGNMENT)).contains(&alignment) && alignment.count_ones() == 1;
        if usable {
            return Ok(alignment as usize);
        }
        Err(broken(self.path(), format!("{key} is {alignment}, expected a power of two from 8 to {MAX_ALIGNMENT}")))
    }

    fn read_tensors(&mut self, at: usize, count: u64, options: &GgufOptions) -> Result<()> {
        let path = self.file.path();
        let architecture = self.text("general.architecture")?;
        let file_type = self.integer("general.file_type")?;
        let mut cursor = Cursor::new(path, self.file.bytes(), at);
        let mut found = Vec::new();
        for i in 0..count {
            let name = cursor.text(MAX_NAME_BYTES, &format_args!("the name of tensor {i}"))?;
            let what = format!("tensor {name:?}");
            let shape = read_shape(&mut cursor, path, &what)?;
            let id = cursor.u32(&what)?;
            let offset = cursor.u64(&what)?;
            let ty = TensorType::resolve(id, architecture.as_deref(), file_type, options)
                .map_err(|reason| broken(path, format!("{what} {reason}")))?;
            if !offset.is_multiple_of(self.alignment as u64) {
                return Err(broken(
                    path,
                    format!(
                        "{what} begins at offset {offset}, which is no multiple of the alignment {}",
                        self.alignment
                    ),
                ));
            }
            found.push((name, what, shape, ty, offset));
        }
        let data = (cursor.at() as u64).next_multiple_of(self.alignment as u64);
        let mut tensors = BTreeMap::new();
        for (name, what, shape, ty, offset) in found {
            let mut tensor = GgufTensor { ty, shape, start: 0, bytes: 0 };
            let (rows, columns) = tensor.matrix();
            let bytes = ty
                .bytes(rows, columns)
                .ok_or_else(|| broken(path, format!("{what} of shape {:?} cannot be {}", tensor.shape, ty.name())))?;
            let size = self.file.bytes().len();
            let start = data.checked_add(offset).and_then(|start| usize::try_from(start).ok());
            let fits = start.filter(|start| start.checked_add(bytes).is_some_and(|end| end <= size));
            tensor.start = fits.ok_or_else(|| {
                broken(path, format!("truncated: {what} has {bytes} bytes at {data} + {offset}, the file has {size}"))
            })?;
            tensor.bytes = bytes;
            if tensors.insert(name, tensor).is_some() {
                return Err(broken(path, format!("{what} is there twice")));
            }
        }
        self.tensors = tensors;
        Ok(())
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// What tells the file from others; None when it is in memory.
    pub(in crate::model) fn stamp(&self) -> Option<Stamp> {
        self.file.stamp()
    }

    /// Version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Bytes that tensors are aligned to.
    pub fn alignment(&self) -> usize {
        self.alignment
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, GgufTensor> {
        &self.tensors
    }

    /// All keys with a short description of their values.
    pub fn metadata(&self) -> Vec<(String, String)> {
        self.metadata.iter().map(|(key, entry)| (key.clone(), self.describe(key, *entry))).collect()
    }

    fn describe(&self, key: &str, entry: Entry) -> String {
        const LONGEST: usize = 60;
        let value = match entry.ty {
            ValueType::Array => {
                self.array(key).map(|a| a.map_or(String::new(), |(ty, len, _)| format!("{len} x {}", ty.name())))
            }
            ValueType::String => self.text(key).map(|text| {
                let text = text.unwrap_or_default();
                let short: String = text.chars().take(LONGEST).collect();
                if short.len() < text.len() {
                    format!("{short:?}... ({} bytes)", text.len())
                } else {
                    format!("{short:?}")
                }
            }),
            _ => self.number(key).map(|n| match n {
                Some(Number::Integer(n)) => n.to_string(),
                Some(Number::Single(x)) => x.to_string(),
                Some(Number::Double(x)) => x.to_string(),
                Some(Number::Bool(b)) => b.to_string(),
                None => String::new(),
            }),
        };
        value.unwrap_or_else(|error| error.to_string())
    }

    /// Whether a key is there.
    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    fn cursor(&self, entry: Entry) -> Cursor<'_> {
        Cursor::new(self.file.path(), self.file.bytes(), entry.at)
    }

    fn wrong_type(&self, key: &str, entry: Entry, expected: &str) -> bitnet_contracts::InferenceError {
        broken(self.path(), format!("{key} is of type {}, expected {expected}", entry.ty.name()))
    }

    /// A number or boolean; None when the key is not there.
    ///
    /// # Errors
    /// `ModelError::InvalidFormat` naming the key when it is of another type. The same holds for all that follow.
    pub fn number(&self, key: &str) -> Result<Option<Number>> {
        let Some(&entry) = self.metadata.get(key) else { return Ok(None) };
        match number(&mut self.cursor(entry), entry.ty, &key)? {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong_type(key, entry, "a number")),
        }
    }

    /// An integer of any width.
    pub fn integer(&self, key: &str) -> Result<Option<i128>> {
        match self.number(key)? {
            None => Ok(None),
            Some(Number::Integer(n)) => Ok(Some(n)),
            Some(_) => Err(broken(self.path(), format!("{key} is no integer"))),
        }
    }

    /// A count: an integer that fits a usize.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        self.integer(key)?
            .map(|n| usize::try_from(n).map_err(|_| broken(self.path(), format!("{key} is {n}, expected a count"))))
            .transpose()
    }

    /// A token id.
    pub fn id(&self, key: &str) -> Result<Option<u32>> {
        self.integer(key)?
            .map(|n| u32::try_from(n).map_err(|_| broken(self.path(), format!("{key} is {n}, expected a token id"))))
            .transpose()
    }

    /// A number that may have a fraction.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        Ok(match self.number(key)? {
            None => None,
            Some(Number::Integer(n)) => Some(n as f64),
            Some(Number::Single(x)) => Some(x.to_string().parse().unwrap_or(f64::from(x))),
            Some(Number::Double(x)) => Some(x),
            Some(Number::Bool(_)) => return Err(broken(self.path(), format!("{key} is no number"))),
        })
    }

    /// A boolean.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.number(key)? {
            None => Ok(None),
            Some(Number::Bool(b)) => Ok(Some(b)),
            Some(_) => Err(broken(self.path(), format!("{key} is no boolean"))),
        }
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<String>> {
        let Some(&entry) = self.metadata.get(key) else { return Ok(None) };
        match entry.ty {
            ValueType::String => self.cursor(entry).text(MAX_STRING_BYTES, &key).map(Some),
            _ => Err(self.wrong_type(key, entry, "a string")),
        }
    }

    fn array(&self, key: &str) -> Result<Option<(ValueType, u64, Cursor<'_>)>> {
        let Some(&entry) = self.metadata.get(key) else { return Ok(None) };
        if entry.ty != ValueType::Array {
            return Err(self.wrong_type(key, entry, "an array"));
        }
        let mut cursor = self.cursor(entry);
        let (ty, len) = array_header(&mut cursor, self.path(), &key)?;
        Ok(Some((ty, len, cursor)))
    }

    /// An array of strings.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>> {
        match self.array(key)? {
            None => Ok(None),
            Some((ValueType::String, len, mut cursor)) => (0..len)
                .map(|i| cursor.text(MAX_STRING_BYTES, &format_args!("{key}[{i}]")))
                .collect::<Result<_>>()
                .map(Some),
            Some((ty, ..)) => {
                Err(broken(self.path(), format!("{key} is an array of {}, expected an array of strings", ty.name())))
            }
        }
    }

    /// An array of integers.
    pub fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        let Some((ty, len, mut cursor)) = self.array(key)? else { return Ok(None) };
        let wrong = || broken(self.path(), format!("{key} is an array of {}, expected integers", ty.name()));
        let element = |i| match number(&mut cursor, ty, &format_args!("{key}[{i}]"))? {
            Some(Number::Integer(n)) => i64::try_from(n).map_err(|_| wrong()),
            _ => Err(wrong()),
        };
        (0..len).map(element).collect::<Result<_>>().map(Some)
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// `ModelError::InvalidFormat` when the file has become shorter.
    pub fn data(&self, tensor: &GgufTensor) -> Result<&[u8]> {
        self.range(tensor.start, tensor.bytes)
    }

    /// Some bytes of the file.
    pub(super) fn range(&self, start: usize, len: usize) -> Result<&[u8]> {
        start
            .checked_add(len)
            .and_then(|end| self.file.bytes().get(start..end))
            .ok_or_else(|| broken(self.path(), format!("truncated: {len} bytes at {start} are not there")))
    }

    /// The bytes of a tensor, to be read later.
    pub(in crate::model) fn part(&self, tensor: &GgufTensor) -> Option<FilePart> {
        self.file.part(tensor.start..tensor.start.checked_add(tensor.bytes)?)
    }

    /// Lets the system drop the pages of `bytes` bytes from `start` on.
    pub(super) fn release(&self, start: usize, bytes: usize) {
        self.file.release(start..start.saturating_add(bytes));
    }
}

/// Number of dimensions and dimensions, none of them zero, their product countable; the outermost first.
fn read_shape(cursor: &mut Cursor, path: &Path, what: &str) -> Result<Vec<usize>> {
    let dimensions = cursor.u32(&what)?;
    if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
        return Err(broken(path, format!("{what} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")));
    }
    let mut shape = Vec::new();
    let mut elements = 1usize;
    for _ in 0..dimensions {
        let n = cursor.u64(&what)?;
        let dimension = usize::try_from(n).ok().filter(|&n| n > 0);
        let product = dimension.and_then(|n| elements.checked_mul(n));
        let (Some(dimension), Some(product)) = (dimension, product) else {
            return Err(broken(
                path,
                format!("{what} has a dimension of {n}: none, or more elements than can be counted"),
            ));
        };
        elements = product;
        shape.push(dimension);
    }
    shape.reverse();
    Ok(shape)
}
