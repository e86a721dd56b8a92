//! Who holds a UDP port or a device that a tunnel needs: asked for only after the kernel refused it.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use super::refusal::errno;
use super::tun::TunFacts;
use super::{LinkFacts, Netlink};
use crate::state::name::Name;
use crate::state::{KernelChange, LinkIdentity, VxlanIdentity};

impl Netlink {
    /// The kernel's refusal with the name of what is in the way, if it is about that.
    pub(super) fn named(&mut self, change: &KernelChange, error: io::Error) -> io::Error {
        let words = match (change, error.raw_os_error()) {
            (KernelChange::AddLink(name, _) | KernelChange::SetLink(name, _), Some(errno::EADDRINUSE)) => {
                let links = self.links().unwrap_or_default();
                port_of(&links, name).map(|port| port_holder(port, &links, name))
            }
            (KernelChange::SetForwarding(name, forwarding), Some(errno::EADDRINUSE)) => {
                let links = self.links().unwrap_or_default();
                Some(port_holder(forwarding.port, &links, name))
            }
            (KernelChange::SetWireguard(name, port, _), Some(errno::EADDRINUSE)) => {
                let links = self.links().unwrap_or_default();
                Some(port_holder(*port, &links, name))
            }
            (KernelChange::AddLink(name, link), Some(errno::EEXIST)) => match &link.identity {
                LinkIdentity::Vxlan(want) => vxlan_rival(&self.links().unwrap_or_default(), name, want),
                LinkIdentity::Ipip(want) => {
                    let links = self.links().unwrap_or_default();
                    ipip_rival(&links, name, want.local)
                }
                _ => None,
            },
            (KernelChange::AddLink(name, link), Some(errno::EBUSY)) if link.identity == LinkIdentity::Tun => {
                Some(self.who_has_tun(name))
            }
            _ => None,
        };
        match words {
            Some(words) => io::Error::new(error.kind(), format!("{error}: {words}")),
            None => error,
        }
    }

    /// What keeps this process from having a TUN device of this name.
    fn who_has_tun(&mut self, name: &Name) -> String {
        let facts = self.find(name).ok().and_then(|message| TunFacts::of(&message));
        if facts.is_some_and(TunFacts::is_for_others) {
            return format!("somebody has made {name} for a user or a group: remove it (ip link del {name})");
        }
        let process = tun_holder(name);
        format!("{process} holds {name}: stop it, or give this network another Backend.Port (of udp)")
    }
}

/// What keeps an IP-in-IP tunnel from being made: a device of its name, or another tunnel for all peers of its address.
fn ipip_rival(links: &[LinkFacts], name: &Name, local: Ipv4Addr) -> Option<String> {
    let named = links.iter().find(|other| other.host.name == *name);
    if let Some(LinkIdentity::Other(kind)) = named.map(|other| &other.tunnel.identity) {
        let kind = if kind.is_empty() { "physical" } else { kind };
        return Some(format!(
            "another program has made {name}, a device of the kind {kind}: remove it (ip link del {name}), or use another \
             backend"
        ));
    }
    let takes_all = |other: &&LinkFacts| matches!(&other.tunnel.identity, LinkIdentity::Ipip(have) if have.local == local);
    let rival = links.iter().filter(|other| other.host.name != *name).find(takes_all)?;
    Some(format!(
        "{} takes the IP-in-IP packets for {local} already: remove it (ip link del {0}), or use another backend",
        rival.host.name
    ))
}

/// Which device keeps the kernel from making a VXLAN device: it has the same VNI, port and family (`vxlan_config_validate`
/// in drivers/net/vxlan/vxlan_core.c). Two devices of this node never have.
fn vxlan_rival(links: &[LinkFacts], name: &Name, want: &VxlanIdentity) -> Option<String> {
    let same = |other: &&LinkFacts| {
        matches!(&other.tunnel.identity, LinkIdentity::Vxlan(have) if (have.vni, have.family) == (want.vni, want.family)
            && (want.port.is_none() || have.port == want.port))
    };
    let rival = links.iter().filter(|other| other.host.name != *name).find(same)?;
    Some(format!(
        "{} has this VNI and port: remove it (ip link del {0}), or configure another Backend.VNI or Backend.Port",
        rival.host.name
    ))
}

fn vxlan_port(link: &LinkFacts) -> Option<u16> {
    match &link.tunnel.identity {
        LinkIdentity::Vxlan(identity) => identity.port,
        _ => None,
    }
}

fn port_of(links: &[LinkFacts], name: &Name) -> Option<u16> {
    links.iter().find(|link| link.host.name == *name).and_then(vxlan_port)
}

/// Who holds a port, and the remedy.
fn port_holder(port: u16, links: &[LinkFacts], own: &Name) -> String {
    let device = links
        .iter()
        .find(|link| link.host.name != *own && link.host.up && vxlan_port(link) == Some(port))
        .map(|link| format!("the VXLAN device {}", link.host.name));
    let holder = device.or_else(|| {
        ["udp", "udp6"].iter().find_map(|table| {
            let text = fs::read_to_string(format!("/proc/thread-self/net/{table}")).ok()?;
            socket_at(&text, port).map(|inode| match inode {
                // The kernel's own sockets belong to no process.
                0 => "a tunnel of the kernel (WireGuard, Geneve, FOU)".to_owned(),
                inode => process_with(|fd| points_to(fd, &format!("socket:[{inode}]")))
                    .unwrap_or_else(|| "a process of another PID namespace".to_owned()),
            })
        })
    });
    let holder = holder.unwrap_or_else(|| "another program".to_owned());
    format!(
        "{holder} has UDP port {port} (ss -ulnp sport = :{port}): stop or remove it, or give this network another \
         Backend.Port (of wireguard: Backend.ListenPort)"
    )
}

/// The inode of the first socket with this local port, in the text of `/proc/net/udp`.
fn socket_at(table: &str, port: u16) -> Option<u64> {
    table.lines().skip(1).find_map(|line| {
        let mut words = line.split_whitespace();
        let local = words.nth(1)?;
        let held = u16::from_str_radix(local.rsplit(':').next()?, 16).ok()?;
        if held == port { words.nth(7)?.parse().ok() } else { None }
    })
}

/// The process that holds the TUN device of this name. Every network namespace may have one of that name.
fn tun_holder(name: &Name) -> String {
    let own = fs::read_link("/proc/thread-self/ns/net").ok();
    let process = process_with(|fd| {
        points_to(fd, "/dev/net/tun") && {
            let info = fd.to_string_lossy().replacen("/fd/", "/fdinfo/", 1);
            let iff = format!("iff:\t{name}\n");
            let process = fd.parent().and_then(Path::parent);
            fs::read_to_string(info).is_ok_and(|text| text.contains(&iff))
                && process.is_some_and(|process| has_thread_in(process, own.as_deref()))
        }
    });
    process.unwrap_or_else(|| "a process of another PID or network namespace".to_owned())
}

/// Whether a thread of `process` is in this network namespace; each of them can be in another one.
fn has_thread_in(process: &Path, namespace: Option<&Path>) -> bool {
    let threads = fs::read_dir(process.join("task")).into_iter().flatten().flatten();
    threads
        .map(|thread| thread.path().join("ns/net"))
        .any(|link| fs::read_link(link).ok().as_deref() == namespace)
}

fn points_to(fd: &Path, target: &str) -> bool {
    fs::read_link(fd).is_ok_and(|to| to.as_os_str() == target)
}

/// The first process with such a file, in words.
fn process_with(is_it: impl Fn(&Path) -> bool) -> Option<String> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    for process in processes {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        if files.flatten().any(|file| is_it(&file.path())) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("the process {} (pid {pid})", name.trim()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use subnet::{Family, Mac};

    use super::*;
    use crate::state::host::HostLink;
    use crate::state::{Link, LinkSettings};

    #[test]
    fn a_vxlan_device_is_in_the_way_of_one_of_the_same_vni_port_and_family() {
        let identity = |family, port| VxlanIdentity {
            vni: 1,
            port: Some(port),
            gbp: false,
            family,
            foreign_modes: false,
        };
        let link = |name: &str, identity| {
            let host = HostLink {
                index: 7,
                name: name.parse().unwrap(),
                altnames: Vec::new(),
                mtu: 1450,
                up: true,
                carrier: true,
                bridge: false,
                controller: None,
                mac: Mac([2, 0, 0, 0, 0, 7]),
                addresses: Vec::new(),
            };
            let tunnel =
                Link { identity: LinkIdentity::Vxlan(identity), settings: LinkSettings::plain(1450) };
            LinkFacts { host, tunnel }
        };
        let links = [
            link("flannel-v6.1", identity(Family::V6, 8472)),
            link("other-port", identity(Family::V4, 4789)),
            link("foo", identity(Family::V4, 8472)),
        ];
        let rival = |links: &[LinkFacts], name: &str, want| vxlan_rival(links, &name.parse().unwrap(), &want);
        let named = rival(&links, "flannel.1", identity(Family::V4, 8472)).unwrap();
        assert!(named.contains("(ip link del foo)"), "{named}");
        assert_eq!(rival(&links[..2], "flannel.1", identity(Family::V4, 8472)), None);
        let v6 = rival(&links[..1], "flannel-v6.1", identity(Family::V6, 8472));
        assert_eq!(v6, None, "the device itself");
    }

    #[test]
    fn a_socket_is_found_by_its_port_in_the_kernels_table() {
        let table = "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops\n\
            \x20 101: 0100007F:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 17311 2 0000000000000000 0\n\
            \x20 211: 00000000:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 0 2 0000000000000000 0\n";
        assert_eq!(socket_at(table, 53), Some(17311));
        assert_eq!(socket_at(table, 8472), Some(0));
        assert_eq!(socket_at(table, 54), None);
        assert_eq!(socket_at("nonsense\n:\nx y:z", 53), None);
    }
}
