//! How far two rows of logits are apart.
//!
//! Rows are `f32` or `f64` slices of one length. The first argument is the row under test, the second the one it is held
//! to. Rows of different or zero length, and rows with a NaN, give NaN, which no comparison with a tolerance passes.

/// A row of logits can have either float type.
pub trait Value: Copy + Into<f64> {}

impl Value for f32 {}
impl Value for f64 {}

/// Largest absolute difference.
pub fn max_abs_diff<A: Value, B: Value>(actual: &[A], expected: &[B]) -> f64 {
    if actual.len() != expected.len() || actual.is_empty() {
        return f64::NAN;
    }
    // `f64::max` would drop a NaN.
    pairs(actual, expected)
        .map(|(a, e)| (a - e).abs())
        .fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst })
}

/// Pearson correlation. NaN for a constant row. Blind to any affine error: use [`slope`] and [`max_abs_diff`] beside it.
pub fn pearson<A: Value, B: Value>(actual: &[A], expected: &[B]) -> f64 {
    let m = Moments::of(actual, expected);
    m.covariance / (m.actual_variance.sqrt() * m.expected_variance.sqrt())
}

/// Slope of the least-squares line of `actual` over `expected`: 1 for equal rows, 2 for logits twice too large.
pub fn slope<A: Value, B: Value>(actual: &[A], expected: &[B]) -> f64 {
    let m = Moments::of(actual, expected);
    m.covariance / m.expected_variance
}

/// Normalised mean squared error: sum of squared differences over sum of squares of `expected`.
pub fn nmse<A: Value, B: Value>(actual: &[A], expected: &[B]) -> f64 {
    if actual.len() != expected.len() {
        return f64::NAN;
    }
    let error: f64 = pairs(actual, expected).map(|(a, e)| (a - e) * (a - e)).sum();
    let size: f64 = pairs(actual, expected).map(|(_, e)| e * e).sum();
    error / size
}

/// Kullback-Leibler divergence of the softmax of `actual` from the softmax of `expected`, in nats.
pub fn kl_divergence<A: Value, B: Value>(actual: &[A], expected: &[B]) -> f64 {
    if actual.len() != expected.len() || actual.is_empty() {
        return f64::NAN;
    }
    let (log_q, log_p) = (log_softmax(actual), log_softmax(expected));
    log_p.iter().zip(&log_q).map(|(p, q)| libm::exp(*p) * (p - q)).sum()
}

/// Index of the largest value, the first of equals. `None` for an empty row and for one with a NaN.
pub fn top1<A: Value>(row: &[A]) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (i, &value) in row.iter().enumerate() {
        let value: f64 = value.into();
        if value.is_nan() {
            return None;
        }
        if best.is_none_or(|(_, largest)| value > largest) {
            best = Some((i, value));
        }
    }
    best.map(|(i, _)| i)
}

/// Difference between the largest and the second largest value; 0 for fewer than two.
pub fn margin<A: Value>(row: &[A]) -> f64 {
    let (mut first, mut second) = (f64::NEG_INFINITY, f64::NEG_INFINITY);
    for &value in row {
        let value: f64 = value.into();
        if value > first {
            (first, second) = (value, first);
        } else if value > second {
            second = value;
        }
    }
    if row.len() < 2 { 0.0 } else { first - second }
}

fn pairs<'a, A: Value, B: Value>(a: &'a [A], b: &'a [B]) -> impl Iterator<Item = (f64, f64)> + 'a {
    a.iter().zip(b).map(|(&a, &b)| (a.into(), b.into()))
}

fn log_softmax<A: Value>(row: &[A]) -> Vec<f64> {
    let row: Vec<f64> = row.iter().map(|&x| x.into()).collect();
    let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_total = libm::log(row.iter().map(|x| libm::exp(x - largest)).sum());
    row.iter().map(|x| x - largest - log_total).collect()
}

/// Sums of squares and products around the means.
struct Moments {
    covariance: f64,
    actual_variance: f64,
    expected_variance: f64,
}

impl Moments {
    fn of<A: Value, B: Value>(actual: &[A], expected: &[B]) -> Self {
        let n = if actual.len() == expected.len() { actual.len() as f64 } else { f64::NAN };
        let (sum_a, sum_e) = pairs(actual, expected).fold((0.0, 0.0), |(s, t), (a, e)| (s + a, t + e));
        let (mean_a, mean_e) = (sum_a / n, sum_e / n);
        let mut m = Moments { covariance: 0.0, actual_variance: 0.0, expected_variance: 0.0 };
        for (a, e) in pairs(actual, expected) {
            m.covariance += (a - mean_a) * (e - mean_e);
            m.actual_variance += (a - mean_a) * (a - mean_a);
            m.expected_variance += (e - mean_e) * (e - mean_e);
        }
        m
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: [f64; 4] = [1.0, -2.0, 0.5, 3.0];

    #[test]
    fn equal_rows_are_perfect_and_an_affine_error_shows_in_slope_and_kl_only() {
        assert_eq!((max_abs_diff(&ROW, &ROW), nmse(&ROW, &ROW), kl_divergence(&ROW, &ROW)), (0.0, 0.0, 0.0));
        assert!((pearson(&ROW, &ROW) - 1.0).abs() < 1e-15 && (slope(&ROW, &ROW) - 1.0).abs() < 1e-15);
        let twice: Vec<f32> = ROW.iter().map(|x| 2.0 * *x as f32 + 1.0).collect();
        assert!((pearson(&twice, &ROW) - 1.0).abs() < 1e-12);
        assert!((slope(&twice, &ROW) - 2.0).abs() < 1e-12);
        assert!(kl_divergence(&twice, &ROW) > 0.1);
        assert_eq!(max_abs_diff(&twice, &ROW), 4.0);
    }

    #[test]
    fn kl_and_nmse_by_hand() {
        // Two outcomes: p = (1/2, 1/2), q = (1/4, 3/4): KL(p, q) = ln(2/sqrt(3)).
        let (actual, expected) = ([0.0, 3f64.ln()], [0.0, 0.0]);
        assert!((kl_divergence(&actual, &expected) - (2.0 / 3f64.sqrt()).ln()).abs() < 1e-12);
        assert_eq!(nmse(&[1.0, 2.0], &[1.0, 4.0]), 4.0 / 17.0);
    }

    #[test]
    fn what_cannot_be_compared_is_nan() {
        let broken = [1.0, f64::NAN, 0.5, 3.0];
        type Measure = fn(&[f64], &[f64]) -> f64;
        let measures: [Measure; 5] = [max_abs_diff, pearson, slope, nmse, kl_divergence];
        for measure in measures {
            assert!(measure(&broken, &ROW).is_nan());
            assert!(measure(&ROW[..3], &ROW).is_nan());
            assert!(measure(&[], &[]).is_nan());
        }
        assert_eq!(top1(&broken), None);
    }

    #[test]
    fn top1_takes_the_first_of_equals() {
        assert_eq!(top1(&[0.0f32, 2.0, 2.0]), Some(1));
        assert_eq!(top1::<f32>(&[]), None);
        assert_eq!(margin(&[0.0, 5.0, 3.5]), 1.5);
        assert_eq!(margin(&[2.0, 2.0]), 0.0);
    }
}
