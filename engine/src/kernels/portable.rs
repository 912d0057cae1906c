//! The portable path: plain Rust, the definition that every other path is held to.

use super::attention::FloatLanes;
use super::kv_page::KvNumber;
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
