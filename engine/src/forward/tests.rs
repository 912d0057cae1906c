//! Layer 0 against the traces: a sub-norm behind them hides the scales of v, gate and up from the logits (they cancel up to epsilon),
//! so they are compared where they are.

use bitnet_contracts::Result;
use golden::{Derivation, Semantics};

use super::run::{Observed, Row, Run};
use super::{CpuCache, Transformer};
use crate::kernels::{Isa, Kernels, KvFormat, Threads};
use crate::model::{Checkpoint, ModelSource};

#[test]
fn the_first_layer_is_the_traced_one() -> Result<()> {
    let mut compared = 0;
    for case in fixtures::ORACLE_CASES {
        let golden = golden::load(case).unwrap();
        let Some(trace) = &golden.trace else { continue };
        let prompt = golden.prompt(&trace.prompt).unwrap();
        let folder = fixtures::oracle_case(case).unwrap().folder().unwrap();
        let threads = Threads::new(Some(1))?;
        let model = Transformer::load(
            &Checkpoint::open(&ModelSource::Folder(folder.path().into()))?,
            Kernels::of(Isa::best())?,
            &threads,
            super::LoadOptions { in_memory: true, ..Default::default() },
        )?;
        let rows: Vec<Row> = prompt.input_ids[0]
            .iter()
            .enumerate()
            .map(|(position, &token)| Row { sequence: 0, position, token })
            .collect();
        let mut run = Run::new(&model, Kernels::of(Isa::best())?, threads);
        let mut cache = CpuCache::new(&model.description, KvFormat::F32);
        cache.reserve(1, rows.len())?;
        run.first_layer(&model, &rows, &mut cache, &mut Observed::default())?;
        let b = &run.buffers;
        let (heads, width) = (run.kv_heads, run.hidden / run.kv_heads);
        let attended: Vec<f32> = (0..rows.len() * heads)
            .flat_map(|i| b.attended[(i % heads * rows.len() + i / heads) * width..][..width].to_vec())
            .collect();
        let mut gated = vec![0.0; b.up.len()];
        run.kernels.relu2_gate(&b.gate, &b.up, &mut gated);
        // Up to the first sub-norm only float rounding differs; behind a quantiser one activation may fall to the other side of a tie.
        for (name, seen, tolerance) in [
            ("layer0.v", &b.v, 1e-5),
            ("layer0.attn_out", &attended, 1e-5),
            ("layer0.ffn_act", &gated, 2e-2),
            ("layer0.out", &b.x, 2e-2),
        ] {
            let expected = trace.get(Semantics::W158A8, Derivation::Transformers, name).unwrap().1;
            assert_eq!(seen.len(), expected.len());
            let largest = expected.iter().fold(0f32, |m, x| m.max(x.abs()));
            let worst = seen.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(worst <= tolerance * largest, "{case} {name}: off by {worst}, largest value {largest}");
            compared += seen.len();
        }
    }
    assert!(compared > 10_000);
    Ok(())
}
