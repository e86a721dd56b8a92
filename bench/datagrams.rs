//! Sends datagrams and tells the CPU time that it took; for `tunnel-filter.sh` and `policy-cost.sh`, which compile it with
//! `rustc -O`.
//!
//! For each line with a number on the standard input, so many datagrams of 64 bytes go to the address given as the
//! first argument: from one socket, or, after a line `fresh NUMBER`, each from a socket of its own. What the kernel does with them up to the receiver, it does in the time of this thread, since veth has
//! no queue; so the time that the scheduler counted says what each costs, also on a busy machine.

use std::io::{BufRead, Write};
use std::net::UdpSocket;

fn ran() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("a kernel with schedstat");
    stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds")
}

fn connected(target: &str) -> UdpSocket {
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    socket.connect(target).expect("a route");
    socket
}

fn main() {
    let target = std::env::args().nth(1).expect("an address with a port");
    let socket = connected(&target);
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line");
        let fresh = line.starts_with("fresh ");
        let count: u32 = line.trim_start_matches("fresh ").trim().parse().expect("a number");
        let before = ran();
        for _ in 0..count {
            let own = fresh.then(|| connected(&target));
            let _ = own.as_ref().unwrap_or(&socket).send(&[0; 64]);
        }
        // The clock is brought up to date when the thread lets others run.
        std::thread::yield_now();
        println!("{}", ran() - before);
        std::io::stdout().flush().expect("somebody listens");
    }
}
