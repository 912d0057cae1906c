//! Rotary position embedding, half split ("NEOX"): pair `(i, i + d/2)` turns by `position * theta^(-2i/d)`.

/// The inverse frequencies of a model.
#[derive(Debug)]
pub(crate) struct Rope {
    inverse_frequencies: Vec<f32>,
}

impl Rope {
    /// For heads of `head_dim` floats. Computed in f32 as `transformers` does, with the power and the division each rounded once.
    pub(crate) fn new(theta: f64, head_dim: usize) -> Self {
        let inverse_frequencies = (0..head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / head_dim as f32;
                1.0 / (libm::pow(theta, f64::from(exponent)) as f32)
            })
            .collect();
        Self { inverse_frequencies }
    }

    /// Cosines and sines at `position`, appended to `out` as `[cos; d/2] [sin; d/2]`. The angle is an f32 product; its cosine and sine
    /// are correctly rounded f32 (computed in f64 by `libm`, so the same on every platform).
    pub(crate) fn angles(&self, position: usize, out: &mut Vec<f32>) {
        let angle = |&f: &f32| f64::from(position as f32 * f);
        out.extend(self.inverse_frequencies.iter().map(|f| libm::cos(angle(f)) as f32));
        out.extend(self.inverse_frequencies.iter().map(|f| libm::sin(angle(f)) as f32));
    }

    /// Length of what [`Self::angles`] appends: the head dimension.
    pub(crate) fn head_dim(&self) -> usize {
        2 * self.inverse_frequencies.len()
    }

    /// Turns every head of `x`, `[heads, d]`, by the `angles` of its position.
    pub(crate) fn apply(&self, x: &mut [f32], angles: &[f32]) {
        let half = self.inverse_frequencies.len();
        let (cos, sin) = angles.split_at(half);
        for head in x.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for i in 0..half {
                let (x, y) = (a[i], b[i]);
                a[i] = x * cos[i] - y * sin[i];
                b[i] = y * cos[i] + x * sin[i];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::guarded::{Guarded, Place};

    #[test]
    fn pairs_are_half_a_head_apart() {
        let rope = Rope::new(10_000.0, 4);
        let mut angles = Vec::new();
        rope.angles(3, &mut angles);
        let mut x = [1.0, 0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0];
        rope.apply(&mut x, &angles);
        let (fast, slow) = (3.0f32, 3.0f32 * 0.01);
        let expected = [fast.cos(), 0.0, fast.sin(), 0.0, 0.0, 2.0 * slow.cos(), 0.0, 2.0 * slow.sin()];
        for (x, e) in x.iter().zip(expected) {
            assert!((x - e).abs() < 1e-6, "{x} {e}");
        }
    }

    #[test]
    fn position_zero_turns_nothing() {
        let rope = Rope::new(500_000.0, 6);
        let mut angles = Vec::new();
        rope.angles(0, &mut angles);
        let mut x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        rope.apply(&mut x, &angles);
        assert_eq!(x, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    }

    /// Every even width around the vectors, at every offset, between pages that nobody may touch.
    #[test]
    fn heads_of_every_width_turn_by_the_definition() {
        for half in (1..=34).chain([63, 64, 65]) {
            let (rope, heads) = (Rope::new(500_000.0, 2 * half), 1 + half % 3);
            let mut angles = Vec::new();
            rope.angles(17, &mut angles);
            let number = |i: usize| ((i * 37 + half) % 101) as f32 / 50.0 - 1.0;
            let x: Vec<f32> = (0..heads * 2 * half).map(number).collect();
            for place in Place::all::<f32>() {
                let (mut turned, angles) = (Guarded::of(&x, place), Guarded::of(&angles, place));
                rope.apply(&mut turned, &angles);
                for (i, &found) in turned.iter().enumerate() {
                    let (head, at) = (i / (2 * half) * 2 * half, i % (2 * half));
                    let [a, b] = [head + at % half, head + at % half + half].map(|i| f64::from(x[i]));
                    let frequency = 500_000f64.powf(-((at % half) as f64) / half as f64);
                    let (sin, cos) = (17.0 * frequency).sin_cos();
                    let expected = if at < half { a * cos - b * sin } else { b * cos + a * sin };
                    assert!(
                        (f64::from(found) - expected).abs() < 1e-5,
                        "{i} of {heads} heads of {half} pairs at {place:?}"
                    );
                }
            }
        }
    }
}
