//! The kernel parameters that TL1 and TL2 lay a matrix out for.
//!
//! bitnet.cpp generates a kernel for every shape (`utils/codegen_tl1.py`, `codegen_tl2.py`) and orders the weights as that kernel reads
//! them. The parameters end up in `include/kernel_config.ini` and **not in the model file**: such a file can only be read by who knows
//! them. They are read here from that ini file, or taken from the presets of bitnet.cpp's `setup_env.py` for the shapes these name.

use std::collections::BTreeMap;

use bitnet_contracts::{ConfigurationError, Result};

/// How one shape is cut up: tiles of `bm` rows by `bk` columns, blocks of `bmm` rows in them. The names are those of
/// `kernel_config.ini`; the generators call them BM, BK and bm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TlKernel {
    /// Rows of a tile.
    pub bm: usize,
    /// Columns of a tile.
    pub bk: usize,
    /// Rows of a block within a tile.
    pub bmm: usize,
}

/// Kernel parameters by shape, `(rows, columns)`.
pub type TlKernels = BTreeMap<(usize, usize), TlKernel>;

/// Most bytes of a kernel_config.ini.
pub const MAX_INI_BYTES: u64 = 1 << 20;

/// Kernel parameters as a `kernel_config.ini` has them.
pub fn to_ini(kernels: &TlKernels) -> String {
    let sections = kernels.iter().enumerate().map(|(i, (&(m, k), &TlKernel { bm, bk, bmm }))| {
        format!("[Kernels_{i}]\nm = {m}\nk = {k}\nbm = {bm}\nbk = {bk}\nbmm = {bmm}\n\n")
    });
    sections.collect()
}

impl TlKernel {
    /// The parameters of bitnet.cpp's preset for a shape, TL1 or TL2: the shapes of bitnet_b1_58-large, bitnet_b1_58-3B and
    /// Llama3-8B-1.58 (`setup_env.py`).
    pub fn preset(tl2: bool, rows: usize, columns: usize) -> Option<Self> {
        let (bm, tl1_bk, tl1_bmm, tl2_bk) = match (rows, columns) {
            (1536, 4096) => (256, 128, 32, 96),
            (1536, 1536) => (128, 64, 64, 192),
            (4096, 1536) => (256, 128, 32, 96),
            (3200, 8640) => (160, 64, 32, 96),
            (3200, 3200) => (320, 128, 64, 96),
            (8640, 3200) => (320, 64, 32, 96),
            (14336, 4096) => (256, 128, 32, 96),
            (4096, 14336) => (128, 64, 64, 96),
            (1024, 4096) => (256, 128, 32, 96),
            (4096, 4096) => (128, 64, 64, 96),
            _ => return None,
        };
        Some(if tl2 { Self { bm, bk: tl2_bk, bmm: 32 } } else { Self { bm, bk: tl1_bk, bmm: tl1_bmm } })
    }

    /// Parameters that the generators take for a shape, for a file to be written: the preset if there is one, else the largest tile of
    /// those that presets use which divides the shape. None when the format cannot hold the shape.
    pub fn for_writing(tl2: bool, rows: usize, columns: usize) -> Option<Self> {
        let tall = [320, 256, 160, 128, 96, 64, 32];
        let wide: &[usize] = if tl2 { &[192, 96] } else { &[128, 64] };
        Self::preset(tl2, rows, columns).or_else(|| {
            let mut candidates = tall.iter().flat_map(|&bm| wide.iter().map(move |&bk| Self { bm, bk, bmm: 32 }));
            candidates.find(|kernel| {
                if tl2 {
                    super::tl2::sections("", rows, columns, *kernel).is_ok()
                } else {
                    super::tl1::sections("", rows, columns, *kernel).is_ok()
                }
            })
        })
    }

    /// Reads a `kernel_config.ini`: sections of `m`, `k`, `bm`, `bk`, `bmm`. `origin` is for the error.
    ///
    /// # Errors
    /// `ConfigurationError::InvalidParameter` naming the line, for a key that is missing, unknown, or no number above zero, and for two
    /// sections of one shape.
    pub fn parse_ini(text: &str, origin: &str) -> Result<TlKernels> {
        let refuse = |line: usize, value: &str, range: &str| {
            ConfigurationError::InvalidParameter {
                parameter: format!("{origin}, line {line}"),
                value: value.to_string(),
                valid_range: range.to_string(),
            }
            .into()
        };
        let mut kernels = TlKernels::new();
        let mut section = [None; 5];
        let mut finish = |section: &mut [Option<usize>; 5], line: usize| {
            let whole = match *section {
                [None, None, None, None, None] => return Ok(()),
                [Some(m), Some(k), Some(bm), Some(bk), Some(bmm)] => kernels.insert((m, k), Self { bm, bk, bmm }),
                _ => return Err(refuse(line, "a section that ends", "after m, k, bm, bk and bmm")),
            };
            *section = [None; 5];
            if whole.is_some() { Err(refuse(line, "a shape", "that no other section has")) } else { Ok(()) }
        };
        let mut last = 0;
        for (number, line) in text.lines().enumerate().map(|(i, line)| (i + 1, line.trim())) {
            last = number;
            if line.is_empty() || line.starts_with(['#', ';']) {
                continue;
            }
            if line.starts_with('[') && line.ends_with(']') {
                finish(&mut section, number)?;
                continue;
            }
            let (key, value) =
                line.split_once('=').ok_or_else(|| refuse(number, line, "a [section] or key = value"))?;
            let slot = ["m", "k", "bm", "bk", "bmm"]
                .iter()
                .position(|&known| known == key.trim())
                .ok_or_else(|| refuse(number, key.trim(), "m, k, bm, bk, bmm"))?;
            let value: usize =
                value.trim().parse().map_err(|_| refuse(number, value.trim(), "a whole number above zero"))?;
            if value == 0 || section[slot].replace(value).is_some() {
                return Err(refuse(number, line, "a whole number above zero, once a section"));
            }
        }
        finish(&mut section, last)?;
        Ok(kernels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_generator_writes() {
        let text = "[Kernels_0]\nm = 3200\nk = 8640\nbm = 160\nbk = 64\nbmm = 32\n\n[Kernels_1]\nm = 64\nk=64\nbm=64\nbk=64\nbmm=64\n";
        let kernels = TlKernel::parse_ini(text, "kernel_config.ini").unwrap();
        assert_eq!(kernels.len(), 2);
        assert_eq!(TlKernel::parse_ini(&to_ini(&kernels), "again").unwrap(), kernels);
        assert_eq!(kernels[&(3200, 8640)], TlKernel::preset(false, 3200, 8640).unwrap());
    }

    #[test]
    fn what_is_no_kernel_config_is_refused() {
        for text in [
            "[a]\nm = 1",
            "m = 1\nk = 1\nbm = 1\nbk = 1\nbmm = 0",
            "m = 1\nm = 2",
            "x = 1",
            "m",
            "m = -1",
            "m = 1\nk = 1\nbm = 1\nbk = 1\nbmm = 1\n[b]\nm = 1\nk = 1\nbm = 1\nbk = 1\nbmm = 1",
        ] {
            assert!(TlKernel::parse_ini(text, "x").is_err(), "{text}");
        }
    }

    #[test]
    fn every_preset_fits_its_shape() {
        for (rows, columns) in [
            (1536, 4096),
            (1536, 1536),
            (4096, 1536),
            (3200, 8640),
            (3200, 3200),
            (8640, 3200),
            (14336, 4096),
            (4096, 14336),
            (1024, 4096),
            (4096, 4096),
        ] {
            let kernel = |tl2| TlKernel::preset(tl2, rows, columns).unwrap();
            assert!(crate::ternary::tl1::sections("", rows, columns, kernel(false)).is_ok(), "TL1 {rows}x{columns}");
            assert!(crate::ternary::tl2::sections("", rows, columns, kernel(true)).is_ok(), "TL2 {rows}x{columns}");
        }
        assert!(TlKernel::for_writing(true, 100, 100).is_none());
        assert!(TlKernel::for_writing(true, 2560, 6912).is_some());
    }
}
