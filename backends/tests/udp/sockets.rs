//! Sockets as the kernel knows them: options that no crate has, and those of somebody else in this process.

#![expect(unsafe_code, reason = "setsockopt takes a pointer")]

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use backends::testing::Namespace;

/// Sends without checksums, and takes what has none. The kernel then refuses to segment (EINVAL; net/ipv4/udp.c,
/// `udp_send_skb`, and its counterpart in net/ipv6).
pub(crate) fn without_checksums(socket: &impl AsFd) {
    let yes = 1i32.to_ne_bytes();
    if rustix::net::sockopt::socket_domain(socket).unwrap() == rustix::net::AddressFamily::INET {
        return set(socket, libc::SOL_SOCKET, libc::SO_NO_CHECK, &yes);
    }
    for name in [libc::UDP_NO_CHECK6_TX, libc::UDP_NO_CHECK6_RX] {
        set(socket, libc::SOL_UDP, name, &yes);
    }
}

/// All packets of the socket have a destination options header (RFC 8200 §4.6) that says nothing.
pub(crate) fn with_destination_options(socket: &impl AsFd) {
    // Eight bytes: next header and length by the kernel, and padding of six.
    set(socket, libc::IPPROTO_IPV6, libc::IPV6_DSTOPTS, &[0, 0, 1, 4, 0, 0, 0, 0]);
}

fn set(socket: &impl AsFd, level: i32, name: i32, value: &[u8]) {
    let len = value.len() as libc::socklen_t;
    // SAFETY: the kernel reads as many bytes as the value has, which lives until the call returns.
    let result =
        unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, value.as_ptr().cast(), len) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// The socket of this process that is bound to a UDP port in a namespace; `table` is `udp` or `udp6`.
pub(crate) fn bound(namespace: &Namespace, table: &str, port: u16) -> OwnedFd {
    let text = namespace.run(|| fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap());
    let with_port = |line: &&str| {
        line.split_whitespace().nth(1).is_some_and(|local| local.ends_with(&format!(":{port:04X}")))
    };
    let line = text.lines().find(with_port).unwrap_or_else(|| panic!("nobody has port {port}:\n{text}"));
    let name = format!("socket:[{}]", line.split_whitespace().nth(9).unwrap());
    let is_it = |file: &fs::DirEntry| fs::read_link(file.path()).is_ok_and(|link| link.as_os_str() == &*name);
    let file = fs::read_dir("/proc/self/fd").unwrap().map(Result::unwrap).find(is_it).unwrap();
    let number = file.file_name().to_str().unwrap().parse().unwrap();
    let this = rustix::process::getpid();
    let process = rustix::process::pidfd_open(this, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_getfd(process, number, rustix::process::PidfdGetfdFlags::empty()).unwrap()
}
