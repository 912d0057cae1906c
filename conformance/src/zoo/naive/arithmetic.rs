//! Numbers that every engine of the zoo needs, each computed once or in few steps: a proof spends most of its time here.

use super::weights::Ternary;
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

/// Sum of products in f64: eight sums side by side, for each addition waits for the one before it.
pub fn dot_float<A: Copy + Into<f64>>(a: &[A], b: &[f32]) -> f32 {
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        for ((sum, &a), &b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a.into() * f64::from(b);
        }
    }
    sums.iter().sum::<f64>() as f32
}

/// The products of a ternary matrix with codes, one a row, with the widest vectors that this processor has.
pub fn dots(matrix: &Ternary, codes: &[i16]) -> Vec<i32> {
    // Sixteen bits by sixteen: vector units multiply and add such pairs in one step, unless each sum is checked.
    let product = |t: i8, c: i16| i32::from(i16::from(t)).wrapping_mul(i32::from(c));
    let mut out = vec![0i32; matrix.rows];
    // Plain loops: what an iterator's own loop is compiled to is not part of the function that has the wide vectors.
    pulp::Arch::new().dispatch(|| {
        for (sum, row) in out.iter_mut().zip(matrix.trits.chunks_exact(matrix.columns.max(1))) {
            for (&t, &c) in row.iter().zip(codes) {
                *sum = sum.wrapping_add(product(t, c));
            }
        }
    });
    out
}

/// Rounds numbers below 2²² in size to whole ones, ties to even, as addition does by itself: without an instruction for it,
/// which the baseline of x86-64 lacks, `f32::round_ties_even` is a call.
pub fn round_ties_even(x: f32) -> f32 {
    const SHIFT: f32 = 1.5 * (1 << 23) as f32;
    (x + SHIFT) - SHIFT
}

/// Sines and cosines of a position's rotation, one a pair.
pub type Rotation = Rc<[(f64, f64)]>;

/// The rotation of a position in heads of `size` values: computed once, for it serves every head, layer and engine.
pub fn rotation(theta: f64, size: usize, position: usize) -> Rotation {
    /// More than any check needs.
    const MOST: usize = 1 << 14;
    thread_local! {
        static KNOWN: RefCell<HashMap<(u64, usize, usize), Rotation>> = RefCell::default();
    }
    KNOWN.with_borrow_mut(|known| {
        if known.len() > MOST {
            known.clear();
        }
        let angles = known.entry((theta.to_bits(), size, position)).or_insert_with(|| {
            let pairs = (0..size / 2).map(|i| {
                let exponent = f64::from((2.0 * i as f64 / size as f64) as f32);
                let inverse = (1.0 / libm::pow(theta, exponent) as f32) as f32;
                let angle = f64::from(position as f32 * inverse);
                (f64::from(libm::sin(angle) as f32), f64::from(libm::cos(angle) as f32))
            });
            pairs.collect()
        });
        angles.clone()
    })
}
