//! The layouts that the look-up kernels read (TL1, TL2): an index byte of a row and a nibble's table meet in one byte shuffle.
//!
//! Sixteen rows are interleaved; a block of 64 bytes is four lanes of sixteen bytes, one byte a row. Codes `c` are trits plus one.
//!
//! Pairs (TL1, 2 bits a trit), 16 columns a block:
//! ```text
//!   byte 16*lane + row   low nibble 3 c0 + c1, high nibble 3 c2 + c3, columns 4*lane + 0 .. 3
//! ```
//! Triples (TL2, 5/3 bits a trit), 96 columns in 320 bytes: a block of signs, then four of indices. Twelve columns are a step; with
//! `v = 9 t0 + 3 t1 + t2` of columns `12*step + lane + 0, 4, 8`
//! ```text
//!   signs, byte 16*lane + row              bit 7 - step: v < 0                        steps 0 .. 7
//!   block step/2, byte 16*lane + row       |v|, low nibble for even steps, high for odd ones
//! ```
//! Each row group of triples starts with 64 bytes: how many signs each row has, as little-endian i32. A kernel takes the complement for
//! the negative, which is one less.

#![allow(clippy::needless_range_loop)] // Rows are counted, several arrays at once.

use crate::kernels::chunks::{as_chunks, as_chunks_mut};

const ROWS: usize = 16;
/// Bytes of a block.
const BLOCK: usize = 64;
/// Bytes in front of a row group of triples.
pub(crate) const COUNTS: usize = 64;
/// Bytes of 96 columns of triples.
pub(crate) const TRIPLES: usize = 320;
/// Planes of four columns in them.
pub(crate) const TRIPLE_PLANES: usize = 24;

/// A byte in each of four.
const fn four(byte: u32) -> u32 {
    byte * 0x0101_0101
}

/// 1 in every byte of `x` that is at least `least`; bytes are below 128.
#[inline(always)]
fn at_least(x: u32, least: u32) -> u32 {
    (x + four(128 - least)) >> 7 & four(1)
}

/// Packs lanes of codes, `[columns / 4, 16]`, as pairs.
#[inline(always)]
pub(super) fn pack_pairs(lanes: &[[u32; ROWS]], codes: impl Fn(u32) -> u32, out: &mut [u8]) {
    for (lanes, block) in as_chunks::<4, _>(lanes).0.iter().zip(as_chunks_mut::<BLOCK, _>(out).0) {
        for lane in 0..4 {
            for r in 0..ROWS {
                let c = codes(lanes[lane][r]);
                let low = 3 * (c & 3) + (c >> 8 & 3);
                let high = 3 * (c >> 16 & 3) + (c >> 24);
                block[ROWS * lane + r] = (low | high << 4) as u8;
            }
        }
    }
}

/// Packs lanes of codes, `[columns / 4, 16]`, as triples, `out` a row group with its counts.
#[inline(always)]
pub(super) fn pack_triples(lanes: &[[u32; ROWS]], codes: impl Fn(u32) -> u32, out: &mut [u8]) {
    let (counts, out) = out.split_at_mut(COUNTS.min(out.len()));
    let mut negative = [0u32; ROWS];
    for (lanes, unit) in as_chunks::<TRIPLE_PLANES, _>(lanes).0.iter().zip(as_chunks_mut::<TRIPLES, _>(out).0) {
        let (signs, indices) = unit.split_at_mut(BLOCK);
        signs.fill(0);
        for (step, lanes) in as_chunks::<3, _>(lanes).0.iter().enumerate() {
            let block = &mut indices[step / 2 * BLOCK..][..BLOCK];
            for r in 0..ROWS {
                // 13 + v, four at a time.
                let u = 9 * codes(lanes[0][r]) + 3 * codes(lanes[1][r]) + codes(lanes[2][r]);
                let sign = four(1) - at_least(u, 13);
                let mask = sign * 0xff;
                let n = ((four(13) & mask) - (u & mask)) + ((u & !mask) - (four(13) & !mask));
                for lane in 0..4 {
                    let (n, sign) = ((n >> (8 * lane)) as u8, (sign >> (8 * lane) & 1) as u8);
                    let place = &mut block[ROWS * lane + r];
                    *place = if step % 2 == 0 { n } else { *place | n << 4 };
                    signs[ROWS * lane + r] |= sign << (7 - step);
                    negative[r] += u32::from(sign);
                }
            }
        }
    }
    for (place, count) in as_chunks_mut::<4, _>(counts).0.iter_mut().zip(negative) {
        *place = count.to_le_bytes();
    }
}

/// The planes of a block of pairs: codes of four columns in a dword a row.
#[inline(always)]
pub(crate) fn unpack_pairs(block: &[u8; BLOCK]) -> [[u32; ROWS]; 4] {
    let mut planes = [[0; ROWS]; 4];
    for lane in 0..4 {
        for r in 0..ROWS {
            let byte = u32::from(block[ROWS * lane + r]);
            let pairs = byte & 15 | byte >> 4 << 16;
            // A third, rounded down, of numbers up to 8.
            let first = (pairs * 11) >> 5 & 0x0003_0003;
            planes[lane][r] = first | (pairs - 3 * first) << 8;
        }
    }
    planes
}

/// The planes of 96 columns of triples.
#[inline(always)]
pub(crate) fn unpack_triples(unit: &[u8; TRIPLES]) -> [[u32; ROWS]; TRIPLE_PLANES] {
    let mut planes = [[0; ROWS]; TRIPLE_PLANES];
    let (blocks, _) = as_chunks::<BLOCK, _>(unit);
    for step in 0..8 {
        let (signs, block) = (&blocks[0], &blocks[1 + step / 2]);
        for r in 0..ROWS {
            let gather = |bytes: &[u8; BLOCK]| {
                let byte = |lane: usize| u32::from(bytes[ROWS * lane + r]);
                byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24
            };
            let n = gather(block) >> (4 * (step % 2)) & four(15);
            let mask = (gather(signs) >> (7 - step) & four(1)) * 0xff;
            let u = four(13) + n - 2 * (n & mask);
            let first = at_least(u, 9) + at_least(u, 18);
            let rest = u - 9 * first;
            let second = at_least(rest, 3) + at_least(rest, 6);
            planes[3 * step][r] = first;
            planes[3 * step + 1][r] = second;
            planes[3 * step + 2][r] = rest - 3 * second;
        }
    }
    planes
}
