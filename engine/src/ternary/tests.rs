//! Every format against reference bytes, against itself, and against bytes that are no codes.
//!
//! The reference bytes are those of `tests/data/ternary/generate.py`.

use bitnet_contracts::{InferenceError, QuantizationError, Result};
use proptest::prelude::*;

use super::*;

/// A format with its parameters.
#[derive(Debug, Clone, Copy)]
enum Format {
    Hf,
    I2s(I2sLayout),
    Tq1,
    Tq2,
    Iq1,
    Iq2,
    Tl1(TlKernel),
    Tl2(TlKernel),
}

const TL1_SMALL: Format = Format::Tl1(TlKernel { bm: 64, bk: 64, bmm: 32 });
const TL1_LARGE: Format = Format::Tl1(TlKernel { bm: 128, bk: 128, bmm: 64 });
const TL2_SMALL: Format = Format::Tl2(TlKernel { bm: 64, bk: 96, bmm: 32 });
const TL2_LARGE: Format = Format::Tl2(TlKernel { bm: 32, bk: 192, bmm: 32 });

const ALL: [Format; 11] = [
    Format::Hf,
    Format::I2s(I2sLayout::X86),
    Format::I2s(I2sLayout::Arm),
    Format::Tq1,
    Format::Tq2,
    Format::Iq1,
    Format::Iq2,
    TL1_SMALL,
    TL1_LARGE,
    TL2_SMALL,
    TL2_LARGE,
];

impl Format {
    fn pack(self, trits: &[i8], rows: usize, columns: usize, scale: f32) -> Result<Vec<u8>> {
        match self {
            Self::Hf => hf_packed::pack("w", trits, rows, columns),
            Self::I2s(layout) => i2_s::pack("w", trits, rows, columns, scale, layout),
            Self::Tq1 => tq1_0::pack("w", trits, rows, columns, scale),
            Self::Tq2 => tq2_0::pack("w", trits, rows, columns, scale),
            Self::Iq1 => iq1_bn::pack("w", trits, rows, columns, scale),
            Self::Iq2 => iq2_bn::pack("w", trits, rows, columns, scale),
            Self::Tl1(kernel) => tl1::pack("w", trits, rows, columns, kernel),
            Self::Tl2(kernel) => tl2::pack("w", trits, rows, columns, kernel),
        }
    }

    fn view(self, bytes: &[u8], rows: usize, columns: usize) -> Result<(Box<dyn PackedRows + '_>, Option<f32>)> {
        Ok(match self {
            Self::Hf => (Box::new(HfPacked::new("w", bytes, rows, columns)?), None),
            Self::I2s(layout) => {
                let view = I2S::new("w", bytes, rows, columns, layout)?;
                (Box::new(view), Some(view.scale()))
            }
            Self::Tq1 => {
                let view = Tq1_0::new("w", bytes, rows, columns)?;
                (Box::new(view), Some(view.scale("w")?))
            }
            Self::Tq2 => {
                let view = Tq2_0::new("w", bytes, rows, columns)?;
                (Box::new(view), Some(view.scale("w")?))
            }
            Self::Iq1 => {
                let view = Iq1Bn::new("w", bytes, rows, columns)?;
                (Box::new(view), Some(view.scale("w")?))
            }
            Self::Iq2 => {
                let view = Iq2Bn::new("w", bytes, rows, columns)?;
                (Box::new(view), Some(view.scale("w")?))
            }
            Self::Tl1(kernel) => (Box::new(Tl1::new("w", bytes, rows, columns, kernel)?), None),
            Self::Tl2(kernel) => (Box::new(Tl2::new("w", bytes, rows, columns, kernel)?), None),
        })
    }

    fn unpack(self, bytes: &[u8], rows: usize, columns: usize) -> Result<(Vec<i8>, Option<f32>)> {
        let (view, scale) = self.view(bytes, rows, columns)?;
        let mut trits = vec![9i8; rows * columns];
        for (r, row) in trits.chunks_exact_mut(columns).enumerate() {
            view.row("w", r, row)?;
        }
        Ok((trits, scale))
    }

    /// A shape that the format can hold, for any two small numbers.
    fn shape(self, a: usize, b: usize) -> (usize, usize) {
        match self {
            Self::Hf => (4 * a, b),
            Self::I2s(layout) => (a, b * layout.block()),
            Self::Tq1 | Self::Tq2 => (a, b * 256),
            Self::Iq1 | Self::Iq2 => (a, b * 64),
            Self::Tl1(kernel) => (a * kernel.bm, b * kernel.bk),
            // Pairs of 0 to 2 tiles behind the triples.
            Self::Tl2(kernel) => (a * kernel.bm, 256_usize.next_multiple_of(kernel.bk) + b * 32),
        }
    }
}

/// Flat element `e` is `(e * e + e / 3) % 3 - 1`.
fn pattern(n: usize) -> Vec<i8> {
    (0..n).map(|e| ((e * e + e / 3) % 3) as i8 - 1).collect()
}

fn hashed(n: usize) -> Vec<i8> {
    (0..n).map(|e| (((e as u64 * 2_654_435_761) as u32 >> 16) % 3) as i8 - 1).collect()
}

#[test]
fn bytes_are_those_of_the_reference() {
    macro_rules! case {
        ($format:expr, $fill:ident, $rows:literal, $columns:literal, $file:literal) => {
            (
                $format,
                $fill($rows * $columns),
                $rows,
                $columns,
                include_bytes!(concat!("../../tests/data/ternary/", $file)).as_slice(),
            )
        };
    }
    for (format, trits, rows, columns, bytes) in [
        case!(Format::Hf, pattern, 8, 4, "hf_8x4.bin"),
        case!(Format::Hf, hashed, 64, 40, "hf_64x40.bin"),
        case!(Format::I2s(I2sLayout::X86), pattern, 4, 128, "i2_s_x86_4x128.bin"),
        case!(Format::I2s(I2sLayout::X86), hashed, 3, 640, "i2_s_x86_3x640.bin"),
        case!(Format::I2s(I2sLayout::Arm), pattern, 4, 128, "i2_s_arm_4x128.bin"),
        case!(Format::I2s(I2sLayout::Arm), hashed, 3, 192, "i2_s_arm_3x192.bin"),
        case!(Format::Tq1, pattern, 1, 256, "tq1_0_1x256.bin"),
        case!(Format::Tq1, hashed, 3, 512, "tq1_0_3x512.bin"),
        case!(Format::Tq2, pattern, 1, 256, "tq2_0_1x256.bin"),
        case!(Format::Tq2, hashed, 3, 512, "tq2_0_3x512.bin"),
        case!(Format::Iq1, pattern, 1, 64, "iq1_bn_1x64.bin"),
        case!(Format::Iq1, hashed, 4, 320, "iq1_bn_4x320.bin"),
        case!(Format::Iq2, pattern, 1, 64, "iq2_bn_1x64.bin"),
        case!(Format::Iq2, hashed, 4, 320, "iq2_bn_4x320.bin"),
        case!(TL1_SMALL, pattern, 64, 64, "tl1_64_64_32_64x64.bin"),
        case!(TL1_SMALL, hashed, 128, 192, "tl1_64_64_32_128x192.bin"),
        case!(TL1_LARGE, pattern, 128, 128, "tl1_128_128_64_128x128.bin"),
        case!(TL1_LARGE, hashed, 256, 384, "tl1_128_128_64_256x384.bin"),
        case!(TL2_SMALL, pattern, 64, 512, "tl2_64_96_64x512.bin"),
        case!(TL2_SMALL, hashed, 128, 576, "tl2_64_96_128x576.bin"),
        case!(TL2_LARGE, pattern, 32, 256, "tl2_32_192_32x256.bin"),
        case!(TL2_LARGE, hashed, 64, 608, "tl2_32_192_64x608.bin"),
    ] {
        assert!(format.pack(&trits, rows, columns, 0.5).unwrap() == bytes, "packing {format:?} {rows}x{columns}");
        let (unpacked, scale) = format.unpack(bytes, rows, columns).unwrap();
        assert!(unpacked == trits, "unpacking {format:?} {rows}x{columns}");
        assert_eq!(scale.unwrap_or(0.5), 0.5, "{format:?}");
    }
}

fn code_of(error: InferenceError) -> (usize, u8) {
    match error {
        InferenceError::Quantization(QuantizationError::InvalidCode { position, code, .. }) => (position, code),
        other => panic!("{other}"),
    }
}

proptest! {
    #[test]
    fn packing_and_unpacking_gives_everything_back(
        format in proptest::sample::select(&ALL[..]), a in 1usize..4, b in 1usize..4, seed in any::<u64>(), zeroes in 0u64..4,
        scale in prop_oneof![Just(0.5f32), Just(1.0), Just(1.171875), Just(0.0078125)],
    ) {
        let (rows, columns) = format.shape(a, b);
        let trit = |e: usize| {
            let hash = (seed ^ e as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            if hash % 4 < zeroes { 0 } else { (hash / 4 % 3) as i8 - 1 }
        };
        let trits: Vec<i8> = (0..rows * columns).map(trit).collect();
        match format.pack(&trits, rows, columns, scale) {
            Ok(bytes) => {
                let (unpacked, found) = format.unpack(&bytes, rows, columns).unwrap();
                prop_assert!(unpacked == trits);
                prop_assert_eq!(found.unwrap_or(scale), scale);
                // A byte too few or too many is refused.
                prop_assert!(format.view(&bytes[1..], rows, columns).is_err());
                prop_assert!(format.view(&[&bytes[..], &[0]].concat(), rows, columns).is_err());
            }
            // TL2 cannot hold every number of columns.
            Err(error) => prop_assert!(matches!(format, Format::Tl2(_)), "{}", error),
        }
    }

    #[test]
    fn any_bytes_give_trits_or_an_error(format in proptest::sample::select(&ALL[..]), a in 1usize..3, b in 1usize..3, seed in any::<u64>()) {
        let (rows, columns) = format.shape(a, b);
        let Ok(mut bytes) = format.pack(&vec![0; rows * columns], rows, columns, 1.0) else { return Ok(()) };
        for (i, byte) in bytes.iter_mut().enumerate() {
            *byte = ((seed ^ i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8;
        }
        if let Ok((trits, _)) = format.unpack(&bytes, rows, columns) {
            prop_assert!(trits.iter().all(|t| (-1..=1).contains(t)));
        }
    }

    #[test]
    fn no_shape_panics(format in proptest::sample::select(&ALL[..]), rows in any::<usize>(), columns in any::<usize>()) {
        prop_assert!(format.view(&[0; 64], rows, columns).is_err());
        prop_assert!(format.view(&[0; 64], 0, 0).is_err());
        prop_assert!(format.pack(&[0; 64], rows, columns, 1.0).is_err());
    }
}

/// Every byte of every format's codes, broken in turn: it is still trits, or an error that names the place of a broken weight.
#[test]
fn a_broken_byte_is_an_error_at_its_place() {
    for format in ALL {
        let (rows, columns) = format.shape(1, 1);
        let trits = hashed(rows * columns);
        let bytes = format.pack(&trits, rows, columns, 1.0).unwrap();
        let mut refused = 0;
        for i in 0..bytes.len() {
            let mut broken = bytes.clone();
            broken[i] = 0xff;
            match format.unpack(&broken, rows, columns) {
                Ok((unpacked, _)) => assert!(unpacked.iter().all(|t| (-1..=1).contains(t))),
                Err(InferenceError::Quantization(QuantizationError::InvalidCode { position, .. })) => {
                    refused += 1;
                    assert!(position < rows * columns, "{format:?}");
                }
                Err(InferenceError::Quantization(_)) => (),
                Err(other) => panic!("{format:?}: {other}"),
            }
        }
        // Byte 255 stands for five trits of +1 where five trits are a byte, so only the bytes with fewer refuse it.
        assert!(refused > 0, "{format:?}");
    }
}

#[test]
fn codes_that_do_not_exist_are_named() {
    let mut bytes = Format::I2s(I2sLayout::X86).pack(&[0; 256], 2, 128, 1.0).unwrap();
    bytes[33] |= 0b0011_0000;
    assert_eq!(code_of(Format::I2s(I2sLayout::X86).unpack(&bytes, 2, 128).unwrap_err()), (128 + 33, 3));
    let mut bytes = Format::Tq1.pack(&[0; 512], 1, 512, 1.0).unwrap();
    bytes[54 + 33] = 20;
    assert!((0..243).all(|n| (n * 256 + 242) / 243 != 20));
    assert_eq!(code_of(Format::Tq1.unpack(&bytes, 1, 512).unwrap_err()), (256 + 161, 20));
    let mut bytes = TL1_SMALL.pack(&[0; 64 * 64], 64, 64, 1.0).unwrap();
    bytes[0] = 0x94;
    assert_eq!(code_of(TL1_SMALL.unpack(&bytes, 64, 64).unwrap_err()), (0, 9));
    // A sign with a zero.
    let mut bytes = TL2_SMALL.pack(&[0; 64 * 512], 64, 512, 1.0).unwrap();
    let signs = 64 * 480 / 6;
    bytes[signs + 1] = 0x80;
    assert_eq!(code_of(TL2_SMALL.unpack(&bytes, 64, 512).unwrap_err()), (0, 0x10));
}

/// Other parameters than the file was written with: sections that begin elsewhere, where sign bits meet zeroes; or the same sections in
/// another order, which nothing can tell.
#[test]
fn a_wrong_bk_of_tl2_shows_when_it_moves_the_sections() {
    let trits = hashed(64 * 512);
    let bytes = TL2_SMALL.pack(&trits, 64, 512, 1.0).unwrap();
    let as_other = |bm, bk| Format::Tl2(TlKernel { bm, bk, bmm: 32 }).unpack(&bytes, 64, 512);
    assert!(as_other(64, 192).is_err());
    assert!(as_other(32, 96).unwrap().0 != trits);
}

#[test]
fn scales_that_no_engine_can_use_are_refused() {
    let bad = [0.0, -1.0, f32::NAN, f32::INFINITY, f32::from_bits(1), -f32::from_bits(1)];
    for format in [Format::I2s(I2sLayout::X86), Format::Tq1, Format::Tq2, Format::Iq1, Format::Iq2] {
        let (rows, columns) = format.shape(2, 1);
        let trits = hashed(rows * columns);
        for scale in bad {
            let refused = format.pack(&trits, rows, columns, scale).unwrap_err();
            assert!(
                matches!(refused, InferenceError::Quantization(QuantizationError::InvalidScale { .. })),
                "{format:?} {scale}"
            );
        }
        let bytes = format.pack(&trits, rows, columns, 1.0).unwrap();
        let (at, wide) = match format {
            Format::I2s(_) => (bytes.len() - i2_s::TAIL, true),
            Format::Tq1 => (52, false),
            Format::Tq2 => (64, false),
            Format::Iq1 => (0, false),
            _ => (0, true),
        };
        for scale in bad {
            let mut broken = bytes.clone();
            if wide {
                broken[at..at + 4].copy_from_slice(&scale.to_le_bytes());
            } else {
                // The smallest f16 denormal in place of the f32 one, which would round to zero.
                let half = if scale.is_subnormal() { half::f16::from_bits(1) } else { half::f16::from_f32(scale) };
                broken[at..at + 2].copy_from_slice(&half.to_le_bytes());
            }
            let refused = format.unpack(&broken, rows, columns).unwrap_err();
            assert!(
                matches!(refused, InferenceError::Quantization(QuantizationError::InvalidScale { .. })),
                "{format:?} {scale}: {refused}"
            );
        }
        if !matches!(format, Format::I2s(_)) {
            let mut other = bytes.clone();
            let two = if wide { 2f32.to_le_bytes().to_vec() } else { half::f16::from_f32(2.0).to_le_bytes().to_vec() };
            other[at..at + two.len()].copy_from_slice(&two);
            assert!(matches!(
                format.unpack(&other, rows, columns).unwrap_err(),
                InferenceError::Quantization(QuantizationError::LayoutMismatch { .. })
            ));
        }
    }
}

/// What llama.cpp's quantiser writes for a block without a weight: a scale of zero.
#[test]
fn a_scale_of_zero_is_fine_where_everything_is_zero() {
    for (format, at, len) in [(Format::Tq1, 52, 2), (Format::Tq2, 64, 2), (Format::Iq1, 0, 2), (Format::Iq2, 0, 4)] {
        let (rows, columns) = format.shape(2, 1);
        let mut trits = hashed(rows * columns);
        trits[..columns].fill(0);
        let mut bytes = format.pack(&trits, rows, columns, 0.5).unwrap();
        bytes[at..at + len].fill(0);
        assert_eq!(format.unpack(&bytes, rows, columns).unwrap(), (trits, Some(0.5)), "{format:?}");
    }
}
