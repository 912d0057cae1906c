//! Which cases there are: every (backend × model × check) that makes sense, chosen by backend, model and id.

use crate::backend::{BackendFactory, Capability, Registry, RegistryError};
use crate::case::Check;
use crate::model::{Model, ModelError};
use globset::{Glob, GlobMatcher};
use std::path::Path;
use std::sync::Arc;

/// One test: a check of a backend on a model.
#[derive(Clone)]
pub struct Case {
    /// The stable id, see [`Check::case_id`].
    pub id: String,
    /// The backend.
    pub backend: Arc<dyn BackendFactory>,
    /// The model.
    pub model: Arc<Model>,
    /// The check.
    pub check: Check,
    /// What the check needs and the backend declares that it lacks: the case probes that in place of running the check.
    pub lacks: Option<Capability>,
}

/// Why no list of cases can be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SuiteError {
    /// A faulty registration, or a backend that is not registered.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A model that does not exist.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Two checks have one name, so that their cases would have one id.
    #[error("two cases have the id {id}")]
    DuplicateId {
        /// The id.
        id: String,
    },
    /// A filter that is no pattern.
    #[error("filter {filter:?} is not a pattern: {reason}")]
    Filter {
        /// The filter.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nothing is left to run. An empty run proves nothing, so it is not a green one.
    #[error("no case matches the choice of backends, models and filter")]
    Nothing,
}

/// What to take from a suite. The default takes everything.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Backends by name; empty for all registered ones.
    pub backends: Vec<String>,
    /// Models by name or folder; empty for the default run over the built-in models.
    pub models: Vec<String>,
    /// A part of the case id, or a pattern over the whole id where it contains a `*`.
    pub filter: Option<String>,
}

/// The backends, the checks and the models.
#[derive(Clone)]
pub struct Suite {
    registry: Registry,
    checks: Vec<Check>,
    models: Vec<Arc<Model>>,
}

impl Suite {
    /// All checks on the built-in models, for the registered backends.
    ///
    /// # Errors
    /// [`SuiteError::Registry`] where a registration is faulty or there is none.
    pub fn new(registry: Registry) -> Result<Self, SuiteError> {
        registry.validate()?;
        Ok(Self {
            registry,
            checks: crate::checks::all(),
            models: Model::built_in().into_iter().map(Arc::new).collect(),
        })
    }

    /// The same with other checks.
    #[must_use]
    pub fn with_checks(mut self, checks: Vec<Check>) -> Self {
        self.checks = checks;
        self
    }

    /// The registered backends.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The checks.
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// The built-in models.
    pub fn models(&self) -> &[Arc<Model>] {
        &self.models
    }

    /// The cases of a selection: by backend, then model, then check. Never empty.
    ///
    /// # Errors
    /// [`SuiteError`] for a name that does not exist, a bad filter, a repeated id, or an empty result.
    pub fn select(&self, selection: &Selection) -> Result<Vec<Case>, SuiteError> {
        let registry = self.registry.select(&selection.backends)?;
        let chosen = !selection.models.is_empty();
        let models = if chosen {
            selection.models.iter().map(|m| self.model(m)).collect::<Result<Vec<_>, _>>()?
        } else {
            self.models.clone()
        };
        let filter = selection.filter.as_deref().map(Filter::new).transpose()?;
        let mut ids = std::collections::HashSet::new();
        let mut cases = Vec::new();
        for backend in registry.factories() {
            let capabilities = backend.capabilities();
            for model in &models {
                for check in self.checks.iter().filter(|c| c.models.takes(model, chosen)) {
                    let id = check.case_id(backend.name(), model.name());
                    if !ids.insert(id.clone()) {
                        return Err(SuiteError::DuplicateId { id });
                    }
                    if filter.as_ref().is_some_and(|f| !f.takes(&id)) {
                        continue;
                    }
                    let lacks = check.needs.filter(|capability| !capabilities.has(*capability));
                    let (backend, model, check) = (backend.clone(), model.clone(), check.clone());
                    cases.push(Case { id, backend, model, check, lacks });
                }
            }
        }
        if cases.is_empty() { Err(SuiteError::Nothing) } else { Ok(cases) }
    }

    fn model(&self, name: &str) -> Result<Arc<Model>, SuiteError> {
        if let Some(model) = self.models.iter().find(|m| m.name() == name) {
            return Ok(model.clone());
        }
        let path = Path::new(name);
        if path.is_dir() {
            return Ok(Arc::new(Model::folder(path)?));
        }
        let known = self.models.iter().map(|m| m.name().to_string()).collect();
        Err(ModelError::Unknown { name: name.to_string(), known }.into())
    }
}

enum Filter {
    Part(String),
    Pattern(GlobMatcher),
}

impl Filter {
    fn new(text: &str) -> Result<Self, SuiteError> {
        if !text.contains('*') {
            return Ok(Self::Part(text.to_string()));
        }
        let pattern =
            Glob::new(text).map_err(|e| SuiteError::Filter { filter: text.to_string(), reason: e.to_string() })?;
        Ok(Self::Pattern(pattern.compile_matcher()))
    }

    fn takes(&self, id: &str) -> bool {
        match self {
            Self::Part(part) => id.contains(part.as_str()),
            Self::Pattern(pattern) => pattern.is_match(id),
        }
    }
}
