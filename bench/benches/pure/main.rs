//! Micro-benchmarks of what is pure: how long decisions take, without the kernel.

mod reconcile;

// The udp backend's are to come here, a module each for routing, checksums, splitting and merging.

fn main() {
    divan::main();
}
