//! Engines that refuse in another way: where more than one error is right, and where a model may be refused early or late.

use super::super::HonestVariant;
use super::super::naive::{Deviation, Naive, Weights};
use crate::backend::Semantics;
use crate::model::ModelFixture;
use bitnet_contracts::{
    BitNetInference, ForwardPassError, GenerationConfig, GenerationError, GenerationResult, InferenceError,
    InputValidator, OutputValidationError, QuantizationError, Result, StandardInputValidator, TokenizationError,
};
use std::sync::Arc;

pub(super) const VARIANTS: &[HonestVariant] = &[
    variant("prompt-too-long", "a prompt that leaves no room is PromptTooLong", || Arc::new(NoRoom(prompt_too_long))),
    variant("context-exhausted", "a prompt that leaves no room is ContextExhausted", || {
        Arc::new(NoRoom(context_exhausted))
    }),
    variant("other-variants", "the other one of two right errors, wherever there are two", || Arc::new(OtherVariants)),
    variant("refuses-late", "numbers that are not finite are met in use, not at loading", || Arc::new(RefusesLate)),
    variant("refuses-more", "scales that are 0 or beyond all measure are refused at loading", || Arc::new(RefusesMore)),
];

const fn variant(name: &'static str, what: &'static str, make: fn() -> Arc<dyn Deviation>) -> HonestVariant {
    HonestVariant { name, what, declare: |c| c, semantics: Semantics::W158A8, make }
}

fn prompt_too_long(prompt_tokens: usize, max_positions: usize) -> GenerationError {
    GenerationError::PromptTooLong { prompt_tokens, max_positions }
}

fn context_exhausted(position: usize, max_positions: usize) -> GenerationError {
    GenerationError::ContextExhausted { position, max_positions }
}

/// An error for prompts after which nothing fits, from their length and the room there is.
struct NoRoom(fn(usize, usize) -> GenerationError);

impl Deviation for NoRoom {
    fn generate(
        &self,
        engine: &mut Naive,
        prompt: &[u32],
        max_tokens: usize,
        config: &GenerationConfig,
    ) -> Result<GenerationResult> {
        let validator = StandardInputValidator::new(engine.config().clone(), engine.device().clone());
        let room = engine.config().max_position_embeddings.min(config.max_total_tokens);
        if max_tokens > 0 && prompt.len() >= room && validator.validate_generation_config(config).is_ok() {
            return Err((self.0)(prompt.len(), room).into());
        }
        engine.honest_generate(prompt, max_tokens, config)
    }
}

/// Where the contracts have two words for one thing, the one that the naive engine does not use.
struct OtherVariants;

impl Deviation for OtherVariants {
    fn forward(
        &self,
        engine: &mut Naive,
        ids: &bitnet_contracts::Tensor,
        cache: Option<&mut bitnet_contracts::KVCache>,
    ) -> Result<bitnet_contracts::InferenceOutput> {
        engine.honest_forward(ids, cache).map_err(|error| match error {
            InferenceError::Tokenization(TokenizationError::EmptySequence) => {
                ForwardPassError::ShapeMismatch { expected: vec![1, 1], actual: ids.dims().to_vec() }.into()
            }
            other => other,
        })
    }

    fn error(&self, error: InferenceError) -> InferenceError {
        match error {
            InferenceError::ForwardPass(ForwardPassError::NumericalInstability { .. }) => {
                let (tensor, invalid_values, total_values) = ("logits".to_string(), 1, 1);
                OutputValidationError::NumericalInstability { tensor, invalid_values, total_values }.into()
            }
            other => other,
        }
    }
}

/// Weights are not looked at; results are.
struct RefusesLate;

impl Deviation for RefusesLate {
    fn checks_weights(&self) -> bool {
        false
    }
}

/// A scale is a usable number or an error.
struct RefusesMore;

impl Deviation for RefusesMore {
    fn load(&self, model: &ModelFixture) -> Result<Weights> {
        let mut weights = Weights::load(model.dir(), model.name())?;
        for (i, layer) in weights.layers.iter_mut().enumerate() {
            for matrix in layer.projections() {
                if !(1e-20..1e20).contains(&matrix.scale.abs()) {
                    let tensor = format!("a weight_scale of layer {i}");
                    return Err(QuantizationError::InvalidScale { tensor, value: matrix.scale }.into());
                }
            }
        }
        Ok(weights)
    }
}
