//! What a refusal of the kernel means, and what an operator can do about it.

use std::io;

use crate::kernel::KernelError;
use crate::state::name::Name;
use crate::state::{KernelChange, Link, LinkIdentity, LinkPatch};

/// What the kernel lets a device for IPv4 have at least.
const SMALLEST_MTU: u32 = 68;

/// Files a failed change, unless the kernel only says that things are so already.
pub(super) fn record(
    changes: &[KernelChange],
    failures: &mut Vec<(usize, KernelError)>,
    position: usize,
    outcome: io::Result<()>,
) {
    let change = &changes[position];
    if let Err(source) = outcome
        && !already_so(change, &source)
    {
        let source = explained(change, source);
        let (object, device) = (change.object(), change.device());
        let refused = KernelError::Refused { object, device, change: change.to_string(), source };
        failures.push((position, refused));
    }
}

/// What the kernel means where its errno alone leaves an operator in the dark, and what to do.
fn explained(change: &KernelChange, error: io::Error) -> io::Error {
    let remedy = match (change, error.raw_os_error()) {
        (_, Some(errno::EPERM)) => "flanneld needs CAP_NET_ADMIN in this network namespace",
        (KernelChange::AddLink(name, Link { identity: LinkIdentity::Tun, .. }), Some(number)) => {
            return io::Error::new(error.kind(), tun_remedy(name, number, &error));
        }
        (KernelChange::SetForwarding(_, forwarding), Some(errno::EADDRINUSE)) => {
            let sockets: Vec<String> = forwarding.sockets().map(|socket| socket.to_string()).collect();
            let words = format!(
                "{error}: another process has {} (ss -ulnp): stop it, or give this network another Backend.Port (of wireguard: Backend.ListenPort)",
                sockets.join(" or ")
            );
            return io::Error::new(error.kind(), words);
        }
        (KernelChange::RenameLink(..), Some(errno::EBUSY)) => {
            "this kernel can't rename a device that is up (Linux 6.2 and later can), so the port can't change without an \
             interruption: restart flanneld on all nodes with the new configuration"
        }
        (
            KernelChange::AddLink(_, Link { identity: LinkIdentity::Wireguard, .. }),
            Some(errno::EOPNOTSUPP),
        ) => {
            "this kernel has no WireGuard: load the module wireguard (modprobe wireguard; Linux 5.6 and later have it), \
             or let flanneld encrypt with Backend.Userspace: \"auto\""
        }
        (KernelChange::AddLink(_, Link { identity: LinkIdentity::Ipip(_), .. }), Some(errno::EOPNOTSUPP)) => {
            "this kernel can't make ipip devices: load the module ipip (modprobe ipip; Debian and Ubuntu have it in the \
             package of the kernel, Fedora in kernel-modules-extra, OpenWrt in kmod-ipip), use the vxlan or host-gw \
             backend, or allow this node the udp backend with Backend.Fallback: \"udp\""
        }
        (KernelChange::AddLink(..), Some(errno::EOPNOTSUPP)) => {
            "this kernel can't make VXLAN devices: load the module vxlan (modprobe vxlan; Ubuntu for Raspberry Pi has it in \
             the package linux-modules-extra-raspi, OpenWrt in kmod-vxlan), use the host-gw backend, or allow this node \
             the udp backend with Backend.Fallback: \"udp\""
        }
        (KernelChange::AddLink(_, Link { identity: LinkIdentity::Ipip(_), .. }), Some(errno::EEXIST)) => {
            "another ipip device has this local address (ip -d link show type ipip), or another device this name: \
             remove it"
        }
        (KernelChange::AddLink(..), Some(errno::EEXIST)) => {
            "another device has this VNI and port (ip -d link show type vxlan): remove it, or configure another \
             Backend.VNI or Backend.Port"
        }
        (KernelChange::SetLink(name, LinkPatch { mtu: Some(mtu), .. }), Some(errno::EINVAL)) => {
            return io::Error::new(error.kind(), mtu_remedy(name, *mtu, &error));
        }
        (KernelChange::AddAddress(name, net), Some(errno::EACCES)) if net.addr().is_ipv6() => {
            let words = format!(
                "{error}: IPv6 is disabled on {name} and flanneld can't write below /proc/sys: set \
                 net.ipv6.conf.default.disable_ipv6 and net/ipv6/conf/{name}/disable_ipv6 to 0 with sysctl"
            );
            return io::Error::new(error.kind(), words);
        }
        (KernelChange::SetRoute(route), Some(errno::ENETUNREACH)) if !route.onlink => {
            "the next hop is on no link of this host: host-gw needs all nodes on one link, vxlan does not"
        }
        _ => return error,
    };
    io::Error::new(error.kind(), format!("{error}: {remedy}"))
}

/// Why a device can't have an MTU, and what to do.
fn mtu_remedy(name: &Name, mtu: u32, error: &io::Error) -> String {
    if mtu < SMALLEST_MTU {
        return format!(
            "{error}: the smallest MTU of a device is {SMALLEST_MTU}, with IPv6 1280, and {name} would have {mtu}: raise \
             Backend.MTU, or the MTU of the external interface"
        );
    }
    format!("{error}: {name} can't have an MTU of {mtu}: give it another one with Backend.MTU")
}

/// Why a TUN device can't be made, and what to do.
fn tun_remedy(name: &Name, number: i32, error: &io::Error) -> String {
    let remedy = match number {
        errno::EBUSY => format!("another process holds {name}: stop it (another flanneld?)"),
        errno::ENOENT | errno::ENODEV | errno::ENXIO => {
            "there is no /dev/net/tun: load the module tun, and mount /dev/net/tun into the container"
                .to_owned()
        }
        errno::EACCES | errno::EPERM => {
            "/dev/net/tun can't be used: flanneld needs CAP_NET_ADMIN, and the container needs the device \
             (a privileged one, or a device plugin)"
                .to_owned()
        }
        errno::EINVAL => format!("{name} is no TUN device with one queue: delete it (ip link del {name})"),
        _ => "udp, and wireguard in process, need a TUN device".to_owned(),
    };
    format!("{error}: {remedy}")
}

pub(super) mod errno {
    pub(in super::super) const EPERM: i32 = 1;
    pub(in super::super) const ENOENT: i32 = 2;
    pub(in super::super) const ESRCH: i32 = 3;
    pub(in super::super) const ENXIO: i32 = 6;
    pub(in super::super) const EACCES: i32 = 13;
    pub(in super::super) const EBUSY: i32 = 16;
    pub(in super::super) const EEXIST: i32 = 17;
    pub(in super::super) const ENODEV: i32 = 19;
    pub(in super::super) const EINVAL: i32 = 22;
    pub(in super::super) const ENOSYS: i32 = 38;
    pub(in super::super) const EOPNOTSUPP: i32 = 95;
    pub(in super::super) const EAFNOSUPPORT: i32 = 97;
    pub(in super::super) const EADDRINUSE: i32 = 98;
    pub(in super::super) const EADDRNOTAVAIL: i32 = 99;
    pub(in super::super) const ENETUNREACH: i32 = 101;
}

fn already_so(change: &KernelChange, error: &io::Error) -> bool {
    let Some(number) = error.raw_os_error() else { return false };
    match change {
        KernelChange::AddAddress(..) | KernelChange::AddBlackhole(..) => number == errno::EEXIST,
        KernelChange::DelLink(..)
        | KernelChange::DelAddress(..)
        | KernelChange::DelFdb(..)
        | KernelChange::DelNeighbour(..)
        | KernelChange::DelRoute(..)
        | KernelChange::DelNexthop(..)
        | KernelChange::DelBlackhole(..) => {
            matches!(number, errno::ENOENT | errno::ESRCH | errno::ENODEV | errno::EADDRNOTAVAIL)
        }
        KernelChange::AddLink(..)
        | KernelChange::RenameLink(..)
        | KernelChange::SetLink(..)
        | KernelChange::SetForwarding(..)
        | KernelChange::SetWireguard(..)
        | KernelChange::SetWireguardPeers(..)
        | KernelChange::DelForwarding(..)
        | KernelChange::SetFdb(..)
        | KernelChange::SetNeighbour(..)
        | KernelChange::SetRoute(..) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_mtu_that_the_kernel_refuses_is_named_with_the_smallest_one_and_the_remedy() {
        let refused = |mtu| {
            let change = KernelChange::SetLink(
                "flannel.1".parse().unwrap(),
                LinkPatch { mtu: Some(mtu), ..LinkPatch::default() },
            );
            explained(&change, io::Error::from_raw_os_error(errno::EINVAL)).to_string()
        };
        let small = refused(50);
        for word in
            ["Invalid argument", "smallest MTU", "68", "1280", "flannel.1 would have 50", "raise Backend.MTU"]
        {
            assert!(small.contains(word), "{word}: {small}");
        }
        let other = refused(100_000);
        assert!(other.contains("can't have an MTU of 100000") && !other.contains("smallest"), "{other}");
    }
}
