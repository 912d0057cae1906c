//! NEON as every AArch64 processor has it: sixteen rows are four registers. Products are summed in 16 bits for as long as that is exact.

// From Rust 1.87 on most of these intrinsics are safe to call where NEON is the baseline.
#![allow(unused_unsafe)]
#![allow(clippy::needless_range_loop)] // Registers are counted, several arrays at once.

use std::arch::aarch64::*;
use std::arch::asm;

use crate::kernels::attention::FloatLanes;
use crate::kernels::lookup::LookupLanes;
use crate::kernels::ternary_tile::{BLOCK_BYTES, DotLanes, Line, ROWS};
use crate::kernels::{Isa, kernel_table};
use crate::ternary::interleaved::Packing;

// Two bits, by count: 0.24 vector instructions a weight against 0.67 in base three, since an upper half of a 16-bit product is two
// widening products and an unzip here. Two pipes at 3 GHz would then read 2 GB/s: it is not bytes that such a core waits for.
// One group by three tokens: 24 registers of sums, 4 of codes, the rest for activations.
kernel_table!(Isa::Neon, Neon, Packing::TwoBits, panel: (1, 3), heads: (4, 1), "neon");

/// Four registers.
pub(super) struct Neon;

// SAFETY (of every block below): the methods are inlined into entries compiled for NEON, which run after the CPU was found to have
// it (`Kernels::of`); loads and stores stay inside the fixed-size arrays that the references point to, and a prefetch may name any
// address.
impl DotLanes for Neon {
    type Codes = [uint8x16_t; 4];
    type Dword = int32x4_t;
    /// 16-bit sums of one column each.
    type Partial = [int16x8_t; 8];
    type Words = [uint16x8_t; 4];
    /// Sums of one word each, two neighbours a row.
    type Sums = [int32x4_t; 8];
    // A step adds at most 2 * 128 = 256 to a 16-bit sum: 127 fit, and 120 are whole blocks in either packing.
    const RUN: usize = 120;
    // At most 15 * 128 = 1920: 17 fit.
    const RUN_4BIT: usize = 16;
    const CHAINS: usize = 1;
    const PARTIALS: usize = 2;

    #[inline(always)]
    fn zero() -> Self::Partial {
        unsafe { [vdupq_n_s16(0); 8] }
    }

    #[inline(always)]
    fn unpack(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 4] {
        unsafe {
            let mask = vdupq_n_u8(3);
            let v = load_bytes(block);
            let mut planes = [v; 4];
            for i in 0..4 {
                planes[0][i] = vandq_u8(v[i], mask);
                planes[1][i] = vandq_u8(vshrq_n_u8::<2>(v[i]), mask);
                planes[2][i] = vandq_u8(vshrq_n_u8::<4>(v[i]), mask);
                planes[3][i] = vshrq_n_u8::<6>(v[i]);
            }
            planes
        }
    }

    #[inline(always)]
    fn unpack_4bit(block: &[u8; BLOCK_BYTES]) -> [Self::Codes; 2] {
        unsafe {
            let mask = vdupq_n_u8(15);
            let v = load_bytes(block);
            let mut halves = [v; 2];
            for i in 0..4 {
                halves[0][i] = vandq_u8(v[i], mask);
                halves[1][i] = vshrq_n_u8::<4>(v[i]);
            }
            halves
        }
    }

    #[inline(always)]
    fn load(line: &Line) -> Self::Codes {
        load_bytes(&line.0)
    }

    #[inline(always)]
    fn store(codes: Self::Codes, line: &mut Line) {
        unsafe {
            for i in 0..4 {
                vst1q_u8(line.0.as_mut_ptr().add(16 * i), codes[i]);
            }
        }
    }

    #[inline(always)]
    fn broadcast(dword: i32) -> Self::Dword {
        unsafe { vdupq_n_s32(dword) }
    }

    #[inline(always)]
    fn mac(mut partial: Self::Partial, codes: Self::Codes, activations: Self::Dword) -> Self::Partial {
        unsafe {
            let activations = vreinterpretq_s8_s32(activations);
            for i in 0..4 {
                // Codes are below 128: they are the same bytes with a sign.
                let codes = vreinterpretq_s8_u8(codes[i]);
                partial[2 * i] = vmlal_s8(partial[2 * i], vget_low_s8(codes), vget_low_s8(activations));
                partial[2 * i + 1] = add_upper_products(partial[2 * i + 1], codes, activations);
            }
            partial
        }
    }

    #[inline(always)]
    fn fold(partial: Self::Partial, sums: &mut [i32; ROWS]) {
        unsafe {
            for i in 0..4 {
                let four = vpaddq_s32(vpaddlq_s16(partial[2 * i]), vpaddlq_s16(partial[2 * i + 1]));
                let place = sums.as_mut_ptr().add(4 * i);
                vst1q_s32(place, vaddq_s32(vld1q_s32(place), four));
            }
        }
    }

    #[inline(always)]
    fn words(block: &[u8; BLOCK_BYTES]) -> Self::Words {
        unsafe {
            let v = load_bytes(block);
            let mut words = [vdupq_n_u16(0); 4];
            for i in 0..4 {
                words[i] = vreinterpretq_u16_u8(v[i]);
            }
            words
        }
    }

    #[inline(always)]
    fn upper_product(mut words: Self::Words, factor: u16) -> Self::Words {
        unsafe {
            for i in 0..4 {
                let low = vreinterpretq_u16_u32(vmull_n_u16(vget_low_u16(words[i]), factor));
                let high = vreinterpretq_u16_u32(vmull_high_n_u16(words[i], factor));
                words[i] = vuzp2q_u16(low, high);
            }
            words
        }
    }

    #[inline(always)]
    fn lower_product(mut words: Self::Words, factor: u16) -> Self::Words {
        unsafe {
            for i in 0..4 {
                words[i] = vmulq_n_u16(words[i], factor);
            }
            words
        }
    }

    #[inline(always)]
    fn minus_thrice(mut a: Self::Words, b: Self::Words) -> Self::Words {
        unsafe {
            for i in 0..4 {
                a[i] = vmlsq_n_u16(a[i], b[i], 3);
            }
            a
        }
    }

    #[inline(always)]
    fn interleave(even: Self::Words, odd: Self::Words) -> Self::Codes {
        unsafe {
            let mut codes = [vdupq_n_u8(0); 4];
            for i in 0..4 {
                codes[i] = vreinterpretq_u8_u16(vsliq_n_u16::<8>(even[i], odd[i]));
            }
            codes
        }
    }

    #[inline(always)]
    fn zero_sums() -> Self::Sums {
        unsafe { [vdupq_n_s32(0); 8] }
    }

    #[inline(always)]
    fn mac_words(mut sums: Self::Sums, words: Self::Words, pair: Self::Dword) -> Self::Sums {
        unsafe {
            let pair = vreinterpretq_s16_s32(pair);
            for i in 0..4 {
                // Prefixes are below 3^5.
                let words = vreinterpretq_s16_u16(words[i]);
                sums[2 * i] = vmlal_s16(sums[2 * i], vget_low_s16(words), vget_low_s16(pair));
                sums[2 * i + 1] = vmlal_high_s16(sums[2 * i + 1], words, pair);
            }
            sums
        }
    }

    #[inline(always)]
    fn fold_sums(more: Self::Sums, sums: &mut [i32; ROWS]) {
        unsafe {
            for i in 0..4 {
                let place = sums.as_mut_ptr().add(4 * i);
                vst1q_s32(place, vaddq_s32(vld1q_s32(place), vpaddq_s32(more[2 * i], more[2 * i + 1])));
            }
        }
    }

    #[inline(always)]
    fn prefetch(address: *const u8) {
        // The intrinsic is not stable. A hint, which reads nothing as far as the compiler is concerned.
        #[allow(clippy::pointers_in_nomem_asm_block)]
        unsafe {
            asm!("prfm pldl1keep, [{}]", in(reg) address, options(nomem, nostack, preserves_flags))
        }
    }
}

/// `vmlal_high_s8`. Of the intrinsic, whose activations are a dword four times, the compiler makes a `smlal` of lower halves and one
/// more instruction to fetch the codes down.
#[inline(always)]
fn add_upper_products(mut sums: int16x8_t, codes: int8x16_t, activations: int8x16_t) -> int16x8_t {
    // SAFETY: as above; the instruction reads and writes the named registers only.
    unsafe {
        asm!(
            "smlal2 {sums:v}.8h, {codes:v}.16b, {activations:v}.16b",
            sums = inout(vreg) sums,
            codes = in(vreg) codes,
            activations = in(vreg) activations,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sums
}

/// A block in four registers.
#[inline(always)]
fn load_bytes(block: &[u8; BLOCK_BYTES]) -> [uint8x16_t; 4] {
    // SAFETY: as above.
    unsafe {
        let mut v = [vdupq_n_u8(0); 4];
        for i in 0..4 {
            v[i] = vld1q_u8(block.as_ptr().add(16 * i));
        }
        v
    }
}

// SAFETY (of every block below): as above; `part` is below `PARTS`, so that a load stays inside the block.
impl LookupLanes for Neon {
    type Bytes = uint8x16_t;
    type Mask = uint8x16_t;
    const PARTS: usize = 4;
    const GROUPS: usize = 4;

    #[inline(always)]
    fn no_bytes() -> Self::Bytes {
        unsafe { vdupq_n_u8(0) }
    }

    #[inline(always)]
    fn load_bytes(block: &[u8; BLOCK_BYTES], part: usize) -> Self::Bytes {
        debug_assert!(part < Self::PARTS);
        unsafe { vld1q_u8(block.as_ptr().add(16 * part)) }
    }

    #[inline(always)]
    fn store_bytes(bytes: Self::Bytes, line: &mut Line) {
        unsafe { vst1q_u8(line.0.as_mut_ptr(), bytes) }
    }

    #[inline(always)]
    fn low_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { vandq_u8(bytes, vdupq_n_u8(15)) }
    }

    #[inline(always)]
    fn high_nibbles(bytes: Self::Bytes) -> Self::Bytes {
        unsafe { vshrq_n_u8::<4>(bytes) }
    }

    #[inline(always)]
    fn lookup(table: Self::Bytes, indices: Self::Bytes) -> Self::Bytes {
        unsafe { vqtbl1q_u8(table, indices) }
    }

    #[inline(always)]
    fn having(bytes: Self::Bytes, bit: u8) -> Self::Mask {
        unsafe { vtstq_u8(bytes, vdupq_n_u8(bit)) }
    }

    #[inline(always)]
    fn complement(bytes: Self::Bytes, mask: Self::Mask) -> Self::Bytes {
        unsafe { veorq_u8(bytes, mask) }
    }

    #[inline(always)]
    fn add([all, odd, high]: [Self::Bytes; 3], low: Self::Bytes, more: Self::Bytes) -> [Self::Bytes; 3] {
        unsafe {
            let words = vreinterpretq_u16_u8(low);
            [
                vreinterpretq_u8_u16(vaddq_u16(vreinterpretq_u16_u8(all), words)),
                vreinterpretq_u8_u16(vsraq_n_u16::<8>(vreinterpretq_u16_u8(odd), words)),
                vaddq_u8(high, more),
            ]
        }
    }
}

// SAFETY: as above.
impl FloatLanes for Neon {
    type Floats = [float32x4_t; 4];

    #[inline(always)]
    fn splat(x: f32) -> Self::Floats {
        unsafe { [vdupq_n_f32(x); 4] }
    }

    #[inline(always)]
    fn load(x: &[f32; 16]) -> Self::Floats {
        unsafe {
            let mut v = [vdupq_n_f32(0.0); 4];
            for i in 0..4 {
                v[i] = vld1q_f32(x.as_ptr().add(4 * i));
            }
            v
        }
    }

    #[inline(always)]
    fn load_f16(x: &[u16; 16]) -> Self::Floats {
        unsafe {
            // As `KvNumber::widen` for u16: the conversion of half precision is no stable intrinsic.
            let to_2_112 = vdupq_n_f32(f32::from_bits((127 + 112) << 23));
            let mut v = [vdupq_n_f32(0.0); 4];
            for i in 0..4 {
                let bits = vmovl_u16(vld1_u16(x.as_ptr().add(4 * i)));
                let magnitude = vshlq_n_u32::<13>(vandq_u32(bits, vdupq_n_u32(0x7fff)));
                let magnitude = vreinterpretq_u32_f32(vmulq_f32(vreinterpretq_f32_u32(magnitude), to_2_112));
                let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
                v[i] = vreinterpretq_f32_u32(vorrq_u32(magnitude, sign));
            }
            v
        }
    }

    #[inline(always)]
    fn load_i8(x: &[i8; 16]) -> Self::Floats {
        unsafe {
            let bytes = vld1q_s8(x.as_ptr());
            let halves = [vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes))];
            [
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[0]))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(halves[0]))),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(halves[1]))),
                vcvtq_f32_s32(vmovl_s16(vget_high_s16(halves[1]))),
            ]
        }
    }

    #[inline(always)]
    fn store(v: Self::Floats, out: &mut [f32; 16]) {
        unsafe {
            for i in 0..4 {
                vst1q_f32(out.as_mut_ptr().add(4 * i), v[i]);
            }
        }
    }

    #[inline(always)]
    fn prefetch_line(address: *const u8) {
        <Self as DotLanes>::prefetch(address)
    }

    #[inline(always)]
    fn add_product(mut sum: Self::Floats, a: Self::Floats, b: Self::Floats) -> Self::Floats {
        unsafe {
            for i in 0..4 {
                // Not `vfmaq_f32`: it rounds once, all other paths twice.
                sum[i] = vaddq_f32(sum[i], vmulq_f32(a[i], b[i]));
            }
            sum
        }
    }
}
