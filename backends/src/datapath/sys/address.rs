//! Addresses as the kernel takes and gives them.

use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An address of either family; all of it is initialized.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) union Address {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl Address {
    /// What the kernel reads and writes of it for a socket of this family.
    pub(super) fn len(v6: bool) -> libc::socklen_t {
        let len = if v6 { size_of::<libc::sockaddr_in6>() } else { size_of::<libc::sockaddr_in>() };
        len as libc::socklen_t
    }

    pub(super) fn new(to: IpAddr, port: u16) -> Self {
        // SAFETY: all-zero addresses are valid values of these plain C structures.
        let mut address: Self = unsafe { mem::zeroed() };
        match to {
            IpAddr::V4(to) => {
                address.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: port.to_be(),
                    sin_addr: libc::in_addr { s_addr: to.to_bits().to_be() },
                    sin_zero: [0; 8],
                };
            }
            IpAddr::V6(to) => {
                address.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: port.to_be(),
                    sin6_flowinfo: 0,
                    sin6_addr: libc::in6_addr { s6_addr: to.octets() },
                    sin6_scope_id: 0,
                };
            }
        }
        address
    }

    /// The port, as the kernel has written it for a socket of this family.
    pub(super) fn port(&self, v6: bool) -> u16 {
        if v6 {
            // SAFETY: both structures are plain numbers, and all of the union was initialized.
            u16::from_be(unsafe { self.v6 }.sin6_port)
        } else {
            // SAFETY: as above.
            u16::from_be(unsafe { self.v4 }.sin_port)
        }
    }

    /// The host's address, as the kernel has written it for a socket of this family.
    pub(super) fn ip(&self, v6: bool) -> IpAddr {
        if v6 {
            // SAFETY: both structures are plain numbers, and all of the union was initialized.
            IpAddr::V6(Ipv6Addr::from(unsafe { self.v6 }.sin6_addr.s6_addr))
        } else {
            // SAFETY: as above.
            IpAddr::V4(Ipv4Addr::from_bits(u32::from_be(unsafe { self.v4 }.sin_addr.s_addr)))
        }
    }
}
