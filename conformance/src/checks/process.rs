//! What the operating system says of this process: its memory, threads and open files. Linux only.

use crate::case::Stop;

/// Memory of this process, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory {
    /// Resident now.
    pub resident: f64,
    /// Most that was ever resident.
    pub peak_resident: f64,
}

/// A field of a file of `/proc/self` that is given in kB, in bytes.
fn field(text: &str, name: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<f64>().ok().map(|kb| kb * 1024.0)
}

/// The memory of this process; `None` where the platform does not say.
pub(super) fn memory() -> Option<Memory> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    Some(Memory { resident: field(&status, "VmRSS:")?, peak_resident: field(&status, "VmHWM:")? })
}

/// Anonymous memory in bytes, resident or swapped out: what the process holds for itself, files aside.
///
/// From `smaps_rollup`, which counts pages; the counters of `status` are off by some pages a processor.
pub(super) fn held() -> Option<f64> {
    if let Ok(rollup) = std::fs::read_to_string("/proc/self/smaps_rollup") {
        return Some(field(&rollup, "Anonymous:")? + field(&rollup, "Swap:")?);
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    Some(field(&status, "RssAnon:")? + field(&status, "VmSwap:")?)
}

/// Threads and open files of this process.
pub(super) fn handles() -> Option<[f64; 2]> {
    let count = |folder: &str| Some(std::fs::read_dir(folder).ok()?.count() as f64);
    Some([count("/proc/self/task")?, count("/proc/self/fd")?])
}

/// A reading that a check cannot do without.
pub(super) fn need<T>(reading: Option<T>) -> Result<T, Stop> {
    reading.ok_or_else(|| Stop::Unsupported("memory of a process can be read on Linux only".to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_read_in_bytes() {
        let text = "Anonymous:           116 kB\nSwapPss:  7 kB\nSwap:    4 kB\n";
        assert_eq!((field(text, "Anonymous:"), field(text, "Swap:")), (Some(118_784.0), Some(4096.0)));
        assert_eq!(field(text, "Rss:"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn memory_that_is_touched_is_held() {
        let before = held().expect("a reading");
        let block = vec![1u8; 8 << 20];
        let grown = held().expect("a reading") - before;
        assert!(grown > 4e6, "{grown}");
        let memory = memory().expect("a reading");
        assert!(memory.peak_resident >= 8e6 && memory.resident >= 8e6, "{memory:?} beside {}", block.len());
        assert!(handles().is_some_and(|[threads, files]| threads >= 1.0 && files >= 1.0));
    }
}
