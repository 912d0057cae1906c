//! The ternary product of every instruction set and packing against its definition, to the bit, with nothing written beside it.
//!
//! The input is a shape, then activations of any bits and at the same time trits.

use std::sync::OnceLock;

use bitnet_engine::kernels::{Isa, Kernels, QuantizedActivations, TernaryJob, Threads, ternary_matmul};
use bitnet_engine::ternary::InterleavedMatrix;
use bitnet_engine::ternary::interleaved::{Packing, TritSource};

use super::{Numbers, bounded};

const CANARY: u32 = 0x7fc0_dead;

/// The definition.
fn product(trits: &[i8], x: &[f32], columns: usize, scale: f32) -> Option<Vec<f32>> {
    let mut out = Vec::new();
    for x in x.chunks_exact(columns) {
        if !x.iter().all(|v| v.is_finite()) {
            return None;
        }
        let absmax = x.iter().fold(1e-5f32, |m, v| m.max(v.abs()));
        let k = (1.0 / absmax) * 127.0;
        let q: Vec<i32> = x.iter().map(|v| (v * k).round_ties_even().clamp(-128.0, 127.0) as i32).collect();
        for row in trits.chunks_exact(columns) {
            let sum: i32 = row.iter().zip(&q).map(|(&t, &q)| i32::from(t) * q).sum();
            out.push(sum as f32 / k * scale);
        }
    }
    Some(out)
}

fn threads(count: usize) -> &'static Threads {
    static THREADS: [OnceLock<Threads>; 2] = [OnceLock::new(), OnceLock::new()];
    THREADS[count - 1].get_or_init(|| Threads::new(Some(count)).expect("threads"))
}

/// One input.
pub fn run(data: &[u8]) {
    bounded(data, || {
        let mut numbers = Numbers(data);
        let (rows, columns, tokens) = (numbers.size(70), numbers.size(200), numbers.size(12));
        let (count, raw, scale) = (numbers.size(2), numbers.byte() % 2 == 1, 0.37);
        let trits = numbers.trits(rows * columns);
        let x: Vec<f32> = (0..tokens * columns)
            .map(|_| if raw { numbers.float() } else { f32::from(numbers.byte() as i8) / 8.0 })
            .collect();
        let row = |r: usize, out: &mut [i8]| {
            out.copy_from_slice(&trits[r * columns..(r + 1) * columns]);
            Ok(())
        };
        let source = TritSource { rows, columns, scale, row: &row };
        let expected = product(&trits, &x, columns, scale);
        for packing in Packing::ALL {
            for isa in Isa::available() {
                let kernels = Kernels::of(isa).expect("it is available").with_packing(packing);
                let weights = InterleavedMatrix::pack(&source, kernels, threads(1)).expect("a small matrix");
                let mut q = QuantizedActivations::default();
                let quantized = q.quantize(kernels, threads(count), &x, columns, &String::new);
                let Some(expected) = &expected else {
                    assert!(quantized.is_err(), "{isa}: NaN or infinity was taken");
                    continue;
                };
                quantized.expect("finite activations");
                // The output at any place of a larger buffer.
                let before = 1 + rows % 7;
                let mut buffer = vec![f32::from_bits(CANARY); before + tokens * rows + 17];
                let out = &mut buffer[before..before + tokens * rows];
                ternary_matmul(kernels, threads(count), &q, [TernaryJob { weights: &weights, out, add: false }]);
                let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a == b;
                assert!(
                    buffer[before..].iter().zip(expected).all(same),
                    "{isa} {packing:?} {rows}x{columns}, {tokens}"
                );
                let mut beside = buffer[..before].iter().chain(&buffer[before + tokens * rows..]);
                assert!(beside.all(|v| v.to_bits() == CANARY), "{isa} {packing:?} wrote beside its output");
            }
        }
    });
}
