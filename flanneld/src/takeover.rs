//! One agent takes the place of another (`--take-over`), as in a roll-out in which the new pod starts before the old one
//! ends: tunnels that live in the process go over with their devices and sockets, so that no packet is lost.
//!
//! Both talk over a socket beside the subnet file. The successor asks; the former agent ends everything but its
//! datapaths, lets go of the lock and the health port, and sends the files of its tunnels. It moves packets until the
//! successor's datapaths are about to start, and then only waits to be ended: if it ended by itself, its supervisor
//! it would start it again, and the two would take turns.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub(crate) mod former;
pub(crate) mod successor;
mod wire;

/// The version of what is said.
const VERSION: u32 = 1;
/// A message that is longer is no message of an agent.
const MAX_MESSAGE: usize = 64 << 10;
/// The successor's last word, and the answer to it.
const STOP: &[u8] = b"stop\n";
const STOPPED: &[u8] = b"stopped\n";

/// What the successor asks.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TakeoverRequest {
    take_over: u32,
    /// Inode of its network namespace: tunnels can't go into another one.
    network_namespace: u64,
}

/// What the former agent answers.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum TakeoverAnswer {
    /// It goes on, for this reason.
    Refused(String),
    /// These are its tunnels; their files come with this message, in the order of the parts.
    Tunnels(Vec<TunnelParts>),
}

/// One tunnel without its files.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TunnelParts {
    name: String,
    index: u32,
    vnet: bool,
    udp: bool,
    queues: usize,
    sockets: Vec<Vec<SocketParts>>,
}

/// One socket without its files: first what it receives from, then what it sends from if that is another one.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SocketParts {
    local: std::net::SocketAddr,
    sender: bool,
}

/// Where the two meet.
pub(crate) fn path(subnet_file: &Path) -> PathBuf {
    let mut path = subnet_file.as_os_str().to_owned();
    path.push(".take-over");
    path.into()
}

/// The inode of this process's network namespace.
fn network_namespace() -> std::io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata("/proc/thread-self/ns/net")?.ino())
}
