//! Micro-benchmarks of what is pure: how long decisions take, without the kernel.

mod datapath;
mod reconcile;

/// Peers of a node.
const SIZES: [u32; 3] = [100, 1000, 5000];

fn main() {
    divan::main();
}
