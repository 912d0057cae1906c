//! NEON with dot products (ARMv8.2 `dotprod`): four products and their sum are one instruction. All else is as in [`super::neon`].

// From Rust 1.87 on most of these intrinsics are safe to call where NEON is the baseline.
#![allow(unused_unsafe)]
#![allow(clippy::needless_range_loop)] // Registers are counted, several arrays at once.

use std::arch::aarch64::*;
use std::arch::asm;

use super::neon::Neon;
use crate::kernels::attention::FloatLanes;
use crate::kernels::lookup::LookupLanes;
use crate::kernels::ternary_tile::{BLOCK_BYTES, DotLanes, Line, ROWS};
use crate::kernels::{Isa, kernel_table};
use crate::ternary::interleaved::Packing;

// Two bits, as for `neon`, and the more so: 0.17 vector instructions a weight.
// One group by six tokens: 24 registers of sums, 4 of codes, the rest for activations.
kernel_table!(Isa::DotProd, DotProd, Packing::TwoBits, panel: (1, 6), heads: (4, 1), "neon,dotprod");

/// Four registers.
struct DotProd;

/// Adds to each 32-bit lane of `sum` the products of its four bytes in `a` and `b`: `vdotq_s32`, which is not stable.
///
/// # Safety
/// The CPU has `dotprod`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the instruction reads and writes the named registers only, and the caller promises that the CPU has it.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

// SAFETY (of every block below): the methods are inlined into entries compiled for these features, which run after the CPU was
// found to have them (`Kernels::of`); loads and stores stay inside the fixed-size arrays that the references point to.
impl DotLanes for DotProd {
    type Codes = <Neon as DotLanes>::Codes;
    type Dword = <Neon as DotLanes>::Dword;
    type Partial = [int32x4_t; 4];
    type Words = <Neon as DotLanes>::Words;
    type Sums = <Neon as DotLanes>::Sums;
    // A step adds at most 4 * 2 * 128: two million steps fit.
    const RUN: usize = 1 << 20;
    const RUN_4BIT: usize = 1 << 17;
    // Four registers are four chains; in the time that a block's four steps take, so many instructions unpack the next.
    const CHAINS: usize = 1;
    const PARTIALS: usize = 4;

    #[inline(always)]
    fn zero() -> Self::Partial {
        unsafe { [vdupq_n_s32(0); 4] }
    }

    #[inline(always)]
    fn mac(mut partial: Self::Partial, codes: Self::Codes, activations: Self::Dword) -> Self::Partial {
        unsafe {
            let activations = vreinterpretq_s8_s32(activations);
            for i in 0..4 {
                // Codes are below 128: they are the same bytes with a sign.
                partial[i] = sdot(partial[i], vreinterpretq_s8_u8(codes[i]), activations);
            }
            partial
        }
    }

    #[inline(always)]
    fn fold(partial: Self::Partial, sums: &mut [i32; ROWS]) {
        unsafe {
            for i in 0..4 {
                let place = sums.as_mut_ptr().add(4 * i);
                vst1q_s32(place, vaddq_s32(vld1q_s32(place), partial[i]));
            }
        }
    }

    #[inline(always)]
    fn unpack(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 4] {
        Neon::unpack(block)
    }

    #[inline(always)]
    fn unpack_4bit(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 2] {
        Neon::unpack_4bit(block)
    }

    #[inline(always)]
    fn load(line: &Line) -> Self::Codes {
        <Neon as DotLanes>::load(line)
    }

    #[inline(always)]
    fn store(codes: Self::Codes, line: &mut Line) {
        <Neon as DotLanes>::store(codes, line)
    }

    #[inline(always)]
    fn broadcast(dword: i32) -> Self::Dword {
        Neon::broadcast(dword)
    }

    #[inline(always)]
    fn words(block: &[u8; BLOCK_BYTES]) -> Self::Words {
        Neon::words(block)
    }

    #[inline(always)]
    fn upper_product(words: Self::Words, factor: u16) -> Self::Words {
        Neon::upper_product(words, factor)
    }

    #[inline(always)]
    fn lower_product(words: Self::Words, factor: u16) -> Self::Words {
        Neon::lower_product(words, factor)
    }

    #[inline(always)]
    fn minus_thrice(a: Self::Words, b: Self::Words) -> Self::Words {
        Neon::minus_thrice(a, b)
    }

    #[inline(always)]
    fn interleave(even: Self::Words, odd: Self::Words) -> Self::Codes {
        Neon::interleave(even, odd)
    }

    #[inline(always)]
    fn zero_sums() -> Self::Sums {
        Neon::zero_sums()
    }

    #[inline(always)]
    fn mac_words(sums: Self::Sums, words: Self::Words, pair: Self::Dword) -> Self::Sums {
        Neon::mac_words(sums, words, pair)
    }

    #[inline(always)]
    fn fold_sums(more: Self::Sums, sums: &mut [i32; ROWS]) {
        Neon::fold_sums(more, sums)
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        Neon::prefetch(address)
    }
}

// Looking up takes no dot products.
impl LookupLanes for DotProd {
    type Bytes = <Neon as LookupLanes>::Bytes;
    type Mask = <Neon as LookupLanes>::Mask;
    const PARTS: usize = Neon::PARTS;
    const GROUPS: usize = Neon::GROUPS;

    #[inline(always)]
    fn no_bytes() -> Self::Bytes {
        Neon::no_bytes()
    }

    #[inline(always)]
    fn load_bytes(block: &[u8; BLOCK_BYTES], part: usize) -> Self::Bytes {
        Neon::load_bytes(block, part)
    }

    #[inline(always)]
    fn store_bytes(bytes: Self::Bytes, line: &mut Line) {
        Neon::store_bytes(bytes, line)
    }

    #[inline(always)]
    fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        Neon::low_nibbles(bytes)
    }

    #[inline(always)]
    fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        Neon::high_nibbles(bytes)
    }

    #[inline(always)]
    fn lookup(table: Self::Bytes, indices: Self::Bytes) -> Self::Bytes {
        Neon::lookup(table, indices)
    }

    #[inline(always)]
    fn having(bytes: Self::Bytes, bit: u8) -> Self::Mask {
        Neon::having(bytes, bit)
    }

    #[inline(always)]
    fn complement(bytes: Self::Bytes, mask: Self::Mask) -> Self::Bytes {
        Neon::complement(bytes, mask)
    }

    #[inline(always)]
    fn add(running: [Self::Bytes; 3], low: Self::Bytes, high: Self::Bytes) -> [Self::Bytes; 3] {
        Neon::add(running, low, high)
    }
}

impl FloatLanes for DotProd {
    type Floats = <Neon as FloatLanes>::Floats;

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        Neon::splat(x)
    }

    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self::Floats {
        <Neon as FloatLanes>::load(x)
    }

    #[inline(always)]
    fn load_f16(x: &[u16; 16]) -> Self::Floats {
        Neon::load_f16(x)
    }

    #[inline(always)]
    fn load_i8(x: &[i8; 16]) -> Self::Floats {
        Neon::load_i8(x)
    }

    #[inline(always)]
    fn store(v: Self::Floats, out: &mut [f32; 16]) {
        <Neon as FloatLanes>::store(v, out)
    }

    #[inline(always)]
    fn prefetch_line(address: *const u8) {
        Neon::prefetch_line(address)
    }

    #[inline(always)]
    fn add_product(sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        Neon::add_product(sum, a, b)
    }
}
