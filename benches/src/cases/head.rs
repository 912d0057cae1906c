//! The output head, whole and screened.

use bitnet_contracts::Result;
use bitnet_engine::alone::Head;
use bitnet_engine::kernels::{Kernels, Threads};

use super::{Case, Outcome, Work, check, number};

/// A state and bf16 rows, of which one fits it: as in a trained model one logit stands out.
struct Made {
    values: Vec<u16>,
    hidden: Vec<f32>,
    outstanding: usize,
}

fn bf16(x: f32) -> u16 {
    (x.to_bits() >> 16) as u16
}

fn widen(bits: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(bits) << 16))
}

fn made(rows: usize, columns: usize) -> Made {
    let hidden: Vec<f32> = (0..columns).map(|i| number(i + 7)).collect();
    let outstanding = rows / 3;
    let mut values: Vec<u16> = (0..rows * columns).map(|i| bf16(number(i))).collect();
    for (value, h) in values[outstanding * columns..].iter_mut().zip(&hidden) {
        *value = bf16(widen(*value) as f32 + h);
    }
    Made { values, hidden, outstanding }
}

/// The logit of one row and the largest rounding error that a sum of f32 products can have.
fn plain(row: &[u16], hidden: &[f32]) -> (f64, f64) {
    let products = || row.iter().zip(hidden).map(|(&w, &h)| widen(w) * f64::from(h));
    let magnitudes: f64 = products().map(f64::abs).sum();
    (products().sum(), magnitudes * row.len() as f64 * f64::from(f32::EPSILON))
}

/// Every logit of one state.
pub struct HeadCase {
    kernels: Kernels,
    threads: Threads,
    head: Head,
    made: Made,
    out: Vec<f32>,
}

impl HeadCase {
    /// A head of `rows` rows of `columns`.
    ///
    /// # Errors
    /// As [`Head::from_bf16`].
    pub fn new(kernels: &Kernels, threads: &Threads, rows: usize, columns: usize) -> Result<Self> {
        let made = made(rows, columns);
        let head = Head::from_bf16(kernels, threads, columns, made.values.clone())?;
        Ok(Self { kernels: kernels.clone(), threads: threads.clone(), head, made, out: vec![0.0; rows] })
    }
}

impl Case for HeadCase {
    fn run(&mut self) -> Result<()> {
        self.head.logits(&self.kernels, &self.threads, &self.made.hidden, &mut self.out)
    }

    fn verify(&self) -> Outcome {
        let columns = self.made.hidden.len();
        for row in [0, self.made.outstanding, self.out.len() - 1] {
            let (should, error) = plain(&self.made.values[row * columns..][..columns], &self.made.hidden);
            let is = f64::from(self.out[row]);
            check((is - should).abs() <= error, || format!("row {row}: {is}, not {should}"))?;
        }
        Ok(())
    }

    fn work(&self) -> Work {
        Work::Memory(self.head.bytes())
    }
}

/// The largest logit of one state, found with the screen.
pub struct ScreenedHeadCase {
    whole: HeadCase,
    found: Option<(u32, f32)>,
}

impl ScreenedHeadCase {
    /// A head of `rows` rows of `columns`.
    ///
    /// # Errors
    /// As [`Head::from_bf16`].
    pub fn new(kernels: &Kernels, threads: &Threads, rows: usize, columns: usize) -> Result<Self> {
        Ok(Self { whole: HeadCase::new(kernels, threads, rows, columns)?, found: None })
    }
}

impl Case for ScreenedHeadCase {
    fn run(&mut self) -> Result<()> {
        let HeadCase { kernels, threads, head, made, .. } = &mut self.whole;
        let logits = head.largest(kernels, threads, &made.hidden)?;
        let larger = |a: &(u32, f32), b: &(u32, f32)| a.1.total_cmp(&b.1);
        self.found = logits.and_then(|logits| logits.iter().copied().max_by(larger));
        Ok(())
    }

    fn verify(&self) -> Outcome {
        let HeadCase { kernels, threads, head, made, out } = &self.whole;
        let mut out = vec![0f32; out.len()];
        head.logits(kernels, threads, &made.hidden, &mut out)?;
        let largest = (0..).zip(out).max_by(|a: &(u32, f32), b| a.1.total_cmp(&b.1));
        check(self.found.is_some() && self.found == largest, || format!("{:?}, not {largest:?}", self.found))
    }

    fn work(&self) -> Work {
        Work::Memory(self.whole.head.screen_bytes())
    }
}
