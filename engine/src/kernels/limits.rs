//! What the machine allows, measured: how fast memory and cache can be read and how many multiply-accumulates an instruction set does.
//! A figure of the engine means something beside such a limit only if both come from the same machine in the same minute.
//!
//! Both loops return what they did, summed up from the data that they went through: a word of the memory that is read is 1, and so is
//! every code and activation that is multiplied. A loop that the compiler had shortened would count less.

#![allow(clippy::needless_range_loop)] // Registers, tokens and groups are counted, several arrays at once.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bitnet_contracts::Result;

use super::chunks::{as_chunks, as_chunks_mut};
use super::pages::Pages;
use super::ternary_tile::{BLOCK_BYTES, DotLanes, Line, PLANE, ROWS};
use super::{Kernels, Threads};

/// Bytes that are read from memory: far more than a last-level cache.
const MEMORY: usize = 512 << 20;
/// Bytes that are read from the cache, by every thread its own: more than a first-level cache holds and less than a second-level one.
const CACHE: usize = 128 << 10;
/// Readings of them in one sample.
const CACHE_PASSES: usize = 2048;
/// Activations, four each, that one pass of the multiply-accumulate loop goes through: 8 KiB of a first-level cache, whole tiles of
/// every instruction set, and few enough for the narrowest sums.
const DWORDS: usize = 2016;
/// Passes over them in one sample.
const MAC_PASSES: usize = 4096;
/// How long each limit is sampled for.
const PERIOD: Duration = Duration::from_millis(400);
/// How far ahead of its use memory is asked for, as by the kernels that stream.
const AHEAD: usize = 4096;

/// What a machine allows, by the best of many samples.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Limits {
    /// Reading memory one address after another, in 2 MiB pages where the system has them, all threads together: 10^9 bytes a second.
    pub dram_read_gb_s: f64,
    /// Reading from second-level caches, all threads together: 10^9 bytes a second.
    pub cache_read_gb_s: f64,
    /// Products of a code and an activation, added up in registers, all threads together: 10^9 a second.
    pub gmac_s: f64,
}

impl Limits {
    /// Measures for about a second, with the loads and the multiply-accumulate of `kernels` on every thread of `threads`. Takes 512 MiB
    /// of memory meanwhile.
    ///
    /// # Errors
    /// `MemoryError::AllocationFailed`.
    pub fn measure(kernels: &Kernels, threads: &Threads) -> Result<Limits> {
        Ok(Limits {
            dram_read_gb_s: memory(kernels, threads)?,
            cache_read_gb_s: cache(kernels, threads)?,
            gmac_s: macs(kernels, threads),
        })
    }
}

/// Memory of which every 64-bit word is 1. Written, since pages that never were are all one page of zeroes.
fn ones(bytes: usize, threads: &Threads) -> Result<Pages> {
    let mut pages = Pages::zeroed(bytes)?;
    threads.for_each_chunk(&mut pages, bytes.div_ceil(threads.count()), true, |_, part| {
        as_chunks_mut::<8, _>(part).0.iter_mut().for_each(|word| *word = 1u64.to_ne_bytes());
    });
    Ok(pages)
}

/// The most that `sample` did in a nanosecond.
fn best(mut sample: impl FnMut() -> u64) -> f64 {
    let (start, mut best) = (Instant::now(), 0f64);
    while start.elapsed() < PERIOD {
        let start = Instant::now();
        let done = sample();
        best = best.max(done as f64 / start.elapsed().as_nanos().max(1) as f64);
    }
    best
}

/// What all threads did together, each in a part of its own.
fn together(threads: &Threads, part: impl Fn(usize) -> u64 + Sync + Send) -> u64 {
    let done = AtomicU64::new(0);
    threads.for_each(threads.count(), true, |i| {
        done.fetch_add(part(i), Ordering::Relaxed);
    });
    done.into_inner()
}

fn memory(kernels: &Kernels, threads: &Threads) -> Result<f64> {
    let share = (MEMORY / threads.count()).next_multiple_of(BLOCK_BYTES * CHAINS);
    let pages = ones(share * threads.count(), threads)?;
    let parts: Vec<&[u8]> = pages.chunks_exact(share).collect();
    Ok(best(|| 8 * together(threads, |i| (kernels.read_limit)(black_box(parts[i])))))
}

fn cache(kernels: &Kernels, threads: &Threads) -> Result<f64> {
    let parts = (0..threads.count()).map(|_| ones(CACHE, threads)).collect::<Result<Vec<_>>>()?;
    let passes = |i: usize| (0..CACHE_PASSES).map(|_| (kernels.read_limit)(black_box(&parts[i]))).sum::<u64>();
    Ok(best(|| 8 * together(threads, passes)))
}

fn macs(kernels: &Kernels, threads: &Threads) -> f64 {
    best(|| together(threads, |_| (kernels.mac_limit)(MAC_PASSES)))
}

/// Lines that are read at a time, each into a sum of its own.
const CHAINS: usize = 8;

/// Reads `bytes`, whole groups of eight lines, and gives the sum of their 64-bit words.
#[inline(always)]
pub(super) fn read<L: DotLanes>(bytes: &[u8]) -> u64 {
    let mut sums = [[0u64; BLOCK_BYTES / 8]; CHAINS];
    let (lines, _) = as_chunks::<BLOCK_BYTES, _>(bytes);
    for lines in as_chunks::<CHAINS, _>(lines).0 {
        for c in 0..CHAINS {
            L::prefetch(lines[c].as_ptr().wrapping_add(AHEAD));
            let (words, _) = as_chunks::<8, _>(&lines[c]);
            for w in 0..words.len() {
                sums[c][w] = sums[c][w].wrapping_add(u64::from_ne_bytes(words[w]));
            }
        }
    }
    sums.into_iter().flatten().fold(0, u64::wrapping_add)
}

/// The inner loop of [`super::ternary_panel`] with the codes kept in registers: `G` groups of rows by `T` tokens. Gives the number of
/// products.
#[inline(always)]
pub(super) fn multiply<L: DotLanes, const G: usize, const T: usize>(passes: usize) -> u64 {
    // Each in its own memory: what two chains are known to share is computed once.
    let lines = black_box([Line([1; BLOCK_BYTES]); G]);
    let dwords = black_box([i32::from_ne_bytes([1; PLANE]); DWORDS]);
    let mut codes = [L::load(&lines[0]); G];
    for g in 1..G {
        codes[g] = L::load(&lines[g]);
    }
    let mut products = 0u64;
    for _ in 0..passes {
        let mut partial = [[L::zero(); T]; G];
        for dwords in as_chunks::<T, _>(black_box(&dwords)).0 {
            for t in 0..T {
                let activations = L::broadcast(dwords[t]);
                for g in 0..G {
                    partial[g][t] = L::mac(partial[g][t], codes[g], activations);
                }
            }
        }
        let mut sums = [0i32; ROWS];
        for partial in partial.into_iter().flatten() {
            L::fold(partial, &mut sums);
        }
        products += sums.into_iter().map(|sum| sum as u64).sum::<u64>();
    }
    products
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Isa;

    #[test]
    fn the_loops_do_what_they_count() {
        let threads = Threads::new(Some(1)).unwrap();
        for isa in Isa::available() {
            let kernels = Kernels::of(isa).unwrap();
            let mut pages = ones(1 << 16, &threads).unwrap();
            assert_eq!((kernels.read_limit)(&pages), 1 << 13, "{isa}");
            pages[8 * 4321..][..8].copy_from_slice(&1_000_001u64.to_ne_bytes());
            assert_eq!((kernels.read_limit)(&pages), (1 << 13) + 1_000_000, "{isa}: every word counts");
            let groups = kernels.panel_groups();
            assert_eq!((kernels.mac_limit)(3), (3 * DWORDS * groups * PLANE * ROWS) as u64, "{isa}");
        }
    }

    #[test]
    fn limits_are_numbers() {
        for count in [1, 2] {
            let kernels = Kernels::of(Isa::best()).unwrap();
            let limits = Limits::measure(kernels, &Threads::new(Some(count)).unwrap()).unwrap();
            // What they are is for the benches: a test may run on a machine that is busy.
            let figures = [limits.dram_read_gb_s, limits.cache_read_gb_s, limits.gmac_s];
            assert!(figures.iter().all(|figure| figure.is_finite() && *figure > 0.0), "{limits:?}");
        }
    }
}
