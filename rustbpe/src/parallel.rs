//! Work on several threads while the caller's thread keeps watch.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, Scope};
use std::time::Duration;

use crate::error::{Error, Result};

/// How often the caller looks up from its work, for signals and progress.
pub const LOOK: Duration = Duration::from_millis(50);

/// The threads that this process may use: `RAYON_NUM_THREADS` where it is set, as for the published package.
pub fn threads() -> usize {
    let wanted = std::env::var("RAYON_NUM_THREADS").ok().and_then(|text| text.parse().ok()).filter(|&count| count > 0);
    wanted.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from))
}

/// A panic of ours becomes an error: none may reach the caller.
pub fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(Error::Internal(text.unwrap_or_else(|| "a panic".to_owned())))
    })
}

/// Runs `work` once for each of `states`, on a thread each, and calls `watch` from here meanwhile. The first error stops
/// all: `work` looks at the flag that it is given from time to time.
pub fn run<S: Send, W>(states: Vec<S>, work: W, watch: &mut dyn FnMut() -> Result<()>) -> Result<()>
where
    W: Fn(S, &AtomicBool) -> Result<()> + Sync,
{
    let stop = AtomicBool::new(false);
    let mut outcome = Ok(());
    let mut note = |result: Result<()>| {
        if let (Ok(()), Err(error)) = (&outcome, result) {
            stop.store(true, Ordering::Relaxed);
            outcome = Err(error);
        }
    };
    thread::scope(|scope: &Scope<'_, '_>| {
        let (done, results) = mpsc::channel();
        for state in states {
            let (done, work, stop) = (done.clone(), &work, &stop);
            let job = move || {
                let _ = done.send(guarded(|| work(state, stop)));
            };
            if let Err(error) = thread::Builder::new().name("rustbpe".into()).spawn_scoped(scope, job) {
                note(Err(Error::Internal(format!("no thread: {error}"))));
                break;
            }
        }
        drop(done);
        loop {
            match results.recv_timeout(LOOK) {
                Ok(result) => note(result),
                Err(RecvTimeoutError::Timeout) => note(watch()),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
    });
    outcome
}
