//! The float kernels of every instruction set, to the bit: attention against its definition in plain loops, the others against the
//! portable path. The ternary product and the screen of the head have their tests beside them.

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

/// Probabilities and outputs: every score the plain sum over the dimensions, every output the plain sum over the positions.
fn plain_attention(args: &AttendArgs<'_>) -> (Vec<f32>, Vec<f32>) {
    let AttendArgs { queries, keys, values, total, head_dim: d } = *args;
    let (mut scores, mut out) = (Vec::new(), Vec::new());
    for query in queries.chunks_exact(d) {
        let score = |j: usize| {
            let product = |sum, i| sum + query[i] * keys(j / PAGE)[i * PAGE + j % PAGE];
            (0..d).fold(0f32, product) * (1.0 / (d as f32).sqrt())
        };
        let mut row: Vec<f32> = (0..total).map(score).collect();
        float::softmax(&mut row);
        out.extend((0..d).map(|i| (0..total).fold(0f32, |sum, j| sum + row[j] * values(j / PAGE)[j % PAGE * d + i])));
        scores.extend(row);
    }
    (scores, out)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    #[test]
    fn attention_is_its_definition(heads in 1usize..10, d in 1usize..150, total in 1usize..200, seed in any::<u64>()) {
        let queries = numbers(heads * d, seed);
        let page = |kind: u64| -> Vec<Vec<f32>> {
            (0..total.div_ceil(PAGE) as u64).map(|p| numbers(PAGE * d, seed ^ (8 * p + kind) << 32)).collect()
        };
        let (keys, values) = (page(1), page(2));
        let args =
            AttendArgs { queries: &queries, keys: &|p| &keys[p], values: &|p| &values[p], total, head_dim: d };
        let expected = plain_attention(&args);
        for isa in Isa::available() {
            let (mut scores, mut out) = (vec![f32::NAN; heads * total], vec![f32::NAN; heads * d]);
            Kernels::of(isa).unwrap().attend(&args, &mut scores, &mut out);
            prop_assert!(bits(&scores) == bits(&expected.0), "{isa}: probabilities");
            prop_assert!(bits(&out) == bits(&expected.1), "{isa}: output");
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
