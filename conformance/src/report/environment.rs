//! The machine a run ran on, as far as it can matter to the results.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::process::Command;

/// The machine of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Environment {
    /// The processor's name for itself.
    pub cpu: String,
    /// The architecture, such as `x86_64`.
    pub arch: String,
    /// Instruction set extensions that BitNet kernels use and this processor has.
    pub instruction_sets: Vec<String>,
    /// Threads that may run at once.
    pub threads: usize,
    /// The operating system, such as `linux`, with the kernel's release where it is known.
    pub os: String,
    /// Whether the suite was built with optimisation.
    pub optimised: bool,
    /// The compiler that the suite was built with.
    pub rustc: String,
    /// The working tree that the run was started in, where it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git: Option<GitState>,
    /// Environment variables that choose kernels or thread counts and were set.
    pub variables: std::collections::BTreeMap<String, String>,
}

/// The state of a git working tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GitState {
    /// The commit that is checked out.
    pub commit: String,
    /// Whether a tracked file differs from it.
    pub dirty: bool,
}

impl GitState {
    /// The state of the working tree that a folder is in; `None` where there is none, or no git.
    pub fn of(folder: &Path) -> Option<Self> {
        let mut git = Command::new("git");
        // Without optional locks a run never gets in the way of a git command beside it.
        git.env("GIT_OPTIONAL_LOCKS", "0").arg("-C").arg(folder);
        let output = git.args(["status", "--porcelain=v2", "--branch", "--untracked-files=no"]).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout);
        let commit = text.lines().find_map(|line| line.strip_prefix("# branch.oid "))?;
        let is_commit = commit.chars().all(|c| c.is_ascii_hexdigit());
        let dirty = text.lines().any(|line| !line.starts_with('#'));
        (output.status.success() && is_commit).then(|| Self { commit: commit.to_string(), dirty })
    }
}

impl Environment {
    /// This machine, now.
    pub fn current() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_string()))
            .unwrap_or_else(|| "unknown".to_string());
        let release = read("/proc/sys/kernel/osrelease");
        let names = ["BITNET_ISA", "BITNET_THREADS", "RAYON_NUM_THREADS"];
        Self {
            cpu,
            arch: std::env::consts::ARCH.to_string(),
            instruction_sets: instruction_sets().into_iter().map(str::to_string).collect(),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            os: format!("{} {}", std::env::consts::OS, release.trim()).trim().to_string(),
            optimised: !cfg!(debug_assertions),
            rustc: env!("CONFORMANCE_RUSTC").to_string(),
            git: GitState::of(Path::new(".")),
            variables: names
                .iter()
                .filter_map(|name| std::env::var(name).ok().map(|value| ((*name).to_string(), value)))
                .collect(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) fn instruction_sets() -> Vec<&'static str> {
    let have = [
        ("sse4.1", std::is_x86_feature_detected!("sse4.1")),
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("f16c", std::is_x86_feature_detected!("f16c")),
        ("avxvnni", std::is_x86_feature_detected!("avxvnni")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::is_x86_feature_detected!("avx512bw")),
        ("avx512vnni", std::is_x86_feature_detected!("avx512vnni")),
    ];
    have.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

#[cfg(target_arch = "aarch64")]
pub(crate) fn instruction_sets() -> Vec<&'static str> {
    let have = [
        ("neon", std::arch::is_aarch64_feature_detected!("neon")),
        ("dotprod", std::arch::is_aarch64_feature_detected!("dotprod")),
        ("i8mm", std::arch::is_aarch64_feature_detected!("i8mm")),
        ("sve", std::arch::is_aarch64_feature_detected!("sve")),
    ];
    have.into_iter().filter(|(_, has)| *has).map(|(name, _)| name).collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(crate) fn instruction_sets() -> Vec<&'static str> {
    Vec::new()
}
