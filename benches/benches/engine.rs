//! The whole engine on the embedded model: a prompt, and a decode step behind it. Prefill and decode are checked to agree to the bit
//! before anything is timed.

use bitnet_contracts::BitNetInference;
use bitnet_engine::{CpuEngine, EngineOptions};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

fn engine(c: &mut Criterion) {
    let prompt: Vec<u32> = (0..128).map(|i| (i * 7919 + 17) % 4096).collect();
    for threads in [1, 2] {
        let mut engine =
            CpuEngine::embedded(&EngineOptions::default().with_threads(threads)).expect("the embedded model");
        let whole = engine.feed(&prompt).expect("a prompt").to_vec();
        engine.reset().expect("reset");
        engine.feed(&prompt[..127]).expect("a prompt");
        assert_eq!(engine.feed(&prompt[127..]).expect("a token"), whole, "prefill and decode agree");

        let mut group = c.benchmark_group(format!("tiny model, {threads} threads"));
        group.throughput(Throughput::Elements(128));
        group.bench_function("prefill 128", |b| {
            b.iter(|| {
                engine.reset().expect("reset");
                engine.feed(&prompt).expect("a prompt").len()
            })
        });
        group.throughput(Throughput::Elements(1));
        group.bench_function("decode", |b| {
            engine.reset().expect("reset");
            engine.feed(&prompt).expect("a prompt");
            let mut positions = 128;
            b.iter(|| {
                if positions == 512 {
                    engine.reset().expect("reset");
                    engine.feed(&prompt).expect("a prompt");
                    positions = 128;
                }
                positions += 1;
                engine.feed(&[5]).expect("a token").len()
            })
        });
        group.finish();
    }
}

criterion_group!(benches, engine);
criterion_main!(benches);
