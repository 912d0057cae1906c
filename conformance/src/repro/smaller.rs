//! Smaller models: the order in which the numbers of a specification go down.

use super::file::Synthetic;
use super::limits;
use crate::model::{Model, ModelFacts, PRESET_SEED};
use fixtures::{Eos, GAUSSIAN_ZEROS, Layout, LinearClass, NormStyle, RopeSpelling, Spec, Storage};

/// Synthetic models on which the failure of a model may show: itself, one of the same shape as far as the limits go,
/// and the presets.
pub(super) fn starts(model: &Model) -> Vec<Synthetic> {
    let itself = model.spec().map(|(spec, seed)| Synthetic { seed, spec });
    let of = |spec: Spec| Synthetic { seed: PRESET_SEED, spec };
    let like = itself.is_none().then(|| of(like(model.facts())));
    itself.into_iter().chain(like).chain(fixtures::presets().iter().map(|p| of(p.spec.clone()))).collect()
}

/// A synthetic model with the shape of another one, within the limits of a reproducer.
fn like(facts: &ModelFacts) -> Spec {
    Spec {
        hidden: facts.hidden_size,
        ffn: facts.intermediate_size.min(limits::MAX_FFN),
        layers: facts.layers.min(limits::MAX_LAYERS),
        heads: facts.heads,
        kv_heads: facts.kv_heads,
        vocab: facts.vocab_size.min(limits::MAX_VOCAB),
        context: facts.max_positions.min(limits::MAX_CONTEXT),
        tied: facts.tied,
        rope_theta: facts.rope_theta,
        rope: RopeSpelling::Theta,
        eps: facts.rms_eps,
        storage: Storage::Bf16,
        layout: Layout::Packed(LinearClass::AutoBitLinear),
        norms: NormStyle::Plain,
        zeros: GAUSSIAN_ZEROS,
        bos: 1,
        eos: Eos::One(2),
        shards: 1,
    }
}

/// The smaller models next to one: for each step, in their fixed order, the candidates from the smallest on.
pub(super) fn steps(spec: &Spec) -> Vec<Vec<Spec>> {
    let with = |change: &dyn Fn(&mut Spec)| {
        let mut smaller = spec.clone();
        change(&mut smaller);
        smaller
    };
    let below = |sizes: &[usize], now: usize| sizes.iter().copied().filter(|&n| n < now).collect::<Vec<_>>();
    let head = spec.head_dim();
    let steps = vec![
        below(&[1, 2], spec.layers).into_iter().map(|n| with(&|s| s.layers = n)).collect(),
        // As many query heads as are left for each key/value head, then the same with smaller heads.
        below(&[1, 2, 4], spec.heads)
            .into_iter()
            .flat_map(|n| {
                let kv = spec.kv_heads.min(n);
                [n * head, spec.hidden].map(|hidden| with(&|s| (s.heads, s.kv_heads, s.hidden) = (n, kv, hidden)))
            })
            .collect(),
        below(&[1, 2], spec.kv_heads).into_iter().map(|n| with(&|s| s.kv_heads = n)).collect(),
        below(&[2, 4, 8, 16, 32], head).into_iter().map(|d| with(&|s| s.hidden = s.heads * d)).collect(),
        below(&[4, 8, 16, 32, 64], spec.ffn).into_iter().map(|n| with(&|s| s.ffn = n)).collect(),
        below(&[8, 16, 32, 64], spec.vocab).into_iter().map(|n| with(&|s| s.set_vocab(n))).collect(),
        below(&[4, 8, 16, 32, 64], spec.context).into_iter().map(|n| with(&|s| s.context = n)).collect(),
        vec![with(&|s| s.shards = 1)],
        vec![with(&|s| s.storage = Storage::F32)],
        vec![with(&|s| s.layout = Layout::Packed(LinearClass::AutoBitLinear))],
        vec![with(&|s| s.norms = NormStyle::Plain)],
        vec![with(&|s| s.zeros = GAUSSIAN_ZEROS)],
        vec![with(&|s| s.tied = true)],
        vec![with(&|s| (s.rope, s.rope_theta) = (RopeSpelling::Theta, 10_000.0))],
        vec![with(&|s| s.eps = 1e-5)],
        vec![with(&|s| s.eos = Eos::Nothing)],
    ];
    steps.into_iter().map(|step: Vec<Spec>| step.into_iter().filter(|s| s.check().is_ok()).collect()).collect()
}

/// A vocabulary, with the special tokens in it.
trait SetVocab {
    fn set_vocab(&mut self, vocab: usize);
}

impl SetVocab for Spec {
    fn set_vocab(&mut self, vocab: usize) {
        let inside = |id: u32| id.min(vocab as u32 - 1);
        self.vocab = vocab;
        self.bos = inside(self.bos);
        self.eos = match self.eos {
            Eos::One(id) => Eos::One(inside(id)),
            Eos::Two([a, b]) => Eos::Two([inside(a), inside(b)]),
            other => other,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn going_down_from_any_preset_ends_at_the_same_smallest_model() {
        let mut ends = Vec::new();
        for preset in fixtures::presets() {
            let mut spec = preset.spec.clone();
            let mut moves = 0;
            while let Some(next) = steps(&spec).into_iter().flatten().find(|next| *next != spec) {
                assert_eq!(next.check().map_err(|e| e.to_string()), Ok(()));
                (spec, moves) = (next, moves + 1);
                assert!(moves < 100, "{}: no end of steps", preset.name);
            }
            ends.push(Spec { bos: 0, ..spec });
        }
        assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
        assert_eq!((ends[0].layers, ends[0].heads, ends[0].hidden, ends[0].vocab, ends[0].context), (1, 1, 4, 8, 4));
    }

    #[test]
    fn every_built_in_model_has_a_start_within_the_limits() {
        for model in Model::built_in() {
            let start = starts(&model).remove(0);
            assert!(limits::check_spec(&start.spec).is_ok() && start.spec.check().is_ok(), "{}", model.name());
        }
    }
}
