//! The ternary product alone: one token (decode, bound by memory) and many (prefill, bound by arithmetic), on every instruction set
//! that this CPU has, in both packings, one thread. Each case checks its output against plain integers before it is timed.

use bitnet_engine::kernels::{Isa, Kernels, QuantizedActivations, TernaryJob, Threads, ternary_matmul};
use bitnet_engine::ternary::interleaved::{InterleavedMatrix, Packing, TritSource};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// The attention output projection of bitnet-b1.58-2B-4T.
const ROWS: usize = 2560;
const COLUMNS: usize = 2560;

fn trit(row: usize, column: usize) -> i8 {
    ((row * 31 + column * 17 + row * column) % 3) as i8 - 1
}

fn activation(token: usize, column: usize) -> f32 {
    ((token * 37 + column * 101) % 255) as f32 - 127.0
}

fn ternary(c: &mut Criterion) {
    let threads = Threads::new(Some(1)).expect("one thread");
    let row = |row: usize, out: &mut [i8]| {
        out.iter_mut().enumerate().for_each(|(column, t)| *t = trit(row, column));
        Ok(())
    };
    let source = TritSource { rows: ROWS, columns: COLUMNS, scale: 1.0, row: &row };
    for packing in Packing::ALL {
        let packer = Kernels::of(Isa::best()).expect("the best there is").with_packing(packing);
        let weights = InterleavedMatrix::pack(&source, &packer, &threads).expect("six million weights fit");
        for tokens in [1, 132] {
            let x: Vec<f32> = (0..tokens * COLUMNS).map(|i| activation(i / COLUMNS, i % COLUMNS)).collect();
            let mut group = c.benchmark_group(format!("ternary {ROWS}x{COLUMNS}, {packing:?}, {tokens} tokens"));
            group.throughput(Throughput::Elements((tokens * ROWS * COLUMNS) as u64));
            for isa in Isa::available() {
                let kernels = Kernels::of(isa).expect("available").with_packing(packing);
                let mut q = QuantizedActivations::default();
                q.quantize(&kernels, &threads, &x, COLUMNS, &|| "x".to_string()).expect("finite");
                let mut out = vec![0f32; tokens * ROWS];
                let run = |out: &mut [f32]| {
                    ternary_matmul(&kernels, &threads, &q, [TernaryJob { weights: &weights, out, add: false }]);
                };
                run(&mut out);
                verify(&out, tokens);
                group.bench_function(BenchmarkId::from_parameter(isa), |b| b.iter(|| run(&mut out)));
            }
            group.finish();
        }
    }
}

/// The activations are integers with absmax 127, so the quantiser leaves them as they are.
fn verify(out: &[f32], tokens: usize) {
    let k = (1.0f32 / 127.0) * 127.0;
    for (token, row) in [(0, 0), (tokens - 1, ROWS - 1), (tokens / 2, 1237)] {
        let sum: i32 = (0..COLUMNS).map(|c| i32::from(trit(row, c)) * activation(token, c) as i32).sum();
        assert_eq!(out[token * ROWS + row], sum as f32 / k, "row {row} of token {token}");
    }
}

criterion_group!(benches, ternary);
criterion_main!(benches);
