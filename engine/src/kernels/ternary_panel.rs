//! The ternary product for many tokens: a panel of row groups is unpacked a stretch of columns at a time, into the first-level cache,
//! and meets all tokens there, a tile of them with its sums in registers.
//!
//! Activations of a tile lie as they are read: for every four columns the dwords of its `T` tokens side by side.

#![allow(clippy::needless_range_loop)] // Registers, tokens and groups are counted, several arrays at once.

use super::chunks::{as_chunks, as_chunks_mut};
use super::ternary_matmul::Product;
use super::ternary_tile::{BLOCK_BYTES, DotLanes, Line, PLANE, ROWS, unpack_base3};
use crate::ternary::interleaved::Packing;
use crate::ternary::lookup_layout::{COUNTS, TRIPLE_PLANES, TRIPLES, unpack_pairs, unpack_triples};

/// Planes of one stretch of columns, at most. Two groups of them are 20 KiB.
const STRETCH: usize = 160;

/// Working memory of a thread.
#[derive(Default)]
pub(crate) struct PanelScratch {
    /// The unpacked stretch, group by group for every plane.
    lines: Vec<Line>,
    /// Sums of every tile, group and token.
    sums: Vec<[i32; ROWS]>,
}

/// Row groups `first .. first + G` of `product` for all its tokens.
#[inline(always)]
pub(super) fn panel<L: DotLanes, const G: usize, const T: usize>(
    product: &Product<'_>,
    first: usize,
    scratch: &mut PanelScratch,
) {
    // Whole blocks.
    let block = product.weights.packing().block() / PLANE;
    let stretch = STRETCH.min(L::RUN) / block * block;
    let steps = product.activations.steps();
    scratch.lines.resize(stretch * G, Line([0; BLOCK_BYTES]));
    let (lines, _) = as_chunks_mut::<G, _>(&mut scratch.lines);
    scratch.sums.clear();
    scratch.sums.resize(product.activations.tiles::<T>().count() * G * T, [0; ROWS]);
    let (sums, _) = as_chunks_mut::<T, _>(&mut scratch.sums);
    let (sums, _) = as_chunks_mut::<G, _>(sums);
    let mut from = 0;
    while from < steps {
        let count = stretch.min(steps - from);
        for g in 0..G {
            unpack_stretch::<L, G>(product, first + g, g, from, &mut lines[..count]);
        }
        for (tile, sums) in product.activations.tiles::<T>().zip(sums.iter_mut()) {
            add_stretch::<L, G, T>(&lines[..count], &tile[from..from + count], sums);
        }
        from += count;
    }
    for (i, sums) in sums.iter().enumerate() {
        for t in 0..T.min(product.tokens() - i * T) {
            let mut own = [&sums[0][t]; G];
            for g in 1..G {
                own[g] = &sums[g][t];
            }
            product.finish(i * T + t, first, own);
        }
    }
}

/// Unpacks planes `from ..` of a row group into place `g` of `lines`.
#[inline(always)]
fn unpack_stretch<L: DotLanes, const G: usize>(
    product: &Product<'_>,
    group: usize,
    g: usize,
    from: usize,
    lines: &mut [[Line; G]],
) {
    let bytes = product.weights.group(group);
    let (blocks, _) = as_chunks::<BLOCK_BYTES, _>(bytes);
    match product.weights.packing() {
        Packing::TwoBits => {
            for (block, lines) in blocks[from / 4..].iter().zip(as_chunks_mut::<4, _>(lines).0) {
                let planes = L::unpack(block);
                for p in 0..4 {
                    L::store(planes[p], &mut lines[p][g]);
                }
            }
        }
        Packing::BaseThree => {
            for (block, lines) in blocks[from / 5..].iter().zip(as_chunks_mut::<5, _>(lines).0) {
                let planes = unpack_base3::<L>(block);
                for p in 0..5 {
                    L::store(planes[p], &mut lines[p][g]);
                }
            }
        }
        Packing::Pairs => {
            for (block, lines) in blocks[from / 4..].iter().zip(as_chunks_mut::<4, _>(lines).0) {
                let planes = unpack_pairs(block);
                for p in 0..4 {
                    write_plane(&planes[p], &mut lines[p][g]);
                }
            }
        }
        Packing::Triples => {
            let (units, _) = as_chunks::<TRIPLES, _>(&bytes[COUNTS..]);
            for (unit, lines) in units[from / TRIPLE_PLANES..].iter().zip(as_chunks_mut::<TRIPLE_PLANES, _>(lines).0) {
                let planes = unpack_triples(unit);
                for p in 0..TRIPLE_PLANES {
                    write_plane(&planes[p], &mut lines[p][g]);
                }
            }
        }
    }
}

/// Writes a plane of which a dword a row is at hand.
#[inline(always)]
fn write_plane(plane: &[u32; ROWS], line: &mut Line) {
    for (place, codes) in as_chunks_mut::<4, _>(&mut line.0).0.iter_mut().zip(plane) {
        *place = codes.to_le_bytes();
    }
}

/// `G` groups of rows against `T` tokens, over one stretch.
#[inline(always)]
fn add_stretch<L: DotLanes, const G: usize, const T: usize>(
    lines: &[[Line; G]],
    tile: &[[i32; T]],
    sums: &mut [[[i32; ROWS]; T]; G],
) {
    let mut partial = [[L::zero(); T]; G];
    for (lines, dwords) in lines.iter().zip(tile) {
        let mut codes = [L::load(&lines[0]); G];
        for g in 1..G {
            codes[g] = L::load(&lines[g]);
        }
        for t in 0..T {
            let activations = L::broadcast(dwords[t]);
            for g in 0..G {
                partial[g][t] = L::mac(partial[g][t], codes[g], activations);
            }
        }
    }
    for g in 0..G {
        for t in 0..T {
            L::fold(partial[g][t], &mut sums[g][t]);
        }
    }
}
