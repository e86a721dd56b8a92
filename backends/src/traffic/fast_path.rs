//! Which flows of pods skip bridge, routing and rules of this node, and on which kernels that is done: the decisions,
//! without a mechanism.

use std::collections::BTreeSet;
use std::fmt;

use ipnet::IpNet;
use subnet::Family;

use crate::host::{HostLink, HostView};
use crate::state::name::Name;
use subnet::env_file::gateway;

/// What the fast path of one family consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FastPath {
    /// The networks of pods, all of one family: the one in force first, then those that are being left.
    pub networks: Vec<IpNet>,
    /// The devices between nodes: the external interface and the tunnels.
    pub outer: BTreeSet<Name>,
    /// The host's ends of pods' links.
    pub pods: BTreeSet<Name>,
    /// Only packets of clients add a flow. Network policies judge connections by them; and replies from behind IPVS have the
    /// address of the pod here, which a flow would leave as it is.
    pub requests_only: bool,
    /// What of it this kernel can do.
    pub abilities: Abilities,
}

/// What kernels with flowtables can do, or can't.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abilities {
    /// Chains at the forward hook can ask whether the route to a packet's source leaves by the device that it came in by (6.1 and
    /// 6.18 can). Without that, packets that come in add no flow.
    pub reverse_path: bool,
    /// There are quotas, which notify once when they are used up. Without them, the fast path is always armed.
    pub quotas: bool,
}

impl Abilities {
    /// All combinations, those with more before those with less.
    pub(crate) const ALL: [Self; 4] = [
        Self { reverse_path: true, quotas: true },
        Self { reverse_path: false, quotas: true },
        Self { reverse_path: true, quotas: false },
        Self { reverse_path: false, quotas: false },
    ];
}

/// After "the kernel takes the table only".
impl fmt::Display for Abilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.reverse_path, self.quotas) {
            (true, true) => "with all that a fast path can have",
            (true, false) => "without a quota (module nft_quota), so it is always armed",
            (false, true) => {
                "without the look for the way back (fib at the forward hook), so packets that come in add no flow"
            }
            (false, false) => {
                "without a quota (module nft_quota) and without the look for the way back (fib at the forward hook), so it is \
                 always armed, and packets that come in add no flow"
            }
        })
    }
}

impl Default for Abilities {
    fn default() -> Self {
        Self::ALL[0]
    }
}

/// Whether devices are in the flowtable. Every packet that arrives at them costs a look then, which is worth it only while there are
/// connections of many packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No device is, until a connection has many packets.
    Waiting,
    /// They are, until no connection is in the flowtable.
    Armed,
}

/// Before ", because" and a cause.
impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Waiting => "waits for long connections",
            Self::Armed => "armed",
        })
    }
}

/// What the kernel tells of a fast path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    /// There is none.
    Nothing,
    /// One that waits, and no connection has had many packets.
    ShortConnections,
    /// One that waits, and a connection has had many packets.
    LongConnection,
    /// One that is armed.
    Armed,
    /// One that is armed, and no connection is in its flowtable.
    ArmedForNothing,
}

impl Phase {
    /// The phase that follows from what was seen.
    pub(crate) fn after(seen: Seen, abilities: Abilities) -> Self {
        match seen {
            _ if !abilities.quotas => Self::Armed,
            Seen::LongConnection | Seen::Armed => Self::Armed,
            Seen::Nothing | Seen::ShortConnections | Seen::ArmedForNothing => Self::Waiting,
        }
    }
}

impl FastPath {
    /// The family of its addresses.
    pub(crate) fn family(&self) -> Option<Family> {
        self.networks.first().map(|network| Family::of(network.addr()))
    }
}

impl HostView {
    /// The devices that lead to pods of these subnets: the ports of the bridge that has a gateway's address, or devices
    /// that have it themselves.
    pub fn pod_devices(&self, subnets: &[IpNet]) -> BTreeSet<Name> {
        let gateways: Vec<_> = subnets.iter().map(|subnet| gateway(*subnet)).collect();
        let serves =
            |link: &HostLink| link.addresses.iter().any(|found| gateways.contains(&found.net.addr()));
        let (bridges, single): (Vec<_>, Vec<_>) =
            self.links.values().filter(|link| serves(link)).partition(|link| link.bridge);
        let bridges: BTreeSet<u32> = bridges.into_iter().map(|link| link.index).collect();
        let is_port = |link: &&HostLink| link.controller.is_some_and(|index| bridges.contains(&index));
        self.links
            .values()
            .filter(is_port)
            .chain(single)
            .filter(|link| link.up)
            .map(|link| link.name)
            .collect()
    }
}

/// The first patch level of each stable series with flowtables that work for pods on a bridge. Linux 5.13 is the first that finds the
/// port of a bridge (before, flows of pods are added and never hit); until these patch levels each flow that leaves through a
/// port keeps a reference to its route, so that a device can't be deleted any more (`unregister_netdevice: waiting for …`).
const SERIES: [((u32, u32), u32); 4] = [((5, 15), 150), ((6, 1), 80), ((6, 6), 19), ((6, 7), 7)];
/// All later ones have it.
const FIRST_WHOLE: (u32, u32) = (6, 8);
/// Reported to stop TCP connections with translated addresses (firewalld issue 1555).
const BROKEN: (u32, u32) = (6, 19);

/// Why the fast path is not used on a kernel of this release (`uname -r`), if it isn't. Distributions that leave the patch level
/// out there say it elsewhere: `more` is such text (`uname -v`, `/proc/version_signature`).
///
/// # Errors
/// A sentence with the remedy.
pub fn suits_release(release: &str, more: &str) -> Result<(), String> {
    let [(major, minor, patch), ..] = versions(release)[..] else { return Err(unsuited(release)) };
    let series = (major, minor);
    let of_series = versions(more).into_iter().filter(|found| (found.0, found.1) == series);
    let patch = of_series.map(|(.., patch)| patch).max().unwrap_or(0).max(patch);
    if series == BROKEN {
        return Err(format!(
            "Linux {release} is reported to stop TCP connections with translated addresses in flowtables, so pods' flows take \
             the ordinary path: use another kernel, or --fast-path=on if this one is mended"
        ));
    }
    let floor = SERIES.iter().find(|(of, _)| *of == series).map(|(_, floor)| *floor);
    let whole = series >= FIRST_WHOLE || floor.is_some_and(|floor| patch >= floor);
    if whole { Ok(()) } else { Err(unsuited(release)) }
}

fn unsuited(release: &str) -> String {
    format!(
        "Linux {release} has faults in flowtables for pods on a bridge, so pods' flows take the ordinary path: it takes \
         5.15.150, 6.1.80, 6.6.19, 6.7.7 or 6.8, or --fast-path=on if the distribution has mended this one"
    )
}

/// All words that begin with a version of three numbers; the third is 0 where there is none.
fn versions(text: &str) -> Vec<(u32, u32, u32)> {
    let version = |word: &str| {
        let mut numbers = word.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().ok());
        let (major, minor) = (numbers.next()??, numbers.next()??);
        Some((major, minor, numbers.next().flatten().unwrap_or(0)))
    };
    text.split_whitespace().filter(|word| word.contains('.')).filter_map(version).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_with_faults_in_flowtables_takes_the_ordinary_path_and_says_which_would_do() {
        let debian = "#1 SMP PREEMPT_DYNAMIC Debian 6.1.164-1 (2026-03-09)";
        for (good, more) in [
            ("5.15.150", ""),
            ("6.1.80-1-amd64", ""),
            ("6.1.0-44-amd64", debian),
            ("5.15.0-190-generic", "#200-Ubuntu SMP Fri Feb 6\nUbuntu 5.15.0-190.200-generic 5.15.160"),
            ("6.6.19", ""),
            ("6.8.0-41-generic", ""),
            ("6.18.44-fc-v782", ""),
            ("7.0.1", ""),
        ] {
            assert_eq!(suits_release(good, more), Ok(()), "{good}");
        }
        for (bad, more) in [
            ("4.19.0", ""),
            ("5.4.300", ""),
            ("5.10.0-30-amd64", "#1 SMP Debian 5.10.218-1 (2024-06-01)"),
            ("5.13.1", ""),
            ("5.15.149", debian),
            ("5.15.0-101-generic", "Ubuntu 5.15.0-101.111-generic 5.15.143"),
            ("6.1.79", ""),
            ("6.1.0-18-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.76-1 (2024-02-01)"),
            ("6.5.13", ""),
            ("6.19.3", ""),
            ("", debian),
            ("x.y.z", ""),
        ] {
            let why = suits_release(bad, more).unwrap_err();
            assert!(why.contains(bad) && why.contains("--fast-path=on"), "{why}");
        }
    }

    fn link(index: u32, name: &str, controller: Option<u32>, address: Option<&str>) -> HostLink {
        let address = address.map(|net| crate::host::HostAddr {
            net: net.parse().unwrap(),
            deprecated: false,
            permanent: true,
            temporary: false,
        });
        HostLink {
            index,
            name: name.parse().unwrap(),
            altnames: Vec::new(),
            mtu: 1500,
            up: true,
            carrier: true,
            bridge: name.starts_with("br") || name == "cni0",
            controller,
            mac: subnet::Mac([0; 6]),
            addresses: address.into_iter().collect(),
        }
    }

    #[test]
    fn what_a_kernel_lacks_and_what_follows_is_said_in_words() {
        for abilities in Abilities::ALL {
            let said = abilities.to_string();
            assert_eq!(
                said.contains("nft_quota") && said.contains("always armed"),
                !abilities.quotas,
                "{said}"
            );
            assert_eq!(
                said.contains("fib") && said.contains("add no flow"),
                !abilities.reverse_path,
                "{said}"
            );
            assert!(!said.contains(['{', ':']), "{said}");
        }
    }

    #[test]
    fn a_long_connection_arms_it_and_only_a_flowtable_without_connections_disarms_it() {
        let all = Abilities::default();
        for (seen, phase) in [
            (Seen::Nothing, Phase::Waiting),
            (Seen::ShortConnections, Phase::Waiting),
            (Seen::LongConnection, Phase::Armed),
            (Seen::Armed, Phase::Armed),
            (Seen::ArmedForNothing, Phase::Waiting),
        ] {
            assert_eq!(Phase::after(seen, all), phase, "{seen:?}");
            let without = Abilities { quotas: false, ..all };
            assert_eq!(Phase::after(seen, without), Phase::Armed, "nothing would tell of a long connection");
        }
    }

    #[test]
    fn devices_of_pods_are_ports_of_the_bridge_with_the_gateway_and_links_that_have_it_themselves() {
        let mut host = HostView::default();
        let mut down = link(9, "veth9", Some(2), None);
        down.up = false;
        for link in [
            link(1, "eth0", None, Some("192.0.2.1/24")),
            link(2, "cni0", None, Some("10.244.1.1/24")),
            link(3, "veth3", Some(2), None),
            link(4, "veth4", Some(5), None),
            link(5, "br-other", None, Some("10.99.1.1/24")),
            link(6, "ptp6", None, Some("10.244.1.1/32")),
            link(7, "flannel.1", None, Some("10.244.1.0/32")),
            down,
        ] {
            host.links.insert(link.index, link);
        }
        let pods = host.pod_devices(&["10.244.1.0/24".parse().unwrap()]);
        assert_eq!(pods.iter().map(Name::as_str).collect::<Vec<_>>(), ["ptp6", "veth3"]);
        assert!(host.pod_devices(&[]).is_empty());
    }
}
