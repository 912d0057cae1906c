//! The ternary dot product, once for all instruction sets: sixteen rows of weights against some tokens' int8 activations.
//!
//! Layout of a row group (see [`crate::ternary::interleaved`]): 64 bytes for every 16 columns; byte `4 * row + j` holds in bits
//! `2p, 2p + 1` the code (trit + 1) of column `4p + j`. So one 32-bit lane is one row, four columns a plane, and an instruction that
//! multiplies unsigned by signed bytes and adds four neighbours needs the activations as one broadcast dword and no shuffle.

/// Rows that are interleaved in one group.
pub(crate) const ROWS: usize = 16;
/// Columns of one 64-byte block.
pub(crate) const BLOCK: usize = 16;
/// Bytes of one block of a group.
pub(crate) const BLOCK_BYTES: usize = 64;
/// Most tokens in one register tile, for any instruction set.
const MAX_TILE: usize = 8;

/// Sixteen int32 lanes of an instruction set.
///
/// Every method is `#[inline(always)]` and becomes part of an entry compiled with the right target features.
pub(crate) trait DotLanes: Sized {
    /// Tokens of one register tile (1 to [`MAX_TILE`]).
    const TILE: usize;
    /// The four planes of one block, unpacked to codes 0, 1, 2 (a byte each).
    type Planes: Copy;
    /// Sixteen int32 sums.
    type Sums: Copy;

    /// Zeroes.
    fn zero() -> Self::Sums;
    /// Unpacks one block.
    fn unpack(block: &[u8; BLOCK_BYTES]) -> Self::Planes;
    /// Adds the products of one block with sixteen activations.
    fn dot(sums: Self::Sums, planes: &Self::Planes, activations: &[i8; BLOCK]) -> Self::Sums;
    /// Writes the sums out.
    fn store(sums: Self::Sums, out: &mut [i32; ROWS]);
}

/// `out[t][row] = sum_k code[row][k] * activations[t][k]` for one group.
///
/// `group` holds `columns / 16` blocks, `activations` is `[tokens, columns]` with `columns` a multiple of 16, `out` is
/// `[tokens, 16]`. Codes are the trits plus one: the caller subtracts the sum of the activations.
#[inline(always)]
pub(crate) fn tile<L: DotLanes>(group: &[u8], activations: &[i8], tokens: usize, out: &mut [i32]) {
    let (blocks, rest) = group.as_chunks::<BLOCK_BYTES>();
    assert!(rest.is_empty(), "a row group is whole blocks");
    let columns = blocks.len() * BLOCK;
    assert!(activations.len() == tokens * columns && out.len() == tokens * ROWS, "tile shapes");
    let (out, _) = out.as_chunks_mut::<ROWS>();
    let mut t = 0;
    while t < tokens {
        let n = L::TILE.min(tokens - t);
        let a = &activations[t * columns..(t + n) * columns];
        let o = &mut out[t..t + n];
        match n {
            8 => tokens_at_once::<L, 8>(blocks, a, o),
            4..8 => tokens_at_once::<L, 4>(blocks, &a[..4 * columns], &mut o[..4]),
            2..4 => tokens_at_once::<L, 2>(blocks, &a[..2 * columns], &mut o[..2]),
            _ => tokens_at_once::<L, 1>(blocks, &a[..columns], &mut o[..1]),
        }
        t += match n {
            8 => 8,
            4..8 => 4,
            2..4 => 2,
            _ => 1,
        };
    }
}

/// `N` tokens against one group, the sums in registers.
#[inline(always)]
fn tokens_at_once<L: DotLanes, const N: usize>(
    blocks: &[[u8; BLOCK_BYTES]],
    activations: &[i8],
    out: &mut [[i32; ROWS]],
) {
    const { assert!(N <= MAX_TILE) };
    let rows: [&[[i8; BLOCK]]; N] = std::array::from_fn(|t| {
        let columns = blocks.len() * BLOCK;
        activations[t * columns..(t + 1) * columns].as_chunks::<BLOCK>().0
    });
    let mut sums = [L::zero(); N];
    for (b, block) in blocks.iter().enumerate() {
        let planes = L::unpack(block);
        for t in 0..N {
            sums[t] = L::dot(sums[t], &planes, &rows[t][b]);
        }
    }
    for t in 0..N {
        L::store(sums[t], &mut out[t]);
    }
}
