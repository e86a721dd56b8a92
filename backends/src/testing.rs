//! Network namespaces, nodes, pods and the programs in them, for tests, the demo and measurements.
//!
//! ```text
//!            switch namespace: bridge br0, 172.31.0.254/24, fd31::fe/64
//!            │ port1                               │ port2
//!            │                                     │
//!          eth0 172.31.0.1/24, fd31::1/64        eth0 172.31.0.2/24, fd31::2/64
//!     node namespace                         node namespace
//!            │ cni0 (bridge)                       │ cni0
//!          eth0                                  eth0
//!     pod namespace                          pod namespace
//! ```
//!
//! A second bridge, br1 with 172.31.1.254/24 and fd31:0:0:1::fe/64, comes with the first node that is asked
//! for on the other side of a router.
//!
//! Nothing here has a name outside of this process: a namespace lives as long as one of its threads, so all
//! of it is gone when the process ends, however it ends. The programs `ip`, `ping` and the CNI plugins of the
//! distribution build and probe the bed, because what is under test must not be its own witness.

mod agent;
mod checksums;
mod etcd;
mod fabric;
mod member;
mod namespace;
mod numbers;
pub mod packet;
mod ping;
mod pod;
pub mod policy;
mod process;
mod programs;
mod transfer;

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::netlink::socket;

pub use agent::Agent;
pub use checksums::ChecksumErrors;
pub use etcd::Etcd;
pub use fabric::{Fabric, Node, NodeOptions};
pub use member::{Launch, Member};
pub use namespace::Namespace;
pub use numbers::Numbers;
pub use ping::{PingOptions, Pinger, Pings};
pub use pod::Pod;
pub use process::{NsCommand, Process};
pub use rustix::process::Signal;
pub use transfer::{Transfer, transfer};

/// The workspace's program `name`, built in the same profile as the one that asks: beside it, or for a test
/// one directory above.
pub fn program(name: &str) -> anyhow::Result<PathBuf> {
    let own = env::current_exe().context("this program's own path is unknown")?;
    let candidates = own.ancestors().skip(1).take(2).map(|dir: &Path| dir.join(name));
    let found = candidates.into_iter().find(|path| path.is_file());
    found.with_context(|| format!("no program {name} beside {}: make build", own.display()))
}

/// Time between two looks at what is waited for: at least the first, at most the second.
const POLL: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(250));

/// Repeats a call while it is interrupted, as every wait with a time limit is when this process was stopped and continued.
///
/// # Errors
/// The call's other errors.
pub fn uninterrupted<T>(call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    socket::uninterrupted(call)
}

/// Polls `condition` until it holds; an error with `what` once `limit` has passed.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> anyhow::Result<()> {
    wait_for_some(what, limit, || condition().then_some(()))
}

/// Polls `probe` until it gives a value; an error with `what` once `limit` has passed.
///
/// A probe that takes long, because it runs a program on a machine that is busy or emulated, rests as long as it took: what is waited
/// for needs the processor, too.
pub fn wait_for_some<T>(
    what: &str,
    limit: Duration,
    mut probe: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        let asked = Instant::now();
        if let Some(value) = probe() {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("waited {:.1} s in vain for this: {what}", limit.as_secs_f64());
        }
        thread::sleep(asked.elapsed().clamp(POLL.0, POLL.1));
    }
}
