//! The screen against the whole head.

use super::*;
use crate::kernels::guarded::{Guarded, Place};
use crate::kernels::{Isa, head_matmul};
use crate::model::FloatMatrix;
use proptest::prelude::*;

fn number(i: usize, seed: u64) -> f32 {
    let z = (i as u64 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (((z ^ (z >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f32 / (1 << 23) as f32) - 1.0
}

/// A sum of four uniform numbers is near a normal one.
fn normal(i: usize, seed: u64) -> f32 {
    (0..4).map(|k| number(4 * i + k, seed)).sum()
}

fn table(rows: usize, columns: usize, value: impl Fn(usize) -> f32) -> FloatTable {
    FloatMatrix::from_f32(rows, columns, (0..rows * columns).map(value).collect()).into()
}

/// What `largest` finds, against the whole head: every token asked for, to the bit. False when an instruction set left it to the
/// whole head.
fn check(head: &FloatTable, hidden: &[f32], top: usize, also: &[u32]) -> bool {
    let mut found = true;
    for isa in Isa::available() {
        let kernels = Kernels::of(isa).unwrap();
        let threads = Threads::new(Some(2)).unwrap();
        let mut whole = Guarded::<f32>::new(head.rows(), Place::any::<f32>(head.rows() + head.columns()));
        head_matmul(kernels, &threads, head, hidden, &mut whole).unwrap();
        let screen = HeadScreen::new(head, kernels, &threads).unwrap();
        let mut scratch = ScreenScratch::default();
        let state = HeadAndState { head, hidden };
        if !screen.largest(&state, kernels, &threads, top, also, &mut scratch) {
            found = false;
            continue;
        }
        let mut order: Vec<u32> = (0..head.rows() as u32).collect();
        order.sort_by(|a, b| whole[*b as usize].total_cmp(&whole[*a as usize]).then(a.cmp(b)));
        let last = whole[order[top - 1] as usize];
        let wanted = order.iter().copied().filter(|&row| whole[row as usize] >= last).chain(also.iter().copied());
        for row in wanted {
            let at = scratch.logits().binary_search_by_key(&row, |l| l.0);
            let (_, logit) = scratch.logits()[at.unwrap_or_else(|_| panic!("{isa}: row {row} is missing"))];
            assert_eq!(logit.to_bits(), whole[row as usize].to_bits(), "{isa}: row {row}");
        }
        assert!(scratch.logits().is_sorted_by(|a, b| a.0 < b.0));
    }
    found
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn the_largest_logits_are_those_of_the_whole_head(
        rows in 600usize..3000,
        columns in 8usize..200,
        top in 1usize..9,
        seed in any::<u64>(),
        scale in prop::sample::select(vec![1e-20f32, 1e-3, 1.0, 1e6]),
    ) {
        let head = table(rows, columns, |i| scale * normal(i, seed));
        let hidden: Vec<f32> = (0..columns).map(|i| normal(i, !seed)).collect();
        check(&head, &hidden, top, &[0, 5, rows as u32 - 1]);
    }
}

/// Rows as in a trained model: one that fits the state stands out. Here the screen must do the work.
#[test]
fn a_row_that_stands_out_is_found_without_the_whole_head() {
    let (rows, columns) = (4096, 256);
    let hidden: Vec<f32> = (0..columns).map(|i| normal(i, 1)).collect();
    for place in [0, 1777, 4095] {
        let head =
            table(rows, columns, |i| normal(i, 2) + if i / columns == place { 0.5 * hidden[i % columns] } else { 0.0 });
        assert!(check(&head, &hidden, 1, &[]));
    }
}

/// Equal rows have equal logits: all of them are found, or the lowest could not win.
#[test]
fn ties_are_all_found() {
    let (rows, columns) = (2048, 64);
    let hidden: Vec<f32> = (0..columns).map(|i| normal(i, 3)).collect();
    let head = table(rows, columns, |i| if i / columns % 500 == 7 { hidden[i % columns] } else { 0.1 * normal(i, 4) });
    assert!(check(&head, &hidden, 1, &[]));
}

/// Outliers make a row's step wide and rows of zeroes make it vanish; states of zeroes make every logit a tie.
#[test]
fn odd_heads_and_states_are_right_or_left_to_the_whole_head() {
    let (rows, columns) = (1024, 40);
    let hidden: Vec<f32> = (0..columns).map(|i| normal(i, 5)).collect();
    let outliers = table(rows, columns, |i| if i % 97 == 0 { 50.0 } else { 1.0 } * normal(i, 6));
    check(&outliers, &hidden, 3, &[]);
    check(&table(rows, columns, |i| if i / columns < 900 { 0.0 } else { normal(i, 7) }), &hidden, 2, &[]);
    check(&table(rows, columns, |_| 0.0), &hidden, 1, &[]);
    check(&outliers, &vec![0.0; columns], 1, &[]);
    check(&outliers, &vec![1e-30; columns], 1, &[]);
    let huge: Vec<f32> = hidden.iter().map(|h| h * 1e36).collect();
    let screen_gives_up = !check(&outliers, &huge, 1, &[]);
    assert!(screen_gives_up, "a state near the end of f32");
}

/// The largest codes and states of one sign: 16-bit sums that run on for too long overflow here.
#[test]
fn saturating_states_do_not_overflow() {
    let (rows, columns) = (1024, 1000);
    let head = table(rows, columns, |i| 1.0 + (i / columns) as f32 / rows as f32);
    for hidden in [5.0, -5.0] {
        assert!(check(&head, &vec![hidden; columns], 1, &[]), "{hidden}");
    }
}

/// The error of the estimate is within the bound for every row: far within it, since the bound is for one in 2^80.
#[test]
fn estimates_are_within_the_bound() {
    let (rows, columns) = (8192, 320);
    let head = table(rows, columns, |i| normal(i, 8));
    let hidden: Vec<f32> = (0..columns).map(|i| normal(i, 9)).collect();
    let kernels = Kernels::of(Isa::best()).unwrap();
    let threads = Threads::new(Some(1)).unwrap();
    let screen = HeadScreen::new(&head, kernels, &threads).unwrap();
    let mut scratch = ScreenScratch::default();
    let slack = screen.estimate(kernels, &threads, &hidden, &mut scratch).unwrap();
    let mut whole = vec![0.0; rows];
    head_matmul(kernels, &threads, &head, &hidden, &mut whole).unwrap();
    let share = |r: usize| f64::from((whole[r] - scratch.estimates[r]).abs()) / (f64::from(screen.steps[r]) * slack);
    let worst = (0..rows).map(share).fold(0.0, f64::max);
    // Normal errors of standard deviation 1 / sqrt(12) steps: of 8192, the largest is about 4 of them, of 10.6 in the bound.
    assert!((0.2..0.65).contains(&worst), "{worst}");
}

/// Every number of columns around the blocks of eight and the runs of 16-bit sums, every group of rows, the estimates at every offset:
/// the plain sums of the codes.
#[test]
fn estimates_are_the_sums_of_the_codes() {
    let mut turn = 0;
    for columns in (1..=34usize).chain([62, 63, 64, 65, 66, 127, 128, 129]) {
        let blocks = columns.div_ceil(BLOCK);
        for groups in 1..=3 {
            turn += 1;
            let codes: Vec<u8> =
                (0..groups * blocks * BLOCK_BYTES).map(|i| (number(i, 1) * 128.0) as i8 as u8).collect();
            let steps: Vec<f32> = (0..groups * ROWS).map(|r| 0.1 + number(r, 2).abs()).collect();
            let part = |seed, most: f32| -> Vec<i32> {
                let byte = |i: usize| if i < columns { (number(i, seed) * most) as i8 } else { 0 };
                (0..2 * blocks).map(|d| i32::from_ne_bytes(std::array::from_fn(|j| byte(4 * d + j) as u8))).collect()
            };
            let (upper, lower) = (part(3, 127.0), part(4, 64.0));
            let (factor, bias) = (0.01, 3.0);
            let q = |c: usize| {
                let [upper, lower] = [&upper, &lower].map(|part| i64::from(part[c / 4].to_ne_bytes()[c % 4] as i8));
                128 * upper + lower
            };
            let code = |r: usize, c: usize| {
                let byte = codes[(r / ROWS * blocks + c / BLOCK) * BLOCK_BYTES + 4 * (r % ROWS) + c % 4];
                i64::from(if c % BLOCK < 4 { byte & 15 } else { byte >> 4 })
            };
            let expected = |r: usize| {
                let sum: i64 = (0..columns).map(|c| code(r, c) * q(c)).sum();
                steps[r] * (factor * sum as f32 - bias)
            };
            for isa in Isa::available() {
                let place = Place::any::<f32>(turn);
                let (codes, steps) = (Guarded::of(&codes, Place::any::<u8>(turn)), Guarded::of(&steps, place));
                let (upper, lower) = (Guarded::of(&upper, place), Guarded::of(&lower, Place::End));
                let pass =
                    ScreenPass { codes: &codes, blocks, upper: &upper, lower: &lower, steps: &steps, factor, bias };
                for first in 0..groups {
                    let mut out = Guarded::<f32>::new((groups - first) * ROWS, place);
                    Kernels::of(isa).unwrap().screen(&pass, first, &mut out);
                    for (r, &out) in out.iter().enumerate() {
                        assert_eq!(
                            out,
                            expected(first * ROWS + r),
                            "{isa}: row {r} from group {first}, {columns} columns"
                        );
                    }
                }
            }
        }
    }
}
