//! Memory for weights: zeroed, 64-byte aligned, in 2 MiB pages where the system has them. A stream over weights in 4 KiB pages spends
//! a sixth of its time on page tables.

use std::ops::{Deref, DerefMut};

use bitnet_contracts::{MemoryError, Result};
use memmap2::MmapMut;

/// A large page of x86-64 and of most aarch64 systems.
const LARGE_PAGE: usize = 2 << 20;

/// A block of memory of its own.
#[derive(Debug)]
pub(crate) struct Pages {
    map: MmapMut,
    start: usize,
    len: usize,
}

impl Pages {
    /// `len` zeroes.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`.
    pub(crate) fn zeroed(len: usize) -> Result<Self> {
        let failed = |reason: String| MemoryError::AllocationFailed { size_bytes: len, reason };
        // Room to start on a large page; what is never touched costs no memory.
        let slack = if len >= LARGE_PAGE { LARGE_PAGE } else { 64 };
        let room = len.checked_add(slack).ok_or_else(|| failed("more than the address space".to_string()))?;
        #[cfg(test)]
        let room = room.checked_add(super::guarded::spare()).ok_or_else(|| failed("so many".to_string()))?;
        #[cfg_attr(not(test), allow(unused_mut))]
        let mut map = MmapMut::map_anon(room).map_err(|e| failed(e.to_string()))?;
        let start = map.as_ptr().align_offset(slack).min(slack);
        // In the tests of the kernels, reading beyond the weights is a fault.
        #[cfg(test)]
        let start = super::guarded::fence(&mut map, start, len, slack);
        // A system without large pages refuses: small ones do.
        #[cfg(target_os = "linux")]
        if len >= LARGE_PAGE {
            let _ = map.advise_range(memmap2::Advice::HugePage, start, len);
        }
        Ok(Self { map, start, len })
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_zeroed_aligned_and_as_long_as_asked_for() {
        for len in [0, 1, 64, 4097, LARGE_PAGE, 3 * LARGE_PAGE + 5] {
            let mut pages = Pages::zeroed(len).unwrap();
            assert_eq!(pages.len(), len);
            assert!(pages.iter().all(|&b| b == 0));
            let alignment = if len >= LARGE_PAGE { LARGE_PAGE } else { 64 };
            assert_eq!(pages.as_ptr().align_offset(alignment), 0, "{len}");
            pages.fill(7);
        }
    }

    #[test]
    fn an_impossible_size_is_an_error() {
        assert!(Pages::zeroed(usize::MAX).is_err());
        assert!(Pages::zeroed(usize::MAX / 2).is_err());
    }
}
