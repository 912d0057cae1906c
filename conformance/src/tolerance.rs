//! Every tolerance of the suite, with the evidence for it.
//!
//! The numbers stand in `tolerances.toml`, one table a tolerance, and nowhere else: the limit, the worst error of an
//! honest backend and the nearest error of a faulty one. All are errors, so that larger is worse: a correlation r is
//! held as 1 − r, a slope as its distance from 1, a share as what is missing from it. `conformance calibrate` measures
//! them anew.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::LazyLock;

/// The file, as it stands in the repository.
pub const TABLE: &str = include_str!("../tolerances.toml");

/// A faulty error that is less than this many times the worst honest one is no evidence: the tolerance tells no fault
/// from noise.
pub const MIN_SEPARATION: f64 = 4.0;

/// A tolerance by its name. Checks hold errors to it with [`crate::Context::check_within`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tolerance {
    name: &'static str,
}

impl Tolerance {
    /// The tolerance of this name in `tolerances.toml`.
    pub const fn named(name: &'static str) -> Self {
        Self { name }
    }

    /// The name in `tolerances.toml` and in the `errors` of an [`crate::Outcome`].
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The largest error that passes. NaN, which no error is within, where the table has no such tolerance.
    pub fn limit(&self) -> f64 {
        self.entry().map_or(f64::NAN, |e| e.limit)
    }

    /// The unit of the errors, such as `of the largest golden logit`.
    pub fn unit(&self) -> &'static str {
        self.entry().map_or("", |e| &e.unit)
    }

    /// What the table says of it.
    pub fn entry(&self) -> Option<&'static Entry> {
        entries().get(self.name)
    }
}

/// What justifies a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// The geometric mean of the worst honest and the nearest faulty error, which are apart by [`MIN_SEPARATION`] or
    /// more.
    Evidence,
    /// The contract's own number, which lies between the two.
    Contract,
    /// A probability or an argument about a distribution, stated in `why`.
    Statistical,
    /// An allowance for what no check measures as an error, for the reason in `why`.
    Grant,
}

/// One tolerance of `tolerances.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The unit of limit and errors.
    pub unit: String,
    /// What is held to it, in one line.
    pub what: String,
    /// What justifies the limit.
    pub rule: Rule,
    /// The reason, for rules that need words.
    pub why: Option<String>,
    /// The largest error that passes.
    pub limit: f64,
    /// The worst error of an honest backend.
    pub honest: Option<f64>,
    /// That backend and the model, as `backend/model`.
    pub honest_by: Option<String>,
    /// The nearest error of a faulty backend above the limit.
    pub faulty: Option<f64>,
    /// That fault and the model, as `fault/model`.
    pub faulty_by: Option<String>,
    /// The errors come from the clock or from the process's memory, and no two runs repeat them.
    #[serde(default)]
    pub clock: bool,
}

impl Entry {
    /// How many times the worst honest error the nearest faulty one is.
    pub fn separation(&self) -> Option<f64> {
        Some(self.faulty? / self.honest?)
    }

    /// What is wrong with the entry by its own rule; empty where it is sound.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let mut demand = |holds: bool, what: String| {
            if !holds {
                faults.push(what);
            }
        };
        demand(self.limit.is_finite() && self.limit > 0.0, format!("limit {} is no positive number", self.limit));
        demand(self.honest.is_some() == self.honest_by.is_some(), "honest needs honest_by".to_string());
        demand(self.faulty.is_some() == self.faulty_by.is_some(), "faulty needs faulty_by".to_string());
        if let Some(honest) = self.honest {
            demand(honest < self.limit, format!("an honest error of {honest} is not below the limit {}", self.limit));
        }
        if let Some(faulty) = self.faulty {
            demand(faulty > self.limit, format!("a faulty error of {faulty} is not above the limit {}", self.limit));
        }
        match self.rule {
            Rule::Statistical | Rule::Grant => {
                demand(self.why.as_ref().is_some_and(|why| !why.trim().is_empty()), "why is missing".to_string());
            }
            Rule::Contract | Rule::Evidence => {
                demand(self.honest.is_some() && self.faulty.is_some(), "two measurements are needed".to_string());
            }
        }
        if let (Rule::Evidence, Some(honest), Some(faulty)) = (self.rule, self.honest, self.faulty) {
            let limit = middle(honest, faulty);
            let near = (self.limit / limit - 1.0).abs() <= ROUNDING;
            demand(near, format!("limit {:e} is not the geometric mean {limit:e}", self.limit));
            let apart = faulty / honest;
            demand(apart >= MIN_SEPARATION, format!("faulty / honest is {apart:.2}, below {MIN_SEPARATION}"));
        }
        faults
    }
}

/// What rounding to two digits may change, at most: 1.05 to 1.0 or 1.1.
const ROUNDING: f64 = 0.05;

/// The geometric mean of two errors, to two significant digits.
pub fn middle(honest: f64, faulty: f64) -> f64 {
    rounded((honest * faulty).sqrt(), 2)
}

/// A number to so many significant digits.
pub fn rounded(value: f64, digits: usize) -> f64 {
    format!("{value:.*e}", digits.saturating_sub(1)).parse().unwrap_or(value)
}

/// A table by name.
pub type Table = BTreeMap<String, Entry>;

/// Reads a table of tolerances.
///
/// # Errors
/// What TOML says of a text that is none, or of a field that is missing or unknown.
pub fn parse(text: &str) -> Result<Table, toml::de::Error> {
    toml::from_str(text)
}

/// The committed table. Empty where it cannot be read, which a unit test rules out; then no error is within anything.
pub fn entries() -> &'static Table {
    static ENTRIES: LazyLock<Table> = LazyLock::new(|| parse(TABLE).unwrap_or_default());
    &ENTRIES
}

/// Declares tolerances and lists them all.
macro_rules! tolerances {
    ($($(#[$doc:meta])* $constant:ident = $name:literal;)*) => {
        $($(#[$doc])* pub static $constant: Tolerance = Tolerance::named($name);)*

        /// Every tolerance of the table.
        pub static ALL: &[&Tolerance] = &[$(&$constant),*];
    };
}

tolerances! {
    /// 1 − Pearson correlation of the worst position with the fp32 golden: the contract's own gate.
    FP32_CORRELATION = "fp32_correlation";
    /// `fp32` semantics: the largest difference of a logit from the golden.
    FP32_LOGIT = "fp32_logit";
    /// The same behind sums of thousands of equal terms, which float32 adds up one after the other at worst.
    FP32_LONG_SUM = "fp32_long_sum";
    /// `fp32` semantics: two evaluations of one sequence by one backend that claims no bit-exactness.
    FP32_SELF = "fp32_self";
    /// `w1.58a8`: the largest difference of a logit from the oracle's where no activation is near a rounding tie.
    CLEAR_ROW = "clear_row";
    /// `w1.58a8`: 1 − correlation of the worst row with the golden.
    A8_CORRELATION = "a8_correlation";
    /// The same for coarse noise.
    COARSE_CORRELATION = "coarse_correlation";
    /// `w1.58a8`: mean KL divergence and mean NMSE, in units of the model's own quantisation gap.
    A8_GAP = "a8_gap";
    /// The same for coarse noise.
    COARSE_GAP = "coarse_gap";
    /// `w1.58a8`: KL divergence of the worst row, in units of the worst row of the model's own quantisation gap.
    GAP_WORST = "gap_worst";
    /// Distance from 1 of the mean slope of logits on golden logits.
    SLOPE_MEAN = "slope_mean";
    /// Distance from 1 of the slope of the worst row.
    SLOPE_WORST = "slope_worst";
    /// `w1.58a8`: the golden's lead over the second token where the backend has another first.
    A8_MARGIN = "a8_margin";
    /// Hidden states times the head against the logits.
    HEAD = "head";
    /// The same where 16-bit floats are used.
    HEAD_COARSE = "head_coarse";
    /// Distance from 1 of the sum of a row of attention weights.
    ATTENTION_SUM = "attention_sum";
    /// `fp32` semantics: the largest difference of an attention weight from the oracle's.
    ATTENTION_FP32 = "attention_fp32";
    /// The same in `w1.58a8`, where a flipped code of a query or a key moves the weights of a row.
    ATTENTION = "attention";
    /// The same for coarse noise.
    ATTENTION_COARSE = "attention_coarse";
    /// 1 − correlation with the oracle, the third quartile of 64 rows, far into the context.
    FAR_POSITIONS = "far_positions";
    /// The largest difference of a logit from the oracle's, in the middle one of many rows behind a long cache.
    FAR_ROW = "far_row";
    /// `w1.58a8`: how far from a rounding tie every activation of a prompt must be for float32 noise to decide none.
    CLEAR_OF_TIES = "clear_of_ties";
    /// Logits that reach less far than this are held to what is allowed at this reach.
    SMALL_REACH = "small_reach";

    /// A part of a time that an engine reports, over the whole that it is a part of.
    TIME_WITHIN = "time_within";
    /// What sums of such parts may be longer besides: for clocks of another grain.
    CLOCK_STEP = "clock_step";
    /// What an engine's figure leaves out of the time around it, in the median call.
    TIME_OWNED = "time_owned";
    /// The same for prefill and decode together.
    STAGES_OWNED = "stages_owned";
    /// The same for prefill and the time to the first token after a long prompt.
    PREFILL_OWNED = "prefill_owned";
    /// The time to the first of many ids against a call for one id, as a factor either way.
    FIRST_TOKEN = "first_token";
    /// The smallest share of a component in `total_time` over its largest.
    SHARE_SAME = "share_same";
    /// Deterministic generation over sampling without a seed, in the median pair.
    DETERMINISTIC_COST = "deterministic_cost";
    /// `flops_estimate` against twice the weights that the tokens meet, as a factor either way.
    FLOPS_FACTOR = "flops_factor";
    /// What `memory_bandwidth_usage` says that a pass moved.
    TRAFFIC = "traffic";

    /// Bytes of a cache over what its capacity takes in f64.
    CACHE_SLACK = "cache_slack";
    /// What a cache may hold besides.
    CACHE_REST = "cache_rest";
    /// What the metrics say of a cache against its own word, as a factor either way.
    CACHE_TOLD = "cache_told";
    /// What the metrics may say besides.
    CACHE_TOLD_REST = "cache_told_rest";
    /// Memory claimed beyond what the process holds.
    RESIDENT_SLACK = "resident_slack";
    /// What sessions take in the process over what their caches say they hold.
    SESSION_FACTOR = "session_factor";
    /// What sessions may take besides.
    SESSION_SLACK = "session_slack";
    /// What a large session takes in resident pages over what its cache says it holds.
    LARGE_SESSION_FACTOR = "large_session_factor";
    /// What an engine takes in the process over what it says it holds.
    ENGINE_FACTOR = "engine_factor";
    /// What an engine may take besides.
    ENGINE_SLACK = "engine_slack";
    /// The same where it has a tokenizer.
    TOKENIZER_SLACK = "tokenizer_slack";
    /// Memory that a call leaves behind.
    LEAK_PER_CALL = "leak_per_call";
    /// Memory that a thread-local copy leaves behind.
    LEAK_PER_COPY = "leak_per_copy";
    /// Memory that an engine leaves behind, as a share of its weights.
    LEAK_PER_ENGINE = "leak_per_engine";
    /// Weights of fewer bytes than this count as so many there.
    LEAK_FEW_WEIGHTS = "leak_few_weights";
    /// Threads or open files that an engine leaves behind.
    LEAK_HANDLES = "leak_handles";

    /// Fuzzing, `fp32` semantics: what a logit may be off by where that is more than [`FP32_LOGIT`].
    FUZZ_FP32_OF_GAP = "fuzz_fp32_of_gap";
    /// Fuzzing, `w1.58a8`: an activation this near to a rounding tie may go either way.
    FUZZ_TIE = "fuzz_tie";
    /// Fuzzing, `w1.58a8`: what a logit may be off by where no activation was near a tie.
    FUZZ_A8_LOGIT = "fuzz_a8_logit";
    /// Fuzzing: what a row may be off by in which an activation may have gone the other way.
    FUZZ_FLIP_GAPS = "fuzz_flip_gaps";
    /// The same as a share of the row's sum of squares, allowed where it is more.
    FUZZ_FLIP_NMSE = "fuzz_flip_nmse";
}

/// The probability, at most, that one honest backend meets a false alarm in one run: the budget that all statistical
/// assertions share.
pub const RUN_FALSE_ALARM: f64 = 1e-6;

/// The most statistical assertions that a run makes of one backend. They are counted: a run that makes more has spent
/// more than its budget, and fails. Measured: 2,797 with every check on every built-in model.
pub const STATISTICAL_ASSERTIONS: u64 = 4_000;

/// The probability, at most, that an honest backend fails one statistical assertion by bad luck.
///
/// Measured with one fault at a time in the engine: a nucleus one token short e^-194, a seed that is ignored e^-3019; a
/// nucleus one token long draws what the table forbids, which no honest sampler does.
pub const FALSE_ALARM: f64 = RUN_FALSE_ALARM / STATISTICAL_ASSERTIONS as f64;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_tolerance_has_one_entry_and_every_entry_a_tolerance() {
        let table = parse(TABLE).expect("tolerances.toml");
        let named: Vec<&str> = ALL.iter().map(|t| t.name()).collect();
        let unique: BTreeSet<&str> = named.iter().copied().collect();
        assert_eq!(unique.len(), named.len(), "a name is used twice");
        assert_eq!(table.keys().map(String::as_str).collect::<BTreeSet<_>>(), unique);
    }

    #[test]
    fn every_entry_is_sound_by_its_rule() {
        for (name, entry) in entries() {
            assert_eq!(entry.faults(), [""; 0], "{name}");
            assert!(!entry.unit.is_empty() && !entry.what.is_empty(), "{name}");
        }
    }

    fn entry(rule: &str, limit: f64) -> Entry {
        let text = format!(
            "unit = 'u'\nwhat = 'w'\nrule = '{rule}'\nlimit = {limit}\nhonest = 1\nhonest_by = 'h/m'\nfaulty = 9\nfaulty_by = 'f/m'"
        );
        toml::from_str(&text).expect("an entry")
    }

    #[test]
    fn an_entry_without_evidence_is_found_out() {
        assert!(entry("evidence", 3.0).faults().is_empty());
        assert_eq!(entry("evidence", 4.0).faults().len(), 1, "not the geometric mean");
        assert_eq!(Entry { faulty: Some(3.9), ..entry("evidence", 2.0) }.faults().len(), 1, "too near");
        assert!(entry("contract", 4.0).faults().is_empty());
        assert_eq!(entry("contract", 0.5).faults().len(), 1, "below the honest error");
        assert_eq!(entry("contract", 10.0).faults().len(), 1, "above the faulty error");
        assert_eq!(Entry { faulty: None, ..entry("contract", 4.0) }.faults().len(), 2, "one measurement, half named");
        assert_eq!(entry("grant", 4.0).faults(), ["why is missing"]);
        assert_eq!(entry("statistical", 4.0).faults(), ["why is missing"]);
        assert_eq!(Entry { limit: f64::NAN, ..entry("contract", 4.0) }.faults().len(), 3);
    }

    #[test]
    fn a_name_that_the_table_lacks_lets_nothing_pass() {
        assert!(Tolerance::named("no such").limit().is_nan());
        assert_eq!(middle(1e-6, 9e-4), 3.0e-5);
        assert_eq!(rounded(123_456.0, 3), 123_000.0);
    }
}
