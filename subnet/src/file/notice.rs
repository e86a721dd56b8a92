//! Noticing that the directory has changed: by inotify, and on network file systems also by looking.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use super::directory::Directory;
use crate::store::StoreError;
use crate::watched::{LOOK_EVERY, SETTLE, events, every, is_remote};

/// Waits for changes of the leases in one directory.
pub(super) struct Notice<'a> {
    directory: &'a Directory,
    inotify: AsyncFd<OwnedFd>,
    root: i32,
    leases: i32,
    /// How often to look, if changes may come unannounced.
    every: Option<Duration>,
}

/// What events said so far.
#[derive(PartialEq)]
enum Heard {
    Nothing,
    Change,
    /// What is watched is not what the path names any more.
    Gone,
}

impl<'a> Notice<'a> {
    /// Everything that happens from now on is noticed.
    pub(super) fn new(directory: &'a Directory) -> Result<Self, StoreError> {
        directory.prepare()?;
        let every = is_remote(directory.root()).then_some(LOOK_EVERY);
        Self::looking(directory, every)
    }

    fn looking(directory: &'a Directory, every: Option<Duration>) -> Result<Self, StoreError> {
        let itself = WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF | WatchFlags::ONLYDIR;
        let entries = WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::MOVED_FROM | WatchFlags::MOVED_TO;
        let content = WatchFlags::CLOSE_WRITE | WatchFlags::ATTRIB;
        let failed = |path: &Path, error: Errno| directory.failed(path, &error.into());
        let (root, leases) = (directory.root(), directory.leases());
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)
            .map_err(|error| failed(Path::new("inotify"), error))?;
        let watch =
            |path: &Path, flags| inotify::add_watch(&fd, path, flags).map_err(|error| failed(path, error));
        let (root, leases) = (watch(root, itself | entries)?, watch(&leases, itself | entries | content)?);
        #[expect(deprecated, reason = "sound for a descriptor that is owned; what replaces it is unsafe")]
        let inotify = AsyncFd::new(fd);
        let inotify = inotify.map_err(|error| directory.failed(Path::new("inotify"), &error))?;
        Ok(Self { directory, inotify, root, leases, every })
    }

    /// Waits until a lease, or only the one named, may have changed.
    ///
    /// # Errors
    /// [`StoreError::Unreachable`] when the directory was moved, deleted or unmounted: a new notice is
    /// needed then.
    pub(super) async fn changed(&mut self, only: Option<&str>) -> Result<(), StoreError> {
        tokio::select! {
            heard = self.hear(only) => heard?,
            () = every(self.every) => return Ok(()),
        }
        sleep(SETTLE).await;
        match self.drain(None)? {
            Heard::Gone => Err(self.gone()),
            Heard::Nothing | Heard::Change => Ok(()),
        }
    }

    async fn hear(&self, only: Option<&str>) -> Result<(), StoreError> {
        loop {
            let ready = self.inotify.readable().await;
            let mut ready = ready.map_err(|error| self.directory.failed(Path::new("inotify"), &error))?;
            match self.drain(only)? {
                Heard::Nothing => ready.clear_ready(),
                Heard::Change => return Ok(()),
                Heard::Gone => return Err(self.gone()),
            }
        }
    }

    /// Reads all events that are there.
    fn drain(&self, only: Option<&str>) -> Result<Heard, StoreError> {
        let mut all = Heard::Nothing;
        let read =
            events(self.inotify.get_ref(), |watch, what, name| match self.meaning(watch, what, name, only) {
                Heard::Nothing => {}
                Heard::Change if all == Heard::Gone => {}
                heard => all = heard,
            });
        read.map_err(|error| self.directory.failed(Path::new("inotify"), &error.into()))?;
        Ok(all)
    }

    fn meaning(&self, watch: i32, events: ReadFlags, name: &str, only: Option<&str>) -> Heard {
        let gone = ReadFlags::DELETE_SELF | ReadFlags::MOVE_SELF | ReadFlags::IGNORED | ReadFlags::UNMOUNT;
        if events.contains(ReadFlags::QUEUE_OVERFLOW) {
            Heard::Change
        } else if events.intersects(gone) || (watch == self.root && name == "subnets") {
            Heard::Gone
        } else if watch != self.leases || name.starts_with('.') || only.is_some_and(|only| only != name) {
            Heard::Nothing
        } else {
            Heard::Change
        }
    }

    fn gone(&self) -> StoreError {
        self.directory
            .unreachable("it was moved, deleted or unmounted: put it back, or mount its file system".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory() -> (tempfile::TempDir, Directory) {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir(place.path().join("subnets")).unwrap();
        let directory = Directory::new(place.path().to_owned());
        (place, directory)
    }

    #[tokio::test]
    async fn where_changes_come_unannounced_it_is_looked_again_and_again() {
        let (_place, directory) = directory();
        let mut notice = Notice::looking(&directory, Some(Duration::from_millis(1))).unwrap();
        for _ in 0..3 {
            notice.changed(None).await.unwrap();
        }
    }

    #[tokio::test]
    async fn changes_of_leases_are_noticed_and_others_are_not() {
        let (place, directory) = directory();
        let notice = Notice::looking(&directory, None).unwrap();
        let write = |name: &str| std::fs::write(place.path().join(name), "x").unwrap();
        write(".lock");
        write("config.json");
        write("subnets/.10.3.1.0-24.77");
        assert!(notice.drain(None).unwrap() == Heard::Nothing);
        write("subnets/10.3.1.0-24");
        assert!(notice.drain(Some("10.3.2.0-24")).unwrap() == Heard::Nothing);
        write("subnets/10.3.2.0-24");
        assert!(notice.drain(Some("10.3.2.0-24")).unwrap() == Heard::Change);
        std::fs::remove_file(place.path().join("subnets/10.3.1.0-24")).unwrap();
        assert!(notice.drain(None).unwrap() == Heard::Change);
        std::fs::rename(place.path().join("subnets"), place.path().join("elsewhere")).unwrap();
        assert!(notice.drain(None).unwrap() == Heard::Gone);
    }
}
