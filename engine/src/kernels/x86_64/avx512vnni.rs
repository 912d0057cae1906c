//! AVX-512 with VNNI: sixteen rows are one register, four products and their sum one instruction.

use std::arch::x86_64::*;

use crate::kernels::attention::FloatLanes;
use crate::kernels::lookup::LookupLanes;
use crate::kernels::ternary_tile::{BLOCK_BYTES, DotLanes, Line, ROWS};
use crate::kernels::{Isa, kernel_table};
use crate::ternary::interleaved::Packing;

// Two groups by twelve tokens: 24 registers of sums, 2 of codes, the rest for activations on their way.
kernel_table!(Isa::Avx512Vnni, Avx512Vnni, Packing::BaseThree, panel: (2, 12), heads: (4, 4), "avx512f,avx512bw,avx512vl,avx512vnni,avx2");

/// One register.
struct Avx512Vnni;

// SAFETY (of every block below): the methods are inlined into entries compiled for these features, which run after the CPU was
// found to have them (`Kernels::of`); loads and stores stay inside the fixed-size arrays that the references point to, and a
// prefetch may name any address.
impl DotLanes for Avx512Vnni {
    type Codes = __m512i;
    type Dword = __m512i;
    type Partial = __m512i;
    type Words = __m512i;
    type Sums = __m512i;
    // A step adds at most 4 * 2 * 128: two million steps fit.
    const RUN: usize = 1 << 20;
    const RUN_4BIT: usize = 1 << 17;
    const CHAINS: usize = 4;
    const PARTIALS: usize = 4;

    #[inline(always)]
    fn zero() -> Self::Partial {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn unpack(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 4] {
        unsafe {
            let mask = _mm512_set1_epi8(3);
            let v = _mm512_loadu_si512(block.as_ptr().cast());
            [
                _mm512_and_si512(v, mask),
                _mm512_and_si512(_mm512_srli_epi16::<2>(v), mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask),
                _mm512_and_si512(_mm512_srli_epi16::<6>(v), mask),
            ]
        }
    }

    #[inline(always)]
    fn unpack_4bit(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 2] {
        unsafe {
            let mask = _mm512_set1_epi8(15);
            let v = _mm512_loadu_si512(block.as_ptr().cast());
            [_mm512_and_si512(v, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(v), mask)]
        }
    }

    #[inline(always)]
    fn load(line: &Line) -> Self::Codes {
        unsafe { _mm512_load_si512(line.0.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store(codes: Self::Codes, line: &mut Line) {
        unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), codes) }
    }

    #[inline(always)]
    fn broadcast(dword: i32) -> Self::Dword {
        unsafe { _mm512_set1_epi32(dword) }
    }

    #[inline(always)]
    fn mac(partial: Self::Partial, codes: Self::Codes, activations: Self::Dword) -> Self::Partial {
        unsafe { _mm512_dpbusd_epi32(partial, codes, activations) }
    }

    #[inline(always)]
    fn fold(partial: Self::Partial, sums: &mut [i32; ROWS]) {
        unsafe {
            let sum = _mm512_loadu_si512(sums.as_ptr().cast());
            _mm512_storeu_si512(sums.as_mut_ptr().cast(), _mm512_add_epi32(sum, partial));
        }
    }

    #[inline(always)]
    fn words(block: &[u8; BLOCK_BYTES]) -> Self::Words {
        unsafe { _mm512_loadu_si512(block.as_ptr().cast()) }
    }

    #[inline(always)]
    fn upper_product(words: Self::Words, factor: u16) -> Self::Words {
        unsafe { _mm512_mulhi_epu16(words, _mm512_set1_epi16(factor as i16)) }
    }

    #[inline(always)]
    fn lower_product(words: Self::Words, factor: u16) -> Self::Words {
        unsafe { _mm512_mullo_epi16(words, _mm512_set1_epi16(factor as i16)) }
    }

    #[inline(always)]
    fn minus_thrice(a: Self::Words, b: Self::Words) -> Self::Words {
        unsafe { _mm512_sub_epi16(a, _mm512_add_epi16(b, _mm512_add_epi16(b, b))) }
    }

    #[inline(always)]
    fn interleave(even: Self::Words, odd: Self::Words) -> Self::Codes {
        unsafe { _mm512_or_si512(even, _mm512_slli_epi16::<8>(odd)) }
    }

    #[inline(always)]
    fn zero_sums() -> Self::Sums {
        Self::zero()
    }

    #[inline(always)]
    fn mac_words(sums: Self::Sums, words: Self::Words, pair: Self::Dword) -> Self::Sums {
        unsafe { _mm512_dpwssd_epi32(sums, words, pair) }
    }

    #[inline(always)]
    fn fold_sums(more: Self::Sums, sums: &mut [i32; ROWS]) {
        Self::fold(more, sums)
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}

// SAFETY (of every block below): as above.
impl LookupLanes for Avx512Vnni {
    type Bytes = __m512i;
    type Mask = __mmask64;
    const PARTS: usize = 1;
    const GROUPS: usize = 4;

    #[inline(always)]
    fn no_bytes() -> Self::Bytes {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn load_bytes(block: &[u8; BLOCK_BYTES], _: usize) -> Self::Bytes {
        unsafe { _mm512_loadu_si512(block.as_ptr().cast()) }
    }

    #[inline(always)]
    fn store_bytes(bytes: Self::Bytes, line: &mut Line) {
        unsafe { _mm512_store_si512(line.0.as_mut_ptr().cast(), bytes) }
    }

    #[inline(always)]
    fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { _mm512_and_si512(bytes, _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), _mm512_set1_epi8(15)) }
    }

    #[inline(always)]
    fn lookup(table: Self::Bytes, indices: Self::Bytes) -> Self::Bytes {
        unsafe { _mm512_shuffle_epi8(table, indices) }
    }

    #[inline(always)]
    fn having(bytes: Self::Bytes, bit: u8) -> Self::Mask {
        unsafe { _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(bit as i8)) }
    }

    #[inline(always)]
    fn complement(bytes: Self::Bytes, mask: Self::Mask) -> Self::Bytes {
        unsafe { _mm512_mask_sub_epi8(bytes, mask, _mm512_set1_epi8(-1), bytes) }
    }

    #[inline(always)]
    fn add([all, odd, high]: [Self::Bytes; 3], low: Self::Bytes, more: Self::Bytes) -> [Self::Bytes; 3] {
        unsafe {
            [
                _mm512_add_epi16(all, low),
                _mm512_add_epi16(odd, _mm512_srli_epi16::<8>(low)),
                _mm512_add_epi8(high, more),
            ]
        }
    }
}

// SAFETY: as above.
impl FloatLanes for Avx512Vnni {
    type Floats = __m512;

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self::Floats {
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn load_f16(x: &[u16; 16]) -> Self::Floats {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn load_i8(x: &[i8; 16]) -> Self::Floats {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn store(v: Self::Floats, out: &mut [f32; 16]) {
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) }
    }

    #[inline(always)]
    fn prefetch_line(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    fn add_product(sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        unsafe { _mm512_add_ps(sum, _mm512_mul_ps(a, b)) }
    }
}
