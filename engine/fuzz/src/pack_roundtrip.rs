//! Every storage of trits: what is packed comes out again, and any bytes give trits or a typed error.
//!
//! The input is the number of a format, a shape, three kernel parameters, a scale, then trits and at the same time packed bytes.

use bitnet_contracts::Result;
use bitnet_engine::ternary::*;

use super::{Numbers, bounded};

type View<'a> = (Box<dyn PackedRows + 'a>, Option<f32>);

struct Format {
    number: u8,
    rows: usize,
    columns: usize,
    kernel: TlKernel,
}

impl Format {
    fn pack(&self, trits: &[i8], scale: f32) -> Result<Vec<u8>> {
        let (rows, columns) = (self.rows, self.columns);
        match self.number {
            0 => hf_packed::pack("w", trits, rows, columns),
            1 => i2_s::pack("w", trits, rows, columns, scale, I2sLayout::X86),
            2 => i2_s::pack("w", trits, rows, columns, scale, I2sLayout::Arm),
            3 => tq1_0::pack("w", trits, rows, columns, scale),
            4 => tq2_0::pack("w", trits, rows, columns, scale),
            5 => iq1_bn::pack("w", trits, rows, columns, scale),
            6 => iq2_bn::pack("w", trits, rows, columns, scale),
            7 => tl1::pack("w", trits, rows, columns, self.kernel),
            _ => tl2::pack("w", trits, rows, columns, self.kernel),
        }
    }

    fn view<'a>(&self, bytes: &'a [u8]) -> Result<View<'a>> {
        let (rows, columns) = (self.rows, self.columns);
        macro_rules! scaled {
            ($view:expr) => {{
                let view = $view;
                let scale = view.scale("w")?;
                (Box::new(view), Some(scale))
            }};
        }
        Ok(match self.number {
            0 => (Box::new(HfPacked::new("w", bytes, rows, columns)?), None),
            1 | 2 => {
                let layout = if self.number == 1 { I2sLayout::X86 } else { I2sLayout::Arm };
                let view = I2S::new("w", bytes, rows, columns, layout)?;
                let scale = view.scale();
                (Box::new(view), Some(scale))
            }
            3 => scaled!(Tq1_0::new("w", bytes, rows, columns)?),
            4 => scaled!(Tq2_0::new("w", bytes, rows, columns)?),
            5 => scaled!(Iq1Bn::new("w", bytes, rows, columns)?),
            6 => scaled!(Iq2Bn::new("w", bytes, rows, columns)?),
            7 => (Box::new(Tl1::new("w", bytes, rows, columns, self.kernel)?), None),
            _ => (Box::new(Tl2::new("w", bytes, rows, columns, self.kernel)?), None),
        })
    }

    fn unpack(&self, bytes: &[u8]) -> Result<(Vec<i8>, Option<f32>)> {
        let (view, scale) = self.view(bytes)?;
        let mut trits = vec![9; self.rows * self.columns];
        for (r, row) in trits.chunks_exact_mut(self.columns).enumerate() {
            view.row("w", r, row)?;
        }
        Ok((trits, scale))
    }

    /// Bytes of a matrix; of TL1 and TL2 whatever their parameters.
    fn bytes(&self) -> Option<usize> {
        let (rows, columns) = (self.rows, self.columns);
        match self.number {
            0 => Some(rows * columns / 4),
            1 | 2 => i2_s::bytes(rows, columns),
            3 => tq1_0::bytes(rows, columns),
            4 => tq2_0::bytes(rows, columns),
            5 => iq1_bn::bytes(rows, columns),
            6 => iq2_bn::bytes(rows, columns),
            7 => tl1::bytes(rows, columns),
            _ => tl2::bytes(rows, columns),
        }
    }
}

/// One input.
pub fn run(data: &[u8]) {
    bounded(data, || {
        let mut numbers = Numbers(data);
        let number = numbers.byte() % 9;
        // Shapes that fit the formats now and then, and not too large to be fast.
        let rows = numbers.size(8) * [1, 4, 32][usize::from(numbers.byte() % 3)];
        let columns = numbers.size(8) * [1, 32, 64, 96, 256][usize::from(numbers.byte() % 5)];
        let mut parameter = || numbers.size(256) - 1;
        let kernel = TlKernel { bm: parameter(), bk: parameter(), bmm: parameter() };
        let format = Format { number, rows, columns, kernel };
        let scale = numbers.float();
        let trits = numbers.trits(rows * columns);
        if let Ok(bytes) = format.pack(&trits, scale) {
            let (unpacked, stored) = format.unpack(&bytes).expect("what was packed can be read");
            assert!(unpacked == trits, "trits");
            // Formats with half precision round; one without any weight has forgotten its scale.
            if let (Some(stored), true) = (stored, trits.iter().any(|&t| t != 0)) {
                assert!((stored - scale).abs() <= scale / 2048.0, "{scale} became {stored}");
            }
        }
        let Some(size) = format.bytes() else { return };
        let bytes: Vec<u8> = numbers.0.iter().copied().cycle().take(size).collect();
        if let Ok((unpacked, _)) = format.unpack(&bytes) {
            assert!(unpacked.iter().all(|t| (-1..=1).contains(t)), "a value that is no trit");
        }
        assert!(
            format.view(&bytes[..bytes.len().saturating_sub(1)]).is_err() || bytes.is_empty(),
            "one byte is missing"
        );
    });
}
