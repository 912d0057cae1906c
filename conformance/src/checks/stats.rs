//! The arithmetic of comparisons: two logit rows against each other, and seen frequencies against probabilities.
//!
//! Everything here is f64 and pure. A NaN anywhere in what a backend returned turns into the worst possible figure, so
//! that no gate written as `worst < limit` can be passed by not being comparable.

/// One row of logits held against the row it should be.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowStats {
    /// Pearson correlation; blind to any affine error, hence the others.
    pub pearson: f64,
    /// Squared error over the squared deviation of the expected row from its mean.
    pub nmse: f64,
    /// Slope of the regression of seen on expected: 1 where the scale is right.
    pub slope: f64,
    /// KL(expected ‖ seen) of the two softmax distributions, nats.
    pub kl: f64,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// The expected row's top-1 minus top-2 logit where the seen top-1 is another token; 0 where they agree.
    pub lost_margin: f64,
}

/// Compares one row. Both slices have the same, positive length.
pub(super) fn compare_row(seen: &[f32], expected: &[f32]) -> RowStats {
    let n = expected.len() as f64;
    let mean = |row: &[f32]| row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let (mean_seen, mean_expected) = (mean(seen), mean(expected));
    let (mut ss, mut ee, mut se, mut dd, mut max_abs) = (0.0, 0.0, 0.0, 0.0, 0.0f64);
    for (&s, &e) in seen.iter().zip(expected) {
        let (s, e) = (f64::from(s), f64::from(e));
        ss += (s - mean_seen).powi(2);
        ee += (e - mean_expected).powi(2);
        se += (s - mean_seen) * (e - mean_expected);
        dd += (s - e).powi(2);
        let gap = (s - e).abs();
        max_abs = if gap.is_nan() { f64::INFINITY } else { max_abs.max(gap) };
    }
    let worst_if_nan = |x: f64, worst: f64| if x.is_nan() { worst } else { x };
    let pearson = match (ss > 0.0, ee > 0.0) {
        (true, true) => se / (ss * ee).sqrt(),
        _ if ss.is_nan() || ee.is_nan() => f64::NAN,
        // A constant row correlates with a constant row and with nothing else.
        (varies, expected) => f64::from(u8::from(varies == expected)),
    };
    let kl = log_softmax(expected).iter().zip(log_softmax(seen)).map(|(e, s)| e.exp() * (e - s)).sum::<f64>();
    let (top, margin) = top_two(expected);
    let lost_margin = if top_two(seen).0 == top { 0.0 } else { margin };
    RowStats {
        pearson: worst_if_nan(pearson, -1.0),
        nmse: worst_if_nan(dd / ee, f64::INFINITY),
        slope: worst_if_nan(se / ee, f64::INFINITY),
        kl: worst_if_nan(kl, f64::INFINITY),
        max_abs,
        lost_margin,
    }
}

/// Many rows held against the rows they should be.
#[derive(Debug, Clone, Default)]
pub(super) struct Rows {
    rows: Vec<RowStats>,
}

impl Rows {
    /// Adds the rows of two equally long lists of logits, `vocab` to a row.
    pub(super) fn add(&mut self, seen: &[f32], expected: &[f32], vocab: usize) {
        let pairs = seen.chunks_exact(vocab).zip(expected.chunks_exact(vocab));
        self.rows.extend(pairs.map(|(s, e)| compare_row(s, e)));
    }

    /// The rows compared.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// The extreme of a figure and the row it is in; `worse(a, b)` says that `a` is worse than `b`.
    pub(super) fn worst(&self, figure: fn(&RowStats) -> f64, worse: fn(f64, f64) -> bool) -> (usize, f64) {
        let mut found = None;
        for (i, row) in self.rows.iter().enumerate() {
            let value = figure(row);
            if found.is_none_or(|(_, kept)| worse(value, kept)) {
                found = Some((i, value));
            }
        }
        found.unwrap_or((0, f64::NAN))
    }

    /// The lowest Pearson correlation and its row.
    pub(super) fn worst_pearson(&self) -> (usize, f64) {
        self.worst(|r| r.pearson, |a, b| a < b)
    }

    /// The largest absolute difference and its row.
    pub(super) fn worst_abs(&self) -> (usize, f64) {
        self.worst(|r| r.max_abs, |a, b| a > b)
    }

    /// The largest KL divergence, nats, and its row.
    pub(super) fn worst_kl(&self) -> (usize, f64) {
        self.worst(|r| r.kl, |a, b| a > b)
    }

    /// A figure of every row, in order.
    pub(super) fn figures(&self, figure: fn(&RowStats) -> f64) -> impl Iterator<Item = f64> {
        self.rows.iter().map(figure)
    }

    /// The mean of a figure over the rows.
    pub(super) fn mean(&self, figure: fn(&RowStats) -> f64) -> f64 {
        self.rows.iter().map(figure).sum::<f64>() / self.rows.len() as f64
    }
}

/// Natural logarithms of the softmax of a row.
pub(super) fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
    let sum: f64 = row.iter().map(|&x| (f64::from(x) - max).exp()).sum();
    row.iter().map(|&x| f64::from(x) - max - sum.ln()).collect()
}

/// The index of the largest value (the lowest index of equal ones) and its distance to the second largest.
pub(super) fn top_two(row: &[f32]) -> (usize, f64) {
    let (mut top, mut best, mut second) = (0, f64::NEG_INFINITY, f64::NEG_INFINITY);
    for (i, &x) in row.iter().enumerate() {
        let x = f64::from(x);
        if x > best {
            (top, second, best) = (i, best, x);
        } else if x > second {
            second = x;
        }
    }
    (top, best - second)
}

/// How surprising it is to see `hits` of `draws` where each has probability `p`: an upper bound on the probability of
/// a deviation this large in this direction is `exp(-surprise)` (Chernoff), with no approximation at any size.
pub(super) fn surprise(draws: usize, hits: usize, p: f64) -> f64 {
    let n = draws as f64;
    let q = hits as f64 / n;
    let term = |a: f64, b: f64| if a == 0.0 { 0.0 } else { a * (a / b.max(0.0)).ln() };
    n * (term(q, p) + term(1.0 - q, 1.0 - p))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_are_perfect_and_scaled_rows_show_only_in_slope_nmse_and_kl() {
        let row = [1.0f32, -2.0, 3.5, 0.25];
        let same = compare_row(&row, &row);
        assert!((same.pearson - 1.0).abs() < 1e-12 && same.nmse == 0.0 && same.max_abs == 0.0 && same.kl.abs() < 1e-12);
        let scaled = row.map(|x| x * 2.4);
        let off = compare_row(&scaled, &row);
        assert!((off.pearson - 1.0).abs() < 1e-12, "Pearson is blind to scale");
        assert!((off.slope - 2.4).abs() < 1e-6 && off.kl > 0.05 && off.nmse > 1.0);
    }

    #[test]
    fn nan_is_the_worst_of_everything() {
        let off = compare_row(&[f32::NAN, 1.0], &[0.0, 1.0]);
        assert_eq!((off.pearson, off.max_abs), (-1.0, f64::INFINITY));
        assert_eq!((off.kl, off.nmse), (f64::INFINITY, f64::INFINITY));
    }

    #[test]
    fn a_constant_row_does_not_correlate() {
        assert_eq!(compare_row(&[2.0, 2.0, 2.0], &[1.0, 2.0, 3.0]).pearson, 0.0);
    }

    #[test]
    fn top_two_takes_the_lowest_of_equal_maxima() {
        assert_eq!(top_two(&[1.0, 5.0, 5.0, 2.0]), (1, 0.0));
        assert_eq!(top_two(&[1.0, 2.0, 5.0]), (2, 3.0));
    }

    #[test]
    fn surprise_is_zero_at_the_mean_and_infinite_for_the_impossible() {
        assert!(surprise(100, 25, 0.25).abs() < 1e-9);
        assert_eq!(surprise(100, 1, 0.0), f64::INFINITY);
        // 100 heads of 100: probability 2^-100.
        assert!((surprise(100, 100, 0.5) - 100.0 * std::f64::consts::LN_2).abs() < 1e-9);
    }
}
