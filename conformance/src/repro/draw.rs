//! Drawing models and schedules from a seed.

use super::file::Synthetic;
use super::schedule::{Call, Form, Forward, Generate, Schedule};
use fixtures::{Eos, GAUSSIAN_ZEROS, Layout, LinearClass, NormStyle, RopeSpelling, Spec, Storage};

/// SplitMix64.
pub(super) struct Draw(u64);

impl Draw {
    /// The draws of one iteration: iterations of one seed do not depend on each other.
    pub(super) fn of(seed: u64, iteration: u64) -> Self {
        let mut draw = Self(seed);
        let start = draw.next() ^ iteration.wrapping_mul(0xd6e8_feb8_6659_fd93);
        Self(start)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from `least` to `most`, both included.
    fn within(&mut self, least: usize, most: usize) -> usize {
        least + (self.next() % (most - least + 1) as u64) as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.within(0, from.len() - 1)]
    }

    /// Whether something happens that happens in `percent` of all cases.
    fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }
}

/// A small model: any shape, layout and spelling that the format knows.
pub(super) fn model(draw: &mut Draw) -> Synthetic {
    loop {
        let heads: usize = draw.pick(&[1, 1, 2, 2, 3, 4, 6, 8]);
        let hidden = heads * draw.pick(&[2, 4, 8, 8, 16, 16, 32]);
        let divisors: Vec<usize> = (1..=heads).filter(|&n| heads.is_multiple_of(n)).collect();
        let vocab = draw.within(8, 160);
        let eos = match draw.within(0, 2) {
            0 => Eos::Nothing,
            1 => Eos::One(draw.within(0, vocab - 1) as u32),
            _ => Eos::Two([draw.within(0, vocab - 1) as u32, draw.within(0, vocab - 1) as u32]),
        };
        let spec = Spec {
            hidden,
            ffn: 4 * draw.within(1, 32),
            layers: draw.within(1, 3),
            heads,
            kv_heads: draw.pick(&divisors),
            vocab,
            context: draw.within(4, 40),
            tied: draw.chance(50),
            rope_theta: draw.pick(&[100.0, 10_000.0, 500_000.0]),
            rope: draw.pick(&[RopeSpelling::Theta, RopeSpelling::Parameters]),
            eps: draw.pick(&[1e-6, 1e-5, 1e-3]),
            storage: draw.pick(&[Storage::F32, Storage::F16, Storage::Bf16]),
            layout: draw.pick(&[
                Layout::Packed(LinearClass::AutoBitLinear),
                Layout::Packed(LinearClass::BitLinear),
                Layout::Packed(LinearClass::BitLinearByDefault),
                Layout::Master,
            ]),
            norms: draw.pick(&[NormStyle::Plain, NormStyle::Plain, NormStyle::RealLike]),
            zeros: draw.pick(&[GAUSSIAN_ZEROS, GAUSSIAN_ZEROS, 0, 27_525, 50_000]),
            bos: draw.within(0, vocab - 1) as u32,
            eos,
            shards: draw.pick(&[1, 1, 2, 3]),
        };
        // Seeds of three digits leave room in the file, and there is no want of models.
        let seed = draw.within(0, 999) as u64;
        if hidden <= 128 && spec.check().is_ok() {
            return Synthetic { seed, spec };
        }
    }
}

/// What a cache holds at this point of a schedule.
#[derive(Clone, Copy)]
struct Held {
    capacity: usize,
    len: usize,
    batch: usize,
}

/// Calls for a model. Most of them are good ones; the rest must be refused.
pub(super) fn schedule(draw: &mut Draw, spec: &Spec) -> Schedule {
    let count = draw.within(1, 3);
    let mut caches: Vec<Held> =
        (0..count).map(|_| Held { capacity: draw.within(1, spec.context + 4), len: 0, batch: 1 }).collect();
    let capacities = caches.iter().map(|c| c.capacity).collect();
    let calls = (0..draw.within(4, 12)).map(|_| call(draw, spec, &mut caches)).collect();
    Schedule { caches: capacities, calls }
}

fn call(draw: &mut Draw, spec: &Spec, caches: &mut [Held]) -> Call {
    let cache = draw.within(0, caches.len() - 1);
    match draw.within(0, 99) {
        0..=69 => Call::Forward(forward(draw, spec, caches, cache)),
        70..=79 => {
            let to = draw.within(0, caches[cache].len);
            caches[cache].len = to;
            Call::Truncate { cache, to }
        }
        80..=83 => {
            caches[cache].len = 0;
            Call::Clear { cache }
        }
        84..=86 => {
            caches.iter_mut().for_each(|c| c.len = 0);
            Call::Reset {}
        }
        87..=93 => Call::Greedy(generate(draw, spec)),
        _ => Call::Sample { generate: generate(draw, spec), seed: draw.within(0, 99) as u64, top: draw.within(1, 5) },
    }
}

fn forward(draw: &mut Draw, spec: &Spec, caches: &mut [Held], cache: usize) -> Forward {
    let cached = draw.chance(70);
    let held = caches[cache];
    let mut batch = if draw.chance(15) { draw.within(2, 3) } else { 1 };
    // Now and then another number of sequences than the cache holds, which must be refused.
    if cached && held.len > 0 && draw.chance(95) {
        batch = held.batch;
    }
    let mut seq = draw.within(1, if batch == 1 { 8 } else { 4 });
    if cached && draw.chance(90) {
        seq = seq.min(held.capacity.min(spec.context).saturating_sub(held.len)).max(1);
    }
    let mut ids: Vec<Vec<u32>> = (0..batch).map(|_| tokens(draw, spec, seq)).collect();
    let form = match draw.within(0, 99) {
        0..=79 => Form::U32,
        80..=93 => Form::I64,
        94..=95 => Form::F32,
        96..=97 => Form::Flat,
        _ => Form::Deep,
    };
    let mut good = matches!(form, Form::U32 | Form::I64);
    if draw.chance(4) {
        let (row, at) = (draw.within(0, batch - 1), draw.within(0, seq - 1));
        ids[row][at] = (spec.vocab + draw.within(0, 3)) as u32;
        good = false;
    } else if draw.chance(1) {
        ids.iter_mut().for_each(Vec::clear);
        good = false;
    }
    let fits = held.len + seq <= held.capacity.min(spec.context) && (held.len == 0 || held.batch == batch);
    if cached && good && fits {
        caches[cache] = Held { len: held.len + seq, batch, ..held };
    }
    Forward { ids, cache: cached.then_some(cache), form, copy: !cached && draw.chance(30) }
}

fn generate(draw: &mut Draw, spec: &Spec) -> Generate {
    let length = draw.within(1, 6.min(spec.context));
    Generate { prompt: tokens(draw, spec, length), tokens: draw.within(1, 6), copy: draw.chance(20) }
}

fn tokens(draw: &mut Draw, spec: &Spec, count: usize) -> Vec<u32> {
    (0..count).map(|_| draw.within(0, spec.vocab - 1) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::super::file::{Observed, REPRODUCER_VERSION, Reproducer, ScheduleCase};
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn whatever_is_drawn_fits_into_a_file_and_is_accepted_by_a_reader() {
        for iteration in 0..2000 {
            let mut draw = Draw::of(1, iteration);
            let model = model(&mut draw);
            let schedule = schedule(&mut draw, &model.spec);
            let case = Reproducer::Schedule(ScheduleCase {
                version: REPRODUCER_VERSION,
                backend: "a-backend-of-a-long-name".to_string(),
                semantics: crate::backend::Semantics::W158A8,
                model,
                schedule,
                outcome: Observed { seen: "x".repeat(3000), ..Observed::none() },
            });
            let text = case.to_json().expect("it fits");
            let read = Reproducer::from_json(&text).expect("it is accepted");
            assert_eq!(read.synthetic(), case.synthetic());
        }
    }

    #[test]
    fn every_spelling_and_every_kind_of_call_is_drawn() {
        let (mut specs, mut calls) = (BTreeSet::new(), BTreeSet::new());
        for iteration in 0..400 {
            let mut draw = Draw::of(1, iteration);
            let Synthetic { spec, .. } = model(&mut draw);
            specs.insert(format!("{:?}", spec.layout));
            specs.insert(format!("{:?}", spec.storage));
            specs.insert(format!("{:?} {}", spec.rope, spec.tied));
            specs.insert(format!("{:?} {}", spec.norms, spec.layers));
            for call in schedule(&mut draw, &spec).calls {
                calls.insert(match &call {
                    Call::Forward(f) => format!("{:?} {} {} {}", f.form, f.cache.is_some(), f.ids.len() > 1, f.copy),
                    other => {
                        other.name().split(|c: char| !c.is_alphabetic()).collect::<String>().chars().take(3).collect()
                    }
                });
            }
        }
        assert_eq!(specs.len(), 4 + 3 + 4 + 6, "{specs:?}");
        let forms = ["U32", "I64", "F32", "Flat", "Deep"];
        for expected in forms.iter().map(|form| format!("{form} true false false")) {
            assert!(calls.contains(&expected), "{expected} of {calls:?}");
        }
        assert!(calls.contains("U32 false false true") && calls.contains("U32 true true false"), "{calls:?}");
    }
}
