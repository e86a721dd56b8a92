//! Noticing that the directory has changed: by inotify, and on network file systems also by looking.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::sleep;

use super::directory::Directory;
use crate::store::StoreError;

/// inotify does not see what other machines do; Go flannel has no such store, so the interval is ours.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Changes that come this close together are one.
const SETTLE: Duration = Duration::from_millis(20);

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
        let look = async {
            match self.every {
                Some(every) => sleep(every).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            heard = self.hear(only) => heard?,
            () = look => return Ok(()),
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
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = Reader::new(self.inotify.get_ref(), &mut buffer);
        let mut all = Heard::Nothing;
        loop {
            let event = match reader.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(all),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(self.directory.failed(Path::new("inotify"), &error.into())),
            };
            let name = event.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
            match self.meaning(event.wd(), event.events(), &name, only) {
                Heard::Nothing => {}
                Heard::Change if all == Heard::Gone => {}
                heard => all = heard,
            }
        }
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
        self.directory.unreachable("it was moved, deleted or unmounted".into())
    }
}

/// Whether other machines may change what is here.
fn is_remote(path: &Path) -> bool {
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
mod tests {
    use super::*;

    fn directory() -> (tempfile::TempDir, Directory) {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir(place.path().join("subnets")).unwrap();
        let directory = Directory::new(place.path().to_owned());
        (place, directory)
    }

    #[test]
    fn network_file_systems_are_told_from_local_ones() {
        assert!(is_remote_magic(0x6969) && is_remote_magic(0xff53_4d42));
        for path in ["/proc", "/dev", "/"] {
            assert!(!is_remote(Path::new(path)), "{path}");
        }
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
