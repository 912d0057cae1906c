//! The ternary product in every packing, packing itself and the tables of the lookups.

use super::numbers;
use crate::kernels::guarded::{Guarded, Place};
use crate::kernels::lookup::table_lines;
use crate::kernels::ternary_tile::{Line, ROWS};
use crate::kernels::{Isa, Kernels, QuantizedActivations, TernaryJob, Threads, ternary_matmul};
use crate::ternary::InterleavedMatrix;
use crate::ternary::interleaved::{Packing, TritSource};

const SCALE: f32 = 0.37;

fn trit(row: usize, column: usize) -> i8 {
    ((row * 7919 + column * 104_729).wrapping_mul(0x9e37_79b9) >> 13) as i8 % 3 % 2
}

/// The definition.
fn product(rows: usize, columns: usize, x: &[f32]) -> Vec<f32> {
    let mut out = Vec::new();
    for x in x.chunks_exact(columns) {
        let k = (1.0 / x.iter().fold(1e-5f32, |m, x| m.max(x.abs()))) * 127.0;
        let q: Vec<i32> = x.iter().map(|x| (x * k).round_ties_even() as i32).collect();
        out.extend((0..rows).map(|r| {
            let sum: i32 = q.iter().enumerate().map(|(c, q)| i32::from(trit(r, c)) * q).sum();
            sum as f32 / k * SCALE
        }));
    }
    out
}

/// One matrix in every packing.
struct Matrices {
    packed: [InterleavedMatrix; 4],
    threads: Threads,
}

impl Matrices {
    fn new(rows: usize, columns: usize) -> Self {
        let threads = Threads::new(Some(1)).unwrap();
        let row = |r: usize, out: &mut [i8]| {
            out.iter_mut().enumerate().for_each(|(c, o)| *o = trit(r, c));
            Ok(())
        };
        let source = TritSource { rows, columns, scale: SCALE, row: &row };
        let packed = Packing::ALL.map(|packing| {
            let kernels = Kernels::of(Isa::best()).unwrap().with_packing(packing);
            InterleavedMatrix::pack(&source, kernels, &threads).unwrap()
        });
        Self { packed, threads }
    }

    /// The product with some tokens on every instruction set, written to `place` and added to what is there.
    fn check(&self, tokens: usize, place: Place) {
        let (rows, columns) = (self.packed[0].rows(), self.packed[0].columns());
        let x = numbers(tokens * columns, rows);
        let expected = product(rows, columns, &x);
        for (isa, weights) in Isa::available().into_iter().flat_map(|isa| self.packed.iter().map(move |w| (isa, w))) {
            let kernels = Kernels::of(isa).unwrap().with_packing(weights.packing());
            let mut q = QuantizedActivations::default();
            q.quantize(kernels, &self.threads, &Guarded::of(&x, place), columns, &String::new).unwrap();
            let [mut out, mut added] = [(); 2].map(|()| Guarded::<f32>::new(tokens * rows, place));
            added.fill(0.5);
            let jobs =
                [TernaryJob { weights, out: &mut out, add: false }, TernaryJob { weights, out: &mut added, add: true }];
            ternary_matmul(kernels, &self.threads, &q, jobs);
            let what = || format!("{isa}, {:?}, {rows}x{columns}, {tokens} tokens at {place:?}", weights.packing());
            assert_eq!(*out, *expected, "{}", what());
            assert!(added.iter().zip(&expected).all(|(a, e)| *a == 0.5 + e), "added: {}", what());
        }
    }
}

/// All up to two blocks of the smaller packings, then around one and two blocks of the largest, the runs of 16-bit sums (240 columns, 480)
/// and the stretches of panels (160 planes are 640 columns, 576 in whole blocks of triples).
#[test]
fn products_of_every_number_of_columns() {
    let around = [48, 60, 64, 80, 96, 128, 192, 240, 480, 576, 640].into_iter().flat_map(|n| n - 1..=n + 1);
    for (turn, columns) in (1..=40).chain(around).enumerate() {
        let matrices = Matrices::new(17, columns);
        for tokens in [1, 2, 4, 9] {
            matrices.check(tokens, Place::any::<f32>(turn + tokens));
        }
    }
}

/// Rows around the sixteen of a group and the four groups of a lookup, tokens around every tile (3, 4, 6, 12).
#[test]
fn products_of_every_number_of_rows_and_tokens() {
    for (turn, rows) in (1..=17).chain([31, 32, 33, 47, 48, 49, 64, 65, 80]).enumerate() {
        let matrices = Matrices::new(rows, 23);
        for tokens in (1..=13).chain([16, 17, 18, 19, 23, 24, 25]) {
            matrices.check(tokens, Place::any::<f32>(turn + tokens));
        }
    }
}

#[test]
fn products_at_every_offset() {
    for (rows, columns) in [(16, 20), (33, 97)] {
        let matrices = Matrices::new(rows, columns);
        for place in Place::all::<f32>() {
            [1, 3, 8, 13].into_iter().for_each(|tokens| matrices.check(tokens, place));
        }
    }
}

/// Packed bytes and tables, wherever they are read and written: those of the portable kernels, which have tests of their own.
#[test]
fn packing_and_tables_at_every_offset() {
    for (packing, blocks) in Packing::ALL.into_iter().flat_map(|p| [1, 2, 3, 5].map(|blocks| (p, blocks))) {
        let columns = packing.block() * blocks;
        let dword = |c: usize, r: usize| u32::from_le_bytes(std::array::from_fn(|j| trit(r, c + j) as u8));
        let lanes: Vec<u32> = (0..columns / 4 * ROWS).map(|i| dword(i / ROWS * 4, i % ROWS)).collect();
        let bytes = packing.bytes(ROWS, columns).unwrap();
        let activations: Vec<i8> = (0..columns).map(|i| (i * 37 + blocks) as i8).collect();
        let mut packed: Option<Vec<u8>> = None;
        let mut tables: Option<Vec<u8>> = None;
        for isa in Isa::available() {
            let kernels = Kernels::of(isa).unwrap().with_packing(packing);
            for (i, place) in Place::all::<u8>().into_iter().enumerate() {
                let mut out = Guarded::<u8>::new(bytes, place);
                kernels.pack(&Guarded::of(&lanes, Place::any::<u32>(i)), &mut out);
                assert_eq!(*out, packed.get_or_insert(out.to_vec())[..], "{isa}, {packing:?} at {place:?}");
                if packing.has_tables() {
                    // Lines are aligned: they are at an end, and what they are made of anywhere.
                    let ends = [Place::End, Place::Start];
                    let mut lines = Guarded::<Line>::new(table_lines(packing, columns), ends[i % 2]);
                    kernels.tables(&Guarded::of(&activations, place), &mut lines);
                    let lines: Vec<u8> = lines.iter().flat_map(|line| line.0).collect();
                    assert_eq!(&lines, tables.get_or_insert(lines.clone()), "{isa}, {packing:?} of {place:?}");
                }
            }
        }
    }
}
