//! Failures that are known: an expectations file says which cases fail, how, why, where that is tracked and until when.
//!
//! ```toml
//! version = 1
//!
//! [[expect]]
//! id = "mine/*/kv_cache/overflow@*"       # a pattern over whole case ids; `*` crosses slashes
//! kind = "fail"                           # fail, crash, timeout or inconclusive
//! reason = "the cache grows without end"
//! link = "https://example.org/issues/7"
//! expires = 2027-06-30                    # the last day on which this counts, in UTC
//! bound = { cache_slack = 3.0 }           # optional: the largest error or measurement of that name
//! ```
//!
//! A case that fails as it is expected to is waived. Everything else about an entry is strict, so that a file of excuses
//! cannot outlive them: see [`Expectations::findings`].

use crate::suite::Case;
use crate::verdict::{CaseResult, Outcome, Verdict};
use globset::{Glob, GlobMatcher};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
pub use toml::value::Date;

/// The version of the expectations file that this suite reads.
pub const EXPECTATIONS_VERSION: u32 = 1;

/// Why an expectations file cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExpectationsError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The text is no expectations file.
    #[error("expectations: {reason}")]
    Form {
        /// What is wrong.
        reason: String,
    },
}

/// How a case is expected to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Fail,
    Crash,
    Timeout,
    Inconclusive,
}

impl Kind {
    const fn verdict(self) -> Verdict {
        match self {
            Self::Fail => Verdict::Fail,
            Self::Crash => Verdict::Crash,
            Self::Timeout => Verdict::Timeout,
            Self::Inconclusive => Verdict::Inconclusive,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    #[serde(default)]
    expect: Vec<RawEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    id: String,
    kind: Kind,
    reason: String,
    link: String,
    expires: toml::Value,
    #[serde(default)]
    bound: BTreeMap<String, f64>,
}

#[derive(Debug, Clone)]
struct Entry {
    id: String,
    pattern: GlobMatcher,
    kind: Kind,
    reason: String,
    link: String,
    expires: Date,
    bound: BTreeMap<String, f64>,
}

/// What is wrong with an expectations file in the light of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The pattern of the entry.
    pub id: String,
    /// What is wrong with it, as a sentence that names the pattern.
    pub text: String,
}

/// The entries of an expectations file, as they count on one day.
#[derive(Debug, Clone)]
pub struct Expectations {
    entries: Vec<Entry>,
    today: Date,
}

impl Expectations {
    /// Reads the text of an expectations file. Unknown keys are errors: a misspelt bound must not be one that is never
    /// held.
    ///
    /// # Errors
    /// [`ExpectationsError::Form`].
    pub fn parse(text: &str, today: Date) -> Result<Self, ExpectationsError> {
        let form = |reason: String| ExpectationsError::Form { reason };
        let file: File = toml::from_str(text).map_err(|e| form(e.to_string()))?;
        if file.version != EXPECTATIONS_VERSION {
            return Err(form(format!("version {}, and this reader knows {EXPECTATIONS_VERSION}", file.version)));
        }
        let entries = file.expect.into_iter().map(|raw| {
            let id = raw.id.clone();
            Entry::new(raw).map_err(|reason| form(format!("{id:?}: {reason}")))
        });
        Ok(Self { entries: entries.collect::<Result<_, _>>()?, today })
    }

    /// Reads an expectations file as it counts today.
    ///
    /// # Errors
    /// [`ExpectationsError`].
    pub fn read(path: &Path) -> Result<Self, ExpectationsError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ExpectationsError::Io { path: path.to_path_buf(), source })?;
        Self::parse(&text, today())
    }

    /// Changes the verdict of a case by what is expected of it: what fails as it should within its bounds is waived, and
    /// what passes is an unexpected pass. Entries that have expired, or that are two for one case, change nothing.
    pub fn judge(&self, result: &mut CaseResult) {
        let mut of_case = self.entries.iter().filter(|e| !self.expired(e) && e.pattern.is_match(&result.id));
        let (Some(entry), None) = (of_case.next(), of_case.next()) else { return };
        let outcome = &mut result.outcome;
        if outcome.verdict == Verdict::Pass {
            outcome.verdict = Verdict::UnexpectedPass;
            outcome.reason = Some(format!("expected to end as {} ({})", entry.kind.verdict(), entry.why()));
        } else if outcome.verdict == entry.kind.verdict() {
            let breaches = entry.breaches(outcome);
            let was = outcome.reason.take();
            if breaches.is_empty() {
                outcome.notes.extend(was.map(|reason| format!("{}: {reason}", outcome.verdict)));
                outcome.verdict = Verdict::Waived;
                outcome.reason = Some(entry.why());
            } else {
                let past = format!("past the bound of a known failure: {} ({})", breaches.join(", "), entry.why());
                outcome.reason = Some(was.into_iter().chain([past]).collect::<Vec<_>>().join("; "));
            }
        }
    }

    /// Everything for which the run must fail although no case does: an entry that has expired, that matches no case
    /// which could run (stale), or that shares a case with another one; and the unexpected passes of an entry, in one
    /// sentence.
    ///
    /// `selection` is what the chosen backends and models would run without a filter; `results` is what did run.
    pub fn findings(&self, selection: &[Case], results: &[CaseResult]) -> Vec<Finding> {
        let mut findings = Vec::new();
        for (i, entry) in self.entries.iter().enumerate() {
            let mut find = |text: String| findings.push(Finding { id: entry.id.clone(), text });
            if self.expired(entry) {
                find(format!("expectation {:?} expired on {}: {}", entry.id, entry.expires, entry.why()));
            }
            let mut matched = selection.iter().filter(|case| entry.pattern.is_match(&case.id)).peekable();
            if matched.peek().is_none() {
                find(format!("expectation {:?} matches no case of the selection", entry.id));
            } else if matched.clone().all(|case| case.lacks.is_some()) {
                find(format!("expectation {:?} matches only cases that are declared absent", entry.id));
            }
            for other in &self.entries[..i] {
                if let Some(case) = matched.clone().find(|case| other.pattern.is_match(&case.id)) {
                    find(format!("expectations {:?} and {:?} both match {}", other.id, entry.id, case.id));
                }
            }
            let passed: Vec<&str> = results
                .iter()
                .filter(|r| r.outcome.verdict == Verdict::UnexpectedPass && entry.pattern.is_match(&r.id))
                .map(|r| r.id.as_str())
                .collect();
            if let Some(first) = passed.first() {
                find(format!(
                    "expectation {:?} says that {} cases fail which pass, {first} first",
                    entry.id,
                    passed.len()
                ));
            }
        }
        findings
    }

    fn expired(&self, entry: &Entry) -> bool {
        self.today > entry.expires
    }
}

impl Entry {
    fn new(raw: RawEntry) -> Result<Self, String> {
        let pattern = Glob::new(&raw.id).map_err(|e| format!("the id is no pattern: {e}"))?.compile_matcher();
        if raw.reason.trim().is_empty() {
            return Err("the reason is empty".to_string());
        }
        let address = raw.link.strip_prefix("https://").or_else(|| raw.link.strip_prefix("http://"));
        if address.is_none_or(|rest| rest.is_empty() || rest.contains(char::is_whitespace)) {
            return Err(format!("the link {:?} is no http(s) address", raw.link));
        }
        if let Some((name, limit)) = raw.bound.iter().find(|(_, limit)| !limit.is_finite()) {
            return Err(format!("the bound {name} = {limit} is no number"));
        }
        if !raw.bound.is_empty() && matches!(raw.kind, Kind::Crash | Kind::Timeout) {
            return Err("a case that crashes or times out leaves no errors to hold against a bound".to_string());
        }
        let expires = date(&raw.expires).ok_or_else(|| format!("expires = {} is no date YYYY-MM-DD", raw.expires))?;
        let RawEntry { id, kind, reason, link, bound, .. } = raw;
        Ok(Self { id, pattern, kind, reason, link, expires, bound })
    }

    fn why(&self) -> String {
        format!("{}; {}; until {}", self.reason, self.link, self.expires)
    }

    /// The figures of an outcome that are past their bounds, or that the case did not leave.
    fn breaches(&self, outcome: &Outcome) -> Vec<String> {
        let figure = |name: &String| {
            [&outcome.errors, &outcome.measurements, &outcome.timings].into_iter().find_map(|of| of.get(name))
        };
        let breach = |(name, limit): (&String, &f64)| match figure(name) {
            Some(seen) if seen <= limit => None,
            Some(seen) => Some(format!("{name} is {seen}, at most {limit} is known")),
            None => Some(format!("{name} was not measured, at most {limit} is known")),
        };
        self.bound.iter().filter_map(breach).collect()
    }
}

/// A date of TOML's own, or a string in the same form.
fn date(value: &toml::Value) -> Option<Date> {
    let parsed = match value {
        toml::Value::Datetime(parsed) => *parsed,
        toml::Value::String(text) => text.parse().ok()?,
        _ => return None,
    };
    parsed.date.filter(|_| parsed.time.is_none() && parsed.offset.is_none())
}

/// The date in UTC.
pub fn today() -> Date {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    civil(seconds / 86_400)
}

/// The Gregorian date of a day counted from 1970-01-01: 400-year cycles of 146,097 days, years that begin in March.
fn civil(day: u64) -> Date {
    let day = day + 719_468;
    let (cycle, in_cycle) = (day / 146_097, day % 146_097);
    let year_of_cycle = (in_cycle - in_cycle / 1_460 + in_cycle / 36_524 - in_cycle / 146_096) / 365;
    let in_year = in_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let month = (5 * in_year + 2) / 153;
    let (in_month, month) = (in_year - (153 * month + 2) / 5, if month < 10 { month + 3 } else { month - 9 });
    let year = cycle * 400 + year_of_cycle + u64::from(month <= 2);
    Date { year: year as u16, month: month as u8, day: in_month as u8 + 1 }
}

#[cfg(test)]
mod tests {
    use super::civil;

    #[test]
    fn days_are_dates() {
        for (day, date) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (19_782, "2024-02-29"),
            (19_783, "2024-03-01"),
            (20_453, "2025-12-31"),
            (47_540, "2100-02-28"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(civil(day).to_string(), date, "day {day}");
        }
    }
}
