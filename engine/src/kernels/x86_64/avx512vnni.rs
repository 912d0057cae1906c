//! AVX-512 with VNNI: sixteen rows are one register, four products and their sum one instruction.

use std::arch::x86_64::*;

use crate::kernels::ternary_tile::{BLOCK, BLOCK_BYTES, DotLanes, ROWS};
use crate::kernels::{Isa, kernel_table};

kernel_table!(Isa::Avx512Vnni, Avx512Vnni, "avx512f,avx512bw,avx512vl,avx512vnni,avx2");

/// One `__m512i`.
struct Avx512Vnni;

// SAFETY (of every block below): the methods are inlined into entries compiled for these features, which run after the CPU was
// found to have them (`Kernels::of`); loads and stores stay inside the fixed-size arrays that the references point to.
impl DotLanes for Avx512Vnni {
    const TILE: usize = 8;
    type Planes = [__m512i; 4];
    type Sums = __m512i;

    #[inline(always)]
    fn zero() -> Self::Sums {
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    fn unpack(block: &[u8; BLOCK_BYTES]) -> Self::Planes {
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
    fn dot(mut sums: Self::Sums, planes: &Self::Planes, activations: &[i8; BLOCK]) -> Self::Sums {
        unsafe {
            let dwords = activations.as_ptr().cast::<i32>();
            for (p, plane) in planes.iter().enumerate() {
                sums = _mm512_dpbusd_epi32(sums, *plane, _mm512_set1_epi32(dwords.add(p).read_unaligned()));
            }
            sums
        }
    }

    #[inline(always)]
    fn store(sums: Self::Sums, out: &mut [i32; ROWS]) {
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sums) }
    }
}
