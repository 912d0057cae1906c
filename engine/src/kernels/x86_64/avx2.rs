//! AVX2: sixteen rows are two registers of eight int32 lanes.

use std::arch::x86_64::*;

use crate::kernels::ternary_tile::{BLOCK, BLOCK_BYTES, DotLanes, ROWS};
use crate::kernels::{Isa, kernel_table};

kernel_table!(Isa::Avx2, Avx2, "avx2");

/// Two `__m256i`.
struct Avx2;

// SAFETY (of every block below): the methods are inlined into entries compiled for AVX2, which run after the CPU was found to have
// it (`Kernels::of`); loads and stores stay inside the fixed-size arrays that the references point to.
impl DotLanes for Avx2 {
    // Two tokens: 8 registers of planes, 4 of sums, the rest for the broadcast activations and the 16-bit sums.
    const TILE: usize = 2;
    type Planes = [[__m256i; 2]; 4];
    type Sums = [__m256i; 2];

    #[inline(always)]
    fn zero() -> Self::Sums {
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    fn unpack(block: &[u8; BLOCK_BYTES]) -> Self::Planes {
        unsafe {
            let mask = _mm256_set1_epi8(3);
            let half: [__m256i; 2] = std::array::from_fn(|h| _mm256_loadu_si256(block.as_ptr().add(32 * h).cast()));
            [
                half.map(|v| _mm256_and_si256(v, mask)),
                half.map(|v| _mm256_and_si256(_mm256_srli_epi16::<2>(v), mask)),
                half.map(|v| _mm256_and_si256(_mm256_srli_epi16::<4>(v), mask)),
                half.map(|v| _mm256_and_si256(_mm256_srli_epi16::<6>(v), mask)),
            ]
        }
    }

    #[inline(always)]
    fn dot(mut sums: Self::Sums, planes: &Self::Planes, activations: &[i8; BLOCK]) -> Self::Sums {
        unsafe {
            let dwords = activations.as_ptr().cast::<i32>();
            let a: [__m256i; 4] = std::array::from_fn(|p| _mm256_set1_epi32(dwords.add(p).read_unaligned()));
            let ones = _mm256_set1_epi16(1);
            for h in 0..2 {
                // A pair of products is at most 2 * 2 * 128 = 512 in size and four of them at most 2048: no overflow in 16 bits.
                let s01 = _mm256_add_epi16(
                    _mm256_maddubs_epi16(planes[0][h], a[0]),
                    _mm256_maddubs_epi16(planes[1][h], a[1]),
                );
                let s23 = _mm256_add_epi16(
                    _mm256_maddubs_epi16(planes[2][h], a[2]),
                    _mm256_maddubs_epi16(planes[3][h], a[3]),
                );
                sums[h] = _mm256_add_epi32(sums[h], _mm256_madd_epi16(_mm256_add_epi16(s01, s23), ones));
            }
            sums
        }
    }

    #[inline(always)]
    fn store(sums: Self::Sums, out: &mut [i32; ROWS]) {
        unsafe {
            for (h, sum) in sums.into_iter().enumerate() {
                _mm256_storeu_si256(out.as_mut_ptr().add(8 * h).cast(), sum);
            }
        }
    }
}
