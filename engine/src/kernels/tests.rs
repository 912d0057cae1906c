//! The float kernels of every instruction set, to the bit against the portable path; attention against its definition as well. The ternary
//! product and the screen of the head have their tests beside them.

use super::guarded::{Guarded, Place};
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

/// Pages of positions and what they hold.
fn pages(format: KvFormat, order: Order, rows: &[f32], d: usize) -> (Vec<Guarded<f32>>, Vec<f32>) {
    // As the cache gives them: of f32, aligned to that. A page ends where nobody may read on.
    let blank = || Guarded::<f32>::new(format.page_bytes(d) / 4, Place::End);
    let mut pages: Vec<_> = (0..rows.len().div_ceil(d * PAGE)).map(|_| blank()).collect();
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

/// One head group's attention at one position.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attention {
    pub(super) total: usize,
    pub(super) d: usize,
    pub(super) group: usize,
    /// Dimensions of the values that are taken at a time.
    pub(super) part: usize,
    /// Where queries, scores and outputs lie.
    pub(super) place: Place,
    pub(super) seed: u64,
}

/// In every format: what plain f64 arithmetic gives on what the pages hold, and the same bits on every instruction set. What is in the
/// pages behind the last position is NaN, or nonsense.
pub(super) fn check_attention(case: Attention) {
    let Attention { total, d, group, part, place, seed } = case;
    // Scores of a size that exponentials in f32 bear.
    let small = |count, seed, most: f32| -> Vec<f32> { numbers(count, seed).iter().map(|x| x / 10.0 * most).collect() };
    let queries = Guarded::of(&small(group * d, seed, 4.0), place);
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
            let mut scores = Guarded::<f32>::new(args.score_floats(), place);
            let untouched = scores.iter().map(|x| x.to_bits()).next();
            let mut out = Guarded::<f32>::new(group * d, place);
            kernels.attend(&args, &mut scores, &mut out);
            let behind = scores.chunks(group * PAGE).last().into_iter().flat_map(|page| page.chunks(PAGE));
            for row in behind {
                let behind = &row[(total - 1) % PAGE + 1..];
                assert!(
                    behind.iter().all(|x| Some(x.to_bits()) == untouched),
                    "{isa}: scores behind the last position"
                );
            }
            // In parts, as several threads do it.
            let mut parts = Guarded::<f32>::new(scores.len(), place);
            for (page, of_page) in parts.chunks_mut(group * PAGE).enumerate() {
                let mut own = Guarded::<f32>::new(of_page.len(), place);
                kernels.scores(&args, page, &mut own);
                of_page.copy_from_slice(&own);
            }
            kernels.probabilities(&mut parts, total);
            assert_eq!(bits(&parts), bits(&scores), "{isa}");
            for at in (0..d).step_by(part) {
                let width = part.min(d - at);
                let mut some = Guarded::<f32>::new(group * width, place);
                kernels.weighted_values(&args, &parts, at, &mut some);
                for (some, whole) in some.chunks(width).zip(out.chunks(d)) {
                    assert_eq!(some, &whole[at..at + width], "{isa}: values {at} and on");
                }
            }
            (scores.to_vec(), out.to_vec())
        };
        let (scores, out) = run(Isa::Portable);
        for h in 0..group {
            let product = |j: usize, i: usize| f64::from(queries[h * d + i]) * f64::from(keys[j * d + i]);
            let dot = |j: usize| (0..d).map(|i| product(j, i)).sum::<f64>();
            let raw: Vec<f64> = (0..total).map(|j| dot(j) / (d as f64).sqrt()).collect();
            let max = raw.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = raw.iter().map(|s| (s - max).exp()).sum();
            let weights: Vec<f64> = raw.iter().map(|s| (s - max).exp() / sum).collect();
            for j in 0..total {
                let score = f64::from(scores[(j / PAGE * group + h) * PAGE + j % PAGE]);
                assert!((score - weights[j]).abs() <= 1e-5 * weights[j], "{format} {case:?}: probability {j}");
            }
            for i in 0..d {
                let o: f64 = (0..total).map(|j| weights[j] * f64::from(values[j * d + i])).sum();
                assert!((f64::from(out[h * d + i]) - o).abs() < 2e-6, "{format} {case:?}: output {i} of head {h}");
            }
        }
        for isa in Isa::available() {
            let (s, o) = run(isa);
            assert_eq!(bits(&s), bits(&scores), "{format} {isa} {case:?}");
            assert_eq!(bits(&o), bits(&out), "{format} {isa} {case:?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    /// Whatever the width of a head and the size of a group.
    #[test]
    fn attention_is_right_and_the_same_bits_on_every_instruction_set(
        total in 1usize..200,
        d in (1usize..36).prop_map(|d| 2 * d),
        group in 1usize..7,
        place in any::<usize>(),
        seed in any::<u64>(),
    ) {
        check_attention(Attention { total, d, group, part: 24, place: Place::any::<f32>(place), seed });
    }

    #[test]
    fn float_kernels_give_the_bits_of_the_portable_ones(n in 1usize..300, tokens in 1usize..7, seed in any::<u64>()) {
        let place = |i: usize| Place::any::<f32>((seed >> 8) as usize + 5 * i);
        let (x, y) = (Guarded::of(&numbers(n, seed), place(0)), Guarded::of(&numbers(n, !seed), place(1)));
        let hidden = Guarded::of(&numbers(n * tokens, seed ^ 1 << 40), place(2));
        let bf16: Vec<u16> = y.iter().map(|y| (y.to_bits() >> 16) as u16).collect();
        let offsets: Vec<f32> = y.iter().map(|y| y.abs() / 10.0).collect();
        let results = |isa: Isa| {
            let kernels = Kernels::of(isa).unwrap();
            let mut floats: Vec<_> = (3..6).map(|i| Guarded::<f32>::new(n, place(i))).collect();
            assert!(kernels.rms_norm(&x, &y, 1e-5, &mut floats[0]));
            kernels.relu2_gate(&x, &y, &mut floats[1]);
            kernels.silu_gate(&x, &y, &mut floats[2]);
            for rows in [FloatRows::F32 { values: &y, columns: n }, FloatRows::Bf16 { values: &bf16, columns: n }] {
                let mut out = Guarded::<f32>::new(tokens, place(7));
                kernels.head(rows, &hidden, tokens, &mut out);
                floats.push(out);
            }
            let mut bytes = Guarded::<i8>::new(n + 5, place(8));
            let mut codes = Guarded::<u8>::new(n.next_multiple_of(8), place(9));
            let scale = kernels.quantize(&x, &mut bytes).unwrap();
            let step = kernels.screen_codes(&x, &offsets, &mut codes);
            floats.push(Guarded::of(&[scale.k, step], Place::End));
            let mut bad = x.to_vec();
            bad[seed as usize % n] = f32::NAN;
            let finite = (kernels.all_finite(&x), kernels.all_finite(&bad));
            (floats.iter().map(|f| bits(f)).collect::<Vec<_>>(), bytes.to_vec(), scale.sum, codes.to_vec(), finite)
        };
        let portable = results(Isa::Portable);
        prop_assert_eq!(portable.4, (true, false));
        for isa in Isa::available() {
            prop_assert!(results(isa) == portable, "{isa}");
        }
    }
}
