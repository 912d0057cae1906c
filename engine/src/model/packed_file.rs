//! Packed weights in a file beside the model, so that a start reads what an earlier one has made of the same weight files.
//!
//! ```text
//! byte 0    "BITNETPK"
//!      8    length of the header, u64
//!     16    CRC-32 of the header, u32
//!     20    the header, JSON: the key, the length of each section, the CRC-32 of each piece of 1 MiB of each section
//!           the sections, one behind the other
//! ```
//! Numbers are little endian. The file is as good as its key: another length, time or inode of a weight file, another description or
//! packing, and it is stale. The checksums find what disks do; a file that somebody forged is trusted like the model itself.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

use bitnet_contracts::{ConfigurationError, InferenceError, Result};
use serde::{Deserialize, Serialize};

use super::aside;
use super::mapped_file::{Stamp, loading_failed, open_regular, read_at};
use crate::kernels::Threads;

const MAGIC: &[u8; 8] = b"BITNETPK";
/// Bytes before the header.
const PREFIX: usize = 20;
/// Bytes under one checksum: what a thread reads at a time and finds in its cache when it checks it.
const PIECE: usize = 1 << 20;
/// The most bytes of a header: that of a model of 1 TB.
const MAX_HEADER_BYTES: u64 = 32 << 20;
/// Of what the sections hold and in which layout. A new number makes every older file stale.
const LAYOUT: u32 = 1;

/// Whether an engine keeps its packed weights in a file beside the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PackedWeights {
    /// Packed anew at every start.
    Never,
    /// Read where there is a file, which is written anew when it is stale.
    #[default]
    Use,
    /// As `Use`, and a file is made where there is none.
    Keep,
}

impl PackedWeights {
    /// All choices.
    pub const ALL: [PackedWeights; 3] = [PackedWeights::Never, PackedWeights::Use, PackedWeights::Keep];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            PackedWeights::Never => "never",
            PackedWeights::Use => "use",
            PackedWeights::Keep => "keep",
        }
    }
}

impl std::fmt::Display for PackedWeights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for PackedWeights {
    type Err = InferenceError;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|value| value.name() == name).ok_or_else(|| {
            ConfigurationError::InvalidParameter {
                parameter: "packed".to_string(),
                value: name.to_string(),
                valid_range: Self::ALL.map(Self::name).join(", "),
            }
            .into()
        })
    }
}

/// What packed weights were made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PackedKey {
    layout: u32,
    /// The weight files, in the order in which they were opened.
    sources: Vec<Stamp>,
    /// What the engine knows of the model besides its weights, and how it reads them.
    reading: String,
    packing: String,
}

impl PackedKey {
    pub(super) fn new(sources: Vec<Stamp>, reading: String, packing: &str) -> Self {
        Self { layout: LAYOUT, sources, reading, packing: packing.to_string() }
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    key: PackedKey,
    sections: Vec<u64>,
    checksums: Vec<u32>,
}

/// An open file whose key is right.
pub(crate) struct PackedFile {
    file: File,
    header: Header,
    /// Where the sections begin.
    body: u64,
}

/// What there is under a path.
pub(crate) enum Found {
    /// No file.
    Nothing,
    /// A file that cannot be used, and why.
    Stale(String),
    /// A file that was made of the same model.
    Fresh(PackedFile),
}

impl PackedFile {
    /// Looks for a file at `path` that was made for `key`.
    pub(crate) fn find(path: &Path, key: &PackedKey) -> Found {
        if !path.exists() {
            return Found::Nothing;
        }
        match Self::open(path) {
            Err(reason) => Found::Stale(reason),
            Ok(found) if found.header.key != *key => {
                Found::Stale("it was made of other files or for other kernels".to_string())
            }
            Ok(found) => Found::Fresh(found),
        }
    }

    fn open(path: &Path) -> std::result::Result<Self, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let file = open_regular(path).map_err(|e| text(&e))?;
        let len = file.metadata().map_err(|e| text(&e))?.len();
        let mut prefix = [0u8; PREFIX];
        read_at(&file, 0, &mut prefix).map_err(|e| text(&e))?;
        let (magic, rest) = prefix.split_at(8);
        let (header_len, checksum) = rest.split_at(8);
        let header_len = u64::from_le_bytes(header_len.try_into().unwrap_or_default());
        if magic != MAGIC || header_len > MAX_HEADER_BYTES.min(len) {
            return Err("it is no file of packed weights".to_string());
        }
        let mut header = vec![0u8; header_len as usize];
        read_at(&file, PREFIX as u64, &mut header).map_err(|e| text(&e))?;
        if crc32fast::hash(&header).to_le_bytes() != checksum {
            return Err("its header is damaged".to_string());
        }
        let header: Header = serde_json::from_slice(&header).map_err(|e| text(&e))?;
        let body = PREFIX as u64 + header_len;
        let pieces = |&section: &u64| section.div_ceil(PIECE as u64);
        if header.sections.iter().try_fold(body, |sum, &n| sum.checked_add(n)) != Some(len)
            || header.sections.iter().map(pieces).sum::<u64>() != header.checksums.len() as u64
        {
            return Err("its length is not what its header says".to_string());
        }
        Ok(Self { file, header, body })
    }

    /// Bytes of each section.
    #[cfg(test)]
    pub(crate) fn lengths(&self) -> &[u64] {
        &self.header.sections
    }

    /// Fills `out` with section `index`.
    ///
    /// # Errors
    /// A sentence: there is no such section, it has another length, it cannot be read, its checksum is wrong.
    pub(crate) fn read(&self, index: usize, out: &mut [u8], threads: &Threads) -> std::result::Result<(), String> {
        let sections = &self.header.sections;
        if sections.get(index) != Some(&(out.len() as u64)) {
            return Err(format!("section {index} has not the {} bytes that the model needs", out.len()));
        }
        let start = self.body + sections[..index].iter().sum::<u64>();
        let first: u64 = sections[..index].iter().map(|n| n.div_ceil(PIECE as u64)).sum();
        let checksums = &self.header.checksums[first as usize..];
        let failure = Mutex::new(None);
        threads.for_each_chunk(out, PIECE, true, |i, piece| {
            let reason = match read_at(&self.file, start + (i * PIECE) as u64, piece) {
                Err(error) => error.to_string(),
                Ok(()) if crc32fast::hash(piece) != checksums[i] => format!("section {index} is damaged"),
                Ok(()) => return,
            };
            *failure.lock().unwrap_or_else(|e| e.into_inner()) = Some(reason);
        });
        match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
            Some(reason) => Err(reason),
            None => Ok(()),
        }
    }

    /// Fills `out` with section `index` as `count` floats, all finite.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub(crate) fn floats(
        &self,
        index: usize,
        count: usize,
        out: &mut Vec<f32>,
        threads: &Threads,
    ) -> std::result::Result<(), String> {
        // The length is held against the file before room is made.
        if self.header.sections.get(index).is_none_or(|&bytes| bytes / 4 != count as u64) {
            return Err(format!("section {index} has not the {count} numbers that the model needs"));
        }
        out.resize(count, 0.0);
        self.read(index, bytemuck::cast_slice_mut(out), threads)?;
        out.iter_mut().for_each(|f| *f = f32::from_bits(u32::from_le(f.to_bits())));
        if out.iter().all(|f| f.is_finite()) { Ok(()) } else { Err(format!("section {index} is not finite")) }
    }

    /// Writes a file of these sections, aside at first: other processes see the old file or the whole new one.
    ///
    /// # Errors
    /// `ModelError::LoadingFailed` naming the path.
    pub(crate) fn write(path: &Path, key: PackedKey, sections: &[&[u8]], threads: &Threads) -> Result<()> {
        let pieces: Vec<&[u8]> = sections.iter().flat_map(|section| section.chunks(PIECE)).collect();
        let mut checksums = vec![0u32; pieces.len()];
        threads.for_each_chunk(&mut checksums, 1, true, |i, sum| sum[0] = crc32fast::hash(pieces[i]));
        let lengths = sections.iter().map(|section| section.len() as u64).collect();
        let header =
            serde_json::to_vec(&Header { key, sections: lengths, checksums }).map_err(|e| loading_failed(path, &e))?;
        let mut file = aside::create(path)?;
        let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(|e| loading_failed(path, &e));
        put(MAGIC)?;
        put(&(header.len() as u64).to_le_bytes())?;
        put(&crc32fast::hash(&header).to_le_bytes())?;
        put(&header)?;
        sections.iter().try_for_each(|section| put(section))?;
        aside::publish(file, path)
    }
}
