//! The ternary product by tables, once for all instruction sets: what a few tokens make of every pair or triple of trits is written
//! down once ([`write_tables`]), and a byte shuffle looks it up for sixteen rows of a pair or triple in every 128-bit lane. For many
//! tokens the codes are unpacked ([`super::ternary_panel`]): there multiplying is faster.
//!
//! A sum of a pair is at most 256 and of a triple at most 384 in magnitude: tables are split into low bytes and signed high bytes. Low
//! bytes are added up as words and, shifted down, those of odd rows apart: what the two leave of each other modulo 2^16 is the even rows'
//! sum, exact for up to 257 additions of at most 255. High bytes (-1 to 1 of a pair, -2 to 1 of a triple) are added up as bytes: 127 and
//! 64 fit.
//!
//! A negative triple is looked up as its opposite and complemented, `-x - 1`: the ones that are missing are counted with the weights.

#![allow(clippy::needless_range_loop)] // Registers, tokens and groups are counted, several arrays at once.

use super::chunks::{as_chunks, as_chunks_mut};
use super::ternary_matmul::Product;
use super::ternary_tile::{BLOCK_BYTES, DotLanes, Line, ROWS};
use crate::ternary::interleaved::Packing;
use crate::ternary::lookup_layout::{COUNTS, TRIPLES};

/// Additions of pairs that eight bits of high bytes hold.
const PAIR_ADDS: usize = 127;
/// Additions of triples.
const TRIPLE_ADDS: usize = 64;
/// Lines of tables of one block of pairs: low and high bytes for the low nibbles, then for the high ones.
const PAIR_LINES: usize = 4;
/// Lines of tables of 96 columns of triples: low and high bytes of eight steps.
const TRIPLE_LINES: usize = 16;
/// How far ahead weights are asked for.
const AHEAD: usize = 4096;

/// The trits of every index, sixteen of them: of pairs `3 (t0 + 1) + t1 + 1`, of triples `9 t0 + 3 t1 + t2`.
const PAIR_TRITS: [[i16; 16]; 2] = trits([3, 1], 9, 0);
const TRIPLE_TRITS: [[i16; 16]; 3] = trits([9, 3, 1], 14, 13);

/// Digits less one of `index + offset` in base three, by place values.
const fn trits<const D: usize>(places: [usize; D], count: usize, offset: usize) -> [[i16; 16]; D] {
    let mut table = [[0; 16]; D];
    let mut d = 0;
    while d < D {
        let mut index = 0;
        while index < count {
            table[d][index] = ((index + offset) / places[d] % 3) as i16 - 1;
            index += 1;
        }
        d += 1;
    }
    table
}

/// Registers of bytes and what looking up takes.
///
/// Every method is `#[inline(always)]` and becomes part of an entry compiled with the right target features.
pub(crate) trait LookupLanes: DotLanes {
    /// Sixteen rows in every 128-bit lane.
    type Bytes: Copy;
    /// Which bytes.
    type Mask: Copy;
    /// Registers of a block: 1, 2 or 4.
    const PARTS: usize;
    /// Row groups that one token goes through together: 1, 2 or 4.
    const GROUPS: usize;

    /// Zeroes.
    fn no_bytes() -> Self::Bytes;
    /// Register `part` of a block.
    fn load_bytes(block: &[u8; BLOCK_BYTES], part: usize) -> Self::Bytes;
    /// Writes a register to the front of `line`.
    fn store_bytes(bytes: Self::Bytes, line: &mut Line);
    /// The low nibbles.
    fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes;
    /// The high nibbles.
    fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes;
    /// In every lane, the bytes of `table` at `indices`, which are below 16.
    fn lookup(table: Self::Bytes, indices: Self::Bytes) -> Self::Bytes;
    /// The bytes that have the bit `bit` set.
    fn having(bytes: Self::Bytes, bit: u8) -> Self::Mask;
    /// Bytes with those in `mask` complemented.
    fn complement(bytes: Self::Bytes, mask: Self::Mask) -> Self::Bytes;
    /// Adds up low bytes as words, those of odd bytes apart, and high bytes.
    fn add(running: [Self::Bytes; 3], low: Self::Bytes, high: Self::Bytes) -> [Self::Bytes; 3];
}

/// Lines of the tables of `columns` columns, whole blocks of `packing`.
pub(super) fn table_lines(packing: Packing, columns: usize) -> usize {
    match packing {
        Packing::Pairs => columns / packing.block() * PAIR_LINES,
        Packing::Triples => columns / packing.block() * TRIPLE_LINES,
        Packing::TwoBits | Packing::BaseThree => 0,
    }
}

/// Writes the tables of one token's activations, whole blocks of them.
#[inline(always)]
pub(super) fn write_tables(packing: Packing, activations: &[i8], out: &mut [Line]) {
    if packing == Packing::Pairs {
        for (a, lines) in as_chunks::<16, _>(activations).0.iter().zip(as_chunks_mut::<PAIR_LINES, _>(out).0) {
            for pair in 0..8 {
                let (lane, half) = (pair / 2, pair % 2);
                let (a0, a1) = (i16::from(a[2 * pair]), i16::from(a[2 * pair + 1]));
                for i in 0..16 {
                    let sum = a0 * PAIR_TRITS[0][i] + a1 * PAIR_TRITS[1][i];
                    lines[2 * half].0[16 * lane + i] = sum as u8;
                    lines[2 * half + 1].0[16 * lane + i] = (sum >> 8) as u8;
                }
            }
        }
    } else {
        for (a, lines) in as_chunks::<96, _>(activations).0.iter().zip(as_chunks_mut::<TRIPLE_LINES, _>(out).0) {
            for step in 0..8 {
                for lane in 0..4 {
                    let at = 12 * step + lane;
                    let (a0, a1, a2) = (i16::from(a[at]), i16::from(a[at + 4]), i16::from(a[at + 8]));
                    for i in 0..16 {
                        let sum = a0 * TRIPLE_TRITS[0][i] + a1 * TRIPLE_TRITS[1][i] + a2 * TRIPLE_TRITS[2][i];
                        lines[2 * step].0[16 * lane + i] = sum as u8;
                        lines[2 * step + 1].0[16 * lane + i] = (sum >> 8) as u8;
                    }
                }
            }
        }
    }
}

/// Row groups `first .. end` of `product` for all its tokens.
#[inline(always)]
pub(super) fn stream<L: LookupLanes>(product: &Product<'_>, first: usize, end: usize) {
    let mut group = first;
    while group < end {
        let groups = (end - group).min(L::GROUPS);
        let mut token = 0;
        while token < product.tokens() {
            // Two tokens take as many registers as twice the groups.
            token += match (groups, product.tokens() - token) {
                (2.., 2..) if L::GROUPS > 2 => {
                    tokens::<L, 2, 2>(product, group, token);
                    if groups > 3 {
                        tokens::<L, 2, 2>(product, group + 2, token);
                    }
                    2
                }
                (4.., _) => tokens::<L, 4, 1>(product, group, token),
                (2.., _) => tokens::<L, 2, 1>(product, group, token),
                (_, _) => tokens::<L, 1, 1>(product, group, token),
            };
        }
        group += if groups == 3 { 2 } else { groups };
    }
}

/// `G` row groups by `N` tokens. Gives `N`.
#[inline(always)]
fn tokens<L: LookupLanes, const G: usize, const N: usize>(product: &Product<'_>, group: usize, token: usize) -> usize {
    let mut sums = [[[0i32; ROWS]; G]; N];
    for n in 0..N {
        // What `finish` takes are sums of codes.
        let (_, bias) = product.activations.inverse(token + n);
        sums[n] = [[bias; ROWS]; G];
    }
    if product.weights.packing() == Packing::Pairs {
        pairs::<L, G, N>(product, group, token, &mut sums);
    } else {
        triples::<L, G, N>(product, group, token, &mut sums);
    }
    for n in 0..N {
        let mut own = [&sums[n][0]; G];
        for g in 1..G {
            own[g] = &sums[n][g];
        }
        product.finish(token + n, group, own);
    }
    N
}

/// The tables of `N` tokens, by blocks.
#[inline(always)]
fn tables<'a, const LINES: usize, const N: usize>(product: &'a Product<'_>, token: usize) -> [&'a [[Line; LINES]]; N] {
    let mut tables: [&[[Line; LINES]]; N] = [&[]; N];
    for n in 0..N {
        tables[n] = as_chunks(product.activations.tables(token + n)).0;
    }
    tables
}

/// Adds the pairs of `G` row groups.
#[inline(always)]
fn pairs<L: LookupLanes, const G: usize, const N: usize>(
    product: &Product<'_>,
    group: usize,
    token: usize,
    sums: &mut [[[i32; ROWS]; G]; N],
) {
    let mut blocks: [&[[u8; BLOCK_BYTES]]; G] = [&[]; G];
    for g in 0..G {
        blocks[g] = as_chunks(product.weights.group(group + g)).0;
    }
    let tables = tables::<PAIR_LINES, N>(product, token);
    let count = blocks[0].len();
    let mut done = 0;
    while done < count {
        let end = count.min(done + PAIR_ADDS / (2 * L::PARTS));
        let mut running = [[[L::no_bytes(); 3]; G]; N];
        for b in done..end {
            let ahead = ahead::<G>(b, count, BLOCK_BYTES);
            for g in 0..G {
                L::prefetch(blocks[g][b].as_ptr().wrapping_add(ahead));
            }
            for part in 0..L::PARTS {
                for half in 0..2 {
                    let mut indices = [L::no_bytes(); G];
                    for g in 0..G {
                        let bytes = L::load_bytes(&blocks[g][b], part);
                        indices[g] = if half == 0 { L::low_nibbles(bytes) } else { L::high_nibbles(bytes) };
                    }
                    for n in 0..N {
                        let low = L::load_bytes(&tables[n][b][2 * half].0, part);
                        let high = L::load_bytes(&tables[n][b][2 * half + 1].0, part);
                        for g in 0..G {
                            running[n][g] =
                                L::add(running[n][g], L::lookup(low, indices[g]), L::lookup(high, indices[g]));
                        }
                    }
                }
            }
        }
        fold::<L, G, N>(&running, sums);
        done = end;
    }
}

/// Adds the triples of `G` row groups.
#[inline(always)]
fn triples<L: LookupLanes, const G: usize, const N: usize>(
    product: &Product<'_>,
    group: usize,
    token: usize,
    sums: &mut [[[i32; ROWS]; G]; N],
) {
    let mut units: [&[[u8; TRIPLES]]; G] = [&[]; G];
    for g in 0..G {
        let (counts, bytes) = product.weights.group(group + g).split_at(COUNTS);
        units[g] = as_chunks(bytes).0;
        for (r, count) in as_chunks::<4, _>(counts).0.iter().enumerate() {
            for n in 0..N {
                sums[n][g][r] += i32::from_le_bytes(*count);
            }
        }
    }
    let tables = tables::<TRIPLE_LINES, N>(product, token);
    let count = units[0].len();
    let mut done = 0;
    while done < count {
        let end = count.min(done + TRIPLE_ADDS / (8 * L::PARTS));
        let mut running = [[[L::no_bytes(); 3]; G]; N];
        for u in done..end {
            let ahead = ahead::<G>(u, count, TRIPLES);
            let mut blocks: [&[[u8; BLOCK_BYTES]]; G] = [&[]; G];
            for g in 0..G {
                blocks[g] = as_chunks(&units[g][u]).0;
                for line in 0..TRIPLES / BLOCK_BYTES {
                    L::prefetch(units[g][u].as_ptr().wrapping_add(ahead + BLOCK_BYTES * line));
                }
            }
            for part in 0..L::PARTS {
                for step in 0..8 {
                    let mut indices = [L::no_bytes(); G];
                    let mut negative = [L::having(L::no_bytes(), 1); G];
                    for g in 0..G {
                        let bytes = L::load_bytes(&blocks[g][1 + step / 2], part);
                        indices[g] = if step % 2 == 0 { L::low_nibbles(bytes) } else { L::high_nibbles(bytes) };
                        negative[g] = L::having(L::load_bytes(&blocks[g][0], part), 0x80 >> step);
                    }
                    for n in 0..N {
                        let low = L::load_bytes(&tables[n][u][2 * step].0, part);
                        let high = L::load_bytes(&tables[n][u][2 * step + 1].0, part);
                        for g in 0..G {
                            let low = L::complement(L::lookup(low, indices[g]), negative[g]);
                            let high = L::complement(L::lookup(high, indices[g]), negative[g]);
                            running[n][g] = L::add(running[n][g], low, high);
                        }
                    }
                }
            }
        }
        fold::<L, G, N>(&running, sums);
        done = end;
    }
}

/// Where, from block `b` of `count` on, the weights lie that are read soon: behind the row's end begins the row group `G` further on.
#[inline(always)]
fn ahead<const G: usize>(b: usize, count: usize, bytes: usize) -> usize {
    if (b * bytes + AHEAD) < count * bytes { AHEAD } else { AHEAD + (G - 1) * count * bytes }
}

/// Adds running sums to `sums`.
#[inline(always)]
fn fold<L: LookupLanes, const G: usize, const N: usize>(
    running: &[[[L::Bytes; 3]; G]; N],
    sums: &mut [[[i32; ROWS]; G]; N],
) {
    for n in 0..N {
        for g in 0..G {
            let mut lines = [Line([0; BLOCK_BYTES]); 3];
            for i in 0..3 {
                L::store_bytes(running[n][g][i], &mut lines[i]);
            }
            let [all, odd, high] = lines;
            for lane in 0..4 / L::PARTS {
                for pair in 0..ROWS / 2 {
                    let at = ROWS * lane + 2 * pair;
                    let odd = u16::from_le_bytes([odd.0[at], odd.0[at + 1]]);
                    let even = u16::from_le_bytes([all.0[at], all.0[at + 1]]).wrapping_sub(odd << 8);
                    sums[n][g][2 * pair] += i32::from(even) + 256 * i32::from(high.0[at] as i8);
                    sums[n][g][2 * pair + 1] += i32::from(odd) + 256 * i32::from(high.0[at + 1] as i8);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::guarded::{Guarded, Place};
    use crate::kernels::{Isa, Kernels};

    /// Every entry for the activations that make the largest sums, -128 among them.
    #[test]
    fn tables_hold_the_sums_of_their_trits() {
        let extremes = [-128i8, -1, 0, 1, 127];
        for isa in Isa::available() {
            for packing in [Packing::Pairs, Packing::Triples] {
                let kernels = Kernels::of(isa).unwrap().with_packing(packing);
                let mut lines = Guarded::<Line>::new(table_lines(packing, 96 * 5), Place::End);
                let a: Vec<i8> = (0..96 * 5).map(|i| extremes[(i * 7 + i / 5 * 3 + i / 96) % 5]).collect();
                kernels.tables(&a, &mut lines);
                let entry =
                    |line: usize, at: usize| i32::from(i16::from_le_bytes([lines[line].0[at], lines[line + 1].0[at]]));
                let sum = |columns: &[usize], trits: &[i32]| -> i32 {
                    columns.iter().zip(trits).map(|(&c, t)| i32::from(a[c]) * t).sum()
                };
                for n in 0..96 * 5 {
                    let (block, at, lane) = (n / packing.block(), n % packing.block(), n % 4);
                    if packing == Packing::Pairs && at % 2 == 0 {
                        let line = PAIR_LINES * block + 2 * (at / 2 % 2);
                        for i in 0..9 {
                            let expected = sum(&[n, n + 1], &[i / 3 - 1, i % 3 - 1]);
                            assert_eq!(entry(line, 16 * (at / 4) + i as usize), expected, "{isa}, pair at {n}");
                        }
                    } else if packing == Packing::Triples && at % 12 < 4 {
                        let line = TRIPLE_LINES * block + 2 * (at / 12);
                        for i in 0..14 {
                            let u = i + 13;
                            let expected = sum(&[n, n + 4, n + 8], &[u / 9 - 1, u / 3 % 3 - 1, u % 3 - 1]);
                            assert_eq!(entry(line, 16 * lane + i as usize), expected, "{isa}, triple at {n}");
                        }
                    }
                }
            }
        }
    }
}
