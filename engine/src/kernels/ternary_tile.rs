//! The ternary dot product, once for all instruction sets: sixteen rows of weights against the int8 activations of a few tokens, the
//! weights unpacked in registers. [`super::ternary_panel`] is for many tokens.
//!
//! The layouts of a row group are those of [`crate::ternary::interleaved`].

#![allow(clippy::needless_range_loop)] // Registers, tokens and groups are counted, several arrays at once.

use super::chunks::as_chunks;
use super::ternary_matmul::Product;
use crate::ternary::interleaved::Packing;

/// Rows that are interleaved in one group.
pub(crate) const ROWS: usize = 16;
/// Bytes of one block of a group.
pub(crate) const BLOCK_BYTES: usize = 64;
/// Columns of one plane: what one broadcast dword of activations meets.
pub(crate) const PLANE: usize = 4;

/// Codes of sixteen rows and four columns, a byte each, as a kernel reads them.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; BLOCK_BYTES]);

/// Sixteen int32 lanes of an instruction set.
///
/// Every method is `#[inline(always)]` and becomes part of an entry compiled with the right target features.
pub(crate) trait DotLanes {
    /// Codes (0, 1, 2; of 4 bits up to 15) of sixteen rows and four columns, a byte each.
    type Codes: Copy;
    /// Four activations, once for every row.
    type Dword: Copy;
    /// Running sums, possibly narrower than 32 bits.
    type Partial: Copy;
    /// Sixteen pairs of 16-bit words.
    type Words: Copy;
    /// Sixteen int32 sums.
    type Sums: Copy;
    /// Steps of [`Self::mac`] that a [`Self::Partial`] holds without overflow.
    const RUN: usize;
    /// The same for codes of 4 bits.
    const RUN_4BIT: usize;
    /// Independent sums that hide the latency of [`Self::mac`]: 1, 2 or 4.
    const CHAINS: usize;
    /// Partial sums that the registers hold beside the codes: 2 or 4.
    const PARTIALS: usize;

    /// Zeroes.
    fn zero() -> Self::Partial;
    /// Unpacks one block into its planes.
    fn unpack(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 4];
    /// Unpacks a block of 4-bit codes: the lower halves, then the upper ones.
    fn unpack_4bit(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 2];
    /// Reads an unpacked plane.
    fn load(line: &Line) -> Self::Codes;
    /// Writes an unpacked plane.
    fn store(codes: Self::Codes, line: &mut Line);
    /// Four activations for every row.
    fn broadcast(dword: i32) -> Self::Dword;
    /// Adds the products of four columns.
    fn mac(partial: Self::Partial, codes: Self::Codes, activations: Self::Dword) -> Self::Partial;
    /// Adds the running sums to `sums`.
    fn fold(partial: Self::Partial, sums: &mut [i32; ROWS]);

    /// The words of a block.
    fn words(block: &[u8; BLOCK_BYTES]) -> Self::Words;
    /// The upper halves of the words' products with `factor`.
    fn upper_product(words: Self::Words, factor: u16) -> Self::Words;
    /// The lower halves of the words' products with `factor`.
    fn lower_product(words: Self::Words, factor: u16) -> Self::Words;
    /// `a - 3 b` in words.
    fn minus_thrice(a: Self::Words, b: Self::Words) -> Self::Words;
    /// Words below 256 as the even and the odd bytes of codes.
    fn interleave(even: Self::Words, odd: Self::Words) -> Self::Codes;
    /// Zeroes.
    fn zero_sums() -> Self::Sums;
    /// Adds, in every lane, the products of its two words with the two of `pair`.
    fn mac_words(sums: Self::Sums, words: Self::Words, pair: Self::Dword) -> Self::Sums;
    /// Adds `more` to `sums`.
    fn fold_sums(more: Self::Sums, sums: &mut [i32; ROWS]);

    /// Asks for the memory that is read soon. The address need not be valid.
    fn prefetch(address: *const u8);
}

/// How far ahead of the block in use weights are asked for: a page, since the hardware's own prefetch ends there.
const AHEAD: usize = 4096;

/// Row group `group` of `product` for all its tokens.
#[inline(always)]
pub(super) fn stream<L: DotLanes>(product: &Product<'_>, group: usize) {
    let mut token = 0;
    while token < product.tokens() {
        token += match (product.weights.packing(), (product.tokens() - token).min(L::PARTIALS)) {
            (Packing::TwoBits, 4..) => tokens_at_once::<L, 4>(product, group, token),
            (Packing::TwoBits, 2..) => tokens_at_once::<L, 2>(product, group, token),
            (Packing::TwoBits, _) => tokens_at_once::<L, 1>(product, group, token),
            // Tables have a loop of their own: [`super::lookup`].
            (Packing::Pairs | Packing::Triples, left) => left.max(1),
            (Packing::BaseThree, 4..) => tokens_by_prefixes::<L, 4>(product, group, token),
            (Packing::BaseThree, 2..) => tokens_by_prefixes::<L, 2>(product, group, token),
            (Packing::BaseThree, _) => tokens_by_prefixes::<L, 1>(product, group, token),
        };
    }
}

/// `N` tokens against one group of two-bit codes, the sums in registers. Gives `N`.
#[inline(always)]
fn tokens_at_once<L: DotLanes, const N: usize>(product: &Product<'_>, group: usize, token: usize) -> usize {
    let (blocks, _) = as_chunks::<BLOCK_BYTES, _>(product.weights.group(group));
    let rows: [&[[i32; 4]]; N] = std::array::from_fn(|n| as_chunks(product.activations.row(token + n)).0);
    let mut sums = [[0i32; ROWS]; N];
    let mut done = 0;
    for run in blocks.chunks((L::RUN / 4).max(1)) {
        let activations: [&[[i32; 4]]; N] = rows.map(|row| &row[done..done + run.len()]);
        let mut partial = [[L::zero(); 4]; N];
        for (b, block) in run.iter().enumerate() {
            L::prefetch(block.as_ptr().wrapping_add(AHEAD));
            let planes = L::unpack(block);
            for n in 0..N {
                for p in 0..4 {
                    let chain = p % L::CHAINS;
                    partial[n][chain] = L::mac(partial[n][chain], planes[p], L::broadcast(activations[n][b][p]));
                }
            }
        }
        for n in 0..N {
            for chain in 0..L::CHAINS {
                L::fold(partial[n][chain], &mut sums[n]);
            }
        }
        done += run.len();
    }
    for n in 0..N {
        product.finish(token + n, group, [&sums[n]]);
    }
    N
}

/// `N` tokens against one group in base three, by the prefixes of its words. Gives `N`.
#[inline(always)]
fn tokens_by_prefixes<L: DotLanes, const N: usize>(product: &Product<'_>, group: usize, token: usize) -> usize {
    let (blocks, _) = as_chunks::<BLOCK_BYTES, _>(product.weights.group(group));
    let rows: [&[[i32; 10]]; N] = std::array::from_fn(|n| as_chunks(product.activations.row(token + n)).0);
    let mut sums = [[0i32; ROWS]; N];
    let mut done = 0;
    // A prefix is at most 3^j - 1 and its factor at most 127 + 3 * 128: less than 2^20 a block.
    for run in blocks.chunks(2048) {
        let pairs: [&[[i32; 10]]; N] = rows.map(|row| &row[done..done + run.len()]);
        let mut partial = [[L::zero_sums(); 5]; N];
        for (b, block) in run.iter().enumerate() {
            L::prefetch(block.as_ptr().wrapping_add(AHEAD));
            let mut words = L::words(block);
            for half in 0..2 {
                for (j, factor) in [3, 9, 27, 81, 243].into_iter().enumerate() {
                    let prefixes = L::upper_product(words, factor);
                    for n in 0..N {
                        // Five chains for one or two tokens; for more a token's own sums hide the latency.
                        let chain = if N > 2 { 0 } else { j };
                        partial[n][chain] =
                            L::mac_words(partial[n][chain], prefixes, L::broadcast(pairs[n][b][5 * half + j]));
                    }
                }
                words = L::lower_product(words, 243);
            }
        }
        for n in 0..N {
            for partial in partial[n] {
                L::fold_sums(partial, &mut sums[n]);
            }
        }
        done += run.len();
    }
    for n in 0..N {
        product.finish(token + n, group, [&sums[n]]);
    }
    N
}

/// Unpacks a base-three block into five planes of codes.
#[inline(always)]
pub(super) fn unpack_base3<L: DotLanes>(block: &[u8; BLOCK_BYTES]) -> [L::Codes; 5] {
    let mut words = L::words(block);
    let mut codes = [words; 10];
    for half in 0..2 {
        // `c_j = p_j - 3 p_(j-1)`.
        let mut before = L::upper_product(words, 3);
        codes[5 * half] = before;
        for (j, factor) in [9, 27, 81, 243].into_iter().enumerate() {
            let prefix = L::upper_product(words, factor);
            codes[5 * half + j + 1] = L::minus_thrice(prefix, before);
            before = prefix;
        }
        words = L::lower_product(words, 243);
    }
    let mut planes = [L::interleave(codes[0], codes[1]); 5];
    for p in 1..5 {
        planes[p] = L::interleave(codes[2 * p], codes[2 * p + 1]);
    }
    planes
}
