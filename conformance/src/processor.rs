//! What Linux says of a process's use of the processors. Where nothing is said, there is nothing to tell.

use std::collections::BTreeMap;
use std::ffi::OsString;

/// What a process has had of the processors at some time.
pub(crate) struct Usage {
    time: Option<f64>,
    waits: Waits,
}

impl Usage {
    /// Of the process with this number, so far.
    pub(crate) fn of(pid: u32) -> Self {
        Self { time: time_used(pid), waits: waits(&pid.to_string()) }
    }

    /// What it had since an earlier time: `None` where nothing is said.
    pub(crate) fn since(&self, before: &Self) -> Option<Share> {
        let computed = self.time.zip(before.time).map(|(now, before)| now - before)?;
        Some(Share { computed, withheld: longest_wait(&before.waits, &self.waits) / 1e3 })
    }
}

/// What a process had of the processors over some time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Share {
    /// Seconds for which its threads computed, all together.
    pub computed: f64,
    /// Seconds for which the thread that waited longest would have computed, and was not let.
    pub withheld: f64,
}

impl Share {
    /// Whether others kept a process from computing for most of `seconds`. One that waits for a lock has nothing withheld, and
    /// one whose threads are in each other's way computes all the same.
    pub(crate) fn is_starved(self, seconds: f64) -> bool {
        self.withheld > seconds / 2.0 && self.computed < seconds / 2.0
    }
}

/// Seconds of processor time that all threads of a process have used.
fn time_used(pid: u32) -> Option<f64> {
    /// They are counted in hundredths of a second for every program, whatever the system does itself (`USER_HZ`).
    const TICKS: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name of the executable stands in brackets and may hold anything; 11 fields behind it come the two times.
    let mut times = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<f64>);
    Some((times.next()?.ok()? + times.next()?.ok()?) / TICKS)
}

/// Milliseconds that each thread of a process has waited for a processor so far.
pub(crate) type Waits = BTreeMap<OsString, f64>;

/// The waits of a process: its number, or `self`.
pub(crate) fn waits(process: &str) -> Waits {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{process}/task")) else { return Waits::new() };
    tasks
        .flatten()
        .filter_map(|task| {
            let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            let nanoseconds: f64 = text.split_whitespace().nth(1)?.parse().ok()?;
            Some((task.file_name(), nanoseconds / 1e6))
        })
        .collect()
}

/// The longest that one thread waited between two readings, in milliseconds.
pub(crate) fn longest_wait(before: &Waits, after: &Waits) -> f64 {
    after.iter().map(|(task, wait)| wait - before.get(task).unwrap_or(&0.0)).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[cfg(target_os = "linux")]
    #[test]
    fn sleep_is_not_taken_for_a_want_of_processors() {
        let me = std::fs::read_link("/proc/thread-self").expect("a link").file_name().expect("a number").to_owned();
        let before = waits("self").get(&me).copied();
        std::thread::sleep(Duration::from_millis(200));
        let waited = waits("self").get(&me).copied().zip(before).map(|(after, before)| after - before);
        assert!(waited.is_none_or(|waited| waited < 150.0), "{waited:?}");
    }

    #[test]
    fn starved_is_who_would_compute_and_is_not_let() {
        let share = |computed, withheld| Share { computed, withheld };
        assert!(share(11.8, 100.0).is_starved(120.0), "kept from computing");
        assert!(!share(0.0, 0.1).is_starved(120.0), "waits for a lock");
        assert!(!share(119.0, 0.5).is_starved(120.0), "computes for ever");
        assert!(!share(230.0, 70.0).is_starved(120.0), "four threads spin on two processors");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn what_a_process_computes_is_seen() {
        let before = Usage::of(std::process::id());
        let clock = std::time::Instant::now();
        // Three hundredths of a second at least, however the clock is read.
        while clock.elapsed() < Duration::from_secs(20) {
            std::hint::black_box((0..1_000_000u64).fold(1u64, |a, b| a.wrapping_mul(b | 1)));
            let share = Usage::of(std::process::id()).since(&before).expect("Linux says");
            if share.computed >= 0.03 {
                return;
            }
        }
        panic!("nothing seen in 20 seconds");
    }

    #[test]
    fn the_longest_wait_counts() {
        let reading = |a: f64, b: f64| BTreeMap::from([("1".into(), a), ("2".into(), b)]);
        assert_eq!(longest_wait(&reading(1.0, 2.0), &reading(4.0, 2.5)), 3.0);
        assert_eq!(longest_wait(&BTreeMap::new(), &BTreeMap::new()), 0.0);
    }
}
