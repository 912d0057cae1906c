//! The float kernels of every instruction set, to the bit against the portable path; attention against its definition as well. The ternary
//! product and the screen of the head have their tests beside them.

use super::kv_page::{KvNumber, write};
use super::*;
use proptest::prelude::*;

/// Numbers of mixed signs and sizes.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let number = |i: usize| {
        let z = (i as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let z = (z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((z >> 40) as f32 / (1 << 23) as f32 - 1.0) * [0.1, 1.0, 3.0, 10.0][z as usize % 4]
    };
    (0..count).map(number).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Pages of `total` positions and what they hold.
fn pages(format: KvFormat, order: Order, rows: &[f32], d: usize) -> (Vec<Vec<f32>>, Vec<f32>) {
    let blank = || vec![0f32; format.page_bytes(d) / 4];
    let mut pages: Vec<Vec<f32>> = (0..rows.len().div_ceil(d * PAGE)).map(|_| blank()).collect();
    for (position, row) in rows.chunks_exact(d).enumerate() {
        assert!(write(format, order, bytemuck::cast_slice_mut(&mut pages[position / PAGE]), position % PAGE, row));
    }
    let held = (0..rows.len()).map(|i| {
        let (position, column) = (i / d, i % d);
        let slot = position % PAGE;
        let at = if order == Order::Keys { column * PAGE + slot } else { slot * d + column };
        match KvPage::read(format, bytemuck::cast_slice(&pages[position / PAGE])) {
            KvPage::F32(x) => x[at],
            KvPage::F16(x) => x[at].widen(),
            KvPage::Int8(x, steps) => x[at].widen() * steps[slot],
        }
    });
    let held = held.collect();
    (pages, held)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    /// In every format, whatever the width of a head and the size of a group: what plain f64 arithmetic gives on what the pages
    /// hold, and the same bits on every instruction set.
    #[test]
    fn attention_is_right_and_the_same_bits_on_every_instruction_set(
        total in 1usize..200,
        d in (1usize..36).prop_map(|d| 2 * d),
        group in 1usize..7,
        seed in any::<u64>(),
    ) {
        // Scores of a size that exponentials in f32 bear.
        let small = |count, seed, most: f32| -> Vec<f32> { numbers(count, seed).iter().map(|x| x / 10.0 * most).collect() };
        let queries = small(group * d, seed, 4.0);
        let (keys, values) = (small(total * d, seed ^ 2 << 40, 1.0), small(total * d, seed ^ 4 << 40, 1.0));
        for format in KvFormat::ALL {
            let (key_pages, keys) = pages(format, Order::Keys, &keys, d);
            let (value_pages, values) = pages(format, Order::Values, &values, d);
            let args = AttendArgs {
                queries: &queries,
                keys: &|page| KvPage::read(format, bytemuck::cast_slice(&key_pages[page])),
                values: &|page| KvPage::read(format, bytemuck::cast_slice(&value_pages[page])),
                total,
                head_dim: d,
            };
            let run = |isa| {
                let kernels = Kernels::of(isa).unwrap();
                let (mut scores, mut out) = (vec![7.0; args.score_floats()], vec![f32::NAN; group * d]);
                kernels.attend(&args, &mut scores, &mut out);
                // In parts, as several threads do it.
                let mut parts = vec![7.0; scores.len()];
                for (page, part) in parts.chunks_mut(group * PAGE).enumerate() {
                    kernels.scores(&args, page, part);
                }
                kernels.probabilities(&mut parts, total);
                assert_eq!(parts, scores);
                for at in (0..d).step_by(24) {
                    let width = 24.min(d - at);
                    let mut part = vec![f32::NAN; group * width];
                    kernels.weighted_values(&args, &parts, at, &mut part);
                    for (part, whole) in part.chunks(width).zip(out.chunks(d)) {
                        assert_eq!(part, &whole[at..at + width]);
                    }
                }
                (scores, out)
            };
            let (scores, out) = run(Isa::Portable);
            for h in 0..group {
                let product = |j: usize, i: usize| f64::from(queries[h * d + i]) * f64::from(keys[j * d + i]);
                let dot = |j: usize| (0..d).map(|i| product(j, i)).sum::<f64>();
                let raw: Vec<f64> = (0..total).map(|j| dot(j) / (d as f64).sqrt()).collect();
                let max = raw.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = raw.iter().map(|s| (s - max).exp()).sum();
                for j in 0..total {
                    let p = (raw[j] - max).exp() / sum;
                    let score = f64::from(scores[(j / PAGE * group + h) * PAGE + j % PAGE]);
                    prop_assert!((score - p).abs() <= 1e-5 * p, "{format} probability {j}");
                }
                for i in 0..d {
                    let o: f64 = (0..total).map(|j| (raw[j] - max).exp() / sum * f64::from(values[j * d + i])).sum();
                    prop_assert!((f64::from(out[h * d + i]) - o).abs() < 2e-6, "{format} output {i} of head {h}");
                }
            }
            for isa in Isa::available() {
                let (s, o) = run(isa);
                prop_assert_eq!(bits(&s), bits(&scores), "{} {}", format, isa);
                prop_assert_eq!(bits(&o), bits(&out), "{} {}", format, isa);
            }
        }
    }

    #[test]
    fn float_kernels_give_the_bits_of_the_portable_ones(n in 1usize..300, tokens in 1usize..7, seed in any::<u64>()) {
        let (x, y) = (numbers(n, seed), numbers(n, !seed));
        let hidden = numbers(n * tokens, seed ^ 1 << 40);
        let bf16: Vec<u16> = y.iter().map(|y| (y.to_bits() >> 16) as u16).collect();
        let offsets: Vec<f32> = y.iter().map(|y| y.abs() / 10.0).collect();
        let results = |isa: Isa| {
            let kernels = Kernels::of(isa).unwrap();
            let mut floats = vec![vec![0f32; n]; 3];
            assert!(kernels.rms_norm(&x, &y, 1e-5, &mut floats[0]));
            kernels.relu2_gate(&x, &y, &mut floats[1]);
            kernels.silu_gate(&x, &y, &mut floats[2]);
            for rows in [FloatRows::F32 { values: &y, columns: n }, FloatRows::Bf16 { values: &bf16, columns: n }] {
                let mut out = vec![0f32; tokens];
                kernels.head(rows, &hidden, tokens, &mut out);
                floats.push(out);
            }
            let (mut bytes, mut codes) = (vec![0i8; n + 5], vec![0u8; n.next_multiple_of(8)]);
            let scale = kernels.quantize(&x, &mut bytes).unwrap();
            let step = kernels.screen_codes(&x, &offsets, &mut codes);
            floats.push(vec![scale.k, step]);
            let mut bad = x.clone();
            bad[seed as usize % n] = f32::NAN;
            let finite = (kernels.all_finite(&x), kernels.all_finite(&bad));
            (floats.iter().map(|f| bits(f)).collect::<Vec<_>>(), bytes, scale.sum, codes, finite)
        };
        let portable = results(Isa::Portable);
        prop_assert_eq!(portable.4, (true, false));
        for isa in Isa::available() {
            prop_assert!(results(isa) == portable, "{isa}");
        }
    }
}
