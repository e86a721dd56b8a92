//! What pods' packets need of the host besides what this agent makes: settings below `/proc/sys/net`.
//!
//! Pure: which settings matter, and what their values mean. The kernel's side is
//! [`Kernel::sysctls`](crate::Kernel::sysctls).

use std::collections::BTreeMap;
use std::fmt;

use subnet::Family;

use crate::state::name::Name;

/// Values by their paths below `/proc/sys/net`; those that this kernel doesn't have are left out.
pub type Sysctls = BTreeMap<String, String>;

/// Where packets of pods pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passage {
    /// The families that are enabled.
    pub families: Vec<Family>,
    /// The external interface.
    pub underlay: Option<Name>,
    /// Tunnel devices.
    pub tunnels: Vec<Name>,
    /// Bridges with an address in this node's subnets.
    pub bridges: Vec<Name>,
    /// Services are reached by rules for what crosses a bridge (kube-proxy).
    pub services: bool,
}

/// A setting that keeps packets from passing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Its name for an operator, or that of a missing module.
    pub object: String,
    /// What is so, and what follows from it.
    pub cause: String,
    /// What to do.
    pub remedy: String,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.cause, self.remedy)
    }
}

impl Obstacle {
    fn set(key: &str, value: u8, cause: String) -> Self {
        Self { object: dotted(key), cause, remedy: remedy(key, value) }
    }
}

/// The setting that turns forwarding on for a family as a whole.
pub fn forwarding(family: Family) -> &'static str {
    match family {
        Family::V4 => "ipv4/ip_forward",
        Family::V6 => "ipv6/conf/all/forwarding",
    }
}

/// Whether a device takes router advertisements; with 1 not any more once forwarding is on, with 2 still.
pub fn accept_ra(device: &Name) -> String {
    format!("ipv6/conf/{device}/accept_ra")
}

impl Passage {
    /// The settings that matter.
    pub fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> = vec!["ipv4/conf/all/rp_filter".into()];
        for family in &self.families {
            keys.push(forwarding(*family).into());
            keys.push(bridge_calls(*family).into());
        }
        for device in self.devices() {
            keys.push(format!("ipv4/conf/{device}/forwarding"));
            keys.push(format!("ipv4/conf/{device}/rp_filter"));
        }
        keys.push("ipv6/conf/default/disable_ipv6".into());
        keys.extend(self.bridges.iter().map(disable_ipv6));
        keys
    }

    /// What keeps packets from passing, each with its remedy.
    pub fn judge(&self, sysctls: &Sysctls) -> Vec<Obstacle> {
        let is = |key: &str, value: &str| sysctls.get(key).is_some_and(|found| found == value);
        let mut notes = Vec::new();
        for family in &self.families {
            let key = forwarding(*family);
            if is(key, "0") {
                let cause = format!(
                    "{} is 0, so no {family} packet passes between pods and other nodes",
                    dotted(key)
                );
                notes.push(Obstacle::set(key, 1, cause));
            }
        }
        if self.families.contains(&Family::V4) {
            self.judge_devices(&is, sysctls, &mut notes);
        }
        if self.families.contains(&Family::V6) {
            self.judge_ipv6(&is, &mut notes);
        }
        if self.services {
            self.judge_bridge_calls(sysctls, &mut notes);
        }
        notes
    }

    /// Per-device settings of IPv4. IPv6 has none that keep packets from being forwarded: there the
    /// namespace's setting decides alone (net/ipv6/ip6_output.c, `ip6_forward`).
    fn judge_devices(&self, is: &impl Fn(&str, &str) -> bool, sysctls: &Sysctls, notes: &mut Vec<Obstacle>) {
        let on = !is(forwarding(Family::V4), "0");
        for device in self.devices() {
            let key = format!("ipv4/conf/{device}/forwarding");
            if on && is(&key, "0") {
                let cause =
                    format!("{} is 0, so no packet that comes in by {device} passes on", dotted(&key));
                notes.push(Obstacle::set(&key, 1, cause));
            }
        }
        let outer = self.underlay.iter().chain(&self.tunnels);
        for device in outer {
            let key = format!("ipv4/conf/{device}/rp_filter");
            let value = |key: &str| sysctls.get(key).and_then(|text| text.parse::<u8>().ok()).unwrap_or(0);
            // The kernel takes the larger one of the two.
            if value(&key).max(value("ipv4/conf/all/rp_filter")) == 1 {
                let cause = format!(
                    "rp_filter is strict (1) on {device}: packets are dropped whose answers would leave by another \
                     device"
                );
                notes.push(Obstacle::set(&key, 2, cause));
            }
        }
    }

    fn judge_ipv6(&self, is: &impl Fn(&str, &str) -> bool, notes: &mut Vec<Obstacle>) {
        let mut off: Vec<String> = self.bridges.iter().map(disable_ipv6).filter(|key| is(key, "1")).collect();
        if self.bridges.is_empty() && is("ipv6/conf/default/disable_ipv6", "1") {
            off.push("ipv6/conf/default/disable_ipv6".into());
        }
        for key in off {
            let cause =
                format!("{} is 1, so the bridge of the pods has no IPv6 and pods can't use it", dotted(&key));
            notes.push(Obstacle::set(&key, 0, cause));
        }
    }

    fn judge_bridge_calls(&self, sysctls: &Sysctls, notes: &mut Vec<Obstacle>) {
        let lost = "so a pod may not reach a Service whose endpoint is on its own node";
        for family in &self.families {
            let key = bridge_calls(*family);
            match sysctls.get(key).map(String::as_str) {
                None => notes.push(Obstacle {
                    object: "br_netfilter".to_owned(),
                    cause: format!(
                        "the module br_netfilter is not loaded ({} is missing), {lost}",
                        dotted(key)
                    ),
                    remedy: "modprobe br_netfilter, and name it in /etc/modules-load.d".to_owned(),
                }),
                Some("0") => notes.push(Obstacle::set(key, 1, format!("{} is 0, {lost}", dotted(key)))),
                Some(_) => {}
            }
        }
    }

    fn devices(&self) -> impl Iterator<Item = &Name> {
        self.underlay.iter().chain(&self.tunnels).chain(&self.bridges)
    }
}

fn bridge_calls(family: Family) -> &'static str {
    match family {
        Family::V4 => "bridge/bridge-nf-call-iptables",
        Family::V6 => "bridge/bridge-nf-call-ip6tables",
    }
}

fn disable_ipv6(device: &Name) -> String {
    format!("ipv6/conf/{device}/disable_ipv6")
}

/// The name of a setting for an operator. A device's name may have dots itself, so such a setting keeps its
/// slashes, which `sysctl` takes too.
fn dotted(key: &str) -> String {
    let dots = !key.contains('.');
    if dots { format!("net.{}", key.replace('/', ".")) } else { format!("net/{key}") }
}

fn remedy(key: &str, value: u8) -> String {
    format!("sysctl -w {}={value}, and keep it in /etc/sysctl.d", dotted(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passage() -> Passage {
        Passage {
            families: Family::BOTH.to_vec(),
            underlay: Some("eth0".parse().unwrap()),
            tunnels: vec!["flannel.1".parse().unwrap()],
            bridges: vec!["cni0".parse().unwrap()],
            services: true,
        }
    }

    /// A host on which all is well, but for this.
    fn host(but: &[(&str, Option<&str>)]) -> Sysctls {
        let good = |key: String| {
            let value = if key.ends_with("forward") || key.ends_with("forwarding") || key.contains("call") {
                "1"
            } else {
                "0"
            };
            (key, value.to_owned())
        };
        let mut all: Sysctls = passage().keys().into_iter().map(good).collect();
        for (key, value) in but {
            match value {
                Some(value) => drop(all.insert((*key).to_owned(), (*value).to_owned())),
                None => drop(all.remove(*key)),
            }
        }
        all
    }

    #[test]
    fn each_setting_that_stops_packets_is_named_with_its_remedy_and_no_other() {
        assert_eq!(passage().judge(&host(&[])), []);
        for (key, value, expected) in [
            ("ipv4/ip_forward", Some("0"), "sysctl -w net.ipv4.ip_forward=1"),
            ("ipv6/conf/all/forwarding", Some("0"), "sysctl -w net.ipv6.conf.all.forwarding=1"),
            ("ipv4/conf/eth0/forwarding", Some("0"), "sysctl -w net.ipv4.conf.eth0.forwarding=1"),
            ("ipv4/conf/flannel.1/forwarding", Some("0"), "sysctl -w net/ipv4/conf/flannel.1/forwarding=1"),
            ("ipv4/conf/cni0/forwarding", Some("0"), "comes in by cni0"),
            ("ipv4/conf/eth0/rp_filter", Some("1"), "sysctl -w net.ipv4.conf.eth0.rp_filter=2"),
            ("ipv4/conf/flannel.1/rp_filter", Some("1"), "net/ipv4/conf/flannel.1/rp_filter=2"),
            ("ipv6/conf/cni0/disable_ipv6", Some("1"), "sysctl -w net.ipv6.conf.cni0.disable_ipv6=0"),
            ("bridge/bridge-nf-call-iptables", None, "modprobe br_netfilter"),
            ("bridge/bridge-nf-call-iptables", Some("0"), "sysctl -w net.bridge.bridge-nf-call-iptables=1"),
            ("bridge/bridge-nf-call-ip6tables", Some("0"), "net.bridge.bridge-nf-call-ip6tables=1"),
        ] {
            let notes = passage().judge(&host(&[(key, value)]));
            assert!(notes.len() == 1 && notes[0].to_string().contains(expected), "{key}: {notes:?}");
        }
    }

    #[test]
    fn the_larger_rp_filter_decides_and_loose_is_no_obstacle() {
        let all = |value| ("ipv4/conf/all/rp_filter", Some(value));
        assert_eq!(passage().judge(&host(&[all("1")])).len(), 2, "on both outer devices");
        assert!(passage().judge(&host(&[all("2")])).is_empty());
        assert!(passage().judge(&host(&[all("2"), ("ipv4/conf/eth0/rp_filter", Some("1"))])).is_empty());
    }

    #[test]
    fn what_is_of_no_concern_is_not_mentioned() {
        let v4 = Passage { families: vec![Family::V4], services: false, ..passage() };
        let off = [
            ("ipv6/conf/all/forwarding", Some("0")),
            ("ipv6/conf/cni0/disable_ipv6", Some("1")),
            ("bridge/bridge-nf-call-iptables", None),
        ];
        assert!(v4.judge(&host(&off)).is_empty());
        // Without a bridge yet, the default is what it will begin with.
        let early = Passage { bridges: Vec::new(), ..passage() };
        assert_eq!(early.judge(&host(&[("ipv6/conf/default/disable_ipv6", Some("1"))])).len(), 1);
        assert!(passage().judge(&host(&[("ipv6/conf/default/disable_ipv6", Some("1"))])).is_empty());
        // A kernel that says nothing is not accused.
        assert!(Passage { services: false, ..passage() }.judge(&Sysctls::new()).is_empty());
    }
}
