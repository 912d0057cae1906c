//! The slope of a series with a confidence interval: Theil and Sen's, which neither a step nor an outlier moves.

/// Deviations that a bound leaves out with 99 % confidence (one-sided normal quantile).
const DEVIATIONS: f64 = 2.326;

/// The slope of a series.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slope {
    /// 99 of 100 times the slope is at least this.
    pub low: f64,
    /// The median of the slopes of all pairs of points.
    pub middle: f64,
    /// 99 of 100 times the slope is at most this.
    pub high: f64,
}

/// The slope of evenly spaced values, `step` apart. NaN for fewer than two.
pub(super) fn slope(values: &[f64], step: f64) -> Slope {
    let n = values.len();
    let mut slopes: Vec<f64> = (0..n)
        .flat_map(|i| (i + 1..n).map(move |j| (i, j)))
        .map(|(i, j)| (values[j] - values[i]) / ((j - i) as f64 * step))
        .collect();
    slopes.sort_by(f64::total_cmp);
    let pairs = slopes.len();
    // Under Kendall's variance this many ranks lie between the two bounds.
    let variance = (n * n.saturating_sub(1) * (2 * n + 5)) as f64 / 18.0;
    let outside = (pairs as f64 - DEVIATIONS * variance.sqrt()) / 2.0;
    let rank = (outside.max(0.0) as usize).saturating_sub(1);
    let at = |rank: usize| slopes.get(rank).copied().unwrap_or(f64::NAN);
    Slope { low: at(rank), middle: at(pairs / 2), high: at(pairs.saturating_sub(1).saturating_sub(rank)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(value: fn(f64) -> f64) -> Slope {
        slope(&(0..20).map(|i| value(f64::from(i))).collect::<Vec<_>>(), 10.0)
    }

    #[test]
    fn a_line_has_its_slope_and_a_constant_none() {
        let line = series(|x| 5000.0 * x + 3.0);
        assert_eq!((line.low, line.middle, line.high), (500.0, 500.0, 500.0));
        let flat = series(|_| 7.0);
        assert_eq!((flat.low, flat.middle, flat.high), (0.0, 0.0, 0.0));
    }

    #[test]
    fn a_step_an_outlier_and_a_plateau_are_no_growth() {
        assert_eq!(series(|x| if x < 9.0 { 0.0 } else { 132e3 }).low, 0.0);
        assert_eq!(series(|x| if x == 12.0 { 1e9 } else { 0.0 }).low, 0.0);
        assert_eq!(series(|x| x.min(6.0) * 4096.0).low, 0.0);
    }

    #[test]
    fn pages_of_a_small_leak_and_blocks_of_a_rare_one_are_growth() {
        // 508 bytes a call in whole pages; 64 KiB every sixtieth call.
        assert!(series(|x| (x * 5080.0 / 4096.0).floor() * 4096.0).low > 256.0);
        assert!(series(|x| (x / 6.0).floor() * 65_536.0).low > 256.0);
    }

    #[test]
    fn bounds_lie_around_the_middle_of_a_noisy_line() {
        let noisy = series(|x| 1000.0 * x + (x * x * 7.3) % 5.0 * 1000.0);
        assert!(noisy.low < noisy.middle && noisy.middle < noisy.high);
        assert!(noisy.low > 0.0 && noisy.high < 250.0, "{noisy:?}");
        assert!(slope(&[1.0], 1.0).middle.is_nan());
    }
}
