//! What a program that works for minutes tells the user meanwhile, and how it ends when the user asks it to.

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use backends::testing::wait_for_some;
use tokio::signal::unix::{SignalKind, signal};

/// Where progress is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// It is what the program is for.
    Standard,
    /// The results are what it is for.
    Error,
}

/// Tells of progress, and knows whether the user asked to stop; clones are one and the same.
#[derive(Clone, Debug)]
pub struct Progress {
    output: Output,
    start: Instant,
    stopped: Arc<AtomicBool>,
}

impl Progress {
    fn new(output: Output) -> Self {
        Self { output, start: Instant::now(), stopped: Arc::new(AtomicBool::new(false)) }
    }

    /// An error once the user asked to stop, so that the guards clean up.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(!self.stopped.load(Ordering::Relaxed), "interrupted");
        Ok(())
    }

    /// Sleeps, but not after the user asked to stop.
    pub fn pause(&self, time: Duration) -> anyhow::Result<()> {
        let end = Instant::now() + time;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            self.check()?;
            thread::sleep(left.min(Duration::from_millis(200)));
        }
        self.check()
    }

    /// Polls `condition` until it holds; an error when that takes longer than `limit` or the user asked to
    /// stop.
    pub fn wait_for(
        &self,
        what: &str,
        limit: Duration,
        mut condition: impl FnMut() -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        wait_for_some(what, limit, || match self.check().and_then(|()| condition()) {
            Ok(false) => None,
            Ok(true) => Some(Ok(())),
            Err(error) => Some(Err(error)),
        })?
    }

    /// Prints a line of progress, with the time since the start.
    pub fn step(&self, text: &str) -> anyhow::Result<()> {
        self.check()?;
        self.say(&format!("{:6.1} s  {text}", self.start.elapsed().as_secs_f64()))
    }

    /// Prints text as it is.
    pub fn say(&self, text: &str) -> anyhow::Result<()> {
        match self.output {
            Output::Standard => {
                writeln!(io::stdout(), "{text}").context("can't write to the standard output")
            }
            Output::Error => writeln!(io::stderr(), "{text}").context("can't write to the standard error"),
        }
    }
}

/// Runs `work` on a thread of its own. The first SIGINT, SIGTERM or SIGHUP asks it to stop, a second one ends
/// the process at once: the kernel then removes the namespaces, and this function the temporary files.
pub fn watch_signals_during(
    program: &'static str,
    output: Output,
    work: impl FnOnce(Progress) -> anyhow::Result<()> + Send + 'static,
) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let progress = Progress::new(output);
    let files = TemporaryFiles::new(program)?;
    let outcome = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let working = progress.clone();
        let mut working = tokio::task::spawn_blocking(move || work(working));
        loop {
            tokio::select! {
                outcome = &mut working => return outcome.context("the work panicked")?,
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
                _ = hangup.recv() => {}
            }
            if progress.stopped.swap(true, Ordering::Relaxed) {
                bail!("interrupted twice: not waiting for the end of the current step");
            }
            eprintln!("{program}: stopping and removing everything; once more to end at once");
        }
    });
    runtime.shutdown_timeout(Duration::ZERO);
    drop(files);
    outcome
}

/// The directory in which all temporary files of the process are.
struct TemporaryFiles(PathBuf);

impl TemporaryFiles {
    fn new(program: &str) -> anyhow::Result<Self> {
        // Not in tempfile's own directory, which is another one after the override below.
        let prefix = format!("flannel-{program}-");
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir_in(std::env::temp_dir());
        let directory = directory.context("no directory for temporary files: set TMPDIR")?.keep();
        // An error means that it was overridden before: then there is a directory for all of them already.
        let _ = tempfile::env::override_temp_dir(&directory);
        Ok(Self(directory))
    }
}

impl Drop for TemporaryFiles {
    fn drop(&mut self) {
        // Work that was not waited for may still make files in it.
        for _ in 0..50 {
            match fs::remove_dir_all(&self.0) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    thread::sleep(Duration::from_millis(20))
                }
                _ => return,
            }
        }
        eprintln!("temporary files could not be removed: {}", self.0.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_to_stop_gets_an_error_at_the_next_step_and_no_sleep() {
        let progress = Progress::new(Output::Error);
        progress.step("it goes on").unwrap();
        let (worker, asked) = (progress.clone(), progress.stopped);
        asked.store(true, Ordering::Relaxed);
        let hour = Duration::from_secs(3600);
        for outcome in [
            worker.check(),
            worker.step("never said"),
            worker.pause(hour),
            worker.wait_for("nothing", hour, || Ok(false)),
        ] {
            assert_eq!(outcome.unwrap_err().to_string(), "interrupted");
        }
    }

    #[test]
    fn the_outcome_of_the_work_is_that_of_the_program() {
        watch_signals_during("test", Output::Error, |progress| progress.check()).unwrap();
        let error = watch_signals_during("test", Output::Error, |_| bail!("it broke")).unwrap_err();
        assert_eq!(error.to_string(), "it broke");
        let error = watch_signals_during("test", Output::Error, |_| panic!("a test's panic")).unwrap_err();
        assert_eq!(error.to_string(), "the work panicked");
    }
}
