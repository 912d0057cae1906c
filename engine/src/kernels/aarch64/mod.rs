//! AArch64: NEON and its dot products.

pub(super) mod dotprod;
pub(super) mod neon;
