//! The portable path: plain Rust, the definition that every other path is held to.

use super::ternary_tile::{BLOCK, BLOCK_BYTES, DotLanes, ROWS};
use super::{Isa, kernel_table};

kernel_table!(Isa::Portable, Portable);

/// Sixteen lanes as an array.
struct Portable;

impl DotLanes for Portable {
    const TILE: usize = 4;
    type Planes = [[u8; BLOCK_BYTES]; 4];
    type Sums = [i32; ROWS];

    #[inline(always)]
    fn zero() -> Self::Sums {
        [0; ROWS]
    }

    #[inline(always)]
    fn unpack(block: &[u8; BLOCK_BYTES]) -> Self::Planes {
        std::array::from_fn(|p| block.map(|byte| (byte >> (2 * p)) & 3))
    }

    #[inline(always)]
    fn dot(mut sums: Self::Sums, planes: &Self::Planes, activations: &[i8; BLOCK]) -> Self::Sums {
        for (plane, a) in planes.iter().zip(activations.as_chunks::<4>().0) {
            for (row, sum) in sums.iter_mut().enumerate() {
                let codes = &plane[4 * row..4 * row + 4];
                *sum += (0..4).map(|j| i32::from(codes[j]) * i32::from(a[j])).sum::<i32>();
            }
        }
        sums
    }

    #[inline(always)]
    fn store(sums: Self::Sums, out: &mut [i32; ROWS]) {
        *out = sums;
    }
}
