//! Keys and values of one KV head at 64 positions, in f32 or fewer bits.
//!
//! A page of keys is transposed, `[head_dim, 64]`, one of values is `[64, head_dim]`: see [`super::attention`]. An int8 page has 64 steps
//! in f32 behind its codes, one a position. What is written is rounded once; every reader, in the same call too, sees the rounded value, so
//! how a prompt is cut into calls does not show in the results.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use bitnet_contracts::ConfigurationError;

use super::attention::{FloatLanes, PAGE};

/// How the CPU backend keeps keys and values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// As they are computed.
    #[default]
    F32,
    /// IEEE half precision, rounded to nearest even: half the memory and half the bytes that attention reads.
    F16,
    /// Eight bits with one step (absmax / 127) for every position and KV head: about a quarter.
    Int8,
}

impl KvFormat {
    /// All formats.
    pub const ALL: [KvFormat; 3] = [KvFormat::F32, KvFormat::F16, KvFormat::Int8];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            KvFormat::F32 => "f32",
            KvFormat::F16 => "f16",
            KvFormat::Int8 => "int8",
        }
    }

    /// Bytes of the keys, or the values, of one KV head in one page.
    pub(crate) fn page_bytes(self, head_dim: usize) -> usize {
        match self {
            KvFormat::F32 => 4 * PAGE * head_dim,
            KvFormat::F16 => 2 * PAGE * head_dim,
            KvFormat::Int8 => PAGE * (head_dim + 4),
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for KvFormat {
    type Err = bitnet_contracts::InferenceError;

    fn from_str(name: &str) -> bitnet_contracts::Result<KvFormat> {
        Self::ALL.into_iter().find(|format| format.name() == name).ok_or_else(|| {
            ConfigurationError::InvalidParameter {
                parameter: "kv".to_string(),
                value: name.to_string(),
                valid_range: Self::ALL.map(Self::name).join(", "),
            }
            .into()
        })
    }
}

/// A page of keys or values, to read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KvPage<'a> {
    F32(&'a [f32]),
    /// Bits of half-precision numbers.
    F16(&'a [u16]),
    /// Codes and the step of each position.
    Int8(&'a [i8], &'a [f32]),
}

impl<'a> KvPage<'a> {
    /// Where the page begins.
    pub(crate) fn address(&self) -> *const u8 {
        match self {
            KvPage::F32(x) => x.as_ptr().cast(),
            KvPage::F16(x) => x.as_ptr().cast(),
            KvPage::Int8(x, _) => x.as_ptr().cast(),
        }
    }

    /// The page in `bytes`, which [`KvPage::write`] filled.
    pub(crate) fn read(format: KvFormat, bytes: &'a [u8]) -> Self {
        match format {
            KvFormat::F32 => KvPage::F32(bytemuck::cast_slice(bytes)),
            KvFormat::F16 => KvPage::F16(bytemuck::cast_slice(bytes)),
            KvFormat::Int8 => {
                let (codes, steps) = bytes.split_at(bytes.len() - 4 * PAGE);
                KvPage::Int8(bytemuck::cast_slice(codes), bytemuck::cast_slice(steps))
            }
        }
    }
}

/// Where the numbers of one position lie in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// `[head_dim, 64]`.
    Keys,
    /// `[64, head_dim]`.
    Values,
}

impl Order {
    fn places(self, slot: usize, head_dim: usize) -> std::iter::StepBy<Range<usize>> {
        match self {
            Order::Keys => (slot..head_dim * PAGE).step_by(PAGE),
            Order::Values => (slot * head_dim..(slot + 1) * head_dim).step_by(1),
        }
    }
}

/// Writes one head's key or value at position `slot` of its page. False when a number cannot be kept: beyond f16, or no number at all in a
/// format that has no place for that (f32 keeps NaN and infinity, and they show in the next norm).
#[must_use]
pub(crate) fn write(format: KvFormat, order: Order, bytes: &mut [u8], slot: usize, x: &[f32]) -> bool {
    let places = order.places(slot, x.len());
    match format {
        KvFormat::F32 => {
            let page: &mut [f32] = bytemuck::cast_slice_mut(bytes);
            places.zip(x).for_each(|(place, &x)| page[place] = x);
            true
        }
        KvFormat::F16 => {
            let page: &mut [u16] = bytemuck::cast_slice_mut(bytes);
            let mut finite = true;
            for (place, &x) in places.zip(x) {
                let rounded = half::f16::from_f32(x);
                finite &= rounded.is_finite();
                page[place] = rounded.to_bits();
            }
            finite
        }
        KvFormat::Int8 => {
            let (codes, steps) = bytes.split_at_mut(bytes.len() - 4 * PAGE);
            let (codes, steps): (&mut [i8], &mut [f32]) =
                (bytemuck::cast_slice_mut(codes), bytemuck::cast_slice_mut(steps));
            if x.iter().any(|x| !x.is_finite()) {
                return false;
            }
            let step = x.iter().fold(0f32, |m, x| m.max(x.abs())) / 127.0;
            steps[slot] = step;
            for (place, &x) in places.zip(x) {
                // A step of zero, from zeroes or from numbers that vanish beside f32's smallest, leaves zeroes.
                codes[place] = if step == 0.0 { 0 } else { (x / step).round_ties_even().clamp(-127.0, 127.0) as i8 };
            }
            true
        }
    }
}

/// A number as a page holds it.
pub(super) trait KvNumber: Copy {
    /// Sixteen of them as f32, exactly.
    fn load<L: FloatLanes>(x: &[Self; 16]) -> L::Floats;
    /// One.
    fn widen(self) -> f32;
}

impl KvNumber for f32 {
    #[inline(always)]
    fn load<L: FloatLanes>(x: &[f32; 16]) -> L::Floats {
        L::load(x)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl KvNumber for u16 {
    #[inline(always)]
    fn load<L: FloatLanes>(x: &[u16; 16]) -> L::Floats {
        L::load_f16(x)
    }

    /// Shifted into place, a half-precision number is 2^112 too small, subnormal or not; there are no infinities here.
    #[inline(always)]
    fn widen(self) -> f32 {
        const TO_2_112: f32 = f32::from_bits((127 + 112) << 23);
        let magnitude = f32::from_bits(u32::from(self & 0x7fff) << 13) * TO_2_112;
        f32::from_bits(magnitude.to_bits() | u32::from(self & 0x8000) << 16)
    }
}

impl KvNumber for i8 {
    #[inline(always)]
    fn load<L: FloatLanes>(x: &[i8; 16]) -> L::Floats {
        L::load_i8(x)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_finite_half_widens_to_itself() {
        for bits in (0..=u16::MAX).filter(|&bits| half::f16::from_bits(bits).is_finite()) {
            assert_eq!(bits.widen().to_bits(), half::f16::from_bits(bits).to_f32().to_bits(), "{bits:#x}");
        }
    }

    #[test]
    fn names_round_trip_and_unknown_ones_are_refused() {
        for format in KvFormat::ALL {
            assert_eq!(format.name().parse::<KvFormat>().unwrap(), format);
        }
        assert!("q4".parse::<KvFormat>().unwrap_err().to_string().contains("f32, f16, int8"));
    }

    /// What a page of `format` holds at `slot`.
    fn held(format: KvFormat, order: Order, bytes: &[u8], slot: usize, d: usize) -> Vec<f32> {
        let places = order.places(slot, d);
        match KvPage::read(format, bytes) {
            KvPage::F32(x) => places.map(|i| x[i]).collect(),
            KvPage::F16(x) => places.map(|i| x[i].widen()).collect(),
            KvPage::Int8(x, steps) => places.map(|i| x[i].widen() * steps[slot]).collect(),
        }
    }

    /// A page as the cache gives it, aligned.
    fn page(format: KvFormat, d: usize) -> Vec<f32> {
        vec![0.0; format.page_bytes(d) / 4]
    }

    #[test]
    fn what_cannot_be_kept_is_told() {
        for (bad, f32_keeps) in [(f32::NAN, true), (f32::INFINITY, true), (1e6, true)] {
            for format in KvFormat::ALL {
                let mut page = page(format, 4);
                let kept = write(format, Order::Keys, bytemuck::cast_slice_mut(&mut page), 3, &[1.0, bad, 0.0, 2.0]);
                let keeps = match format {
                    KvFormat::F32 => f32_keeps,
                    KvFormat::F16 => false,
                    KvFormat::Int8 => bad.is_finite(),
                };
                assert_eq!(kept, keeps, "{bad} in {format}");
            }
        }
    }

    #[test]
    fn zeroes_and_vanishing_numbers_are_kept_as_zeroes() {
        for x in [[0.0f32; 4], [f32::from_bits(1); 4]] {
            let mut page = page(KvFormat::Int8, 4);
            let bytes = bytemuck::cast_slice_mut(&mut page);
            assert!(write(KvFormat::Int8, Order::Values, bytes, 63, &x));
            assert_eq!(held(KvFormat::Int8, Order::Values, bytes, 63, 4), [0.0; 4]);
        }
    }

    proptest! {
        #[test]
        fn a_position_reads_as_it_was_written(
            rows in prop::collection::vec(prop::collection::vec(-100f32..100.0, 20), 1..PAGE),
            keys in any::<bool>(),
        ) {
            let order = if keys { Order::Keys } else { Order::Values };
            for format in KvFormat::ALL {
                let mut page = page(format, 20);
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut page);
                for (slot, row) in rows.iter().enumerate() {
                    prop_assert!(write(format, order, bytes, slot, row));
                }
                for (slot, row) in rows.iter().enumerate() {
                    let absmax = row.iter().fold(0f32, |m, x| m.max(x.abs()));
                    for (&x, kept) in row.iter().zip(held(format, order, bytes, slot, 20)) {
                        let most = match format {
                            KvFormat::F32 => 0.0,
                            KvFormat::F16 => x.abs() / 2048.0 + 3e-8,
                            KvFormat::Int8 => absmax / 127.0 * 0.5001,
                        };
                        prop_assert!((x - kept).abs() <= most, "{} {} {}", format, x, kept);
                    }
                }
            }
        }
    }
}
