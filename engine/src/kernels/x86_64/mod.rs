//! x86-64: AVX2 and AVX-512 VNNI.

pub(super) mod avx2;
pub(super) mod avx512vnni;
