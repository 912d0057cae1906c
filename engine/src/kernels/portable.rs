//! The portable path: plain Rust, the definition that every other path is held to.

#![allow(clippy::needless_range_loop)] // Lanes are counted, several arrays at once.

use super::attention::FloatLanes;
use super::chunks::as_chunks;
use super::kv_page::KvNumber;
use super::lookup::LookupLanes;
use super::ternary_tile::{BLOCK_BYTES, DotLanes, Line, ROWS};
use super::{Isa, kernel_table};
use crate::ternary::interleaved::Packing;

kernel_table!(Isa::Portable, Portable, Packing::TwoBits, panel: (1, 4), heads: (2, 1));

/// Sixteen lanes as an array.
struct Portable;

impl DotLanes for Portable {
    type Codes = [u8; BLOCK_BYTES];
    type Dword = [i8; 4];
    type Partial = [i32; ROWS];
    type Words = [u16; 2 * ROWS];
    type Sums = [i32; ROWS];
    const RUN: usize = 1 << 20;
    const RUN_4BIT: usize = 1 << 17;
    const CHAINS: usize = 1;
    const PARTIALS: usize = 4;

    #[inline(always)]
    fn zero() -> Self::Partial {
        [0; ROWS]
    }

    #[inline(always)]
    fn unpack(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 4] {
        std::array::from_fn(|p| block.map(|byte| (byte >> (2 * p)) & 3))
    }

    #[inline(always)]
    fn unpack_4bit(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 2] {
        [block.map(|byte| byte & 15), block.map(|byte| byte >> 4)]
    }

    #[inline(always)]
    fn load(line: &Line) -> Self::Codes {
        line.0
    }

    #[inline(always)]
    fn store(codes: Self::Codes, line: &mut Line) {
        line.0 = codes;
    }

    #[inline(always)]
    fn broadcast(dword: i32) -> Self::Dword {
        dword.to_ne_bytes().map(|b| b as i8)
    }

    #[inline(always)]
    fn mac(mut sums: Self::Partial, codes: Self::Codes, activations: Self::Dword) -> Self::Partial {
        for (row, sum) in sums.iter_mut().enumerate() {
            *sum += (0..4).map(|j| i32::from(codes[4 * row + j]) * i32::from(activations[j])).sum::<i32>();
        }
        sums
    }

    #[inline(always)]
    fn fold(partial: Self::Partial, sums: &mut [i32; ROWS]) {
        for (sum, partial) in sums.iter_mut().zip(partial) {
            *sum += partial;
        }
    }

    #[inline(always)]
    fn words(block: &[u8; BLOCK_BYTES]) -> Self::Words {
        std::array::from_fn(|i| u16::from_le_bytes([block[2 * i], block[2 * i + 1]]))
    }

    #[inline(always)]
    fn upper_product(words: Self::Words, factor: u16) -> Self::Words {
        words.map(|w| ((u32::from(w) * u32::from(factor)) >> 16) as u16)
    }

    #[inline(always)]
    fn lower_product(words: Self::Words, factor: u16) -> Self::Words {
        words.map(|w| w.wrapping_mul(factor))
    }

    #[inline(always)]
    fn minus_thrice(a: Self::Words, b: Self::Words) -> Self::Words {
        std::array::from_fn(|i| a[i].wrapping_sub(b[i].wrapping_mul(3)))
    }

    #[inline(always)]
    fn interleave(even: Self::Words, odd: Self::Words) -> Self::Codes {
        std::array::from_fn(|i| (if i % 2 == 0 { even[i / 2] } else { odd[i / 2] }) as u8)
    }

    #[inline(always)]
    fn zero_sums() -> Self::Sums {
        [0; ROWS]
    }

    #[inline(always)]
    fn mac_words(sums: Self::Sums, words: Self::Words, pair: Self::Dword) -> Self::Sums {
        let pair = pair.map(|b| b as u8);
        let (a, b) = (i16::from_ne_bytes([pair[0], pair[1]]), i16::from_ne_bytes([pair[2], pair[3]]));
        std::array::from_fn(|l| {
            sums[l] + i32::from(words[2 * l]) * i32::from(a) + i32::from(words[2 * l + 1]) * i32::from(b)
        })
    }

    #[inline(always)]
    fn fold_sums(more: Self::Sums, sums: &mut [i32; ROWS]) {
        Self::fold(more, sums)
    }

    #[inline(always)]
    fn prefetch(_: *const u8) {}
}

impl LookupLanes for Portable {
    type Bytes = [u8; 16];
    type Mask = [u8; 16];
    const PARTS: usize = 4;
    const GROUPS: usize = 1;

    #[inline(always)]
    fn no_bytes() -> Self::Bytes {
        [0; 16]
    }

    #[inline(always)]
    fn load_bytes(block: &[u8; BLOCK_BYTES], part: usize) -> Self::Bytes {
        as_chunks(block).0[part]
    }

    #[inline(always)]
    fn store_bytes(bytes: Self::Bytes, line: &mut Line) {
        line.0[..16].copy_from_slice(&bytes);
    }

    #[inline(always)]
    fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        let mut nibbles = bytes;
        for i in 0..16 {
            nibbles[i] &= 15;
        }
        nibbles
    }

    #[inline(always)]
    fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        let mut nibbles = bytes;
        for i in 0..16 {
            nibbles[i] >>= 4;
        }
        nibbles
    }

    #[inline(always)]
    fn lookup(table: Self::Bytes, indices: Self::Bytes) -> Self::Bytes {
        let mut found = [0; 16];
        for i in 0..16 {
            found[i] = table[usize::from(indices[i] & 15)];
        }
        found
    }

    #[inline(always)]
    fn having(bytes: Self::Bytes, bit: u8) -> Self::Mask {
        let mut mask = [0; 16];
        for i in 0..16 {
            mask[i] = if bytes[i] & bit != 0 { 0xff } else { 0 };
        }
        mask
    }

    #[inline(always)]
    fn complement(bytes: Self::Bytes, mask: Self::Mask) -> Self::Bytes {
        let mut complemented = bytes;
        for i in 0..16 {
            complemented[i] ^= mask[i];
        }
        complemented
    }

    #[inline(always)]
    fn add([mut all, mut odd, mut high]: [Self::Bytes; 3], low: Self::Bytes, more: Self::Bytes) -> [Self::Bytes; 3] {
        for i in (0..16).step_by(2) {
            let word = u16::from_le_bytes([low[i], low[i + 1]]);
            let both = u16::from_le_bytes([all[i], all[i + 1]]).wrapping_add(word);
            [all[i], all[i + 1]] = both.to_le_bytes();
            let apart = u16::from_le_bytes([odd[i], odd[i + 1]]).wrapping_add(word >> 8);
            [odd[i], odd[i + 1]] = apart.to_le_bytes();
        }
        for i in 0..16 {
            high[i] = high[i].wrapping_add(more[i]);
        }
        [all, odd, high]
    }
}

impl FloatLanes for Portable {
    type Floats = [f32; 16];

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        [x; 16]
    }

    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self::Floats {
        *x
    }

    #[inline(always)]
    fn load_f16(x: &[u16; 16]) -> Self::Floats {
        x.map(KvNumber::widen)
    }

    #[inline(always)]
    fn load_i8(x: &[i8; 16]) -> Self::Floats {
        x.map(KvNumber::widen)
    }

    #[inline(always)]
    fn store(v: Self::Floats, out: &mut [f32; 16]) {
        *out = v;
    }

    #[inline(always)]
    fn prefetch_line(_: *const u8) {}

    #[inline(always)]
    fn add_product(sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        std::array::from_fn(|l| sum[l] + a[l] * b[l])
    }
}
