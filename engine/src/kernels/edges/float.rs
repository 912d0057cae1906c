//! The float kernels and the head.

use super::{bits, lengths, numbers};
use crate::kernels::guarded::{Guarded, Place};
use crate::kernels::{Isa, Kernels, Threads, head_matmul};
use crate::model::{FloatMatrix, FloatRows};

/// `found` is `expected` but for rounding.
fn assert_near(found: &[f32], expected: impl Iterator<Item = f64>, what: &str) {
    for (i, (&found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((f64::from(found) - expected).abs() <= 2e-6 * expected.abs() + 1e-6, "{what}[{i}]: {found} {expected}");
    }
}

/// The instruction sets with their kernels.
fn all_kernels() -> Vec<(Isa, &'static Kernels)> {
    Isa::available().into_iter().map(|isa| (isa, Kernels::of(isa).unwrap())).collect()
}

#[test]
fn rows_of_every_length_at_every_offset() {
    for n in lengths() {
        let (x, y) = (numbers(n, n), numbers(n, n + 1000));
        let wide = |x: f32| f64::from(x);
        let mean = x.iter().map(|&x| wide(x) * wide(x)).sum::<f64>() / n as f64;
        let pairs = || x.iter().zip(&y).map(|(&x, &y)| (wide(x), wide(y)));
        let mut expected: Option<[Vec<u32>; 3]> = None;
        for (isa, kernels) in all_kernels() {
            for (i, place) in Place::all::<f32>().into_iter().enumerate() {
                // The inputs elsewhere within their lines.
                let (x, y) =
                    (Guarded::of(&x, Place::any::<f32>(i * 7 + 1)), Guarded::of(&y, Place::any::<f32>(i * 5 + 2)));
                let mut out = [(); 3].map(|()| Guarded::<f32>::new(n, place));
                assert!(kernels.rms_norm(&x, &y, 1e-5, &mut out[0]));
                kernels.relu2_gate(&x, &y, &mut out[1]);
                kernels.silu_gate(&x, &y, &mut out[2]);
                assert!(kernels.all_finite(&x));
                if expected.is_none() {
                    assert_near(&out[0], pairs().map(|(x, y)| x / (mean + 1e-5).sqrt() * y), "rms_norm");
                    assert_near(&out[1], pairs().map(|(x, y)| x.max(0.0).powi(2) * y), "relu2_gate");
                    assert_near(&out[2], pairs().map(|(x, y)| x / (1.0 + (-x).exp()) * y), "silu_gate");
                }
                let found = out.each_ref().map(|out| bits(out));
                assert_eq!(&found, expected.get_or_insert(found.clone()), "{isa}, {n} at {place:?}");
            }
        }
    }
}

#[test]
fn bytes_of_every_length_at_every_offset() {
    for n in lengths() {
        let (x, offsets) = (numbers(n, n), numbers(n, n + 1000).iter().map(|y| y.abs() / 4.0).collect::<Vec<_>>());
        let largest = x.iter().fold(0f32, |m, x| m.max(x.abs()));
        let padded = n.next_multiple_of(8);
        for (isa, kernels) in all_kernels() {
            // Rows that are longer than a vector of bytes: a third of the places each, other ones than the row before.
            let (first, step) = if n > 17 { (n % 3, 3) } else { (0, 1) };
            for (i, place) in Place::all::<i8>().into_iter().enumerate().skip(first).step_by(step) {
                let (x, offsets) =
                    (Guarded::of(&x, Place::any::<f32>(i)), Guarded::of(&offsets, Place::any::<f32>(i + 3)));
                let (mut q, mut codes) = (Guarded::<i8>::new(n + i % 20, place), Guarded::<u8>::new(padded, place));
                let scale = kernels.quantize(&x, &mut q).unwrap();
                assert_eq!(scale.k, (1.0 / largest) * 127.0);
                let expected: Vec<i8> = x.iter().map(|x| (x * scale.k).round_ties_even() as i8).collect();
                assert_eq!(q[..n], expected, "{isa}, {n} at {place:?}");
                assert!(q[n..].iter().all(|&q| q == 0));
                assert_eq!(scale.sum, expected.iter().map(|&q| i32::from(q)).sum::<i32>());

                let step = f64::from(kernels.screen_codes(&x, &offsets, &mut codes));
                assert!((step / f64::from(largest) * 6.999 - 1.0).abs() < 1e-6);
                for i in 0..n {
                    let exact = f64::from(x[i]) / step + f64::from(offsets[i]) + 7.5;
                    assert!((f64::from(codes[i]) - exact).abs() < 0.50001, "{isa}, {n} at {place:?}: code {i}");
                }
                assert!(codes[n..].iter().all(|&c| c == 0));
            }
        }
    }
}

/// One number that is none, at every place of a row.
#[test]
fn what_is_not_finite_is_seen_wherever_it_is() {
    for n in 1..=40 {
        for (isa, kernels) in all_kernels() {
            let (mut x, mut q) = (Guarded::of(&numbers(n, n), Place::End), Guarded::<i8>::new(n, Place::End));
            for at in 0..n {
                let number = std::mem::replace(&mut x[at], [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][at % 3]);
                assert!(!kernels.all_finite(&x) && kernels.quantize(&x, &mut q).is_none(), "{isa}: {at} of {n}");
                x[at] = number;
            }
            assert!(kernels.all_finite(&x));
        }
    }
}

/// The rows of a head in either precision, for any number of tokens.
#[test]
fn heads_of_every_width_for_any_tokens() {
    for (turn, columns) in lengths().enumerate() {
        for tokens in 1..=9 {
            let rows = 1 + (columns + tokens) % 3;
            let (w, x) = (numbers(rows * columns, columns), numbers(tokens * columns, columns + 1000));
            let halves: Vec<u16> = w.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            let exact: Vec<f32> = halves.iter().map(|&w| f32::from_bits(u32::from(w) << 16)).collect();
            for (isa, kernels) in all_kernels() {
                let place = |i: usize| Place::any::<f32>(turn * 9 + tokens + i);
                let (w, exact) = (Guarded::of(&w, place(1)), Guarded::of(&exact, place(2)));
                let (halves, x) =
                    (Guarded::of(&halves, Place::any::<u16>(turn * 9 + tokens)), Guarded::of(&x, place(3)));
                let heads = [
                    (FloatRows::F32 { values: &w, columns }, &w),
                    (FloatRows::Bf16 { values: &halves, columns }, &exact),
                ];
                for (head, w) in heads {
                    let mut out = Guarded::<f32>::new(rows * tokens, place(0));
                    kernels.head(head, &x, tokens, &mut out);
                    for (i, &found) in out.iter().enumerate() {
                        let (w, x) = (&w[i / tokens * columns..], &x[i % tokens * columns..][..columns]);
                        let terms = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                        let most = 1e-6 * terms().map(f64::abs).sum::<f64>();
                        let near = (f64::from(found) - terms().sum::<f64>()).abs() <= most;
                        assert!(near, "{isa}: {i} of {rows}x{columns}, {tokens} tokens");
                    }
                }
            }
        }
    }
}

/// Around the 64 rows of a piece, with the output at any offset.
#[test]
fn whole_heads_of_any_number_of_rows() {
    let threads = Threads::new(Some(2)).unwrap();
    let rows_of = (1..=17).chain([31, 32, 33, 63, 64, 65, 127, 128, 129]);
    for (turn, rows) in rows_of.enumerate() {
        for (tokens, columns) in [(1, 33), (2, 16), (3, 7), (5, 40), (9, 1)] {
            let (w, x) = (numbers(rows * columns, rows), numbers(tokens * columns, rows + 1000));
            let head = FloatMatrix::from_f32(rows, columns, w.clone()).into();
            for (isa, kernels) in all_kernels() {
                let mut out = Guarded::<f32>::new(tokens * rows, Place::any::<f32>(turn * 5 + tokens));
                let x = Guarded::of(&x, Place::any::<f32>(turn + tokens));
                head_matmul(kernels, &threads, &head, &x, &mut out).unwrap();
                for (i, &found) in out.iter().enumerate() {
                    let (w, x) = (&w[i % rows * columns..], &x[i / rows * columns..][..columns]);
                    let sum: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                    let near = (f64::from(found) - sum).abs() <= 1e-6 * 16.0 * columns as f64;
                    assert!(near, "{isa}: {i} of {tokens} tokens by {rows} rows of {columns}");
                }
            }
        }
    }
}
