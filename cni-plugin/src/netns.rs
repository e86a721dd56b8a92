//! The network namespace of a pod.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::sync::OnceLock;

/// From <linux/sockios.h>: a descriptor of the network namespace that a socket is in.
const SIOCGSKNS: libc::Ioctl = 0x894C;

/// A pod's network namespace.
pub(crate) struct Namespace {
    file: File,
}

/// Why a namespace can't be had.
#[derive(Debug)]
pub(crate) enum Missing {
    /// There is nothing at the path: the pod is gone.
    Gone(String),
    /// What is there is no network namespace; the place of a bind mount is a plain file without it.
    NoNamespace(String),
    /// It can't be opened.
    Failed(String),
}

impl Missing {
    /// The sentence.
    pub(crate) fn text(self) -> String {
        match self {
            Self::Gone(text) | Self::NoNamespace(text) | Self::Failed(text) => text,
        }
    }
}

impl Namespace {
    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// [`Missing`], with the texts of Go plugins.
    pub(crate) fn open(path: &OsStr) -> Result<Self, Missing> {
        let failed = |error: io::Error| match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR | libc::ESRCH) => {
                Missing::Gone(format!("failed to Statfs {path:?}: no such file or directory"))
            }
            _ => Missing::Failed(format!("failed to Statfs {path:?}: {error}")),
        };
        let mut options = File::options();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
        let namespace = Self { file };
        let kind = namespace.kind().map_err(failed)?;
        if kind != libc::CLONE_NEWNET {
            return Err(Missing::NoNamespace(format!(
                "{path:?} is no network namespace: the runtime gives the path of one in CNI_NETNS"
            )));
        }
        Ok(namespace)
    }

    /// The namespace that this process is in outside of [`Self::within`]: that of a socket which it opens, because for a
    /// process that has just begun /proc makes an entry for each part of the path. Without CAP_NET_ADMIN /proc tells it.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn own() -> io::Result<&'static Self> {
        static OWN: OnceLock<Namespace> = OnceLock::new();
        if let Some(own) = OWN.get() {
            return Ok(own);
        }
        let file = match UnixDatagram::unbound().and_then(|socket| namespace_of(socket.as_fd())) {
            Ok(file) => file,
            Err(_) => File::open("/proc/thread-self/ns/net")?,
        };
        Ok(OWN.get_or_init(|| Self { file }))
    }

    /// What two handles of one namespace have in common.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn identity(&self) -> io::Result<(u64, u64)> {
        self.file.metadata().map(|meta| (meta.dev(), meta.ino()))
    }

    #[expect(unsafe_code, reason = "ioctl has no safe form in what is linked already")]
    fn kind(&self) -> io::Result<i32> {
        // SAFETY: NS_GET_NSTYPE takes no argument and touches no memory; on what is no namespace it fails.
        let kind = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::NS_GET_NSTYPE) };
        match kind {
            -1 if io::Error::last_os_error().raw_os_error() == Some(libc::ENOTTY) => Ok(0),
            -1 => Err(io::Error::last_os_error()),
            kind => Ok(kind),
        }
    }

    #[expect(unsafe_code, reason = "setns has no safe form in what is linked already")]
    fn enter(&self) -> io::Result<()> {
        // SAFETY: setns takes two numbers and touches no memory; this process has one thread, so that nothing
        // else goes on in a namespace that it does not expect.
        match unsafe { libc::setns(self.file.as_raw_fd(), libc::CLONE_NEWNET) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Does `work` in the namespace, and returns to the process's [own](Self::own).
    ///
    /// # Errors
    /// When a namespace can't be entered.
    pub(crate) fn within<T>(&self, work: impl FnOnce() -> T) -> io::Result<T> {
        let own = Self::own()?;
        self.enter()?;
        let outcome = work();
        own.enter()?;
        Ok(outcome)
    }
}

#[expect(unsafe_code, reason = "ioctl has no safe form in what is linked already")]
fn namespace_of(socket: BorrowedFd<'_>) -> io::Result<File> {
    // SAFETY: SIOCGSKNS takes no argument and touches no memory.
    let descriptor = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just opened it for this call, so that nothing else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(descriptor) }))
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_namespace_of_this_process_is_that_of_proc() {
        let meta = std::fs::metadata("/proc/thread-self/ns/net").unwrap();
        let own = Namespace::own().unwrap().identity().unwrap();
        assert_eq!(own, (meta.dev(), meta.ino()));
    }

    #[test]
    fn only_a_network_namespace_is_opened() {
        let open = |path: &str| Namespace::open(OsStr::new(path));
        assert!(open("/proc/self/ns/net").is_ok());
        for path in ["/nowhere/at/all", "/etc/passwd/x", "/proc/4194305/ns/net"] {
            assert!(matches!(open(path), Err(Missing::Gone(_))), "{path}");
        }
        for path in ["/proc/self/ns/uts", "/etc/passwd", "/tmp"] {
            assert!(matches!(open(path), Err(Missing::NoNamespace(_))), "{path}");
        }
    }
}
