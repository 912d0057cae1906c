//! Every kernel at the edges: all tails and offsets in memory, every slice between canaries and forbidden pages, against plain
//! definitions. The tests beside the kernels draw their shapes by chance; these go through all that are near a multiple of something.

mod attention;
mod float;
mod ternary;

/// Lengths around every vector, block and page: all up to forty, then the multiples of 16 with their neighbours.
fn lengths() -> impl Iterator<Item = usize> {
    (1..=40).chain([48, 64, 80, 96, 128, 192, 256].into_iter().flat_map(|n| n - 1..=n + 1))
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Numbers in -4 .. 4, which differ from their neighbours.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| (i as u64 + ((seed as u64) << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    (0..count).map(|i| number(i) as f32 / (1 << 21) as f32 - 4.0).collect()
}
