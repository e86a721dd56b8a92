//! Agents on kernels that this machine doesn't have: run in a guest by `make test-vm`.
//!
//! `bench/vm/test` prepares the guest's kernel for each module of tests: their names are the filters.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

#[path = "../nodes/bed.rs"]
#[expect(dead_code, reason = "the bed of the node tests has more than these tests use")]
mod bed;
mod evidence;
mod exchange;
mod fast_path;
mod ipip;
mod ipvlan;
mod ipvs;
#[path = "../nodes/kubernetes.rs"]
#[expect(dead_code, reason = "as with the bed")]
mod kubernetes;
mod linux_6_1;
mod lossy;
mod transfer;
mod wireguard;
mod without_ipip;
mod without_vxlan;

use std::time::Instant;

use backends::kernel::netlink::Netlink;
use backends::{KernelState, Scope, converge};

/// An emulated machine is some thirty times slower, and this one may do something else meanwhile.
const LIMIT_SECONDS: u64 = 240;

/// Fails unless the guest's kernel is of this release.
fn require_kernel(release: &str) {
    let running = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(running.starts_with(release), "this test needs Linux {release}, not {running}: run make test-vm");
}

/// Makes the kernel be so. The result is how many changes it took.
fn applied(kernel: &mut Netlink, desired: &KernelState, scope: &Scope) -> usize {
    let start = Instant::now();
    let report = converge(kernel, desired, scope).unwrap();
    assert!(report.failed.is_empty() && report.settled, "{:?}", report.failed);
    println!("{} changes in {:?}", report.applied.len(), start.elapsed());
    report.applied.len()
}
