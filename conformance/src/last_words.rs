//! What a worker says shortly before its deadline, so that a case that never answers leaves word of how far it came.

use std::panic::Location;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// The part of a deadline after which there is little hope.
const LATE: f64 = 0.9;

/// The assertions of the present case: how many ran, and the one that ran last.
static PROGRESS: Mutex<(u64, Option<&'static Location<'static>>)> = Mutex::new((0, None));

/// Notes that an assertion ran.
pub(crate) fn asserted(count: u64, at: &'static Location<'static>) {
    *PROGRESS.lock().unwrap_or_else(PoisonError::into_inner) = (count, Some(at));
}

/// A thread that speaks on standard error, which the parent keeps, when a case is late.
pub(crate) struct LastWords {
    /// Seconds until the next deadline; `None` when the case has answered.
    deadlines: Sender<Option<f64>>,
}

impl LastWords {
    pub(crate) fn start() -> Self {
        let (deadlines, received) = channel::<Option<f64>>();
        std::thread::spawn(move || {
            let mut next: Option<Duration> = None;
            loop {
                let told = match next {
                    Some(wait) => received.recv_timeout(wait),
                    None => received.recv().map_err(|_| RecvTimeoutError::Disconnected),
                };
                next = match told {
                    Ok(deadline) => deadline.and_then(|s| Duration::try_from_secs_f64(s * LATE).ok()),
                    Err(RecvTimeoutError::Timeout) => {
                        eprintln!("conformance worker: {}", so_far());
                        None
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                };
            }
        });
        Self { deadlines }
    }

    /// A case begins that must answer within so many seconds.
    pub(crate) fn by(&self, deadline_s: f64) {
        *PROGRESS.lock().unwrap_or_else(PoisonError::into_inner) = (0, None);
        // Without the thread nothing is said, and nothing else is lost.
        let _ = self.deadlines.send(Some(deadline_s));
    }

    /// The case has answered.
    pub(crate) fn cancel(&self) {
        let _ = self.deadlines.send(None);
    }
}

fn so_far() -> String {
    match *PROGRESS.lock().unwrap_or_else(PoisonError::into_inner) {
        (count, Some(at)) => {
            format!("the deadline is near; assertions so far: {count}, the last at {}:{}", at.file(), at.line())
        }
        (_, None) => "the deadline is near, and no assertion ran yet".to_string(),
    }
}
