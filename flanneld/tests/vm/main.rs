//! Agents on kernels that this machine doesn't have: run in a guest by `make test-vm`.
//!
//! Each module needs a guest of its own, which `bench/vm/boot` prepares: the modules' names are the test filters.

#![expect(clippy::unwrap_used, reason = "a test panics where something is not as it should be")]

#[path = "../nodes/bed.rs"]
#[expect(dead_code, reason = "the bed of the node tests has more than these tests use")]
mod bed;
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

/// An emulated machine is some thirty times slower, and this one may do something else meanwhile.
const LIMIT_SECONDS: u64 = 240;

/// Fails unless the guest's kernel is of this release.
fn require_kernel(release: &str) {
    let running = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert!(running.starts_with(release), "this test needs Linux {release}, not {running}: run make test-vm");
}
