//! The whole engine on the embedded model: a prompt, and a decode step behind it. Prefill and decode are checked to agree to the bit
//! before anything is timed. The model is small enough to stay in a cache, so that is what its decode is held to.

mod beside;

use benches::cases::Work;
use bitnet_contracts::BitNetInference;
use bitnet_engine::{CpuEngine, EngineOptions};
use criterion::{Criterion, criterion_group, criterion_main};

/// Tokens of the prompt.
const PROMPT: usize = 128;
/// Positions at which a run of decode steps starts again.
const END: usize = 512;

fn engine(c: &mut Criterion) {
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| (i * 7919 + 17) % 4096).collect();
    for threads in [1, 2] {
        let mut engine =
            CpuEngine::embedded(&EngineOptions::default().with_threads(threads)).expect("the embedded model");
        let whole = engine.feed(&prompt).expect("a prompt").to_vec();
        engine.reset().expect("reset");
        engine.feed(&prompt[..PROMPT - 1]).expect("a prompt");
        assert_eq!(engine.feed(&prompt[PROMPT - 1..]).expect("a token"), whole, "prefill and decode agree");
        let largest = (0..).zip(&whole).max_by(|a: &(u32, &f32), b| a.1.total_cmp(b.1)).expect("a vocabulary").0;
        engine.reset().expect("reset");
        assert_eq!(
            engine.feed_greedy(&prompt).expect("a prompt"),
            largest,
            "the screened head finds the largest logit"
        );
        let limits = engine.limits().expect("memory for the limits");

        let products = Work::Products(PROMPT * engine.products_per_token());
        let mut group = beside::group(c, &format!("tiny model, {threads} threads, prefill"), products);
        beside::time(&mut group, format!("{PROMPT} tokens"), products, &limits, || {
            engine.reset().expect("reset");
            engine.feed_greedy(&prompt).expect("a prompt");
        });
        group.finish();

        let bytes = Work::Cache(engine.step_bytes((PROMPT + END) / 2).total());
        let mut group = beside::group(c, &format!("tiny model, {threads} threads, decode"), bytes);
        let mut positions = END;
        beside::time(&mut group, format!("positions {PROMPT} to {}", END - 1), bytes, &limits, || {
            if positions == END {
                engine.reset().expect("reset");
                engine.feed_greedy(&prompt).expect("a prompt");
                positions = PROMPT;
            }
            positions += 1;
            engine.feed_greedy(&[5]).expect("a token");
        });
        group.finish();
    }
}

criterion_group!(benches, engine);
criterion_main!(benches);
