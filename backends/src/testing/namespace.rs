//! A network namespace that a thread of this process keeps alive.

use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{fmt, fs, process};

use anyhow::Context;
use rustix::thread::{LinkNameSpaceType, gettid, move_into_link_name_space};

/// How long an HTTP server may take to answer, on a machine that does something else.
const HTTP_TIMEOUT: Duration = Duration::from_secs(20);

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace without a name: it ends with this value, and with the process at the latest.
///
/// Its own thread stays in it for as long as the value lives, and is the parent of every program spawned in
/// it: they are killed when it ends.
pub struct Namespace {
    path: PathBuf,
    handle: File,
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Namespace {
    /// The namespace that the calling thread is in: programs started here end with this value, too.
    pub fn current() -> anyhow::Result<Self> {
        Self::keep(|| Ok(()))
    }

    /// Runs `work` on a thread inside the namespace and hands back its result, or its panic.
    ///
    /// Sockets opened by `work` stay in the namespace, wherever they are used later.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("who may create a network namespace may also enter it");
                work()
            });
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }

    /// Where other programs find the namespace (`CNI_NETNS`, `nsenter --net=`, `ip ... netns`).
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a setting below `/proc/sys/net`, for instance `ipv4/ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> anyhow::Result<()> {
        let path = format!("/proc/sys/net/{key}");
        self.run(|| fs::write(&path, value)).with_context(|| format!("can't write {value:?} to {path}"))
    }

    /// Asks the HTTP server at `address` for `path`; gives the status code and the body.
    pub fn http_get(&self, address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
        let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
        let answer = self.run(|| -> io::Result<String> {
            let mut stream = TcpStream::connect_timeout(&address, HTTP_TIMEOUT)?;
            stream.set_read_timeout(Some(HTTP_TIMEOUT))?;
            stream.write_all(request.as_bytes())?;
            io::read_to_string(stream)
        });
        let answer = answer.with_context(|| format!("no answer from http://{address}{path}"))?;
        let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
        let code = code.with_context(|| format!("not an HTTP answer: {answer:?}"))?;
        Ok((code, answer.split_once("\r\n\r\n").unwrap_or_default().1.to_owned()))
    }

    /// Runs `work` on the thread that lives as long as the namespace.
    ///
    /// The kernel ties the life of a child to the thread that made it (`PR_SET_PDEATHSIG`), so children that
    /// are to outlive the call come from here.
    pub(super) fn run_on_keeper<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (sender, result) = mpsc::channel();
        let job: Job = Box::new(move || drop(sender.send(work())));
        self.jobs.as_ref().and_then(|jobs| jobs.send(job).ok()).expect("the keeper lives until drop");
        result.recv().expect("the keeper runs every job")
    }

    /// A thread that prepares itself and then waits for jobs.
    pub(super) fn keep(prepare: impl FnOnce() -> nix::Result<()> + Send + 'static) -> anyhow::Result<Self> {
        let (told, tell) = mpsc::channel();
        let (jobs, todo) = mpsc::channel::<Job>();
        let thread = thread::Builder::new().name("namespace".to_owned()).spawn(move || {
            let ready = prepare().map(|()| gettid());
            let failed = ready.is_err();
            if told.send(ready).is_err() || failed {
                return;
            }
            while let Ok(job) = todo.recv() {
                job();
            }
        })?;
        let tid = tell.recv().context("its thread ended early")??;
        let path = PathBuf::from(format!("/proc/{}/task/{}/ns/net", process::id(), tid.as_raw_nonzero()));
        let handle = File::open(&path).with_context(|| format!("can't open {}", path.display()))?;
        Ok(Self { path, handle, jobs: Some(jobs), thread: Some(thread) })
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Namespace").field(&self.path).finish()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            // A keeper that panicked has nothing to add: its jobs already failed at their callers.
            drop(thread.join());
        }
    }
}
