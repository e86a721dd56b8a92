//! A file whose content may change under us: tells when it is another one than was read last.
//!
//! A file from a ConfigMap is a link to `..data/NAME`, and `..data` is a link that is replaced: so it is
//! the directories on the way that are watched, and the content that decides.

use std::io::{self, ErrorKind};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use std::{fs, path};

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use crate::pace::Backoff;
use crate::regular;

/// inotify does not see what other machines do; Go flannel has no such store, so the interval is ours.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Changes that come this close together are one.
pub(crate) const SETTLE: Duration = Duration::from_millis(20);

/// What was found where the file should be.
type Found = Result<Vec<u8>, ErrorKind>;

/// One file, and what was read last.
#[derive(Debug)]
pub(crate) struct Watched {
    path: PathBuf,
    last: Mutex<Option<Found>>,
}

impl Watched {
    /// Nothing is read yet.
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, last: Mutex::new(None) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The content, remembered.
    pub(crate) fn read(&self) -> io::Result<Vec<u8>> {
        let read = regular::read(&self.path);
        let found = match &read {
            Ok(content) => Ok(content.clone()),
            Err(error) => Err(error.kind()),
        };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
        read
    }

    /// Resolves when a reader would find something else than [`read`](Self::read) did, or if nothing was
    /// read yet.
    pub(crate) async fn changed(&self) {
        // As of now: who else reads meanwhile takes nothing away.
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut backoff = Backoff::watching();
        loop {
            // Watched first, so that nothing is missed between looking and watching.
            let watch = FileWatch::new(&self.path);
            let now = regular::read(&self.path).map_err(|error| error.kind());
            if last.as_ref() != Some(&now) {
                return;
            }
            match watch {
                Ok(mut watch) => match watch.heard().await {
                    Ok(()) => sleep(SETTLE).await,
                    Err(_) => backoff.wait().await,
                },
                // Such as a limit of the system.
                Err(error) => {
                    if backoff.worth_saying() {
                        let file = self.path.display();
                        tracing::warn!(%error, %file, "the file can't be watched and is looked at instead");
                    }
                    sleep(LOOK_EVERY).await;
                }
            }
        }
    }
}

/// Everything that may have to do with the file, as it was reached when this was made.
struct FileWatch {
    inotify: AsyncFd<OwnedFd>,
    /// What is watched, and the only entry in it that matters, if it is not all.
    places: Vec<(i32, Option<PathBuf>)>,
    /// How often to look, if changes may come unannounced.
    every: Option<Duration>,
}

impl FileWatch {
    fn new(file: &Path) -> io::Result<Self> {
        let file = path::absolute(file)?;
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let itself = WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
        let entries = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO;
        let content = WatchFlags::CLOSE_WRITE | WatchFlags::ATTRIB;
        // A file that is mounted alone is changed in a directory that can't be seen from here.
        let alone = inotify::add_watch(&fd, &file, itself | content);
        let mut places: Vec<_> = alone.into_iter().map(|watch| (watch, None)).collect();
        // Of a link every entry beside it may be a part of the way.
        let is_link = fs::symlink_metadata(&file).is_ok_and(|about| about.is_symlink());
        let mut every = None;
        let (mut entry, mut more, mut nearest) = (file.as_path(), content, true);
        while let Some(directory) = entry.parent() {
            let name = entry.file_name().filter(|_| !(nearest && is_link)).map(PathBuf::from);
            match inotify::add_watch(&fd, directory, itself | entries | more | WatchFlags::ONLYDIR) {
                Ok(watch) => places.push((watch, name)),
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                // It may not be read, or the system has no more watches.
                Err(_) => every = Some(LOOK_EVERY),
            }
            if nearest && is_remote(directory) {
                every = Some(LOOK_EVERY);
            }
            (entry, more, nearest) = (directory, WatchFlags::empty(), false);
        }
        #[expect(deprecated, reason = "sound for a descriptor that is owned; what replaces it is unsafe")]
        let inotify = AsyncFd::new(fd)?;
        Ok(Self { inotify, places, every })
    }

    /// Waits for something that matters.
    async fn heard(&mut self) -> io::Result<()> {
        let events = async {
            loop {
                let mut ready = self.inotify.readable().await?;
                let mut matters = false;
                events(self.inotify.get_ref(), |watch, what, name| {
                    matters |= what.contains(ReadFlags::QUEUE_OVERFLOW) || self.matters(watch, name);
                })?;
                if matters {
                    return Ok(());
                }
                ready.clear_ready();
            }
        };
        tokio::select! {
            outcome = events => outcome,
            () = every(self.every) => Ok(()),
        }
    }

    /// Without a name it is about what is watched itself.
    fn matters(&self, watch: i32, name: &str) -> bool {
        let concerns = |only: &Option<PathBuf>| only.as_deref().is_none_or(|only| only == Path::new(name));
        self.places.iter().any(|(place, only)| *place == watch && (name.is_empty() || concerns(only)))
    }
}

/// Waits this long, or for ever.
pub(crate) async fn every(interval: Option<Duration>) {
    match interval {
        Some(interval) => sleep(interval).await,
        None => std::future::pending().await,
    }
}

/// Hands out all events that are there: the watch, what happened, and to which entry.
pub(crate) fn events(inotify: &OwnedFd, mut each: impl FnMut(i32, ReadFlags, &str)) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(inotify, &mut buffer);
    loop {
        match reader.next() {
            Ok(event) => {
                let name = event.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
                each(event.wd(), event.events(), &name);
            }
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether other machines may change what is here.
pub(crate) fn is_remote(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|found| is_remote_magic(found.f_type as u32))
}

/// By the magic numbers of statfs(2) and linux/magic.h.
fn is_remote_magic(magic: u32) -> bool {
    const REMOTE: [u32; 15] = [
        0x0000_6969, // NFS
        0xff53_4d42, // CIFS
        0xfe53_4d42, // SMB2 and newer
        0x0000_517b, // SMB
        0x6573_5546, // FUSE: GlusterFS, SSHFS, virtiofs and others
        0x0102_1997, // 9P
        0x00c3_6400, // Ceph
        0x5346_414f, // AFS
        0x6b41_4653, // kAFS
        0x7375_7245, // Coda
        0x7461_636f, // OCFS2
        0x0116_1970, // GFS2
        0x0bd0_0bd0, // Lustre
        0x4750_4653, // GPFS
        0x786f_4256, // VirtualBox shared folders
    ];
    REMOTE.contains(&magic)
}

#[cfg(test)]
#[path = "watched/tests.rs"]
mod tests;
