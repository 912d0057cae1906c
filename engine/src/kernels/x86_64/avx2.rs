//! AVX2: sixteen rows are two registers. Products are summed in 16 bits for as long as that is exact.

use std::arch::x86_64::*;

use crate::kernels::attention::FloatLanes;
use crate::kernels::lookup::LookupLanes;
use crate::kernels::ternary_tile::{BLOCK_BYTES, DotLanes, Line, ROWS};
use crate::kernels::{Isa, kernel_table};
use crate::ternary::interleaved::Packing;

// One group by four tokens: 8 registers of sums, 2 of codes, the rest for activations and products on their way.
kernel_table!(Isa::Avx2, Avx2, Packing::TwoBits, panel: (1, 4), heads: (2, 2), "avx2,f16c");

/// Two registers.
struct Avx2;

// SAFETY (of every block below): the methods are inlined into entries compiled for AVX2, which run after the CPU was found to have
// it (`Kernels::of`); loads and stores stay inside the fixed-size arrays that the references point to, and a prefetch may name any
// address.
impl DotLanes for Avx2 {
    type Codes = [__m256i; 2];
    type Dword = __m256i;
    /// 16-bit sums of two columns each.
    type Partial = [__m256i; 2];
    type Words = [__m256i; 2];
    type Sums = [__m256i; 2];
    // A step adds at most 2 * 2 * 128 = 512 to a 16-bit sum: 63 fit, and 60 are whole blocks in either packing.
    const RUN: usize = 60;
    // At most 2 * 15 * 128 = 3840: 8 fit.
    const RUN_4BIT: usize = 8;
    const CHAINS: usize = 1;
    const PARTIALS: usize = 4;

    #[inline(always)]
    fn zero() -> Self::Partial {
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn unpack(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 4] {
        unsafe {
            let mask = _mm256_set1_epi8(3);
            let half = Self::words(block);
            [
                [_mm256_and_si256(half[0], mask), _mm256_and_si256(half[1], mask)],
                [
                    _mm256_and_si256(_mm256_srli_epi16::<2>(half[0]), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<2>(half[1]), mask),
                ],
                [
                    _mm256_and_si256(_mm256_srli_epi16::<4>(half[0]), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(half[1]), mask),
                ],
                [
                    _mm256_and_si256(_mm256_srli_epi16::<6>(half[0]), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<6>(half[1]), mask),
                ],
            ]
        }
    }

    #[inline(always)]
    fn unpack_4bit(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 2] {
        unsafe {
            let mask = _mm256_set1_epi8(15);
            let half = Self::words(block);
            [half.map(|v| _mm256_and_si256(v, mask)), half.map(|v| _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask))]
        }
    }

    #[inline(always)]
    fn load(line: &Line) -> Self::Codes {
        unsafe { [_mm256_load_si256(line.0.as_ptr().cast()), _mm256_load_si256(line.0.as_ptr().add(32).cast())] }
    }

    #[inline(always)]
    fn store(codes: Self::Codes, line: &mut Line) {
        unsafe {
            for (h, codes) in codes.into_iter().enumerate() {
                _mm256_store_si256(line.0.as_mut_ptr().add(32 * h).cast(), codes);
            }
        }
    }

    #[inline(always)]
    fn broadcast(dword: i32) -> Self::Dword {
        unsafe { _mm256_set1_epi32(dword) }
    }

    #[inline(always)]
    fn mac(partial: Self::Partial, codes: Self::Codes, activations: Self::Dword) -> Self::Partial {
        unsafe {
            [
                _mm256_add_epi16(partial[0], _mm256_maddubs_epi16(codes[0], activations)),
                _mm256_add_epi16(partial[1], _mm256_maddubs_epi16(codes[1], activations)),
            ]
        }
    }

    #[inline(always)]
    fn fold(partial: Self::Partial, sums: &mut [i32; ROWS]) {
        unsafe {
            for (h, partial) in partial.into_iter().enumerate() {
                let place = sums.as_mut_ptr().add(8 * h).cast();
                let sum = _mm256_madd_epi16(partial, _mm256_set1_epi16(1));
                _mm256_storeu_si256(place, _mm256_add_epi32(_mm256_loadu_si256(place), sum));
            }
        }
    }

    #[inline(always)]
    fn words(block: &[u8; BLOCK_BYTES]) -> Self::Words {
        unsafe { [_mm256_loadu_si256(block.as_ptr().cast()), _mm256_loadu_si256(block.as_ptr().add(32).cast())] }
    }

    #[inline(always)]
    fn upper_product(words: Self::Words, factor: u16) -> Self::Words {
        unsafe {
            [
                _mm256_mulhi_epu16(words[0], _mm256_set1_epi16(factor as i16)),
                _mm256_mulhi_epu16(words[1], _mm256_set1_epi16(factor as i16)),
            ]
        }
    }

    #[inline(always)]
    fn lower_product(words: Self::Words, factor: u16) -> Self::Words {
        unsafe {
            [
                _mm256_mullo_epi16(words[0], _mm256_set1_epi16(factor as i16)),
                _mm256_mullo_epi16(words[1], _mm256_set1_epi16(factor as i16)),
            ]
        }
    }

    #[inline(always)]
    fn minus_thrice(a: Self::Words, b: Self::Words) -> Self::Words {
        unsafe {
            [
                _mm256_sub_epi16(a[0], _mm256_add_epi16(b[0], _mm256_add_epi16(b[0], b[0]))),
                _mm256_sub_epi16(a[1], _mm256_add_epi16(b[1], _mm256_add_epi16(b[1], b[1]))),
            ]
        }
    }

    #[inline(always)]
    fn interleave(even: Self::Words, odd: Self::Words) -> Self::Codes {
        unsafe {
            [
                _mm256_or_si256(even[0], _mm256_slli_epi16::<8>(odd[0])),
                _mm256_or_si256(even[1], _mm256_slli_epi16::<8>(odd[1])),
            ]
        }
    }

    #[inline(always)]
    fn zero_sums() -> Self::Sums {
        Self::zero()
    }

    #[inline(always)]
    fn mac_words(sums: Self::Sums, words: Self::Words, pair: Self::Dword) -> Self::Sums {
        unsafe {
            [
                _mm256_add_epi32(sums[0], _mm256_madd_epi16(words[0], pair)),
                _mm256_add_epi32(sums[1], _mm256_madd_epi16(words[1], pair)),
            ]
        }
    }

    #[inline(always)]
    fn fold_sums(more: Self::Sums, sums: &mut [i32; ROWS]) {
        unsafe {
            for (h, more) in more.into_iter().enumerate() {
                let place = sums.as_mut_ptr().add(8 * h).cast();
                _mm256_storeu_si256(place, _mm256_add_epi32(_mm256_loadu_si256(place), more));
            }
        }
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }
}

// SAFETY (of every block below): as above; `part` is below `PARTS`, so that a load stays inside the block.
impl LookupLanes for Avx2 {
    type Bytes = __m256i;
    type Mask = __m256i;
    const PARTS: usize = 2;
    const GROUPS: usize = 2;

    #[inline(always)]
    fn no_bytes() -> Self::Bytes {
        unsafe { _mm256_setzero_si256() }
    }

    #[inline(always)]
    fn load_bytes(block: &[u8; BLOCK_BYTES], part: usize) -> Self::Bytes {
        debug_assert!(part < Self::PARTS);
        unsafe { _mm256_loadu_si256(block.as_ptr().add(32 * part).cast()) }
    }

    #[inline(always)]
    fn store_bytes(bytes: Self::Bytes, line: &mut Line) {
        unsafe { _mm256_store_si256(line.0.as_mut_ptr().cast(), bytes) }
    }

    #[inline(always)]
    fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { _mm256_and_si256(bytes, _mm256_set1_epi8(15)) }
    }

    #[inline(always)]
    fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), _mm256_set1_epi8(15)) }
    }

    #[inline(always)]
    fn lookup(table: Self::Bytes, indices: Self::Bytes) -> Self::Bytes {
        unsafe { _mm256_shuffle_epi8(table, indices) }
    }

    #[inline(always)]
    fn having(bytes: Self::Bytes, bit: u8) -> Self::Mask {
        unsafe {
            let bit = _mm256_set1_epi8(bit as i8);
            _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit)
        }
    }

    #[inline(always)]
    fn complement(bytes: Self::Bytes, mask: Self::Mask) -> Self::Bytes {
        unsafe { _mm256_xor_si256(bytes, mask) }
    }

    #[inline(always)]
    fn add([all, odd, high]: [Self::Bytes; 3], low: Self::Bytes, more: Self::Bytes) -> [Self::Bytes; 3] {
        unsafe {
            [
                _mm256_add_epi16(all, low),
                _mm256_add_epi16(odd, _mm256_srli_epi16::<8>(low)),
                _mm256_add_epi8(high, more),
            ]
        }
    }
}

// SAFETY: as above.
impl FloatLanes for Avx2 {
    type Floats = [__m256; 2];

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        unsafe { [_mm256_set1_ps(x); 2] }
    }

    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self::Floats {
        unsafe { [_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))] }
    }

    #[inline(always)]
    fn load_f16(x: &[u16; 16]) -> Self::Floats {
        unsafe {
            let halves: *const __m128i = x.as_ptr().cast();
            [_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves.add(1)))]
        }
    }

    #[inline(always)]
    fn load_i8(x: &[i8; 16]) -> Self::Floats {
        unsafe {
            let x = _mm_loadu_si128(x.as_ptr().cast());
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(x))),
            ]
        }
    }

    #[inline(always)]
    fn store(v: Self::Floats, out: &mut [f32; 16]) {
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), v[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), v[1]);
        }
    }

    #[inline(always)]
    fn prefetch_line(address: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
    }

    #[inline(always)]
    fn add_product(sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        unsafe { [_mm256_add_ps(sum[0], _mm256_mul_ps(a[0], b[0])), _mm256_add_ps(sum[1], _mm256_mul_ps(a[1], b[1]))] }
    }
}
