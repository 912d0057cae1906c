//! What a backend declares that it lacks is asked for all the same: one probe a capability.
//!
//! The honest answer is the refusal that the contracts have a type for. Whatever is answered instead is judged by the
//! check that needed the capability: if it passes, the declaration is stale; if not, the backend gives wrong answers to
//! questions that it says it cannot answer.

use super::support::{generate, greedy, ids, prompt, try_forward};
use crate::backend::{Capability, CreateOptions};
use crate::case::{Check, CheckResult, Context, Stop};
use bitnet_contracts::{BitNetInference, GenerationConfig, InferenceError, InferenceOutput, TokenizationError};

/// The probe of one capability.
pub struct Probe {
    /// The requirement's number in SPEC.md.
    pub id: &'static str,
    /// `probe/capability`.
    pub name: &'static str,
    /// What is asked for.
    pub capability: Capability,
    run: fn(&mut Context<'_>) -> Result<Answer, Stop>,
}

/// What came of asking.
enum Answer {
    /// A refusal, right or wrong: the assertions say which.
    Refused,
    /// An answer, which the check must judge.
    Given,
}

/// Every probe, in the order of the requirements.
pub const ALL: &[Probe] = &[
    Probe { id: "CAP-1", name: "probe/batch", capability: Capability::Batch, run: batch },
    Probe {
        id: "CAP-2",
        name: "probe/attention_weights",
        capability: Capability::AttentionWeights,
        run: attention_weights,
    },
    Probe { id: "CAP-3", name: "probe/hidden_states", capability: Capability::HiddenStates, run: hidden_states },
    Probe { id: "CAP-4", name: "probe/threads", capability: Capability::Threads, run: threads },
    Probe {
        id: "CAP-5",
        name: "probe/instruction_sets",
        capability: Capability::InstructionSets,
        run: instruction_sets,
    },
    Probe { id: "CAP-6", name: "probe/thread_safe", capability: Capability::ThreadSafe, run: thread_safe },
    Probe { id: "CAP-7", name: "probe/tokenizer", capability: Capability::Tokenizer, run: tokenizer },
];

/// Runs a check or, where the backend declares that it lacks what the check needs, the probe of that.
pub(crate) fn run(check: &Check, ctx: &mut Context<'_>) -> CheckResult {
    let lacking = check.needs.filter(|capability| !ctx.capabilities().has(*capability));
    let Some(probe) = lacking.and_then(|capability| ALL.iter().find(|probe| probe.capability == capability)) else {
        return (check.run)(ctx);
    };
    let missing = probe.capability;
    ctx.note(format!("declared absent: {missing}; {} asks for it all the same", probe.id));
    match (probe.run)(ctx)? {
        Answer::Refused => Err(Stop::Unsupported(missing.to_string())),
        Answer::Given => {
            (check.run)(ctx)?;
            if ctx.failed() > 0 {
                return Ok(());
            }
            Err(Stop::UnexpectedPass(format!("stale claim: {missing} declared absent, and the check passes")))
        }
    }
}

fn is_configuration(error: &InferenceError) -> bool {
    matches!(error, InferenceError::Configuration(_))
}

const CONFIGURATION: &str = "a ConfigurationError";

fn is_about_text(error: &InferenceError) -> bool {
    is_configuration(error) || matches!(error, InferenceError::Tokenization(TokenizationError::MissingTokenizer { .. }))
}

const NO_TEXT: &str = "a ConfigurationError or MissingTokenizer";

/// Notes a refusal of the right or of the wrong kind.
#[track_caller]
fn refused(
    ctx: &mut Context<'_>,
    what: &str,
    error: InferenceError,
    right: fn(&InferenceError) -> bool,
    name: &str,
) -> Answer {
    ctx.expect_error(format!("{what}, declared absent,"), Err::<(), _>(error), right, name);
    Answer::Refused
}

fn batch(ctx: &mut Context<'_>) -> Result<Answer, Stop> {
    let mut engine = ctx.engine()?;
    let rows = [prompt(ctx.facts(), 3, 96), prompt(ctx.facts(), 3, 97)];
    Ok(match try_forward(engine.as_mut(), &rows, None)? {
        Ok(_) => Answer::Given,
        Err(error) => {
            let right = |e: &InferenceError| matches!(e, InferenceError::ForwardPass(_)) || is_configuration(e);
            refused(ctx, "a batch of two", error, right, "a ForwardPassError or a ConfigurationError")
        }
    })
}

/// An engine with options that are declared absent; `None` where they are refused.
fn made_with(ctx: &mut Context<'_>, options: &CreateOptions) -> Option<Box<dyn BitNetInference>> {
    match ctx.factory().create_with(ctx.model(), options) {
        Ok(engine) => Some(engine),
        Err(error) => {
            refused(ctx, &format!("create_with({options:?})"), error, is_configuration, CONFIGURATION);
            None
        }
    }
}

/// An option for an output: refusing it and leaving the output empty are both honest.
fn output(ctx: &mut Context<'_>, options: &CreateOptions, given: fn(&InferenceOutput) -> bool) -> Result<Answer, Stop> {
    let Some(mut engine) = made_with(ctx, options) else { return Ok(Answer::Refused) };
    let input = ids(&[prompt(ctx.facts(), 3, 4)], engine.device())?;
    if given(&engine.forward(&input, None)?) {
        return Ok(Answer::Given);
    }
    ctx.check(true, "nothing of what is declared absent", "");
    Ok(Answer::Refused)
}

fn attention_weights(ctx: &mut Context<'_>) -> Result<Answer, Stop> {
    output(ctx, &CreateOptions::default().with_attentions(), |output| output.attention_weights.is_some())
}

fn hidden_states(ctx: &mut Context<'_>) -> Result<Answer, Stop> {
    output(ctx, &CreateOptions::default().with_hidden_states(), |output| output.hidden_states.is_some())
}

/// Whether a number of threads is honoured cannot be seen from outside, so an engine that takes one claims it.
fn threads(ctx: &mut Context<'_>) -> Result<Answer, Stop> {
    let made = made_with(ctx, &CreateOptions::default().with_threads(2));
    Ok(if made.is_some() { Answer::Given } else { Answer::Refused })
}

/// A name that no backend can know: an engine that takes it ignores the option.
const NO_SUCH_SET: &str = "no-such-instruction-set";

/// Asserts that an instruction set which does not exist is refused.
pub(super) fn refuses_unknown_set(ctx: &mut Context<'_>) {
    let made = ctx.factory().create_with(ctx.model(), &CreateOptions::default().with_isa(NO_SUCH_SET));
    ctx.expect_error(format!("an engine for {NO_SUCH_SET:?}"), made.map(drop), is_configuration, CONFIGURATION);
}

fn instruction_sets(ctx: &mut Context<'_>) -> Result<Answer, Stop> {
    refuses_unknown_set(ctx);
    let known = crate::report::environment::instruction_sets();
    for name in ["portable", "scalar"].into_iter().chain(known) {
        // With no name declared there is nothing to run the check on, so that a name taken is all there is to say.
        if made_with(ctx, &CreateOptions::default().with_isa(name)).is_some() && ctx.failed() == 0 {
            let missing = Capability::InstructionSets;
            let why = format!("stale claim: {missing} declared absent, and {name:?} is taken");
            return Err(Stop::UnexpectedPass(why));
        }
    }
    Ok(Answer::Refused)
}

fn thread_safe(ctx: &mut Context<'_>) -> Result<Answer, Stop> {
    match ctx.factory().create_thread_safe(ctx.model()) {
        Some(Ok(_)) => return Ok(Answer::Given),
        Some(Err(error)) => ctx.check(false, "None from create_thread_safe, declared absent", error),
        None => ctx.check(true, "None from create_thread_safe, declared absent", ""),
    };
    Ok(Answer::Refused)
}

fn tokenizer(ctx: &mut Context<'_>) -> Result<Answer, Stop> {
    let mut engine = ctx.engine()?;
    let tokens = prompt(ctx.facts(), 4, 290);
    let config = GenerationConfig { stop_sequences: vec!["\u{1}never\u{1}".to_string()], ..greedy() };
    match engine.generate(&tokens, 4, &config) {
        Ok(result) if !result.generated_text.is_empty() => return Ok(Answer::Given),
        Ok(_) => ctx.check(false, format!("a stop sequence refused with {NO_TEXT}"), "passed over: there is no text"),
        Err(error) => {
            refused(ctx, "a stop sequence", error, is_about_text, NO_TEXT);
            let result = generate(engine.as_mut(), &tokens, 4, &greedy())?;
            ctx.check_eq("text without a tokenizer", result.generated_text.as_str(), "")
        }
    };
    Ok(Answer::Refused)
}
