//! Kernels by themselves on every instruction set that this CPU has, on one thread: the ternary product for one token (bound by memory)
//! and many (bound by arithmetic) in every packing (I2S in two bits and in base three, TL1 as pairs, TL2 as triples), the output head whole and screened, norm and quantisation, attention. Each case checks its output
//! against a plain computation before it is timed; behind each stands what the machine allows, measured at the start.
//!
//! What is bound by memory is larger than a last-level cache here, so that it is read from memory every time, as in a model.

mod beside;

use std::rc::Rc;

use benches::cases::{AttentionCase, Case, HeadCase, NormCase, ScreenedHeadCase, Shape, TernaryCase, TernaryWeights};
use bitnet_engine::kernels::{Isa, Kernels, Limits, Threads};
use bitnet_engine::ternary::interleaved::Packing;
use criterion::{Criterion, criterion_group, criterion_main};

/// Width of bitnet-b1.58-2B-4T.
const WIDTH: usize = 2560;
/// Rows of a matrix of 82 to 102 MB.
const MANY_ROWS: usize = 160_000;
/// Rows of a head of 256 MB, whose screen has 64.
const HEAD_ROWS: usize = 50_000;

/// One instruction set and what the machine allows it.
struct Path {
    kernels: &'static Kernels,
    limits: Limits,
}

fn paths(threads: &Threads) -> Vec<Path> {
    let path = |isa| {
        let kernels = Kernels::of(isa).expect("available");
        Path { kernels, limits: Limits::measure(kernels, threads).expect("memory for the limits") }
    };
    Isa::available().into_iter().map(path).collect()
}

/// Checks and times what `make` makes, on every path.
fn time<C: Case>(c: &mut Criterion, name: &str, paths: &[Path], make: impl Fn(&Kernels) -> C) {
    for Path { kernels, limits } in paths {
        let mut case = make(kernels);
        case.run().expect("a run");
        case.verify().unwrap_or_else(|wrong| panic!("{name}, {}: {wrong}", kernels.isa()));
        let mut group = beside::group(c, name, case.work());
        beside::time(&mut group, kernels.isa().name(), case.work(), limits, || case.run().expect("a run"));
        group.finish();
    }
}

fn kernels(c: &mut Criterion) {
    let threads = Threads::new(Some(1)).expect("one thread");
    let paths = paths(&threads);
    for packing in Packing::ALL {
        for (rows, tokens) in [(MANY_ROWS, 1), (WIDTH, 132)] {
            let weights = TernaryWeights::new(Shape { rows, columns: WIDTH }, packing, &threads);
            let weights = Rc::new(weights.expect("memory for the weights"));
            time(c, &format!("ternary {rows}x{WIDTH}, {packing:?}, {tokens} tokens"), &paths, |kernels| {
                TernaryCase::new(weights.clone(), kernels, &threads, tokens).expect("finite activations")
            });
        }
    }
    time(c, &format!("head {HEAD_ROWS}x{WIDTH}, bf16"), &paths, |kernels| {
        HeadCase::new(kernels, &threads, HEAD_ROWS, WIDTH).expect("memory for the head")
    });
    time(c, &format!("head {HEAD_ROWS}x{WIDTH}, screened"), &paths, |kernels| {
        ScreenedHeadCase::new(kernels, &threads, HEAD_ROWS, WIDTH).expect("memory for the head")
    });
    time(c, &format!("norm and quantise 132x{WIDTH}"), &paths, |kernels| NormCase::new(kernels, &threads, 132, WIDTH));
    // The heads of 30 layers of the 2B model, and those of one.
    time(c, "attention, decode at depth 1000", &paths, |kernels| {
        AttentionCase::new(kernels, (150, 4, 128), 1000..1001).expect("memory for keys and values")
    });
    time(c, "attention, prefill of positions 448 to 511", &paths, |kernels| {
        AttentionCase::new(kernels, (5, 4, 128), 448..512).expect("memory for keys and values")
    });
}

criterion_group!(benches, kernels);
criterion_main!(benches);
