//! Sends datagrams and tells the CPU time that it took; for `tunnel-filter.sh`, which compiles it with `rustc -O`.
//!
//! For each line with a number on the standard input, so many datagrams of 64 bytes go to the address given as the
//! first argument. What the kernel does with them up to the receiver, it does in the time of this thread, since veth has
//! no queue; so the time that the scheduler counted says what each costs, also on a busy machine.

use std::io::{BufRead, Write};
use std::net::UdpSocket;

fn ran() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("a kernel with schedstat");
    stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("nanoseconds")
}

fn main() {
    let target = std::env::args().nth(1).expect("an address with a port");
    let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
    socket.connect(&target).expect("a route");
    for line in std::io::stdin().lock().lines() {
        let count: u32 = line.expect("a line").trim().parse().expect("a number");
        let before = ran();
        for _ in 0..count {
            let _ = socket.send(&[0; 64]);
        }
        // The clock is brought up to date when the thread lets others run.
        std::thread::yield_now();
        println!("{}", ran() - before);
        std::io::stdout().flush().expect("somebody listens");
    }
}
