//! Files with bytes changed at random: a model or an error, never a panic.

use std::sync::OnceLock;

use bitnet_engine::model::gguf::GgufOptions;
use bitnet_engine::ternary::{I2sLayout, TlKernel};
use proptest::prelude::*;

use super::raw::{Raw, RawModel, read};

fn model() -> (Vec<u8>, usize) {
    static MODEL: OnceLock<(Vec<u8>, usize)> = OnceLock::new();
    MODEL.get_or_init(|| Raw::model().bytes()).clone()
}

fn options(said: bool) -> GgufOptions {
    let mut options = GgufOptions::default();
    if said {
        options.i2s_layout = Some(I2sLayout::Arm);
        options.kernels.insert((64, 64), TlKernel { bm: 64, bk: 64, bmm: 32 });
    }
    options
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn changed_bytes_of_the_header(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6), said in any::<bool>()) {
        let (mut bytes, header) = model();
        for (at, byte) in changes {
            bytes[at.index(header)] = byte;
        }
        let _ = read(bytes, &options(said));
    }

    /// Numbers of four and eight bytes that are small, large or near a power of two, anywhere.
    #[test]
    fn numbers_put_anywhere(at in any::<prop::sample::Index>(), power in 0u32..64, near in -2i64..3, wide in any::<bool>()) {
        let (mut bytes, header) = model();
        let number = (1u64 << power).wrapping_add_signed(near).to_le_bytes();
        let at = at.index(header);
        let len = if wide { 8 } else { 4 }.min(bytes.len() - at);
        bytes[at..at + len].copy_from_slice(&number[..len]);
        let _ = read(bytes, &options(true));
    }

    #[test]
    fn flipped_bits_anywhere(flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u32..8), 1..9)) {
        let (mut bytes, _) = model();
        for (at, bit) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        let _ = read(bytes, &options(false));
    }

    #[test]
    fn pieces_cut_out(from in any::<prop::sample::Index>(), len in 1usize..200, end in any::<prop::sample::Index>()) {
        let (mut bytes, _) = model();
        let from = from.index(bytes.len());
        bytes.drain(from..(from + len).min(bytes.len()));
        bytes.truncate(end.index(bytes.len()) + 1);
        let _ = read(bytes, &options(true));
    }
}
